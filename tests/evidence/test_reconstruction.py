"""Reconstruction identifies a patient where nothing is protected, and no better than the prior under strong noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from cohorts import blob_patient
from fedlab.core.convolution import FastConvolutions
from fedlab.core.regions import labels_to_regions
from fedlab.core.weights import trainable
from fedlab.evidence.inversion import (
    _distance,
    _gradients,
    invert_update,
    one_step_update,
    patch_net,
    tumour_patch,
)
from fedlab.evidence.reconstruction import (
    Reconstruction,
    channel_correlations,
    similarity,
    tissue_prior,
)
from fedlab.training.defaults import DiceBCE


def smooth_patch(seed: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth waves, different in each channel and patient, and the same bright block in all of them."""
    rng = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*[torch.linspace(0, 1, size)] * 3, indexing="ij")
    image = torch.stack([sum(torch.sin(6.3 * float(torch.rand((), generator=rng)) + (3 + 4 * float(torch.rand(
        (), generator=rng))) * axis) for axis in axes) for _ in range(4)])
    label = torch.zeros(size, size, size, dtype=torch.uint8)
    label[2:7, 2:7, 2:7], label[3:6, 3:6, 3:6], label[4, 4, 4] = 2, 1, 4
    image = image + 0.8 * (label > 0)
    return (image - image.mean()) / image.std(), labels_to_regions(label)


PATCHES, PUBLIC = [smooth_patch(seed) for seed in range(5)], [smooth_patch(seed) for seed in range(100, 119)]
ATTACK = Reconstruction(steps=100, lr=0.1)


def updates(model: nn.Module, noise: float = 0.0) -> list[dict[str, torch.Tensor]]:
    rng = torch.Generator().manual_seed(0)
    found = []
    for image, regions in PATCHES:
        update = one_step_update(model, image, regions)
        std = noise * update.norm()
        found.append({name: t + std * torch.randn(t.shape, generator=rng) for name, t in update.delta.items()})
    return found


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return patch_net(width=8)


def test_patients_are_identified_without_protection(model):
    found = ATTACK(model, updates(model), PATCHES, public=PUBLIC)
    assert found.identified.value == 1.0 and found.ranks == [1] * 5
    assert found.identified.low == pytest.approx(0.025**0.2)  # Clopper and Pearson, 5 of 5
    assert found.identified.is_clear
    assert found.correlation.low > found.correlation.chance and found.similarity.low > found.similarity.chance
    assert found.identified.measure == "patients identified among 20" and found.identified.trials == 5
    assert repr(ATTACK) in str(found) and "n = 5" in found._repr_html_()


def test_under_strong_noise_patients_are_not_identified(model):
    found = ATTACK(model, updates(model, noise=1.0), PATCHES, public=PUBLIC)
    assert not found.identified.is_clear
    assert found.correlation.low <= found.correlation.chance


@pytest.mark.parametrize("objective, per_layer", [("cosine", False), ("euclidean", True), ("euclidean", False)])
def test_every_objective_comes_closer(model, objective, per_layer):
    image, regions = PATCHES[0]
    delta = one_step_update(model, image, regions, lr=0.3).delta
    found = invert_update(delta, model=model, regions=regions, steps=60, objective=objective, per_layer=per_layer,
                          local_lr=0.3)
    first = invert_update(delta, model=model, regions=regions, steps=1, objective=objective, per_layer=per_layer,
                          local_lr=0.3)
    assert found.distance < first.distance / 3
    assert channel_correlations(found.image, image).mean() > channel_correlations(first.image, image).mean() + 0.15


class Watched(nn.Module):
    """A network that notes within which context it is called."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.modes = inner, set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.modes |= {type(mode) for mode in _get_current_function_mode_stack()}
        return self.inner(x)


def test_the_network_is_called_as_everywhere_else():
    """One patch falls off torch's fast path otherwise: `fedlab.core.hardware.calling` holds for steps and attacks."""
    (image, regions), watched = PATCHES[0], Watched(patch_net(width=4))
    update = one_step_update(watched, image, regions)
    assert watched.modes == {FastConvolutions}
    watched.modes.clear()
    invert_update(update.delta, model=watched, regions=regions, steps=1)
    assert watched.modes == {FastConvolutions}


