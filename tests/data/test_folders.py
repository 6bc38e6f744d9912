import gzip
import shutil
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from fedlab.core.errors import DataError
from fedlab.core.regions import labels_to_regions
from fedlab.data.readers.folders import (
    CONVENTIONS,
    find_patients,
    read_label,
    read_patient,
    read_sites,
    save_prediction,
    to_native,
)
from fedlab.data.readers.nifti import axis_weights, from_ras, read_volume, resample, to_ras
from fedlab.data.sites.partition import split_patients
from fedlab.data.sites.site_table import read_site_table
from folders import LPS, brain_and_label, poke_header, rewrite, write_patient

REAL = Path(__file__).parents[2] / ".." / "shared" / "data" / "brats_real"
real = pytest.mark.skipif(not REAL.is_dir(), reason="the real scans are missing")


def dice(one, other):
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


# --- grids and orientation

@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SAL"])
def test_axes_turn_to_ras_and_back(codes):
    ornt = nib.orientations.axcodes2ornt(codes)
    affine = nib.orientations.inv_ornt_aff(nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), ornt), (3, 4, 5)) * 1.0
    stored = np.arange(60).reshape(3, 4, 5) if codes in ("RAS", "LPS") else np.arange(60).reshape(4, 5, 3)
    turned, straight = to_ras(stored, affine)
    assert nib.aff2axcodes(straight) == ("R", "A", "S")
    np.testing.assert_array_equal(from_ras(turned, affine), stored)
    index = np.array([1, 2, 1, 1])
    place = np.round(np.linalg.inv(straight) @ affine @ index).astype(int)
    assert turned[tuple(place[:3])] == stored[1, 2, 1]


def test_axis_weights_by_hand():
    torch.testing.assert_close(axis_weights(4, 2, scale=2.0, offset=0.0),
                               torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]))
    torch.testing.assert_close(axis_weights(3, 2, scale=1.5, offset=0.0),
                               torch.tensor([[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]))
    torch.testing.assert_close(axis_weights(2, 4, scale=0.5, offset=0.0),
                               torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]))
    torch.testing.assert_close(axis_weights(2, 4, scale=1.0, offset=-1.0),
                               torch.tensor([[0.0, 0], [1, 0], [0, 1], [0, 0]]))


