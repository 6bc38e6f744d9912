"""Figures of privacy: what a run spent, round by round, beside what it bought."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from fedlab.run.history import History
from fedlab.view.style import Picture, styled

__all__ = ["privacy_curves"]

_WORST, _OTHERS, _METRIC, _BUDGET = "#0072B2", "#9DB9CE", "#222222", "#B3261E"


def privacy_curves(history: History, *, metric: str = "Dice", budget: float | None = None) -> Picture:
    """The ε of every site after every round, and a metric of the model beside it.

    A panel for each unit of the guarantee, with δ, adjacency and accountant under it, for an ε says nothing without
    them. The site that has spent most is drawn strong.

    Args:
        history: of a run with a formal guarantee.
        metric: which metric of the rounds is shown; without it there is no such panel.
        budget: ε that no site was to exceed, drawn as a line.

    Raises:
        ValueError: the run has no formal guarantee, so there is no ε to draw.
    """
    spent = history.spent()
    if spent.empty:
        raise ValueError("the run has no formal guarantee, so there is no ε to draw; fedlab.curves shows what it "
                         "learned")
    table = history.table()
    units = list(dict.fromkeys(spent.index.get_level_values("unit")))
    words = []
    with styled():
        shown = metric in table and bool(table[metric].notna().any())
        figure = Picture(figsize=(5 * (len(units) + shown), 4.1), layout="constrained")
        axes = figure.subplots(1, len(units) + shown, squeeze=False)[0]
        for ax, unit in zip(axes, units, strict=False):
            of_unit = spent[spent.index.get_level_values("unit") == unit].droplevel("unit")
            words.append(_spending(ax, of_unit, str(unit), budget))
        if shown:
            values = table[metric].dropna()
            axes[-1].plot(values.index + 1, values, color=_METRIC, linewidth=2.2, marker="o", markersize=3.5)
            axes[-1].set_ylim(bottom=0)
            _dress(axes[-1], f"{metric} of the model")
            words.append(f"{metric} ends at {values.iloc[-1]:.2f}.")
    figure.alt = " ".join(words)
    return figure


def _spending(ax: Axes, spent: pd.DataFrame, unit: str, budget: float | None) -> str:
    """Lines of the sites' ε for one unit; returns them in words."""
    wide = spent["epsilon"].unstack("site").sort_index().ffill()
    last = wide.iloc[-1]
    worst = str(last.idxmax())
    for site in wide:
        strong = site == worst
        ax.plot(wide.index + 1, wide[site], color=_WORST if strong else _OTHERS, linewidth=2.4 if strong else 1.2,
                marker="o" if len(wide) < 16 else "", markersize=3.5, zorder=3 if strong else 2,
                label=f"{site}, most" if strong and wide.shape[1] > 1 else str(site) if strong else "other sites")
    if budget is not None:
        ax.axhline(budget, color=_BUDGET, linewidth=1.4, linestyle="--", label=f"budget {budget:g}")
    handles, labels = ax.get_legend_handles_labels()
    unique: dict[str, Any] = dict(zip(labels, handles, strict=True))
    ax.legend(unique.values(), unique.keys(), loc="upper left")
    ax.set_ylim(0, 1.25 * max(float(wide.max().max()), budget or 0.0))
    terms = [f"δ = {row.delta:g}, {row.adjacency}, {row.accountant} accountant"
             for row in spent[["delta", "adjacency", "accountant"]].drop_duplicates().itertuples()]
    _dress(ax, f"ε per {unit}, spent so far")
    ax.set_xlabel("rounds finished\n" + "\n".join(terms), fontsize=8.5)
    return (f"ε per {unit} ({'; '.join(terms)}) rises to {float(last[worst]):.3g} at {worst}"
            + (f", the budget is {budget:g}." if budget is not None else "."))


def _dress(ax: Axes, title: str) -> None:
    ax.set_title(title)
    ax.grid(axis="y")
    ax.set_xlabel("rounds finished")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.margins(x=0.02)
