"""Whether the noise that a technique adds fits what it enters into the ledger, found out by trying.

Noise with standard deviation s hides two inputs that move the output by d, in the Euclidean norm, like a Gaussian
mechanism of noise multiplier s / d. That is measured, with the same random numbers for both inputs, and compared with
what was charged. Anything that is done to the output later is held to what follows from any such guarantee: the
expectation of no function f may differ by more than the standard deviation of f times √χ², where χ² ≤ exp(μ²) − 1 for a
Gaussian mechanism of noise multiplier 1/μ and χ² ≤ exp(ε) − 1 for an ε-private one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from fedlab.checks.check_report import Finding
from fedlab.checks.rehearsal import Charge, Rehearsal, Script, Stage, plain_descent, rehearse
from fedlab.core.types import Patient, Site, Tensors
from fedlab.core.weights import load_weights
from fedlab.privacy.accounting.mechanisms import Concentrated, Gaussian
from fedlab.privacy.base import Privacy

__all__ = ["Claim", "check_broadcast", "check_claim", "check_patients", "check_whole", "find_claims"]

#: Runs with other random numbers from which the noise is estimated.
_RUNS = 12
#: Relative error allowed to the measured influence: several times that of the estimate of the noise.
_SLACK = 0.05
#: Standard errors by which a mean may be off by chance: probability 6e-7.
_ERRORS = 5.0


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What one layer entered into a ledger in one round, and where its output can be seen.

    Attributes:
        layer: its place in the technique.
        where: "training", "site" or "server".
        charges: the entries.
    """

    layer: int
    where: str
    charges: tuple[Charge, ...]

    @property
    def mu(self) -> float:
        """1 over the noise multiplier of all entries together; infinite where one is no Gaussian noise."""
        total = 0.0
        for release, _ in self.charges:
            if isinstance(release, Gaussian):
                total += release.steps / release.noise_multiplier**2
            elif isinstance(release, Concentrated):
                total += 2 * release.rho * release.times
            else:
                return math.inf
        return math.sqrt(total)

    @property
    def chi(self) -> float:
        """The square root of χ² between the outputs of two neighbouring inputs, at most."""
        exponent = 0.0  # the second moment of the ratio of densities is at most exp(exponent), and exponents add up
        for release, _ in self.charges:
            if isinstance(release, Gaussian):
                exponent += release.steps / release.noise_multiplier**2
            elif isinstance(release, Concentrated):
                exponent += 2 * release.rho * release.times
            else:
                exponent += release.epsilon * release.times
        return math.sqrt(math.expm1(min(exponent, 600.0)))

    @property
    def to_zero(self) -> bool:
        """Whether neighbours differ by a contribution that is there or not, rather than by any two."""
        words = self.charges[0].terms.adjacency.lower()
        return "any two" not in words and "replace one" not in words

    def of(self, technique: Privacy, stage: Stage) -> str:
        """The name of the class whose claim it is."""
        return type((*technique.layers, stage.aggregation)[self.layer]).__name__

    def output(self, seen: Rehearsal, number: int, site: str) -> Tensors:
        """What came out of the layer in a round."""
        if self.where == "training":
            return seen.trained[number][site]
        if self.where == "server":
            return seen.released[number][self.layer].delta
        steps = [s for s in seen.steps if (s.layer, s.round, s.site) == (self.layer, number, site)]
        return steps[-1].returned.delta  # type: ignore[attr-defined, no-any-return]


def find_claims(technique: Privacy, seen: Rehearsal) -> list[Claim]:
    """The claims of each layer, and of the aggregation after them, in the first round of a rehearsal."""
    claims = []
    for place in range(len(technique.layers) + 1):
        first = next((s for s in seen.steps if s.layer == place), None)
        hidden = place == len(technique.layers)  # what an aggregation has masked is seen in the sum only
        for where, charges in (("training", seen.equipped.get(place, ())),
                               ("server" if hidden else "site", first.charged if first else ()),
                               ("server", seen.settled.get(place, ()))):
            if charges:
                claims.append(Claim(layer=place, where=where, charges=charges))
    return claims


