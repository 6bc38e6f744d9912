"""The noise of a claim: its size, its law, and whether it is drawn anew for every entry, tensor, round and site.

Noise is what is left of an output when the mean of its runs is subtracted. It is tested where an update only shifts
the output: there the law of the output is the law of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedlab.checks.check_report import Finding
from fedlab.checks.claims import PRIVACY, Claim
from fedlab.checks.noise_law import (
    least_distance,
    least_joint_distance,
    odd_law,
    quiet_part,
    shrink,
    spread_of_norms,
)
from fedlab.checks.rehearsal import Stage, rehearse
from fedlab.checks.samples import Sketch
from fedlab.core.types import Tensors

__all__ = ["Noise", "check_noise", "check_sites", "law_of", "only_shifted"]

Floats = npt.NDArray[np.float64]

#: Runs in which the noise of all sites is seen.
_SITE_RUNS = 12
#: Standard errors by which the moments of noise may be off; more for few entries, whose moments are less normal.
_ODD, _ODD_OF_FEW, _FEW = 10.0, 16.0, 300
#: The spread of squared norms, over that of Gaussian noise, from which their law is taken as Gamma.
_GAMMA = 1.25
#: Error of a distance measured on a part of the entries.
_PART = 1.06


@dataclass(frozen=True)
class Noise:
    """The noise of each tensor in one round, from runs of equal input."""

    sketch: Sketch
    variances: Mapping[str, float]
    sizes: Mapping[str, float]  # mean absolute values
    runs: int
    gamma: bool  # whether its law is in proportion to exp(-norm): as Gaussian noise, but with norms that spread more

    @classmethod
    def of(cls, runs: Floats, sketch: Sketch) -> Noise:
        """From runs of equal input, (runs, entries)."""
        centred = runs - runs.mean(axis=0)
        correction = len(runs) / (len(runs) - 1)
        groups = sketch.groups
        gamma = spread_of_norms(centred) > _GAMMA and odd_law(runs)[1] < _ODD if centred.any() else False
        return cls(sketch, {n: float((centred[:, g]**2).mean()) * correction for n, g in groups.items()},
                   {n: float(np.abs(centred[:, g]).mean()) * math.sqrt(correction) for n, g in groups.items()},
                   len(runs), gamma)

    @property
    def total(self) -> float:
        """The sum of the variances of all kept entries."""
        return sum(variance * len(self.sketch.places[name]) for name, variance in self.variances.items())

    def _parts(self, squares: Floats, *, equal: bool, power: int = 2) -> list[tuple[float, float]]:
        out: list[tuple[float, float]] = []
        for name, group in self.sketch.groups.items():
            square, variance = float(squares[group].sum()), self.variances[name] ** (power / 2)
            scale = self.sketch.scale(name) if equal else 1.0
            out.append((0.0 if square == 0 else scale * square / variance if variance > 0 else
                        math.copysign(math.inf, square), len(self.sketch.places[name]) * (self.runs - 1)))
        return out

    def least_square_distance(self, squares: Floats, *, equal: bool) -> float:
        """The least Σ d²/σ² that agrees with the runs, from squared shifts; `equal` if tensors shift evenly."""
        return least_distance(self._parts(squares, equal=equal))

    def square_distance(self, squares: Floats, *, equal: bool, power: int = 2) -> float:
        """The estimated Σ d²/σ², or for squares of squares Σ d⁴/σ⁴."""
        return sum(square for square, _ in self._parts(squares, equal=equal, power=power))

    def least_pure_distance(self, moved: Floats, *, equal: bool) -> float:
        """The ε of Laplace noise on each entry, or of noise in proportion to exp(-norm), at least."""
        if self.gamma:
            entries = sum(len(place) for place in self.sketch.places.values())
            return math.sqrt(self.least_square_distance(moved**2, equal=equal) * (entries + 1))
        total = 0.0
        for name, group in self.sketch.groups.items():
            shift = float(np.abs(moved[group]).sum()) * (self.sketch.scale(name) if equal else 1.0)
            if shift > 0:
                freedom = len(self.sketch.places[name]) * (self.runs - 1)
                size = self.sizes[name]
                # The mean of absolute values of Laplace noise varies as its own size.
                total += shift / size * max(0.2, 1 - 8 / math.sqrt(freedom)) if size > 0 else math.inf
        return total


def check_noise(where: str, claim: Claim, runs: Floats, moves: Sequence[Floats], sketch: Sketch) -> Iterator[Finding]:
    """Independence and law of the noise of a claim.

    Args:
        where: the name of the layer.
        claim: what was charged.
        runs: outputs for updates of zeros, (runs, rounds, entries).
        moves: the shift of the output by some large updates in each round, for two seeds, (2, rounds, entries).
        sketch: the kept entries.
    """
    noise = runs - runs.mean(axis=0)
    shifts = [all(only_shifted(moved[:, number], noise[:, number]) for moved in moves)
              for number in range(runs.shape[1])]
    rounds, moved = next((r for r, additive in enumerate(shifts) if not additive), len(shifts)), moves[0]
    if not rounds:
        return
    part = 1.0 if all(len(sketch.places[n]) == size for n, size in sketch.sizes.items()) else _PART
    if math.isfinite(claim.mu):
        kept, limit = slice(0, rounds), (1 + 0.006) * part
        together = max(_over_rounds(noise[:, kept], moved[0, kept], sketch) for moved in moves) / claim.square(rounds)
        if together > limit:
            each = max(sum(_over_rounds(noise[:, [r]], moved[0, [r]], sketch) for r in range(rounds))
                       for moved in moves) / claim.square(rounds)
            yield PRIVACY.verdict("whole update", f"{where}: {_of_charged(together)} in {rounds} rounds together",
                                  check="sensitivity") if each > limit else PRIVACY.verdict(
                "independent draws", f"the noise of {where} is not drawn anew in every round: {_of_charged(together)}")
            return
        for found, wrong in ((_over_entries(noise[:, kept], moved[0, 0]) / claim.mu**2,
                              "is not drawn anew for every entry of every tensor"),
                             (quiet_part(runs[:, 0], moved[0, 0], list(sketch.groups.values())) / claim.mu**2,
                              "is smaller for some entries than for others")):
            if found > limit:
                yield PRIVACY.verdict("independent draws", f"the noise of {where} {wrong}: {_of_charged(found)}")
                return
    yield PRIVACY.verdict("independent draws", None)
    wrong_law = law_of(claim, runs[:, 0], sketch)
    yield PRIVACY.verdict("law of the noise", f"{where}: {wrong_law}" if wrong_law else None, where=where)


def only_shifted(moved: Floats, noise: Floats) -> bool:
    """Whether an update shifts the output, and alike whatever the noise is.

    Args:
        moved: the shift for two seeds, (2, entries).
        noise: centred, (runs, entries).
    """
    varies, size = float(((moved[0] - moved[1])**2).sum()), float((moved**2).sum())
    return size > 0 and varies <= 1e-6 * size + 1e-12 * float((noise**2).sum()) / len(noise)


def _over_rounds(noise: Floats, moved: Floats, sketch: Sketch) -> float:
    """The least Σ d²/σ² over rounds, whose noise may be correlated."""
    parts = []
    for name, group in sketch.groups.items():
        if moved[:, group].any():
            square, freedom = least_joint_distance(moved[:, group], noise[:, :, group])
            parts.append((square * sketch.scale(name), float(freedom)))
    return least_distance(parts)


def _over_entries(noise: Floats, moved: Floats) -> float:
    """The least Σ d²/σ² over the entries whose noise seems to be correlated, and some others."""
    runs, rounds, _ = noise.shape
    scale = np.sqrt((noise**2).mean(axis=0))
    kept = np.flatnonzero((scale > 0).all(axis=0) & (moved != 0))
    if len(kept) < 2:
        return 0.0
    kept = kept[np.unique(np.linspace(0, len(kept) - 1, 1200).astype(int))]
    flat = (noise / np.where(scale > 0, scale, 1.0))[:, :, kept]
    first, rest = flat[:runs // 2].reshape(-1, len(kept)), flat[runs // 2:].reshape(-1, len(kept))
    alike = np.abs(first.T @ first) / len(first) - np.eye(len(kept))
    size = max(2, min(len(rest) // 4, len(kept)))
    chosen: list[int] = []
    for flat_place in np.argsort(-np.triu(alike, 1), axis=None)[:4 * size]:
        chosen += [place for place in divmod(int(flat_place), len(kept)) if place not in chosen]
    chosen = chosen[:size]
    shift = (moved[kept] / scale[0, kept])[chosen]
    covariance = rest[:, chosen].T @ rest[:, chosen] / len(rest)
    square = float(shift @ np.linalg.solve(covariance + 1e-9 * np.eye(len(chosen)), shift))
    freedom = (runs - runs // 2 - 1) * rounds - len(chosen)
    return float(square * shrink(freedom) * freedom / len(rest))


def _of_charged(found: float) -> str:
    return "updates differ by " + ("more than any noise hides" if found > 1e7 else
                                   f"{math.sqrt(found):.3g} times as much of the noise as is charged")


def law_of(claim: Claim, runs: Floats, sketch: Sketch) -> str | None:
    """What is wrong with the law of noise that an update only shifts, or None; runs are (runs, entries)."""
    scaled = []
    for group in sketch.groups.values():
        spread = runs[:, group].std()
        if spread > 0:
            scaled.append((runs[:, group] - runs[:, group].mean(axis=0)) / spread)
    if not scaled:
        return None
    noise = np.concatenate(scaled, axis=1)
    skew, tails, far = odd_law(noise)
    limit = _ODD if noise.shape[1] >= _FEW else _ODD_OF_FEW
    even = float(noise.var(axis=0).max()) < 3 * float(noise.var(axis=0).mean())
    if claim.pure:
        light = tails < limit and spread_of_norms(noise) < _GAMMA
        return ("an ε without δ is charged, but the noise has the tails of Gaussian noise or lighter ones, which "
                "satisfy none") if light else None
    light = tails < -limit or (even and far < -limit)
    if claim.gaussian and (light or abs(skew) > limit or tails > limit or (even and far > limit)):
        return "Gaussian noise is charged, but the noise " + (
            "has lighter tails, as uniform or truncated noise has" if light else
            "has heavier tails, as Laplace noise or a mixture has" if max(tails, far) > limit else "is skewed")
    return "the noise has lighter tails than a concentrated guarantee allows" if light else None


def check_sites(stage: Stage, claims: Sequence[Claim], large: Tensors, opposite: Tensors, zeros: Tensors,
                sketch: Sketch) -> Iterator[Finding]:
    """Whether every site has noise of its own, and the server as much however many sites take part."""
    names = [site.name for site in stage.sites]
    here = [claim for claim in claims if claim.where == "site" and math.isfinite(claim.mu)]
    if here and len(names) > 1 and not stage.aggregation.hides_updates:
        runs = [rehearse(stage, script=lambda name, number: zeros, seed=seed, quick=True, catch=True)
                for seed in range(_SITE_RUNS)]
        shown = [[rehearse(stage.seeded(), script=lambda name, number, update=update: update,  # type: ignore[misc]
                           seed=seed, quick=True, catch=True) for update in (large, opposite, zeros)]
                 for seed in range(2)]
        for claim in here if all(seen.error is None for seen in (*runs, *shown[0], *shown[1])) else []:
            noise = np.array([[sketch.take(claim.output(seen, 0, name)) for name in names] for seen in runs])
            noise -= noise.mean(axis=0)
            moved = np.array([[sketch.take(claim.output(trio[0], 0, name))
                               - sketch.take(claim.output(trio[2 if claim.to_zero else 1], 0, name))
                               for name in names] for trio in shown])
            for place, name in enumerate(names):
                one = np.zeros_like(moved[0])
                one[place] = moved[0, place]
                if not only_shifted(moved[:, place], noise[:, place]):
                    continue
                if _over_rounds(noise, one, sketch) > claim.mu**2 * 1.05 * _PART:
                    yield PRIVACY.verdict("independent draws", f"{stage.name(claim.layer)} gives {name} less noise "
                                          "than is charged, or noise that another site has too")
                    return
    for claim in claims:
        if claim.where == "server" and math.isfinite(claim.mu) and not stage.aggregation.hides_updates:
            yield from _alone(stage, claim, large, opposite, zeros, sketch)


def _alone(stage: Stage, claim: Claim, large: Tensors, opposite: Tensors, zeros: Tensors, sketch: Sketch
           ) -> Iterator[Finding]:
    """The server's noise in a round with one site, and the influence of a site that is there or not."""
    first, *others = [site.name for site in stage.sites]

    def shown(update: Tensors, other: Tensors, seed: int, absent: Sequence[str]) -> Floats:
        seen = rehearse(stage.seeded(), script=lambda name, number: update if name == first else other, seed=seed,
                        quick=True, absent=absent, catch=True)
        row: Floats = np.full(sum(map(len, sketch.places.values())), np.nan)
        return row if seen.error else sketch.take(claim.output(seen, 0, first))

    tried = [("in a round with one site only", zeros, others, large, zeros, others)]
    if others and "add or remove" in claim.charges[0].terms.adjacency:
        tried.append(("for a site that is absent", zeros, [], opposite, large, [first]))
    for where, usual, absent, update, other, left_out in tried:
        noise = np.array([shown(usual, usual, seed, absent) for seed in range(_SITE_RUNS)])
        moved = np.array([shown(update, other, seed, absent) - shown(zeros, other, seed, left_out)
                          for seed in range(2)])
        if left_out and absent != left_out and not np.isnan(noise).any():
            without = np.array([shown(usual, usual, seed, left_out) for seed in range(_SITE_RUNS)])
            ratio = Noise.of(without, sketch).total / max(Noise.of(noise, sketch).total, 1e-300)
            if abs(math.log(max(ratio, 1e-300))) > 0.05 + 8 * math.sqrt(4 / (noise.size - noise.shape[1])):
                yield PRIVACY.verdict("independent draws", f"the noise of {stage.name(claim.layer)} has {ratio:.3g} "
                                      "times the variance if a site is absent: divide by the expected number of sites")
                return
        if np.isnan(noise).any() or np.isnan(moved).any() or not only_shifted(moved, noise - noise.mean(axis=0)):
            continue
        spread = Noise.of(noise, sketch)
        if spread.least_square_distance(moved[0]**2, equal=False) > claim.mu**2 * 1.05:
            yield PRIVACY.verdict("independent draws", f"{where} {stage.name(claim.layer)} adds less noise than is "
                                  "charged, or a site has more influence", check="sensitivity")
            return
