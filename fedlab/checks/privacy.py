"""Does a privacy technique keep its promises? A battery of checks for authors of techniques, as in a notebook cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from fedlab.checks.check_report import CheckReport, Finding
from fedlab.checks.claims import PRIVACY, Claim, find_claims
from fedlab.checks.influence import check_updates
from fedlab.checks.patients import check_patients
from fedlab.checks.rehearsal import DECOY, Stage, make_stage, rehearse
from fedlab.checks.small_runs import lost_settings, other_random_numbers
from fedlab.checks.watched import Rehearsal
from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError, SiteError
from fedlab.core.gate import check_update
from fedlab.core.global_generators import seeded
from fedlab.core.protocols import Strategy
from fedlab.core.types import Site, Tensors
from fedlab.privacy.accounting.mechanisms import Gaussian
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.at_sites import AtSites
from fedlab.privacy.base import Privacy, technique_at
from fedlab.run.recipe import recipe_sha256
from fedlab.training.trainer import SiteTrainer

__all__ = ["check_privacy"]


def check_privacy(technique: Privacy | Aggregation, *, trainer: SiteTrainer | None = None,
                  sites: Sequence[Site] | None = None, strategy: Strategy | None = None,
                  aggregation: Aggregation | None = None, raise_: bool = True) -> CheckReport:
    """Puts a technique, or several joined by `+`, through small federated runs and observes them.

    The checks, by name:
        "fits the run": it works with the trainer, the sites and the strategy; three rounds end, the last of them with
            the number 100, so that a schedule shows.
        "shapes and names": protect() returns an `Update` with the tensors of its input.
        "purity": it changes neither its input nor itself, the sites or the weights.
        "state": it writes tensors, into its own namespace.
        "settings": they are attributes, so that runs with other settings can be told apart.
        "determinism": one seed gives the same numbers, whatever else drew random numbers before.
        "fails closed": nothing is sent after NaN, missing, unknown or misshapen tensors.
        "ledger": a technique with `units` charges every round and states what is spent.
        "budget": with `max_epsilon`, a site withdraws before it would exceed it, in the first round and in the next.
        "charges": every round and every step is charged, at no lower rate than sites are drawn with.
        "noise": every entry of every tensor under a charge varies with the random numbers, but for entries that are 0
            in every round, as under a mask that everyone knows.
        "sensitivity": the noise is the charged one for any update or patient, adversarial ones included, by the L2
            norm for Gaussian noise and the L1 norm for Laplace noise; and what finally leaves, at the site or from the
            server, after all techniques, tells two updates or patients apart no better than was charged: by sums,
            norms, zeros, signs, the last places of numbers and the steps between them, in three rounds.
        "independent draws": noise is drawn anew for every entry, tensor, step, round and site, and none gets less.
        "law of the noise": it is Gaussian where that is charged, and has no lighter tails than Laplace noise where an ε
            without δ is.
        "draws": each patient is drawn independently in every step, with the charged probability.
        "beside the update": weight, steps, sizes, metrics, types, what is spent, whether anything is sent, and all else
            of an update or of the server's broadcast depends on it no more than was charged.
        "order": what to know about techniques in this order.

    The checks find mistakes; they prove nothing. Statistical ones are seeded; a bound is exceeded by chance with
    probability below 1e-9, and benchmarks/check_privacy.py counts how often right techniques are refused.

    Args:
        technique: used as it is, not copied; it must come out unchanged. An aggregation is checked by itself, and of
            an `AtSites` all that works at its sites.
        trainer: with a network of the kind that the technique is for; by default a SegResNet of two levels,
            for a guarantee per patient two convolutions.
        sites: by default three of noise, or as many as the secure aggregation needs, with patients enough for the
            technique's attribute `batch`.
        strategy: `FedAvg(weights="uniform")` by default.
        aggregation: that it works with, such as `SecureAggregation(threshold=2)`; in the open by default.
        raise_: raise if a check fails; otherwise read the report.

    Returns:
        The report, true if no check failed.

    Raises:
        PrivacyError: a check failed; the message is the report.
        ValueError: `technique` is not a `Privacy`, or is for other sites than `sites`.

    Example:
        >>> class Leaky(fl.Privacy):
        ...     units = frozenset({"site"})  # claims a guarantee, adds no noise
        >>> bool(fl.check_privacy(Leaky(), raise_=False))
        False
    """
    if isinstance(technique, Aggregation):
        aggregation, technique = technique, Privacy()
    if not isinstance(technique, Privacy):
        raise ValueError(f"a technique is an object of a class derived from fedlab.Privacy, got {technique!r}"
                         + ("; make one: put brackets behind its name" if isinstance(technique, type) else ""))
    aggregation = Aggregation() if aggregation is None else aggregation
    with seeded():
        findings = [finding for part in _at_each_site(technique, sites) for finding in _findings(
            make_stage(part, trainer=trainer, sites=sites, strategy=strategy, aggregation=aggregation))]
    parts = [part for part in (technique, aggregation) if type(part) not in (Privacy, Aggregation)]
    report = CheckReport(" with ".join(map(repr, parts or [technique])), findings)
    if raise_ and not report:
        raise PrivacyError(str(report))
    return report


def _at_each_site(technique: Privacy, sites: Sequence[Site] | None) -> list[Privacy]:
    """What the technique is at the sites, once each; the technique itself where sites do not differ."""
    named = [name for layer in technique.layers if isinstance(layer, AtSites) for name in layer.sites]
    names = named if sites is None else [site.name for site in sites]
    if unknown := sorted(set(named) - set(names)):
        raise ValueError(f"{technique!r} is for the sites {unknown}, which are not among the given {names}; give sites "
                         "of these names, or leave sites out")
    found = {repr(part): part for part in (technique_at(technique, name) for name in names)}
    return [part for part in found.values() if type(part) is not Privacy] or [technique]


def _findings(stage: Stage) -> Iterator[Finding]:
    yield _settings(stage)
    yield from _order(stage)
    before = _outside(stage)
    real = rehearse(stage.unlimited(), rounds=3, catch=True)
    shapes, kept = _shapes(stage, real), _state(real)
    yield shapes
    yield from _purity(stage, real, before)
    yield kept
    if real.error is not None:
        if shapes.outcome == kept.outcome == "passed":
            yield _cause(real.error)
        return
    yield PRIVACY.verdict("fits the run", None)
    repeats, claims = _determinism(stage), find_claims(stage, real)
    yield repeats
    yield _fails_closed(stage)
    ledger = list(_ledger(stage, real, claims))
    yield from ledger
    # If two runs differ nothing can be told apart from chance; a wrong ledger has no charges to compare with.
    if repeats.outcome == "passed" and all(finding.outcome != "failed" for finding in ledger):
        yield from _claims(stage, claims)


def _claims(stage: Stage, claims: Sequence[Claim]) -> Iterator[Finding]:
    """Whether charges, noise and sensitivity are what they should be."""
    wrong = _charges(stage, claims)
    yield PRIVACY.verdict("charges", wrong)
    if wrong:
        return
    for claim in claims:
        if claim.where == "training":
            yield from check_patients(stage, claim)
    about_updates = [claim for claim in claims if claim.where != "training"]
    if about_updates:
        yield from check_updates(stage, about_updates)


def _charges(stage: Stage, claims: Sequence[Claim]) -> str | None:
    """What is wrong with the entries as such."""
    drawn = float(getattr(stage.strategy, "sample", 1.0))
    for claim in claims:
        name = stage.name(claim.layer)
        missed = [number + 1 for number, charges in enumerate(claim.rounds) if not charges]
        rate = min((release.sample_rate for charges in claim.rounds for release, _ in charges
                    if isinstance(release, Gaussian)), default=1.0)
        if missed:
            return f"{name} charges some rounds but not round {missed[0]}"
        if claim.where == "site" and rate < 1:
            return (f"{name} charges its noise on updates at a sample rate of {rate:g}, but a site that sends an "
                    "update takes part in the round with all of it, and the server sees that it does")
        if claim.where == "server" and rate < drawn * (1 - 1e-9):
            return f"{name} charges a sample rate of {rate:g}, but the strategy draws each site with {drawn:g}"
    return None


def _cause(error: Exception) -> Finding:
    """What ended the rehearsal, under the name of the check that it belongs to."""
    what = f"{type(error).__name__}: {error}"
    if isinstance(error, PrivacyError) and "entered nothing into the ledger" in str(error):
        return Finding(check="ledger", outcome="failed", what=what,
                       remedy="charge Ledger(state) in equip() or protect() before noise is added")
    if isinstance(error, PrivacyError) and str(error).startswith("release() states"):
        return Finding(check="ledger", outcome="failed", what=what,
                       remedy="charge Ledger(state) of the state that release() is given, in every round, and return "
                              "dataclasses.replace(mean, spent=ledger.spent())")
    return PRIVACY.verdict("fits the run", what)


def _settings(stage: Stage) -> Finding:
    lost = [f"{type(layer).__name__}.{name}" for layer in stage.technique.layers for name in lost_settings(layer)]
    return PRIVACY.verdict("settings", f"{', '.join(lost)} cannot be read from the technique" if lost else None,
                           otherwise="warned", technique=repr(stage.technique))


def _shapes(stage: Stage, seen: Rehearsal) -> Finding:
    wrong = None
    for step in seen.steps:
        if step.layer < len(stage.technique.layers) and wrong is None:
            try:
                check_update(step.returned, like=step.given, buffers=step.buffers, site=step.site)
            except PrivacyError as error:
                wrong = f"{stage.name(step.layer)}.protect(): {error}"
    return PRIVACY.verdict("shapes and names", wrong)


def _outside(stage: Stage) -> dict[str, str]:
    """Hashes of everything that a technique is given and must not change."""
    return {
        **{f"{type(layer).__name__}.{name}": recipe_sha256(value) for layer in stage.technique.layers
           for name, value in vars(layer).items()},
        **{f"the scan of {p.id}": recipe_sha256(p.image) for site in stage.sites for p in list(site.train)[:2]},
        **{f"the first weights, {name}": recipe_sha256(t) for name, t in stage.like.items()},
    }


def _purity(stage: Stage, seen: Rehearsal, before: Mapping[str, str]) -> Iterator[Finding]:
    in_place = next((f"{stage.name(s.layer)} changes {s.in_place[0]} of its input in place"
                     for s in seen.steps if s.in_place), None)
    after = _outside(stage)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    public = [name for name in changed if not name.rpartition(".")[2].startswith("_")]
    if in_place or not changed:
        yield PRIVACY.verdict("purity", in_place)
    if public:
        yield Finding(check="purity", outcome="failed", what=f"a round changes {', '.join(public[:3])}",
                      remedy="keep what changes from round to round in state.own: one technique serves all sites, and "
                             "a resumed run has only the states")
    elif changed:
        yield Finding(check="purity", outcome="warned", what=f"a round changes {', '.join(changed[:3])}",
                      remedy="acceptable for values that can be computed anew; all else belongs in state.own")


def _state(seen: Rehearsal) -> Finding:
    foreign = sorted({owner for step in seen.steps for owner in step.foreign} | set(seen.foreign))
    gone = any(DECOY not in state.namespaces for state in seen.states.values())
    where = ", ".join(map(repr, foreign)) or "an existing namespace"
    return PRIVACY.verdict("state", f"writes into {where}, which is not its own, or something other than tensors by "
                           "name" if foreign or gone else None)


def _determinism(stage: Stage) -> Finding:
    runs = []
    for number in (1, 2):
        with other_random_numbers(number):
            runs.append(rehearse(stage, rounds=2))
    one, other = runs
    hidden = stage.aggregation.hides_updates  # masks are fresh; the sum is what repeats
    same = all(recipe_sha256(one.moved[k].delta) == recipe_sha256(other.moved[k].delta) for k in one.moved) and (
        hidden or all(recipe_sha256(update.delta) == recipe_sha256(other.sent[k][site].delta)
                      for k, sent in one.sent.items() for site, update in sent.items()))
    secure = any(getattr(part, "secure_mode", False) for part in stage.parts)
    if same and one.unseeded:
        return Finding(check="determinism", outcome="failed", what=f"{stage.name(min(one.unseeded))} enters its noise "
                       "as one that does not repeat with the seed, but the same seed gives the same numbers",
                       remedy="take the noise from the operating system, or leave repeatable and seeded of "
                              "Ledger.charge() as they are: the guarantee then says that the noise repeats")
    return PRIVACY.verdict("determinism", None if same or secure else "two runs with the same seed differ", what=
                           "the same seed gives the same numbers" if same else
                           "no two runs are alike, as secure_mode intends")


def _fails_closed(stage: Stage) -> Finding:
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
    sent, unclear = [], []
    for what, make in bad.items():
        delta = make()
        seen = rehearse(stage, script=lambda site, number, delta=delta: delta, catch=True)  # type: ignore[misc]
        if seen.error is None or seen.sent.get(0):
            sent.append(what)
        elif not isinstance(seen.error, PrivacyError | SiteError):
            unclear.append(f"{what}: {type(seen.error).__name__}")
    if unclear and not sent:
        return Finding(check="fails closed", outcome="warned", what=f"nothing was sent, but {'; '.join(unclear)}",
                       remedy="raise PrivacyError with what to do")
    return PRIVACY.verdict("fails closed", f"an update was sent although the trained one had {', '.join(sent)}"
                           if sent else None)


def _with_entry(t: torch.Tensor, value: float) -> torch.Tensor:
    out = t.clone()
    out.view(-1)[0] = value
    return out


def _ledger(stage: Stage, seen: Rehearsal, claims: Sequence[Claim]) -> Iterator[Finding]:
    server = [claim for claim in claims if seen.settled.get((0, claim.layer))]
    if any(not seen.released[0][claim.layer].spent for claim in server):
        yield Finding(check="ledger", outcome="failed", what="the server's ledger is charged but nothing is stated",
                      remedy="return dataclasses.replace(mean, spent=ledger.spent()) from release()")
        return
    units = stage.technique.units | stage.aggregation.units
    if not units:
        yield PRIVACY.verdict("ledger", "charges the sites' ledgers but names no units" if claims and not server else
                              None, otherwise="warned", what="a guarantee through noise at the server, stated every "
                              "round" if server else "no formal guarantee is claimed")
        return
    extra = {charge.terms.unit for claim in claims for charge in claim.charges if claim not in server} - set(units)
    if extra:
        yield Finding(check="ledger", outcome="warned", what=f"also charges for {sorted(extra)}, not named in units",
                      remedy="name them too, so that a round without the charge is refused")
    for terms in {charge.terms for claim in claims for charge in claim.charges}:
        many = len(stage.sites) if terms.unit == "site" else len(stage.sites[0].train)
        if terms.delta >= 1 / many:
            yield Finding(check="ledger", outcome="failed", what=f"delta is {terms.delta:g} with {many} {terms.unit}s: "
                          f"giving one {terms.unit} away entirely would satisfy the guarantee",
                          remedy="choose delta below 1 over their number; Terms.check_delta refuses others in check()")
            return
    stated = {spent.unit for sent in seen.sent.values() for update in sent.values() for spent in update.spent}
    yield Finding(check="ledger", outcome="passed",
                  what=f"every round is charged and states what is spent per {' and per '.join(sorted(stated))}")
    yield _budget(stage, *([s.epsilon for update in seen.sent[number].values() for s in update.spent]
                           for number in range(2)))


def _budget(stage: Stage, once: Sequence[float], twice: Sequence[float]) -> Finding:
    """Whether a site withdraws at a budget of a quarter of the ε of one round, and at one between one round and two."""
    limited = [part for part in stage.parts if part.units and hasattr(part, "max_epsilon")]
    if not limited:
        return Finding(check="budget", outcome="warned", what="no site can set a budget",
                       remedy="take max_epsilon=None as an argument and pass it to Ledger.charge(max_epsilon=...)")
    def tried_with(budget: float, rounds: int) -> Rehearsal:
        return rehearse(stage.remade(lambda part: {"max_epsilon": budget} if part in limited else {}), rounds=rounds,
                        checked=False, catch=True)

    tried = tried_with(min(once) / 4, 1)
    # An aggregation refuses when it is bound to the run, before the first round.
    refused = (PrivacyBudgetExhausted, *([ValueError] if stage.aggregation.units else []))
    ended = "an update was sent" if tried.error is None else f"the run ended with {tried.error!r}"
    if not isinstance(tried.error, refused) or tried.sent.get(0):
        return PRIVACY.verdict("budget", f"with max_epsilon at a quarter of the cost of a round, {ended}")
    late = max(once) < min(twice) and tried_with((max(once) + min(twice)) / 2, 3).sent.get(1)
    return PRIVACY.verdict("budget", "with max_epsilon between the cost of one round and of two, an update was sent in "
                           "the second" if late else None)


def _order(stage: Stage) -> Iterator[Finding]:
    """What to know about the order, from the attributes of the layers."""
    def warned(what: str, remedy: str) -> Finding:
        return Finding(check="order", outcome="warned", what=what, remedy=remedy)

    layers = stage.technique.layers
    for place, layer in enumerate(layers):
        name = type(layer).__name__
        if "site" in layer.units and stage.aggregation.hides_updates:
            yield warned(f"every site adds the noise of {name} before {stage.name(-1)} forms the sum",
                         "the guarantee holds, with as many noises in the sum as there are sites; secure "
                         "aggregation's own noise is in the sum only once")
        for other in layers[place + 1:]:
            about = type(other).__name__
            if layer.units and getattr(other, "error_feedback", False):
                yield warned(f"{about} remembers what it left out of {name}'s noise and sends it later",
                             f"it costs no privacy, but {about} before {name} would remember the update")
            if "patient" in layer.units and type(other).equip is not Privacy.equip:
                yield warned(f"{about} changes the training that {name} has already wrapped",
                             f"put {about} before {name}")
            if layer.units & other.units:
                yield warned(f"{name} and {about} both protect each {min(layer.units & other.units)}",
                             "both are charged and ε adds up; one of them with the noise of both is cheaper")
            if layer.units and not other.units and type(other).protect is not Privacy.protect:
                yield Finding(check="order", outcome="passed", what=f"{about} receives the noisy updates of {name}: "
                              "this costs no privacy if it uses nothing else, which 'sensitivity' tries")
