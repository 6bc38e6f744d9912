"""Intervals of 95 % for what attacks count: areas under ROC curves, shares, and means of a few numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = ["Floats", "area_under_roc", "mean_interval", "share_interval", "true_positives"]

Floats = npt.NDArray[np.float64]


def area_under_roc(members: Floats, others: Floats) -> tuple[float, float, float]:
    """The AUC of scores, ties counted half, and its interval: (value, low, high).

    The interval solves |AUC − θ| = 1.96 √V(θ) with the variance of Hanley and McNeil 1982 (R. G. Newcombe, Statistics
    in Medicine 25:559, 2006, method 5). Unlike that of DeLong and the bootstrap it has a width where all scores are in
    order, as with the few patients of a site.
    """
    members, others = _finite(members, "members"), _finite(others, "others")
    gaps = members[:, None] - others[None]
    value = float(((gaps > 0) + 0.5 * (gaps == 0)).mean())
    spread = (len(members) + len(others)) / 2 - 1

    def distance(theta: float) -> float:
        rest = 1 - theta
        variance = theta * rest * (1 + spread * (rest / (2 - theta) + theta / (1 + theta))) / gaps.size
        return abs(value - theta) - _normal_quantile() * math.sqrt(max(variance, 0.0))

    low = 0.0 if value == 0 else _crossing(distance, inside=value, outside=0.0)
    return value, low, 1.0 if value == 1 else _crossing(distance, inside=value, outside=1.0)


def true_positives(members: Floats, others: Floats, *, rate: float = 0.01) -> tuple[int, int, float]:
    """Members whose scores lie above the threshold that at most a share `rate` of the others exceed.

    Returns:
        The number of these members, that of the others above the threshold, and the share of members that would be
        expected above it if members and others did not differ: (k + 1) / (n + 1) for k of n others.
    """
    members, others = _finite(members, "members"), _finite(others, "others")
    false = math.floor(rate * len(others))
    threshold = np.sort(others)[::-1][false]
    return int((members > threshold).sum()), int((others > threshold).sum()), (false + 1) / (len(others) + 1)


def share_interval(count: int, trials: int) -> tuple[float, float, float]:
    """A share and its exact interval (Clopper and Pearson 1934): (value, low, high)."""
    from scipy.stats import beta

    low = 0.0 if count == 0 else float(beta.ppf(0.025, count, trials - count + 1))
    high = 1.0 if count == trials else float(beta.ppf(0.975, count + 1, trials - count))
    return count / trials, low, high


def mean_interval(values: npt.ArrayLike) -> tuple[float, float, float]:
    """A mean and its interval by Student's t: (value, low, high); infinitely wide for one value."""
    from scipy.stats import t

    found = _finite(values, "values")
    mean = float(found.mean())
    if len(found) == 1:
        return mean, -math.inf, math.inf
    half = float(t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found)))
    return mean, mean - half, mean + half


def _finite(values: npt.ArrayLike, what: str) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise ValueError(f"{what} are one or more finite numbers in one dimension, got {found}")
    return found


def _normal_quantile() -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(0.975)


def _crossing(distance: Callable[[float], float], *, inside: float, outside: float) -> float:
    """Where the distance changes its sign between a point within an interval and one beyond it."""
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if distance(middle) <= 0 else (inside, middle)
    return outside
