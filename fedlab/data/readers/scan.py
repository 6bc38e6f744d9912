"""One patient's files, read and checked: voxels in, findings out, and onto a common grid and back.

Every check is made on every file, so that all that is wrong with a patient is known at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fedlab.core.errors import DataError
from fedlab.core.regions import labels_to_regions, regions_to_labels
from fedlab.core.types import MODALITIES, REGIONS, Patient
from fedlab.data.intensity import normalise
from fedlab.data.readers.conventions import check_convention, count_values, to_internal, wrong_values
from fedlab.data.readers.findings import Finding, settle
from fedlab.data.readers.nifti import (
    Volume,
    axis_weights,
    from_ras,
    read_volume,
    resample,
    same_grid,
    to_ras,
    write_label,
)
from fedlab.data.readers.patient_files import PatientFiles

__all__ = ["Look", "Scan", "check_headers", "check_labels", "look", "native_volume", "on_grid", "read_label",
           "read_patient", "read_scan", "save_prediction", "to_native"]

_HALF = 0.5 - 1e-4  # a voxel exactly half inside counts as inside, whatever the rounding
#: From this share of the brain's voxels at the largest value on, a volume counts as saturated; at least 10 voxels.
SATURATED = 5e-4
#: From this share of the brain on, what is not 0 (or is 0) in one modality alone is told.
_ALONE = 0.02


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """A patient's voxels on RAS axes: image float32 (4, X, Y, Z), brain bool, internal labels uint8."""

    image: torch.Tensor
    brain: torch.Tensor
    label: torch.Tensor | None
    affine: np.ndarray


@dataclass(kw_only=True, eq=False)
class Look:
    """What could be read of one patient, and what is wrong with it.

    Attributes:
        files: what was looked at.
        volumes: headers by modality and "label".
        images: voxels by modality, stored order, stored type or float32.
        label: voxels of the label map as they are stored.
        label_counts: voxels by value in it.
        brain: bool, stored order: where any readable modality isn't 0.
        findings: so far.
    """

    files: PatientFiles
    volumes: dict[str, Volume] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    label: np.ndarray | None = None
    label_counts: dict[float, int] = field(default_factory=dict)
    brain: np.ndarray | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether there is no error so far."""
        return all(f.severity != "error" for f in self.findings)


def look(files: PatientFiles, *, labels: str | None = None) -> Look:
    """Read every file of one patient and check everything there is; bad data gives findings, never an error.

    Args:
        files: some may be missing.
        labels: the label convention; None leaves the labels' meaning unchecked.
    """
    seen = Look(files=files)
    seen.volumes, seen.findings = _load(files, voxels=True)
    for modality in (m for m in MODALITIES if m in seen.volumes):
        _check_image(seen, modality)
    if seen.images and len({array.shape for array in seen.images.values()}) == 1:
        _check_brain(seen)
    if "label" in seen.volumes:
        seen.label = np.asarray(seen.volumes["label"].array)
        seen.label_counts = count_values(seen.label)
        if seen.brain is not None and seen.label.shape == seen.brain.shape:
            stray = int(np.count_nonzero((seen.label != 0) & ~seen.brain))
            if stray:
                seen.findings.append(Finding(patient=files.id, code="label-outside", severity="warning", message=
                                             f"{stray} labelled voxels lie where every modality is 0"))
    check_labels(seen, labels)
    return seen


def check_headers(files: PatientFiles) -> list[Finding]:
    """What is wrong with the headers of one patient's files."""
    return _load(files, voxels=False)[1]


def _load(files: PatientFiles, *, voxels: bool) -> tuple[dict[str, Volume], list[Finding]]:
    """Every readable volume of a patient, by modality and "label", and what is wrong with the others."""
    volumes: dict[str, Volume] = {}
    findings: list[Finding] = []

    def read(path: Path, series: bool) -> Volume | None:
        try:
            volume = read_volume(path, voxels=voxels, series=series)
        except DataError as error:
            findings.append(Finding(patient=files.id, code=error.code, message=str(error)))
            return None
        findings.extend(Finding(patient=files.id, code="affines-differ", severity="warning", message=note)
                        for note in volume.notes)
        return volume

    if files.channels and files.images:
        series = read(files.images[MODALITIES[0]], True)
        if series is not None:
            volumes |= _channels(series, files, findings)
    for name, path in ({} if files.channels else files.images).items():
        if (volume := read(path, False)) is not None:
            volumes[name] = volume
    if files.label is not None and (volume := read(files.label, False)) is not None:
        volumes["label"] = volume
    if volumes:
        first, *others = volumes.values()
        findings += [Finding(patient=files.id, code="grids-differ", message=f"{other.path.name} has another grid than "
                             f"{first.path.name}: {_grid(other)}, not {_grid(first)}; register and resample it first")
                     for other in others if not same_grid(first, other)]
    return volumes, findings


