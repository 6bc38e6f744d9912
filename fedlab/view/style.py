"""What all figures share: colours, type sizes, and a figure that notebooks show by themselves."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

__all__ = ["ARMS", "Picture", "arm_colours", "arm_label", "arm_of", "styled"]

#: How runs are told apart in every figure: an arm and its colour (Okabe & Ito 2008, safe for the colour-blind).
ARMS: Mapping[str, str] = {
    "federated": "#0072B2", "centralised": "#444444", "local": "#E08A00", "thresholding": "#9A9A9A",
}
_FURTHER = ("#009E73", "#CC79A7", "#56B4E9", "#8C510A", "#6A51A3")
_LABELS = {"local_own": "local, own patients", "local_others": "local, others' patients"}
_INK = "#222222"

_STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10,
    "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9.5, "figure.titlesize": 13,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlepad": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888", "axes.linewidth": 0.8,
    "axes.grid": False, "grid.color": "#E4E4E4", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "text.color": _INK, "axes.labelcolor": _INK, "axes.titlecolor": _INK, "xtick.color": "#555555",
    "ytick.color": "#555555", "xtick.labelcolor": _INK, "ytick.labelcolor": _INK,
    "legend.frameon": False, "lines.linewidth": 2.0, "lines.solid_capstyle": "round",
    "figure.facecolor": "white", "savefig.facecolor": "white",
}


def styled() -> AbstractContextManager[None]:
    """The matplotlib settings of our figures for the length of a `with`; the user's come back after it."""
    return rc_context(_STYLE)


class Picture(Figure):
    """A matplotlib figure that a notebook shows as the value of a cell, once, whatever the backend.

    It isn't known to pyplot, so it leaves no figure open behind it.

    Attributes:
        alt: what is to be seen, in a sentence, for those who don't see it.
    """

    alt: str = ""

    def _repr_png_(self, *, dpi: int = 160) -> tuple[bytes, dict[str, int]]:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=dpi)
        width, height = (round(inches * 96) for inches in self.get_size_inches())
        return buffer.getvalue(), {"width": width, "height": height}


def arm_of(name: str) -> str:
    """The arm that a run belongs to: "local" for "local_own" or "local: Bern"; else the name itself."""
    return next((arm for arm in ARMS if name.lower().startswith(arm)), name)


def arm_colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name: its arm's, or the next free one for an arm that `ARMS` doesn't hold.

    Raises:
        ValueError: more unknown arms than there are colours to tell them apart.
    """
    names = list(names)
    unknown = list(dict.fromkeys(arm for name in names if (arm := arm_of(name)) not in ARMS))
    if len(unknown) > len(_FURTHER):
        raise ValueError(f"at most {len(_FURTHER)} arms besides {', '.join(ARMS)} can be told apart by colour, got "
                         f"{len(unknown)}: {', '.join(unknown)}; draw them in several figures")
    colours = {**ARMS, **dict(zip(unknown, _FURTHER, strict=False))}
    return {name: colours[arm_of(name)] for name in names}


def arm_label(name: str) -> str:
    """An arm's name as figures and tables write it."""
    return _LABELS.get(name, name)
