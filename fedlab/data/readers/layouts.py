"""The layout of a folder of scans, determined from names alone: every published layout of BraTS and its relatives.

BraTS 2018 to 2021 (Bakas et al. 2017; Baid et al. 2021, arXiv:2107.02314), FeTS (Pati et al. 2021, arXiv:2105.05874),
BraTS 2023 and later, Medical Segmentation Decathlon (Antonelli et al. 2022), raw data of nnU-Net (Isensee et al. 2021),
and tables of paths for anything else. The patients of BraTS may also lie together in one folder.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedlab.core.errors import DataError
from fedlab.core.text import counted
from fedlab.core.types import MODALITIES
from fedlab.data.readers.decathlon import list_msd, looks_like_msd
from fedlab.data.readers.findings import Finding, without_errors
from fedlab.data.readers.named import is_expert_segmentation, list_named
from fedlab.data.readers.other_formats import find_other_format
from fedlab.data.readers.patient_files import (
    Listing,
    PatientFiles,
    is_broken_link,
    is_circular_link,
    is_nifti,
    is_valid_id,
    is_visible_folder,
    scans_below,
    stem,
)
from fedlab.data.readers.tables import TABLES, find_path_table, list_table, merge_columns
from fedlab.data.sites.persons import person_of

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
    "nnunet": "imagesTr/CASE_0000.nii.gz, _0001, ..., labelsTr/ and dataset.json, one file per modality",
    "named": "files that end in _FLAIR, _T1, _T1c or _T1Gd, _T2, _segm and the like, in any folders, or whose folders "
             "are named so (UPENN-GBM, UCSF-PDGM, BraTS-TCGA, EGD, BIDS)",
    "table": "a CSV file of paths with the columns patient, flair, t1, t1c, t2, label",
}
_SUFFIXES: Mapping[str, Mapping[str, str]] = {
    "_": {"flair": "FLAIR", "t1": "T1", "t1ce": "T1c", "t2": "T2", "seg": "label"},
    "-": {"t2f": "FLAIR", "t1n": "T1", "t1c": "T1c", "t2w": "T2", "seg": "label"},
}
_NAMES = {mark: re.compile(rf"(?P<id>.+){mark}(?P<kind>{'|'.join(kinds)})\.nii(\.gz)?", re.IGNORECASE)
          for mark, kinds in _SUFFIXES.items()}
_STATE_NAMED = "layout='named' (--layout named), which reads files of any folders by their names"
_GRADES = ("HGG", "LGG")
#: Names of folders that keep apart what must not be mixed.
_SPLITS = re.compile(r"(?:train(?:ing)?|val(?:id(?:ation)?)?|test(?:ing)?)(?![a-z])", re.IGNORECASE)


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
        if (named := _named(folder, root, layout)) is not None:
            root, listing = folder, named
        else:
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
        if looks_like_msd(inner) or _tables(inner) or _find_folders(inner) or _find_together(inner):
            return inner
        inside = [entry for entry in sorted(inner.iterdir()) if is_visible_folder(entry)]
        if len(inside) != 1:
            break
        inner = inside[0]
    return folder


def _named(folder: Path, root: Path, layout: str | None) -> Listing | None:
    """The patients of the layout "named" if it is stated, or if no file tells another one but a table of paths."""
    if layout not in (None, "named") or (layout is None and looks_like_msd(root)):
        return None
    listing = list_named(folder, stated=layout is not None)
    if listing is None and layout is not None:
        raise DataError(f"{folder} contains no patient with at least three scans in the layout {layout!r}: "
                        f"{LAYOUTS[layout]}")
    if listing is not None and layout is None and (table := find_path_table(root)) is not None:
        return list_table(table)
    return listing


def _list(root: Path, layout: str | None) -> Listing:
    if layout in ("msd", "nnunet"):
        return list_msd(root)
    if layout == "table":
        if (table := find_path_table(root)) is None:
            raise DataError(f"{root} contains no CSV file with the columns patient, flair, t1, t1c and t2")
        return list_table(table)
    folders = _find_folders(root)
    crowded = [folder for folder in folders if folder.is_crowded]
    if layout is None and all(not folder.mark or folder in crowded for folder in folders):
        if looks_like_msd(root):
            return list_msd(root)
        if (table := find_path_table(root)) is not None:
            return list_table(table)
    if len(crowded) == 1 == len(folders):
        if not _elsewhere(root, folders):
            return _list(crowded[0].path, layout)
        folders = []
    elif not folders or len(crowded) == len(folders):
        folders = _find_together(root)
    if not folders:
        if layout is None and (listing := _anywhere(root)) is not None:
            return listing
        raise DataError(_no_patients(root))
    marks = Counter(folder.mark for folder in folders if folder.mark)
    if layout is None and len(marks) == 2 and marks["_"] == marks["-"]:
        raise DataError(f"{root}: as many patients are named as in BraTS 2021 (_t1ce) as in BraTS 2023 (-t1c); pass "
                        f"layout='brats2021' or 'brats2023' (--layout on the command line)")
    if layout is not None:
        mark = "-" if layout == "brats2023" else "_"
    elif marks:
        mark = marks.most_common(1)[0][0]
    else:
        examples = ", ".join(path.name for folder in folders[:2] for path in folder.scans[:3])
        raise DataError(f"{root}: {counted(len(folders), 'folder')} with scans, but their names match no layout: "
                        f"{examples}. Expected {'; '.join(LAYOUTS.values())}. For any other layout write a table of "
                        f"paths")
    listing = _list_folders(root, folders, mark, layout)
    if layout is None and not without_errors(listing.files, listing.findings):
        return _with_longer_names(root, folders) or listing
    return listing


def _with_longer_names(root: Path, folders: Sequence[_Folder]) -> Listing | None:
    """The patients of folders in which no name is quite as in BraTS: P1/P1_time1_t1ce, P1/P1_t1_bet.

    None if one of them has a problem still, or carries a name that is not its folder's with an addition.
    """
    found = list_named(root, stated=True)
    if found is None or len(without_errors(found.files, found.findings)) < len(found.files):
        return None
    names = {folder.path: folder.id for folder in folders}
    whole = all(name.lower().startswith(names.get(scan.parent, "\0").lower())
                for name, files in found.files.items() for scan in files.images.values())
    return found if whole and {scan.parent for files in found.files.values() for scan in files.images.values()} \
        == set(names) else None


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """The files of one patient.

    Attributes:
        id: the name of the folder, or the beginning of the files' names where all patients lie in one folder.
        path: the folder.
        grade: "HGG" or "LGG" where it lies in a folder of that name, else "".
        scans: the patient's NIfTI files.
        others: the other files in the folder of a patient.
        links: broken or circular links in it, or the folder itself if it is one.
        error: why it cannot be listed.
    """

    id: str
    path: Path
    grade: str = ""
    scans: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()
    links: tuple[Path, ...] = ()
    error: str = ""

    @property
    def mark(self) -> str:
        """The separator of most names, "_" or "-"; "" where no name matches."""
        marks = Counter(mark for scan in self.scans for mark, name in _NAMES.items() if name.fullmatch(scan.name))
        return marks.most_common(1)[0][0] if marks else ""

    @property
    def is_named(self) -> bool:
        """Whether a scan carries the name of the folder."""
        return any(_same_id(name, self.id) for name in _by_id(self.scans))

    @property
    def has_images(self) -> bool:
        """Whether a scan is named as a FLAIR, T1, T1c or T2."""
        return any((match := name.fullmatch(scan.name)) and _SUFFIXES[mark][match["kind"].lower()] in MODALITIES
                   for scan in self.scans for mark, name in _NAMES.items())

    @property
    def form(self) -> str:
        """The name with any number as 0, which patients of one data set share."""
        return re.sub(r"\d", "0", self.id)

    @property
    def is_crowded(self) -> bool:
        """Whether it holds scans of several patients."""
        return len(_by_id(self.scans)) > 1 and not self.is_named


def _same_id(one: str, other: str) -> bool:
    """Whether two names of a patient differ at most in upper and lower case and in the Unicode form of accents."""
    one, other = (unicodedata.normalize("NFC", name).casefold() for name in (one, other))
    return one == other


def _find_folders(root: Path) -> list[_Folder]:
    """The folders below `root`, or below its HGG/ and LGG/, that contain scans or are named like those that do."""
    found = []
    for entry in sorted(root.iterdir()):
        grade = entry.name.upper() if entry.name.upper() in _GRADES and is_visible_folder(entry) else ""
        inside = sorted(entry.iterdir()) if grade else [entry]
        found += [_read_folder(path, grade) for path in inside
                  if (not is_nifti(path) if _is_bad_link(path) else is_visible_folder(path))]
    forms = {folder.form for folder in found if folder.scans}
    found = [folder for folder in found if folder.scans or (
        forms and (folder.error or folder.links or folder.form in forms))]
    sure = {folder.form for folder in found if folder.is_named and folder.has_images}
    # Beside patients, a folder of predictions, masks or several patients' scans is none.
    return [folder for folder in found if not sure or not folder.scans or folder.form in sure or folder.is_named
            or (folder.has_images and not folder.is_crowded)]


def _find_together(root: Path) -> list[_Folder]:
    """The patients whose scans lie in `root` itself; a file of unknown name goes to the id with which it begins."""
    scans = [entry for entry in sorted(root.iterdir()) if is_nifti(entry)]
    found = _by_id(scans)
    if not found or root.name in found:  # the folder of one patient
        return []
    for scan in sorted(set(scans).difference(*found.values())):
        found[max((name for name in found if scan.name.startswith(name)), key=len, default=min(found))].append(scan)
    return [_Folder(id=name, path=root, scans=tuple(own)) for name, own in found.items()]


def _by_id(scans: Iterable[Path]) -> dict[str, list[Path]]:
    """The scans whose names follow a layout, by the patient's id."""
    found: dict[str, list[Path]] = {}
    for scan in scans:
        for match in filter(None, (pattern.fullmatch(scan.name) for pattern in _NAMES.values())):
            found.setdefault(match["id"], []).append(scan)
    return found


