"""A server and sites that share nothing but messages: the same result as in one process, whatever breaks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import networkx
import pytest
import torch

from cohorts import BatchNet, TinyNet, blob_sites
from fedlab import (
    DPSGD,
    FedAvg,
    Local,
    Privacy,
    PrivacyError,
    SecureAggregation,
    Site,
    SiteTrainer,
    Update,
    federate,
)
from fedlab.core import ServerState, SiteError, weights_sha256
from fedlab.deploy.host import SiteHost
from fedlab.deploy.messages import pack_answer, unpack_state
from fedlab.deploy.plan import Plan, built
from fedlab.deploy.policy import Budget, Required, SitePolicy
from fedlab.engines.processes import Processes
from fedlab.engines.remote import Remote
from fedlab.privacy import AtSites, LedgerFile, LocalGaussian, PersonalLayers, SharePercentile
from fedlab.run import Admission, History, SiteStates
from fedlab.run.site_task import SiteTask
from fedlab.strategies import SCAFFOLD, FedNova, FedOpt, FedProx
from fedlab.topologies import Gossip, ring, star
from fedlab.training import PolyDecay, augmentation

POLICY = SitePolicy(installed=("cohorts", "test_remote"), tell_errors=True)
SIZES = (3, 2, 4)


def trainer(network: type[TinyNet] = TinyNet, **settings: Any) -> SiteTrainer:
    settings = {"lr": 0.05, "steps": 2, "crop": (8, 8, 8), "augment": None, "optimiser": torch.optim.SGD,
                "precision": "fp32", **settings}
    return SiteTrainer(model=built(network, seed=3), **settings)


class Hosts:
    """Sites in this process behind an interface of bytes, answering in reverse; a site can be killed and reopened."""

    def __init__(self, folder: Path, *, policy: SitePolicy = POLICY, sites: Sequence[Site] | None = None) -> None:
        self.folder, self.policy = folder, policy
        self.sites = {site.name: site for site in (blob_sites(SIZES) if sites is None else sites)}
        self.hosts: dict[str, SiteHost] = {}
        self.plan: tuple[str, bytes] = ("", b"")
        self.engine: Remote | None = None
        self.calls: list[tuple[str, str]] = []
        self.trouble: Callable[[str, str], None] = lambda name, method: None
        for name in self.sites:
            self.open(name)

    def open(self, name: str) -> None:
        self.hosts[name] = SiteHost(site=self.sites[name], folder=self.folder / name, policy=self.policy)

    def restart(self, name: str) -> None:
        self.hosts.pop(name).close()
        self.open(name)

    def ask(self, sites: Sequence[str], method: str, args: dict[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
        for name in reversed(sites):
            self.calls.append((name, method))
            if method == "begin":
                self.plan = args[name]
            try:
                self.trouble(name, method)
                came = getattr(self.hosts[name], method)(*args[name])
            except Exception as error:
                came = error
            yield name, came

    def close(self) -> None:
        for host in self.hosts.values():
            host.close()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path / "sites")
    yield made
    made.close()


def run(hosts: Hosts | None, *, rounds: int = 3, strategy: Any = None, privacy: Privacy | None = None,
        aggregation: Any = None, topology: Any = star, admission: Any = None, checkpoint: Path | None = None,
        seed: int = 5, settings: dict[str, Any] | None = None, engine: Any = None) -> History:
    """The run by the hosts, or in this process where there are none."""
    train, strategy, privacy = trainer(**(settings or {})), strategy or FedAvg(), privacy or Privacy()
    sites: Any = blob_sites(SIZES)
    if hosts is None:
        engine = Local()
    else:
        plan = Plan.of(trainer=train, strategy=strategy, privacy=privacy, aggregation=aggregation, topology=topology,
                       admission=admission, rounds=rounds, seed=seed, sites=sites)
        engine = hosts.engine = engine or Remote(plan=plan, ask=hosts.ask)
        sites = [site.name for site in sites]
    return federate(train, sites, strategy=strategy, privacy=privacy, aggregation=aggregation, topology=topology,
                    admission=admission, rounds=rounds, seed=seed, engine=engine, checkpoint=checkpoint, progress=False)


@cache
def alone(case: str) -> History:
    """The case in one process."""
    return run(None, **CASES[case])


def sha(history: History) -> str:
    assert history.state is not None
    return weights_sha256(history.state.model)


class Halving(PolyDecay):
    """A learning rate that halves every round."""

    def __call__(self, round: int) -> float:
        return self.start / 2**round


DP = DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.1, batch=2)
CASES = {
    "FedAvg": {},
    "FedAvg with moments kept": {"settings": {"optimiser": torch.optim.AdamW, "lr": 0.01, "augment": augmentation()}},
    "FedAvg with moments averaged": {"settings": {"optimiser": torch.optim.AdamW, "lr": 0.01, "momentum": "average"}},
    "FedProx": {"strategy": FedProx(mu=0.5)},
    "FedOpt": {"strategy": FedOpt(rule="adam", server_lr=0.01)},
    "SCAFFOLD": {"strategy": SCAFFOLD()},
    "SCAFFOLD on a schedule": {"strategy": SCAFFOLD(), "settings": {"lr": Halving(start=0.05, rounds=9)}},
    "FedNova": {"strategy": FedNova(), "settings": {"steps": None, "epochs": 1, "batch_size": 1}},
    "DPSGD": {"privacy": DP},
    "DPSGD at one site, sums hidden": {"strategy": FedAvg(weights="uniform"), "privacy": AtSites(
        sites=("site-1",), technique=DP), "aggregation": SecureAggregation(clip=5.0, threshold=2)},
    "DPSGD + LocalGaussian": {"privacy": DP + LocalGaussian(clip=1.0, noise_multiplier=1.0, delta=0.1)},
    "SharePercentile": {"privacy": SharePercentile(keep=0.3, error_feedback=True)},
    "PersonalLayers": {"privacy": PersonalLayers(names=["last.*"])},
    "SecureAggregation": {"strategy": FedAvg(weights="uniform"),
                          "aggregation": SecureAggregation(clip=5.0, threshold=2)},
    "ring": {"topology": ring},
    "batch norm": {"settings": {"network": BatchNet}},
    "batch norm in a ring": {"settings": {"network": BatchNet}, "topology": ring},
    "batch norm kept at the sites": {"settings": {"network": BatchNet, "buffers": "keep"}},
}


@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_in_one_process(hosts: Hosts, case: str) -> None:
    here, there = alone(case), run(hosts, **CASES[case])
    assert sha(here) == sha(there)
    assert [r["spent"] for r in here.records] == [r["spent"] for r in there.records]


@pytest.mark.parametrize("case", ["FedAvg with moments kept", "FedAvg with moments averaged", "SCAFFOLD", "DPSGD",
                                  "SecureAggregation"])
def test_a_second_run_on_one_engine_starts_anew_and_gives_the_same_bits(hosts: Hosts, case: str) -> None:
    settings = {**CASES[case], "rounds": 6}  # more than the snapshots that a site keeps
    first, second = run(hosts, **settings), run(hosts, engine=hosts.engine, **settings)
    assert sha(first) == sha(second)
    assert not first.site_states  # what the sites keep is theirs


def spent(folder: Path, name: str) -> list[dict[str, Any]]:
    """What a site's ledger on disk says, as a history has it."""
    return [one._asdict() for one in LedgerFile(folder / "sites" / name / "ledger", name).read().spent()]


