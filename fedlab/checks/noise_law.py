"""Statistics of noise: bounds that a right technique exceeds with a probability of less than 1e-9 each.

All take arrays of samples, one row per run with other random numbers, and know nothing of techniques. Bounds are exact
where the law is known (χ² of variances, Wishart of covariances, binomial of counts) and generous elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["LEVEL", "allowed_probability", "least_distance", "least_joint_distance", "odd_draws", "odd_law",
           "probability_of_events", "quiet_part", "shrink", "spread_of_norms"]

Floats = npt.NDArray[np.float64]

#: Probability with which one bound is exceeded by chance.
LEVEL = 1e-10
#: Degrees of freedom from which sums of variances are taken as normal, at `_FAR` standard errors.
_MANY, _FAR = 2000, 7.5
#: Orders of Rényi divergences at which the probability of an event is bounded.
_ORDERS = np.array([1.05, 1.1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 1024])


def shrink(freedom: float, *, level: float = LEVEL) -> float:
    """The quantile at `level` of a variance estimated with so many degrees of freedom, over the true variance."""
    from scipy.stats import chi2

    return float(chi2.ppf(level, freedom) / freedom) if freedom > 0 else 0.0


def least_distance(parts: Sequence[tuple[float, float]]) -> float:
    """The least true Σ d²/σ² that agrees with estimates (Σ d²/s², degrees of freedom of s²) of independent parts."""
    parts = [(square, freedom) for square, freedom in parts if square > 0]
    if any(math.isinf(square) for square, _ in parts):
        return math.inf
    many = [(square, freedom) for square, freedom in parts if freedom >= _MANY]
    total = sum(square for square, _ in many)
    error = math.sqrt(sum(2 * square**2 / freedom for square, freedom in many))
    few = [(square, freedom) for square, freedom in parts if freedom < _MANY]
    return max(0.0, total - _FAR * error) + sum(square * shrink(freedom, level=LEVEL / max(1, len(few)))
                                                for square, freedom in few)


def least_joint_distance(shift: Floats, noise: Floats) -> tuple[float, float]:
    """Of entries whose noise is correlated over q places, such as rounds: Σ dᵀ C⁻¹ d and its degrees of freedom.

    Args:
        shift: of every entry at every place, (q, entries).
        noise: centred, (runs, q, entries); equal laws for all entries.
    """
    places, entries = shift.shape
    freedom = entries * (len(noise) - 1)
    flat = noise.transpose(0, 2, 1).reshape(-1, places)
    covariance = flat.T @ flat / max(1, freedom)
    scale = np.sqrt(np.maximum(np.diag(covariance), 1e-300))
    correlation = covariance / np.outer(scale, scale) + 1e-9 * np.eye(places)
    moved = shift / scale[:, None]
    return float((moved * np.linalg.solve(correlation, moved)).sum()), freedom - places + 1


def quiet_part(noise: Floats, shift: Floats, tensors: Sequence[slice]) -> float:
    """The least Σ d²/σ² of entries that are sorted by the noise of half of the runs, measured in the other half.

    Finds entries with less noise than the other entries of their tensor; noise is (runs, entries), not centred.
    """
    half = len(noise) // 2
    first, rest = noise[:half].var(axis=0, ddof=1), noise[half:].var(axis=0, ddof=1)
    parts: list[tuple[float, float]] = []
    for tensor in tensors:
        moved = tensor.start + np.flatnonzero(shift[tensor])
        order = moved[np.argsort(first[moved], kind="stable")]
        for chosen in np.array_split(order, min(8, len(order) // 40 + 1)) if len(order) else []:
            variance, square = float(rest[chosen].mean()), float((shift[chosen]**2).sum())
            parts.append((square / variance if variance > 0 else math.inf, len(chosen) * (len(noise) - half - 1)))
    return least_distance(parts)


def odd_law(noise: Floats) -> tuple[float, float, float]:
    """Skewness, excess kurtosis and excess of far values of noise, each in standard errors of normal noise.

    Args:
        noise: (runs, entries) of equal scale within the array; entries without noise are left out.
    """
    runs = len(noise)
    centred = noise - noise.mean(axis=0)
    second = (centred**2).mean(axis=0)
    centred, second = centred[:, second > 0], second[second > 0]
    if not centred.size:
        return 0.0, 0.0, 0.0
    skew = (centred**3).mean(axis=0) / second**1.5
    tails = (centred**4).mean(axis=0) / second**2
    # Moments of the sample skewness and kurtosis of normal values (Fisher 1930).
    n, root = float(runs), math.sqrt(len(second))
    skew_error = math.sqrt(6 * (n - 2) / ((n + 1) * (n + 3))) / root
    tail_error = math.sqrt(24 * n * (n - 2) * (n - 3) / ((n + 1)**2 * (n + 3) * (n + 5))) / root
    far = 3.3
    scaled = np.abs(centred) / np.sqrt(second.mean() * n / (n - 1))
    # A value less the mean of the runs has (n - 1) / n of the variance.
    chance = math.erfc(far / math.sqrt(2 * (n - 1) / n))
    count, expected = float((scaled > far).sum()), chance * scaled.size
    return (float(skew.mean()) / skew_error, (float(tails.mean()) - 3 * (n - 1) / (n + 1)) / tail_error,
            (count - expected) / math.sqrt(max(expected, 1.0)))


def spread_of_norms(noise: Floats) -> float:
    """The variance of squared norms over that of normal noise: 1 for Gaussian noise, 2 where the norm is Gamma."""
    squares = (noise**2).sum(axis=1)
    return float(squares.var(ddof=1) / squares.mean()**2 * noise.shape[1] / 2)


def allowed_probability(divergence: Callable[[Floats], Floats], *, mu: float = math.inf
                        ) -> Callable[[Floats], Floats]:
    """The largest probability of an event, given that of a neighbour.

    Args:
        divergence: Rényi divergences by order.
        mu: of Gaussian differential privacy (Dong et al. 2019), if all releases are Gaussian.
    """
    from scipy.special import ndtr, ndtri

    bound, orders = divergence(_ORDERS), _ORDERS

    def allowed(other: Floats) -> Floats:
        with np.errstate(divide="ignore", over="ignore"):  # probability preservation, van Erven and Harremoës 2014
            logs = np.log(np.maximum(other, 1e-300))
            powers = (bound[:, None] + logs) * ((orders - 1) / orders)[:, None]
        likely: Floats = np.exp(np.minimum(powers, 0.0)).min(axis=0)
        return np.minimum(likely, ndtr(ndtri(other) + mu)) if math.isfinite(mu) else likely
    return allowed


def probability_of_events(one: Floats, other: Floats, allowed: Callable[[Floats], Floats]) -> float:
    """An upper bound of the chance that samples of two neighbours differ so much, over the events that differ most."""
    best = 1.0
    values = np.concatenate([one, other])
    for a, b in ((one, other), (other, one)):
        above = (a[:, None] >= values).mean(axis=0) - (b[:, None] >= values).mean(axis=0)
        equal = (a[:, None] == values).mean(axis=0) - (b[:, None] == values).mean(axis=0)
        for gaps, test in ((above, np.greater_equal), (-above, np.less), (equal, np.equal)):
            where = int(np.argmax(gaps))
            if gaps[where] < 0.35:
                continue
            event_a, event_b = int(test(a, values[where]).sum()), int(test(b, values[where]).sum())
            best = min(best, 2 * len(values) * _chance(event_a, len(a), event_b, len(b), allowed))
    return best


def _chance(count_a: int, runs_a: int, count_b: int, runs_b: int, allowed: Callable[[Floats], Floats]) -> float:
    from scipy.stats import binom

    chances = np.linspace(0, 1, 401)
    likely: Any = binom.cdf(count_b, runs_b, chances) * binom.sf(count_a - 1, runs_a, allowed(chances))
    return float(likely.max())


def odd_draws(drawn: npt.NDArray[np.bool_], rate: float) -> str | None:
    """What tells draws from independent ones with at most the probability `rate`; None if nothing does.

    Args:
        drawn: whether a patient was drawn, (rounds, steps, patients).
        rate: below 1.
    """
    from scipy.stats import binom

    rounds, steps, patients = drawn.shape
    found = float(drawn.mean())
    if binom.sf(int(drawn.sum()) - 1, drawn.size, rate) < LEVEL:
        return f"patients are drawn with probability {found:.3g}, charged is {rate:.3g}"
    most = int(drawn.sum(axis=(0, 1)).max())
    if binom.sf(most - 1, rounds * steps, rate) < LEVEL / patients:
        return f"a patient is drawn with probability {most / (rounds * steps):.3g}, charged is {rate:.3g}"
    empty = int((drawn.sum(axis=2) == 0).sum())
    if binom.cdf(empty, rounds * steps, (1 - rate)**patients) < LEVEL:
        return (f"{empty} of {rounds * steps} steps draw no patient, of independent draws "
                f"{rounds * steps * (1 - rate)**patients:.0f} would")
    for axis, what in ((2, "the number of patients of a step"), (1, "the number of steps of a patient in a round"),
                       (0, "a patient's place in a round")):
        size = drawn.shape[axis]
        if size < 2 or found <= 0:
            continue
        counts, variance = drawn.sum(axis=axis), size * found * (1 - found)
        spread = float(((counts - counts.mean())**2).sum()) / variance
        cells = counts.size
        error = math.sqrt(cells * (2 + max(0.0, (1 / (found * (1 - found)) - 6) / size)))
        if abs(spread - cells) > 9 * error:
            return (f"{what} varies {'less' if spread < cells else 'more'} than with independent draws: "
                    f"{spread / cells:.2f} times as much")
    return None
