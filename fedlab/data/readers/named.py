"""Scans whose modality is the end of their name, in any folders: UPENN-GBM, UCSF-PDGM, BraTS-TCGA, BIDS and the like.

The modality may also be the name of a file's folder: P1/T1/scan.nii.gz, 1_T1/NIFTI/T1.nii.gz (EGD), T1/P1.nii.gz.

Files with one beginning are of one patient, wherever they lie, such as label maps in a folder of their own. Where two
files claim to be the same scan, none is chosen, but for what the data sets themselves say: UCSF-PDGM stores each scan
also without its bias field, UPENN-GBM and BraTS-TCGA store label maps of a program beside those that experts corrected.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlab.core.text import counted
from fedlab.core.types import MODALITIES
from fedlab.data.readers.findings import Finding
from fedlab.data.readers.patient_files import Listing, PatientFiles, is_valid_id, scans_below, stem

__all__ = ["list_named"]

_DEEP = 6  # levels of folders: derivatives/PIPELINE/sub-01/ses-01/anat has five
_KINDS = {
    "FLAIR": r"(?:t2[-_ ]?)?flair|t2f", "T1": r"t1[wn]?|t1[-_ ]?pre", "T2": r"t2w?",
    "T1c": r"t1w?[-_ ]?(?:c|ce|gd|gad|post)|ct1",
    "label": r"segm?|dseg|segmentation|(?:brats[-_])?tumou?r[-_]?(?:seg|segmentation|mask)|automated_approx_segm"
             r"|glistrboost(?:_manuallycorrected)?",
}
_IMAGES = "|".join(f"(?P<{name}>{_KINDS[name]})" for name in MODALITIES)
_KIND = rf"(?:(?:brain_)?(?:{_IMAGES})(?P<bias>_bias)?|(?P<label>{_KINDS['label']}))"
_NAME = re.compile(rf"(?:(?P<id>.+?)[-_. ])??{_KIND}", re.IGNORECASE)
_FIRST = re.compile(rf"{_KIND}[-_. ](?P<id>.+)", re.IGNORECASE)
_FOLDER = re.compile(rf"(?:\d+[-_. ]+)?{_KIND}", re.IGNORECASE)  # folders of one modality
_NUMBERED_MASK = re.compile(r"\d+[-_. ]+mask", re.IGNORECASE)  # EGD's; other masks may be the brain's
_FORMAT = re.compile(r"nii|nifti|anat", re.IGNORECASE)  # folders that say nothing of the patient
_LABELS = re.compile(r"(?:images_)?(?:label|seg|mask|ground.?truth)", re.IGNORECASE)  # folders of label maps
#: Names by which the layouts of BraTS, which are read as such, are known.
_BRATS = re.compile(r".+(_t1ce|-t1c|-t1n|-t2f|-t2w)\.nii(?:\.gz)?", re.IGNORECASE)
_AUTOMATIC = re.compile(r"automated|glistrboost(?!_manuallycorrected)", re.IGNORECASE)
_PREDICTED = re.compile(r"pred|infer|output|result", re.IGNORECASE)  # folders whose label maps are no expert's


@dataclass(frozen=True)
class _Claim:
    """A file, the patient and the kind that its name states ("" where it begins with the kind)."""

    path: Path
    id: str
    kind: str
    bias: bool


def list_named(root: Path, *, stated: bool = False) -> Listing | None:
    """The patients of a folder by the ends of file names; None where it is in another layout, or has no such names.

    Args:
        root: the folder.
        stated: whether the user named this layout, so that names as in BraTS are read in this way too.
    """
    claims, others, ends = [], [], set[str]()
    closed: list[Path] = []
    for scan in scans_below(root, _DEEP, closed):
        if not stated and (match := _BRATS.fullmatch(scan.name)):
            ends.add(match[1].lower())
            if "_t1ce" in ends or ("-t1c" in ends and len(ends) > 1):
                return None
        claim = _claim(scan, root)
        if claim is None or (not claim.id and scan.parent == root) or (
                claim.kind == "label" and any(map(_PREDICTED.search, scan.relative_to(root).parts[:-1]))):
            others.append(scan)
        else:
            claims.append(claim)
    found = _by_patient(claims, root)
    for name, own in list(found.items()):  # of a person with one session, the label map may name the person alone
        sessions = [other for other in found if other.startswith(f"{name}_ses-")] if own.keys() == {"label"} else []
        if len(sessions) == 1 and "label" not in found[sessions[0]]:
            found[sessions[0]]["label"] = found.pop(name)["label"]
    whole = [name for name, own in found.items() if "T1c" in own and len(own.keys() & {*MODALITIES}) > 2]
    if not whole:
        return None
    files: dict[str, PatientFiles] = {}
    findings = [Finding(path.name, "no-file", f"{path.relative_to(root)} cannot be listed; allow to read it, or move "
                        f"it elsewhere") for path in closed]
    forms = {_form(name) for name in whole}
    stray: dict[str, Path] = {}
    passed = 0
    for name, own in found.items():
        images = own.keys() & {*MODALITIES}
        if len(images) > 1 or (images and _form(name) in forms):
            files[name], problems = _choose(name, own, root)
            findings += problems
            if all(problem.code != "two-files" for problem in problems):
                passed += sum(map(len, own.values())) - len(files[name].images) - (files[name].label is not None)
        elif images or not any(name.startswith(patient) for patient in whole):
            stray[name] = next(iter(own.values()))[0].path
        else:  # a mask of a patient's brain or the like
            others += [claim.path for claim in own["label"]]
    if stray:
        findings.append(Finding(min(stray), "elsewhere", f"{stray[min(stray)].relative_to(root)} is not read: no other "
                                f"scans have names that begin with {min(stray)}; {len(stray)} such in all", "warning"))
    example = next((own.images["T1c"] for own in files.values() if "T1c" in own.images), found[whole[0]]["T1c"][0].path)
    reason = f"{counted(len(files), 'patient')} with files named by their modality, such as {example.name}"
    if passed:
        reason += f"; {counted(passed, 'file')} passed over for a scan without bias field or a corrected label map"
    if others:
        reason += f"; {counted(len(others), 'other NIfTI file')} not read, such as {others[0].relative_to(root)}"
    return Listing(folder=root, layout="named", reason=reason, files=dict(sorted(files.items())),
                   findings=tuple(findings))


def _kind(match: re.Match[str]) -> str:
    return next(kind for kind in (*MODALITIES, "label") if match[kind])


def _home(folder: Path, root: Path) -> Path:
    """The folder of the patient: the first above that is named neither as a modality nor as a format."""
    while folder != root and (_FORMAT.fullmatch(folder.name) or _FOLDER.fullmatch(folder.name)
                              or _NUMBERED_MASK.fullmatch(folder.name)):
        folder = folder.parent
    return folder


def _by_folder(scan: Path, root: Path) -> _Claim | None:
    """What the names of its folders say of a file whose own name says nothing."""
    folder = scan.parent.parent if _FORMAT.fullmatch(scan.parent.name) else scan.parent
    if root not in folder.parents:
        return None
    if match := _FOLDER.fullmatch(folder.name):
        # In a folder of the whole data set, files are named as patients; in a patient's, as anything.
        return _Claim(scan, stem(scan) if _home(folder, root) == root else "", _kind(match), bool(match["bias"]))
    return _Claim(scan, "", "label", False) if _NUMBERED_MASK.fullmatch(folder.name) else None


def _claim(scan: Path, root: Path) -> _Claim | None:
    *entities, suffix = stem(scan).split("_")
    name = stem(scan)
    if name.lower().startswith("sub-") and entities and all("-" in entity for entity in entities):  # BIDS
        enhanced = suffix == "T1w" and any(entity.lower().startswith("ce-") for entity in entities)
        name = "_".join([*(entity for entity in entities if entity.lower().startswith(("sub-", "ses-"))),
                         "T1c" if enhanced else suffix])
    if (match := _NAME.fullmatch(name)) is None:
        match = _FIRST.fullmatch(name)
        if match is None or match["id"] != scan.parent.name:
            if claim := _by_folder(scan, root):
                return claim
            return _Claim(scan, name, "label", False) if _LABELS.match(scan.parent.name) else None
    return _Claim(scan, match["id"] or "", _kind(match), bool(match["bias"]))


def _by_patient(claims: Sequence[_Claim], root: Path) -> dict[str, dict[str, list[_Claim]]]:
    """The files by patient and kind. A patient's id is the folder's name where it is the shorter one and no other's."""
    plain = sorted({_home(claim.path.parent, root) for claim in claims if not claim.id})
    base = plain[0].parent if len(plain) == 1 else Path(os.path.commonpath([*plain])) if plain else root
    found: defaultdict[str, defaultdict[str, list[_Claim]]] = defaultdict(lambda: defaultdict(list))
    for claim in claims:
        found[claim.id or "_".join(_home(claim.path.parent, root).relative_to(base).parts)][claim.kind].append(claim)
    homes: defaultdict[str, set[str]] = defaultdict(set)
    for name, own in found.items():
        for home in {claim.path.parent.name for kind in own if kind != "label" for claim in own[kind]}:
            if name.startswith(home) and name[len(home):][:1] in ("_", "-", "."):
                homes[home].add(name)
    short = {names.pop(): home for home, names in homes.items() if len(names) == 1 and home not in found}
    return {short.get(name, name): dict(own) for name, own in found.items()}


