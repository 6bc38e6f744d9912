"""A checkpoint goes on with the same run only: the same by content, in whatever process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.losses import DiceFocalLoss, DiceLoss, TverskyLoss
from torch import nn

from cohorts import TinyNet, blob_sites
from fedlab.core.errors import RunError
from fedlab.core.types import Site
from fedlab.core.weights import weights_sha256
from fedlab.data.readers.folders import read_cohort
from fedlab.run.checkpoint import Checkpoint
from fedlab.run.federate import federate
from fedlab.training.defaults import DiceBCE, augmentation
from folders import write_patient
from trainers import trainer


class Around(nn.Module):
    """A loss around another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, y):
        return self.inner(x, y)


def sgd(momentum):
    def optimiser(parameters, lr):
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum)
    return optimiser


def changed(change) -> list[Site]:
    """The usual sites with a change of every patient."""
    return [replace(site, train=[change(p) for p in site.train]) for site in blob_sites()]


def corrected(patient):
    """One voxel of the label is drawn anew."""
    label = patient.label.clone()
    label[0, 0, 0] = 4
    return replace(patient, label=label)


def go_on(folder: Path, name: str, first: Callable[[], object], then: Callable[[], object]) -> int:
    """The number of rounds of a run that stops after one, and goes on with everything, and one setting, made anew."""
    for rounds, make in ((1, first), (2, then)):
        parts = {"sites": blob_sites(), "seed": 0, name: make()}
        sites, seed = parts.pop("sites"), parts.pop("seed")
        history = federate(trainer(**parts), sites, rounds=rounds, seed=seed, checkpoint=folder / "run", progress=False)
    return len(history.records)


REFUSED = {
    "learning rate": ("lr", lambda: 1e-3, lambda: 1e-2),
    "seed": ("seed", lambda: 0, lambda: 1),
    "MONAI's Dice": ("loss", lambda: DiceLoss(sigmoid=True), lambda: DiceLoss(sigmoid=True, squared_pred=True)),
    "focal loss": ("loss", lambda: DiceFocalLoss(sigmoid=True), lambda: DiceFocalLoss(sigmoid=True, gamma=5.0)),
    "Tversky": ("loss", lambda: TverskyLoss(sigmoid=True), lambda: TverskyLoss(sigmoid=True, alpha=0.9, beta=0.1)),
    "fedlab's loss": ("loss", lambda: DiceBCE(bce=0.5), lambda: DiceBCE(bce=0.3)),
    "inner loss": ("loss", lambda: Around(DiceBCE(bce=0.5)), lambda: Around(DiceBCE(bce=0.3))),
    "momentum": ("optimiser", lambda: sgd(0.9), lambda: sgd(0.0)),
    "augmentation": ("augment", augmentation, lambda: augmentation(flips=(0,))),
    "schedule": ("lr", lambda: lambda r: 1e-3, lambda: lambda r: 2e-3),
    "network": ("model", lambda: nn.Sequential(TinyNet(), nn.ReLU()), lambda: nn.Sequential(TinyNet(), nn.Tanh())),
    "weights at the start": ("model", TinyNet, lambda: TinyNet(seed=1)),
    "images": ("sites", blob_sites, lambda: changed(lambda p: replace(p, image=p.image.flip(1)))),
    "labels": ("sites", blob_sites, lambda: changed(corrected)),
    "a site's patients": ("sites", blob_sites, lambda: blob_sites((3, 1))),
}


@pytest.mark.parametrize(("name", "first", "then"), REFUSED.values(), ids=REFUSED)
def test_another_run_is_refused(tmp_path, name, first, then):
    with pytest.raises(RunError, match="holds a run with other settings or data"):
        go_on(tmp_path, name, first, then)
    assert go_on(tmp_path, name, first, first) == 2  # and the folder is as it was