def _places(root: Path) -> list[Path]:
    """The folder itself and its HGG/ and LGG/."""
    return [root, *(entry for entry in sorted(root.iterdir())
                    if entry.name.upper() in _GRADES and is_visible_folder(entry))]


def _elsewhere(root: Path, folders: Sequence[_Folder]) -> dict[Path, list[str]]:
    """The places below `root` with scans named as in a layout that are in none of the folders, and the ids there."""
    read = {folder.path for folder in folders}
    places = _places(root)
    found: dict[Path, list[str]] = {}
    for place in places:
        inside = sorted(place.iterdir())
        if place not in read:
            found[place] = sorted(_by_id(filter(is_nifti, inside)))
        found |= {entry: sorted(_by_id(scans_below(entry))) for entry in inside
                  if is_visible_folder(entry) and entry not in read and entry not in places}
    return {place: ids for place, ids in found.items() if ids}


def _tables(folder: Path, start: str = "") -> list[Path]:
    """The tables of a folder whose names begin with `start`, in upper or lower case."""
    return sorted(path for path in folder.iterdir()
                  if path.suffix.lower() in TABLES and path.name.lower().startswith(start))


def _is_bad_link(entry: Path) -> bool:
    return is_broken_link(entry) or is_circular_link(entry)


def _read_folder(path: Path, grade: str) -> _Folder:
    if _is_bad_link(path):
        return _Folder(id=path.name, path=path, grade=grade, links=(path,))
    try:
        inside = sorted(path.iterdir())
    except OSError as error:
        return _Folder(id=path.name, path=path, grade=grade, error=f"cannot be listed ({error.strerror})")
    scans = tuple(entry for entry in inside if is_nifti(entry))
    links = tuple(entry for entry in inside if not is_nifti(entry) and _is_bad_link(entry))
    others = tuple(entry for entry in inside if not is_nifti(entry) and not entry.name.startswith("."))
    return _Folder(id=path.name, path=path, grade=grade, scans=scans, others=others, links=links if scans else ())


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
    for place, ids in _elsewhere(root, folders).items():
        where = "beside the patients' folders" if place == root else f"in {place.relative_to(root)}"
        findings.append(Finding(ids[0] if place == root else str(place.relative_to(root)), "elsewhere",
                                f"scans of {counted(len(ids), 'patient')} ({', '.join(ids[:3])}"
                                f"{', …' if len(ids) > 3 else ''}) lie {where} and are not read; move them to where "
                                f"those of the other patients lie, or read them as a folder of their own", "warning"))
    read = {folder.path for folder in folders}
    for entry in (entry for place in _places(root) for entry in sorted(place.iterdir())
                  if is_visible_folder(entry) and entry not in read):
        inside = list(scans_below(entry, 0))
        if inside and not _by_id(inside):
            findings.append(Finding(str(entry.relative_to(root)), "elsewhere", f"{entry.name} is not read as a "
                                    f"patient: of {counted(len(inside), 'file')} such as {inside[0].name} none is "
                                    f"named as a FLAIR, T1, T1c or T2", "warning"))
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
    if folders[0].path == root:
        count = f"{counted(len(folders), 'patient')} in one folder"
    if mark == "-":
        return "brats2023", f"{count} with files named -t1n, -t1c, -t2w, -t2f", []
    graded = any(folder.grade for folder in folders)
    mapping = [path for place in (root, *(root / name for name in _GRADES)) if place.is_dir()
               for path in _tables(place, "name_mapping")]
    partition = _tables(root, "partitioning_")
    tables = [*mapping, *partition, *_tables(root, "survival")]
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
    unknown: list[Path] = []
    for path in map(_unpacked, folder.scans):
        match, other = (_NAMES[key].fullmatch(path.name) for key in (mark, "-" if mark == "_" else "_"))
        if match is None and other is not None and _same_id(other["id"], folder.id):
            findings.append(Finding(folder.id, "other-layout", f"{path.name} is named as in "
                                    f"{'BraTS 2023' if mark == '_' else 'BraTS 2018 to 2021'}, unlike most files here; "
                                    f"label values have other meanings there"))
        elif match is None:
            unknown.append(path)
        elif not _same_id(match["id"], folder.id):
            findings.append(Finding(folder.id, "foreign-file", f"expected {folder.id}{path.name[match.end('id'):]}, "
                                    f"but {path.name} carries another patient's id"))
        elif not os.path.isfile(path):
            findings.append(Finding(folder.id, "no-file", f"{path.name} is a folder, or a broken or circular link"))
        else:
            kinds.setdefault(_SUFFIXES[mark][match["kind"].lower()], []).append(path)
    segmentations = [path for path in unknown if is_expert_segmentation(path)]
    if set(kinds) == set(MODALITIES) and len(segmentations) == 1:  # as in BraTS 2020, patient 355
        kinds["label"] = segmentations
        findings.append(Finding(folder.id, "label-name", f"{segmentations[0].name} is read as the label map, the only "
                                f"file here that is named as one; expected {folder.id}{mark}seg.nii.gz", "warning"))
    endings = ", ".join(mark + suffix for suffix in _SUFFIXES[mark])
    findings += [Finding(folder.id, "unknown-file", f"{path.name} is ignored: its name has none of the endings "
                         f"{endings}; rename it if it is one of them, or write a table of paths", "warning")
                 for path in unknown if path not in kinds.get("label", ())]
    findings += [Finding(folder.id, "two-files", f"{' and '.join(path.name for path in paths)} both claim to be the "
                         f"{kind}; keep one") for kind, paths in kinds.items() if len(paths) > 1]
    for suffix, modality in _SUFFIXES[mark].items():
        if modality not in kinds:
            wanted = f"{folder.id}{mark}{suffix}"
            alike = [path.name for path in folder.others if path.name.lower().startswith(f"{wanted}.".lower())]
            hint = f"; {alike[0]} is not named as a NIfTI file: convert or rename it" if alike else ""
            if modality != "label":
                findings.append(Finding(folder.id, "missing-modality", f"no {modality}: {wanted}.nii.gz{hint}"))
            elif alike:
                findings.append(Finding(folder.id, "no-label", f"no {wanted}.nii.gz{hint}", "warning"))
    if not is_valid_id(folder.id):
        findings.append(Finding(folder.id, "unusable", "a name must be printable and contain no \\"))
    images = {modality: kinds[modality][0] for modality in MODALITIES if modality in kinds}
    return PatientFiles(id=folder.id, images=images, label=kinds.get("label", [None])[0]), findings


