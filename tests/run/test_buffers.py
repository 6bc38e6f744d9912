"""Buffers that training moves are part of what is federated, alike on all engines, or stay at each site on purpose."""

from __future__ import annotations

from dataclasses import replace

import networkx
import pytest
import torch
from torch import nn

from cohorts import BatchNet, TinyNet, blob_sites
from fedlab.core.errors import PrivacyError, SiteError
from fedlab.core.gate import check_update
from fedlab.core.types import ServerState, SiteState, Update
from fedlab.core.weights import load_weights, weights_sha256
from fedlab.deploy.messages import pack_answer, pack_state, unpack_answer, unpack_state
from fedlab.engines.nvflare.run_folder import FinishedRounds
from fedlab.engines.processes import Processes
from fedlab.evidence.contributions import KeepUpdates
from fedlab.privacy import SecureAggregation
from fedlab.privacy.compression import TopK
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.privacy.personal_layers import PersonalLayers, norms
from fedlab.privacy.sparse.partial_sharing import PartialSharing
from fedlab.run.admission import Admission
from fedlab.run.baselines import local_only
from fedlab.run.federate import each_round, federate
from fedlab.run.local import Local
from fedlab.run.recipe import recipe_sha256
from fedlab.strategies import (
    SCAFFOLD,
    CoordinateMedian,
    Ditto,
    FedAvg,
    FedNova,
    FedOpt,
    FedProx,
    GeometricMedian,
    Krum,
    NormBound,
    TrimmedMean,
    weighted_mean,
)
from fedlab.topologies import Buffered, Gossip, Tree, ring
from fedlab.training.metrics import evaluate
from trainers import plain_sgd, trainer

MOVED = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")


def batch(**settings):
    return trainer(**({"model": BatchNet(), "crop": (8, 8, 8), "steps": 2, "batch_size": 2} | settings))


def run(sites=None, **settings):
    own = {name: settings.pop(name) for name in ("buffers", "optimiser", "momentum") if name in settings}
    one = batch(**own)
    return one, federate(one, blob_sites((3, 2, 4)) if sites is None else sites, rounds=2, progress=False, **settings)


def sha(history):
    return weights_sha256(history.state.model)


def test_statistics_are_the_mean_of_the_sites_by_weight_and_counts_the_largest():
    sites = blob_sites((3, 1))
    one = batch(steps=None, epochs=1, batch_size=1)
    history = federate(one, sites, rounds=1, progress=False)
    alone = [federate(batch(steps=None, epochs=1, batch_size=1), [site], rounds=1, progress=False) for site in sites]
    assert set(history.state.buffers) == set(MOVED)  # not the constant
    for name in MOVED[:2]:
        mean = sum(h.state.buffers[name].double() * w for h, w in zip(alone, (3, 1), strict=True)) / 4
        assert history.state.buffers[name].equal(mean.float())
        assert not history.state.buffers[name].equal(alone[0].state.buffers[name])
    assert int(history.state.buffers[MOVED[2]]) == 3
    assert one.model.norm.running_mean.equal(history.state.buffers[MOVED[0]])  # the model is left with them


@pytest.mark.parametrize("strategy", [FedAvg(), FedAvg(weights="uniform"), FedProx(mu=0.1), Ditto(lam=0.5),
                                      FedOpt(rule="adam", server_lr=0.01)], ids=repr)
def test_the_same_bits_in_processes_and_in_another_order_of_the_sites(strategy):
    torch.set_num_threads(1)
    sites = blob_sites((3, 2, 4))
    _, here = run(sites, strategy=strategy)
    scores = evaluate(run(sites, strategy=strategy)[0].model, sites)
    with Processes(workers=2) as engine:
        one, there = run(sites, strategy=strategy, engine=engine)
    assert sha(here) == sha(there) == sha(run(sites[::-1], strategy=strategy)[1])
    assert evaluate(one.model, sites).equals(scores)


