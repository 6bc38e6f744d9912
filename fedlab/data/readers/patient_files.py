"""Which files belong to which patient, in any layout."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedlab.core.types import MODALITIES
from fedlab.data.readers.findings import Finding

__all__ = ["Listing", "PatientFiles", "find_copies", "is_broken_link", "is_circular_link", "is_nifti", "is_valid_id",
           "is_visible_folder", "scans_below", "stem"]

_EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class PatientFiles:
    """Where one patient's scans are, and how to read them.

    Attributes:
        id: the patient's pseudonym.
        images: one file per name in `fedlab.core.types.MODALITIES`.
        label: the file of the expert's label map, or None.
        layout: one of `fedlab.data.readers.layouts.LAYOUTS`.
        label_convention: one of `fedlab.data.readers.conventions.CONVENTIONS`; None until it is known.
        channels: the volume of a 4-D file that holds each modality; empty where each modality has its own file.
        columns: what tables beside the scans state about the patient, such as {"grade": "HGG"}.
    """

    id: str
    images: Mapping[str, Path]
    label: Path | None = None
    layout: str = "brats2021"
    label_convention: str | None = None
    channels: Mapping[str, int] = field(default_factory=lambda: _EMPTY)
    columns: Mapping[str, str] = field(default_factory=lambda: _EMPTY)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities with a file, in the order of `fedlab.core.types.MODALITIES`."""
        return tuple(name for name in MODALITIES if name in self.images)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The patients of a folder by their file names; no file has been opened.

    Attributes:
        folder: where the patients are; a subfolder where the given folder contains nothing else.
        layout, reason: one of `fedlab.data.readers.layouts.LAYOUTS`, and why.
        files: by patient, sorted; a patient with errors may lack files.
        findings: about names and tables.
        described: meaning of each label value according to dataset.json; None without one.
    """

    folder: Path
    layout: str
    reason: str
    files: Mapping[str, PatientFiles]
    findings: tuple[Finding, ...] = ()
    described: Mapping[int, str] | None = None


def find_copies(patients: Iterable[PatientFiles]) -> list[Finding]:
    """A warning for each patient whose four scans are those of an earlier one, by checksums that the files store."""
    first: dict[tuple[bytes, ...], str] = {}
    findings = []
    for files in patients:
        try:
            key = tuple(_checksum(files.images[name]) for name in files.modalities)
        except OSError:  # reported where the file is read
            continue
        if len(key) == len(MODALITIES) and first.setdefault(key, files.id) != files.id:
            findings.append(Finding(files.id, "copy", f"its scans are the same files as those of {first[key]}: one "
                                    f"person under two ids; leave one out, or name the person in a column person of "
                                    f"the table of sites", "warning"))
    return findings


def _checksum(path: Path) -> bytes:
    """The checksum and length at the end of a compressed file; of any other its length and a part of its middle."""
    if not os.path.isfile(path):  # a pipe would block forever
        raise OSError(f"{path} is not a file")
    with path.open("rb") as file:
        packed, size = file.read(2) == b"\x1f\x8b", path.stat().st_size
        file.seek(max(size - 8, 0) if packed else size // 2)
        return file.read(8) if packed else size.to_bytes(8) + file.read(2**16)


def is_nifti(path: Path) -> bool:
    """Whether a name has a NIfTI ending; hidden files do not count."""
    return path.name.lower().endswith((".nii", ".nii.gz")) and not path.name.startswith(".")


def stem(path: Path) -> str:
    """The name without .nii or .nii.gz."""
    lower = path.name.lower()
    return path.name[:-7] if lower.endswith(".nii.gz") else path.name[:-4] if lower.endswith(".nii") else path.name


def is_broken_link(path: Path) -> bool:
    """Whether it is a link without a target, or a circle of links."""
    return path.is_symlink() and not os.path.exists(path)


def is_circular_link(path: Path) -> bool:
    """Whether it is a link to a folder that contains it."""
    try:
        return path.is_symlink() and path.resolve(strict=True) in path.parent.resolve(strict=True).joinpath("x").parents
    except (OSError, RuntimeError):  # a circle of links
        return False


def is_visible_folder(path: Path) -> bool:
    """Whether it is a folder that is not hidden, and no link to a folder that contains it."""
    return path.is_dir() and not path.name.startswith((".", "__")) and not is_circular_link(path)


def scans_below(folder: Path, levels: int = 3, closed: list[Path] | None = None) -> Iterator[Path]:
    """The scans in a folder and, some levels deep, in the folders in it; `closed` gets those that cannot be listed."""
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        if closed is not None:
            closed.append(folder)
        return
    for entry in inside:
        if is_nifti(entry):
            yield entry
        elif levels and is_visible_folder(entry):
            yield from scans_below(entry, levels - 1, closed)


def is_valid_id(name: str) -> bool:
    """Whether a pseudonym can be part of a file name: printable, not empty, hidden or too long, without separators."""
    return 0 < len(name.encode("utf-8", "replace")) <= 200 and name.isprintable() \
        and not name.startswith(".") and not set(name) & {"/", "\\"}