def _channels(series: Volume, files: PatientFiles, findings: list[Finding]) -> dict[str, Volume]:
    """The volumes of a 4-D file by modality, without copying a voxel."""
    if series.channels != len(files.channels) or max(files.channels.values()) >= series.channels:
        findings.append(Finding(patient=files.id, code="channels", message=f"{series.path.name} holds "
                                f"{series.channels or 'one'} volumes; expected {len(files.channels)}: "
                                f"{', '.join(sorted(files.channels, key=lambda m: files.channels[m]))}"))
        return {}
    return {modality: Volume(path=series.path, shape=series.shape, affine=series.affine, codes=series.codes,
                             array=None if series.array is None else series.array[..., files.channels[modality]])
            for modality in MODALITIES}


def _grid(volume: Volume) -> str:
    shape, spacing = "x".join(map(str, volume.shape)), "x".join(f"{s:g}" for s in volume.spacing_mm)
    corner = ", ".join(f"{v:g}" for v in volume.affine[:3, 3])
    return f"{shape} voxels of {spacing} mm from ({corner})"


def _check_image(seen: Look, modality: str) -> None:
    """Voxels that are numbers, differ, and leave the border of the volume 0."""
    array, name = np.asarray(seen.volumes[modality].array), _name(seen, modality)
    finding = partial(Finding, patient=seen.files.id)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows float32 is reported as Inf
            array = array.astype(np.float32, copy=False)
        wrong = array.size - int(np.count_nonzero(np.isfinite(array)))
        if wrong:
            seen.findings.append(finding(code="not-finite", message=f"{name} holds {wrong:,} voxels that are NaN or "
                                         f"Inf; write what they should be, 0 outside the brain"))
            return
    low, high = array.min(), array.max()
    seen.images[modality] = array
    if low == high:
        seen.findings.append(finding(code="blank", message=f"{name} is blank: every voxel is {float(low):g}"))
        return
    rim = (array[0], array[-1], array[:, 0], array[:, -1], array[:, :, 0], array[:, :, -1])
    share = sum(int(np.count_nonzero(face)) for face in rim) / sum(face.size for face in rim)
    if share > 0.5:
        seen.findings.append(finding(code="background", message=f"{name}: {share:.0%} of the voxels on the volume's "
                                     f"faces are not 0; expected skull-stripped scans whose background is 0"))
        return
    inside = int(np.count_nonzero(array))
    peak = int(np.count_nonzero(array == high))
    if peak >= 10 and peak >= SATURATED * inside:
        seen.findings.append(finding(code="saturated", severity="warning", message=f"{name}: {peak:,} voxels, "
                                     f"{peak / inside:.2%} of those that aren't 0, share the largest value "
                                     f"{float(high):g}; bright structures were cut off"))


def _name(seen: Look, modality: str) -> str:
    name = seen.volumes[modality].path.name
    return f"{modality} in {name}" if seen.files.channels else name


def _check_brain(seen: Look) -> None:
    """The brain is where any modality has a signal; modalities that disagree about it are told."""
    finding = partial(Finding, patient=seen.files.id)
    masks = {modality: array != 0 for modality, array in seen.images.items()}
    signals = sum((mask.view(np.uint8) for mask in masks.values()), np.zeros((), dtype=np.uint8))
    seen.brain = np.asarray(signals > 0)
    voxels = int(np.count_nonzero(seen.brain))
    if not voxels:
        seen.findings.append(finding(code="empty-brain", message="no voxel of any modality has a signal"))
        return
    if voxels > 0.9 * seen.brain.size and all(f.code != "background" for f in seen.findings):
        seen.findings.append(finding(code="background", message="more than 90 % of the voxels are not 0 in some "
                                     "modality; expected skull-stripped scans whose background is 0"))
    if len(masks) < len(MODALITIES) or not seen.sound:
        return
    for modality, mask in masks.items():
        alone = int(np.count_nonzero(mask & (signals == 1)))
        if alone > _ALONE * voxels:
            seen.findings.append(finding(code="background", severity="warning", message=f"{_name(seen, modality)}: "
                                         f"{alone:,} voxels are not 0 here but 0 in all other modalities; is the "
                                         f"background 0, the skull off?"))
        lost = int(np.count_nonzero(~mask & (signals == len(masks) - 1)))
        if lost > _ALONE * voxels:
            seen.findings.append(finding(code="cut-off", severity="warning", message=f"{_name(seen, modality)}: "
                                         f"{lost:,} voxels are 0 here but not in any other modality; is the scan cut?"))


