"""Figures of sites: patients, tumour volumes, statistics released in place of images, and messages of a workflow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fedlab.core.protocols import Topology
from fedlab.core.settings import check_choice
from fedlab.core.types import Site
from fedlab.data.sites.heterogeneity import Heterogeneity, heterogeneity
from fedlab.data.sites.partition import Partition
from fedlab.data.sites.statistics import SiteStatistics
from fedlab.topologies.tree import Tree
from fedlab.view.colours import BLUE, INK, LABEL_COLOURS, MODALITY_COLOURS, REGION_COLOURS, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fedlab.view.picture import Picture

__all__ = ["heterogeneity_figure", "intensity_figure", "partition_figure", "sites_figure", "workflow_figure"]

Place: TypeAlias = tuple[float, float]

_LAKE = "#C44E00"
_OFFSETS = (-0.22, 0.0, 0.22)  # of three quantities in the row of a site


@styled
def sites_figure(sites: Sequence[Site]) -> Picture:
    """The number of patients of each site, and the volumes of the parts of their tumours in ml.

    Reads every patient of every site once.

    Raises:
        ValueError: there is no site.
    """
    from fedlab.view.picture import Picture, log_ticks

    if not sites:
        raise ValueError("there is no site to show")
    counts = {site.name: (len(site.train), len(site.val)) for site in sites}
    figure = Picture(figsize=(10, 1.7 + 0.38 * len(sites)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
    _patients(left, counts)
    volumes = [(row, np.bincount(patient.label.flatten(), minlength=5) * np.prod(patient.spacing_mm) / 1000)
               for row, site in enumerate(sites) for patients in (site.train, site.val)
               for patient in patients if patient.label is not None]
    for offset, (label, name) in zip(_OFFSETS, {2: "oedema", 1: "core", 4: "enhancing"}.items(), strict=True):
        points = [(of_labels[label], row + offset) for row, of_labels in volumes if of_labels[label]]
        right.scatter(*np.reshape(points, (-1, 2)).T, s=20, color=LABEL_COLOURS[label], edgecolor="#444444",
                      linewidth=0.4, alpha=0.85, label=name)
    log_ticks(right)
    right.set_title("Volumes of the parts of the tumours [ml], one dot per patient")
    _finish(figure, counts, "Patients of each site")
    figure.alt += " Volumes of tumour parts."
    return figure


@styled
def partition_figure(partition: Partition, statistics: Sequence[SiteStatistics] = ()) -> Picture:
    """One row per site: patients, tumour volumes, and the distance of its intensities from those of the other sites.

    Args:
        partition: of the patients among the sites.
        statistics: of its sites, in any order; without them only the patients are shown. Volumes are drawn from the
            first to the last released quantile, with a dot at the median; what was withheld stays blank.

    Raises:
        ValueError: statistics of a site that is not in the partition.
    """
    from fedlab.view.picture import Picture

    table = partition.table()
    names = [str(name) for name in table.index]
    released = {each.site: each for each in statistics}
    if unknown := released.keys() - set(names):
        raise ValueError(f"the partition has no site {', '.join(sorted(unknown))}; it has {', '.join(names)}")
    counts = {name: (int(train), int(held_out)) for name, train, held_out
              in zip(names, table["train"], table["held out"], strict=True)}
    figure = Picture(figsize=(11 if released else 6, 1.7 + 0.38 * len(names)), layout="constrained")
    axes = figure.subplots(1, 3 if released else 1, sharey=True, squeeze=False)[0]
    _patients(axes[0], counts)
    if released:
        _volumes(axes[1], [released.get(name) for name in names])
        _shifts(axes[2], names, released)
    _finish(figure, counts, f"Patients of each site in partition {partition.id}")
    return figure


def _patients(ax: Axes, counts: Mapping[str, tuple[int, int]]) -> None:
    """A bar per site for the patients to train on, continued by the held-out ones."""
    from fedlab.view.picture import whole_ticks

    rows, (train, held_out) = range(len(counts)), zip(*counts.values(), strict=True)
    ax.barh(rows, train, height=0.62, color="#4C5C6B", label="to train on")
    ends = ax.barh(rows, held_out, height=0.62, left=train, color="#B8C4CF", label="held out")
    ax.bar_label(ends, [" + ".join(map(str, both)) for both in counts.values()], padding=4, fontsize=9)
    ax.set_xlim(0, max(map(sum, counts.values())) * 1.25 + 0.5)
    whole_ticks(ax, 6)
    ax.set_title("Patients")


def _finish(figure: Picture, counts: Mapping[str, tuple[int, int]], title: str) -> None:
    """Stripes, names of the sites, legend and description of a figure with one row per site."""
    for ax in figure.axes:
        for row in range(0, len(counts), 2):
            ax.axhspan(row - 0.5, row + 0.5, color="#F6F7F8", zorder=0)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(axis="x")
    figure.axes[0].set_yticks(range(len(counts)), list(counts))
    figure.axes[0].set_ylim(len(counts) - 0.4, -0.6)
    figure.legend(loc="outside lower center", ncols=5, columnspacing=1.4)
    figure.alt = f"{title}, to train on and held out: " + "; ".join(
        f"{name} {train} and {held_out}" for name, (train, held_out) in counts.items()) + "."


def _volumes(ax: Axes, statistics: Sequence[SiteStatistics | None]) -> None:
    for offset, (region, colour) in zip(_OFFSETS, REGION_COLOURS.items(), strict=True):
        for row, each in enumerate(statistics):
            spread = None if each is None else each.volumes_ml.get(region)
            if spread is not None and spread.quantiles:
                values = dict(spread.quantiles)
                ax.hlines(row + offset, min(values.values()), max(values.values()), color=colour, linewidth=2.5)
                ax.plot(values.get(0.5, np.nan), row + offset, "o", color=colour, markersize=5)
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


@styled
def heterogeneity_figure(report: Heterogeneity, *, measure: str = "jensen_shannon") -> Picture:
    """One matrix per quantity: the distance between each two sites. Grey: withheld; all of it: named in the title.

    Args:
        report: from `fedlab.data.sites.heterogeneity.heterogeneity`.
        measure: "jensen_shannon", from 0 to 1, or "wasserstein", in the images' unit and ml.

    Raises:
        ValueError: another measure.
    """
    from fedlab.view.picture import Picture, matrix

    check_choice(("jensen_shannon", "wasserstein"), measure=measure)
    bounded = measure == "jensen_shannon"
    found = report.jensen_shannon if bounded else report.wasserstein
    pairs = {name: values[np.triu_indices(len(values), 1)] for name, values in found.items()}
    matrices = {name: values for name, values in found.items() if np.isfinite(pairs[name]).any()}
    columns = min(4, max(1, len(matrices)))
    rows = max(1, -(-len(matrices) // columns))
    title = ("Jensen–Shannon distance between sites (0 the same, 1 no overlap)" if bounded
             else "Earth mover's distance between sites (intensity units; ml)")
    if withheld := [name for name in found if name not in matrices]:
        title += f"\nwithheld by the sites: {', '.join(withheld)}"
    figure = Picture(figsize=(max(6.5, 2.7 * columns + 0.6), 2.7 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    figure.alt = f"{title}."
    few = len(report.sites) <= 8  # the cells have room for numbers

    def text(row: int, column: int, value: float) -> str:
        shown = few and row != column and np.isfinite(value)
        return (f"{value:.2f}" if value < 10 else f"{value:.0f}") if shown else ""

    shown = axes[:len(matrices)]
    for ax, (name, values) in zip(shown, matrices.items(), strict=True):
        known = pairs[name][np.isfinite(pairs[name])]
        matrix(ax, values, report.sites, report.sites, low=0.0, text=text, fontsize=8,
               high=1.0 if bounded else max([*known, 1e-9]),
               bar=list(shown) if bounded and ax is shown[-1] else [] if bounded or few else [ax])
        ax.set(title=name, aspect="equal")
        ax.tick_params(labelsize=8)
        if max(map(len, report.sites)) > 3:
            ax.tick_params(axis="x", labelrotation=90)
        figure.alt += f" {name}: {known.mean():.2f} on average."
    for ax in axes[len(matrices):]:
        ax.set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure


@styled
def intensity_figure(statistics: Sequence[SiteStatistics]) -> Picture:
    """The intensity histograms of the sites, one panel per modality, one line per site.

    Raises:
        ValueError: no site released its intensities.
    """
    from fedlab.view.picture import Picture

    modalities = list(dict.fromkeys(name for each in statistics for name in each.intensity))
    if not modalities:
        raise ValueError("none of the sites released its intensities")
    figure = Picture(figsize=(3.0 * len(modalities), 3.0), layout="constrained")
    axes = figure.subplots(1, len(modalities), squeeze=False)[0]
    for ax, name in zip(axes, modalities, strict=True):
        spreads = {each.site: each.intensity[name] for each in statistics if name in each.intensity}
        for site, spread in spreads.items():
            ax.stairs(spread.shares() / np.diff(spread.edges), spread.edges, linewidth=1.3, label=site)
        # From the 0.2nd to the 99.8th percentile of the site that goes furthest.
        ax.set(title=name, yticks=[], xlabel="intensity", xlim=tuple(
            furthest(spread.quantile(share) for spread in spreads.values())
            for furthest, share in ((min, 0.002), (max, 0.998))))
        ax.spines["left"].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=8, title="site",
                  title_fontsize=8)
    figure.alt = f"Histograms of {', '.join(modalities)} over the brain at {len(statistics)} sites."
    return figure


@styled
def workflow_figure(workflows: Topology | Mapping[str, Topology | None], sites: Sequence[Site]) -> Picture:
    """Draws one workflow, or several side by side, in the manner of figure 3 of Rieke et al. 2020.

    Arrows are the messages of a round as the workflow lists them (`Topology.messages`): weights in all workflows
    except the data lake, to which the patients' scans are sent.

    Args:
        workflows: a topology, or name -> topology; None stands for the data lake in which all patients are pooled.
        sites: the sites of the run.

    Raises:
        ValueError: no workflow or no site.
    """
    from fedlab.view.picture import Picture

    drawn = workflows if isinstance(workflows, Mapping) else {type(workflows).__name__: workflows}
    if not drawn or not sites:
        raise ValueError(f"expected at least one workflow and one site, got {len(drawn)} and {len(sites)}")
    names = [site.name for site in sites]
    columns = min(len(drawn), 3)
    rows = math.ceil(len(drawn) / columns)
    figure = Picture(figsize=(3.6 * columns, 3.5 * rows), layout="constrained")
    for number, (title, topology) in enumerate(drawn.items()):
        _draw(figure.add_subplot(rows, columns, number + 1), title, topology, names)
    figure.alt = "Workflows of " + ", ".join(names) + ": " + "; ".join(drawn)
    return figure


def _draw(ax: Axes, title: str, topology: Topology | None, names: Sequence[str]) -> None:
    messages = [(name, "data lake") for name in names] if topology is None else topology.messages(names)
    places = _places(topology, names, messages)
    colour = _LAKE if topology is None else "#777777"
    for sender, receiver in messages:
        both = (receiver, sender) in messages
        ax.annotate("", places[receiver], places[sender], arrowprops={
            "arrowstyle": "-|>", "color": colour, "lw": 1.1, "shrinkA": 13, "shrinkB": 13, "mutation_scale": 9,
            "connectionstyle": f"arc3,rad={0.12 if both else 0}"})
    for name, (x, y) in places.items():
        site = name in names
        ax.scatter(x, y, s=360, marker="o" if site else "s", zorder=3,
                   color=BLUE if site else _LAKE if topology is None else INK)
        shift, across, along = _beside(x, y, tree=isinstance(topology, Tree))
        ax.annotate(name, (x, y), xytext=shift, textcoords="offset points", fontsize=8, zorder=4, ha=across, va=along)
    ax.set(title=title, xlim=(-1.45, 1.45), ylim=(-1.45, 1.45), aspect="equal")
    ax.set_axis_off()


def _beside(x: float, y: float, *, tree: bool) -> tuple[Place, str, str]:
    """Where the name of a place stands, off its arrows: the shift in points, and both alignments of the text."""
    if tree:
        dx, dy = (0.0, -1.0) if y < -0.5 else (math.copysign(1.0, x), 0.0) if abs(x) > 0.05 else (0.0, 1.0)
    elif math.hypot(x, y) < 0.05:
        dx, dy = 0.8, -0.8
    else:
        dx, dy = x, y
    across = "left" if dx > 0.3 else "right" if dx < -0.3 else "center"
    return (13 * dx, 13 * dy), across, "bottom" if dy > 0.3 else "top" if dy < -0.3 else "center"


def _places(topology: Topology | None, names: Sequence[str], messages: Sequence[tuple[str, str]]) -> dict[str, Place]:
    """Positions: sites on a circle around a server, or in rows below their regions."""
    if isinstance(topology, Tree):
        members = [(region, name) for region, own in topology.regions.items() for name in own if name in names]
        x = {name: -1.2 + 2.4 * (k + 0.5) / len(members) for k, (_, name) in enumerate(members)}
        places: dict[str, Place] = {name: (x[name], -0.95) for _, name in members}
        server = any("server" in pair for pair in messages)
        for k, region in enumerate(topology.regions):
            own = [x[name] for of, name in members if of == region]
            bow = 0.8 * math.sin(math.pi * (k + 0.5) / len(topology.regions)) - 0.2
            lift = 0.0 if server or len(topology.regions) < 3 else bow  # keeps arrows between regions apart
            places[region] = (sum(own) / len(own) if own else 0.0, 0.1 + lift)
        return places | ({"server": (0.0, 1.1)} if server else {})
    angle = {name: math.pi / 2 - 2 * math.pi * k / len(names) for k, name in enumerate(names)}
    circle: dict[str, Place] = {name: (math.cos(a), math.sin(a)) for name, a in angle.items()}
    middle = {end for pair in messages for end in pair} - set(names)
    return circle | {name: (0.0, 0.0) for name in middle}
