"""Surfaces and exported labels, read back by nibabel, by SimpleITK and by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

import fedlab as fl
from cohorts import blob_patient

OBLIQUE = np.array([[2.0, 0.0, 0.0, -30.0], [0.0, 1.5, 0.0, 12.0], [0.0, 0.0, 3.0, 5.0], [0.0, 0.0, 0.0, 1.0]])


@pytest.fixture
def patient() -> fl.Patient:
    """A block of oedema around a core, off the centre, with anisotropic voxels."""
    return replace(blob_patient("p", seed=3, shape=(20, 18, 16)), affine=OBLIQUE)


def read_stl(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Corners (F, 3, 3) and normals of a binary STL file, by the published layout."""
    data = path.read_bytes()
    count = int.from_bytes(data[80:84], "little")
    assert len(data) == 84 + 50 * count
    rows = np.frombuffer(data[84:], dtype=[("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("unused", "<u2")])
    return rows["corners"].astype(float), rows["normal"].astype(float)


def signed_ml(corners: np.ndarray) -> float:
    """Positive only if every face is counter-clockwise seen from outside."""
    return float(np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum()) / 6000


@pytest.mark.parametrize("part, label", [("WT", (1, 2, 4)), ("TC", (1, 4)), ("ET", (4,)), ("NCR", (1,)), ("ED", (2,))])
def test_encloses_the_labels_where_they_lie(patient: fl.Patient, part: str, label: tuple[int, ...]) -> None:
    mesh = fl.view.surface(patient, part=part)  # type: ignore[arg-type]
    inside = np.isin(patient.label.numpy(), label)
    places = nib.affines.apply_affine(patient.affine, np.argwhere(inside))
    half = np.array(patient.spacing_mm) / 2
    low, high = np.array(mesh.bounds_mm)
    assert np.allclose(low, places.min(axis=0) - half, atol=1e-3)
    assert np.allclose(high, places.max(axis=0) + half, atol=1e-3)
    exact = inside.sum() * np.prod(patient.spacing_mm) / 1000
    assert 0.75 * exact < mesh.volume_ml < exact, "marching cubes cut off the corners of voxels only"


def test_closed_and_turned_outwards(patient: fl.Patient) -> None:
    mesh = fl.view.surface(patient)
    edges = np.sort(np.concatenate([mesh.faces[:, pair] for pair in ((0, 1), (1, 2), (2, 0))]), axis=1)
    assert (np.unique(edges, axis=0, return_counts=True)[1] == 2).all(), "every edge belongs to two triangles"
    assert signed_ml(mesh.vertices[mesh.faces].astype(float)) == pytest.approx(mesh.volume_ml)


def test_smoothing_takes_the_steps_off(patient: fl.Patient) -> None:
    rough, smooth = fl.view.surface(patient), fl.view.surface(patient, smooth_mm=3.0)
    assert smooth.volume_ml < rough.volume_ml
    assert len(np.unique(smooth.vertices[:, 2])) > 3 * len(np.unique(rough.vertices[:, 2]))


def test_brain(patient: fl.Patient) -> None:
    image = torch.zeros(4, 20, 18, 16)
    image[:, 4:16, 4:14, 4:12] = 1.0
    mesh = fl.view.surface(replace(patient, image=image, label=None), part="brain")
    low, high = np.array(mesh.bounds_mm)
    assert np.allclose(high - low, np.array([12, 10, 8]) * patient.spacing_mm)


def test_touching_the_edge_of_the_scan_it_is_still_closed(patient: fl.Patient) -> None:
    label = torch.full((20, 18, 16), 2, dtype=torch.uint8)
    mesh = fl.view.surface(patient, label)
    assert mesh.volume_ml == pytest.approx(20 * 18 * 16 * 9 / 1000, rel=0.05)


def test_stl_in_mm_ras(patient: fl.Patient, tmp_path: Path) -> None:
    mesh = fl.view.surface(patient)
    path = mesh.save(tmp_path / "new" / "tumour.stl")
    corners, normals = read_stl(path)
    assert np.array_equal(corners, mesh.vertices[mesh.faces].astype(float))
    assert signed_ml(corners) == pytest.approx(mesh.volume_ml)
    across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert np.allclose(normals, across / np.linalg.norm(across, axis=1, keepdims=True), atol=1e-5)
    assert b"SPACE=RAS" in path.read_bytes()[:80], "3D Slicer would read it as LPS"
    assert not path.read_bytes().startswith(b"solid"), "readers take a file with this start for text"


def test_ply_in_mm_ras(patient: fl.Patient, tmp_path: Path) -> None:
    mesh = fl.view.surface(patient)
    data = mesh.save(tmp_path / "tumour.ply").read_bytes()
    head, _, body = data.partition(b"end_header\n")
    lines = head.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    assert "comment SPACE=RAS" in lines and f"element vertex {len(mesh.vertices)}" in lines
    size = 12 * len(mesh.vertices)
    assert np.array_equal(np.frombuffer(body[:size], "<f4").reshape(-1, 3), mesh.vertices)
    faces = np.frombuffer(body[size:], dtype=[("count", "u1"), ("corners", "<i4", 3)])
    assert (faces["count"] == 3).all() and np.array_equal(faces["corners"], mesh.faces)


def test_refuses_what_has_no_surface(patient: fl.Patient, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no ET in the labels"):
        fl.view.surface(patient, torch.full((20, 18, 16), 2, dtype=torch.uint8), part="ET")
    with pytest.raises(ValueError, match="has no label map"):
        fl.view.surface(replace(patient, label=None))
    with pytest.raises(ValueError, match="part is one of"):
        fl.view.surface(patient, part="tumour")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="smooth_mm is at least 0"):
        fl.view.surface(patient, smooth_mm=-1.0)
    with pytest.raises(ValueError, match="leaves nothing"):
        fl.view.surface(patient, part="ET", smooth_mm=15.0)
    mesh = fl.view.surface(patient)
    with pytest.raises(fl.core.DataError, match=r"\.stl or \.ply"):
        mesh.save(tmp_path / "tumour.obj")
    kept = mesh.save(tmp_path / "tumour.stl").read_bytes()
    with pytest.raises(fl.core.DataError, match="not overwritten"):
        fl.view.surface(patient, part="ET").save(tmp_path / "tumour.stl")
    assert (tmp_path / "tumour.stl").read_bytes() == kept


def test_labels_lie_where_the_scan_does(patient: fl.Patient, tmp_path: Path) -> None:
    """Read by nibabel in RAS, and by SimpleITK in LPS, as 3D Slicer and ITK-SNAP do."""
    guess = torch.roll(patient.label, 2, 0)
    path = fl.view.export_labels(tmp_path / "pred.nii.gz", patient, fl.core.labels_to_regions(guess) * 0.9)
    seen = nib.load(path)
    assert np.array_equal(seen.affine, patient.affine) and seen.get_data_dtype() == np.uint8
    assert np.array_equal(np.asarray(seen.dataobj), guess.numpy())
    other = sitk.ReadImage(str(path))
    assert other.GetPixelID() == sitk.sitkUInt8 and other.GetSpacing() == pytest.approx(patient.spacing_mm)
    assert np.array_equal(sitk.GetArrayFromImage(other).T, guess.numpy())
    for voxel in ((0, 0, 0), (5, 7, 9), (19, 17, 15)):
        x, y, z = nib.affines.apply_affine(patient.affine, voxel)
        assert other.TransformIndexToPhysicalPoint(voxel) == pytest.approx((-x, -y, z))


def test_own_labels_and_no_overwriting(patient: fl.Patient, tmp_path: Path) -> None:
    path = fl.view.export_labels(tmp_path / "own.nii", patient)
    assert np.array_equal(np.asarray(nib.load(path).dataobj), patient.label.numpy())
    with pytest.raises(fl.core.DataError, match="not overwritten"):
        fl.view.export_labels(path, patient, torch.zeros_like(patient.label))
    with pytest.raises(fl.core.DataError, match=r"\.nii or \.nii\.gz"):
        fl.view.export_labels(tmp_path / "own.img", patient)
    with pytest.raises(ValueError, match="has no label map"):
        fl.view.export_labels(tmp_path / "none.nii", replace(patient, label=None))


def test_real_scan(real_scans: Path, tmp_path: Path) -> None:
    """The exported labels of a real patient against the expert's own file, resampled by SimpleITK."""
    found = fl.read_cohort(real_scans / "brats2021_2mm", spacing_mm=2.0, progress=False)
    patient = found[0]
    path = fl.view.export_labels(tmp_path / "own.nii.gz", patient)
    ours = sitk.ReadImage(str(path))
    theirs = sitk.ReadImage(str(found.files[patient.id].label))
    moved = sitk.Resample(ours, theirs, sitk.Transform(), sitk.sitkNearestNeighbor)
    a, b = (sitk.GetArrayFromImage(image) > 0 for image in (moved, theirs))
    assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.95
