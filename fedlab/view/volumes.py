"""A patient and what arms say about it, as viewers want it: cropped to the head, bytes, made only when shown."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch

from fedlab.core.regions import regions_to_labels
from fedlab.core.types import MODALITIES, REGIONS, Patient
from fedlab.data.readers.nifti import Volume, read_volume, same_grid, to_ras

__all__ = ["ERRORS", "MEMBERS", "REFERENCE", "Case", "Prediction", "RegionFacts", "as_labels", "make_case"]

#: What may be given as a prediction: labels (X, Y, Z), regions (3, X, Y, Z), a NIfTI image, or the path of one.
Prediction: TypeAlias = torch.Tensor | npt.NDArray[Any] | nib.spatialimages.SpatialImage | str | os.PathLike[str]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Box: TypeAlias = tuple[slice, slice, slice]

#: Name of the layer that holds the expert's labels.
REFERENCE = "reference"
#: Values of an error map, their colours and names; told apart from `fedlab.view.slices.COLOURS` and from each other.
ERRORS: Mapping[int, tuple[str, str]] = {
    1: ("#F032E6", "false positive"), 2: ("#2F8CFF", "false negative"), 3: ("#D9D9D9", "both"),
}
_LABELS = (1, 2, 4)
_NOWHERE = Path()
#: Region -> the labels that belong to it.
MEMBERS: Mapping[str, tuple[int, ...]] = {"TC": (1, 4), "WT": (1, 2, 4), "ET": (4,)}
_MARGIN = 2
_SAMPLE = 200_000


class RegionFacts(NamedTuple):
    """One region as a layer has it; NaN where there is no reference to compare with."""

    region: str
    ml: float
    reference_ml: float
    dice: float


def as_labels(patient: Patient, prediction: Prediction, *, name: str = "prediction") -> Bytes:
    """A prediction in any of its forms as BraTS labels on the patient's grid.

    Args:
        patient: whose grid it must lie on.
        prediction: label map of shape (X, Y, Z) with the values 0, 1, 2, 4; regions or their probabilities of shape
            (3, X, Y, Z) in the order of `REGIONS`, which count from 0.5 on; a nibabel image or the path of a NIfTI
            file with labels, whose affine is compared with the patient's.
        name: what messages call it.

    Returns:
        uint8, shape (X, Y, Z). A uint8 array is handed back as it is, not copied.

    Raises:
        ValueError: another shape or affine, values that are no labels or probabilities, NaN, or a file that can't
            be read (`fedlab.core.DataError`).
    """
    array = _array(patient, prediction, name)
    grid = tuple(patient.image.shape[1:])
    regions = array.ndim == 4 and array.shape[0] == len(REGIONS)
    if (array.shape[1:] if regions else array.shape) != grid:
        raise ValueError(f"{name} of patient {patient.id} has shape {array.shape}; expected a label map of shape "
                         f"{grid} or regions ({', '.join(REGIONS)}) of shape {(len(REGIONS), *grid)}: bring it to "
                         "the patient's grid first")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{name} of patient {patient.id} holds NaN or Inf: has the training that made it diverged?")
    if regions:
        if array.dtype.kind == "f" and (array.min() < 0 or array.max() > 1):
            raise ValueError(f"{name} of patient {patient.id} holds values from {array.min():g} to {array.max():g}; "
                             "regions are 0/1 or probabilities: logits need .sigmoid()")
        return regions_to_labels(torch.from_numpy(np.ascontiguousarray(array >= 0.5))).numpy()
    return _only_labels(patient, array, name)


def _array(patient: Patient, prediction: Prediction, name: str) -> npt.NDArray[Any]:
    if isinstance(prediction, torch.Tensor):
        plain = prediction.detach().cpu()
        return (plain.float() if plain.dtype == torch.bfloat16 else plain).numpy()
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
    _same_place(patient, array.shape, affine, name)
    return array


def _same_place(patient: Patient, shape: tuple[int, ...], affine: npt.NDArray[Any], name: str) -> None:
    def grid(size: Sequence[int], at: npt.NDArray[Any]) -> Volume:
        return Volume(path=_NOWHERE, shape=(size[0], size[1], size[2]), affine=at, codes=(1, 1))

    own = grid(patient.image.shape[1:], np.asarray(patient.affine, dtype=np.float64))
    if own.shape == tuple(shape) and not same_grid(own, grid(shape, affine)):
        raise ValueError(f"{name} of patient {patient.id} lies elsewhere: its affine puts voxel (0, 0, 0) at "
                         f"{_point(affine)} mm, the patient's at {_point(own.affine)} mm (RAS); resample it to the "
                         "patient's grid, or take the affine from the scan it was made on")


def _point(affine: npt.NDArray[Any]) -> str:
    return "(" + ", ".join(f"{float(mm):.1f}" for mm in affine[:3, 3]) + ")"


def _only_labels(patient: Patient, array: npt.NDArray[Any], name: str) -> Bytes:
    labels = array if array.dtype == np.uint8 else array.astype(np.uint8)
    if labels is not array and not np.array_equal(labels, array):
        raise ValueError(f"{name} of patient {patient.id} holds values that are no labels, from {array.min():g} to "
                         f"{array.max():g}; expected 0, 1, 2 and 4 (probabilities come as regions, shape (3, X, Y, Z))")
    other = sorted(set(np.flatnonzero(np.bincount(labels.ravel(), minlength=5)).tolist()) - {0, *_LABELS})
    if other:
        hint = "; BraTS 2023 and later call the enhancing tumour 3: torch.where(labels == 3, 4, labels)" \
            if other == [3] else ""
        raise ValueError(f"{name} of patient {patient.id} holds the value{'s' * (len(other) > 1)} "
                         f"{', '.join(map(str, other))}; labels are 1 (core), 2 (oedema) and 4 (enhancing){hint}")
    return labels


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """What a viewer shows: one patient, and layers of labels over it.

    Attributes:
        patient: who is shown; its image is not copied.
        layers: "reference" where an expert drew labels, then the arms, in order: uint8, shape (x, y, z), cropped.
        box: what of the patient's grid is shown: the head and everything labelled, with a margin.
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
        """A modality between two percentiles of the brain as bytes, 0 outside it; made anew at every call.

        Raises:
            ValueError: an unknown modality, or NaN in it.
        """
        if modality not in MODALITIES:
            raise ValueError(f"modality is one of {', '.join(MODALITIES)}, got {modality!r}")
        part = self.patient.image[MODALITIES.index(modality)][self.box].detach().cpu()
        volume = part.to(torch.float32, copy=True).numpy()
        if not np.isfinite(volume).all():
            wrong = int(np.count_nonzero(~np.isfinite(volume)))
            raise ValueError(f"{modality} of patient {self.patient.id} holds NaN or Inf in {wrong:,} voxels, so it "
                             "can't be shown; fedlab data inspect says what is wrong with a scan")
        brain = volume != 0
        inside = volume[brain]
        if not inside.size:
            return np.zeros(self.shape, dtype=np.uint8)
        low, high = np.percentile(inside[::max(1, inside.size // _SAMPLE)], (0.5, 99.7))
        volume -= low
        volume *= 245 / max(float(high - low), 1e-6)  # the brain stands off the background, which is 0
        np.clip(volume, 0, 245, out=volume)
        volume += 10
        volume *= brain
        return volume.astype(np.uint8)

    def errors(self, layer: str, region: str = "WT") -> Bytes:
        """Where a layer and the reference differ: 1 false positive, 2 false negative, 3 in both, 0 in neither.

        Raises:
            ValueError: an unknown layer or region, or there is no reference.
        """
        if REFERENCE not in self.layers:
            raise ValueError(f"patient {self.patient.id} has no label map, so there is no error map")
        guess, truth = (_member(self.layer(name), region) for name in (layer, REFERENCE))
        return (guess & ~truth) + np.uint8(2) * (truth & ~guess) + np.uint8(3) * (guess & truth)

    def layer(self, name: str) -> Bytes:
        """The labels of a layer.

        Raises:
            ValueError: there is no such layer.
        """
        if name not in self.layers:
            known = ", ".join(self.layers) or "none: the patient has no label map and no prediction was given"
            raise ValueError(f"there is no layer {name!r}; there are {known}")
        return self.layers[name]

    def facts(self, layer: str) -> list[RegionFacts]:
        """Volume of each region, and its Dice with the reference: 1 if both are empty, as in `fedlab.training.metrics`."""
        voxel_ml = math.prod(self.patient.spacing_mm) / 1000
        guess, truth = self.layer(layer), self.layers.get(REFERENCE)
        # How many voxels have each pair of labels: all regions from one pass over the volume.
        pairs = guess if truth is None else guess | truth << np.uint8(4)
        counts = np.bincount(pairs.ravel(), minlength=256).reshape(16, 16)
        facts = []
        for region, members in ((region, list(MEMBERS[region])) for region in REGIONS):
            size = int(counts[:, members].sum())
            known, both = int(counts[members].sum()), int(counts[np.ix_(members, members)].sum())
            dice = 2 * both / (size + known) if size + known else 1.0
            facts.append(RegionFacts(region, size * voxel_ml, *((math.nan, math.nan) if truth is None
                                                                else (known * voxel_ml, dice))))
        return facts

    def table(self, layer: str) -> str:
        """The facts of a layer as an HTML table; names from outside are escaped."""
        scored = REFERENCE in self.layers and layer != REFERENCE
        head = ["", "ml", "reference ml", "Dice"] if scored else ["", "ml"]
        rows = []
        for fact in self.facts(layer):
            numbers = [f"{fact.ml:.1f}", *([f"{fact.reference_ml:.1f}", f"{fact.dice:.3f}"] if scored else [])]
            cells = "".join(f'<td style="text-align:right">{number}</td>' for number in numbers)
            rows.append(f'<tr><th style="text-align:left">{fact.region}</th>{cells}</tr>')
        titles = "".join(f'<th style="text-align:right">{name}</th>' for name in head)
        return (f"<b>{html.escape(self.patient.id)}</b>, {html.escape(layer)}<table><tr>{titles}</tr>{''.join(rows)}"
                "</table>")

    def centre(self) -> tuple[int, int, int]:
        """Voxel of the box where most of the tumour of the first layer that has one meets; else its middle."""
        for labels in self.layers.values():
            if labels.any():
                areas = [np.count_nonzero(labels, axis=axes) for axes in ((1, 2), (0, 2), (0, 1))]
                best = [np.flatnonzero(area == area.max()) for area in areas]
                x, y, z = (int(places[len(places) // 2]) for places in best)
                return x, y, z
        x, y, z = (size // 2 for size in self.shape)
        return x, y, z


def make_case(patient: Patient, arms: Mapping[str, Prediction]) -> Case:
    """Checks a patient and predictions, and crops them to the head.

    Args:
        patient: axes right, anterior, superior.
        arms: name of an arm -> its prediction.

    Raises:
        ValueError: the patient's image is no four modalities in 3-D, its axes point elsewhere, its label map has
            another shape, an arm is called "reference", or a prediction can't be used (see `as_labels`).
    """
    if not isinstance(patient, Patient):
        more = f" of {len(patient)} patients; fedlab.compare shows several" if isinstance(patient, Sequence) else ""
        raise ValueError(f"expected one Patient, got a {type(patient).__name__}{more}")
    if patient.image.ndim != 4 or patient.image.shape[0] != len(MODALITIES) or min(patient.image.shape) < 1:
        raise ValueError(f"the image of patient {patient.id} has shape {tuple(patient.image.shape)}; expected "
                         f"({len(MODALITIES)}, X, Y, Z): {', '.join(MODALITIES)}")
    codes = nib.orientations.aff2axcodes(patient.affine)
    if codes != ("R", "A", "S"):
        raise ValueError(f"the axes of patient {patient.id} point {', '.join(map(str, codes))}, but viewers mark left "
                         "and right for R, A, S; read the scan with fedlab.data.read_patient or reorient it")
    if REFERENCE in arms:
        raise ValueError(f"an arm can't be called {REFERENCE!r}: that is the patient's own label map")
    layers = {} if patient.label is None else {REFERENCE: as_labels(patient, patient.label, name="the label map")}
    layers |= {name: as_labels(patient, labels, name=f"prediction {name!r}") for name, labels in arms.items()}
    box = _box(patient, list(layers.values()))
    affine = np.array(patient.affine, dtype=np.float64)
    affine[:3, 3] += affine[:3, :3] @ np.array([part.start for part in box], dtype=np.float64)
    return Case(patient=patient, layers={name: labels[box] for name, labels in layers.items()}, box=box, affine=affine)


def _box(patient: Patient, layers: Sequence[Bytes]) -> Box:
    """Bounds of every voxel that isn't 0 in some modality or layer, with a margin; the whole grid if there is none."""
    seen = torch.zeros(patient.image.shape[1:], dtype=torch.bool)
    for channel in patient.image:
        seen |= channel.detach().cpu() != 0
    spans = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        used = seen.numpy().any(axis=others)
        for labels in layers:
            used = used | labels.any(axis=others)
        inside = np.flatnonzero(used)
        first, last = (int(inside[0]), int(inside[-1])) if inside.size else (0, used.size - 1)
        spans.append(slice(max(0, first - _MARGIN), min(used.size, last + 1 + _MARGIN)))
    return spans[0], spans[1], spans[2]


def _member(labels: Bytes, region: str) -> npt.NDArray[np.bool_]:
    if region not in MEMBERS:
        raise ValueError(f"region is one of {', '.join(MEMBERS)}, got {region!r}")
    known = np.zeros(256, dtype=np.bool_)
    known[list(MEMBERS[region])] = True
    found: npt.NDArray[np.bool_] = known[labels]
    return found
