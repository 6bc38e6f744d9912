"""A folder of scans looked at, patient by patient: what is there, how large the tumours are, and what is wrong."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from fedlab.core.errors import DataError
from fedlab.core.types import MODALITIES, REGIONS
from fedlab.data.readers.brats import in_parallel
from fedlab.data.readers.conventions import CONVENTIONS, Convention, check_convention, detect_convention, to_internal
from fedlab.data.readers.findings import Finding
from fedlab.data.readers.layouts import list_patients
from fedlab.data.readers.nifti import to_ras
from fedlab.data.readers.patient_files import Listing, PatientFiles
from fedlab.data.readers.scan import Look, check_labels, look

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Case", "Inspection", "Slice", "inspect_folder"]

_INSIDE = {"TC": (1, 4), "WT": (1, 2, 4), "ET": (4,)}
_LARGEST = 192  # pixels of a slice


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """One axial slice, seen from the feet: the patient's right is on the left, the face on top.

    Attributes:
        modality: which one.
        grey: uint8, shape (rows, columns).
        label: the values in the label map, same shape; internal labels once the convention is known.
        pixel_mm: height and width of a pixel.
    """

    modality: str
    grey: np.ndarray
    label: np.ndarray | None
    pixel_mm: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is known about one patient; None where a damaged file leaves it unknown.

    Attributes:
        patient: the pseudonym.
        layout: one of `fedlab.data.readers.layouts.LAYOUTS`.
        label_convention: one of `fedlab.data.readers.conventions.CONVENTIONS`; None for a patient without a readable label.
        shape: voxels along the three stored axes.
        spacing_mm: voxel size along them.
        orientation: where the stored axes point, such as "LPS".
        modalities: those there is a file for.
        volumes_ml: region volumes on the patient's own grid, by name in `fedlab.core.types.REGIONS`.
        findings: errors first.
        picture: the axial slice with the most tumour.
    """

    patient: str
    layout: str
    label_convention: str | None = None
    shape: tuple[int, int, int] | None = None
    spacing_mm: tuple[float, float, float] | None = None
    orientation: str | None = None
    modalities: tuple[str, ...] = ()
    volumes_ml: Mapping[str, float | None] = field(default_factory=lambda: dict.fromkeys(REGIONS))
    findings: tuple[Finding, ...] = ()
    picture: Slice | None = field(default=None, repr=False, compare=False)

    @property
    def usable(self) -> bool:
        """Whether there is no error."""
        return all(f.severity != "error" for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain lists, numbers and texts: what `fedlab data inspect --json` prints."""
        return {
            "patient": self.patient, "layout": self.layout, "label_convention": self.label_convention,
            "shape": None if self.shape is None else list(self.shape),
            "spacing_mm": None if self.spacing_mm is None else list(self.spacing_mm),
            "orientation": self.orientation, "modalities": list(self.modalities),
            "volumes_ml": {name: self.volumes_ml[name] for name in REGIONS},
            "findings": [{"severity": f.severity, "code": f.code, "message": f.message} for f in self.findings],
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class Inspection:
    """A folder and every patient in it.

    Attributes:
        folder: where the patients are.
        layout: one of `fedlab.data.readers.layouts.LAYOUTS`.
        reason: why it is that layout.
        convention: the label convention and why; its name is None where it can't be told or nobody is labelled.
        cases: one for each patient, sorted.
    """

    folder: Path
    layout: str
    reason: str
    convention: Convention
    cases: tuple[Case, ...]

    @property
    def broken(self) -> tuple[Case, ...]:
        """The patients with errors."""
        return tuple(case for case in self.cases if not case.usable)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Of all patients."""
        return tuple(f for case in self.cases for f in case.findings)

    def as_json(self) -> list[dict[str, Any]]:
        """One entry a patient, see `Case.as_json`."""
        return [case.as_json() for case in self.cases]

    def table(self) -> pd.DataFrame:
        """One row a patient; volumes in ml, spacing in mm."""
        import pandas as pd

        rows = [{
            "grid": "?" if case.shape is None else "x".join(map(str, case.shape)),
            "mm": "?" if case.spacing_mm is None else " x ".join(f"{s:.3g}" for s in case.spacing_mm),
            "axes": case.orientation or "?", "modalities": len(case.modalities),
            "labels": case.label_convention or "-",
            **{f"{name} ml": np.nan if (ml := case.volumes_ml[name]) is None else ml for name in REGIONS},
            "errors": sum(f.severity == "error" for f in case.findings),
            "warnings": sum(f.severity == "warning" for f in case.findings),
        } for case in self.cases]
        return pd.DataFrame(rows, index=pd.Index([case.patient for case in self.cases], name="patient"))

    def summary(self) -> list[str]:
        """Folder, layout, label convention and counts, a line each."""
        counts = f"{len(self.cases)} patients, {len(self.broken)} with errors, " \
                 f"{sum(case.usable and bool(case.findings) for case in self.cases)} with warnings only"
        return [f"{self.folder}", f"layout: {self.layout} ({self.reason})",
                f"label convention: {self.convention.name or 'none'} ({self.convention.reason})", counts]

    def __str__(self) -> str:
        table = self.table().to_string(float_format="{:.1f}".format, na_rep="?")
        found = [f"  {f.severity}: {f}" for f in self.findings]
        lines = [*self.summary(), "", table, *(["", "findings:"] if found else []), *found]
        # A file's name may hold signs that steer a terminal.
        return "".join(sign if sign.isprintable() or sign == "\n" else "\ufffd" for sign in "\n".join(lines))

    def __repr__(self) -> str:
        return f"<Inspection of {self.folder}: {'; '.join(self.summary()[1:])}>"

    def _repr_html_(self) -> str:
        from html import escape

        found = "".join(f"<li>{escape(f'{f.severity}: {f}')}</li>" for f in self.findings)
        table: str = self.table().to_html(escape=True, float_format="{:.1f}".format, na_rep="?")
        return f"<p>{'<br>'.join(map(escape, self.summary()))}</p>{table}<ul>{found}</ul>"


def inspect_folder(folder: str | os.PathLike[str], *, layout: str | None = None, label_convention: str | None = None,
                   progress: bool = True) -> Inspection:
    """Read every file of every patient and say what is there and what is wrong; damaged patients stop nothing.

    Args:
        folder: in one of `fedlab.data.readers.layouts.LAYOUTS`, or a CSV table of paths.
        layout: one of them; None finds out.
        label_convention: one of `fedlab.data.readers.conventions.CONVENTIONS`; None finds out. Where it can't be told, that
            is an error of every labelled patient.
        progress: show a bar where it takes more than three seconds.

    Raises:
        DataError: no such folder, no patient in it, or a layout that can't be told.
        ValueError: unknown options.
    """
    check_convention(label_convention)
    listing = list_patients(folder, layout=layout)
    seen = in_parallel(partial(_summarise, channels=listing.layout == "msd"), list(listing.files.values()),
                       "looking at patients", progress)
    values = {one.files.id: frozenset(one.label_counts) for one, _ in seen if one.label_counts}
    try:
        convention = detect_convention(values, layout=listing.layout, described=listing.described,
                                       stated=label_convention)
    except DataError as error:
        convention = Convention(name=None, reason=str(error))
    cases = {one.files.id: _case(one, picture, listing, convention) for one, picture in seen}
    for finding in listing.findings:
        if finding.patient not in cases:
            cases[finding.patient] = Case(patient=finding.patient, layout=listing.layout, findings=tuple(
                f for f in listing.findings if f.patient == finding.patient))
    return Inspection(folder=listing.folder, layout=listing.layout, reason=listing.reason, convention=convention,
                      cases=tuple(cases[name] for name in sorted(cases)))


def _summarise(files: PatientFiles, *, channels: bool) -> tuple[Look, Slice | None]:
    """What is kept of a patient: headers, counts and one slice, no volume."""
    seen = look(files)
    picture = _slice(seen)
    seen.images.clear()
    seen.label = seen.brain = None
    seen.volumes = {name: replace(volume, array=None) for name, volume in seen.volumes.items()}
    return seen, picture


def _case(seen: Look, picture: Slice | None, listing: Listing, convention: Convention) -> Case:
    files = seen.files
    if files.label is None and all(f.code != "no-label" for f in listing.findings if f.patient == files.id):
        seen.findings.append(Finding(patient=files.id, code="no-label", severity="warning",
                                     message="there is no label map: it can't be trained on or scored"))
    elif seen.label_counts and convention.name is None:
        seen.findings.append(Finding(patient=files.id, code="label-convention", message=convention.reason))
    check_labels(seen, convention.name)
    findings = [*(f for f in listing.findings if f.patient == files.id), *seen.findings]
    known = convention.name if seen.label_counts else None
    volume = next(iter(seen.volumes.values()), None)
    return Case(
        patient=files.id, layout=listing.layout, label_convention=known,
        shape=None if volume is None else volume.shape,
        spacing_mm=None if volume is None else _rounded(volume.spacing_mm),
        orientation=None if volume is None else "".join(nib.aff2axcodes(volume.affine)),
        modalities=files.modalities, volumes_ml=_volumes(seen, known),
        findings=tuple(sorted(dict.fromkeys(findings), key=lambda f: f.severity != "error")),
        picture=_coloured(picture, known))


def _rounded(spacing_mm: tuple[float, float, float]) -> tuple[float, float, float]:
    x, y, z = (round(value, 6) for value in spacing_mm)
    return x, y, z


def _volumes(seen: Look, convention: str | None) -> dict[str, float | None]:
    """Region volumes in ml; None where the labels can't be understood."""
    if convention is None or any(f.code == "label-values" for f in seen.findings):
        return dict.fromkeys(REGIONS)
    known = CONVENTIONS[convention]
    voxel_ml = abs(float(np.linalg.det(seen.volumes["label"].affine[:3, :3]))) / 1000
    inside = {value: known[int(value)] for value in seen.label_counts}
    return {name: round(voxel_ml * sum(count for value, count in seen.label_counts.items()
                                       if inside[value] in _INSIDE[name]), 6) for name in REGIONS}


def _slice(seen: Look) -> Slice | None:
    """The axial slice with the most label, or else the most brain."""
    modality = next((name for name in MODALITIES if name in seen.images), None)
    if modality is None:
        return None
    volume = seen.volumes[modality]
    image, affine = to_ras(seen.images[modality], volume.affine)
    label = None
    if seen.label is not None and seen.label.shape == volume.shape:
        label = to_ras(seen.label, volume.affine)[0]
    shown = label if label is not None and label.any() else image
    index = int(np.count_nonzero(shown, axis=(0, 1)).argmax())
    step = max(1, -(-max(image.shape[:2]) // _LARGEST))
    width, height = (float(np.linalg.norm(affine[:3, axis])) * step for axis in (0, 1))
    picture = np.asarray(image[::-step, ::-step, index].T, dtype=np.float32)
    return Slice(modality=modality, grey=_grey(picture), pixel_mm=(height, width),
                 label=None if label is None else np.array(label[::-step, ::-step, index].T))


def _grey(picture: np.ndarray) -> np.ndarray:
    """0 to 255, black where it is 0, white from the 99.5th percentile on."""
    signal = picture[picture != 0]
    if not signal.size:
        return np.zeros(picture.shape, dtype=np.uint8)
    low, high = (float(v) for v in np.percentile(signal, (0.5, 99.5)))
    low = min(low, 0.0) if low < 0 else 0.0
    scaled = (picture - low) / max(high - low, 1e-6)
    return np.asarray(np.where(picture == 0, 0, scaled.clip(0, 1) * 255).astype(np.uint8))


def _coloured(picture: Slice | None, convention: str | None) -> Slice | None:
    if picture is None or picture.label is None or convention is None:
        return None if picture is None else replace(picture, label=None)
    return replace(picture, label=to_internal(picture.label, convention))
