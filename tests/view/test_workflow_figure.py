"""The drawing of a workflow shows the messages of its object."""

from __future__ import annotations

import networkx as nx
import pytest
from matplotlib.text import Annotation

from cohorts import blob_sites
from fedlab.topologies import Buffered, Gossip, Tree, ring, star
from fedlab.view import workflow_figure

SITES = blob_sites((1, 1, 1, 1))
NAMES = [site.name for site in SITES]
HALVES = {"north": NAMES[:2], "south": NAMES[2:]}


def arrows(ax):
    return [a for a in ax.texts if isinstance(a, Annotation) and a.arrow_patch is not None]


@pytest.mark.parametrize("topology", [
    star, ring, Gossip(graph=nx.cycle_graph(4)), Buffered(size=2), Tree(regions=HALVES),
    Tree(regions=HALVES, within=ring, between=Gossip(graph=nx.path_graph(2))),
], ids=repr)
def test_an_arrow_for_each_message_and_a_name_for_each_place(topology):
    ax = workflow_figure(topology, SITES).axes[0]
    sent = topology.messages(NAMES)
    assert len(arrows(ax)) == len(sent) > 0
    shown = {a.get_text() for a in ax.texts} - {""}
    assert shown == set(NAMES) | {end for pair in sent for end in pair}
    places = [tuple(mark.get_offsets()[0]) for mark in ax.collections]
    assert len(set(places)) == len(shown)  # no two places coincide
    assert topology.messages(NAMES) == sent


def test_several_side_by_side_and_the_data_lake():
    figure = workflow_figure({"data lake": None, "server": star, "ring": ring, "peers": Gossip(
        graph=nx.complete_graph(4))}, SITES)
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]
    assert titles == ["data lake", "server", "ring", "peers"] and "data lake" in figure.alt
    assert {a.get_text() for a in figure.axes[0].texts} - {""} == {*NAMES, "data lake"}


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="at least one workflow"):
        workflow_figure({}, SITES)
    with pytest.raises(ValueError, match="one site"):
        workflow_figure(star, [])