def test_a_second_run_and_a_resumed_one_give_the_same_bits(tmp_path):
    one, whole = run()
    again = federate(one, blob_sites((3, 2, 4)), rounds=2, progress=False)
    assert sha(again) == sha(whole)
    first = federate(one, blob_sites((3, 2, 4)), rounds=1, progress=False, checkpoint=tmp_path / "run")
    rest = federate(one, blob_sites((3, 2, 4)), rounds=2, progress=False, checkpoint=tmp_path / "run")
    assert len(first.records) == 1 and sha(rest) == sha(whole)
    assert recipe_sha256(one) == recipe_sha256(batch()) != recipe_sha256(batch(buffers="keep"))


@pytest.mark.parametrize("topology", [
    ring, Gossip(graph=networkx.path_graph(3)), Tree(regions={"n": ["site-0", "site-1"], "s": ["site-2"]}),
    Tree(regions={"n": ["site-0", "site-1"], "s": ["site-2"]}, within=ring),
    Tree(regions={"n": ["site-0", "site-1"], "s": ["site-2"]}, between=ring),
    Tree(regions={"n": ["site-0", "site-1"], "s": ["site-2"]}, between=Gossip(graph=networkx.path_graph(2))),
], ids=["ring", "gossip", "tree", "rings", "ring of stars", "gossip of stars"])
def test_workflows_carry_buffers(topology, tmp_path):
    _, whole = run(topology=topology)
    assert set(whole.state.buffers) == set(MOVED) and int(whole.state.buffers[MOVED[2]]) >= 4
    start = batch().initial_buffers()
    assert not whole.state.buffers[MOVED[0]].equal(start[MOVED[0]])
    with Processes(workers=2) as engine:
        assert sha(run(topology=topology, engine=engine)[1]) == sha(whole)
    for rounds in (1, 2):
        resumed = federate(batch(), blob_sites((3, 2, 4)), rounds=rounds, topology=topology, progress=False,
                           checkpoint=tmp_path / "run")
    assert sha(resumed) == sha(whole)


def test_a_tree_of_stars_is_the_star():
    tree = Tree(regions={"n": ["site-0", "site-1"], "s": ["site-2"]})
    star, other = run()[1].state.model, run(topology=tree)[1].state.model
    for name, tensor in star.items():
        torch.testing.assert_close(other[name], tensor)


def test_a_ring_hands_the_last_sites_buffers_on():
    sites = blob_sites((2, 2))
    first = next(each_round(batch(), sites[:1], topology=ring)).state
    both = next(each_round(batch(), sites, topology=ring)).state
    alone = next(each_round(batch(), sites[1:], topology=ring, state=replace(first, round=0))).state
    assert weights_sha256(both.model) == weights_sha256(alone.model)


def test_fednova_and_scaffold_average_buffers_as_fedavg_does():
    sites = blob_sites((2, 2))
    means = [run(sites, strategy=strategy, optimiser=plain_sgd, momentum="restart")[1].state.buffers[MOVED[0]]
             for strategy in (FedAvg(), FedNova(), SCAFFOLD())]
    for other in means[1:]:
        torch.testing.assert_close(other, means[0], rtol=0.05, atol=1e-3)


def test_compressed_updates_carry_whole_buffers_and_count_their_bytes():
    _, sparse = run(privacy=TopK(keep=0.01))
    assert not sparse.state.buffers[MOVED[0]].equal(torch.zeros(6))
    update = Update(site="a", delta={"w": torch.ones(10)}, weight=1.0, encoded=3, buffers={"b": torch.ones(2)})
    assert update.nbytes == 11 and replace(update, encoded=None).nbytes == 48


# Kept at each site


