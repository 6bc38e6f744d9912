"""What of a patient is shown, and the picture of it that needs nothing but matplotlib.

Slices lie as in `fedlab.view.slices`: the patient's right on the left of the picture, the face on the left of
sagittal ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from fedlab.core.types import MODALITIES
from fedlab.view.depth_rendering import rendered
from fedlab.view.slices import COLOURS, NAMES
from fedlab.view.style import Picture, arm_label, styled
from fedlab.view.volumes import ERRORS, REFERENCE, Case, RegionFacts

__all__ = ["OVERLAYS", "VIEWS", "Look", "View", "colours_of", "legend_of", "picture"]

View: TypeAlias = Literal["all", "axial", "coronal", "sagittal", "3-D"]
#: What a viewer can show of a patient at once: three planes and the 3-D view, or one of them.
VIEWS: tuple[str, ...] = get_args(View)
#: What lies over the scan: labels, the errors of a region, or nothing.
OVERLAYS = ("labels", *(f"errors {region}" for region in ("WT", "TC", "ET")), "none")

_AXIS = {"axial": 2, "coronal": 1, "sagittal": 0}
_SIDES = {"axial": ("R", "L"), "coronal": ("R", "L"), "sagittal": ("A", "P")}
_CROSSHAIR = "#7FD4FF"
_EDGE = [withStroke(linewidth=1.5, foreground="black")]


@dataclass(frozen=True, kw_only=True)
class Look:
    """What of a case is shown.

    Attributes:
        modality: one of `MODALITIES`.
        view: one of `VIEWS`.
        layer: name of the layer over the scan: "reference" or an arm; None where there is none.
        overlay: one of `OVERLAYS`.
        opacity: of the overlay, from 0 to 1.
        labels: which of the labels 1, 2, 4 are drawn.
        crosshair: voxel of the box where the planes meet.
    """

    modality: str = MODALITIES[0]
    view: str = "all"
    layer: str | None = None
    overlay: str = "labels"
    opacity: float = 0.6
    labels: tuple[int, ...] = (1, 2, 4)
    crosshair: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        for name, value, known in (("modality", self.modality, MODALITIES), ("view", self.view, VIEWS),
                                   ("overlay", self.overlay, OVERLAYS)):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, got {value!r}")
        if not 0 <= self.opacity <= 1:
            raise ValueError(f"opacity goes from 0 to 1, got {self.opacity}")
        if strange := set(self.labels) - set(COLOURS):
            raise ValueError(f"labels are some of {', '.join(map(str, COLOURS))}, got {sorted(strange)}")

    @property
    def region(self) -> str | None:
        """Region of the error map, None where labels are shown."""
        return self.overlay.split()[1] if self.overlay.startswith("errors") else None


def painted(case: Case, look: Look, layer: str | None) -> npt.NDArray[np.uint8] | None:
    """Values of the overlay in the box: labels, or an error map; None for nothing.

    Raises:
        ValueError: an error map without a reference, or an unknown layer.
    """
    if layer is None or look.overlay == "none":
        return None
    return case.layer(layer) if look.region is None else case.errors(layer, look.region)


def colours_of(look: Look) -> dict[int, tuple[str, float]]:
    """Value of the overlay -> its colour and opacity; a label that isn't drawn is left out."""
    if look.region is None:
        return {value: (colour, look.opacity) for value, colour in COLOURS.items() if value in look.labels}
    return {value: (colour, look.opacity * (0.35 if value == 3 else 1.0)) for value, (colour, _) in ERRORS.items()}


def legend_of(look: Look) -> dict[str, str]:
    """Colour -> what it stands for."""
    if look.overlay == "none":
        return {}
    if look.region is None:
        return {COLOURS[value]: NAMES[value] for value in COLOURS if value in look.labels}
    return {colour: f"{name} {look.region}" for colour, name in ERRORS.values()}


def picture(case: Case, look: Look, *, layers: Sequence[str] | None = None) -> Picture:
    """A row for each layer: the three planes through the crosshair and the tumour in the translucent brain.

    With one plane only (`look.view`) the layers stand side by side.

    Args:
        case: who is shown.
        look: how; its layer is ignored where `layers` are given.
        layers: which layers; by default that of `look`.
    """
    names: list[str | None] = [*layers] if layers else [look.layer]
    views = ["axial", "coronal", "sagittal", "3-D"] if look.view == "all" else [look.view]
    cells = [(name, view) for name in names for view in views]
    columns = len(views) if len(views) > 1 else min(4, len(cells))
    painting = {name: painted(case, look, name) for name in names}
    facts = {name: case.facts(name) for name in names if name is not None}
    grey = case.grey(look.modality)
    turned = rendered(case, look, painting, colours_of(look)) if "3-D" in views else {}
    with styled():
        figure, ax, corners = _sheet(len(cells), columns)
        for (name, view), (left, bottom, side) in zip(cells, corners, strict=True):
            ax.add_patch(Rectangle((left, bottom), side, side, facecolor="black", edgecolor="none", zorder=0))
            if view == "3-D":
                ax.imshow(_bytes(turned[name]), interpolation="bilinear", aspect="auto", zorder=1,
                          extent=(left, left + side, bottom, bottom + side))
                _letters(ax, ("R", "L"), left, bottom + 0.28, side)
            else:
                _slice(ax, case, look, grey, painting[name], view, (left, bottom, side))
            if view == views[0]:
                told = _told(case, name, facts, wide=len(views) > 1)
                ax.text(left, bottom + side + 0.05, told, fontsize=9 if len(views) > 1 else 8, fontweight="bold",
                        va="bottom")
        width, height = (float(inches) for inches in figure.get_size_inches())
        ax.set(xlim=(0, width), ylim=(0, height), aspect="auto")
        figure.suptitle(f"{case.patient.id}, {look.modality}", x=0.5, y=1 - 0.1 / height, va="top", fontweight="bold")
        _foot(figure, look)
    figure.alt = _words(case, look, facts)
    return figure


