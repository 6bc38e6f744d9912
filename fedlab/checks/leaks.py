"""What finally leaves, compared between two neighbouring inputs: values, and everything that is sent beside them.

A guarantee bounds how much likelier an event may become for a neighbour, and with it how far a mean may move. Both are
tried with functions of the update in which raw values would show: sums, projections, zeros, signs, the last bits of
numbers and the steps between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedlab.checks.noise_law import probability_of_events, shrink
from fedlab.checks.samples import Outcome

__all__ = ["differing", "moved_far", "statistics", "suspects"]

Floats = npt.NDArray[np.float64]
Allowed = Callable[[Floats], Floats]

#: Binary places of an entry that are looked at.
_BITS = range(-2, 31)
#: Chance below which a difference is none by chance, of some hundred per check; below which it is looked at again.
_RARE, _SUSPECT = 1e-10, 1e-3
#: Values of few entries of which the steps are looked at.
_GAPS = 4000


def differing(one: Sequence[Outcome], other: Sequence[Outcome], *, allowed: Allowed, covered: frozenset[str]
              ) -> str | None:
    """The name of something sent beside the delta that depends on the update more than is allowed.

    Args:
        one, other: of the runs of two neighbours, in one round.
        allowed: the largest probability of an event given that of a neighbour.
        covered: names of metrics that noise at the server covers.
    """
    first = "whether it is sent"
    for name in sorted({name for seen in (*one, *other) for name in seen}, key=lambda name: (name != first, name)):
        if name.removeprefix("metrics ") in covered:
            continue
        a, b = ([seen.get(name, "") for seen in group] for group in (one, other))
        if len(set(a)) == 1 and len(set(b)) == 1:
            # Sizes may follow from noisy values: there a difference in all runs may be chance, if much is allowed.
            if a[0] != b[0] and (name != "encoded" or probability_of_events(
                    np.zeros(len(a)), np.ones(len(b)), allowed) < 1e-6):
                return name
        elif probability_of_events(*_numbers(a, b), allowed) < _RARE:
            return name
    return None


def _numbers(one: Sequence[float | str], other: Sequence[float | str]) -> tuple[Floats, Floats]:
    codes = {value: float(place) for place, value in enumerate(sorted({v for v in (*one, *other)
                                                                     if isinstance(v, str)}))}
    a, b = (np.array([codes[v] if isinstance(v, str) else v for v in group], dtype=float) for group in (one, other))
    return a, b


def statistics(entries: Floats, sums: Floats, *, signs: Floats, heavy: npt.NDArray[np.bool_], single: bool
               ) -> dict[str, Floats]:
    """Functions of updates in which a raw update of these signs, larger in its `heavy` entries, would show.

    Args:
        entries: kept entries of what is sent, (runs, entries).
        sums: of its tensors, (runs, tensors).
        signs: of the raw update's entries.
        heavy: whether an entry of the raw update is one of the larger ones.
        single: whether values are sent in single precision.
    """
    positive = signs > 0
    found = {f"the sum of tensor {k}": sums[:, k] for k in range(sums.shape[1])} if sums.shape[1] <= 40 else {}
    found |= {
        "the sum along the update": entries @ (signs * (1 + 2 * heavy)),
        "the sum along the update's larger entries": entries @ (signs * heavy),
        "the norm": np.sqrt((entries**2).sum(axis=1)),
        "the sum of absolute values": np.abs(entries).sum(axis=1),
        "the largest absolute value": np.abs(entries).max(axis=1),
        "the number of zeros": (entries == 0).sum(axis=1).astype(float),
        "the number of entries with the update's sign": (np.sign(entries) == signs).sum(axis=1).astype(float),
    }
    if heavy.any() and not heavy.all():
        found["the zeros among the update's larger entries"] = (
            (entries == 0)[:, heavy].mean(axis=1) - (entries == 0)[:, ~heavy].mean(axis=1))
        found["the size of the update's larger entries"] = (
            np.abs(entries[:, heavy]).mean(axis=1) - np.abs(entries[:, ~heavy]).mean(axis=1))
    chosen = np.sort(np.unique(np.linspace(0, entries.shape[1] - 1, _GAPS).astype(int)))
    ordered = np.sort(entries[:, chosen], axis=1)
    gaps = np.diff(ordered, axis=1)
    rounding = np.abs(ordered).max(axis=1, keepdims=True) * 2.0 ** (-21 if single else -50)
    found["the number of different values"] = (gaps > rounding).sum(axis=1).astype(float)
    found["the smallest step between values"] = np.where(gaps > rounding, gaps, np.inf).min(axis=1)
    sample = entries[:, chosen]
    finest = np.abs(entries).max() * 2.0 ** (-22 if single else -51)  # finer places depend on the size of a value
    for bit in (bit for bit in _BITS if 2.0**-bit >= finest > 0):
        odd = np.floor(np.abs(sample) * 2.0**bit) % 2
        found[f"binary place {bit}"] = odd.mean(axis=1)
        found[f"binary place {bit} of positive entries"] = np.where(positive[chosen], odd, 1 - odd).mean(axis=1)
    return found


def suspects(one: Mapping[str, Floats], other: Mapping[str, Floats], allowed: Allowed) -> list[str]:
    """The functions of an update whose values are worth more runs; arguments as of `moved_far`."""
    return [name for name in one if name in other and probability_of_events(one[name], other[name], allowed) < _SUSPECT]


def moved_far(one: Mapping[str, Floats], other: Mapping[str, Floats], *, chi: float, allowed: Allowed
              ) -> tuple[str, str] | None:
    """The first function of an update whose values tell two neighbours apart more than is allowed.

    Args:
        one, other: values of each function, (runs,).
        chi: an upper bound of √χ² between the neighbours. If it is infinite, only events are compared.
        allowed: the largest probability of an event given that of a neighbour.

    Returns:
        Its name, and what was seen and allowed, in words.
    """
    for name in [name for name in one if name in other]:
        a, b = one[name], other[name]
        finite = np.isfinite(a).all() and np.isfinite(b).all()
        shift = abs(float(a.mean() - b.mean())) if finite else 0.0
        freedom = len(a) + len(b) - 2
        spread = math.sqrt(float(a.var() * len(a) + b.var() * len(b)) / freedom / shrink(freedom)) if finite else 0.0
        bound = spread * (chi + 7 * math.sqrt(1 / len(a) + 1 / len(b))) if math.isfinite(chi) else math.inf
        if shift > max(bound, 1e-9) and not min(a.max(), b.max()) >= max(a.min(), b.min()):
            return name, f"it moves by {shift:.3g}, the ledger allows {bound:.3g}"
        if probability_of_events(a, b, allowed) < _RARE:
            return name, f"it lies around {np.median(a):.4g} for one update and {np.median(b):.4g} for the other"
    return None
