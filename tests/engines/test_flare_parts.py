"""The parts of the NVFLARE engine that need no NVFLARE: calls, jobs, entries of rounds, following a run."""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from cohorts import TinyNet, blob_sites
from fedlab import DPSGD, FedlabError, Local, PrivacyError, SiteTrainer, federate
from fedlab.apps.cli import main
from fedlab.core import PrivacyBudgetExhausted, Round, RunError, ServerState, Spent, weights_sha256
from fedlab.data.store import load_sites
from fedlab.deploy.messages import pack_weights
from fedlab.deploy.plan import built
from fedlab.engines import NVFlare
from fedlab.engines.nvflare.admin import watch
from fedlab.engines.nvflare.environments import raise_if_failed
from fedlab.engines.nvflare.kits import check_site_names
from fedlab.engines.nvflare.run_folder import FinishedRounds, SavedRun, read_round
from fedlab.engines.nvflare.simulation import prepare_simulation
from fedlab.engines.nvflare.site_calls import Ended, SiteCalls
from fedlab.privacy.base import Privacy
from fedlab.run import Admission
from fedlab.run.federate import check_sites, make_run


class Proxy:
    """The way to a site, which is at work or gone."""

    def __init__(self, work: Callable[..., Any] = lambda *arguments: {"value": arguments}) -> None:
        self.work, self.gone, self.timeout, self.hung_up = work, threading.Event(), 0.0, 0

    def __call__(self) -> Proxy:
        return self

    def hang_up(self) -> None:
        self.hung_up += 1

    def ask(self, method: str, arguments: tuple[Any, ...], *, seconds: float) -> Any:
        if method != "alive":
            self.timeout = seconds
            return self.work(*arguments)
        if self.gone.is_set():
            raise TimeoutError("no answer")
        return 1


def asked(calls: SiteCalls, *names: str) -> dict[str, Any]:
    return dict(calls.ask(names, "train", {name: (name,) for name in names}))


def test_answers_come_as_they_are_ready_and_errors_are_values() -> None:
    def refuse(*arguments: Any) -> Any:
        return {"error": "PrivacyError", "text": "not \x1b[31mhere"}

    def late(*arguments: Any) -> Any:
        time.sleep(0.3)
        return {"value": b"late"}

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("gone wrong")

    calls = SiteCalls({"a": Proxy(late), "b": Proxy(), "c": Proxy(refuse), "d": Proxy(broken),
                       "e": Proxy(lambda *a: b"?")}, seconds=7)
    order = list(calls.ask(("a", "b", "c", "d", "e", "f"), "train", {name: (1,) for name in "abcdef"}))
    came = dict(order)
    assert order[-1][0] == "a" and came["a"] == b"late" and came["b"] == (1,)
    assert isinstance(came["c"], PrivacyError) and "\x1b" not in str(came["c"])
    assert isinstance(came["d"], FedlabError) and "gone wrong" in str(came["d"])
    assert isinstance(came["e"], FedlabError) and "bytes" in str(came["e"])
    assert "was not connected" in str(came["f"])
    assert calls.sites["a"].timeout == 7


def test_a_site_that_falls_silent_is_given_up_and_found_again() -> None:
    stuck = threading.Event()
    site = Proxy(lambda *arguments: stuck.wait(60) and {"value": b"done"})
    calls = SiteCalls({"a": site, "b": Proxy()}, seconds=60, patience=0.6)
    site.gone.set()
    began = time.monotonic()
    assert "no sign of life" in str(asked(calls, "a")["a"]) and time.monotonic() - began < 5
    assert site.hung_up == 1
    assert calls.silent == {"a"} and "not connected" in str(asked(calls, "a")["a"])
    site.gone.clear()
    stuck.set()
    assert asked(calls, "a") == {"a": b"done"} and calls.silent == set()


def test_a_site_that_works_long_is_waited_for() -> None:
    def long(*arguments: Any) -> Any:
        time.sleep(1.5)
        return {"value": b"long"}

    assert asked(SiteCalls({"a": Proxy(long)}, seconds=60, patience=0.3), "a") == {"a": b"long"}


def test_an_aborted_job_stops_waiting() -> None:
    end = threading.Event()
    calls = SiteCalls({"a": Proxy(lambda *arguments: time.sleep(30))}, seconds=60, aborted=end.is_set)
    threading.Timer(0.3, end.set).start()
    with pytest.raises(Ended):
        asked(calls, "a")


