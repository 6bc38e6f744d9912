"""Sites in worker processes: the bits of Local, bounded memory, and no worker's death hangs a run or stays behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import textwrap
import threading
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from cohorts import TinyNet, blob_patient, blob_sites
from fedlab.checks.engine import Marks
from fedlab.core.errors import FedlabError, PrivacyError, SiteError
from fedlab.core.types import Site
from fedlab.core.weights import weights_sha256
from fedlab.data.readers.folders import read_cohort
from fedlab.data.readers.patient_folder import PatientFolder
from fedlab.engines import worker_pool as pool
from fedlab.engines.processes import Processes
from fedlab.faults.sites import DropOut, Faulty, PoisonedLabels
from fedlab.privacy.accounting.ledger import Ledger
from fedlab.privacy.accounting.ledger_file import LedgerFile
from fedlab.privacy.base import Privacy
from fedlab.privacy.dp.site_level import LocalGaussian
from fedlab.run.admission import Admission
from fedlab.run.federate import each_round, federate
from fedlab.run.local import Local
from fedlab.run.site_states import SiteStates
from fedlab.strategies.averaging import FedAvg
from fedlab.training.networks import segresnet
from folders import write_patient
from runs import wait_for
from trainers import trainer


def in_a_worker():
    return multiprocessing.parent_process() is not None

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def processes():
    with Processes(workers=2) as made:
        yield made


def run(engine, sites=(3, 2, 1), **settings):
    sites = blob_sites(sites) if isinstance(sites, tuple) else sites
    return federate(trainer(), sites, engine=engine, **{"rounds": 2, "progress": False, **settings})


def bits(history):
    return weights_sha256(history.state.params)


def pids(engine):
    return [worker.process.pid for worker in engine._pool._workers]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Dies(Privacy):
    """The worker's process ends in one round of one site, once and without a word."""

    def __init__(self, *, site, how, folder, round=1):
        self.site, self.how, self.round, self.folder = site, how, round, folder

    def protect(self, update, state, rng):
        once = Path(self.folder, "has died")
        if update.site == self.site and state.round == self.round and not once.exists():
            assert in_a_worker()
            once.touch()
            os._exit(3) if self.how == "exit" else os.kill(os.getpid(), getattr(signal, self.how))
        return update


class Waits(Privacy):
    """Says in a file which process trains a site, and waits to be killed."""

    def __init__(self, *, folder, site):
        self.folder, self.site = folder, site

    def equip(self, kit, site, state):
        if site.name == self.site and not Path(self.folder, site.name).exists():
            Path(self.folder, site.name).write_text(str(os.getpid()))
            time.sleep(60)
        return kit


