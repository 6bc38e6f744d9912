"""Fingerprints find a scan again after changes, and do not confuse two patients."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from fedlab.core.errors import DataError
from fedlab.core.types import Patient, Site
from fedlab.data.phantom.generator import make_cohort
from fedlab.data.sites.fingerprint import (
    LENGTH,
    THRESHOLD,
    WAVES,
    Fingerprint,
    Match,
    find_duplicates,
    fingerprint,
    fingerprint_site,
    read_fingerprints,
    same_person,
    write_fingerprints,
)
from fedlab.data.sites.partition import by_quantity


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> list[Site]:
    """Ten patients on a coarse grid."""
    return make_cohort(sizes=[5, 5], held_out=1, shape=(40, 48, 40), spacing_mm=4.0, progress=False, workers=0,
                       cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def patients(cohort: list[Site]) -> list[Patient]:
    return [patient for site in cohort for patient in (*site.train, *site.val)]


def altered(patient: Patient, image: np.ndarray, affine: np.ndarray | None = None) -> Patient:
    held = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
    return Patient("someone", held, None, patient.affine if affine is None else affine)


def positive(patient: Patient) -> np.ndarray:
    """The image as a scanner delivers it: above 0 in the brain."""
    image = patient.image.float().numpy().copy()
    brain = (image != 0).any(axis=0)
    image[:, brain] += 1 - image[:, brain].min(axis=1, keepdims=True)
    return image


def test_the_length_is_as_documented(patients: list[Patient]) -> None:
    print_ = fingerprint(patients[0])
    assert LENGTH == len(print_.values) == 4 * len(WAVES) == 256
    assert max(map(abs, print_.values)) == 127
    assert all(tuple(np.array(wave)[list(order)].tolist()) in WAVES
               for wave in WAVES for order in itertools.permutations(range(3)))


def test_fingerprints_are_invariant_to_orientation(patients: list[Patient]) -> None:
    patient = patients[0]
    image, own = positive(patient), fingerprint(patient)
    for axes in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            turned = image.transpose(0, *(axis + 1 for axis in axes))[:, ::flips[0], ::flips[1], ::flips[2]]
            assert own.distance(fingerprint(altered(patient, turned))) < 1e-3, (axes, flips)


def test_fingerprints_are_invariant_to_monotone_intensities_and_margins(patients: list[Patient]) -> None:
    patient = patients[1]
    image, own = positive(patient), fingerprint(patient)
    brain = (image != 0).any(axis=0)
    where = np.nonzero(brain)
    box = tuple(slice(at.min(), at.max() + 1) for at in where)
    for name, other in {
        "scaled": image * 37.0, "root": np.sqrt(image), "squared": image**2, "logarithm": np.log1p(image),
        "shifted": (image + 500) * brain, "cropped": image[(slice(None), *box)],
        "padded": np.pad(image, ((0, 0), (5, 1), (0, 7), (3, 3))),
    }.items():
        assert own.distance(fingerprint(altered(patient, other))) < 1e-3, name


@pytest.mark.parametrize("spacing_mm", [2.5, 5.0])
def test_resampled_noisy_and_cut_scans_are_found(patients: list[Patient], spacing_mm: float) -> None:
    rng = np.random.default_rng(0)
    for patient in patients:
        image, factor = positive(patient), 4.0 / spacing_mm
        brain = ndimage.zoom((image != 0).any(axis=0).astype(np.float32), factor, order=1) >= 0.5
        other = np.stack([ndimage.zoom(channel, factor, order=1) for channel in image]) * brain
        other += rng.normal(size=other.shape) * 0.1 * image.std() * brain
        other[..., :np.nonzero(brain)[2].min() + 2] = 0
        affine = patient.affine @ np.diag([1 / factor] * 3 + [1.0])
        apart = fingerprint(patient).distance(fingerprint(altered(patient, other, affine)))
        assert apart < THRESHOLD
        # A wrong voxel size means a head of another size.
        assert fingerprint(patient).distance(fingerprint(altered(patient, other))) > 2 * apart


def test_different_patients_of_one_anatomy_are_distinguished(patients: list[Patient]) -> None:
    prints = [fingerprint(patient) for patient in patients]
    nearest = min(one.distance(other) for one, other in itertools.combinations(prints, 2))
    assert nearest > 1.2 * THRESHOLD


def test_duplicates_are_found_across_sites_and_splits(cohort: list[Site]) -> None:
    one, other = cohort
    copied = replace(one.train[0], id="moved", image=one.train[0].image.flip(1) * 3)
    twice = replace(other.train[1], id="again", image=other.train[1].image.flip(2))
    sites = [one, Site(other.name, [*other.train, copied], [*other.val, twice])]
    sent = {site.name: read_fingerprints(write_fingerprints(fingerprint_site(site))) for site in sites}
    matches = find_duplicates(sent)
    assert [(m.site, m.patient, m.other_site, m.other_patient) for m in matches] in (
        [(one.name, one.train[0].id, other.name, "moved"), (other.name, other.train[1].id, other.name, "again")],
        [(other.name, other.train[1].id, other.name, "again"), (one.name, one.train[0].id, other.name, "moved")])
    same = same_person(matches)
    assert set(same) == {frozenset({one.train[0].id, "moved"}), frozenset({other.train[1].id, "again"})}
    names = [p.id for site in sites for p in (*site.train, *site.val)]
    for seed in range(5):
        partition = by_quantity(names, sites=3, skew=0.5, held_out=0.4, seed=seed, same=same)
        for ids in (*partition.train.values(), *partition.held_out.values()):
            assert all(len(person & set(ids)) in (0, 2) for person in same)


def test_the_message_is_short_and_contains_no_image(cohort: list[Site]) -> None:
    sent = json.loads(write_fingerprints(fingerprint_site(cohort[0])))
    assert set(sent) == {"format", "patients"}
    assert all(set(each) == {"patient", "values"} and len(each["values"]) == LENGTH for each in sent["patients"])


def test_same_person_joins_chains_and_refuses_equal_ids() -> None:
    def match(a: str, b: str) -> Match:
        return Match(distance=0.0, site="s", patient=a, other_site="t", other_patient=b)

    assert same_person([match("a", "b"), match("c", "d"), match("d", "b"), match("x", "y")]) == (
        frozenset("abcd"), frozenset("xy"))
    with pytest.raises(DataError, match="a is listed at s and again at t"):
        same_person([match("a", "a")])


def test_no_sites_no_duplicates() -> None:
    assert find_duplicates({}) == []
    with pytest.raises(ValueError, match="threshold"):
        find_duplicates({}, threshold=1.5)


def test_images_without_a_fingerprint_are_refused() -> None:
    blank = torch.zeros(4, 8, 8, 8)
    for image in (blank, blank + float("nan"), blank + 3.0):
        with pytest.raises(DataError, match="p1"):
            fingerprint(Patient("p1", image, None, np.eye(4)))


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"format": "fedlab-fingerprints-1"}', '{"format": "fedlab-fingerprints-1", "patients": [3]}',
    '{"format": "fedlab-fingerprints-1", "patients": [{"patient": "p", "values": [1, 2]}]}',
    json.dumps({"format": "fedlab-fingerprints-1", "patients": [{"patient": "p", "values": [1.5] * LENGTH}]}),
    json.dumps({"format": "fedlab-fingerprints-1", "patients": [{"patient": "p", "values": [200] * LENGTH}]}),
    json.dumps({"format": "fedlab-fingerprints-1", "patients": [{"patient": "p", "values": [0] * LENGTH}]}),
    "[" * 100_000,
])
def test_a_broken_message_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="fingerprint"):
        read_fingerprints(text)


@pytest.mark.filterwarnings("ignore:(?s).*no enhancing tumour")
def test_the_real_duplicate_is_found_and_the_others_are_not(real_scans: Path) -> None:
    from fedlab.data.readers.folders import find_patients, read_patient

    def prints(folder: str) -> list[Fingerprint]:
        return [fingerprint(read_patient(files)) for files in find_patients(real_scans / folder).values()]

    matches = find_duplicates({"fine": prints("brats2021_1mm"), "coarse": prints("brats2021_2mm")})
    assert [(m.site, m.patient, m.other_site, m.other_patient) for m in matches] == [
        ("fine", "BraTS2021_01479", "coarse", "BraTS2021_01479")]
