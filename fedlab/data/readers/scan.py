"""One patient's files: reading, resampling onto a common grid, and mapping predictions back."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedlab.core.errors import DataError
from fedlab.core.regions import labels_to_regions, regions_to_labels
from fedlab.core.types import MODALITIES, REGIONS, Patient
from fedlab.data.brain import bounding_box, normalise
from fedlab.data.readers.conventions import (
    check_convention,
    count_values,
    describe,
    from_internal,
    to_internal,
    wrong_values,
)
from fedlab.data.readers.examination import examine
from fedlab.data.readers.findings import Finding, usable
from fedlab.data.readers.nifti import (
    Volume,
    axis_weights,
    from_ras,
    read_volume,
    resample,
    to_ras,
    turn_volume,
    write_label,
)
from fedlab.data.readers.patient_files import PatientFiles

__all__ = ["Grid", "Scan", "native_volume", "on_grid", "read_label", "read_patient", "read_scan",
           "save_prediction", "to_native"]

_HALF = 0.5 - 1e-4  # a voxel exactly half inside counts as inside, whatever the rounding


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The voxels that patients are resampled to; see `read_patient`.

    Raises:
        ValueError: an invalid voxel size or shape.
    """

    spacing_mm: float | None = None
    shape: tuple[int, int, int] | None = None
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if self.spacing_mm is not None and not 0.1 <= self.spacing_mm <= 20:
            raise ValueError(f"spacing_mm must be between 0.1 and 20 mm, got {self.spacing_mm}")
        if self.shape is not None and (len(self.shape) != 3 or min(self.shape) < 1):
            raise ValueError(f"shape must be three positive voxel counts, got {self.shape}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """A patient's voxels on RAS axes: image float32 (4, X, Y, Z), brain bool, internal labels uint8."""

    image: torch.Tensor
    brain: torch.Tensor
    label: torch.Tensor | None
    affine: np.ndarray


def read_scan(files: PatientFiles, label_convention: str | None = None) -> tuple[Scan | None, list[Finding]]:
    """Reads every voxel of one patient; None instead of a scan if there is an error."""
    check_convention(label_convention)
    convention = label_convention or files.label_convention
    exam = examine(files, labels=convention)
    if exam.label is not None and convention is None:
        exam.add("label-convention", "its label convention is unknown; pass label_convention=")
    if not exam.sound or len(exam.images) < len(MODALITIES) or exam.brain is None:
        return None, exam.findings
    affine = exam.volumes[MODALITIES[0]].affine
    brain, straight = to_ras(exam.brain, affine)
    image = np.empty((len(MODALITIES), *brain.shape), dtype=np.float32)
    for number, modality in enumerate(MODALITIES):
        image[number] = to_ras(exam.images.pop(modality), affine)[0]
    if exam.cleared:
        image *= brain
    label = None
    if exam.label is not None and convention is not None:
        stored = to_ras(to_internal(exam.label, convention), affine)[0]
        label = torch.from_numpy(np.ascontiguousarray(stored))
    return Scan(image=torch.from_numpy(image), brain=torch.from_numpy(np.ascontiguousarray(brain)), label=label,
                affine=straight), exam.findings


def read_patient(files: PatientFiles, *, spacing_mm: float | None = None, shape: tuple[int, int, int] | None = None,
                 label_convention: str | None = None, dtype: torch.dtype = torch.float16) -> Patient:
    """Reads one patient onto RAS axes and the requested grid, z-scored over the brain.

    On a coarser grid, a voxel is the mean over what it covers, taken over brain voxels only so that the rim is not
    dimmed; on a finer grid, images are interpolated. A region label is kept where it fills at least half a voxel.

    Args:
        files: from `fedlab.data.readers.folders.find_patients`.
        spacing_mm: edge of the new cubic voxels in mm; None keeps the scan's own voxels.
        shape: voxels of the new grid, with the brain at its centre; None takes the smallest multiple of 16 that
            holds the brain. A brain that does not fit is refused, never cut.
        label_convention: one of `fedlab.data.readers.conventions.CONVENTIONS`; None takes that of `files`.
        dtype: of the image.

    Raises:
        DataError: the files cannot be used; all problems are listed at once.
        ValueError: options out of range.
    """
    grid = Grid(spacing_mm=spacing_mm, shape=shape, dtype=dtype)
    scan, findings = read_scan(files, label_convention)
    usable({files.id: files}, findings, broken="raise", where=files.images[MODALITIES[0]].parent)
    if scan is None:  # only with an error, which `usable` has raised
        raise DataError(f"{files.id}: could not be read")
    return on_grid(files.id, scan, grid)


def on_grid(name: str, scan: Scan, grid: Grid) -> Patient:
    """A scan resampled, cropped to its brain and normalised; see `read_patient`.

    Raises:
        DataError: the brain does not fit into the shape of the grid.
    """
    native = np.linalg.norm(scan.affine[:3, :3], axis=0)
    scale = np.ones(3) if grid.spacing_mm is None else grid.spacing_mm / native
    box = bounding_box(scan.brain.numpy())
    need = [int(np.ceil((side.stop - side.start) / s - 1e-6)) for side, s in zip(box, scale, strict=True)]
    shape = grid.shape or tuple(-(-n // 16) * 16 for n in need)
    if any(n > m for n, m in zip(need, shape, strict=True)):
        raise DataError(f"{name}: its brain takes {need[0]}x{need[1]}x{need[2]} voxels and does not fit into shape="
                        f"{shape}; give a larger shape or a larger spacing_mm", code="too-large")
    # The grid starts at an edge of stored voxels, so that integer ratios average whole blocks.
    slack = [m * s - (side.stop - side.start) for m, s, side in zip(shape, scale, box, strict=True)]
    offset = [side.start - int(free // 2) for side, free in zip(box, slack, strict=True)]
    weights = [axis_weights(n, m, scale=float(s), offset=float(o))
               for n, m, s, o in zip(scan.brain.shape, shape, scale, offset, strict=True)]
    filled = resample(scan.brain[None], weights)[0]
    brain = filled >= _HALF
    image = resample(scan.image, weights) / filled.clamp_min(0.1)
    label = None if scan.label is None else regions_to_labels(
        torch.stack([resample(region[None], weights)[0] >= _HALF for region in labels_to_regions(scan.label)]))
    corner = np.asarray(offset) + scale / 2 - 0.5
    affine = scan.affine @ np.vstack((np.column_stack((np.diag(scale), corner)), (0, 0, 0, 1)))
    return Patient(id=name, image=normalise(image, brain).to(grid.dtype), label=label, affine=affine)


def read_label(files: PatientFiles, *, label_convention: str | None = None) \
        -> tuple[torch.Tensor, tuple[float, float, float]]:
    """The expert's labels on the patient's own grid, uint8 (X, Y, Z) in stored order, and its spacing in mm.

    Raises:
        DataError: the label is missing or invalid, or its convention is unknown.
    """
    check_convention(label_convention)
    if files.label is None:
        raise DataError(f"{files.id} has no label file" + (f"; expected {files.id}_seg.nii.gz beside its scans"
                        if files.layout.startswith("brats20") else ""), code="no-label")
    convention = label_convention or files.label_convention
    if convention is None:
        raise DataError(f"{files.id}: its label convention is unknown; pass label_convention=", code="label-convention")
    volume = turn_volume(read_volume(files.label), native_volume(files))
    array = np.asarray(volume.array)
    if problem := wrong_values(count_values(array), convention, files.id):
        raise DataError(f"{files.id}: {files.label.name} {problem}", code="label-values")
    return torch.from_numpy(to_internal(array, convention)), volume.spacing_mm


def native_volume(files: PatientFiles) -> Volume:
    """The header of a patient's images: their stored grid, without voxels; a `DataError` if it cannot be read."""
    return read_volume(files.images[MODALITIES[0]], voxels=False, series=bool(files.channels))


def to_native(prediction: torch.Tensor, *, patient: Patient, files: PatientFiles, threshold: float = 0.5) -> np.ndarray:
    """Maps a prediction back onto the patient's own grid, orientation and axes.

    Args:
        prediction: on the grid of `patient`: labels 1/2/4 as uint8 (X, Y, Z), or regions as probabilities or
            0/1, shape (3, X, Y, Z) in the order of `fedlab.core.types.REGIONS`.
        patient: from `read_patient`.
        files: the files that `patient` was read from.
        threshold: a region is set where its interpolated probability is at least this.

    Returns:
        uint8 labels 0/1/2/4 in the stored order of the patient's files.

    Raises:
        DataError: `patient` was not read from `files`.
        ValueError: `prediction` has another grid than `patient`.
    """
    grid = tuple(patient.image.shape[1:])
    if tuple(prediction.shape) not in (grid, (len(REGIONS), *grid)):
        raise ValueError(f"expected a prediction of shape {grid} or {(len(REGIONS), *grid)} for {patient.id}, got "
                         f"{tuple(prediction.shape)}")
    regions = labels_to_regions(prediction) if prediction.ndim == 3 else prediction.float()
    own = native_volume(files)
    straight = to_ras(np.empty(own.shape, dtype=np.bool_), own.affine)
    between = np.linalg.inv(straight[1]) @ patient.affine
    scale, first = np.diag(between)[:3], between[:3, 3]
    if files.id != patient.id or np.abs(between[:3, :3] - np.diag(scale)).max() > 1e-3 or scale.min() <= 0:
        raise DataError(f"patient {patient.id} does not lie on the grid of the files of {files.id}; pass the files it "
                        f"was read from")
    offset = first - scale / 2 + 0.5
    weights = [axis_weights(n, m, scale=float(1 / s), offset=float(-o / s))
               for n, m, s, o in zip(grid, straight[0].shape, scale, offset, strict=True)]
    back = torch.stack([resample(region[None], weights)[0] >= threshold - 1e-4 for region in regions.cpu()])
    return from_ras(regions_to_labels(back).numpy(), own.affine)


def save_prediction(path: str | os.PathLike[str], label: np.ndarray, *, files: PatientFiles,
                    label_convention: str = "brats2021") -> Path:
    """Writes labels 0/1/2/4 of `to_native` as uint8 NIfTI with the scan's affine, in the values of a convention.

    Raises:
        DataError: `path` exists already, ends neither in .nii nor in .nii.gz, or the labels have another shape or
            other values.
    """
    if label.dtype != np.uint8 or label.max(initial=0) > 4:
        raise DataError(f"{path}: expected uint8 labels 0, 1, 2 and 4, got {label.dtype} up to {label.max(initial=0)}")
    return write_label(path, from_internal(label, label_convention), like=native_volume(files),
                       description=f"fedlab, labels {label_convention}: {describe(label_convention)}")
