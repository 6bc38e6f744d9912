"""The statistics that a site releases about its patients: what is counted, its distribution, and all of it together."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedlab.core.errors import DataError
from fedlab.core.types import MODALITIES, REGIONS, Spent

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PERCENTILES", "QUANTILES", "RAW", "Distribution", "Domain", "SiteStatistics", "wasserstein"]

#: Percentiles of a patient's intensities that serve as landmarks (Nyúl et al. 2000, variant with the deciles).
PERCENTILES = (1.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 99.0)
#: Quantiles of the patients' tumour volumes.
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def _ascending(edges: Sequence[float]) -> bool:
    return len(edges) > 1 and all(map(_is_number, edges)) and all(a < b for a, b in itertools.pairwise(edges))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class Domain:
    """What is counted, in which bins: agreed before anyone reads data, and the same at every site.

    Noise is added to every bin of every quantity: with noise, choose few modalities and regions and few, wide bins.
    Values below the first or above the last edge are counted in the first or last bin.

    Args:
        modalities: their intensities are counted.
        intensity: edges of the bins, in the unit of the images; the default suits z-scored images, see `RAW`.
        regions: their volumes are counted.
        volume_ml: edges of the bins in ml; the first bin of the default holds the patients without the region.
        spacings: voxel sizes to distinguish, as "1x1x1" in mm; all others are "other". None distinguishes all that
            occur, which is not possible with noise.
        shapes: voxel counts to distinguish, as "240x240x155"; likewise.

    Raises:
        ValueError: unknown names, or edges that do not ascend.
    """

    modalities: tuple[str, ...] = MODALITIES
    intensity: tuple[float, ...] = tuple(np.linspace(-5.0, 10.0, 61).round(6).tolist())
    regions: tuple[str, ...] = REGIONS
    volume_ml: tuple[float, ...] = (0.0, 0.1, *(round(2 ** (k / 2), 3) for k in range(17)))
    spacings: tuple[str, ...] | None = None
    shapes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if unknown := [*set(self.modalities).difference(MODALITIES), *set(self.regions).difference(REGIONS)]:
            raise ValueError(f"modalities must be from {', '.join(MODALITIES)} and regions from {', '.join(REGIONS)}, "
                             f"got {', '.join(sorted(unknown))}")
        for name in ("intensity", "volume_ml"):
            if not _ascending(getattr(self, name)):
                raise ValueError(f"{name} must be at least two finite, ascending edges, got {getattr(self, name)}")


#: For scans in a scanner's own units: bins that grow by a quarter of an octave from 1 to 32768.
RAW = Domain(intensity=tuple(round(2 ** (k / 4), 3) for k in range(61)))


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """The distribution of one quantity over a site's patients.

    Attributes:
        edges: of the bins, ascending; the outer bins also hold the values beyond them.
        counts: patients in each bin. A patient's voxels may lie in many bins and then count as shares that sum to 1.
            With noise a count may be fractional or negative.
        mean, sd: mean and standard deviation, or None if they are withheld.
        quantiles: pairs (fraction, value); of intensities the mean over patients of each patient's own quantile,
            of volumes the quantile over patients.
        coarse: whether the bins, merged because of the minimum number of patients, are too wide to show the
            distribution; it is then not compared with others.

    Raises:
        DataError: inconsistent numbers.
    """

    edges: tuple[float, ...]
    counts: tuple[float, ...]
    mean: float | None = None
    sd: float | None = None
    quantiles: tuple[tuple[float, float], ...] = ()
    coarse: bool = False

    def __post_init__(self) -> None:
        numbers = [*self.counts, *(v for v in (self.mean, self.sd) if v is not None), *sum(self.quantiles, ())]
        if not _ascending(self.edges) or len(self.counts) != len(self.edges) - 1 or not all(map(_is_number, numbers)):
            raise DataError(f"a distribution needs ascending edges, one count fewer and finite numbers; got "
                            f"{len(self.edges)} edges, {len(self.counts)} counts, mean {self.mean}, sd {self.sd}")

    @property
    def total(self) -> float:
        """Patients in all bins."""
        return math.fsum(self.counts)

    def shares(self, edges: Sequence[float] | None = None) -> NDArray[np.float64]:
        """The share of each bin, not negative even with noise, optionally in other bins.

        Args:
            edges: of the requested bins; the content of a bin is assumed to be spread evenly over it, and values
                beyond the requested edges belong to the outer bins.

        Raises:
            ValueError: the sum of all bins is not above 0.
        """
        if not self.total > 0:
            raise ValueError("an empty distribution has no shares")
        shares = _on_simplex(np.asarray(self.counts, dtype=np.float64))
        shares /= shares.sum()
        if edges is None:
            return shares
        cumulated = np.interp(edges, self.edges, np.concatenate(([0.0], np.cumsum(shares))))
        cumulated[0], cumulated[-1] = 0.0, 1.0
        return np.clip(np.diff(cumulated), 0.0, None)  # rounding may give -1e-17

    def quantile(self, q: float) -> float:
        """The value below which the share `q` lies, interpolated in the bins.

        Raises:
            ValueError: `q` outside [0, 1], or the sum of all bins is not above 0.
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"q must be a share between 0 and 1, got {q}")
        cumulated = np.concatenate(([0.0], np.cumsum(self.shares())))
        rising = np.concatenate(([True], np.diff(cumulated) > 0))
        return float(np.interp(q, cumulated[rising], np.asarray(self.edges)[rising]))


