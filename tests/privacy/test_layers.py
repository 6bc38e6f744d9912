"""Which networks are fit for patient-level privacy, which layer is not, and what puts it right."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from cohorts import TinyNet, blob_sites
from fedlab.core.weights import trainable
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.dp.gradients import MODES
from fedlab.privacy.dp.validators import check_loss, check_private, fix_private
from fedlab.run.federate import each_round, federate
from fedlab.training.defaults import DiceBCE
from fedlab.training.networks import segresnet
from trainers import plain_sgd, trainer


def networks():
    from monai.networks.nets import BasicUNet, DynUNet, SegResNet, UNet

    torch.manual_seed(0)
    unet = dict(spatial_dims=3, in_channels=4, out_channels=3)
    dyn = dict(kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[8, 16, 16])
    return {
        "segresnet": segresnet(), "SegResNet": SegResNet(3, 8, 4, 3, blocks_down=(1, 1), blocks_up=(1,)),
        "UNet": UNet(**unet, channels=(8, 16), strides=(2,), num_res_units=2),
        "BasicUNet": BasicUNet(**unet, features=(8, 8, 8, 8, 8, 8)),
        "DynUNet": DynUNet(**unet, **dyn), "DynUNet residual": DynUNet(**unet, **dyn, res_block=True),
    }


NETWORKS = networks()
#: What works as shipped, and also after `fix_private`: "ew" knows neither PReLU nor transposed convolutions, and
#: DynUNet holds its layers under two names, so that Opacus hooks each of them twice.
AS_SHIPPED = {"SegResNet": {"backward", "functorch", "ew"}, "UNet": {"backward", "hooks", "functorch"},
              "BasicUNet": {"backward", "functorch"}, "DynUNet": {"backward", "functorch"},
              "DynUNet residual": {"backward", "functorch"}}
FIXED = {"SegResNet": {"hooks"}, "BasicUNet": {"hooks"}}


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("name", AS_SHIPPED)
def test_the_verdict_on_monai_networks_and_its_remedy(name, gradients):
    fitness = check_private(NETWORKS[name], gradients=gradients)
    assert bool(fitness) == (gradients in AS_SHIPPED[name]), fitness
    if not fitness:
        assert "say gradients='backward', which takes this network as it is" in fitness.remedy
        helps = gradients in FIXED.get(name, ())  # found by trying the fixed network
        assert (f"or use fix_private(model, gradients={gradients!r})" in fitness.remedy) == helps
        assert ("work in place" in repr(fitness)) == (name != "UNet")


def test_a_network_that_a_mode_breaks_is_refused_before_training_and_its_fixed_copy_trains():
    def technique(gradients):
        return DPSGD(clip=1.0, noise_multiplier=0, sample_rate=1.0, gradients=gradients)

    network = NETWORKS["segresnet"]
    with pytest.raises(ValueError, match="remedy: say gradients='backward'"):
        each_round(trainer(model=network), blob_sites((3,)), privacy=technique("hooks"))
    moved = []
    for model, gradients in ((fix_private(network, gradients="hooks"), "hooks"), (network, "backward")):
        one = trainer(model=model, steps=1, lr=1.0, optimiser=plain_sgd)
        state = next(each_round(one, blob_sites((2,)), privacy=technique(gradients))).state
        moved.append(torch.cat([(p - one.initial()[name]).flatten() for name, p in state.params.items()]))
    assert float((moved[0] - moved[1]).norm()) < 1e-4 * float(moved[0].norm())


@pytest.mark.parametrize("name", ["SegResNet", "DynUNet residual"])
def test_putting_sums_out_of_place_changes_no_number(name):
    fixed, image = fix_private(NETWORKS[name], gradients="hooks"), torch.randn(2, 4, 16, 16, 16)
    assert torch.equal(fixed(image), NETWORKS[name](image))
    again = pickle.loads(pickle.dumps(copy.deepcopy(fixed)))
    assert torch.equal(again(image), fixed(image)) and type(again) is type(NETWORKS[name])
    assert list(trainable(fixed)) == list(trainable(NETWORKS[name]))


@pytest.mark.parametrize(("norm", "leak"), [
    ("batch", "mixes the patients of a batch"),
    (("instance", {"track_running_stats": True, "affine": True}), "keeps running statistics")])
def test_norms_that_leak_are_named_refused_and_replaced(norm, leak):
    from monai.networks.nets import UNet

    network = UNet(3, 4, 3, channels=(8, 16), strides=(2,), norm=norm)
    for gradients in MODES[:2]:
        fitness = check_private(network, gradients=gradients)
        assert not fitness and leak in repr(fitness) and "model.0.adn.N" in fitness.problems[0]
        assert fitness.remedy == f"use fix_private(model, gradients={gradients!r}) and say gradients={gradients!r}"
        fixed = fix_private(network, gradients=gradients)
        assert check_private(fixed, gradients=gradients)
        assert fixed.get_parameter("model.0.adn.N.weight").equal(network.get_parameter("model.0.adn.N.weight"))
    technique = DPSGD(clip=1.0, noise_multiplier=1.0, delta=1e-2, sample_rate=1.0)
    with pytest.raises(ValueError, match=r"leaks.*\n(.*\n)*remedy: use fix_private"):
        federate(trainer(model=network), blob_sites((3,)), privacy=technique, rounds=1, progress=False)
    history = federate(trainer(model=fix_private(network), steps=1), blob_sites((3,)), privacy=technique, rounds=1,
                       progress=False)
    assert history.spent()["epsilon"].iloc[0] > 0


class Centred(TinyNet):
    """Subtracts the mean over the batch: no layer's type tells that it mixes patients."""

    def forward(self, image):
        return super().forward(image - image.mean(dim=0, keepdim=True))


