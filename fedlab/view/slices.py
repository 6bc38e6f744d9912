"""Slices of patients with their tumours, as radiologists look at them.

Axial and coronal slices are seen from the patient's feet and face, so the patient's right side is on the left
of the picture (radiological convention); sagittal slices have the patient's face on the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any, Literal, TypeAlias

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from fedlab.core.types import MODALITIES, Patient
from fedlab.view.style import Picture, arm_label, styled
from fedlab.view.volumes import Prediction, as_labels

__all__ = ["COLOURS", "NAMES", "Plane", "best_slice", "compare", "overlay", "show_patient"]

Plane: TypeAlias = Literal["axial", "coronal", "sagittal"]
LabelMap: TypeAlias = torch.Tensor | npt.NDArray[Any]
View: TypeAlias = tuple[float, float]

#: Colours of BraTS labels. The usual red, green and third colour, in tones that the colour-blind tell apart too.
COLOURS: Mapping[int, str] = {1: "#E8432E", 2: "#12B886", 4: "#FFD43B"}
#: Names of BraTS labels.
NAMES: Mapping[int, str] = {1: "necrotic / non-enhancing core", 2: "oedema", 4: "enhancing tumour"}

_AXES: Mapping[Plane, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
_EDGE = withStroke(linewidth=2.0, foreground=(0, 0, 0, 0.55))
_TALLEST = 44.0  # inches of a figure
_SIDES: Mapping[Plane, tuple[str, str]] = {"axial": ("R", "L"), "coronal": ("R", "L"), "sagittal": ("A", "P")}


def best_slice(label: LabelMap, *, plane: Plane = "axial") -> int:
    """Index of the slice with the largest tumour area; of several equal ones, the middle.

    Args:
        label: BraTS labels, shape (X, Y, Z), RAS.
        plane: "axial", "coronal" or "sagittal".

    Raises:
        ValueError: no such plane, or there is no tumour in `label`.
    """
    axis = _axis(plane)
    area = np.count_nonzero(_label(label), axis=tuple(a for a in range(3) if a != axis))
    if not area.any():
        raise ValueError("the label map holds no tumour, so no slice is the best; choose one by index")
    best = np.flatnonzero(area == area.max())
    return int(best[len(best) // 2])


def overlay(ax: Axes, patient: Patient, label: LabelMap | None, *, modality: str = "FLAIR", plane: Plane = "axial",
            index: int | None = None, outline: LabelMap | None = None, view: View | None = None) -> None:
    """Draws a slice of a patient, with the tumour of a label map over it.

    Args:
        ax: what to draw into.
        patient: shows `modality`, one of `MODALITIES`.
        label: BraTS labels to fill with `COLOURS`, shape (X, Y, Z); None for the image alone.
        plane: "axial", "coronal" or "sagittal".
        index: which slice; the best of `label`, or of `outline` or the patient's own, by default.
        outline: a second label map, such as the reference, whose whole tumour is drawn as a white line.
        view: width and height in mm of what is shown around the middle of the brain; the whole brain by default.

    Raises:
        ValueError: an unknown modality or plane, a label map of another shape, an index outside the volume, or a
            patient whose axes aren't right, anterior, superior: left and right could be mistaken.
    """
    _check(patient, label, outline)
    if modality not in MODALITIES:
        raise ValueError(f"modality is one of {', '.join(MODALITIES)}, got {modality!r}")
    if index is None:
        index = _index(patient, plane, [label, outline, patient.label])
    if view is None:
        view = _view([patient], plane)
    grey = _plane(_grey(patient, modality), plane, index)
    across, up = _spacing(patient, plane)
    with styled():
        ax.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="bilinear", aspect="equal",
                  extent=(-across / 2, (grey.shape[1] - 0.5) * across, (grey.shape[0] - 0.5) * up, -up / 2))
        for value, colour in COLOURS.items():
            if label is not None:
                _fill(ax, _plane(_label(label) == value, plane, index), (across, up), colour)
        if outline is not None:
            _line(ax, _plane(_label(outline) > 0, plane, index), (across, up))
        _frame(ax, patient, plane, view)
        for side, x, align in zip(_SIDES[plane], (0.03, 0.97), ("left", "right"), strict=True):
            ax.text(x, 0.97, side, transform=ax.transAxes, color="white", fontsize=9, ha=align, va="top",
                    fontweight="bold", path_effects=[withStroke(linewidth=1.2, foreground="black")])


def show_patient(patient: Patient, prediction: LabelMap | None = None, *, plane: Plane = "axial",
                 index: int | None = None) -> Picture:
    """One slice of a patient: the four modalities, the reference labels if there are any, and the prediction.

    Args:
        patient: who is shown.
        prediction: BraTS labels, shape (X, Y, Z).
        plane: "axial", "coronal" or "sagittal".
        index: which slice; by default the one with most tumour in the reference labels, else in the prediction,
            else the middle one.

    Raises:
        ValueError: as `overlay`.
    """
    _check(patient, prediction)
    if index is None:
        index = _index(patient, plane, [patient.label, prediction])
    panels: list[tuple[str, str, LabelMap | None]] = [(modality, modality, None) for modality in MODALITIES]
    background = MODALITIES[0]
    if patient.label is not None:
        panels.append(("reference", background, patient.label))
    if prediction is not None:
        panels.append((f"prediction{_scored(patient, prediction)}", background, prediction))
    labelled = len(panels) > len(MODALITIES)
    figure, axes = _grid(_view([patient], plane), rows=2 if labelled else 1,
                         columns=3 if labelled else len(MODALITIES), top=0.72, foot=0.75 if labelled else 0.45)
    with styled():
        for ax, (title, modality, label) in zip(axes.flat, panels, strict=False):
            shown = label is not None
            overlay(ax, patient, label, modality=modality, plane=plane, index=index,
                    outline=patient.label if title.startswith("prediction") else None)
            ax.set_title(title, fontweight="bold" if shown else "normal", loc="center", pad=4)
        for ax in axes.flat[len(panels):]:
            ax.set_axis_off()
        where = f"{plane} slice {index}"
        figure.suptitle(f"{patient.id}, {where}", fontweight="bold", y=1 - 0.12 / figure.get_figheight(), va="top")
        _foot(figure, plane, labels=labelled, line=prediction is not None and patient.label is not None)
    figure.alt = (f"{where.capitalize()} of patient {patient.id}: {', '.join(title for title, _, _ in panels)}.")
    return figure


def compare(patients: Sequence[Patient], arms: Mapping[str, Sequence[Prediction]], *, modality: str = "FLAIR",
            plane: Plane = "axial") -> Picture:
    """The same slices segmented by the reference and by each arm: a row a patient, a column an arm.

    Over each panel stands the Dice of the whole tumour in the whole volume, not in the slice shown; the reference's
    whole tumour is drawn as a white line on every arm's panel.

    Args:
        patients: who is shown; the slice is the one with most tumour in the reference labels, or else in those of
            the first arm that found any.
        arms: name of an arm -> its predictions, one for each patient in the same order: label maps (X, Y, Z), regions
            or probabilities (3, X, Y, Z), or NIfTI files; as `fedlab.show` takes them.
        modality: what is shown under the labels.
        plane: "axial", "coronal" or "sagittal".

    Raises:
        ValueError: no patient, an arm with another number of label maps than patients, or as `overlay`.
    """
    if not patients:
        raise ValueError("there is no patient to compare arms on")
    for name, labels in arms.items():
        if len(labels) != len(patients):
            raise ValueError(f"arm {name!r} has {len(labels)} label maps for {len(patients)} patients; "
                             "give one for each patient, in the same order")
    maps = {name: [as_labels(patient, label, name=f"prediction {name!r}")
                   for patient, label in zip(patients, labels, strict=True)] for name, labels in arms.items()}
    known = any(patient.label is not None for patient in patients)
    heads = [modality, *(["reference"] if known else []), *map(arm_label, arms)]
    written = [fill(head, max(8, round(100 / len(heads)))) for head in heads]  # 10 letters of this size fit an inch
    view = _view(patients, plane)
    figure, axes = _grid(view, rows=len(patients), columns=len(heads), foot=0.8, left=0.35,
                         top=0.45 + 0.17 * max(1 + head.count("\n") for head in written))
    with styled():
        for row, patient in enumerate(patients):
            guesses = [labels[row] for labels in maps.values()]
            _check(patient, *guesses)
            index = _index(patient, plane, [patient.label, *guesses])
            shown = [None, *([patient.label] if known else []), *guesses]
            for column, (ax, label) in enumerate(zip(axes[row], shown, strict=True)):
                arm = column >= len(heads) - len(arms)
                overlay(ax, patient, label, modality=modality, plane=plane, index=index, view=view,
                        outline=patient.label if arm else None)
                if arm and label is not None:
                    ax.set_title(_scored(patient, label).lstrip(", "), fontsize=9.5, loc="center", pad=3,
                                 fontweight="normal")
            axes[row, 0].text(-0.06, 0.5, patient.id, transform=axes[row, 0].transAxes, rotation=90, va="center",
                              ha="right", fontsize=9)
        for ax, head in zip(axes[0], written, strict=True):
            ax.annotate(head, (0.5, 1), (0, 19), xycoords="axes fraction", textcoords="offset points", ha="center",
                        va="bottom", fontweight="bold", fontsize=10)
        _foot(figure, plane, labels=True, line=known and bool(arms))
    figure.alt = (f"{plane.capitalize()} {modality} slices of {len(patients)} patients with the tumour as seen by "
                  + ", ".join(heads[1:]) + ". " + " ".join(_spoken(patients, maps)))
    return figure


def _spoken(patients: Sequence[Patient], arms: Mapping[str, Sequence[LabelMap]]) -> list[str]:
    sentences = []
    for row, patient in enumerate(patients):
        scores = [f"{arm_label(name)}{_scored(patient, labels[row])}" for name, labels in arms.items()]
        sentences.append(f"{patient.id}: {'; '.join(scores)}.")
    return sentences if any(patient.label is not None for patient in patients) else []


def _axis(plane: Plane) -> int:
    if plane not in _AXES:
        raise ValueError(f"plane is one of {', '.join(_AXES)}, got {plane!r}")
    return _AXES[plane]


def _label(label: LabelMap) -> npt.NDArray[Any]:
    return label.detach().cpu().numpy() if isinstance(label, torch.Tensor) else np.asarray(label)


def _check(patient: Patient, *labels: LabelMap | None) -> None:
    codes = nib.orientations.aff2axcodes(patient.affine)
    if codes != ("R", "A", "S"):
        raise ValueError(f"the axes of patient {patient.id} point {', '.join(map(str, codes))}, but figures mark left "
                         "and right for R, A, S; read the scan with fedlab.data or reorient it")
    for label in labels:
        if label is not None and tuple(label.shape) != tuple(patient.image.shape[1:]):
            raise ValueError(f"the scan of patient {patient.id} has shape {tuple(patient.image.shape[1:])}, the label "
                             f"map {tuple(label.shape)}; they must lie on one grid")


def _index(patient: Patient, plane: Plane, labels: Sequence[LabelMap | None]) -> int:
    """The slice with most tumour in the first label map that has any, or the middle of the brain."""
    for label in labels:
        if label is not None and bool((label > 0).any()):
            return best_slice(label, plane=plane)
    inside = np.flatnonzero(_brain(patient).any(axis=tuple(a for a in range(3) if a != _axis(plane))))
    return int(np.median(inside)) if len(inside) else patient.image.shape[1 + _axis(plane)] // 2


def _brain(patient: Patient) -> npt.NDArray[np.bool_]:
    brain: npt.NDArray[np.bool_] = np.logical_or.reduce([channel != 0 for channel in patient.image.cpu().numpy()])
    return brain


def _plane(volume: npt.NDArray[Any], plane: Plane, index: int) -> npt.NDArray[Any]:
    """A slice of an RAS volume as a picture: rows downwards, the patient's right or face on the left."""
    axis = _axis(plane)
    if not 0 <= index < volume.shape[axis]:
        raise ValueError(f"{plane} slices go from 0 to {volume.shape[axis] - 1}, got {index}")
    picture: npt.NDArray[Any] = volume.take(index, axis=axis)
    return picture[::-1, ::-1].T


