"""A folder's patients: corrected files are noticed, and the hash of the content is read once."""

from __future__ import annotations

import os
import pickle
import shutil
import time
from pathlib import Path

import cloudpickle
import pytest
import torch

from fedlab.core.errors import DataError
from fedlab.data.readers import patient_folder
from fedlab.data.readers.folders import read_cohort
from fedlab.run.recipe import patients_sha256
from folders import rewrite, write_patient


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for number in range(3):
        write_patient(tmp_path / "d", f"P{number}", suffix=".nii", seed=number, shape=(12, 14, 10))
    return tmp_path / "d"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The patients that are read from their files from now on."""
    seen: list[str] = []
    plain = patient_folder.prepare_patient
    monkeypatch.setattr(patient_folder, "prepare_patient",
                        lambda files, **how: (seen.append(files.id), plain(files, **how))[1])
    return seen


def correct(path: Path, *, new_file: bool) -> None:
    """Changes a voxel of the label and sets the times back, as copying with the times of the original does."""
    before = path.stat()
    raw = bytearray(path.read_bytes())
    place = next(at for at in range(352, len(raw)) if raw[at] == 2)
    raw[place] = 1
    if new_file:
        path.with_suffix(".new").write_bytes(raw)
        os.replace(path.with_suffix(".new"), path)
    else:
        path.write_bytes(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("new_file", [False, True])
def test_a_correction_of_equal_size_and_time_is_noticed(scans: Path, tmp_path: Path, new_file: bool) -> None:
    found = read_cohort(scans, cache=tmp_path / "cache", progress=False)
    before, content = found[1].label, found.content_sha256()
    correct(scans / "P1" / "P1_seg.nii", new_file=new_file)
    assert int((found[1].label != before).sum()) == 1
    assert found.content_sha256() != content
    assert found.content_sha256() == patients_sha256(list(found))


def test_the_content_is_that_of_the_patients_and_read_once(scans: Path, reads: list[str]) -> None:
    found = read_cohort(scans, examine=False, progress=False)
    content = patients_sha256(found)
    assert content == patients_sha256(list(found)) and sorted(set(reads)) == ["P0", "P1", "P2"]
    reads.clear()
    assert patients_sha256(found) == content
    assert patients_sha256(pickle.loads(cloudpickle.dumps(found))) == content
    assert patients_sha256(found[:2]) == patients_sha256(found.subset(["P0", "P1"])) != content
    assert reads == []
    assert patients_sha256(found.subset(["P1", "P0"])) == patients_sha256([found[1], found[0]])


def test_the_content_depends_on_voxels_not_on_places_and_times(scans: Path, tmp_path: Path, reads: list[str]) -> None:
    content = read_cohort(scans, examine=False, progress=False).content_sha256()
    shutil.copytree(scans, tmp_path / "copied")
    assert read_cohort(tmp_path / "copied", examine=False, progress=False).content_sha256() == content
    assert read_cohort(scans, examine=False, progress=False, spacing_mm=2.0).content_sha256() != content
    assert read_cohort(scans, examine=False, progress=False, dtype=torch.float32).content_sha256() != content
    reads.clear()
    rewrite(scans / "P2" / "P2_t1.nii", lambda array, affine: (array.clip(max=600), affine))
    assert read_cohort(scans, examine=False, progress=False).content_sha256() != content
    assert reads == ["P2"]


def test_a_lost_file_is_not_hidden_by_a_known_hash(scans: Path) -> None:
    found = read_cohort(scans, examine=False, progress=False)
    found.content_sha256()
    (scans / "P2" / "P2_t1.nii").unlink()
    with pytest.raises(DataError, match="P2"):
        found.content_sha256()


def test_a_known_hash_costs_no_reading(scans: Path) -> None:
    found = read_cohort(scans, examine=False, progress=False)
    found.content_sha256()
    start = time.perf_counter()
    for _ in range(20):
        found.content_sha256()
    assert time.perf_counter() - start < 20 * 3 * 0.02  # 20 ms per patient; measured: 0.2 ms
