"""Inspection of a folder: every defect is found, all at once, and stops nothing; sound scans are measured correctly."""

from __future__ import annotations

import gzip
import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest

from fedlab.apps.cli import main
from fedlab.core.errors import DataError, RunError
from fedlab.data.readers.findings import CODES, Finding
from fedlab.data.readers.folders import find_patients, read_cohort
from fedlab.data.readers.inspection import inspect_folder
from fedlab.view.inspection_page import write_page
from folders import LPS, ball, poke_header, rewrite, save, save_files, write_layout, write_paths

KEYS = ["patient", "layout", "label_convention", "shape", "spacing_mm", "orientation", "modalities", "volumes_ml",
        "findings"]
BIG = (32, 34, 30)


def inspect(folder, **options):
    return inspect_folder(folder, progress=False, **options)


def change(path, edit):
    rewrite(path, lambda array, affine: (edit(array), affine))


def bright(array, share):
    """The brightest voxels all get the same value."""
    inside = np.sort(array[array > 0])
    return np.minimum(array, inside[int(len(inside) * (1 - share))])


def with_value(array, value, fraction=1.0):
    out = array.astype(np.float32)
    where = np.argwhere(out > 0)
    out[tuple(where[: max(1, int(fraction * len(where)))].T)] = value
    return out