def adversarial(like: Tensors) -> dict[str, Tensors]:
    """Updates that a mechanism without a bound would give away, by what they are."""
    rng = torch.Generator().manual_seed(0)
    signs = {name: torch.randint(0, 2, t.shape, generator=rng) * 2.0 - 1 for name, t in like.items()}
    largest = max(like, key=lambda name: like[name].numel())
    one = {name: torch.zeros_like(t) for name, t in like.items()}
    one[largest].view(-1)[one[largest].numel() // 2] = 1e6
    return {
        "nothing": {name: torch.zeros_like(t) for name, t in like.items()},
        "large everywhere": {name: 1e4 * t for name, t in signs.items()},
        "the opposite": {name: -1e4 * t for name, t in signs.items()},
        "one huge entry": one,
        "tiny": {name: 1e-12 * t for name, t in signs.items()},
        "ordinary": {name: 0.01 * torch.randn(t.shape, generator=rng) for name, t in like.items()},
    }


def only(site: str, first: Tensors, like: Tensors) -> Script:
    """One site's update in the first round; everybody else, and every later round, has nothing to say."""
    nothing = {name: torch.zeros_like(t) for name, t in like.items()}
    return lambda name, number: first if name == site and number == 0 else nothing


def check_claim(technique: Privacy, seeded: tuple[Privacy, Stage], stage: Stage, claim: Claim) -> Iterator[Finding]:
    """Noise and sensitivity of a claim about updates; `seeded` are technique and stage with noise that repeats."""
    site, like = stage.sites[0].name, stage.like
    if claim.where == "site":
        stage = stage.alone()
    updates = adversarial(like)
    layer = claim.of(technique, stage)
    runs = [claim.output(rehearse(technique, stage, script=only(site, updates["nothing"], like), seed=seed), 0, site)
            for seed in range(_RUNS)]
    shared = _shared(claim, technique, stage, updates, site)
    silent = _silent(runs, shared, every=math.isfinite(claim.mu))
    if silent:
        yield Finding(check="noise", outcome="failed",
                      what=f"{layer} charges the ledger, but what it gives of {silent[0]} doesn't vary with the "
                           "random numbers" + (f"; {len(silent)} tensors in all" if len(silent) > 1 else ""),
                      remedy="add noise to every entry of every tensor that is shared, zeros included")
        return
    yield Finding(check="noise", outcome="passed", what=f"{layer}: every shared tensor gets noise")
    if not math.isfinite(claim.mu):
        return
    std = _std(runs)
    names = ("nothing", "large everywhere", "the opposite", "one huge entry", "tiny", "ordinary")
    calm = seeded[1].alone() if claim.where == "site" else seeded[1]
    given = {name: [claim.output(rehearse(seeded[0], calm, script=only(site, updates[name], like), seed=seed), 0, site)
                    for seed in (0, 1)] for name in names}
    pairs = [("nothing", name) for name in names[1:]] if claim.to_zero else combinations(names, 2)
    worst, which = max((_distance(one, other, std), pair) for pair in pairs
                       for one, other in zip(given[pair[0]], given[pair[1]], strict=True))
    yield _judged(worst, claim.mu, f"{layer}, updates {which[0]!r} and {which[1]!r}")


def check_patients(technique: Privacy, seeded: tuple[Privacy, Stage], stage: Stage, claim: Claim) -> Iterator[Finding]:
    """Sensitivity of a claim about patients: one of them is replaced by extreme ones, all else stays."""
    load_weights(stage.trainer.model, stage.like)  # the start of the trainer that is made from it
    trainer = replace(stage.trainer, optimiser=plain_descent, lr=1.0, steps=1, epochs=None, augment=None)
    alone = stage.alone().sites
    site = alone[0].name

    def outputs(tried: Privacy, patient: Patient, seeds: Sequence[int]) -> list[Tensors]:
        first = Site(site, [patient, *list(alone[0].train)[1:]], alone[0].val)
        aggregation = stage.aggregation if tried is technique else seeded[1].aggregation
        changed = replace(stage, trainer=trainer, sites=[first, *alone[1:]], aggregation=aggregation)
        return [claim.output(rehearse(tried, changed, seed=seed), 0, site) for seed in seeds]

    usual = alone[0].train[0]
    runs = outputs(technique, usual, range(_RUNS))
    silent = _silent(runs, set(stage.like), every=True)
    if silent:
        yield Finding(check="noise", outcome="failed",
                      what=f"training charges the ledger, but the change of {silent[0]} doesn't vary with the random "
                           "numbers", remedy="add noise to the gradient of every trainable tensor, in every step")
        return
    yield Finding(check="noise", outcome="passed", what="every trained tensor gets noise")
    std = _std(runs)
    given = {name: outputs(seeded[0], change(usual), range(4)) for name, change in _PATIENTS.items()}
    worst, which = max((_distance(one, other, std), pair) for pair in combinations(_PATIENTS, 2)
                       for one, other in zip(given[pair[0]], given[pair[1]], strict=True))
    if worst == 0:
        yield Finding(check="sensitivity", outcome="warned",
                      what="no patient was replaced with any effect: the one tried was never drawn",
                      remedy="check with a higher sampling rate, which is otherwise no different")
        return
    # Replacing a patient is taking one away and adding another: twice what is charged for.
    layer = claim.of(technique, stage)
    yield _judged(worst / 2, claim.mu, f"{layer}, {which[0]} in place of {which[1]}")


def check_whole(technique: Privacy, stage: Stage, claims: Sequence[Claim]) -> Iterator[Finding]:
    """What finally leaves, in this round and the next, tells no more of an update than was charged for."""
    site, like = stage.sites[0].name, stage.like
    seen_at_server = stage.aggregation.hides_updates or any(c.where == "server" for c in claims)
    if not seen_at_server:
        stage = stage.alone()
    chi = Claim(layer=0, where="site", charges=tuple(c for claim in claims for c in claim.charges)).chi
    updates = adversarial(like)
    direction = {name: t / 1e4 for name, t in updates["large everywhere"].items()}

    def final(seen: Rehearsal, number: int) -> float:
        delta = seen.moved[number].delta if seen_at_server else seen.sent[number][site].delta
        return float(sum((delta[name].double() * d).sum() for name, d in direction.items()))

    runs = {name: [rehearse(technique, stage, script=only(site, updates[name], like), seed=seed, rounds=2)
                   for seed in range(_RUNS)] for name in ("nothing", "large everywhere")}
    for number, when in ((0, "the round itself"), (1, "the round after it")):
        one, other = (torch.tensor([final(seen, number) for seen in group], dtype=torch.float64)
                      for group in runs.values())
        spread, shift = float((one.var() + other.var()) / 2), float((one.mean() - other.mean()).abs())
        allowed = math.sqrt(spread) * (chi * (1 + _SLACK) + _ERRORS * math.sqrt(2 / _RUNS))
        if shift > max(allowed, 1e-9):
            yield Finding(
                check="sensitivity", outcome="failed",
                what=f"what leaves in {when} tells far more of a large update than was charged for: its sum along "
                     f"the update moves by {shift:.3g}, at most {allowed:.3g} follows from the ledger",
                remedy="clip what noise is added to; after the noise touch neither the update as it was nor anything "
                       "remembered from it")
            return
    yield Finding(check="sensitivity", outcome="passed",
                  what="what finally leaves, this round and the next, tells no more than was charged for")


def check_broadcast(technique: Privacy, stage: Stage) -> Iterator[Finding]:
    """What the server tells the sites beside the weights, such as a clipping norm, knows updates through noise only."""
    site, like = stage.sites[0].name, stage.like
    updates = adversarial(like)

    def told(name: str, seed: int) -> Tensors:
        return rehearse(technique, stage, script=only(site, updates[name], like), seed=seed).broadcast

    usual, others = told("nothing", 0), [told("nothing", seed) for seed in (1, 2)]
    changed = {name: t for kind in ("large everywhere", "ordinary") for name, t in told(kind, 0).items()
               if name not in usual or not torch.equal(t, usual[name])}
    bare = [name for name in changed if all(name in usual and torch.equal(t[name], usual[name]) for t in others)]
    if bare:
        yield Finding(check="noise", outcome="failed",
                      what=f"the server broadcasts {bare[0]}, which depends on the updates but doesn't vary with the "
                           "random numbers",
                      remedy="add noise to what it is computed from, and charge the ledger for it")
    elif changed:
        yield Finding(check="noise", outcome="passed",
                      what=f"what the server broadcasts ({', '.join(changed)}) gets noise")


def _judged(worst: float, claimed: float, where: str) -> Finding:
    if worst > claimed * (1 + _SLACK):
        measured = "no noise at all" if math.isinf(worst) else f"a noise multiplier of {1 / worst:.3g}"
        return Finding(check="sensitivity", outcome="failed",
                       what=f"{where}: the noise is that of {measured}, the ledger was charged for "
                            f"{1 / claimed:.3g}",
                       remedy="bound the Euclidean norm of what noise is added to (clip), and let the noise be the "
                              "charged multiplier times the bound; with adjacency 'any two' the sensitivity is twice "
                              "the clip")
    return Finding(check="sensitivity", outcome="passed",
                   what=f"{where}: worst case is a noise multiplier of {1 / worst:.3g}, charged is {1 / claimed:.3g}")


def _distance(one: Tensors, other: Tensors, std: Mapping[str, float]) -> float:
    """How far two outputs with the same noise are apart, in standard deviations of the noise."""
    total = 0.0
    for name, t in one.items():
        gap = float((t.double() - other[name].double()).square().sum())
        total += 0.0 if gap == 0 else gap / std[name] ** 2 if std[name] > 0 else math.inf
    return math.sqrt(total)


def _std(runs: Sequence[Tensors]) -> dict[str, float]:
    """Standard deviation of each tensor's entries over the runs."""
    return {name: math.sqrt(float(torch.stack([run[name].double() for run in runs]).var(dim=0).mean()))
            for name in runs[0]}


def _silent(runs: Sequence[Tensors], shared: set[str], *, every: bool) -> list[str]:
    """Shared tensors without noise, on any entry or, where noise chooses entries, on all."""
    out = []
    for name in sorted(shared):
        moves = torch.stack([run[name].double() for run in runs]).var(dim=0) > 0
        if not (moves.all() if every else moves.any()):
            out.append(name)
    return out


def _shared(claim: Claim, technique: Privacy, stage: Stage, updates: Mapping[str, Tensors], site: str) -> set[str]:
    """Tensors of which anything comes through at all; of a noise that chooses, none need."""
    found: set[str] = set()
    for name in ("large everywhere", "nothing"):
        for seed in (0, 1):
            seen = rehearse(technique, stage, script=only(site, updates[name], stage.like), seed=seed)
            found |= {key for key, t in claim.output(seen, 0, site).items() if t.count_nonzero()}
    return found


def _with(patient: Patient, *, scale: float = 1.0, label: int | None = None) -> Patient:
    drawn = patient.label if label is None or patient.label is None else torch.full_like(patient.label, label)
    return Patient(patient.id, patient.image * scale, drawn, patient.affine)


#: Patients of whom one takes the place of another.
_PATIENTS: Mapping[str, Callable[[Patient], Patient]] = {
    "a patient": lambda patient: patient,
    "a scan 10 000 times as bright": lambda patient: _with(patient, scale=1e4),
    "an empty scan": lambda patient: _with(patient, scale=0.0),
    "a scan all tumour": lambda patient: _with(patient, label=4),
    "a scan without tumour": lambda patient: _with(patient, label=0),
}
