"""The checks of one patient's files: each on every file, so that all defects are reported at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import nibabel as nib
import numpy as np

from fedlab.core.errors import DataError
from fedlab.core.text import counted
from fedlab.core.types import MODALITIES
from fedlab.data.brain import find_brain, typical_signal
from fedlab.data.readers.conventions import (
    CONVENTIONS,
    count_values,
    rounded,
    wrong_values,
)
from fedlab.data.readers.findings import Finding, Severity
from fedlab.data.readers.nifti import (
    Volume,
    read_volume,
    same_grid,
    turn_volume,
)
from fedlab.data.readers.patient_files import PatientFiles

__all__ = ["Examination", "check_headers", "check_labels", "examine"]

#: Share of the brain's voxels at the largest value from which a volume counts as saturated; at least 10 voxels.
SATURATED = 5e-4
#: Share of the brain from which voxels that are not 0 (or 0) in one modality only are reported.
_ALONE = 0.02
#: Share of the brain's largest cross-section that lies on a face of the volume where the scan is cut off there.
_FACE = 0.4
#: Correlation over the brain from which two modalities are one scan; different ones of real patients stay below 0.95.
_SAME = 0.9999
#: By how much the voxels of T1 are more skewed than those of T2 where the two are swapped: fluid is dark in T1 and
#: bright in T2, and the difference is between -1.9 and -3.5 in the real patients at hand.
_SWAPPED = 0.5
#: The brightness of FLAIR where T2 is brightest, less that of T2 where FLAIR is, in standard deviations, from which the
#: two are swapped: FLAIR suppresses fluid. It is between -1.1 and -3.2 in the real patients at hand.
_FLUID = 0.5
#: By how many standard deviations a part of the tumour is brighter in T1 than in T1c, and no part as much brighter in
#: T1c, where the two are swapped. In the real patients at hand it is at most 0.8, beside 2.5 in the enhancing part.
_ENHANCED = 0.9
#: By how much FLAIR and T2 together, in standard deviations of the brain, are brighter in a mirrored label map than in
#: the label map itself where that is mirrored; in the real patients at hand they are darker by 0.6 to 3.8.
_MIRRORED = 0.5
#: The distance of the largest value from the median, over the range from the 5th to the 95th percentile of the brain,
#: from which a voxel is reported; in the real patients at hand it is at most 6.
_SPIKE = 30
#: Share of the brain that a tumour does not fill.
_MOST = 0.6
_LEAST = 100  # labelled voxels from which this is looked at
#: Values that an image holds at least; masks and label maps hold fewer.
_VALUES = 9
#: Share of a modality's typical signal that ringing far from the brain does not reach.
_FAINT = 0.01


@dataclass(kw_only=True, eq=False)
class Examination:
    """The readable data of one patient, with the findings.

    Attributes:
        volumes: headers by modality and "label".
        images: voxels by modality, stored order, stored type or float32.
        label: voxels of the label map as stored.
        label_counts: number of voxels by value in the label map.
        brain: bool, stored order: where any readable modality is not 0, or less where `cleared`.
        brain_voxels: number of voxels of `brain`.
        cleared: whether voxels outside the brain hold weak values that are read as 0.
    """

    files: PatientFiles
    volumes: dict[str, Volume] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    label: np.ndarray | None = None
    label_counts: dict[float, int] = field(default_factory=dict)
    brain: np.ndarray | None = None
    brain_voxels: int = 0
    cleared: bool = False
    findings: list[Finding] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether there is no error so far."""
        return all(f.severity != "error" for f in self.findings)

    def add(self, code: str, message: str, severity: Severity = "error") -> None:
        """Adds a finding about this patient."""
        self.findings.append(Finding(self.files.id, code, message, severity))


