"""The values in which a site tells about its patients: what is counted, how it spreads, and all of it together."""

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

__all__ = ["PERCENTILES", "QUANTILES", "RAW", "Distribution", "Domain", "SiteStatistics"]

#: Percentiles of a patient's intensities that serve as landmarks (Nyúl et al. 2000, variant with the deciles).
PERCENTILES = (1.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 99.0)
#: Quantiles of the patients' tumour volumes.
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


def _ascending(edges: Sequence[float]) -> bool:
    return len(edges) > 1 and all(map(_is_number, edges)) and all(a < b for a, b in itertools.pairwise(edges))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _edges(low: float, high: float, bins: int) -> tuple[float, ...]:
    return tuple(np.linspace(low, high, bins + 1).round(6).tolist())


@dataclass(frozen=True, kw_only=True)
class Domain:
    """What is counted, and in which bins: agreed on before anyone looks at data, and the same at every site.

    Noise is added to every bin of every quantity: with it, name few modalities and regions and give few, wide bins.
    Whatever lies below the first or above the last edge is counted in the first or last bin.

    Args:
        modalities: whose intensities are counted.
        intensity: edges of the bins, in the unit of the images; the default suits z-scored ones, see `RAW`.
        regions: whose volumes are counted.
        volume_ml: edges of the bins in ml; the first bin of the default holds the patients without the region.
        spacings: voxel sizes told apart, as "1x1x1" in mm, everything else being "other". None tells whatever occurs,
            which noise doesn't allow.
        shapes: voxel counts told apart, as "240x240x155"; likewise.

    Raises:
        ValueError: unknown names, or edges that don't ascend.
    """

    modalities: tuple[str, ...] = MODALITIES
    intensity: tuple[float, ...] = _edges(-5.0, 10.0, 60)
    regions: tuple[str, ...] = REGIONS
    volume_ml: tuple[float, ...] = (0.0, 0.1, *(round(2 ** (k / 2), 3) for k in range(17)))
    spacings: tuple[str, ...] | None = None
    shapes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if unknown := [*set(self.modalities).difference(MODALITIES), *set(self.regions).difference(REGIONS)]:
            raise ValueError(f"modalities are of {', '.join(MODALITIES)} and regions of {', '.join(REGIONS)}, "
                             f"got {', '.join(sorted(unknown))}")
        for name in ("intensity", "volume_ml"):
            if not _ascending(getattr(self, name)):
                raise ValueError(f"{name} is at least two finite, ascending edges, got {getattr(self, name)}")


