"""Networks and weights that users bring: sizes, several outputs, other types of numbers, threads, changed starts."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from cohorts import BatchNet, TinyNet, blob_patient, blob_sites
from fedlab.core.global_generators import seeded
from fedlab.core.types import SiteState
from fedlab.core.weights import load_weights, trainable, weights_sha256
from fedlab.run.federate import each_round, federate
from fedlab.training.defaults import DiceBCE, augmentation
from fedlab.training.metrics import evaluate, predict
from fedlab.training.networks import segresnet
from fedlab.training.schedules import PolyDecay
from fedlab.training.trainer import Crops, SiteTrainer
from trainers import trainer

# Sizes


class Multiple(TinyNet):
    """Takes multiples of a size only, and notes the sizes that it was called with."""

    def __init__(self, size, *, exact=False):
        super().__init__()
        self.size, self.exact, self.seen = size, exact, []

    def forward(self, image):
        self.seen.append(tuple(image.shape[2:]))
        if any(n % self.size or (self.exact and n != self.size) for n in image.shape[2:]):
            raise RuntimeError(f"sizes must be multiples of {self.size}")
        return super().forward(image)


def test_predict_pads_to_what_the_network_takes_and_finds_it_out_once():
    patient = blob_patient("a", seed=1, shape=(20, 40, 20))
    model = Multiple(32)
    out = predict(model, patient, precision="fp32")
    assert out.shape == (3, 20, 40, 20) and model.seen[0] == (32, 48, 32) and model.seen[-1] == (32, 64, 32)
    inner = torch.zeros(1, 4, 32, 64, 32)
    inner[:, :, 6:26, 12:52, 6:26] = patient.image
    expected = TinyNet.forward(model, inner).sigmoid()[0, :, 6:26, 12:52, 6:26]
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)
    model.seen.clear()
    predict(model, patient)
    assert set(model.seen) == {(32, 64, 32)}  # known from now on


def test_a_network_of_one_size_is_given_the_window():
    model = Multiple(24, exact=True)
    assert predict(model, blob_patient("a", seed=1), window=(24, 24, 24)).shape == (3, 16, 16, 16)
    assert len(evaluate(model, blob_sites((1,)), window=(24, 24, 24))) == 3


def test_a_network_that_takes_no_size_says_what_it_said_first():
    with pytest.raises(ValueError, match=r"64x64x64 voxels or less \(RuntimeError: .*multiples of 7\); pass window="):
        predict(Multiple(7), blob_patient("a", seed=1))


def test_a_unet_of_six_levels_is_evaluated_on_any_grid():
    from monai.networks.nets import UNet

    model = UNet(spatial_dims=3, in_channels=4, out_channels=3, channels=(4, 4, 4, 4, 4, 4), strides=(2,) * 5)
    assert predict(model, blob_patient("a", seed=1, shape=(16, 20, 36))).shape == (3, 16, 20, 36)


# Several outputs


class Levels(TinyNet):
    """Deep supervision: outputs at full and half resolution, in training or always."""

    def __init__(self, *, always=False):
        super().__init__()
        self.coarse, self.always = nn.Conv3d(6, 3, 1), always

    def forward(self, image):
        features = torch.relu(self.first(image))
        out = self.last(features)
        return [out, self.coarse(nn.functional.avg_pool3d(features, 2))] if self.training or self.always else out


class Stack(TinyNet):
    """Outputs at one resolution in one tensor, (B, 2, 3, X, Y, Z), as MONAI's DynUNet in training."""

    def forward(self, image):
        out = super().forward(image)
        return torch.stack([out, out / 2], dim=1) if self.training else out