def _sheet(cells: int, columns: int) -> tuple[Picture, Axes, list[tuple[float, float, float]]]:
    """A figure of one pair of axes in inches, and left, bottom and side of each cell: axes for each would be slow."""
    rows = -(-cells // columns)
    side, gap, caption, top, foot = 2.45 if columns > 1 else 4.5, 0.06, 0.3, 0.36, 0.62
    used, height = columns * (side + gap), top + rows * (side + caption) + foot
    width = max(used, 6.0)
    figure = Picture(figsize=(width, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    corners = []
    for row, column in (divmod(number, columns) for number in range(cells)):
        corners.append(((width - used) / 2 + column * (side + gap) + gap / 2,
                        height - top - (row + 1) * (side + caption), side))
    return figure, ax, corners


def _slice(ax: Axes, case: Case, look: Look, grey: npt.NDArray[np.uint8], over: npt.NDArray[np.uint8] | None,
           plane: str, cell: tuple[float, float, float]) -> None:
    axis = _AXIS[plane]
    index = look.crosshair[axis]
    shown = np.repeat(_flat(grey, axis, index)[..., None], 3, axis=2).astype(np.float32) / 255
    if over is not None:
        values = _flat(over, axis, index)
        for value, (colour, opacity) in colours_of(look).items():
            here = values == value
            shown[here] = (1 - opacity) * shown[here] + opacity * np.asarray(to_rgb(colour), dtype=np.float32)
    left, bottom, side = cell
    across, up = (case.patient.spacing_mm[other] for other in range(3) if other != axis)
    longest = max(size * mm for size, mm in zip(case.shape, case.patient.spacing_mm, strict=True))
    wide, high = (side * count * mm / longest for count, mm in ((shown.shape[1], across), (shown.shape[0], up)))
    x, y = left + (side - wide) / 2, bottom + (side - high) / 2
    ax.imshow(_bytes(shown), interpolation="bilinear", aspect="auto", extent=(x, x + wide, y, y + high), zorder=1)
    column, row = (look.crosshair[other] for other in range(3) if other != axis)
    ax.vlines(x + wide * (1 - (column + 0.5) / shown.shape[1]), y, y + high, color=_CROSSHAIR, linewidth=0.5, alpha=0.7)
    ax.hlines(y + high * (row + 0.5) / shown.shape[0], x, x + wide, color=_CROSSHAIR, linewidth=0.5, alpha=0.7)
    _letters(ax, _SIDES[plane], left, bottom + side - 0.05, side)
    ax.text(left + 0.06, bottom + 0.06, f"{plane} {index + case.box[axis].start}", color="white", fontsize=7.5,
            path_effects=_EDGE)


def _bytes(image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.asarray(np.rint(255 * image), dtype=np.uint8)


def _letters(ax: Axes, letters: tuple[str, str], left: float, top: float, side: float) -> None:
    """What is on the left and on the right of a cell."""
    for letter, x, align in zip(letters, (left + 0.07, left + side - 0.07), ("left", "right"), strict=True):
        ax.text(x, top, letter, color="white", fontsize=9, ha=align, va="top", fontweight="bold", path_effects=_EDGE)


def _flat(volume: npt.NDArray[np.uint8], axis: int, index: int) -> npt.NDArray[np.uint8]:
    """Rows downwards, the patient's right or face on the left."""
    flat: npt.NDArray[np.uint8] = np.take(volume, index, axis=axis)
    return flat[::-1, ::-1].T


def _told(case: Case, name: str | None, facts: Mapping[str, Sequence[RegionFacts]], *, wide: bool) -> str:
    """A layer's name, with its volumes, and its Dice where it has one."""
    if name is None:
        return "no label map, no prediction"
    known = {fact.region: fact for fact in facts[name]}
    scored = name != REFERENCE and REFERENCE in case.layers
    told = [f"{region} {known[region].ml:.1f} ml" + (f", Dice {known[region].dice:.2f}" if scored else "")
            for region in ("WT", "TC", "ET")]
    if not any(fact.ml for fact in facts[name]):
        told = ["no tumour" + (f", Dice WT {known['WT'].dice:.2f}" if scored else "")]
    return f"{arm_label(name)}   {' · '.join(told if wide else told[:1])}"


def _foot(figure: Picture, look: Look) -> None:
    height = figure.get_figheight()
    handles: list[Any] = [Patch(facecolor=colour, label=name) for colour, name in legend_of(look).items()]
    if handles:
        figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.22 / height), ncols=len(handles),
                      handlelength=1.2, handleheight=1.0, columnspacing=1.4, fontsize=8.5)
    figure.text(0.5, 0.08 / height, "R, L, A, P: the patient's right, left, front and back; the lines meet at the "
                "crosshair", ha="center", va="bottom", fontsize=7.5, color="#666666")


def _words(case: Case, look: Look, facts: Mapping[str, Sequence[RegionFacts]]) -> str:
    told = []
    for name, known in facts.items():
        scored = name != REFERENCE and REFERENCE in case.layers
        told.append(f"{name}: " + ", ".join(f"{fact.region} {fact.ml:.1f} ml" + (f" (Dice {fact.dice:.2f})" if scored
                                                                                 else "") for fact in known))
    return f"{look.modality} of patient {case.patient.id}, {look.overlay}. " + "; ".join(told or ["no labels"]) + "."