def test_resample_is_the_block_mean():
    volume = torch.arange(2 * 4 * 6 * 2, dtype=torch.float32).view(2, 4, 6, 2)
    weights = [axis_weights(n, n // 2, scale=2.0, offset=0.0) for n in (4, 6, 2)]
    torch.testing.assert_close(resample(volume, weights), torch.nn.functional.avg_pool3d(volume, 2))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("affine", [LPS, np.diag([1.0, 1, 1, 1]),
                                    np.array([[0.0, 0, 1, -9], [-1, 0, 0, 7], [0, -1, 0, 3], [0, 0, 0, 1]])])
def test_native_spacing_round_trip_is_exact(tmp_path, affine, suffix):
    write_patient(tmp_path, affine=affine, suffix=suffix)
    files = find_patients(tmp_path)["P1"]
    patient = read_patient(files)
    assert patient.image.dtype == torch.float16 and patient.image.shape == (4, 32, 32, 32)
    assert nib.aff2axcodes(patient.affine) == ("R", "A", "S")
    label, spacing = read_label(files)
    assert spacing == (1.0, 1.0, 1.0)
    assert np.array_equal(to_native(patient.label, patient=patient, files=files), label)
    centre = (patient.label > 0).nonzero().double().mean(0)  # the tumour lies right, anterior and superior
    assert (centre > (patient.image != 0).any(0).nonzero().double().mean(0) + 2).all()


def test_world_coordinates_survive_resampling(tmp_path):
    turn = np.array([[0.98, -0.17, 0.0], [0.17, 0.98, 0.0], [0.0, 0.0, 1.0]])
    turn /= np.linalg.norm(turn, axis=0)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag([-1.0, -1.2, 1.5]), (40, -7, 3)
    write_patient(tmp_path, affine=affine, shape=(60, 60, 50))
    files = find_patients(tmp_path)["P1"]
    patient = read_patient(files, spacing_mm=2.0)
    assert patient.spacing_mm == pytest.approx((2, 2, 2))
    label, _ = read_label(files)

    def middle(mask, to_mm):
        return to_mm[:3, :3] @ mask.nonzero().double().mean(0).numpy() + to_mm[:3, 3]

    np.testing.assert_allclose(middle(patient.label > 0, patient.affine), middle(label > 0, affine), atol=0.3)
    back = torch.from_numpy(to_native(patient.label, patient=patient, files=files))
    assert dice(back > 0, label > 0) > 0.9


def test_images_are_z_scored_over_the_brain_and_dark_outside(tmp_path):
    write_patient(tmp_path, shape=(60, 60, 50))
    patient = read_patient(find_patients(tmp_path)["P1"], spacing_mm=2.0, dtype=torch.float32)
    brain = (patient.image != 0).any(0)
    assert patient.image[:, brain].mean(1).abs().max() < 1e-4
    assert (patient.image[:, brain].std(1) - 1).abs().max() < 1e-4
    expected = brain_and_label((60, 60, 50))[0].sum() / 8
    assert int(brain.sum()) == pytest.approx(expected, rel=0.03)
    healthy = patient.image[0][brain & (patient.label == 0)]
    assert healthy.min() > -3  # the empty background does not dim the rim


def test_probabilities_map_back_too_and_threshold_counts(tmp_path):
    write_patient(tmp_path)
    files = find_patients(tmp_path)["P1"]
    patient = read_patient(files, spacing_mm=2.0)
    sure = labels_to_regions(patient.label)
    half = to_native(sure * 0.8, patient=patient, files=files)
    strict = to_native(sure * 0.8, patient=patient, files=files, threshold=0.79)
    assert np.array_equal(to_native(sure * 0.8, patient=patient, files=files, threshold=0.4),
                          to_native(patient.label, patient=patient, files=files))
    assert 0 < (strict > 0).sum() < (half > 0).sum()


def test_the_shape_is_exact_and_the_brain_centred_and_never_cut(tmp_path):
    write_patient(tmp_path)
    files = find_patients(tmp_path)["P1"]
    patient = read_patient(files, shape=(40, 44, 48))
    assert patient.image.shape[1:] == (40, 44, 48) and patient.label.shape == (40, 44, 48)
    where = (patient.image != 0).any(0).nonzero().double()
    middle = (where.min(0).values + where.max(0).values) / 2
    assert (middle - torch.tensor([19.5, 21.5, 23.5])).abs().max() <= 1
    with pytest.raises(DataError, match=r"takes 2\dx2\dx2\d voxels and does not fit .* larger shape"):
        read_patient(files, shape=(16, 44, 48))
    with pytest.raises(ValueError, match=r"between 0\.1 and 20 mm, got 0"):
        read_patient(files, spacing_mm=0)


def test_wrong_predictions_are_refused(tmp_path):
    write_patient(tmp_path, "P1")
    write_patient(tmp_path, "P2")
    files = find_patients(tmp_path)
    patient = read_patient(files["P1"])
    with pytest.raises(ValueError, match=r"expected a prediction of shape \(32, 32, 32\)"):
        to_native(patient.label[1:], patient=patient, files=files["P1"])
    with pytest.raises(DataError, match="pass the files it was read from"):
        to_native(patient.label, patient=patient, files=files["P2"])


def test_predictions_are_written_on_the_scans_grid_and_never_over_a_file(tmp_path):
    write_patient(tmp_path / "data")
    files = find_patients(tmp_path / "data")["P1"]
    patient = read_patient(files, spacing_mm=2.0)
    label = to_native(patient.label, patient=patient, files=files)
    path = save_prediction(tmp_path / "out" / "P1.nii.gz", label, files=files)
    saved, scan = nib.load(path), nib.load(files.images["FLAIR"])
    assert saved.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(saved.affine, scan.affine)
    np.testing.assert_array_equal(saved.get_sform(), scan.get_sform())
    assert saved.header["sform_code"] == scan.header["sform_code"]
    np.testing.assert_array_equal(np.asanyarray(saved.dataobj), label)
    before = path.read_bytes()
    with pytest.raises(DataError, match="not overwritten"):
        save_prediction(path, label, files=files)
    assert path.read_bytes() == before
    with pytest.raises(DataError, match=r"ends in \.nii"):
        save_prediction(tmp_path / "p.mha", label, files=files)
    with pytest.raises(DataError, match="of shape"):
        save_prediction(tmp_path / "p.nii", label[1:], files=files)


# --- defects of a folder

def test_every_problem_of_every_patient_is_listed_at_once(tmp_path):
    write_patient(tmp_path, "good")
    (write_patient(tmp_path, "lacking") / "lacking_t1ce.nii.gz").unlink()
    home = write_patient(tmp_path, "mixed")
    shutil.copy(tmp_path / "good" / "good_t1.nii.gz", home)
    home = write_patient(tmp_path, "shifted")
    rewrite(home / "shifted_t2.nii.gz", lambda a, m: (a, m + np.outer([3, 0, 0, 0], [0, 0, 0, 1])))
    home = write_patient(tmp_path, "double")
    shutil.copy(home / "double_t1.nii.gz", home / "double_t1.nii")
    with pytest.raises(DataError) as caught:
        find_patients(tmp_path)
    text = str(caught.value)
    assert "problems with 4 of 5 patients" in text and "broken='skip'" in text
    for piece in ("lacking: no T1c: lacking_t1ce.nii.gz [missing-modality]", "another patient's id [foreign-file]",
                  "shifted: shifted_t2.nii.gz has another grid", "[grids-differ]", "[two-files]"):
        assert piece in text, piece
    with pytest.warns(UserWarning, match="continuing without 4 patients"):
        assert list(find_patients(tmp_path, broken="skip")) == ["good"]


def test_folders_without_patients(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        find_patients(tmp_path / "none")
    (tmp_path / "HGG" / "P1").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no patient folder; .* found HGG"):
        find_patients(tmp_path)
    write_patient(tmp_path, "only")
    (tmp_path / "only" / "only_t1.nii.gz").unlink()
    with pytest.raises(DataError, match="no usable patient"):
        find_patients(tmp_path, broken="skip")
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        find_patients(tmp_path, broken="ignore")


def test_circular_links_and_unusual_names(tmp_path):
    home = write_patient(tmp_path, "Žofie 1 é")
    (home / "notes.nii.gz").write_bytes(b"not a scan")
    with pytest.warns(UserWarning, match=r"notes\.nii\.gz is ignored"):
        files = find_patients(tmp_path)["Žofie 1 é"]
    assert read_patient(files).id == "Žofie 1 é"
    (home / "notes.nii.gz").unlink()
    path = home / "Žofie 1 é_t1.nii.gz"
    path.unlink()
    path.symlink_to(path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match="broken or circular link"):
        find_patients(tmp_path)


def flip_bits(path):
    data = bytearray(path.read_bytes())
    data[-6] ^= 0xFF  # in the stored checksum: every voxel is decompressed without an error
    path.write_bytes(data)


DAMAGE = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:2000]), "cannot be read|truncated"),
    "checksum": (flip_bits, "CRC"),
    "empty": (lambda p: p.write_bytes(b""), "not a NIfTI file"),
    "text": (lambda p: p.write_bytes(b"hello " * 200), "not a NIfTI file: it starts with the bytes 68 65 6c 6c"),
    "nan": (lambda p: rewrite(p, lambda a, m: (np.where(a == a.max(), np.nan, a).astype(np.float32), m)), "NaN or Inf"),
    "inf": (lambda p: rewrite(p, lambda a, m: (np.where(a == a.max(), 1e300, a), m)), "NaN or Inf"),
    "blank": (lambda p: rewrite(p, lambda a, m: (a * 0, m)), "is blank: every voxel is 0"),
    "4-D": (lambda p: rewrite(p, lambda a, m: (np.stack([a, a], -1), m)), "expected one 3-D volume"),
    "complex": (lambda p: rewrite(p, lambda a, m: (a.astype(np.complex64), m)), "not grey values"),
    "lost orientation": (lambda p: poke_header(p, sform_code=0, qform_code=0), "left and right would be a guess"),
    "metres": (lambda p: rewrite(p, lambda a, m: (a, m * 1e-3)), "expected 0.05 to 30 mm"),
    "affine": (lambda p: poke_header(p, srow_x=[np.nan, 0, 0, 0]), "NaN or Inf"),
    "skewed": (lambda p: poke_header(p, srow_x=[-1, 0.8, 0, 0]), "not perpendicular"),
    "pair": (lambda p: poke_header(p, magic=b"ni1"), "in one NIfTI file"),
    "offset": (lambda p: poke_header(p, vox_offset=4e9), "voxels at byte"),
    "huge": (lambda p: poke_header(p, dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]), "at most 67,108,864"),
    "50 GB": (lambda p: poke_header(p, dim=[3, 400, 400, 400, 1, 1, 1, 1], datatype=64, bitpix=64), "can hold"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_scans_are_refused_with_a_reason(tmp_path, kind):
    path = write_patient(tmp_path) / "P1_t1.nii.gz"
    files = find_patients(tmp_path)["P1"]
    damage, reason = DAMAGE[kind]
    damage(path)
    with pytest.raises(DataError, match=reason) as caught:
        read_patient(files)
    assert "P1_t1.nii.gz" in str(caught.value)


def test_an_uncompressed_file_is_checked_against_its_size(tmp_path):
    home = write_patient(tmp_path, suffix=".nii")
    path = home / "P1_t1.nii"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"more than this file of .* can hold"):
        find_patients(tmp_path)