@dataclass(frozen=True, kw_only=True)
class SiteStatistics:
    """The statistics of a site's patients. Created by `site_statistics` and `combine`.

    Attributes:
        site: name of the site.
        patients: number of patients; None if it is withheld.
        train, held_out: numbers of patients in the split; None if they are withheld.
        intensity: by modality, over brain voxels, with equal weight per patient.
        volumes_ml: by region, over the patients with a label.
        spacing_mm: patients by voxel size, "1x1x1" or "other".
        shape: patients by voxel counts, "240x240x155" or "other".
        minimum: smallest number of patients behind a released value; other values are withheld.
        spent: the privacy cost of these numbers per patient; empty without noise, when there is no guarantee.
        withheld: what is withheld, and why.

    Raises:
        DataError: a value of an invalid type.
    """

    site: str
    patients: float | None
    train: float | None = None
    held_out: float | None = None
    intensity: Mapping[str, Distribution] = field(default_factory=dict)
    volumes_ml: Mapping[str, Distribution] = field(default_factory=dict)
    spacing_mm: Mapping[str, float] = field(default_factory=dict)
    shape: Mapping[str, float] = field(default_factory=dict)
    minimum: int = 5
    spent: tuple[Spent, ...] = ()
    withheld: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        numbers = [v for v in (self.patients, self.train, self.held_out) if v is not None]
        numbers += [*self.spacing_mm.values(), *self.shape.values(), self.minimum]
        if not isinstance(self.site, str) or not all(map(_is_number, numbers)):
            raise DataError(f"the statistics of {self.site!r} contain values that are not finite numbers")

    def to_json(self) -> str:
        """The statistics as JSON text for `from_json`."""
        return json.dumps({"format": "fedlab-statistics-1", **asdict(self),
                           "spent": [spent._asdict() for spent in self.spent]}, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> SiteStatistics:
        """Reads what `to_json` wrote, at any site.

        Raises:
            DataError: invalid text.
        """
        try:
            values = json.loads(text)
            if values.pop("format") != "fedlab-statistics-1":
                raise ValueError("not in the format fedlab-statistics-1")
            for name in ("intensity", "volumes_ml"):
                values[name] = {str(key): _read_distribution(**value) for key, value in values[name].items()}
            values["spent"] = tuple(_read_spent(**spent) for spent in values["spent"])
            values["withheld"] = tuple(map(str, values["withheld"]))
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"not the statistics of a site ({type(error).__name__}: {error}); expected the output of "
                            "SiteStatistics.to_json()") from error

    def table(self) -> pd.DataFrame:
        """One row per quantity: number of patients, mean, standard deviation, median; NaN if withheld."""
        import pandas as pd

        spreads = {f"intensity {name}": spread for name, spread in self.intensity.items()}
        spreads |= {f"volume {name} [ml]": spread for name, spread in self.volumes_ml.items()}
        rows = [(spread.total, spread.mean, spread.sd, dict(spread.quantiles).get(0.5)) for spread in spreads.values()]
        return pd.DataFrame(rows, pd.Index(spreads, name="quantity"), ["patients", "mean", "sd", "median"], dtype=float)

    @property
    def guarantee(self) -> str:
        """The privacy guarantee of these numbers, in words."""
        if self.spent:
            return ", ".join(map(str, self.spent))
        return f"no noise and no guarantee; values of fewer than {self.minimum} patients are withheld"

    def __repr__(self) -> str:
        patients = "patients withheld" if self.patients is None else f"{self.patients:g} patients"
        return f"<SiteStatistics of {self.site}: {patients}; {self.guarantee}>"

    def _repr_html_(self) -> str:
        patients = "withheld" if self.patients is None else f"{self.patients:g}"
        split = f" ({self.train:g} to train on, {self.held_out:g} held out)" if self.train and self.held_out else ""
        counted = [f"{name}: " + ", ".join(f"{key} {count:g}" for key, count in table.items())
                   for name, table in (("voxels [mm]", self.spacing_mm), ("shape", self.shape)) if table]
        table: str = self.table().to_html(float_format="{:.3g}".format, na_rep="withheld")
        lines = [f"{self.site}: patients {patients}{split}", *counted, self.guarantee, *self.withheld]
        return f"<p>{'<br>'.join(map(escape, lines))}</p>{table}"


