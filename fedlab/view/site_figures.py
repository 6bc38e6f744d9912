"""Figures of sites: patients and tumour volumes, and the statistics that sites release in place of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedlab.core.types import Patient, Site
from fedlab.data.sites.heterogeneity import Heterogeneity, heterogeneity
from fedlab.data.sites.partition import Partition
from fedlab.data.sites.statistics import Distribution, SiteStatistics
from fedlab.view.colours import INK, LABEL_COLOURS, MODALITY_COLOURS, REGION_COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fedlab.view.picture import Picture

__all__ = ["heterogeneity_figure", "intensity_figure", "partition_figure", "sites_figure"]


def sites_figure(sites: Sequence[Site]) -> Picture:
    """The number of patients of each site, and the volumes of the parts of their tumours in ml.

    Reads every patient of every site once.

    Raises:
        ValueError: there is no site.
    """
    from fedlab.view.picture import Picture, styled

    if not sites:
        raise ValueError("there is no site to show")
    counts = {site.name: (len(site.train), len(site.val)) for site in sites}
    with styled():
        figure = Picture(figsize=(10, 1.7 + 0.38 * len(sites)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
        _patients(left, counts)
        for offset, (label, name) in zip((-0.22, 0.0, 0.22), {2: "oedema", 1: "core", 4: "enhancing"}.items(),
                                         strict=True):
            points = [(volume, row + offset) for row, site in enumerate(sites) for patients in (site.train, site.val)
                      for patient in patients if (volume := _millilitres(patient, label)) > 0]
            x, y = zip(*points, strict=True) if points else ((), ())
            right.scatter(x, y, s=20, color=LABEL_COLOURS[label], edgecolor="#444444", linewidth=0.4, alpha=0.85,
                          label=name)
        right.set_xscale("log")
        right.xaxis.set_major_formatter("{x:g}")
        right.set_title("Volumes of the parts of the tumours [ml], one dot per patient")
        _finish(figure, list(counts))
    figure.alt = _spoken("Patients of each site", counts) + " Volumes of tumour parts."
    return figure


def partition_figure(partition: Partition, statistics: Sequence[SiteStatistics] = ()) -> Picture:
    """One row per site: patients, tumour volumes, and the distance of its intensities from those of the other sites.

    Args:
        partition: of the patients among the sites.
        statistics: of its sites, in any order; without them only the patients are shown. Volumes are drawn from the
            first to the last released quantile, with a dot at the median; what was withheld stays blank.

    Raises:
        ValueError: statistics of a site that is not in the partition.
    """
    from fedlab.view.picture import Picture, styled

    table = partition.table()
    names = [str(name) for name in table.index]
    released = {each.site: each for each in statistics}
    if unknown := released.keys() - set(names):
        raise ValueError(f"the partition has no site {', '.join(sorted(unknown))}; it has {', '.join(names)}")
    counts = {name: (int(train), int(held_out)) for name, train, held_out
              in zip(names, table["train"], table["held out"], strict=True)}
    with styled():
        figure = Picture(figsize=(11 if released else 6, 1.7 + 0.38 * len(names)), layout="constrained")
        axes = figure.subplots(1, 3 if released else 1, sharey=True, squeeze=False)[0]
        _patients(axes[0], counts)
        if released:
            _volumes(axes[1], [released.get(name) for name in names])
            _shifts(axes[2], names, released)
        _finish(figure, names)
    figure.alt = _spoken(f"Patients of each site in partition {partition.id}", counts)
    return figure


def _patients(ax: Axes, counts: Mapping[str, tuple[int, int]]) -> None:
    """A bar per site for the patients to train on, continued by the held-out ones."""
    from fedlab.view.picture import whole_ticks

    rows, (train, held_out) = np.arange(len(counts)), zip(*counts.values(), strict=True)
    ax.barh(rows, train, height=0.62, color="#4C5C6B", label="to train on")
    ax.barh(rows, held_out, height=0.62, left=train, color="#B8C4CF", label="held out")
    for row, both in enumerate(counts.values()):
        ax.annotate(" + ".join(map(str, both)), (sum(both), row), (4, 0), textcoords="offset points", va="center",
                    fontsize=9)
    ax.set_xlim(0, max(map(sum, counts.values())) * 1.25 + 0.5)
    whole_ticks(ax, 6)
    ax.set_title("Patients")


def _finish(figure: Picture, names: Sequence[str]) -> None:
    """Stripes, names of the sites and legend of a figure with one row per site."""
    for ax in figure.axes:
        for row in range(0, len(names), 2):
            ax.axhspan(row - 0.5, row + 0.5, color="#F6F7F8", zorder=0)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(axis="x")
    figure.axes[0].set_yticks(range(len(names)), names)
    figure.axes[0].set_ylim(len(names) - 0.4, -0.6)
    figure.legend(loc="outside lower center", ncols=5, columnspacing=1.4)


def _spoken(title: str, counts: Mapping[str, tuple[int, int]]) -> str:
    return f"{title}, to train on and held out: " + "; ".join(
        f"{name} {train} and {held_out}" for name, (train, held_out) in counts.items()) + "."


def _millilitres(patient: Patient, label: int) -> float:
    if patient.label is None:
        return 0.0
    return int((patient.label == label).sum()) * float(np.prod(patient.spacing_mm)) / 1000


def _volumes(ax: Axes, statistics: Sequence[SiteStatistics | None]) -> None:
    for offset, (region, colour) in zip((-0.22, 0.0, 0.22), REGION_COLOURS.items(), strict=True):
        for row, each in enumerate(statistics):
            spread = None if each is None else each.volumes_ml.get(region)
            if spread is not None and spread.quantiles:
                values = [value for _, value in spread.quantiles]
                ax.plot([values[0], values[-1]], [row + offset] * 2, color=colour, linewidth=2.5)
                if (median := dict(spread.quantiles).get(0.5)) is not None:
                    ax.plot(median, row + offset, "o", color=colour, markersize=5)
        ax.plot([], [], "o-", color=colour, label=region)
    ax.set_xlim(left=0)
    ax.set_title("Volumes [ml]")


def _shifts(ax: Axes, names: Sequence[str], released: Mapping[str, SiteStatistics]) -> None:
    known = [released[name] for name in names if name in released]
    ax.set_title("Intensity shift from the other sites")
    if len(known) < 2:
        return
    report = heterogeneity(known)
    rows = np.asarray([names.index(each.site) for each in known])
    modalities = [name for name in MODALITY_COLOURS if name in report.shift]
    for offset, name in zip(np.linspace(-0.24, 0.24, len(modalities)), modalities, strict=True):
        ax.plot(report.shift[name], rows + offset, "o", color=MODALITY_COLOURS[name], markersize=5, label=name)
    ax.set_xlim(left=0)
    ax.set_xlabel("earth mover's distance")


def heterogeneity_figure(report: Heterogeneity, *, measure: str = "jensen_shannon") -> Picture:
    """One matrix per quantity: the distance between each two sites. Grey: withheld.

    Args:
        report: from `fedlab.data.sites.heterogeneity.heterogeneity`.
        measure: "jensen_shannon", from 0 to 1, or "wasserstein", in the images' unit and ml.

    Raises:
        ValueError: another measure.
    """
    from fedlab.view.picture import SHADES, Picture, styled

    if measure not in ("jensen_shannon", "wasserstein"):
        raise ValueError(f"measure is 'jensen_shannon' or 'wasserstein', got {measure!r}")
    bounded = measure == "jensen_shannon"
    matrices = report.jensen_shannon if bounded else report.wasserstein
    columns = min(4, len(matrices))
    rows = -(-len(matrices) // columns)
    title = ("Jensen–Shannon distance between sites (0 the same, 1 no overlap)" if bounded
             else "Earth mover's distance between sites (intensity units; ml)")
    sentences = [f"{title}."]
    with styled():
        figure = Picture(figsize=(2.9 * columns, 3.0 * rows + 0.3), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax, (name, matrix) in zip(axes, matrices.items(), strict=False):
            top = 1.0 if bounded else max(float(np.nanmax(np.append(matrix.ravel(), 0.0))), 1e-9)
            image = ax.imshow(np.ma.masked_invalid(matrix), cmap=SHADES.with_extremes(bad="#DDDDDD"), vmin=0, vmax=top)
            _write_numbers(ax, matrix, top)
            ax.set_title(name)
            ax.set_xticks(range(len(report.sites)), report.sites, rotation=90)
            ax.set_yticks(range(len(report.sites)), report.sites)
            ax.tick_params(length=0, labelsize=7)
            figure.colorbar(image, ax=ax, shrink=0.7)
            apart = matrix[np.triu_indices(len(matrix), 1)]
            mean = float(np.nanmean(apart)) if np.isfinite(apart).any() else float("nan")
            sentences.append(f"{name}: {mean:.2f} on average.")
        for ax in axes[len(matrices):]:
            ax.set_visible(False)
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figure.alt = " ".join(sentences)
    return figure


def _write_numbers(ax: Axes, matrix: NDArray[np.float64], top: float) -> None:
    if len(matrix) > 8:
        return
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value) and row != column:
            ax.text(column, row, f"{value:.2f}" if value < 10 else f"{value:.0f}", ha="center", va="center",
                    fontsize=7, color="white" if value > 0.55 * top else INK)


def intensity_figure(statistics: Sequence[SiteStatistics]) -> Picture:
    """The intensity histograms of the sites, one panel per modality, one line per site.

    Raises:
        ValueError: no site released its intensities.
    """
    from fedlab.view.picture import Picture, styled

    modalities = list(dict.fromkeys(name for each in statistics for name in each.intensity))
    if not modalities:
        raise ValueError("none of the sites released its intensities")
    with styled():
        figure = Picture(figsize=(3.0 * len(modalities), 3.0), layout="constrained")
        axes = figure.subplots(1, len(modalities), squeeze=False)[0]
        for ax, name in zip(axes, modalities, strict=True):
            spreads: dict[str, Distribution] = {each.site: each.intensity[name] for each in statistics
                                                if name in each.intensity}
            for site, spread in spreads.items():
                ax.stairs(spread.shares() / np.diff(spread.edges), spread.edges, linewidth=1.3, label=site)
            ax.set_title(name)
            # From the 0.2nd to the 99.8th percentile of the site that goes furthest.
            ax.set_xlim(*(furthest(spread.quantile(share) for spread in spreads.values())
                          for furthest, share in ((min, 0.002), (max, 0.998))))
            ax.set_yticks([])
            ax.spines["left"].set_visible(False)
            ax.set_xlabel("intensity")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8)
    figure.alt = f"Histograms of {', '.join(modalities)} over the brain at {len(statistics)} sites."
    return figure
