"""`check_private` finds what a forward pass keeps of patients and where it mixes them, and DP-SGD asks again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cohorts import TinyNet, blob_sites
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.dp.validators import check_loss, check_private
from fedlab.run.federate import each_round
from fedlab.training.defaults import DiceBCE
from trainers import trainer

# What moves in a forward pass.


class ActNorm(nn.Module):
    """Scale and shift set from the first batch (Kingma and Dhariwal 2018)."""

    def __init__(self):
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
        self.initialised = False

    def forward(self, x):
        if self.training and not self.initialised:
            with torch.no_grad():
                self.shift.copy_(-x.mean(dim=(0, 2, 3, 4)))
                self.scale.copy_(1 / x.std(dim=(0, 2, 3, 4)))
            self.initialised = True
        return (x + self.shift.view(1, -1, 1, 1, 1)) * self.scale.view(1, -1, 1, 1, 1)


class Keeping(TinyNet):
    """A network that does something with its input first; `keep` is given the image."""

    def forward(self, image):
        return super().forward(self.keep(image))

    def keep(self, image):
        return image


class DataInitialised(Keeping):
    def __init__(self):
        super().__init__()
        self.act = ActNorm()

    def keep(self, image):
        return self.act(image)


class ThroughData(Keeping):
    """Sets a parameter through `.data`, which torch's count of versions does not see."""

    def keep(self, image):
        self.last.bias.data = self.last.bias.data * 0 + image.mean()
        return image


