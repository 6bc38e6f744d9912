"""What of a patient is shown, and the picture of it that needs nothing but matplotlib.

Slices lie as in `fedlab.view.slices`: the patient's right on the left of the picture, the face on the left of
sagittal ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from fedlab.types import MODALITIES, REGIONS
from fedlab.view.depth import rendered
from fedlab.view.slices import COLOURS, NAMES
from fedlab.view.style import Picture, arm_label, styled
from fedlab.view.volumes import ERRORS, REFERENCE, Case

__all__ = ["OVERLAYS", "VIEWS", "Look", "View", "colours_of", "legend_of", "picture"]

View: TypeAlias = Literal["all", "axial", "coronal", "sagittal", "3-D"]
#: What a viewer can show of a patient at once: three planes and the 3-D view, or one of them.
VIEWS: tuple[str, ...] = get_args(View)
#: What lies over the scan: labels, the errors of a region, or nothing.
OVERLAYS = ("labels", *(f"errors {region}" for region in ("WT", "TC", "ET")), "none")

_AXIS = {"axial": 2, "coronal": 1, "sagittal": 0}
_SIDES = {"axial": ("R", "L"), "coronal": ("R", "L"), "sagittal": ("A", "P")}
_CROSSHAIR = "#7FD4FF"


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
    figure, axes = _grid(case, cells, columns)
    grey = case.grey(look.modality)
    turned = rendered(case, look, {name: painted(case, look, name) for name in names}, colours_of(look)) \
        if "3-D" in views else {}
    with styled():
        for ax, (name, view) in zip(axes, cells, strict=True):
            if view == "3-D":
                _solid(ax, turned[name])
            else:
                _slice(ax, case, look, grey, painted(case, look, name), view)
            if view == views[0]:
                _caption(ax, case, name, wide=len(views) > 1)
        height = figure.get_figheight()
        figure.suptitle(f"{case.patient.id}, {look.modality}", x=0.5, y=1 - 0.1 / height, va="top", fontweight="bold")
        _foot(figure, look)
    figure.alt = _words(case, look, [name for name in names if name is not None])
    return figure


def _grid(case: Case, cells: Sequence[Any], columns: int) -> tuple[Picture, list[Axes]]:
    rows = -(-len(cells) // columns)
    side, gap, caption, top, foot = 2.45 if columns > 1 else 4.5, 0.06, 0.3, 0.36, 0.62
    width, height = columns * (side + gap), top + rows * (side + caption) + foot
    figure = Picture(figsize=(max(width, 6.0), height))
    axes = []
    for number in range(len(cells)):
        row, column = divmod(number, columns)
        left = (max(width, 6.0) - width) / 2 + column * (side + gap) + gap / 2
        bottom = height - top - (row + 1) * (side + caption)
        axes.append(figure.add_axes((left / max(width, 6.0), bottom / height, side / max(width, 6.0), side / height)))
    return figure, axes


def _slice(ax: Axes, case: Case, look: Look, grey: npt.NDArray[np.uint8], over: npt.NDArray[np.uint8] | None,
           plane: str) -> None:
    axis = _AXIS[plane]
    index = look.crosshair[axis]
    shown = np.repeat(_flat(grey, axis, index)[..., None], 3, axis=2).astype(np.float32) / 255
    if over is not None:
        values = _flat(over, axis, index)
        for value, (colour, opacity) in colours_of(look).items():
            here = values == value
            shown[here] = (1 - opacity) * shown[here] + opacity * np.asarray(to_rgb(colour), dtype=np.float32)
    across, up = (case.patient.spacing_mm[other] for other in range(3) if other != axis)
    right, down = shown.shape[1] * across, shown.shape[0] * up
    ax.imshow(shown, interpolation="bilinear", aspect="equal", extent=(0, right, down, 0))
    half = max(right, down) / 2
    ax.set(xlim=(right / 2 - half, right / 2 + half), ylim=(down / 2 + half, down / 2 - half), xticks=[], yticks=[],
           facecolor="black")
    ax.spines[:].set_visible(False)
    x, y = (look.crosshair[other] for other in range(3) if other != axis)
    ax.axvline(right - (x + 0.5) * across, color=_CROSSHAIR, linewidth=0.5, alpha=0.7)
    ax.axhline(down - (y + 0.5) * up, color=_CROSSHAIR, linewidth=0.5, alpha=0.7)
    edge = [withStroke(linewidth=1.5, foreground="black")]
    for side, where, align in zip(_SIDES[plane], (0.03, 0.97), ("left", "right"), strict=True):
        ax.text(where, 0.97, side, transform=ax.transAxes, color="white", fontsize=9, ha=align, va="top",
                fontweight="bold", path_effects=edge)
    ax.text(0.03, 0.03, f"{plane} {index + case.box[axis].start}", transform=ax.transAxes, color="white", fontsize=7.5,
            path_effects=edge)


def _flat(volume: npt.NDArray[np.uint8], axis: int, index: int) -> npt.NDArray[np.uint8]:
    """Rows downwards, the patient's right or face on the left."""
    return volume.take(index, axis=axis)[::-1, ::-1].T


