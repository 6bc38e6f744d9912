"""Whether the noise that a technique adds fits what it enters into the ledger: a measurement.

Noise with standard deviation s hides two inputs that move the output by d, in the Euclidean norm, like a Gaussian
mechanism of noise multiplier s / d. This is measured, with the same random numbers for both inputs, and compared with
the ledger. All later processing is held to a consequence of any such guarantee: the expectation of no function f may
differ by more than the standard deviation of f times √χ², where χ² ≤ exp(μ²) − 1 for a Gaussian mechanism of noise
multiplier 1/μ and χ² ≤ exp(ε) − 1 for an ε-private one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import torch

from fedlab.checks.check_report import Battery, Finding
from fedlab.checks.rehearsal import Charge, Rehearsal, Script, Stage, rehearse
from fedlab.checks.small_runs import plain_descent
from fedlab.core.types import Patient, Site, Tensors
from fedlab.core.weights import load_weights
from fedlab.privacy.accounting.mechanisms import Concentrated, Gaussian, Pure, Release

__all__ = ["PRIVACY", "Claim", "check_broadcast", "check_claim", "check_patients", "check_whole", "find_claims"]

PRIVACY = Battery("privacy")
#: Runs with other random numbers from which the noise is estimated.
_RUNS = 12
#: Relative error allowed to the measured influence: several times that of the estimate of the noise.
_SLACK = 0.05
#: Standard errors by which a mean may be off by chance: probability 6e-7.
_ERRORS = 5.0


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The entries of one layer into a ledger in one round, and the place where its output is seen."""

    layer: int  # its place in the technique
    where: Literal["training", "site", "server"]
    charges: tuple[Charge, ...]

    @property
    def mu(self) -> float:
        """1 over the noise multiplier of all entries together; infinite if one of them is no Gaussian noise."""
        return math.sqrt(sum(_twice_rho(release) for release, _ in self.charges))

    @property
    def chi(self) -> float:
        """An upper bound of √χ² between the outputs of two neighbouring inputs."""
        # The second moment of the ratio of densities is at most exp(exponent), and exponents add up.
        exponent = sum(release.epsilon * release.times if isinstance(release, Pure) else _twice_rho(release)
                       for release, _ in self.charges)
        return math.sqrt(math.expm1(min(exponent, 600.0)))

    @property
    def to_zero(self) -> bool:
        """Whether neighbours differ by a contribution that is there or not, rather than by any two."""
        words = self.charges[0].terms.adjacency.lower()
        return "any two" not in words and "replace one" not in words

    def output(self, seen: Rehearsal, number: int, site: str) -> Tensors:
        """The output of the layer in a round."""
        if self.where == "training":
            return seen.trained[number][site]
        if self.where == "server":
            return seen.released[number][self.layer].delta
        steps = [s for s in seen.steps if (s.layer, s.round, s.site) == (self.layer, number, site)]
        return steps[-1].returned.delta  # type: ignore[attr-defined, no-any-return]


def _twice_rho(release: Release) -> float:
    """Twice the ρ of zero-concentrated privacy (Bun and Steinke 2016); infinite for what is no Gaussian noise."""
    if isinstance(release, Gaussian):
        return release.steps / release.noise_multiplier**2
    return 2 * release.rho * release.times if isinstance(release, Concentrated) else math.inf


def find_claims(stage: Stage, seen: Rehearsal) -> list[Claim]:
    """The claims of each layer, and of the aggregation after them, in the first round of a rehearsal."""
    claims = []
    for place in range(len(stage.parts)):
        first = next((s for s in seen.steps if s.layer == place), None)
        hidden = place == len(stage.technique.layers)  # a masked update is seen in the sum only
        found = [Claim(layer=place, where="training", charges=seen.equipped.get(place, ())),
                 Claim(layer=place, where="server" if hidden else "site", charges=first.charged if first else ()),
                 Claim(layer=place, where="server", charges=seen.settled.get(place, ()))]
        claims += [claim for claim in found if claim.charges]
    return claims


def adversarial(like: Tensors) -> dict[str, Tensors]:
    """Updates that reveal themselves through a mechanism without a bound, by a description."""
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
    """One site's update in the first round; all other updates, and those of later rounds, are zero."""
    nothing = {name: torch.zeros_like(t) for name, t in like.items()}
    return lambda name, number: first if name == site and number == 0 else nothing