def examine(files: PatientFiles, *, labels: str | None = None) -> Examination:
    """Reads and checks every file of one patient; invalid data becomes a finding, never an exception.

    Args:
        files: some may be missing.
        labels: the label convention; None leaves the meaning of the labels unchecked.
    """
    exam = _load(files, voxels=True)
    for modality in (m for m in MODALITIES if m in exam.volumes):
        _check_image(exam, modality)
    if exam.images and len({array.shape for array in exam.images.values()}) == 1:
        _check_brain(exam)
    if "label" in exam.volumes:
        exam.label = rounded(np.asarray(exam.volumes["label"].array))
        exam.label_counts = count_values(exam.label)
        if exam.brain is not None and exam.label.shape == exam.brain.shape:
            stray = int(np.count_nonzero((exam.label != 0) & ~exam.brain))
            if stray:
                share = stray / np.count_nonzero(exam.label)
                exam.add("label-outside", f"{stray} labelled voxels lie where every modality is 0, {share:.1%} of all; "
                         f"check that the label map belongs to the scans and has their orientation", "warning")
            if exam.sound:
                _check_orientation(exam, exam.label, exam.brain)
                _check_enhancement(exam, exam.label, exam.brain)
    check_labels(exam, labels)
    return exam


def check_headers(files: PatientFiles) -> list[Finding]:
    """Findings about the headers of one patient's files."""
    return _load(files, voxels=False).findings


def _load(files: PatientFiles, *, voxels: bool) -> Examination:
    """Every readable volume of a patient, and findings about the others."""
    exam = Examination(files=files)

    def read(path: Path, series: bool = False) -> Volume | None:
        try:
            volume = read_volume(path, voxels=voxels, series=series)
        except DataError as error:
            exam.add(error.code, str(error))
            return None
        for note in volume.notes:
            exam.add("affines-differ", note, "warning")
        return volume

    if files.channels and files.images:
        if (volume := read(files.images[MODALITIES[0]], series=True)) is not None:
            exam.volumes |= _split_channels(volume, exam)
    else:
        exam.volumes |= {name: volume for name, path in files.images.items() if (volume := read(path)) is not None}
    if files.label is not None and (volume := read(files.label)) is not None:
        exam.volumes["label"] = volume
    if exam.volumes:
        first = next(iter(exam.volumes.values()))
        exam.volumes = {name: turn_volume(volume, first) for name, volume in exam.volumes.items()}
        for other in exam.volumes.values():
            if not same_grid(first, other):
                exam.add("grids-differ", f"{other.path.name} has another grid than {first.path.name}: "
                         f"{_describe(other)}, not {_describe(first)}; register and resample it first")
    return exam


def _split_channels(series: Volume, exam: Examination) -> dict[str, Volume]:
    """The volumes of a 4-D file by modality, without copying voxels."""
    channels = exam.files.channels
    if series.channels != len(channels) or max(channels.values()) >= series.channels:
        exam.add("channels", f"{series.path.name} holds {series.channels or 'one'} volumes; expected {len(channels)}: "
                 f"{', '.join(sorted(channels, key=lambda m: channels[m]))}")
        return {}
    arrays = {name: None if series.array is None else series.array[..., channel] for name, channel in channels.items()}
    return {name: replace(series, channels=0, notes=(), array=arrays[name]) for name in MODALITIES}


def _describe(volume: Volume) -> str:
    shape, spacing = "x".join(map(str, volume.shape)), "x".join(f"{s:g}" for s in volume.spacing_mm)
    corner = ", ".join(f"{v:g}" for v in volume.affine[:3, 3])
    return f"{shape} voxels of {spacing} mm from ({corner})"


