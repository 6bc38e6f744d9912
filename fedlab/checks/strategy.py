"""Does a strategy do what a server and a resumed run rely on? Checks for those who write one, as in a notebook cell."""

from __future__ import annotations

import copy
import inspect
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlab.checks.check_report import CheckReport, Finding
from fedlab.checks.rehearsal import plain_descent, unlike_randomness
from fedlab.core.errors import FedlabError
from fedlab.core.protocols import Strategy
from fedlab.core.seeds import derive, generator
from fedlab.core.types import Patient, ServerState, Site, SiteState, Tensors, Update
from fedlab.core.weights import weights_sha256
from fedlab.run.federate import federate, make_run
from fedlab.strategies.averaging import TooFewUpdates
from fedlab.training.trainer import SiteTrainer

__all__ = ["check_strategy"]

#: Sums in float64 differ by less than this, whatever their order.
_ROUNDING = 1e-9


def check_strategy(strategy: Strategy, *, trainer: SiteTrainer | None = None, sites: Sequence[Site] | None = None,
                   raise_: bool = True) -> CheckReport:
    """Puts a strategy through made-up rounds and a small federated run and looks at what it does.

    Checked are, by name:
        "settings": they are attributes, so that runs with other settings can be told apart.
        "select": a cohort is some of the sites, the same for the same random stream.
        "shapes and dtypes": the mean has the updates' tensors, the step keeps names, order, shapes and dtypes of the
            model and counts the round.
        "purity": updates, state and strategy come out as they went in.
        "determinism": the same input gives the same bits, whatever else drew random numbers before.
        "order": updates may arrive in any order.
        "one update": one update alone, and several that are equal, give that update or a shorter one.
        "weights": they count, or the strategy says weights="uniform" and they don't.
        "uniform mean": a strategy that says so is one, which noise at the server and secure aggregation rely on.
        "precision": sums are in float64.
        "not finite": NaN and infinite values never pass.
        "no update": is a clear error.
        "fits the run": three rounds of a small run end.
        "state": sites are left tensors by name, in the strategy's own namespace.
        "resume": a run stopped after two rounds ends with the bits of the whole one.

    The checks find mistakes; they prove nothing. Whether the strategy is the one of its paper only a comparison with
    the formula written out can tell.

    Args:
        strategy: is used as it is and must come out unchanged.
        trainer, sites: that it is for; by default a tiny network trained with plain SGD at seven sites of noise, or
            with the strategy's own `sites`, `steps` and `lr`.
        raise_: raise if a check fails; otherwise look at the report.

    Returns:
        The report, true if no check failed.

    Raises:
        ValueError: a check failed, and the message is the report; or `strategy` is no strategy.
    """
    missing = [name for name in ("begin", "select", "equip", "combine", "step", "remember", "bind", "sample")
               if not hasattr(strategy, name)]
    if missing or isinstance(strategy, type):
        raise ValueError(f"a strategy is an object with {', '.join(missing) or 'settings'}, got {strategy!r}; inherit "
                         "from FedAvg, override what differs, and make one with brackets behind its name")
    with torch.random.fork_rng(devices=[]):
        report = CheckReport(repr(strategy), list(_findings(strategy, _stage(strategy, trainer, sites))))
    if raise_ and not report:
        raise ValueError(str(report))
    return report


@dataclass(frozen=True, kw_only=True)
class _Stage:
    trainer: SiteTrainer
    sites: Sequence[Site]

    def updates(self, seed: int = 0) -> list[Update]:
        """One of every site: other values, weights and steps, one of them long."""
        rng = generator(seed, "check strategy")
        return [Update(site=site.name, weight=1.0 + 2 * k, steps=1 + k, metrics={"loss": 0.5 + k}, round=0, delta={
            name: torch.randn(p.shape, generator=rng) * (30.0 if k == 2 else 1.0) + 0.5
            for name, p in self.trainer.initial().items()}) for k, site in enumerate(self.sites)]