def check_labels(seen: Look, convention: str | None) -> None:
    """Adds what is wrong with the label map under a convention; None where none is known."""
    if not seen.label_counts or convention is None:
        return
    finding = partial(Finding, patient=seen.files.id)
    name = "label map" if seen.files.label is None else seen.files.label.name
    if problem := wrong_values(seen.label_counts, convention):
        seen.findings.append(finding(code="label-values", message=f"{name} {problem}"))
        return
    enhancing = 4.0 if convention in ("brats2021", "brats2013") else 3.0
    if not any(seen.label_counts.get(float(value), 0) for value in (1, 2, 3, 4)):
        seen.findings.append(finding(code="no-tumour", severity="warning", message=f"{name} is empty"))
    elif not seen.label_counts.get(enhancing, 0):
        seen.findings.append(finding(code="no-enhancing", severity="warning", message=f"{name} marks no enhancing "
                                     f"tumour, which is legal: its Dice rests on the rule for empty regions"))
    if convention == "brats2024" and (cavity := seen.label_counts.get(4.0, 0)):
        seen.findings.append(finding(code="cavity", severity="warning", message=f"{name}: {cavity:,} voxels of "
                                     f"resection cavity count as no tumour"))


def read_scan(files: PatientFiles, label_convention: str | None = None) -> tuple[Scan | None, list[Finding]]:
    """Read every voxel of one patient; no scan where anything is wrong."""
    check_convention(label_convention)
    convention = label_convention or files.label_convention
    seen = look(files, labels=convention)
    if seen.label is not None and convention is None:
        seen.findings.append(Finding(patient=files.id, code="label-convention", message="its label convention isn't "
                                     "known; say label_convention="))
    if not seen.sound or len(seen.images) < len(MODALITIES) or seen.brain is None:
        return None, seen.findings
    affine = seen.volumes[MODALITIES[0]].affine
    straight = to_ras(seen.images[MODALITIES[0]], affine)[1]
    image = np.empty((len(MODALITIES), *to_ras(seen.brain, affine)[0].shape), dtype=np.float32)
    for number, modality in enumerate(MODALITIES):
        image[number] = to_ras(seen.images.pop(modality), affine)[0]
    brain = np.ascontiguousarray(to_ras(seen.brain, affine)[0])
    label = None
    if seen.label is not None and convention is not None:
        label = np.ascontiguousarray(to_ras(to_internal(seen.label, convention), affine)[0])
    return Scan(image=torch.from_numpy(image), brain=torch.from_numpy(brain), affine=straight,
                label=None if label is None else torch.from_numpy(label)), seen.findings


def read_patient(files: PatientFiles, *, spacing_mm: float | None = None, shape: tuple[int, int, int] | None = None,
                 label_convention: str | None = None, dtype: torch.dtype = torch.float16) -> Patient:
    """Read one patient onto RAS axes and the grid wanted, z-scored over the brain.

    Images are averaged over what a coarser voxel covers (of brain voxels only, so that the rim isn't
    dimmed) and interpolated onto finer ones. A region label is kept where it fills at least half a voxel.

    Args:
        files: from `fedlab.data.readers.brats.find_patients`.
        spacing_mm: edge of the new cubic voxels in mm; None keeps the scan's own voxels.
        shape: voxels of the new grid, the brain in its centre; None takes the smallest multiple of 16 that
            holds the brain. A brain that doesn't fit is refused, never cut.
        label_convention: one of `fedlab.data.readers.conventions.CONVENTIONS`; None takes that of `files`.
        dtype: of the image.

    Raises:
        DataError: the files can't be used as they are; all problems are listed at once.
        ValueError: options out of range.
    """
    scan, findings = read_scan(files, label_convention)
    settle({files.id: files}, findings, broken="raise", where=files.images[MODALITIES[0]].parent)
    if scan is None:  # only with an error, which settle has raised
        raise DataError(f"{files.id}: could not be read")
    return on_grid(files.id, scan, spacing_mm=spacing_mm, shape=shape, dtype=dtype)


