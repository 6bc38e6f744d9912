"""The sparse vector technique: its noise, its choice, and the ε that both provably compose to.

Let γ be the clip, c the number of values released, and b₁, b₂, b₃ the scales of the Laplace noise on the threshold,
on each comparison and on each released value. The unit is a whole site: any two updates may be exchanged, so every
coordinate may change at once, its clipped magnitude by at most γ and its clipped value by at most 2γ.

*Which positions are shared.* The threshold's noise is drawn once. Shift it by γ: that changes its density by at most
e^(γ/b₁). Under the shifted threshold no comparison that failed becomes less likely, however many there are, and each
of the c that succeeded becomes less likely by at most e^(2γ/b₂), for its magnitude and its threshold move by γ each.
So the choice is γ/b₁ + 2cγ/b₂ differentially private (M. Lyu, D. Su and N. Li, Understanding the Sparse Vector
Technique for Differential Privacy, PVLDB 10(6), 2017, arXiv 1603.01699, algorithm 7; magnitudes are not monotonic
queries). The proof holds for any stream of comparisons, so a position that failed may be tried again with new noise.
It needs that no more than c successes show. Positions are tried in random order until c of them succeed, so of a pass
with too many successes a random part is kept, without replacement. (With replacement the number of different
positions tells how many succeeded, which the proof doesn't cover.)

*Which values.* Given the positions, each value is one Laplace mechanism of 2γ/b₃, and c of them are released. Clipping
afterwards costs nothing. The clip *before* the noise is what bounds the sensitivity: clipping only afterwards, as the
paper's formula may be read, gives no guarantee at all.

*Together*, c + 1 pure mechanisms go into the ledger, which takes the smaller of their sum and what Rényi composition
proves at δ.

Outside this proof, as for every mechanism here that draws floating point numbers: the last bits of a noisy value may
tell more than real numbers would (I. Mironov, On Significance of the Least Significant Bits for Differential Privacy,
CCS 2012). Patient counts, the number of steps and the names of layers left out are public.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fedlab.privacy.accounting.ledger import Accountant, Pure, Terms, epsilon_of

__all__ = ["ADJACENCY", "LaplaceScales", "SparseVectorCost", "laplace", "random_bits", "select", "sparse_vector_cost"]

#: As in `fedlab.privacy.dp.site_level.LocalGaussian`, so that both can be added up.
ADJACENCY = "any two updates of a site"
#: Noise made at a time: what stays in a processor's cache.
_CHUNK = 2**17


@dataclass(frozen=True, kw_only=True)
class LaplaceScales:
    """Scales of the Laplace noise of a sparse vector, in units of the weights.

    Args:
        threshold: of the noise on the threshold, drawn once a round.
        query: of the noise on each comparison.
        release: of the noise on each released value.

    Raises:
        ValueError: a scale that is not positive.
    """

    threshold: float
    query: float
    release: float

    def __post_init__(self) -> None:
        for name in ("threshold", "query", "release"):
            _check_positive(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class SparseVectorCost:
    """What one round of a sparse vector costs.

    Attributes:
        released: values released, c.
        selection: ε of choosing their positions.
        per_value: ε of each released value.
        delta: of the guarantee.
        stated: ε that whoever published the settings says they give; None for nobody. It is no guarantee.
        accountant: that composes.
    """

    released: int
    selection: float
    per_value: float
    delta: float
    stated: float | None = None
    accountant: Accountant = "rdp"

    def releases(self, *, rounds: int = 1) -> tuple[Pure, Pure]:
        """What the ledger is charged with."""
        return (Pure(epsilon=self.selection, times=rounds),
                Pure(epsilon=self.per_value, times=self.released * rounds))

    def epsilon(self, *, rounds: int = 1) -> float:
        """The ε that so many rounds together provably satisfy at δ, per site."""
        return epsilon_of(self.releases(rounds=rounds), delta=self.delta, accountant=self.accountant)


def sparse_vector_cost(*, clip: float, scales: LaplaceScales, released: int, delta: float,
                       stated: float | None = None, accountant: Accountant = "rdp") -> SparseVectorCost:
    """What a round of any sparse vector costs, from the noise that it really adds; derived at the top of this module.

    Args:
        clip: γ, largest absolute value of a coordinate before the noise.
        scales: of its noise.
        released: at most so many values, c.
        delta: of the guarantee.
        stated: ε that is claimed for it, to be shown beside the proven one.
        accountant: as in `Terms`.

    Raises:
        ValueError: a setting out of its range.
    """
    _check_positive("clip", clip)
    Terms(unit="site", delta=delta, adjacency=ADJACENCY, accountant=accountant)
    if not isinstance(released, int) or released < 1:
        raise ValueError(f"released is a positive whole number, got {released!r}")
    return SparseVectorCost(
        released=released, selection=clip / scales.threshold + 2 * released * clip / scales.query,
        per_value=2 * clip / scales.release, stated=stated, delta=delta, accountant=accountant)


def random_bits(size: int, rng: torch.Generator | None) -> torch.Tensor:
    """Uniform whole numbers from 0 to 2³¹ - 1, int32, from a seeded generator or, for None, the operating system."""
    if rng is not None:
        return torch.empty(size, dtype=torch.int32).random_(generator=rng)
    return torch.frombuffer(bytearray(os.urandom(4 * size)), dtype=torch.int32).bitwise_and_(2**31 - 1)


def laplace(size: int, rng: torch.Generator | None) -> torch.Tensor:
    """Laplace noise of scale 1, float32, from 31 random bits each: none beyond ±21.5, where one in 2³¹ would lie.

    Args:
        size: how many.
        rng: a seeded generator, or None for the operating system's entropy.
    """
    noise = torch.empty(size, dtype=torch.float32)
    for start in range(0, size, _CHUNK):
        bits = random_bits(min(_CHUNK, size - start), rng)
        uniform = bits.sub_(2**30).to(torch.float32).add_(0.5).mul_(2.0**-30)  # -1 to 1, finest around 0: the tails
        noise[start:start + _CHUNK] = uniform.abs().log_().copysign_(uniform)
    return noise


def select(magnitude: torch.Tensor, *, threshold: float, count: int, passes: int,
           noise: Callable[[int], torch.Tensor], order: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The first `count` positions, tried in random order, whose noisy magnitude reaches the noisy threshold.

    Args:
        magnitude: clipped absolute values, shape (N,).
        threshold: with its noise.
        count: at most so many positions.
        passes: how often every position not yet found is tried, at most.
        noise: of so many comparisons, new at every call.
        order: random whole numbers for the so many positions that a pass found, should it find too many; those with
            the smallest were tried first.

    Returns:
        int64, shape (count,) or less; each position once.
    """
    above = magnitude + noise(magnitude.numel()) >= threshold
    found = _where(above)
    kept, missing = [], count
    for last in range(passes - 1, -1, -1):
        if found.numel() > missing:
            found = found[_smallest(order(found.numel()), missing)]
        kept.append(found)
        missing -= found.numel()
        if missing == 0 or last == 0:
            break
        left = _where(~above)
        found = left[_where(magnitude.index_select(0, left) + noise(left.numel()) >= threshold)]
        above[found] = True
    return torch.cat(kept)


def _where(mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(mask.numpy()))  # several times as fast as torch's own


def _smallest(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the `count` smallest keys; of equal ones the first."""
    numbers = keys.numpy()
    cut = np.partition(numbers, count - 1)[count - 1]
    taken = numbers < cut
    taken[np.flatnonzero(numbers == cut)[:count - np.count_nonzero(taken)]] = True
    return torch.from_numpy(np.flatnonzero(taken))


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is a positive number, got {value}")