def check_claim(stage: Stage, claim: Claim) -> Iterator[Finding]:
    """Noise and sensitivity of a claim about updates."""
    stage = stage.alone() if claim.where == "site" else stage
    site, layer, updates = stage.sites[0].name, stage.name(claim.layer), adversarial(stage.like)

    def output(used: Stage, name: str, seed: int) -> Tensors:
        return claim.output(rehearse(used, script=only(site, updates[name], stage.like), seed=seed), 0, site)

    runs = [output(stage, "nothing", seed) for seed in range(_RUNS)]
    # Tensors that are shared at all. Noise that chooses entries need not share any.
    tried = [*runs[:2], *(output(stage, "large everywhere", seed) for seed in (0, 1))]
    shared = {name for tensors in tried for name, t in tensors.items() if t.count_nonzero()}
    noise = _noise(runs, shared, every=math.isfinite(claim.mu), where=layer,
                   entries="every entry of every tensor that is shared, zeros included")
    yield noise
    if noise.outcome == "failed" or not math.isfinite(claim.mu):
        return
    seeded = stage.seeded()
    given = {name: [output(seeded, name, seed) for seed in (0, 1)] for name in updates}
    pairs = [("nothing", name) for name in updates if name != "nothing"] if claim.to_zero else combinations(updates, 2)
    worst, which = _worst(given, pairs, runs)
    yield _sensitivity(worst, claim.mu, f"{layer}, updates {which[0]!r} and {which[1]!r}")


def check_patients(stage: Stage, claim: Claim) -> Iterator[Finding]:
    """Sensitivity of a claim about patients: one of them is replaced by extreme ones, all else stays."""
    load_weights(stage.trainer.model, stage.like)  # the start of the trainer that is made from it
    trainer = replace(stage.trainer, optimiser=plain_descent, lr=1.0, steps=1, epochs=None, augment=None)
    stage = replace(stage.alone(), trainer=trainer)
    (usual, *others), site = stage.sites[0].train, stage.sites[0].name

    def outputs(used: Stage, patient: Patient, seeds: Sequence[int]) -> list[Tensors]:
        changed = replace(used, sites=[Site(site, [patient, *others]), *used.sites[1:]])
        return [claim.output(rehearse(changed, seed=seed), 0, site) for seed in seeds]

    runs = outputs(stage, usual, range(_RUNS))
    noise = _noise(runs, set(stage.like), every=True, where="training",
                   entries="the gradient of every trainable tensor, in every step")
    yield noise
    if noise.outcome == "failed":
        return
    given = {name: outputs(stage.seeded(), change(usual), range(4)) for name, change in _PATIENTS.items()}
    worst, which = _worst(given, combinations(_PATIENTS, 2), runs)
    if worst == 0:
        yield Finding(check="sensitivity", outcome="warned",
                      what="no replacement of the patient had an effect: it was never drawn",
                      remedy="check the technique with a higher sampling rate and all else the same")
        return
    # To replace a patient is to remove one and to add another: twice the change that is charged.
    yield _sensitivity(worst / 2, claim.mu, f"{stage.name(claim.layer)}, {which[0]} and {which[1]}")


def check_whole(stage: Stage, claims: Sequence[Claim]) -> Iterator[Finding]:
    """What finally leaves, in this round and the next, reveals no more of an update than was charged."""
    seen_at_server = stage.aggregation.hides_updates or any(c.where == "server" for c in claims)
    stage = stage if seen_at_server else stage.alone()
    site, updates = stage.sites[0].name, adversarial(stage.like)
    chi = Claim(layer=0, where="site", charges=tuple(c for claim in claims for c in claim.charges)).chi
    direction = {name: t / 1e4 for name, t in updates["large everywhere"].items()}

    def final(seen: Rehearsal, number: int) -> float:
        delta = seen.moved[number].delta if seen_at_server else seen.sent[number][site].delta
        return float(sum((delta[name].double() * d).sum() for name, d in direction.items()))

    runs = [[rehearse(stage, script=only(site, updates[name], stage.like), seed=seed, rounds=2)
             for seed in range(_RUNS)] for name in ("nothing", "large everywhere")]
    for number, when in enumerate(("the round itself", "the round after it")):
        one, other = (torch.tensor([final(seen, number) for seen in group], dtype=torch.float64) for group in runs)
        spread, shift = float((one.var() + other.var()) / 2), float((one.mean() - other.mean()).abs())
        allowed = math.sqrt(spread) * (chi * (1 + _SLACK) + _ERRORS * math.sqrt(2 / _RUNS))
        if shift > max(allowed, 1e-9):
            yield PRIVACY.verdict("whole update", f"the update sent in {when} reveals far more of a large update than "
                                  f"was charged: its sum along the update moves by {shift:.3g}, the ledger allows "
                                  f"{allowed:.3g}", check="sensitivity")
            return
    yield PRIVACY.verdict("whole update", None, check="sensitivity")


