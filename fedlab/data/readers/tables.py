"""Tables beside scans: what they state about patients, and tables of paths in place of a layout."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping
from itertools import zip_longest
from pathlib import Path

from fedlab.core.errors import DataError
from fedlab.core.text import counted
from fedlab.core.types import MODALITIES
from fedlab.data.readers.findings import Finding
from fedlab.data.readers.patient_files import Listing, PatientFiles, is_nifti, is_valid_id

__all__ = ["TABLES", "find_column", "find_path_table", "list_table", "merge_columns", "read_table"]

#: Endings of the names of tables.
TABLES = (".csv", ".tsv")
_MAX_BYTES = 2**26
_SEPARATORS = (",", ";", "\t")
#: How the files of Excel begin: .xlsx, which is a zip archive, and .xls.
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
#: The first line with which Excel is told the separator.
_STATED = re.compile(r'"?sep=([,;\t])"?[\r\n]+', re.IGNORECASE)
_NAMES: Mapping[str, tuple[str, ...]] = {
    "patient": ("patient", "patientid", "id", "subject", "subjectid", "case", "caseid"),
    "FLAIR": ("flair", "t2f", "t2flair"),
    "T1": ("t1", "t1n", "t1w", "t1pre"),
    "T1c": ("t1c", "t1ce", "t1gd", "t1post"),
    "T2": ("t2", "t2w"),
    "label": ("label", "seg", "segmentation", "mask"),
}


def read_table(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Column names and rows of a table, each row with its line number; cells are stripped, "" if empty.

    The text is in UTF-8, or in UTF-16 with a byte order mark; commas, semicolons or tabs separate the cells. Unnamed
    columns, rows without content and a first line such as "sep=;" are skipped.

    Raises:
        DataError: the table cannot be read, has no header, repeats a column name, a row has too many cells, or its
            cells could be separated in two ways.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path}: {path.stat().st_size:,} bytes are too many for a table of patients")
        raw = path.read_bytes()
        if raw.startswith(_WORKBOOKS):
            raise DataError(f"{path}: a workbook of a spreadsheet program, not a CSV table; save the sheet with the "
                            "patients as CSV in UTF-8")
        text = _decoded(raw)
        stated = _STATED.match(text)
        mark = stated[1] if stated else _separator(text, path)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True)
        if stated:
            next(reader)
        header = [name.strip() for name in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except FileNotFoundError as error:
        raise DataError(f"there is no table {path}") from error
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a CSV table in UTF-8 or UTF-16 ({error}); save it as CSV in "
                        "UTF-8") from error
    columns = [name for name in header if name]
    if not columns:
        raise DataError(f"{path}: the first line contains no column name")
    if double := sorted({name for name in columns if columns.count(name) > 1}):
        raise DataError(f"{path}: two columns are named {', '.join(double)}; rename one")
    if longer := [line for line, row in rows if len(row) > len(header)]:
        raise DataError(f"{path}: line {longer[0]} has more cells than the header has columns; put a cell that holds a "
                        "separator in quotes")
    return columns, [(line, {name: cell.strip() for name, cell in zip_longest(header, row, fillvalue="") if name})
                     for line, row in rows]


def _decoded(raw: bytes) -> str:
    """The text of a table, without its byte order mark.

    Raises:
        UnicodeError: neither UTF-8 nor UTF-16 with a byte order mark.
    """
    if not raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        if b"\0" in raw:
            raise UnicodeError("it holds zero bytes, as UTF-16 without a byte order mark does")
        return raw.decode("utf-8-sig")
    text = raw.decode("utf-16")
    if not any(mark in text for mark in _SEPARATORS):  # any bytes decode to letters of some script
        raise UnicodeError("it holds no separator")
    return text


def _separator(text: str, path: Path) -> str:
    """The one separator in the header, or the one that gives every row as many cells as the header.

    Raises:
        DataError: several do, or none.
    """
    found = [mark for mark in _SEPARATORS if mark in re.split("[\r\n]", text, maxsplit=1)[0]]
    if len(found) < 2:
        return found[0] if found else ","
    lengths = {mark: {len(row) for row in csv.reader(io.StringIO(text, newline=""), delimiter=mark) if any(row)}
               for mark in found}
    fitting = [mark for mark in found if len(lengths[mark]) == 1 and lengths[mark] != {1}]
    if len(fitting) != 1:
        raise DataError(f"{path}: commas, semicolons or tabs could separate its cells; use one of them, and put cells "
                        "that hold it in quotes")
    return fitting[0]


def find_column(columns: Collection[str], wanted: str) -> str | None:
    """The column of this name, or the only one that differs in case, spaces and punctuation alone."""
    alike = [name for name in columns if _letters(name) == _letters(wanted)]
    return wanted if wanted in columns else alike[0] if len(alike) == 1 else None


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold())


def merge_columns(tables: Collection[Path], patients: Collection[str]) -> dict[str, dict[str, str]]:
    """What tables state about patients: for each patient, cells by column name.

    The column with the patients' ids is found by its values. The column of the grade is named "grade", the column
    of the site in a partitioning table is named after the file.

    Raises:
        DataError: a table cannot be read.
    """
    known = set(patients)
    merged: dict[str, dict[str, str]] = {name: {} for name in known}
    for path in sorted(tables):
        columns, rows = read_table(path)
        hits = {name: sum(row[name] in known for _, row in rows) for name in columns}
        id_column = max(hits, key=lambda name: hits[name])
        renamed = {"grade": "grade", "partition_id": path.stem}
        for _, row in rows:
            if row[id_column] in known:
                merged[row[id_column]] |= {renamed.get(name.lower(), name): cell for name, cell in row.items()
                                           if name != id_column and cell}
    return merged


def _meaning(columns: Collection[str]) -> dict[str, list[str]]:
    """The columns that may be that of the patient, and those of each modality's path."""
    short = {name: re.sub("(path|file)$", "", _letters(name)) for name in columns}
    return {kind: found for kind, names in _NAMES.items() if (found := [c for c in columns if short[c] in names])}


