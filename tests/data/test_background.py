"""Background that is not exactly 0, after resampling or smoothing: the brain is found; clean scans are left alone."""

from __future__ import annotations

import hashlib

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from fedlab.core.errors import DataError
from fedlab.data.brain import bounding_box, find_brain, normalise, typical_signal
from fedlab.data.phantom.generator import write_brats
from fedlab.data.readers.folders import find_patients, read_cohort, read_patient
from fedlab.data.readers.inspection import inspect_folder
from fedlab.data.readers.scan import read_scan
from folders import Raw, ball, load_raw, save_files, write_layout

MOVE = (0.33, 0.2, -0.4)  # voxels


MOVED: dict[str, np.ndarray] = {}  # several changes begin with it, and it takes a second


def spline(array):
    """A shift by a part of a voxel and back with cubic splines, as in registration: it rings everywhere."""
    key = hashlib.sha256(np.ascontiguousarray(array)).hexdigest()
    if key not in MOVED:
        moved = ndimage.shift(ndimage.shift(array, MOVE, order=3), [-step for step in MOVE], order=3)
        MOVED[key] = moved.astype(np.float32)
    return MOVED[key].copy()


def cleared(array):
    out = spline(array)
    for axis in range(3):
        np.moveaxis(out, axis, 0)[[0, -1]] = 0
    return out


def rounding(array):
    """Remainders of a pipeline around the head, 0 farther out."""
    around = ndimage.gaussian_filter((array > 0).astype(np.float32), 4) > 0.05
    return np.where((array == 0) & around, np.float32(1e-5 * array[array > 0].mean()), array)


def noise(array):
    level = 0.004 * array[array > 0].mean()
    faint = np.abs(np.random.default_rng(0).normal(0, level, array.shape)).astype(np.float32)
    return np.where(array == 0, faint, array)


CHANGES = {
    "spline": spline, "spline, faces cleared": cleared, "remainders around the head": rounding, "noise": noise,
    "overshoot clipped": lambda array: np.maximum(cleared(array), 0),
    "int16": lambda array: np.rint(cleared(array)).astype(np.int16),
    "int16, overshoot clipped": lambda array: np.rint(np.maximum(cleared(array), 0)).astype(np.int16),
}


def changed(raw, change):
    return raw._replace(images={name: change(array.astype(np.float32)) for name, array in raw.images.items()})


def tumour(patient):
    """The mean of each modality in the tumour, in standard deviations of the brain."""
    return patient.image.float()[:, patient.label > 0].mean(dim=1)


def test_a_weak_background_is_0_before_scans_are_resampled(tmp_path):
    """Resampling would mix what is left of it into the voxels at the rim of the brain."""
    raw = ball("P1", shape=(60, 68, 52))
    save_files(changed(raw, noise), tmp_path / raw.id, suffix=".nii")
    files = find_patients(tmp_path)[raw.id]
    scan, findings = read_scan(files, "brats2021")
    assert "background" in [finding.code for finding in findings]
    stored = next(np.asarray(nib.load(path).dataobj) for path in files.images.values())
    assert np.count_nonzero(stored) > 0.9 * stored.size  # the background is there in the file
    assert not scan.image[:, ~scan.brain].any() and scan.image[:, scan.brain].all(dim=0).float().mean() > 0.99


