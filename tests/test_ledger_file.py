"""A site's ledger on disk forgets nothing: not when it is killed, not when an old copy comes back."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from cohorts import TinyNet, blob_sites
from filelock import FileLock
from test_privacy_frame import STEP, TERMS, Noise
from test_training import trainer

from fedlab.engines.local import Local
from fedlab.errors import PrivacyBudgetExhausted, PrivacyError
from fedlab.models import weights_sha256
from fedlab.privacy import ledger_file
from fedlab.privacy.accounting import Gaussian, Ledger, epsilon_of
from fedlab.privacy.ledger_file import LedgerFile
from fedlab.server import each_round, federate
from fedlab.types import Site


def run(folder: Path, *, rounds: int = 4, privacy=None, sites=None, one=None, seed: int = 0, **more):
    return federate(one or trainer(), sites or blob_sites(), privacy=privacy or Noise(), rounds=rounds, seed=seed,
                    progress=False, engine=Local(ledgers=folder / "ledgers"), **more)


def entries(folder: Path, site: str) -> list[tuple[int, str]]:
    """Round and stream of each entry in a site's file."""
    note = json.loads((folder / "ledgers" / f"{site}.ledger.json").read_text("utf-8"))["ledger"]
    return sorted((entry["round"], entry["stream"]) for entry in [*note["entries"], *note["before"]])