def _grey(patient: Patient, modality: str) -> npt.NDArray[np.float32]:
    """A modality scaled to 0..1 between two percentiles of the brain, black outside it."""
    volume = patient.image[MODALITIES.index(modality)].float().cpu().numpy()
    brain = _brain(patient)
    if not brain.any():
        return np.zeros_like(volume)
    low, high = np.percentile(volume[brain], (0.5, 99.7))
    scaled = np.clip((volume - low) / max(high - low, 1e-6), 0, 1) * 0.96 + 0.04  # the brain stands off the background
    return np.where(brain, scaled, 0).astype(np.float32)


def _spacing(patient: Patient, plane: Plane) -> tuple[float, float]:
    """Voxel size in mm across and down a picture."""
    across, up = (size for axis, size in enumerate(patient.spacing_mm) if axis != _axis(plane))
    return across, up


def _bounds(patient: Patient, plane: Plane) -> tuple[float, float, float, float]:
    """Left, right, top and bottom in mm of the brain in all slices together; of the grid where there is none."""
    seen = np.asarray(_brain(patient).any(axis=_axis(plane)))[::-1, ::-1].T
    edges: list[float] = []
    for axis, size in zip((0, 1), _spacing(patient, plane), strict=True):
        inside = np.flatnonzero(seen.any(axis=axis))
        first, last = (inside[0], inside[-1]) if len(inside) else (0, seen.shape[1 - axis] - 1)
        edges += [(first - 0.5) * size, (last + 0.5) * size]
    return edges[0], edges[1], edges[2], edges[3]


