"""A site's policy holds against a server that tries: what was sent counts, work has limits, files are not toolboxes."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cohorts import TinyNet, blob_sites
from fedlab import DPSGD, FedAvg, Privacy, PrivacyError, SecureAggregation, SiteTrainer, Update
from fedlab.core.kit import Kit
from fedlab.core.text import without_folders
from fedlab.core.types import Failure, ServerState, SiteState, Withdrawal
from fedlab.deploy.host import SiteHost
from fedlab.deploy.limits import Limits
from fedlab.deploy.messages import pack_state, pack_weights, unpack_answer
from fedlab.deploy.plan import Plan, built
from fedlab.deploy.policy import Budget, Required, SitePolicy
from fedlab.deploy.snapshots import SiteSnapshots
from fedlab.privacy import (
    SVT,
    AdaptiveClip,
    AtSites,
    CentralGaussian,
    Gaussian,
    Ledger,
    LedgerFile,
    LocalGaussian,
    PersonalLayers,
    SharePercentile,
    SparseVector,
    Terms,
    epsilon_of,
)
from fedlab.privacy.aggregation import Aggregation
from fedlab.strategies import Ditto
from fedlab.topologies import star

SITE = blob_sites((4,))[0]
NAMES = ("site-0", "site-1", "site-2")
UNIFORM = FedAvg(weights="uniform")
KNOWN = ("cohorts", "test_policy")
SECURE_NOISE = LocalGaussian(clip=1.0, noise_multiplier=5.0, delta=0.1, secure_mode=True)


def trainer(**settings: Any) -> SiteTrainer:
    return SiteTrainer(**{"model": built(TinyNet, seed=3), "lr": 0.05, "steps": 1, "crop": (8, 8, 8), "augment": None,
                          "optimiser": torch.optim.SGD, "precision": "fp32", **settings})


START = trainer().initial()


def plan_of(**more: Any) -> Plan:
    return Plan.of(**{"trainer": trainer(), "strategy": FedAvg(), "privacy": Privacy(), "topology": star,
                      "admission": None, "rounds": 3, "seed": 0, "sites": NAMES, **more})


@contextmanager
def begun(folder: Path, plan: Plan | str, policy: SitePolicy | None = None, **more: Any) -> Iterator[SiteHost]:
    given = policy or SitePolicy()
    policy = replace(given, installed=(*KNOWN, *given.installed))
    with SiteHost(site=SITE, folder=folder, policy=policy, **more) as host:
        host.begin(plan if isinstance(plan, str) else plan.to_json(), pack_weights(START))
        yield host


def ask(host: SiteHost, run: str, round: int = 0, *, shift: float = 0.0, **more: Any) -> Any:
    state = ServerState(round=round, params={k: t + shift for k, t in START.items()}, **more)
    return unpack_answer(host.train(run, pack_state(state)), site="site-0")


# What was sent


def counted(folder: Path) -> int:
    path = folder / "ledger" / "answers.json"
    return sum(map(len, json.loads(path.read_text()).values())) if path.exists() else 0


def test_an_update_that_is_asked_for_again_counts_again(tmp_path: Path) -> None:
    """With noise from the operating system each is another one: their mean has the less noise, the more there are."""
    plan, policy = plan_of(privacy=SECURE_NOISE, rounds=1), SitePolicy(max_rounds=1, max_updates=3, secure_mode=True)
    with begun(tmp_path, plan, policy) as host:
        sent = [ask(host, plan.run) for _ in range(5)]
    assert [type(answer) for answer in sent] == [Update] * 3 + [Withdrawal] * 2
    assert "max_updates: site-0 answers at most 3 times in all runs, this would be number 4" in sent[3].reason
    assert not torch.equal(sent[0].delta["first.weight"], sent[1].delta["first.weight"])
    for other in (plan, plan_of(privacy=SECURE_NOISE, rounds=1, seed=9)):  # after a restart, and under another name
        with begun(tmp_path, other, policy) as host:
            assert isinstance(ask(host, other.run), Withdrawal)
    assert counted(tmp_path) == 3


def test_updates_count_over_runs_rounds_and_restarts_whatever_becomes_of_them(tmp_path: Path) -> None:
    policy, left = SitePolicy(max_updates=4), 4
    for seed, round in ((0, 0), (1, 0), (0, 0), (1, 1)):  # the server may void a round, or never receive its update
        plan = plan_of(seed=seed)
        with begun(tmp_path, plan, policy) as host:
            assert isinstance(ask(host, plan.run, round), Update)
        left -= 1
        assert counted(tmp_path) == 4 - left
    with begun(tmp_path, plan, policy) as host:
        assert isinstance(ask(host, plan.run, 2), Withdrawal)


def test_the_count_is_on_disk_before_an_update_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site that dies right after it has counted has sent nothing, and has counted; never the other way round."""
    plan = plan_of()
    with begun(tmp_path, plan, SitePolicy(max_updates=2)) as host:
        monkeypatch.setattr(SiteSnapshots, "save", lambda *arguments: pytest.fail("the machine loses power"))
        with pytest.raises(pytest.fail.Exception):
            host.train(plan.run, pack_state(ServerState(round=0, params=START)))
        assert counted(tmp_path) == 1
        monkeypatch.undo()
        assert isinstance(ask(host, plan.run), Update) and isinstance(ask(host, plan.run), Withdrawal)