def _unpacked(path: Path) -> Path:
    """The scan of the same name in a folder that is named as a scan, as some programs unpack it; or the path itself."""
    try:
        inside = [entry for entry in path.iterdir() if is_nifti(entry)] if is_visible_folder(path) else []
    except OSError:
        return path
    return inside[0] if len(inside) == 1 and _same_id(stem(inside[0]), stem(path)) else path


def _anywhere(root: Path) -> Listing | None:
    """The patients by the names of files in any folders, where no subfolder has them all to itself.

    None if the folder is that of one patient, if its subfolders are cohorts of different patients or the splits of a
    data set, of which the user chooses, or if two files claim to be the same scan.
    """
    places = _elsewhere(root, ())
    splits = [place for place in places if _SPLITS.match(place.name)]
    apart = len(set().union(*places.values())) == sum(map(len, places.values()))
    persons = all(person_of(one) == place.name.upper() for place, ids in places.items() for one in ids)
    if root in places or len(splits) > 1 or (apart and not persons and _cohorts(root)):
        return None
    listing = list_named(root, stated=True)
    return listing if listing and all(finding.code != "two-files" for finding in listing.findings) else None


def _cohorts(root: Path) -> list[str]:
    """The subfolders that hold patients, by their paths below `root`."""
    candidates = [_innermost(entry) for entry in sorted(root.iterdir()) if is_visible_folder(entry)]
    return [str(entry.relative_to(root)) for entry in candidates
            if looks_like_msd(entry) or _find_together(entry)
            or any(folder.is_named or folder.is_crowded for folder in _find_folders(entry))]


