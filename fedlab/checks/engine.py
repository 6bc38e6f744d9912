"""Does an engine do what a run relies on? The same as `Local`, to the bit, and the same where a site goes wrong."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fedlab.checks.check_report import CheckReport, Finding
from fedlab.checks.rehearsal import plain_descent
from fedlab.core.errors import FedlabError, PrivacyBudgetExhausted, PrivacyError, SiteError
from fedlab.core.kit import Kit
from fedlab.core.protocols import Elsewhere, Engine
from fedlab.core.seeds import derive, generator
from fedlab.core.types import Patient, Round, Site, SiteState, Tensors, Update
from fedlab.core.weights import weights_sha256
from fedlab.privacy.base import Privacy
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.personal_layers import PersonalLayers
from fedlab.privacy.secure_aggregation.aggregation import SecureAggregation
from fedlab.run.admission import Admission
from fedlab.run.federate import each_round, federate
from fedlab.run.local import Local
from fedlab.strategies.averaging import FedAvg
from fedlab.strategies.client_drift import SCAFFOLD
from fedlab.topologies.cyclic import ring
from fedlab.topologies.gossip import Gossip
from fedlab.training.trainer import SiteTrainer

__all__ = ["FailsAt", "Marks", "check_engine"]

_STEPS, _LR = 2, 0.1
_Factory = Callable[[], Engine | Elsewhere]


def check_engine(engine_factory: _Factory, *, trainer: SiteTrainer | None = None,
                 sites: Sequence[Site] | None = None, only: Collection[str] | None = None,
                 raise_: bool = True) -> CheckReport:
    """Puts an engine through small federated runs and compares each with the same run on `Local`.

    Checked are, by name:
        "engine": it has what the loop asks of one.
        "bits": plain averaging with the optimiser's moments kept at the sites.
        "noise": DP-SGD whose noise comes from the run's seed, and the privacy spent.
        "site states": SCAFFOLD's control variates, at the sites and at the server.
        "personal layers": each site keeps its own.
        "exchange": secure aggregation's messages between the sites.
        "workflows": a ring and a gossip, in which sites begin with weights of their own.
        "order": updates come in the order of the cohort, though the first site is slow.
        "failure": a site that fails in equip(), in training or in protect() is one failure, with its name and the
            stage, and the others go on.
        "failure ends the run": without rules of admission it is raised, with the user's own words.
        "withdrawal": a site whose budget is used up withdraws, and all of them end the run.
        "isolation": no site ever sees the state of another.
        "again": a second run with the same engine is bit-equal to the first, with kept moments.
        "resume": a run that is stopped and goes on with a new engine ends with the bits of the whole one.
        "untouched": patients, the trainer's first weights and what was handed on stay as they were.

    Args:
        engine_factory: makes an engine; called anew for each check. Engines with a close() are closed.
        trainer, sites: for engines that can't send whatever they are given; by default a tiny network and four sites
            of noise. The trainer's steps, optimiser and learning rate are replaced.
        only: names of the checks to make, for engines that take long to start; all by default.
        raise_: raise if a check fails; otherwise look at the report.

    Returns:
        The report, true if no check failed.

    Raises:
        ValueError: a check failed, and the message is the report; or there is no check of a name in `only`.
    """
    chosen = set(_CHECKS if only is None else only)
    if isinstance(only, str) or not chosen <= set(_CHECKS):
        raise ValueError(f"only holds some of {', '.join(map(repr, _CHECKS))}; got {only!r}")
    stage = _stage(trainer, sites)
    with _made(engine_factory) as engine:
        subject = repr(engine)
        needed = () if isinstance(engine, Elsewhere) else ("train", "exchange")
        missing = [name for name in needed if not hasattr(engine, name)]
    findings = [_finding("engine", f"{subject} has no {' and no '.join(missing)}" if missing else None,
                         f"has {', '.join(needed) or 'rounds'}", "see fedlab.core.Engine")]
    if not missing:
        findings += [_safely(check, engine_factory, stage) for check in _CHECKS if check in chosen]
    report = CheckReport(subject, findings)
    if raise_ and not report:
        raise ValueError(str(report))
    return report


class FailsAt(Privacy):
    """A technique that breaks at one site, or at all of them, in one round.

    Args:
        site: name of the site; None for all.
        stage: where; "withdraws" says that its budget is used up.
        round: in which, for sites that are asked in every round.
    """

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

    Args:
        slow: a site that takes its time.
        seconds: that it takes.
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


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """What is trained, and on whom: with AdamW, and with plain SGD."""

    trainer: SiteTrainer
    plain: SiteTrainer
    sites: Sequence[Site]

    def seen(self) -> dict[str, str]:
        """A hash of all that no engine may change."""
        patients = {f"{site.name}|{split}|{k}|{what}": tensor for site in self.sites
                    for split, patients in (("train", site.train), ("val", site.val))
                    for k, patient in enumerate(patients)
                    for what, tensor in (("image", patient.image), ("label", patient.label)) if tensor is not None}
        return {"patients": weights_sha256(patients), "first weights": weights_sha256(self.trainer.initial())}


@dataclass(kw_only=True)
class _Outcome:
    """The outcome of a run."""

    rounds: list[Round] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    error: FedlabError | None = None
    states: Mapping[str, SiteState] = field(default_factory=dict)
    loose: frozenset[str] = frozenset()  # numbers that differ between two runs that are the same


def _stage(trainer: SiteTrainer | None, sites: Sequence[Site] | None) -> _Stage:
    if sites is None:
        sites = [Site(f"site-{k}", [_patient(k, number) for number in range(1 + k % 3)], [_patient(k, 9)])
                 for k in range(4)]
    if trainer is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = nn.Sequential(nn.Conv3d(4, 2, 1), nn.GroupNorm(1, 2), nn.ReLU(), nn.Conv3d(2, 3, 1))
        trainer = SiteTrainer(model=network, steps=_STEPS, batch_size=1, crop=(8, 8, 8), augment=None,
                              precision="fp32", device="cpu")
    return _Stage(trainer=replace(trainer, steps=_STEPS, epochs=None, lr=1e-2), sites=sites,
                  plain=replace(trainer, steps=_STEPS, epochs=None, lr=_LR, optimiser=plain_descent))


def _patient(site: int, number: int) -> Patient:
    label = torch.zeros(8, 8, 8, dtype=torch.uint8)
    label[1:6, 1:6, 1:6], label[2:5, 2:5, 2:5], label[3, 3, 3] = 2, 1, 4
    image = torch.randn(4, 8, 8, 8, generator=generator(site, "patient", number)) + label.float()
    return Patient(f"s{site}p{number}", image, label, torch.eye(4).numpy())


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
    out = _Outcome(loose=frozenset({"seconds", "norm"} if "aggregation" in settings else {"seconds"}))
    try:
        for finished in each_round(stage.plain if plain else stage.trainer, stage.sites, engine=engine, rounds=rounds,
                                   **settings):
            out.rounds.append(finished)
            out.hashes.append(_hash(finished))
            out.states = dict(finished.site_states)
    except FedlabError as error:
        out.error = error
    return out


def _both(factory: _Factory, stage: _Stage, **settings: Any) -> tuple[_Outcome, _Outcome]:
    """The run on the engine, and on `Local`."""
    with _made(factory) as engine:
        return _run(engine, stage, **settings), _run(Local(), stage, **settings)


def _hash(finished: Round) -> str:
    """Of all tensors of the server's state."""
    state = finished.state
    groups: dict[str, Tensors] = {"params": state.params, **{f"moments {k}": v for k, v in state.moments.items()},
                                  **{f"kept {k}": v for k, v in state.namespaces.items()},
                                  "broadcast": state.broadcast,
                                  **{f"model {k}": v for k, v in state.models.items()}}
    return weights_sha256({f"{group}|{name}": t for group, slots in groups.items() for name, t in slots.items()})


