"""How a folder of scans is laid out: every published layout of BraTS and its relatives is told from names alone.

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
from fedlab.data.readers.patient_files import Listing, PatientFiles, is_nifti, leads_back, leads_nowhere, sound_id
from fedlab.data.readers.tables import find_path_table, list_table, merge_columns

__all__ = ["LAYOUTS", "list_patients"]

#: Every layout, with what it looks like.
LAYOUTS: Mapping[str, str] = {
    "brats2018": "HGG/ and LGG/ with <ID>/<ID>_flair.nii.gz, _t1, _t1ce, _t2, _seg",
    "brats2019": "as brats2018, with name_mapping.csv",
    "brats2020": "<ID>/<ID>_flair.nii.gz, _t1, _t1ce, _t2, _seg, with name_mapping.csv",
    "brats2021": "<ID>/<ID>_flair.nii.gz, _t1, _t1ce, _t2, _seg",
    "brats2023": "<ID>/<ID>-t2f.nii.gz, -t1n, -t1c, -t2w, -seg (BraTS 2023 and later)",
    "fets": "as brats2021, with partitioning_*.csv",
    "msd": "imagesTr/, labelsTr/ and dataset.json, four modalities in one 4-D file",
    "table": "a CSV file with the columns patient, flair, t1, t1c, t2, label, where the paths are",
}
_SUFFIXES: Mapping[str, Mapping[str, str]] = {
    "_": {"flair": "FLAIR", "t1": "T1", "t1ce": "T1c", "t2": "T2", "seg": "label"},
    "-": {"t2f": "FLAIR", "t1n": "T1", "t1c": "T1c", "t2w": "T2", "seg": "label"},
}
_NAMES = {mark: re.compile(rf"(?P<id>.+){mark}(?P<kind>{'|'.join(kinds)})\.nii(\.gz)?", re.IGNORECASE)
          for mark, kinds in _SUFFIXES.items()}
_GRADES = ("HGG", "LGG")


def list_patients(folder: str | os.PathLike[str], *, layout: str | None = None) -> Listing:
    """The patients of a folder, or of a table of paths, by their names alone; the layout is found, or stated.

    Where the folder holds nothing but one folder that holds the patients, that one is read.

    Args:
        folder: a folder in one of `LAYOUTS`, or a CSV file.
        layout: one of `LAYOUTS`, where it is known or can't be told.

    Raises:
        DataError: there is no such folder or no patient in it, or its layout can't be told.
        ValueError: an unknown layout.
    """
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout is one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    folder = Path(folder)
    if folder.suffix.lower() == ".csv" and folder.is_file():
        return list_table(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one that holds a folder for each patient")
    try:
        root = _innermost(folder)
        listing = _list(root, layout)
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error})") from error
    deeper = "" if root == folder else f" (in its only sub-folder {root.relative_to(folder)})"
    told = f"stated; {listing.reason}" if layout else listing.reason
    return replace(listing, reason=told + deeper)


def _innermost(folder: Path) -> Path:
    """The folder itself, or the only folder in it, where nothing but that is in it; three deep at most."""
    inner = folder
    for _ in range(4):
        if looks_like_msd(inner) or any(inner.glob("*.csv")) or _homes(inner):
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
        table = find_path_table(root)
        if table is None:
            raise DataError(f"{root} holds no CSV file with the columns patient, flair, t1, t1c and t2")
        return list_table(table)
    homes = _homes(root)
    marks = Counter(home.mark for home in homes if home.mark)
    if layout is None and not marks:
        if looks_like_msd(root):
            return list_msd(root)
        if (table := find_path_table(root)) is not None:
            return list_table(table)
    if not homes:
        raise DataError(_nothing(root))
    if layout is None and len(marks) == 2 and marks["_"] == marks["-"]:
        raise DataError(f"{root}: as many patients are named as in BraTS 2021 (_t1ce) as in BraTS 2023 (-t1c); say "
                        f"layout='brats2021' or 'brats2023' (--layout on the command line)")
    if layout is not None:
        mark = "-" if layout == "brats2023" else "_"
    elif marks:
        mark = marks.most_common(1)[0][0]
    else:
        seen = ", ".join(path.name for home in homes[:2] for path in home.scans[:3])
        raise DataError(f"{root}: {len(homes)} folders hold scans, but their names follow no layout: {seen}. Expected "
                        f"{'; '.join(LAYOUTS.values())}. For anything else write a table of paths and give that")
    return _list_homes(root, homes, mark, layout)


@dataclass(frozen=True, kw_only=True)
class _Home:
    """One patient's folder: its grade where it lies in HGG/ or LGG/, its scans, and how most of them are named."""

    path: Path
    grade: str
    scans: tuple[Path, ...]
    mark: str
    links: tuple[Path, ...] = ()
    error: str = ""

    @property
    def id(self) -> str:
        return self.path.name


