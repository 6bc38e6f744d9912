"""Does an engine keep what a run relies on? The same as `Local`, bit by bit, also where a site fails."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from fedlab.checks.check_report import Battery, CheckReport, Finding
from fedlab.checks.small_runs import noise_site, plain_descent, small_trainer
from fedlab.core.errors import FedlabError, PrivacyBudgetExhausted, PrivacyError, SiteError
from fedlab.core.kit import Kit
from fedlab.core.protocols import Elsewhere, Engine
from fedlab.core.seeds import derive
from fedlab.core.types import Round, Site, SiteState, Update
from fedlab.core.weights import weights_sha256
from fedlab.privacy.base import Privacy
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.personal_layers import PersonalLayers
from fedlab.privacy.secure_aggregation.secure_sum import SecureAggregation
from fedlab.run.admission import Admission
from fedlab.run.federate import each_round, federate
from fedlab.run.local import Local
from fedlab.run.recipe import Json, differences, patients_sha256, recipe_sha256
from fedlab.strategies.averaging import FedAvg
from fedlab.strategies.client_drift import SCAFFOLD
from fedlab.topologies.cyclic import ring
from fedlab.topologies.gossip import Gossip
from fedlab.training.defaults import adamw
from fedlab.training.trainer import SiteTrainer

__all__ = ["FailsAt", "Marks", "check_engine"]

_ENGINE = Battery("engine")
_Factory = Callable[[], Engine | Elsewhere]


def check_engine(engine_factory: _Factory, *, trainer: SiteTrainer | None = None,
                 sites: Sequence[Site] | None = None, only: Collection[str] | None = None,
                 raise_: bool = True) -> CheckReport:
    """Puts an engine through small federated runs and compares each with the same run on `Local`.

    The checks, by name:
        "engine": it has the methods of one.
        "bits": plain averaging with the optimiser's moments kept at the sites.
        "noise": DP-SGD whose noise comes from the run's seed, and the privacy spent.
        "site states": SCAFFOLD's control variates, at the sites and at the server.
        "personal layers": each site keeps its own.
        "exchange": secure aggregation's messages between the sites.
        "workflows": a ring and a gossip, in which sites begin with weights of their own.
        "order": updates come in the order of the cohort, although the first site is slow.
        "isolation": no site ever sees the state of another.
        "failure": a site that fails in equip(), in training or in protect() is one failure, with its name and the
            stage, and the others go on.
        "failure ends the run": without rules of admission it is raised, with the text of the user's own error.
        "withdrawal": a site whose budget is used up withdraws; if all do, the run ends.
        "again": a second run on the same engine is bit-equal to the first and to one on a new `Local`, with kept
            moments, with a technique's states and with SCAFFOLD's.
        "resume": a run that is stopped and goes on with a new engine ends with the bits of the whole one.
        "untouched": patients, the trainer's first weights and finished rounds stay as they were.

    Args:
        engine_factory: makes an engine, or returns one that was made before; called for each check. Engines with a
            close() are closed after it.
        trainer, sites: for engines that cannot send any trainer and site; by default a tiny network and four sites of
            noise. The trainer's steps, optimiser, momentum and learning rate are replaced.
        only: names of the checks to make, for engines that start slowly; all by default.
        raise_: raise if a check fails; otherwise read the report.

    Returns:
        The report, true if no check failed. A check that the given trainer or sites do not allow on any engine, such as
        noise on a network with batch norm, is not tried, which is a warning.

    Raises:
        ValueError: a check failed, and the message is the report; or `only` holds an unknown name.
    """
    stage = _stage(trainer, sites)
    checks: dict[str, _Check] = {name: partial(_unequal, runs) for name, runs in _compared(stage).items()} | _CHECKS
    chosen = set(checks if only is None else only)
    if isinstance(only, str) or not chosen <= set(checks):
        raise ValueError(f"only holds some of {', '.join(map(repr, checks))}; got {only!r}")
    with _made(engine_factory) as engine:
        subject = repr(engine)
        needed = () if isinstance(engine, Elsewhere) else ("train", "exchange")
        missing = [name for name in needed if not hasattr(engine, name)]
    findings = [_ENGINE.verdict("engine", f"{subject} has no {' and no '.join(missing)}" if missing else None,
                                methods=", ".join(needed) or "rounds")]
    for name, check in checks.items():
        if name in chosen and not missing:
            try:
                findings.append(_ENGINE.verdict(name, check(engine_factory, stage)))
            except _Unfit as error:
                findings.append(Finding(check=name, outcome="warned", what=f"not tried: {error}",
                                        remedy="give check_engine() a trainer and sites that these parts take"))
            except Exception as error:  # the author's engine may raise anything
                findings.append(Finding(check=name, outcome="failed", what=f"{type(error).__name__}: {error}",
                                        remedy="see the message; an error at a site is a Failure or a Withdrawal from "
                                               "train()"))
    report = CheckReport(subject, findings)
    if raise_ and not report:
        raise ValueError(str(report))
    return report


class FailsAt(Privacy):
    """A technique that fails at one site, or at all (None), in one round; "withdraws" means a used-up budget."""

    def __init__(self, *, site: str | None, stage: Literal["equip", "fit", "protect", "withdraws"],
                 round: int = 1) -> None:
        self.site, self.stage, self.round = site, stage, round

    def equip(self, kit: Kit, site: Site, state: SiteState) -> Kit:
        if self._here(site.name, state):
            if self.stage == "withdraws":
                raise PrivacyBudgetExhausted("the budget of this check is used up")
            if self.stage == "equip":
                raise RuntimeError("on purpose, in equip")
            if self.stage == "fit":
                return replace(kit, backward=_breaks)
        return kit

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        if self.stage == "protect" and self._here(update.site, state):
            raise RuntimeError("on purpose, in protect")
        return update

    def _here(self, site: str, state: SiteState) -> bool:
        return self.site in (None, site) and state.round == self.round


def _breaks(kit: Kit, image: torch.Tensor, target: torch.Tensor) -> float:
    raise RuntimeError("on purpose, in fit")


class Marks(Privacy):
    """A technique that writes its site's name into the site's state and refuses any other name there.

    The site `slow` sleeps for some `seconds` before it trains.
    """

    def __init__(self, *, slow: str | None = None, seconds: float = 0.0) -> None:
        self.slow, self.seconds = slow, seconds

    def equip(self, kit: Kit, site: Site, state: SiteState) -> Kit:
        if site.name == self.slow:
            time.sleep(self.seconds)
        return kit

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        name = torch.tensor(derive(0, update.site))
        if state.own.setdefault("name", name) != name:
            raise PrivacyError("the state of another site")
        state.own["rounds"] = state.own.get("rounds", torch.zeros((), dtype=torch.int64)) + 1
        return update


class _Unfit(Exception):
    """The given trainer and sites are refused before the runs of a check, on any engine."""


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """A trainer with AdamW and kept moments, one with plain SGD, and the sites."""

    trainer: SiteTrainer
    plain: SiteTrainer
    sites: Sequence[Site]

    def content(self) -> dict[str, str]:
        """Hashes of everything that no engine may change."""
        patients = [patients_sha256(part) for site in self.sites for part in (site.train, site.val)]
        return {"patients": recipe_sha256(patients), "first weights": weights_sha256(self.trainer.initial())}


@dataclass(kw_only=True)
class _Outcome:
    """The outcome of a run: its rounds, a hash of the server's state after each, what ended it, the sites' states."""

    rounds: list[Round] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    error: FedlabError | None = None
    states: Mapping[str, SiteState] = field(default_factory=dict)
    random: frozenset[str] = frozenset()  # numbers that differ between two equal runs

    def record(self, *, states: bool) -> Json:
        """What two equal runs have in common, with or without the states of the sites."""
        return {
            "error": type(self.error).__name__ if self.error else None,
            "round": {str(r.number): {
                "absent": ", ".join(sorted(r.absent)), "spent": {site: repr(spent) for site, spent in r.spent.items()},
                "weights": digest, "sites": {site: {name: repr(value) for name, value in numbers.items()
                                                    if name not in self.random} for site, numbers in r.sites.items()}}
                for r, digest in zip(self.rounds, self.hashes, strict=True)},
            "state": {site: {"enrolled": state.enrolled, "updates": state.updates,
                             **{owner: weights_sha256(slots) for owner, slots in state.namespaces.items()}}
                      for site, state in self.states.items() if states}}


def _stage(trainer: SiteTrainer | None, sites: Sequence[Site] | None) -> _Stage:
    trainer = small_trainer(steps=2) if trainer is None else trainer
    changed = partial(replace, trainer, steps=2, epochs=None, momentum="keep")
    return _Stage(trainer=changed(lr=1e-2, optimiser=adamw), plain=changed(lr=0.1, optimiser=plain_descent),
                  sites=[noise_site(k, 1 + k % 3, held_out=1) for k in range(4)] if sites is None else sites)


@contextmanager
def _made(factory: _Factory) -> Iterator[Engine | Elsewhere]:
    engine = factory()
    try:
        yield engine
    finally:
        getattr(engine, "close", lambda: None)()


def _run(engine: Engine | Elsewhere, stage: _Stage, *, plain: bool = False, rounds: int = 2,
         **settings: Any) -> _Outcome:
    # A masked update is random.
    out = _Outcome(random=frozenset({"seconds", "norm"} if "aggregation" in settings else {"seconds"}))
    try:
        for finished in each_round(stage.plain if plain else stage.trainer, stage.sites, engine=engine, rounds=rounds,
                                   **settings):
            out.rounds.append(finished)
            out.hashes.append(recipe_sha256(finished.state))
            out.states = dict(finished.site_states)
    except FedlabError as error:
        out.error = error
    return out


def _both(factory: _Factory, stage: _Stage, **settings: Any) -> tuple[_Outcome, _Outcome]:
    """The run on the engine, and on `Local`."""
    with _made(factory) as engine:
        return _run(engine, stage, **settings), _run(Local(), stage, **settings)


def _unlike(ours: _Outcome, theirs: _Outcome, where: str = "on Local") -> str | None:
    """The first difference of a run from another one, `where` that one was, or None."""
    known = bool(ours.states)  # those of sites elsewhere are not compared
    different = differences(theirs.record(states=known), ours.record(states=known))
    if ours.error is not None and theirs.error is None:
        return f"the run ended with {type(ours.error).__name__}: {ours.error}"
    return f"{different[0]}; there means {where}" if different else None


def _compared(stage: _Stage) -> dict[str, list[dict[str, Any]]]:
    """The settings of runs without any failure that are compared with `Local`, by check."""
    import networkx as nx

    count, first = len(stage.sites), next(iter(stage.trainer.initial()))
    return {
        "bits": [{}],
        "noise": [dict(privacy=DPSGD(clip=1.0, noise_multiplier=1.0, delta=1e-3, sample_rate=0.5))],
        "site states": [dict(strategy=SCAFFOLD(), plain=True, rounds=3)],
        "personal layers": [dict(privacy=PersonalLayers(names=[first]))],
        "exchange": [dict(strategy=FedAvg(weights="uniform"),
                          aggregation=SecureAggregation(clip=1.0, threshold=count))],
        "workflows": [dict(topology=ring), dict(topology=Gossip(graph=nx.cycle_graph(count)))],
    }


def _unequal(runs: Sequence[Mapping[str, Any]], factory: _Factory, stage: _Stage) -> str | None:
    for settings in runs:
        try:
            theirs = _run(Local(), stage, **settings)
        except ValueError as error:
            raise _Unfit(str(error)) from error
        with _made(factory) as engine:
            ours = _run(engine, stage, **settings)
        if (wrong := _unlike(ours, theirs)) is not None:
            return wrong
    return None


def _order(factory: _Factory, stage: _Stage) -> str | None:
    names = [site.name for site in stage.sites]
    with _made(factory) as engine:
        out = _run(engine, stage, privacy=Marks(slow=names[0], seconds=0.3))
    if out.error:
        return str(out.error)
    return next((f"updates came in the order {list(finished.sites)}, the cohort was {names}"
                 for finished in out.rounds if list(finished.sites) != names), None)


def _isolation(factory: _Factory, stage: _Stage) -> str | None:
    with _made(factory) as engine:
        out = _run(engine, stage, privacy=Marks())
    if out.error:
        return str(out.error)
    marks = {site: state.of("privacy").own for site, state in out.states.items() if "privacy" in state.namespaces}
    changed = [site for site, mark in marks.items()
               if (int(mark["name"]), int(mark["rounds"])) != (derive(0, site), len(out.rounds))]
    return f"the state of {', '.join(changed)} is not as the site left it" if changed else None


def _failure(factory: _Factory, stage: _Stage) -> str | None:
    name = stage.sites[1].name
    for where in ("equip", "fit", "protect"):
        ours, local = _both(factory, stage, rounds=3, admission=Admission(min_sites=1),
                            privacy=FailsAt(site=name, stage=where))
        reason = ours.rounds[1].absent.get(name, "") if len(ours.rounds) > 1 else ""
        if ours.error is None and not (repr(name) in reason and repr(where) in reason):
            return f"when {name} failed at stage {where!r} in round 1, the reason given is {reason!r}"
        if (wrong := _unlike(ours, local)) is not None:
            return wrong
    return None


def _failure_ends_the_run(factory: _Factory, stage: _Stage) -> str | None:
    name = stage.sites[1].name
    with _made(factory) as engine:
        error = _run(engine, stage, privacy=FailsAt(site=name, stage="fit")).error
        again = _run(engine, stage, rounds=1)  # the engine works afterwards
    if not isinstance(error, SiteError) or (error.site, error.round, error.stage) != (name, 1, "fit"):
        return f"when {name} failed at stage 'fit' in round 1, {error!r} was raised"
    if "on purpose, in fit" not in str(error):
        return f"the text of the user's own error is missing in {error}"
    return f"another run with the same engine ended with {again.error!r}" if len(again.rounds) != 1 else None


def _withdrawal(factory: _Factory, stage: _Stage) -> str | None:
    name = stage.sites[-1].name
    ours, local = _both(factory, stage, rounds=3, privacy=FailsAt(site=name, stage="withdraws"))
    wrong = _unlike(ours, local)
    if wrong is None and "budget of this check" not in ours.rounds[1].absent.get(name, ""):
        wrong = f"the reason is lost: {ours.rounds[1].absent}"
    with _made(factory) as engine:
        error = _run(engine, stage, privacy=FailsAt(site=None, stage="withdraws")).error
    if not isinstance(error, PrivacyBudgetExhausted):
        wrong = wrong or f"when all sites withdrew, {error!r} was raised"
    return wrong


def _again(factory: _Factory, stage: _Stage) -> str | None:
    kinds: list[dict[str, Any]] = [{}, dict(seed=1, privacy=Marks()), dict(seed=2, strategy=SCAFFOLD(), plain=True)]
    with _made(factory) as engine:
        first, second = ([_run(engine, stage, **kind) for kind in kinds] for _ in range(2))
    wrong = None
    for kind, one, other in zip(kinds, first, second, strict=True):
        wrong = (wrong or _unlike(other, one, "in the first run on this engine")
                 or _unlike(one, _run(Local(), stage, **kind), "on a new Local"))
    return wrong


def _resume(factory: _Factory, stage: _Stage) -> str | None:
    settings: dict[str, Any] = dict(strategy=SCAFFOLD(), progress=False, privacy=Marks())
    whole = federate(stage.plain, stage.sites, rounds=3, **settings).state
    with tempfile.TemporaryDirectory() as folder:
        for rounds in (1, 3):
            with _made(factory) as engine:
                resumed = federate(stage.plain, stage.sites, rounds=rounds, engine=engine,
                                   checkpoint=Path(folder) / "run", **settings).state
    same = whole is not None and resumed is not None and weights_sha256(whole.params) == weights_sha256(resumed.params)
    return None if same else "a run that went on with a new engine ends with other bits"


def _untouched(factory: _Factory, stage: _Stage) -> str | None:
    before = stage.content()
    with _made(factory) as engine:
        out = _run(engine, stage, rounds=3)
    changed = [what for what, value in stage.content().items() if before[what] != value]
    if [recipe_sha256(finished.state) for finished in out.rounds] != out.hashes:
        changed.append("the state of a finished round")
    return f"{' and '.join(changed)} changed" if changed else None


#: What is wrong with an engine, or None.
_Check = Callable[[_Factory, _Stage], str | None]
_CHECKS: dict[str, _Check] = {
    "order": _order, "isolation": _isolation, "failure": _failure, "failure ends the run": _failure_ends_the_run,
    "withdrawal": _withdrawal, "again": _again, "resume": _resume, "untouched": _untouched,
}
