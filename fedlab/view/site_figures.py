"""Figures of sites drawn from what the sites told, never from their images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fedlab.data.sites.heterogeneity import Heterogeneity, heterogeneity
from fedlab.data.sites.partition import Partition
from fedlab.data.sites.statistics import Distribution, SiteStatistics
from fedlab.view.style import Picture, styled

__all__ = ["heterogeneity_figure", "intensity_figure", "partition_figure"]

_SHADES = LinearSegmentedColormap.from_list("fedlab", ["#F6F8FB", "#C9DDEE", "#6FA8D2", "#0072B2", "#003A66"])
_REGION_COLOURS = {"WT": "#56B4E9", "TC": "#D55E00", "ET": "#CC79A7"}
_MODALITY_COLOURS = {"FLAIR": "#0072B2", "T1": "#009E73", "T1c": "#E08A00", "T2": "#6A51A3"}


def partition_figure(partition: Partition, statistics: Sequence[SiteStatistics] = ()) -> Picture:
    """A row a site: its patients, its tumours' volumes, and how far its intensities lie from the other sites'.

    Args:
        partition: who is where.
        statistics: of its sites, in any order; without them only the patients are shown. Volumes are drawn from the
            first to the last quantile that was told, with a dot at the median; what was withheld stays blank.

    Raises:
        ValueError: statistics of a site that the partition doesn't have.
    """
    table = partition.table()
    names = [str(name) for name in table.index]
    told = {each.site: each for each in statistics}
    if unknown := told.keys() - set(names):
        raise ValueError(f"the partition has no site {', '.join(sorted(unknown))}; it has {', '.join(names)}")
    rows = np.arange(len(names))
    with styled():
        figure = Picture(figsize=(11 if told else 6, 1.7 + 0.38 * len(names)), layout="constrained")
        axes = figure.subplots(1, 3 if told else 1, sharey=True, squeeze=False)[0]
        train, held = table["train"].to_numpy(dtype=float), table["held out"].to_numpy(dtype=float)
        axes[0].barh(rows, train, height=0.62, color="#4C5C6B", label="to train on")
        axes[0].barh(rows, held, height=0.62, left=train, color="#B8C4CF", label="held out")
        for row, (one, two) in enumerate(zip(train, held, strict=True)):
            axes[0].annotate(f"{one:g} + {two:g}", (one + two, row), (4, 0), textcoords="offset points", va="center",
                             fontsize=9)
        axes[0].set_xlim(0, float((train + held).max()) * 1.25 + 0.5)
        axes[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes[0].set_title("Patients")
        if told:
            _volumes(axes[1], [told.get(name) for name in names])
            _shift_lines(axes[2], names, told)
        for ax in axes:
            _striped(ax, rows)
        axes[0].set_yticks(rows, names)
        axes[0].set_ylim(len(names) - 0.4, -0.6)
        figure.legend(loc="outside lower center", ncols=5, columnspacing=1.4)
    figure.alt = f"Patients of each site, to train on and held out, in partition {partition.id}: " + "; ".join(
        f"{name} {one:g} and {two:g}" for name, one, two in zip(names, train, held, strict=True)) + "."
    return figure


def heterogeneity_figure(report: Heterogeneity, *, measure: str = "jensen_shannon") -> Picture:
    """A matrix a quantity: how far each two sites are apart. Grey: withheld.

    Args:
        report: from `fedlab.data.sites.heterogeneity.heterogeneity`.
        measure: "jensen_shannon", from 0 to 1, or "wasserstein", in the images' unit and ml.

    Raises:
        ValueError: another measure.
    """
    if measure not in ("jensen_shannon", "wasserstein"):
        raise ValueError(f"measure is 'jensen_shannon' or 'wasserstein', got {measure!r}")
    matrices = report.jensen_shannon if measure == "jensen_shannon" else report.wasserstein
    columns = min(4, len(matrices))
    lines = -(-len(matrices) // columns)
    with styled():
        figure = Picture(figsize=(2.9 * columns, 3.0 * lines + 0.3), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        shades = _SHADES.with_extremes(bad="#DDDDDD")
        for ax, (name, matrix) in zip(axes, matrices.items(), strict=False):
            top = 1.0 if measure == "jensen_shannon" else max(float(np.nanmax(np.append(matrix.ravel(), 0.0))), 1e-9)
            image = ax.imshow(np.ma.masked_invalid(matrix), cmap=shades, vmin=0, vmax=top)
            _numbered(ax, matrix, top)
            ax.set_title(name)
            ax.set_xticks(range(len(report.sites)), report.sites, rotation=90)
            ax.set_yticks(range(len(report.sites)), report.sites)
            ax.tick_params(length=0, labelsize=7)
            figure.colorbar(image, ax=ax, shrink=0.7)
        for ax in axes[len(matrices):]:
            ax.set_visible(False)
        title = ("Jensen–Shannon distance between sites (0 the same, 1 no overlap)" if measure == "jensen_shannon"
                 else "Earth mover's distance between sites (intensity units; ml)")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.alt = f"{title}. " + " ".join(
        f"{name}: {_mean(matrix):.2f} on average." for name, matrix in matrices.items())
    return figure


def intensity_figure(statistics: Sequence[SiteStatistics]) -> Picture:
    """The sites' intensity histograms, a panel a modality, a line a site.

    Raises:
        ValueError: no site told its intensities.
    """
    modalities = list(dict.fromkeys(name for told in statistics for name in told.intensity))
    if not modalities:
        raise ValueError("none of the sites told its intensities")
    with styled():
        figure = Picture(figsize=(3.0 * len(modalities), 3.0), layout="constrained")
        axes = figure.subplots(1, len(modalities), squeeze=False)[0]
        for ax, name in zip(axes, modalities, strict=True):
            for told in statistics:
                if (spread := told.intensity.get(name)) is not None:
                    ax.stairs(spread.shares() / np.diff(spread.edges), spread.edges, linewidth=1.3, label=told.site)
            ax.set_title(name)
            ax.set_xlim(*_bulk([told.intensity[name] for told in statistics if name in told.intensity]))
            ax.set_yticks([])
            ax.spines["left"].set_visible(False)
            ax.set_xlabel("intensity")
        lines, labels = axes[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=7, fontsize=8)
    figure.alt = f"Histograms of {', '.join(modalities)} over the brain at {len(statistics)} sites."
    return figure


def _volumes(ax: Axes, statistics: Sequence[SiteStatistics | None]) -> None:
    for offset, (region, colour) in zip((-0.22, 0.0, 0.22), _REGION_COLOURS.items(), strict=True):
        for row, told in enumerate(statistics):
            spread = None if told is None else told.volumes_ml.get(region)
            if spread is not None and spread.quantiles:
                values = [value for _, value in spread.quantiles]
                ax.plot([values[0], values[-1]], [row + offset] * 2, color=colour, linewidth=2.5)
                if (median := dict(spread.quantiles).get(0.5)) is not None:
                    ax.plot(median, row + offset, "o", color=colour, markersize=5)
        ax.plot([], [], "o-", color=colour, label=region)
    ax.set_xlim(left=0)
    ax.set_title("Volumes [ml]")


def _shift_lines(ax: Axes, names: Sequence[str], told: dict[str, SiteStatistics]) -> None:
    known = [told[name] for name in names if name in told]
    ax.set_title("Intensity shift from the other sites")
    if len(known) < 2:
        return
    report = heterogeneity(known)
    places = [names.index(each.site) for each in known]
    modalities = [name for name in _MODALITY_COLOURS if name in report.shift]
    for offset, name in zip(np.linspace(-0.24, 0.24, len(modalities)), modalities, strict=True):
        ax.plot(report.shift[name], np.asarray(places) + offset, "o", color=_MODALITY_COLOURS[name], markersize=5,
                label=name)
    ax.set_xlim(left=0)
    ax.set_xlabel("earth mover's distance")


def _striped(ax: Axes, rows: NDArray[np.int64]) -> None:
    for row in rows[::2]:
        ax.axhspan(row - 0.5, row + 0.5, color="#F6F7F8", zorder=0)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")


def _numbered(ax: Axes, matrix: NDArray[np.float64], top: float) -> None:
    if len(matrix) > 8:
        return
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value) and row != column:
            ax.text(column, row, f"{value:.2f}" if value < 10 else f"{value:.0f}", ha="center", va="center",
                    fontsize=7, color="white" if value > 0.55 * top else "#222222")


def _bulk(spreads: Sequence[Distribution]) -> tuple[float, float]:
    """From the 0.2nd to the 99.8th percentile of whichever site goes furthest."""
    return min(each.quantile(0.002) for each in spreads), max(each.quantile(0.998) for each in spreads)


def _mean(matrix: NDArray[np.float64]) -> float:
    apart = matrix[np.triu_indices(len(matrix), 1)]
    return float(np.nanmean(apart)) if np.isfinite(apart).any() else float("nan")
