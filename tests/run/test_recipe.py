"""Whether two runs are the same is answered by content: what computes the same has one recipe, and nothing else has."""

from __future__ import annotations

import functools
import importlib
import json
import re
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss, DiceFocalLoss, DiceLoss, TverskyLoss
from monai.transforms import Compose, RandFlipd, RandScaleIntensityd
from torch import nn

from cohorts import TinyNet, blob_sites
from fedlab.core import hardware
from fedlab.core.errors import RunError
from fedlab.core.types import Site
from fedlab.core.weights import trainable
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import Quantise, TopK
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.personal_layers import PersonalLayers
from fedlab.run.federate import federate, make_run
from fedlab.run.recipe import differences, patients_sha256, recipe, recipe_sha256, run_recipe
from fedlab.strategies import FedAvg
from fedlab.training.defaults import DiceBCE, augmentation
from fedlab.training.schedules import PolyDecay
from trainers import trainer


def cell(source, **values):
    """What a notebook cell defines."""
    names = {"__name__": "__main__", **values}
    exec(textwrap.dedent(source), names)
    return names


def with_momentum(momentum):
    def optimiser(parameters, lr):
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum)
    return optimiser


class Wraps(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


class Mine(Privacy):
    def __init__(self, *, factor, schedule=None):
        self.factor, self.schedule = factor, schedule

    def protect(self, update, state, rng):
        return update.map(lambda t: t * self.factor)


class MineToo(Privacy):
    def __init__(self, *, factor, schedule=None):
        self.factor, self.schedule = factor, schedule


@dataclass
class Slotted:
    __slots__ = ("x",)
    x: int


class Mode(Enum):
    FAST = 1
    SLOW = 2


class Weighted(nn.Module):
    """A loss around another one, and tensors that are not trained."""

    def __init__(self, *, offset=0.0, scale=1.0):
        super().__init__()
        self.inner = DiceBCE()
        self.register_buffer("offset", torch.tensor(offset))
        self.scale = nn.Parameter(torch.tensor(scale), requires_grad=False)


class Rates(list):
    """A schedule that is a list with a setting."""

    def __init__(self, rates, *, factor=1.0):
        super().__init__(rates)
        self.factor = factor

    def __call__(self, round):
        return self[round] * self.factor


def net(change):
    made = TinyNet()
    change(made)
    return made


SGD, ADAM = torch.optim.SGD, torch.optim.Adam
ONE_LINE = [lambda p, lr: torch.optim.ASGD(p, lr), lambda p, lr: torch.optim.Adamax(p, lr)]
INNER = [lambda r: [k * 2.0 for k in range(r)], lambda r: [k * 3.0 for k in range(r)]]
DIFFERENT = {
    "weights of regions": (DiceCELoss(sigmoid=True, weight=torch.tensor([1.0, 1.0, 1.0])),
                           DiceCELoss(sigmoid=True, weight=torch.tensor([1.0, 1.0, 2.0]))),
    "buffers": (Weighted(), Weighted(offset=0.1)), "frozen weights": (Weighted(), Weighted(scale=0.1)),
    "a trained weight": (TinyNet(), net(lambda made: made.last.requires_grad_(False))),
    "types of weights": (TinyNet(), TinyNet().double()),
    "a layer": (nn.Conv3d(4, 3, 3, padding=1), nn.Conv3d(4, 3, 3, padding=1, padding_mode="circular")),
    "a partial's function": (functools.partial(SGD, weight_decay=0.1), functools.partial(ADAM, weight_decay=0.1)),
    "a partial's arguments": (functools.partial(with_momentum, 0.9), functools.partial(with_momentum, 0.0)),
    "lambdas on one line": ONE_LINE, "constants inside lambdas": INNER,
    "a default": (lambda r, k=1: k, lambda r, k=2: k),
    "schedules": (PolyDecay(start=1e-3, rounds=10), PolyDecay(start=1e-3, rounds=20)),
    "a list's method": ([1e-3, 1e-4].__getitem__, [1e-3, 1e-5].__getitem__),
    "an object's method": (Rates([1e-3]).__call__, Rates([1e-3], factor=2.0).__call__),
    "a list with a setting": (Rates([1e-3]), Rates([1e-3], factor=2.0)), "a list's class": (Rates([1e-3]), [1e-3]),
    "functions of torch": (torch.relu, torch.sigmoid), "functions of numpy": (np.sqrt, np.exp),
    "a transform": (RandFlipd(keys=["image"], prob=0.5), RandFlipd(keys=["image"], prob=0.2)),
    "transforms": (Compose([RandScaleIntensityd(keys=["image"], factors=0.1, prob=0.5)]),
                   Compose([RandScaleIntensityd(keys=["image"], factors=0.2, prob=0.5)])),
    "an order": (TopK(keep=0.1) + Quantise(), Quantise() + TopK(keep=0.1)),
    "arrays": (np.zeros(3), np.array([0.0, 0.0, 1e-9])),
    "arrays of objects": (np.array([1, "a"], dtype=object), np.array([1, "b"], dtype=object)),
    "members": (Mode.FAST, Mode.SLOW), "slots": (Slotted(1), Slotted(2)),
    "patterns": (re.compile("a"), re.compile("b")),
    "infinity": (float("nan"), float("inf")), "nothing": (None, False),
}


@pytest.mark.parametrize("make", [
    trainer, lambda: trainer(augment=augmentation()), lambda: trainer(lr=PolyDecay(start=0.1, rounds=5)),
    lambda: trainer(loss=DiceFocalLoss(sigmoid=True)), lambda: trainer(optimiser=with_momentum(0.9)),
    lambda: trainer(optimiser=functools.partial(torch.optim.SGD, momentum=0.9)),
    lambda: TopK(keep=0.1) + PersonalLayers(names=["last.*"]), lambda: Mine(factor=2.0, schedule=lambda r: r + 1),
    lambda: {"a": np.arange(3), "b": torch.ones(2), "c": {3, 1, 2}, "d": Slotted(1), "e": float("nan")},
    lambda: cell("SCALE = 3\ndef lr(r):\n    return SCALE / (r + 1)")["lr"],
])
def test_what_is_made_again_alike_has_one_recipe(make):
    assert recipe(make()) == recipe(make()) and len(recipe_sha256(make())) == 64


@pytest.mark.parametrize("one, other", [
    (trainer(), trainer(lr=2e-2)),
    (trainer(), trainer(loss=DiceLoss(sigmoid=True))),
    (DiceLoss(sigmoid=True), DiceLoss(sigmoid=True, squared_pred=True)),
    (DiceFocalLoss(sigmoid=True), DiceFocalLoss(sigmoid=True, gamma=5.0)),
    (TverskyLoss(sigmoid=True), TverskyLoss(sigmoid=True, alpha=0.9, beta=0.1)),
    (DiceBCE(bce=0.5), DiceBCE(bce=0.25)),
    (Wraps(DiceLoss(sigmoid=True)), Wraps(DiceLoss(sigmoid=True, squared_pred=True))),
    (nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh())),
    (nn.Dropout(0.1), nn.Dropout(0.2)),
    (with_momentum(0.9), with_momentum(0.0)),
    (functools.partial(torch.optim.SGD, momentum=0.9), functools.partial(torch.optim.SGD, momentum=0.8)),
    (augmentation(), augmentation(flips=(0,))),
    (Mine(factor=2.0), Mine(factor=3.0)), (Mine(factor=2.0), MineToo(factor=2.0)),
    (lambda r: 1e-3, lambda r: 1e-2), (lambda r: r + 1, lambda r: r - 1),
    (cell("def lr(r):\n    return K", K=1)["lr"], cell("def lr(r):\n    return K", K=2)["lr"]),
    (torch.ones(2), torch.zeros(2)), (torch.ones(2), torch.ones(2).double()), ([1, 2], [2, 1]), ("1", 1),
    *DIFFERENT.values(),
], ids=lambda value: type(value).__name__)
def test_what_computes_otherwise_has_another_recipe(one, other):
    assert recipe(one) != recipe(other) and differences(recipe(one), recipe(other))
    assert recipe_sha256(one) != recipe_sha256(other)