@pytest.mark.parametrize("case", ["FedAvg with moments kept", "SCAFFOLD", "DPSGD", "PersonalLayers"])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_site_that_is_killed_and_started_again_goes_on_to_the_same_bits(
        hosts: Hosts, tmp_path: Path, case: str, when: int) -> None:
    rounds_seen: dict[str, int] = {}

    def kill(name: str, method: str) -> None:
        if method == "train":
            rounds_seen[name] = rounds_seen.get(name, -1) + 1
            if name == "site-1" and rounds_seen[name] == when:
                hosts.restart(name)
                plan, start = hosts.plan
                hosts.hosts[name].begin(plan, start)  # what a transport's own start-up does

    hosts.trouble = kill
    there, here = run(hosts, **CASES[case]), alone(case)
    assert sha(here) == sha(there)
    if case == "DPSGD":
        assert spent(tmp_path, "site-1") == here.records[-1]["spent"]["site-1"]


@pytest.mark.parametrize("case", ["SCAFFOLD", "DPSGD"])
def test_a_server_that_is_killed_within_a_round_resumes_to_the_same_bits_and_spends_nothing_twice(
        hosts: Hosts, tmp_path: Path, case: str) -> None:
    trained: list[str] = []

    def kill(name: str, method: str) -> None:
        if method == "train":
            trained.append(name)
            if len(trained) == 5:  # in round 1, one site has answered
                raise KeyboardInterrupt

    hosts.trouble = kill
    with pytest.raises(KeyboardInterrupt):
        run(hosts, **CASES[case], checkpoint=tmp_path / "run")
    assert len(trained) == 5
    there = run(hosts, **CASES[case], checkpoint=tmp_path / "run")
    assert len(trained) == 5 + 6
    here = alone(case)
    assert sha(here) == sha(there)
    if case == "DPSGD":
        for name in hosts.sites:
            assert spent(tmp_path, name) == here.records[-1]["spent"][name]


