"""Real scans in BraTS folders: found, checked, put on a common grid, and predictions mapped back.

The layout read here is that of BraTS 2018 to 2021 (Menze et al. 2015; Bakas et al. 2017; Baid et al. 2021,
arXiv:2107.02314): one folder a patient, `<ID>/<ID>_flair.nii.gz` and likewise `_t1`, `_t1ce`, `_t2`, `_seg`.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fedlab.data.nifti import (
    Volume,
    axis_weights,
    from_ras,
    read_volume,
    resample,
    same_grid,
    to_ras,
    write_label,
)
from fedlab.data.partition import read_partitioning, split_patients
from fedlab.data.prepare import labels_to_regions, normalise, regions_to_labels
from fedlab.errors import DataError
from fedlab.types import MODALITIES, REGIONS, Patient, Site
from fedlab.workers import available_cores

__all__ = ["CONVENTIONS", "Finding", "PatientFiles", "find_patients", "read_label", "read_patient", "read_sites",
           "save_prediction", "to_native"]

#: File-name endings of BraTS 2018 to 2021.
SUFFIXES = {"flair": "FLAIR", "t1": "T1", "t1ce": "T1c", "t2": "T2", "seg": "label"}
#: Label conventions: value in the file -> label inside fedlab (1 core, 2 oedema, 4 enhancing).
CONVENTIONS: Mapping[str, Mapping[int, int]] = {
    "brats2021": {0: 0, 1: 1, 2: 2, 4: 4},  # BraTS 2017 to 2021 and FeTS
    "brats2023": {0: 0, 1: 1, 2: 2, 3: 4},  # BraTS 2023 and later: 3 is enhancing
}
_NAME = re.compile(r"(?P<id>.+)_(?P<kind>flair|t1ce|t1|t2|seg)\.nii(\.gz)?", re.IGNORECASE)
_HALF = 0.5 - 1e-4  # a voxel exactly half inside counts as inside, whatever the rounding

Broken = Literal["raise", "skip"]


@dataclass(frozen=True, kw_only=True)
class PatientFiles:
    """Where one patient's scans are.

    Attributes:
        id: the patient's pseudonym, the name of the folder.
        images: a file for each name in `fedlab.types.MODALITIES`.
        label: the file of the expert's label map, or None.
    """

    id: str
    images: Mapping[str, Path]
    label: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong, or odd, with one patient's files."""

    patient: str
    code: str
    message: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.patient}: {self.message} [{self.code}]"


def find_patients(folder: str | os.PathLike[str], *, broken: Broken = "raise") -> dict[str, PatientFiles]:
    """The patients of a BraTS 2018 to 2021 folder, in the order of their ids.

    Names and headers are checked here, voxels when they are read.

    Args:
        folder: holds one folder a patient.
        broken: "raise" stops at problems, all of them listed at once; "skip" leaves those patients out and warns.

    Raises:
        DataError: no such folder, no patient in it, or patients with problems.
    """
    folder = Path(folder)
    found: dict[str, PatientFiles] = {}
    findings: list[Finding] = []
    for home in _patient_folders(folder):
        files, problems = _name_files(home)
        if files is not None:
            problems += _check_headers(files)
            found[home.name] = files
        findings += problems
    return _settle(found, findings, broken=broken, where=folder)


def _patient_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected one that holds a folder for each patient")
    try:
        homes = [home for home in sorted(folder.iterdir())
                 if home.is_dir() and not home.name.startswith(".") and any(map(_is_nifti, home.iterdir()))]
    except OSError as error:
        raise DataError(f"{folder} cannot be listed ({error})") from error
    if not homes:
        inside = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise DataError(f"{folder} holds no patient folder; expected <ID>/<ID>_flair.nii.gz, _t1, _t1ce, _t2 and, "
                        f"where labelled, _seg; found {inside}. If patients lie one folder deeper, name that folder")
    return homes


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz")) and not path.name.startswith(".")


