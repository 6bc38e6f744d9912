"""Line charts as inline SVG: drawn in a millisecond, in any thread, without a plotting library or global settings."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from fedlab.core.files import filled_in

__all__ = ["Points", "Spans", "Style", "chart"]

Points = Sequence[tuple[float, float]]
#: Intervals: number of finished rounds, low and high.
Spans = Sequence[tuple[float, float, float]]
#: Colour and dash pattern of a line.
Style = tuple[str, str]
#: The frame of the axes in pixels; the template has the size of the picture.
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 330, 28, 166
_MOST = 240  # points per line; more cannot be seen
_DASH = 7  # pixels of one line before the next, where several coincide


def chart(title: str, lines: Mapping[str, Points], *, rounds: int, styles: Mapping[str, Style] | None = None,
          bottom: float | None = None, top: float | None = None, limit: float | None = None, bold: str | None = None,
          spans: Spans = (), note: str = "nothing yet") -> str:
    """Values over the rounds, one line per name, as an SVG element. Lines that coincide alternate along their way.

    Args:
        title: above the chart.
        lines: name -> (number of finished rounds, value); a line is broken where a round is missing, and values that
            are not finite are left out.
        rounds: right end of the horizontal axis.
        styles: name -> style of its line; other lines have the colour of the text.
        bottom, top: ends of the vertical axis; by default those of the values.
        limit: a value drawn as a red dashed line.
        bold: the name of the line that is drawn strong, above the others.
        spans: intervals, drawn upright behind the lines.
        note: shown if there are no lines.
    """
    kept = {name: finite for name, points in lines.items()
            if (finite := [(x, y) for x, y in _thinned(points) if math.isfinite(y)])}
    values = [y for points in kept.values() for _, y in points] + ([limit] if limit is not None else [])
    low = min(values, default=0.0) if bottom is None else bottom
    high = max([*values, low]) if top is None else top
    if high <= low:
        high = low + (abs(low) or 1.0)
    elif top is None:
        high += 0.06 * (high - low)

    def across(x: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * (x - 1) / max(rounds - 1, 1), 1)

    def down(y: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * (y - low) / (high - low), 1)

    drawn: list[dict[str, Any]] = []
    for name, points in sorted(kept.items(), key=lambda item: item[0] == bold):
        pieces = [[(across(x), down(y)) for x, y in piece] for piece in _pieces(points)]
        drawn.append({"name": name, "last": points[-1][1], "pieces": pieces, "strong": name == bold,
                      "style": (styles or {}).get(name, ("currentColor", "")),
                      "dots": {*(piece[0] for piece in pieces if len(piece) == 1), pieces[-1][-1]}})
    _alternate(drawn)
    axes = bool(kept) or limit is not None
    whole = {max(1, round(value)) for value in _ticks(1, max(rounds, 2), 5)} | {1}
    return filled_in(
        "fedlab.run", "chart.svg", title=title, lines=drawn, frame=(_LEFT, _RIGHT),
        rows=[(value, down(value)) for value in _ticks(low, high, 4)] if axes else [],
        columns=[(number, across(number)) for number in sorted(whole)] if axes else [],
        limit=None if limit is None else (down(limit), across(max(rounds, 2))),
        spans=[(across(x), down(below), down(above)) for x, below, above in spans],
        note=[] if kept else textwrap.wrap(note, 50))


def _alternate(drawn: list[dict[str, Any]]) -> None:
    """Gives each of several lines with the same pixels its own dashes, so that all of their colours are seen."""
    for line in drawn:
        same = [other for other in drawn if other["pieces"] == line["pieces"]]
        line["offset"] = 0
        if len(same) > 1:
            line["style"] = (line["style"][0], f"{_DASH} {_DASH * (len(same) - 1)}")
            line["offset"] = -_DASH * next(k for k, other in enumerate(same) if other is line)


def _pieces(points: Points) -> list[list[tuple[float, float]]]:
    """A line in pieces, broken where rounds are missing."""
    gap = 1.5 * max(1.0, min((b[0] - a[0] for a, b in pairwise(points)), default=1.0))
    pieces = [[points[0]]]
    for before, point in pairwise(points):
        if point[0] - before[0] > gap:
            pieces.append([])
        pieces[-1].append(point)
    return pieces


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two others."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= next((factor for factor in (1, 2, 5) if (high - low) / (step * factor) <= about + 1), 10)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _thinned(points: Points) -> Points:
    """Every n-th point of a long line, and always the last."""
    every = math.ceil(len(points) / _MOST)
    return points if every <= 1 else [*points[:-1:every], points[-1]]