@pytest.mark.parametrize("make", [Levels, lambda: Levels(always=True), Stack])
def test_several_outputs_train_with_monais_loss_and_predict_at_full_resolution(make):
    from monai.losses import DeepSupervisionLoss

    model, sites = make(), blob_sites()
    one = trainer(model=model, loss=DeepSupervisionLoss(DiceBCE()))
    history = federate(one, sites, rounds=1, progress=False)
    image, target = blob_patient("a", seed=3).image[None], torch.zeros(1, 3, 16, 16, 16)
    kit = one.prepare(sites[0], history.state, site_state=SiteState(owner="optimiser"), seed=0)
    model.train()
    outputs = model(image)
    outputs = outputs.unbind(1) if isinstance(outputs, torch.Tensor) else outputs
    base = DiceBCE()
    expected = sum(0.5**k * base(o, nn.functional.interpolate(target, size=o.shape[2:])) for k, o in enumerate(outputs))
    torch.testing.assert_close(kit.loss(image, target), expected)
    model.eval()
    full = model(image)
    full = full[0] if isinstance(full, list) else full
    torch.testing.assert_close(predict(model, blob_patient("a", seed=3), precision="fp32"), full.sigmoid()[0].detach(),
                               rtol=1e-4, atol=1e-5)
    assert len(evaluate(model, sites)) == 6


@pytest.mark.parametrize("model", [Levels(), Stack()], ids=["list", "stack"])
def test_a_loss_of_one_output_names_the_loss_of_several(model):
    with pytest.raises(Exception, match=r"loss=monai.losses.DeepSupervisionLoss\(DiceBCE\(\)\)"):
        federate(trainer(model=model), blob_sites(), rounds=1, progress=False)


def test_a_loss_over_the_stack_still_gets_the_stack():
    base = DiceBCE()
    one = trainer(model=Stack(), loss=lambda logits, target: sum(base(o, target) for o in torch.unbind(logits, 1)))
    federate(one, blob_sites(), rounds=1, progress=False)


# Types of numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_other_types_train_and_predict_in_their_own(dtype):
    model = TinyNet().to(dtype)
    one = trainer(model=model, precision="auto", lr=0.1)
    before = {name: p.clone() for name, p in one.initial().items()}
    history = federate(one, blob_sites(), rounds=2, progress=False)
    assert {p.dtype for p in history.state.params.values()} == {dtype}
    assert not history.state.params["last.weight"].equal(before["last.weight"])
    assert predict(model, blob_patient("a", seed=1)).dtype == torch.float32
    with pytest.raises(ValueError, match=rf"weights are {dtype} .*precision at 'auto'"):
        trainer(model=model, precision="fp32")


def test_float64_weights_compute_what_float32_weights_compute():
    sites = blob_sites()
    single = federate(trainer(), sites, rounds=2, progress=False).state.params
    double = federate(trainer(model=TinyNet().double(), precision="auto"), sites, rounds=2, progress=False).state.params
    for name, p in single.items():
        torch.testing.assert_close(double[name].float(), p, rtol=1e-3, atol=1e-4)


def test_complex_parameters_are_refused():
    class Phases(TinyNet):
        def __init__(self):
            super().__init__()
            self.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))

    with pytest.raises(ValueError, match=r"parameter phase is torch.complex64.*view_as_complex"):
        trainer(model=Phases())


# Schedules and starts


def test_a_schedule_shorter_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"learning rate of round 2 is 0.0 in a run of 3 rounds"):
        each_round(trainer(lr=PolyDecay(start=0.1, rounds=2)), blob_sites(), rounds=3)
    each_round(trainer(lr=PolyDecay(start=0.1, rounds=2)), blob_sites(), rounds=2)
    with pytest.raises(ValueError, match="round 0 is nan"):
        each_round(trainer(lr=lambda round: float("nan")), blob_sites(), rounds=3)


def test_weights_loaded_after_the_trainer_was_made_are_noticed():
    one, sites = trainer(), blob_sites()
    federate(one, sites, rounds=1, progress=False)
    federate(one, sites, rounds=1, progress=False)  # what runs leave in the model is no change
    other = TinyNet(seed=5).state_dict()
    one.model.load_state_dict(other)
    with pytest.raises(ValueError, match=r"changed after the trainer was made.*dataclasses\.replace\(trainer\)"):
        federate(one, sites, rounds=1, progress=False)
    new = replace(one)
    assert all(new.initial()[name].equal(t) for name, t in other.items())
    federate(new, sites, rounds=1, progress=False)
    one.model.load_state_dict(other)
    load_weights(one.model, one.initial_model())
    federate(one, sites, rounds=1, progress=False)
    one.model.load_state_dict(dict(one.initial()))  # the very same start
    federate(one, sites, rounds=1, progress=False)


