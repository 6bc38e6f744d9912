"""A patient with layers of labels, the reference and the predictions of arms, and what a viewer shows of them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch

from fedlab.core.regions import REGION_ORDER, regions_to_labels
from fedlab.core.settings import check_choice, check_within
from fedlab.core.types import MODALITIES, REGIONS, Patient
from fedlab.data.readers.nifti import Volume, read_volume, same_grid, to_ras
from fedlab.view.colours import ERRORS, LABEL_COLOURS, LABEL_NAMES, REGION_LABELS, REGION_NAMES

__all__ = ["OVERLAYS", "REFERENCE", "VIEWS", "Case", "Prediction", "RegionFacts", "View", "ViewSettings", "as_labels",
           "check_ras", "grey_values", "head_box", "largest_slice", "make_case", "patient_grid"]

#: The forms of a prediction: labels (X, Y, Z), regions (3, X, Y, Z), a NIfTI image, or the path of one.
Prediction: TypeAlias = torch.Tensor | npt.NDArray[Any] | nib.spatialimages.SpatialImage | str | os.PathLike[str]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Box: TypeAlias = tuple[slice, slice, slice]

View: TypeAlias = Literal["all", "axial", "coronal", "sagittal", "3-D"]
#: Three planes and the 3-D view together, or one of them.
VIEWS: tuple[str, ...] = get_args(View)
#: What is drawn over the scan: labels, the errors of a region, or nothing.
OVERLAYS = ("labels", *(f"errors {region}" for region in REGION_NAMES), "none")
#: Name of the layer with the expert's labels.
REFERENCE = "reference"
_MARGIN = 2  # voxels around the head
_SAMPLE = 200_000  # voxels from which percentiles are estimated


class RegionFacts(NamedTuple):
    """Volume and overlap of one region of a layer; NaN where there is no reference."""

    region: str
    ml: float
    reference_ml: float
    dice: float


def as_labels(patient: Patient, prediction: Prediction, *, name: str = "prediction") -> Bytes:
    """Converts a prediction in any of its forms to BraTS labels on the patient's grid, uint8, shape (X, Y, Z).

    Args:
        patient: defines the grid.
        prediction: label map of shape (X, Y, Z) with the values 0, 1, 2, 4, not copied if it is uint8; regions or
            their probabilities of shape (3, X, Y, Z) in the order of `REGIONS`, thresholded at 0.5; a nibabel image or
            the path of a NIfTI file with labels, whose affine must be the patient's.
        name: of the prediction in error messages.

    Raises:
        ValueError: another shape or affine, invalid labels or probabilities, NaN, or an unreadable file
            (`fedlab.core.DataError`).
    """
    array = _array(patient, prediction, name)
    grid = tuple(patient.image.shape[1:])
    regions = array.ndim == 4 and array.shape[0] == len(REGIONS)
    if (array.shape[1:] if regions else array.shape) != grid:
        raise ValueError(f"{name} of patient {patient.id} has shape {array.shape}; expected a label map of shape "
                         f"{grid} or regions ({', '.join(REGIONS)}) of shape {(len(REGIONS), *grid)}: resample it to "
                         "the patient's grid first")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} of patient {patient.id} holds NaN or Inf: did the training diverge?")
    if not regions:
        return _valid_labels(patient, array, name)
    if array.dtype.kind == "f" and (array.min() < 0 or array.max() > 1):
        raise ValueError(f"{name} of patient {patient.id} holds values from {array.min():g} to {array.max():g}; "
                         "regions are 0/1 or probabilities: logits need .sigmoid()")
    return regions_to_labels(torch.from_numpy(np.ascontiguousarray(array >= 0.5))).numpy()


def _array(patient: Patient, prediction: Prediction, name: str) -> npt.NDArray[Any]:
    if isinstance(prediction, torch.Tensor):
        tensor = prediction.detach().cpu()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if isinstance(prediction, np.ndarray):
        return prediction
    if isinstance(prediction, (str, os.PathLike)):
        stored = read_volume(prediction)
        array, affine = to_ras(stored.array if stored.array is not None else np.empty(0), stored.affine)
    elif isinstance(prediction, nib.spatialimages.SpatialImage):
        if len(prediction.shape) != 3:
            raise ValueError(f"{name} of patient {patient.id} is a {len(prediction.shape)}-D image of shape "
                             f"{prediction.shape}; expected one 3-D label map: choose one volume, image.slicer[..., 0]")
        array, affine = to_ras(np.asanyarray(prediction.dataobj), np.asarray(prediction.affine, dtype=np.float64))
    else:
        raise ValueError(f"{name} is a {type(prediction).__name__}; expected a tensor or array of labels (X, Y, Z) or "
                         "regions (3, X, Y, Z), a nibabel image, or the path of a NIfTI file")
    grid = patient_grid(patient)
    if array.shape == grid.shape and not same_grid(grid, replace(grid, affine=affine)):
        own_mm, given_mm = (", ".join(f"{mm:.1f}" for mm in known[:3, 3]) for known in (grid.affine, affine))
        raise ValueError(f"{name} of patient {patient.id} lies elsewhere: its affine puts voxel (0, 0, 0) at "
                         f"({given_mm}) mm, the patient's at ({own_mm}) mm (RAS); resample it to the patient's grid, "
                         "or use the affine of the scan it was made from")
    return array


def patient_grid(patient: Patient) -> Volume:
    """Shape and affine of a patient, without voxels."""
    x, y, z = patient.image.shape[1:]
    return Volume(path=Path(), shape=(x, y, z), affine=np.asarray(patient.affine, dtype=np.float64), codes=(1, 1))


def _valid_labels(patient: Patient, array: npt.NDArray[Any], name: str) -> Bytes:
    labels = array if array.dtype == np.uint8 else array.astype(np.uint8)
    if labels is not array and not np.array_equal(labels, array):
        raise ValueError(f"{name} of patient {patient.id} holds invalid labels, from {array.min():g} to "
                         f"{array.max():g}; expected 0, 1, 2 and 4, or probabilities of regions of shape (3, X, Y, Z)")
    if invalid := sorted(set(np.flatnonzero(np.bincount(labels.ravel())).tolist()) - {0, *LABEL_COLOURS}):
        hint = "; BraTS 2023 and later encode the enhancing tumour as 3: torch.where(labels == 3, 4, labels)" \
            if invalid == [3] else ""
        raise ValueError(f"{name} of patient {patient.id} holds the value{'s' * (len(invalid) > 1)} "
                         f"{', '.join(map(str, invalid))}; labels are 1 (core), 2 (oedema) and 4 (enhancing){hint}")
    return labels


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One patient and layers of labels over it.

    Attributes:
        patient: the patient shown; its image is not copied.
        layers: "reference" if the patient has labels, then the arms, in order: uint8, shape (x, y, z), cropped.
        box: the part of the patient's grid that is shown: the head and all labels, with a margin.
        affine: float64, shape (4, 4), voxel of the box -> mm in RAS.
    """

    patient: Patient
    layers: Mapping[str, Bytes]
    box: Box
    affine: npt.NDArray[np.float64]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels of the box along x, y, z."""
        x, y, z = (part.stop - part.start for part in self.box)
        return x, y, z

    def grey(self, modality: str) -> Bytes:
        """A modality as grey values; see `grey_values`. Computed anew at every call."""
        return grey_values(self.patient, modality, self.box)

    def grey_range(self, modality: str) -> tuple[float, float]:
        """The intensities of the grey values 10 and 255 of a modality."""
        return _scale(_finite(self.patient, modality, self.box))

    def layer(self, name: str) -> Bytes:
        """The labels of a layer; raises `ValueError` if there is none of this name."""
        if name not in self.layers:
            known = ", ".join(self.layers) or "none: the patient has no label map and no prediction was given"
            raise ValueError(f"there is no layer {name!r}; there are {known}")
        return self.layers[name]

    def beside(self, name: str | None) -> str | None:
        """The layer to compare one with: the reference, for the reference the first arm; None if there is no other."""
        others = [other for other in self.layers if other != REFERENCE]
        if REFERENCE not in self.layers or name is None or not others:
            return None
        return others[0] if name == REFERENCE else REFERENCE

    def scored(self, name: str | None) -> bool:
        """Whether a layer is a prediction with a reference to compare it with."""
        return name is not None and name != REFERENCE and REFERENCE in self.layers

    def errors(self, layer: str, region: str = "WT") -> Bytes:
        """The differences of a layer from the reference: 1 false positive, 2 false negative, 3 both, 0 neither."""
        if REFERENCE not in self.layers:
            raise ValueError(f"patient {self.patient.id} has no label map, so there is no error map")
        check_choice(REGION_LABELS, region=region)
        guess, truth = (np.isin(self.layer(name), REGION_LABELS[region]) for name in (layer, REFERENCE))
        return guess + np.uint8(2) * truth

    def facts(self, layer: str) -> list[RegionFacts]:
        """Volume of each region, and its Dice with the reference: 1 if both are empty, as in `evaluate`."""
        voxel_ml = math.prod(self.patient.spacing_mm) / 1000
        guess, truth = self.layer(layer), self.layers.get(REFERENCE)
        # The number of voxels with each pair of labels gives all regions from one pass over the volume.
        pairs = guess if truth is None else guess | truth << np.uint8(4)
        counts = np.bincount(pairs.ravel(), minlength=256).reshape(16, 16)
        facts = []
        for region in REGION_ORDER:
            labels = list(REGION_LABELS[region])
            size, known = int(counts[:, labels].sum()), int(counts[labels].sum())
            both = int(counts[np.ix_(labels, labels)].sum())
            dice = 2 * both / (size + known) if size + known else 1.0
            reference = (math.nan, math.nan) if truth is None else (known * voxel_ml, dice)
            facts.append(RegionFacts(region, size * voxel_ml, *reference))
        return facts

    def centre(self) -> tuple[int, int, int]:
        """Voxel of the box where the planes with most tumour meet, in the first layer with tumour; else the middle."""
        tumour = next((labels for labels in self.layers.values() if labels.any()), None)
        x, y, z = (size // 2 if tumour is None else largest_slice(tumour, axis)
                   for axis, size in enumerate(self.shape))
        return x, y, z


def grey_values(patient: Patient, modality: str, box: Box = (slice(None), slice(None), slice(None))) -> Bytes:
    """A modality within a box, scaled between two percentiles of its nonzero voxels to 10...255; 0 stays 0."""
    volume = _finite(patient, modality, box)
    low, high = _scale(volume)
    brain = volume != 0
    volume -= low
    volume *= 245 / (high - low)
    np.clip(volume, 0, 245, out=volume)
    grey: Bytes = ((volume + 10) * brain).astype(np.uint8)  # the brain stands out from the background
    return grey


def _finite(patient: Patient, modality: str, box: Box) -> npt.NDArray[np.float32]:
    """A copy of a modality within a box; raises `ValueError` for NaN and Inf."""
    check_choice(MODALITIES, modality=modality)
    volume = patient.image[MODALITIES.index(modality)][box].detach().cpu().to(torch.float32, copy=True).numpy()
    if invalid := int(np.count_nonzero(~np.isfinite(volume))):
        raise ValueError(f"{modality} of patient {patient.id} holds NaN or Inf in {invalid:,} voxels and cannot be "
                         "shown; fedlab data inspect reports what is wrong with a scan")
    return volume


def _scale(volume: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Two percentiles of the nonzero voxels, (0, 1) if there are none."""
    inside = volume[volume != 0]
    if not inside.size:
        return 0.0, 1.0
    low, high = np.percentile(inside[::max(1, inside.size // _SAMPLE)], (0.5, 99.7))
    return float(low), max(float(high), float(low) + 1e-6)


def largest_slice(labels: npt.NDArray[Any], axis: int) -> int:
    """Index of the slice across `axis` with the largest labelled area; of several equal ones, the middle."""
    area = np.count_nonzero(labels, axis=tuple(other for other in range(3) if other != axis))
    best = np.flatnonzero(area == area.max())
    return int(best[len(best) // 2])


def check_ras(patient: Patient) -> None:
    """Raises `ValueError` for axes other than right, anterior, superior: left and right could be mistaken."""
    codes = nib.orientations.aff2axcodes(patient.affine)
    if codes != ("R", "A", "S"):
        raise ValueError(f"the axes of patient {patient.id} point {', '.join(map(str, codes))}, but figures mark left "
                         "and right for R, A, S; read the scan with fedlab.data.read_patient or reorient it")


def make_case(patient: Patient, arms: Mapping[str, Prediction]) -> Case:
    """Checks a patient and the predictions of arms, and crops them to the head; raises `ValueError` as `show` does."""
    if not isinstance(patient, Patient):
        more = f" of {len(patient)} patients; fedlab.compare shows several" if isinstance(patient, Sequence) else ""
        raise ValueError(f"expected one Patient, got a {type(patient).__name__}{more}")
    if not patient.image.numel():
        raise ValueError(f"the image of patient {patient.id} holds no voxel, its shape is {tuple(patient.image.shape)}")
    check_ras(patient)
    if REFERENCE in arms:
        raise ValueError(f"the arm name {REFERENCE!r} is reserved for the patient's own label map")
    layers = {} if patient.label is None else {REFERENCE: patient.label.cpu().numpy()}
    layers |= {name: as_labels(patient, labels, name=f"prediction {name!r}") for name, labels in arms.items()}
    box = head_box(patient, *layers.values(), margin=_MARGIN)
    affine = np.array(patient.affine, dtype=np.float64)
    affine[:3, 3] += affine[:3, :3] @ np.array([part.start for part in box], dtype=np.float64)
    return Case(patient=patient, layers={name: labels[box] for name, labels in layers.items()}, box=box, affine=affine)


def head_box(patient: Patient, *layers: Bytes, margin: int = 0) -> Box:
    """Bounds of all voxels that are nonzero in any modality or layer, with a margin; the whole grid if none is."""
    from scipy.ndimage import find_objects

    used = (patient.image.detach() != 0).any(dim=0).cpu().numpy()
    for labels in layers:
        used |= labels != 0
    if not used.any():
        used[:] = True
    x, y, z = (slice(max(0, part.start - margin), min(size, part.stop + margin))
               for part, size in zip(find_objects(used.view(np.uint8))[0], used.shape, strict=True))
    return x, y, z


@dataclass(frozen=True, kw_only=True)
class ViewSettings:
    """What is shown of a case; as the arguments of `fedlab.show`, except:

    Attributes:
        layer: name of the layer over the scan: "reference" or an arm; None where there is none.
        crosshair: voxel of the case's box where the planes meet.

    Raises:
        ValueError: an unknown choice, or an opacity out of range.
    """

    modality: str = MODALITIES[0]
    view: str = "all"
    layer: str | None = None
    overlay: str = "labels"
    opacity: float = 0.6
    labels: tuple[int, ...] = (1, 2, 4)
    crosshair: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        check_choice(MODALITIES, modality=self.modality)
        check_choice(VIEWS, view=self.view)
        check_choice(OVERLAYS, overlay=self.overlay)
        check_within(most=1, opacity=self.opacity)
        if unknown := set(self.labels) - set(LABEL_COLOURS):
            raise ValueError(f"labels are some of {', '.join(map(str, LABEL_COLOURS))}, got {sorted(unknown)}")

    @property
    def region(self) -> str | None:
        """Region of the error map, None where labels are shown."""
        return self.overlay.split()[1] if self.overlay.startswith("errors") else None

    def values(self, case: Case, layer: str | None) -> Bytes | None:
        """Values of the overlay in the box: labels, or an error map; None for no overlay."""
        if layer is None or self.overlay == "none":
            return None
        return case.layer(layer) if self.region is None else case.errors(layer, self.region)

    def colours(self) -> dict[int, tuple[str, float]]:
        """Value of the overlay -> its colour and opacity, without the labels that are not drawn."""
        if self.region is None:
            return {value: (LABEL_COLOURS[value], self.opacity) for value in LABEL_COLOURS if value in self.labels}
        return {value: (colour, self.opacity * (0.6 if value == 3 else 1.0))
                for value, (colour, _) in ERRORS.items()}

    def names(self) -> dict[int, str]:
        """Value of the overlay -> its name."""
        return dict(LABEL_NAMES) if self.region is None else {
            value: f"{name} {self.region}" for value, (_, name) in ERRORS.items()}

    def legend(self) -> dict[str, str]:
        """Colour -> its meaning."""
        if self.overlay == "none":
            return {}
        if self.region is None:
            return {LABEL_COLOURS[value]: LABEL_NAMES[value] for value in LABEL_COLOURS if value in self.labels}
        return {ERRORS[value][0]: name for value, name in self.names().items()}
