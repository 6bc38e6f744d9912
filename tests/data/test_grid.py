"""Resampling onto a common grid, of scans with anisotropic voxels and oblique axes, against geometry by hand."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch

from cohorts import OBLIQUE
from fedlab.core.types import MODALITIES, Patient
from fedlab.data.readers.examination import examine
from fedlab.data.readers.nifti import read_volume, write_label
from fedlab.data.readers.patient_files import PatientFiles
from fedlab.data.readers.scan import Grid, Scan, on_grid


def ball(shape=(30, 44, 26), center=(15, 20, 12), radius=(10, 10, 10)):
    """A mask, true where the middle of a voxel lies in the ellipsoid; centers lie between voxels."""
    axes = np.ogrid[tuple(slice(0, n) for n in shape)]
    return sum(((x + 0.5 - c) / r) ** 2 for x, c, r in zip(axes, center, radius, strict=True)) < 1


def scan_of(brain, image, affine, label=None):
    four = np.stack([image] * 4).astype(np.float32) * brain
    return Scan(image=torch.from_numpy(four), brain=torch.from_numpy(brain),
                label=None if label is None else torch.from_numpy(label.astype(np.uint8)), affine=affine)


def center_mm(weights, affine):
    places = np.argwhere(weights)
    mean = np.average(places, axis=0, weights=weights[tuple(places.T)])
    return affine[:3, :3] @ mean + affine[:3, 3]


def test_the_rim_of_the_brain_is_not_dimmed():
    """Two halves of intensity 1 and 3 have the z-scores -1 and 1, in voxels that the brain fills in part as well."""
    brain = ball()
    halves = np.where(np.arange(30)[:, None, None] < 15, 1.0, 3.0) * np.ones(brain.shape)
    patient = on_grid("A", scan_of(brain, halves, np.eye(4)), Grid(spacing_mm=2.0))
    inside = patient.image[0].float()[patient.image[0] != 0]
    assert len(inside) > 400 and (inside < 0).any() and (inside > 0).any()
    assert bool(((inside.abs() > 0.99) & (inside.abs() < 1.01)).all())


@pytest.mark.parametrize("spacing", [None, 4.0, 1.0])
def test_an_oblique_scan_keeps_its_place_and_its_size_in_mm(spacing):
    """Voxels of 1.5 x 2 x 3 mm, axes turned against those of the scanner: a tumour stays where it was, in mm."""
    brain, tumour = ball(radius=(12, 15, 9)), ball(center=(18, 25, 10), radius=(5, 6, 4))
    image = np.random.default_rng(1).uniform(1, 2, brain.shape)
    patient = on_grid("A", scan_of(brain, image, OBLIQUE, 2 * tumour), Grid(spacing_mm=spacing))
    assert np.linalg.norm(OBLIQUE[:3, :3], axis=0) == pytest.approx([1.5, 2, 3])
    assert patient.spacing_mm == pytest.approx([1.5, 2, 3] if spacing is None else [spacing] * 3)
    here = center_mm(patient.label.numpy() > 0, patient.affine)
    assert np.linalg.norm(here - center_mm(tumour, OBLIQUE)) < 0.3
    volume = int((patient.label > 0).sum()) * np.prod(patient.spacing_mm)
    assert volume == pytest.approx(tumour.sum() * 9.0, rel=0.1)
    middle = center_mm(patient.image[0].numpy() != 0, patient.affine)
    assert np.linalg.norm(middle - center_mm(brain, OBLIQUE)) < 0.6


@pytest.mark.parametrize(("voxels", "kept"), [(4, 1), (3, 0), (5, 1), (8, 1)])
def test_a_label_is_kept_where_it_fills_half_a_voxel(voxels, kept):
    """The brain begins at voxels 5, 10 and 2, so that blocks of 2 x 2 x 2 begin at odd, even and even places."""
    brain, label = ball(), np.zeros((30, 44, 26))
    label[11:13, 18:20, 10:12] = 2 * (np.arange(8) < voxels).reshape(2, 2, 2)
    patient = on_grid("A", scan_of(brain, brain + 0.5 * ball(radius=(5, 5, 5)), np.eye(4), label), Grid(spacing_mm=2.0))
    assert int((patient.label == 2).sum()) == int((patient.label > 0).sum()) == kept


def test_the_brain_lies_in_the_middle_of_a_given_shape():
    brain = ball(radius=(8, 11, 6))
    patient = on_grid("A", scan_of(brain, brain + 0.5 * ball(), np.eye(4)), Grid(shape=(33, 40, 32)))
    filled = np.argwhere(patient.image[0].numpy() != 0)
    # brain of 16 x 22 x 12 voxels: margins of 8 and 9, 9 and 9, 10 and 10
    assert filled.min(axis=0).tolist() == [8, 9, 10]
    assert filled.max(axis=0).tolist() == [23, 30, 21]


def test_the_voxel_size_of_an_oblique_patient_is_that_of_its_columns():
    patient = Patient("A", torch.zeros(4, 8, 8, 8), None, OBLIQUE)
    assert patient.spacing_mm == pytest.approx((1.5, 2.0, 3.0))


# Files


def stored(path, *, order="<"):
    """Whole numbers with a slope of 0.5 and an intercept of -3, in either order of bytes, on oblique axes."""
    whole = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4)
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(np.dtype(np.int16).newbyteorder(order))
    image = nib.Nifti1Image(whole, None, header)
    image.header.set_slope_inter(0.5, -3)
    image.set_sform(OBLIQUE, code=2)
    image.set_qform(OBLIQUE, code=1)
    nib.save(image, path)
    return whole * 0.5 - 3


@pytest.mark.parametrize("order", ["<", ">"])
def test_scaled_numbers_of_any_byte_order_are_read_with_the_voxel_size_of_oblique_axes(order, tmp_path):
    values = stored(tmp_path / "a.nii.gz", order=order)
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_allclose(volume.array, values, rtol=0, atol=1e-6)
    np.testing.assert_allclose(volume.affine, OBLIQUE, atol=1e-5)
    assert volume.spacing_mm == pytest.approx((1.5, 2, 3), abs=1e-5) and volume.codes == (2, 1)


def test_a_label_map_is_written_with_the_orientation_codes_of_its_scan(tmp_path):
    stored(tmp_path / "a.nii.gz")
    label = np.zeros((6, 5, 4), dtype=np.uint8)
    label[1, 2, 3] = 4
    write_label(tmp_path / "seg.nii", label, like=read_volume(tmp_path / "a.nii.gz"))
    found = nib.load(tmp_path / "seg.nii")
    assert (int(found.header["sform_code"]), int(found.header["qform_code"])) == (2, 1)
    np.testing.assert_allclose(found.affine, OBLIQUE, atol=1e-5)
    assert np.argwhere(np.asarray(found.dataobj) == 4).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(("equal", "found"), [(10, False), (11, True)])
def test_brightest_voxels_are_counted_against_those_of_the_brain(equal, found, tmp_path):
    """Of 21,952 voxels that are not 0, 11 are five in ten thousand, and 10 are less; of all 64,000 both are less."""
    rng = np.random.default_rng(2)
    for name in MODALITIES:
        values = rng.permutation(28**3).astype(np.float32) + 100
        values = np.minimum(values, np.sort(values)[-equal]).reshape(28, 28, 28)
        nib.save(nib.Nifti1Image(np.pad(values, 6), OBLIQUE), tmp_path / f"{name}.nii")
    files = PatientFiles(id="A", images={name: tmp_path / f"{name}.nii" for name in MODALITIES}, label=None,
                         layout="table", columns={})
    codes = [finding.code for finding in examine(files).findings]
    assert codes == ["saturated"] * 4 * found
