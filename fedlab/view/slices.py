"""Slices of patients with their tumours, in radiological convention.

Axial and coronal slices are seen from the patient's feet and face, so the patient's right is on the left of the
picture; sagittal slices have the face on the left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from fedlab.core.settings import check_choice
from fedlab.core.text import counted
from fedlab.core.types import MODALITIES, Patient
from fedlab.view.colours import LABEL_COLOURS, LABEL_NAMES, arm_label, styled
from fedlab.view.label_layers import Prediction, as_labels, check_ras, grey_values, head_box, largest_slice

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fedlab.view.picture import Picture

__all__ = ["AXES", "SIDES", "Plane", "best_slice", "compare", "overlay", "show_patient", "slice_image", "write_sides"]

Plane: TypeAlias = Literal["axial", "coronal", "sagittal"]
LabelMap: TypeAlias = torch.Tensor | npt.NDArray[Any]
View: TypeAlias = tuple[float, float]

#: Plane -> the axis that it cuts.
AXES: Mapping[str, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
#: Plane -> the patient's sides on the left and the right of the picture.
SIDES: Mapping[str, tuple[str, str]] = {"axial": ("R", "L"), "coronal": ("R", "L"), "sagittal": ("A", "P")}
_TALLEST = 44.0  # inches of a figure


def slice_image(volume: npt.NDArray[Any], plane: str, index: int) -> npt.NDArray[Any]:
    """A slice of an RAS volume (X, Y, Z) as an image: rows downwards, the patient's right or face on the left."""
    axis = AXES[plane]
    if not 0 <= index < volume.shape[axis]:
        raise ValueError(f"{plane} slices go from 0 to {volume.shape[axis] - 1}, got {index}")
    image: npt.NDArray[Any] = volume.take(index, axis=axis)
    return image[::-1, ::-1].T


def write_sides(ax: Axes, letters: tuple[str, str], x: tuple[float, float], y: float, **text: Any) -> None:
    """Marks the patient's sides in the upper corners of a slice."""
    from matplotlib.patheffects import withStroke

    for letter, place, align in zip(letters, x, ("left", "right"), strict=True):
        ax.text(place, y, letter, color="white", fontsize=9, ha=align, va="top", fontweight="bold",
                path_effects=[withStroke(linewidth=1.3, foreground="black")], **text)


def best_slice(label: LabelMap, *, plane: Plane = "axial") -> int:
    """Index of the slice with the largest tumour area; of several equal ones, the middle."""
    axis, labels = _axis(plane), np.asarray(label)
    if not labels.any():
        raise ValueError("the label map holds no tumour, so there is no best slice; choose one by index")
    return largest_slice(labels, axis)


@styled
def overlay(ax: Axes, patient: Patient, label: Prediction | None, *, modality: str = "FLAIR", plane: Plane = "axial",
            index: int | None = None, outline: Prediction | None = None, view: View | None = None) -> None:
    """Draws a slice of a patient with the labels of a tumour over it.

    Args:
        ax: the axes to draw into.
        patient: shows `modality`.
        label: labels to fill with their colours, in any form that `fedlab.show` accepts; None for the image alone.
        plane: that the slice lies in.
        index: of the slice; by default the best of `label`, of `outline` or of the patient's own labels.
        outline: a second label map, such as the reference, whose whole tumour is drawn as a white line.
        view: width and height in mm of the part shown around the centre of the brain; by default the whole brain.

    Raises:
        ValueError: an unknown modality or plane, invalid labels, an index outside the volume, or a patient whose axes
            are not right, anterior, superior.
    """
    from matplotlib.patheffects import withStroke

    check_ras(patient)
    filled, line = (None if one is None else as_labels(patient, one, name="label map") for one in (label, outline))
    if index is None:
        index = _index(patient, plane, [filled, line, patient.label])
    width, height = _view([patient], plane) if view is None else view
    (x, y), _, (across, up) = _brain_frame(patient, plane)
    grey = slice_image(grey_values(patient, modality), plane, index)

    rows, columns = grey.shape
    extent = (-across, columns * across, -up, rows * up)  # of a mask with an empty rim: contours close at the edge
    ax.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="bilinear", aspect="equal",
              extent=(-across / 2, (columns - 0.5) * across, (rows - 0.5) * up, -up / 2))
    shown = np.zeros(1) if filled is None else np.pad(slice_image(filled, plane, index), 1)
    for value, colour in LABEL_COLOURS.items():
        if (shown == value).any():
            padded = (shown == value).astype(float)
            ax.contourf(padded, levels=[0.5, 1.5], colors=[colour], alpha=0.36, extent=extent)
            ax.contour(padded, levels=[0.5], colors=[colour], linewidths=1.5, extent=extent)
    if line is not None and (mask := slice_image(line > 0, plane, index)).any():
        drawn = ax.contour(np.pad(mask, 1).astype(float), levels=[0.5], colors=["white"], linewidths=1.0, extent=extent)
        drawn.set_path_effects([withStroke(linewidth=2.0, foreground=(0, 0, 0, 0.55))])
    ax.set(xlim=(x - width / 2, x + width / 2), ylim=(y + height / 2, y - height / 2), xticks=[], yticks=[],
           facecolor="black")
    ax.spines[:].set_visible(False)
    write_sides(ax, SIDES[plane], (0.03, 0.97), 0.97, transform=ax.transAxes)