def test_a_count_that_is_damaged_sends_nothing(tmp_path: Path) -> None:
    plan = plan_of()
    for content in ("", "[]", '{"run": 3}', "{"):
        with begun(tmp_path, plan) as host:
            (tmp_path / "ledger").mkdir(exist_ok=True)
            (tmp_path / "ledger" / "answers.json").write_text(content)
            answer = ask(host, plan.run)
        assert isinstance(answer, Failure) and "answers.json is damaged" in str(answer.error)


# The work of a round


CENTRAL = CentralGaussian(clip=AdaptiveClip(start=1.0, bit_noise=2.0), noise_multiplier=1.0, delta=0.1)
SVT_ = SVT(fraction=0.1, epsilon_threshold=1.0, epsilon_release=1.0, delta=0.1, passes=20)
#: A rule, plans that keep it as closely as they can (four patients), and plans that break it.
LIMITED: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]] = {
    "steps": ({"max_steps": 4}, [{"trainer": trainer(steps=4)}, {"trainer": trainer(steps=None, epochs=2)}],
              [{"trainer": trainer(steps=5)}, {"trainer": trainer(steps=None, epochs=3)},
               {"trainer": trainer(steps=None, epochs=7, batch_size=6)},  # 28 patients are four batches and a part
               {"trainer": trainer(steps=3), "strategy": Ditto(lam=1.0)}]),
    "batch": ({"max_batch": 2}, [{"trainer": trainer(batch_size=2)}, {"privacy": DPSGD(
        clip=1.0, noise_multiplier=1.0, delta=0.1, sample_rate=0.5)}],
              [{"trainer": trainer(batch_size=3)},
               {"privacy": DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.1, batch=2.5)},
               {"privacy": DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.1, sample_rate=0.75)}]),
    "crops": ({"max_crops": 2}, [{"privacy": DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.1, batch=2, crops=2)}, {}],
              [{"privacy": DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.1, batch=2, crops=3)},
               {"privacy": AtSites(sites=NAMES[:1], technique=DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.1, batch=2,
                                                                   crops=3))}]),
    "passes": ({"max_passes": 2}, [{"trainer": trainer(steps=4)}, {"trainer": trainer(steps=None, epochs=2)},
                                   {"trainer": trainer(steps=None, epochs=2, batch_size=3)},
                                   {"trainer": trainer(steps=2), "strategy": Ditto(lam=1.0)}],
               [{"trainer": trainer(steps=5)}, {"trainer": trainer(steps=3), "strategy": Ditto(lam=1.0)},
                {"trainer": trainer(steps=None, epochs=3)}, {"privacy": SVT_},
                {"trainer": trainer(steps=8, batch_size=1), "privacy": DPSGD(
                    clip=1.0, noise_multiplier=1.0, delta=0.1, sample_rate=0.5)}]),
    "broadcast_clip": ({"broadcast_clip": (0.5, 1.0)}, [{"privacy": CENTRAL, "strategy": UNIFORM}],
                       [{"strategy": UNIFORM, "privacy": CentralGaussian(clip=AdaptiveClip(
                           start=start, bit_noise=2.0), noise_multiplier=1.0, delta=0.1)} for start in (0.4, 1.1)]),
}


@pytest.mark.parametrize("rule", LIMITED)
def test_work_beyond_a_limit_is_refused_with_the_rule(tmp_path: Path, rule: str) -> None:
    policy, kept, broken = LIMITED[rule]
    for number, more in enumerate(broken):
        plan = plan_of(**more)
        with pytest.raises(PrivacyError, match=f"site-0 refuses: (max_)?{rule}: this site allows"), begun(
                tmp_path / f"b{number}", plan, SitePolicy(**policy)):
            pass
        with begun(tmp_path / f"b{number}", plan):
            pass  # the rule alone has refused it
    for number, more in enumerate(kept):
        with begun(tmp_path / f"k{number}", plan_of(**more), SitePolicy(**policy)):
            pass


