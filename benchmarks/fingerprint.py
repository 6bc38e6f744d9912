"""How often fingerprints find the same patient again, and how often they take two patients for one.

    .venv/bin/python benchmarks/fingerprint.py [--patients 208]

The generated patients are others than those the fingerprint was designed on (seed 11); the threshold was fixed there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from common import write
from fedlab.core.types import Patient
from fedlab.data.phantom.anatomy import Grid
from fedlab.data.phantom.generator import generate_patient, make_cohort, site_profiles
from fedlab.data.readers.folders import read_cohort
from fedlab.data.sites.fingerprint import LENGTH, THRESHOLD, Fingerprint, find_duplicates, fingerprint

SITES, SEED = 13, 0
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "brats_real"
Voxels = np.ndarray


def changed(patient: Patient, rng: np.random.Generator) -> Iterator[tuple[str, Patient]]:
    """The patient as another data set might hold it."""
    image = patient.image.float().numpy().copy()
    brain = (image != 0).any(axis=0)
    for channel in image:  # positive in the brain, as a scanner gives it
        channel[brain] += 1 - channel[brain].min()
    spacing = patient.spacing_mm[0]
    low, high = (np.array([f(at) for at in np.nonzero(brain)]) for f in (np.min, np.max))
    box = tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))
    cut = round(12 / spacing)
    sd = image[:, brain].std(axis=1)[:, None, None, None]
    gamma = rng.uniform(0.5, 2.0, 4)[:, None, None, None]

    def as_patient(name: str, voxels: Voxels, affine: Voxels | None = None) -> tuple[str, Patient]:
        held = torch.from_numpy(np.ascontiguousarray(voxels, dtype=np.float32))
        return name, replace(patient, image=held, label=None, affine=patient.affine if affine is None else affine)

    yield as_patient("another id", image)
    yield as_patient("flipped left to right", image[:, ::-1])
    yield as_patient("flipped front to back and upside down", image[:, :, ::-1, ::-1])
    yield as_patient("axes swapped", image.transpose(0, 3, 1, 2), patient.affine[:, [2, 0, 1, 3]])
    yield as_patient("renormalised (affine)", image * rng.uniform(0.2, 900) * brain)
    yield as_patient("renormalised (gamma 0.5 to 2)", image**gamma)
    yield as_patient("saturated above the 95th percentile", np.stack([
        np.minimum(channel, np.percentile(channel[brain], 95)) for channel in image]))
    noise = rng.normal(size=image.shape).astype(np.float32) * 0.2 * sd
    yield as_patient("noise of 0.2 sd", np.maximum(image + noise, 1e-3) * brain)
    yield as_patient("resampled to 2 mm", *resampled(image, patient.affine, 2.0))
    yield as_patient("resampled to 4 mm", *resampled(image, patient.affine, 4.0))
    yield as_patient("cropped to the brain", image[(slice(None), *box)])
    yield as_patient("lowest 12 mm of the brain cut off", image[:, :, :, low[2] + cut:])
    yield as_patient("brain mask eroded by a voxel", image * ndimage.binary_erosion(brain))
    yield as_patient("turned by up to 3 degrees, moved by up to 3 mm", turned(image, rng, 3, 3 / spacing))
    yield as_patient("turned by up to 6 degrees, moved by up to 6 mm", turned(image, rng, 6, 6 / spacing))
    for strength in (0.02, 0.05, 0.1):
        yield as_patient(f"coil of {strength} (sd of log gain)", image * coil(brain.shape, rng, strength))
    small, affine = resampled(image[:, ::-1] ** gamma, patient.affine, 3.7)
    yield as_patient("flipped, gamma, resampled, noise together", np.maximum(
        small + (small != 0) * rng.normal(size=small.shape) * 0.05 * small[small != 0].std(), 0), affine)


def resampled(image: Voxels, affine: Voxels, spacing_mm: float) -> tuple[Voxels, Voxels]:
    factor = np.linalg.norm(affine[:3, :3], axis=0) / spacing_mm
    inside = ndimage.zoom((image != 0).any(axis=0).astype(np.float32), factor, order=1) >= 0.5
    finer = affine @ np.diag([*1 / factor, 1.0])
    return np.stack([ndimage.zoom(channel, factor, order=1) for channel in image]) * inside, finer


def turned(image: Voxels, rng: np.random.Generator, degrees: float, voxels: float) -> Voxels:
    matrix = Rotation.from_euler("xyz", rng.uniform(-degrees, degrees, 3), degrees=True).as_matrix()
    middle = (np.array(image.shape[1:]) - 1) / 2
    offset = middle - matrix @ (middle + rng.uniform(-voxels, voxels, 3))
    inside = ndimage.affine_transform((image != 0).any(axis=0).astype(np.float32), matrix, offset, order=1) >= 0.5
    return np.stack([ndimage.affine_transform(channel, matrix, offset, order=1) for channel in image]) * inside


def coil(shape: tuple[int, ...], rng: np.random.Generator, sd: float) -> Voxels:
    """A smooth gain for each modality."""
    fields = np.stack([ndimage.zoom(rng.normal(size=(3, 3, 3)), [n / 3 for n in shape], order=3) for _ in range(4)])
    return np.exp(sd * fields / fields.std(axis=(1, 2, 3), keepdims=True))


def found_again(pairs: list[tuple[Fingerprint, Fingerprint]]) -> dict[str, float | int]:
    distances = np.array([one.distance(other) for one, other in pairs])
    return {"pairs": len(pairs), "found": int((distances <= THRESHOLD).sum()),
            "median distance": round(float(np.median(distances)), 4), "largest": round(float(distances.max()), 4)}


def apart(prints: list[Fingerprint]) -> dict[str, float | int]:
    """Every pair of different patients."""
    distances = np.array([match.distance for match in find_duplicates({"all": prints}, threshold=0.999)])
    pairs = len(prints) * (len(prints) - 1) // 2
    touched = {name for match in find_duplicates({"all": prints}) for name in (match.patient, match.other_patient)}
    return {"pairs": pairs, "taken for one": int((distances <= THRESHOLD).sum()),
            "patients concerned": len(touched), "smallest distance": round(float(distances.min()), 4),
            "0.1 % quantile": round(float(np.sort(distances)[pairs // 1000]), 4)}


def again(seed: int, patients: int) -> dict[str, dict[str, float | int]]:
    """The same person another time: on another scanner, or with a larger tumour. Duplicates of a person, not a scan."""
    profiles, grid = site_profiles(SITES, seed), Grid(shape=(64, 64, 64), spacing_mm=3.0)
    other, bigger = [], []
    for number in range(patients):
        own, next_one = profiles[number % SITES], profiles[(number + 1) % SITES]
        larger = replace(own.population, median_ml=min(250.0, own.population.median_ml * 1.5))
        looks = [fingerprint(generate_patient(seed=seed, site="again", index=number, profile=profile, grid=grid))
                 for profile in (own, replace(own, scanner=next_one.scanner), replace(own, population=larger))]
        other.append((looks[0], looks[1]))
        bigger.append((looks[0], looks[2]))
    return {"another scanner, same day": found_again(other), "same scanner, tumour half as large again":
            found_again(bigger)}


def real(rng: np.random.Generator, generated: list[Fingerprint]) -> dict[str, object]:
    """Six real patients, one of them at 1 mm and at 2 mm."""
    if not REAL.is_dir():
        return {"left out": "no real scans beside the checkout"}
    fine, coarse, other = (list(read_cohort(REAL / name)) for name in (
        "brats2021_1mm", "brats2021_2mm", "msd/Task01_BrainTumour"))
    coarse += other
    prints = {patient.id: fingerprint(patient) for patient in coarse}
    repeated: dict[str, list[tuple[Fingerprint, Fingerprint]]] = {}
    for patient in coarse:
        for name, copy in changed(patient, rng):
            repeated.setdefault(name, []).append((prints[patient.id], fingerprint(copy)))
    nearest = min(one.distance(other) for one in prints.values() for other in generated)
    pairs = sorted((round(a.distance(b), 4), a.patient, b.patient)
                   for a in prints.values() for b in prints.values() if a.patient < b.patient)
    return {
        "01479 at 1 mm and at 2 mm": round(fingerprint(fine[0]).distance(prints[fine[0].id]), 4),
        "different patients": apart(list(prints.values())), "nearest different patients": pairs[:3],
        "decathlon, nearest": min(pair for pair in pairs if other[0].id in pair),
        "nearest generated patient": round(nearest, 4),
        "changed": {name: found_again(pairs) for name, pairs in repeated.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=208)
    count = parser.parse_args().patients
    sites = make_cohort(sizes=[count // SITES] * SITES, seed=SEED, held_out=0, progress=False)
    patients = [patient for site in sites for patient in site.train]
    started = time.perf_counter()
    prints = [fingerprint(patient) for patient in patients]
    seconds = (time.perf_counter() - started) / len(patients)
    repeated: dict[str, list[tuple[Fingerprint, Fingerprint]]] = {}
    for number, patient in enumerate(patients):
        for name, copy in changed(patient, np.random.default_rng(number)):
            repeated.setdefault(name, []).append((prints[number], fingerprint(copy)))
    write("fingerprint", {
        "whole numbers": LENGTH, "threshold": THRESHOLD, "seconds a patient (64x64x64)": round(seconds, 3),
        "generated, different patients": apart(prints),
        "generated, the same scan changed": {name: found_again(pairs) for name, pairs in repeated.items()},
        "generated, the same person scanned again": again(SEED + 1, count // 2),
        "real": real(np.random.default_rng(0), prints),
    })


if __name__ == "__main__":
    main()