def _name_files(home: Path) -> tuple[PatientFiles | None, list[Finding]]:
    """Sort one patient's files by their names; None where a modality is missing or doubtful."""
    finding = partial(Finding, patient=home.name)
    findings: list[Finding] = []
    kinds: dict[str, list[Path]] = {}
    for path in sorted(filter(_is_nifti, home.iterdir())):
        match = _NAME.fullmatch(path.name)
        if match is None:
            findings.append(finding(code="unknown-file", severity="warning", message=f"{path.name} is left aside: it "
                                    f"ends in none of {', '.join('_' + suffix for suffix in SUFFIXES)}"))
        elif match["id"] != home.name:
            findings.append(finding(code="foreign-file", message=f"{path.name} carries another patient's id"))
        elif not path.is_file():
            findings.append(finding(code="no-file", message=f"{path.name} is a folder or a link that leads nowhere"))
        else:
            kinds.setdefault(SUFFIXES[match["kind"].lower()], []).append(path)
    for kind, paths in kinds.items():
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            findings.append(finding(code="two-files", message=f"{names} both claim to be the {kind}; keep one"))
    for modality in MODALITIES:
        if modality not in kinds:
            suffix = next(suffix for suffix, name in SUFFIXES.items() if name == modality)
            findings.append(finding(code="missing-modality", message=f"no {modality}: {home.name}_{suffix}.nii.gz"))
    if any(f.severity == "error" for f in findings):
        return None, findings
    images = {modality: kinds[modality][0] for modality in MODALITIES}
    return PatientFiles(id=home.name, images=images, label=kinds.get("label", [None])[0]), findings


def _load(files: PatientFiles, *, voxels: bool) -> tuple[dict[str, Volume], list[Finding]]:
    """Every readable volume of a patient, by modality and "label", and what is wrong with the others."""
    volumes: dict[str, Volume] = {}
    findings: list[Finding] = []
    named = {**files.images} if files.label is None else {**files.images, "label": files.label}
    for name, path in named.items():
        try:
            volumes[name] = read_volume(path, voxels=voxels)
        except DataError as error:
            findings.append(Finding(patient=files.id, code="unreadable", message=str(error)))
            continue
        findings += [Finding(patient=files.id, code="header", severity="warning", message=note)
                     for note in volumes[name].notes]
    if volumes:
        first, *others = volumes.values()
        findings += [Finding(patient=files.id, code="grids-differ", message=f"{other.path.name} has another grid than "
                             f"{first.path.name}: {_grid(other)}, not {_grid(first)}; register and resample it first")
                     for other in others if not same_grid(first, other)]
    return volumes, findings


def _grid(volume: Volume) -> str:
    shape, spacing = "x".join(map(str, volume.shape)), "x".join(f"{s:g}" for s in volume.spacing_mm)
    corner = ", ".join(f"{v:g}" for v in volume.affine[:3, 3])
    return f"{shape} voxels of {spacing} mm from ({corner})"


def _check_headers(files: PatientFiles) -> list[Finding]:
    return _load(files, voxels=False)[1]


def _settle(found: dict[str, PatientFiles], findings: Sequence[Finding], *, broken: Broken,
            where: str | os.PathLike[str]) -> dict[str, PatientFiles]:
    """Raise or skip what has errors, warn of what is odd; everything is listed at once."""
    if broken not in ("raise", "skip"):
        raise ValueError(f"broken is 'raise' or 'skip', got {broken!r}")
    errors = [f for f in findings if f.severity == "error"]
    odd = [f for f in findings if f.severity == "warning"]
    bad = {f.patient for f in errors}
    good = {name: files for name, files in found.items() if name not in bad}
    listing = _listing(errors)
    if errors and broken == "raise":
        raise DataError(f"{where}: problems with {len(bad)} of {len(good) + len(bad)} patients:\n{listing}\n"
                        f"Mend them, or say broken='skip' to go on without these patients")
    if not good:
        raise DataError(f"{where}: no usable patient:\n{listing}")
    if errors:
        warnings.warn(f"{where}: going on without {len(bad)} patients:\n{listing}", stacklevel=3)
    if odd:
        warnings.warn(f"{where}:\n{_listing(odd)}", stacklevel=3)
    return good