def small_and_huge(path):
    """A 1 kB file whose header claims 50 GB."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_sform(LPS, code=1)
    header["dim"] = [3, 2350, 2350, 2350, 1, 1, 1, 1]
    header["magic"], header["vox_offset"] = b"n+1", 352
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4 + 60_000)))
    assert path.stat().st_size < 1024


def other_grid(path):
    image = nib.load(path)
    data = np.asanyarray(image.dataobj)[::2, ::2, ::2].copy()
    path.unlink()
    save(data, image.affine @ np.diag([2, 2, 2, 1]), path)


def loop(path):
    path.unlink()
    path.symlink_to(path.name)


def break_checksum(path):
    data = bytearray(path.read_bytes())
    data[-7] ^= 0xFF
    path.write_bytes(data)


def stray_background(array):
    rng = np.random.default_rng(0)
    return np.where(array == 0, rng.integers(1, 30, array.shape), array).astype(array.dtype)


def blank_all(home):
    for path in home.iterdir():
        change(path, lambda a: a * 0)


def fluid(array, factor):
    """A twentieth of the brain, on one side, is as bright as this factor of the rest."""
    inside = np.argwhere(array > 0)
    out = array.copy()
    where = tuple(inside[: len(inside) // 20].T)
    out[where] = (factor * array[array > 0].mean() + array[where] / 100).astype(array.dtype)
    return out


def proportional(path, other):
    """The scan of another modality, twice as bright and of another type."""
    change(path, lambda array: np.asanyarray(nib.load(other).dataobj).astype(np.float32) * 2)


def in_unit(path, unit):
    image = nib.load(path)
    data = np.asanyarray(image.dataobj).copy()
    path.unlink()
    stated = nib.Nifti1Image(data, image.affine)
    stated.header.set_xyzt_units(unit)
    nib.save(stated, path)


def halve(home):
    for path in home.iterdir():
        change(path, lambda array: array[:, :, 13:].copy())


#: Each defect with its code, its severity, and a function that creates it in the folder of the patient "bad one é".
DEFECTS = {
    "missing modality": ("missing-modality", "error", lambda home, f: f("t1ce").unlink()),
    "missing label": ("no-label", "warning", lambda home, f: f("seg").unlink()),
    "different grids": ("grids-differ", "error", lambda home, f: other_grid(f("t2"))),
    "shifted grid": ("grids-differ", "error", lambda home, f: rewrite(f("t2"), lambda a, m: (
        a, m + np.outer([5, 0, 0, 0], [0, 0, 0, 1])))),
    "label on another grid": ("grids-differ", "error", lambda home, f: other_grid(f("seg"))),
    "truncated": ("truncated", "error", lambda home, f: f("t1").write_bytes(f("t1").read_bytes()[:9000])),
    "checksum": ("corrupt", "error", lambda home, f: break_checksum(f("t1"))),
    "garbled": ("corrupt", "error", lambda home, f: f("t1").write_bytes(gzip.compress(b"")[:10] + b"\x07" * 5000)),
    "empty file": ("not-nifti", "error", lambda home, f: f("flair").write_bytes(b"")),
    "text": ("not-nifti", "error", lambda home, f: f("seg").write_text("hello " * 100)),
    "wrong header": ("wrong-header", "error", lambda home, f: poke_header(
        f("t1"), pixdim=[0] * 8, srow_x=[0, 0, 0, 0])),
    "wrong data type": ("wrong-header", "error", lambda home, f: poke_header(f("t1"), datatype=1792)),
    "no orientation": ("wrong-header", "error", lambda home, f: poke_header(f("t1"), sform_code=0, qform_code=0)),
    "NaN": ("not-finite", "error", lambda home, f: change(f("t2"), lambda a: with_value(a, np.nan, 0.01))),
    "Inf": ("not-finite", "error", lambda home, f: change(f("t2"), lambda a: with_value(a, -np.inf, 0.01))),
    "one blank modality": ("blank", "error", lambda home, f: change(f("t2"), lambda a: a * 0)),
    "empty brain": ("empty-brain", "error", lambda home, f: blank_all(home)),
    "label values": ("label-values", "error", lambda home, f: change(f("seg"), lambda a: np.where(a == 1, 9, a)
                                                                     .astype(np.uint8))),
    "fractions for labels": ("label-values", "error", lambda home, f: change(f("seg"), lambda a: a * np.float32(0.9))),
    "no enhancing tumour": ("no-enhancing", "warning", lambda home, f: change(f("seg"), lambda a: np.where(a == 4, 1, a)
                                                                              .astype(np.uint8))),
    "no tumour": ("no-tumour", "warning", lambda home, f: change(f("seg"), lambda a: a * 0)),
    "saturated": ("saturated", "warning", lambda home, f: change(f("t1ce"), lambda a: bright(a, 0.003))),
    "offset background": ("background", "error", lambda home, f: change(f("t1"), lambda a: a + np.int16(40))),
    "noisy background": ("background", "error", lambda home, f: change(f("flair"), stray_background)),
    "skull left on": ("background", "warning", lambda home, f: change(f("t2"), lambda a: np.pad(
        np.maximum(a[2:-2, 2:-2, 2:-2], 30), 2).astype(np.int16))),
    "cut off": ("cut-off", "warning", lambda home, f: change(f("t2"), lambda a: a * (np.arange(a.shape[2]) > 12))),
    "another patient's id": ("foreign-file", "error", lambda home, f: f("t1").rename(home / "good 1_t1.nii.gz")),
    "another patient's file": ("foreign-file", "error", lambda home, f: shutil.copy(
        home.parent / "good 1" / "good 1_t1.nii.gz", home)),
    "unknown name": ("unknown-file", "warning", lambda home, f: shutil.copy(f("seg"), home / "W39_Segm.nii.gz")),
    "label map under another name": ("label-name", "warning", lambda home, f: f("seg").rename(
        home / "W39_1998.09.19_Segm.nii.gz")),
    "two of a kind": ("two-files", "error", lambda home, f: shutil.copy(f("t1"), home / "bad one é_t1.nii")),
    "a circle of links": ("no-file", "error", lambda home, f: loop(f("t1"))),
    "a link back": ("no-file", "warning", lambda home, f: (home / "again").symlink_to("..")),
    "a link to nowhere": ("no-file", "error", lambda home, f: (f("t1").unlink(), f("t1").symlink_to("none"))),
    "50 GB in 1 kB": ("oversized", "error", lambda home, f: small_and_huge(f("t1"))),
    "label outside the brain": ("label-outside", "warning", lambda home, f: change(f("seg"), lambda a: np.pad(
        a[1:-1, 1:-1, 1:-1], 1, constant_values=2))),
    "metres for mm": ("wrong-header", "error", lambda home, f: in_unit(f("t1"), "meter")),
    "microns for mm": ("wrong-header", "error", lambda home, f: in_unit(f("t1"), "micron")),
    "one scan under two names": ("same-scan", "error", lambda home, f: (f("t1ce").unlink(), shutil.copy(
        f("t1"), f("t1ce")))),
    "one scan twice as bright": ("same-scan", "error", lambda home, f: proportional(f("t1ce"), f("t1"))),
    "label map as a scan": ("few-values", "error", lambda home, f: (f("t1ce").unlink(), shutil.copy(
        f("seg"), f("t1ce")))),
    "T1 and T2 swapped": ("swapped", "warning", lambda home, f: (change(f("t1"), lambda a: fluid(a, 4)),
                                                               change(f("t2"), lambda a: fluid(a, 0.1)))),
    "a spike": ("spike", "warning", lambda home, f: change(f("t2"), lambda a: with_value(a, 1e6, 0))),
    "lost slices": ("cut-off", "warning", lambda home, f: [change(
        path, lambda a: a * (np.arange(a.shape[1])[:, None] != 17)) for path in home.iterdir()]),
    "a lost slice of one scan": ("cut-off", "warning", lambda home, f: change(
        f("t2"), lambda a: a * (np.arange(a.shape[2]) != 4))),
    "most of the brain labelled": ("label-large", "warning", lambda home, f: change(f("seg"), lambda a: np.where(
        np.asanyarray(nib.load(f("t1")).dataobj) > 0, np.maximum(a, 1), a))),
    "cut off at a face": ("cut-off", "warning", lambda home, f: halve(home)),
    **{f"label map mirrored along axis {axis}": ("label-mirrored", "warning", lambda home, f, axis=axis: change(
        f("seg"), lambda a: np.flip(a, axis).copy())) for axis in range(3)},
    "another format": ("missing-modality", "error", lambda home, f: f("t1").rename(home / "bad one é_t1.mha")),
    "label map in another format": ("no-label", "warning", lambda home, f: f("seg").rename(
        home / "bad one é_seg.nrrd")),
    "forms disagree": ("affines-differ", "warning", lambda home, f: poke_header(
        f("t1"), qform_code=1, qoffset_x=77, pixdim=[1, 1, 1, 1, 1, 1, 1, 1])),
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A sound patient and the one to be damaged, with a space and an accent in its name."""
    folder = tmp_path_factory.mktemp("with space é") / "scans"
    for i, name in enumerate(("bad one é", "good 1")):
        save_files(ball(name, seed=i, shape=BIG), folder / name)
    return folder


