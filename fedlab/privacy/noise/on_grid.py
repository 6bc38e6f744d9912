"""Noise on a public grid: the low bits of what is released say no more than its ε.

Noise in floating point leaves gaps around the true value, so that its last bits can tell two inputs apart for certain
(I. Mironov, On Significance of the Least Significant Bits for Differential Privacy, CCS 2012). Here inputs become whole
steps of a grid that depends on settings only, noise is a whole number of steps drawn by comparing random integers, and
their sum is exact in 64 bits. Every later rounding, such as to float32, is a function of that sum and costs nothing.

*Laplace.* Discrete Laplace noise has exactly the ratio exp(-1 / scale) between neighbours on the grid, so that inputs
which differ by n steps satisfy ε = n / scale as real numbers do (Canonne, Kamath and Steinke 2020, arXiv 2004.00010).

*Gaussian.* A normal value is drawn on a lattice at least 2**18 times finer than the grid and rounded to the grid. A
whole input plus the rounded noise is their rounded sum: a function of the Gaussian mechanism on real numbers, so every
accountant's proof holds, with or without sampling. (The lattice itself is a discrete Gaussian of 2**64 steps, within
√d 2**-130 in total variation of real numbers for d values: below 1e-30 on δ.)
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
import torch

from fedlab.core.errors import PrivacyError
from fedlab.core.tensors import unflatten
from fedlab.core.types import Tensors
from fedlab.privacy.noise.coins import (
    Coins,
    Flags,
    Integers,
    Unsigned,
    drawn,
    exponential,
    laplace_block,
    until_it_fails,
)

__all__ = ["GaussianGrid", "discrete_laplace_steps", "rounded_gaussian"]

#: Values drawn together: enough for numpy, few enough for the cache.
_BLOCK = 2**15
#: Whole standard deviations that are tried at most: more have probability exp(-5000).
_FARTHEST = 100


@dataclass(frozen=True, kw_only=True)
class GaussianGrid:
    """The grid of Gaussian noise on a sum of vectors, from public settings alone.

    Terms that are clipped to `inner(entries)` instead of `reach` move the whole numbers of `noised` by at most
    `reach / step`, whatever is rounded on the way, so that the noise covers them as it covers real vectors of norm
    `reach`. Proof: let R = reach / step, n terms, d entries. (1) A norm computed in float64 is off by a factor of less
    than 1 ± d 2**-52 (d + 1 roundings). (2) A sum of n terms in float64, divided and multiplied by n, is off by a
    vector of norm at most (n + 2) 2**-53 n reach; with and without a term that is below n² 2**-50 reach together for
    n > 1, and 0 for one. (3) Rounding to whole steps moves two numbers apart by at most one step, two vectors by √d.
    `inner` takes all three off, and 2**-30 for products of these factors.

    Args:
        reach: norm of a term.
        std: standard deviation of the noise, in the unit of `reach`.
        terms: of a sum, at most.

    Raises:
        ValueError: the noise is too little, or the reach too small beside it, to be held in 64 bits.
    """

    reach: float
    std: float
    terms: int = 1

    def __post_init__(self) -> None:
        if not 2.0**-8 < self.std / self.step < 2.0**47:
            raise ValueError(f"noise of standard deviation {self.std:g} cannot be drawn exactly beside sums of "
                             f"{self.terms} vectors of norm {self.reach:g}; take a noise multiplier nearer to 1, or "
                             "secure_mode=False for research")

    @property
    def step(self) -> float:
        """A power of two with which the sum, and 16 standard deviations of the noise, take at most 2**50 steps."""
        return math.ldexp(1.0, math.frexp(max(self.terms * self.reach, 16 * self.std))[1] - 50)

    def inner(self, entries: int) -> float:
        """The norm to clip a term of so many entries to."""
        share = 1 - 2.0**-30 - entries * 2.0**-52 - (self.terms - 1) * self.terms * 2.0**-50
        found = share * self.reach - 2 * math.sqrt(entries) * self.step
        if not found > self.reach / 2:
            raise PrivacyError(f"noise of standard deviation {self.std:g} leaves too coarse a grid for {entries} "
                               f"entries clipped to {self.reach:g}; take a smaller noise multiplier")
        return found

    def whole(self, values: torch.Tensor) -> torch.Tensor:
        """Values in whole steps, to the nearest, float64."""
        return (values.double() / self.step).round_()

    def noised(self, values: Tensors) -> dict[str, torch.Tensor]:
        """Values on the grid, with noise from the operating system; float64, exact."""
        whole = {name: self.whole(t) for name, t in values.items()}
        noise = rounded_gaussian(sum(t.numel() for t in whole.values()), scale=self.std / self.step, key=os.urandom(32))
        parts = unflatten(torch.from_numpy(noise), whole)
        return {name: (t + parts[name].to(t)) * self.step for name, t in whole.items()}


def rounded_gaussian(count: int, *, scale: float, key: bytes) -> Integers:
    """Independent draws of floor(scale z + 1/2), z normal with mean 0 and standard deviation 1.

    C. F. F. Karney, Sampling exactly from the normal distribution, ACM TOMS 2016, arXiv 1303.6257, algorithm N: z is
    ± (k + x), k a whole number, x one of 2**64 fractions. `scale` is rounded up to 24 bits: at most 2**-23 more noise.

    Args:
        count: number of draws.
        scale: standard deviation, 2**-8 to 2**47.
        key: 32 bytes; equal keys give equal draws, whatever the number of torch's threads.
    """
    fraction, power = math.frexp(scale)
    factor, shift = math.ceil(fraction * 2**24), np.uint64(31 + 24 - power)
    half = np.uint64(32)

    def block(coins: Coins, wanted: int) -> Integers:
        tried = min(_BLOCK, 2 * wanted + 64)  # of which half are kept
        whole = np.zeros(tried, np.uint64)  # k with probability in proportion to exp(-k / 2)
        going = np.arange(tried)
        while going.size:
            going = going[until_it_fails(np.ones(going.size, np.uint64), 2, 1, coins)]
            whole[going] += np.uint64(1)
        whole = whole[whole < _FARTHEST]
        whole = whole[exponential(whole * np.maximum(whole, np.uint64(1)) - whole, 2, coins)]  # exp(-k (k - 1) / 2)
        x = coins.words(len(whole))
        kept = _accepted(whole, x, coins)
        whole, x = whole[kept], x[kept]
        negative = (coins.words(len(x)) >> np.uint64(63)).astype(np.bool_)
        # factor (k + x) in units of 2**-32, and what is left of it in units of 2**-64
        least = np.uint64(factor) * (x & np.uint64(2**32 - 1))
        most = (whole * np.uint64(factor) << half) + np.uint64(factor) * (x >> half) + (least >> half)
        rest = (most & ((np.uint64(1) << shift) - np.uint64(1)) | (least & np.uint64(2**32 - 1))) > 0
        twice = most >> shift  # of the result, rounded down
        size = ((twice + np.where(negative, rest, True).astype(np.uint64)) >> np.uint64(1)).astype(np.int64)
        signed: Integers = np.where(negative, -size, size)[~(negative & (whole == 0) & (x == 0))]
        return signed

    return drawn(count, key, block)


def _accepted(whole: Unsigned, x: Unsigned, coins: Coins) -> Flags:
    """True with probability exp(-x (2 k + x) / 2), x in units of 2**-64: k + 1 coins of the (k + 1)-th root."""
    out = np.ones(len(x), np.bool_)
    left, going = whole + np.uint64(1), np.arange(len(x))
    while going.size:
        out[going] = passed = _root(whole[going], x[going], coins)
        left[going] -= np.uint64(1)
        going = going[passed & (left[going] > 0)]
    return out


def _root(whole: Unsigned, x: Unsigned, coins: Coins) -> Flags:
    """True with probability exp(-g), g = x (2 k + x) / (2 k + 2): tosses coins of probability g / n, n = 1, 2, ..."""
    out = np.zeros(len(x), np.bool_)
    going, n = np.arange(len(x)), 1
    while going.size:
        fell = coins.words(going.size) < x  # probability x
        side = coins.below(2 * whole + np.uint64(2))
        fell &= (side < 2 * whole) | ((side == 2 * whole) & (coins.words(going.size) < x))
        if n > 1:
            fell &= coins.below(np.full(going.size, n, np.uint64)) == 0
        if n % 2:
            out[going[~fell]] = True
        going, whole, x, n = going[fell], whole[fell], x[fell], n + 1
    return out


def discrete_laplace_steps(count: int, *, scale: int, key: bytes) -> Integers:
    """Independent draws y with probability proportional to exp(-|y| / scale), scale a whole number up to 2**50."""
    return drawn(count, key, lambda coins, wanted: laplace_block(min(_BLOCK, 2 * wanted + 64), scale, coins))