def _stage(strategy: Strategy, trainer: SiteTrainer | None, sites: Sequence[Site] | None) -> _Stage:
    if sites is None:
        count = getattr(strategy, "sites", None) or max(7, int(getattr(strategy, "needed", 0)))
        sites = [Site(f"site-{k}", [_patient(derive(k, "patient", number)) for number in range(1 + k % 2)])
                 for k in range(count)]
    if trainer is None:
        steps, lr = getattr(strategy, "steps", None) or 2, getattr(strategy, "lr", None) or 0.1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = nn.Sequential(nn.Conv3d(4, 2, 1), nn.GroupNorm(1, 2), nn.ReLU(), nn.Conv3d(2, 3, 1))
        trainer = SiteTrainer(model=network, steps=steps, lr=lr, optimiser=plain_descent, batch_size=1, crop=(8, 8, 8),
                              augment=None, precision="fp32", device="cpu")
    return _Stage(trainer=trainer, sites=sites)


def _patient(seed: int) -> Patient:
    label = torch.zeros(8, 8, 8, dtype=torch.uint8)
    label[1:6, 1:6, 1:6], label[2:5, 2:5, 2:5], label[3, 3, 3] = 2, 1, 4
    image = torch.randn(4, 8, 8, 8, generator=generator(seed)) + label.float()
    return Patient(f"p{seed}", image, label, torch.eye(4).numpy())


def _findings(strategy: Strategy, stage: _Stage) -> Iterator[Finding]:
    yield _settings(strategy)
    before = copy.deepcopy(vars(strategy))
    try:
        bound = make_run(stage.trainer, stage.sites, strategy=strategy).strategy
        yield from _round(bound, stage)
        for check in (_select, _order, _one, _weights, _uniform, _precision, _finite, _nothing):
            yield from check(bound, stage)
    except Exception as error:  # the author's code, whatever it raises
        yield Finding(check="fits the run", outcome="failed", what=f"{type(error).__name__}: {error}",
                      remedy="combine() takes an iterable of updates that may be walked once and returns an Update; "
                             "step() takes the state and that update, and returns a state")
    else:
        yield from _run(strategy, stage)
    changed = sorted(name for name, value in vars(strategy).items() if repr(before.get(name)) != repr(value))
    if changed:
        yield Finding(check="purity", outcome="failed", what=f"a round changes the strategy's {', '.join(changed)}",
                      remedy="put what changes into ServerState.moments, at a site into site_state.own: a resumed run "
                             "has nothing else")


def _finding(check: str, wrong: str | None, right: str, remedy: str) -> Finding:
    return Finding(check=check, outcome="failed" if wrong else "passed", what=wrong or right,
                   remedy=remedy if wrong else "")


def _settings(strategy: Strategy) -> Finding:
    lost = [name for name, parameter in inspect.signature(type(strategy).__init__).parameters.items()
            if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            and not hasattr(strategy, name)]
    hidden = " at 0x" in repr(strategy).partition("(")[0] or " object at 0x" in repr(strategy)
    return _finding("settings", f"{', '.join(lost)} can't be read from the strategy" if lost else
                    f"prints as {strategy!r}" if hidden else None, f"prints as {strategy!r}",
                    "make it a frozen dataclass: it then prints as the code that makes it, and a run with other "
                    "settings is not taken for the same run")


