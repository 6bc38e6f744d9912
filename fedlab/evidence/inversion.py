"""Gradient inversion: the reconstruction of a patch of a scan from the update that was computed from it.

J. Geiping, H. Bauermeister, H. Dröge, M. Moeller, Inverting Gradients: How easy is it to break privacy in federated
learning?, NeurIPS 2020, arXiv 2003.14053. An adversary who sees a site's update and knows the model looks for the image
whose gradient has the direction of the update, or whose simulated training gives the update. The case is the easiest
for the adversary: plain steps on one patch whose labels are known. A failure of this attack proves nothing; its success
shows that the update is no secret. `fedlab.evidence.reconstruction` scores it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.func import functional_call

from fedlab.core.global_generators import seeded
from fedlab.core.hardware import calling
from fedlab.core.regions import labels_to_regions
from fedlab.core.seeds import derive, generator
from fedlab.core.settings import check_choice, check_positive, check_whole, check_within
from fedlab.core.types import Patient, Tensors, Update
from fedlab.core.weights import check_fit, trainable
from fedlab.training.defaults import DiceBCE

__all__ = ["Inversion", "invert_update", "one_step_update", "patch_net", "tumour_patch"]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Inversion:
    """The result of an attack."""

    image: torch.Tensor  # the reconstruction, float32, (4, X, Y, Z), in the units of a network's input
    distance: float  # between the update and that of the reconstruction; 0 is a perfect match
    steps: int
    seconds: float  # wall time

    def correlation(self, truth: torch.Tensor) -> float:
        """Pearson correlation of the reconstruction with the patch of the update, over all channels and voxels.

        1 is the patch itself up to brightness and contrast; 0 is unrelated to it.

        Raises:
            ValueError: a patch of another shape, or one without any contrast.
        """
        if truth.shape != self.image.shape:
            raise ValueError(f"the truth has shape {tuple(truth.shape)}, the reconstruction "
                             f"{tuple(self.image.shape)}; give the patch of the update")
        pair = torch.stack([self.image.double().flatten(), truth.double().flatten()])
        if bool((pair.std(dim=1) == 0).any()):
            raise ValueError("the patch or its reconstruction has the same value everywhere, so there is no "
                             "correlation; take a patch with tissue in it")
        return float(torch.corrcoef(pair)[0, 1])

    def __repr__(self) -> str:
        grid = "x".join(map(str, self.image.shape[1:]))
        return (f"<Inversion of a {grid} patch: {self.steps} steps in {self.seconds:.1f} s, "
                f"distance {self.distance:.3f}>")


def patch_net(*, width: int = 16, seed: int = 0) -> nn.Module:
    """A small network for patches that is quick to attack: convolutions of 3³, 3³ and 1³, and a smooth activation.

    It maps images (B, 4, X, Y, Z) to logits (B, 3, X, Y, Z) by way of `width` channels.

    Raises:
        ValueError: `width` below 1.
    """
    check_whole(width=width)
    with seeded(derive(seed, "patch_net")):
        return nn.Sequential(nn.Conv3d(4, width, 3, padding=1), nn.Softplus(beta=4),
                             nn.Conv3d(width, width, 3, padding=1), nn.Softplus(beta=4), nn.Conv3d(width, 3, 1))


def tumour_patch(patient: Patient, crop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A cube around the middle of the tumour, within the scan: image (4, c, c, c) and regions (3, c, c, c).

    Raises:
        ValueError: a patient without a label or a tumour, or smaller than the cube.
    """
    if patient.label is None:
        raise ValueError(f"patient {patient.id} has no label, which training needs to compute an update")
    where = patient.label.nonzero()
    if len(where) == 0 or min(patient.label.shape) < crop:
        raise ValueError(f"expected a patient with a tumour and at least {crop} voxels along each axis; {patient.id} "
                         f"has {len(where)} tumour voxels on a grid of {tuple(patient.label.shape)}")
    middle = where.float().mean(dim=0).round().long()
    first = (middle - crop // 2).clamp(min=0).minimum(torch.tensor(patient.label.shape) - crop)
    cut = tuple(slice(start, start + crop) for start in first.tolist())
    return patient.image[(slice(None), *cut)].float(), labels_to_regions(patient.label[cut])


def one_step_update(model: nn.Module, image: torch.Tensor, regions: torch.Tensor, *, lr: float = 0.1,
                    loss: Loss | None = None, site: str = "site", steps: int = 1) -> Update:
    """The update of a site that takes one plain gradient step on one patch, −lr times the gradient, or several.

    Args:
        model: does not change.
        image: (4, X, Y, Z).
        regions: (3, X, Y, Z), as of `labels_to_regions`.
        lr: learning rate.
        loss: of logits and regions; `DiceBCE()` by default.
        site: the sender.
        steps: number of plain steps, all on this patch.

    Raises:
        ValueError: the shapes do not fit each other, or `steps` is below 1.
    """
    check_whole(steps=steps)
    if image.dim() != 4 or regions.dim() != 4 or image.shape[1:] != regions.shape[1:]:
        raise ValueError(f"expected an image (4, X, Y, Z) and its regions (3, X, Y, Z), got {tuple(image.shape)} and "
                         f"{tuple(regions.shape)}")
    params = {name: p.detach() for name, p in trainable(model).items()}
    gradient = _gradients(model, params, image.float()[None], regions.float()[None], loss or DiceBCE(), keep=False,
                          steps=steps, lr=lr)
    return Update(site=site, delta={name: -lr * g for name, g in zip(params, gradient, strict=True)}, weight=1.0,
                  steps=steps)


def invert_update(
    delta: Tensors, *, model: nn.Module, regions: torch.Tensor, loss: Loss | None = None, steps: int = 400,
    lr: float = 0.1, smoothness: float = 1e-3, channels: int = 4, limit: float = 4.0, seed: int = 0,
    max_seconds: float = 60.0, on_step: Callable[[int, torch.Tensor], bool] | None = None,
    objective: Literal["cosine", "euclidean"] = "cosine", per_layer: bool = False, start: torch.Tensor | None = None,
    local_steps: int = 1, local_lr: float = 0.1,
) -> Inversion:
    """Reconstructs the patch that an update was computed from.

    Minimises distance(update, update of the patch) + smoothness × total variation, with Adam on the signs of the
    gradient, from noise or from what the adversary expects (Geiping et al. 2020, section 4). The distance is 1 − cosine
    and independent of the update's length, so that clipping alone hides nothing; or the squared Euclidean distance
    over the squared length of the update (Zhu et al. 2019, arXiv 1906.08935), which needs `local_lr`.

    Args:
        delta: the update, with the names and shapes of the model's trainable tensors.
        model: with the weights that the update starts from; does not change.
        regions: of the patch, (3, X, Y, Z); known to the adversary.
        loss: of the site; `DiceBCE()` by default.
        steps: at most.
        lr: step of Adam, divided by ten at 3/8, 5/8 and 7/8 of the steps.
        smoothness: weight of the mean total variation.
        channels: of the patch.
        limit: values are clamped to ±limit; a z-scored scan has few beyond 4.
        seed: of the noise at the start.
        max_seconds: time after which the attack ends with its result so far.
        on_step: called with the number of steps taken and the patch so far (4, X, Y, Z); false ends the attack.
        objective: the distance.
        per_layer: the mean over the tensors' own distances; else that of the whole update, in which large networks'
            last layers outweigh the first, which see the image.
        start: (channels, X, Y, Z), such as `tissue_prior` gives, in place of noise.
        local_steps: plain steps that the site took on the patch; more than one are simulated.
        local_lr: learning rate of these steps.

    Returns:
        The reconstruction, and how well it explains the update.

    Raises:
        ValueError: an update that is zero everywhere or does not fit the model, or a setting out of its range.
    """
    check_positive(steps=steps, lr=lr, limit=limit, max_seconds=max_seconds, local_lr=local_lr)
    check_within(smoothness=smoothness)
    check_whole(local_steps=local_steps)
    check_choice(("cosine", "euclidean"), objective=objective)
    _check_update(delta, model)
    if start is not None and tuple(start.shape) != (channels, *regions.shape[1:]):
        raise ValueError(f"start has shape {tuple(start.shape)}, expected {(channels, *regions.shape[1:])}")
    started, loss = time.perf_counter(), loss or DiceBCE()
    params = {name: p.detach() for name, p in trainable(model).items()}
    seen = [-delta[name].detach().float() / local_lr for name in params]
    target = regions.float()[None]
    patch = torch.randn((1, channels, *regions.shape[1:]), generator=generator(seed, "inversion"))
    patch = (patch if start is None else start.float()[None] + 0.1 * patch).requires_grad_()
    optimiser = torch.optim.Adam([patch], lr=lr)
    falls = torch.optim.lr_scheduler.MultiStepLR(optimiser, [round(steps * k / 8) for k in (3, 5, 7)], gamma=0.1)
    taken, distance = 0, torch.tensor(1.0)
    while taken < steps and time.perf_counter() - started < max_seconds:
        gradient = _gradients(model, params, patch, target, loss, keep=True, steps=local_steps, lr=local_lr)
        distance = _distance(gradient, seen, objective, per_layer=per_layer)
        patch.grad, = torch.autograd.grad(distance + smoothness * _variation(patch), [patch])
        patch.grad.sign_()
        optimiser.step()
        falls.step()
        patch.data.clamp_(-limit, limit)
        taken += 1
        if on_step is not None and on_step(taken, patch.detach()[0].clone()) is False:
            break
    return Inversion(image=patch.detach()[0].clone(), distance=float(distance.detach()), steps=taken,
                     seconds=time.perf_counter() - started)


def _gradients(model: nn.Module, params: Tensors, image: torch.Tensor, target: torch.Tensor, loss: Loss, *, keep: bool,
               steps: int, lr: float) -> Sequence[torch.Tensor]:
    """The sum of the gradients of plain steps, in the order of the parameters; differentiable itself if `keep`."""
    weights = {name: p.clone().requires_grad_() for name, p in params.items()}
    total: list[torch.Tensor] = []
    for _ in range(steps):
        with calling(image.device, torch.float32):
            value = loss(functional_call(model, weights, (image,)), target)
        found = torch.autograd.grad(value, list(weights.values()), create_graph=keep)
        total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
        moved = (w - lr * g for w, g in zip(weights.values(), found, strict=True))
        weights = {name: w if keep else w.detach().requires_grad_() for name, w in zip(weights, moved, strict=True)}
    return total


def _distance(gradient: Sequence[torch.Tensor], seen: Sequence[torch.Tensor], objective: str, *,
              per_layer: bool) -> torch.Tensor:
    """Between two lists of tensors: of all their entries together, or the mean over the tensors that are not zero."""
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(gradient, seen, strict=True)]
    if per_layer:
        pairs = [(a, b) for a, b in pairs if bool(b.any())]
    else:
        pairs = [(torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs]))]
    if objective == "cosine":
        return torch.stack([1 - torch.cosine_similarity(a, b, dim=0) for a, b in pairs]).mean()
    return torch.stack([(a - b).square().sum() / b.square().sum() for a, b in pairs]).mean()


def _variation(patch: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbouring voxels, summed over the three axes."""
    return torch.stack([patch.diff(dim=axis).abs().mean() for axis in (2, 3, 4)]).sum()


def _check_update(delta: Tensors, model: nn.Module) -> None:
    try:
        check_fit(trainable(model), delta)
    except ValueError as error:
        raise ValueError(f"the update does not fit the model; {error}") from error
    if not any(bool(t.any()) for t in delta.values()):
        raise ValueError("the update is zero everywhere, so it reveals nothing")
