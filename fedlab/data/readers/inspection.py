"""A folder of scans inspected patient by patient: what it contains, tumour volumes, and defects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from fedlab.core.errors import DataError
from fedlab.core.regions import REGION_ORDER
from fedlab.core.text import counted
from fedlab.core.types import MODALITIES
from fedlab.data.readers.conventions import CONVENTIONS, Convention, check_convention, detect_convention, to_internal
from fedlab.data.readers.examination import Examination, check_labels, examine
from fedlab.data.readers.findings import Finding
from fedlab.data.readers.folders import in_parallel
from fedlab.data.readers.layouts import list_patients
from fedlab.data.readers.nifti import to_ras
from fedlab.data.readers.patient_files import Listing, PatientFiles, find_copies

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Case", "Inspection", "Slice", "inspect_folder"]

_LABELS = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}  # of each region
_LARGEST = 192  # pixels of a slice


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """One axial slice of a modality, seen from the feet: the patient's right is on the left, the face at the top.

    Attributes:
        modality: of the image.
        grey: uint8, shape (rows, columns).
        label: values of the label map, same shape; internal labels once the convention is known.
        pixel_mm: height and width of a pixel.
    """

    modality: str
    grey: np.ndarray
    label: np.ndarray | None
    pixel_mm: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """The properties of one patient; None where a damaged file leaves them unknown.

    Attributes:
        patient: the pseudonym.
        layout, label_convention: as in `PatientFiles`; no convention without a readable label.
        shape, spacing_mm, orientation: of the three stored axes, such as (240, 240, 155), (1, 1, 1), "LPS".
        modalities: those with a file.
        volumes_ml: volumes of the regions on the patient's own grid, by name in `fedlab.core.regions.REGION_ORDER`.
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
    volumes_ml: Mapping[str, float | None] = field(default_factory=lambda: dict.fromkeys(REGION_ORDER))
    findings: tuple[Finding, ...] = ()
    picture: Slice | None = field(default=None, repr=False, compare=False)

    @property
    def usable(self) -> bool:
        """Whether there is no error."""
        return all(f.severity != "error" for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Lists, numbers and texts, as `fedlab data inspect --json` prints them."""
        return {
            "patient": self.patient, "layout": self.layout, "label_convention": self.label_convention,
            "shape": self.shape and list(self.shape), "spacing_mm": self.spacing_mm and list(self.spacing_mm),
            "orientation": self.orientation, "modalities": list(self.modalities),
            "volumes_ml": {name: self.volumes_ml[name] for name in REGION_ORDER},
            "findings": [{"severity": f.severity, "code": f.code, "message": f.message} for f in self.findings],
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class Inspection:
    """The inspection of a folder and of every patient in it.

    Attributes:
        folder, layout, reason: as in `fedlab.data.readers.patient_files.Listing`.
        convention: the label convention and the reason; without a name if it cannot be determined.
        cases: one per patient, sorted.
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
        """The findings about all patients."""
        return tuple(f for case in self.cases for f in case.findings)

    def as_json(self) -> list[dict[str, Any]]:
        """One entry per patient, see `Case.as_json`."""
        return [case.as_json() for case in self.cases]

    def table(self) -> pd.DataFrame:
        """One row per patient; volumes in ml, spacing in mm."""
        import pandas as pd

        rows = [{
            "grid": "?" if case.shape is None else "x".join(map(str, case.shape)),
            "mm": "?" if case.spacing_mm is None else " x ".join(f"{s:.3g}" for s in case.spacing_mm),
            "axes": case.orientation or "?", "modalities": len(case.modalities),
            "labels": case.label_convention or "-",
            **{f"{name} ml": np.nan if (ml := case.volumes_ml[name]) is None else ml for name in REGION_ORDER},
            "errors": sum(f.severity == "error" for f in case.findings),
            "warnings": sum(f.severity == "warning" for f in case.findings),
        } for case in self.cases]
        return pd.DataFrame(rows, index=pd.Index([case.patient for case in self.cases], name="patient"))

    def summary(self) -> list[str]:
        """Folder, layout, label convention and counts, one line each."""
        patients = [case for case in self.cases if {f.code for f in case.findings} != {"elsewhere"} or case.modalities]
        counts = f"{counted(len(patients), 'patient')}, {len(self.broken)} with errors, " \
                 f"{sum(case.usable and bool(case.findings) for case in patients)} with warnings only"
        return [f"{self.folder}", f"layout: {self.layout} ({self.reason})",
                f"label convention: {self.convention.names or 'none'} ({self.convention.reason})", counts]

    def __str__(self) -> str:
        table = self.table().to_string(float_format="{:.1f}".format, na_rep="?")
        found = [f"  {f.severity}: {f}" for f in self.findings]
        lines = [*self.summary(), "", table, *(["", "findings:"] if found else []), *found]
        # A file name may contain control characters of a terminal.
        return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in "\n".join(lines))

    def __repr__(self) -> str:
        return f"<Inspection of {self.folder}: {'; '.join(self.summary()[1:])}>"

    def _repr_html_(self) -> str:
        from html import escape

        found = "".join(f"<li>{escape(f'{f.severity}: {f}')}</li>" for f in self.findings)
        table: str = self.table().to_html(escape=True, float_format="{:.1f}".format, na_rep="?")
        return f"<p>{'<br>'.join(map(escape, self.summary()))}</p>{table}<ul>{found}</ul>"