def _check_image(exam: Examination, modality: str) -> None:
    """Checks that voxels are finite, not constant, and 0 at the border of the volume."""
    array, name = np.asarray(exam.volumes[modality].array), _name(exam, modality)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):  # overflow of float32 is reported as Inf
            array = array.astype(np.float32, copy=False)
        wrong = array.size - int(np.count_nonzero(np.isfinite(array)))
        if wrong:
            exam.add("not-finite", f"{name} holds {wrong:,} voxels that are NaN or Inf; write their true values, 0 "
                     f"outside the brain")
            return
    low, high = array.min(), array.max()
    exam.images[modality] = array
    if low == high:
        exam.add("blank", f"{name} is blank: every voxel is {float(low):g}")
        return
    if _share_on_faces(array, 0) > 0.5 and (share := _share_on_faces(array, _FAINT * typical_signal(array))) > 0.5:
        exam.add("background", f"{name}: {share:.0%} of the voxels on the volume's faces are not 0; expected "
                 f"skull-stripped scans with background 0")
        return
    if np.unique(array[::6, ::6, ::6]).size < _VALUES and np.unique(array).size < _VALUES:
        exam.add("few-values", f"{name} holds {np.unique(array).size} different values, as a mask or label map does; "
                 f"give the scan itself")
        return
    inside = int(np.count_nonzero(array))
    peak = int(np.count_nonzero(array == high))
    if high != 0 and peak >= 10 and peak >= SATURATED * inside:
        exam.add("saturated", f"{name}: {peak:,} voxels, {peak / inside:.2%} of those that are not 0, share the "
                 f"largest value {float(high):g}; bright structures are cut off", "warning")


def _share_on_faces(array: np.ndarray, level: float) -> float:
    """The share of the voxels on the six faces of a volume whose absolute value is above a level."""
    faces = (array[0], array[-1], array[:, 0], array[:, -1], array[:, :, 0], array[:, :, -1])
    return sum(int(np.count_nonzero(np.abs(face) > level)) for face in faces) / sum(face.size for face in faces)


def _name(exam: Examination, modality: str) -> str:
    name = exam.volumes[modality].path.name
    return f"{modality} in {name}" if exam.files.channels else name


def _check_brain(exam: Examination) -> None:
    """Sets the brain, as a rule where any modality is not 0, and reports modalities that disagree about it."""
    brain = find_brain(list(exam.images.values())) if exam.sound else None
    masks = {modality: array != 0 if brain is None else brain & (np.abs(array) > _FAINT * typical_signal(array))
             for modality, array in exam.images.items()}
    signals = sum((mask.view(np.uint8) for mask in masks.values()), np.zeros((), dtype=np.uint8))
    exam.brain, exam.cleared = np.asarray(signals > 0) if brain is None else brain, brain is not None
    if exam.cleared:
        exam.add("background", "the scans hold voxels around the brain that are not 0 but weak in every modality, as "
                 "resampling or smoothing after skull stripping leaves them; they are read as 0", "warning")
    voxels = exam.brain_voxels = int(np.count_nonzero(exam.brain))
    if not voxels:
        exam.add("empty-brain", "no voxel of any modality has a signal")
        return
    if voxels > 0.9 * exam.brain.size and all(f.code != "background" for f in exam.findings):
        exam.add("background", "more than 90 % of the voxels are not 0 in some modality; expected skull-stripped "
                 "scans with background 0")
    _check_gaps(exam, {"every modality": exam.brain, **{_name(exam, name): mask for name, mask in masks.items()}})
    for axis in range(3):
        area = _areas(exam.brain, axis)
        share = max(area[0], area[-1]) / area.max()
        if share > _FACE and exam.sound:
            exam.add("cut-off", f"the brain reaches a face of the volume ({_axis(exam, axis)}) with {share:.0%} of its "
                     f"largest cross-section; check whether the scans are cut off there", "warning")
    if len(masks) < len(MODALITIES) or not exam.sound:
        return
    _check_contrasts(exam, exam.brain)
    for modality, mask in masks.items():
        alone = int(np.count_nonzero(mask & (signals == 1)))
        if alone > _ALONE * voxels:
            exam.add("background", f"{_name(exam, modality)}: {alone:,} voxels are not 0 here but 0 in all other "
                     f"modalities; check that the background is 0 and the skull is removed", "warning")
        lost = int(np.count_nonzero(~mask & (signals == len(masks) - 1)))
        if lost > _ALONE * voxels:
            exam.add("cut-off", f"{_name(exam, modality)}: {lost:,} voxels are 0 here but not in any other modality; "
                     f"check whether the scan is cut off", "warning")