def test_kept_buffers_stay_at_the_sites_and_belong_to_the_run():
    one, history = run(buffers="keep")
    assert not history.state.buffers and "norm.weight" in history.state.params
    kept = [history.site_states[f"site-{k}"].namespaces["buffers"] for k in range(3)]
    assert [int(own[MOVED[2]]) for own in kept] == [4, 4, 4]
    assert not kept[0][MOVED[0]].equal(kept[1][MOVED[0]])
    assert one.model.norm.running_mean.equal(torch.zeros(6))  # the global model has the initial ones
    load_weights(one.model, one.local(history.state, history.site_states["site-1"]))
    assert one.model.norm.running_mean.equal(kept[1][MOVED[0]])
    with Processes(workers=2) as engine:
        other = run(buffers="keep", engine=engine)[1]
    assert sha(other) == sha(history)
    assert all(other.site_states[f"site-{k}"].namespaces["buffers"][MOVED[1]].equal(kept[k][MOVED[1]]) for k in (0, 1))


def test_fedbn_keeps_weights_and_statistics_of_the_norms():
    technique = PersonalLayers(names=norms(BatchNet()))
    one, history = run(buffers="keep", privacy=technique)
    mine = technique.local(history.state.model, history.site_states["site-1"])
    assert not mine["norm.weight"].equal(torch.ones(6)) and not mine[MOVED[0]].equal(torch.zeros(6))
    load_weights(one.model, mine)
    with pytest.raises(ValueError, match=r"running statistics are shared; say SiteTrainer\(buffers='keep'\)"):
        run(privacy=technique)


def test_dittos_own_model_has_buffers_of_its_own():
    for buffers in ("average", "keep"):
        one, history = run(strategy=Ditto(lam=0.5), buffers=buffers)
        mine = Ditto(lam=0.5).local(one.local(history.state), history.site_states["site-0"])
        theirs = one.local(history.state, history.site_states["site-0"])
        assert set(mine) == set(theirs) and not mine[MOVED[0]].equal(theirs[MOVED[0]])
        load_weights(one.model, mine)


@pytest.mark.parametrize("buffers", ["average", "keep"])
def test_without_a_pull_dittos_own_model_has_the_buffers_of_training_alone(buffers):
    sites = blob_sites((3, 2))
    one, history = run(sites, strategy=Ditto(lam=0.0), buffers=buffers)
    alone = local_only(batch(buffers=buffers), sites, rounds=2, progress=False)
    for site in sites:
        mine = Ditto(lam=0.0).local(one.local(history.state), history.site_states[site.name])
        by_itself = alone[site.name]
        there = one.local(by_itself.state, by_itself.site_states[site.name])
        assert weights_sha256(mine) == weights_sha256(there) and int(mine[MOVED[2]]) == 4  # two rounds of two steps


# Refused


@pytest.mark.parametrize("settings, part", [
    *[(dict(strategy=strategy), type(strategy).__name__) for strategy in (
        CoordinateMedian(), TrimmedMean(trim=0.1), Krum(attackers=0), GeometricMedian(), NormBound(bound=1.0))],
    (dict(privacy=LocalGaussian(clip=1.0, noise_multiplier=1.0, delta=0.1)), "LocalGaussian"),
    (dict(privacy=CentralGaussian(clip=1.0, noise_multiplier=1.0, delta=0.1), strategy=FedAvg(weights="uniform")),
     "CentralGaussian"),
    (dict(aggregation=SecureAggregation(threshold=2), strategy=FedAvg(weights="uniform")), "SecureAggregation"),
    (dict(admission=Admission(max_norm=1.0)), "Admission"),
    (dict(topology=Buffered(size=2)), "late updates"),
    (dict(privacy=PartialSharing(fraction=0.1)), "PartialSharing"),
])
def test_parts_that_cannot_treat_buffers_are_refused_before_the_run(settings, part):
    with pytest.raises(ValueError, match=rf"{part}[\s\S]*buffers='keep'"):
        each_round(batch(), blob_sites((3, 2, 4)), **settings)
    each_round(batch(model=TinyNet()), blob_sites((3, 2, 4)), **settings)
    if part != "PersonalLayers":
        each_round(batch(buffers="keep"), blob_sites((3, 2, 4)), **settings)


