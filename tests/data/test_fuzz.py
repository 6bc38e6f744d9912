"""Damaged input of every kind: only fedlab's own errors, no hang, bounded memory. 1240 cases, the same on every run."""

from __future__ import annotations

import bz2
import gzip
import json
import shutil
import signal
import struct
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fedlab.core.errors import DataError
from fedlab.data.readers.findings import CODES
from fedlab.data.readers.folders import read_cohort, read_sites
from fedlab.data.readers.inspection import inspect_folder
from fedlab.data.readers.layouts import list_patients
from fedlab.data.readers.nifti import read_volume
from fedlab.data.readers.tables import merge_columns, read_table
from fedlab.data.sites.partition import by_institution
from fedlab.data.sites.site_table import read_site_table
from folders import (
    LPS,
    OLD,
    UPENN,
    ball,
    poke_header,
    save,
    save_files,
    write_msd,
    write_named,
    write_nnunet,
    write_paths,
    write_table,
)

SHAPE = (12, 14, 10)
SECONDS = 5  # of processor time; a case takes milliseconds
MEMORY = 2**30
seen = {"cases": 0}


def fuzz(cases):
    """The same cases on every run; hypothesis' own deadline would fail on a busy machine."""
    return settings(max_examples=cases, deadline=None, derandomize=True, database=None,
                    phases=[Phase.generate, Phase.shrink],
                    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture,
                                           HealthCheck.data_too_large])


@contextmanager
def guarded():
    """Stops a case that hangs; permits only fedlab's own errors and ignores warnings."""
    def late(*_):
        raise TimeoutError("timed out")

    before = {number: signal.signal(number, late) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(60 * SECONDS)  # a case that waits forever takes no processor time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DataError as error:
        assert len(str(error)) > 10 and error.code in CODES
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_bytes():
    """Largest memory of this process since the peak was last reset; None if the system does not provide it."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="module", autouse=True)
def memory():
    """All tests of this file together add less than 1 GB to the memory at their start."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        pass
    before = peak_bytes()
    yield
    if before is not None:
        assert peak_bytes() - before < MEMORY


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """BraTS folders, a Decathlon and a table of paths, each of one tiny patient."""
    folder = tmp_path_factory.mktemp("fuzz")
    save_files(ball("P1", shape=SHAPE), folder / "packed" / "P1")
    save_files(ball("P1", shape=SHAPE), folder / "plain" / "P1", suffix=".nii")
    write_msd(folder / "msd", [ball("BRATS_001", shape=SHAPE)])
    write_paths(folder / "table", [ball("P1", shape=SHAPE)])
    write_nnunet(folder / "nnunet", [ball("P1", shape=SHAPE)])
    write_named(folder / "named", [ball(name, shape=SHAPE) for name in ("P1", "P2")], UPENN, labels="images_segm")
    for name in ("P1", "P2"):
        save_files(ball(name, shape=SHAPE), folder / "apart" / name)
    (folder / "together").mkdir()
    for path in folder.glob("apart/*/*"):
        path.rename(folder / "together" / path.name)
    return folder


@contextmanager
def copy_of(folder):
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(folder, Path(scratch) / "x")
        yield Path(scratch) / "x"


#: Critical numbers, in addition to random ones.
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 4, 5, 7, 127, 128, 255, 256, 352, 32767, -32768, 65535, 2**31 - 1, -2**31,
                           float("nan"), float("inf"), -float("inf"), 1e30, 1e-30]) | st.floats(width=32) \
    | st.integers(-2**31, 2**31 - 1)
FIELDS = ("sizeof_hdr", "dim", "datatype", "bitpix", "pixdim", "vox_offset", "scl_slope", "scl_inter", "qform_code",
          "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "srow_x", "srow_y", "srow_z", "magic",
          "xyzt_units")


def set_field(raw, name, place, value):
    """Sets a header field to a value, truncated to its type."""
    dtype = nib.Nifti1Header.template_dtype[name]
    offset = nib.Nifti1Header.template_dtype.fields[name][1]
    unit = dtype.base
    spot = offset + place % (dtype.itemsize // unit.itemsize) * unit.itemsize
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cell = np.array([float(value)]).astype(unit) if unit.kind in "fiu" else np.frombuffer(
            struct.pack("<d", float(value))[: unit.itemsize], dtype=unit)
    raw[spot:spot + unit.itemsize] = cell.tobytes()


def look_at(folder, spoilt):
    """Everything that reads a folder."""
    seen["cases"] += 1
    with guarded():
        found = inspect_folder(folder, progress=False)
        assert found.cases and json.dumps(found.as_json(), allow_nan=False)
        if spoilt is None:
            assert str(found) and found._repr_html_()
    with guarded():
        list(read_cohort(folder, progress=False, broken="skip", examine=False))
    if spoilt is not None:
        with guarded():
            read_volume(spoilt, series=True)


@fuzz(110)
@given(kind=st.sampled_from([*OLD.values()]), how=st.sampled_from(["packed", "plain"]),
       places=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=20),
       early=st.booleans())