def _view(patients: Sequence[Patient], plane: Plane) -> View:
    """Width and height in mm that show every one of the brains whole, with a margin."""
    bounds = [_bounds(patient, plane) for patient in patients]
    return (1.08 * max(right - left for left, right, _, _ in bounds),
            1.08 * max(bottom - top for _, _, top, bottom in bounds))


def _frame(ax: Axes, patient: Patient, plane: Plane, view: View) -> None:
    """A view of that size around the middle of the brain, on black, without ticks."""
    left, right, top, bottom = _bounds(patient, plane)
    middle, height = (left + right) / 2, (top + bottom) / 2
    ax.set(xlim=(middle - view[0] / 2, middle + view[0] / 2), ylim=(height + view[1] / 2, height - view[1] / 2),
           xticks=[], yticks=[], facecolor="black")
    ax.spines[:].set_visible(False)


def _fill(ax: Axes, mask: npt.NDArray[np.bool_], spacing: tuple[float, float], colour: str) -> None:
    if mask.any():
        columns, rows, padded = _padded(mask, spacing)
        ax.contourf(columns, rows, padded, levels=[0.5, 1.5], colors=[colour], alpha=0.48)
        ax.contour(columns, rows, padded, levels=[0.5], colors=[colour], linewidths=1.1)


