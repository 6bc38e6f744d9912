"""A case as a still picture: three planes and the tumour in the translucent brain, without OpenGL or meshes.

For each pixel of the 3-D view the first voxel of a body along the line of sight is found, and shaded by the direction
of the surface there. Angle, light and glass are those of the interactive viewer (templates/viewer.js).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from fedlab.view.colours import REGION_NAMES, arm_label, styled
from fedlab.view.label_layers import VIEWS, Case, ViewSettings
from fedlab.view.slices import AXES, SIDES, slice_image, write_sides

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fedlab.view.picture import Picture

__all__ = ["draw_case"]

Cell: TypeAlias = tuple[float, float, float]
Image: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]

_CROSSHAIR = "#7FD4FF"
_PIXELS = 128
_TURN, _TILT = np.deg2rad(35.0), np.deg2rad(22.0)  # from the front towards the patient's right, and up
_LIGHT = np.array([-0.35, 0.5, 0.8]) / np.linalg.norm([-0.35, 0.5, 0.8])  # right, up and towards the viewer
_SPAN = 0.68  # width of the 3-D view as a share of the box's diagonal


@styled
def draw_case(case: Case, settings: ViewSettings, *, layers: Sequence[str] | None = None) -> Picture:
    """One row per layer, by default that of `settings`: the planes through the crosshair and the 3-D view.

    With a single plane or the 3-D view (`settings.view`) the layers stand side by side.
    """
    from matplotlib.patches import Rectangle

    from fedlab.view.picture import foot

    names: list[str | None] = [*layers] if layers else [settings.layer]
    views = [*VIEWS[1:]] if settings.view == "all" else [settings.view]
    cells = [(name, view) for name in names for view in views]
    values = {name: settings.values(case, name) for name in names}
    captions, grey = {name: _caption(case, name) for name in names}, case.grey(settings.modality)
    bodies = _rendered(case, settings, values) if "3-D" in views else {}
    figure, ax, corners = _sheet(len(cells), len(views) if len(views) > 1 else min(4, len(cells)))
    for (name, view), (left, bottom, side) in zip(cells, corners, strict=True):
        ax.add_patch(Rectangle((left, bottom), side, side, facecolor="black", edgecolor="none", zorder=0))
        if view == "3-D":
            ax.imshow(bodies[name], interpolation="bilinear", aspect="auto", zorder=1,
                      extent=(left, left + side, bottom, bottom + side))
            _directions(ax, case, (left, bottom, side))
        else:
            _slice(ax, case, settings, grey, values[name], view, (left, bottom, side))
        if view == views[0]:
            caption = captions[name] if len(views) > 1 else captions[name].partition(" · ")[0]
            ax.text(left, bottom + side + 0.05, caption, fontsize=9 if len(views) > 1 else 8, fontweight="bold",
                    va="bottom")
    width, height = (float(inches) for inches in figure.get_size_inches())
    ax.set(xlim=(0, width), ylim=(0, height), aspect="auto")
    figure.suptitle(f"{case.patient.id}, {settings.modality}", y=1 - 0.1 / height, va="top", fontweight="bold")
    foot(figure, settings.legend(), "R, L, A, P: the patient's right, left, front and back; the lines meet at the "
         "crosshair")
    figure.alt = (f"{settings.modality} of patient {case.patient.id}, {settings.overlay}. "
                  f"{'; '.join(captions.values())}.")
    return figure


def _sheet(cells: int, columns: int) -> tuple[Picture, Axes, list[Cell]]:
    """A figure with one pair of axes in inches, and left, bottom and side of each cell: many axes would be slow."""
    from fedlab.view.picture import Picture

    rows = -(-cells // columns)
    side, gap, caption, top, foot = 2.45 if columns > 1 else 4.5, 0.06, 0.3, 0.36, 0.62
    used, height = columns * (side + gap), top + rows * (side + caption) + foot
    width = max(used, 6.0)
    figure = Picture(figsize=(width, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    return figure, ax, [((width - used) / 2 + column * (side + gap) + gap / 2,
                         height - top - (row + 1) * (side + caption), side)
                        for row, column in (divmod(number, columns) for number in range(cells))]


def _slice(ax: Axes, case: Case, settings: ViewSettings, grey: Bytes,
           overlay: Bytes | None, plane: str, cell: Cell) -> None:
    from matplotlib.patheffects import withStroke

    from fedlab.view.picture import blended

    axis = AXES[plane]
    index = settings.crosshair[axis]
    shown = blended(slice_image(grey, plane, index), None if overlay is None else slice_image(overlay, plane, index),
                    settings.colours())
    left, bottom, side = cell
    across, up = (case.patient.spacing_mm[other] for other in range(3) if other != axis)
    longest = max(size * mm for size, mm in zip(case.shape, case.patient.spacing_mm, strict=True))
    wide, high = (side * count * mm / longest for count, mm in ((shown.shape[1], across), (shown.shape[0], up)))
    x, y = left + (side - wide) / 2, bottom + (side - high) / 2
    ax.imshow(shown, interpolation="bilinear", aspect="auto", extent=(x, x + wide, y, y + high), zorder=1)
    for value, (colour, opacity) in settings.colours().items():
        here = np.zeros(1) if overlay is None else slice_image(overlay, plane, index) == value
        if opacity and here.any():  # a line keeps its hue over bright enhancement
            rim_x, rim_y = (wide / shown.shape[1], high / shown.shape[0])
            ax.contour(np.pad(here, 1)[::-1].astype(float), levels=[0.5], colors=[colour], linewidths=0.9, zorder=1.5,
                       extent=(x - rim_x, x + wide + rim_x, y - rim_y, y + high + rim_y)).set_path_effects(
                           [withStroke(linewidth=1.8, foreground=(0, 0, 0, 0.5))])
    column, row = (settings.crosshair[other] for other in range(3) if other != axis)
    ax.vlines(x + wide * (1 - (column + 0.5) / shown.shape[1]), y, y + high, color=_CROSSHAIR, linewidth=0.5, alpha=0.7)
    ax.hlines(y + high * (row + 0.5) / shown.shape[0], x, x + wide, color=_CROSSHAIR, linewidth=0.5, alpha=0.7)
    write_sides(ax, SIDES[plane], (left + 0.07, left + side - 0.07), bottom + side - 0.05)
    ax.text(left + 0.06, bottom + 0.06, f"{plane} {index + case.box[axis].start}", color="white", fontsize=7.5,
            path_effects=[withStroke(linewidth=1.5, foreground="black")])


def _caption(case: Case, name: str | None) -> str:
    """Name, volumes and Dice of a layer, the whole tumour first."""
    if name is None:
        return "no label map, no prediction"
    known = {fact.region: fact for fact in case.facts(name)}
    dice = {region: f", Dice {fact.dice:.2f}" if case.scored(name) else "" for region, fact in known.items()}
    words = [f"{region} {known[region].ml:.1f} ml{dice[region]}" for region in REGION_NAMES]
    if not any(fact.ml for fact in known.values()):
        words = ["no tumour" + dice["WT"].replace("Dice", "Dice WT")]
    return f"{arm_label(name)}   {' · '.join(words)}"


def _directions(ax: Axes, case: Case, cell: Cell) -> None:
    """The patient's six sides around the 3-D view, without those towards and away from the viewer."""
    from matplotlib.patheffects import withStroke

    left, bottom, side = cell
    across, up, away = _axes()
    size = np.asarray(case.shape) * case.patient.spacing_mm
    for axis, letters in enumerate(("RL", "AP", "SI")):
        if abs(away[axis]) > 0.7:
            continue
        for letter, sign in zip(letters, (1, -1), strict=True):
            reach = sign * (size[axis] / 2 + 6) / (_SPAN * float(np.linalg.norm(size)))
            x, y = np.clip((0.5 + reach * across[axis], 0.5 + reach * up[axis]), 0.04, 0.96)
            ax.text(left + side * x, bottom + side * y, letter, color="white", fontsize=8, fontweight="bold",
                    ha="center", va="center", path_effects=[withStroke(linewidth=1.3, foreground="black")])


