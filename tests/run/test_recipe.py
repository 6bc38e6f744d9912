"""Whether two runs are the same is answered by content: what computes the same has one recipe, and nothing else has."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from monai.losses import DiceFocalLoss, DiceLoss, TverskyLoss
from torch import nn

from cohorts import TinyNet, blob_sites
from fedlab.core.errors import RunError
from fedlab.core.types import Site
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import TopK
from fedlab.privacy.personal_layers import PersonalLayers
from fedlab.run.federate import federate
from fedlab.run.recipe import differences, patients_sha256, recipe, recipe_sha256
from fedlab.training.trainer import DiceBCE, PolyDecay, augmentation
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
], ids=lambda value: type(value).__name__)
def test_what_computes_otherwise_has_another_recipe(one, other):
    assert recipe(one) != recipe(other) and differences(recipe(one), recipe(other))


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
        from fedlab.training.trainer import augmentation
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