def test_a_huge_clipping_norm_of_a_round_is_refused_before_training(tmp_path: Path) -> None:
    plan = plan_of(privacy=CENTRAL, strategy=UNIFORM)
    required = SitePolicy(require=(Required(technique="CentralGaussian", least={"clip": 0.5}, most={"clip": 2.0}),))
    for policy, norms in ((SitePolicy(broadcast_clip=(0.5, 2.0)), (2.1, 0.4, 1e30)), (required, (2.1, 0.4, 1e30)),
                          (SitePolicy(), (0.0, -1.0, float("inf"), float("nan")))):
        with begun(tmp_path, plan, policy) as host:
            for norm in norms:
                answer = ask(host, plan.run, broadcast={"clipping norm": torch.tensor(norm, dtype=torch.float64)})
                assert isinstance(answer, Failure) and isinstance(answer.error, PrivacyError), norm
                assert any(word in str(answer.error) for word in ("clip", "NaN or infinite"))
            two = ask(host, plan.run, broadcast={"clipping norm": torch.ones(2, dtype=torch.float64)})
            assert isinstance(two, Failure) and "one number" in str(two.error)
    assert not (tmp_path / "ledger").exists()  # nothing was trained
    with begun(tmp_path, plan, SitePolicy(broadcast_clip=(0.5, 2.0))) as host:
        answer = ask(host, plan.run, broadcast={"clipping norm": torch.tensor(1.5, dtype=torch.float64)})
        assert isinstance(answer, Update) and answer.norm() <= 1.5


def test_a_clipping_norm_that_the_site_has_moved_stays_within_what_is_required() -> None:
    required = SitePolicy(require=(Required(technique="DPSGD", most={"clip": 2.0}),))
    for norm, fits in ((1.9, True), (2.1, False)):
        own = SiteState(namespaces={"privacy 0": {"clipping norm": torch.tensor(norm)}, "strategy": {
            "clipping norm": torch.tensor(9.0)}})
        if fits:
            required.check_round(ServerState(round=1, params={}), own)
        else:
            with pytest.raises(PrivacyError, match=r"clip of at most 2.0, in this round it is 2.1"):
                required.check_round(ServerState(round=1, params={}), own)


class LongerAtHeart(FedAvg):
    """Takes more steps than the plan says."""

    def equip(self, kit: Kit, site: Any, state: Any, site_state: Any) -> Kit:
        return replace(kit, loader=[batch for batch in kit.loader for _ in range(3)])


def test_steps_are_counted_when_they_are_taken_too(tmp_path: Path) -> None:
    plan = plan_of(strategy=LongerAtHeart())
    for most, fits in ((3, True), (2, False)):
        with begun(tmp_path / str(most), plan, SitePolicy(max_steps=most)) as host:
            answer = ask(host, plan.run)
        assert isinstance(answer, Update if fits else Failure)
        if not fits:
            assert "max_steps: this site allows at most 2 steps per round, this one took 3" in str(answer.error)
            assert not (tmp_path / str(most) / "ledger" / "answers.json").exists()


@pytest.mark.parametrize("wrong", [
    {"max_steps": 0}, {"max_steps": 1.5}, {"max_steps": True}, {"max_steps": "9"}, {"max_batch": 0},
    {"max_batch": float("nan")}, {"max_batch": float("inf")}, {"max_batch": -1}, {"max_crops": 0}, {"max_crops": 2.5},
    {"max_passes": 0.0}, {"max_passes": "2"}, {"max_passes": False}, {"broadcast_clip": (2.0, 1.0)},
    {"broadcast_clip": (0.0, 1.0)}, {"broadcast_clip": (1.0,)}, {"broadcast_clip": 1.0}, {"broadcast_clip": (1.0, "2")},
    {"broadcast_clip": (1.0, float("inf"))}, {"broadcast_clip": (float("nan"), 1.0)}, {"broadcast_clip": (True, 2)},
    {"installed": "os"}, {"max_updates": 0}, {"max_updates": True}, {"min_sites": 0}, {"secure_mode": 1},
], ids=str)
def test_a_limit_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SitePolicy(**wrong)


# Each pair of a rule and another rule's setting: a rule refuses what breaks it, whatever else the plan keeps.


