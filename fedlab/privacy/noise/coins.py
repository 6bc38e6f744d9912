"""Fair coins from a cipher's stream, and coins of exact rational and exponential probability made of them.

Canonne, Kamath and Steinke (NeurIPS 2020, arXiv 2004.00010), algorithm 1, on whole arrays: every probability is decided
by comparing random integers, without floating point numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import CipherContext

from fedlab.privacy.secure_aggregation.crypto import derive_key, stream

__all__ = ["Coins", "Flags", "Integers", "Unsigned", "drawn", "exponential", "laplace_block", "until_it_fails"]

Integers = np.ndarray[tuple[int], np.dtype[np.int64]]
Unsigned = np.ndarray[tuple[int], np.dtype[np.uint64]]
Flags = np.ndarray[tuple[int], np.dtype[np.bool_]]

#: Values per stream: more keep every thread busy, fewer cost keys.
_PIECE = 2**19


class Coins:
    """Uniform random words, and coins with an exact rational probability."""

    def __init__(self, cipher: CipherContext) -> None:
        self._cipher = cipher

    def words(self, count: int) -> Unsigned:
        return np.frombuffer(self._cipher.update(bytes(8 * count)), "<u8").astype(np.uint64, copy=False)

    def below(self, numbers: Unsigned) -> Unsigned:
        """For each number, of at least 2, a uniform whole number below it."""
        groups, rest = np.divmod(np.uint64(2**64 - 1), numbers)
        groups += rest == numbers - np.uint64(1)  # 2**64 words fall into so many groups
        found = self.words(len(numbers)) // groups
        while (again := np.flatnonzero(found >= numbers)).size:  # the words of an incomplete last group
            found[again] = self.words(again.size) // groups[again]
        return found

    def toss(self, numerators: Unsigned, denominator: int, times: int) -> Flags:
        """True with probability numerator / (denominator * times); numerators lie below the denominator."""
        unit = 2**64 // (denominator * times)
        limit = unit * times * denominator  # larger words would favour some outcomes: draw them again
        words = self.words(len(numerators))
        if limit < 2**64:
            while (again := np.flatnonzero(words >= np.uint64(limit))).size:
                words = words.copy()
                words[again] = self.words(again.size)
        fell: Flags = words < numerators * np.uint64(unit)
        return fell


def exponential(numerators: Unsigned, denominator: int, coins: Coins) -> Flags:
    """True with probability exp(-numerator / denominator)."""
    whole = numerators // np.uint64(denominator)
    out = until_it_fails(numerators - whole * np.uint64(denominator), denominator, 1, coins)
    left = np.flatnonzero(out & (whole > 0))
    while left.size:  # exp(-whole) as so many times exp(-1)
        out[left] = passed = _inverse_e(left.size, coins)
        whole[left] -= np.uint64(1)
        left = left[passed & (whole[left] > 0)]
    return out


def _inverse_e(count: int, coins: Coins) -> Flags:
    """True with probability exp(-1); the first coin, of probability 1, is not tossed."""
    return until_it_fails(np.ones(count, np.uint64), 1, 2, coins)


def until_it_fails(numerators: Unsigned, denominator: int, first: int, coins: Coins) -> Flags:
    """Tosses coins of probability gamma / k, gamma at most 1, for k = first, first + 1, ...; true where the first k
    that fails is odd, which has probability exp(-gamma).
    """
    out = np.zeros(len(numerators), np.bool_)
    going, k = np.arange(len(numerators)), first
    while going.size:
        fell = coins.toss(numerators, denominator, k)
        if k % 2:
            out[going[~fell]] = True
        going, numerators, k = going[fell], numerators[fell], k + 1
    return out


def laplace_block(count: int, scale: int, coins: Coins) -> Integers:
    """About count / 1.6 draws with probability proportional to exp(-|y| / scale) (algorithm 2); scale at most 2**50."""
    within = np.zeros(count, np.uint64)
    if scale > 1:
        within = coins.below(np.full(count, scale, np.uint64))
        within = within[until_it_fails(within, scale, 1, coins)]  # probability exp(-within / scale)
    blocks = np.zeros(len(within), np.int64)  # k with probability in proportion to exp(-k)
    going = np.arange(len(within))
    while going.size:
        going = going[_inverse_e(going.size, coins)]
        blocks[going] += 1
    sizes = within.astype(np.int64) + blocks * scale
    negative = (coins.words(len(sizes)) >> np.uint64(63)).astype(np.bool_)
    signed: Integers = np.where(negative, -sizes, sizes)[~(negative & (sizes == 0))]  # zero has one sign only
    return signed


def drawn(count: int, key: bytes, block: Callable[[Coins, int], Integers]) -> Integers:
    """So many draws, from several streams of one key: the same in any number of torch's threads.

    Args:
        count: number of draws.
        key: 32 bytes.
        block: some draws from the coins, given how many are still wanted.
    """
    sizes = [min(_PIECE, count - start) for start in range(0, count, _PIECE)]

    def piece(k: int) -> Integers:
        coins = Coins(stream(derive_key(key, purpose=f"noise {k}")))
        out, filled = np.empty(sizes[k], np.int64), 0
        while filled < sizes[k]:
            found = block(coins, sizes[k] - filled)[:sizes[k] - filled]
            out[filled:filled + len(found)] = found
            filled += len(found)
        return out

    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        return np.concatenate([np.empty(0, np.int64), *pool.map(piece, range(len(sizes)))])
