"""The layout of a folder of scans, determined from names alone: every published layout of BraTS and its relatives.

BraTS 2018 to 2021 (Bakas et al. 2017; Baid et al. 2021, arXiv:2107.02314), FeTS (Pati et al. 2021, arXiv:2105.05874),
BraTS 2023 and later, Medical Segmentation Decathlon (Antonelli et al. 2022), and tables of paths for anything else.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedlab.core.errors import DataError
from fedlab.core.types import MODALITIES
from fedlab.data.readers.decathlon import list_msd, looks_like_msd
from fedlab.data.readers.findings import Finding
from fedlab.data.readers.patient_files import (
    Listing,
    PatientFiles,
    is_broken_link,
    is_circular_link,
    is_nifti,
    is_valid_id,
)
from fedlab.data.readers.tables import TABLES, find_path_table, list_table, merge_columns

__all__ = ["LAYOUTS", "list_patients"]

#: Every layout with its description.
LAYOUTS: Mapping[str, str] = {
    "brats2018": "HGG/ and LGG/ with <ID>/<ID>_flair.nii.gz, _t1, _t1ce, _t2, _seg",
    "brats2019": "as brats2018, with name_mapping.csv",
    "brats2020": "<ID>/<ID>_flair.nii.gz, _t1, _t1ce, _t2, _seg, with name_mapping.csv",
    "brats2021": "<ID>/<ID>_flair.nii.gz, _t1, _t1ce, _t2, _seg",
    "brats2023": "<ID>/<ID>-t2f.nii.gz, -t1n, -t1c, -t2w, -seg (BraTS 2023 and later)",
    "fets": "as brats2021, with partitioning_*.csv",
    "msd": "imagesTr/, labelsTr/ and dataset.json, four modalities in one 4-D file",
    "table": "a CSV file of paths with the columns patient, flair, t1, t1c, t2, label",
}
_SUFFIXES: Mapping[str, Mapping[str, str]] = {
    "_": {"flair": "FLAIR", "t1": "T1", "t1ce": "T1c", "t2": "T2", "seg": "label"},
    "-": {"t2f": "FLAIR", "t1n": "T1", "t1c": "T1c", "t2w": "T2", "seg": "label"},
}
_NAMES = {mark: re.compile(rf"(?P<id>.+){mark}(?P<kind>{'|'.join(kinds)})\.nii(\.gz)?", re.IGNORECASE)
          for mark, kinds in _SUFFIXES.items()}
_GRADES = ("HGG", "LGG")


def list_patients(folder: str | os.PathLike[str], *, layout: str | None = None) -> Listing:
    """The patients of a folder, or of a table of paths, by names alone.

    Where the folder contains nothing but one folder that holds the patients, that one is read.

    Args:
        folder: a folder in one of `LAYOUTS`, or a CSV file.
        layout: one of `LAYOUTS`; None detects it.

    Raises:
        DataError: there is no such folder, it contains no patient, or its layout cannot be detected.
        ValueError: an unknown layout.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    folder = Path(folder)
    if folder.suffix.lower() in TABLES and folder.is_file():
        return list_table(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected a folder with one subfolder per patient")
    try:
        root = _innermost(folder)
        listing = _list(root, layout)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error})") from error
    deeper = "" if root == folder else f" (in its only subfolder {root.relative_to(folder)})"
    reason = f"stated; {listing.reason}" if layout else listing.reason
    return replace(listing, reason=reason + deeper)


def _innermost(folder: Path) -> Path:
    """The folder itself, or the only folder in it where it contains nothing else; at most three levels down."""
    inner = folder
    for _ in range(4):
        if looks_like_msd(inner) or any(inner.glob("*.csv")) or _find_folders(inner):
            return inner
        inside = [entry for entry in sorted(inner.iterdir()) if _is_visible_folder(entry)]
        if len(inside) != 1:
            break
        inner = inside[0]
    return folder