class Tells(Privacy):
    """Raises what is asked of the process."""

    def __init__(self, *, what):
        self.what = what

    def equip(self, kit, site, state):
        raise ValueError(str({"threads": torch.get_num_threads(), "worker": in_a_worker(),
                              "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}[self.what]))


def test_the_same_bits_metrics_and_site_states_as_local(processes):
    ours, theirs = run(processes, rounds=3), run(Local(), rounds=3)
    assert bits(ours) == bits(theirs)
    assert [record["sites"] for record in ours.records] != []
    for one, other in zip(ours.records, theirs.records, strict=True):
        assert list(one["sites"]) == list(other["sites"]) == ["site-0", "site-1", "site-2"]
        assert all(one["sites"][site]["loss"] == other["sites"][site]["loss"] for site in one["sites"])
    assert ours.site_states.keys() == theirs.site_states.keys()
    for site, state in theirs.site_states.items():
        mine = ours.site_states[site]
        assert {g: weights_sha256(t) for g, t in state.namespaces.items()} == {
            g: weights_sha256(t) for g, t in mine.namespaces.items()}
        assert (state.enrolled, state.updates) == (mine.enrolled, mine.updates) == (True, 3)
    assert len(pids(processes)) == 2 and os.getpid() not in pids(processes)


def test_a_second_run_on_one_engine_is_the_first_to_the_bit(processes):
    """The optimiser's moments belong to the run."""
    first, second = (run(processes, rounds=3) for _ in range(2))
    assert bits(first) == bits(second) == bits(run(Local(), rounds=3))
    assert bits(first) != bits(federate(trainer(momentum="restart"), blob_sites((3, 2, 1)), rounds=3,
                                        engine=processes, progress=False))


class ChargesAndFails(LocalGaussian):
    """Enters its noise into the ledger, changes what it keeps, and fails at one site in round 1."""

    def protect(self, update, state, rng):
        state.own.setdefault("touched", torch.zeros(1)).add_(1)  # in place
        update = super().protect(update, state, rng)
        if update.site == "site-1" and state.round == 1:
            raise RuntimeError("after the charge")
        return update


@pytest.mark.parametrize("name", ["Local", "Processes"])
def test_work_that_fails_leaves_the_site_s_state_but_for_its_ledger(processes, name):
    rounds = each_round(trainer(), blob_sites((2, 2)), rounds=2, engine=processes if name == "Processes" else Local(),
                        privacy=ChargesAndFails(clip=1.0, noise_multiplier=1.0, delta=1e-3), admission=Admission())
    before = {site: state for site, state in next(rounds).site_states.items()}
    finished = next(rounds)
    assert finished.absent.keys() == {"site-1"} and finished.sites.keys() == {"site-0"}
    kept, went_on = finished.site_states["site-1"], finished.site_states["site-0"]
    assert (kept.updates, went_on.updates) == (1, 2) and kept.enrolled
    assert kept.namespaces["privacy"]["touched"].item() == 1 and went_on.namespaces["privacy"]["touched"].item() == 2
    assert kept.namespaces.keys() == before["site-1"].namespaces.keys() == {"optimiser", "privacy"}
    for owner, slots in before["site-1"].namespaces.items():
        assert weights_sha256(kept.namespaces[owner]) == weights_sha256(slots)
    ours, ran = (Ledger(state).spent()[0].epsilon for state in (kept, went_on))
    assert ours == ran > Ledger(before["site-1"]).spent()[0].epsilon  # what was charged stays charged


def test_another_number_of_threads_gives_other_bits_so_workers_have_those_of_their_parent(processes):
    def deep(engine):
        made = trainer(model=segresnet(), steps=3, batch_size=1)  # the first gradients may agree to the bit
        return weights_sha256(federate(made, blob_sites((1, 1)), engine=engine, rounds=1, progress=False).state.params)

    one = deep(Local())
    torch.set_num_threads(2)
    try:
        two = deep(Local())
        assert one != two  # or this test would show nothing
        assert deep(processes) == two
        with Processes(workers=1, threads=1) as other:
            assert deep(other) == one
        with pytest.raises(SiteError, match="ValueError: 2"):
            run(processes, privacy=Tells(what="threads"))
    finally:
        torch.set_num_threads(1)


def test_as_many_workers_as_there_are_cores_for_their_threads(monkeypatch):
    monkeypatch.setattr("fedlab.engines.processes.available_cores", lambda: 8)
    assert [Processes(threads=k)._count(k) for k in (1, 2, 3, 16)] == [8, 4, 2, 1]
    assert Processes(workers=3)._count(8) == 3


def test_a_technique_strategy_and_model_of_a_notebook_cell(processes):
    cell: dict[str, object] = {"__name__": "__main__"}
    exec(textwrap.dedent("""
        from dataclasses import dataclass
        import torch
        from fedlab import FedAvg, Privacy, SiteTrainer
        from cohorts import TinyNet

        FACTOR = 0.5

        class Shrinks(Privacy):
            def protect(self, update, state, rng):
                return update.map(lambda t: t * FACTOR)

        @dataclass(frozen=True, kw_only=True)
        class Slower(FedAvg):
            def equip(self, kit, site, state, site_state):
                for group in kit.optimiser.param_groups:
                    group["lr"] /= 2
                return kit

        class Net(TinyNet):
            def forward(self, image):
                return super().forward(image) + 0.1
        """), cell)
    settings = {"privacy": cell["Shrinks"](), "strategy": cell["Slower"](), "rounds": 2, "progress": False}
    ours, theirs = (federate(trainer(model=cell["Net"](), optimiser=lambda p, lr: torch.optim.SGD(p, lr)),
                             blob_sites((2, 1)), engine=engine, **settings) for engine in (processes, Local()))
    assert bits(ours) == bits(theirs)
    cell["FACTOR"] = 0.25  # as after running the cell again
    assert bits(run(processes, **settings)) != bits(theirs)


@pytest.mark.parametrize(("how", "said"), [
    ("SIGKILL", r"killed \(SIGKILL\).*take fewer workers"), ("SIGSEGV", r"crashed \(SIGSEGV\); engine=Local\(\)"),
    ("exit", r"ended itself \(exit code 3\); look for sys.exit")])
def test_a_worker_that_dies_is_one_failed_site(processes, how, said, tmp_path):
    before = pids(processes)
    ours = run(processes, rounds=3, privacy=Dies(site="site-1", how=how, folder=str(tmp_path)),
               admission=Admission(min_sites=1))
    assert [list(record["sites"]) for record in ours.records] == [
        ["site-0", "site-1", "site-2"], ["site-0", "site-2"], ["site-0", "site-1", "site-2"]]
    reason = ours.records[1]["absent"]["site-1"]
    assert reason.startswith("site 'site-1' failed in round 1 at stage 'reach': its worker process")
    assert re.search(said, reason) and len(pids(processes)) == 2 and pids(processes) != before


def test_a_killed_site_goes_on_from_its_state_before_the_round(processes, tmp_path):
    """As one that was not reached in that round."""
    ours = run(processes, rounds=3, privacy=Dies(site="site-1", how="SIGKILL", folder=str(tmp_path)),
               admission=Admission(min_sites=1))
    away = Faulty(engine=Local(), faults=[DropOut(sites=("site-1",), rounds=(1,))])
    assert bits(ours) == bits(run(away, rounds=3, admission=Admission(min_sites=1)))


def test_a_worker_killed_from_outside_in_the_middle_of_training(processes, tmp_path):
    def kill():
        wait_for((tmp_path / "site-1").is_file, seconds=60, why="site-1 doesn't begin")
        wait_for((tmp_path / "site-1").read_text, seconds=60, why="site-1 doesn't say where")
        os.kill(int((tmp_path / "site-1").read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    ours = run(processes, privacy=Waits(folder=str(tmp_path), site="site-1"), admission=Admission(min_sites=2))
    killer.join()
    assert [sorted(record["sites"]) for record in ours.records] == [
        ["site-0", "site-2"], ["site-0", "site-1", "site-2"]]
    assert "SIGKILL" in ours.records[0]["absent"]["site-1"]


def test_without_rules_of_admission_a_dead_worker_ends_the_run_and_the_engine_is_of_use(processes, tmp_path):
    with pytest.raises(SiteError, match=r"site-2.*round 0.*SIGKILL") as caught:
        run(processes, privacy=Dies(site="site-2", how="SIGKILL", round=0, folder=str(tmp_path)))
    assert caught.value.stage == "reach"
    assert bits(run(processes)) == bits(run(Local()))


def test_a_worker_that_died_between_rounds_costs_nothing(processes):
    rounds = each_round(trainer(), blob_sites((2, 1)), engine=processes, rounds=2)
    next(rounds)
    before = pids(processes)
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not any(map(alive, before)), seconds=60, why="a killed process is still there")
    last = next(rounds)
    assert last.absent == {} and weights_sha256(last.state.params) == bits(run(Local(), (2, 1)))


def test_the_user_s_own_exception_is_there_with_where_it_came_from(processes):
    with pytest.raises(SiteError, match="failed in round 0 at stage 'equip': ValueError: True") as caught:
        run(processes, privacy=Tells(what="worker"))
    text = str(caught.value.__cause__)
    assert "in equip" in text and "test_processes.py" in text and "ValueError: True" in text


class Foreign(FedlabError):
    """An error that the parent doesn't know, with a constructor of its own."""

    def __init__(self, *, number):
        super().__init__(f"number {number}")


class RaisesForeign(Privacy):
    def protect(self, update, state, rng):
        raise Foreign(number=7)


class KeepsALock(Privacy):
    def protect(self, update, state, rng):
        state.own["x"] = threading.Lock()
        return update


class HasALock(Privacy):
    def __init__(self):
        self.lock = threading.Lock()


class OnlyHere(Privacy):
    """Can be made in this process only."""

    def __reduce__(self):
        return _only_here, ()


def _only_here():
    if in_a_worker():
        raise ImportError("no module of that name")
    return OnlyHere()


def test_what_cannot_travel_is_said(processes):
    with pytest.raises(ValueError, match=r"trainer, strategy or technique cannot be sent .*lock.*engine=Local\(\)"):
        run(processes, privacy=HasALock())
    normed = TinyNet()
    normed.layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv3d(3, 3, 1))
    with pytest.raises(ValueError, match=r"(?s)Serialization of parametrized modules .*engine=Local\(\)"):
        federate(trainer(model=normed), blob_sites(), engine=processes, progress=False)
    locked = replace(blob_sites((1,))[0], card=threading.Lock())
    with pytest.raises(ValueError, match="the patients of site-0 cannot be sent to a worker process"):
        run(processes, [locked])
    words = r"site-0.*'remember'.*what the site sends or keeps cannot leave its process"
    with pytest.raises(SiteError, match=words):
        run(processes, privacy=KeepsALock())
    with pytest.raises(FedlabError, match="cannot read what it was sent") as caught:
        run(processes, privacy=OnlyHere())
    assert "ImportError: no module of that name" in str(caught.value.__cause__)
    with pytest.raises(FedlabError, match="number 7") as caught:
        run(processes, privacy=RaisesForeign())
    assert type(caught.value) is FedlabError
    assert bits(run(processes)) == bits(run(Local()))


@dataclass(frozen=True, kw_only=True)
class Counts(FedAvg):
    """Counts the updates that are alive while it adds them up."""

    def combine(self, updates):
        def counted():
            for update in updates:
                ALIVE.add(update)
                SEEN.append((len(ALIVE), len(waiting())))
                yield update
                del update

        return super().combine(counted())


ALIVE: weakref.WeakSet = weakref.WeakSet()
SEEN: list[tuple[int, int]] = []


def waiting():
    """Updates that have come to this process and wait for their turn."""
    return [ticket for ticket in gc.get_objects() if type(ticket) is pool.Ticket and ticket.answer is not None]


def test_updates_wait_for_their_turn_and_no_more_than_there_are_workers(processes):
    seen = []
    for engine in (processes, Local()):
        SEEN.clear()
        done = run(engine, (1,) * 7, rounds=1, strategy=Counts(), privacy=Marks(slow="site-0", seconds=1.0))
        assert list(done.records[0]["sites"]) == [f"site-{k}" for k in range(7)] and len(SEEN) == 7
        seen.append([max(numbers) for numbers in zip(*SEEN, strict=True)])
    (in_hand, in_waiting), (local_in_hand, _) = seen
    assert in_hand <= local_in_hand and 1 <= in_waiting <= 2


def test_no_file_descriptor_and_no_memory_is_left_of_a_round(processes):
    counts = []
    for _ in each_round(trainer(), blob_sites((2, 1, 1)), engine=processes, rounds=8):
        gc.collect()
        counts.append(len(os.listdir("/proc/self/fd")))
    assert max(counts[2:]) <= counts[1]
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("fedlab")]


def test_patients_travel_once_and_again_only_where_they_changed(processes, monkeypatch):
    sent = []
    packed = pool._shared
    monkeypatch.setattr(pool, "_shared", lambda thing, what: sent.append(thing) or packed(thing, what))
    sites = blob_sites((2, 1))
    run(processes, sites, rounds=3)
    assert sum(isinstance(thing, Site) for thing in sent) == 2
    sites[0].train.append(blob_patient("new", seed=77))
    assert bits(run(processes, sites)) == bits(run(Local(), sites))
    assert [thing.name for thing in sent if isinstance(thing, Site)] == ["site-0", "site-1", "site-0"]
    del sites
    sent.clear()
    gc.collect()
    assert len(processes._pool._sites) == 0


def test_labels_that_are_corrected_in_place_between_two_runs_reach_the_workers(processes):
    sites = blob_sites((2, 1))
    before = bits(run(processes, sites))
    sites[0].train[0].label.zero_()
    assert bits(run(processes, sites)) == bits(run(Local(), sites)) != before


def test_patients_of_a_folder_are_read_by_the_workers(processes, tmp_path):
    for number in range(3):
        write_patient(tmp_path, f"P{number}", seed=number)
    folder = read_cohort(tmp_path, progress=False)
    sites = [Site("a", folder[:2]), Site("b", folder[2:])]
    assert isinstance(sites[0].train, PatientFolder)
    assert 100 * pool._shared(sites[0], "a").nbytes < folder[0].image.nbytes  # no image of a patient is in it
    assert bits(run(processes, sites)) == bits(run(Local(), sites))


def test_faults_and_checkpoints_work_with_it(processes, tmp_path):
    def faulty(engine):
        return Faulty(engine=engine, faults=[DropOut(probability=0.4), PoisonedLabels(sites=("site-1",))], seed=3)

    settings = {"rounds": 4, "admission": Admission(min_sites=1)}
    whole = bits(run(faulty(Local()), **settings))
    assert bits(run(faulty(processes), **settings)) == whole
    run(faulty(processes), rounds=2, admission=Admission(min_sites=1), checkpoint=tmp_path / "run")
    assert bits(run(faulty(processes), **settings, checkpoint=tmp_path / "run")) == whole


def test_ledgers_are_kept_in_files_before_an_update_is_handed_on(processes, tmp_path):
    technique = LocalGaussian(clip=1.0, noise_multiplier=1.0, delta=1e-3)
    strategy = FedAvg(weights="uniform")
    spent = []
    for engine, folder in ((Processes(workers=2, ledgers=tmp_path / "ours"), tmp_path / "ours"),
                           (Local(ledgers=tmp_path / "theirs"), tmp_path / "theirs")):
        done = run(engine, privacy=technique, strategy=strategy)
        spent.append((bits(done), [LedgerFile(folder, f"site-{k}").read().spent() for k in range(3)]))
        if isinstance(engine, Processes):
            ours = engine
    assert spent[0] == spent[1] and spent[0][1][0][0].epsilon > 0
    (tmp_path / "ours" / "site-1.ledger.json").unlink()
    with pytest.raises(PrivacyError, match=r"the ledger of site-1 was kept in .* which is missing"):
        run(ours, privacy=technique, strategy=strategy)
    parts = dict(privacy=technique, strategy=strategy, rounds=2)
    first = next(each_round(trainer(), blob_sites((1,)), engine=Local(ledgers=tmp_path / "begun"), **parts))
    with pytest.raises(PrivacyError, match=r"say Processes\(ledgers=…\) with its folder"):
        next(each_round(trainer(), blob_sites((1,)), engine=processes, state=first.state,
                        site_states=first.site_states, **parts))
    ours.close()


def test_a_ledger_is_not_charged_for_an_update_that_nobody_took(tmp_path):
    """Of a site that had run ahead when the run ended."""
    technique = LocalGaussian(clip=1.0, noise_multiplier=1.0, delta=1e-3) + Dies(
        site="site-0", how="exit", round=0, folder=str(tmp_path))
    states = SiteStates(["site-0", "site-1", "site-2"])
    with Processes(workers=2, ledgers=tmp_path) as engine, pytest.raises(SiteError):
        next(each_round(trainer(), blob_sites((3, 2, 1)), engine=engine, privacy=technique, site_states=states,
                        strategy=FedAvg(weights="uniform")))
    assert not list(tmp_path.glob("*.json"))
    for state in states.values():
        assert state.enrolled and not state.updates and not state.ledger and not state.namespaces


def test_devices_are_given_in_turn(processes, monkeypatch):
    with Processes(workers=1, devices=("cpu",)) as engine:
        assert bits(run(engine)) == bits(run(Local()))
        with pytest.raises(SiteError, match=r"ValueError: $"):  # no GPU is shown to it
            run(engine, privacy=Tells(what="gpus"))
        with pytest.raises(ValueError, match=r"trainer needs device='cuda', the workers have \('cpu',\)"):
            federate(trainer(device="cuda"), blob_sites(), engine=engine, progress=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5f,7")
    engine = Processes(devices=("cuda:2", "cuda:1"))
    assert engine._pool._visible == ["7", "GPU-5f"] and engine._count(1) == 2
    for wrong, said in ((("cuda:3",), "there is no cuda:3: this process sees 3 GPUs"), (("gpu",), "is no device"),
                        (("cuda",), "names no single device"), (("cpu", "cuda:0"), "name one kind"),
                        ("cuda:0", r"several names, such as \('cuda:0',\)")):
        with pytest.raises(ValueError, match=said):
            Processes(devices=wrong)


@pytest.mark.parametrize("wrong", [dict(workers=0), dict(workers=1.5), dict(workers=True), dict(threads=0)])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="is a positive whole number"):
        Processes(**wrong)


def test_it_prints_as_the_code_that_makes_it(tmp_path):
    assert repr(Processes()) == "Processes()"
    shown = repr(Processes(3, threads=1, devices=("cpu",), ledgers="ledgers"))
    assert shown == "Processes(workers=3, threads=1, devices=('cpu',), ledgers='ledgers')"
    assert repr(eval(shown)) == shown


def test_elsewhere_than_on_linux_it_refuses(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(FedlabError, match=r"only Linux has; use engine=Local\(\)"):
        Processes()


def test_no_process_of_a_test_is_left(processes):
    processes.close()
    assert [child for child in multiprocessing.active_children() if child.name.startswith("fedlab-site")] == []
