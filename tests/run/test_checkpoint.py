"""A checkpoint goes on with the same run only: the same by content, in whatever process."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.losses import DiceFocalLoss, DiceLoss, TverskyLoss
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from cohorts import TinyNet, blob_sites
from fedlab.core.errors import RunError
from fedlab.core.types import ServerState, Site
from fedlab.core.weights import weights_sha256
from fedlab.data.readers.folders import read_cohort
from fedlab.run.checkpoint import Checkpoint, full_disk_explained
from fedlab.run.federate import federate
from fedlab.training.defaults import DiceBCE, augmentation
from folders import write_patient
from trainers import trainer
from warm import PYTHON


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


def kernel(*arguments: object, python: Sequence[str] = PYTHON) -> list[str]:
    """What a kernel prints that runs the cells of a notebook and ends."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    out = subprocess.run([*python, "-c", textwrap.dedent(KERNEL), *map(str, arguments)], capture_output=True,
                         text=True, timeout=300, env={**os.environ, "PYTHONPATH": path})
    assert out.returncode == 0, out.stderr
    return out.stdout.split()[-2:]


def test_a_schedule_of_a_notebook_survives_a_restart_of_its_kernel(tmp_path):
    assert kernel(1, "<ipython-input-3>", tmp_path / "run")[0] == "1"
    resumed = kernel(3, "<ipython-input-1>", tmp_path / "run", python=[sys.executable])  # hashes texts otherwise
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


# The folder, written and read by hand

START = {"w": torch.tensor([1.0, 2.0])}


def opened(folder: Path, **recipe) -> Checkpoint:
    return Checkpoint.open(folder, recipe={"seed": 3, "rounds": "any", **recipe}, start=START)


def odd_state(round: int) -> ServerState:
    """Every part filled, with names that a path or a key could take for something else."""
    shared = torch.arange(6.0).reshape(2, 3).T  # neither contiguous nor of one owner
    return ServerState(
        round=round, params={"a|b": shared, "first.weight": torch.tensor(0.5)}, broadcast={"clip|norm": torch.ones(1)},
        buffers={"count": torch.tensor([7, 9])}, moments={"of | Zürich/1": {"x|y": torch.tensor([3.0])}, "m": {}},
        models={"site/0|a": {"a|b": shared}, "site-1": {"a|b": shared}},
        namespaces={"privacy 0": {"seen": torch.tensor([1.0, float(round)], dtype=torch.float64)}},
        ledger={"format": "x", "entries": [1, "δ"]})


def parts(state: ServerState) -> dict[str, object]:
    """All of it, as plain values by name."""
    found: dict[str, object] = {"round": state.round, "ledger": state.ledger}
    for kind in ("params", "broadcast", "buffers"):
        found |= {f"{kind} {name}": (t.dtype, t.tolist()) for name, t in getattr(state, kind).items()}
    for kind in ("moments", "models", "namespaces"):
        found |= {f"{kind} {group} {name}": (t.dtype, t.tolist())
                  for group, slots in getattr(state, kind).items() for name, t in slots.items()}
    return found


def test_a_state_comes_back_whole_whatever_its_names(tmp_path):
    checkpoint, records = opened(tmp_path / "deep" / "run"), [{"round": 0, "loss": 0.25, "text": "Zürich"}]
    assert checkpoint.load() is None and checkpoint.state() is None and checkpoint.records() == []
    states = checkpoint.new_states(["a", "b"])
    with states.working("a") as state:
        state.updates, state.namespaces["privacy"] = 5, {"seen": torch.tensor([2.5])}
    checkpoint.save(odd_state(1), states, records)
    assert (checkpoint.folder / "round-0001" / "state.safetensors").is_file()
    again = opened(tmp_path / "deep" / "run")
    assert parts(again.state()) == parts(odd_state(1)) and again.records() == records
    state, kept, read = again.load()
    assert parts(state) == parts(odd_state(1)) and read == records
    assert list(kept) == ["a", "b"] and kept["a"].updates == 5 and kept["b"].updates == 0
    assert kept["a"].namespaces["privacy"]["seen"].tolist() == [2.5]
    assert kept.folder == checkpoint.folder / "site-states"


def test_of_all_rounds_the_last_is_kept_and_read(tmp_path):
    checkpoint = opened(tmp_path)
    states = checkpoint.new_states(["a"])
    (tmp_path / "round-notes").mkdir()  # somebody's own
    (tmp_path / "round-0007").write_text("a file")
    for number in (8, 9, 10, 11):
        scratch = tmp_path / f"round-{number:04d}.part"
        scratch.mkdir()
        (scratch / "left over").write_text("of a kill")
        checkpoint.save(odd_state(number), states, [{"round": number}])
        found = sorted(path.name for path in tmp_path.glob("round-*") if path.is_dir())
        assert found == [f"round-{number:04d}", "round-notes"]
        assert not (tmp_path / found[0] / "left over").exists()
    assert checkpoint.records() == [{"round": 11}] and checkpoint.state().round == 11