DP = DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.1, batch=2, crops=2, max_epsilon=50.0, secure_mode=True)
#: Rules that the plan `GOOD` keeps, and a change of the plan that breaks each of them.
RULES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "require": ({"require": (Required(technique="DPSGD", least={"noise_multiplier": 1.0}, most={
        "clip": 1.0, "max_epsilon": 50.0}, exactly={"per_layer": False}),)}, {"noise_multiplier": 0.9}),
    "budget": ({"budgets": {"patient": Budget(epsilon=90.0, delta=0.1)}}, {"delta": 0.2}),
    "max_rounds": ({"max_rounds": 3}, {"rounds": 4}),
    "secure_mode": ({"secure_mode": True}, {"secure_mode": False}),
    "min_sites": ({"min_sites": 3}, {"sites": NAMES[:2]}),
    "max_steps": ({"max_steps": 2}, {"steps": 3}),
    "max_batch": ({"max_batch": 2}, {"batch": 3}),
    "max_crops": ({"max_crops": 2}, {"crops": 3}),
    "max_passes": ({"max_passes": 1}, {"steps": 3}),
}


def good(**changed: Any) -> Plan:
    own = {name: getattr(DP, name) for name in ("clip", "noise_multiplier", "delta", "batch", "crops", "max_epsilon",
                                                "secure_mode")}
    technique = DPSGD(**{**own, **{name: value for name, value in changed.items() if name in own}})
    rest = {name: value for name, value in changed.items() if name not in {*own, "steps"}}
    return plan_of(privacy=technique, trainer=trainer(steps=changed.get("steps", 2)), **rest)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_holds_beside_every_other_one(tmp_path: Path, rule: str) -> None:
    broken, kept = good(**RULES[rule][1]), good()
    said = {"require": "insists on DPSGD", "max_passes": "max_(passes|steps): ", "max_steps": "max_(passes|steps): "}
    for other in RULES.keys() - {rule}:
        policy = SitePolicy(**RULES[rule][0], **RULES[other][0])
        with pytest.raises(PrivacyError, match=said.get(rule, f"{rule}: ")), begun(tmp_path, broken, policy):
            pass
        if rule < other:
            with begun(tmp_path, kept, policy):
                pass


# Noise from the operating system


def noisy(*, secure: bool) -> dict[str, dict[str, Any]]:
    """Everything of fedlab that adds noise, alone, nested and joined."""
    mode = {"secure_mode": secure}
    local = LocalGaussian(clip=1.0, noise_multiplier=2.0, delta=0.1, **mode)
    svt = SVT(fraction=0.1, epsilon_threshold=1.0, epsilon_release=1.0, delta=0.1, **mode)
    sparse = SparseVector(fraction=0.1, epsilon=1.0, delta=0.1, **mode)
    dpsgd = DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.1, batch=2, **mode)
    adaptive = DPSGD(clip=AdaptiveClip(start=1.0, bit_noise=2.0), noise_multiplier=1.0, delta=0.1, batch=2, **mode)
    central = CentralGaussian(clip=1.0, noise_multiplier=2.0, delta=0.1, **mode)
    hidden = SecureAggregation(threshold=3, clip=1.0, noise_multiplier=2.0, delta=0.1, **mode)
    alone = {"LocalGaussian": local, "SVT": svt, "SparseVector": sparse, "DPSGD": dpsgd, "AdaptiveClip": adaptive}
    return {
        **{name: {"privacy": part} for name, part in alone.items()},
        **{f"{name} in AtSites": {"privacy": AtSites(sites=("site-1", "site-0"), technique=part)}
           for name, part in alone.items()},
        **{f"{name} in two AtSites, joined": {"privacy": SharePercentile() + AtSites(
            sites=NAMES, technique=AtSites(sites=NAMES[:1], technique=part) + SharePercentile())}
           for name, part in alone.items()},
        "CentralGaussian": {"privacy": central, "strategy": UNIFORM},
        "CentralGaussian, adaptive": {"strategy": UNIFORM, "privacy": CentralGaussian(
            clip=AdaptiveClip(start=1.0, bit_noise=2.0), noise_multiplier=1.0, delta=0.1, **mode)},
        "SparseVector + DPSGD": {"privacy": DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.1, batch=2, secure_mode=True)
                                 + sparse},
        "SecureAggregation": {"aggregation": hidden, "strategy": UNIFORM},
        "SecureAggregation, DPSGD": {"aggregation": hidden, "strategy": UNIFORM, "privacy": DP},
    }


@pytest.mark.parametrize("name", noisy(secure=False))
def test_noise_that_repeats_is_refused_wherever_it_stands(tmp_path: Path, name: str) -> None:
    policy = SitePolicy(secure_mode=True)
    with pytest.raises(PrivacyError, match=r"secure_mode: .*\(secure_mode=True\)"), begun(
            tmp_path, plan_of(**noisy(secure=False)[name]), policy):
        pass
    with begun(tmp_path, plan_of(**noisy(secure=True)[name]), policy):
        pass


