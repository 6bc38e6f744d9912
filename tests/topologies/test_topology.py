"""Workflows: each by hand or against another that it must equal, and resumed to equal bits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest
import torch

from cohorts import blob_sites
from fedlab.core.protocols import Run
from fedlab.core.types import ServerState, Site, Update
from fedlab.core.weights import weights_sha256
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.privacy.secure_aggregation.secure_sum import SecureAggregation
from fedlab.run.admission import Admission
from fedlab.run.federate import each_round, federate
from fedlab.run.round import Star, star
from fedlab.strategies.averaging import FedAvg
from fedlab.topologies.buffered import Buffered
from fedlab.topologies.combining import combined
from fedlab.topologies.cyclic import Ring, ring
from fedlab.topologies.gossip import Gossip
from fedlab.topologies.tree import Tree
from trainers import trainer

#: Out of alphabetical order, as the names of hospitals are.
NAMES = ("zurich", "aachen", "mainz", "bonn")
HALVES = Tree(regions={"north": ("site-0", "site-1"), "south": ("site-2", "site-3")})
SITES = blob_sites((3, 2, 2, 1))
MASKED = SecureAggregation(clip=1.0, threshold=3)


class Pulls:
    """An engine without networks: site k pulls its weight a share of the way towards k, and counts k + 1 patients."""

    def __init__(self, *, share=1 / 4, absent=()):
        self.share, self.absent = share, absent

    def train(self, task, state, cohort, states):
        for site in cohort:
            if site.name not in self.absent:
                k, own = NAMES.index(site.name), state.at(site.name)
                yield Update(site=site.name, delta={"w": (k - own.params["w"]) * self.share}, weight=k + 1.0,
                             steps=k + 1, round=state.round)


def small_run(topology, engine):
    """A run of four sites without patients."""
    return Run(trainer=trainer(), sites=tuple(Site(name=name, train=[]) for name in NAMES), strategy=FedAvg(),
               privacy=Privacy(), aggregation=Aggregation(), topology=topology, engine=engine, admission=None,
               rounds=10, seed=0)


def play(topology, *, steps=1, absent=()):
    """The states of a run without networks."""
    run = small_run(topology, Pulls(absent=absent))
    topology.check(run)
    states = [run.strategy.begin({"w": torch.tensor([8.0], dtype=torch.float64)})]
    for _ in range(steps):
        states.append(topology(run, states[-1]).state)
    return states


def test_a_star_by_hand():
    # deltas -2, -1.75, -1.5, -1.25 with weights 1, 2, 3, 4: mean -1.5
    assert play(star)[-1].params["w"].item() == 6.5


def test_a_ring_by_hand():
    # 8 -> 6 -> 4.75 -> 4.0625 -> 3.796875
    state = play(ring)[-1]
    assert state.params["w"].item() == 3.796875 and state.round == 1
    assert play(ring, absent=("zurich", "bonn"))[-1].params["w"].item() == 8 - 1.75 - 1.0625


def test_gossip_on_a_path_by_hand():
    topology = Gossip(graph=nx.path_graph(4))
    state = play(topology)[-1]
    # after training 6, 6.25, 6.5, 6.75; the ends have one neighbour, the others two: every edge has weight 1/3
    wanted = [6 * 2 / 3 + 6.25 / 3, (6 + 6.25 + 6.5) / 3, (6.25 + 6.5 + 6.75) / 3, 6.75 * 2 / 3 + 6.5 / 3]
    assert [state.models[n]["w"].item() for n in NAMES] == pytest.approx(wanted)
    assert state.params["w"].item() == pytest.approx(6.375)
    assert topology.metrics(state)["consensus distance"] == pytest.approx(np.std(wanted))


@pytest.mark.parametrize("graph", [nx.cycle_graph(4), nx.complete_graph(4), nx.star_graph(3),
                                   nx.connected_watts_strogatz_graph(4, 2, 0.5, seed=2), nx.circulant_graph(4, [1, 2])])
@pytest.mark.parametrize("present", [NAMES, ("zurich", "mainz"), ()])
def test_a_mixing_matrix_is_doubly_stochastic_and_symmetric(graph, present):
    rows = Gossip(graph=graph).mixing(NAMES, present)
    matrix = np.array([[rows[a].get(b, 0.0) for b in NAMES] for a in NAMES])
    assert (matrix >= 0).all() and np.allclose(matrix.sum(1), 1) and np.allclose(matrix, matrix.T)
    for k, name in enumerate(NAMES):
        assert name in present or matrix[k, k] == 1  # who is absent keeps its model


def test_gossip_keeps_the_mean_and_brings_models_together():
    apart = play(Gossip(graph=nx.cycle_graph(4)), steps=1)[-1]
    still = ServerState(round=1, params=apart.params, models=apart.models)
    topology = Gossip(graph=nx.cycle_graph(4))
    silent = small_run(topology, Pulls(share=0.0))
    distances = [topology.metrics(still)["consensus distance"]]
    for _ in range(5):
        still = topology(silent, still).state
        distances.append(topology.metrics(still)["consensus distance"])
        assert still.params["w"].item() == pytest.approx(apart.params["w"].item())
    # the second eigenvalue of a cycle of four with thirds is 1/3
    assert all(b <= a / 3 + 1e-12 for a, b in pairwise(distances)) and distances[0] > 0.05


def test_a_complete_gossip_with_equal_sites_is_uniform_averaging():
    sites = blob_sites((2, 2, 2))
    peers = federate(trainer(), sites, rounds=2, topology=Gossip(graph=nx.complete_graph(3)), progress=False)
    server = federate(trainer(), sites, rounds=2, strategy=FedAvg(weights="uniform"), progress=False)
    for name, value in server.state.params.items():
        torch.testing.assert_close(peers.state.params[name], value, rtol=1e-5, atol=1e-6)


def test_a_tree_of_means_is_the_star():
    flat = federate(trainer(), SITES, rounds=2, progress=False)
    tree = federate(trainer(), SITES, rounds=2, topology=HALVES, progress=False)
    for name, value in flat.state.params.items():
        torch.testing.assert_close(tree.state.params[name], value, rtol=1e-6, atol=1e-7)
    assert tree.table()["bytes"].tolist() == flat.table()["bytes"].tolist()


def test_hybrids_by_hand():
    regions = {"north": ("zurich", "aachen"), "south": ("mainz", "bonn")}
    rings = play(Tree(regions=regions, within=ring))[-1]
    # north 8 -> 6 -> 4.75 counts 3, south 8 -> 6.5 -> 5.625 counts 7
    assert rings.params["w"].item() == pytest.approx((3 * 4.75 + 7 * 5.625) / 10)
    peers = play(Tree(regions=regions, between=Gossip(graph=nx.path_graph(2))))[-1]
    # north 8 - (2 + 3.5) / 3, south 8 - (4.5 + 5) / 7, then half and half
    assert peers.models["north"]["w"].item() == pytest.approx(8 - (5.5 / 3 + 9.5 / 7) / 2)
    passing = play(Tree(regions=regions, between=ring))[-1]
    north = 8 - 5.5 / 3
    assert passing.params["w"].item() == pytest.approx(north + (3 * (2 - north) / 4 + 4 * (3 - north) / 4) / 7)
    assert play(Tree(regions=regions), absent=("zurich", "aachen"))[-1].params["w"].item() == pytest.approx(8 - 9.5 / 7)


def test_a_buffer_by_hand():
    topology = Buffered(size=1, seconds={"zurich": 1.0, "aachen": 1.5, "mainz": 10.0, "bonn": 10.0})
    first, second, third = play(topology, steps=3)[1:]
    # t = 1: a, from 8: 8 - 2 = 6. t = 1.5: b, from 8, overtaken once: 6 - 1.75 / sqrt(2). t = 2: a again, from 6.
    assert first.params["w"].item() == 6 and topology.metrics(first) == {"staleness": 0, "clock": 1}
    assert second.params["w"].item() == pytest.approx(6 - 1.75 / 2**0.5)
    assert topology.metrics(second) == {"staleness": 1, "clock": 1.5}
    assert third.params["w"].item() == pytest.approx(second.params["w"].item() - 1.5 / 2**0.5)
    assert third.models["mainz"]["w"].item() == 8  # still at work on what it was first given


def test_updates_in_one_buffer_count_less_each_by_its_own_delay():
    topology = Buffered(size=2, seconds={"zurich": 1.0, "aachen": 1.2, "mainz": 2.1, "bonn": 100.0})
    first, second = play(topology, steps=2)[1:]
    one = 8 - (2 * 1 + 1.75 * 2) / 3  # t = 1.2: zurich and aachen, both from 8
    assert first.params["w"].item() == pytest.approx(one) and topology.metrics(first)["staleness"] == 0
    # t = 2.2: mainz, from 8 and overtaken once, and zurich, from the present model.
    assert second.params["w"].item() == pytest.approx(one + (3 * -1.5 / 2**0.5 + 1 * -one / 4) / 4)
    assert topology.metrics(second) == {"staleness": 0.5, "clock": 2.2}


def test_a_region_s_update_counts_patients_and_steps_of_all_its_sites():
    class Notes(FedAvg):
        def combine(self, updates):
            received = list(updates)
            seen.extend((update.site, update.weight, update.steps) for update in received)
            return super().combine(iter(received))

    seen: list[tuple[str, float, int]] = []
    run = replace(small_run(Tree(regions={"north": ("zurich", "aachen"), "south": ("mainz", "bonn")}, within=ring),
                            Pulls()), strategy=Notes())
    run.topology(run, run.strategy.begin({"w": torch.tensor([8.0], dtype=torch.float64)}))
    assert seen == [("north", 3.0, 3), ("south", 7.0, 7)]


def test_models_are_mixed_by_weight_and_counts_in_them_by_the_largest():
    models = {"a": {"w": torch.tensor(1.0), "n": torch.tensor(5)}, "b": {"w": torch.tensor(3.0), "n": torch.tensor(3)}}
    for order in ("ab", "ba"):
        mixed = combined({name: {"a": 0.25, "b": 0.75}[name] for name in order}, models)
        assert (mixed["w"].item(), mixed["n"].item()) == (2.5, 5)


def test_a_full_buffer_of_equal_sites_is_the_star():
    whole = federate(trainer(), SITES, rounds=2, topology=Buffered(size=4), progress=False)
    flat = federate(trainer(), SITES, rounds=2, progress=False)
    assert weights_sha256(whole.state.params) == weights_sha256(flat.state.params)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_run_of_a_buffer_ends_when_all_budgets_are_used_up(size, tmp_path):
    """However few sites send in one round, and also where the run is resumed in between."""
    budget = LocalGaussian(clip=1.0, noise_multiplier=2.0, delta=1e-3, max_epsilon=6.0)
    alone = federate(trainer(), SITES[:1], rounds=20, privacy=budget, progress=False)
    releases = len(alone.records)
    assert alone.stopped and 1 < releases < 5
    settings = dict(topology=Buffered(size=size), privacy=budget, strategy=FedAvg(weights="uniform"), progress=False)
    history = federate(trainer(), SITES, rounds=50, **settings)
    sent = [name for record in history.records for name in record["sites"]]
    assert {name: sent.count(name) for name in sent} == dict.fromkeys((site.name for site in SITES), releases)
    assert "no site is left" in history.stopped and "budget is ε = 6" in history.stopped
    assert len(history.records) < 4 * (releases + 1) // size + 1
    federate(trainer(), SITES, rounds=len(history.records) - 1, checkpoint=tmp_path / "run", **settings)
    resumed = federate(trainer(), SITES, rounds=50, checkpoint=tmp_path / "run", **settings)
    assert resumed.stopped == history.stopped and len(resumed.records) == len(history.records)


def test_a_ring_of_one_is_plain_training():
    alone = blob_sites((3,))
    assert weights_sha256(federate(trainer(), alone, rounds=2, topology=ring, progress=False).state.params) \
        == weights_sha256(federate(trainer(), alone, rounds=2, progress=False).state.params)


@pytest.mark.parametrize("topology", [
    ring, Gossip(graph=nx.cycle_graph(4)), HALVES, replace(HALVES, within=ring),
    replace(HALVES, between=Gossip(graph=nx.path_graph(2))), Buffered(size=2, seconds={"site-1": 3.0}),
], ids=repr)
@pytest.mark.parametrize("privacy", [None, LocalGaussian(clip=1.0, noise_multiplier=1.0, delta=0.01)], ids=["", "dp"])
def test_every_workflow_resumes_to_equal_bits(topology, privacy, tmp_path):
    whole = federate(trainer(), SITES, rounds=3, topology=topology, privacy=privacy, progress=False)

    def stop(finished):
        if finished.number == 1:
            raise KeyboardInterrupt

    settings = dict(rounds=3, topology=topology, privacy=privacy, checkpoint=tmp_path / "run", progress=False)
    with pytest.raises(KeyboardInterrupt):
        federate(trainer(), SITES, on_round=stop, **settings)
    resumed = federate(trainer(), SITES, **settings)
    assert weights_sha256(resumed.state.params) == weights_sha256(whole.state.params)
    for site, model in whole.state.models.items():
        assert weights_sha256(resumed.state.models[site]) == weights_sha256(model)
    assert resumed.guarantee() == whole.guarantee()


def test_messages_are_what_is_sent():
    assert ring.messages(NAMES) == [("zurich", "aachen"), ("aachen", "mainz"), ("mainz", "bonn"), ("bonn", "zurich")]
    assert ring.messages(["zurich"]) == []
    assert len(star.messages(NAMES)) == 8 and len(Gossip(graph=nx.complete_graph(4)).messages(NAMES)) == 12
    tree = Tree(regions={"north": ("zurich", "aachen"), "south": ("mainz", "bonn")})
    assert ("zurich", "north") in tree.messages(NAMES) and ("south", "server") in tree.messages(NAMES)
    history = federate(trainer(), SITES, rounds=1, topology=Gossip(graph=nx.star_graph(3)), progress=False)
    sent = history.sites()["bytes"].loc[0]
    assert sent["site-0"] == 3 * sent["site-1"] > 0  # the hub has three neighbours


def test_a_site_sees_its_own_model_only():
    state = ServerState(round=0, params={"w": torch.zeros(1)}, models={"zurich": {"w": torch.ones(1)}})
    assert state.at("zurich").params["w"].item() == 1 and not state.at("zurich").models
    assert state.at("aachen").params["w"].item() == 0 and not state.at("aachen").models


@pytest.mark.parametrize("make, message", [
    (lambda: Gossip(graph=nx.DiGraph([(0, 1)])), "undirected"),
    (lambda: Gossip(graph=[(0, 1)]), "undirected networkx graph"),
    (lambda: Gossip(graph=nx.empty_graph(3)), "falls apart"),
    (lambda: Tree(regions={}), "at least one site"),
    (lambda: Tree(regions={"n": ()}), "at least one site"),
    (lambda: Tree(regions={"n": ("zurich",), "s": ("zurich",)}), "in several"),
    (lambda: Tree(regions={"n": ("zurich",)}, within=Gossip(graph=nx.path_graph(2))), "inside a region"),
    (lambda: Tree(regions={"n": ("zurich",)}, between=Buffered(size=1)), "between regions"),
    (lambda: Buffered(size=0), "positive whole number"),
    (lambda: Buffered(size=1, seconds={"zurich": 0.0}), "seconds are positive"),
])
def test_workflows_refuse_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("settings, message", [
    (dict(topology=Gossip(graph=nx.path_graph(3))), "nodes are the sites' names"),
    (dict(topology=Tree(regions={"n": ("site-0", "elsewhere")})), "these differ"),
    (dict(topology=Buffered(size=5)), "a buffer of 5 updates from 4 sites"),
    (dict(topology=Buffered(size=1, seconds={"x": 2.0})), "times of unknown sites"),
    (dict(topology=Buffered(size=1), strategy=FedAvg(sample=0.5)), "sample at 1"),
    (dict(topology=ring, strategy=FedAvg(server_lr=0.5)), "no server"),
    (dict(topology=Gossip(graph=nx.path_graph(4)), strategy=FedAvg(server_lr=0.5)), "peers have no server"),
    (dict(topology=ring, privacy=CentralGaussian(clip=1.0, noise_multiplier=1.0, delta=0.01),
          strategy=FedAvg(weights="uniform")), "use topology=star"),
    (dict(topology=HALVES, aggregation=MASKED, strategy=FedAvg(weights="uniform")), "use topology=star"),
    (dict(privacy=CentralGaussian(clip=1.0, noise_multiplier=1.0, delta=0.01), strategy=FedAvg(weights="uniform"),
          admission=Admission(min_sites=2)), "how many sites took part"),
    (dict(aggregation=MASKED, strategy=FedAvg(weights="uniform"), admission=Admission(max_norm=1.0)),
     "max_norm cannot be checked"),
])
def test_parts_that_do_not_work_together_are_refused_before_training(settings, message):
    with pytest.raises(ValueError, match=message):
        next(each_round(trainer(), SITES, rounds=1, **settings))


def test_workflows_print_as_code():
    known = dict(Star=Star, Ring=Ring, Tree=Tree, Gossip=Gossip, Buffered=Buffered,
                 networkx=SimpleNamespace(Graph=nx.Graph))
    for topology in (star, ring, Gossip(graph=nx.cycle_graph(4)), HALVES, Buffered(size=2)):
        assert repr(eval(repr(topology), known)) == repr(topology)
