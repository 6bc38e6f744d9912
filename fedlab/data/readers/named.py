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
    "FLAIR": r"(?:t2(?:wi?)?[-_ ]?)?flair|t2f", "T1": r"t1(?:wi?|n)?|t1(?:wi?)?[-_ ]?pre", "T2": r"t2(?:wi?)?",
    "T1c": r"t1(?:wi?)?[-_ ]?(?:\+?c|c\+|ce|km|gd|gad(?:o(?:linium)?)?|contrast|post(?:[-_ ]?(?:contrast|gd|gad))?)"
           r"|ct1|(?:ce|gd)[-_ ]?t1(?:wi?)?",
}
_SEGMENTED = r"segm?|dseg|segmentations?|(?:brats[-_])?tumou?r[-_]?(?:seg|segmentation|mask)|automated_approx_segm" \
             r"|glistrboost(?:_manuallycorrected)?"
#: Files, though not folders, are also label maps by these names. "mask" alone may be the brain's.
_SEGMENTED_FILE = rf"{_SEGMENTED}|seg[-_ ]?mask|(?:tumou?rs?|lesions?|labels?)(?:[-_ ]?(?:mask|seg|roi|labels?))?|roi" \
                  r"|gt|(?:ground[-_ ]?)?truth"
_IMAGES = "|".join(f"(?P<{name}>{_KINDS[name]})" for name in MODALITIES)
#: What programs append to the names of scans that they have made ready: brain alone, no bias field, registered.
_READY = r"[-_](?:bias|bet|hdbet|reg|registered|r2s|n4|ss|brain|stripped|skull[-_]?stripped)"
_PLANE = r"(?:brain|ax|axial|sag|sagittal|cor|coronal)[-_ ]"


def _pattern(label: str) -> str:
    return rf"(?:(?:{_PLANE})?(?:{_IMAGES})(?P<ready>(?:{_READY})+)?|(?P<label>{label}))"


_NAME = re.compile(rf"(?:(?P<id>.+?)[-_. ])??{_pattern(_SEGMENTED_FILE)}", re.IGNORECASE)
_FIRST = re.compile(rf"{_pattern(_SEGMENTED_FILE)}[-_. ](?P<id>.+)", re.IGNORECASE)
_FOLDER = re.compile(rf"(?:\d+[-_. ]+)?{_pattern(_SEGMENTED)}", re.IGNORECASE)  # folders of one modality
_SEGMENTATION = re.compile(rf"(?:.*[-_. ])?(?:{_SEGMENTED})", re.IGNORECASE)
_CONTRAST = re.compile(r"(?:(?P<id>.+)[-_. ])?(?P<kind>pre|post)", re.IGNORECASE)  # T1 before and after contrast
_ENHANCED = re.compile(r"ce-.+|acq-(?:(?!.*(?:pre|non?))(?:.*(?:post|gd|gad|contrast))|ce)", re.IGNORECASE)  # of BIDS
_TUMOUR = re.compile(r"(?:label|desc)-.*(?:tumou?r|lesion|glioma)", re.IGNORECASE)  # of a BIDS name
_OTHER_PARTS = re.compile(r"brain|aseg|aparc|tissue|-(?:gm|wm|csf)", re.IGNORECASE)
_LIKE_LABEL = re.compile(r"(?!.*brain).*(?:mask|seg|label|tumou?r|lesion|roi|truth)", re.IGNORECASE)
_NUMBERED_MASK = re.compile(r"\d+[-_. ]+mask", re.IGNORECASE)  # EGD's; other masks may be the brain's
_FORMAT = re.compile(r"nii|nifti|anat", re.IGNORECASE)  # folders that say nothing of the patient
_LABELS = re.compile(r"(?:images_)?(?:label|seg|mask|ground.?truth)", re.IGNORECASE)  # folders of label maps
#: Names by which the layouts of BraTS, which are read as such, are known.
_BRATS = re.compile(r".+(_t1ce|-t1c|-t1n|-t2f|-t2w)\.nii(?:\.gz)?", re.IGNORECASE)
_AUTOMATIC = re.compile(r"automated|glistrboost(?!_manuallycorrected)", re.IGNORECASE)
_PREDICTED = re.compile(r"pred|infer|output|result", re.IGNORECASE)  # folders whose label maps are no expert's


@dataclass(frozen=True)
class _Claim:
    """A file, the patient and the kind that its name states ("" where it begins with the kind), and what was done."""

    path: Path
    id: str
    kind: str
    ready: str


def is_expert_segmentation(path: Path) -> bool:
    """Whether a file is named as the segmentation of a tumour, and not as the brain's or a program's."""
    name = stem(path)
    return bool(_SEGMENTATION.fullmatch(name)) and not any(
        pattern.search(name) for pattern in (_OTHER_PARTS, _AUTOMATIC, _PREDICTED))