def inspect_folder(folder: str | os.PathLike[str], *, layout: str | None = None, label_convention: str | None = None,
                   progress: bool = True) -> Inspection:
    """Reads every file of every patient and reports contents and defects; damaged patients do not stop it.

    Args:
        folder, layout, label_convention: as in `fedlab.data.readers.folders.find_patients`; an ambiguous convention is
            an error of every labelled patient.
        progress: whether to show a bar if it takes more than three seconds.

    Raises:
        DataError: there is no such folder, it contains no patient, or its layout cannot be detected.
        ValueError: unknown options.
    """
    check_convention(label_convention)
    listing = list_patients(folder, layout=layout)
    exams = in_parallel(_summarise, list(listing.files.values()), "inspecting patients", progress)
    values = {exam.files.id: frozenset(exam.label_counts) for exam, _ in exams if exam.label_counts}
    try:
        convention = detect_convention(values, layout=listing.layout, described=listing.described,
                                       stated=label_convention)
    except DataError as error:
        convention = Convention(name=None, reason=str(error))
    listing = replace(listing, findings=(*listing.findings, *find_copies(listing.files.values())))
    cases = {exam.files.id: _case(exam, picture, listing, convention) for exam, picture in exams}
    for patient in {f.patient for f in listing.findings} - cases.keys():
        own = tuple(f for f in listing.findings if f.patient == patient)
        cases[patient] = Case(patient=patient, layout=listing.layout, findings=own)
    return Inspection(folder=listing.folder, layout=listing.layout, reason=listing.reason, convention=convention,
                      cases=tuple(cases[name] for name in sorted(cases)))


def _summarise(files: PatientFiles) -> tuple[Examination, Slice | None]:
    """Headers, counts and one slice of a patient; no volume is kept."""
    exam = examine(files)
    picture = _slice(exam)
    exam.images.clear()
    exam.label = exam.brain = None
    exam.volumes = {name: replace(volume, array=None) for name, volume in exam.volumes.items()}
    return exam, picture


def _case(exam: Examination, picture: Slice | None, listing: Listing, convention: Convention) -> Case:
    files, listed = exam.files, [f for f in listing.findings if f.patient == exam.files.id]
    if files.label is None and all(f.code != "no-label" for f in listed):
        exam.add("no-label", "there is no label map: the patient cannot be used for training or scoring", "warning")
    elif exam.label_counts and convention.of(files.id) is None:
        exam.add("label-convention", convention.reason)
    check_labels(exam, convention.of(files.id))
    known = convention.of(files.id) if exam.label_counts else None
    if picture is not None and picture.label is not None:
        picture = replace(picture, label=None if known is None else to_internal(picture.label, known))
    case = Case(
        patient=files.id, layout=listing.layout, label_convention=known, modalities=files.modalities,
        volumes_ml=_volumes(exam, known), picture=picture,
        findings=tuple(sorted(dict.fromkeys([*listed, *exam.findings]), key=lambda f: f.severity != "error")))
    volume = next(iter(exam.volumes.values()), None)
    if volume is None:
        return case
    x, y, z = (round(value, 6) for value in volume.spacing_mm)
    return replace(case, shape=volume.shape, spacing_mm=(x, y, z),
                   orientation="".join(nib.aff2axcodes(volume.affine)))


def _volumes(exam: Examination, convention: str | None) -> dict[str, float | None]:
    """Volumes of the regions in ml; None if the labels cannot be interpreted."""
    if convention is None or any(f.code == "label-values" for f in exam.findings):
        return dict.fromkeys(REGION_ORDER)
    voxel_ml = abs(float(np.linalg.det(exam.volumes["label"].affine[:3, :3]))) / 1000
    inside = {value: CONVENTIONS[convention][int(value)] for value in exam.label_counts}
    return {name: round(voxel_ml * sum(count for value, count in exam.label_counts.items()
                                       if inside[value] in _LABELS[name]), 6) for name in REGION_ORDER}


def _slice(exam: Examination) -> Slice | None:
    """The axial slice with the most label voxels, or with the most brain if there are none."""
    modality = next((name for name in MODALITIES if name in exam.images), None)
    if modality is None:
        return None
    volume = exam.volumes[modality]
    image, affine = to_ras(exam.images[modality], volume.affine)
    label = None
    if exam.label is not None and exam.label.shape == volume.shape:
        label = to_ras(exam.label, volume.affine)[0]
    shown = label if label is not None and label.any() else image
    index = int(np.count_nonzero(shown, axis=(0, 1)).argmax())
    step = max(1, -(-max(image.shape[:2]) // _LARGEST))
    width, height = (float(np.linalg.norm(affine[:3, axis])) * step for axis in (0, 1))
    picture = np.asarray(image[::-step, ::-step, index].T, dtype=np.float32)
    return Slice(modality=modality, grey=_grey(picture), pixel_mm=(height, width),
                 label=None if label is None else np.array(label[::-step, ::-step, index].T))


def _grey(picture: np.ndarray) -> np.ndarray:
    """0 to 255: black where the image is 0, white from the 99.5th percentile upwards."""
    signal = picture[picture != 0]
    if not signal.size:
        return np.zeros(picture.shape, dtype=np.uint8)
    low, high = (float(v) for v in np.percentile(signal, (0.5, 99.5)))
    low = min(low, 0.0)
    scaled = (picture - low) / max(high - low, 1e-6)
    return np.asarray(np.where(picture == 0, 0, scaled.clip(0, 1) * 255).astype(np.uint8))