def _rendered(case: Case, settings: ViewSettings,
              layers: Mapping[str | None, Bytes | None]) -> dict[str | None, Bytes]:
    """One RGB image per layer: its values as opaque surfaces inside the translucent brain, or the brain alone."""
    from matplotlib.colors import to_rgb

    scan = _rotated(case, case.grey(settings.modality))
    light, rim, first = _shaded(scan > 0)
    below = np.minimum(first + 5, _PIXELS - 1)[..., None]  # a few voxels under the surface folds can be seen
    tone = np.clip((0.35 + np.take_along_axis(scan, below, axis=2)[..., 0] / 255) * (0.5 + 0.9 * light), 0, 1)
    glass = np.where(light > 0, 0.3 + 0.6 * rim, 0)
    images: dict[str | None, Bytes] = {}
    for name, values in layers.items():
        image, nearest = np.zeros((_PIXELS, _PIXELS, 3), dtype=np.float32), np.full((_PIXELS, _PIXELS), _PIXELS)
        rotated = np.zeros((_PIXELS,) * 3, dtype=np.uint8) if values is None else _rotated(case, values)
        for value, (colour, opacity) in settings.colours().items():
            light, _, first = _shaded(np.equal(rotated, value))
            seen = (light > 0) & (first < nearest) & (opacity > 0)
            image[seen] = np.asarray(to_rgb(colour)) * light[seen, None]
            nearest[seen] = first[seen]
        image = np.clip(image * (1 - glass[..., None]) + (glass * tone)[..., None], 0, 1)
        images[name] = np.rint(255 * image).astype(np.uint8)
    return images


