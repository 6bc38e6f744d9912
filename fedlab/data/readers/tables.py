"""CSV tables beside scans: what they say about patients, and tables of paths in place of a layout."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from fedlab.core.errors import DataError
from fedlab.core.types import MODALITIES
from fedlab.data.readers.findings import Finding
from fedlab.data.readers.patient_files import Listing, PatientFiles, sound_id

__all__ = ["find_path_table", "list_table", "merge_columns", "read_table"]

_MAX_BYTES = 2**26
_NAMES: Mapping[str, tuple[str, ...]] = {
    "patient": ("patient", "patientid", "id", "subject", "subjectid", "case", "caseid"),
    "FLAIR": ("flair", "t2f", "t2flair"),
    "T1": ("t1", "t1n", "t1w", "t1pre"),
    "T1c": ("t1c", "t1ce", "t1gd", "t1post"),
    "T2": ("t2", "t2w"),
    "label": ("label", "seg", "segmentation", "mask"),
}


def read_table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Heading and rows of a CSV table in UTF-8, each row with its line number; cells are stripped, "" where empty.

    Raises:
        DataError: it can't be read, has no heading, or two columns carry one name.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path}: {path.stat().st_size:,} bytes are too many for a table of patients")
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            heading = [name.strip() for name in next(lines, [])]
            rows = [(lines.line_num, row) for row in lines if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a CSV table in UTF-8 ({error})") from error
    named = [name for name in heading if name]
    if not named:
        raise DataError(f"{path}: the first line names no column")
    if double := sorted({name for name in named if named.count(name) > 1}):
        raise DataError(f"{path}: two columns are called {', '.join(double)}; rename one")
    if longer := [line for line, row in rows if len(row) > len(heading)]:
        raise DataError(f"{path}: line {longer[0]} has more cells than the heading has columns")
    return heading, [(line, {name: cell.strip() for name, cell in
                             zip(heading, [*row, *[""] * (len(heading) - len(row))], strict=True) if name})
                     for line, row in rows]


def merge_columns(tables: Collection[Path], patients: Collection[str]) -> dict[str, dict[str, str]]:
    """What tables say about patients: cells by column name, by patient; the patient's column is found by its values.

    The grade becomes "grade"; a column of the site in a partitioning table is called as the file.

    Raises:
        DataError: a table can't be read.
    """
    known = set(patients)
    said: dict[str, dict[str, str]] = {name: {} for name in known}
    for path in sorted(tables):
        heading, rows = read_table(path)
        hits = {name: sum(row.get(name) in known for _, row in rows) for name in heading if name}
        column = max(hits, key=lambda name: hits[name])
        if not hits[column]:
            continue
        for _, row in rows:
            if row[column] in known:
                cells = {_call(name, path): cell for name, cell in row.items() if name != column and cell}
                said[row[column]] |= cells
    return said


def _call(column: str, path: Path) -> str:
    if column.lower() == "grade":
        return "grade"
    return path.stem if column.lower() == "partition_id" else column


def _meaning(heading: Collection[str]) -> dict[str, str]:
    """Which column is the patient, which a modality's path."""
    plain = {name: re.sub(r"[\W_]|path$|file$", "", re.sub(r"[\W_]", "", name.lower())) for name in heading}
    return {kind: next(name for name in heading if plain[name] in names) for kind, names in _NAMES.items()
            if any(plain[name] in names for name in heading)}


def find_path_table(folder: Path) -> Path | None:
    """The one CSV file in a folder that gives paths for patients; None where there is none.

    Raises:
        DataError: there are several.
    """
    found = []
    for path in sorted(folder.glob("*.csv")):
        try:
            heading = read_table(path)[0]
        except DataError:
            continue  # a table that can't be read gives no paths; where it is asked for by name its error shows
        meaning = _meaning([name for name in heading if name])
        if "patient" in meaning and sum(name in meaning for name in MODALITIES) >= 2:
            found.append(path)
    if len(found) > 1:
        raise DataError(f"{folder} holds several tables of paths: {', '.join(path.name for path in found)}; give the "
                        f"path of one of them in place of the folder")
    return found[0] if found else None


def list_table(path: Path) -> Listing:
    """The patients of a table of paths: one row a patient, columns patient, flair, t1, t1c, t2 and perhaps label.

    Paths are relative to the table's folder, or absolute. Other columns are kept.

    Raises:
        DataError: the table can't be read, lacks a column, or has no row.
    """
    heading, rows = read_table(path)
    meaning = _meaning([name for name in heading if name])
    if missing := [name for name in ("patient", *MODALITIES) if name not in meaning]:
        raise DataError(f"{path}: no column {' and '.join(missing)}; expected patient, flair, t1, t1c, t2 and perhaps "
                        f"label, found {', '.join(name for name in heading if name)}")
    if not rows:
        raise DataError(f"{path}: no row below its heading; expected one a patient")
    files: dict[str, PatientFiles] = {}
    findings: list[Finding] = []
    for line, row in rows:
        patient = row[meaning["patient"]]
        if not sound_id(patient):
            findings.append(Finding(patient=patient or f"line {line}", code="unusable", message=f"line {line} of "
                                    f"{path.name}: a patient's name is printable, without / or \\, and not empty"))
        elif patient in files:
            findings.append(Finding(patient=patient, code="two-folders",
                                    message=f"line {line} of {path.name} is a second row for this patient"))
        else:
            files[patient], problems = _row_files(patient, row, meaning, path)
            findings += problems
    return Listing(folder=path.parent, layout="table", reason=f"{path.name} gives paths for {len(files)} patients",
                   files=dict(sorted(files.items())), findings=tuple(findings))


def _row_files(patient: str, row: Mapping[str, str], meaning: Mapping[str, str],
               table: Path) -> tuple[PatientFiles, list[Finding]]:
    findings: list[Finding] = []
    paths: dict[str, Path] = {}
    for kind in (*MODALITIES, "label"):
        cell = row.get(meaning.get(kind, ""), "")
        if not cell:
            if kind != "label":
                findings.append(Finding(patient=patient, code="missing-modality",
                                        message=f"{table.name} gives no path for {kind}"))
            continue
        paths[kind] = table.parent / cell
        if not os.path.isfile(paths[kind]):
            findings.append(Finding(patient=patient, code="no-file", message=f"{kind}: {cell} is no file, or a link "
                                    f"that leads nowhere"))
            del paths[kind]
    for path in {p for p in paths.values() if list(paths.values()).count(p) > 1}:
        both = " and ".join(kind for kind, p in paths.items() if p == path)
        findings.append(Finding(patient=patient, code="two-files", message=f"{both} are one file, {path.name}"))
    label = paths.pop("label", None)
    used = set(meaning.values())
    columns = {name: cell for name, cell in row.items() if name not in used and cell}
    return PatientFiles(id=patient, images=paths, label=label, layout="table", columns=columns), findings
