"""Discrete Gaussian noise on the integers, drawn exactly, without floating point numbers."""

from __future__ import annotations

import numpy as np

from fedlab.privacy.noise.coins import Coins, Integers, drawn, exponential, laplace_block

__all__ = ["MAX_LOG2_SIGMA", "discrete_gaussian"]

#: Squares of values up to 100 standard deviations fit into 64 bits.
MAX_LOG2_SIGMA = 24
#: Values drawn together: enough for numpy, few enough for the cache.
_BLOCK = 2**15
#: Laplace values beyond this many scales are rejected at once: the Gaussian accepts them with probability exp(-4900).
_FARTHEST = 100


def discrete_gaussian(count: int, *, log2_sigma: int, key: bytes) -> Integers:
    """Independent draws x with probability proportional to exp(-x**2 / (2 sigma**2)).

    Canonne, Kamath and Steinke (NeurIPS 2020, arXiv 2004.00010), algorithms 1 to 3: discrete Laplace values are
    accepted with a probability exp(-a / b) that is decided by comparing random integers. With sigma a power of two and
    the Laplace scale equal to it, every b is a power of two as well, so 64-bit integers suffice.

    Args:
        count: number of draws.
        log2_sigma: sigma is 2 to this power; the standard deviation is sigma to better than 1e-8.
        key: 32 bytes; equal keys give equal draws, whatever the number of torch's threads.

    Raises:
        ValueError: log2_sigma outside 1 ... 24.
    """
    if not 1 <= log2_sigma <= MAX_LOG2_SIGMA:
        raise ValueError(f"log2_sigma lies between 1 and {MAX_LOG2_SIGMA}, got {log2_sigma}")
    sigma = 1 << log2_sigma

    def block(coins: Coins, wanted: int) -> Integers:  # algorithm 3
        found = laplace_block(_BLOCK, sigma, coins)
        found = found[np.abs(found) < _FARTHEST * sigma]
        # exp(-|y| / s) * exp(-(|y| - s)**2 / (2 s**2)) is exp(-y**2 / (2 s**2)) but for a constant.
        off = np.abs(found) - sigma
        accepted: Integers = found[exponential((off * off).astype(np.uint64), 2 * sigma * sigma, coins)]
        return accepted

    return drawn(count, key, block)