@pytest.mark.parametrize("objective, per_layer", [("cosine", False), ("cosine", True), ("euclidean", True)])
@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_of_distances_are_those_of_float64(objective, per_layer, steps):
    """Second derivatives through narrow, strided, unfolded and upsampled layers; float64 is computed by torch alone."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(4, 8, 3, padding=1), nn.Softplus(), nn.Conv3d(8, 5, 3, stride=2, padding=1),
                            nn.GroupNorm(1, 5), nn.Upsample(scale_factor=2, mode="trilinear"), nn.Conv3d(5, 3, 1))
    (image, regions), (guess, _) = PATCHES[0], PATCHES[1]

    def slope(dtype: torch.dtype) -> torch.Tensor:
        params = {name: p.detach().to(dtype) for name, p in trainable(network).items()}
        patch, target = guess[None].to(dtype).requires_grad_(), regions[None].to(dtype)
        seen, found = (_gradients(network, params, one, target, DiceBCE(), keep=True, steps=steps, lr=0.1)
                       for one in (image[None].to(dtype), patch))
        distance = _distance(found, [g.detach() for g in seen], objective, per_layer=per_layer)
        return torch.autograd.grad(distance, [patch])[0].double()

    exact = slope(torch.float64)
    assert float(exact.abs().max()) > 0
    torch.testing.assert_close(slope(torch.float32), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


def test_the_truth_explains_an_update_of_several_steps(model):
    """Simulated training is that of the site: at the true patch the distance vanishes."""
    image, regions = PATCHES[0]
    update = one_step_update(model, image, regions, lr=0.5, steps=3)
    weights = {name: p.detach().clone() for name, p in trainable(model).items()}
    own = patch_net(width=8)
    optimiser = torch.optim.SGD(own.parameters(), lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        DiceBCE()(own(image[None]), regions[None]).backward()
        optimiser.step()
    for name, p in own.named_parameters():
        torch.testing.assert_close(update.delta[name], p.detach() - weights[name], rtol=1e-3, atol=1e-6)
    assert update.steps == 3
    settings = dict(model=model, regions=regions, objective="euclidean", local_lr=0.5, smoothness=0.0, limit=10.0)
    near = [invert_update(update.delta, steps=1, local_steps=count, start=image, **settings).distance  # noise of 0.1
            for count in (3, 1)]
    assert near[0] < 1e-3 and near[1] == pytest.approx(4 / 9, abs=0.1)  # one step explains a third of the length
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_the_prior_is_the_mean_of_each_tissue():
    regions = torch.zeros(3, 2, 1, 1)
    regions[1, 0] = 1  # oedema in the first voxel: whole tumour only
    public = [(torch.tensor(values).view(1, 2, 1, 1), regions) for values in ([1.0, 5.0], [3.0, 7.0])]
    assert tissue_prior(public, regions).flatten().tolist() == [2.0, 6.0]
    other = torch.zeros(3, 2, 1, 1)
    other[0, 0] = 1  # a tissue that no public patch has: the mean over all
    assert tissue_prior(public, other).flatten().tolist() == [4.0, 6.0]


def test_scores_by_hand():
    truth = torch.randn(2, 7, 7, 7, generator=torch.Generator().manual_seed(0))
    # A channel's mean and scale count for nothing, a sign does.
    assert channel_correlations(3 * truth + torch.tensor([9.0, -9.0]).view(2, 1, 1, 1), truth).tolist() == (
        pytest.approx([1.0, 1.0]))
    assert channel_correlations(torch.stack([-truth[0], torch.zeros(7, 7, 7)]), truth).tolist() == (
        pytest.approx([-1.0, 0.0]))
    assert similarity(3 * truth + 5, truth) == pytest.approx(1.0)
    assert abs(similarity(torch.randn(2, 7, 7, 7, generator=torch.Generator().manual_seed(1)), truth)) < 0.3


def test_patches_are_cut_around_the_tumour_and_bad_input_is_refused(model):
    patient = blob_patient("p", seed=0)  # of 16³ voxels, its tumour between 3 and 12
    image, regions = tumour_patch(patient, 8)
    assert torch.equal(image, patient.image[:, 3:11, 3:11, 3:11]) and regions[1].all()
    delta = one_step_update(model, *PATCHES[0]).delta
    with pytest.raises(ValueError, match="as many patches"):
        ATTACK(model, [delta], PATCHES, public=PUBLIC)
    with pytest.raises(ValueError, match="start has shape"):
        invert_update(delta, model=model, regions=PATCHES[0][1], start=torch.zeros(4, 2, 2, 2))
    with pytest.raises(ValueError, match="objective is one of"):
        Reconstruction(objective="manhattan")
    with pytest.raises(ValueError, match="local_lr is a positive number"):
        Reconstruction(local_lr=math.inf)
