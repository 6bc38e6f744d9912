"""Does a strategy keep what a server and a resumed run rely on? Checks for authors of strategies."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fedlab.checks.check_report import Battery, CheckReport, Finding
from fedlab.checks.small_runs import lost_settings, noise_site, other_random_numbers, small_trainer
from fedlab.core.errors import FedlabError
from fedlab.core.global_generators import seeded
from fedlab.core.protocols import Strategy
from fedlab.core.seeds import generator
from fedlab.core.types import ServerState, Site, SiteState, Tensors, Update
from fedlab.run.federate import federate, make_run
from fedlab.run.recipe import recipe_sha256
from fedlab.strategies.averaging import TooFewUpdates
from fedlab.training.trainer import SiteTrainer

__all__ = ["check_strategy"]

_STRATEGY = Battery("strategy")
#: Sums in float64 differ by less than this, whatever their order.
_ROUNDING = 1e-9


def check_strategy(strategy: Strategy, *, trainer: SiteTrainer | None = None, sites: Sequence[Site] | None = None,
                   raise_: bool = True) -> CheckReport:
    """Puts a strategy through made-up rounds and a small federated run, and observes it.

    The checks, by name:
        "settings": they are attributes, so that runs with other settings can be told apart.
        "select": a cohort is some of the sites, the same for the same random stream.
        "shapes and dtypes": the mean has the updates' tensors; the step keeps names, order, shapes and dtypes of the
            model and counts the round.
        "purity": updates, state and strategy stay as they were.
        "determinism": the same input gives the same bits, whatever else drew random numbers before.
        "order": updates may arrive in any order.
        "one update": one update alone, and several equal ones, give that update or a shorter one.
        "weights": they count, or the strategy says weights="uniform" and they do not.
        "uniform mean": a strategy that says so is one, which noise at the server and secure aggregation rely on.
        "precision": sums are in float64.
        "not finite": NaN and infinite values never pass.
        "no update": is a clear error.
        "fits the run": three rounds of a small run end.
        "state": sites keep tensors by name, in the strategy's own namespace.
        "resume": a run stopped after two rounds ends with the bits of the whole one.

    The checks find mistakes; they prove nothing. Whether the strategy is the one of its paper is shown only by a
    comparison with the formula written out.

    Args:
        strategy: used as it is; it must come out unchanged.
        trainer, sites: that it is for; by default a tiny network trained with plain SGD at seven sites of noise, or
            with the strategy's own `sites`, `steps` and `lr`.
        raise_: raise if a check fails; otherwise read the report.

    Returns:
        The report, true if no check failed.

    Raises:
        ValueError: a check failed, and the message is the report; or `strategy` is not a strategy.
    """
    missing = [name for name in ("begin", "select", "equip", "combine", "step", "remember", "bind", "sample")
               if not hasattr(strategy, name)]
    if missing or isinstance(strategy, type):
        raise ValueError(f"a strategy is an object with {', '.join(missing) or 'settings'}, got {strategy!r}; inherit "
                         "from FedAvg, override what differs, and make one with brackets behind its name")
    with seeded():
        report = CheckReport(repr(strategy), list(_findings(_stage(strategy, trainer, sites))))
    if raise_ and not report:
        raise ValueError(str(report))
    return report


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """A strategy, and the trainer and sites that it is tried with."""

    strategy: Strategy
    trainer: SiteTrainer
    sites: Sequence[Site]

    def updates(self, seed: int = 0) -> list[Update]:
        """One of every site, with other values, weights and steps each; the third is long."""
        rng = generator(seed, "check strategy")
        return [Update(site=site.name, weight=1.0 + 2 * k, steps=1 + k, metrics={"loss": 0.5 + k}, round=0, delta={
            name: torch.randn(p.shape, generator=rng) * (30.0 if k == 2 else 1.0) + 0.5
            for name, p in self.trainer.initial().items()}) for k, site in enumerate(self.sites)]

    def mean(self, updates: Iterable[Update]) -> Update:
        """The combination of updates that can be read once."""
        return self.strategy.combine(iter(updates))

    def begun(self) -> ServerState:
        """The state before the first round, in tensors of its own."""
        return self.strategy.begin(_copied(self.trainer.initial()))


def _stage(strategy: Strategy, trainer: SiteTrainer | None, sites: Sequence[Site] | None) -> _Stage:
    if sites is None:
        count = getattr(strategy, "sites", None) or max(7, int(getattr(strategy, "needed", 0)))
        sites = [noise_site(k, 1 + k % 2) for k in range(count)]
    steps, lr = getattr(strategy, "steps", None) or 2, getattr(strategy, "lr", None) or 0.1
    return _Stage(strategy=strategy, trainer=trainer or small_trainer(steps=steps, lr=lr), sites=sites)


def _findings(stage: _Stage) -> Iterator[Finding]:
    yield _settings(stage.strategy)
    before = {name: recipe_sha256(value) for name, value in vars(stage.strategy).items()}
    try:
        bound = replace(stage, strategy=make_run(stage.trainer, stage.sites, strategy=stage.strategy).strategy)
        yield from _round(bound)
        for name, check in _CHECKS.items():
            yield _STRATEGY.verdict(name, check(bound))
        yield from (_weights(bound), _uniform(bound))
    except Exception as error:  # the author's code may raise anything
        yield Finding(check="fits the run", outcome="failed", what=f"{type(error).__name__}: {error}",
                      remedy="combine() takes an iterable of updates that can be read once and returns an Update; "
                             "step() takes the state and that update, and returns a state")
    else:
        yield from _run(stage)
    changed = sorted(name for name, value in vars(stage.strategy).items() if before.get(name) != recipe_sha256(value))
    if changed:
        yield Finding(check="purity", outcome="failed", what=f"a round changes the strategy's {', '.join(changed)}",
                      remedy="keep what changes in ServerState.moments, at a site in site_state.own: a resumed run "
                             "has nothing else")


def _settings(strategy: Strategy) -> Finding:
    lost, shown = lost_settings(strategy), repr(strategy)
    wrong = f"{', '.join(lost)} cannot be read from the strategy" if lost else None
    if " at 0x" in shown.partition("(")[0] or " object at 0x" in shown:
        wrong = wrong or f"prints as {shown}"
    return _STRATEGY.verdict("settings", wrong, strategy=shown)


def _round(stage: _Stage) -> Iterator[Finding]:
    """The input and the output of one round."""
    params, state, updates = stage.trainer.initial(), stage.begun(), stage.updates()
    before = recipe_sha256(updates), recipe_sha256(state)
    mean = stage.mean(updates)
    like = {name: (t.shape, True) for name, t in params.items()}
    got = {name: (t.shape, t.is_floating_point()) for name, t in mean.delta.items()}
    wrong = None if got == like else f"the mean has other tensors than the updates: {sorted(got.keys() ^ like.keys())}"
    mean_before = recipe_sha256(mean)
    after = stage.strategy.step(state, mean)
    same = [(name, p.shape, p.dtype) for name, p in after.params.items()]
    if wrong is None and same != [(name, p.shape, p.dtype) for name, p in params.items()]:
        wrong = "the step changes names, order, shapes or dtypes of the model"
    if wrong is None and after.round != state.round + 1:
        wrong = f"the step leads from round {state.round} to {after.round}"
    yield _STRATEGY.verdict("shapes and dtypes", wrong)
    changed = {"an update": before[0] != recipe_sha256(updates), "the state": before[1] != recipe_sha256(state),
               "the mean": mean_before != recipe_sha256(mean)}
    touched = " and ".join(what for what, changes in changed.items() if changes)
    yield _STRATEGY.verdict("purity", f"{touched} is changed in place" if touched else None)
    runs = []
    for number in (1, 2):
        with other_random_numbers(number):
            mean = stage.mean(stage.updates())
            runs.append(recipe_sha256([stage.strategy.step(stage.begun(), mean), mean.delta]))
    yield _STRATEGY.verdict("determinism", "the same updates gave other numbers" if len(set(runs)) > 1 else None)


def _select(stage: _Stage) -> str | None:
    names = [site.name for site in stage.sites]
    for number in range(20):
        one, other = ([site.name for site in stage.strategy.select(stage.sites, generator(number))] for _ in range(2))
        if one != other:
            return "the same random stream chose other sites"
        if not set(one) <= set(names) or len(set(one)) < len(one):
            return f"chose {one} out of {names}"
        if stage.strategy.sample == 1 and one != names:
            return f"says sample=1 but chose {len(one)} of {len(names)} sites"
    return None


def _order(stage: _Stage) -> str | None:
    updates = stage.updates()
    mean, *others = (stage.mean(order) for order in (updates, updates[::-1], updates[3:] + updates[:3]))
    apart = max(_apart(mean.delta, other.delta) for other in others)
    return f"another order of arrival changes the mean by {apart:.2g}" if apart > _ROUNDING else None


def _one(stage: _Stage) -> str | None:
    update, wrong = stage.updates()[0], None
    for count in (1, len(stage.sites)):
        try:
            mean = stage.mean(replace(update, site=site.name) for site in stage.sites[:count])
        except TooFewUpdates:
            continue  # a clear error
        along, aside = _along(mean.delta, update.delta)
        if not 0 < along <= 1 + _ROUNDING or aside > 1e-6:
            wrong = f"the mean of {count} equal updates is not that update"
    return wrong


def _weights(stage: _Stage) -> Finding:
    declared, updates = getattr(stage.strategy, "weights", None), stage.updates()
    heavy = {"weights": replace(updates[0], weight=40 * updates[0].weight),
             "steps": replace(updates[0], steps=40 * updates[0].steps)}
    mean = stage.mean(updates).delta
    counts = [what for what, first in heavy.items()
              if _apart(mean, stage.mean([first, *updates[1:]]).delta) > _ROUNDING]
    wrong = None
    if declared == "uniform" and "weights" in counts:
        wrong = "says weights='uniform', but an update's weight counts"
    elif declared in ("patients", "steps") and ("weights" if declared == "patients" else "steps") not in counts:
        wrong = f"says weights={declared!r}, but they do not count"
    elif declared not in ("patients", "steps", "uniform") and counts:
        wrong = f"{' and '.join(counts)} count, but no attribute `weights` says so"
        return _STRATEGY.verdict("weights", wrong, otherwise="warned")
    return _STRATEGY.verdict("weights", wrong, declared=declared)


def _uniform(stage: _Stage) -> Finding:
    claimed, wrong = getattr(stage.strategy, "uniform_mean", False) is True, None
    for updates in map(stage.updates, range(3 if claimed else 0)):
        mean = stage.mean(updates)
        plain = {name: torch.stack([u.delta[name].double() for u in updates]).mean(dim=0) for name in mean.delta}
        if _apart(mean.delta, plain) > _ROUNDING or mean.weight != len(updates):
            wrong = "says uniform_mean, but is not the sum of the updates over their number, of that weight"
    return _STRATEGY.verdict("uniform mean", wrong, what="every update counts the same, whatever it holds" if claimed
                             else "is not claimed: noise at the server and secure aggregation refuse this strategy")


def _precision(stage: _Stage) -> str | None:
    single = stage.updates()
    double = [update.map(lambda t: t.double()) for update in single]
    thirds = double[0].map(lambda t: t / 3)  # float32 cannot hold them
    _, aside = _along(stage.mean(replace(thirds, site=site.name) for site in stage.sites).delta, thirds.delta)
    apart = max(aside, _apart(stage.mean(single).delta, stage.mean(double).delta))
    return f"sums are off by {apart:.2g} of their size" if apart > _ROUNDING else None


def _finite(stage: _Stage) -> str | None:
    accepted = []
    for value in (math.nan, math.inf):
        updates = stage.updates()
        mean, spoilt = stage.mean(updates), _copied(updates[-1].delta)
        next(iter(spoilt.values())).view(-1)[0] = value
        calls: dict[str, Callable[[], object]] = {
            f"combine() accepts {value} in one update": partial(
                stage.mean, [*updates[:-1], replace(updates[-1], delta=spoilt)]),
            f"step() accepts {value} in the mean": partial(
                stage.strategy.step, stage.begun(), replace(mean, delta=spoilt))}
        accepted += [what for what, call in calls.items() if not _refuses(call)]
    return "; ".join(accepted) or None


def _refuses(call: Callable[[], object]) -> bool:
    try:
        call()
    except (ValueError, ArithmeticError, FedlabError):
        return True
    return False


def _nothing(stage: _Stage) -> str | None:
    try:
        return None if _refuses(lambda: stage.mean([])) else "the combination of no update is not refused"
    except Exception as error:  # of the author's code
        return f"the combination of no update raises {type(error).__name__}: {error}"


#: Checks of the strategy bound to a run; each returns what is wrong.
_CHECKS: dict[str, Callable[[_Stage], str | None]] = {
    "select": _select, "order": _order, "one update": _one, "precision": _precision, "not finite": _finite,
    "no update": _nothing}


def _run(stage: _Stage) -> Iterator[Finding]:
    """Three rounds of a real run, whole and interrupted."""
    def run(rounds: int, folder: Path | None = None) -> tuple[ServerState, dict[str, SiteState]]:
        history = federate(stage.trainer, stage.sites, strategy=copy.deepcopy(stage.strategy), rounds=rounds,
                           progress=False, checkpoint=folder)
        return history.state or ServerState(round=0, params={}), dict(history.site_states)

    try:
        whole, states = run(3)
        with tempfile.TemporaryDirectory() as folder:
            run(2, Path(folder) / "run")
            resumed, states_resumed = run(3, Path(folder) / "run")
    except Exception as error:  # of the author's code
        yield _STRATEGY.verdict("fits the run", f"{type(error).__name__}: {error}")
        return
    yield _STRATEGY.verdict("fits the run", None)
    foreign = sorted({owner for state in states.values() for owner in state.namespaces} - {"optimiser", "strategy"})
    own = sorted({name.partition("|")[0] for state in states.values() for name in state.of("strategy").own})
    yield _STRATEGY.verdict("state", f"it writes for {', '.join(foreign)}" if foreign else None,
                            names=", ".join(own[:4]) or "nothing")
    same = recipe_sha256(whole) == recipe_sha256(resumed) and all(
        recipe_sha256(slots) == recipe_sha256(states_resumed[site].of(owner).own) for site, state in states.items()
        for owner, slots in state.namespaces.items())
    yield _STRATEGY.verdict("resume", None if same else "a run stopped after two rounds ends with other bits than the "
                            "whole one")


def _copied(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in tensors.items()}


def _along(mean: Tensors, update: Tensors) -> tuple[float, float]:
    """The multiple of an update that is nearest to a mean, and what is left beside it as a share of the mean."""
    def dot(one: Tensors, other: Tensors) -> float:
        return sum(float((t.double() * other[name].double()).sum()) for name, t in one.items())

    along = dot(mean, update) / dot(update, update)
    return along, _apart(mean, {name: t * along for name, t in update.items()})


def _apart(one: Tensors, other: Tensors) -> float:
    """The largest difference as a share of the largest value."""
    def largest(values: Iterable[torch.Tensor]) -> float:
        return max((float(t.abs().max()) for t in values), default=0.0)

    return largest(t.double() - other[name].double() for name, t in one.items()) / max(largest(one.values()), 1e-12)
