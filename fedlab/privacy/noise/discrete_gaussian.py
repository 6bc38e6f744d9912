"""Discrete Gaussian noise on the integers, drawn exactly, without floating point numbers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import CipherContext

from fedlab.privacy.secure_aggregation.crypto import derive_key, stream

__all__ = ["MAX_LOG2_SIGMA", "discrete_gaussian"]

#: Squares of values up to 100 standard deviations fit into 64 bits.
MAX_LOG2_SIGMA = 24
#: Values per stream, and values drawn together: large enough for numpy, small enough for the cache.
_PIECE, _BLOCK = 2**19, 2**15
#: Laplace blocks beyond this one are rejected at once: the Gaussian would accept them with probability exp(-4900).
_FARTHEST = 100

_Integers = np.ndarray[tuple[int], np.dtype[np.int64]]
_Unsigned = np.ndarray[tuple[int], np.dtype[np.uint64]]
_Flags = np.ndarray[tuple[int], np.dtype[np.bool_]]


def discrete_gaussian(count: int, *, log2_sigma: int, key: bytes) -> _Integers:
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
    sizes = [min(_PIECE, count - start) for start in range(0, count, _PIECE)]
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        pieces = pool.map(lambda k: _piece(sizes[k], log2_sigma, derive_key(key, purpose=f"noise {k}")),
                          range(len(sizes)))
        return np.concatenate([np.empty(0, np.int64), *pieces])


def _piece(count: int, log2_sigma: int, key: bytes) -> _Integers:
    """Draws from one stream (algorithm 3)."""
    coins = _Coins(stream(key))
    out = np.empty(count, np.int64)
    filled = 0
    while filled < count:
        drawn = _laplace(_BLOCK, log2_sigma, coins)
        # exp(-|y| / s) * exp(-(|y| - s)**2 / (2 s**2)) is exp(-y**2 / (2 s**2)) but for a constant.
        off = (np.abs(drawn) - (1 << log2_sigma)).astype(np.int64)
        drawn = drawn[_exponential((off * off).astype(np.uint64), 2 * log2_sigma + 1, coins)][:count - filled]
        out[filled:filled + len(drawn)] = drawn
        filled += len(drawn)
    return out


class _Coins:
    """Uniform random words, and coins with an exact rational probability."""

    def __init__(self, cipher: CipherContext) -> None:
        self._cipher = cipher

    def words(self, count: int) -> _Unsigned:
        return np.frombuffer(self._cipher.update(bytes(8 * count)), "<u8").astype(np.uint64, copy=False)

    def toss(self, numerators: _Unsigned, log2_denominator: int, times: int) -> _Flags:
        """True with probability numerator / (2**log2_denominator * times); numerators lie below their denominator."""
        unit = 2 ** (64 - log2_denominator) // times
        limit = unit * times << log2_denominator  # larger words would favour some outcomes: draw them again
        words = self.words(len(numerators))
        if limit < 2**64:
            while (again := np.flatnonzero(words >= np.uint64(limit))).size:
                words = words.copy()
                words[again] = self.words(again.size)
        fell: _Flags = words < numerators * np.uint64(unit)
        return fell


def _exponential(numerators: _Unsigned, log2_denominator: int, coins: _Coins) -> _Flags:
    """True with probability exp(-numerator / 2**log2_denominator) (algorithm 1)."""
    whole = numerators >> np.uint64(log2_denominator)
    out = _until_it_fails(numerators - (whole << np.uint64(log2_denominator)), log2_denominator, 1, coins)
    left = np.flatnonzero(out & (whole > 0))
    while left.size:  # exp(-whole) as so many times exp(-1)
        out[left] = passed = _inverse_e(left.size, coins)
        whole[left] -= np.uint64(1)
        left = left[passed & (whole[left] > 0)]
    return out


def _inverse_e(count: int, coins: _Coins) -> _Flags:
    """True with probability exp(-1); the first coin, of probability 1, is not tossed."""
    return _until_it_fails(np.ones(count, np.uint64), 0, 2, coins)


def _until_it_fails(numerators: _Unsigned, log2_denominator: int, first: int, coins: _Coins) -> _Flags:
    """Tosses coins of probability gamma / k, gamma at most 1, for k = first, first + 1, ...; true where the first k
    that fails is odd, which has probability exp(-gamma).
    """
    out = np.zeros(len(numerators), np.bool_)
    going, k = np.arange(len(numerators)), first
    while going.size:
        fell = coins.toss(numerators, log2_denominator, k)
        if k % 2:
            out[going[~fell]] = True
        going, numerators, k = going[fell], numerators[fell], k + 1
    return out


def _laplace(count: int, log2_scale: int, coins: _Coins) -> _Integers:
    """About count / 1.6 draws with probability proportional to exp(-|y| / 2**log2_scale) (algorithm 2)."""
    within = coins.words(count) >> np.uint64(64 - log2_scale)
    within = within[_until_it_fails(within, log2_scale, 1, coins)]  # probability exp(-within / 2**log2_scale)
    blocks = np.zeros(len(within), np.int64)
    going = np.arange(len(within))
    while going.size:
        going = going[_inverse_e(going.size, coins)]
        blocks[going] += 1
    sizes = within.astype(np.int64) + (blocks << log2_scale)
    negative = (coins.words(len(sizes)) >> np.uint64(63)).astype(np.bool_)
    kept = ~(negative & (sizes == 0)) & (blocks < _FARTHEST)  # zero has one sign only
    signed: _Integers = np.where(negative, -sizes, sizes)[kept]
    return signed
