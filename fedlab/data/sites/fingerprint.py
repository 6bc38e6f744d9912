"""Duplicate patients across sites and splits, found without a site showing an image to another.

Each site turns every patient into 256 small whole numbers, and only those are compared. Public data sets share
patients under other names (BraTS and the Medical Segmentation Decathlon, for one), flipped, renormalised or
resampled; a patient who is trained on at one site and held out at another makes every score too good.

How it works: per modality, brain voxels are replaced by their rank, which no brightness, contrast or monotone
renormalisation changes. Ranks are projected on cosines over a cube of 200 mm around the middle of the brain, in mm,
so that voxel size and margins don't matter. Of these waves the 64 with half-wavelengths of 37 to 47 mm are kept: longer
ones mostly show what all brains share and what the coil did, shorter ones don't survive a shift of some mm. A flip
turns the sign of some numbers and a swap of axes reorders them, so all 48 orientations are compared at no cost.

What it misses: a copy whose coil's uneven gain was corrected while the other's was not, from about 10 % (standard
deviation) on; a copy with other modalities; much of the brain cut off. The same person scanned on another day or
scanner is found sometimes and must be kept together by what the site knows.

What a fingerprint gives away: it is made from the image and is not anonymous. It can be turned back into a blurred
picture of four modalities, coarse but enough for the side of a large tumour, and whoever holds another scan of the
person can tell from it that the person is at that site; that is what it is for. It comes with no differential privacy.
Send it only to who does the comparing, under the same agreement as other personal data, and delete it afterwards.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlab.core.errors import DataError
from fedlab.core.types import MODALITIES, Site
from fedlab.data.sites.statistics import Scanned

__all__ = ["LENGTH", "THRESHOLD", "Fingerprint", "Match", "find_duplicates", "fingerprint", "fingerprint_site",
           "read_fingerprints", "same_person", "write_fingerprints"]

#: Edge of the cube on which the waves live [mm].
CUBE_MM = 200.0
#: Half-waves along the three axes of the waves kept; with each wave all its permutations.
WAVES = tuple(wave for wave in itertools.product(range(6), repeat=3) if 18 <= sum(n * n for n in wave) <= 29)
#: Whole numbers in a fingerprint.
LENGTH = len(MODALITIES) * len(WAVES)
#: Distance up to which two fingerprints count as the same patient's. How often that is wrong, and how often right,
#: is measured by benchmarks/fingerprint.py and stands in benchmarks/results/fingerprint.json.
THRESHOLD = 0.10


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What is compared of a patient. See the module for what it gives away.

    Attributes:
        patient: the patient's id, or whatever the site calls the patient towards others.
        values: `LENGTH` whole numbers from -127 to 127.

    Raises:
        DataError: another length, values out of range, or all 0.
    """

    patient: str
    values: tuple[int, ...]

    def __post_init__(self) -> None:
        if (len(self.values) != LENGTH or not any(self.values)
                or not all(type(value) is int and -127 <= value <= 127 for value in self.values)):
            raise DataError(f"the fingerprint of {self.patient!r} is {LENGTH} whole numbers from -127 to 127, not all "
                            f"0; got {len(self.values)} values")

    def distance(self, other: Fingerprint) -> float:
        """From 0 (the same numbers) to 2, in the best of 48 orientations; see `THRESHOLD`."""
        return float(_distances([self], [other])[0, 0])

    def __repr__(self) -> str:
        return f"<Fingerprint of {self.patient}: {LENGTH} numbers>"


@dataclass(frozen=True, kw_only=True, order=True)
class Match:
    """Two entries that seem to be the same patient.

    Attributes:
        distance: between the fingerprints.
        site, patient: the one.
        other_site, other_patient: the other; the same site where a site lists a patient twice.
    """

    distance: float
    site: str
    patient: str
    other_site: str
    other_patient: str


def fingerprint(patient: Scanned) -> Fingerprint:
    """The fingerprint of one patient, computed at the patient's site.

    Args:
        patient: image of shape (4, X, Y, Z) in the order of `fedlab.core.types.MODALITIES`, 0 outside the brain, in any
            units, voxel size and orientation.

    Raises:
        DataError: the brain is empty, holds NaN or Inf, or shows nothing.
    """
    image = patient.image.float().numpy()
    brain = (image != 0).any(axis=0)
    if not brain.any() or not np.isfinite(image).all():
        raise DataError(f"patient {patient.id} has an empty brain, or NaN or Inf in it; it has no fingerprint")
    box = tuple(slice(at.min(), at.max() + 1) for at in np.nonzero(brain))
    image, brain = image[(slice(None), *box)], brain[box]
    spacing = np.linalg.norm(np.asarray(patient.affine, dtype=np.float64)[:3, :3], axis=0)
    waves = [_cosines(brain.sum(axis=tuple({0, 1, 2} - {axis})), float(spacing[axis])) for axis in range(3)]
    values = []
    for channel in image:
        volume = np.zeros(brain.shape, dtype=np.float32)
        volume[brain] = _ranks(channel[brain])
        projected = np.einsum("xyz,kz->xyk", volume, waves[2], optimize=True)
        projected = np.einsum("xyk,jy->xjk", projected, waves[1], optimize=True)
        projected = np.einsum("xjk,ix->ijk", projected, waves[0], optimize=True)
        values.append([projected[wave] for wave in WAVES])
    table = np.asarray(values, dtype=np.float64)
    largest = np.abs(table).max()
    if not largest > 0:
        raise DataError(f"patient {patient.id} shows nothing: every modality is the same throughout the brain")
    return Fingerprint(patient=patient.id, values=tuple(np.rint(table / largest * 127).astype(int).ravel().tolist()))


