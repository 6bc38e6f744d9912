"""What a site may release about its patients without showing one, and the sum over sites.

Three kinds of values leave a site: its number of patients, histograms, and a few numbers about them. A value of fewer
than a minimum number of patients is withheld. That hides individual patients but proves nothing: two releases that
differ by one patient differ by that patient's contribution. Laplace noise with a stated ε gives a proof.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from fedlab.core.errors import DataError
from fedlab.core.regions import labels_to_regions
from fedlab.core.seeds import derive
from fedlab.core.types import MODALITIES, REGIONS, Patient, Site, Spent
from fedlab.data.sites.distributions import (
    PERCENTILES,
    QUANTILES,
    RAW,
    Distribution,
    Domain,
    SiteStatistics,
    wasserstein,
)
from fedlab.data.sites.persons import check_one_scan_each
from fedlab.privacy.noise.laplace import noisy

__all__ = ["ADJACENCY", "PARTS", "PERCENTILES", "QUANTILES", "RAW", "Distribution", "Domain", "SiteStatistics",
           "combine", "contributions", "site_statistics"]

#: The two sites that the ε of noised statistics compares.
ADJACENCY = "add or remove one patient"
#: One patient is counted in this many whole parts, so that a share of a patient is a whole number.
PARTS = 2**16
#: Merged bins show a distribution if merging moves it by at most this share of its standard deviation (earth mover's
#: distance). So the distance between two sites is exact up to half of the sum of their standard deviations, beside the
#: width of the domain's bins.
COARSEST = 0.5
_OTHER = "other"

Counts = NDArray[np.int64]


def site_statistics(site: Site, *, domain: Domain | None = None, minimum: int = 5, epsilon: float | None = None,
                    charge: Callable[[Spent], object] | None = None, seed: int | None = None) -> SiteStatistics:
    """Statistics of all patients of a site, training and held-out.

    Without noise, every released value has at least `minimum` patients behind it: neighbouring bins are merged until
    at least that many patients contribute to each, rare voxel sizes are counted as "other", quantiles need that many
    patients around them, and numbers are rounded to three digits. This is no guarantee against an adversary who knows
    the other patients, or who sees the statistics before and after a patient joins.

    With `epsilon`, the release is ε-differentially private with δ = 0; the unit is the patient, and two sites are
    adjacent if one has one patient more, all else equal. The proof: the `contributions` of a patient are Q vectors of
    non-negative whole parts that sum to at most `PARTS` each, so a patient changes all counts together by at most
    Q · PARTS (L1). Laplace noise of scale Q · PARTS / ε is added to every count, exactly
    (`fedlab.privacy.noise.laplace`), and everything else is computed from the noisy counts. The bins must not depend
    on the data: a `domain` without `spacings` or `shapes` leaves those out, and the split is not released. Several
    scans of one person are refused. Every call spends its ε again.

    Args:
        site: the site; each of its patients is read once.
        domain: what is counted in which bins; by default `Domain()`, which suits z-scored images.
        minimum: smallest number of patients behind every value; 1 withholds nothing.
        epsilon: of all the statistics together; None adds no noise.
        charge: called with the privacy to be spent before any noise is drawn, to enter it in the site's ledger:
            `LedgerFile(folder, site.name).charging(delta=...)` of `fedlab.privacy.accounting.ledger_file`. If it
            raises, nothing is released.
        seed: of the noise, to repeat an experiment. None uses the operating system's entropy: an adversary who knows
            the seed can remove the noise.

    Raises:
        ValueError: `minimum` below 1, or `epsilon` not above 0, or several scans of one person with `epsilon`.
        DataError: a patient is listed twice, holds NaN or Inf, or has an empty brain.
    """
    domain = domain or Domain()
    if minimum < 1:
        raise ValueError(f"minimum must be a number of patients of at least 1, got {minimum}")
    if epsilon is not None and not (0 < epsilon < math.inf):
        raise ValueError(f"epsilon must be above 0 and finite, or None for no noise, got {epsilon}")
    if epsilon is None:
        if seed is not None or charge is not None:
            raise ValueError("seed and charge belong to noise; pass epsilon=, or leave them out")
        summaries = [_summarise(patient, domain) for patient in _patients(site)]
        return _exact(site.name, summaries, domain, minimum, len(site.val))
    sums = {name: np.zeros(size, dtype=np.int64) for name, size in _sizes(domain).items()}
    ids = []
    for patient in _patients(site):
        ids.append(patient.id)
        for name, counts in contributions(patient, domain=domain).items():
            sums[name] += counts
    check_one_scan_each(site, ids)
    spent = Spent(epsilon=float(epsilon), delta=0.0, unit="patient", accountant="Laplace", adjacency=ADJACENCY,
                  repeats=seed is not None)
    if charge is not None:
        charge(spent)
    rng = random.SystemRandom() if seed is None else random.Random(derive(seed, "statistics", site.name))
    scale = Fraction(len(sums) * PARTS) / Fraction(epsilon)
    noised = {name: np.array(noisy(map(int, counts), scale=scale, rng=rng)) / PARTS for name, counts in sums.items()}
    return _noised(site.name, noised, domain, minimum, spent)


def contributions(patient: Patient, *, domain: Domain) -> dict[str, Counts]:
    """What one patient adds to the counts that noise is added to.

    Returns:
        One vector of non-negative whole parts per quantity, each summing to at most `PARTS`: the patient itself; its
        voxels' intensities by modality as shares of all its brain voxels, rounded down; its volume by region (zeros
        without a label); and, if the domain names them, its voxel size and shape.

    Raises:
        DataError: the image holds NaN or Inf, or its brain is empty.
    """
    summary = _summarise(patient, domain)
    parts = {name: counts * PARTS // counts.sum() for name, counts in summary.counts.items()}
    parts["patients"] = np.array([PARTS], dtype=np.int64)
    for name, known, value in (("spacing", domain.spacings, summary.spacing), ("shape", domain.shapes, summary.shape)):
        if known is not None:
            parts[name] = PARTS * np.array([value == each for each in known] + [value not in known], dtype=np.int64)
    return {name: parts.get(name, np.zeros(size, dtype=np.int64)) for name, size in _sizes(domain).items()}


def _sizes(domain: Domain) -> dict[str, int]:
    """The number of bins of everything that noise is added to: Q names."""
    return {
        "patients": 1,
        **{f"intensity {name}": len(domain.intensity) - 1 for name in domain.modalities},
        **{f"volume {name}": len(domain.volume_ml) - 1 for name in domain.regions},
        **({} if domain.spacings is None else {"spacing": len(domain.spacings) + 1}),
        **({} if domain.shapes is None else {"shape": len(domain.shapes) + 1}),
    }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Summary:
    """The measurements of one patient; they do not leave the site."""

    counts: dict[str, Counts]  # "intensity <modality>": voxels in each bin; "volume <region>": 1 in its bin
    moments: dict[str, tuple[float, float]]  # by modality, the mean of its intensities and of their squares
    landmarks: dict[str, NDArray[np.float64]]  # by modality, its percentiles
    volumes: dict[str, float]  # by region in ml; empty without a label
    spacing: str
    shape: str


def _patients(site: Site) -> Iterator[Patient]:
    listed: set[str] = set()
    for patient in itertools.chain(site.train, site.val):
        if patient.id in listed:
            raise DataError(f"site {site.name} lists patient {patient.id} twice; a patient counts once")
        listed.add(patient.id)
        yield patient


def _summarise(patient: Patient, domain: Domain) -> _Summary:
    image = patient.image.float()
    brain = (image != 0).any(dim=0)
    if not brain.any():
        raise DataError(f"patient {patient.id} has an empty brain: every voxel is 0")
    counts, moments, landmarks = {}, {}, {}
    for name in domain.modalities:
        values = image[MODALITIES.index(name)][brain].numpy().astype(np.float64)
        if not np.isfinite(values).all():
            raise DataError(f"the {name} of patient {patient.id} holds NaN or Inf; repair it or leave the patient out")
        counts[f"intensity {name}"] = _histogram(values, domain.intensity)
        moments[name] = float(values.mean()), float(np.square(values).mean())
        landmarks[name] = np.percentile(values, PERCENTILES)
    spacing = np.linalg.norm(np.asarray(patient.affine)[:3, :3], axis=0)
    volumes: dict[str, float] = {}
    if patient.label is not None:
        millilitres = labels_to_regions(patient.label).flatten(1).sum(1).numpy() * float(spacing.prod()) / 1000
        volumes = {name: float(millilitres[REGIONS.index(name)]) for name in domain.regions}
        counts |= {f"volume {name}": _histogram(np.array([v]), domain.volume_ml) for name, v in volumes.items()}
    return _Summary(counts=counts, moments=moments, landmarks=landmarks, volumes=volumes,
                    spacing="x".join(f"{round(float(s), 2):g}" for s in spacing), shape="x".join(map(str, brain.shape)))


def _histogram(values: NDArray[np.float64], edges: Sequence[float]) -> Counts:
    """Number of values in each bin; the outer bins are open."""
    return np.bincount(np.searchsorted(edges[1:-1], values, side="right"), minlength=len(edges) - 1).astype(np.int64)


def _exact(site: str, summaries: Sequence[_Summary], domain: Domain, minimum: int, held_out: int) -> SiteStatistics:
    """Statistics without noise; values of fewer than `minimum` patients are withheld."""
    patients = len(summaries)
    if patients < minimum:
        return SiteStatistics(site=site, patients=None, minimum=minimum,
                              withheld=(f"everything: there are fewer than {minimum} patients",))
    withheld = []
    train = patients - held_out
    hide_split = any(0 < part < minimum for part in (train, held_out))
    if hide_split:
        withheld.append(f"the split: fewer than {minimum} patients in a part of it")
    intensity = {}
    for name in domain.modalities:
        mean, square = np.mean([summary.moments[name] for summary in summaries], axis=0)
        marks = np.mean([summary.landmarks[name] for summary in summaries], axis=0)
        intensity[name] = _merged(
            [summary.counts[f"intensity {name}"] for summary in summaries], domain.intensity, minimum,
            mean=_rounded(mean), sd=_deviation(mean, square),
            quantiles=tuple((p / 100, _rounded(mark)) for p, mark in zip(PERCENTILES, marks, strict=True)))
    labelled = [summary.volumes for summary in summaries if summary.volumes]
    volumes = {}
    if len(labelled) < minimum or 0 < patients - len(labelled) < minimum:
        withheld.append(f"volumes: fewer than {minimum} patients with, or without, a label")
    else:
        volumes = {name: _volumes([own[name] for own in labelled], domain, minimum) for name in domain.regions}
    if coarse := [f"{kind} {name}" for kind, spreads in (("intensity", intensity), ("volume", volumes))
                  for name, spread in spreads.items() if spread.coarse]:
        withheld.append(f"the distribution of {', '.join(coarse)}: bins of at least {minimum} patients are too wide to "
                        "show it")
    return SiteStatistics(
        site=site, patients=patients, train=None if hide_split else train, held_out=None if hide_split else held_out,
        intensity=intensity, volumes_ml=volumes, minimum=minimum, withheld=tuple(withheld),
        spacing_mm=_named((summary.spacing for summary in summaries), domain.spacings, minimum),
        shape=_named((summary.shape for summary in summaries), domain.shapes, minimum))


def _volumes(values: Sequence[float], domain: Domain, minimum: int) -> Distribution:
    """The volumes of one region; a quantile is the mean of the `minimum` patients nearest to it in rank."""
    ordered = np.sort(values)
    quantiles = []
    for q in QUANTILES:
        first = round(q * (len(ordered) - 1) - (minimum - 1) / 2)
        if first >= 0 and first + minimum <= len(ordered):
            quantiles.append((q, _rounded(ordered[first:first + minimum].mean())))
    return _merged([_histogram(np.array([v]), domain.volume_ml) for v in values], domain.volume_ml, minimum,
                   mean=_rounded(ordered.mean()), sd=_rounded(ordered.std()), quantiles=tuple(quantiles))


def _merged(counted: Sequence[Counts], edges: Sequence[float], minimum: int, *, mean: float, sd: float,
            quantiles: tuple[tuple[float, float], ...]) -> Distribution:
    """Patients by bin, neighbouring bins merged until at least `minimum` patients contribute to each.

    Outer bins without any patient are left out where the next one holds enough patients by itself.
    """
    table = np.array([counts / counts.sum() for counts in counted])
    finest = Distribution(edges=tuple(edges), counts=tuple(table.sum(axis=0).tolist()))
    patients = (table > 0).sum(axis=0)
    first, last = np.flatnonzero(patients)[[0, -1]]
    low = first if patients[first] >= minimum else 0
    high = last + 1 if patients[last] >= minimum else len(patients)
    edges, table = edges[low:high + 1], table[:, low:high]
    kept, counts = [edges[0]], []
    pending = np.zeros(len(table))
    for column, edge in enumerate(edges[1:]):
        pending += table[:, column]
        if (pending > 0).sum() >= minimum:
            kept.append(edge)
            counts.append(pending.sum())
            pending = np.zeros(len(table))
    if kept[-1] != edges[-1]:  # too few patients at the upper end belong to the bin below
        kept[-1] = edges[-1]
        counts[-1] += pending.sum()
    merged = Distribution(edges=tuple(kept), counts=tuple(round(float(count), 3) for count in counts), mean=mean, sd=sd,
                          quantiles=quantiles)
    return replace(merged, coarse=wasserstein(merged, finest) > max(COARSEST * sd, 1e-6))


def _named(values: Iterator[str], known: Sequence[str] | None, minimum: int) -> dict[str, float]:
    """Patients by name; names of fewer than `minimum` patients become "other", which is never that small itself."""
    counts = Counter(value if known is None or value in known else _OTHER for value in values)
    rare = counts.pop(_OTHER, 0) + sum(count for count in counts.values() if count < minimum)
    kept = [(name, count) for name, count in counts.most_common() if count >= minimum]
    while kept and 0 < rare < minimum:  # otherwise the total would reveal the few
        rare += kept.pop()[1]
    return {**{name: float(count) for name, count in kept}, **({_OTHER: float(rare)} if rare else {})}


def _noised(site: str, counts: Mapping[str, NDArray[np.float64]], domain: Domain, minimum: int,
            spent: Spent) -> SiteStatistics:
    """Statistics computed from noisy counts only."""
    patients = float(counts["patients"][0])
    if patients < minimum:
        return SiteStatistics(site=site, patients=None, minimum=minimum, spent=(spent,),
                              withheld=(f"everything: there seem to be fewer than {minimum} patients",))
    withheld = ["the split, and exact values of means and quantiles: all values are computed from the noisy counts"]
    withheld += [f"{name}: the domain does not list them in advance"
                 for name, known in (("voxel sizes", domain.spacings), ("shapes", domain.shapes)) if known is None]
    released: dict[str, dict[str, Distribution]] = {"intensity": {}, "volume": {}}
    for kind, names, edges, levels in (
            ("intensity", domain.modalities, domain.intensity, [level / 100 for level in PERCENTILES]),
            ("volume", domain.regions, domain.volume_ml, QUANTILES)):
        for name in names:
            table = counts[f"{kind} {name}"]
            if kind == "intensity":  # every patient has all intensities: the bins sum to the patients
                table = table + (patients - table.sum()) / len(table)
            bare = Distribution(edges=edges, counts=tuple(table.tolist()))
            if bare.total <= 0:
                withheld.append(f"{kind} {name}: the noise exceeds it")
                continue
            middle, shares = (np.array(edges[1:]) + np.array(edges[:-1])) / 2, bare.shares()
            mean = float(shares @ middle)
            sd = math.sqrt(float(shares @ np.square(middle - mean)))
            released[kind][name] = replace(bare, mean=_rounded(mean), sd=_rounded(sd),
                                           quantiles=tuple((q, _rounded(bare.quantile(q))) for q in levels))
    categories = [dict(zip((*(known or ()), _OTHER), counts[name].tolist(), strict=True)) if known is not None else {}
                  for name, known in (("spacing", domain.spacings), ("shape", domain.shapes))]
    return SiteStatistics(site=site, patients=patients, intensity=released["intensity"], volumes_ml=released["volume"],
                          spacing_mm=categories[0], shape=categories[1], minimum=minimum, spent=(spent,),
                          withheld=tuple(withheld))


def combine(statistics: Sequence[SiteStatistics], *, name: str = "all sites") -> SiteStatistics:
    """The statistics of several sites as one, at the server.

    Counts are added, and every patient has equal weight in means and quantiles. If sites use different bins, the
    patients of a bin are assumed to be spread evenly over it. Values that a site withholds are missing in the sums, and
    so are its distributions that are too coarse, unless all are.

    The ε of the result is the largest of the sites' if all of them added noise and no patient is at two sites:
    a patient is in one site's statistics only (parallel composition). If a site added no noise there is none.

    Raises:
        ValueError: no statistics, or two of the same site.
    """
    if not statistics:
        raise ValueError("there are no statistics to combine")
    if twice := [site for site, count in Counter(own.site for own in statistics).items() if count > 1]:
        raise ValueError(f"{', '.join(twice)} would be counted twice; give the statistics of each site once")
    silent = [own.site for own in statistics if own.patients is None]
    known = [own for own in statistics if own.patients is not None]
    guaranteed = all(own.spent for own in statistics)
    return SiteStatistics(
        site=name, patients=_added([own.patients for own in known]), train=_added([own.train for own in known]),
        held_out=_added([own.held_out for own in known]),
        intensity=_pooled([own.intensity for own in known], per_patient=True),
        volumes_ml=_pooled([own.volumes_ml for own in known], per_patient=False),
        spacing_mm=_tallied([own.spacing_mm for own in known]),
        shape=_tallied([own.shape for own in known]), minimum=min(own.minimum for own in statistics),
        spent=max((own.spent for own in statistics), key=lambda spent: spent[0].epsilon) if guaranteed else (),
        withheld=(*((f"the patients of {', '.join(silent)}",) if silent else ()),
                  *(f"{own.site}: {reason}" for own in known for reason in own.withheld)))


def _added(numbers: Sequence[float | None]) -> float | None:
    """The sum, or None if one of the numbers is withheld."""
    known = [number for number in numbers if number is not None]
    return math.fsum(known) if known and len(known) == len(numbers) else None


def _tallied(tables: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: math.fsum(table.get(name, 0.0) for table in tables) for name in names}


def _pooled(tables: Sequence[Mapping[str, Distribution]], *, per_patient: bool) -> dict[str, Distribution]:
    """Distributions by name, over the sites that release them.

    Args:
        per_patient: the quantiles are means over patients and can be averaged; otherwise they are computed from the
            bins.
    """
    pooled = {}
    for name in dict.fromkeys(name for table in tables for name in table):
        parts = [table[name] for table in tables if name in table and table[name].total > 0]
        parts = [part for part in parts if not part.coarse] or parts
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
    """One distribution in the bins of all parts, with their joint moments unless a part has none."""
    edges = sorted({edge for part in parts for edge in part.edges})
    counts = np.sum([part.total * part.shares(edges) for part in parts], axis=0)
    moments = [(p.mean, p.mean**2 + p.sd**2) for p in parts if p.mean is not None and p.sd is not None]
    bare = Distribution(edges=tuple(edges), counts=tuple(counts.tolist()), coarse=any(part.coarse for part in parts))
    if len(moments) < len(parts):
        return bare
    mean, square = np.average(moments, axis=0, weights=[part.total for part in parts])
    return replace(bare, mean=_rounded(mean), sd=_deviation(mean, square))


def _deviation(mean: float, square: float) -> float:
    """The standard deviation of values with this mean and this mean of squares."""
    return _rounded(math.sqrt(max(square - mean**2, 0.0)))


def _rounded(value: float) -> float:
    """Three digits, which suffice for every use here."""
    return round(float(f"{value:.3g}"), 3) + 0.0  # not -0.0
