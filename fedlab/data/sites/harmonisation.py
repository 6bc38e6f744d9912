"""Intensities on one scale across sites, fitted from the sites' statistics only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedlab.core.errors import DataError
from fedlab.core.types import MODALITIES, Patient, Site, Spent
from fedlab.data.sites.statistics import SiteStatistics, combine

__all__ = ["Harmonisation", "fit_harmonisation"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Harmonisation:
    """Maps each patient's percentiles onto common landmarks, linearly between them (Nyúl, Udupa & Zhang 2000).

    Percentiles are taken over the brain, tumour included, so a very large tumour slightly changes its own scale. Beyond
    the outermost landmarks the slope of the outermost piece applies (https://doi.org/10.1109/42.836373).

    Attributes:
        percentiles: from 0 to 100, ascending.
        landmarks: by modality, the intensity that each percentile is mapped to, ascending.
        spent: privacy per patient that the sites' statistics have spent, or None if they are not noised; a guarantee
            of a run on harmonised sites says so.

    Raises:
        ValueError: landmarks that do not ascend, or do not match the percentiles.
    """

    percentiles: tuple[float, ...]
    landmarks: Mapping[str, tuple[float, ...]]
    spent: tuple[Spent, ...] | None = None

    def __post_init__(self) -> None:
        for name, marks in {"percentiles": self.percentiles, **self.landmarks}.items():
            if len(marks) != len(self.percentiles) or len(marks) < 2 or not all(map(math.isfinite, marks)):
                raise ValueError(f"{name}: expected as many finite landmarks as percentiles, at least two, got {marks}")
            if not all(a < b for a, b in itertools.pairwise(marks)):
                raise ValueError(f"{name} must ascend, got {marks}; with noise, raise epsilon or use fewer bins")

    def __call__(self, patient: Patient) -> Patient:
        """The patient with harmonised intensities: same data type, 0 outside the brain, label unchanged.

        Raises:
            DataError: a modality is constant in the brain.
        """
        image = patient.image.to(torch.float32, copy=True)
        brain = (image != 0).any(dim=0)
        for name, marks in self.landmarks.items():
            channel = image[MODALITIES.index(name)]
            values = channel[brain].numpy().astype(np.float64)
            own = np.percentile(values, self.percentiles)
            rising = np.concatenate(([True], np.diff(own) > 0))  # saturated images have equal percentiles
            if rising.sum() < 2:
                raise DataError(f"the {name} of patient {patient.id} is constant; nothing to harmonise")
            channel[brain] = torch.from_numpy(_piecewise(values, own[rising], np.asarray(marks)[rising])).float()
        return replace(patient, image=image.to(patient.image.dtype))

    def site(self, site: Site) -> Site:
        """The site with all patients harmonised, in memory."""
        return replace(site, train=[self(patient) for patient in site.train], val=[self(p) for p in site.val],
                       remarks=(*site.remarks, self._remark))

    @property
    def _remark(self) -> str:
        if self.spent:
            return (f"the statistics that harmonised the intensities have spent {', '.join(map(str, self.spent))}, "
                    "which counts besides unless it was entered into the ledgers")
        return "the statistics that harmonised the intensities were not noised and are outside it"

    def _repr_html_(self) -> str:
        import pandas as pd

        table = pd.DataFrame(dict(self.landmarks), index=pd.Index(self.percentiles, name="percentile"))
        html: str = table.to_html(float_format="{:.3g}".format)
        return f"<p>The landmarks that every patient's percentiles are mapped to:</p>{html}"


def fit_harmonisation(statistics: Sequence[SiteStatistics]) -> Harmonisation:
    """The common scale: the mean of every percentile over all patients of all sites, from the sites' statistics.

    If statistics carry noise, landmarks are computed from noisy histograms at no further privacy cost.

    Raises:
        ValueError: no site released its intensities, or their landmarks do not ascend.
    """
    pooled = combine(statistics)
    released = {name: spread.quantiles for name, spread in pooled.intensity.items() if spread.quantiles}
    if not released:
        raise ValueError("no site released the quantiles of its intensities, so there is nothing to fit; check for too "
                         "few patients or too much noise")
    levels = next(iter(released.values()))
    return Harmonisation(percentiles=tuple(100 * q for q, _ in levels),
                         landmarks={name: tuple(value for _, value in marks) for name, marks in released.items()},
                         spent=pooled.spent or None)


def _piecewise(values: Floats, own: Floats, marks: Floats) -> Floats:
    """Piecewise linear interpolation, with the outermost slopes beyond the landmarks."""
    mapped: Floats = np.interp(values, own, marks)
    below, above = values < own[0], values > own[-1]
    mapped[below] = marks[0] + (values[below] - own[0]) * (marks[1] - marks[0]) / (own[1] - own[0])
    mapped[above] = marks[-1] + (values[above] - own[-1]) * (marks[-1] - marks[-2]) / (own[-1] - own[-2])
    return mapped