def find_path_table(folder: Path) -> Path | None:
    """The only table in a folder that gives paths for patients; None without one.

    Raises:
        DataError: there are several.
    """
    found = []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLES):
        try:
            columns, rows = read_table(path)
        except DataError:
            continue  # an unreadable table gives no paths; its error is shown if it is requested by name
        meaning = _meaning(columns)
        scans = [column for name in MODALITIES for column in meaning.get(name, [])]
        if "patient" in meaning and sum(name in meaning for name in MODALITIES) >= 2 and (
                not rows or any(is_nifti(Path(row[column])) for _, row in rows for column in scans)):
            found.append(path)
    if len(found) > 1:
        raise DataError(f"{folder} contains several tables of paths: {', '.join(path.name for path in found)}; give "
                        f"the path of one of them in place of the folder")
    return found[0] if found else None


def list_table(path: Path) -> Listing:
    """The patients of a table of paths: one row per patient, columns patient, flair, t1, t1c, t2 and optionally label.

    Paths are relative to the table's folder, or absolute. Other columns are kept.

    Raises:
        DataError: the table cannot be read, lacks a column, or has no row.
    """
    columns, rows = read_table(path)
    candidates = _meaning(columns)
    if several := [f"{' and '.join(found)} may each be the {kind}" for kind, found in candidates.items()
                   if len(found) > 1]:
        raise DataError(f"{path}: columns {'; columns '.join(several)}; keep one, and rename the others")
    meaning = {kind: found[0] for kind, found in candidates.items()}
    if missing := [name for name in ("patient", *MODALITIES) if name not in meaning]:
        raise DataError(f"{path}: no column {' and '.join(missing)}; expected patient, flair, t1, t1c, t2 and "
                        f"optionally label, found {', '.join(columns)}")
    if not rows:
        raise DataError(f"{path}: no row below its header; expected one row per patient")
    files: dict[str, PatientFiles] = {}
    findings: list[Finding] = []
    for line, row in rows:
        patient = row[meaning["patient"]]
        if not is_valid_id(patient):
            findings.append(Finding(patient or f"line {line}", "unusable", f"line {line} of {path.name}: a patient id "
                                    f"must be printable, not empty, and without / or \\"))
        elif patient in files:
            findings.append(Finding(patient, "two-folders", f"line {line} of {path.name} is a second row for this "
                                    f"patient"))
        else:
            files[patient], problems = _row_files(patient, row, meaning, path)
            findings += problems
    return Listing(folder=path.parent, layout="table",
                   reason=f"{path.name} gives paths for {counted(len(files), 'patient')}",
                   files=dict(sorted(files.items())), findings=tuple(findings))


def _row_files(patient: str, row: Mapping[str, str], meaning: Mapping[str, str],
               table: Path) -> tuple[PatientFiles, list[Finding]]:
    cells = {kind: cell for kind in (*MODALITIES, "label") if (cell := row.get(meaning.get(kind, ""), ""))}
    cells = {kind: slashed if "\\" in cell and os.path.isfile(table.parent / (slashed := cell.replace("\\", "/")))
             else cell for kind, cell in cells.items()}
    paths = {kind: table.parent / cell for kind, cell in cells.items() if os.path.isfile(table.parent / cell)}
    findings = [Finding(patient, "missing-modality", f"{table.name} gives no path for {kind}")
                for kind in MODALITIES if kind not in cells]
    findings += [Finding(patient, "no-file", f"{kind}: {cell} is not a file, or a broken link")
                 for kind, cell in cells.items() if kind not in paths]
    for path, count in Counter(paths.values()).items():
        if count > 1:
            both = " and ".join(kind for kind, own in paths.items() if own == path)
            findings.append(Finding(patient, "two-files", f"{both} are one file, {path.name}"))
    label = paths.pop("label", None)
    used = set(meaning.values())
    columns = {name: cell for name, cell in row.items() if name not in used and cell}
    if "label" not in meaning and (unread := [name for name, cell in columns.items() if is_nifti(Path(cell))]):
        findings.append(Finding(patient, "no-label", f"{table.name} has no column label, and the files in its column "
                                f"{' and '.join(unread)} are not read; name the column of the label maps label",
                                "warning"))
    return PatientFiles(id=patient, images=paths, label=label, layout="table", columns=columns), findings
