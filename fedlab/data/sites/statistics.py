"""What a site may tell about its patients without showing one, and what that adds up to across sites.

Three things leave a site: how many patients it has, histograms, and a few numbers about them. A value that fewer than
a minimum number of patients stand behind is withheld. That keeps a patient out of sight, but it proves nothing: two
releases that differ by one patient differ by that patient. Laplace noise with a stated ε does prove something.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedlab.core.errors import DataError
from fedlab.core.regions import labels_to_regions
from fedlab.core.seeds import derive
from fedlab.core.types import MODALITIES, REGIONS, Site, Spent
from fedlab.data.sites.distributions import PERCENTILES, QUANTILES, RAW, Distribution, Domain, SiteStatistics
from fedlab.privacy.noise.laplace import noisy

__all__ = ["ADJACENCY", "PARTS", "PERCENTILES", "QUANTILES", "RAW", "Distribution", "Domain", "SiteStatistics",
           "combine", "contributions", "site_statistics"]

#: Which two sites the ε of noised statistics compares.
ADJACENCY = "add or remove one patient"
#: One patient is counted in this many whole parts, so that a share of a patient is a whole number.
PARTS = 2**16
_OTHER = "other"

Counts = NDArray[np.int64]


class Scanned(Protocol):
    """What statistics need of a patient: `fedlab.core.types.Patient` and `fedlab.data.phantom.generator.RawPatient` have it."""

    @property
    def id(self) -> str: ...
    @property
    def image(self) -> torch.Tensor: ...
    @property
    def label(self) -> torch.Tensor | None: ...
    @property
    def affine(self) -> NDArray[Any]: ...


def site_statistics(site: Site, *, domain: Domain | None = None, minimum: int = 5, epsilon: float | None = None,
                    charge: Callable[[Spent], object] | None = None, seed: int | None = None) -> SiteStatistics:
    """What a site tells about all its patients, to train on and held out.

    Without noise, every released value has at least `minimum` patients behind it: neighbouring bins are merged until
    at least that many patients have something in each, rare voxel sizes go under "other", quantiles need that many
    patients on either side, and numbers are rounded to three digits. This is no guarantee against someone who knows
    the other patients, or who sees the statistics before and after one patient came.

    With `epsilon`, the release is ε-differentially private with δ = 0; the unit is the patient, and two sites are
    adjacent if one has one patient more, all else equal. The proof: what `contributions` counts of a patient is a
    set of Q vectors of non-negative whole parts that sum to at most `PARTS` each, so a patient changes all counts
    together by at most Q · PARTS (L1). Laplace noise of scale Q · PARTS / ε is added to every count, exactly
    (`fedlab.privacy.noise.laplace`), and everything else is computed from the noisy counts. The bins must not depend on the
    data, so a `domain` without `spacings` or `shapes` leaves those out, and the split isn't told. The same person
    under two ids is two patients here. Every call spends its ε anew.

    Args:
        site: whose patients; each is looked at once.
        domain: what is counted in which bins; by default `Domain()`, which suits z-scored images.
        minimum: patients behind every value; 1 withholds nothing.
        epsilon: of all the statistics together; None adds no noise.
        charge: called with what is about to be spent before anything is drawn, so that it enters the site's ledger:
            `LedgerFile(folder, site.name).charging(delta=...)` of `fedlab.privacy.accounting.ledger_file`, or `Ledger.charging`.
            If it raises, nothing is released.
        seed: of the noise, to repeat an experiment. None takes the operating system's entropy: whoever knows the
            seed can take the noise off again.

    Raises:
        ValueError: `minimum` below 1, or `epsilon` not above 0.
        DataError: a patient is listed twice, holds NaN or Inf, or has an empty brain.
    """
    domain = domain or Domain()
    if minimum < 1:
        raise ValueError(f"minimum is a number of patients from 1 on, got {minimum}")
    if epsilon is not None and not (0 < epsilon < math.inf):
        raise ValueError(f"epsilon is above 0 and finite, or None for no noise, got {epsilon}")
    if epsilon is None:
        if seed is not None or charge is not None:
            raise ValueError("seed and charge belong to noise; say epsilon=, or leave them out")
        looks = [_look(patient, domain) for patient in _patients(site)]
        return _exact(site.name, looks, domain, minimum, len(site.val))
    sums = {name: np.zeros(size, dtype=np.int64) for name, size in _sizes(domain).items()}
    for patient in _patients(site):
        for name, counts in contributions(patient, domain=domain).items():
            sums[name] += counts
    spent = Spent(epsilon=float(epsilon), delta=0.0, unit="patient", accountant="Laplace", adjacency=ADJACENCY)
    if charge is not None:
        charge(spent)
    rng = random.SystemRandom() if seed is None else random.Random(derive(seed, "statistics", site.name))
    scale = Fraction(len(sums) * PARTS) / Fraction(epsilon)
    noised = {name: np.array(noisy(map(int, counts), scale=scale, rng=rng)) / PARTS for name, counts in sums.items()}
    return _noised(site.name, noised, domain, minimum, spent)


def contributions(patient: Scanned, *, domain: Domain) -> dict[str, Counts]:
    """What one patient adds to the counts that noise is added to.

    Returns:
        A vector of whole parts for each thing counted, none negative, each summing to at most `PARTS`: the patient
        itself; its voxels' intensities by modality as shares of all its brain voxels, rounded down; its volume by
        region (nothing where there is no label); and, where the domain names them, its voxel size and shape.

    Raises:
        DataError: the image holds NaN or Inf, or its brain is empty.
    """
    look = _look(patient, domain)
    parts = {name: counts * PARTS // counts.sum() for name, counts in look.counts.items()}
    parts["patients"] = np.array([PARTS], dtype=np.int64)
    for name, known, value in (("spacing", domain.spacings, look.spacing), ("shape", domain.shapes, look.shape)):
        if known is not None:
            parts[name] = PARTS * np.array([value == each for each in known] + [value not in known], dtype=np.int64)
    return {name: parts.get(name, np.zeros(size, dtype=np.int64)) for name, size in _sizes(domain).items()}


def _sizes(domain: Domain) -> dict[str, int]:
    """The bins of everything that noise is added to: Q names."""
    return {
        "patients": 1,
        **{f"intensity {name}": len(domain.intensity) - 1 for name in domain.modalities},
        **{f"volume {name}": len(domain.volume_ml) - 1 for name in domain.regions},
        **({} if domain.spacings is None else {"spacing": len(domain.spacings) + 1}),
        **({} if domain.shapes is None else {"shape": len(domain.shapes) + 1}),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Look:
    """What is taken from one patient; it stays at the site.

    Attributes:
        counts: by "intensity <modality>" voxels in each bin; by "volume <region>" 1 in the bin of the volume.
        moments: by modality, the mean of its intensities and of their squares.
        landmarks: by modality, its percentiles.
        volumes: by region in ml; empty where there is no label.
    """

    counts: dict[str, Counts]
    moments: dict[str, tuple[float, float]]
    landmarks: dict[str, NDArray[np.float64]]
    volumes: dict[str, float]
    spacing: str
    shape: str


def _patients(site: Site) -> Iterator[Scanned]:
    seen: set[str] = set()
    for patients in (site.train, site.val):
        for patient in patients:
            if patient.id in seen:
                raise DataError(f"site {site.name} lists patient {patient.id} twice; a patient counts once")
            seen.add(patient.id)
            yield patient


def _look(patient: Scanned, domain: Domain) -> _Look:
    image = patient.image.float()
    brain = (image != 0).any(dim=0)
    if not brain.any():
        raise DataError(f"patient {patient.id} has an empty brain: every voxel is 0")
    counts, moments, landmarks = {}, {}, {}
    for name in domain.modalities:
        values = image[MODALITIES.index(name)][brain].numpy().astype(np.float64)
        if not np.isfinite(values).all():
            raise DataError(f"the {name} of patient {patient.id} holds NaN or Inf; mend it or leave the patient out")
        counts[f"intensity {name}"] = _histogram(values, domain.intensity)
        moments[name] = float(values.mean()), float(np.square(values).mean())
        landmarks[name] = np.percentile(values, PERCENTILES)
    spacing = np.linalg.norm(np.asarray(patient.affine)[:3, :3], axis=0)
    volumes: dict[str, float] = {}
    if patient.label is not None:
        millilitres = labels_to_regions(patient.label).flatten(1).sum(1).numpy() * float(spacing.prod()) / 1000
        volumes = {name: float(millilitres[REGIONS.index(name)]) for name in domain.regions}
        counts |= {f"volume {name}": _histogram(np.array([v]), domain.volume_ml) for name, v in volumes.items()}
    return _Look(counts=counts, moments=moments, landmarks=landmarks, volumes=volumes,
                 spacing="x".join(f"{round(float(s), 2):g}" for s in spacing), shape="x".join(map(str, brain.shape)))


def _histogram(values: NDArray[np.float64], edges: Sequence[float]) -> Counts:
    """How many values lie in each bin, the outer ones open."""
    return np.bincount(np.searchsorted(edges[1:-1], values, side="right"), minlength=len(edges) - 1).astype(np.int64)


def _exact(site: str, looks: Sequence[_Look], domain: Domain, minimum: int, held_out: int) -> SiteStatistics:
    """Statistics without noise; nothing that fewer than `minimum` patients stand behind."""
    if len(looks) < minimum:
        return SiteStatistics(site=site, patients=None, minimum=minimum,
                              withheld=(f"everything: there are fewer than {minimum} patients",))
    withheld = []
    split: tuple[int | None, int | None] = len(looks) - held_out, held_out
    if any(0 < part < minimum for part in (len(looks) - held_out, held_out)):
        split = None, None
        withheld.append(f"the split: fewer than {minimum} patients in a part of it")
    intensity = {}
    for name in domain.modalities:
        told = _merged([look.counts[f"intensity {name}"] for look in looks], domain.intensity, minimum)
        mean, square = np.mean([look.moments[name] for look in looks], axis=0)
        marks = np.mean([look.landmarks[name] for look in looks], axis=0)
        intensity[name] = Distribution(
            **told, mean=_rounded(mean), sd=_rounded(math.sqrt(max(square - mean**2, 0.0))),
            quantiles=tuple((p / 100, _rounded(mark)) for p, mark in zip(PERCENTILES, marks, strict=True)))
    labelled = [look for look in looks if look.volumes]
    volumes = {}
    if len(labelled) < minimum or 0 < len(looks) - len(labelled) < minimum:
        withheld.append(f"volumes: fewer than {minimum} patients with, or without, a label")
    else:
        volumes = {name: _volumes([look.volumes[name] for look in labelled], domain, minimum)
                   for name in domain.regions}
    return SiteStatistics(
        site=site, patients=len(looks), train=split[0], held_out=split[1], intensity=intensity, volumes_ml=volumes,
        spacing_mm=_named((look.spacing for look in looks), domain.spacings, minimum),
        shape=_named((look.shape for look in looks), domain.shapes, minimum), minimum=minimum, withheld=tuple(withheld))


def _volumes(values: Sequence[float], domain: Domain, minimum: int) -> Distribution:
    """The volumes of one region; a quantile is the mean of the `minimum` patients nearest to it in rank."""
    ordered = np.sort(values)
    quantiles = []
    for q in QUANTILES:
        first = round(q * (len(ordered) - 1) - (minimum - 1) / 2)
        if first >= 0 and first + minimum <= len(ordered):
            quantiles.append((q, _rounded(ordered[first:first + minimum].mean())))
    told = _merged([_histogram(np.array([v]), domain.volume_ml) for v in values], domain.volume_ml, minimum)
    return Distribution(**told, mean=_rounded(ordered.mean()), sd=_rounded(ordered.std()), quantiles=tuple(quantiles))


def _merged(counted: Sequence[Counts], edges: Sequence[float], minimum: int) -> dict[str, Any]:
    """Edges and patients, neighbouring bins merged until at least `minimum` patients have something in each."""
    table = np.array([counts / counts.sum() for counts in counted])
    kept, counts = [edges[0]], []
    pending = np.zeros(len(table))
    for column, edge in enumerate(edges[1:]):
        pending += table[:, column]
        if (pending > 0).sum() >= minimum:
            kept.append(edge)
            counts.append(pending.sum())
            pending = np.zeros(len(table))
    if kept[-1] != edges[-1]:  # too few at the upper end: they go to the bin below
        kept[-1] = edges[-1]
        counts[-1] += pending.sum()
    return {"edges": tuple(kept), "counts": tuple(round(float(count), 3) for count in counts)}


def _named(values: Iterator[str], known: Sequence[str] | None, minimum: int) -> dict[str, float]:
    """Patients by name; names of fewer than `minimum` patients become "other", which is never that small itself."""
    counts = Counter(value if known is None or value in known else _OTHER for value in values)
    rare = counts.pop(_OTHER, 0) + sum(count for count in counts.values() if count < minimum)
    kept = [(name, count) for name, count in counts.most_common() if count >= minimum]
    while kept and 0 < rare < minimum:  # or the total would give the few away
        rare += kept.pop()[1]
    return {**{name: float(count) for name, count in kept}, **({_OTHER: float(rare)} if rare else {})}


def _noised(site: str, counts: Mapping[str, NDArray[np.float64]], domain: Domain, minimum: int,
            spent: Spent) -> SiteStatistics:
    """Statistics computed from noisy counts alone."""
    patients = float(counts["patients"][0])
    if patients < minimum:
        return SiteStatistics(site=site, patients=None, minimum=minimum, spent=(spent,),
                              withheld=(f"everything: there seem to be fewer than {minimum} patients",))
    withheld = ["the split, and the exact values behind means and quantiles: all is read from the noisy counts"]
    withheld += [f"{name}: the domain doesn't say beforehand which there are"
                 for name, known in (("voxel sizes", domain.spacings), ("shapes", domain.shapes)) if known is None]
    told: dict[str, dict[str, Distribution]] = {"intensity": {}, "volume": {}}
    for kind, names, edges, levels in (("intensity", domain.modalities, domain.intensity, PERCENTILES),
                                       ("volume", domain.regions, domain.volume_ml, np.multiply(QUANTILES, 100))):
        for name in names:
            table = counts[f"{kind} {name}"]
            if kind == "intensity":  # every patient has all intensities: the bins sum to the patients
                table = table + (patients - table.sum()) / len(table)
            bare = Distribution(edges=edges, counts=tuple(table.tolist()))
            if bare.total <= 0:
                withheld.append(f"{kind} {name}: the noise outweighs it")
                continue
            told[kind][name] = _described(bare, [float(level) / 100 for level in levels])
    categories = [dict(zip((*(known or ()), _OTHER), counts[name].tolist(), strict=True)) if known is not None else {}
                  for name, known in (("spacing", domain.spacings), ("shape", domain.shapes))]
    return SiteStatistics(site=site, patients=patients, intensity=told["intensity"], volumes_ml=told["volume"],
                          spacing_mm=categories[0], shape=categories[1], minimum=minimum, spent=(spent,),
                          withheld=tuple(withheld))


def _described(bare: Distribution, levels: Sequence[float]) -> Distribution:
    """The distribution with mean, standard deviation and quantiles read from its bins."""
    middle, shares = (np.array(bare.edges[1:]) + np.array(bare.edges[:-1])) / 2, bare.shares()
    mean = float(shares @ middle)
    return Distribution(edges=bare.edges, counts=bare.counts, mean=_rounded(mean),
                        sd=_rounded(math.sqrt(float(shares @ np.square(middle - mean)))),
                        quantiles=tuple((q, _rounded(bare.quantile(q))) for q in levels))


def combine(statistics: Sequence[SiteStatistics], *, name: str = "all sites") -> SiteStatistics:
    """What several sites told, as one, at the server.

    Counts add up, and each patient weighs the same in means and quantiles. Where sites told in different bins, a
    bin's patients are taken to be spread evenly over it. What a site withheld is missing in the sums.

    The ε of the whole is the largest of the sites' if all of them added noise and no patient is at two sites:
    a patient is in one site's statistics only (parallel composition). Where a site told without noise there is none.

    Raises:
        ValueError: no statistics, or two of the same site.
    """
    if not statistics:
        raise ValueError("there are no statistics to combine")
    if twice := [site for site, count in Counter(told.site for told in statistics).items() if count > 1]:
        raise ValueError(f"{', '.join(twice)} would be counted twice; give the statistics of each site once")
    silent = [told.site for told in statistics if told.patients is None]
    known = [told for told in statistics if told.patients is not None]
    guaranteed = all(told.spent for told in statistics)
    return SiteStatistics(
        site=name, patients=_added([told.patients for told in known]), train=_added([told.train for told in known]),
        held_out=_added([told.held_out for told in known]),
        intensity=_pooled([told.intensity for told in known], per_patient=True),
        volumes_ml=_pooled([told.volumes_ml for told in known], per_patient=False),
        spacing_mm=_tallied([told.spacing_mm for told in known]),
        shape=_tallied([told.shape for told in known]), minimum=min(told.minimum for told in statistics),
        spent=max((told.spent for told in statistics), key=lambda spent: spent[0].epsilon) if guaranteed else (),
        withheld=(f"the patients of {', '.join(silent)}",) if silent else ())


def _added(numbers: Sequence[float | None]) -> float | None:
    """The sum, or None where one of the numbers is withheld."""
    known = [number for number in numbers if number is not None]
    return math.fsum(known) if known and len(known) == len(numbers) else None


def _tallied(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: math.fsum(table.get(name, 0.0) for table in tables) for name in names}


def _pooled(tables: Sequence[Mapping[str, Distribution]], *, per_patient: bool) -> dict[str, Distribution]:
    """Distributions by name, over the sites that told one.

    Args:
        per_patient: the quantiles are means over patients, so they can be averaged; else they are read from the bins.
    """
    pooled = {}
    for name in dict.fromkeys(name for table in tables for name in table):
        parts = [table[name] for table in tables if name in table and table[name].total > 0]
        if not parts:
            continue
        bare = _added_up(parts)
        levels = [q for q, _ in parts[0].quantiles if all(q in dict(part.quantiles) for part in parts)]
        weights = [part.total for part in parts]
        marks = [np.average([dict(part.quantiles)[q] for part in parts], weights=weights) if per_patient
                 else bare.quantile(q) for q in levels]
        pooled[name] = replace(bare, quantiles=tuple((q, _rounded(v)) for q, v in zip(levels, marks, strict=True)))
    return pooled


def _added_up(parts: Sequence[Distribution]) -> Distribution:
    """One distribution in the bins of all, with the moments of all, or none where a part has none."""
    edges = sorted({edge for part in parts for edge in part.edges})
    counts = np.sum([part.total * part.shares(edges) for part in parts], axis=0)
    moments = [(p.mean, p.mean**2 + p.sd**2) for p in parts if p.mean is not None and p.sd is not None]
    bare = Distribution(edges=tuple(edges), counts=tuple(counts.tolist()))
    if len(moments) < len(parts):
        return bare
    mean, square = np.average(moments, axis=0, weights=[part.total for part in parts])
    return replace(bare, mean=_rounded(mean), sd=_rounded(math.sqrt(max(square - mean**2, 0.0))))


def _rounded(value: float) -> float:
    """Three digits: no more than any use here needs."""
    return round(float(f"{value:.3g}"), 3) + 0.0  # not -0.0
