"""The messages of a workflow, drawn from its object in the manner of figure 3 of Rieke et al. 2020."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedlab.core.protocols import Topology
from fedlab.core.types import Site
from fedlab.topologies.tree import Tree
from fedlab.view.colours import BLUE, INK, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fedlab.view.picture import Picture

__all__ = ["workflow_figure"]

_LAKE = "#C44E00"
Place = tuple[float, float]


@styled
def workflow_figure(workflows: Topology | Mapping[str, Topology | None], sites: Sequence[Site]) -> Picture:
    """Draws one workflow, or several side by side.

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
        ax.annotate(name, (x, y), xytext=(0, -17), textcoords="offset points", ha="center", va="top", fontsize=7.5,
                    zorder=4, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8})
    ax.set(title=title, xlim=(-1.45, 1.45), ylim=(-1.55, 1.35), aspect="equal")
    ax.set_axis_off()


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