def test_sound_folders_with_unusual_names_have_no_findings(clean):
    found = inspect(clean)
    assert [case.patient for case in found.cases] == ["bad one é", "good 1"]
    assert found.findings == () and found.broken == ()


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_kind_of_defect_is_a_finding_of_its_patient_and_stops_nothing(tmp_path, clean, defect):
    code, severity, damage = DEFECTS[defect]
    folder = tmp_path / "scans"
    shutil.copytree(clean, folder)
    home = folder / "bad one é"
    damage(home, lambda kind: home / f"bad one é_{kind}.nii.gz")
    found = inspect(folder)
    bad, *good = found.cases
    assert bad.patient == "bad one é" and (severity, code) in {(f.severity, f.code) for f in bad.findings}, bad.findings
    assert bad.usable == (severity == "warning") and bad.as_json()["patient"] == "bad one é"
    assert all(len(f.message) > 10 for f in bad.findings)
    assert [(case.patient, case.usable, case.findings) for case in good] == [("good 1", True, ())]
    assert good[0].volumes_ml["WT"] > 0 and good[0].label_convention == "brats2021"
    write_page(tmp_path / "page.html", found)
    if severity == "error":
        with pytest.raises(DataError, match=rf"\[{code}\]"):
            read_cohort(folder, progress=False)
        with pytest.warns(UserWarning, match="continuing without 1 patient:"):
            assert read_cohort(folder, progress=False, broken="skip").ids == ("good 1",)
    elif code == "no-label":
        assert read_cohort(folder, progress=False).ids == ("bad one é", "good 1")
    else:
        with pytest.warns(UserWarning, match=rf"\[{code}\]"):
            assert read_cohort(folder, progress=False).ids == ("bad one é", "good 1")


