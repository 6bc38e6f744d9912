"""Lower bounds of ε from guesses about canaries: what an audit in one run shows, with confidence.

m canaries are in or out by independent fair coins. An attacker who sees the output guesses for g of them and is right
for c. Two bounds:

- `epsilon_in_one_run`: for any mechanism (T. Steinke, M. Nasr, M. Jagielski, Privacy Auditing with One (1) Training
  Run, NeurIPS 2023, arXiv 2305.08846, theorem 5.2). It assumes nothing and stays far below the truth.
- `refuted`: for a trade-off function f (S. Mahloujifar, L. Melis, K. Chaudhuri, Auditing f-Differential Privacy in One
  Run, 2024, arXiv 2410.22235, algorithm 3). It tests the releases of a ledger as what they are, such as Gaussian noise
  of a certain size, and is much tighter.

Where every canary has a run of its own, right guesses are independent, and their binomial law is tighter again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from fedlab.core.settings import check_share, check_whole, check_within
from fedlab.privacy.accounting.mechanisms import Gaussian, Pure, Release, renyi_of

__all__ = ["Guesses", "alone_refuted", "best_accuracy", "epsilon_in_one_run", "guesses_alone", "louder", "make_guesses",
           "refuted", "trade_off"]

#: Guesses about canaries: their number, and how many of them are right.
Guesses = tuple[int, int]
#: The least probability of an event under a neighbour, given that under the other.
TradeOff = Callable[[float], float]


def make_guesses(scores: npt.NDArray[np.float64], present: npt.NDArray[np.bool_]) -> list[Guesses]:
    """The guesses of an attacker who says "in" for high scores, and "out" for low ones or nothing.

    All canaries, a quarter of them at both ends, and the uppermost quarter, tenth and thirtieth: fixed in advance, so
    that a bound over all of them has the confidence of each, divided by their number.
    """
    order = np.argsort(-scores, kind="stable")
    right_in, right_out = np.cumsum(present[order]), np.cumsum(~present[order[::-1]])
    total = len(scores)
    sides = [(total - total // 2, total // 2), (total // 8, total // 8), (total // 4, 0), (total // 10, 0),
             (total // 30, 0)]
    return [(top + bottom, int((right_in[top - 1] if top else 0) + (right_out[bottom - 1] if bottom else 0)))
            for top, bottom in sides if top + bottom]


def guesses_alone(scores: npt.NDArray[np.float64], present: npt.NDArray[np.bool_]) -> Guesses:
    """Guesses by the threshold that is best for the first fifth of the canaries, about all the others."""
    first = max(1, len(scores) // 5)
    right = [(scores[:first] >= threshold) == present[:first] for threshold in scores[:first]]
    best = np.array([one.sum() for one in right])
    threshold = np.median(scores[:first][best == best.max()])  # in the middle of equally good ones
    return len(scores) - first, int(((scores[first:] >= threshold) == present[first:]).sum())


def epsilon_in_one_run(guesses: Guesses, *, canaries: int, delta: float, level: float = 0.05) -> float:
    """The largest ε that is refuted at δ, for any mechanism; 0 if none is.

    Args:
        guesses: number of guesses and of right ones.
        canaries: in total.
        delta: of the guarantee.
        level: probability with which the bound may be wrong.

    Raises:
        ValueError: numbers that contradict each other.
    """
    _check(guesses, canaries, level)
    check_within(below=1, delta=delta)
    from scipy.stats import binom

    made, right = guesses

    def chance(epsilon: float) -> float:  # of so many right guesses at most
        likely = 1 / (1 + math.exp(-epsilon))
        tail = float(binom.sf(right - 1, made, likely))
        steps = np.arange(1, right + 1)
        gained = (binom.sf(right - steps - 1, made, likely) - tail) / steps
        return tail + 2 * canaries * delta * float(gained.max(initial=0.0))

    if chance(0.0) > level:
        return 0.0
    low, high = 0.0, 1.0
    while chance(high) <= level and high < 64:
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if chance(middle) <= level else (low, middle)
    return low


def refuted(least: TradeOff, guesses: Guesses, *, canaries: int, level: float = 0.05) -> bool:
    """Whether a mechanism with this trade-off function would allow so many right guesses with less than `level`.

    Args:
        least: the trade-off function, or one below it.
        guesses, canaries, level: as in `epsilon_in_one_run`.
    """
    _check(guesses, canaries, level)
    made, right = guesses
    if made == 0:
        return False
    # From c right guesses downwards: bounds of the share of right and of wrong ones that a larger count needs.
    correct, wrong = level * right / canaries, level * (made - right) / canaries
    for count in range(right - 1, -1, -1):
        more = max(wrong, least(correct))
        if more == wrong:
            break
        correct = min(correct + count / (made - count) * (more - wrong), 1.0)
        wrong = more
    return correct + wrong > made / canaries


def alone_refuted(accuracy: float, guesses: Guesses, *, level: float = 0.05) -> bool:
    """Whether so many right guesses, independent and right with at most this probability, have less than `level`."""
    from scipy.stats import binom

    made, right = guesses
    return float(binom.sf(right - 1, made, accuracy)) < level


def best_accuracy(least: TradeOff) -> float:
    """The largest probability of a right guess about one canary that a trade-off function allows."""
    low, high = 0.0, 1.0

    def right(p: float) -> float:
        return (1 + p - least(p)) / 2

    for _ in range(60):  # concave
        one, other = low + (high - low) / 3, high - (high - low) / 3
        low, high = (one, high) if right(one) < right(other) else (low, other)
    return right(low)


def louder(releases: Sequence[Release], factor: float) -> list[Release]:
    """The releases with their noise divided by a factor."""
    return [replace(one, noise_multiplier=one.noise_multiplier / factor) if isinstance(one, Gaussian) else
            replace(one, epsilon=one.epsilon * factor) if isinstance(one, Pure) else
            replace(one, rho=one.rho * factor**2) for one in releases]


def trade_off(releases: Sequence[Release]) -> TradeOff:
    """The trade-off function of releases: exact for Gaussian noise without sampling, else a function below it.

    For others it follows from their Rényi divergences (probability preservation, van Erven and Harremoës 2014), and for
    pure releases from the sum of their ε.
    """
    from statistics import NormalDist

    if all(isinstance(one, Gaussian) and one.sample_rate == 1 for one in releases):
        mu = math.sqrt(math.fsum(one.steps / one.noise_multiplier**2 for one in releases if isinstance(one, Gaussian)))
        normal = NormalDist()
        return lambda p: p if p in (0.0, 1.0) else normal.cdf(normal.inv_cdf(p) - mu)
    orders, divergences = renyi_of(releases)
    orders, divergences = orders[~np.isnan(divergences)], divergences[~np.isnan(divergences)]
    powers = orders / (orders - 1)
    pure = [one for one in releases if isinstance(one, Pure)]
    epsilon = math.fsum(one.epsilon * one.times for one in pure) if len(pure) == len(releases) else math.inf

    def least(p: float) -> float:
        if p <= 0 or p >= 1:
            return float(p >= 1)
        found = np.exp(powers * math.log(p) - divergences).max(initial=0.0)  # of the event
        rest = np.exp(np.minimum((divergences + math.log1p(-p)) / powers, 0.0)).min(initial=1.0)  # complement, at most
        basic = 0.0 if epsilon > 700 else max(p * math.exp(-epsilon), 1 - (1 - p) * math.exp(epsilon))
        return float(max(found, 1 - rest, basic, 0.0))
    return least


def _check(guesses: Guesses, canaries: int, level: float) -> None:
    check_whole(canaries=canaries)
    check_share(level=level)
    if not 0 <= guesses[1] <= guesses[0] <= canaries:
        raise ValueError(f"expected right guesses ≤ guesses ≤ canaries, got {guesses[1]}, {guesses[0]} and {canaries}")