def test_layout_and_comments_are_not_content():
    file = {"here": 1}

    def one(r):
        return r + file["here"]  # a comment

    def two(r):

        return (r
                + file["here"])

    two.__qualname__ = one.__qualname__
    first, second = recipe(one), recipe(two)
    assert first["source"].replace("def one", "def two") == second["source"] and first["closure"] == second["closure"]


def test_a_recipe_is_the_same_in_another_process(tmp_path):
    script = "import sys; sys.path[:0] = sys.argv[1:]\n" + textwrap.dedent("""
        from trainers import trainer
        from fedlab.run.recipe import recipe_sha256
        from fedlab.training.defaults import augmentation
        print(recipe_sha256([trainer(augment=augmentation()), {"c": {"x", "y", "z"}}]))
        """)
    out = subprocess.run([sys.executable, "-c", script, *sys.path], capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == recipe_sha256([trainer(augment=augmentation()), {"c": {"x", "y", "z"}}]), out.stderr


def test_patients_are_known_by_their_images_and_labels():
    patients = blob_sites((2,))[0].train
    same, before = blob_sites((2,))[0].train, patients_sha256(patients)
    assert patients_sha256(same) == before and patients_sha256(same[::-1]) != before
    first = patients[0]
    for changed in (replace(first, image=first.image + 1e-3), replace(first, label=first.label.flip(0)),
                    replace(first, label=None), replace(first, affine=first.affine * 2), replace(first, id="other")):
        assert patients_sha256([changed, patients[1]]) != before


OTHER_DATA = [Site(site.name, [replace(p, image=p.image.flip(1)) for p in site.train], site.val)
              for site in blob_sites()]


@pytest.mark.parametrize("changed, said", [
    (dict(loss=DiceLoss(sigmoid=True, squared_pred=True)), "trainer.settings.loss"),
    (dict(optimiser=with_momentum(0.5)), "trainer.settings.optimiser"),
    (dict(sites=OTHER_DATA), "patients.site-0"), (dict(privacy=Mine(factor=0.5)), "privacy"),
], ids=["loss", "optimiser", "data", "technique"])
def test_a_checkpoint_is_of_one_run_by_content(tmp_path, changed, said):
    def run(*, rounds, **more):
        parts = dict(loss=DiceLoss(sigmoid=True), optimiser=with_momentum(0.9), sites=blob_sites(),
                     privacy=Privacy()) | more
        one = trainer(loss=parts["loss"], optimiser=parts["optimiser"])
        return federate(one, parts["sites"], privacy=parts["privacy"], rounds=rounds, checkpoint=tmp_path / "run",
                        progress=False)

    run(rounds=1)
    with pytest.raises(RunError, match=f"other settings or data .*{said}"):
        run(rounds=2, **changed)
    assert len(run(rounds=2).records) == 2  # all objects are made anew


def test_a_run_keeps_the_precision_that_auto_stood_for(tmp_path, monkeypatch):
    def run(precision, *, rounds):
        return federate(trainer(precision=precision), blob_sites(), rounds=rounds, checkpoint=tmp_path / "run",
                        progress=False)

    monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: False)
    assert run("auto", rounds=1).precision == "fp32"
    monkeypatch.setattr(hardware, "_cpu_has_bf16", lambda: True)  # as on another machine
    with pytest.raises(RunError, match=r"other settings or data .*trainer\.settings\.precision"):
        run("auto", rounds=2)
    assert run("fp32", rounds=2).published().precision == "fp32"


