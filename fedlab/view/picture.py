"""The class of all figures, and parts that they share. Import it inside functions: it loads matplotlib."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from fedlab.view.colours import GREY, INK

__all__ = ["Picture", "blended", "darken", "figure_png", "foot", "log_ticks", "matrix", "over_rounds", "png_base64",
           "whole_ticks"]

#: Colours of the light theme that cannot be seen on a dark background -> those that take their place.
_ON_DARK = {INK: "#E8E8E8", GREY: "#B5B5B5", "#444444": "#C8C8C8", "#777777": "#A0A0A0",
            "#F6F7F8": "#1C1C1C", "#6A51A3": "#A18BD6", "#8C510A": "#C98B4A"}
_SHADES = LinearSegmentedColormap.from_list("fedlab", ["#F6F8FB", "#C9DDEE", "#6FA8D2", "#0072B2", "#003A66"])


class Picture(Figure):
    """A matplotlib figure that a notebook shows as the value of a cell, once, with any backend.

    It is not registered with pyplot, so no figure stays open.
    """

    #: A description in words, for readers who do not see the figure.
    alt: str = ""

    def _repr_png_(self, *, dpi: int = 160) -> tuple[bytes, dict[str, int]]:
        return figure_png(self, dpi)


def figure_png(figure: Figure, dpi: int) -> tuple[bytes, dict[str, int]]:
    """A figure as PNG, and its width and height in CSS pixels, 96 per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    width, height = (round(inches * 96) for inches in figure.get_size_inches())
    return buffer.getvalue(), {"width": width, "height": height}


def darken(figure: object) -> None:
    """Gives a figure's artists the colours of the dark theme; text on images keeps its own."""
    if not isinstance(figure, Figure):
        return
    on_images = {text for ax in figure.axes if ax.images for text in ax.texts}
    changed = {to_hex(light): to_rgb(dark) for light, dark in _ON_DARK.items()}
    for artist in figure.findobj():
        if artist in on_images:
            continue
        for part in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            if not hasattr(artist, f"get_{part}") or not hasattr(artist, f"set_{part}"):
                continue
            before = to_rgba_array(getattr(artist, f"get_{part}")()).tolist()
            after = [[*changed.get(to_hex(rgba), rgba[:3]), rgba[3]] for rgba in before]
            if after != before:
                getattr(artist, f"set_{part}")(after[0] if len(after) == 1 else after)
        box = artist.get_bbox_patch() if isinstance(artist, Text) else None
        if box is not None and to_rgb(box.get_facecolor()) == (1.0, 1.0, 1.0):
            box.set_facecolor((*to_rgb(figure.get_facecolor()), box.get_alpha() or 1.0))


def whole_ticks(ax: Axes, most: int = 10) -> None:
    """Ticks of the horizontal axis at whole numbers, at most `most` of them."""
    ax.xaxis.set_major_locator(MaxNLocator(nbins=most, integer=True))


def log_ticks(ax: Axes) -> None:
    """Makes the horizontal axis of drawn values logarithmic, with plain numbers that do not run into each other."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter(NullFormatter())


def over_rounds(ax: Axes, title: str) -> None:
    """Title, grid and horizontal axis of a panel with values over rounds."""
    ax.set_title(title)
    ax.grid(axis="y")
    ax.set_xlabel("rounds finished")
    ax.margins(x=0.02)
    whole_ticks(ax)


def matrix(ax: Axes, values: npt.NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], *, low: float,
           high: float, text: Callable[[int, int, float], str], fontsize: float, bar: Sequence[Axes] = ()) -> None:
    """A matrix as shades with texts in its cells, grey where a value is missing, and a colour bar beside these axes."""
    image = ax.imshow(np.ma.masked_invalid(values), cmap=_SHADES.with_extremes(bad="#DDDDDD"), vmin=low, vmax=high,
                      aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        red, green, blue = (np.asarray(_SHADES(float(value - low) / (high - low)))[:3] ** 2.2
                            if np.isfinite(value) else (1, 1, 1))
        dark = 0.21 * red + 0.72 * green + 0.07 * blue < 0.18  # luminance; from there on black has the better contrast
        ax.text(column, row, text(row, column, value), ha="center", va="center", fontsize=fontsize,
                color="white" if dark else INK)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xticks(range(len(columns)), columns)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if bar:
        ax.figure.colorbar(image, ax=list(bar)).outline.set_visible(False)


def foot(figure: Figure, colours: Mapping[str, str], text: str, *further: Artist) -> None:
    """A legend of colours and their meanings, and a line of text below it, at the foot of a figure."""
    height = figure.get_figheight()
    if handles := [*(Patch(facecolor=colour, label=name) for colour, name in colours.items()), *further]:
        figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.26 / height), ncols=len(handles),
                      handlelength=1.3, handleheight=1.0, columnspacing=1.5, fontsize=8.5)
    figure.text(0.5, 0.1 / height, text, ha="center", va="bottom", fontsize=8, color=GREY)


def blended(grey: npt.NDArray[np.uint8], values: npt.NDArray[Any] | None,
            colours: Mapping[int, tuple[str, float]]) -> npt.NDArray[np.uint8]:
    """A grey image (rows, columns) as RGB under an overlay of the same shape.

    `colours` maps a value of the overlay to its colour and opacity; other values are transparent.
    """
    image = np.repeat(grey[..., None], 3, axis=2).astype(np.float32)
    for value, (colour, opacity) in colours.items() if values is not None else ():
        here = values == value
        image[here] = (1 - opacity) * image[here] + opacity * 255 * np.asarray(to_rgb(colour), dtype=np.float32)
    return np.rint(image).astype(np.uint8)


def png_base64(image: npt.NDArray[Any]) -> str:
    """An image as base64 PNG, a 2-D one in grey from 0 to 1. It changes no settings, so any thread may call it."""
    buffer = io.BytesIO()
    imsave(buffer, image, cmap="gray", vmin=0, vmax=1, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