def _unlike(ours: _Outcome, local: _Outcome) -> str | None:
    """Where a run differs from the one on `Local`, or None."""
    if ours.error is not None and local.error is None:
        return f"the run ended with {type(ours.error).__name__}: {ours.error}"
    if len(ours.rounds) != len(local.rounds):
        return f"{len(ours.rounds)} rounds were finished, {len(local.rounds)} on Local"
    for mine, other in zip(ours.rounds, local.rounds, strict=True):
        where = f"in round {other.number} "
        if set(mine.sites) != set(other.sites) or set(mine.absent) != set(other.absent):
            return where + (f"updates of {sorted(mine.sites)} were received, absent were {dict(mine.absent)}, on Local "
                            f"{sorted(other.sites)} and {dict(other.absent)}")
        for site, numbers in other.sites.items():
            told = {name for name in {**numbers, **mine.sites[site]} if name not in local.loose and not _same(
                numbers.get(name), mine.sites[site].get(name))}
            if told:
                return where + f"{site} tells another {', '.join(sorted(told))}"
        if mine.spent != other.spent:
            return where + f"{mine.spent} was spent, on Local {other.spent}"
    if ours.hashes != local.hashes:
        number = next(k for k, pair in enumerate(zip(ours.hashes, local.hashes, strict=True)) if pair[0] != pair[1])
        return f"after round {number} the model has other bits than on Local"
    return None


def _same(one: float | None, other: float | None) -> bool:
    return one == other or (one is not None and other is not None and math.isnan(one) and math.isnan(other))


