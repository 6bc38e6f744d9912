"""Figures of runs: learning curves, privacy spent, arms compared by region and by site, and site contributions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedlab.core.text import counted
from fedlab.core.types import REPEATS, rounded_up
from fedlab.evidence.contributions import Contributions
from fedlab.run.history import History
from fedlab.view.colours import ARMS, BLUE, GREY, INK, ORANGE, RED, REGION_NAMES, arm_colours, arm_label, arm_of, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fedlab.view.picture import Picture

__all__ = ["contributions_figure", "cross_site_heatmap", "curves", "dice_by_arm", "privacy_curves"]

_METRIC_TITLES = {"dice": "Dice", "Dice": "Dice of held-out patients", "hd95_mm": "95 % Hausdorff distance [mm]"}


@styled
def curves(histories: Mapping[str, History], *, metric: str = "Dice") -> Picture:
    """Training loss and a metric of the model over the rounds, one line per arm.

    Arms of one kind, such as "local: Bern" and "local: Basel", share a colour and an entry of the legend.

    Args:
        histories: name of the arm -> history of its run.
        metric: of the rounds. Rounds and arms without it have no point in its panel; if no arm has it, the panel is
            left out.

    Raises:
        ValueError: no history holds a finished round, or neither a loss nor the metric.
    """
    from fedlab.view.picture import Picture, over_rounds

    tables = {name: table for name, history in histories.items() if len(table := history.table())}
    if not tables:
        raise ValueError("none of the histories holds a finished round, so there is no curve to draw")
    titles = {"loss": "Mean training loss", metric: _METRIC_TITLES.get(metric, metric)}
    panels = {column: title for column, title in titles.items() if any(column in table for table in tables.values())}
    if not panels:
        raise ValueError(f"the rounds hold neither a loss nor {metric!r}, only "
                         f"{sorted({str(c) for table in tables.values() for c in table})}; name one as metric=")
    colours, kinds = arm_colours(tables), [arm_of(name) for name in tables]
    figure = Picture(figsize=(10, 3.9), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=True, gridspec_kw={"wspace": 0.06})[0]
    lines: dict[str, Any] = {}
    for ax, (column, title) in zip(axes, panels.items(), strict=True):
        for name, table in tables.items():
            models = kinds.count(arm_of(name))
            label = f"{arm_of(name)} ({models} models)" if models > 1 else arm_label(name)
            values = table[column].dropna() if column in table else table.iloc[:0, 0]
            lines.setdefault(label, _line(ax, values, colours[name], strong=models == 1, label=label,
                                          alpha=0.75 if models > 1 else 1.0))
        over_rounds(ax, title)
        if column == metric:
            ax.set_ylim(0, 1 if metric == "Dice" else None)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4)
    last = {name: table[metric].dropna() for name, table in tables.items() if metric in table}
    figure.alt = " ".join([f"{' and '.join(panels.values())} over the rounds.", *(
        f"{arm_label(name)} ends at {values.iloc[-1]:.2f}." for name, values in last.items() if len(values))])
    return figure


def _line(ax: Axes, values: pd.Series[float], colour: str, *, strong: bool = True, **more: Any) -> Any:
    """Values by round, with dots if there are few."""
    line, = ax.plot(values.index + 1, values, color=colour, linewidth=2.2 if strong else 1.2, markersize=3.5,
                    marker="o" if len(values) < 16 else "", zorder=3 if strong else 2, **more)
    return line


@styled
def privacy_curves(history: History, *, metric: str = "Dice", budget: float | None = None) -> Picture:
    """The ε of every site after every round, and a metric of the model beside it.

    One panel per unit of the guarantee, with δ, adjacency and accountant below it, which define the meaning of an ε.
    The site that has spent most is highlighted.

    Args:
        history: of a run with a formal guarantee.
        metric: of the rounds; without it there is no such panel.
        budget: ε that no site should exceed, drawn as a line.

    Raises:
        ValueError: the run has no formal guarantee, so there is no ε to draw.
    """
    from fedlab.view.picture import Picture, over_rounds

    spent, table = history.published().spent(), history.table()
    if spent.empty:
        raise ValueError("the run has no formal guarantee, so there is no ε to draw; fedlab.view.curves shows what "
                         "it learned")
    units = dict.fromkeys(spent.index.get_level_values("unit"))
    shown = metric in table and bool(table[metric].notna().any())
    figure = Picture(figsize=(5 * (len(units) + shown), 4.1), layout="constrained")
    axes = figure.subplots(1, len(units) + shown, squeeze=False)[0]
    sentences = [_spending(ax, spent[spent.index.get_level_values("unit") == unit].droplevel("unit"), str(unit), budget)
                 for ax, unit in zip(axes, units, strict=False)]
    if shown:
        values = table[metric].dropna()
        _line(axes[-1], values, INK)
        axes[-1].set_ylim(bottom=0)
        over_rounds(axes[-1], f"{metric} of the model")
        sentences.append(f"{metric} ends at {values.iloc[-1]:.2f}.")
    figure.alt = " ".join(sentences)
    return figure


def _spending(ax: Axes, spent: pd.DataFrame, unit: str, budget: float | None) -> str:
    """Draws the ε of the sites for one unit, and returns a description."""
    from fedlab.view.picture import over_rounds

    wide = spent["epsilon"].unstack("site").sort_index().ffill()
    last = wide.iloc[-1]
    worst = str(last.idxmax())
    for site in wide:
        strong = site == worst
        _line(ax, wide[site], BLUE if strong else "#9DB9CE", strong=strong,
              label=f"{site}, most" if strong and wide.shape[1] > 1 else str(site) if strong else "other sites")
    if budget is not None:
        ax.axhline(budget, color=RED, linewidth=1.4, linestyle="--", label=f"budget {budget:g}")
    handles, labels = ax.get_legend_handles_labels()
    unique: dict[str, Any] = dict(zip(labels, handles, strict=True))
    ax.legend(unique.values(), unique.keys(), loc="upper left")
    ax.set_ylim(0, 1.25 * max(float(wide.max().max()), budget or 0.0))
    terms = [f"δ = {row.delta:g}, {row.adjacency}, {row.accountant} accountant"
             for row in spent[["delta", "adjacency", "accountant"]].drop_duplicates().itertuples()]
    terms += [REPEATS] * bool(spent["repeats"].any())
    over_rounds(ax, f"ε per {unit}, spent so far")
    ax.set_xlabel("rounds finished\n" + "\n".join(terms), fontsize=8.5)
    return (f"ε per {unit} ({'; '.join(terms)}) rises to {rounded_up(float(last[worst]))} at {worst}"
            + (f", the budget is {budget:g}." if budget is not None else "."))


@styled
def cross_site_heatmap(table: pd.DataFrame, *, title: str = "Mean Dice of each model on each site's patients",
                       own: Mapping[str, str] | None = None) -> Picture:
    """The score of each model on each site's patients, as shades with the numbers in them.

    Args:
        table: one row per model, one column per site, values between 0 and 1; NaN where nothing was measured.
        title: of the figure.
        own: model -> the one site that it was trained on; those cells are framed. By default a model belongs to a
            site if its name is the site's, or "local: " and the site's.

    Raises:
        ValueError: the table is empty.
    """
    from matplotlib.patches import Rectangle

    from fedlab.view.picture import Picture, matrix

    if table.empty:
        raise ValueError("the table of models and sites is empty: give one row per model and one column per site")
    models, sites = [str(name) for name in table.index], [str(name) for name in table.columns]
    if own is None:
        own = {model: site for model in models for site in sites if model in (site, f"local: {site}", f"local {site}")}
    values = table.to_numpy(dtype=float)
    longest, names = 0.085 * max(map(len, sites)), 0.085 * max(map(len, models)) + 0.4  # inches of text
    cell = min(1.15, (9.0 - names) / len(sites))
    figure = Picture(figsize=(names + cell * len(sites) + 0.9, 1.4 + min(0.52, max(0.36, cell)) * len(models)
                              + (longest / 2 if longest > cell else 0)), layout="constrained")
    ax = figure.subplots()
    matrix(ax, values, [arm_label(model) for model in models], sites, high=1.0, bar=[ax],
           fontsize=10 if cell > 0.55 else 7.5,
           low=min(0.5, np.floor(np.nanmin(values) * 10) / 10) if np.isfinite(values).any() else 0.0,
           text=lambda row, column, value: f"{value:.2f}" if np.isfinite(value) else "–")
    ax.hlines(np.arange(1, len(models)) - 0.5, -0.5, len(sites) - 0.5, color="white", linewidth=1.5)
    ax.vlines(np.arange(1, len(sites)) - 0.5, -0.5, len(models) - 0.5, color="white", linewidth=1.5)
    for model, site in own.items():
        if model in models and site in sites:
            ax.add_patch(Rectangle((sites.index(site) - 0.47, models.index(model) - 0.47), 0.94, 0.94, fill=False,
                                   edgecolor=ORANGE, linewidth=2.2))
    ax.tick_params(top=False, labeltop=True, labelbottom=False)
    if longest > cell:
        ax.set_xticks(range(len(sites)), sites, rotation=35, ha="left")
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    if own:
        figure.supxlabel("framed: the model was trained on this site alone", fontsize=9, color=GREY)
    figure.alt = " ".join([f"{title}: {len(models)} models by {len(sites)} sites.", *(
        f"{arm_label(model)} from {np.nanmin(row):.2f} to {np.nanmax(row):.2f}."
        for model, row in zip(models, values, strict=True) if np.isfinite(row).any())])
    return figure


#: Patients below which a mean is drawn without its interval.
_FEWEST = 6


@styled
def dice_by_arm(scores: pd.DataFrame, *, metric: str = "dice") -> Picture:
    """The arms side by side for each region: a bar for the mean over patients with its interval, a dot per patient.

    The interval is that of the mean of one arm, at 95 % by Student's t, from six patients on. Whether two arms differ
    is said by the paired difference (`fedlab.difference`), not by bars that overlap.

    Args:
        scores: one row per patient, region and arm, with the columns `arm`, `region`, `patient` and `metric`. NaN,
            such as the Dice of a region that is empty in reference and prediction, is left out. Where an arm has
            several models for a patient, such as the local ones of the other sites, the dot is their mean.
        metric: the column shown, "dice" or "hd95_mm".

    Raises:
        ValueError: a column is missing, or it holds no number.
    """
    from matplotlib.colors import to_rgb

    from fedlab.view.picture import Picture

    missing = [column for column in ("arm", "region", "patient", metric) if column not in scores]
    if missing:
        raise ValueError(f"the scores lack the columns {missing}; they have {list(scores.columns)}")
    each = ["arm", "region", *(["site"] if "site" in scores else []), "patient"]
    known = scores.dropna(subset=[metric]).groupby(each, sort=False)[metric].mean().reset_index()
    if known.empty:
        raise ValueError(f"no row of the scores has a number as {metric}")
    arms, measured = list(known["arm"].unique()), list(known["region"].unique())
    regions = sorted(measured, key=[*REGION_NAMES, *measured].index)
    values = {(str(arm), str(region)): group[metric].to_numpy(dtype=float)
              for (arm, region), group in known.groupby(["arm", "region"], sort=False)}
    colours, kinds = arm_colours(arms), [arm_of(arm) for arm in arms]
    # The second, third, ... arm of one kind has its colour mixed with white.
    shares = {arm: 0.75 ** (2 * kinds[:number].count(kinds[number])) for number, arm in enumerate(arms)}
    tints = {arm: tuple(1 - shares[arm] * (1 - part) for part in to_rgb(colours[arm])) for arm in arms}
    patients, title = known["patient"].nunique(), _METRIC_TITLES.get(metric, metric)
    figure = Picture(figsize=(10, 4.2), layout="constrained")
    ax = figure.subplots()
    width = 0.84 / max(sum((arm, region) in values for arm in arms) for region in regions)
    for column, region in enumerate(regions):
        present = [arm for arm in arms if (arm, region) in values]
        for number, arm in enumerate(present):
            _bar(ax, column + (number + 0.5 - len(present) / 2) * width, width, values[arm, region], tints[arm])
    for arm in arms:
        ax.bar(0, 0, color=tints[arm], label=arm_label(arm))
    ax.set_title(title)
    ax.grid(axis="y")
    if metric == "dice":
        ax.set(ylim=(-0.02, 1.09), yticks=np.linspace(0, 1, 6))
    labels = [f"{REGION_NAMES[region]} ({region})" if region in REGION_NAMES else region for region in regions]
    ax.set_xticks(range(len(regions)), labels, fontsize=10)
    ax.tick_params(axis="x", length=0, pad=20)
    figure.legend(loc="outside lower center", ncols=-(-len(arms) // -(-len(arms) // 5)))
    ax.set_title(f"bars: mean over {counted(patients, 'patient')}"
                 f"{', lines: its 95 % interval' * (patients >= _FEWEST)}, dots: single patients", loc="right",
                 fontsize=9, fontweight="normal", color=GREY)
    figure.alt = f"{title} by arm and region, means over {counted(patients, 'patient')}: " + "; ".join(
        f"{arm_label(arm)} " + ", ".join(f"{region} {values[arm, region].mean():.2f}" for region in regions
                                        if (arm, region) in values) for arm in arms) + "."
    return figure


def _bar(ax: Axes, x: float, width: float, values: npt.NDArray[Any], colour: Any) -> None:
    """A bar for the mean with its interval and its number below, and a dot per patient in the order of the values."""
    from scipy.special import stdtrit

    mean = float(values.mean())
    ax.bar(x, mean, width * 0.9, color=colour)
    spread = ((np.arange(len(values)) * 0.618034) % 1 - 0.5) * width * 0.62
    ax.scatter(x + spread, np.sort(values), s=14, color="white", edgecolor=INK, linewidth=0.6, alpha=0.8, zorder=3)
    if len(values) >= _FEWEST:
        half = float(stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values)))
        ax.errorbar(x, mean, yerr=half, color=INK, linewidth=1.6, capsize=min(5.0, 30 * width), zorder=4)
    ax.annotate(f"{mean:.{2 if mean < 10 else 1}f}", (x, 0), (0, -4), textcoords="offset points", ha="center", va="top",
                fontsize=min(10.0, 70 * width), fontweight="bold")


@styled
def contributions_figure(found: Contributions, *, metric: str = "Dice") -> Picture:
    """Shapley values as bars with their standard errors, leave-one-out as marks; one row per site, the largest on top.

    Args:
        found: by `fedlab.evidence.contributions.site_contributions`.
        metric: that its utility measures.

    Raises:
        ValueError: there is no site.
    """
    from fedlab.view.picture import Picture

    if found.table.empty:
        raise ValueError("there is no site to draw")
    table = found.table.sort_values("shapley")
    figure = Picture(figsize=(8, 1.5 + 0.36 * len(table)), layout="constrained")
    ax = figure.subplots()
    rows, errors = range(len(table)), table["standard error"].to_numpy()
    ax.barh(rows, table["shapley"], color=ARMS["federated"], height=0.6, label="Shapley value",
            xerr=errors if errors.any() else None, error_kw={"ecolor": INK, "capsize": 3})
    ax.plot(table["leave one out"], rows, "D", color=ARMS["local"], markersize=6, label="leave one out")
    ax.axvline(0, color="#888888", linewidth=0.8)
    ax.set_yticks(rows, [str(name) for name in table.index])
    ax.set_xlabel(f"{metric} that a site's updates add")
    ax.set_title(f"From {found.start:.3f} to {found.end:.3f}: contributions of the sites")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    total = found.end - found.start
    figure.alt = " ".join([f"Shapley values of {len(table)} sites, which add up to {total:.3f} {metric}.",
                           *(f"{name} {value:.3f}." for name, value in table["shapley"][::-1].items())])
    return figure