@pytest.mark.parametrize(("names", "is_read"), [
    (["W39_1998.09.19_Segm"], True), (["expert-segmentation"], True), (["W39_Segm", "W40_Segm"], False),
    (["pred_segm"], False), (["brain_segm"], False), (["automated_approx_segm"], False), (["notes"], False)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_label_map_of_another_name_is_read_if_nothing_else_can_be_meant(tmp_path, clean, names, is_read):
    folder = tmp_path / "scans"
    shutil.copytree(clean, folder)
    home = folder / "bad one é"
    want = inspect(folder).cases[0].volumes_ml
    for name in names:
        shutil.copy(home / "bad one é_seg.nii.gz", home / f"{name}.nii.gz")
    (home / "bad one é_seg.nii.gz").unlink()
    bad, _ = inspect(folder).cases
    assert bad.volumes_ml == (want if is_read else {"TC": None, "WT": None, "ET": None}) and bad.usable
    codes = [finding.code for finding in bad.findings]
    assert codes.count("label-name") == is_read and codes.count("unknown-file") == (0 if is_read else len(names))
    assert (read_cohort(folder, progress=False)[0].label is not None) == is_read
    (home / "bad one é_t2.nii.gz").unlink()  # of an incomplete patient nothing is guessed
    assert "label-name" not in {finding.code for finding in inspect(folder).cases[0].findings}


def test_everything_wrong_is_listed_at_once(tmp_path, clean):
    folder = tmp_path / "scans"
    shutil.copytree(clean, folder)
    save_files(ball("good 2"), folder / "good 2")
    change(folder / "bad one é" / "bad one é_t1.nii.gz", lambda a: with_value(a, np.nan))
    small_and_huge(folder / "bad one é" / "bad one é_t2.nii.gz")
    change(folder / "good 2" / "good 2_seg.nii.gz", lambda a: (a > 0) * np.uint8(7))
    (folder / "good 3").mkdir()
    (folder / "good 4").symlink_to("good 4")
    (folder / "notes").mkdir()
    found = inspect(folder)
    codes = {case.patient: {f.code for f in case.findings} for case in found.cases}
    assert codes == {"bad one é": {"not-finite", "oversized"}, "good 1": set(), "good 2": {"label-values"},
                     "good 3": {"missing-modality"}, "good 4": {"no-file"}}
    with pytest.raises(DataError) as caught:
        read_cohort(folder, progress=False)
    assert "problems with 4 of 5 patients" in str(caught.value)
    assert len(found.broken) == 4


def test_damaged_patients_have_null_where_nothing_is_known(tmp_path, clean):
    folder = tmp_path / "scans"
    shutil.copytree(clean, folder)
    save_files(ball("good 2"), folder / "good 2")
    for path in (folder / "good 2").iterdir():
        path.write_bytes(b"nothing")
    (folder / "good 1" / "good 1_seg.nii.gz").write_bytes(b"nothing")
    entries = {entry["patient"]: entry for entry in inspect(folder).as_json()}
    lost = entries["good 2"]
    assert lost["shape"] is lost["spacing_mm"] is lost["orientation"] is lost["label_convention"] is None
    assert lost["volumes_ml"] == {"TC": None, "WT": None, "ET": None} and len(lost["findings"]) == 5
    half = entries["good 1"]
    assert half["shape"] == list(BIG) and half["label_convention"] is None and half["volumes_ml"]["ET"] is None


def test_an_ambiguous_convention_is_an_error_of_every_labelled_patient(tmp_path):
    write_paths(tmp_path, [ball("P1"), ball("P2", seed=1)], convention="brats2023")
    found = inspect(tmp_path)
    assert found.convention.name is None
    for case in found.cases:
        assert case.volumes_ml == {"TC": None, "WT": None, "ET": None} and case.label_convention is None
        assert [f.code for f in case.findings] == ["label-convention"]
        assert "--label-convention" in case.findings[0].message
    stated = inspect(tmp_path, label_convention="brats2023")
    assert stated.findings == () and stated.cases[0].volumes_ml["ET"] > 0


def test_volumes_shape_spacing_and_orientation_by_hand(tmp_path):
    label = np.zeros((20, 20, 20), np.uint8)
    label[5:10, 5:10, 5:10] = 2       # 125 voxels of oedema,
    label[6:9, 6:9, 6:9] = 1          # 27 of them core,
    label[7, 7, 7:9] = 4              # 2 of these enhancing
    affine = np.array([[0, -2.0, 0, 9], [-1.5, 0, 0, 3], [0, 0, 4.0, 1], [0, 0, 0, 1]])
    images = {name: np.zeros(label.shape, np.int16) for name in ("FLAIR", "T1", "T1c", "T2")}
    for seed, image in enumerate(images.values()):
        image[2:-2, 2:-2, 2:-2] = np.random.default_rng(seed).integers(50, 900, (16, 16, 16))
    raw = ball("P1")._replace(images=images, label=label, affine=affine)
    write_layout(tmp_path, "brats2021", [raw])
    (entry,) = inspect(tmp_path).as_json()
    voxel_ml = 1.5 * 2 * 4 / 1000
    assert entry == {"patient": "P1", "layout": "brats2021", "label_convention": "brats2021", "shape": [20, 20, 20],
                     "spacing_mm": [1.5, 2.0, 4.0], "orientation": "PLS",
                     "modalities": ["FLAIR", "T1", "T1c", "T2"], "findings": [],
                     "volumes_ml": {"TC": pytest.approx(27 * voxel_ml), "WT": pytest.approx(125 * voxel_ml),
                                    "ET": pytest.approx(2 * voxel_ml)}}


@pytest.mark.parametrize("layout", ["brats2018", "brats2023", "fets", "msd", "table"])
def test_the_same_volumes_in_every_layout(tmp_path, layout):
    raws = [ball("P1"), ball("P2", seed=1)]
    entries = inspect(write_layout(tmp_path, layout, raws)).as_json()
    sizes = {"TC": (1, 4), "WT": (1, 2, 4), "ET": (4,)}
    for raw, entry in zip(raws, entries, strict=True):
        assert entry["layout"] == layout and entry["orientation"] == "LPS" and entry["findings"] == []
        assert entry["volumes_ml"] == {name: pytest.approx(np.isin(raw.label, values).sum() / 1000)
                                       for name, values in sizes.items()}


def test_the_slice_shows_the_most_tumour_with_the_patients_right_on_the_left(tmp_path):
    raw = ball("P1")  # its tumour lies right, anterior, superior
    write_layout(tmp_path, "brats2021", [raw])
    picture = inspect(tmp_path).cases[0].picture
    rows, columns = np.nonzero(picture.label)
    assert picture.grey.shape == (34, 30) and rows.mean() < 15 and columns.mean() < 13
    assert set(np.unique(picture.label)) == {0, 1, 2, 4} and picture.grey.max() == 255
    stored = np.count_nonzero(raw.label, axis=(0, 1)).max()
    assert np.count_nonzero(picture.label) == stored


def test_the_page_is_one_file_that_escapes_what_it_shows(tmp_path):
    name = "<script>alert(1)<"
    write_layout(tmp_path / "scans", "brats2021", [ball("P1")])
    table = write_paths(tmp_path / "t", [ball("P1")])
    text = (tmp_path / "t" / "paths.csv").read_text().replace("P1,", f"{name},")
    (tmp_path / "t" / "paths.csv").write_text(text)
    assert table is None
    for folder in ("scans", "t"):
        found = inspect(tmp_path / folder)
        page = write_page(tmp_path / f"{folder}.html", found).read_text(encoding="utf-8")
        assert page.count("data:image/png;base64,") == 1 and "<script" not in page and "http" not in page
        assert "<script" not in found._repr_html_() and "<script" not in read_cohort(tmp_path / folder)._repr_html_()
    assert "&lt;script&gt;alert(1)&lt;" in page
    with pytest.raises(RunError, match="not overwritten"):
        write_page(tmp_path / "t.html", found)


def test_control_characters_in_names_are_replaced(tmp_path):
    write_layout(tmp_path, "brats2021", [ball("P1")])
    (tmp_path / "P1" / "a\x1b[2J.nii.gz").write_bytes(b"")
    assert "\x1b" not in str(inspect(tmp_path))


def test_findings_have_known_codes():
    with pytest.raises(ValueError, match="a finding's code must be one of"):
        Finding(patient="P1", code="mine", message="")
    assert {code for code, _, _ in DEFECTS.values()} <= set(CODES)


# --- the command

def run(capsys, *arguments):
    status = main(["data", "inspect", *map(str, arguments)])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return status, said.out, said.err


def test_the_command_prints_a_table_and_writes_a_page(tmp_path, clean, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, clean)
    assert status == 0 and "layout: brats2021 (2 patient folders" in out and "bad one é" in out
    (page,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"inspect-\d{8}-\d{6}\.html", page.name) and f"runs/{page.name}" in out
    before = page.read_bytes()
    status, _, err = run(capsys, clean, "--html", page)
    assert status == 1 and "not overwritten" in err and page.read_bytes() == before
    assert run(capsys, clean, "--out", tmp_path / "new" / "mine.html")[0] == 0
    assert (tmp_path / "new" / "mine.html").is_file()


def test_the_command_prints_json_and_nothing_else(tmp_path, clean, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = run(capsys, clean, "--json")
    entries = json.loads(out)
    assert status == 0 and [list(entry) for entry in entries] == [KEYS] * 2 and not any(tmp_path.iterdir())
    assert all(list(entry["volumes_ml"]) == ["WT", "TC", "ET"] for entry in entries)
    shutil.copytree(clean, tmp_path / "scans")
    (tmp_path / "scans" / "good 1" / "good 1_t1.nii.gz").write_bytes(b"")
    status, out, err = run(capsys, tmp_path / "scans", "--json", "--html", tmp_path / "page.html")
    broken = json.loads(out)[1]
    assert status == 3 and "page:" in err and (tmp_path / "page.html").is_file()
    assert [list(f) for f in broken["findings"]] == [["severity", "code", "message"]]
    assert broken["findings"][0]["severity"] == "error" and broken["findings"][0]["code"] == "not-nifti"


def test_the_command_reports_errors(tmp_path, clean, capsys):
    for arguments, reason in [((tmp_path / "none",), "is not a folder"), ((tmp_path,), "contains no patient folder"),
                              ((clean, "--layout", "mine"), "layout must be one of"),
                              ((clean, "--label-convention", "mine"), "--label-convention must be one of")]:
        status, out, err = run(capsys, *arguments, "--json")
        assert status == 1 and out == "" and reason in err
    with pytest.raises(SystemExit) as end:
        main(["data", "inspect", "--help"])
    assert end.value.code == 0 and "Exit status: 0" in capsys.readouterr().out


# --- the real scans

def test_real_scans_against_nibabel(real_scans):
    meaning = {"brats2021_2mm": {"TC": (1, 4), "WT": (1, 2, 4), "ET": (4,)},
               "msd": {"TC": (2, 3), "WT": (1, 2, 3), "ET": (3,)}}
    for folder, regions in meaning.items():
        for case in inspect(real_scans / folder).cases:
            (path,) = [*(real_scans / folder).glob(f"{case.patient}/*_seg.nii.gz"),
                       *(real_scans / folder).glob(f"*/labelsTr/{case.patient}.nii.gz")]
            image = nib.load(path)
            values, ml = np.asanyarray(image.dataobj), np.prod(np.float64(image.header.get_zooms())) / 1000
            assert case.usable and case.shape == image.shape
            assert case.orientation == "".join(nib.aff2axcodes(image.affine))
            assert case.spacing_mm == pytest.approx(image.header.get_zooms())
            for name, inside in regions.items():
                assert case.volumes_ml[name] == pytest.approx(np.isin(values, inside).sum() * ml, rel=1e-6)
            expected = ["no-enhancing"] if case.patient == "BraTS2021_01484" else []
            assert [f.code for f in case.findings] == expected


def test_a_damaged_real_patient_in_the_decathlons_layout(tmp_path, real_scans):
    source = real_scans / "msd" / "Task01_BrainTumour"
    shutil.copytree(source, tmp_path / "data")
    path = tmp_path / "data" / "imagesTr" / "BRATS_001.nii.gz"
    path.write_bytes(path.read_bytes()[:100_000])
    (case,) = inspect(tmp_path / "data").cases
    assert [f.code for f in case.findings] == ["truncated"] and case.volumes_ml["WT"] == pytest.approx(113.68)
    with pytest.raises(DataError, match=r"\[truncated\]"):
        read_cohort(tmp_path / "data", progress=False)
    assert find_patients(source)