def test_while_everybody_is_gone_nobody_is_asked() -> None:
    sites = {name: Proxy() for name in "ab"}
    calls = SiteCalls(sites, seconds=60, patience=0.3)
    calls.silent |= {"a", "b"}
    for site in sites.values():
        site.gone.set()
    threading.Timer(1.0, sites["b"].gone.clear).start()
    began = time.monotonic()
    came = asked(calls, "a", "b")
    assert time.monotonic() - began > 0.9 and came["b"] == ("b",) and "not connected" in str(came["a"])


def finished(number: int) -> Round:
    params = {"w": torch.full((2, 3), float(number)), "b": torch.tensor(0.5)}
    spent = (Spent(float("inf"), 1e-3, "patient", "rdp", "one added"), Spent(1.5, 0.0, "site", "pure", "replaced"))
    return Round(number=number, state=ServerState(round=number + 1, params=params), cohort=("a", "b", "c"),
                 sites={"a": {"loss": float("nan"), "norm": 1.0}, "b": {"norm": 2.0}}, spent={"a": spent},
                 metrics={"Dice": 0.25}, seconds=1.25, absent={"c": "late"})


def test_a_round_comes_back_as_it_was(tmp_path: Path) -> None:
    diary = FinishedRounds(tmp_path)
    for number in (0, 1, 3):
        diary.add(finished(number))
    assert len(diary) == 2  # up to the gap
    back, was = read_round(diary.text(1), diary.weights(1)), finished(1)
    assert weights_sha256(back.state.params) == weights_sha256(was.state.params) and back.state.round == 2
    assert (back.number, back.cohort, back.spent, back.metrics, back.seconds, back.absent) == (
        was.number, was.cohort, was.spent, was.metrics, was.seconds, was.absent)
    assert str(back.sites) == str(was.sites)
    with pytest.raises(FedlabError, match="not those that its entry names"):
        read_round(diary.text(1), diary.weights(0))
    for odd in ("{}", "[]", "nonsense", diary.text(1).replace('"patient"', '"household"')):
        with pytest.raises(FedlabError):
            read_round(odd, diary.weights(1))


def a_trainer() -> SiteTrainer:
    return SiteTrainer(model=built(TinyNet, seed=3), lr=0.05, steps=2, crop=(8, 8, 8), precision="fp32")


def test_what_the_server_had_no_time_to_write_is_caught_up(tmp_path: Path) -> None:
    rounds: list[Round] = []
    federate(a_trainer(), blob_sites((3, 2)), rounds=2, checkpoint=tmp_path / "checkpoint", on_round=rounds.append,
             progress=False)
    diary = FinishedRounds(tmp_path)
    diary.add(rounds[0])
    diary.catch_up(tmp_path / "checkpoint")
    back = read_round(diary.text(1), diary.weights(1))
    assert weights_sha256(back.state.params) == weights_sha256(rounds[1].state.params)
    assert (back.cohort, back.sites, back.seconds) == (rounds[1].cohort, rounds[1].sites, rounds[1].seconds)


def test_a_job_has_no_code_and_names_only_our_classes(tmp_path: Path) -> None:
    engine = NVFlare(patience=40)
    folder = engine.save(tmp_path / "run", a_trainer(), ["a", "b", "c"], rounds=3, admission=Admission(min_sites=2))
    saved = SavedRun.read(folder)
    job = saved.write_job(tmp_path / "job", 4)
    names = sorted(str(path.relative_to(job)) for path in job.rglob("*") if path.is_file())
    assert names == ["meta.json", "server/config/config_fed_server.json", "server/config/plan.json",
                     "server/config/start.safetensors", "site/config/config_fed_client.json"]
    meta = json.loads((job / "meta.json").read_text())
    assert meta["min_clients"] == 2 and meta["deploy_map"] == {"server": ["server"], "site": ["a", "b", "c"]}
    site = json.loads((job / "site" / "config" / "config_fed_client.json").read_text())
    assert [(part["path"], part["args"]) for part in site["components"]] == [
        ("fedlab.engines.nvflare.site_part.SitePart", {"threads": 4})]
    server = json.loads((job / "server" / "config" / "config_fed_server.json").read_text())
    assert server["components"][0]["args"] == {"seconds": 600.0 + 60 * 2 * 2, "patience": 40}
    with pytest.raises(RunError, match="nothing is overwritten"):
        engine.save(folder, a_trainer(), ["a"])
    with pytest.raises(RunError, match="holds no run"):
        SavedRun.read(tmp_path)


