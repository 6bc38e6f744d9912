"""A case as a still picture: three planes and the tumour in the translucent brain, without OpenGL or meshes.

For each pixel of the 3-D view the first voxel of a body along the line of sight is found, and shaded by the direction
of the surface there. Orthographic, seen from the front, from the patient's right and from above.
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
_PIXELS = 96
_TURN, _TILT = np.deg2rad(35.0), np.deg2rad(22.0)  # from the front towards the patient's right, and up
_LIGHT = np.array([-0.4, 0.55, 0.75]) / np.linalg.norm([-0.4, 0.55, 0.75])  # right, up and towards the viewer
# Drawn from the inside out, with a factor of the opacity: the core shows through the enhancing tumour, both through
# the oedema. Label 3 occurs in error maps only.
_COVER = {1: 1.0, 4: 0.8, 2: 0.5, 3: 0.5}


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
            write_sides(ax, ("R", "L"), (left + 0.07, left + side - 0.07), bottom + 0.28)
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


def _rendered(case: Case, settings: ViewSettings,
              layers: Mapping[str | None, Bytes | None]) -> dict[str | None, Bytes]:
    """One RGB image per layer: its values inside the brain, or the brain alone."""
    from matplotlib.colors import to_rgb

    colours = settings.colours()
    skin, rim = _shaded(_rotated(case, case.grey(settings.modality) > 0).astype(bool))
    glass = np.where(skin > 0, 0.2 + 0.55 * rim, 0)[..., None]
    images: dict[str | None, Bytes] = {}
    for name, values in layers.items():
        image = np.zeros((_PIXELS, _PIXELS, 3), dtype=np.float32)
        rotated = np.zeros((_PIXELS,) * 3, dtype=np.uint8) if values is None else _rotated(case, values)
        for value in (value for value in _COVER if value in colours):
            light, _ = _shaded(np.equal(rotated, value))
            colour, opacity = colours[value]
            cover = ((light > 0) * opacity * _COVER[value])[..., None]
            image = image * (1 - cover) + np.asarray(to_rgb(colour)) * light[..., None] * cover
        image = np.clip(image * (1 - 0.5 * glass) + 0.9 * glass * skin[..., None], 0, 1)
        images[name] = np.rint(255 * image).astype(np.uint8)
    return images


def _rotated(case: Case, values: Bytes | npt.NDArray[np.bool_]) -> Bytes:
    """The values seen from the viewer, axes row, column and depth: the nearest voxel, 0 outside the box."""
    from scipy.ndimage import affine_transform

    spacing, shape = np.asarray(case.patient.spacing_mm), np.asarray(case.shape)
    step = float(np.linalg.norm(shape * spacing)) * 0.74 / _PIXELS
    sin, cos = np.sin(_TURN), np.cos(_TURN)
    away = np.array([-sin * np.cos(_TILT), -cos * np.cos(_TILT), -np.sin(_TILT)])  # from the viewer into the head
    right = np.array([-cos, sin, 0.0])  # in the picture: seen from the front, the patient's left is there
    matrix = np.stack([np.cross(away, right), right, away], axis=1) * step / spacing[:, None]
    offset = (shape - 1) / 2 - matrix @ np.full(3, (_PIXELS - 1) / 2)
    return np.asarray(affine_transform(values.view(np.uint8), matrix, offset, (_PIXELS,) * 3, order=0))


def _shaded(body: npt.NDArray[np.bool_]) -> tuple[Image, Image]:
    """Brightness of the surface at each pixel, 0 where there is none, and how far it turns away from the viewer."""
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
    light = 0.35 + 0.65 * np.clip(outward @ _LIGHT, 0, 1)
    return (light * hit).astype(np.float32), ((1 - np.clip(outward[..., 2], 0, 1)) ** 2 * hit).astype(np.float32)