def _list(root: Path, layout: str | None) -> Listing:
    if layout == "msd":
        return list_msd(root)
    if layout == "table":
        if (table := find_path_table(root)) is None:
            raise DataError(f"{root} contains no CSV file with the columns patient, flair, t1, t1c and t2")
        return list_table(table)
    folders = _find_folders(root)
    marks = Counter(folder.mark for folder in folders if folder.mark)
    if layout is None and not marks:
        if looks_like_msd(root):
            return list_msd(root)
        if (table := find_path_table(root)) is not None:
            return list_table(table)
    if not folders:
        raise DataError(_no_patients(root))
    if layout is None and len(marks) == 2 and marks["_"] == marks["-"]:
        raise DataError(f"{root}: as many patients are named as in BraTS 2021 (_t1ce) as in BraTS 2023 (-t1c); pass "
                        f"layout='brats2021' or 'brats2023' (--layout on the command line)")
    if layout is not None:
        mark = "-" if layout == "brats2023" else "_"
    elif marks:
        mark = marks.most_common(1)[0][0]
    else:
        examples = ", ".join(path.name for folder in folders[:2] for path in folder.scans[:3])
        raise DataError(f"{root}: {len(folders)} folders contain scans, but the names match no layout: {examples}. "
                        f"Expected {'; '.join(LAYOUTS.values())}. For any other layout write a table of paths")
    return _list_folders(root, folders, mark, layout)


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """The folder of one patient.

    Attributes:
        path: the folder.
        grade: "HGG" or "LGG" where it lies in a folder of that name, else "".
        scans: its NIfTI files.
        mark: "_" or "-", the separator of most of their names; "" where none matches.
        links: broken or circular links in it, or the folder itself if it is one.
        error: why it cannot be listed.
    """

    path: Path
    grade: str
    scans: tuple[Path, ...] = ()
    mark: str = ""
    links: tuple[Path, ...] = ()
    error: str = ""

    @property
    def id(self) -> str:
        return self.path.name


def _find_folders(root: Path) -> list[_Folder]:
    """The folders below `root`, or below its HGG/ and LGG/, that contain scans or are named like those that do."""
    found = []
    for entry in sorted(root.iterdir()):
        grade = entry.name.upper() if entry.name.upper() in _GRADES and _is_visible_folder(entry) else ""
        inside = sorted(entry.iterdir()) if grade else [entry]
        found += [_read_folder(path, grade) for path in inside if _may_be_patient(path)]
    patterns = {_pattern(folder.id) for folder in found if folder.scans}
    return [folder for folder in found if folder.scans or (
        patterns and (folder.error or folder.links or _pattern(folder.id) in patterns))]