def assert_same_tumour(tmp_path, raw, other, spacing_mm):
    """The tumour has the same z-scores in a scan and in the same scan with another background."""
    save_files(raw, tmp_path / "clean" / raw.id, suffix=".nii")
    save_files(other, tmp_path / "changed" / raw.id, suffix=".nii")
    clean = read_patient(find_patients(tmp_path / "clean")[raw.id], spacing_mm=spacing_mm)
    with pytest.warns(UserWarning, match=r"weak in every modality.* are read as 0 \[background\]"):
        found = read_cohort(tmp_path / "changed", spacing_mm=spacing_mm, progress=False)
    assert (tumour(found[0]) - tumour(clean)).abs().max() < 0.1
    sizes = [int((patient.image != 0).any(0).sum()) for patient in (found[0], clean)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    case, = inspect_folder(tmp_path / "changed", progress=False).cases
    assert case.usable and "background" in [f.code for f in case.findings]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    base = tmp_path_factory.mktemp("phantom")
    write_brats(base / "scans", sites=1, patients=2, shape=(96, 112, 96), spacing_mm=2.0, workers=0, progress=False)
    home = next(path for path in sorted((base / "scans").iterdir()) if path.is_dir())
    return load_raw(base / "scans", home.name)


def cut_out(raw):
    """A patient with 12 voxels around the brain."""
    box = bounding_box(np.any(list(raw.images.values()), axis=0))
    box = tuple(slice(max(0, side.start - 12), side.stop + 12) for side in box)
    return Raw(raw.id, {name: array[box] for name, array in raw.images.items()}, raw.label[box], raw.affine)


@pytest.mark.parametrize("change", CHANGES)
def test_the_brain_is_found_in_a_generated_patient_at_2_mm(tmp_path, phantom, change):
    assert_same_tumour(tmp_path, phantom, changed(phantom, CHANGES[change]), 2.0)


@pytest.mark.parametrize("change", ["spline", "int16", "noise"])
@pytest.mark.parametrize("patient", ["BraTS2021_00006", "BraTS2021_01481"])
def test_the_brain_is_found_in_real_scans_at_2_mm(tmp_path, real_scans, patient, change):
    raw = cut_out(load_raw(real_scans / "brats2021_2mm", patient))
    assert_same_tumour(tmp_path, raw, changed(raw, CHANGES[change]), 2.0)


def test_the_brain_is_found_in_a_real_scan_at_1_mm(tmp_path, real_scans):
    whole = load_raw(real_scans / "brats2021_1mm", "BraTS2021_01479")
    middle = int(np.count_nonzero(whole.label, axis=(0, 1)).argmax())
    slab = np.zeros(whole.label.shape[2], dtype=np.int16)
    slab[middle - 12:middle + 12] = 1  # a part of the brain, for speed
    raw = cut_out(whole._replace(images={name: array * slab for name, array in whole.images.items()},
                                 label=whole.label * slab.astype(np.uint8)))
    moved = changed(raw, cleared)
    assert_same_tumour(tmp_path / "float", raw, moved, 1.0)
    assert_same_tumour(tmp_path / "int16", raw, changed(moved, lambda array: np.rint(array).astype(np.int16)), 1.0)


def test_clean_scans_and_rims_of_partial_volume_are_left_alone(real_scans, phantom):
    raws = [phantom, *(load_raw(real_scans / "brats2021_2mm", path.name)
                       for path in sorted((real_scans / "brats2021_2mm").glob("BraTS*")))]
    for raw in raws:
        images = list(raw.images.values())
        assert find_brain(images) is None
        coarse = [np.asarray([[array[i::4, j::4] for j in range(4)] for i in range(4)], dtype=np.float32).mean((0, 1))
                  for array in (array[:array.shape[0] // 4 * 4, :array.shape[1] // 4 * 4] for array in images)]
        assert find_brain(coarse) is None


def test_a_clean_scan_is_read_to_the_bit_as_before(tmp_path):
    write_layout(tmp_path, "brats2021", [ball("P1")])
    patient = read_cohort(tmp_path, progress=False)[0]
    image = torch.from_numpy(np.stack([array[::-1, ::-1] for array in ball("P1").images.values()]).astype(np.float32))
    brain = (image != 0).any(0)
    want = normalise(image, brain).half()[:, brain]
    assert torch.equal(patient.image[:, (patient.image != 0).any(0)], want)


def test_levels_by_hand():
    image = np.zeros((20, 20, 20))
    image[5:15, 5:15, 5:15] = 200
    image[5:15, 5:15, 5] = 400
    assert typical_signal(image) == 200 and typical_signal(image.astype(np.int16) * -1) == 200
    assert typical_signal(np.zeros((4, 4, 4))) == 0
    assert find_brain([image] * 4) is None and find_brain([np.zeros((9, 9, 9))]) is None
    ringing = image + 1
    np.testing.assert_array_equal(find_brain([ringing] * 4), image > 0)


@pytest.mark.parametrize("offset", [7, 40])
def test_a_background_as_high_as_tissue_is_still_refused(tmp_path, offset):
    raw = ball("P1")
    save_files(raw._replace(images={**raw.images, "T1": raw.images["T1"] + np.int16(offset)}), tmp_path / "P1")
    assert nib.load(tmp_path / "P1" / "P1_t1.nii.gz").get_fdata().min() == offset
    with pytest.raises(DataError, match=r"skull-stripped scans with background 0 \[background\]"):
        read_cohort(tmp_path, progress=False)