def wasserstein(one: Distribution, other: Distribution) -> float:
    """Earth mover's distance: the area between the cumulative shares, in the unit of the edges."""
    edges = np.array(sorted({*one.edges, *other.edges}))
    gap = np.concatenate(([0.0], np.cumsum(one.shares(edges.tolist()) - other.shares(edges.tolist()))))
    left, right = gap[:-1], gap[1:]
    both = np.abs(left) + np.abs(right)
    # If the curves cross within a bin, the area is that of two triangles.
    area = np.where(left * right < 0, (left**2 + right**2) / np.where(both > 0, 2 * both, 1.0), both / 2)
    return float(area @ np.diff(edges))


def _on_simplex(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest non-negative numbers with the same sum, which removes noise added to all of them.

    Least-squares projection onto the simplex, by sorting (Duchi et al. 2008, doi:10.1145/1390156.1390191).
    """
    total = counts.sum()
    falling = np.sort(counts)[::-1]
    excess = (np.cumsum(falling) - total) / np.arange(1, len(counts) + 1)
    used = np.flatnonzero(falling > excess)[-1]
    nearest: NDArray[np.float64] = np.clip(counts - excess[used], 0.0, None)
    return nearest


def _read_distribution(*, edges: list[float], counts: list[float], mean: float | None, sd: float | None,
                       quantiles: list[list[float]], coarse: bool = False) -> Distribution:
    return Distribution(edges=tuple(edges), counts=tuple(counts), mean=mean, sd=sd, coarse=bool(coarse),
                        quantiles=tuple((float(q), float(value)) for q, value in quantiles))


def _read_spent(*, epsilon: float, delta: float, unit: str, accountant: str, adjacency: str,
                repeats: bool = True) -> Spent:
    if unit not in ("patient", "site") or not (_is_number(epsilon) and epsilon > 0 and _is_number(delta)
                                            and 0 <= delta < 1):
        raise ValueError(f"invalid privacy spent: ε = {epsilon}, δ = {delta} per {unit}")
    return Spent(epsilon=epsilon, delta=delta, unit="site" if unit == "site" else "patient",
                 accountant=str(accountant), adjacency=str(adjacency), repeats=bool(repeats))