def _form(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def _choose(name: str, own: Mapping[str, Sequence[_Claim]], root: Path) -> tuple[PatientFiles, list[Finding]]:
    """One patient's files; several of a kind become findings and are left out."""
    findings: list[Finding] = []
    images, label = {}, None
    corrected = all(any(claim.bias for claim in own.get(kind, ())) for kind in MODALITIES)
    for kind in (*MODALITIES, "label"):
        of_kind = [claim for claim in own.get(kind, ()) if kind == "label" or not corrected or claim.bias]
        expert = [claim for claim in of_kind if not _AUTOMATIC.search(str(claim.path.relative_to(root)))]
        chosen = (expert or of_kind) if kind == "label" else of_kind
        if len(chosen) > 1:
            both = " and ".join(str(claim.path.relative_to(root)) for claim in chosen)
            findings.append(Finding(name, "two-files", f"{both} all claim to be the {kind}; keep one, or write a table "
                                    f"of paths"))
        elif not chosen and kind != "label":
            findings.append(Finding(name, "missing-modality", f"no {kind}: no file of {name} has a name that ends as "
                                    f"that of one, such as {name}_{kind}.nii.gz"))
        elif chosen and not os.path.isfile(chosen[0].path):
            findings.append(Finding(name, "no-file", f"{chosen[0].path.relative_to(root)} is a folder, or a broken or "
                                    f"circular link"))
        elif chosen and kind == "label":
            label = chosen[0].path
            if not expert:
                findings.append(Finding(name, "automatic", f"{label.relative_to(root)} is the label map of a program, "
                                        f"which no expert corrected", "warning"))
        elif chosen:
            images[kind] = chosen[0].path
    if not is_valid_id(name):
        findings.append(Finding(name, "unusable", "a name must be printable and contain no \\"))
    return PatientFiles(id=name, images=images, label=label, layout="named"), findings