def _homes(root: Path) -> list[_Home]:
    """Every folder below `root`, or below its HGG/ and LGG/, that holds scans, or is called as those that do."""
    found = []
    for entry in sorted(root.iterdir()):
        if entry.name.upper() in _GRADES and _is_visible_folder(entry):
            found += [_look(inner, entry.name.upper()) for inner in sorted(entry.iterdir()) if _may_be_home(inner)]
        elif _may_be_home(entry):
            found.append(_look(entry, ""))
    pattern = {_shape_of(home.id) for home in found if home.scans}
    return [home for home in found if home.scans or (pattern and (home.error or home.links or
                                                                  _shape_of(home.id) in pattern))]


def _is_visible_folder(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith((".", "__")) and not leads_back(entry)


def _may_be_home(entry: Path) -> bool:
    if leads_nowhere(entry) or leads_back(entry):
        return not is_nifti(entry)
    return _is_visible_folder(entry)


def _shape_of(name: str) -> str:
    return re.sub(r"\d", "0", name)


def _look(path: Path, grade: str) -> _Home:
    if leads_nowhere(path) or leads_back(path):
        return _Home(path=path, grade=grade, scans=(), mark="", links=(path,))
    try:
        inside = sorted(path.iterdir())
    except OSError as error:
        return _Home(path=path, grade=grade, scans=(), mark="", error=f"cannot be listed ({error.strerror})")
    scans = tuple(entry for entry in inside if is_nifti(entry))
    links = tuple(entry for entry in inside if not is_nifti(entry) and (leads_nowhere(entry) or leads_back(entry)))
    marks = Counter(mark for entry in scans for mark, name in _NAMES.items() if name.fullmatch(entry.name))
    return _Home(path=path, grade=grade, scans=scans, mark=marks.most_common(1)[0][0] if marks else "",
                 links=links if scans else ())


def _list_homes(root: Path, homes: Sequence[_Home], mark: str, stated: str | None) -> Listing:
    files: dict[str, PatientFiles] = {}
    findings: list[Finding] = []
    for home in homes:
        if home.id in files:
            findings.append(Finding(patient=home.id, code="two-folders", message=f"{home.path.relative_to(root)} is a "
                                    f"second folder for this patient"))
            continue
        named, problems = _name_files(home, mark)
        findings += problems
        if home.scans:  # an empty folder or a dead link is no patient, but stands among the findings
            files[home.id] = named
    layout, reason, tables = _year(root, homes, mark)
    if stated is not None and stated != layout:
        layout, reason = stated, f"{reason}, like {layout}"
    said = merge_columns(tables, files)
    graded = {home.id: {"grade": home.grade} for home in homes if home.grade}
    files = {name: replace(found, layout=layout, columns={**said[name], **graded.get(name, {})})
             for name, found in sorted(files.items())}
    return Listing(folder=root, layout=layout, reason=reason, files=files, findings=tuple(findings))


def _year(root: Path, homes: Sequence[_Home], mark: str) -> tuple[str, str, list[Path]]:
    """Layout, reason and tables of a folder with patient folders."""
    count = f"{len(homes)} patient folder{'s' if len(homes) > 1 else ''}"
    if mark == "-":
        return "brats2023", f"{count} with files named -t1n, -t1c, -t2w, -t2f", []
    graded = any(home.grade for home in homes)
    places = [root, *(root / name for name in _GRADES)]
    mapping = [path for place in places for path in sorted(place.glob("name_mapping*.csv"))]
    partition = sorted(root.glob("partitioning_*.csv"))
    further = sorted(root.glob("survival*.csv"))
    tables = [*mapping, *partition, *further]
    where = "in HGG/ and LGG/ " if graded else ""
    why = f"{count} {where}with files named _flair, _t1, _t1ce, _t2"
    if partition:
        return "fets", f"{why}, and {' and '.join(path.name for path in partition)}", tables
    years = Counter(found[1] for home in homes if (found := re.match(r"brats(?:20)?(18|19|20|21)_", home.id.lower())))
    year = years.most_common(1)[0][0] if years else ""
    if mapping:
        why += f", and {mapping[0].name}"
    if graded:
        return f"brats20{year if year in ('18', '19', '20') else '19' if mapping else '18'}", why, tables
    if year in ("18", "19", "20"):
        return f"brats20{year}", why, tables
    return "brats2020" if mapping else "brats2021", why, tables


def _name_files(home: _Home, mark: str) -> tuple[PatientFiles, list[Finding]]:
    """Sort one patient's files by their names; what is doubtful is left out and found fault with."""
    findings = [Finding(patient=home.id, code="no-file", severity="error" if path == home.path else "warning",
                        message=f"{path.name} is a link that leads " + ("back to a folder it lies in; left aside"
                        if leads_back(path) else "nowhere or in a circle")) for path in home.links]
    if home.error:
        findings.append(Finding(patient=home.id, code="no-file", message=home.error))
    if home.links == (home.path,) or home.error:
        return PatientFiles(id=home.id, images={}), findings
    kinds: dict[str, list[Path]] = {}
    for path in home.scans:
        match, other = (_NAMES[key].fullmatch(path.name) for key in (mark, "-" if mark == "_" else "_"))
        if match is None and other is not None and other["id"] == home.id:
            findings.append(Finding(patient=home.id, code="other-layout", message=f"{path.name} is named as in "
                                    f"{'BraTS 2023' if mark == '_' else 'BraTS 2018 to 2021'}, unlike most files here; "
                                    f"labels mean other things there"))
        elif match is None:
            findings.append(Finding(patient=home.id, code="unknown-file", severity="warning", message=f"{path.name} is "
                                    f"left aside: it ends in none of {_endings(mark)}; rename it if it is one of them"))
        elif match["id"] != home.id:
            findings.append(Finding(patient=home.id, code="foreign-file",
                                    message=f"{path.name} carries another patient's id"))
        elif not os.path.isfile(path):
            findings.append(Finding(patient=home.id, code="no-file",
                                    message=f"{path.name} is a folder or a link that leads nowhere or in a circle"))
        else:
            kinds.setdefault(_SUFFIXES[mark][match["kind"].lower()], []).append(path)
    findings += _gaps(home, kinds, mark)
    images = {modality: kinds[modality][0] for modality in MODALITIES if modality in kinds}
    return PatientFiles(id=home.id, images=images, label=kinds.get("label", [None])[0]), findings


def _gaps(home: _Home, kinds: Mapping[str, Sequence[Path]], mark: str) -> list[Finding]:
    """What is missing or there twice."""
    findings = []
    for kind, paths in kinds.items():
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            findings.append(Finding(patient=home.id, code="two-files",
                                    message=f"{names} both claim to be the {kind}; keep one"))
    for modality in MODALITIES:
        if modality not in kinds:
            suffix = next(suffix for suffix, name in _SUFFIXES[mark].items() if name == modality)
            findings.append(Finding(patient=home.id, code="missing-modality",
                                    message=f"no {modality}: {home.id}{mark}{suffix}.nii.gz"))
    if not sound_id(home.id):
        findings.append(Finding(patient=home.id, code="unusable", message="a folder's name is printable and has no \\"))
    return findings


def _endings(mark: str) -> str:
    return ", ".join(mark + suffix for suffix in _SUFFIXES[mark])


def _nothing(root: Path) -> str:
    inside = sorted(entry.name for entry in root.iterdir())
    folders = [_innermost(entry) for entry in sorted(root.iterdir()) if _is_visible_folder(entry)]
    like = [str(entry.relative_to(root)) for entry in folders if looks_like_msd(entry) or
            any(home.mark for home in _homes(entry))]
    if like:
        return f"{root} holds no patients itself; name one of the folders in it that do: {', '.join(like)}"
    own = next((name for name in inside for pattern in _NAMES.values() if pattern.fullmatch(name)), None)
    if own is not None:
        return f"{root} holds no patient folder but scans such as {own}: it is one patient's folder; name the one above"
    return (f"{root} holds no patient folder; expected {'; '.join(LAYOUTS.values())}; found "
            f"{', '.join(inside[:5]) or 'nothing'}")