def _listing(items: Iterable[object]) -> str:
    return "\n".join(f"  - {item}" for item in items)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scan:
    """A patient's voxels on RAS axes: image float32 (4, X, Y, Z), brain bool, internal labels uint8."""

    image: torch.Tensor
    brain: torch.Tensor
    label: torch.Tensor | None
    affine: np.ndarray


def _examine(files: PatientFiles, label_convention: str) -> tuple[_Scan | None, list[Finding]]:
    """Read every voxel of one patient; no scan where anything is wrong."""
    finding = partial(Finding, patient=files.id)
    volumes, findings = _load(files, voxels=True)
    images: dict[str, np.ndarray] = {}
    for modality in (m for m in MODALITIES if m in volumes):
        array, name = np.asarray(volumes[modality].array), volumes[modality].path.name
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows float32 is reported as Inf
            images[modality] = array = array.astype(np.float32)
        if not np.isfinite(array).all():
            wrong = int(array.size - np.isfinite(array).sum())
            findings.append(finding(code="not-finite", message=f"{name} holds {wrong:,} voxels that are NaN or Inf"))
        elif array.min() == array.max():
            findings.append(finding(code="blank", message=f"{name} is blank: every voxel is {array.flat[0]:g}"))
    label: np.ndarray | None = None
    if "label" in volumes:
        label, problem = _internal_label(volumes["label"], label_convention)
        findings += [finding(code="label-values", message=problem)] if problem else []
    if any(f.severity == "error" for f in findings):
        return None, findings
    affine = volumes[MODALITIES[0]].affine
    straight = to_ras(images[MODALITIES[0]], affine)[1]
    stack = np.stack([to_ras(images[modality], affine)[0] for modality in MODALITIES])
    image = torch.from_numpy(stack)
    brain = torch.from_numpy((stack != 0).any(axis=0))
    if float(brain.float().mean()) > 0.9:
        findings.append(finding(code="background", message="more than 90 % of the voxels are not 0 in some modality; "
                                "expected skull-stripped scans whose background is 0"))
        return None, findings
    turned = None if label is None else torch.from_numpy(np.ascontiguousarray(to_ras(label, affine)[0]))
    if turned is not None and (stray := int((turned.bool() & ~brain).sum())):
        findings.append(finding(code="label-outside", severity="warning",
                                message=f"{stray} labelled voxels lie where every modality is 0"))
    return _Scan(image=image, brain=brain, label=turned, affine=straight), findings


def _internal_label(volume: Volume, convention: str) -> tuple[np.ndarray | None, str]:
    """The label map in fedlab's values, or what is wrong with it."""
    if convention not in CONVENTIONS:
        raise ValueError(f"label_convention is one of {', '.join(map(repr, CONVENTIONS))}, got {convention!r}")
    known = CONVENTIONS[convention]
    array = np.asarray(volume.array)
    label, seen = np.zeros_like(array, dtype=np.uint8), np.zeros_like(array, dtype=np.bool_)
    for value, inside in known.items():
        here = array == value
        np.copyto(label, inside, where=here)
        seen |= here
    if seen.all():
        return label, ""
    others = [name for name, table in CONVENTIONS.items() if np.isin(array, list(table)).all()]
    hint = (f"if they follow another convention, say label_convention={' or '.join(map(repr, others))}"
            if others else f"label_convention knows {', '.join(map(repr, CONVENTIONS))} and none of them has these")
    shown = ", ".join(f"{value:g}" for value in np.unique(array[~seen])[:6].tolist())
    return None, (f"{volume.path.name} holds the values {shown}; convention {convention!r} knows "
                  f"{', '.join(map(str, known))}; {hint}")


