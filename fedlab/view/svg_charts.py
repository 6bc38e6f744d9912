"""Line charts as inline SVG: drawn in a millisecond, in any thread, with no library and no settings of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise

__all__ = ["COLOURS", "chart", "colours_of", "legend"]

#: Okabe & Ito 2008, safe for the colour-blind, in an order in which neighbours differ.
COLOURS = ("#0072B2", "#E08A00", "#009E73", "#CC79A7", "#444444", "#56B4E9", "#8C510A", "#6A51A3")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 190, 46, 10, 28, 24
_MOST = 240  # points of a line; more cannot be seen

Points = Sequence[tuple[float, float]]


def colours_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a dash pattern for each name; the colours come round again with other dashes."""
    dashes = ("", "5 3", "2 2")
    return {name: (COLOURS[k % len(COLOURS)], dashes[k // len(COLOURS) % len(dashes)]) for k, name in enumerate(names)}


def legend(styles: Mapping[str, tuple[str, str]]) -> str:
    """The names beside a piece of their line, as HTML."""
    return " ".join(
        f'<span style="white-space:nowrap;margin-right:14px"><svg width="22" height="8"><path d="M0 4H22" '
        f'stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dash}"/></svg> {escape(name)}</span>'
        for name, (colour, dash) in styles.items())


def chart(title: str, lines: Mapping[str, Points], *, styles: Mapping[str, tuple[str, str]], rounds: int,
          bottom: float | None = None, top: float | None = None, limit: float | None = None, bold: str | None = None,
          note: str = "") -> str:
    """Values over the rounds, a line a name, as an SVG element.

    Args:
        title: above the chart.
        lines: name -> (number of finished rounds, value); a line is broken where a round is missing, and values that
            are no finite number are left out.
        styles: name -> colour and dash pattern; names without are black.
        rounds: right end of the horizontal axis.
        bottom, top: ends of the vertical axis; by default those of the values.
        limit: a value drawn as a red dashed line.
        bold: the name whose line is drawn strong, above the others.
        note: shown in place of lines where there are none.
    """
    kept = {name: good for name, points in lines.items()
            if (good := [(x, y) for x, y in _thinned(points) if math.isfinite(y)])}
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

    drawn = [_line(points, at, *styles.get(name, ("#222222", "")), strong=name == bold, name=name)
             for name, points in sorted(kept.items(), key=lambda item: item[0] == bold)]
    if limit is not None:
        drawn.append(f'<path d="M{at(1, limit)}L{at(max(rounds, 2), limit)}" stroke="#B3261E" stroke-width="1.4" '
                     'stroke-dasharray="6 4"/>')
    if not kept:
        drawn.append(_wrapped(note or "nothing yet"))
    return (f'<svg role="img" aria-label="{escape(_spoken(title, kept))}" width="{_WIDTH}" height="{_HEIGHT}" '
            f'viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="10" fill="none" '
            'style="background:#fff;margin:0 10px 10px 0">'
            f'<text x="6" y="15" font-size="12.5" font-weight="bold" fill="#222">{escape(title)}</text>'
            f"{_axes(at, low, high, rounds) if kept or limit is not None else ''}{''.join(drawn)}</svg>")


def _line(points: Points, at: Callable[[float, float], str], colour: str, dash: str, *, strong: bool,
          name: str) -> str:
    """A line that is broken where rounds are missing, with a dot at its end and at points that stand alone."""
    gap = 1.5 * max(1.0, min((b[0] - a[0] for a, b in pairwise(points)), default=1.0))
    path, alone = "", []
    for k, (x, y) in enumerate(points):
        begins = k == 0 or x - points[k - 1][0] > gap
        path += f"{'M' if begins else 'L'}{at(x, y)}"
        if begins and (k + 1 == len(points) or points[k + 1][0] - x > gap):
            alone.append((x, y))
    dots = "".join('<circle cx="{}" cy="{}" r="2.6" fill="{}"/>'.format(*at(x, y).split(), colour)
                   for x, y in {*alone, points[-1]})
    return (f'<g><title>{escape(name)}: {points[-1][1]:.4g}</title><path d="{path}" stroke="{colour}" '
            f'stroke-width="{2.4 if strong else 1.5}" stroke-dasharray="{dash}" stroke-linejoin="round"/>{dots}</g>')


def _axes(at: Callable[[float, float], str], low: float, high: float, rounds: int) -> str:
    parts = []
    for value in _ticks(low, high, 4):
        x, y = at(1, value).split()
        parts.append(f'<path d="M{x} {y}H{_WIDTH - _RIGHT}" stroke="#E4E4E4"/><text x="{float(x) - 5}" '
                     f'y="{float(y) + 3.5}" text-anchor="end" fill="#444">{value:g}</text>')
    whole = sorted({max(1, round(value)) for value in _ticks(1, max(rounds, 2), 5)} | {1})
    for number in whole:
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
    """Every so many points of a long line, and always the last."""
    every = math.ceil(len(points) / _MOST)
    return points if every <= 1 else [*points[:-1:every], points[-1]]


def _wrapped(text: str) -> str:
    """A sentence in the middle of the chart, in lines of about fifty letters."""
    lines: list[str] = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > 50:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    top = _HEIGHT / 2 - 7 * (len(lines) - 1)
    return "".join(f'<text x="{_WIDTH / 2}" y="{top + 14 * k:g}" text-anchor="middle" font-size="11" '
                   f'fill="#666">{escape(line)}</text>' for k, line in enumerate(lines))


def _spoken(title: str, lines: Mapping[str, Points]) -> str:
    ends = ", ".join(f"{name} {points[-1][1]:.3g}" for name, points in lines.items())
    return f"{title}: {ends or 'nothing yet'}"