def test_a_schedule_of_a_notebook_survives_a_kernel_restart(tmp_path):
    cells = "def lr(number):\n    return 0.01 / (number + 1)"
    for rounds in (1, 2):
        history = federate(trainer(lr=cell(cells)["lr"]), blob_sites(), rounds=rounds, checkpoint=tmp_path / "run",
                           progress=False)
    assert len(history.records) == 2
    with pytest.raises(RunError, match=r"trainer\.settings\.lr"):
        federate(trainer(lr=cell(cells.replace("0.01", "0.02"))["lr"]), blob_sites(), rounds=3,
                 checkpoint=tmp_path / "run", progress=False)


def test_a_model_s_tensors_that_are_not_trained_count():
    frozen = TinyNet()
    frozen.first.requires_grad_(False)
    other = TinyNet(seed=1)
    other.first.requires_grad_(False)
    assert recipe(frozen) != recipe(other) and recipe(TinyNet()) == recipe(TinyNet(seed=1))  # a start has its own hash


def test_orders_that_mean_nothing_and_addresses_do_not_count():
    assert recipe({"a": 1, "b": [2, {"c": 3, "d": 4}]}) == recipe({"b": [2, {"d": 4, "c": 3}], "a": 1})
    assert recipe({"x", "y", "z"}) == recipe({"z", "y", "x"}) != recipe({"x", "y"})
    parts = [Mine(factor=object(), schedule=Wraps(nn.ReLU())), with_momentum(0.9), augmentation(), DPSGD(
        clip=1.0, noise_multiplier=1.0, delta=1e-3, batch=2)]
    assert " at 0x" not in json.dumps(recipe(parts))