def test_a_site_that_is_lost_is_absent_and_comes_back(hosts: Hosts) -> None:
    lost: list[int] = []

    def lose(name: str, method: str) -> None:
        if name == "site-0" and method == "train" and len(lost) < 1:
            lost.append(1)
            hosts.restart(name)
            raise ConnectionError("reset by peer")

    hosts.trouble = lose
    there = run(hosts, admission=Admission(min_sites=2))
    assert [sorted(r["absent"]) for r in there.records] == [["site-0"], [], []]
    assert "reset by peer" in there.records[0]["absent"]["site-0"]
    assert [len(r["sites"]) for r in there.records] == [2, 3, 3]


def test_without_admission_rules_the_first_failure_ends_the_run_with_its_reason(hosts: Hosts) -> None:
    def lose(name: str, method: str) -> None:
        if name == "site-1" and method == "train":
            raise TimeoutError("no answer within 60 s")

    hosts.trouble = lose
    with pytest.raises(SiteError, match=r"site-1.*reach.*no answer within 60 s"):
        run(hosts)


@pytest.mark.parametrize("step", ["keys", "shares", "receive", "agree", "unmask"])
def test_a_site_lost_in_an_exchange_of_secure_aggregation_does_not_end_the_run(hosts: Hosts, step: str) -> None:
    lost: list[str] = []
    ask = hosts.ask

    def losing(sites: Sequence[str], method: str, args: dict[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
        for name, came in ask(sites, method, args):
            if name == "site-2" and method == "exchange" and args[name][1] == step and not lost:
                lost.append(name)
                came = TimeoutError("gone")
            yield name, came

    hosts.ask = losing  # type: ignore[method-assign]
    case = CASES["SecureAggregation"]
    late = step in ("agree", "unmask")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        there = run(hosts, **case, admission=Admission(min_sites=2))
    assert lost == ["site-2"]
    assert sorted(there.records[0]["absent"]) == ([] if late else ["site-2"])
    assert late == any("site-2 sent its update but left the exchange" in str(w.message) for w in told)
    assert [len(r["sites"]) for r in there.records] == [3 if late else 2, 3, 3]
    if late:  # its update is in the sum
        assert sha(there) == sha(alone("SecureAggregation"))


@pytest.mark.parametrize("rules", [None, Admission(min_sites=2)], ids=["no rules", "rules"])
@pytest.mark.parametrize("where", ["Local", "Processes", "Remote"])
def test_an_exception_in_an_exchange_is_one_failed_site_on_every_engine(
        hosts: Hosts, where: str, rules: Admission | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    answer = SecureAggregation.answer

    def fails(self: SecureAggregation, step: str, site: str, *details: Any) -> Any:
        asked.extend([site] if step == "keys" else [])
        if (site, step) == ("site-2", "keys") and asked.count(site) == 2:  # in round 1
            raise KeyError("lost")
        return answer(self, step, site, *details)

    monkeypatch.setattr(SecureAggregation, "answer", fails)
    case: dict[str, Any] = {**CASES["SecureAggregation"], "admission": rules, "seed": 5, "rounds": 3}

    def there() -> History:
        if where == "Remote":
            return run(hosts, **case)
        with Processes(workers=1) as processes:
            return federate(trainer(), blob_sites(SIZES), progress=False, **case,
                            engine=processes if where == "Processes" else Local())

    reason = "site 'site-2' failed in round 1 at stage 'exchange': KeyError: 'lost'"
    if rules is None:
        with pytest.raises(SiteError, match=reason):
            there()
    else:
        history = there()
        assert [record["absent"] for record in history.records] == [{}, {"site-2": reason}, {}]


def test_an_error_of_a_site_names_the_round_in_which_the_server_has_asked(hosts: Hosts) -> None:
    """The site itself does not know it where it fails before it has seen the round's state."""
    counted: list[int] = []

    def restart(name: str, method: str) -> None:
        if (name, method) == ("site-0", "train"):
            counted.append(1)
            if len(counted) == 2:  # in round 1
                hosts.restart(name)

                def fails(*details: Any) -> Any:
                    raise ValueError("no such part here")

                hosts.hosts[name]._task = fails  # type: ignore[method-assign]
                raise ConnectionError("reset by peer")

    hosts.trouble = restart
    absent = [record["absent"].get("site-0", "") for record in run(hosts, admission=Admission()).records]
    assert absent[0] == "" and "failed in round 1 at stage 'reach'" in absent[1]
    assert absent[2] == "site 'site-0' failed in round 2 at stage 'begin': ValueError: no such part here"


def test_fewer_than_the_threshold_reveal_nothing(hosts: Hosts) -> None:
    def lose(name: str, method: str) -> None:
        if name != "site-0" and method == "exchange":
            raise TimeoutError("gone")

    hosts.trouble = lose
    history = run(hosts, **CASES["SecureAggregation"], admission=Admission())
    assert all("threshold is 2" in record["void"] and not record["sites"] for record in history.records)
    assert weights_sha256(history.state.params) == weights_sha256(trainer().initial())


def test_gossip_shows_each_site_its_own_model_only(hosts: Hosts) -> None:
    seen: dict[str, set[str]] = {}
    ask = hosts.ask

    def watched(sites: Sequence[str], method: str, args: dict[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
        if method == "train":
            for name in sites:
                state = unpack_state(args[name][1])
                assert not state.models
                seen.setdefault(name, set()).add(weights_sha256(state.params))
        yield from ask(sites, method, args)

    hosts.ask = watched  # type: ignore[method-assign]
    topology = Gossip(graph=networkx.path_graph(3))
    there, here = run(hosts, topology=topology), run(None, topology=topology)
    assert sha(there) == sha(here)
    assert len(set.union(*seen.values())) == 1 + 2 * 3  # one start, then three models a round


def test_only_what_a_site_needs_of_the_state_is_sent(hosts: Hosts) -> None:
    states: list[ServerState] = []
    ask = hosts.ask

    def watched(sites: Sequence[str], method: str, args: dict[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
        if method == "train":
            states.extend(unpack_state(args[name][1]) for name in sites)
        yield from ask(sites, method, args)

    hosts.ask = watched  # type: ignore[method-assign]
    run(hosts, **CASES["FedOpt"], rounds=2)
    assert not any(state.moments for state in states)
    states.clear()
    run(hosts, **CASES["SCAFFOLD"], rounds=2)
    assert [sorted(state.moments) for state in states[3:]] == [["control variate"]] * 3


def test_an_answer_in_another_sites_name_stays_out(hosts: Hosts) -> None:
    ask = hosts.ask

    def swapped(sites: Sequence[str], method: str, args: dict[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
        came = dict(ask(sites, method, args))
        if method == "train":
            came["site-1"] = came["site-0"]
        yield from came.items()

    hosts.ask = swapped  # type: ignore[method-assign]
    there = run(hosts, rounds=1, admission=Admission())
    assert "says it is of 'site-0'" in there.records[0]["absent"]["site-1"]
    assert sorted(there.records[0]["sites"]) == ["site-0", "site-2"]


@pytest.mark.parametrize("came", [b"", b"\x80\x05pickle", {"site-1": b"x"}, "text", None, 7, b"\xff" * 64])
def test_nonsense_is_a_failure_of_who_sent_it(hosts: Hosts, came: Any) -> None:
    ask = hosts.ask

    def spoilt(sites: Sequence[str], method: str, args: dict[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
        for name, answer in ask(sites, method, args):
            yield name, came if (name, method) == ("site-1", "train") else answer

    hosts.ask = spoilt  # type: ignore[method-assign]
    there = run(hosts, rounds=1, admission=Admission())
    assert "site-1" in there.records[0]["absent"]["site-1"]


def test_answers_are_handed_on_in_the_order_of_the_cohort_as_soon_as_they_can_be(tmp_path: Path) -> None:
    train = trainer()
    sites = [Site(name=f"site-{k}", train=()) for k in range(4)]
    plan = Plan.of(trainer=train, strategy=FedAvg(), privacy=Privacy(), topology=star, admission=None, rounds=1, seed=0,
                   sites=sites)
    handed: list[str] = []

    def ask(names: Sequence[str], method: str, args: dict[str, tuple[Any, ...]]) -> Iterator[tuple[str, Any]]:
        for name in names if method == "begin" else ("site-1", "site-0", "site-0", "stranger", "site-3"):
            if method == "train" and name == "site-3":
                assert handed == ["site-0", "site-1"]  # those waited for nobody else
            delta = {key: torch.zeros_like(t) for key, t in train.initial().items()}
            yield name, pack_answer(Update(site=name, delta=delta, weight=1.0, round=0))

    engine = Remote(plan=plan, ask=ask)
    answers = []
    with pytest.warns(UserWarning, match="from 'stranger'|of 'site-0'|of 'stranger'"):
        for answer in engine.train(SiteTask(trainer=train, privacy=Privacy(), seed=0), ServerState(
                round=0, params=train.initial()), sites, SiteStates()):
            handed.append(answer.site)
            answers.append(answer)
    assert handed == ["site-0", "site-1", "site-2", "site-3"]
    assert [type(a).__name__ for a in answers] == ["Update", "Update", "Failure", "Update"]
    assert "the site did not respond" in str(answers[2].error)


def test_what_a_site_refuses_reaches_the_server_with_its_reason(tmp_path: Path) -> None:
    policy = SitePolicy(installed=("cohorts",), require=(Required(technique="DPSGD", least={"noise_multiplier": 2.0}),))
    made = Hosts(tmp_path / "sites", policy=policy)
    try:
        with pytest.raises(PrivacyError, match=r"refuses: this site insists on DPSGD, the plan protects with Privacy"):
            run(made)
        with pytest.raises(PrivacyError, match=r"noise_multiplier of at least 2.0, the plan has 1.0"):
            run(made, privacy=DP)
        assert ("site-0", "train") not in made.calls
    finally:
        made.close()


def test_a_spent_budget_withdraws_the_site_before_anything_is_sent(tmp_path: Path) -> None:
    plain = run(None, privacy=DP, rounds=4)
    after = {name: [r["spent"][name][0]["epsilon"] for r in plain.records] for name in ("site-0", "site-1", "site-2")}
    budget = Budget(epsilon=(after["site-0"][1] + after["site-0"][2]) / 2, delta=0.1)
    within = {name: sum(epsilon <= budget.epsilon for epsilon in own) for name, own in after.items()}
    made = Hosts(tmp_path / "sites", policy=SitePolicy(installed=("cohorts",), budgets={"patient": budget}))
    try:
        there = run(made, privacy=DP, rounds=4)
        assert within["site-0"] == 2 and max(within.values()) < 4
        assert there.stopped and "budget is ε" in there.stopped and len(there.records) == max(within.values())
        for name, rounds in within.items():
            assert sum(name in record["sites"] for record in there.records) == rounds
            (one,) = spent(tmp_path, name)
            assert one["epsilon"] == after[name][rounds - 1] <= budget.epsilon
    finally:
        made.close()
