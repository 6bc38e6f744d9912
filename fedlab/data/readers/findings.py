"""What is wrong, or odd, with a patient's files: stable codes, and what follows from them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from fedlab.core.errors import DataError

__all__ = ["CODES", "Broken", "Finding", "Severity", "listing", "settle"]

Severity = Literal["error", "warning"]
#: What becomes of patients with errors.
Broken = Literal["raise", "skip"]
_Kept = TypeVar("_Kept")

#: Every code, with what it means. The names don't change; new ones may come.
CODES: Mapping[str, str] = {
    "missing-modality": "one of FLAIR, T1, T1c, T2 isn't there",
    "no-label": "there is no expert's label map",
    "two-files": "two files claim to be the same modality",
    "two-folders": "two folders or rows carry the same patient's id",
    "foreign-file": "a file is named with another patient's id",
    "unknown-file": "a file's name says nothing that the layout knows",
    "other-layout": "the files are named as in another layout than the other patients'",
    "no-file": "a file can't be opened: missing, a folder, a link that leads nowhere or in a circle",
    "no-folder": "a table names a patient who has no scans",
    "not-in-table": "a patient has scans but stands in no row of the table",
    "outside": "a path leads out of the data set's folder",
    "truncated": "a file ends too early",
    "corrupt": "a compressed file doesn't unpack, or its checksum is wrong",
    "not-nifti": "a file is no NIfTI file",
    "wrong-header": "a header makes no sense for a brain scan",
    "oversized": "a header claims more voxels than the file can hold or than are read",
    "affines-differ": "sform and qform of a header disagree",
    "channels": "a 4-D file holds another number of volumes than there are modalities",
    "grids-differ": "the files of a patient don't lie on one grid",
    "not-finite": "some voxels are NaN or Inf",
    "blank": "every voxel of a volume has the same value",
    "empty-brain": "no voxel of any modality has a signal",
    "background": "the background isn't 0",
    "cut-off": "a part of the brain is 0 in one modality alone",
    "saturated": "many voxels share the largest value",
    "label-values": "the label map holds values outside its convention",
    "label-convention": "which label convention is used can't be told",
    "label-outside": "labelled voxels lie where every modality is 0",
    "no-tumour": "the label map is empty",
    "no-enhancing": "the tumour doesn't enhance; legal, but Dice of ET then rests on a rule",
    "cavity": "a resection cavity counts as no tumour",
    "too-large": "the brain doesn't fit into the grid asked for",
    "unusable": "something else",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, or odd, with one patient's files.

    Attributes:
        patient: the pseudonym.
        code: one of `CODES`.
        message: what was found, in words, with the file's name.
        severity: "error": the patient can't be used; "warning": the patient can, but look.

    Raises:
        ValueError: an unknown code.
    """

    patient: str
    code: str
    message: str
    severity: Severity = "error"

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"a finding's code is one of {', '.join(CODES)}, got {self.code!r}")

    def __str__(self) -> str:
        return f"{self.patient}: {self.message} [{self.code}]"


def settle(found: Mapping[str, _Kept], findings: Sequence[Finding], *, broken: Broken,
           where: str | os.PathLike[str]) -> dict[str, _Kept]:
    """The patients without errors; raises or warns about the others, everything listed at once.

    Args:
        found: what there is, by patient.
        findings: about any of them, or about patients who aren't in `found`.
        broken: "raise" stops at errors; "skip" goes on without those patients and warns.
        where: the folder, for the message.

    Raises:
        DataError: there are errors and `broken` is "raise", or no patient is left.
        ValueError: `broken` is neither.
    """
    check_broken(broken)
    errors = [f for f in findings if f.severity == "error"]
    odd = [f for f in findings if f.severity == "warning"]
    bad = {f.patient for f in errors}
    good = {name: kept for name, kept in found.items() if name not in bad}
    if errors and broken == "raise":
        raise DataError(f"{where}: problems with {len(bad)} of {len(good) + len(bad)} patients:\n{listing(errors)}\n"
                        f"Mend them, or say broken='skip' (--skip-broken) to go on without these patients",
                        code=errors[0].code)
    if not good:
        raise DataError(f"{where}: no usable patient:\n{listing(errors)}")
    if errors:
        warnings.warn(f"{where}: going on without {len(bad)} patients:\n{listing(errors)}", stacklevel=3)
    if odd:
        warnings.warn(f"{where}:\n{listing(odd)}", stacklevel=3)
    return good


def check_broken(broken: str) -> None:
    """Refuses anything but "raise" and "skip"."""
    if broken not in ("raise", "skip"):
        raise ValueError(f"broken is 'raise' or 'skip', got {broken!r}")


def listing(items: Iterable[object]) -> str:
    """One line an item, for an error's text."""
    return "\n".join(f"  - {item}" for item in items)