def read_patient(files: PatientFiles, *, spacing_mm: float | None = None, shape: tuple[int, int, int] | None = None,
                 label_convention: str = "brats2021", dtype: torch.dtype = torch.float16) -> Patient:
    """Read one patient onto RAS axes and the grid wanted, z-scored over the brain.

    Images are averaged over what a coarser voxel covers (of brain voxels only, so that the rim isn't
    dimmed) and interpolated onto finer ones. A region label is kept where it fills at least half a voxel.

    Args:
        files: from `find_patients`.
        spacing_mm: edge of the new cubic voxels in mm; None keeps the scan's own voxels.
        shape: voxels of the new grid, the brain in its centre; None takes the smallest multiple of 16 that
            holds the brain. A brain that doesn't fit is refused, never cut.
        label_convention: one of `CONVENTIONS`.
        dtype: of the image.

    Raises:
        DataError: the files can't be used as they are; all problems are listed at once.
        ValueError: options out of range.
    """
    scan, findings = _examine(files, label_convention)
    _settle({files.id: files}, findings, broken="raise", where=files.images[MODALITIES[0]].parent)
    if scan is None:  # only with an error, which _settle has raised
        raise DataError(f"{files.id}: could not be read")
    return _on_grid(files.id, scan, spacing_mm=spacing_mm, shape=shape, dtype=dtype)


def _on_grid(name: str, scan: _Scan, *, spacing_mm: float | None, shape: tuple[int, int, int] | None,
             dtype: torch.dtype) -> Patient:
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
                        f"{shape}; give a larger shape or a larger spacing_mm")
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


def read_label(files: PatientFiles, *, label_convention: str = "brats2021") \
        -> tuple[torch.Tensor, tuple[float, float, float]]:
    """The expert's labels on the patient's own grid, uint8 (X, Y, Z) in stored order, and its spacing in mm.

    Raises:
        DataError: there is no label, or it can't be used.
    """
    if files.label is None:
        raise DataError(f"{files.id} has no label file; expected {files.id}_seg.nii.gz beside its scans")
    volume = read_volume(files.label)
    label, problem = _internal_label(volume, label_convention)
    if label is None:
        raise DataError(f"{files.id}: {problem}")
    return torch.from_numpy(label), volume.spacing_mm


