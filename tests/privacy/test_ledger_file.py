"""A site's ledger on disk forgets nothing: not when it is killed, not when an old copy comes back."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from test_privacy_frame import STEP, TERMS, Noise

from cohorts import TinyNet, blob_sites
from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError
from fedlab.core.types import Site, Spent
from fedlab.core.weights import weights_sha256
from fedlab.data.sites.statistics import Domain, site_statistics
from fedlab.privacy.accounting.ledger import PATIENT_ZEROED, Gaussian, Ledger, Pure, epsilon_of
from fedlab.privacy.accounting.ledger_file import LedgerFile
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.run.federate import each_round, federate
from fedlab.run.local import Local
from fedlab.strategies.averaging import FedAvg
from states import copies, kept_as
from trainers import trainer


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

    stands_for = Noise()  # the same run to a checkpoint

    def protect(self, update, state, rng):
        if update.site == "site-1" and Ledger(state).note()["round"] == 2:
            Ledger(state).charge(STEP, terms=TERMS)
            kill()
        return super().protect(update, state, rng)


def dies_in_protect(folder, patch):
    run(folder, privacy=KilledInProtect(), checkpoint=folder / "run")


def dies_while_writing(folder, patch):
    """In round 2, the new file is written but not yet in place."""
    replace = os.replace

    def dying(source, target):
        if str(target).endswith("site-1.ledger.json") and '"round": 2' in Path(source).read_text("utf-8"):
            kill()
        replace(source, target)

    patch.setattr(os, "replace", dying)
    run(folder, checkpoint=folder / "run")


def dies_after_saving(folder, patch):
    """In round 2, the ledger is in place but the update has not been handed to the server."""
    save = LedgerFile.save

    def dying(self, state):
        save(self, state)
        if self.site == "site-1" and Ledger(state).note()["round"] == 2:
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
    second = next(steps)
    old = copies(second.site_states)
    list(steps)
    assert entries(tmp_path, "site-0") == entries(other, "site-0")
    repeated = list(each_round(trainer(), blob_sites(), privacy=Noise(), rounds=4, state=second.state,
                               engine=Local(ledgers=tmp_path / "ledgers"), site_states=kept_as(old)))
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


def test_a_run_without_a_store_of_ledgers_begins_anew(tmp_path):
    """What sites keep, their ledgers included, belongs to the run: the same run again, on one engine, is the same."""
    engine = Local()
    one, other = (federate(trainer(), blob_sites(), privacy=Noise(), rounds=2, engine=engine, progress=False)
                  for _ in range(2))
    assert weights_sha256(one.state.params) == weights_sha256(other.state.params) and one.spent().equals(other.spent())
    for history in (one, other):
        assert len(Ledger(history.site_states["site-0"]).releases()) == 2


def test_what_the_site_remembers_changes_the_noise():
    """Moments kept from a run before make another update of round 0: its noise must be another too."""
    first = next(each_round(trainer(), blob_sites((1,)), privacy=Noise()))
    second = next(each_round(trainer(), blob_sites((1,)), privacy=Noise(), site_states=first.site_states,
                             state=FedAvg().begin(trainer().initial())))
    assert second.number == 0 and len(Ledger(second.site_states["site-0"]).releases()) == 2


def test_other_scans_get_other_noise_and_are_charged(tmp_path):
    run(tmp_path, rounds=1, sites=blob_sites((1,)))
    site = blob_sites((1,))[0]
    patient = site.train[0]
    changed = type(patient)(patient.id, patient.image * 2, patient.label, patient.affine)
    run(tmp_path, rounds=1, sites=[Site(site.name, [changed], site.val)])
    [(_, one), (_, other)] = entries(tmp_path, "site-0")
    assert one != other  # the name of the noise


class Unchanged(list):
    """Patients whose content is said to be what it was."""

    def content_sha256(self):
        return "the same"


def test_the_same_noise_on_another_update_is_refused(tmp_path):
    """Training that gives another update of the same patients, weights and settings must not get the same noise."""
    site = blob_sites((1,))[0]
    patient = site.train[0]
    run(tmp_path, rounds=1, sites=[Site(site.name, Unchanged([patient]), site.val)])
    changed = Unchanged([type(patient)(patient.id, patient.image * 2, patient.label, patient.affine)])
    with pytest.raises(PrivacyError, match=r"training gave another update.*another seed.*nothing was sent"):
        run(tmp_path, rounds=1, sites=[Site(site.name, changed, site.val)])
    run(tmp_path, rounds=1, sites=[Site(site.name, changed, site.val)], seed=5)
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
    first = next(steps)
    (tmp_path / "ledgers" / "site-0.ledger.json").unlink()
    with pytest.raises(PrivacyError, match="is missing; restore it"):
        next(steps)
    assert not (tmp_path / "ledgers" / "site-0.ledger.json").exists()
    with pytest.raises(PrivacyError, match="kept in a file"):
        next(each_round(trainer(), blob_sites((1,)), privacy=Noise(), state=first.state, rounds=2, engine=Local(),
                        site_states=first.site_states))


def test_a_ledger_begun_in_memory_moves_to_a_file(tmp_path):
    first = next(each_round(trainer(), blob_sites((1,)), privacy=Noise(), rounds=4))
    next(each_round(trainer(), blob_sites((1,)), privacy=Noise(), rounds=4, state=first.state,
                    engine=Local(ledgers=tmp_path / "ledgers"), site_states=first.site_states))
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
    with pytest.raises(PrivacyError, match=r"site-0.ledger.json is missing or damaged.*restore it"):
        run(tmp_path, rounds=1, sites=blob_sites((1,)))
    assert path.read_bytes() == content


def test_the_file_of_another_site_is_refused(tmp_path):
    run(tmp_path, rounds=1)
    folder = tmp_path / "ledgers"
    (folder / "site-1.ledger.json").write_bytes((folder / "site-0.ledger.json").read_bytes())
    with pytest.raises(PrivacyError, match="is the ledger of 'site-0', not of 'site-1'"):
        run(tmp_path, rounds=1)


def test_another_network_adds_to_the_same_file(tmp_path):
    run(tmp_path, rounds=1, sites=blob_sites((1,)))
    wider = TinyNet()
    wider.last = torch.nn.Conv3d(6, 3, 3, padding=1)
    run(tmp_path, rounds=1, sites=blob_sites((1,)), one=trainer(model=wider))
    assert len(entries(tmp_path, "site-0")) == 2


def test_a_link_to_a_ledger_stays_one_and_what_it_names_is_charged(tmp_path):
    kept, linked = tmp_path / "kept" / "ledgers", tmp_path / "linked" / "ledgers"
    linked.mkdir(parents=True)
    (linked / "site-0.ledger.json").symlink_to(kept / "site-0.ledger.json")
    run(tmp_path / "kept", rounds=1)
    run(tmp_path / "linked", rounds=1, seed=1)
    assert (linked / "site-0.ledger.json").is_symlink()
    assert [len(entries(tmp_path / "kept", site)) for site in ("site-0", "site-1")] == [2, 1]
    (kept / "site-0.ledger.json").unlink()
    with pytest.raises(PrivacyError, match="is missing; restore it"):
        run(tmp_path / "linked", rounds=1, seed=2)


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
        def protect(self, update, state, rng):
            Ledger(state).charge(Gaussian(noise_multiplier=2.0), terms=TERMS, repeatable=False)
            return update.map(lambda t: t * 0 + torch.randn(t.shape))

    for _ in range(3):
        run(tmp_path, rounds=1, sites=blob_sites((1,)), privacy=Secure())
    assert len(entries(tmp_path, "site-0")) == 3


def test_a_run_without_a_guarantee_needs_no_ledger(tmp_path):
    from fedlab.privacy.base import Privacy

    run(tmp_path, rounds=1, sites=blob_sites((1,)), privacy=Privacy())
    assert not list((tmp_path / "ledgers").glob("*.json"))
    assert repr(Local(ledgers="here")) == "Local(ledgers='here')" and repr(Local()) == "Local()"


# Statistics that a site releases and its training are charged to one ledger

PATIENT = dict(delta=1e-2)
FEW = Domain(modalities=("T1",), regions=("WT",))


def dpsgd(**changes) -> DPSGD:
    return DPSGD(**({"clip": 1.0, "noise_multiplier": 2.0, "sample_rate": 0.5, **PATIENT} | changes))


def spent_on(training: dict, *statistics: float, rounds: int = 2, **changes) -> float:
    """The ε that follows from what was released, put together without a ledger."""
    steps = [Gaussian(noise_multiplier=2.0, sample_rate=0.5, steps=training["steps"])] * rounds
    return epsilon_of([*(Pure(epsilon=each) for each in statistics), *steps], **{**PATIENT, **changes})


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_statistics_and_dp_sgd_compose_in_one_ledger(tmp_path, accountant):
    site = blob_sites((4,))[0]
    engine = Local(ledgers=tmp_path)
    ledger = LedgerFile(tmp_path, site.name).charging(**PATIENT, accountant=accountant)
    released = [site_statistics(site, domain=FEW, epsilon=epsilon, charge=ledger) for epsilon in (0.5, 0.25)]
    assert [each.spent[0].epsilon for each in released] == [0.5, 0.25]
    one = trainer(steps=3)
    history = federate(one, [site], privacy=dpsgd(accountant=accountant), rounds=2, engine=engine, progress=False)
    expected = [spent_on(dict(steps=3), 0.5, 0.25, rounds=n, accountant=accountant) for n in (1, 2)]
    assert history.spent()["epsilon"].tolist() == expected
    assert expected[1] > spent_on(dict(steps=3), accountant=accountant) and expected[0] < expected[1]
    site_statistics(site, domain=FEW, epsilon=0.125, charge=ledger)  # and afterwards
    [spent] = LedgerFile(tmp_path, site.name).read().spent()
    assert spent.epsilon == spent_on(dict(steps=3), 0.5, 0.25, 0.125, accountant=accountant)
    assert (spent.unit, spent.delta, spent.adjacency) == ("patient", 1e-2, PATIENT_ZEROED)  # what both imply


def test_a_budget_covers_statistics_and_training_together(tmp_path):
    site, path = blob_sites((4,))[0], LedgerFile(tmp_path, "site-0").path
    budget = spent_on(dict(steps=3), 1.0, rounds=2)  # two rounds beside the statistics, not three
    ledger = LedgerFile(tmp_path, site.name).charging(**PATIENT, max_epsilon=budget)
    site_statistics(site, domain=FEW, epsilon=1.0, charge=ledger)
    history = federate(trainer(steps=3), [site], privacy=dpsgd(max_epsilon=budget), rounds=4, progress=False,
                       engine=Local(ledgers=tmp_path))
    assert len(history.records) == 2 and "the budget is" in history.stopped
    before = path.read_bytes()
    with pytest.raises(PrivacyBudgetExhausted, match="is spent and this release"):
        site_statistics(site, domain=FEW, epsilon=1.0, charge=ledger)
    assert path.read_bytes() == before


def test_statistics_between_rounds_leave_the_rounds_of_the_run_as_they_are(tmp_path):
    """A round run again after statistics is still the same round: only the statistics are new."""
    site, engine = blob_sites((4,))[0], Local(ledgers=tmp_path)
    steps = each_round(trainer(steps=3), [site], privacy=dpsgd(), rounds=2, engine=engine)
    first = next(steps)
    kept = copies(first.site_states)
    next(steps)
    site_statistics(site, domain=FEW, epsilon=0.5, charge=LedgerFile(tmp_path, site.name).charging(**PATIENT))
    last = next(each_round(trainer(steps=3), [site], privacy=dpsgd(), rounds=2, engine=Local(ledgers=tmp_path),
                           state=first.state, site_states=kept_as(kept)))
    assert last.spent[site.name][0].epsilon == spent_on(dict(steps=3), 0.5, rounds=2)


def test_a_copy_in_memory_of_a_ledger_in_a_file_is_not_charged_alone(tmp_path):
    """A crash before the next round would forget what was charged to the copy only."""
    site = blob_sites((4,))[0]
    first = next(each_round(trainer(steps=3), [site], privacy=dpsgd(), engine=Local(ledgers=tmp_path)))
    before = LedgerFile(tmp_path, site.name).path.read_bytes()
    with pytest.raises(PrivacyError, match=r"kept in a file.*Local\(ledgers="):
        next(each_round(trainer(steps=3), [site], privacy=dpsgd(), rounds=2, engine=Local(), state=first.state,
                        site_states=first.site_states))
    assert LedgerFile(tmp_path, site.name).path.read_bytes() == before


@pytest.mark.parametrize("repeats", [False, True])
def test_a_ledger_says_whether_the_noise_of_statistics_repeats(tmp_path, repeats):
    LedgerFile(tmp_path, "a").charging(delta=1e-3)(Spent(0.5, 0.0, "patient", "rdp", PATIENT_ZEROED, repeats=repeats))
    [spent] = LedgerFile(tmp_path, "a").read().spent()
    assert spent.repeats is repeats and LedgerFile(tmp_path, "a").read().releases() == [Pure(epsilon=0.5)]


def test_statistics_and_training_that_cannot_be_added_up_are_refused(tmp_path):
    site = blob_sites((4,))[0]
    site_statistics(site, domain=FEW, epsilon=0.5, charge=LedgerFile(tmp_path, site.name).charging(delta=1e-3))
    with pytest.raises(PrivacyError, match="use the same δ, adjacency and accountant"):
        federate(trainer(), [site], privacy=dpsgd(), rounds=1, progress=False, engine=Local(ledgers=tmp_path))
    with pytest.raises(PrivacyError, match="is the ledger of 'site-0', not of 'other'"):
        LedgerFile(tmp_path, site.name).path.rename(LedgerFile(tmp_path, "other").path)
        site_statistics(site, domain=FEW, epsilon=0.5, charge=LedgerFile(tmp_path, "other").charging(delta=1e-3))
    with pytest.raises(ValueError, match="delta lies between"):
        LedgerFile(tmp_path, site.name).charging(delta=1.0)
    with pytest.raises(ValueError, match="δ = 0 was expected"):
        charge = LedgerFile(tmp_path, "a").charging(delta=1e-3)
        charge(Spent(1.0, 1e-5, "patient", "rdp", "add or remove one patient"))
    assert not LedgerFile(tmp_path, "a").path.exists()
