"""Laplace noise on whole numbers, drawn exactly, so that floating-point rounding discloses no count.

Continuous Laplace noise in floating point can be removed using the low bits of the released numbers (Mironov 2012,
doi:10.1145/2382196.2382264). On whole numbers the two-sided geometric distribution takes its place (Ghosh et al. 2009,
doi:10.1145/1536414.1536464) and can be drawn with fair coins only (Canonne et al. 2020, arXiv:2004.00010).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from fractions import Fraction

__all__ = ["discrete_laplace", "noisy"]


def noisy(counts: Iterable[int], *, scale: Fraction, rng: random.Random) -> list[int]:
    """Whole numbers, each with its own Laplace noise of `scale`.

    If adding or removing one patient changes the numbers by at most S in total (L1), the result is
    (S / scale)-differentially private with δ = 0.

    Args:
        counts: the exact counts.
        scale: in the unit of the counts; above 0.
        rng: `random.SystemRandom()` where patients must be protected, `random.Random(seed)` to repeat an experiment.
    """
    return [int(count) + discrete_laplace(scale=scale, rng=rng) for count in counts]


def discrete_laplace(*, scale: Fraction, rng: random.Random) -> int:
    """A whole number k with probability (1 - r) / (1 + r) · r^|k|, where r = exp(-1 / scale).

    Raises:
        ValueError: `scale` is not above 0.
    """
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    while True:
        magnitude = _geometric(scale, rng)
        negative = rng.getrandbits(1)
        if magnitude or not negative:  # otherwise 0 would be drawn twice, as +0 and -0
            return -magnitude if negative else magnitude


def _geometric(scale: Fraction, rng: random.Random) -> int:
    """A whole number k >= 0 with probability in proportion to exp(-k / scale)."""
    # In steps of 1 / n with the scale n / d: a fine part below n accepted with probability exp(-fine / n), and a coarse
    # part of multiples of n with probability exp(-1) each. Every d steps are one unit of the result.
    n, d = scale.numerator, scale.denominator
    fine = rng.randrange(n)
    while not _happens(fine, n, rng):
        fine = rng.randrange(n)
    coarse = 0
    while _happens(1, 1, rng):
        coarse += 1
    return (fine + n * coarse) // d


def _happens(numerator: int, denominator: int, rng: random.Random) -> bool:
    """True with probability exp(-numerator / denominator), the fraction between 0 and 1."""
    # After k - 1 successes the k-th has probability x / k: an even number of successes in a row has probability
    # 1 - x + x²/2! - x³/3! ... = exp(-x) (von Neumann 1951).
    successes = 0
    while rng.randrange(denominator * (successes + 1)) < numerator:
        successes += 1
    return successes % 2 == 0
