"""Figures of numbers: what a run learned, how the arms compare, what each site brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from fedlab.core.types import Patient, Site
from fedlab.run.history import History
from fedlab.view.slices import COLOURS
from fedlab.view.style import Picture, arm_colours, arm_label, arm_of, styled

__all__ = ["cross_site_heatmap", "curves", "dice_by_arm", "sites_figure"]

_SHADES = LinearSegmentedColormap.from_list("fedlab", ["#F6F8FB", "#C9DDEE", "#6FA8D2", "#0072B2", "#003A66"])


def curves(histories: Mapping[str, History], *, metric: str = "Dice") -> Picture:
    """Training loss and a metric of the model, round by round, a line an arm.

    Arms of one kind, such as "local: Bern" and "local: Basel", share a colour and an entry of the legend.

    Args:
        histories: name of the arm -> what happened in its run.
        metric: which metric of the rounds is shown; rounds and arms without it have no point in that panel, and
            where no arm has it there is no such panel.

    Raises:
        ValueError: there is no finished round in any of the histories.
    """
    tables = {name: table for name, history in histories.items() if len(table := history.table())}
    if not tables:
        raise ValueError("none of the histories holds a finished round, so there is no curve to draw")
    panels = [(column, title) for column, title in (("loss", "Mean training loss"), (metric, _metric_title(metric)))
              if any(column in table for table in tables.values())]
    if not panels:
        raise ValueError(f"neither a loss nor {metric!r} is among the numbers of the rounds: "
                         f"{sorted({str(c) for table in tables.values() for c in table})}; name one as metric=")
    colours = arm_colours(tables)
    sizes = pd.Series([arm_of(name) for name in tables]).value_counts()
    with styled():
        figure = Picture(figsize=(10, 3.9), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False, gridspec_kw={"wspace": 0.06})[0]
        lines: dict[str, Any] = {}
        for ax, (column, title) in zip(axes, panels, strict=True):
            for name, table in tables.items():
                several = sizes[arm_of(name)] > 1
                label = f"{arm_of(name)} ({sizes[arm_of(name)]} models)" if several else arm_label(name)
                values = table[column].dropna() if column in table else pd.Series(dtype=float)
                line, = ax.plot(values.index + 1, values, color=colours[name], label=label,
                                linewidth=1.2 if several else 2.2, alpha=0.75 if several else 1.0,
                                marker="o" if len(values) < 16 else "", markersize=3.5, zorder=2 if several else 3)
                lines.setdefault(label, line)
            _dress(ax, title)
            if column == metric:
                ax.set_ylim(bottom=0)
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4)
    last = {name: table[metric].dropna() for name, table in tables.items() if metric in table}
    figure.alt = (f"{' and '.join(title for _, title in panels)} over the rounds. " + " ".join(
        f"{arm_label(name)} ends at {values.iloc[-1]:.2f}." for name, values in last.items() if len(values)))
    return figure


def cross_site_heatmap(table: pd.DataFrame, *, title: str = "Mean Dice of each model on each site's patients",
                       own: Mapping[str, str] | None = None) -> Picture:
    """How well each model does on each site's patients, as shades with the numbers in them.

    Args:
        table: a row a model, a column a site, values between 0 and 1; NaN where nothing was measured.
        title: what the numbers are.
        own: model -> the one site that it was trained on; those cells are framed. By default a model is a site's
            own when it is called like the site, or "local: " and the site's name.

    Raises:
        ValueError: the table is empty.
    """
    if table.empty:
        raise ValueError("the table of models and sites is empty: give a row for each model and a column for each site")
    models, sites = [str(name) for name in table.index], [str(name) for name in table.columns]
    if own is None:
        own = {model: site for model in models for site in sites if model in (site, f"local: {site}", f"local {site}")}
    values = table.to_numpy(dtype=float)
    with styled():
        names = max(len(model) for model in models) * 0.085 + 0.4
        cell = min(1.15, (9.0 - names) / len(sites))
        tall = min(0.52, max(0.36, cell))
        tilt = max(len(site) for site in sites) * 0.085 > cell
        head = 0.68 + (max(len(site) for site in sites) * 0.04 if tilt else 0.0)
        width, height = names + cell * len(sites) + 0.85, head + tall * len(models) + (0.5 if own else 0.15)
        figure = Picture(figsize=(width, height))
        ax = figure.add_axes((names / width, (0.5 if own else 0.15) / height, cell * len(sites) / width,
                              tall * len(models) / height))
        low = min(0.5, np.floor(np.nanmin(values) * 10) / 10) if np.isfinite(values).any() else 0.0
        image = ax.imshow(np.ma.masked_invalid(values), cmap=_SHADES, vmin=low, vmax=1.0, aspect="auto")
        _cells(ax, values, low, size=10 if cell > 0.55 else 7.5)
        for row, model in enumerate(models):
            if model in own and own[model] in sites:
                ax.add_patch(Rectangle((sites.index(own[model]) - 0.47, row - 0.47), 0.94, 0.94, fill=False,
                                       edgecolor="#E08A00", linewidth=2.2))
        ax.set_yticks(range(len(models)), [arm_label(model) for model in models])
        ax.set_xticks(range(len(sites)), sites, rotation=35 if tilt else 0, ha="left" if tilt else "center")
        ax.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
        ax.spines[:].set_visible(False)
        figure.text(0.12 / width, 1 - 0.12 / height, title, fontweight="bold", fontsize=11, va="top")
        bar = figure.add_axes(((width - 0.7) / width, ax.get_position().y0, 0.13 / width, ax.get_position().height))
        figure.colorbar(image, cax=bar).outline.set_visible(False)
        if own:
            figure.text(names / width, 0.18 / height, "framed: the model was trained on this site alone",
                        fontsize=9, color="#666666")
    figure.alt = f"{title}: {len(models)} models by {len(sites)} sites. " + " ".join(
        f"{arm_label(model)} from {np.nanmin(row):.2f} to {np.nanmax(row):.2f}."
        for model, row in zip(models, values, strict=True) if np.isfinite(row).any())
    return figure


def dice_by_arm(scores: pd.DataFrame, *, metric: str = "dice") -> Picture:
    """The arms side by side for each region: a bar for the mean over patients, a dot for each patient.

    Args:
        scores: a row a patient, region and arm, with the columns `arm`, `region`, `patient` and `metric`. Values
            that are NaN (such as the Dice of a region that is empty in truth and prediction) are left out. Where
            an arm has several models for a patient, as the local ones of the other sites, the patient's dot is
            their mean.
        metric: which column is shown, "dice" or "hd95_mm".

    Raises:
        ValueError: a column is missing, or no value is a number.
    """
    missing = [column for column in ("arm", "region", "patient", metric) if column not in scores]
    if missing:
        raise ValueError(f"the scores lack the columns {missing}; they have {list(scores.columns)}")
    each = ["arm", "region", *(["site"] if "site" in scores else []), "patient"]
    known = scores.dropna(subset=[metric]).groupby(each, sort=False)[metric].mean().reset_index()
    if known.empty:
        raise ValueError(f"no row of the scores has a number as {metric}")
    arms = list(dict.fromkeys(known["arm"]))
    regions = [region for region in ("WT", "TC", "ET") if region in set(known["region"])]
    regions += [region for region in dict.fromkeys(known["region"]) if region not in regions]
    colours = arm_colours(arms)
    values = {(str(arm), str(region)): group[metric].to_numpy(dtype=float)
              for (arm, region), group in known.groupby(["arm", "region"], sort=False)}
    with styled():
        figure = Picture(figsize=(10, 4.2), layout="constrained")
        ax = figure.subplots()
        kinds = [arm_of(arm) for arm in arms]
        tints = {arm: _tint(colours[arm], kinds[:number].count(kinds[number])) for number, arm in enumerate(arms)}
        width = 0.84 / max(sum((arm, region) in values for arm in arms) for region in regions)
        for column, region in enumerate(regions):
            present = [arm for arm in arms if (arm, region) in values]
            for number, arm in enumerate(present):
                _bar(ax, column + (number + 0.5 - len(present) / 2) * width, width, values[arm, region], tints[arm])
        for arm in arms:
            ax.bar(0, 0, color=tints[arm], label=arm_label(arm))
        _dress(ax, _metric_title(metric), rounds=False)
        if metric == "dice":
            ax.set_ylim(0, 1.09)
            ax.set_yticks(np.linspace(0, 1, 6))
        ax.set_xticks(range(len(regions)), [_REGION_NAMES.get(region, region) for region in regions], fontsize=10)
        ax.tick_params(axis="x", length=0, pad=20)
        figure.legend(loc="outside lower center", ncols=min(5, len(arms)))
        patients = known["patient"].nunique()
        ax.set_title(f"bars: mean over {patients} patients, dots: single patients", loc="right", fontsize=9,
                     fontweight="normal", color="#666666")
    figure.alt = f"{_metric_title(metric)} by arm and region, means over {patients} patients: " + "; ".join(
        f"{arm_label(arm)} " + ", ".join(f"{region} {values[arm, region].mean():.2f}" for region in regions
                                        if (arm, region) in values) for arm in arms) + "."
    return figure


def sites_figure(sites: Sequence[Site]) -> Picture:
    """What each site brings: its number of patients, and the volumes of their tumours' parts in ml.

    Reads every patient of every site once.

    Raises:
        ValueError: there is no site.
    """
    if not sites:
        raise ValueError("there is no site to show")
    with styled():
        figure = Picture(figsize=(10, 1.7 + 0.38 * len(sites)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
        rows = np.arange(len(sites))
        train, held = [len(site.train) for site in sites], [len(site.val) for site in sites]
        left.barh(rows, train, height=0.62, color="#4C5C6B", label="to train on")
        left.barh(rows, held, height=0.62, left=train, color="#B8C4CF", label="held out")
        for row, both in enumerate(zip(train, held, strict=True)):
            left.annotate(" + ".join(map(str, both)), (sum(both), row), (4, 0), textcoords="offset points",
                          va="center", fontsize=9)
        left.set_yticks(rows, [site.name for site in sites])
        left.set_ylim(len(sites) - 0.4, -0.6)
        left.set_xlim(0, max(map(sum, zip(train, held, strict=True))) * 1.2 + 0.5)
        left.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        left.set_title("Patients")
        _volumes(right, sites)
        for ax in (left, right):
            for row in rows[::2]:
                ax.axhspan(row - 0.5, row + 0.5, color="#F6F7F8", zorder=0)
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
            ax.grid(axis="x")
        figure.legend(loc="outside lower center", ncols=5, columnspacing=1.4)
    figure.alt = "Patients of each site, to train on and held out: " + "; ".join(
        f"{site.name} {len(site.train)} and {len(site.val)}" for site in sites) + ". Volumes of tumour parts."
    return figure


_REGION_NAMES = {"WT": "whole tumour (WT)", "TC": "tumour core (TC)", "ET": "enhancing tumour (ET)"}


def _metric_title(metric: str) -> str:
    return {"dice": "Dice", "Dice": "Dice of held-out patients", "hd95_mm": "95 % Hausdorff distance [mm]"}.get(
        metric, metric)


def _dress(ax: Axes, title: str, *, rounds: bool = True) -> None:
    ax.set_title(title)
    ax.grid(axis="y")
    if rounds:
        ax.set_xlabel("rounds finished")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.margins(x=0.02)


def _cells(ax: Axes, values: npt.NDArray[Any], low: float, *, size: float) -> None:
    for axis, count in ((ax.axhline, values.shape[0]), (ax.axvline, values.shape[1])):
        for edge in range(1, count):
            axis(edge - 0.5, color="white", linewidth=1.5)
    for (row, column), value in np.ndenumerate(values):
        dark = np.isfinite(value) and (value - low) / (1 - low) > 0.55
        ax.text(column, row, f"{value:.2f}" if np.isfinite(value) else "–", ha="center", va="center", fontsize=size,
                color="white" if dark else "#222222")


def _tint(colour: str, lighter: int) -> str:
    """The colour itself, or mixed with white for the second, third ... arm of one kind."""
    share = 0.75 ** (2 * lighter)
    return "#" + "".join(f"{round(255 - share * (255 - int(colour[i:i + 2], 16))):02X}" for i in (1, 3, 5))


def _bar(ax: Axes, x: float, width: float, values: npt.NDArray[Any], colour: str) -> None:
    """A bar for the mean with its number under it, and the patients' dots in the order of their values."""
    mean = float(values.mean())
    ax.bar(x, mean, width * 0.9, color=colour)
    spread = ((np.arange(len(values)) * 0.618034) % 1 - 0.5) * width * 0.62
    ax.scatter(x + spread, np.sort(values), s=14, color="white", edgecolor="#222222", linewidth=0.6, alpha=0.8,
               zorder=3)
    ax.annotate(f"{mean:.{2 if mean < 10 else 1}f}", (x, 0), (0, -4), textcoords="offset points", ha="center", va="top",
                fontsize=min(10.0, 70 * width), fontweight="bold")


def _volumes(ax: Axes, sites: Sequence[Site]) -> None:
    """A dot for each patient and label, labels under each other within a site's row, on a logarithmic scale."""
    names = {2: "oedema", 1: "core", 4: "enhancing"}
    for offset, (label, name) in zip((-0.22, 0.0, 0.22), names.items(), strict=True):
        points = [(volume, row + offset) for row, site in enumerate(sites) for patients in (site.train, site.val)
                  for patient in patients if (volume := _millilitres(patient, label)) > 0]
        x, y = zip(*points, strict=True) if points else ((), ())
        ax.scatter(x, y, s=20, color=COLOURS[label], edgecolor="#444444", linewidth=0.4, alpha=0.85, label=name)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set_title("Volume of the tumour's parts [ml], a dot a patient")


def _millilitres(patient: Patient, label: int) -> float:
    if patient.label is None:
        return 0.0
    return int((patient.label == label).sum()) * float(np.prod(patient.spacing_mm)) / 1000
