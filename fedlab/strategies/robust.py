"""Strategies that withstand sites whose updates are damaged or malicious.

All but `NormBound` need every update at once, in one place. They use single updates, so secure aggregation cannot hide
those, and noise at the server has no bound to be sized by: both refuse these strategies. What they combine is no mean:
where sites differ for honest reasons, a rare site is left out like a malicious one. They judge weights only, so a run
in which sites send buffers too, such as the statistics of batch norm, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlab.core.protocols import Run
from fedlab.core.settings import check_positive, check_whole, check_within
from fedlab.core.types import Update
from fedlab.strategies.averaging import FedAvg, TooFewUpdates, UniformAvg, square_distance, weighted_mean

__all__ = ["CoordinateMedian", "GeometricMedian", "Krum", "NormBound", "TrimmedMean"]


@dataclass(frozen=True, kw_only=True)
class CoordinateMedian(UniformAvg):
    """The median of each coordinate (Yin et al., ICML 2018, arXiv 1803.01498).

    Holds as long as fewer than half of the updates are bad, and needs no setting. The median of an even number is the
    mean of the two in the middle. With few sites that differ it moves less than the mean, since no coordinate follows
    the one site that learns most about it.

    Raises:
        ValueError: weights other than "uniform".
    """

    takes_buffers: ClassVar[bool] = False

    def combine(self, updates: Iterable[Update]) -> Update:
        return _by_coordinate(_collected(updates), _median)


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(UniformAvg):
    """The mean of each coordinate without its largest and smallest values (Yin et al., ICML 2018, arXiv 1803.01498).

    Holds while at most the share `trim` of the updates is bad, and uses more of the good ones than the median. With
    trim=0 it is the uniform mean.

    Args:
        trim: share of the updates cut off at each end, rounded up to whole updates; at least one update is left.

    Raises:
        ValueError: a share outside [0, 0.5), or weights other than "uniform".
    """

    takes_buffers: ClassVar[bool] = False
    trim: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_within(below=0.5, trim=self.trim)

    def combine(self, updates: Iterable[Update]) -> Update:
        collected = _collected(updates)
        count = len(collected)
        cut = min(math.ceil(self.trim * count - 1e-9), (count - 1) // 2)  # 0.1 * 30 is a little above 3
        return _by_coordinate(collected, lambda values: values.sort(dim=0).values[cut:count - cut].mean(dim=0))


@dataclass(frozen=True, kw_only=True)
class Krum(UniformAvg):
    """The updates that lie closest to their neighbours (Blanchard et al., NeurIPS 2017, arXiv 1703.02757).

    An update's score is the sum of its squared distances to the n - f - 2 nearest of the n received, f of which may be
    bad; n is at least 2f + 3. The result is the update with the smallest score, or the mean of the `chosen` best
    (multi-Krum). For few bad sites among many alike: it discards most updates, and follows the majority.

    Args:
        attackers: f, the number of bad updates to withstand.
        chosen: number of updates that are averaged.

    Raises:
        ValueError: a setting out of its range, weights other than "uniform", or before the first round too few sites.
    """

    takes_buffers: ClassVar[bool] = False
    one_server: ClassVar[bool] = True

    attackers: int
    chosen: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(least=0, attackers=self.attackers)
        check_whole(chosen=self.chosen)

    @property
    def needed(self) -> int:
        """Number of updates needed."""
        return max(2 * self.attackers + 3, self.attackers + self.chosen)

    def bind(self, run: Run) -> Krum:
        if len(run.sites) < self.needed:
            raise ValueError(f"{self!r} needs {self.needed} updates, the run has {len(run.sites)} sites; expect fewer "
                             "attackers, choose fewer updates, or use CoordinateMedian()")
        return self

    def combine(self, updates: Iterable[Update]) -> Update:
        collected = _collected(updates)
        if len(collected) < self.needed:
            raise TooFewUpdates(f"{self!r} needs {self.needed} updates, it received {len(collected)}; expect fewer "
                                "attackers, or use CoordinateMedian()")
        scores = self.scores(collected)
        best = sorted(range(len(collected)), key=scores.__getitem__)[:self.chosen]
        return weighted_mean(replace(collected[k], weight=1.0, metrics={}) for k in sorted(best))

    def scores(self, updates: Sequence[Update]) -> list[float]:
        """The distance of each update from its nearest neighbours; the smaller the better."""
        near = len(updates) - self.attackers - 2
        squares = [[0.0] * len(updates) for _ in updates]
        for i, one in enumerate(updates):
            for j, other in enumerate(updates[:i]):
                squares[i][j] = squares[j][i] = square_distance(one.delta, other.delta)
        return [sum(sorted(row[:i] + row[i + 1:])[:near]) for i, row in enumerate(squares)]


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(FedAvg):
    """The point with the smallest sum of distances to the updates (RFA: Pillutla et al. 2022, arXiv 1912.13445).

    Holds as long as bad sites have less than half of the weight, which their senders claim: use weights="uniform" where
    sites may be malicious. Found by the smoothed Weiszfeld algorithm of the paper, begun at the coordinate median
    rather than at the mean, which one bad site can move arbitrarily far.

    Args:
        iterations: largest number of iterations.
        nu: distances below this, in the unit of the weights, count as this, so that an update in the median's place
            doesn't stop it.

    Raises:
        ValueError: a setting out of its range.
    """

    takes_buffers: ClassVar[bool] = False
    iterations: int = 100
    nu: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(iterations=self.iterations)
        check_positive(nu=self.nu)

    def combine(self, updates: Iterable[Update]) -> Update:
        collected = _collected(updates)
        point = _by_coordinate(collected, _median)
        weights = [self._weight(update) for update in collected]
        for _ in range(self.iterations):
            distances = [math.sqrt(square_distance(update.delta, point.delta)) for update in collected]
            nearer = weighted_mean(replace(update, weight=weight / max(self.nu, distance), metrics={})
                                   for update, weight, distance in zip(collected, weights, distances, strict=True))
            step = math.sqrt(square_distance(nearer.delta, point.delta))
            point = nearer
            if step <= 1e-9 * max(self.nu, sorted(distances)[len(distances) // 2]):
                break
        return replace(point, weight=sum(weights))


@dataclass(frozen=True, kw_only=True)
class NormBound(FedAvg):
    """The mean of updates that are first scaled down to a norm of at most `bound` (Sun et al. 2019, arXiv 1911.07963).

    No site can move the model by more than its share of `bound`, however far it scales its update. The mildest of these
    strategies: it streams, honours weights, and changes nothing while all updates are shorter.
    `Admission(max_norm=...)` refuses longer updates instead; a clip at the site binds only sites that apply it.

    Args:
        bound: Euclidean norm, in the unit of the weights; see `History.sites()` for those of a run.

    Raises:
        ValueError: a bound that is not positive.
    """

    takes_buffers: ClassVar[bool] = False
    bound: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(bound=self.bound)

    def combine(self, updates: Iterable[Update]) -> Update:
        def shortened(update: Update) -> Update:
            norm = update.norm()
            return update if norm <= self.bound else update.map(lambda t: t.double() * (self.bound / norm))

        return super().combine(map(shortened, updates))


def _collected(updates: Iterable[Update]) -> list[Update]:
    """All updates, by the names of their sites; raises `ValueError` if there is none, or one that is not finite."""
    collected = sorted(updates, key=lambda update: update.site)
    if not collected:
        raise TooFewUpdates("no update to combine: no site of the cohort answered")
    for update in collected:
        for name, t in update.delta.items():
            if not torch.isfinite(t).all():
                raise ValueError(f"the update of {update.site} is NaN or infinite in {name}")
    return collected


def _by_coordinate(updates: Sequence[Update], combined: Callable[[torch.Tensor], torch.Tensor]) -> Update:
    """One update from a function of the stacked values, shape (updates, ...), in float64; one tensor at a time."""
    delta: Mapping[str, torch.Tensor] = {
        name: combined(torch.stack([update.delta[name].double() for update in updates])) for name in updates[0].delta}
    return Update(site="mean", delta=delta, weight=float(len(updates)), steps=sum(update.steps for update in updates))


def _median(values: torch.Tensor) -> torch.Tensor:
    ordered, count = values.sort(dim=0).values, len(values)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