class RunningMean(Keeping):
    """A plain tensor, moved by a hundredth of every batch."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(4)

    def keep(self, image):
        if self.training:
            self.mean = 0.99 * self.mean + 0.01 * image.detach().mean(dim=(0, 2, 3, 4))
        return image - self.mean.view(1, -1, 1, 1, 1)


class InEvaluation(Keeping):
    """Looks at patients in evaluation only."""

    offset = 0.0

    def keep(self, image):
        if not self.training:
            self.offset = float(image.mean())
        return image + self.offset


class InAList(Keeping):
    def __init__(self):
        super().__init__()
        self.seen = [0.0]

    def keep(self, image):
        self.seen.append(float(image.std()))
        return image


class InADict(Keeping):
    def __init__(self):
        super().__init__()
        self.notes = {"levels": {"max": 0.0}}

    def keep(self, image):
        self.notes["levels"]["max"] = max(self.notes["levels"]["max"], float(image.max()))
        return image


class InASubmodule(Keeping):
    def keep(self, image):
        self.first.stride_of_data = float(image[0, 0, 0, 0, 0])
        return image


class Notes:
    """An object that is no module."""

    def __init__(self):
        self.last = torch.zeros(())


class InAnObject(Keeping):
    def __init__(self):
        super().__init__()
        self.notes = Notes()

    def keep(self, image):
        self.notes.last = image.mean()
        return image


class OfItsClass(Keeping):
    """Keeps it in an attribute of the class, which copies of the network share."""

    level = 0.0

    def keep(self, image):
        type(self).level = float(image.abs().mean())
        return image


SEEN = []


class InAModule(Keeping):
    """A global list."""

    def keep(self, image):
        SEEN[:] = [float(image.mean())]
        return image


def in_a_closure():
    last = [0.0]

    def keep(image):
        out = image + 1e-3 * last[0]
        last[0] = float(image.mean())
        return out
    return keep


class InAClosure(Keeping):
    def __init__(self):
        super().__init__()
        self.keep = in_a_closure()


class OnlyOfBrightOnes(Keeping):
    """Remembers patients with a very bright voxel only."""

    peak = 0.0

    def keep(self, image):
        if float(image.max()) > 500:
            self.peak = float(image.max())
        return image


class OnlyOfEmptyOnes(Keeping):
    """Counts empty patients."""

    empty = 0

    def keep(self, image):
        self.empty += int(not image.any())
        return image


class Hidden(Keeping):
    """Remembers in a hook of a layer."""

    def __init__(self):
        super().__init__()
        self.last.register_forward_hook(self.note)

    def note(self, layer, given, output):
        self.noted = float(output.detach().mean())


KEEPS = [(DataInitialised, "act.scale"), (ThroughData, "last.bias"), (RunningMean, "mean"), (InEvaluation, "offset"),
         (InAList, "seen"), (InADict, "notes['levels']['max']"), (InASubmodule, "first.stride_of_data"),
         (InAnObject, "notes.last"), (OfItsClass, "level"), (InAModule, "SEEN"), (InAClosure, "last"),
         (OnlyOfBrightOnes, "peak"), (OnlyOfEmptyOnes, "empty"), (Hidden, "noted")]


@pytest.mark.parametrize(("network", "name"), KEEPS, ids=[kind.__name__ for kind, _ in KEEPS])
def test_what_a_pass_keeps_of_patients_is_named(network, name):
    fitness = check_private(network())
    assert not fitness and any(name in problem and "leaks" in problem for problem in fitness.problems), fitness


def test_dpsgd_refuses_a_network_that_sets_weights_from_data():
    with pytest.raises(ValueError, match=r"act\.shift leaks: a pass in training changes this parameter"):
        run(DataInitialised())


class Counting(Keeping):
    """Counts its passes and caches what depends on shapes only: nothing of patients."""

    def __init__(self):
        super().__init__()
        self.passes, self.cached = 0, {}

    def keep(self, image):
        self.passes += 1
        self.cached.setdefault(tuple(image.shape), torch.linspace(0, 1, image.shape[-1]))
        return image + self.cached[tuple(image.shape)].to(image.dtype)


def test_what_is_kept_of_no_patient_is_no_leak():
    assert check_private(Counting()), check_private(Counting())


class KeepingLoss(DiceBCE):
    """Weighs patients by the tumour of those before."""

    share = 0.5

    def forward(self, logits, target):
        loss = super().forward(logits, target) * (0.5 + self.share)
        self.share = float(target.mean())
        return loss


def test_a_loss_that_keeps_something_is_found():
    assert "loss.share leaks" in repr(check_private(TinyNet(), loss=KeepingLoss()))


# Bold patients.


class Mixing(TinyNet):
    """Subtracts the mean over the batch where `when` says so."""

    def __init__(self, when):
        super().__init__()
        self.when = when

    def forward(self, image):
        mixed = image - image.mean(dim=0, keepdim=True) if self.when(image) else image
        return super().forward(mixed)


WHEN = {
    "large": lambda x: x.abs().max() > 100, "bright": lambda x: x.mean() > 300, "negative": lambda x: x.max() < 0,
    "tiny": lambda x: 0 < x.abs().max() < 1e-3, "constant": lambda x: (x[0] == x[0].mean()).all() and x[0].any(),
    "hot voxel": lambda x: x.abs().max() > 50 * x.std() > 0, "three": lambda x: len(x) == 3,
    "many": lambda x: len(x) > 3, "apart": lambda x: (x[0] - x[-1]).abs().max() > 30,
    "one empty": lambda x: (x.flatten(1).abs().amax(dim=1) == 0).any(), "training": lambda x: True,
}


@pytest.mark.parametrize("when", WHEN)
def test_patients_that_mix_for_some_values_only_are_found(when):
    assert "mixes patients" in repr(check_private(Mixing(WHEN[when])))


class Contrast(nn.Module):
    """Pushes the pooled outputs of two patients apart; nothing at zero mean."""

    def forward(self, logits, target):
        pooled = logits.mean(dim=(2, 3, 4))
        return DiceBCE()(logits, target) + 0.1 * (pooled @ pooled.T).triu(1).sum() / len(logits)


class HardPatients(nn.Module):
    """Takes the largest loss of a batch of three or more."""

    def forward(self, logits, target):
        each = torch.stack([DiceBCE()(one[None], its[None]) for one, its in zip(logits, target, strict=True)])
        return each.max() if len(each) > 2 else each.mean()


class OnlyLargeLogits(nn.Module):
    """Divides by the largest logit of the batch where one is above 20."""

    def forward(self, logits, target):
        top = logits.abs().amax()
        return DiceBCE()(logits / top if top > 20 else logits, target)


@pytest.mark.parametrize("loss", [Contrast(), HardPatients(), OnlyLargeLogits()], ids=lambda loss: type(loss).__name__)
def test_losses_that_mix_for_some_values_only_are_refused(loss):
    with pytest.raises(ValueError, match="mixes patients"):
        check_loss(loss)


# Anew when the network has changed.


class Switched(TinyNet):
    """Mixes patients when it is switched on, or when a weight passes a value."""

    def __init__(self):
        super().__init__()
        self.mix, self.gate = [False], nn.Parameter(torch.zeros(()))

    def forward(self, image):
        mixed = image - image.mean(dim=0, keepdim=True) if self.mix[0] or self.gate > 1 else image
        return super().forward(mixed)


def dpsgd():
    return DPSGD(clip=1.0, noise_multiplier=1.0, delta=1e-2, sample_rate=1.0)


def run(network):
    return next(each_round(trainer(model=network, steps=1), blob_sites((3,)), privacy=dpsgd()))


def with_switch(network):
    network.mix[0] = True


def with_gate(network):
    network.gate.data.fill_(2.0)


def with_batch_norm(network):
    network.last = nn.Sequential(nn.BatchNorm3d(6), network.last)


def with_another_forward(network):
    network.forward = lambda image: TinyNet.forward(network, image - image.mean(dim=0, keepdim=True))


@pytest.mark.parametrize("change", [with_switch, with_gate, with_batch_norm, with_another_forward])
def test_a_network_that_passed_is_tried_again_when_it_changes(change):
    network = Switched()
    run(network)
    change(network)
    with pytest.raises(ValueError, match="mixes"):
        run(network)


def test_a_class_of_the_same_name_is_another_network():
    def network(mixes):
        class Net(TinyNet):
            if mixes:
                def forward(self, image):
                    return super().forward(image - image.mean(dim=0, keepdim=True))
        return Net()
    run(network(False))
    with pytest.raises(ValueError, match="mixes"):
        run(network(True))


class Late(TinyNet):
    """Mixes patients after some passes: seen in the round after."""

    passes = 0

    def forward(self, image):
        self.passes += 1
        return super().forward(image - image.mean(dim=0, keepdim=True) if self.passes > 100 else image)


def test_a_network_that_changes_during_a_run_is_refused_in_the_next_round():
    rounds = each_round(trainer(model=Late(), steps=40), blob_sites((3,)), privacy=dpsgd(), rounds=5)
    with pytest.raises(Exception, match="mixes"):
        for _ in rounds:
            pass


def test_a_network_is_tried_once_if_nothing_changes(monkeypatch):
    from fedlab.privacy.dp import validators

    asked, tried = [], validators._tried
    monkeypatch.setattr(validators, "_PASSED", {})  # other tests have tried networks of this class
    monkeypatch.setattr(validators, "_tried", lambda *args, **more: asked.append(more) or tried(*args, **more))
    network = TinyNet(seed=77)
    for _ in each_round(trainer(model=network, steps=1), blob_sites((3, 3)), privacy=dpsgd(), rounds=2):
        pass
    assert asked == [{"few": False}, {"few": True}]  # before the first round, and of the weights of the second


# Networks that are right.


def sound():
    from monai.networks.nets import UNETR, DynUNet, SegResNet, UNet

    torch.manual_seed(0)
    unet = dict(spatial_dims=3, in_channels=4, out_channels=3)
    dyn = dict(**unet, kernel_size=[3] * 4, strides=[1, 2, 2, 2], upsample_kernel_size=[2] * 3, filters=[8] * 4)
    return {
        "SegResNet": SegResNet(3, 8, 4, 3, blocks_down=(1, 1), blocks_up=(1,), dropout_prob=0.2),
        "UNet, instance norm": UNet(**unet, channels=(8, 16), strides=(2,), num_res_units=2),
        "UNet, group norm": UNet(**unet, channels=(8, 16), strides=(2,), norm=("group", {"num_groups": 4})),
        "DynUNet": DynUNet(**dyn), "DynUNet, deep supervision": DynUNet(**dyn, deep_supervision=True),
        "UNETR": UNETR(in_channels=4, out_channels=3, img_size=(16, 16, 16), feature_size=4, hidden_size=24,
                       mlp_dim=48, num_heads=3),
    }


SOUND = sound()


@pytest.mark.parametrize("name", SOUND)
def test_sound_networks_pass(name):
    from monai.losses import DeepSupervisionLoss

    loss = DeepSupervisionLoss(DiceBCE()) if "deep" in name else None
    fitness = check_private(SOUND[name], loss=loss, crop=(16, 16, 16))
    assert fitness, fitness
