"""Defects and oddities of patients' files: stable codes, and their consequences."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from fedlab.core.errors import DataError
from fedlab.core.files import packaged_toml
from fedlab.core.text import counted

__all__ = ["CODES", "Broken", "Finding", "Severity", "bullets", "usable", "without_errors"]

Severity = Literal["error", "warning"]
#: How patients with errors are handled.
Broken = Literal["raise", "skip"]
_T = TypeVar("_T")

#: Every code with its meaning.
CODES: Mapping[str, str] = packaged_toml("fedlab.data.readers", "findings.toml")


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
        findings: also about patients not in `found`.
        broken: "raise" stops at errors; "skip" continues without the affected patients and warns.
        where: the folder, for the message.

    Raises:
        DataError: there are errors and `broken` is "raise", or no patient is left.
        ValueError: an invalid `broken`.
    """
    if broken not in ("raise", "skip"):
        raise ValueError(f"broken must be 'raise' or 'skip', got {broken!r}")
    each = dict.fromkeys(findings)  # once: headers are checked before and with the voxels
    errors, oddities = ([f for f in each if f.severity == severity] for severity in ("error", "warning"))
    bad = {f.patient for f in errors}
    good = without_errors(found, errors)
    if errors and broken == "raise":
        counts = f"{len(bad)} of {counted(len(good) + len(bad), 'patient')}"
        others = ", or pass broken='skip' (--skip-broken) to continue without these patients" if good else ""
        raise DataError(f"{where}: problems with {counts}:\n{bullets(errors)}\nRepair the files{others}",
                        code=errors[0].code)
    if not good:
        raise DataError(f"{where}: no usable patient:\n{bullets(errors)}")
    if errors:
        warnings.warn(f"{where}: continuing without {counted(len(bad), 'patient')}:\n{bullets(errors)}", stacklevel=3)
    if oddities:
        warnings.warn(f"{where}:\n{bullets(oddities)}", stacklevel=3)
    return good


def bullets(items: Iterable[object]) -> str:
    """One line per item, for the text of an error."""
    return "\n".join(f"  - {item}" for item in items)