@styled
def show_patient(patient: Patient, prediction: Prediction | None = None, *, plane: Plane = "axial",
                 index: int | None = None) -> Picture:
    """One slice of a patient: the four modalities, the reference labels if there are any, and the prediction.

    Args:
        patient: the patient shown.
        prediction: in any form that `fedlab.show` accepts.
        plane: that the slice lies in.
        index: of the slice; by default the one with most tumour in the reference, else in the prediction, else the
            middle one.

    Raises:
        ValueError: as `overlay`.
    """
    check_ras(patient)
    labels = {} if patient.label is None else {"reference": patient.label.cpu().numpy()}
    if prediction is not None:
        guess = as_labels(patient, prediction)
        labels[f"prediction{_dice(patient, guess)}"] = guess
    if index is None:
        index = _index(patient, plane, list(labels.values()))
    titles = [*MODALITIES, *labels]
    figure, axes = _grid(_view([patient], plane), rows=2 if labels else 1, columns=3 if labels else len(MODALITIES),
                         top=0.72, foot=0.75 if labels else 0.45)
    for ax, title in zip(axes.flat, titles, strict=False):
        overlay(ax, patient, labels.get(title), modality=MODALITIES[0] if title in labels else title, plane=plane,
                index=index, outline=patient.label if title.startswith("prediction") else None)
        ax.set_title(title, fontweight="bold" if title in labels else "normal", loc="center", pad=4)
    for ax in axes.flat[len(titles):]:
        ax.set_axis_off()
    where = f"{plane} slice {index}"
    figure.suptitle(f"{patient.id}, {where}", fontweight="bold", y=1 - 0.12 / figure.get_figheight(), va="top")
    _legend(figure, plane, labels=bool(labels), line=len(labels) == 2)
    figure.alt = f"{where.capitalize()} of patient {patient.id}: {', '.join(titles)}."
    return figure


@styled
def compare(patients: Sequence[Patient], arms: Mapping[str, Sequence[Prediction]], *, modality: str = "FLAIR",
            plane: Plane = "axial") -> Picture:
    """The same slices segmented by the reference and by each arm: one row per patient, one column per arm.

    The title of each panel is the Dice of the whole tumour in the whole volume, not in the slice shown. The whole
    tumour of the reference is drawn as a white line on the panels of the arms.

    Args:
        patients: the patients shown; the slice is the one with most tumour in the reference labels, or in those of
            the first arm that found any.
        arms: name of an arm -> its predictions, one per patient in the same order: label maps (X, Y, Z), regions
            or probabilities (3, X, Y, Z), or NIfTI files; as `fedlab.show` accepts them.
        modality: shown under the labels.
        plane: that the slices lie in.

    Raises:
        ValueError: no patient, an arm with another number of label maps than patients, or as `overlay`.

    Example:
        >>> patient = fl.make_cohort(sites=1, patients=2, shape=(32, 32, 32), spacing_mm=6.0)[0].train[0]
        >>> figure = fl.compare([patient], {"public": [fl.predict(fl.public_model(), patient)]})
        >>> figure.savefig("public.png")
    """
    if not patients:
        raise ValueError("there is no patient to compare arms on")
    for name, predictions in arms.items():
        if len(predictions) != len(patients):
            raise ValueError(f"arm {name!r} has {len(predictions)} label maps for {len(patients)} patients; "
                             "give one per patient, in the same order")
    maps = [[as_labels(patient, arms[name][row], name=f"prediction {name!r}") for name in arms]
            for row, patient in enumerate(patients)]
    known = any(patient.label is not None for patient in patients)
    heads = [modality, *(["reference"] if known else []), *map(arm_label, arms)]
    wrapped = [fill(head, max(8, round(100 / len(heads)))) for head in heads]  # 10 letters of this size fit an inch
    view = _view(patients, plane)
    figure, axes = _grid(view, rows=len(patients), columns=len(heads), foot=0.8, left=0.35,
                         top=0.45 + 0.17 * max(1 + head.count("\n") for head in wrapped))
    sentences = []
    for patient, guesses, row in zip(patients, maps, axes, strict=True):
        check_ras(patient)
        index = _index(patient, plane, [patient.label, *guesses])
        scores = [_dice(patient, guess) for guess in guesses]
        panels = [(None, ""), *([(patient.label, "")] if known else []), *zip(guesses, scores, strict=True)]
        for column, (ax, (label, score)) in enumerate(zip(row, panels, strict=True)):
            overlay(ax, patient, label, modality=modality, plane=plane, index=index, view=view,
                    outline=patient.label if column > known else None)
            ax.set_title(score.lstrip(", "), fontsize=9.5, loc="center", pad=3, fontweight="normal")
        row[0].text(-0.06, 0.5, patient.id, transform=row[0].transAxes, rotation=90, va="center", ha="right",
                    fontsize=9)
        spoken = [f"{arm_label(name)}{score}" for name, score in zip(arms, scores, strict=True)]
        sentences += [f"{patient.id}: {'; '.join(spoken)}."] if known else []
    for ax, head in zip(axes[0], wrapped, strict=True):
        ax.annotate(head, (0.5, 1), (0, 19), xycoords="axes fraction", textcoords="offset points", ha="center",
                    va="bottom", fontweight="bold", fontsize=10)
    _legend(figure, plane, labels=True, line=known and bool(arms))
    figure.alt = " ".join([f"{plane.capitalize()} {modality} slices of {counted(len(patients), 'patient')} with the "
                           f"tumour according to {', '.join(heads[1:])}.", *sentences])
    return figure