def to_native(prediction: torch.Tensor, *, patient: Patient, files: PatientFiles, threshold: float = 0.5) -> np.ndarray:
    """Map a prediction back onto the patient's own grid, orientation and axes.

    Args:
        prediction: on the grid of `patient`: labels 1/2/4 as uint8 (X, Y, Z), or regions as probabilities or
            0/1, shape (3, X, Y, Z) in the order of `fedlab.types.REGIONS`.
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
    own = read_volume(files.images[MODALITIES[0]], voxels=False)
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
    return write_label(path, label, like=read_volume(files.images[MODALITIES[0]], voxels=False))


def read_sites(folder: str | os.PathLike[str], table: str | os.PathLike[str], *, spacing_mm: float = 3.0,
               shape: tuple[int, int, int] | None = None, held_out: float = 0.2, seed: int = 0,
               label_convention: str = "brats2021", broken: Broken = "raise", progress: bool = True) -> list[Site]:
    """Read a BraTS folder and its institution table into sites, in memory (float16, one grid for all).

    Args:
        folder: see `find_patients`.
        table: see `read_partitioning`; patients in the folder but not in the table are left out with a warning.
        spacing_mm: edge of the voxels in mm.
        shape: voxels of the common grid; None takes the smallest multiples of 16 that hold every brain.
        held_out: fraction or number of patients a site holds out, see `split_patients`. A site with one
            patient trains on it and holds none out.
        seed: of the split.
        label_convention: one of `CONVENTIONS`.
        broken: "raise" stops at problems, all of them listed at once; "skip" goes on without those patients.
        progress: show a progress bar.

    Raises:
        DataError: folder, table or patients that can't be used; patients of the table without a folder.
    """
    partition = read_partitioning(table)
    wanted = [patient for patients in partition.values() for patient in patients]
    found, findings = _choose(Path(folder), wanted, table)
    read = partial(_read_labelled, label_convention=label_convention, spacing_mm=spacing_mm, shape=shape)
    patients: dict[str, Patient] = {}
    for files, (patient, problems) in zip(found.values(), _parallel(read, list(found.values()), progress), strict=True):
        findings += problems
        if patient is not None:
            patients[files.id] = patient
    good = _settle(found, findings, broken=broken, where=folder)
    common = shape or tuple(max(patients[name].image.shape[axis] for name in good) for axis in (1, 2, 3))
    sites = []
    for name, members in partition.items():
        own = [_pad(patients[member], common) for member in members if member in good]
        if own:
            train, val = split_patients(own, held_out=held_out, seed=seed, site=name)
            sites.append(Site(name=name, train=train, val=val))
    return sites


def _choose(folder: Path, wanted: Sequence[str], table: str | os.PathLike[str]) \
        -> tuple[dict[str, PatientFiles], list[Finding]]:
    """The files of the patients in the table, by id, and what is wrong with folder or table."""
    homes = {home.name: home for home in _patient_folders(folder)}
    found: dict[str, PatientFiles] = {}
    findings = [Finding(patient=name, code="not-in-table", severity="warning", message=f"has a folder but no row in "
                        f"{Path(table).name}; left out") for name in homes if name not in set(wanted)]
    for name in wanted:
        if name not in homes:
            findings.append(Finding(patient=name, code="no-folder", message=f"stands in {Path(table).name} but has no "
                                    f"folder with scans in {folder}"))
            continue
        files, problems = _name_files(homes[name])
        findings += problems
        if files is not None and files.label is None:
            findings.append(Finding(patient=name, code="no-label", message=f"no {name}_seg.nii.gz to learn from"))
        elif files is not None:
            found[name] = files
    return found, findings


def _read_labelled(files: PatientFiles, *, label_convention: str, spacing_mm: float,
                   shape: tuple[int, int, int] | None) -> tuple[Patient | None, list[Finding]]:
    scan, findings = _examine(files, label_convention)
    if scan is None:
        return None, findings
    try:
        return _on_grid(files.id, scan, spacing_mm=spacing_mm, shape=shape, dtype=torch.float16), findings
    except DataError as error:
        return None, [*findings, Finding(patient=files.id, code="too-large", message=str(error))]


def _parallel(read: Callable[[PatientFiles], tuple[Patient | None, list[Finding]]], files: Sequence[PatientFiles],
              progress: bool) -> list[tuple[Patient | None, list[Finding]]]:
    from tqdm.auto import tqdm

    pool = ThreadPoolExecutor(available_cores())  # inflating and averaging both run outside Python's lock
    try:
        return list(tqdm(pool.map(read, files), total=len(files), desc="reading patients", unit="patient",
                         disable=not progress))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C doesn't wait for every patient


def _pad(patient: Patient, shape: Sequence[int]) -> Patient:
    """The same patient in the centre of a larger grid."""
    before = [(m - n) // 2 for m, n in zip(shape, patient.image.shape[1:], strict=True)]
    after = [m - n - b for m, n, b in zip(shape, patient.image.shape[1:], before, strict=True)]
    if not any(before + after):
        return patient
    sides = [side for pair in reversed(list(zip(before, after, strict=True))) for side in pair]
    label = None if patient.label is None else torch.nn.functional.pad(patient.label, sides)
    affine = patient.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.asarray(before, dtype=np.float64)
    return replace(patient, image=torch.nn.functional.pad(patient.image, sides), label=label, affine=affine)
