"""The sparse vector technique: its choice of positions, its noise, and the ε that both provably compose to.

Let γ be the clip, c the number of values released, and b₁, b₂, b₃ the scales of the Laplace noise on the threshold,
on each comparison and on each released value. The unit is a whole site: any two of its updates are adjacent, so every
coordinate may change at once, its clipped magnitude by at most γ and its clipped value by at most 2γ.

*Positions.* The noise of the threshold is drawn once. Shift it by γ: that changes its density by at most e^(γ/b₁).
Under the shifted threshold no failed comparison becomes less likely, however many there are, and each of the c
successful ones becomes less likely by at most e^(2γ/b₂), since its magnitude and its threshold move by γ each. So the
choice is γ/b₁ + 2cγ/b₂ differentially private (M. Lyu, D. Su and N. Li, Understanding the Sparse Vector Technique for
Differential Privacy, PVLDB 10(6), 2017, arXiv 1603.01699, algorithm 7; magnitudes are not monotonic queries). The proof
holds for any stream of comparisons, so a position that failed may be tried again with new noise. It requires that no
more than c successes are revealed. Positions are tried in random order until c of them succeed, so of a pass with too
many successes a random part is kept, without replacement. (With replacement the number of different positions would
reveal how many succeeded, which the proof does not cover.)

*Values.* Given the positions, each value is one Laplace mechanism of 2γ/b₃, and c of them are released. Clipping after
the noise costs nothing. The clip *before* the noise bounds the sensitivity: clipping only afterwards, as the paper's
formula may be read, gives no guarantee.

*Together*, c + 1 pure mechanisms enter the ledger, which takes the smaller of their sum and the Rényi composition at δ.

*On a grid.* With `secure_mode` all of this happens in whole steps of a power of two that depends on the clip and the
scales only (`exact_release`): values are rounded towards zero, scales up to whole steps, and the noise is discrete
Laplace noise. Each line of the proof holds as it stands: a shift by n steps changes the probability of a draw by at
most exp(n / scale), γ and 2γ are at least as many steps as a magnitude or a value moves, and a success is a comparison
of whole numbers. Without `secure_mode` noise is drawn in floating point: ε is that of real numbers, and the last bits
of a noisy value can tell two updates apart (I. Mironov, On Significance of the Least Significant Bits for Differential
Privacy, CCS 2012). Patient counts, the number of steps and the names of layers left out are public.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fedlab.core.settings import check_positive, check_whole
from fedlab.privacy.accounting.ledger import Accountant, Pure, Terms, epsilon_of
from fedlab.privacy.noise.continuous import random_bits
from fedlab.privacy.noise.on_grid import discrete_laplace_steps

__all__ = ["ADJACENCY", "LaplaceScales", "SparseVectorCost", "exact_release", "grid_step", "select",
           "sparse_vector_cost"]

#: As in `fedlab.privacy.dp.site_level.LocalGaussian`, so that both can be added up.
ADJACENCY = "any two updates of a site"


@dataclass(frozen=True, kw_only=True)
class LaplaceScales:
    """Scales of the Laplace noise of a sparse vector, in units of the weights.

    Raises:
        ValueError: a scale is not positive.
    """

    threshold: float  # drawn once per round
    query: float  # of each comparison
    release: float  # of each released value

    def __post_init__(self) -> None:
        check_positive(threshold=self.threshold, query=self.query, release=self.release)


@dataclass(frozen=True, kw_only=True)
class SparseVectorCost:
    """What one round of a sparse vector costs."""

    released: int  # number of values, c
    selection: float  # ε of choosing their positions
    per_value: float  # ε of each released value
    delta: float
    stated: float | None = None  # ε that the publication of the settings claims, which is no guarantee
    accountant: Accountant = "rdp"

    def releases(self, *, rounds: int = 1) -> tuple[Pure, Pure]:
        """The releases that the ledger is charged with."""
        return (Pure(epsilon=self.selection, times=rounds),
                Pure(epsilon=self.per_value, times=self.released * rounds))

    def epsilon(self, *, rounds: int = 1) -> float:
        """The ε that the rounds together provably satisfy at δ, per site."""
        return epsilon_of(self.releases(rounds=rounds), delta=self.delta, accountant=self.accountant)


def sparse_vector_cost(*, clip: float, scales: LaplaceScales, released: int, delta: float,
                       stated: float | None = None, accountant: Accountant = "rdp") -> SparseVectorCost:
    """The cost of one round of any sparse vector, from the noise that it adds; derived at the top of this module.

    Args:
        clip: γ, largest absolute value of a coordinate before the noise.
        scales: of its noise.
        released: largest number of values, c.
        delta: of the guarantee.
        stated: ε that is claimed for it, to be shown beside the proven one.
        accountant: as in `Terms`.

    Raises:
        ValueError: a setting is out of range.
    """
    check_positive(clip=clip)
    check_whole(released=released)
    Terms(unit="site", delta=delta, adjacency=ADJACENCY, accountant=accountant)
    return SparseVectorCost(
        released=released, selection=clip / scales.threshold + 2 * released * clip / scales.query,
        per_value=2 * clip / scales.release, stated=stated, delta=delta, accountant=accountant)


def select(magnitude: torch.Tensor, *, threshold: float, count: int, passes: int,
           noise: Callable[[int], torch.Tensor], order: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The first `count` positions, tried in random order, whose noisy magnitude reaches the noisy threshold.

    Args:
        magnitude: clipped absolute values, shape (N,).
        threshold: with its noise.
        count: largest number of positions.
        passes: largest number of times that a position not yet found is tried.
        noise: of a number of comparisons, new at every call.
        order: random whole numbers for the positions that a pass found, if it found too many; those with the smallest
            were tried first.

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


def grid_step(clip: float, scales: LaplaceScales) -> float:
    """The step of the grid: a power of two, 2**-23 to 2**-24 of the clip unless the largest scale needs a larger one.

    Raises:
        ValueError: noise so large that the clip has less than 256 steps.
    """
    largest = max(scales.threshold, scales.query, scales.release)
    step = math.ldexp(1.0, max(math.frexp(clip)[1] - 24, math.frexp(largest)[1] - 49))
    if clip < 256 * step:
        raise ValueError(f"noise of {largest / clip:.1g} times the clip cannot be drawn exactly beside it; take a "
                         "larger ε or a smaller fraction")
    return step


def exact_release(values: torch.Tensor, *, clip: float, scales: LaplaceScales, threshold: float, count: int,
                  passes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and noisy values of a sparse vector, on a grid and with noise from the operating system.

    Args:
        values: shape (N,).
        clip: γ, largest absolute value before and after the noise.
        scales: of the noise.
        threshold: without noise.
        count, passes: as in `select`.

    Returns:
        Positions as from `select`, and their values, float32.
    """
    step = grid_step(clip, scales)
    limit = math.floor(clip / step)
    whole = (values.double() / step).trunc_().clamp_(-limit, limit).to(torch.int64)

    def noise(size: int, scale: float) -> torch.Tensor:
        return torch.from_numpy(discrete_laplace_steps(size, scale=math.ceil(scale / step), key=os.urandom(32)))

    level = round(min(threshold / step, 2.0**52)) + int(noise(1, scales.threshold))
    chosen = select(whole.abs(), threshold=level, count=count, passes=passes,
                    noise=lambda tried: noise(tried, scales.query), order=lambda found: random_bits(found, None))
    noisy = whole.index_select(0, chosen) + noise(chosen.numel(), scales.release)
    return chosen, (noisy.clamp_(-limit, limit).double() * step).float()


def _where(mask: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.flatnonzero(mask.numpy()))  # several times as fast as torch's own


def _smallest(keys: torch.Tensor, count: int) -> torch.Tensor:
    """Positions of the `count` smallest keys; of equal ones the first."""
    numbers = keys.numpy()
    cut = np.partition(numbers, count - 1)[count - 1]
    taken = numbers < cut
    taken[np.flatnonzero(numbers == cut)[:count - np.count_nonzero(taken)]] = True
    return torch.from_numpy(np.flatnonzero(taken))