def _axes() -> tuple[npt.NDArray[np.float64], ...]:
    """The picture's directions in the patient: to the right, up, and away from the viewer."""
    sin, cos = np.sin(_TURN), np.cos(_TURN)
    away = np.array([-sin * np.cos(_TILT), -cos * np.cos(_TILT), -np.sin(_TILT)])  # from the viewer into the head
    right = np.array([-cos, sin, 0.0])  # seen from the front, the patient's left is there
    return right, -np.cross(away, right), away


def _rotated(case: Case, values: Bytes | npt.NDArray[np.bool_]) -> Bytes:
    """The values seen from the viewer, axes row, column and depth: the nearest voxel, 0 outside the box."""
    from scipy.ndimage import affine_transform

    spacing, shape = np.asarray(case.patient.spacing_mm), np.asarray(case.shape)
    step = float(np.linalg.norm(shape * spacing)) * _SPAN / _PIXELS
    right, up, away = _axes()
    matrix = np.stack([-up, right, away], axis=1) * step / spacing[:, None]
    offset = (shape - 1) / 2 - matrix @ np.full(3, (_PIXELS - 1) / 2)
    return np.asarray(affine_transform(values.view(np.uint8), matrix, offset, (_PIXELS,) * 3, order=0))


def _shaded(body: npt.NDArray[np.bool_]) -> tuple[Image, Image, npt.NDArray[np.intp]]:
    """At each pixel the surface's brightness, 0 where there is none, its turn away from the viewer, and its depth."""
    from scipy.ndimage import uniform_filter

    smooth = uniform_filter(body.astype(np.float32), 3)
    inside = smooth > 0.4
    hit = inside.any(axis=2)
    surface = np.stack([*np.indices(hit.shape), np.where(hit, inside.argmax(axis=2), 0)])
    normal = []
    for axis in range(3):
        step = np.zeros((3, 1, 1), dtype=np.intp)
        step[axis] = 2
        before, after = np.maximum(surface - step, 0), np.minimum(surface + step, _PIXELS - 1)
        normal.append(smooth[tuple(before)] - smooth[tuple(after)])
    down, right, away = normal
    outward = np.stack([right, -down, -away], axis=2)
    outward /= np.maximum(np.linalg.norm(outward, axis=2, keepdims=True), 1e-6)
    light = 0.42 + 0.68 * np.clip(outward @ _LIGHT, 0, 1)
    rim = (1 - np.clip(outward[..., 2], 0, 1)) ** 1.6
    return (light * hit).astype(np.float32), (rim * hit).astype(np.float32), surface[2]