def _line(ax: Axes, mask: npt.NDArray[np.bool_], spacing: tuple[float, float]) -> None:
    if mask.any():
        columns, rows, padded = _padded(mask, spacing)
        ax.contour(columns, rows, padded, levels=[0.5], colors=["white"], linewidths=1.0).set_path_effects([_EDGE])


def _padded(mask: npt.NDArray[np.bool_], spacing: tuple[float, float]) -> tuple[npt.NDArray[Any], ...]:
    """Column and row positions in mm, and the mask with an empty rim, so that contours close at the edge."""
    rows, columns = mask.shape
    return np.arange(-1, columns + 1) * spacing[0], np.arange(-1, rows + 1) * spacing[1], np.pad(mask, 1).astype(float)


def _scored(patient: Patient, label: LabelMap) -> str:
    if patient.label is None:
        return ""
    truth, guess = _label(patient.label) > 0, _label(label) > 0
    both = np.count_nonzero(truth) + np.count_nonzero(guess)
    return f", WT Dice {2 * np.count_nonzero(truth & guess) / both:.2f}" if both else ", no tumour"


def _grid(view: View, *, rows: int, columns: int, top: float, foot: float,
          left: float = 0.05) -> tuple[Picture, npt.NDArray[Any]]:
    """Axes of the view's proportions in a figure about 10 inches wide; top, foot and left margins in inches."""
    gap, title, ratio = 0.08, 0.26, view[1] / view[0]
    most = ((_TALLEST - top - foot) / rows - title) / ratio  # of many patients each is small
    panel = min((10.0 - left - 0.05 - gap * (columns - 1)) / columns, 2.9, max(most, 0.5))
    tall = panel * ratio
    used = left + 0.05 + panel * columns + gap * (columns - 1)
    width = max(used, 8.0) if panel == most else used  # the legend needs its place
    left += (width - used) / 2
    height = top + rows * tall + (rows - 1) * title + foot
    figure = Picture(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={
        "left": left / width, "right": 1 - (0.05 + (width - used) / 2) / width, "top": 1 - top / height,
        "bottom": foot / height, "wspace": gap / panel, "hspace": title / tall})
    return figure, axes


def _foot(figure: Picture, plane: Plane, *, labels: bool, line: bool) -> None:
    """The legend of colours, and what is left and right."""
    height = figure.get_figheight()
    if labels:
        handles: list[Any] = [Patch(facecolor=colour, edgecolor=colour, label=NAMES[value], alpha=0.85)
                              for value, colour in COLOURS.items()]
        if line:
            handles.append(Line2D([], [], color="white", linewidth=1.6, label="whole tumour of the reference",
                                  path_effects=[withStroke(linewidth=3.4, foreground="#555555")]))
        figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.3 / height), ncols=len(handles),
                      handlelength=1.4, handleheight=1.0, columnspacing=1.6)
    sides = ("A: anterior, P: posterior" if plane == "sagittal"
             else "Radiological convention: the patient's right (R) is on the left of the picture")
    figure.text(0.5, 0.12 / height, sides, ha="center", va="bottom", fontsize=8.5, color="#666666")
