"""Which files belong to which patient, whatever the layout they came in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from fedlab.core.types import MODALITIES
from fedlab.data.readers.findings import Finding

__all__ = ["Listing", "PatientFiles", "is_nifti", "leads_back", "leads_nowhere", "sound_id", "stem"]

_NOTHING: Mapping[str, str] = MappingProxyType({})
_NO_CHANNELS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class PatientFiles:
    """Where one patient's scans are, and how to read them.

    Attributes:
        id: the patient's pseudonym.
        images: a file for each name in `fedlab.core.types.MODALITIES`.
        label: the file of the expert's label map, or None.
        layout: how the files were found, see `fedlab.data.readers.layouts.LAYOUTS`.
        label_convention: one of `fedlab.data.readers.conventions.CONVENTIONS`; None where it isn't known yet.
        channels: which volume of a 4-D file is which modality; empty where each has a file of its own.
        columns: what tables beside the scans say about the patient, such as {"grade": "HGG"}.
    """

    id: str
    images: Mapping[str, Path]
    label: Path | None = None
    layout: str = "brats2021"
    label_convention: str | None = None
    channels: Mapping[str, int] = field(default_factory=lambda: _NO_CHANNELS)
    columns: Mapping[str, str] = field(default_factory=lambda: _NOTHING)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities there is a file for, in the order of `fedlab.core.types.MODALITIES`."""
        return tuple(name for name in MODALITIES if name in self.images)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The patients of a folder by their names alone: no file has been opened.

    Attributes:
        folder: where the patients are; a sub-folder where the folder given holds nothing else.
        layout: one of `fedlab.data.readers.layouts.LAYOUTS`.
        reason: why it is that layout.
        files: by patient, sorted; a patient with errors may lack files.
        findings: what is wrong with names and tables.
        described: what dataset.json says each label value is; None where nothing does.
    """

    folder: Path
    layout: str
    reason: str
    files: Mapping[str, PatientFiles]
    findings: tuple[Finding, ...] = ()
    described: Mapping[int, str] | None = None


def is_nifti(path: Path) -> bool:
    """Whether a name ends as NIfTI files do; what begins with a dot is a system's, not a scan."""
    return path.name.lower().endswith((".nii", ".nii.gz")) and not path.name.startswith(".")


def stem(path: Path) -> str:
    """The name without .nii or .nii.gz."""
    lower = path.name.lower()
    return path.name[:-7] if lower.endswith(".nii.gz") else path.name[:-4] if lower.endswith(".nii") else path.name


def leads_nowhere(path: Path) -> bool:
    """Whether it is a link whose end isn't there, or a circle of links."""
    return path.is_symlink() and not os.path.exists(path)


def leads_back(path: Path) -> bool:
    """Whether it is a link to a folder that it lies in."""
    try:
        return path.is_symlink() and path.resolve(strict=True) in path.parent.resolve(strict=True).joinpath("x").parents
    except (OSError, RuntimeError):  # a circle
        return False


def sound_id(name: str) -> bool:
    """Whether a pseudonym can stand in a file's name: it isn't empty, hidden or too long and holds no separator."""
    return 0 < len(name.encode("utf-8", "replace")) <= 200 and name.isprintable() \
        and not name.startswith(".") and not set(name) & {"/", "\\"}