def test_bytes_flipped_in_a_file_as_it_is_stored(base, kind, how, places, early):
    with copy_of(base / how) as folder:
        path = next((folder / "P1").glob(f"*_{kind}.nii*"))
        raw = bytearray(path.read_bytes())
        for place, flip in places:
            raw[place % min(400 if early else len(raw), len(raw))] ^= flip
        path.write_bytes(raw)
        look_at(folder, path)


@fuzz(130)
@given(kind=st.sampled_from([*OLD.values()]),
       changes=st.lists(st.tuples(st.sampled_from(FIELDS), st.integers(0, 7), NUMBERS), min_size=1, max_size=4))
def test_header_fields_changed_under_a_sound_checksum(base, kind, changes):
    with copy_of(base / "packed") as folder:
        path = folder / "P1" / f"P1_{kind}.nii.gz"
        raw = bytearray(gzip.decompress(path.read_bytes()))
        for name, place, value in changes:
            set_field(raw, name, place, value)
        path.write_bytes(gzip.compress(bytes(raw)))
        look_at(folder, path)


@fuzz(50)
@given(cut=st.integers(0, 6000), tail=st.binary(max_size=40), name=st.sampled_from(["P1_t1.nii", "P1_seg.nii"]))
def test_files_cut_and_continued(base, cut, tail, name):
    with copy_of(base / "plain") as folder:
        path = folder / "P1" / name
        path.write_bytes(path.read_bytes()[:cut] + tail)
        look_at(folder, path)


@fuzz(50)
@given(changes=st.lists(st.tuples(st.sampled_from(FIELDS), st.integers(0, 7), NUMBERS), min_size=1, max_size=3),
       label=st.booleans())
def test_headers_of_4_d_files(base, changes, label):
    with copy_of(base / "msd") as folder:
        path = folder / ("labelsTr" if label else "imagesTr") / "BRATS_001.nii.gz"
        raw = bytearray(gzip.decompress(path.read_bytes()))
        for name, place, value in changes:
            set_field(raw, name, place, value)
        path.write_bytes(gzip.compress(bytes(raw)))
        look_at(folder, path)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
                    max_leaves=8)


@fuzz(60)
@given(key=st.sampled_from(["modality", "labels", "training", "test", "name"]), value=JSON,
       flips=st.lists(st.tuples(st.integers(0, 10**4), st.integers(1, 255)), max_size=3))
def test_dataset_json(base, key, value, flips):
    with copy_of(base / "msd") as folder:
        path = folder / "dataset.json"
        raw = bytearray(json.dumps({**json.loads(path.read_text()), key: value}).encode())
        for place, flip in flips:
            raw[place % len(raw)] ^= flip
        path.write_bytes(raw)
        look_at(folder, None)


CELLS = st.text(max_size=12) | st.sampled_from(["P1", "../P1", "/", ".", "a\0b", "x" * 5000, '"', "1e999", "\ud800",
                                                "scans/t1 of 0.nii.gz", "~", "\r\n", "\ufeff"])


@fuzz(80)
@given(heading=st.lists(CELLS | st.sampled_from(["patient", "flair", "t1", "t1c", "t2", "label"]), max_size=8),
       rows=st.lists(st.lists(CELLS, max_size=8), max_size=4), keep=st.booleans(),
       flips=st.lists(st.tuples(st.integers(0, 10**4), st.integers(1, 255)), max_size=4))
def test_tables_of_paths(base, heading, rows, keep, flips):
    path = base / "table" / "fuzzed.txt"
    lines = (base / "table" / "paths.csv").read_text(encoding="utf-8").splitlines() if keep else [",".join(heading)]
    raw = bytearray("\n".join([*lines, *(",".join(row) for row in rows)]).encode("utf-8", "surrogatepass"))
    for place, flip in flips:
        if raw:
            raw[place % len(raw)] ^= flip
    path = path.with_suffix(".CSV")
    path.write_bytes(raw)
    look_at(path, None)
    path.unlink()