ACCEPTED = {
    "nothing": ("seed", lambda: 0, lambda: 0),
    "a lambda written again": ("lr", lambda: lambda r: 1e-3, lambda: lambda r: 1e-3),
    "a loss made again": ("loss", lambda: Around(DiceLoss(sigmoid=True)), lambda: Around(DiceLoss(sigmoid=True))),
    "an optimiser made again": ("optimiser", lambda: sgd(0.9), lambda: sgd(0.9)),
    "held-out patients": ("sites", blob_sites, lambda: [replace(site, val=site.train) for site in blob_sites()]),
}


@pytest.mark.parametrize(("name", "first", "then"), ACCEPTED.values(), ids=ACCEPTED)
def test_the_same_run_goes_on(tmp_path, name, first, then):
    assert go_on(tmp_path, name, first, then) == 2


def test_labels_that_are_corrected_in_place_are_other_patients(tmp_path):
    sites = blob_sites()
    federate(trainer(), sites, rounds=1, checkpoint=tmp_path / "run", progress=False)
    sites[1].train[0].label[0, 0, 0] = 4
    with pytest.raises(RunError, match=r"patients\.site-1"):
        federate(trainer(), sites, rounds=2, checkpoint=tmp_path / "run", progress=False)


def test_a_finished_run_says_that_labels_were_corrected_on_disk(tmp_path):
    for number in range(2):
        write_patient(tmp_path / "scans", f"P{number}", seed=number)

    def run():
        sites = [Site("Bern", read_cohort(tmp_path / "scans", progress=False))]
        return federate(trainer(), sites, rounds=1, checkpoint=tmp_path / "run", progress=False)

    first = run()
    assert weights_sha256(run().state.params) == weights_sha256(first.state.params)  # there is nothing left to do
    file, = (tmp_path / "scans" / "P0").glob("*seg*")
    label = nibabel.load(file)
    values = np.asarray(label.dataobj).copy()
    values[values == 1] = 2
    nibabel.save(nibabel.Nifti1Image(values, label.affine), file)
    with pytest.raises(RunError, match=r"patients\.Bern: .*choose another folder, or remove this one to train anew"):
        run()


KERNEL = """
    import linecache, sys
    import torch
    from cohorts import blob_sites
    from fedlab import federate
    from fedlab.core.weights import weights_sha256
    from trainers import trainer

    torch.set_num_threads(1)
    rounds, name, *folder = sys.argv[1:]
    cell = '''
    HALVED = 0.5
    def schedule(round):
        return 0.01 * HALVED ** round
    '''
    linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
    exec(compile(cell, name, "exec"))
    history = federate(trainer(lr=schedule), blob_sites(), rounds=int(rounds), progress=False,
                       checkpoint=folder[0] if folder else None)
    print(len(history.records), weights_sha256(history.state.params))
    """


def kernel(*arguments: object) -> list[str]:
    """What a kernel prints that runs the cells of a notebook and ends."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(KERNEL), *map(str, arguments)], capture_output=True,
                         text=True, timeout=300, env={**os.environ, "PYTHONPATH": path})
    assert out.returncode == 0, out.stderr
    return out.stdout.split()[-2:]


def test_a_schedule_of_a_notebook_survives_a_restart_of_its_kernel(tmp_path):
    assert kernel(1, "<ipython-input-3>", tmp_path / "run")[0] == "1"
    resumed = kernel(3, "<ipython-input-1>", tmp_path / "run")
    assert resumed == kernel(3, "<ipython-input-2>") and resumed[0] == "3"
    assert len(resumed[1]) == len(weights_sha256({}))


def test_round_ten_thousand_is_later_than_the_one_before_it(tmp_path):
    """Both are there if a run is killed after it has written the one and before it has removed the other."""
    for rounds in (1, 2):
        federate(trainer(), blob_sites(), rounds=rounds, progress=False, checkpoint=tmp_path / str(rounds))
    kept = tmp_path / "2"
    (kept / "round-0002").rename(kept / "round-10000")
    (tmp_path / "1" / "round-0001").rename(kept / "round-9999")
    assert len(Checkpoint(kept).records()) == 2