def _unlike_states(ours: _Outcome, local: _Outcome) -> str | None:
    """Where the state of a site differs from that on `Local`, or None; states elsewhere are not asked for."""
    if not ours.states:
        return None
    for site, state in local.states.items():
        mine = ours.states.get(site, SiteState())
        if (state.enrolled, state.updates) != (mine.enrolled, mine.updates):
            return f"{site} has sent {mine.updates} updates, on Local {state.updates}"
        if odd := sorted(state.namespaces.keys() ^ mine.namespaces.keys()):
            return f"{site} keeps {', '.join(odd)} on one of the two only"
        for owner, slots in state.namespaces.items():
            if weights_sha256(slots) != weights_sha256(mine.namespaces[owner]):
                return f"{site} keeps other tensors for {owner!r} than on Local"
    return None


def _finding(check: str, wrong: str | None, right: str, remedy: str) -> Finding:
    return Finding(check=check, outcome="failed" if wrong else "passed", what=wrong or right,
                   remedy=remedy if wrong else "")


_Check = Callable[[_Factory, _Stage], Finding]


def _safely(check: str, factory: _Factory, stage: _Stage) -> Finding:
    try:
        return _CHECKS[check](factory, stage)
    except Exception as error:  # of the author's engine, whatever it raises
        return Finding(check=check, outcome="failed", what=f"{type(error).__name__}: {error}",
                       remedy="see the message; what goes wrong at a site is a Failure or a Withdrawal from train()")


def _settings(check: str, stage: _Stage) -> list[dict[str, Any]]:
    """Of the runs of a check in which nothing goes wrong."""
    import networkx as nx

    count = len(stage.sites)
    match check:
        case "noise":
            return [dict(privacy=DPSGD(clip=1.0, noise_multiplier=1.0, delta=1e-3, sample_rate=0.5))]
        case "site states":
            return [dict(strategy=SCAFFOLD(), plain=True, rounds=3)]
        case "personal layers":
            return [dict(privacy=PersonalLayers(names=[next(iter(stage.trainer.initial()))]))]
        case "exchange":
            return [dict(strategy=FedAvg(weights="uniform"),
                         aggregation=SecureAggregation(clip=1.0, threshold=count))]
        case "workflows":
            return [dict(topology=ring), dict(topology=Gossip(graph=nx.cycle_graph(count)))]
    return [{}]


def _equal(check: str, remedy: str, factory: _Factory, stage: _Stage) -> Finding:
    wrong = None
    for settings in _settings(check, stage):
        ours, local = _both(factory, stage, **settings)
        wrong = wrong or _unlike(ours, local) or _unlike_states(ours, local)
    return _finding(check, wrong, "the same bits as on Local", remedy)


def _order(factory: _Factory, stage: _Stage) -> Finding:
    names = [site.name for site in stage.sites]
    with _made(factory) as engine:
        out = _run(engine, stage, privacy=Marks(slow=names[0], seconds=0.3))
    wrong = str(out.error) if out.error else None
    for finished in out.rounds:
        if list(finished.sites) != names:
            wrong = wrong or f"updates came as {list(finished.sites)}, the cohort was {names}"
    return _finding("order", wrong, "updates come in the order of the cohort", "sums depend on the order: hold updates "
                    "back until it is their turn")


def _isolation(factory: _Factory, stage: _Stage) -> Finding:
    with _made(factory) as engine:
        out = _run(engine, stage, privacy=Marks())
    wrong = str(out.error) if out.error else None
    marks = {site: state.of("privacy").own for site, state in out.states.items() if "privacy" in state.namespaces}
    odd = [site for site, mark in marks.items()
           if (int(mark["name"]), int(mark["rounds"])) != (derive(0, site), len(out.rounds))]
    if wrong is None and odd:
        wrong = f"the state of {', '.join(odd)} is not what the site left there"
    return _finding("isolation", wrong, "each site sees its own state",
                    "take the state from states.working(site.name), and hand it to no other site")


def _failure(factory: _Factory, stage: _Stage) -> Finding:
    name, wrong = stage.sites[1].name, None
    for where in ("equip", "fit", "protect"):
        ours, local = _both(factory, stage, rounds=3, admission=Admission(min_sites=1),
                            privacy=FailsAt(site=name, stage=where))
        said = ours.rounds[1].absent.get(name, "") if len(ours.rounds) > 1 else ""
        if ours.error is None and not (repr(name) in said and repr(where) in said):
            wrong = wrong or f"when {name} failed at stage {where!r} in round 1, what was said is {said!r}"
        wrong = wrong or _unlike(ours, local) or _unlike_states(ours, local)
    return _finding("failure", wrong, "a site that fails is one Failure with its name and the stage",
                    "yield Failure(site.name, error) with the FedlabError that the task raised, inside "
                    "states.working(site.name), and go on with the next site")


