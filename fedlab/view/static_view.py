"""A case as a still picture, with nothing but matplotlib: three planes and the tumour in the translucent brain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedlab.view.colours import GREY, REGION_NAMES, arm_label
from fedlab.view.label_layers import Case, RegionFacts
from fedlab.view.slices import AXES, SIDES, slice_image, write_sides
from fedlab.view.style import styled
from fedlab.view.view_settings import VIEWS, ViewSettings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fedlab.view.picture import Picture

__all__ = ["draw_case"]

Cell = tuple[float, float, float]
_CROSSHAIR = "#7FD4FF"


@styled
def draw_case(case: Case, settings: ViewSettings, *, layers: Sequence[str] | None = None) -> Picture:
    """One row per layer: the three planes through the crosshair and the tumour in the translucent brain.

    With a single plane or the 3-D view (`settings.view`) the layers stand side by side.

    Args:
        case: the case shown.
        settings: what is shown; its layer is ignored where `layers` are given.
        layers: names of layers; by default that of `settings`.
    """
    from matplotlib.patches import Rectangle

    from fedlab.view.depth_rendering import rendered

    names: list[str | None] = [*layers] if layers else [settings.layer]
    views = [*VIEWS[1:]] if settings.view == "all" else [settings.view]
    cells = [(name, view) for name in names for view in views]
    values = {name: settings.values(case, name) for name in names}
    facts = {name: case.facts(name) for name in names if name is not None}
    grey = case.grey(settings.modality)
    bodies = rendered(case, settings, values) if "3-D" in views else {}
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
            ax.text(left, bottom + side + 0.05, _caption(case, name, facts, whole=len(views) > 1),
                    fontsize=9 if len(views) > 1 else 8, fontweight="bold", va="bottom")
    width, height = (float(inches) for inches in figure.get_size_inches())
    ax.set(xlim=(0, width), ylim=(0, height), aspect="auto")
    figure.suptitle(f"{case.patient.id}, {settings.modality}", x=0.5, y=1 - 0.1 / height, va="top",
                    fontweight="bold")
    _legend(figure, settings)
    described = "; ".join(f"{name}: " + ", ".join(
        f"{fact.region} {fact.ml:.1f} ml" + (f" (Dice {fact.dice:.2f})" if case.scored(name) else "")
        for fact in known) for name, known in facts.items())
    figure.alt = (f"{settings.modality} of patient {case.patient.id}, {settings.overlay}. "
                  f"{described or 'no labels'}.")
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


def _slice(ax: Axes, case: Case, settings: ViewSettings, grey: npt.NDArray[np.uint8],
           overlay: npt.NDArray[np.uint8] | None, plane: str, cell: Cell) -> None:
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


def _caption(case: Case, name: str | None, facts: Mapping[str, Sequence[RegionFacts]], *, whole: bool) -> str:
    """Name, volumes and Dice of a layer; the whole tumour alone where there is little room."""
    if name is None:
        return "no label map, no prediction"
    known = {fact.region: fact for fact in facts[name]}
    dice = {region: f", Dice {fact.dice:.2f}" if case.scored(name) else "" for region, fact in known.items()}
    words = [f"{region} {known[region].ml:.1f} ml{dice[region]}" for region in REGION_NAMES]
    if not any(fact.ml for fact in known.values()):
        words = ["no tumour" + dice["WT"].replace("Dice", "Dice WT")]
    return f"{arm_label(name)}   {' · '.join(words if whole else words[:1])}"


def _legend(figure: Picture, settings: ViewSettings) -> None:
    from matplotlib.patches import Patch

    height = figure.get_figheight()
    if handles := [Patch(facecolor=colour, label=name) for colour, name in settings.legend().items()]:
        figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.22 / height), ncols=len(handles),
                      handlelength=1.2, handleheight=1.0, columnspacing=1.4, fontsize=8.5)
    figure.text(0.5, 0.08 / height, "R, L, A, P: the patient's right, left, front and back; the lines meet at the "
                "crosshair", ha="center", va="bottom", fontsize=7.5, color=GREY)