class Counting(TinyNet):
    """Remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, image):
        self.seen += image.mean().detach()
        return super().forward(image)


def test_what_no_layer_type_tells_is_found_by_trying():
    assert "the network mixes patients" in repr(check_private(Centred()))
    assert "seen leaks" in repr(check_private(Counting()))
    assert "use a network without these layers" in repr(check_private(Counting()))
    network = TinyNet()
    before = copy.deepcopy(network.state_dict())
    assert check_private(network) and repr(check_private(network)).startswith("fit for patient-level privacy")
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert "<li>" in check_private(Centred())._repr_html_()
    assert "fails on a crop" in repr(check_private(nn.Sequential(nn.Conv3d(5, 3, 1))))
    with pytest.raises(ValueError, match="gradients is one of"):
        check_private(network, gradients="ghost")


class Single(TinyNet):
    """Takes float32 only."""

    def forward(self, image):
        return super().forward(image.float())


def test_a_network_of_float32_only_is_tried_in_float32():
    assert check_private(Single()) and check_private(Single(), gradients="functorch")


def test_losses_that_mix_patients_are_refused():
    from monai.losses import DiceCELoss, DiceLoss, GeneralizedDiceLoss

    for loss in (DiceBCE(), DiceBCE(bce=0.0), DiceLoss(sigmoid=True), nn.BCEWithLogitsLoss(),
                 DiceCELoss(sigmoid=True)):
        check_loss(loss)
    for loss in (DiceLoss(sigmoid=True, batch=True), DiceLoss(sigmoid=True, reduction="sum"),
                 GeneralizedDiceLoss(sigmoid=True, batch=True), nn.BCEWithLogitsLoss(reduction="sum")):
        with pytest.raises(ValueError, match="mixes patients"):
            check_loss(loss)


def test_frozen_and_unused_weights_are_no_obstacle():
    network = segresnet()
    for name, p in network.named_parameters():
        p.requires_grad_(name.startswith(("conv_final", "up_layers.2")))
    network.spare = nn.Conv3d(4, 4, 1)
    for gradients in ("backward", "functorch"):
        assert check_private(network, gradients=gradients), check_private(network, gradients=gradients)
