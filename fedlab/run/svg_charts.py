"""Line charts as inline SVG: drawn in a millisecond, in any thread, without a library or global settings."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise

__all__ = ["Points", "Style", "chart"]

Points = Sequence[tuple[float, float]]
#: Colour and dash pattern of a line.
Style = tuple[str, str]
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 190, 46, 10, 28, 24
_MOST = 240  # points per line; more cannot be seen


def chart(title: str, lines: Mapping[str, Points], *, rounds: int, styles: Mapping[str, Style] | None = None,
          bottom: float | None = None, top: float | None = None, limit: float | None = None, bold: str | None = None,
          note: str = "nothing yet") -> str:
    """Values over the rounds, one line per name, as an SVG element.

    Args:
        title: above the chart.
        lines: name -> (number of finished rounds, value); a line is broken where a round is missing, and values that
            are not finite are left out.
        rounds: right end of the horizontal axis.
        styles: name -> style of its line; other lines are black.
        bottom, top: ends of the vertical axis; by default those of the values.
        limit: a value drawn as a red dashed line.
        bold: the name of the line that is drawn strong, above the others.
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

    def at(x: float, y: float) -> str:
        across = _LEFT + (_WIDTH - _LEFT - _RIGHT) * (x - 1) / max(rounds - 1, 1)
        down = _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (y - low) / (high - low)
        return f"{across:.1f} {down:.1f}"

    drawn = [_line(name, points, at, (styles or {}).get(name, ("#222222", "")), strong=name == bold)
             for name, points in sorted(kept.items(), key=lambda item: item[0] == bold)]
    if limit is not None:
        drawn.append(f'<path d="M{at(1, limit)}L{at(max(rounds, 2), limit)}" stroke="#B3261E" stroke-width="1.4" '
                     'stroke-dasharray="6 4"/>')
    if kept or limit is not None:
        drawn.insert(0, _axes(at, low, high, rounds))
    if not kept:
        drawn.append(_wrapped(note))
    spoken = ", ".join(f"{name} {points[-1][1]:.3g}" for name, points in kept.items()) or "nothing yet"
    return (f'<svg role="img" aria-label="{escape(f"{title}: {spoken}")}" width="{_WIDTH}" height="{_HEIGHT}" '
            f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="10" fill="none" '
            'style="background:#fff;margin:0 10px 10px 0">'
            f'<text x="6" y="15" font-size="12.5" font-weight="bold" fill="#222">{escape(title)}</text>'
            f"{''.join(drawn)}</svg>")


def _line(name: str, points: Points, at: Callable[[float, float], str], style: Style, *, strong: bool) -> str:
    """A line that is broken where rounds are missing, with a dot at its end and at isolated points."""
    gap = 1.5 * max(1.0, min((b[0] - a[0] for a, b in pairwise(points)), default=1.0))
    path, isolated = "", []
    for k, (x, y) in enumerate(points):
        begins = k == 0 or x - points[k - 1][0] > gap
        path += f"{'M' if begins else 'L'}{at(x, y)}"
        if begins and (k + 1 == len(points) or points[k + 1][0] - x > gap):
            isolated.append((x, y))
    colour, dash = style
    dots = "".join('<circle cx="{}" cy="{}" r="2.6" fill="{}"/>'.format(*at(x, y).split(), colour)
                   for x, y in {*isolated, points[-1]})
    return (f'<g><title>{escape(name)}: {points[-1][1]:.4g}</title><path d="{path}" stroke="{colour}" '
            f'stroke-width="{2.4 if strong else 1.5}" stroke-dasharray="{dash}" stroke-linejoin="round"/>{dots}</g>')


def _axes(at: Callable[[float, float], str], low: float, high: float, rounds: int) -> str:
    parts = []
    for value in _ticks(low, high, 4):
        x, y = at(1, value).split()
        parts.append(f'<path d="M{x} {y}H{_WIDTH - _RIGHT}" stroke="#E4E4E4"/><text x="{float(x) - 5}" '
                     f'y="{float(y) + 3.5}" text-anchor="end" fill="#444">{value:g}</text>')
    for number in sorted({max(1, round(value)) for value in _ticks(1, max(rounds, 2), 5)} | {1}):
        x = at(number, low).split()[0]
        parts.append(f'<text x="{x}" y="{_HEIGHT - 9}" text-anchor="middle" fill="#444">{number}</text>')
    return "".join(parts)


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


def _wrapped(text: str) -> str:
    """A sentence in the middle of the chart."""
    lines = textwrap.wrap(text, 50)
    top = _HEIGHT / 2 - 7 * (len(lines) - 1)
    return "".join(f'<text x="{_WIDTH / 2}" y="{top + 14 * k:g}" text-anchor="middle" font-size="11" '
                   f'fill="#666">{escape(line)}</text>' for k, line in enumerate(lines))