def test_compression_is_detected_from_the_bytes(tmp_path):
    home = write_patient(tmp_path)
    for path in home.iterdir():
        path.write_bytes(gzip.decompress(path.read_bytes()))  # the name still ends in .gz
    assert read_patient(find_patients(tmp_path)["P1"]).image.shape == (4, 32, 32, 32)


@pytest.mark.parametrize(("unit", "scale"), [("meter", 1e-3), ("micron", 1e3), ("unknown", 1), ("mm", 1)])
def test_affines_in_other_units_are_read_in_mm(tmp_path, unit, scale):
    write_patient(tmp_path / "plain", affine=np.diag([-1.0, -1.2, 1.5, 1]))
    home = write_patient(tmp_path / "data", affine=np.diag([-1.0, -1.2, 1.5, 1]))
    for path in home.iterdir():
        image = nib.load(path)
        data, affine = np.asanyarray(image.dataobj).copy(), np.diag([scale, scale, scale, 1]) @ image.affine
        path.unlink()
        stated = nib.Nifti1Image(data, affine)
        stated.set_qform(affine, code=1)  # both forms are in the unit, and agree
        stated.header.set_xyzt_units(unit)
        nib.save(stated, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = find_patients(tmp_path / "data")["P1"]
        patient = read_patient(files)
    want = read_patient(find_patients(tmp_path / "plain")["P1"])
    assert torch.equal(patient.image, want.image) and torch.equal(patient.label, want.label)
    np.testing.assert_allclose(patient.affine, want.affine, rtol=1e-5, atol=1e-4)
    path = save_prediction(tmp_path / "out.nii.gz", to_native(patient.label, patient=patient, files=files), files=files)
    written = nib.load(path)
    assert written.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(written.header.get_zooms(), [1, 1.2, 1.5], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-9, 1e-4, 1e12, 1e30])