def test_an_object_that_holds_itself_has_a_recipe():
    one, other = Mine(factor=1.0, schedule=[]), Mine(factor=1.0, schedule=[])
    for technique in (one, other):
        technique.schedule.append(technique)
    assert recipe(one) == recipe(other)


def test_an_object_that_stands_for_another_has_its_recipe():
    class Watch:
        stands_for = FedAvg(sample=0.5)

    assert recipe(Watch()) == recipe(FedAvg(sample=0.5))


def test_training_changes_no_recipe():
    """The values of trained weights are not settings; moments, caches and random states come and go."""
    technique = DPSGD(clip=1.0, noise_multiplier=1.0, delta=1e-3, batch=1) + TopK(keep=0.5)
    parts = [trainer(augment=augmentation()), technique]
    before = recipe(parts)
    federate(parts[0], blob_sites((2, 2)), privacy=technique, rounds=1, progress=False)
    assert recipe(parts) == before
    with torch.no_grad():
        for p in trainable(parts[0].model).values():
            p.add_(1.0)
    assert recipe(parts) == before


def test_the_difference_is_named():
    one, other = ({"trainer": recipe(trainer(loss=DiceFocalLoss(sigmoid=True, gamma=gamma)))} for gamma in (2.0, 5.0))
    assert any(line.startswith("trainer.settings.loss.") and line.endswith("gamma: 2.0 there, 5.0 here")
               for line in differences(one, other))
    assert differences(one, one) == []


def one_voxel(tensor, value):
    """The tensor with another value in one voxel."""
    out = tensor.clone()
    out[..., 0, 0, 0] = value
    return out


def test_one_voxel_of_one_patient_counts_also_where_it_is_corrected_in_place():
    patients = blob_sites((2,))[0].train
    before, first = patients_sha256(patients), patients[0]
    others = [patients_sha256([changed, patients[1]]) for changed in (
        replace(first, label=one_voxel(first.label, 4)), replace(first, image=one_voxel(first.image, 0.5)),
        replace(first, image=first.image.half()))]
    assert len({before, *others}) == 4
    first.label[0, 0, 0] = 4
    assert patients_sha256(patients) == others[0]
    first.label[0, 0, 0] = 0
    assert patients_sha256(patients) == before


def test_a_run_is_its_parts_its_seed_and_the_patients_that_it_trains_on():
    sites = blob_sites()
    usual = run_recipe(make_run(trainer(), sites))
    assert usual == run_recipe(make_run(trainer(), blob_sites(), rounds=99))
    assert usual == run_recipe(make_run(trainer(), [replace(site, val=()) for site in sites]))
    first, *rest = sites[1].train
    corrected = [sites[0], replace(sites[1], train=[replace(first, label=one_voxel(first.label, 4)), *rest])]
    for where, run in {"patients.site-1": make_run(trainer(), corrected),
                       "seed": make_run(trainer(), sites, seed=1)}.items():
        assert [line.partition(":")[0] for line in differences(usual, run_recipe(run))] == [where]


def test_functions_of_equal_code_keep_their_own_source(tmp_path, monkeypatch):
    """The type of an argument is in the source, not in the code, and equal code is equal in every dictionary."""
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for kind in ("int", "float"):
        (tmp_path / f"of_{kind}.py").write_text(f"def scaled(x: {kind} = 1):\n    return 2 * x\n", encoding="utf-8")
        found.append(importlib.import_module(f"of_{kind}").scaled)
    assert found[0].__code__ == found[1].__code__
    assert [recipe(one)["source"].splitlines()[0] for one in found * 2] == [
        "def scaled(x: int=1):", "def scaled(x: float=1):"] * 2
