"""Defects and oddities of patients' files: stable codes, and their consequences."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from fedlab.core.errors import DataError

__all__ = ["CODES", "Broken", "Finding", "Severity", "bullets", "usable", "without_errors"]

Severity = Literal["error", "warning"]
#: How patients with errors are handled.
Broken = Literal["raise", "skip"]
_T = TypeVar("_T")

#: Every code with its meaning. Codes are stable; new ones may be added.
CODES: Mapping[str, str] = {
    "missing-modality": "FLAIR, T1, T1c or T2 is missing",
    "no-label": "there is no expert label map",
    "two-files": "two files claim to be the same modality",
    "two-folders": "two folders or rows carry the same patient id",
    "foreign-file": "a file name carries another patient's id",
    "unknown-file": "a file name has no ending of the layout",
    "other-layout": "the files are named as in another layout than those of the other patients",
    "no-file": "a file cannot be opened: missing, a folder, or a broken or circular link",
    "no-folder": "a table names a patient who has no scans",
    "not-in-table": "a patient has scans but no row in the table",
    "outside": "a path leads out of the data set's folder",
    "truncated": "a file ends too early",
    "corrupt": "a compressed file cannot be unpacked, or its checksum is wrong",
    "not-nifti": "a file is not a NIfTI file",
    "wrong-header": "a header is invalid for a brain scan",
    "oversized": "a header claims more voxels than the file can hold or than are read",
    "affines-differ": "sform and qform of a header disagree",
    "channels": "a 4-D file does not hold one volume per modality",
    "grids-differ": "the files of a patient lie on different grids",
    "not-finite": "some voxels are NaN or Inf",
    "blank": "every voxel of a volume has the same value",
    "empty-brain": "no voxel of any modality has a signal",
    "background": "the background is not 0",
    "cut-off": "a part of the brain is 0 in one modality only",
    "saturated": "many voxels share the largest value",
    "label-values": "the label map holds values outside its convention",
    "label-convention": "the label convention cannot be determined",
    "label-outside": "labelled voxels lie where every modality is 0",
    "no-tumour": "the label map is empty",
    "no-enhancing": "the tumour does not enhance; valid, but the Dice of ET then follows the rule for empty regions",
    "cavity": "a resection cavity counts as no tumour",
    "too-large": "the brain does not fit into the requested grid",
    "unusable": "any other defect",
}


@dataclass(frozen=True)
class Finding:
    """One defect or oddity of one patient's files.

    Attributes:
        patient: the pseudonym.
        code: one of `CODES`.
        message: a description with the file's name.
        severity: "error": the patient cannot be used; "warning": the patient can be used but should be checked.

    Raises:
        ValueError: an unknown code.
    """

    patient: str
    code: str
    message: str
    severity: Severity = "error"

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"a finding's code must be one of {', '.join(CODES)}, got {self.code!r}")

    def __str__(self) -> str:
        return f"{self.patient}: {self.message} [{self.code}]"


def without_errors(found: Mapping[str, _T], findings: Iterable[Finding]) -> dict[str, _T]:
    """The entries of the patients without errors."""
    bad = {f.patient for f in findings if f.severity == "error"}
    return {patient: entry for patient, entry in found.items() if patient not in bad}


def usable(found: Mapping[str, _T], findings: Sequence[Finding], *, broken: Broken,
           where: str | os.PathLike[str]) -> dict[str, _T]:
    """The entries of the patients without errors; raises or warns about the others in one message.

    Args:
        found: entries by patient.
        findings: about these patients, or about patients not in `found`.
        broken: "raise" stops at errors; "skip" continues without the affected patients and warns.
        where: the folder, for the message.

    Raises:
        DataError: there are errors and `broken` is "raise", or no patient is left.
        ValueError: an invalid `broken`.
    """
    if broken not in ("raise", "skip"):
        raise ValueError(f"broken must be 'raise' or 'skip', got {broken!r}")
    errors = [f for f in findings if f.severity == "error"]
    oddities = [f for f in findings if f.severity == "warning"]
    bad = {f.patient for f in errors}
    good = without_errors(found, errors)
    if errors and broken == "raise":
        raise DataError(f"{where}: problems with {len(bad)} of {len(good) + len(bad)} patients:\n{bullets(errors)}\n"
                        f"Repair the files, or pass broken='skip' (--skip-broken) to continue without these patients",
                        code=errors[0].code)
    if not good:
        raise DataError(f"{where}: no usable patient:\n{bullets(errors)}")
    if errors:
        warnings.warn(f"{where}: continuing without {len(bad)} patients:\n{bullets(errors)}", stacklevel=3)
    if oddities:
        warnings.warn(f"{where}:\n{bullets(oddities)}", stacklevel=3)
    return good


def bullets(items: Iterable[object]) -> str:
    """One line per item, for the text of an error."""
    return "\n".join(f"  - {item}" for item in items)