class FakeServer:
    """Answers like the admin interface: each job is a list of what it says, one item a question."""

    def __init__(self, *jobs: list[Any]) -> None:
        self.left, self.asked, self.submitted = list(jobs), [], 0
        self.connected = {"a": 1.0, "b": 1.0}
        self.now: list[Any] = []

    def job_of(self, name: str, *, besides: set[str]) -> str | None:
        return None

    def submit(self, saved: SavedRun, *, threads: int) -> str:
        self.submitted += 1
        self.now = self.left.pop(0)
        return f"job-{self.submitted}"

    def ask(self, job: str, question: dict[str, Any]) -> Any:
        self.asked.append(question)
        return self.now.pop(0) if self.now else None

    def weights(self, job: str, number: int) -> bytes:
        return pack_weights(finished(number).state.params)

    def status(self, job: str) -> str:
        return "RUNNING" if self.now else "FINISHED:ABNORMAL"

    def heard_of(self) -> dict[str, float]:
        self.connected = {name: at + 1 for name, at in self.connected.items()}
        return dict(self.connected)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from fedlab.engines.nvflare import admin as module

    monkeypatch.setattr(module, "_PAUSE", 0.0)
    monkeypatch.setattr(module, "_CHECK_EVERY", 0.0)
    yield


def entry(tmp_path: Path, number: int) -> str:
    diary = FinishedRounds(tmp_path / str(number))
    diary.add(finished(number))
    return diary.text(number)


def follow(server: FakeServer, *, have: int = 0) -> list[Any]:
    """Numbers of the rounds, and at last how the run has ended."""
    def watched() -> Iterator[Any]:
        yield (yield from watch(server, SavedRun.read(PLAN[0]), have=have, wait=5))  # type: ignore

    return [came.number if isinstance(came, Round) else came for came in watched()]


PLAN: list[Path] = []


@pytest.fixture(autouse=True)
def plan(tmp_path: Path) -> Iterator[None]:
    PLAN[:] = [NVFlare().save(tmp_path / "plan", a_trainer(), ["a", "b"], rounds=4)]
    yield


@pytest.mark.usefixtures("quick")
def test_a_run_goes_on_in_another_job_when_the_server_was_restarted(tmp_path: Path) -> None:
    rounds = [entry(tmp_path, number) for number in range(3)]
    server = FakeServer(
        [None, {"rounds": [], "lost": []}, {"rounds": rounds[:1], "lost": []}],
        [None, {"rounds": rounds[1:], "lost": []}, {"rounds": [], "lost": [], "end": {"stopped": None}}])
    assert follow(server) == [0, 1, 2, {"stopped": None}]
    assert server.submitted == 2 and server.asked[-1] == {"have": 3}


@pytest.mark.usefixtures("quick")
def test_a_job_that_is_only_said_to_run_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlab.engines.nvflare import admin as module

    monkeypatch.setattr(module, "_STALE", 0.2)
    rounds = [entry(tmp_path, number) for number in range(2)]
    server = FakeServer([{"rounds": rounds[:1], "lost": []}, *[{}] * 100_000],
                        [{"rounds": rounds[1:], "lost": []}, {"rounds": [], "lost": [], "end": {"stopped": None}}])
    assert follow(server) == [0, 1, {"stopped": None}] and server.submitted == 2


@pytest.mark.usefixtures("quick")
def test_a_job_is_ended_for_a_lost_site_only_when_that_is_heard_of_again(tmp_path: Path) -> None:
    rounds = [entry(tmp_path, number) for number in range(3)]
    lost = {"rounds": [], "lost": ["b", "elsewhere"]}
    server = FakeServer(
        [{"rounds": rounds[:1], "lost": ["b"]}, lost, lost, {"rounds": [], "lost": [], "end": {"paused": True}}],
        [{"rounds": rounds[1:], "lost": []}, {"rounds": [], "lost": [], "end": {"stopped": None}}])
    assert follow(server) == [0, 1, 2, {"stopped": None}]
    assert [q.get("pause", False) for q in server.asked[:4]] == [False, False, True, True]

    still = FakeServer([lost, lost, lost, {"rounds": [], "lost": [], "end": {"stopped": None}}])
    still.heard_of = lambda: {"a": 1.0, "b": 1.0}  # type: ignore[method-assign]  # in the list, but not heard of since
    assert follow(still) == [{"stopped": None}] and not any("pause" in q for q in still.asked)


