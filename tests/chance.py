"""Chance in tests: how rarely right code may fail a comparison with a law, and other seeds for all such tests.

Tests that compare samples with a law are marked `chance`. Each comparison fails for right code with a probability of
1e-9; a run makes fewer than 1,000 of them, so that all together fail once in a million runs. `make seeds` repeats them
with other seeds.
"""

from __future__ import annotations

import hashlib
import os

from scipy import stats

#: Probability with which right code fails one comparison.
FALSE_ALARM = 1e-9
#: The same in standard errors of a statistic that is normal, both sides: 6.1.
SIGMAS = float(stats.norm.isf(FALSE_ALARM / 2))
#: Number of the repetition; 0 in the usual run.
REPETITION = int(os.environ.get("FEDLAB_TEST_SEEDS", "0"))


def seeded(seed: int) -> int:
    """A seed of this repetition."""
    return seed + 1_000_003 * REPETITION


def keyed(key: bytes) -> bytes:
    """A key of this repetition, 32 bytes."""
    return hashlib.sha256(key + str(REPETITION).encode()).digest() if REPETITION else key