def test_a_state_of_little_comes_back_as_little(tmp_path):
    checkpoint = opened(tmp_path)
    checkpoint.save(ServerState(round=2, params=START), None, [])
    state = checkpoint.state()
    assert parts(state) == parts(ServerState(round=2, params=START)) and state.moments == state.models == {}
    assert checkpoint.records() == []


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "round.json").unlink(), lambda folder: (folder / "state.safetensors").unlink(),
    lambda folder: (folder / "round.json").write_text("{", "utf-8"),
    lambda folder: (folder / "round.json").write_text("{}", "utf-8"),
    lambda folder: (folder / "state.safetensors").write_bytes(b"not tensors"),
    lambda folder: save_file({"params|w": torch.tensor([1.0, 2.5])}, folder / "state.safetensors")])
def test_a_damaged_round_is_refused_however_it_is_read(tmp_path, damage):
    checkpoint = opened(tmp_path)
    states = checkpoint.new_states(["a"])
    checkpoint.save(ServerState(round=1, params=START), states, [])
    damage(tmp_path / "round-0001")
    for read in (checkpoint.load, checkpoint.state, checkpoint.records):
        with pytest.raises(RunError, match=r"round-0001 is damaged .*remove the run's folder to start over"):
            read()


def test_a_folder_is_of_the_run_that_began_it(tmp_path):
    assert opened(tmp_path / "run").recipe == {"seed": 3, "rounds": "any"}
    note = (tmp_path / "run" / "run.json").read_bytes()
    assert opened(tmp_path / "run").recipe == {"seed": 3, "rounds": "any"}
    several = {"seed": 4, "rounds": 5, "a": 1, "b": 2}
    with pytest.raises(RunError, match=r'\(a: null there, 1 here; b: null there, 2 here; rounds: "any" there, 5 here '
                                       r"and 1 more\); choose"):
        opened(tmp_path / "run", **several)
    with pytest.raises(RunError, match=r"\(a: .*; rounds: .*; seed: 3 there, 4 here\); choose"):
        opened(tmp_path / "run", **{**several, "a": 1} | {"b": None})
    with pytest.raises(RunError, match=r"\(start_sha256: "):
        Checkpoint.open(tmp_path / "run", recipe={"seed": 3, "rounds": "any"}, start={"w": torch.ones(2)})
    (tmp_path / "run" / "run.json").write_text("{", "utf-8")
    with pytest.raises(RunError, match=r"run is damaged .*remove the folder to start over"):
        opened(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_bytes(note)
    opened(str(tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    assert opened(tmp_path / "empty").folder == tmp_path / "empty" and (tmp_path / "empty" / "run.json").is_file()


def test_a_run_that_changes_its_parts_goes_on_with_the_changed_ones_only_as_a_whole(tmp_path):
    """`leave` notes what this process leaves; the run as it began, and as it was left, both go on."""
    checkpoint = opened(tmp_path, technique=1, strategy=(1, 2))
    checkpoint.leave({"technique": 1, "strategy": (1, 2)})
    assert not (tmp_path / "as-left.json").exists()
    checkpoint.leave({"technique": 7})
    assert json.loads((tmp_path / "as-left.json").read_text("utf-8")) == {"technique": 7}
    for technique in (1, 7):
        assert opened(tmp_path, technique=technique, strategy=(1, 2)).recipe["technique"] == 1  # as it began
    for wrong in ({"technique": 8}, {"strategy": (1, 3)}, {"technique": 7, "seed": 4}):
        with pytest.raises(RunError, match="other settings or data"):
            opened(tmp_path, **{"technique": 1, "strategy": (1, 2)} | wrong)


def test_states_of_a_run_that_begins_are_new(tmp_path):
    checkpoint = opened(tmp_path)
    with checkpoint.new_states(["a"]).working("a") as state:
        state.updates = 5
    states = checkpoint.new_states(["a", "c"])
    assert list(states) == ["a", "c"] and states["a"].updates == 0 and states["a"].enrolled
    assert states.folder == tmp_path / "site-states"


@pytest.mark.parametrize(("error", "told"), [
    (OSError(errno.ENOSPC, "no space left"), True), (OSError(errno.EDQUOT, "quota"), True),
    (SafetensorError("I/O"), True), (OSError(errno.EACCES, "not yours"), False), (ValueError("other"), False)])
def test_only_a_full_disk_is_explained_as_one(error, told):
    with pytest.raises(RunError if told else type(error)) as caught, full_disk_explained():
        raise error
    assert (caught.value.__cause__ is error) is told and (caught.value is error) is not told
    assert ("free some space" in str(caught.value)) is told