@fuzz(80)
@given(text=st.text(max_size=60) | st.binary(max_size=60), rows=st.lists(st.tuples(CELLS, CELLS), max_size=5),
       flips=st.lists(st.tuples(st.integers(0, 10**4), st.integers(1, 255)), max_size=4))
def test_institution_tables_and_name_mappings(base, text, rows, flips):
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "name_mapping.csv"
        head = b"Partition_ID,Subject_ID\n1,P1\n2,P0\n"
        raw = bytearray(head + "\n".join(",".join(row) for row in rows).encode("utf-8", "surrogatepass")
                        + (text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")))
        for place, flip in flips:
            raw[place % len(raw)] ^= flip
        path.write_bytes(raw)
        seen["cases"] += 1
        with guarded():
            read_site_table(path)
        with guarded():
            merge_columns([path], ["P0", "P1"])


HEADS = st.lists(st.sampled_from(["Partition_ID", "Subject_ID", "PARTITION_ID", "subject id", "person", "Person", "",
                                  "a;b", '"x"', '"', "\t", "BraTS-GLI-00001-100"]) | CELLS, min_size=1, max_size=5)


@fuzz(300)
@given(heading=HEADS, separator=st.sampled_from([",", ";", "\t", ";,", "|"]),
       ending=st.sampled_from(["\n", "\r\n", "\r"]),
       rows=st.lists(st.lists(CELLS | st.sampled_from(["1", "2", "BraTS-GLI-00001-100", "BraTS-GLI-00001-101"]),
                              max_size=5), max_size=5),
       encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]),
       known=st.booleans(), cut=st.integers(0, 3), flips=st.lists(st.tuples(st.integers(0, 10**4), st.integers(1, 255)),
                                                                  max_size=2))
def test_separators_encodings_and_headings(heading, separator, ending, rows, encoding, known, cut, flips):
    """Any table is read, or refused with a reason."""
    lines = [["Partition_ID", "Subject_ID", "person"] if known else heading, *rows]
    raw = bytearray(ending.join(separator.join(row) for row in lines).encode(encoding, "surrogatepass"))
    for place, flip in flips:
        if raw:
            raw[place % len(raw)] ^= flip
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "table.csv"
        path.write_bytes(raw[:len(raw) - cut])
        seen["cases"] += 1
        with guarded():
            columns, read = read_table(path)
            assert columns and all(set(row) == set(columns) for _, row in read)
        with guarded():
            sites, _ = read_site_table(path)
            assert sites and by_institution(path, held_out=0.5).patients
        with guarded():
            list_patients(path)


@fuzz(110)
@given(values=st.lists(NUMBERS, min_size=1, max_size=6), dtype=st.sampled_from([np.uint8, np.int16, np.float32,
                                                                                 np.float64]),
       name=st.sampled_from(["P1", "BraTS-PED-00001-000", "BraTS-GLI-00001-101", "BraTS-MEN-RT-0001-1"]))
def test_label_values(base, values, dtype, name):
    with copy_of(base / "packed") as folder:
        for path in (folder / "P1").iterdir():
            path.rename(path.with_name(path.name.replace("P1", name)))
        home = (folder / "P1").rename(folder / name)
        label = np.zeros(SHAPE, dtype=dtype)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            label[4:4 + len(values), 5:9, 3:7] = np.array(values, dtype=float).astype(dtype)[:, None, None]
        (home / f"{name}_seg.nii.gz").unlink()
        save(label, LPS, home / f"{name}_seg.nii.gz")
        look_at(folder, home / f"{name}_seg.nii.gz")


@fuzz(70)
@given(kind=st.sampled_from([*OLD.values()]), axes=st.permutations(range(3)),
       scales=st.tuples(*[st.sampled_from([1, 1, 1, -1, -1, 0, 0.5, 2, 1e-4, 60, 1e30, np.nan, np.inf])] * 3),
       shear=st.sampled_from([0, 0, 0, 0.01, 0.3, 1, float("nan")]),
       origin=st.sampled_from([0, 0, 0.04, 5, -1e9, float("inf")]))
def test_affines(base, kind, axes, scales, shear, origin):
    with copy_of(base / "packed") as folder:
        path = folder / "P1" / f"P1_{kind}.nii.gz"
        affine = np.zeros((3, 4), dtype=np.float32)
        affine[list(axes), range(3)] = np.array(scales) * np.diag(LPS)[list(axes)]
        affine[axes[0], 1], affine[0, 3] = shear, origin
        poke_header(path, **dict(zip(("srow_x", "srow_y", "srow_z"), affine, strict=True)))
        look_at(folder, path)