def _no_patients(root: Path) -> str:
    """Why a folder holds no patients, for the text of an error."""
    entries = sorted(root.iterdir())
    if like := _cohorts(root):
        together = (f"; to read several together, write a table of paths, {LAYOUTS['table']}, or state "
                    f"{_STATE_NAMED}") if len(like) > 1 else ""
        return f"{root} contains no patients itself; give one of its subfolders that do: {', '.join(like)}{together}"
    if scan := next(iter(_by_id(entries).values()), None):
        return f"{root} contains scans such as {scan[0].name}: it is one patient's folder; give the folder above it"
    if deep := next(scans_below(root), None):
        return (f"{root}: its scans lie deeper than in any layout, such as {deep.relative_to(root)}; move those of "
                f"each patient into one folder <ID>/, write a table of paths, {LAYOUTS['table']}, or state "
                f"{_STATE_NAMED}")
    if other := find_other_format(root):
        path, kind, how = other
        if kind == "archive":
            return f"{root} holds packed folders such as {path.relative_to(root)}; unpack them and give that folder"
        return (f"{root} holds {kind} files such as {path.relative_to(root)}; convert them to NIfTI, {how}, then "
                f"register them and remove the skull where that has not been done")
    return (f"{root} contains no patient folder; expected {'; '.join(LAYOUTS.values())}; found "
            f"{', '.join(entry.name for entry in entries[:5]) or 'nothing'}")
