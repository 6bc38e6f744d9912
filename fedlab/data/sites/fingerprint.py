"""Duplicate patients across sites and splits, found without exchanging images.

Each site turns every patient into 256 small whole numbers, and only those are compared. Public data sets share
patients under other names (for example BraTS and the Medical Segmentation Decathlon), flipped, renormalised or
resampled; a patient who is trained on at one site and held out at another makes every score too high.

Method: per modality, brain voxels are replaced by their rank, which is invariant to brightness, contrast and monotone
renormalisation. Ranks are projected on cosines over a cube of 200 mm around the centre of the brain, in mm, so that
voxel size and margins do not matter. The 64 waves with half-wavelengths of 37 to 47 mm are kept: longer ones mostly
show what all brains share and the coil's sensitivity, shorter ones do not survive a shift of some mm. A flip changes
the sign of some numbers and a swap of axes permutes them, so all 48 orientations are compared at no cost.

Limits: it misses a copy in which the coil's uneven gain was corrected, from about 10 % (standard deviation) upwards; a
copy with other modalities; a brain that is largely cut off. The same person scanned on another day or scanner is found
only sometimes, so such ids must be kept together by what the site knows.

Disclosure: a fingerprint is computed from the image and is not anonymous. It can be inverted to a blurred picture of
four modalities, which shows the side of a large tumour, and anyone who holds another scan of the person can infer that
the person is at that site; that is its purpose. It has no differential privacy. Send it only to the party that
compares, under the same agreement as other personal data, and delete it afterwards.
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
from fedlab.core.types import MODALITIES, Patient, Site
from fedlab.data.brain import bounding_box
from fedlab.data.sites.persons import FoundPerson

__all__ = ["LENGTH", "THRESHOLD", "Fingerprint", "Match", "find_duplicates", "fingerprint", "fingerprint_site",
           "read_fingerprints", "same_person", "write_fingerprints"]

#: Edge of the cube on which the waves are defined [mm].
CUBE_MM = 200.0
#: Half-waves along the three axes of the kept waves; all permutations of a wave are included.
WAVES = tuple(wave for wave in itertools.product(range(6), repeat=3) if 18 <= sum(n * n for n in wave) <= 29)
#: Whole numbers in a fingerprint.
LENGTH = len(MODALITIES) * len(WAVES)
#: Distance up to which two fingerprints count as those of one patient. benchmarks/fingerprint.py measures the rates of
#: true and false matches; results in benchmarks/results/fingerprint.json.
THRESHOLD = 0.10


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """The fingerprint of one patient. See the module for what it discloses.

    Attributes:
        patient: the patient's id, or the name that the site uses for the patient towards others.
        values: `LENGTH` whole numbers from -127 to 127.

    Raises:
        DataError: another length, values out of range, or all 0.
    """

    patient: str
    values: tuple[int, ...]

    def __post_init__(self) -> None:
        if (len(self.values) != LENGTH or not any(self.values)
                or not all(type(value) is int and -127 <= value <= 127 for value in self.values)):
            raise DataError(f"the fingerprint of {self.patient!r} must be {LENGTH} whole numbers from -127 to 127, "
                            f"not all 0; got {len(self.values)} values")

    def distance(self, other: Fingerprint) -> float:
        """From 0 (the same numbers) to 2, in the best of 48 orientations; see `THRESHOLD`."""
        return float(_distances([self], [other])[0, 0])

    def __repr__(self) -> str:
        return f"<Fingerprint of {self.patient}: {LENGTH} numbers>"


@dataclass(frozen=True, kw_only=True, order=True)
class Match:
    """Two entries that appear to be the same patient.

    Attributes:
        distance: between the fingerprints.
        site, patient: the first entry.
        other_site, other_patient: the second entry; the same site if it lists a patient twice.
    """

    distance: float
    site: str
    patient: str
    other_site: str
    other_patient: str


def fingerprint(patient: Patient) -> Fingerprint:
    """The fingerprint of one patient, computed at the patient's site.

    Args:
        patient: image of shape (4, X, Y, Z) in the order of `fedlab.core.types.MODALITIES`, 0 outside the brain, in any
            unit, voxel size and orientation.

    Raises:
        DataError: the brain is empty, constant, or holds NaN or Inf.
    """
    from scipy.stats import rankdata

    image = patient.image.float().numpy()
    brain = (image != 0).any(axis=0)
    if not brain.any() or not np.isfinite(image).all():
        raise DataError(f"patient {patient.id} has no fingerprint: its brain is empty, or holds NaN or Inf")
    box = bounding_box(brain)
    image, brain = image[(slice(None), *box)], brain[box]
    spacing = np.linalg.norm(np.asarray(patient.affine, dtype=np.float64)[:3, :3], axis=0)
    waves = [_cosines(brain.sum(axis=tuple({0, 1, 2} - {axis})), float(spacing[axis])) for axis in range(3)]
    values = []
    for channel in image:
        volume = np.zeros(brain.shape, dtype=np.float32)
        ranks = rankdata(channel[brain])  # of equal values, their mean rank
        volume[brain] = (2 * ranks - 1) / len(ranks) - 1
        projected = np.einsum("xyz,kz->xyk", volume, waves[2], optimize=True)
        projected = np.einsum("xyk,jy->xjk", projected, waves[1], optimize=True)
        projected = np.einsum("xjk,ix->ijk", projected, waves[0], optimize=True)
        values.append([projected[wave] for wave in WAVES])
    table = np.asarray(values, dtype=np.float64)
    largest = np.abs(table).max()
    if not largest > 0:
        raise DataError(f"patient {patient.id} has no fingerprint: every modality is constant in the brain")
    return Fingerprint(patient=patient.id, values=tuple(np.rint(table / largest * 127).astype(int).ravel().tolist()))


def _cosines(voxels: NDArray[Any], spacing_mm: float) -> NDArray[np.float32]:
    """Cosines with 0 to 5 half-waves over the cube, shape (6, voxels along the axis)."""
    index = np.arange(len(voxels))
    centre = (index * voxels).sum() / voxels.sum()
    inside = np.clip((index - centre) * spacing_mm / CUBE_MM + 0.5, 0.0, 1.0)
    cosines: NDArray[np.float32] = np.cos(np.pi * np.arange(6)[:, None] * inside).astype(np.float32)
    return cosines


def fingerprint_site(site: Site) -> list[Fingerprint]:
    """Fingerprints of all patients of a site, those to train on first.

    Raises:
        DataError: a patient without a fingerprint; see `fingerprint`.
    """
    return [fingerprint(patient) for patients in (site.train, site.val) for patient in patients]


def write_fingerprints(fingerprints: Sequence[Fingerprint]) -> str:
    """Fingerprints as JSON text, for the party that compares."""
    return json.dumps({"format": "fedlab-fingerprints-1",
                       "patients": [{"patient": each.patient, "values": each.values} for each in fingerprints]},
                      ensure_ascii=False)


def read_fingerprints(text: str) -> list[Fingerprint]:
    """Reads what `write_fingerprints` wrote.

    Raises:
        DataError: invalid text.
    """
    try:
        note = json.loads(text)
        if note["format"] != "fedlab-fingerprints-1":
            raise ValueError("not in the format fedlab-fingerprints-1")
        return [Fingerprint(patient=str(each["patient"]), values=tuple(each["values"])) for each in note["patients"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"not a list of fingerprints ({type(error).__name__}: {error}); expected the output of "
                        "write_fingerprints()") from error


def find_duplicates(fingerprints: Mapping[str, Sequence[Fingerprint]], *,
                    threshold: float = THRESHOLD) -> list[Match]:
    """Pairs up to `threshold` apart, which appear to be the same patient, across sites and within them, nearest first.

    Raises:
        ValueError: `threshold` outside [0, 1).
    """
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"threshold must be at least 0 and below 1, got {threshold}; the measured one is {THRESHOLD}")
    entries = [(site, each) for site, own in fingerprints.items() for each in own]
    if not entries:
        return []
    apart = _distances([each for _, each in entries], [each for _, each in entries])
    return sorted(
        Match(distance=round(float(apart[a, b]), 4), site=entries[a][0], patient=entries[a][1].patient,
              other_site=entries[b][0], other_patient=entries[b][1].patient)
        for a, b in np.argwhere(np.triu(apart <= threshold, k=1)).tolist())


def same_person(matches: Iterable[Match]) -> tuple[FoundPerson, ...]:
    """The ids that belong to one person, directly or through others: the `same` of a `Partition`.

    A guarantee of a run on its sites says that fingerprints are outside it.

    Raises:
        DataError: two entries have the same id, which a partition cannot distinguish; rename one.
    """
    import networkx

    pairs = networkx.Graph()
    for match in matches:
        if match.patient == match.other_patient:
            raise DataError(f"{match.patient} is listed at {match.site} and again at {match.other_site}; leave one out")
        pairs.add_edge(match.patient, match.other_patient)
    return tuple(sorted(map(FoundPerson, networkx.connected_components(pairs)), key=sorted))


@lru_cache(maxsize=1)
def _orientations() -> list[tuple[NDArray[np.intp], NDArray[np.float32]]]:
    """For each flip and permutation of axes, the source of each wave's number and its sign."""
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
    units = []
    for side in (some, others):
        values = np.array([each.values for each in side], dtype=np.float32)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        units.append(values.reshape(len(values), len(MODALITIES), len(WAVES)))
    left, right = units
    best = np.full((len(left), len(right)), -1.0, dtype=np.float32)
    for source, signs in _orientations():
        turned = (left[:, :, source] * signs).reshape(len(left), -1)
        np.maximum(best, turned @ right.reshape(len(right), -1).T, out=best)
    apart: NDArray[np.float32] = np.clip(1.0 - best, 0.0, 2.0)
    return apart