def test_scans_of_any_brightness_are_z_scored(tmp_path, scale):
    want = read_patient(find_patients(write_patient(tmp_path / "plain").parent)["P1"])
    home = write_patient(tmp_path / "data")
    for kind in ("flair", "t1", "t1ce", "t2"):
        rewrite(home / f"P1_{kind}.nii.gz", lambda a, m: ((a * scale).astype(np.float32), m))
    patient = read_patient(find_patients(tmp_path / "data")["P1"])
    torch.testing.assert_close(patient.image, want.image, rtol=0, atol=2e-3)


def test_negative_values_are_read_and_not_called_cut_off(tmp_path):
    home = write_patient(tmp_path)
    rewrite(home / "P1_t1.nii.gz", lambda a, m: (np.where(a > 0, a - 3000, 0).astype(np.int16), m))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patient = read_patient(find_patients(tmp_path)["P1"])
    assert (patient.image[1] != 0).sum() > 8000


def test_background_that_is_not_zero_is_refused(tmp_path):
    home = write_patient(tmp_path)
    rewrite(home / "P1_t1.nii.gz", lambda a, m: (a + 7, m))
    with pytest.raises(DataError, match="skull-stripped"):
        read_patient(find_patients(tmp_path)["P1"])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_scaled_and_typed_voxels(tmp_path, dtype):
    home = write_patient(tmp_path)
    want = read_volume(home / "P1_t2.nii.gz").array.astype(np.float32)
    image = nib.load(home / "P1_t2.nii.gz")
    scaled = nib.Nifti1Image(np.asanyarray(image.dataobj) / 16, image.affine)
    scaled.set_data_dtype(dtype)
    nib.save(scaled, tmp_path / "x.nii.gz")
    got = np.asarray(read_volume(tmp_path / "x.nii.gz").array, dtype=np.float32)
    np.testing.assert_allclose(got, nib.load(tmp_path / "x.nii.gz").get_fdata(), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(got, want / 16, atol=0.5)


# --- labels

def test_label_conventions_are_stated_never_guessed(tmp_path):
    home = write_patient(tmp_path)
    label = read_patient(find_patients(tmp_path)["P1"]).label
    rewrite(home / "P1_seg.nii.gz", lambda a, m: (np.where(a == 4, 3, a).astype(np.uint8), m))
    with pytest.raises(DataError, match=r"hold other values: 0, 1, 2, 3\. .* label_convention='brats2023' or "):
        find_patients(tmp_path)
    files = find_patients(tmp_path, label_convention="brats2023")["P1"]
    assert torch.equal(read_patient(files).label, label)
    with pytest.raises(DataError, match=r"holds the values 3; .* label_convention='brats2023'"):
        read_patient(files, label_convention="brats2021")
    rewrite(home / "P1_seg.nii.gz", lambda a, m: (np.where(a == 3, 2.5, a).astype(np.float32), m))
    with pytest.raises(DataError, match=r"holds the values 2\.5; .* none of the conventions .* has these values"):
        read_patient(files, label_convention="brats2023")
    with pytest.raises(ValueError, match=r"label_convention must be one of 'brats2021', 'brats2023', .*, got 'mine'"):
        read_label(files, label_convention="mine")
    assert set(CONVENTIONS["brats2021"]) == {0, 1, 2, 4}


def test_float_labels_no_label_and_stray_labels(tmp_path):
    home = write_patient(tmp_path)
    rewrite(home / "P1_seg.nii.gz", lambda a, m: (a.astype(np.float32), m))
    files = find_patients(tmp_path)["P1"]
    assert set(read_patient(files).label.unique().tolist()) == {0, 1, 2, 4}

    def stray(a, m):
        a[0, 0, 0] = 2
        return a, m

    rewrite(home / "P1_seg.nii.gz", stray)
    with pytest.warns(UserWarning, match="1 labelled voxels lie where every modality is 0, 0.1% of all"):
        read_patient(files)
    (home / "P1_seg.nii.gz").unlink()
    files = find_patients(tmp_path)["P1"]
    assert files.label is None and read_patient(files).label is None
    with pytest.raises(DataError, match=r"expected P1_seg\.nii\.gz"):
        read_label(files)


# --- sites

def test_partitioning_tables(tmp_path):
    table = tmp_path / "p.csv"
    table.write_text("\ufeffPartition_ID,Subject_ID\n10,c\n2,a\n2, b\nnorth,d\n", encoding="utf-8")
    assert read_site_table(table).sites == {"2": ["a", "b"], "10": ["c"], "north": ["d"]}
    assert list(read_site_table(table).sites) == ["2", "10", "north"]
    table.write_text("hospital,case\nx,a\n")
    assert read_site_table(table, site_column="hospital", patient_column="case").sites == {"x": ["a"]}
    with pytest.raises(DataError, match="no column Partition_ID and Subject_ID; it has hospital, case"):
        read_site_table(table)
    table.write_text("Partition_ID,Subject_ID\n1,a\n2,a\n1,\n1,b\n1,b\n")
    with pytest.raises(DataError) as caught:
        read_site_table(table)
    for piece in ("line 3: a is at site 2, and on line 2 at site 1", "line 4: Subject_ID is empty", "line 6: b"):
        assert piece in str(caught.value)
    table.write_text("Partition_ID,Subject_ID\n")
    with pytest.raises(DataError, match="no row below its header"):
        read_site_table(table)
    table.write_bytes(b"\xff\xfe\x00Partition")
    with pytest.raises(DataError, match="CSV table in UTF-8"):
        read_site_table(table)
    with pytest.raises(DataError, match=r"there is no table .*none\.csv"):
        read_site_table(tmp_path / "none.csv")


@pytest.mark.parametrize(("patients", "held_out", "expected"),
                         [(1, 0.2, 0), (2, 0.2, 1), (5, 0.2, 1), (10, 0.2, 2), (10, 3, 3), (3, 5, 2), (4, 0, 0)])
def test_split_sizes(patients, held_out, expected):
    train, val = split_patients(list(range(patients)), held_out=held_out, seed=0, site="s")
    assert len(val) == expected and sorted(train + val) == list(range(patients))


def test_split_depends_on_seed_and_site_alone():
    def val(seed, site):
        return split_patients(list(range(40)), held_out=10, seed=seed, site=site)[1]

    assert val(0, "a") == val(0, "a")
    assert val(0, "a") != val(1, "a") and val(0, "a") != val(0, "b")
    with pytest.raises(ValueError, match=r"got 1\.5"):
        split_patients([1, 2], held_out=1.5, seed=0, site="a")


def make_sites(tmp_path):
    for i, shape in enumerate([(30, 34, 26), (30, 50, 26), (30, 34, 26), (30, 34, 26)]):
        write_patient(tmp_path / "data", f"P{i}", shape=shape, seed=i)
    table = tmp_path / "sites.csv"
    table.write_text("Partition_ID,Subject_ID\nb,P2\na,P0\na,P1\n")
    return tmp_path / "data", table


def test_read_sites(tmp_path):
    folder, table = make_sites(tmp_path)
    with pytest.warns(UserWarning, match=r"P3: has scans but no row in sites\.csv"):
        sites = read_sites(folder, table, spacing_mm=1.0, progress=False)
    assert [(s.name, len(s.train), len(s.val)) for s in sites] == [("a", 1, 1), ("b", 1, 0)]
    patients = {p.id: p for s in sites for p in (*s.train, *s.val)}
    assert {tuple(p.image.shape) for p in patients.values()} == {(4, 32, 48, 32)}
    files = find_patients(folder)["P0"]
    back = to_native(patients["P0"].label, patient=patients["P0"], files=files)
    assert np.array_equal(back, read_label(files)[0])  # padding to the common grid also changed the affine


def test_read_sites_lists_problems_of_table_folder_and_voxels_together(tmp_path):
    folder, table = make_sites(tmp_path)
    table.write_text("Partition_ID,Subject_ID\na,P0\na,P1\nb,P2\nb,P9\nc,P3\n")
    rewrite(folder / "P1" / "P1_t1.nii.gz", lambda a, m: (a * 0, m))
    (folder / "P2" / "P2_seg.nii.gz").unlink()
    with pytest.raises(DataError) as caught:
        read_sites(folder, table, spacing_mm=2.0, progress=False)
    for piece in ("3 of 5 patients", "P9: is in sites.csv but has no scans", "P1_t1.nii.gz is blank",
                  "P2: has no label map to learn from"):
        assert piece in str(caught.value), piece
    with pytest.warns(UserWarning, match="continuing without 3 patients"):
        sites = read_sites(folder, table, spacing_mm=2.0, broken="skip", progress=False)
    assert [(s.name, [p.id for p in s.train]) for s in sites] == [("a", ["P0"]), ("c", ["P3"])]
    with pytest.raises(DataError, match="too-large"):
        read_sites(folder, table, spacing_mm=2.0, shape=(8, 8, 8), progress=False)


# --- the real scans

@real
@pytest.mark.parametrize("folder", ["brats2021_2mm", "brats2021_1mm"])
def test_real_scans_round_trip(folder):
    for files in find_patients(REAL / folder).values():
        label, spacing = read_label(files)
        exact = read_patient(files, spacing_mm=spacing[0])
        assert np.array_equal(to_native(exact.label, patient=exact, files=files), label)
        coarse = read_patient(files, spacing_mm=3.0)
        assert nib.aff2axcodes(coarse.affine) == ("R", "A", "S")
        assert nib.aff2axcodes(nib.load(files.images["T1"]).affine) == ("L", "P", "S")
        back = torch.from_numpy(to_native(coarse.label, patient=coarse, files=files))
        for was, now, grid in zip(labels_to_regions(label)[:2].bool(), labels_to_regions(back)[:2].bool(),
                                  labels_to_regions(coarse.label)[:2], strict=True):
            assert dice(was, now) > 0.9
            assert float(grid.sum()) * 27 == pytest.approx(float(was.sum()) * np.prod(spacing), rel=0.03)


@real
def test_real_sites():
    sites = read_sites(REAL / "brats2021_2mm", REAL / "brats2021_2mm" / "partitioning.csv", progress=False)
    assert [(s.name, len(s.train), len(s.val)) for s in sites] == [("1", 1, 1), ("2", 1, 1), ("3", 1, 0)]
    for patient in (p for s in sites for p in s.train):
        assert patient.image.shape == (4, 48, 64, 64) and patient.image.isfinite().all()