def _round(strategy: Strategy, stage: _Stage) -> Iterator[Finding]:
    """What goes into one round and what comes out."""
    params = stage.trainer.initial()
    state, updates = _begun(strategy, stage), stage.updates()
    kept = [_copied(update.delta) for update in updates], _groups(state)
    mean = strategy.combine(iter(updates))
    like = {name: (t.shape, True) for name, t in params.items()}
    got = {name: (t.shape, t.is_floating_point()) for name, t in mean.delta.items()}
    wrong = None if got == like else f"the mean has other tensors than the updates: {sorted(got.keys() ^ like.keys())}"
    mean_before = _copied(mean.delta)
    after = strategy.step(state, mean)
    same = [(name, p.shape, p.dtype) for name, p in after.params.items()]
    if wrong is None and same != [(name, p.shape, p.dtype) for name, p in params.items()]:
        wrong = "the step changes names, order, shapes or dtypes of the model"
    if wrong is None and after.round != state.round + 1:
        wrong = f"the step goes from round {state.round} to {after.round}"
    yield _finding("shapes and dtypes", wrong, "the model keeps its tensors",
                   "return one float64 tensor for each of an update's; call super().step(state, mean)")
    touched = (["an update"] if not all(map(_equal, kept[0], [u.delta for u in updates])) else []) + (
        ["the state"] if not _equal(kept[1], _groups(state)) else []) + (
        ["the mean"] if not _equal(mean_before, mean.delta) else [])
    yield _finding("purity", f"{' and '.join(touched)} is changed in place" if touched else None,
                   "nothing is changed in place", "make new tensors (t * 2, not t.mul_(2)), or work on t.clone()")
    runs = []
    for number in (1, 2):
        with unlike_randomness(number):
            mean = strategy.combine(iter(stage.updates()))
            runs.append({**_groups(strategy.step(_begun(strategy, stage), mean)), **mean.delta})
    yield _finding("determinism", None if _equal(*runs) else "the same updates gave other numbers",
                   "the same updates give the same bits", "draw nothing at random in combine() and step(), or from a "
                   "generator seeded with the round")


def _select(strategy: Strategy, stage: _Stage) -> Iterator[Finding]:
    names = [site.name for site in stage.sites]
    wrong = None
    for number in range(20):
        one, other = ([site.name for site in strategy.select(stage.sites, generator(number))] for _ in range(2))
        if one != other:
            wrong = "the same random stream chose other sites"
        elif not set(one) <= set(names) or len(set(one)) < len(one):
            wrong = f"chose {one} out of {names}"
        elif strategy.sample == 1 and one != names:
            wrong = f"says sample=1 but chose {len(one)} of {len(names)} sites"
    yield _finding("select", wrong, "a cohort is some of the sites, chosen by the given stream",
                   "choose out of `sites` with the `rng` that select() is given, and say with which probability in "
                   "`sample`: the privacy accountant relies on it")


def _order(strategy: Strategy, stage: _Stage) -> Iterator[Finding]:
    updates = stage.updates()
    means = [strategy.combine(iter(order)) for order in (updates, updates[::-1], updates[3:] + updates[:3])]
    apart = max(_apart(means[0].delta, mean.delta) for mean in means[1:])
    yield _finding("order", f"another order of arrival changes the mean by {apart:.2g}" if apart > _ROUNDING else None,
                   "updates may arrive in any order", "sort what you collect by update.site; let no update count by "
                   "its place")


def _one(strategy: Strategy, stage: _Stage) -> Iterator[Finding]:
    update, wrong = stage.updates()[0], None
    for count in (1, len(stage.sites)):
        try:
            mean = strategy.combine(replace(update, site=site.name) for site in stage.sites[:count])
        except TooFewUpdates:
            continue  # says clearly that it needs more
        along = _dot(mean.delta, update.delta) / _dot(update.delta, update.delta)
        if not 0 < along <= 1 + _ROUNDING or _apart(mean.delta, update.map(lambda t: t * along).delta) > 1e-6:  # noqa: B023
            wrong = f"{count} times the same update gives something else"
    yield _finding("one update", wrong, "gives that update, or a shorter one",
                   "equal updates leave nothing to combine: divide by the sum of what you multiplied with")