def as_bytes(array):
    return nib.Nifti1Image(array, LPS).to_bytes()


def voxels(data):
    return np.asanyarray(nib.Nifti1Image.from_bytes(data).dataobj)


#: Ways to write the bytes of a NIfTI file, with a number that varies them.
CONTAINERS = {
    "empty": lambda n, d: b"", "packed nothing": lambda n, d: gzip.compress(b""),
    "packed twice": lambda n, d: gzip.compress(gzip.compress(d)), "bzip2": lambda n, d: bz2.compress(d),
    "cut": lambda n, d: gzip.compress(d)[:n], "cut plain": lambda n, d: d[:n],
    "two members": lambda n, d: gzip.compress(d[:n]) + gzip.compress(d[n:]),
    "a second file": lambda n, d: gzip.compress(d) * 2, "zip": lambda n, d: b"PK\x03\x04" + d,
    "rubbish behind": lambda n, d: gzip.compress(d) + bytes([n % 256]) * 50,
    "magic alone": lambda n, d: b"\x1f\x8b" + bytes([n % 256]) * 30,
    "4-D": lambda n, d: as_bytes(np.stack([voxels(d)] * (1 + n % 3), -1)),
    "5-D": lambda n, d: as_bytes(voxels(d)[..., None, None].repeat(1 + n % 2, -1)),
    "2-D": lambda n, d: as_bytes(voxels(d)[..., 0]), "NIfTI-2": lambda n, d: nib.Nifti2Image(voxels(d), LPS).to_bytes(),
    "RGB": lambda n, d: as_bytes(np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])),
    **{name: lambda n, d, name=name: as_bytes(voxels(d).astype(name))
       for name in ("uint8", "int8", "uint32", "float64", "complex64", "complex128", ">i2", ">f4")},
}


@fuzz(90)
@given(kind=st.sampled_from([*OLD.values()]), how=st.sampled_from([*CONTAINERS]), number=st.integers(0, 5000),
       suffix=st.sampled_from([".nii", ".nii.gz", ".NII.GZ"]))
def test_odd_containers(base, kind, how, number, suffix):
    with copy_of(base / "plain") as folder:
        path = folder / "P1" / f"P1_{kind}.nii"
        data = CONTAINERS[how](number, path.read_bytes())
        path.unlink()
        path = path.with_name(f"P1_{kind}{suffix}")
        path.write_bytes(data)
        look_at(folder, path)


@fuzz(120)
@given(layout=st.sampled_from(["packed", "together", "nnunet", "named"]),
       places=st.lists(st.integers(0, 9), max_size=4),
       names=st.lists(st.sampled_from(["P1_t1.nii", "P1_T1CE.NII.GZ", "P2_flair.nii.gz", "P1-t1c.nii.gz", "_seg.nii.gz",
                                       "P1_0000.nii.gz", "P1_0009.nii.gz", "x.nii", "P1_seg_seg.nii.gz", "a\tb_t1.nii",
                                       "-t2w.nii.gz", "T1.nii.gz", "P1_T1Gd.nii", "sub-_ce-_T1w.nii",
                                       "P2_FLAIR_bias.nii.gz"]), min_size=4, max_size=4))
def test_names_of_files(base, layout, places, names):
    with copy_of(base / layout) as folder:
        files = sorted(path for path in folder.rglob("*.nii*") if path.is_file())
        for place, name in zip(places, names, strict=False):
            path = files[place % len(files)]
            if path.exists():
                path.rename(path.with_name(name))
        look_at(folder, None)


def test_a_damaged_table_stops_a_run_with_a_reason(base, tmp_path):
    write_table(tmp_path / "sites.csv", ["Partition_ID", "Subject_ID"], [["1", "P1"]])
    assert read_sites(base / "packed", tmp_path / "sites.csv", spacing_mm=1.0, progress=False)[0].train
    raw = bytearray((tmp_path / "sites.csv").read_bytes())
    raw[5] ^= 0xFF
    (tmp_path / "sites.csv").write_bytes(raw)
    with pytest.raises(DataError, match="UTF-8"):
        read_sites(base / "packed", tmp_path / "sites.csv", progress=False)


def test_there_were_enough_cases():
    assert seen["cases"] >= 800
