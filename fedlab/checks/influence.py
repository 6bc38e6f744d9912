"""Whether the noise that a technique adds to updates fits what it enters into the ledger: a measurement.

Noise with standard deviation s hides two inputs that move the output by d, in the Euclidean norm, like a Gaussian
mechanism of noise multiplier s / d. This is measured, with the same random numbers for both inputs, and compared with
the ledger. All later processing is held to a consequence of any such guarantee: the expectation of no function f may
differ by more than the standard deviation of f times √χ², where χ² ≤ exp(μ²) − 1 for a Gaussian mechanism of noise
multiplier 1/μ; and no event may become likelier than the releases' Rényi divergences allow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch

from fedlab.checks.check_report import Finding
from fedlab.checks.claims import PRIVACY, Claim, allowed_of, chi_of
from fedlab.checks.leaks import differing, moved_far, statistics, suspects
from fedlab.checks.noise_law import least_distance
from fedlab.checks.noise_tests import Noise, check_noise, check_sites, only_shifted
from fedlab.checks.rehearsal import Stage, other_patient
from fedlab.checks.samples import Outcome, Samples, Sketch, View, collect
from fedlab.checks.watched import Rehearsal, Script
from fedlab.core.types import Tensors

__all__ = ["check_updates"]

Floats = npt.NDArray[np.float64]

#: Rounds; runs with other random numbers, after a first round with a large update, and of what is looked at again.
_ROUNDS, _RUNS, _RUNS_AFTER, _RUNS_AGAIN = 3, 48, 16, 160
#: Norms of updates that are tried, all their entries of equal size.
_NORMS = (1e-3, 0.03, 0.3, 1.5, 5.0, 30.0, 1e3)
#: Error of the measured distance of what rounds single precision.
_SLACK = 0.003


@dataclass(frozen=True)
class _Inputs:
    """Updates that reveal themselves through a mechanism without a bound, by a description."""

    updates: Mapping[str, Tensors]
    equal: frozenset[str]  # those whose entries have one size within each tensor
    signs: Floats  # of the kept entries of all large ones
    heavy: npt.NDArray[np.bool_]  # the kept entries of "large, unequal" that are three times as large

    @classmethod
    def of(cls, like: Tensors, sketch: Sketch) -> _Inputs:
        rng = torch.Generator().manual_seed(0)
        signs = {name: torch.randint(0, 2, t.shape, generator=rng) * 2.0 - 1 for name, t in like.items()}
        heavy = {name: torch.randint(0, 2, t.shape, generator=rng) * 1.0 for name, t in like.items()}
        zeros = {name: torch.zeros_like(t) for name, t in like.items()}
        size = math.sqrt(sum(t.numel() for t in like.values()))
        largest, names = max(like, key=lambda name: like[name].numel()), list(like)
        ladder = {f"of norm {norm:g}": {name: norm / size * t for name, t in signs.items()} for norm in _NORMS}
        alone = {f"large in {name} only": {**zeros, name: 1e4 * signs[name]}
                 for name in dict.fromkeys([names[0], names[-1], min(like, key=lambda name: like[name].numel())])}
        updates = {
            "nothing": zeros,
            "large everywhere": {name: 1e4 * t for name, t in signs.items()},
            "the opposite": {name: -1e4 * t for name, t in signs.items()},
            "one huge entry": one_entry(zeros, sketch, largest, len(sketch.places[largest]) // 2),
            "tiny": {name: 1e-12 * t for name, t in signs.items()},
            "ordinary": {name: 0.01 * torch.randn(t.shape, generator=rng) for name, t in like.items()},
            "large, unequal": {name: 1e4 * (1 + 2 * heavy[name]) * t for name, t in signs.items()}, **ladder, **alone}
        return cls(updates, frozenset({"nothing", "large everywhere", "the opposite", "tiny", *ladder, *alone}),
                   sketch.take(signs), sketch.take(heavy) > 0)


def one_entry(zeros: Tensors, sketch: Sketch, name: str, place: int, value: float = 1e6) -> Tensors:
    """Zeros but for one of the kept entries of a tensor."""
    changed = zeros[name].clone()
    changed.view(-1)[int(sketch.places[name][place])] = value
    return {**zeros, name: changed}


def only(site: str, chosen: Mapping[int, Tensors], zeros: Tensors) -> Script:
    """One site's updates in some rounds; all other updates are zero."""
    return lambda name, number: chosen.get(number, zeros) if name == site else zeros