def _weights(strategy: Strategy, stage: _Stage) -> Iterator[Finding]:
    declared = getattr(strategy, "weights", None)
    updates = stage.updates()
    heavy = {"weights": [replace(u, weight=u.weight * (40 if k < 1 else 1)) for k, u in enumerate(updates)],
             "steps": [replace(u, steps=u.steps * (40 if k < 1 else 1)) for k, u in enumerate(updates)]}
    mean = strategy.combine(iter(updates)).delta
    counts = {what: _apart(mean, strategy.combine(iter(other)).delta) > _ROUNDING for what, other in heavy.items()}
    wrong = None
    if declared == "uniform" and counts["weights"]:
        wrong = "says weights='uniform', but an update's weight counts"
    elif declared in ("patients", "steps") and not counts["weights" if declared == "patients" else "steps"]:
        wrong = f"says weights={declared!r}, but they count for nothing"
    elif declared not in ("patients", "steps", "uniform") and any(counts.values()):
        yield Finding(check="weights", outcome="warned", what=f"{' and '.join(w for w, c in counts.items() if c)} "
                      "count, but no attribute `weights` says so", remedy="inherit from FedAvg, or name the attribute")
        return
    yield _finding("weights", wrong, f"count as weights={declared!r} says", "use self._weight(update) of FedAvg, or "
                   "refuse other weights than 'uniform' in __post_init__")


def _uniform(strategy: Strategy, stage: _Stage) -> Iterator[Finding]:
    if getattr(strategy, "uniform_mean", False) is not True:
        yield Finding(check="uniform mean", outcome="passed", what="is not claimed: noise at the server and secure "
                      "aggregation refuse this strategy")
        return
    wrong = None
    for seed in range(3):
        updates = stage.updates(seed)
        mean = strategy.combine(iter(updates))
        plain = {name: sum(u.delta[name].double() for u in updates) / len(updates) for name in updates[0].delta}
        if _apart(mean.delta, plain) > _ROUNDING or mean.weight != len(updates):  # type: ignore[arg-type]
            wrong = "says uniform_mean, but it isn't the sum of the updates over their number, of that weight"
    yield _finding("uniform mean", wrong, "every update counts the same, whatever it holds",
                   "leave uniform_mean out, which is False where combine is overridden: noise would be too small")


def _precision(strategy: Strategy, stage: _Stage) -> Iterator[Finding]:
    single = stage.updates()
    double = [update.map(lambda t: t.double()) for update in single]
    apart = _apart(strategy.combine(iter(single)).delta, strategy.combine(iter(double)).delta)
    fine = double[0].map(lambda t: t / 3)  # thirds, which float32 can't hold
    mean = strategy.combine(replace(fine, site=site.name) for site in stage.sites)
    along = _dot(mean.delta, fine.delta) / _dot(fine.delta, fine.delta)
    apart = max(apart, _apart(mean.delta, fine.map(lambda t: t * along).delta))
    yield _finding("precision", f"sums are off by {apart:.2g} of their size" if apart > _ROUNDING
                   else None, "sums are in float64", "turn each tensor into float64 first: t.double()")


def _finite(strategy: Strategy, stage: _Stage) -> Iterator[Finding]:
    passed = []
    first = next(iter(stage.trainer.initial()))
    for value in (math.nan, math.inf):
        updates = stage.updates()
        spoilt = _spoilt(updates[-1].delta, first, value)
        updates[-1] = replace(updates[-1], delta=spoilt)
        if not _refuses(lambda updates=updates: strategy.combine(iter(updates))):  # type: ignore[misc]
            passed.append(f"combine() takes {value} in one update")
        mean = replace(strategy.combine(iter(stage.updates())), delta=spoilt)
        if not _refuses(lambda mean=mean: strategy.step(_begun(strategy, stage), mean)):  # type: ignore[misc]
            passed.append(f"step() takes {value} in the mean")
    yield _finding("not finite", "; ".join(passed) or None, "NaN and infinite values are refused",
                   "sorting and comparing hide NaN: raise ValueError unless torch.isfinite(t).all(), or end in "
                   "weighted_mean() and FedAvg.step(), which do")