def test_changed_statistics_are_noticed_too():
    one = trainer(model=BatchNet(), crop=(8, 8, 8))
    one.model.norm.running_mean.add_(1.0)
    with pytest.raises(ValueError, match="changed after the trainer was made"):
        each_round(one, blob_sites())


# Threads


def in_threads(*calls):
    results = {}
    threads = [threading.Thread(target=lambda k=k, call=call: results.update({k: call()}))
               for k, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[k] for k in range(len(calls))]


def test_networks_made_in_threads_have_the_weights_of_their_seeds():
    def sha(seed):
        return weights_sha256(trainable(segresnet(seed=seed)))

    expected = [sha(seed) for seed in range(4)]
    for _ in range(3):
        assert in_threads(*(lambda seed=seed: sha(seed) for seed in range(4))) == expected


def test_runs_in_threads_give_the_same_bits_and_leave_global_state_alone():
    from monai.data import get_track_meta

    class Dropping(TinyNet):
        def forward(self, image):
            return self.last(nn.functional.dropout(torch.relu(self.first(image)), 0.3, self.training))

    networks = [Dropping(seed=seed) for seed in (0, 1)]

    def run(seed):
        one = SiteTrainer(model=copy.deepcopy(networks[seed]), lr=1e-2, steps=8, crop=(8, 8, 8), batch_size=1,
                          augment=augmentation(), precision="fp32")
        return weights_sha256(federate(one, blob_sites(), rounds=2, progress=False).state.params)

    torch.manual_seed(3)
    drawn = torch.rand(4)
    expected = [run(0), run(1)]
    torch.manual_seed(3)
    for _ in range(2):
        assert in_threads(lambda: run(0), lambda: run(1)) == expected
    assert torch.rand(4).equal(drawn) and get_track_meta()


def test_monais_flag_is_never_changed(monkeypatch):
    import monai.data.meta_obj as meta

    monkeypatch.setattr(meta, "set_track_meta", lambda value: pytest.fail("the flag was changed"))
    monkeypatch.setattr("monai.data.set_track_meta", lambda value: pytest.fail("the flag was changed"))
    crops = Crops([blob_patient("a", seed=1)], crop=(8, 8, 8), tumour_share=0.5, augment=augmentation(), seed=0)
    image, target = crops[0]
    assert type(image) is torch.Tensor and type(target) is torch.Tensor
    assert image.shape == (4, 8, 8, 8) and image.dtype == target.dtype == torch.float32


def test_crops_are_those_of_monais_transform():
    from monai.data import set_track_meta
    from monai.transforms import RandCropByPosNegLabeld

    from fedlab.core.seeds import derive

    patient = blob_patient("a", seed=1)
    theirs = RandCropByPosNegLabeld(("image", "label"), label_key="label", spatial_size=(6, 8, 5), pos=0.3, neg=0.7)
    theirs.set_random_state(seed=derive(4, "crop") % 2**32)
    ours = Crops([patient], crop=(6, 8, 5), tumour_share=0.3, augment=None, seed=4)
    set_track_meta(False)
    try:
        for _ in range(20):
            cut = theirs({"image": patient.image, "label": patient.label[None]})[0]
            assert ours[0][0].equal(cut["image"])
    finally:
        set_track_meta(True)


def test_global_generators_are_as_before():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with seeded(7):
        first = torch.rand(2)
    with seeded(7):
        assert torch.rand(2).equal(first)
    assert torch.rand(2).equal(expected)
    assert copy.deepcopy(segresnet(seed=1)).state_dict().keys() == segresnet(seed=2).state_dict().keys()