def test_what_adds_no_noise_here_needs_no_secure_mode(tmp_path: Path) -> None:
    silent = DPSGD(clip=1.0, noise_multiplier=0.0, delta=0.1, batch=2)
    elsewhere = AtSites(sites=("site-1",), technique=LocalGaussian(clip=1.0, noise_multiplier=2.0, delta=0.1))
    for number, more in enumerate([{}, {"privacy": silent}, {"privacy": SharePercentile()}, {"privacy": elsewhere},
                                   {"privacy": PersonalLayers(names=["last*"])},
                                   {"aggregation": SecureAggregation(threshold=3), "strategy": UNIFORM}]):
        with begun(tmp_path / str(number), plan_of(**more), SitePolicy(secure_mode=True)):
            pass


class Undecided(Privacy):
    """A guarantee without a word about where its noise comes from, or with the wrong one."""

    units = frozenset({"site"})

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        terms = Terms(unit="site", delta=0.1, adjacency="any two updates of a site")
        Ledger(state).charge(Gaussian(noise_multiplier=2.0), terms=terms)
        return update.map(lambda t: torch.randn(t.shape, generator=rng))


class Mistaken(Undecided):
    """Says that its noise does not repeat, and draws it from the seed."""

    secure_mode = True


def test_noise_of_a_file_is_taken_for_noise_that_repeats_unless_it_is_charged_otherwise(tmp_path: Path) -> None:
    policy = SitePolicy(secure_mode=True)
    with pytest.raises(PrivacyError, match=r"secure_mode: .*Undecided"), begun(
            tmp_path, plan_of(privacy=Undecided()), policy):
        pass
    plan = plan_of(privacy=Mistaken())
    with begun(tmp_path, plan, policy) as host:
        answer = ask(host, plan.run)
    assert isinstance(answer, Failure) and "drawn from the seed of the run" in str(answer.error)


# What a plan makes of approved files


FILE = '''
import functools, os, subprocess
from functools import partial
from os import system
from pathlib import Path
from subprocess import Popen

import torch
from fedlab import FedAvg, Privacy
from fedlab.privacy.aggregation import Aggregation

log = []

def helper(text=""):
    log.append(text)
    return 0.05

def loss(logits, target):
    log.append("loss")
    return (logits - target).square().mean()

class Helper:
    def __init__(self, text=""):
        log.append(text)
    def __call__(self, *arguments):
        log.append("called")
        return 0.05

class Shell(Popen):
    pass

class Bound(functools.partial):
    pass

Alias = Helper
made = Helper("at import")

class Mine(Privacy):
    def __init__(self, keep=0.5):
        self.keep = keep
    def protect(self, update, state, rng):
        return update.map(lambda t: t * self.keep)

class Mean(FedAvg):
    pass

class Sum(Aggregation):
    pass

class Loss(torch.nn.Module):
    def forward(self, logits, target):
        return (logits - target).square().mean()
'''
BAD = ("helper", "loss", "Helper", "Shell", "Bound", "Alias", "made", "system", "Popen", "partial", "Path", "os",
       "subprocess", "functools", "log", "torch", "FedAvg", "Privacy", "__builtins__", "nothing")


def forms(name: str) -> Iterator[tuple[str, Any]]:
    """The places in a plan that a server can put a name into, and the forms that it can have there."""
    full = f"policy_file:{name}"
    made = [{"name": full}, {"make": full, "with": {}}, {"partial": full, "with": {}},
            {"make": full, "with": {"text": "x"}}, {"partial": full, "with": {"text": "x"}}]
    yield from itertools.product(("privacy", "trainer.loss"), made)
    yield from zip(("strategy", "aggregation", "topology", "admission", "trainer.lr", "trainer.optimiser",
                    "trainer.augment", "trainer.model"), itertools.cycle(made), strict=False)
    yield "privacy", {"make": "policy_file:Mine", "with": {"keep": {"make": full, "with": {}}}}
    yield "privacy", {"make": "policy_file:Mine", "with": {"keep": [{"name": full}]}}


def changed(plan: Plan, place: str, value: Any) -> str:
    note = json.loads(plan.to_json())
    holder, _, name = place.rpartition(".")
    (note[holder]["with"] if holder else note)[name] = value
    return json.dumps(note)