def list_named(root: Path, *, stated: bool = False) -> Listing | None:
    """The patients of a folder by the ends of file names; None where it is in another layout, or has no such names.

    Args:
        root: the folder.
        stated: whether the user named this layout, so that names as in BraTS are read in this way too.
    """
    closed: list[Path] = []
    if (read := _claims(root, stated, closed)) is None:
        return None
    claims, others = read
    found = _by_patient(claims, root)
    _join_label_maps(found)
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
    like_labels = [scan for scan in others if _LIKE_LABEL.fullmatch(stem(scan)) and not _is_predicted(scan, root)]
    if like_labels and not any(own.label for own in files.values()):
        findings.append(Finding(min(files), "no-label", f"no file is named as a label map; "
                                f"{like_labels[0].relative_to(root)} and the like are not read: name them _seg, or "
                                f"write a table of paths, if they are label maps of tumours", "warning"))
    if stray:
        findings.append(Finding(min(stray), "elsewhere", f"{stray[min(stray)].relative_to(root)} is not read: no other "
                                f"scans have names that begin with {min(stray)}; {len(stray)} such in all", "warning"))
    example = next((own.images["T1c"] for own in files.values() if "T1c" in own.images), found[whole[0]]["T1c"][0].path)
    reason = f"{counted(len(files), 'patient')} with files named by their modality, such as {example.name}"
    if passed:
        reason += (f"; {counted(passed, 'file')} passed over for a scan without bias field, one made ready, or a "
                   f"better label map")
    if others:
        reason += f"; {counted(len(others), 'other NIfTI file')} not read, such as {others[0].relative_to(root)}"
    return Listing(folder=root, layout="named", reason=reason, files=dict(sorted(files.items())),
                   findings=tuple(findings))


def _claims(root: Path, stated: bool, closed: list[Path]) -> tuple[list[_Claim], list[Path]] | None:
    """What each file's name states, and the files that state nothing; None for names of BraTS, unless stated."""
    claims, others, ends = [], [], set[str]()
    for scan in scans_below(root, _DEEP, closed):
        if not stated and (match := _BRATS.fullmatch(scan.name)):
            ends.add(match[1].lower())
            if "_t1ce" in ends or ("-t1c" in ends and len(ends) > 1):
                return None
        claim = _claim(scan, root)
        if claim is None or (not claim.id and scan.parent == root) or (
                claim.kind == "label" and _is_predicted(scan, root)):
            others.append(scan)
        else:
            claims.append(claim)
    return claims, others


def _join_label_maps(found: dict[str, dict[str, list[_Claim]]]) -> None:
    """Gives label maps to their patients where they name the person of one session alone, or write p1 for P1."""
    for name in [name for name, own in found.items() if own.keys() == {"label"}]:
        for alike in ([other for other in found if other.startswith(f"{name}_ses-")],
                      [other for other in found if other != name and other.casefold() == name.casefold()]):
            if name in found and len(alike) == 1 and "label" not in found[alike[0]]:
                found[alike[0]]["label"] = found.pop(name)["label"]


def _is_predicted(scan: Path, root: Path) -> bool:
    return any(map(_PREDICTED.search, scan.relative_to(root).parts[:-1]))


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
        return _Claim(scan, stem(scan) if _home(folder, root) == root else "", _kind(match), match["ready"] or "")
    return _Claim(scan, "", "label", "") if _NUMBERED_MASK.fullmatch(folder.name) else None


def _claim(scan: Path, root: Path) -> _Claim | None:
    *entities, suffix = stem(scan).split("_")
    name = stem(scan)
    if name.lower().startswith("sub-") and entities and all("-" in entity for entity in entities):
        name = _bids(entities, suffix)
    if (match := _NAME.fullmatch(name)) is None:
        match = _FIRST.fullmatch(name)
        if match is None or match["id"] != scan.parent.name:
            if claim := _by_folder(scan, root) or _before_or_after(scan):
                return claim
            return _Claim(scan, name, "label", "") if _LABELS.match(scan.parent.name) else None
    return _Claim(scan, match["id"] or "", _kind(match), match["ready"] or "")


def _bids(entities: Sequence[str], suffix: str) -> str:
    """The name without what a BIDS name states beside person, session and kind."""
    about = [entity for entity in entities if not entity.lower().startswith(("sub-", "ses-"))]
    kind = suffix
    if suffix == "T1w" and any(map(_ENHANCED.fullmatch, about)):
        kind = "T1c"
    elif suffix in ("mask", "dseg", "roi"):
        stated = [entity for entity in about if entity.lower().startswith(("label-", "desc-"))]
        other = suffix == "mask" or any(map(_OTHER_PARTS.search, stated))  # the brain's or its tissues'
        kind = "dseg" if any(map(_TUMOUR.fullmatch, stated)) or not other else f"of-{suffix}"
    return "_".join([*(entity for entity in entities if entity not in about), kind])


def _before_or_after(scan: Path) -> _Claim | None:
    """A T1 that is named only by whether it was taken before or after contrast."""
    match = _CONTRAST.fullmatch(stem(scan))
    if match is None or (match["id"] and _NAME.fullmatch(match["id"])):  # P1_FLAIR_pre was taken before something else
        return None
    return _Claim(scan, match["id"] or "", "T1" if match["kind"].lower() == "pre" else "T1c", "")


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
    ready = all(any(claim.ready for claim in own.get(kind, ())) for kind in MODALITIES)
    for kind in (*MODALITIES, "label"):
        of_kind = list(own.get(kind, ()))
        # UCSF-PDGM has all four scans without their bias fields; where one lacks, no set of four is the one meant.
        if kind != "label" and (ready or not any("bias" in claim.ready.lower() for claim in of_kind)):
            of_kind = [claim for claim in of_kind if bool(claim.ready) == ready] or of_kind
        expert = [claim for claim in of_kind if not _AUTOMATIC.search(str(claim.path.relative_to(root)))]
        chosen = (expert or of_kind) if kind == "label" else of_kind
        if kind == "label" and len(chosen) > 1:  # a segmentation comes before a region of interest and the like
            chosen = [claim for claim in chosen if _SEGMENTATION.fullmatch(stem(claim.path))] or chosen
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