#: For scans as a scanner gives them, in bins that grow by a quarter of an octave from 1 to 32768.
RAW = Domain(intensity=tuple(round(2 ** (k / 4), 3) for k in range(61)))


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """How one quantity is spread over a site's patients.

    Attributes:
        edges: of the bins, ascending; the outer bins also hold what lies beyond them.
        counts: patients in each bin. A patient's voxels may lie in many bins and then count as shares that sum to 1.
            With noise a count may be fractional and negative.
        mean, sd: mean and standard deviation, or None where they are withheld.
        quantiles: pairs (fraction, value). Of intensities the mean over patients of each patient's own quantile,
            of volumes the quantile over patients.

    Raises:
        DataError: the numbers can't belong together.
    """

    edges: tuple[float, ...]
    counts: tuple[float, ...]
    mean: float | None = None
    sd: float | None = None
    quantiles: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        told = [*self.counts, *(v for v in (self.mean, self.sd) if v is not None), *sum(self.quantiles, ())]
        if not _ascending(self.edges) or len(self.counts) != len(self.edges) - 1 or not all(map(_is_number, told)):
            raise DataError(f"a distribution has ascending edges, one count fewer and finite numbers; got "
                            f"{len(self.edges)} edges, {len(self.counts)} counts, mean {self.mean}, sd {self.sd}")

    @property
    def total(self) -> float:
        """Patients in all bins."""
        return math.fsum(self.counts)

    def shares(self, edges: Sequence[float] | None = None) -> NDArray[np.float64]:
        """The share of each bin, none negative whatever the noise, optionally in other bins.

        Args:
            edges: of the bins wanted; what a bin holds is taken to be spread evenly over it, and what lies beyond
                the edges wanted to be in the outer bins.

        Raises:
            ValueError: the bins together hold nothing.
        """
        if not self.total > 0:
            raise ValueError("an empty distribution has no shares")
        shares = _on_simplex(np.asarray(self.counts, dtype=np.float64))
        shares /= shares.sum()
        if edges is None:
            return shares
        cumulated = np.interp(edges, self.edges, np.concatenate(([0.0], np.cumsum(shares))))
        cumulated[0], cumulated[-1] = 0.0, 1.0
        return np.clip(np.diff(cumulated), 0.0, None)  # rounding may leave -1e-17

    def quantile(self, q: float) -> float:
        """The value below which the share `q` lies, read from the bins.

        Raises:
            ValueError: `q` outside [0, 1], or the bins together hold nothing.
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"q is a share between 0 and 1, got {q}")
        cumulated = np.concatenate(([0.0], np.cumsum(self.shares())))
        rising = np.concatenate(([True], np.diff(cumulated) > 0))
        return float(np.interp(q, cumulated[rising], np.asarray(self.edges)[rising]))


@dataclass(frozen=True, kw_only=True)
class SiteStatistics:
    """What a site has told about its patients. Made by `site_statistics` and `combine`.

    Attributes:
        site: name of the site.
        patients: how many it has; None where that is withheld.
        train, held_out: how they are split; None where that is withheld.
        intensity: by modality, over brain voxels, each patient weighing the same.
        volumes_ml: by region, over the patients with a label.
        spacing_mm: patients by voxel size, "1x1x1" or "other".
        shape: patients by voxel counts, "240x240x155" or "other".
        minimum: patients that must stand behind every value; what fewer stand behind is withheld.
        spent: the privacy these numbers cost each patient; empty where there is no noise and no guarantee.
        withheld: what is not told, and why.

    Raises:
        DataError: a value of another type than stated.
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
            raise DataError(f"the statistics of {self.site!r} hold something other than numbers")

    def to_json(self) -> str:
        """As JSON text, which `from_json` reads."""
        return json.dumps({"format": "fedlab-statistics-1", **asdict(self),
                           "spent": [spent._asdict() for spent in self.spent]}, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> SiteStatistics:
        """Read what `to_json` wrote, at whatever site.

        Raises:
            DataError: it isn't what `to_json` writes.
        """
        try:
            told = json.loads(text)
            if told.pop("format") != "fedlab-statistics-1":
                raise ValueError("not in the format fedlab-statistics-1")
            for name in ("intensity", "volumes_ml"):
                told[name] = {str(key): _read_distribution(**value) for key, value in told[name].items()}
            told["spent"] = tuple(_read_spent(**spent) for spent in told["spent"])
            told["withheld"] = tuple(map(str, told["withheld"]))
            return cls(**told)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"these are no statistics of a site ({type(error).__name__}: {error}); expected what "
                            "SiteStatistics.to_json() writes") from error

    def table(self) -> pd.DataFrame:
        """A row a quantity: patients behind it, mean, standard deviation, median; NaN where withheld."""
        import pandas as pd

        rows = [(f"intensity {name}", told) for name, told in self.intensity.items()]
        rows += [(f"volume {name} [ml]", told) for name, told in self.volumes_ml.items()]
        values = [{"quantity": name, "patients": told.total, "mean": told.mean, "sd": told.sd,
                   "median": dict(told.quantiles).get(0.5)} for name, told in rows]
        columns = ["quantity", "patients", "mean", "sd", "median"]
        return pd.DataFrame(values, columns=columns).set_index("quantity").astype(float)

    def __repr__(self) -> str:
        told = "patients withheld" if self.patients is None else f"{self.patients:g} patients"
        return f"<SiteStatistics of {self.site}: {told}; {_guarantee(self)}>"

    def _repr_html_(self) -> str:
        told = "withheld" if self.patients is None else f"{self.patients:g}"
        split = f" ({self.train:g} to train on, {self.held_out:g} held out)" if self.train and self.held_out else ""
        counted = [f"{name}: " + ", ".join(f"{key} {count:g}" for key, count in table.items())
                   for name, table in (("voxels [mm]", self.spacing_mm), ("shape", self.shape)) if table]
        table: str = self.table().to_html(float_format="{:.3g}".format, na_rep="withheld")
        lines = [f"{self.site}: patients {told}{split}", *counted, _guarantee(self), *self.withheld]
        return f"<p>{'<br>'.join(map(escape, lines))}</p>{table}"


def _on_simplex(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest non-negative numbers with the same sum: what noise added everywhere is taken off everywhere.

    Least squares onto the simplex, by sorting (Duchi et al. 2008, doi:10.1145/1390156.1390191).
    """
    total = counts.sum()
    falling = np.sort(counts)[::-1]
    excess = (np.cumsum(falling) - total) / np.arange(1, len(counts) + 1)
    used = np.flatnonzero(falling > excess)[-1]
    nearest: NDArray[np.float64] = np.clip(counts - excess[used], 0.0, None)
    return nearest


def _guarantee(told: SiteStatistics) -> str:
    if told.spent:
        return ", ".join(map(str, told.spent))
    return f"no noise and no guarantee; values with fewer than {told.minimum} patients behind them are withheld"


def _read_distribution(*, edges: list[float], counts: list[float], mean: float | None, sd: float | None,
                       quantiles: list[list[float]]) -> Distribution:
    return Distribution(edges=tuple(edges), counts=tuple(counts), mean=mean, sd=sd,
                        quantiles=tuple((float(q), float(value)) for q, value in quantiles))


def _read_spent(*, epsilon: float, delta: float, unit: str, accountant: str, adjacency: str) -> Spent:
    if unit not in ("patient", "site") or not (_is_number(epsilon) and epsilon > 0 and _is_number(delta)):
        raise ValueError(f"privacy spent of ε = {epsilon} and δ = {delta} per {unit} means nothing")
    return Spent(epsilon=epsilon, delta=delta, unit="site" if unit == "site" else "patient",
                 accountant=str(accountant), adjacency=str(adjacency))
