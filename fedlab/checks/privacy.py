"""Does a privacy technique keep its word? A battery of checks for those who write one, as in a notebook cell."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fedlab.checks.check_report import CheckReport, Finding
from fedlab.checks.influence import check_broadcast, check_claim, check_patients, check_whole, find_claims
from fedlab.checks.rehearsal import DECOY, Rehearsal, Stage, make_stage, rehearse, unlike_randomness
from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError, SiteError
from fedlab.core.protocols import Strategy
from fedlab.core.types import Site, Tensors, Update
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy
from fedlab.training.trainer import SiteTrainer

__all__ = ["check_privacy"]


def check_privacy(technique: Privacy | Aggregation, *, trainer: SiteTrainer | None = None,
                  sites: Sequence[Site] | None = None, strategy: Strategy | None = None,
                  aggregation: Aggregation | None = None, raise_: bool = True) -> CheckReport:
    """Puts a technique, or several joined by `+`, through small federated runs and observes what it does.

    Checked are, by name:
        "fits the run": it works with the trainer, the sites and the strategy; two rounds end.
        "shapes and names": protect() returns an `Update` of the tensors it was given.
        "purity": it changes neither the tensors it is given nor the technique, the sites, the weights.
        "state": it writes tensors, into its own namespace.
        "settings": they are attributes, so that runs with other settings can be told apart.
        "determinism": one seed gives the same numbers, whatever else drew random numbers before.
        "fails closed": after NaN, missing, unknown or misshapen tensors nothing is sent.
        "ledger": a technique with `units` enters every round, and what it spends is stated.
        "budget": with `max_epsilon`, a site withdraws before it would exceed it.
        "noise": what is charged for is really noisy, on every tensor.
        "sensitivity": whatever the update or the patient, the noise is what was charged for, for adversarial ones
            too, in the round and the one after.
        "order": what to know about techniques that stand in this order.

    The checks find mistakes; they prove nothing. Statistical ones are seeded and accept a right technique except with
    probability below 1e-4.

    Args:
        technique: used as it is, not copied; it must come out unchanged. An aggregation is checked by itself.
        trainer: with a network of the kind the technique is for; by default a SegResNet of two levels.
        sites: by default three of noise, or as many as the aggregation needs, with patients enough for the
            technique's attribute `batch`.
        strategy: `FedAvg(weights="uniform")` by default.
        aggregation: that it works with, such as `SecureAggregation(threshold=2)`; in the open by default.
        raise_: raise if a check fails; otherwise look at the report.

    Returns:
        The report, true if no check failed.

    Raises:
        PrivacyError: a check failed; the message is the report.
        ValueError: `technique` is no `Privacy`.
    """
    if isinstance(technique, Aggregation):
        aggregation, technique = technique, Privacy()
    if not isinstance(technique, Privacy):
        raise ValueError(f"a technique is an object of a class derived from fedlab.Privacy, got {technique!r}"
                         + ("; make one: put brackets behind its name" if isinstance(technique, type) else ""))
    with torch.random.fork_rng(devices=[]):
        stage = make_stage(technique, trainer=trainer, sites=sites, strategy=strategy,
                           aggregation=Aggregation() if aggregation is None else aggregation)
        parts = [part for part in (technique, stage.aggregation) if type(part) not in (Privacy, Aggregation)]
        report = CheckReport(" with ".join(map(repr, parts or [technique])), list(_findings(technique, stage)))
    if raise_ and not report:
        raise PrivacyError(str(report))
    return report


def _findings(technique: Privacy, stage: Stage) -> Iterator[Finding]:
    yield from _settings(technique)
    yield from _order(technique, stage)
    before = _outside(technique, stage)
    real = rehearse(technique, stage, rounds=2, catch=True)
    shapes = list(_shapes(technique, real))
    yield from shapes
    yield from _purity(technique, stage, real, before)
    kept = _state(real)
    yield kept
    if real.error is not None:
        if shapes[-1].outcome == kept.outcome == "passed":
            yield _cause(technique, real.error)
        return
    yield Finding(check="fits the run", outcome="passed", what="two rounds of a small run ended")
    repeats = list(_determinism(technique, stage))
    yield from repeats
    yield from _fails_closed(technique, stage)
    yield from _ledger(technique, stage, real)
    if repeats[-1].outcome == "passed":  # otherwise nothing can be told apart from chance
        yield from _claims(technique, stage, real)


def _claims(technique: Privacy, stage: Stage, seen: Rehearsal) -> Iterator[Finding]:
    """Whether noise and sensitivity are what was charged for."""
    claims = find_claims(technique, seen)
    noisy = True
    for claim in claims:
        check = check_patients if claim.where == "training" else check_claim
        for finding in check(technique, _seeded(technique, stage), stage, claim):
            noisy &= finding.check != "noise" or finding.outcome == "passed"
            yield finding
    about_updates = [claim for claim in claims if claim.where != "training"]
    if any(claim.where == "server" for claim in claims):
        yield from check_broadcast(technique, stage)
    if about_updates and noisy:
        yield from check_whole(technique, stage, about_updates)


def _seeded(technique: Privacy, stage: Stage) -> tuple[Privacy, Stage]:
    """Technique and stage with noise that repeats, so that the influence of an update can be told apart from it."""
    layers = [copy.copy(layer) for layer in technique.layers]
    for layer in layers:
        if getattr(layer, "secure_mode", False):
            layer.secure_mode = False  # type: ignore[attr-defined]
    aggregation: Any = stage.aggregation
    if getattr(aggregation, "secure_mode", False):
        aggregation = replace(aggregation, secure_mode=False)
    return functools.reduce(operator.add, layers), replace(stage, aggregation=aggregation)


def _cause(technique: Privacy, error: Exception) -> Finding:
    """What ended the rehearsal, under the name of the check that it belongs to."""
    unpaid = isinstance(error, PrivacyError) and "entered nothing into the ledger" in str(error)
    return Finding(check="ledger" if unpaid else "fits the run", outcome="failed",
                   what=f"{type(error).__name__}: {error}",
                   remedy="charge Ledger(state) in equip() or protect() before noise is added" if unpaid else
                   "see the message; give check_privacy() a trainer, sites or a strategy that the technique is for")


def _settings(technique: Privacy) -> Iterator[Finding]:
    lost = [f"{type(layer).__name__}.{name}" for layer in technique.layers
            for name, parameter in inspect.signature(type(layer).__init__).parameters.items()
            if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            and not hasattr(layer, name)]
    if lost:
        yield Finding(check="settings", outcome="warned", what=f"{', '.join(lost)} can't be read from the technique",
                      remedy="keep every argument of __init__ as an attribute of its name: it then prints as code, and "
                             "a run with other settings is not taken for the same run")
    else:
        yield Finding(check="settings", outcome="passed", what=f"prints as {technique!r}")


def _shapes(technique: Privacy, seen: Rehearsal) -> Iterator[Finding]:
    steps = [step for step in seen.steps if step.layer < len(technique.layers)]
    wrong = next(filter(None, (_misshapen(technique, step.layer, step.returned, step.given) for step in steps)), None)
    if wrong:
        yield Finding(check="shapes and names", outcome="failed", what=wrong,
                      remedy="return update.map(...), or dataclasses.replace(update, delta=...) with all its tensors")
    else:
        yield Finding(check="shapes and names", outcome="passed", what="every update keeps its tensors")


def _misshapen(technique: Privacy, place: int, returned: object, given: Tensors) -> str | None:
    name = f"{type(technique.layers[place]).__name__}.protect()"
    if not isinstance(returned, Update):
        return f"{name} returned {type(returned).__name__}, expected an Update"
    if returned.delta.keys() != given.keys():
        return f"{name} returned other tensors: {sorted(returned.delta.keys() ^ given.keys())[:3]}"
    for key, t in returned.delta.items():
        if not isinstance(t, torch.Tensor) or t.shape != given[key].shape or not t.is_floating_point():
            return f"{name} returned {key} as {getattr(t, 'dtype', type(t).__name__)} {tuple(getattr(t, 'shape', ()))}"
    return None


def _outside(technique: Privacy, stage: Stage) -> dict[str, Any]:
    """All that a technique is given and must leave alone."""
    return {
        **{f"{type(layer).__name__}.{name}": copy.deepcopy(value) for layer in technique.layers
           for name, value in vars(layer).items()},
        **{f"the scan of {p.id}": p.image.clone() for site in stage.sites for p in list(site.train)[:2]},
        **{f"the first weights, {name}": t.clone() for name, t in stage.like.items()},
    }


def _purity(technique: Privacy, stage: Stage, seen: Rehearsal, before: Mapping[str, Any]) -> Iterator[Finding]:
    parts = (*technique.layers, stage.aggregation)
    in_place = next((f"{type(parts[s.layer]).__name__}.protect() changes {s.in_place[0]} of the update it is given in "
                     "place" for s in seen.steps if s.in_place), None)
    after = _outside(technique, stage)
    changed = [name for name in {**before, **after} if not _equal(before.get(name), after.get(name))]
    if in_place:
        yield Finding(check="purity", outcome="failed", what=in_place,
                      remedy="use operations that make new tensors (t * 2, not t.mul_(2)), or work on t.clone()")
    public = [name for name in changed if not name.rpartition(".")[2].startswith("_")]
    if public:
        yield Finding(check="purity", outcome="failed", what=f"a round changes {', '.join(public[:3])}",
                      remedy="keep what changes from round to round in state.own: one technique serves all sites, and "
                             "a resumed run has only the states")
    elif changed:
        yield Finding(check="purity", outcome="warned", what=f"a round changes {', '.join(changed[:3])}",
                      remedy="fine for what can be computed anew; all else belongs into state.own")
    if not in_place and not changed:
        yield Finding(check="purity", outcome="passed", what="nothing is changed in place")


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if not any("__eq__" in vars(kind) for kind in type(one).__mro__[:-1]):  # taken by what they print as
        return type(one) is type(other) and repr(one).partition(" at 0x")[0] == repr(other).partition(" at 0x")[0]
    same = one == other
    return bool(same) if isinstance(same, bool) else bool(getattr(same, "all", lambda: False)())


def _state(seen: Rehearsal) -> Finding:
    foreign = sorted({owner for step in seen.steps for owner in step.foreign} | set(seen.foreign))
    gone = [site for site, state in seen.states.items() if DECOY not in state.namespaces]
    if foreign or gone:
        where = ", ".join(map(repr, foreign)) or "an existing namespace"
        return Finding(check="state", outcome="failed",
                       what=f"writes into {where}, which is not its own, or something other than tensors by name",
                       remedy="write into the namespace of the technique only: state.own['clip'] = torch.tensor(1.0)")
    return Finding(check="state", outcome="passed", what="only its own namespace is written")


def _determinism(technique: Privacy, stage: Stage) -> Iterator[Finding]:
    runs = []
    for number in (1, 2):
        with unlike_randomness(number):
            runs.append(rehearse(technique, stage, rounds=2))
    one, other = runs
    hidden = stage.aggregation.hides_updates  # masks are fresh; the sum is what repeats
    same = all(_bit_equal(one.moved[k].delta, other.moved[k].delta) for k in one.moved) and (hidden or all(
        _bit_equal(update.delta, other.sent[k][site].delta) for k, sent in one.sent.items()
        for site, update in sent.items()))
    if same:
        yield Finding(check="determinism", outcome="passed", what="the same seed gives the same numbers")
    elif any(getattr(part, "secure_mode", False) for part in (*technique.layers, stage.aggregation)):
        yield Finding(check="determinism", outcome="passed", what="no two runs are alike, as secure_mode wants it")
    else:
        yield Finding(check="determinism", outcome="failed", what="the same seed gave other numbers",
                      remedy="draw from the rng that protect() and release() are given, in equip() from "
                             "fedlab.core.seeds.generator(kit.seed, 'my technique'); never from torch's or numpy's own")


def _bit_equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def _fails_closed(technique: Privacy, stage: Stage) -> Iterator[Finding]:
    first, *rest = stage.like
    good = {name: torch.full_like(t, 1e-3) for name, t in stage.like.items()}
    bad: dict[str, Callable[[], Tensors]] = {
        "NaN in one entry": lambda: {**good, first: _with_entry(good[first], float("nan"))},
        "an infinite entry": lambda: {**good, first: _with_entry(good[first], float("inf"))},
        "NaN everywhere": lambda: {name: t * float("nan") for name, t in good.items()},
        "a missing tensor": lambda: {name: good[name] for name in rest},
        "an unknown tensor": lambda: {**good, "unknown": torch.ones(3)},
        "a misshapen tensor": lambda: {**good, first: torch.ones(*good[first].shape, 2)},
    }
    sent, odd = [], []
    for what, make in bad.items():
        delta = make()
        seen = rehearse(technique, stage, script=lambda site, number, delta=delta: delta, catch=True)  # type: ignore[misc]
        if seen.error is None or seen.sent.get(0):
            sent.append(what)
        elif not isinstance(seen.error, PrivacyError | SiteError):
            odd.append(f"{what}: {type(seen.error).__name__}")
    if sent:
        yield Finding(check="fails closed", outcome="failed", what=f"an update was sent though training gave "
                      f"{', '.join(sent)}",
                      remedy="don't hide damage (nan_to_num, comparisons that are false for NaN): let it through, the "
                             "task refuses it, or raise PrivacyError")
    elif odd:
        yield Finding(check="fails closed", outcome="warned", what=f"nothing was sent, but {'; '.join(odd)}",
                      remedy="raise PrivacyError with what to do")
    else:
        yield Finding(check="fails closed", outcome="passed", what="nothing is sent after damaged training")


def _with_entry(t: torch.Tensor, value: float) -> torch.Tensor:
    out = t.clone()
    out.view(-1)[0] = value
    return out


def _ledger(technique: Privacy, stage: Stage, seen: Rehearsal) -> Iterator[Finding]:
    stated = {spent.unit for sent in seen.sent.values() for update in sent.values() for spent in update.spent}
    claims = find_claims(technique, seen)
    server = [claim for claim in claims if seen.settled.get(claim.layer)]
    silent = [c for c in server if not seen.released[0][c.layer].spent]
    if silent:
        yield Finding(check="ledger", outcome="failed", what="the server's ledger is charged but nobody is told",
                      remedy="return dataclasses.replace(mean, spent=ledger.spent()) from release()")
        return
    units = technique.units | stage.aggregation.units
    if not units:
        charged = bool(claims) and not server
        yield Finding(check="ledger", outcome="warned" if charged else "passed",
                      what="charges the sites' ledgers but names no units" if charged else
                      "a guarantee through noise at the server, stated every round" if server else
                      "no formal guarantee is claimed",
                      remedy="name what the guarantee protects: units = frozenset({'site'})" if charged else "")
        return
    extra = {charge.terms.unit for claim in claims for charge in claim.charges if claim not in server}
    extra -= set(units)
    if extra:
        yield Finding(check="ledger", outcome="warned", what=f"also charges for {sorted(extra)}, not named in units",
                      remedy="name them too, so that a round without the charge is refused")
    yield Finding(check="ledger", outcome="passed",
                  what=f"every round is charged and states what is spent per {' and per '.join(sorted(stated))}")
    yield from _budget(technique, stage, seen)


def _budget(technique: Privacy, stage: Stage, seen: Rehearsal) -> Iterator[Finding]:
    once = min(s.epsilon for update in seen.sent[0].values() for s in update.spent)
    parts: tuple[Any, ...] = (*technique.layers, stage.aggregation)
    if not any(part.units and hasattr(part, "max_epsilon") for part in parts):
        yield Finding(check="budget", outcome="warned", what="no site can set a budget",
                      remedy="take max_epsilon=None as an argument and hand it to Ledger.charge(max_epsilon=...)")
        return
    tight = [copy.copy(layer) for layer in technique.layers]
    for layer in tight:
        if layer.units and hasattr(layer, "max_epsilon"):
            layer.max_epsilon = once / 4
    aggregation: Any = stage.aggregation
    if aggregation.units:  # refuses when it is bound to the run, before the first round
        aggregation = replace(aggregation, max_epsilon=once / 4)
    tried = rehearse(functools.reduce(operator.add, tight), replace(stage, aggregation=aggregation), checked=False,
                     catch=True)
    refused = (PrivacyBudgetExhausted, *([ValueError] if aggregation.units else []))
    if isinstance(tried.error, refused) and not tried.sent.get(0):
        yield Finding(check="budget", outcome="passed", what="a site withdraws before it would exceed max_epsilon")
    else:
        yield Finding(check="budget", outcome="failed", what=f"with max_epsilon at a quarter of what a round costs, "
                      f"{'an update was sent' if tried.error is None else f'came {tried.error!r}'}",
                      remedy="hand max_epsilon to Ledger.charge, before noise is added")


def _order(technique: Privacy, stage: Stage) -> Iterator[Finding]:
    """What to know about the order, from the attributes of the layers."""
    layers = technique.layers
    for place, layer in enumerate(layers):
        name, later = type(layer).__name__, layers[place + 1:]
        trains = "patient" in layer.units
        if "site" in layer.units and stage.aggregation.hides_updates:
            yield Finding(check="order", outcome="warned", what=f"every site adds the noise of {name} before "
                          f"{type(stage.aggregation).__name__} adds it all up", remedy="the guarantee stands, with as "
                          "many noises in the sum as there are sites; secure aggregation's own noise needs to be in "
                          "the sum only once")
        for other in later:
            about = type(other).__name__
            if layer.units and getattr(other, "error_feedback", False):
                yield Finding(check="order", outcome="warned", what=f"{about} remembers what it left out of {name}'s "
                              "noise and sends it later",
                              remedy=f"it costs no privacy, but {about} before {name} would remember the update")
            if trains and type(other).equip is not Privacy.equip:
                yield Finding(check="order", outcome="warned", what=f"{about} changes the training that {name} has "
                              "already wrapped", remedy=f"put {about} before {name}")
            if layer.units & other.units:
                unit = min(layer.units & other.units)
                yield Finding(check="order", outcome="warned", what=f"{name} and {about} both protect each {unit}",
                              remedy="both are charged and ε adds up; one of them with the noise of both is cheaper")
            if layer.units and not other.units and type(other).protect is not Privacy.protect:
                yield Finding(check="order", outcome="passed", what=f"{about} sees what {name} has made noisy: that "
                              "costs no privacy as long as it looks at nothing else, which 'sensitivity' tries")