def on_grid(name: str, scan: Scan, *, spacing_mm: float | None, shape: tuple[int, int, int] | None,
            dtype: torch.dtype) -> Patient:
    """A scan resampled, cut to its brain and normalised; see `read_patient`."""
    if spacing_mm is not None and not 0.1 <= spacing_mm <= 20:
        raise ValueError(f"spacing_mm lies between 0.1 and 20 mm, got {spacing_mm}")
    native = np.linalg.norm(scan.affine[:3, :3], axis=0)
    scale = np.ones(3) if spacing_mm is None else spacing_mm / native
    low, high = _bounds(scan.brain)
    need = [int(np.ceil((h - b) / s - 1e-6)) for b, h, s in zip(low, high, scale, strict=True)]
    if shape is None:
        x, y, z = (-(-n // 16) * 16 for n in need)
        shape = x, y, z
    if any(n > m for n, m in zip(need, shape, strict=True)):
        raise DataError(f"{name}: its brain takes {need[0]}x{need[1]}x{need[2]} voxels and doesn't fit into shape="
                        f"{shape}; give a larger shape or a larger spacing_mm", code="too-large")
    # The grid starts at an edge of stored voxels: whole-number ratios then average whole blocks.
    slack = [m * s - (h - b) for m, s, b, h in zip(shape, scale, low, high, strict=True)]
    offset = [b - int(free // 2) for b, free in zip(low, slack, strict=True)]
    weights = [axis_weights(n, m, scale=float(s), offset=float(o))
               for n, m, s, o in zip(scan.brain.shape, shape, scale, offset, strict=True)]
    filled = resample(scan.brain[None], weights)[0]
    brain = filled >= _HALF
    image = resample(scan.image, weights) / filled.clamp_min(0.1)
    label = None if scan.label is None else regions_to_labels(
        torch.stack([resample(region[None], weights)[0] >= _HALF for region in labels_to_regions(scan.label)]))
    corner = np.asarray(offset) + scale / 2 - 0.5
    affine = scan.affine @ np.vstack((np.column_stack((np.diag(scale), corner)), (0, 0, 0, 1)))
    return Patient(id=name, image=normalise(image, brain).to(dtype), label=label, affine=affine)


def _bounds(mask: torch.Tensor) -> tuple[list[int], list[int]]:
    """First and one past the last set index along each axis."""
    low, high = [], []
    for axis in range(3):
        others = tuple(a for a in range(3) if a != axis)
        used = np.flatnonzero(mask.numpy().any(axis=others))
        low.append(int(used[0]))
        high.append(int(used[-1]) + 1)
    return low, high


def read_label(files: PatientFiles, *, label_convention: str | None = None) \
        -> tuple[torch.Tensor, tuple[float, float, float]]:
    """The expert's labels on the patient's own grid, uint8 (X, Y, Z) in stored order, and its spacing in mm.

    Raises:
        DataError: there is no label, it can't be used, or its convention isn't known.
    """
    check_convention(label_convention)
    if files.label is None:
        raise DataError(f"{files.id} has no label file; expected {files.id}_seg.nii.gz beside its scans"
                        if files.layout.startswith("brats20") else f"{files.id} has no label file", code="no-label")
    convention = label_convention or files.label_convention
    if convention is None:
        raise DataError(f"{files.id}: its label convention isn't known; say label_convention=", code="label-convention")
    volume = read_volume(files.label)
    array = np.asarray(volume.array)
    if problem := wrong_values(count_values(array), convention):
        raise DataError(f"{files.id}: {files.label.name} {problem}", code="label-values")
    return torch.from_numpy(to_internal(array, convention)), volume.spacing_mm


def native_volume(files: PatientFiles) -> Volume:
    """The header of a patient's images: their grid as it is stored, without voxels.

    Raises:
        DataError: it can't be read.
    """
    return read_volume(files.images[MODALITIES[0]], voxels=False, series=bool(files.channels))


def to_native(prediction: torch.Tensor, *, patient: Patient, files: PatientFiles, threshold: float = 0.5) -> np.ndarray:
    """Map a prediction back onto the patient's own grid, orientation and axes.

    Args:
        prediction: on the grid of `patient`: labels 1/2/4 as uint8 (X, Y, Z), or regions as probabilities or
            0/1, shape (3, X, Y, Z) in the order of `fedlab.core.types.REGIONS`.
        patient: as `read_patient` gave it.
        files: where `patient` came from.
        threshold: a region is set where its interpolated probability is at least this.

    Returns:
        uint8 labels 0/1/2/4 in the stored order of the patient's files.

    Raises:
        DataError: `patient` wasn't read from `files`.
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
        raise DataError(f"patient {patient.id} doesn't lie on the grid of the files of {files.id}; pass the files it "
                        f"was read from")
    offset = first - scale / 2 + 0.5
    weights = [axis_weights(n, m, scale=float(1 / s), offset=float(-o / s))
               for n, m, s, o in zip(grid, straight[0].shape, scale, offset, strict=True)]
    back = torch.stack([resample(region[None], weights)[0] >= threshold - 1e-4 for region in regions.cpu()])
    return from_ras(regions_to_labels(back).numpy(), own.affine)


def save_prediction(path: str | os.PathLike[str], label: np.ndarray, *, files: PatientFiles) -> Path:
    """Write labels 0/1/2/4 on the patient's own grid (from `to_native`) as uint8 NIfTI with the scan's affine.

    Raises:
        DataError: `path` exists already, ends neither in .nii nor in .nii.gz, or the labels have another shape.
    """
    return write_label(path, label, like=native_volume(files))