def _axis(exam: Examination, axis: int) -> str:
    """The direction of a stored axis in words."""
    code = nib.aff2axcodes(exam.volumes[next(iter(exam.images))].affine)[axis]
    return {"L": "left to right", "R": "left to right", "A": "front to back", "P": "front to back"}.get(
        code, "top to bottom")


def _sample(brain: np.ndarray) -> tuple[slice, ...]:
    """Every so many voxels along each axis that about 50,000 lie in the brain."""
    return (slice(None, None, max(1, round((np.count_nonzero(brain) / 50_000) ** (1 / 3)))),) * 3


def _check_contrasts(exam: Examination, brain: np.ndarray) -> None:
    """Reports one scan under two names, and T1 and T2 under each other's."""
    part = _sample(brain)
    values = np.array([exam.images[modality][part][brain[part]] for modality in MODALITIES], dtype=np.float64)
    low, middle, high = np.percentile(values, (5, 50, 95), axis=1)
    for modality, level, spread in zip(MODALITIES, middle, high - low, strict=True):
        if (peak := float(exam.images[modality].max())) - level > _SPIKE * spread > 0:
            exam.add("spike", f"{_name(exam, modality)}: its largest value {peak:g} is {(peak - level) / spread:.0f} "
                     f"times the usual range of its brain, which looks flat beside it; replace wrong voxels", "warning")
    values = values.clip(*np.percentile(values, (0.1, 99.9), axis=1)[..., None])
    values -= values.mean(axis=1, keepdims=True)
    deviation = values.std(axis=1, keepdims=True)
    if (deviation == 0).any():
        return
    values /= deviation
    alike = values @ values.T / values.shape[1]
    for i, j in zip(*np.nonzero(np.triu(alike > _SAME, 1)), strict=True):
        one, other = (_name(exam, MODALITIES[k]) for k in (i, j))
        exam.add("same-scan", f"{one} and {other} are the same scan (correlation {alike[i, j]:.6f}); replace the wrong "
                 f"one by the scan that its name states")
    skew = dict(zip(MODALITIES, (values**3).mean(axis=1), strict=True))
    if skew["T1"] - skew["T2"] > _SWAPPED:
        exam.add("swapped", f"{_name(exam, 'T1')} and {_name(exam, 'T2')} look swapped: fluid seems bright in T1 and "
                 f"dark in T2; check which is which", "warning")
    flair, t2 = (values[MODALITIES.index(name)] for name in ("FLAIR", "T2"))
    if flair[t2 >= np.percentile(t2, 98)].mean() - t2[flair >= np.percentile(flair, 98)].mean() > _FLUID:
        exam.add("swapped", f"{_name(exam, 'FLAIR')} and {_name(exam, 'T2')} look swapped: fluid seems bright in FLAIR "
                 f"and dark in T2; check which is which", "warning")


def _check_enhancement(exam: Examination, label: np.ndarray, brain: np.ndarray) -> None:
    """Reports T1 and T1c that look swapped: contrast medium makes a part of most tumours brighter."""
    if not {"T1", "T1c"} <= exam.images.keys():
        return
    part = _sample(brain)
    levels = {name: exam.images[name][part][brain[part]].astype(np.float64) for name in ("T1", "T1c")}
    gains = []
    for value, count in exam.label_counts.items():
        if value != 0 and count >= _LEAST and len(exam.label_counts) <= _VALUES:
            before, after = ((float(exam.images[name][label == value].mean()) - level.mean()) / max(level.std(), 1e-30)
                             for name, level in levels.items())
            gains.append(after - before)
    if gains and -min(gains) > max(_ENHANCED, max(gains) + _SWAPPED):
        exam.add("swapped", f"{_name(exam, 'T1')} and {_name(exam, 'T1c')} look swapped: a part of the tumour is far "
                 f"brighter in T1 and none in T1c; check which is which", "warning")