def check_broadcast(stage: Stage) -> Iterator[Finding]:
    """What the server sends to the sites beside the weights, such as a clipping norm, sees updates through noise."""
    site, updates = stage.sites[0].name, adversarial(stage.like)

    def broadcast(name: str, seed: int) -> Tensors:
        return rehearse(stage, script=only(site, updates[name], stage.like), seed=seed).broadcast

    usual, others = broadcast("nothing", 0), [broadcast("nothing", seed) for seed in (1, 2)]
    changed = {name: t for kind in ("large everywhere", "ordinary") for name, t in broadcast(kind, 0).items()
               if name not in usual or not torch.equal(t, usual[name])}
    bare = [name for name in changed if all(name in usual and torch.equal(t[name], usual[name]) for t in others)]
    if changed:
        yield PRIVACY.verdict("broadcast", f"the server broadcasts {bare[0]}, which depends on the updates but does "
                              "not vary with the random numbers" if bare else None, check="noise",
                              names=", ".join(changed))


def _noise(runs: Sequence[Tensors], shared: set[str], *, every: bool, where: str, entries: str) -> Finding:
    """Whether shared tensors vary with the random numbers: every entry or, where noise chooses entries, any."""
    silent = []
    for name in sorted(shared):
        moves = torch.stack([run[name].double() for run in runs]).var(dim=0) > 0
        if not (moves.all() if every else moves.any()):
            silent.append(name)
    more = f"; {len(silent)} tensors in all" if len(silent) > 1 else ""
    return PRIVACY.verdict("noise", f"{where} charges the ledger, but its output {silent[0]} does not vary with the "
                           f"random numbers{more}" if silent else None, where=where, entries=entries)


def _sensitivity(worst: float, claimed: float, where: str) -> Finding:
    """Whether the smallest noise multiplier that was measured, 1 / `worst`, is the charged one, 1 / `claimed`."""
    measured = "no noise at all" if math.isinf(worst) else f"a noise multiplier of {1 / max(worst, 1e-99):.3g}"
    charged = f"{1 / claimed:.3g}"
    return PRIVACY.verdict("sensitivity", f"{where}: measured is {measured}, charged is {charged}"
                           if worst > claimed * (1 + _SLACK) else None, where=where, measured=measured, charged=charged)


def _worst(given: Mapping[str, Sequence[Tensors]], pairs: Iterable[tuple[str, str]], runs: Sequence[Tensors]
           ) -> tuple[float, tuple[str, str]]:
    """The pair of inputs whose outputs with equal noise are furthest apart, in standard deviations of the noise."""
    # Of each tensor's entries, over the runs.
    std = {name: math.sqrt(float(torch.stack([run[name].double() for run in runs]).var(dim=0).mean()))
           for name in runs[0]}

    def distance(one: Tensors, other: Tensors) -> float:
        total = 0.0
        for name, t in one.items():
            gap = float((t.double() - other[name].double()).square().sum())
            total += 0.0 if gap == 0 else gap / std[name] ** 2 if std[name] > 0 else math.inf
        return math.sqrt(total)

    return max((distance(one, other), pair) for pair in pairs
               for one, other in zip(given[pair[0]], given[pair[1]], strict=True))


def _with(patient: Patient, *, scale: float = 1.0, label: int | None = None) -> Patient:
    drawn = patient.label if label is None or patient.label is None else torch.full_like(patient.label, label)
    return Patient(patient.id, patient.image * scale, drawn, patient.affine)


#: Changes of a patient; any result may take the place of any other.
_PATIENTS: Mapping[str, Callable[[Patient], Patient]] = {
    "a patient": lambda patient: patient,
    "a scan 10 000 times as bright": lambda patient: _with(patient, scale=1e4),
    "an empty scan": lambda patient: _with(patient, scale=0.0),
    "a scan that is all tumour": lambda patient: _with(patient, label=4),
    "a scan without tumour": lambda patient: _with(patient, label=0),
}