@pytest.mark.usefixtures("quick")
def test_a_run_whose_last_words_were_lost_is_over_all_the_same(tmp_path: Path) -> None:
    rounds = [entry(tmp_path, number) for number in range(4)]
    assert follow(FakeServer([{"rounds": rounds, "lost": []}])) == [0, 1, 2, 3, {"stopped": None}]


@pytest.mark.usefixtures("quick")
def test_jobs_that_end_without_a_word_end_the_watching() -> None:
    with pytest.raises(RunError, match="3 jobs have ended without a round"):
        follow(FakeServer([], [], []))


def test_how_a_run_ends_is_told() -> None:
    raise_if_failed(None)
    raise_if_failed({"stopped": None})
    with pytest.raises(PrivacyBudgetExhausted, match="no site is left"):
        raise_if_failed({"stopped": "no site is left"})
    with pytest.raises(PrivacyError, match="at the server: site-01 refuses"):
        raise_if_failed({"failed": "site-01 refuses", "kind": "PrivacyError"})
    with pytest.raises(RunError):
        raise_if_failed({"failed": "no", "kind": "AnythingElse"})


def test_the_server_needs_no_numbers_of_patients() -> None:
    private = DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.01, batch=10)
    run = make_run(a_trainer(), ("a", "b"), privacy=private, rounds=3, engine=NVFlare())
    assert [site.name for site in run.sites] == ["a", "b"] and not any(site.train for site in run.sites)
    with pytest.raises(ValueError, match="patients"):
        check_sites(run, blob_sites((3,)))  # which a site finds out with its own patients
    wrong = DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.5, batch=10)
    with pytest.raises(ValueError, match="delta"):
        check_sites(make_run(a_trainer(), ("a",), privacy=wrong, rounds=3, engine=NVFlare()), blob_sites((12,)))


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="patience"):
        NVFlare(patience=0)
    with pytest.raises(ValueError, match="letters"):
        check_site_names(["Klinikum München"])
    with pytest.raises(ValueError, match="by name only"):
        federate(a_trainer(), ["a", "b"], rounds=1, engine=Local())
    assert repr(NVFlare(seconds=90)) == "NVFlare(env=Simulation(folder=None, threads=None, tries=3), seconds=90)"
    assert Privacy().at("anywhere").units == frozenset()


def test_a_simulation_goes_on_with_the_same_patients_only(tmp_path: Path) -> None:
    prepare_simulation(tmp_path, blob_sites((2, 2)), modules=["cohorts"])
    prepare_simulation(tmp_path, blob_sites((2, 2)), modules=["cohorts"])
    kept = load_sites(tmp_path / "data" / "site-1")[0]
    assert [p.id for p in kept.train] == ["s1p0", "s1p1"]
    assert torch.equal(kept.train[1].image, blob_sites((2, 2))[1].train[1].image)
    with pytest.raises(RunError, match="site-1 has other patients"):
        prepare_simulation(tmp_path, blob_sites((2, 3)), modules=["cohorts"])
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["site-0", "site-1"]


def test_without_nvflare_the_error_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: installed("no-nvflare" if name == "nvflare" else name))
    with pytest.raises(RunError, match=r"pip install 'fedlab-workbench\[nvflare\]'"):
        federate(a_trainer(), blob_sites((3, 2)), rounds=1, engine=NVFlare())
    assert main(["deploy", "init", str(tmp_path / "x"), "--server", "localhost", "--sites", "a"]) == 1
    assert "pip install" in capsys.readouterr().err


def test_a_site_tells_the_server_no_name_of_a_class_and_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    collab = SimpleNamespace(caller="server", **dict.fromkeys(("init", "publish", "final"), lambda method: method))
    for name, module in {"nvflare": ModuleType("nvflare"), "nvflare.collab": SimpleNamespace(collab=collab)}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "fedlab.engines.nvflare.site_part", raising=False)
    site_part = importlib.import_module("fedlab.engines.nvflare.site_part")
    monkeypatch.delitem(sys.modules, "fedlab.engines.nvflare.site_part")

    def fails(error: Exception) -> dict[str, Any]:
        def work() -> None:
            raise error

        return site_part.SitePart()._told(work)

    told = [fails(type("Mueller", (ValueError,), {})("Mueller")), fails(type("Mueller", (FedlabError,), {})("no disk")),
            fails(RunError("/hospital/Mueller/states cannot be written"))]
    assert told == [{"error": "FedlabError", "text": "ValueError; its text stays in the log of this site"},
                    {"error": "FedlabError", "text": "no disk"},
                    {"error": "RunError", "text": "states cannot be written"}]
