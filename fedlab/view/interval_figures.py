"""Figures of means with their intervals: the settings of a sweep, and runs on disk."""

from __future__ import annotations

from numbers import Number
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlab.core.text import counted
from fedlab.evidence.differences import mean_dice
from fedlab.evidence.runs import RunTable
from fedlab.evidence.sweeps import Sweep
from fedlab.view.colours import BLUE, LINES, styled

if TYPE_CHECKING:
    import pandas as pd

    from fedlab.view.picture import Picture

__all__ = ["runs_figure", "sweep_figure"]


@styled
def sweep_figure(found: Sweep) -> Picture:
    """Mean Dice by setting, with its 95 % interval over the patients of all seeds.

    The setting with the most values lies on the horizontal axis, logarithmic if its values span a factor of 20; the
    others, if there are any, are lines of a colour each.
    """
    from fedlab.view.picture import Picture, log_ticks

    table = found.over_seeds()
    names = list(next(iter(found.settings.values())))
    along = max(names, key=lambda name: table[name].map(repr).nunique())
    others = [name for name in names if name != along]
    numbers = all(isinstance(v, Number) and not isinstance(v, bool) for v in table[along])
    figure = Picture(figsize=(8, 3.8), layout="constrained")
    ax = figure.subplots()
    places = list(dict.fromkeys(table[along].map(repr)))
    labels = table[others].map(repr).apply(lambda row: ", ".join(f"{k}={v}" for k, v in row.items()), axis=1)
    lines = [(label, table[labels == label]) for label in dict.fromkeys(labels)] if others else [("", table)]
    for number, (label, rows) in enumerate(lines):
        rows = rows.sort_values(along) if numbers else rows
        shift = 0.0 if numbers else 0.08 * (number - (len(lines) - 1) / 2)  # so that intervals do not hide each other
        x = [value if numbers else places.index(repr(value)) + shift for value in rows[along]]
        ax.errorbar(x, rows["dice"], yerr=_around(rows), marker="o", capsize=3, color=LINES[number % len(LINES)],
                    label=label or None, linestyle="-" if numbers else "none")
    if numbers and table[along].min() > 0 and table[along].max() / table[along].min() >= 20:
        log_ticks(ax)
    elif not numbers:
        ax.set_xticks(range(len(places)), places)
    ax.set(xlabel=along, ylabel="mean Dice")
    ax.grid(axis="y")
    if others:
        figure.legend(loc="outside right upper")
    seeds, patients = int(table["seeds"].max()), int(table["patients"].max())
    ax.set_title(f"95 % intervals over {counted(patients, 'patient')}, {counted(seeds, 'seed')}", fontsize=10)
    figure.alt = "Mean Dice by setting: " + "; ".join(
        f"{name} {row.dice:.2f}" for name, row in zip(found.settings, table.itertuples(), strict=True)) + "."
    return figure


@styled
def runs_figure(table: RunTable, *names: str) -> Picture:
    """Mean Dice of the main arms of runs on disk, with 95 % intervals over held-out patients.

    Args:
        table: of `fedlab.evidence.runs`.
        names: of its runs; all finished ones if none is named.

    Raises:
        RunError: a run is missing or not finished, or there is none.
    """
    from fedlab.core.errors import RunError
    from fedlab.view.picture import Picture

    chosen = names or tuple(name for name, run in table.runs.items() if run.summary is not None)
    if not chosen:
        raise RunError("there is no finished run to draw; 'fedlab demo' makes one")
    scores = table.scores(*chosen)
    means = np.array([mean_dice(scores, name) for name in chosen])
    figure = Picture(figsize=(8, 0.9 + 0.42 * len(chosen)), layout="constrained")
    ax = figure.subplots()
    rows = np.arange(len(chosen))
    ax.errorbar(means[:, 0], rows, xerr=np.abs(means[:, 1:] - means[:, :1]).T, fmt="o", capsize=3, color=BLUE)
    ax.set_yticks(rows, chosen)
    ax.set(xlabel="mean Dice of the main arm, 95 % interval over held-out patients", ylim=(len(chosen) - 0.5, -0.5))
    ax.grid(axis="x")
    figure.alt = "Mean Dice of runs: " + "; ".join(f"{n} {m[0]:.2f}" for n, m in zip(chosen, means, strict=True)) + "."
    return figure


def _around(rows: pd.DataFrame) -> Any:
    """Distances of the limits from the mean, shape (2, rows)."""
    return np.abs(np.stack([rows["dice"] - rows["low"], rows["high"] - rows["dice"]]).astype(float))