def killed(work) -> None:
    """Runs `work` in a process of its own, which must end by SIGKILL."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, process.exitcode


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory):
    """A run of four rounds that nothing disturbs, and the folder it used."""
    folder = tmp_path_factory.mktemp("whole")
    return run(folder, checkpoint=folder / "run"), folder


class KilledInProtect(Noise):
    """Dies in round 2 at the second site, after the charge and before the noise."""

    def __repr__(self) -> str:
        return Noise.__repr__(Noise())  # the same run to a checkpoint

    def protect(self, update, memory, rng):
        if update.site == "site-1" and Ledger(memory).note()["round"] == 2:
            Ledger(memory).charge(STEP, terms=TERMS)
            kill()
        return super().protect(update, memory, rng)


def dies_in_protect(folder, patch):
    run(folder, privacy=KilledInProtect(), checkpoint=folder / "run")


def dies_while_writing(folder, patch):
    """In round 2, the new file is written but not yet in place."""
    replace = os.replace

    def dying(source, target):
        if str(target).endswith("site-1.ledger.json") and '"round": 2' in Path(source).read_text("utf-8"):
            kill()
        replace(source, target)

    patch.setattr(ledger_file.os, "replace", dying)
    run(folder, checkpoint=folder / "run")


def dies_after_saving(folder, patch):
    """In round 2, the ledger is in place but the update has not been handed to the server."""
    save = LedgerFile.save

    def dying(self, memory):
        save(self, memory)
        if self.site == "site-1" and Ledger(memory).note()["round"] == 2:
            kill()

    patch.setattr(LedgerFile, "save", dying)
    run(folder, checkpoint=folder / "run")


@pytest.mark.parametrize("death,known", [(dies_in_protect, 2), (dies_while_writing, 2), (dies_after_saving, 3)])
def test_a_killed_run_goes_on_to_the_same_end_with_nothing_spent_twice(tmp_path, whole, death, known):
    undisturbed, other = whole
    with pytest.MonkeyPatch.context() as patch:
        killed(lambda: death(tmp_path, patch))
    assert len(entries(tmp_path, "site-0")) == 3  # its update had been handed on
    assert len(entries(tmp_path, "site-1")) == known
    resumed = run(tmp_path, checkpoint=tmp_path / "run")
    assert weights_sha256(resumed.state.params) == weights_sha256(undisturbed.state.params)
    assert resumed.spent().equals(undisturbed.spent())
    for site in ("site-0", "site-1"):
        assert entries(tmp_path, site) == entries(other, site)
        assert [number for number, _ in entries(tmp_path, site)] == [0, 1, 2, 3]
    assert not list((tmp_path / "ledgers").glob("*.part"))


def test_an_old_checkpoint_lowers_nothing_and_spends_nothing_twice(tmp_path, whole):
    _, other = whole
    engine = Local(ledgers=tmp_path / "ledgers")
    steps = each_round(trainer(), blob_sites(), privacy=Noise(), rounds=4, engine=engine)
    next(steps)
    state = next(steps).state
    old = {site: {group: dict(tensors) for group, tensors in memory.items()} for site, memory in engine.memory.items()}
    list(steps)
    assert entries(tmp_path, "site-0") == entries(other, "site-0")
    again = Local(ledgers=tmp_path / "ledgers")
    again.memory = old
    repeated = list(each_round(trainer(), blob_sites(), privacy=Noise(), rounds=4, engine=again, state=state))
    assert entries(tmp_path, "site-0") == entries(other, "site-0")
    full = epsilon_of([STEP] * 4, delta=1e-2)  # the earlier rounds 2 and 3 are not forgotten in round 2
    assert [finished.spent["site-0"][0].epsilon for finished in repeated] == [full, full]


def test_an_old_copy_of_the_file_lowers_nothing(tmp_path):
    engine = Local(ledgers=tmp_path / "ledgers")
    steps = each_round(trainer(), blob_sites((1,)), privacy=Noise(), rounds=4, engine=engine)
    next(steps)
    path = tmp_path / "ledgers" / "site-0.ledger.json"
    old = path.read_bytes()
    next(steps)
    path.write_bytes(old)
    assert [s.epsilon for s in next(steps).spent["site-0"]] == [epsilon_of([STEP] * 3, delta=1e-2)]
    assert [number for number, _ in entries(tmp_path, "site-0")] == [0, 1, 2]


def test_a_later_run_adds_to_what_the_site_has_spent_unless_it_is_the_same_run(tmp_path):
    first = run(tmp_path, rounds=2)
    same = run(tmp_path, rounds=2)
    assert weights_sha256(first.state.params) == weights_sha256(same.state.params)
    assert len(entries(tmp_path, "site-0")) == 2
    for changed in (dict(seed=1), dict(one=trainer(lr=2e-2)), dict(privacy=Noise(max_epsilon=99.0))):
        before = len(entries(tmp_path, "site-0"))
        run(tmp_path, rounds=1, **changed)
        assert len(entries(tmp_path, "site-0")) == before + 1, changed
    last = run(tmp_path, rounds=3)  # rounds 0 and 1 are known
    assert len(entries(tmp_path, "site-0")) == 6
    assert last.spent()["epsilon"].max() == epsilon_of([STEP] * 6, delta=1e-2)


def test_what_the_site_remembers_changes_the_noise():
    """Moments kept from a run before make another update of round 0: its noise must be another too."""
    engine = Local()
    federate(trainer(), blob_sites((1,)), privacy=Noise(), rounds=1, engine=engine, progress=False)
    federate(trainer(), blob_sites((1,)), privacy=Noise(), rounds=1, engine=engine, progress=False)
    assert len(Ledger(engine.memory["site-0"]).releases()) == 2


def test_the_same_noise_on_another_update_is_refused(tmp_path):
    run(tmp_path, rounds=1, sites=blob_sites((1,)))
    site = blob_sites((1,))[0]
    patient = site.train[0]
    changed = type(patient)(patient.id, patient.image * 2, patient.label, patient.affine)
    with pytest.raises(PrivacyError, match=r"training gave another update.*another seed.*nothing was sent"):
        run(tmp_path, rounds=1, sites=[Site(site.name, [changed], site.val)])
    run(tmp_path, rounds=1, sites=[Site(site.name, [changed], site.val)], seed=5)
    assert len(entries(tmp_path, "site-0")) == 2


def test_a_budget_counts_what_other_runs_spent(tmp_path):
    limit = epsilon_of([STEP] * 3, delta=1e-2)
    run(tmp_path, rounds=2, sites=blob_sites((1,)))
    with pytest.raises(PrivacyBudgetExhausted, match="no site is left"):
        list(each_round(trainer(), blob_sites((1,)), privacy=Noise(max_epsilon=limit), rounds=2, seed=1,
                        engine=Local(ledgers=tmp_path / "ledgers")))
    assert len(entries(tmp_path, "site-0")) == 3


def test_a_lost_file_is_not_replaced_by_an_empty_one(tmp_path):
    engine = Local(ledgers=tmp_path / "ledgers")
    steps = each_round(trainer(), blob_sites((1,)), privacy=Noise(), rounds=4, engine=engine)
    next(steps)
    (tmp_path / "ledgers" / "site-0.ledger.json").unlink()
    with pytest.raises(PrivacyError, match="is missing; restore it"):
        next(steps)
    other = Local()
    other.memory = engine.memory
    with pytest.raises(PrivacyError, match="kept in a file"):
        next(each_round(trainer(), blob_sites((1,)), privacy=Noise(), engine=other))


def test_a_ledger_begun_in_memory_moves_to_a_file(tmp_path):
    first = Local()
    steps = each_round(trainer(), blob_sites((1,)), privacy=Noise(), rounds=4, engine=first)
    state = next(steps).state
    second = Local(ledgers=tmp_path / "ledgers")
    second.memory = first.memory
    next(each_round(trainer(), blob_sites((1,)), privacy=Noise(), rounds=4, engine=second, state=state))
    assert [number for number, _ in entries(tmp_path, "site-0")] == [0, 1]


def altered(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize("damage", [
    lambda text: "", lambda text: text[:-30], lambda text: "[]", lambda text: '{"sha256": "0", "ledger": {}}',
    lambda text: altered(text, '"noise_multiplier": 2.0', '"noise_multiplier": 9.0'),
])
def test_a_damaged_file_is_refused(tmp_path, damage):
    run(tmp_path, rounds=1, sites=blob_sites((1,)))
    path = tmp_path / "ledgers" / "site-0.ledger.json"
    path.write_text(damage(path.read_text("utf-8")), encoding="utf-8")
    content = path.read_bytes()
    with pytest.raises(PrivacyError, match=r"site-0.ledger.json is damaged.*restore it"):
        run(tmp_path, rounds=1, sites=blob_sites((1,)))
    assert path.read_bytes() == content


def test_the_file_of_another_site_is_refused(tmp_path):
    run(tmp_path, rounds=1)
    folder = tmp_path / "ledgers"
    (folder / "site-1.ledger.json").write_bytes((folder / "site-0.ledger.json").read_bytes())
    with pytest.raises(PrivacyError, match="is the ledger of 'site-0', not of 'site-1'"):
        run(tmp_path, rounds=1)


def test_the_file_of_another_model_is_refused(tmp_path):
    run(tmp_path, rounds=1, sites=blob_sites((1,)))
    wider = TinyNet()
    wider.last = torch.nn.Conv3d(6, 3, 3, padding=1)
    with pytest.raises(PrivacyError, match=r"another model.*nothing was sent"):
        run(tmp_path, rounds=1, sites=blob_sites((1,)), one=trainer(model=wider))


def test_two_runs_at_once_are_refused(tmp_path):
    (tmp_path / "ledgers").mkdir()
    with FileLock(tmp_path / "ledgers" / "site-0.ledger.json.lock"), pytest.raises(PrivacyError, match="another run"):
        run(tmp_path, rounds=1, sites=blob_sites((1,)))


def test_names_of_sites_cannot_leave_the_folder(tmp_path):
    for name in ("../../x", "a/b", "..", "Zürich 1"):
        path = LedgerFile(tmp_path, name).path
        assert path.parent == tmp_path and path.name.endswith(".ledger.json")
    site = blob_sites((1,))[0]
    run(tmp_path, rounds=1, sites=[Site("../Zürich", site.train, site.val)])
    assert [p.name for p in (tmp_path / "ledgers").glob("*.json")] == ["..%2FZ%C3%BCrich.ledger.json"]


def test_noise_from_the_operating_system_counts_every_time(tmp_path):
    class Secure(Noise):
        def protect(self, update, memory, rng):
            Ledger(memory).charge(Gaussian(noise_multiplier=2.0), terms=TERMS, repeatable=False)
            return update.map(lambda t: t * 0 + torch.randn(t.shape))

    for _ in range(3):
        run(tmp_path, rounds=1, sites=blob_sites((1,)), privacy=Secure())
    assert len(entries(tmp_path, "site-0")) == 3


def test_a_run_without_a_guarantee_needs_no_ledger(tmp_path):
    from fedlab.privacy.base import Privacy

    run(tmp_path, rounds=1, sites=blob_sites((1,)), privacy=Privacy())
    assert not list((tmp_path / "ledgers").glob("*.json"))
    assert repr(Local(ledgers="here")) == "Local(ledgers='here')" and repr(Local()) == "Local()"
