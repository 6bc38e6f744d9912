"""Differences between sites, computed from their statistics only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedlab.data.sites.distributions import Distribution, SiteStatistics, wasserstein
from fedlab.data.sites.statistics import combine

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Heterogeneity", "heterogeneity", "jensen_shannon", "wasserstein"]

Matrix = NDArray[np.float64]
Measure = Callable[[Distribution, Distribution], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Heterogeneity:
    """Distances between sites. Created by `heterogeneity`.

    Small sites differ by chance alone; compare with a random partition of the same sizes. A distance is NaN where a
    site withholds the quantity, or where the bins that it releases are too wide to show how it is distributed:
    `reasons` says which. A known distance is exact up to half of the sum of both standard deviations, beside the width
    of the domain's bins, and much closer for sites of many patients.

    Attributes:
        statistics: of each site.
        wasserstein: by quantity ("FLAIR", "WT volume" ...), the earth mover's distance between each pair of sites,
            shape (sites, sites), in the unit of the images or in ml.
        jensen_shannon: likewise, the Jensen-Shannon distance between 0 and 1 (Endres & Schindelin 2003).
        shift: by quantity, the earth mover's distance of each site from all others together, shape (sites,).
    """

    statistics: tuple[SiteStatistics, ...]
    wasserstein: Mapping[str, Matrix]
    jensen_shannon: Mapping[str, Matrix]
    shift: Mapping[str, NDArray[np.float64]]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in the order of the matrices."""
        return tuple(own.site for own in self.statistics)

    @property
    def reasons(self) -> dict[str, tuple[str, ...]]:
        """By site, what is not known, and why; only sites of which something is not known."""
        return {own.site: own.withheld for own in self.statistics if own.withheld}

    def table(self) -> pd.DataFrame:
        """One row per site: patients, median volumes in ml, and the shift of each quantity; NaN if not known."""
        import pandas as pd

        rows = {}
        for number, own in enumerate(self.statistics):
            medians = {f"{region} median [ml]": dict(volumes.quantiles).get(0.5)
                       for region, volumes in own.volumes_ml.items()}
            shifts = {f"{quantity} shift": values[number] for quantity, values in self.shift.items()}
            rows[own.site] = {"patients": own.patients, **medians, **shifts}
        return pd.DataFrame.from_dict(rows, orient="index").astype(float).rename_axis("site")

    def __repr__(self) -> str:
        means = []
        for quantity, matrix in self.wasserstein.items():
            apart = matrix[np.triu_indices(len(matrix), 1)]
            means.append(f"{quantity} {f'{np.nanmean(apart):.2f}' if np.isfinite(apart).any() else 'not known'}")
        return f"<Heterogeneity of {len(self.statistics)} sites; mean earth mover's distance: {', '.join(means)}>"

    def _repr_html_(self) -> str:
        table: str = self.table().to_html(float_format="{:.3g}".format, na_rep="not known")
        reasons = "".join(f"<li>{escape(site)}: {escape('; '.join(why))}</li>" for site, why in self.reasons.items())
        return ("<p>Shift: earth mover's distance from all other sites together, of intensities in the images' unit, "
                f"of volumes in ml.</p>{table}{reasons and f'<p>Not known:</p><ul>{reasons}</ul>'}")


def heterogeneity(statistics: Sequence[SiteStatistics]) -> Heterogeneity:
    """Compares sites by their statistics.

    Raises:
        ValueError: fewer than two sites, or two of the same name.
    """
    if len(statistics) < 2:
        raise ValueError(f"expected the statistics of at least two sites, got {len(statistics)}")
    combine(statistics)  # refuses a site named twice
    own = [_by_quantity(each) for each in statistics]
    names = dict.fromkeys(name for each in own for name in each)
    spreads = {name: [each.get(name) for each in own]
               for name in sorted(names, key=lambda name: name.endswith(" volume"))}  # intensities first
    others = [_by_quantity(combine([*statistics[:number], *statistics[number + 1:]])) for number in range(len(own))]
    return Heterogeneity(
        statistics=tuple(statistics),
        wasserstein={name: _pairwise(parts, wasserstein) for name, parts in spreads.items()},
        jensen_shannon={name: _pairwise(parts, jensen_shannon) for name, parts in spreads.items()},
        shift={name: np.array([_between(part, other.get(name), wasserstein)
                               for part, other in zip(parts, others, strict=True)]) for name, parts in spreads.items()})


def _by_quantity(statistics: SiteStatistics) -> dict[str, Distribution | None]:
    """The distributions by name; None for one that cannot be compared."""
    every = {**statistics.intensity, **{f"{name} volume": spread for name, spread in statistics.volumes_ml.items()}}
    return {name: None if spread.coarse else spread for name, spread in every.items()}


def jensen_shannon(one: Distribution, other: Distribution) -> float:
    """Square root of the Jensen-Shannon divergence to base 2: 0 for equal shares, 1 without overlap."""
    from scipy.special import rel_entr

    edges = sorted({*one.edges, *other.edges})
    left, right = one.shares(edges), other.shares(edges)
    middle = (left + right) / 2
    divergence = float((rel_entr(left, middle) + rel_entr(right, middle)).sum()) / 2 / math.log(2)
    return math.sqrt(min(max(divergence, 0.0), 1.0))  # rounding may exceed either end


def _between(one: Distribution | None, other: Distribution | None, measure: Measure) -> float:
    return math.nan if one is None or other is None else measure(one, other)


def _pairwise(parts: Sequence[Distribution | None], measure: Measure) -> Matrix:
    matrix = np.full((len(parts), len(parts)), np.nan)
    for a, b in itertools.combinations_with_replacement(range(len(parts)), 2):
        matrix[a, b] = matrix[b, a] = _between(parts[b], parts[a], measure)
    return matrix