def _failure_ends_the_run(factory: _Factory, stage: _Stage) -> Finding:
    name = stage.sites[1].name
    with _made(factory) as engine:
        error = _run(engine, stage, privacy=FailsAt(site=name, stage="fit")).error
        again = _run(engine, stage, rounds=1)  # it is of use afterwards
    wrong = None
    if not isinstance(error, SiteError) or (error.site, error.round, error.stage) != (name, 1, "fit"):
        wrong = f"when {name} failed at stage 'fit' in round 1, {error!r} was raised"
    elif "on purpose, in fit" not in str(error):
        wrong = f"what the user's own code raised is not to be seen in {error}"
    elif len(again.rounds) != 1:
        wrong = f"another run with the same engine ended with {again.error!r}"
    return _finding("failure ends the run", wrong, "it is raised, with the words of what went wrong",
                    "hand SiteError on as it is; it survives pickling")


def _withdrawal(factory: _Factory, stage: _Stage) -> Finding:
    name = stage.sites[-1].name
    ours, local = _both(factory, stage, rounds=3, privacy=FailsAt(site=name, stage="withdraws"))
    wrong = _unlike(ours, local)
    if wrong is None and "budget of this check" not in ours.rounds[1].absent.get(name, ""):
        wrong = f"the reason is lost: {ours.rounds[1].absent}"
    with _made(factory) as engine:
        everybody = _run(engine, stage, privacy=FailsAt(site=None, stage="withdraws"))
    if not isinstance(everybody.error, PrivacyBudgetExhausted):
        wrong = wrong or f"when all sites withdrew, {everybody.error!r} was raised"
    return _finding("withdrawal", wrong, "a site withdraws with its reason, and the others go on",
                    "yield Withdrawal(site.name, reason) where the task raises PrivacyBudgetExhausted")


def _again(factory: _Factory, stage: _Stage) -> Finding:
    wrong = None
    with _made(factory) as engine:
        for number in (1, 2):
            for seed, technique in enumerate((None, Marks())):
                ours, theirs = (_run(used, stage, seed=seed, privacy=technique) for used in (engine, Local()))
                unlike = _unlike(ours, theirs) or _unlike_states(ours, theirs)
                wrong = wrong or (f"run {number}: {unlike}" if unlike else None)
    return _finding("again", wrong, "a second run is bit-equal to the first",
                    "keep nothing of a run: no task, state, weights or site states of the run before")


def _resume(factory: _Factory, stage: _Stage) -> Finding:
    settings: dict[str, Any] = dict(strategy=SCAFFOLD(), progress=False, privacy=Marks())
    whole = federate(stage.plain, stage.sites, rounds=3, **settings).state
    with tempfile.TemporaryDirectory() as folder:
        for rounds in (1, 3):
            with _made(factory) as engine:
                resumed = federate(stage.plain, stage.sites, rounds=rounds, engine=engine,
                                   checkpoint=Path(folder) / "run", **settings).state
    same = whole is not None and resumed is not None and weights_sha256(whole.params) == weights_sha256(resumed.params)
    return _finding("resume", None if same else "a run that went on with a new engine ends with other bits",
                    "a run goes on with a new engine", "what sites keep lies in the states that train() is "
                    "given, and nowhere else")


def _untouched(factory: _Factory, stage: _Stage) -> Finding:
    before = stage.seen()
    with _made(factory) as engine:
        out = _run(engine, stage, rounds=3)
    changed = [what for what, value in stage.seen().items() if before[what] != value]
    if [_hash(finished) for finished in out.rounds] != out.hashes:
        changed.append("the state of a finished round")
    return _finding("untouched", f"{' and '.join(changed)} changed" if changed else None,
                    "nothing is changed in place", "copy what a site changes before it does")


_CHECKS: dict[str, _Check] = {
    **{check: partial(_equal, check, remedy) for check, remedy in {
        "bits": "run task(site, state, site_state) with this site's own state and as many torch threads as Local has, "
                "and send what it returns as it is",
        "noise": "hand on the task's seed, and the ledger with the rest of the site's state",
        "site states": "hand on state.moments, and keep what the task leaves in the site's state for its next round",
        "personal layers": "keep what the task leaves in the site's state for its next round",
        "exchange": "exchange() asks task.aggregation.answer(step, site, inbox, states.with_secrets(site)), and "
                    "train() goes on with those secrets",
        "workflows": "a site starts from state.at(site.name)",
    }.items()},
    "order": _order, "isolation": _isolation, "failure": _failure, "failure ends the run": _failure_ends_the_run,
    "withdrawal": _withdrawal, "again": _again, "resume": _resume, "untouched": _untouched,
}