def _solid(ax: Axes, image: npt.NDArray[np.float32]) -> None:
    ax.imshow(image, interpolation="bilinear", aspect="equal")
    ax.set(xticks=[], yticks=[], facecolor="black")
    ax.spines[:].set_visible(False)
    for letter, x, y in (("R", 0.05, 0.08), ("L", 0.95, 0.08)):
        ax.text(x, y, letter, transform=ax.transAxes, color="white", fontsize=9, ha="center", fontweight="bold",
                path_effects=[withStroke(linewidth=1.5, foreground="black")])


def _caption(ax: Axes, case: Case, name: str | None, *, wide: bool) -> None:
    if name is None:
        ax.set_title("no label map, no prediction", fontsize=9.5, loc="left", pad=4)
        return
    facts = {fact.region: fact for fact in case.facts(name)}
    scored = name != REFERENCE and REFERENCE in case.layers
    told = [f"{region} {facts[region].ml:.1f} ml"
            + (f", Dice {facts[region].dice:.2f}" if scored and not math.isnan(facts[region].dice) else "")
            for region in ("WT", "TC", "ET")]
    if not any(fact.ml for fact in facts.values()):
        told = ["no tumour"] + (["Dice WT {:.2f}".format(facts["WT"].dice)] if scored else [])
    ax.set_title(arm_label(name) + ("   " + " · ".join(told) if wide else f"\n{told[0]}"),
                 fontsize=9.5 if wide else 8.5, loc="left", pad=4)


def _foot(figure: Picture, look: Look) -> None:
    height = figure.get_figheight()
    handles: list[Any] = [Patch(facecolor=colour, label=name) for colour, name in legend_of(look).items()]
    if handles:
        figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.22 / height), ncols=len(handles),
                      handlelength=1.2, handleheight=1.0, columnspacing=1.4, fontsize=8.5)
    figure.text(0.5, 0.08 / height, "R, L, A, P: the patient's right, left, front and back; the lines meet at the "
                "crosshair", ha="center", va="bottom", fontsize=7.5, color="#666666")


def _words(case: Case, look: Look, names: Sequence[str]) -> str:
    told = []
    for name in names:
        numbers = ", ".join(f"{fact.region} {fact.ml:.1f} ml" + ("" if math.isnan(fact.dice) or name == REFERENCE
                                                                 else f" (Dice {fact.dice:.2f})")
                            for fact in sorted(case.facts(name), key=lambda fact: REGIONS.index(fact.region)))
        told.append(f"{name}: {numbers}")
    return f"{look.modality} of patient {case.patient.id}, {look.overlay}. " + "; ".join(told or ["no labels"]) + "."