def _axis(plane: str) -> int:
    check_choice(AXES, plane=plane)
    return AXES[plane]


def _index(patient: Patient, plane: Plane, labels: Sequence[LabelMap | None]) -> int:
    """The slice with most tumour in the first label map that has any, or the middle of the brain."""
    for label in labels:
        if label is not None and bool((label > 0).any()):
            return best_slice(label, plane=plane)
    box = head_box(patient)[_axis(plane)]
    return int(box.start + box.stop - 1) // 2


def _brain_frame(patient: Patient, plane: Plane) -> npt.NDArray[np.float64]:
    """Centre, size and voxel size of the brain in mm, each across and down a picture that shows all its slices."""
    axes = [axis for axis in range(3) if axis != _axis(plane)]
    box, grid, spacing = head_box(patient), patient.image.shape[1:], np.asarray(patient.spacing_mm)[axes]
    start, stop = np.transpose([(box[axis].start, box[axis].stop) for axis in axes])
    # A picture counts its pixels from the end of either axis, as `slice_image` does.
    centre = np.subtract([grid[axis] for axis in axes], 1) - (start + stop - 1) / 2
    return np.asarray([centre * spacing, (stop - start) * spacing, spacing], dtype=np.float64)


def _view(patients: Sequence[Patient], plane: Plane) -> View:
    """Width and height in mm that show each of the brains whole, with a margin."""
    width, height = 1.08 * np.max([_brain_frame(patient, plane)[1] for patient in patients], axis=0)
    return float(width), float(height)


def _dice(patient: Patient, label: npt.NDArray[np.uint8]) -> str:
    if patient.label is None:
        return ""
    truth, guess = np.asarray(patient.label) > 0, label > 0
    both = np.count_nonzero(truth) + np.count_nonzero(guess)
    return f", WT Dice {2 * np.count_nonzero(truth & guess) / both:.2f}" if both else ", no tumour"


def _grid(view: View, *, rows: int, columns: int, top: float, foot: float,
          left: float = 0.05) -> tuple[Picture, npt.NDArray[Any]]:
    """Axes of the view's proportions in a figure about 10 inches wide; top, foot and left margins in inches."""
    from fedlab.view.picture import Picture

    gap, title, ratio = 0.08, 0.26, view[1] / view[0]
    most = ((_TALLEST - top - foot) / rows - title) / ratio  # many patients get small panels
    margins = left + 0.05 + gap * (columns - 1)
    panel = min((10.0 - margins) / columns, 2.9, max(most, 0.5))
    spare = max(0.0, 8.0 - margins - panel * columns) if panel == most else 0.0  # room for the legend
    width, height = margins + panel * columns + spare, top + rows * (panel * ratio + title) - title + foot
    figure = Picture(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={
        "left": (left + spare / 2) / width, "right": 1 - (0.05 + spare / 2) / width, "top": 1 - top / height,
        "bottom": foot / height, "wspace": gap / panel, "hspace": title / (panel * ratio)})
    return figure, axes


def _legend(figure: Picture, plane: Plane, *, labels: bool, line: bool) -> None:
    """The colours of the labels, and the sides of the patient."""
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    from fedlab.view.picture import foot

    outline = Line2D([], [], color="white", linewidth=1.6, label="whole tumour of the reference",
                     path_effects=[withStroke(linewidth=3.4, foreground="#555555")])
    foot(figure, {LABEL_COLOURS[value]: LABEL_NAMES[value] for value in LABEL_COLOURS} if labels else {},
         "A: anterior, P: posterior" if plane == "sagittal"
         else "Radiological convention: the patient's right (R) is on the left of the picture", *[outline] * line)