def _cosines(voxels: NDArray[Any], spacing_mm: float) -> NDArray[np.float32]:
    """Cosines with 0 to 5 half-waves over the cube, shape (6, voxels along the axis)."""
    at = np.arange(len(voxels))
    middle = (at * voxels).sum() / voxels.sum()
    inside = np.clip((at - middle) * spacing_mm / CUBE_MM + 0.5, 0.0, 1.0)
    cosines: NDArray[np.float32] = np.cos(np.pi * np.arange(6)[:, None] * inside).astype(np.float32)
    return cosines


def _ranks(values: NDArray[Any]) -> NDArray[np.float32]:
    """Ranks from -1 to 1; equal values share the middle of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float32] = ((2 * np.cumsum(count) - count) / len(values) - 1)[place].astype(np.float32)
    return ranks


def fingerprint_site(site: Site) -> list[Fingerprint]:
    """Fingerprints of all patients of a site, those to train on first.

    Raises:
        DataError: a patient without one; see `fingerprint`.
    """
    return [fingerprint(patient) for patients in (site.train, site.val) for patient in patients]


def write_fingerprints(fingerprints: Sequence[Fingerprint]) -> str:
    """As JSON text, to send to who compares."""
    return json.dumps({"format": "fedlab-fingerprints-1",
                       "patients": [{"patient": each.patient, "values": each.values} for each in fingerprints]},
                      ensure_ascii=False)


def read_fingerprints(text: str) -> list[Fingerprint]:
    """What `write_fingerprints` wrote.

    Raises:
        DataError: it isn't that.
    """
    try:
        told = json.loads(text)
        if told["format"] != "fedlab-fingerprints-1":
            raise ValueError("not in the format fedlab-fingerprints-1")
        return [Fingerprint(patient=str(each["patient"]), values=tuple(each["values"])) for each in told["patients"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"these are no fingerprints ({type(error).__name__}: {error}); expected what "
                        "write_fingerprints() writes") from error


def find_duplicates(fingerprints: Mapping[str, Sequence[Fingerprint]], *,
                    threshold: float = THRESHOLD) -> list[Match]:
    """Pairs that seem to be the same patient, across sites and within them, nearest first.

    Args:
        fingerprints: of each site, by its name.
        threshold: largest distance of a pair.

    Raises:
        ValueError: `threshold` outside [0, 1).
    """
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"threshold is a distance from 0 to below 1, got {threshold}; the measured one is {THRESHOLD}")
    entries = [(site, each) for site, own in fingerprints.items() for each in own]
    if not entries:
        return []
    apart = _distances([each for _, each in entries], [each for _, each in entries])
    return sorted(
        Match(distance=round(float(apart[a, b]), 4), site=entries[a][0], patient=entries[a][1].patient,
              other_site=entries[b][0], other_patient=entries[b][1].patient)
        for a, b in np.argwhere(np.triu(apart <= threshold, k=1)).tolist())


def same_person(matches: Iterable[Match]) -> tuple[frozenset[str], ...]:
    """The ids that belong together, directly or through others: the `same` of a `Partition`.

    Raises:
        DataError: two entries have the same id, so that a partition can't tell them apart; rename one.
    """
    groups: list[set[str]] = []
    for match in matches:
        if match.patient == match.other_patient:
            raise DataError(f"{match.patient} is listed at {match.site} and again at {match.other_site}; leave one out")
        pair = {match.patient, match.other_patient}
        touching = [group for group in groups if group & pair]
        groups = [group for group in groups if not group & pair] + [pair.union(*touching)]
    return tuple(sorted((frozenset(group) for group in groups), key=sorted))


@lru_cache(maxsize=1)
def _orientations() -> list[tuple[NDArray[np.intp], NDArray[np.float32]]]:
    """For each flip and swap of axes, where a wave's number comes from and with which sign."""
    place = {wave: index for index, wave in enumerate(WAVES)}
    moves = []
    for axes in itertools.permutations(range(3)):
        source = np.array([place[wave[axes[0]], wave[axes[1]], wave[axes[2]]] for wave in WAVES])
        for flipped in itertools.product((0, 1), repeat=3):
            odd = np.array([sum(n * f for n, f in zip(wave, flipped, strict=True)) % 2 for wave in WAVES])
            moves.append((source, (1 - 2 * odd).astype(np.float32)))
    return moves


def _distances(some: Sequence[Fingerprint], others: Sequence[Fingerprint]) -> NDArray[np.float32]:
    """1 - the largest cosine over all orientations, shape (some, others)."""
    left, right = (_unit(np.array([each.values for each in each_side], dtype=np.float32))
                   for each_side in (some, others))
    best = np.full((len(left), len(right)), -1.0, dtype=np.float32)
    for source, signs in _orientations():
        turned = (left[:, :, source] * signs).reshape(len(left), -1)
        np.maximum(best, turned @ right.reshape(len(right), -1).T, out=best)
    apart: NDArray[np.float32] = np.clip(1.0 - best, 0.0, 2.0)
    return apart


def _unit(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Shape (patients, modalities, waves), each patient's numbers with a sum of squares of 1."""
    table: NDArray[np.float32] = values / np.linalg.norm(values, axis=1, keepdims=True)
    return table.reshape(len(values), len(MODALITIES), len(WAVES))