@pytest.mark.parametrize("how", ["approved", "installed"])
def test_of_a_file_only_parts_of_a_run_are_made(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    techniques = tmp_path / "techniques"
    techniques.mkdir()
    (techniques / "policy_file.py").write_text(FILE)
    policy = SitePolicy(approved={"policy_file": hashlib.sha256(FILE.encode()).hexdigest()})
    if how == "installed":
        monkeypatch.syspath_prepend(techniques)
        policy = SitePolicy(installed=("policy_file",))
    monkeypatch.delitem(sys.modules, "policy_file", raising=False)
    plan = plan_of()
    with SiteHost(site=SITE, folder=tmp_path / "site", policy=replace(policy, installed=(*KNOWN, *policy.installed)),
                  techniques=techniques) as host:
        for name in BAD:
            for place, form in forms(name):
                with pytest.raises(PrivacyError, match="refuses"):
                    host.begin(changed(plan, place, form), pack_weights(START))
        assert sys.modules["policy_file"].log == ["at import"]  # nothing else was called
        good = changed(plan, "privacy", {"make": "policy_file:Mine", "with": {"keep": 0.25}})
        for place, form in (("strategy", {"make": "policy_file:Mean", "with": {}}),
                            ("aggregation", {"make": "policy_file:Sum", "with": {}}),
                            ("trainer.loss", {"make": "policy_file:Loss", "with": {}})):
            good = changed(Plan.from_json(good), place, form)
        host.begin(good, pack_weights(START))
        assert isinstance(ask(host, Plan.from_json(good).run), Update)
    sys.modules.pop("policy_file", None)


def test_installed_modules_of_python_itself_offer_nothing(tmp_path: Path) -> None:
    policy = SitePolicy(installed=("os", "subprocess", "functools", "builtins", "shutil", "pickle", "importlib"))
    for name in ("os:system", "subprocess:Popen", "functools:partial", "builtins:eval", "shutil:rmtree", "os:getenv",
                 "functools:reduce", "importlib:import_module", "builtins:type", "pickle:loads"):
        for place, form in (("privacy", {"make": name, "with": {}}), ("trainer.loss", {"name": name}),
                            ("trainer.lr", {"partial": name, "with": {}})):
            with pytest.raises(PrivacyError, match="refuses"), begun(
                    tmp_path, changed(plan_of(), place, form), policy):
                pass


# No folder of the site in an error


class Quotes(Privacy):
    """Fails with a path of the site, in an error of some type."""

    def __init__(self, *, path: str, kind: str) -> None:
        self.path, self.kind = path, kind

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        from fedlab.core import errors

        if self.kind == "OSError":
            open(self.path).close()
        if self.kind == "SiteError":
            raise errors.SiteError("site-0", 0, "protect", f"the file {self.path} is no scan")
        raise getattr(errors, self.kind)(f"the file {self.path}, or {self.path!r}, is no scan")


@pytest.mark.parametrize("folder", ["plain", "with some blanks", "umlaut ä (1)"])
@pytest.mark.parametrize("tell", [False, True])
def test_no_folder_of_the_site_leaves_in_an_error(tmp_path: Path, folder: str, tell: bool,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "hospital-z" / folder
    techniques = tmp_path / "elsewhere-z" / "techniques"
    techniques.mkdir(parents=True)
    said: list[str] = []
    plan = plan_of()

    def refused(policy: SitePolicy, plan: Plan | str) -> None:
        with pytest.raises(Exception, match=r"\w") as caught, begun(place, plan, policy, techniques=techniques):
            pass
        said.append(str(caught.value))

    mine = changed(plan, "privacy", {"make": "policy_lost:Mine", "with": {}})
    refused(SitePolicy(approved={"policy_lost": "0" * 64}, tell_errors=tell), mine)  # missing
    (techniques / "policy_lost.py").write_text("open(__file__ + '.none')\n")
    refused(SitePolicy(approved={"policy_lost": "0" * 64}, tell_errors=tell), mine)  # changed
    digest = hashlib.sha256((techniques / "policy_lost.py").read_bytes()).hexdigest()
    refused(SitePolicy(approved={"policy_lost": digest}, tell_errors=tell), mine)  # cannot be run
    refused(SitePolicy(installed=("policy_none",), tell_errors=tell), mine.replace("policy_lost", "policy_none"))
    (techniques / "policy_half.py").write_text(f"from {__name__} import nothing\n")
    digest = hashlib.sha256((techniques / "policy_half.py").read_bytes()).hexdigest()
    refused(SitePolicy(approved={"policy_half": digest}, tell_errors=tell), mine.replace("policy_lost", "policy_half"))
    policy = SitePolicy(tell_errors=tell)
    scan = place / "scans of z" / "patient 1.nii.gz"
    for kind in ("OSError", "SiteError", "PrivacyError", "PrivacyBudgetExhausted", "RunError", "DataError",
                 "FedlabError"):
        quoting = plan_of(privacy=Quotes(path=str(scan), kind=kind))
        with begun(place, quoting, policy) as host:
            answer = ask(host, quoting.run)
            said.append(answer.reason if isinstance(answer, Withdrawal) else str(answer.error))
    with begun(place, plan, policy) as host:
        assert isinstance(ask(host, plan.run, 0), Update) and isinstance(ask(host, plan.run, 1), Update)
        (place / "states" / plan.run / "from-000002.state").write_bytes(b"damaged")
        said.append(str(ask(host, plan.run, 2).error))
        (place / "ledger" / "answers.json").write_text("damaged")
        said.append(str(ask(host, plan.run, 1).error))
        (place / "ledger" / "answers.json").unlink()
        for state in (place / "states" / plan.run).glob("*.state"):
            state.unlink()
        said.append(str(ask(host, plan.run, 2).error))
    (place / "states" / plan.run / "sums.json").write_text("damaged")
    refused(policy, plan)
    private = plan_of(privacy=LocalGaussian(clip=1.0, noise_multiplier=2.0, delta=0.1))
    with begun(place, private, policy) as host:
        assert isinstance(ask(host, private.run), Update)
        ledger = LedgerFile(place / "ledger", "site-0")
        ledger.path.write_text("damaged")
        said.append(str(ask(host, private.run).error))
        ledger.path.unlink()
        said.append(str(ask(host, private.run).error))
    assert len(said) == 18
    for text in said:
        for part in ("/", "\\", "hospital-z", "elsewhere-z", "blanks", "umlaut", "scans of z", tmp_path.name):
            assert part not in text, text
    named = " ".join(said)
    for file in ("policy_lost.py", "from-000002.state", "answers.json", "sums.json", "site-0.ledger.json"):
        assert file in named
    assert ("patient 1.nii.gz" in said[6]) is tell  # as the policy says
    log = (place / "site.log").read_text(encoding="utf-8")
    assert str(scan) in log and "policy_lost.py.none" in log  # the site's staff read it all


@pytest.mark.parametrize(("text", "expected"), [
    ("file /srv/a/b.py cannot be read: '/mnt/My Scans/x y.nii'", "file b.py cannot be read: 'x y.nii'"),
    (r"C:\Users\Jane Doe\x.toml and \\server\share\z.nii and ~/secret/y.py", "x.toml and z.nii and y.py"),
    ("hospital-a/ledger/answers.json is damaged; see ./here/now.txt", "answers.json is damaged; see now.txt"),
    ("PosixPath('/a/b c/d')", "PosixPath('d')"), ("file:///home/jane/x.nii, path=/a/b/c", "x.nii, path=c"),
    ("δ is below 1/4, clip / √L, 3.5/4.0, and/or, float32/float64", "δ is below 1/4, clip / √L, 3.5/4.0, and/or, "
                                                                     "float32/float64"),
    ("fedlab.privacy:DPSGD(B, 3, X)", "fedlab.privacy:DPSGD(B, 3, X)"), ("<b>enough</b>", "<b>enough</b>"), ("", ""),
])
def test_paths_become_names_and_nothing_else_changes(text: str, expected: str) -> None:
    assert without_folders(text) == expected


def test_a_known_folder_is_left_out_whatever_its_name() -> None:
    place = Path("/srv/z: data, (1) of 2")
    assert without_folders(f"{place}/ledger/x.json and {place}, {place}/y", [place]) == (
        "x.json and z: data, (1) of 2, y")


# One ledger per site


TERMS = Terms(unit="site", delta=0.1, adjacency="any two updates of a site")


def test_a_budget_compares_the_largest_delta_of_a_plan() -> None:
    policy = SitePolicy(budgets={"site": Budget(epsilon=9.0, delta=0.1)})
    parts = [LocalGaussian(clip=1.0, noise_multiplier=8.0, delta=0.05), SVT_]
    for one, other in (parts, parts[::-1]):
        policy.check_plan(plan_of(), one + other, Aggregation(), site=SITE.name)
        with pytest.raises(PrivacyError, match=r"at δ of at most 0\.09, the plan has 0\.1"):
            replace(policy, budgets={"site": Budget(epsilon=9.0, delta=0.09)}).check_plan(
                plan_of(), one + other, Aggregation(), site=SITE.name)


def test_a_budget_is_not_compared_with_an_epsilon_at_a_larger_delta() -> None:
    ledger = Ledger.open(SiteState(), site=SITE.name, round=0, stream="a")
    ledger.charge(Gaussian(noise_multiplier=8.0), terms=TERMS)
    SitePolicy(budgets={"site": Budget(epsilon=9.0, delta=0.1)}).check_spent(ledger)
    with pytest.raises(PrivacyError, match="not charged per site for this round at such a δ"):
        SitePolicy(budgets={"site": Budget(epsilon=9.0, delta=0.09)}).check_spent(ledger)


def private_plan(**more: Any) -> Plan:
    return plan_of(privacy=LocalGaussian(clip=1.0, noise_multiplier=8.0, delta=0.1), **more)


def test_two_projects_with_other_networks_spend_one_ledger(tmp_path: Path) -> None:
    """A site's folder outlives servers; ε by hand: noise of 8 × clip is a multiplier of 4 for any two updates."""
    other = trainer(model=built(TinyNet, seed=4))
    plans = [(private_plan(), START), (private_plan(trainer=other, seed=5), other.initial())]
    for number, (plan, start) in enumerate(plans):
        with SiteHost(site=SITE, folder=tmp_path, policy=SitePolicy(installed=KNOWN)) as host:
            host.begin(plan.to_json(), pack_weights(start))
            for round in range(2):
                packed = host.train(plan.run, pack_state(ServerState(round=round, params=start)))
                assert isinstance(unpack_answer(packed, site="site-0"), Update)
            with pytest.raises(Exception, match="another process is using"):
                SiteHost(site=SITE, folder=tmp_path)  # of a second server, at the same time
        releases = [Gaussian(noise_multiplier=4.0)] * (2 * (number + 1))
        assert host.spent()[0].epsilon == epsilon_of(releases, delta=0.1)
    budget = SitePolicy(budgets={"site": Budget(epsilon=host.spent()[0].epsilon, delta=0.1)})
    third = private_plan(seed=6)
    with begun(tmp_path, third, budget) as host:
        assert isinstance(ask(host, third.run), Withdrawal)
    other_terms = plan_of(privacy=LocalGaussian(clip=1.0, noise_multiplier=8.0, delta=0.05))
    with begun(tmp_path, other_terms) as host:
        answer = ask(host, other_terms.run)
    assert isinstance(answer, Failure) and "cannot be added up" in str(answer.error)


def test_a_crash_at_any_write_leaves_a_ledger_that_says_at_least_what_was_sent(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlab.deploy import host as host_module
    from fedlab.deploy import snapshots as snapshots_module
    from fedlab.privacy.accounting import ledger_file as ledger_module

    class PowerLoss(BaseException):
        pass

    sent, crashes = 0, 0
    secure = plan_of(privacy=LocalGaussian(clip=1.0, noise_multiplier=8.0, delta=0.1, secure_mode=True))
    for moment in range(6):
        left = [moment]
        with begun(tmp_path, secure) as host:
            for module in (host_module, snapshots_module, ledger_module):
                write = module.write_whole

                def dies(path: Path, data: bytes, *, write: Any = write, left: list[int] = left) -> None:
                    left[0] -= 1
                    if left[0] < 0:
                        raise PowerLoss
                    write(path, data)

                monkeypatch.setattr(module, "write_whole", dies)
            try:
                sent += isinstance(ask(host, secure.run), Update)
            except PowerLoss:
                crashes += 1
            monkeypatch.undo()
        known = host.spent()
        least = epsilon_of([Gaussian(noise_multiplier=4.0)] * sent, delta=0.1) if sent else 0.0
        assert (known[0].epsilon if known else 0.0) >= least and counted(tmp_path) >= sent
    assert sent >= 2 and crashes >= 3


def test_of_several_parts_that_draw_patients_the_largest_draw_counts() -> None:
    """As of a technique of one's own beside DPSGD."""
    few, many = SimpleNamespace(batch=1.0), SimpleNamespace(sample_rate=0.75)
    for parts in ([few, many], [many, few]):
        Limits(max_batch=3).check_work(trainer(), parts, patients=4)
        with pytest.raises(PrivacyError, match=r"at most 2 patients per step, the plan has 3\.0"):
            Limits(max_batch=2).check_work(trainer(), parts, patients=4)


def test_rules_are_told_in_words() -> None:
    policy = SitePolicy(max_steps=4, max_batch=2.5, max_crops=3, max_passes=2, broadcast_clip=(0.5, 2.0), max_updates=7)
    lines = "\n".join(policy.lines())
    for words in ("at most 4 optimiser steps per round", "at most 2.5 patients per step", "at most 3 crops",
                  "at most 2 passes per round", "clipping norm lies between 0.5 and 2", "max_updates = 7"):
        assert words in lines
    assert list(Limits().limit_lines()) == [] and Aggregation().units == frozenset()