def _check_orientation(exam: Examination, label: np.ndarray, brain: np.ndarray) -> None:
    """Reports a label map that fits FLAIR and T2 better when it is mirrored."""
    places = np.array(np.nonzero(label))
    bright = [exam.images[name] for name in ("FLAIR", "T2") if name in exam.images]
    if places.shape[1] < _LEAST or len(bright) < 2:
        return
    part = _sample(brain)
    inside = [array[part][brain[part]] for array in bright]
    levels = [(float(own.mean()), float(own.std())) for own in inside]

    def fit(at: np.ndarray) -> float:
        at = at[:, brain[tuple(at)]]
        if 2 * at.shape[1] < places.shape[1]:
            return -np.inf
        return sum((float(array[tuple(at)].mean()) - mean) / max(deviation, 1e-30)
                   for array, (mean, deviation) in zip(bright, levels, strict=True))

    turned = [np.where(np.arange(3)[:, None] == axis, label.shape[axis] - 1 - places, places) for axis in range(3)]
    fits = [fit(at) for at in turned]
    if (best := max(fits)) > fit(places) + _MIRRORED:
        exam.add("label-mirrored", f"FLAIR and T2 are brighter where the label map would lie if it were mirrored, "
                 f"{_axis(exam, fits.index(best))}; check that it belongs to the scans and has their orientation",
                 "warning")


def _areas(mask: np.ndarray, axis: int) -> np.ndarray:
    """The set voxels of each slice along an axis, of every fourth row and column, or of more in small volumes."""
    step = min(4, max(1, min(mask.shape) // 8))
    part = np.moveaxis(mask, axis, 0)[:, ::step, ::step]
    return np.array([np.count_nonzero(plane) for plane in part])


def _check_gaps(exam: Examination, masks: Mapping[str, np.ndarray]) -> None:
    """Reports slices inside the brain without any signal, those of every modality once."""
    for axis in range(3):
        known: set[int] = set()
        for name, mask in masks.items():
            area = _areas(mask, axis)
            wide = np.flatnonzero(area > 0.02 * area.max())  # not a stray voxel outside the brain
            empty = {*(wide[0] + np.flatnonzero(area[wide[0]:wide[-1]] == 0)).tolist()} if wide.size else set()
            if lost := len(empty - known):
                exam.add("cut-off", f"{name}: {counted(lost, 'slice')} inside the brain, counted {_axis(exam, axis)}, "
                         f"without any signal; check whether slices were lost", "warning")
            known |= empty


def check_labels(exam: Examination, convention: str | None) -> None:
    """Adds findings about the label map under a convention; None if the convention is unknown."""
    counts = exam.label_counts
    if not counts or convention is None:
        return
    name = "label map" if exam.files.label is None else exam.files.label.name
    if problem := wrong_values(counts, convention, exam.files.id):
        exam.add("label-values", f"{name} {problem}")
        return
    present = {CONVENTIONS[convention][int(value)] for value in counts}
    tumour = sum(count for value, count in counts.items() if CONVENTIONS[convention][int(value)])
    if tumour > _MOST * exam.brain_voxels > 0:
        exam.add("label-large", f"{name} labels more than {_MOST:.0%} of the brain's voxels; check that it marks the "
                 f"tumour", "warning")
    if counts.keys() <= {0.0}:
        exam.add("no-tumour", f"{name} is empty", "warning")
    elif 4 not in present:
        exam.add("no-enhancing", f"{name} marks no enhancing tumour; this is valid, but its Dice follows the rule for "
                 f"empty regions", "warning")
    if convention == "brats2024" and (cavity := counts.get(4.0, 0)):
        exam.add("cavity", f"{name}: {cavity:,} voxels of resection cavity count as no tumour", "warning")
