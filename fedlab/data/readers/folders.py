"""Real scans in folders of every BraTS layout and its relatives: found, checked, and put on a common grid.

The layout is determined from names (`fedlab.data.readers.layouts`), the meaning of labels from the layout, a
description or the values (`fedlab.data.readers.conventions`); defects of a patient are found on reading
(`fedlab.data.readers.scan`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from fedlab.core.errors import DataError
from fedlab.core.types import Patient, Site
from fedlab.core.workers import available_cores
from fedlab.data.readers.conventions import CONVENTIONS, Convention, detect_convention, file_values, wrong_values
from fedlab.data.readers.examination import check_headers, examine
from fedlab.data.readers.findings import Broken, Finding, usable, without_errors
from fedlab.data.readers.layouts import LAYOUTS, list_patients
from fedlab.data.readers.patient_files import Listing, PatientFiles, find_copies
from fedlab.data.readers.patient_folder import PatientFolder, prepare_patient
from fedlab.data.readers.scan import (
    Grid,
    read_label,
    read_patient,
    save_prediction,
    to_native,
)
from fedlab.data.sites.partition import split_patients
from fedlab.data.sites.persons import at_site, in_columns, name_several
from fedlab.data.sites.site_table import alike, read_site_table, spelled

__all__ = ["CONVENTIONS", "LAYOUTS", "Finding", "PatientFiles", "PatientFolder", "check_sites", "find_patients",
           "in_parallel", "read_cohort", "read_label", "read_patient", "read_sites", "save_prediction", "to_native"]

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def find_patients(folder: str | os.PathLike[str], *, layout: str | None = None, label_convention: str | None = None,
                  broken: Broken = "raise", only: Collection[str] | None = None) -> dict[str, PatientFiles]:
    """The patients of a folder, or of a table of paths, sorted by id.

    Names, headers and label values are checked here, the other voxels when they are read.

    Args:
        folder: a folder in one of `LAYOUTS`, or a CSV table of paths.
        layout: one of `LAYOUTS`; None detects it.
        label_convention: one of `CONVENTIONS`; None detects it and refuses an ambiguous one.
        broken: "raise" stops at problems and lists all of them; "skip" leaves those patients out and warns.
        only: ids of the patients that are looked at; None for all.

    Raises:
        DataError: there is no such folder, it contains no patient, its layout or label convention cannot be
            detected, or patients have problems.
        ValueError: unknown options.
    """
    found = _survey(folder, layout=layout, label_convention=label_convention, progress=False, only=only)
    return usable(found.files, found.findings, broken=broken, where=folder)


def read_cohort(folder: str | os.PathLike[str], *, layout: str | None = None, label_convention: str | None = None,
                spacing_mm: float | None = None, shape: tuple[int, int, int] | None = None,
                dtype: torch.dtype = torch.float16, broken: Broken = "raise", examine: bool = True,
                cache: str | os.PathLike[str] | None = None, progress: bool = True) -> PatientFolder:
    """The patients of a folder in any layout; reports the layout and label convention, and the reasons for them.

    A patient is read, resampled and normalised on access; `found[0]` and `for patient in found` work.

    Args:
        folder, layout, label_convention, broken: as in `find_patients`.
        spacing_mm: edge of the voxels in mm; None keeps each scan's own.
        shape: voxels of the grid; None takes for each patient the smallest multiples of 16 that hold the brain.
        dtype: of the images.
        examine: whether to check every voxel of every patient now, so that all problems are known at once;
            otherwise, problems of voxels appear when the patient is read.
        cache: a folder that stores patients after reading, resampling and normalising, so that the next access is a
            copy from disk. It then holds patients' images: protect it like the scans. None stores nothing.
        progress: whether to print layout and convention on standard error, and to show a bar if it takes long.

    Raises:
        DataError, ValueError: as in `find_patients`.

    Example:
        >>> folder = fl.data.write_brats("scans", sites=2, patients=4, shape=(32, 32, 32), spacing_mm=6.0)
        >>> fl.read_cohort(folder, spacing_mm=6.0, progress=False)
        <PatientFolder of 4 patients in scans: layout brats2021 ...
    """
    grid = Grid(spacing_mm=spacing_mm, shape=shape, dtype=dtype)
    found = _survey(folder, layout=layout, label_convention=label_convention, progress=progress)
    store = None if cache is None else Path(cache)
    findings = list(found.findings)
    if examine:
        sound = list(without_errors(found.files, findings).values())
        check = partial(_check_voxels, grid=grid, cache=store)
        for problems in in_parallel(check, sound, "reading patients", progress):
            findings += problems
    good = usable(found.files, findings, broken=broken, where=folder)
    return PatientFolder(folder=found.listing.folder, layout=found.listing.layout, reason=found.listing.reason,
                         convention=found.convention, files=good, findings=tuple(dict.fromkeys(findings)), grid=grid,
                         cache=store)


def _check_voxels(files: PatientFiles, *, grid: Grid, cache: Path | None) -> list[Finding]:
    if cache is None and grid.shape is None:
        return examine(files, labels=files.label_convention).findings
    return prepare_patient(files, grid=grid, cache=cache)[1]


@dataclass(frozen=True, kw_only=True)
class _Survey:
    """What names, headers and label values tell about a folder."""

    listing: Listing
    convention: Convention
    files: dict[str, PatientFiles]
    findings: list[Finding]


def _survey(folder: str | os.PathLike[str], *, layout: str | None, label_convention: str | None, progress: bool,
            only: Collection[str] | None = None) -> _Survey:
    """Everything about a folder, or about the patients `only`, that can be known without reading images."""
    listing = list_patients(folder, layout=layout)
    wanted = {name: files for name, files in listing.files.items() if only is None or name in only}
    findings = [f for f in listing.findings if only is None or f.patient in only]
    sound = list(without_errors(wanted, findings).values())
    findings += find_copies(sound)
    checks = in_parallel(partial(_check_quickly, values=label_convention is None), sound, "checking files", progress)
    values: dict[str, frozenset[float]] = {}
    for files, (problems, own) in zip(sound, checks, strict=True):
        findings += problems
        if own is not None:
            values[files.id] = own
    try:
        convention = detect_convention(values, layout=listing.layout, described=listing.described,
                                       stated=label_convention)
    except DataError as error:
        raise DataError(f"{folder}: {error}", code=error.code) from error
    findings += [Finding(files.id, "label-values", f"{files.label.name} {problem}")
                 for files in sound if files.id in values and files.label is not None
                 and (name := convention.of(files.id)) and (problem := wrong_values(values[files.id], name, files.id))]
    if progress:
        print(f"fedlab: {folder}: layout {listing.layout} ({listing.reason}); {convention}", file=sys.stderr)
    known = {name: replace(files, label_convention=convention.of(name)) for name, files in wanted.items()}
    return _Survey(listing=listing, convention=convention, files=known, findings=findings)


def _check_quickly(files: PatientFiles, *, values: bool) -> tuple[list[Finding], frozenset[float] | None]:
    """Findings about the headers, and the values in the label map."""
    findings = check_headers(files)
    if not values or files.label is None or any(f.severity == "error" for f in findings):
        return findings, None
    try:
        return findings, file_values(files.label)
    except DataError as error:
        return [*findings, Finding(files.id, error.code, str(error))], None


def read_sites(folder: str | os.PathLike[str], table: str | os.PathLike[str], *, spacing_mm: float = 3.0,
               shape: tuple[int, int, int] | None = None, held_out: float = 0.2, seed: int = 0,
               layout: str | None = None, label_convention: str | None = None, broken: Broken = "raise",
               cache: str | os.PathLike[str] | None = None, progress: bool = True, at_least: int = 1,
               common_grid: bool = True) -> list[Site]:
    """Reads a folder and its institution table into sites, in memory (float16, one grid for all).

    Args:
        folder, layout, label_convention, broken: as in `find_patients`.
        table: see `read_site_table`; patients in the folder but not in the table are left out with a warning.
        spacing_mm: edge of the voxels in mm.
        shape: voxels of the common grid; None takes the smallest multiples of 16 that hold every brain.
        held_out: fraction or number of patients a site holds out, see `split_patients`: all scans of a person are
            trained on or held out. A site with one patient trains on it and holds none out.
        seed: of the split.
        cache, progress: as in `read_cohort`.
        at_least: as in `split_patients`.
        common_grid: whether all patients get the largest grid that one of them needs, if no shape is given. It depends
            on all of them, and a guarantee says so; otherwise each has the grid that its own brain needs.

    Returns:
        Sites in the order of the table's numbers or names; sites without a usable patient are left out.

    Raises:
        DataError: folder or table cannot be used, or patients have problems.
        ValueError: options out of range.

    Example:
        >>> folder = fl.data.write_brats("scans", sizes=(4, 3), shape=(32, 32, 32), spacing_mm=6.0)
        >>> fl.read_sites(folder, folder / "partitioning.csv", spacing_mm=6.0, held_out=1, progress=False)
        [<Site 1: 3 patients to train on, 1 held out>, <Site 2: 2 patients to train on, 1 held out>]
    """
    folder = Path(folder)
    partition, same = read_site_table(table)
    found, findings = _choose(folder, partition, table, layout, label_convention, progress)
    read = partial(prepare_patient, grid=Grid(spacing_mm=spacing_mm, shape=shape, dtype=torch.float16),
                   cache=None if cache is None else Path(cache))
    patients: dict[str, Patient] = {}
    sound = list(without_errors(found, findings).values())
    for files, (patient, problems) in zip(sound, in_parallel(read, sound, "reading patients", progress), strict=True):
        findings += problems
        if patient is not None:
            patients[files.id] = patient
    good = usable(found, findings, broken=broken, where=folder)
    persons = (*same, *in_columns({name: files.columns for name, files in good.items()}))
    if progress and (several := name_several(good, persons)):
        print(f"fedlab: {table}: {several}", file=sys.stderr)
    common = shape or tuple(max(patients[name].image.shape[axis] for name in good) for axis in (1, 2, 3))
    remarks = () if shape else ("the grid was chosen from the patients: say shape=",)
    sites = []
    for name, members in partition.items():
        own = [_pad(patients[member], common) if common_grid else patients[member] for member in members
               if member in good]
        if own:
            train, val = split_patients(own, held_out=held_out, seed=seed, site=name, same=persons, at_least=at_least)
            sites.append(Site(name=name, train=train, val=val, same=at_site(persons, [patient.id for patient in own]),
                              remarks=remarks if common_grid else ()))
    return sites


def check_sites(folder: str | os.PathLike[str], table: str | os.PathLike[str], *, layout: str | None = None,
                label_convention: str | None = None, broken: Broken = "raise") -> None:
    """Checks whether `read_sites` can use a folder and its table, from names, headers and label values.

    Args:
        folder, table, layout, label_convention, broken: as in `read_sites`.

    Raises:
        DataError: folder or table cannot be used, or patients have problems.
        ValueError: unknown options.
    """
    partition, _ = read_site_table(table)
    found, findings = _choose(Path(folder), partition, table, layout, label_convention, progress=False)
    errors = [f for f in findings if f.severity == "error"]
    if broken == "raise" or not without_errors(found, errors):
        usable(found, errors, broken=broken, where=folder)


def _choose(folder: Path, partition: Mapping[str, Sequence[str]], table: str | os.PathLike[str], layout: str | None,
            label_convention: str | None, progress: bool) -> tuple[dict[str, PatientFiles], list[Finding]]:
    """The files of the patients in the table, by id, and findings about folder and table."""
    wanted = dict.fromkeys(patient for members in partition.values() for patient in members)
    name = Path(table).name
    survey = _survey(folder, layout=layout, label_convention=label_convention, progress=progress, only=wanted)
    findings = survey.findings
    findings += [Finding(patient, "not-in-table", f"has scans but no row in {name}; left out", "warning")
                 for patient in survey.listing.files if patient not in wanted]
    reported = {f.patient for f in findings if f.severity == "error"}
    left = {alike(patient): patient for patient in survey.listing.files if patient not in wanted}
    found = {}
    for patient in wanted:
        files = survey.files.get(patient)
        if files is None:
            if patient not in reported:
                other, hint = left.get(alike(patient)), ""
                if other is not None:
                    stored, listed = spelled(other, patient)
                    hint = f", which has {stored}; write {listed} in {name} as the folder does"
                findings.append(Finding(patient, "no-folder", f"is in {name} but has no scans in {folder}{hint}"))
        elif files.label is None:
            findings.append(Finding(patient, "no-label", "has no label map to learn from"))
        else:
            found[patient] = files
    return found, findings


def in_parallel(work: Callable[[_In], _Out], items: Sequence[_In], what: str, progress: bool) -> list[_Out]:
    """Applies `work` to every item in threads, results in the order of the items; a bar appears after three seconds."""
    from tqdm.auto import tqdm

    # Decompression and averaging release Python's lock; a patient of 240 x 240 x 155 voxels takes up to 0.5 GB.
    pool = ThreadPoolExecutor(min(available_cores(), 8))
    try:
        return list(tqdm(pool.map(work, items), total=len(items), desc=what, unit="patient", delay=3,
                         disable=not progress))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for all patients


def _pad(patient: Patient, shape: Sequence[int]) -> Patient:
    """The same patient at the centre of a larger grid."""
    before = [(m - n) // 2 for m, n in zip(shape, patient.image.shape[1:], strict=True)]
    after = [m - n - b for m, n, b in zip(shape, patient.image.shape[1:], before, strict=True)]
    if not any(before + after):
        return patient
    sides = [side for pair in reversed(list(zip(before, after, strict=True))) for side in pair]
    label = None if patient.label is None else torch.nn.functional.pad(patient.label, sides)
    affine = patient.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.asarray(before, dtype=np.float64)
    return replace(patient, image=torch.nn.functional.pad(patient.image, sides), label=label, affine=affine)
