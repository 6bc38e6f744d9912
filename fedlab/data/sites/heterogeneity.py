"""How much sites differ, seen from their statistics alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedlab.data.sites.statistics import Distribution, SiteStatistics, combine

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Heterogeneity", "heterogeneity", "jensen_shannon", "wasserstein"]

Matrix = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Heterogeneity:
    """Distances between sites. Made by `heterogeneity`.

    Two small sites differ by chance alone, and bins that a small site had to merge blur the distances of its volumes;
    compare with what a partition at random of the same sizes gives.

    Attributes:
        statistics: of each site, as they were told.
        wasserstein: by quantity ("FLAIR", "WT volume" ...), the earth mover's distance between each two sites, shape
            (sites, sites), in the unit of the images or in ml; NaN where a site withheld it.
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
        return tuple(told.site for told in self.statistics)

    def table(self) -> pd.DataFrame:
        """A row a site: patients, median volumes in ml, and the shift of each quantity; NaN where withheld."""
        import pandas as pd

        rows = {}
        for number, told in enumerate(self.statistics):
            medians = {f"{region} median [ml]": dict(volumes.quantiles).get(0.5)
                       for region, volumes in told.volumes_ml.items()}
            shifts = {f"{quantity} shift": values[number] for quantity, values in self.shift.items()}
            rows[told.site] = {"patients": told.patients, **medians, **shifts}
        return pd.DataFrame.from_dict(rows, orient="index").astype(float).rename_axis("site")

    def __repr__(self) -> str:
        means = ", ".join(f"{quantity} {_mean_apart(matrix):.2f}" for quantity, matrix in self.wasserstein.items())
        return f"<Heterogeneity of {len(self.statistics)} sites; mean earth mover's distance: {means}>"

    def _repr_html_(self) -> str:
        table: str = self.table().to_html(float_format="{:.3g}".format, na_rep="withheld")
        return ("<p>Shift: earth mover's distance from all other sites together, of intensities in the images' unit, "
                f"of volumes in ml.</p>{table}")


def heterogeneity(statistics: Sequence[SiteStatistics]) -> Heterogeneity:
    """Compares sites by what they told; sites that withheld everything stay in the tables as NaN.

    Raises:
        ValueError: fewer than two sites, or two of the same name.
    """
    if len(statistics) < 2:
        raise ValueError(f"two sites or more can be compared, got the statistics of {len(statistics)}")
    combine(statistics)  # refuses a site named twice
    told: dict[str, list[Distribution | None]] = {}
    for kind, label in (("intensity", "{}"), ("volumes_ml", "{} volume")):
        for name in dict.fromkeys(name for each in statistics for name in getattr(each, kind)):
            told[label.format(name)] = [getattr(each, kind).get(name) for each in statistics]
    return Heterogeneity(
        statistics=tuple(statistics),
        wasserstein={name: _pairwise(parts, wasserstein) for name, parts in told.items()},
        jensen_shannon={name: _pairwise(parts, jensen_shannon) for name, parts in told.items()},
        shift=_shifts(statistics, told))


def wasserstein(one: Distribution, other: Distribution) -> float:
    """Earth mover's distance: the area between the cumulated shares, in the unit of the edges."""
    edges = np.array(sorted({*one.edges, *other.edges}))
    gap = np.concatenate(([0.0], np.cumsum(one.shares(edges.tolist()) - other.shares(edges.tolist()))))
    left, right = gap[:-1], gap[1:]
    both = np.abs(left) + np.abs(right)
    # Where the curves cross within a bin, the area is that of two triangles.
    area = np.where(left * right < 0, (left**2 + right**2) / np.where(both > 0, 2 * both, 1.0), both / 2)
    return float(area @ np.diff(edges))


def jensen_shannon(one: Distribution, other: Distribution) -> float:
    """Square root of the Jensen-Shannon divergence to base 2: 0 for the same shares, 1 where nothing overlaps."""
    from scipy.special import rel_entr

    edges = sorted({*one.edges, *other.edges})
    left, right = one.shares(edges), other.shares(edges)
    middle = (left + right) / 2
    divergence = float((rel_entr(left, middle) + rel_entr(right, middle)).sum()) / 2 / math.log(2)
    return math.sqrt(min(max(divergence, 0.0), 1.0))  # rounding may leave either end


def _pairwise(parts: Sequence[Distribution | None], measure: Callable[[Distribution, Distribution], float]) -> Matrix:
    matrix = np.full((len(parts), len(parts)), np.nan)
    for a, one in enumerate(parts):
        for b, other in enumerate(parts[:a + 1]):
            if one is not None and other is not None:
                matrix[a, b] = matrix[b, a] = measure(one, other) if a != b else 0.0
    return matrix


def _shifts(statistics: Sequence[SiteStatistics], told: Mapping[str, Sequence[Distribution | None]]) \
        -> dict[str, NDArray[np.float64]]:
    """Each site against all others together."""
    shift = {name: np.full(len(statistics), np.nan) for name in told}
    for number in range(len(statistics)):
        rest = combine([*statistics[:number], *statistics[number + 1:]])
        others = {**rest.intensity, **{f"{name} volume": volumes for name, volumes in rest.volumes_ml.items()}}
        for name, parts in told.items():
            own = parts[number]
            if own is not None and name in others:
                shift[name][number] = wasserstein(own, others[name])
    return shift


def _mean_apart(matrix: Matrix) -> float:
    apart = matrix[np.triu_indices(len(matrix), 1)]
    return float(np.nanmean(apart)) if np.isfinite(apart).any() else float("nan")