def check_updates(stage: Stage, claims: Sequence[Claim]) -> Iterator[Finding]:
    """Noise and sensitivity of claims about updates, and everything that leaves under them."""
    watch = _Watch(stage, claims)
    good = True
    for part in (watch.noise(), watch.sensitivity(), watch.laws(), watch.leaving()):
        for finding in part:
            good &= finding.outcome != "failed"
            yield finding
        if not good:  # what is wrong is told once, by the check that is nearest to it
            return
    if stage.technique.works_at_server and not watch.at_server:
        # What leaves the sites is covered; the server's part may not take the noise off again.
        yield from (found for found in _Watch(stage, claims, moved=True).leaving() if found.outcome == "failed")


class _Watch:
    """The rehearsals of one stage, shared by all checks."""

    def __init__(self, stage: Stage, claims: Sequence[Claim], *, moved: bool = False) -> None:
        self.claims, self.everyone, self.moved = claims, stage.unlimited(), moved
        hidden = stage.aggregation.hides_updates
        self.at_server = hidden or any(claim.where == "server" for claim in claims)
        self.stage = self.everyone if self.at_server else self.everyone.alone()
        self.repeating = self.stage.seeded()
        self.site = stage.sites[0].name
        self.views: list[View] = [self._view(claim) for claim in claims] + [self._final]
        self.sketch = Sketch.of(stage.like)
        self.inputs = _Inputs.of(stage.like, self.sketch)
        self.zeros = self.inputs.updates["nothing"]
        if all(math.isfinite(claim.mu) for claim in claims):  # other noise may leave any entry out by chance
            self.sketch = self.sketch.without(self._masked())
            self.inputs = _Inputs.of(stage.like, self.sketch)
        self.runs = _RUNS // 2 if hidden else _RUNS  # masks take time
        self.quiet = self._collect({}, runs=self.runs)
        once = {name: self._coupled({0: update}) for name, update in self.inputs.updates.items()}
        self.once = {name: shown for name, (shown, _) in once.items()}
        self.beside = {name: beside for name, (_, beside) in once.items()}

    def _view(self, claim: Claim) -> View:
        return lambda seen, number: claim.output(seen, number, self.site)

    def _final(self, seen: Rehearsal, number: int) -> Tensors:
        return seen.moved[number].delta if self.at_server or self.moved else seen.sent[number][self.site].delta

    def _collect(self, chosen: Mapping[int, Tensors], *, runs: int, start: int = 0, others: bool = False) -> Samples:
        """With `others` the site has other patients, too: of them nothing but the update may tell."""
        stage, (first, *rest) = self.stage, self.stage.sites
        if others:
            stage = replace(stage, sites=[replace(first, train=[*map(other_patient, first.train)],
                                                  val=[*map(other_patient, first.val)]), *rest])
        return collect(stage, only(self.site, chosen, self.zeros), seeds=range(start, start + runs),
                       rounds=_ROUNDS, views=self.views, sketch=self.sketch, site=self.site, at_server=self.at_server)

    def _masked(self) -> npt.NDArray[np.bool_]:
        """Which entries are 0 in all rounds, with and without an update, as under a mask that does not depend on it."""
        large = dict.fromkeys(range(_ROUNDS), self.inputs.updates["large everywhere"])
        seen = [one for chosen in ({}, large) for one in self._coupled(chosen, _ROUNDS)[0]]
        zero: npt.NDArray[np.bool_] = np.all([(one == 0).all(axis=(0, 1)) for one in seen], axis=0)
        return zero

    def _coupled(self, chosen: Mapping[int, Tensors], rounds: int = 1) -> tuple[list[Floats], list[Outcome]]:
        """With two seeds that repeat: what each view shows, (2, rounds, entries), and what is sent beside it."""
        seen = collect(self.repeating, only(self.site, chosen, self.zeros), seeds=range(2), rounds=rounds,
                       views=self.views, sketch=self.sketch, site=self.site, at_server=self.at_server)
        return list(seen.entries), [one[0] for one in seen.outcomes]

    def noise(self) -> Iterator[Finding]:
        """Whether every shared tensor varies, and whether anything is sent at all."""
        for place, claim in enumerate(self.claims):
            runs = self.quiet.entries[place]
            shared = [name for name, group in self.sketch.groups.items()
                      if runs[:, 0, group].any() or self.once["large everywhere"][place][:, 0, group].any()]
            every, silent = math.isfinite(claim.mu), []
            for name in shared:
                moves = np.ptp(runs[:, :, self.sketch.groups[name]], axis=0) > 0
                if not (moves.all() if every else moves.any()):
                    silent.append(name)
            more = f"; {len(silent)} tensors in all" if len(silent) > 1 else ""
            where = self.stage.name(claim.layer)
            yield PRIVACY.verdict("noise", f"{where} charges the ledger, but its output {silent[0]} does not vary with "
                                  f"the random numbers{more}" if silent else None, where=where,
                                  entries="every entry of every tensor that is shared, zeros included")

    def sensitivity(self) -> Iterator[Finding]:
        """Whether two updates are as far apart as is charged, in standard deviations of the noise."""
        names = [name for name, shown in self.once.items() if not any(np.isnan(one).any() for one in shown)]
        for place, claim in enumerate(self.claims):
            noise = Noise.of(self.quiet.entries[place][:, 0], self.sketch)
            pairs = [("nothing", name) for name in names if name != "nothing"] if claim.to_zero else list(
                combinations(names, 2))
            worst, which = 0.0, ("nothing", "nothing")
            for one, other in pairs:
                moved = self.once[one][place][:, 0] - self.once[other][place][:, 0]
                ratio = self._over(claim, noise, moved, equal={one, other} <= self.inputs.equal,
                                   from_nothing=one == "nothing")
                worst, which = max((worst, which), (ratio, (one, other)))
            if worst == 0.0 and not math.isfinite(claim.mu) and not claim.pure:
                continue
            yield self._measured(claim, worst, which)

    def _over(self, claim: Claim, noise: Noise, moved: Floats, *, equal: bool, from_nothing: bool) -> float:
        """How far apart two updates are at least, over what the claim allows."""
        varies = float(((moved[0] - moved[1])**2).sum())
        additive = varies <= 1e-6 * float((moved**2).sum()) + 1e-12 * noise.total  # as in `only_shifted`
        if claim.pure:
            return noise.least_pure_distance(moved[0], equal=equal) / claim.epsilon if additive else 0.0
        if not math.isfinite(claim.mu):
            return 0.0
        if additive:
            return math.sqrt(noise.least_square_distance(moved[0]**2, equal=equal)) / claim.mu
        if not from_nothing:
            return 0.0
        # The product of two independent shifts has the square of the mean shift as its mean.
        square = noise.square_distance(moved[0] * moved[1], equal=False)
        error = 12 * math.sqrt(noise.square_distance((moved[0] - moved[1])**4, equal=False, power=4)
                               + noise.square_distance((moved[0] - moved[1])**2 * moved.mean(axis=0)**2, equal=False,
                                                       power=4))
        return math.sqrt(max(0.0, square - error) / 1.5) / claim.chi if claim.chi > 0 else 0.0

    def _measured(self, claim: Claim, worst: float, which: tuple[str, str]) -> Finding:
        where = f"{self.stage.name(claim.layer)}, updates {which[0]!r} and {which[1]!r}"
        if claim.pure:
            measured, charged = f"an ε of {worst * claim.epsilon:.3g}", f"{claim.epsilon:.3g}"
        else:
            found = 1 / (worst * claim.mu) if worst and math.isfinite(worst) else math.inf
            measured = "no noise at all" if math.isinf(worst) else f"a noise multiplier of {found:.3g}"
            charged = f"{1 / claim.mu:.3g}"
        return PRIVACY.verdict("sensitivity", f"{where}: measured is {measured}, charged is {charged}{claim.read}"
                               if worst > 1 + _SLACK else None, where=where, measured=measured, charged=charged)

    def laws(self) -> Iterator[Finding]:
        """The law of the noise, and whether its draws are independent: of entries, tensors, rounds and sites."""
        large = self.inputs.updates["large, unequal"]
        opposite = {name: -t for name, t in large.items()}
        zero = self._coupled({}, _ROUNDS)[0]
        # Equal in all rounds, against noise that is taken back; in turns, against noise that is kept.
        pairs = [[self._coupled({number: two[number % 2 and turns] for number in range(_ROUNDS)}, _ROUNDS)[0]
                  for two in ((large, opposite), (opposite, large))] for turns in (0, 1)]
        for place, claim in enumerate(self.claims):
            moved = [one[place] - (zero if claim.to_zero else other)[place] for one, other in pairs]
            if not np.isnan(moved).any():
                yield from check_noise(self.stage.name(claim.layer), claim, self.quiet.entries[place], moved,
                                       self.sketch)
                yield from self._quietest(place, claim)
        yield from check_sites(self.everyone, self.claims, large, opposite, self.zeros, self.sketch)

    def _quietest(self, place: int, claim: Claim) -> Iterator[Finding]:
        """An update that has only the entry with the least noise."""
        if not math.isfinite(claim.mu):
            return
        runs = self.quiet.entries[place][:, 0]
        half = len(runs) // 2
        spread = runs[:half].var(axis=0)
        entry = int(np.where(spread > 0, spread, np.inf).argmin())
        name = next(name for name, group in self.sketch.groups.items() if group.start <= entry < group.stop)
        update = one_entry(self.zeros, self.sketch, name, entry - self.sketch.groups[name].start)
        moved = self._coupled({0: update})[0][place][:, 0] - self.once["nothing"][place][:, 0]
        variance = float(runs[half:, entry].var(ddof=1))
        if only_shifted(moved, runs - runs.mean(axis=0)) and variance > 0:
            worst = math.sqrt(least_distance([(moved[0, entry]**2 / variance, half - 1)])) / claim.mu
            if worst > 1 + _SLACK:
                yield self._measured(claim, worst, ("nothing", f"one huge entry of {name}"))

    def leaving(self) -> Iterator[Finding]:
        """What finally leaves, in each round, reveals no more of an update than was charged."""
        covered = self.stage.technique.sends if self.at_server else frozenset[str]()
        large = self.inputs.updates["large, unequal"]
        every = self._collect(dict.fromkeys(range(_ROUNDS), large), runs=self.runs, others=True)
        first = self._collect({0: large}, runs=_RUNS_AFTER)
        for number in range(_ROUNDS):
            allowed = allowed_of(self.claims, number + 1)
            for group in (every, first):
                name = differing([run[number] for run in self.quiet.outcomes], [run[number] for run in group.outcomes],
                                 allowed=allowed, covered=covered)
                if name:
                    yield self._beside(name, number)
                    return
        runs, usual = [run[0] for run in self.quiet.outcomes], self.beside["nothing"][0]
        fixed = {key for key in runs[0] if all(one.get(key) == runs[0][key] for one in runs)}
        for name, beside in self.beside.items():
            for key in sorted(fixed - {f"metrics {name}" for name in covered} - {"encoded"}):
                if all(one.get(key) != usual.get(key) for one in beside):
                    yield self._beside(key, 0, name)
                    return
        yield PRIVACY.verdict("beside the update", None)
        wrong, doubtful = self._far(self.quiet, [every, first])
        if doubtful and not wrong:  # runs of their own decide, so that nothing is chosen by what it shows
            quiet, large_runs = (self._collect(chosen, runs=_RUNS_AGAIN, start=_RUNS)
                                 for chosen in ({}, dict.fromkeys(range(_ROUNDS), large)))
            wrong, _ = self._far(quiet, [large_runs], only=doubtful)
        yield PRIVACY.verdict("whole update", wrong, check="sensitivity")

    def _far(self, quiet: Samples, groups: Sequence[Samples], only: frozenset[tuple[int, str]] | None = None
             ) -> tuple[str | None, frozenset[tuple[int, str]]]:
        """What reveals too much, and what is worth more runs: rounds and names of functions of the update."""
        doubtful: set[tuple[int, str]] = set()
        for number in range(_ROUNDS):
            allowed, chi = allowed_of(self.claims, number + 1), chi_of(self.claims, number + 1)
            before = {name: found for name, found in self._statistics(quiet, number).items()
                      if only is None or (number, name) in only}
            for group in groups:
                after = self._statistics(group, number)
                far = moved_far(before, after, chi=chi, allowed=allowed)
                if far:
                    return (f"the update sent in round {number + 1} reveals far more of a large update than was "
                            f"charged: of {far[0]}, {far[1]}"), frozenset()
                doubtful |= {(number, name) for name in suspects(before, after, allowed)}
        return None, frozenset(doubtful)

    def _statistics(self, samples: Samples, number: int) -> dict[str, Floats]:
        return statistics(samples.entries[-1][:, number], samples.sums[:, number], signs=self.inputs.signs,
                          heavy=self.inputs.heavy, single=not self.at_server)

    def _beside(self, name: str, number: int, update: str = "large, unequal") -> Finding:
        if name.startswith("broadcast of"):
            return PRIVACY.verdict("broadcast", f"the server's {name} depends on the updates more than was charged",
                                   check="noise")
        return PRIVACY.verdict("beside the update", f"{name} depends on the update, in round {number + 1} and for an "
                               f"update that is {update!r}")