def _is_visible_folder(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith((".", "__")) and not is_circular_link(entry)


def _is_bad_link(entry: Path) -> bool:
    return is_broken_link(entry) or is_circular_link(entry)


def _may_be_patient(entry: Path) -> bool:
    return not is_nifti(entry) if _is_bad_link(entry) else _is_visible_folder(entry)


def _pattern(name: str) -> str:
    return re.sub(r"\d", "0", name)


def _read_folder(path: Path, grade: str) -> _Folder:
    if _is_bad_link(path):
        return _Folder(path=path, grade=grade, links=(path,))
    try:
        inside = sorted(path.iterdir())
    except OSError as error:
        return _Folder(path=path, grade=grade, error=f"cannot be listed ({error.strerror})")
    scans = tuple(entry for entry in inside if is_nifti(entry))
    links = tuple(entry for entry in inside if not is_nifti(entry) and _is_bad_link(entry))
    marks = Counter(mark for entry in scans for mark, name in _NAMES.items() if name.fullmatch(entry.name))
    return _Folder(path=path, grade=grade, scans=scans, mark=marks.most_common(1)[0][0] if marks else "",
                 links=links if scans else ())


def _list_folders(root: Path, folders: Sequence[_Folder], mark: str, stated: str | None) -> Listing:
    files: dict[str, PatientFiles] = {}
    findings: list[Finding] = []
    for folder in folders:
        if folder.id in files:
            findings.append(Finding(folder.id, "two-folders",
                                    f"{folder.path.relative_to(root)} is a second folder for this patient"))
            continue
        named, problems = _name_files(folder, mark)
        findings += problems
        if folder.scans:  # an empty folder or a broken link is a finding, not a patient
            files[folder.id] = named
    layout, reason, tables = _year(root, folders, mark)
    if stated is not None and stated != layout:
        layout, reason = stated, f"{reason}, like {layout}"
    columns = merge_columns(tables, files)
    graded = {folder.id: {"grade": folder.grade} for folder in folders if folder.grade}
    files = {name: replace(found, layout=layout, columns={**columns[name], **graded.get(name, {})})
             for name, found in sorted(files.items())}
    return Listing(folder=root, layout=layout, reason=reason, files=files, findings=tuple(findings))


def _year(root: Path, folders: Sequence[_Folder], mark: str) -> tuple[str, str, list[Path]]:
    """Layout, reason and tables of a folder with patient folders."""
    count = f"{len(folders)} patient folder{'s' if len(folders) > 1 else ''}"
    if mark == "-":
        return "brats2023", f"{count} with files named -t1n, -t1c, -t2w, -t2f", []
    graded = any(folder.grade for folder in folders)
    mapping = [path for place in (root, *(root / name for name in _GRADES))
               for path in sorted(place.glob("name_mapping*.csv"))]
    partition = sorted(root.glob("partitioning_*.csv"))
    tables = [*mapping, *partition, *sorted(root.glob("survival*.csv"))]
    reason = f"{count} {'in HGG/ and LGG/ ' if graded else ''}with files named _flair, _t1, _t1ce, _t2"
    if partition:
        return "fets", f"{reason}, and {' and '.join(path.name for path in partition)}", tables
    years = Counter(match[1] for folder in folders
                    if (match := re.match(r"brats(?:20)?(18|19|20|21)_", folder.id.lower())))
    year = years.most_common(1)[0][0] if years else ""
    if mapping:
        reason += f", and {mapping[0].name}"
    if year not in ("18", "19", "20"):
        year = ("19" if mapping else "18") if graded else ("20" if mapping else "21")
    return f"brats20{year}", reason, tables


def _name_files(folder: _Folder, mark: str) -> tuple[PatientFiles, list[Finding]]:
    """One patient's files by their names; ambiguous files become findings and are left out."""
    findings: list[Finding] = []
    for path in folder.links:
        kind = "link to a folder that contains it; ignored" if is_circular_link(path) else "broken or circular link"
        findings.append(Finding(folder.id, "no-file", f"{path.name} is a {kind}",
                                "error" if path == folder.path else "warning"))
    if folder.error:
        findings.append(Finding(folder.id, "no-file", folder.error))
    if folder.links == (folder.path,) or folder.error:
        return PatientFiles(id=folder.id, images={}), findings
    kinds: dict[str, list[Path]] = {}
    for path in folder.scans:
        match, other = (_NAMES[key].fullmatch(path.name) for key in (mark, "-" if mark == "_" else "_"))
        if match is None and other is not None and other["id"] == folder.id:
            findings.append(Finding(folder.id, "other-layout", f"{path.name} is named as in "
                                    f"{'BraTS 2023' if mark == '_' else 'BraTS 2018 to 2021'}, unlike most files here; "
                                    f"label values have other meanings there"))
        elif match is None:
            endings = ", ".join(mark + suffix for suffix in _SUFFIXES[mark])
            findings.append(Finding(folder.id, "unknown-file", f"{path.name} is ignored: its name has none of the "
                                    f"endings {endings}; rename it if it is one of them", "warning"))
        elif match["id"] != folder.id:
            findings.append(Finding(folder.id, "foreign-file", f"{path.name} carries another patient's id"))
        elif not os.path.isfile(path):
            findings.append(Finding(folder.id, "no-file", f"{path.name} is a folder, or a broken or circular link"))
        else:
            kinds.setdefault(_SUFFIXES[mark][match["kind"].lower()], []).append(path)
    findings += _gaps(folder, kinds, mark)
    images = {modality: kinds[modality][0] for modality in MODALITIES if modality in kinds}
    return PatientFiles(id=folder.id, images=images, label=kinds.get("label", [None])[0]), findings


def _gaps(folder: _Folder, kinds: Mapping[str, Sequence[Path]], mark: str) -> list[Finding]:
    """Missing and duplicate files, and an invalid id."""
    findings = [Finding(folder.id, "two-files", f"{' and '.join(path.name for path in paths)} both claim to be the "
                        f"{kind}; keep one") for kind, paths in kinds.items() if len(paths) > 1]
    findings += [Finding(folder.id, "missing-modality", f"no {modality}: {folder.id}{mark}{suffix}.nii.gz")
                 for modality in MODALITIES if modality not in kinds
                 for suffix, name in _SUFFIXES[mark].items() if name == modality]
    if not is_valid_id(folder.id):
        findings.append(Finding(folder.id, "unusable", "a folder name must be printable and contain no \\"))
    return findings


def _no_patients(root: Path) -> str:
    """Why a folder holds no patients, for the text of an error."""
    entries = sorted(root.iterdir())
    candidates = [_innermost(entry) for entry in entries if _is_visible_folder(entry)]
    like = [str(entry.relative_to(root)) for entry in candidates if looks_like_msd(entry) or
            any(folder.mark for folder in _find_folders(entry))]
    if like:
        return f"{root} contains no patients itself; give one of its subfolders that do: {', '.join(like)}"
    names = [entry.name for entry in entries]
    scan = next((name for name in names for pattern in _NAMES.values() if pattern.fullmatch(name)), None)
    if scan is not None:
        return f"{root} contains scans such as {scan}: it is one patient's folder; give the folder above it"
    return (f"{root} contains no patient folder; expected {'; '.join(LAYOUTS.values())}; found "
            f"{', '.join(names[:5]) or 'nothing'}")