def test_a_strategy_that_drops_the_buffers_is_refused():
    class Drops(FedAvg):
        def combine(self, updates):
            return replace(weighted_mean(updates), buffers={})

    with pytest.raises(ValueError, match="lacks the network's buffers"):
        run(strategy=Drops())


def test_single_updates_of_such_networks_are_not_kept(tmp_path):
    with pytest.raises(ValueError, match="batch norm"):
        run(engine=KeepUpdates(engine=Local(), folder=tmp_path / "kept"))


def test_a_buffer_that_moves_unexpectedly_is_refused():
    class Late(TinyNet):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.calls = 0

        def forward(self, image):
            self.calls += 1
            if self.calls > 3:
                self.seen += 1
            return super().forward(image)

    with pytest.raises(SiteError, match="training has changed the buffer seen"):
        federate(trainer(model=Late(), steps=6), blob_sites((1,)), rounds=1, progress=False)


def test_the_gate_checks_buffers():
    like, buffers = {"w": torch.zeros(2)}, {"b": torch.zeros(3), "n": torch.tensor(0)}
    good = Update(site="a", delta={"w": torch.ones(2)}, weight=1.0,
                  buffers={"b": torch.ones(3), "n": torch.tensor(4)})
    assert check_update(good, like=like, buffers=buffers, site="a") is good
    for wrong in ({}, {"b": torch.ones(3)}, {**good.buffers, "c": torch.ones(1)}, {**good.buffers, "b": torch.ones(2)},
                  {**good.buffers, "b": torch.full((3,), torch.nan)}, {**good.buffers, "n": torch.tensor(4.0)}, None):
        with pytest.raises(PrivacyError, match="buffer"):
            check_update(replace(good, buffers=wrong), like=like, buffers=buffers, site="a")
    with pytest.raises(PrivacyError, match="other buffers"):
        check_update(good, like=like, site="a")


def test_weights_without_the_statistics_are_refused():
    one, history = run()
    with pytest.raises(ValueError, match=r"statistics are missing.*ServerState\.model"):
        load_weights(one.model, history.state.params)
    load_weights(one.model, history.state.model)


# Messages


def test_messages_carry_buffers():
    buffers = {"b": torch.rand(3), "n": torch.tensor(7)}
    update = Update(site="a", delta={"w": torch.ones(2)}, weight=1.0, round=0, buffers=buffers)
    back = unpack_answer(pack_answer(update), site="a")
    state = unpack_state(pack_state(ServerState(round=0, params={"w": torch.ones(2)}, buffers=buffers)))
    for found in (back.buffers, state.buffers):
        assert found.keys() == buffers.keys() and all(found[name].equal(t) for name, t in buffers.items())


def test_entries_of_rounds_carry_buffers(tmp_path):
    finished = next(each_round(batch(), blob_sites((2, 2))))
    folder = FinishedRounds(tmp_path)
    folder.add(finished)
    (back,) = folder.since(0)
    assert set(back.state.params) == set(finished.state.params)
    assert weights_sha256(back.state.buffers) == weights_sha256(finished.state.buffers)


def test_spectral_norm_moves_buffers_too():
    model = TinyNet()
    nn.utils.parametrizations.spectral_norm(model.first)
    one = trainer(model=model, crop=(8, 8, 8))
    history = federate(one, blob_sites(), rounds=2, progress=False)
    assert len(history.state.buffers) == 2
    with Processes(workers=1) as engine, pytest.raises(ValueError, match=r"parametrized[\s\S]*engine=Local\(\)"):
        federate(one, blob_sites(), rounds=1, engine=engine, progress=False)


def test_networks_without_moving_buffers_have_none():
    history = federate(trainer(), blob_sites(), rounds=1, progress=False)
    assert not history.state.buffers and history.state.model == dict(history.state.params)
    assert all("buffers" not in state.namespaces for state in history.site_states.values())
    assert SiteState().namespaces == {}