def _nothing(strategy: Strategy, stage: _Stage) -> Iterator[Finding]:
    try:
        strategy.combine(iter([]))
        wrong: str | None = "combining no update gives something"
    except (ValueError, FedlabError):
        wrong = None
    except Exception as error:  # whatever the author's code trips over
        wrong = f"combining no update ends in {type(error).__name__}: {error}"
    yield _finding("no update", wrong, "is a clear error", "raise fedlab.strategies.TooFewUpdates: with Admission "
                   "rules the round is then void and the run goes on")


def _run(strategy: Strategy, stage: _Stage) -> Iterator[Finding]:
    """Three rounds of a real run, whole and interrupted."""
    def run(rounds: int, used: Strategy, folder: str | None = None) -> tuple[ServerState, dict[str, SiteState]]:
        history = federate(stage.trainer, stage.sites, strategy=used, rounds=rounds, progress=False,
                           checkpoint=None if folder is None else Path(folder) / "run")
        return history.state or ServerState(round=0, params={}), dict(history.site_states)

    try:
        whole, states = run(3, copy.deepcopy(strategy))
        with tempfile.TemporaryDirectory() as folder:
            run(2, copy.deepcopy(strategy), folder)
            resumed, states_resumed = run(3, copy.deepcopy(strategy), folder)
    except Exception as error:  # the author's code, whatever it raises
        yield Finding(check="fits the run", outcome="failed", what=f"{type(error).__name__}: {error}",
                      remedy="see the message; give check_strategy() a trainer or sites that the strategy is for")
        return
    yield Finding(check="fits the run", outcome="passed", what="three rounds of a small run ended")
    foreign = sorted({owner for state in states.values() for owner in state.namespaces} - {"optimiser", "strategy"})
    own = sorted({name.partition("|")[0] for state in states.values() for name in state.namespaces.get("strategy", {})})
    yield _finding("state", f"it writes for {', '.join(foreign)}" if foreign else None,
                   f"sites keep {', '.join(own[:4])}" if own else "sites keep nothing for it",
                   "write into site_state.own, as site_state.own['clip'] = torch.tensor(1.0)")
    same = _equal(_groups(whole), _groups(resumed)) and all(
        _equal(slots, states_resumed[site].namespaces.get(owner, {})) for site, state in states.items()
        for owner, slots in state.namespaces.items())
    yield _finding("resume", None if same else "a run stopped after two rounds ends with other bits than the whole one",
                   "a stopped run goes on to the same bits", "keep nothing in the strategy: put it into "
                   "ServerState.moments, at a site into site_state.own")


def _begun(strategy: Strategy, stage: _Stage) -> ServerState:
    return strategy.begin(_copied(stage.trainer.initial()))


def _spoilt(delta: Tensors, name: str, value: float) -> dict[str, torch.Tensor]:
    out = _copied(delta)
    out[name].view(-1)[0] = value
    return out


def _refuses(call: Callable[[], object]) -> bool:
    try:
        call()
    except (ValueError, ArithmeticError, FedlabError):
        return True
    return False


def _copied(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in tensors.items()}


def _groups(state: ServerState) -> dict[str, torch.Tensor]:
    """All tensors of a state, copied."""
    groups: Mapping[str, Tensors] = {"params": state.params, **state.moments}
    return {f"{group}|{name}": t.clone() for group, slots in groups.items() for name, t in slots.items()}


def _equal(one: Tensors, other: Tensors) -> bool:
    return weights_sha256(one) == weights_sha256(other)


def _dot(one: Tensors, other: Tensors) -> float:
    return sum(float((t.double() * other[name].double()).sum()) for name, t in one.items())


def _apart(one: Tensors, other: Tensors) -> float:
    """The largest difference as a share of the largest value."""
    def largest(values: Iterable[Any]) -> float:
        return max((float(t.abs().max()) for t in values), default=0.0)

    scale = max(largest(one.values()), 1e-12)
    return largest(t.double() - other[name].double() for name, t in one.items()) / scale
