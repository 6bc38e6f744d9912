"""Sites average their optimisers' moments with the weights, or the run is refused before anything is sent."""

from __future__ import annotations

from dataclasses import replace

import networkx
import pytest
import torch
from safetensors.torch import load_file

from cohorts import BatchNet, TinyNet, blob_sites
from fedlab.core.errors import PrivacyError
from fedlab.core.gate import check_update
from fedlab.core.regions import labels_to_regions
from fedlab.core.types import MOMENT, ServerState, SiteState
from fedlab.core.weights import trainable, weights_sha256
from fedlab.engines.processes import Processes
from fedlab.evidence.contributions import KeepUpdates
from fedlab.privacy import DPSGD, AtSites, LocalGaussian, PersonalLayers, SecureAggregation
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import TopK
from fedlab.privacy.sparse.partial_sharing import PartialSharing
from fedlab.run.admission import Admission
from fedlab.run.federate import each_round, federate
from fedlab.run.local import Local
from fedlab.run.site_task import SiteTask
from fedlab.strategies import AveragedWeights, CoordinateMedian, Ditto, FedAvg, FedNova, FedProx, NormBound
from fedlab.topologies import Buffered, Gossip, Tree, ring
from fedlab.training.defaults import DiceBCE
from trainers import plain_sgd, trainer

SIZES = (3, 1, 2)


def momentum_sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def averaging(**settings):
    return trainer(**({"momentum": "average", "steps": 2} | settings))


def sha(history):
    return weights_sha256({**history.state.params, **history.state.buffers})


def test_two_rounds_are_those_of_the_formula():
    """One step per round on the one patient of each site; the second site weighs twice as much."""
    lr, sites = 0.1, blob_sites((1, 1))
    sites = [sites[0], replace(sites[1], train=[sites[1].train[0], sites[1].train[0]])]
    one = averaging(optimiser=momentum_sgd, lr=lr, steps=1, batch_size=2, loss=DiceBCE())
    weight, net = (1 / 3, 2 / 3), TinyNet()

    def gradients(patient):
        logits = net(patient.image[None].float())
        loss = one.loss(logits, labels_to_regions(patient.label)[None])
        return torch.autograd.grad(loss, list(trainable(net).values()))

    velocity = [torch.zeros_like(p) for p in trainable(net).values()]
    for _ in range(2):
        found = [gradients(site.train[0]) for site in sites]
        velocity = [sum(w * (0.9 * v + g) for w, g in zip(weight, gs, strict=True))
                    for v, *gs in zip(velocity, *found, strict=True)]
        with torch.no_grad():
            for p, v in zip(trainable(net).values(), velocity, strict=True):
                p -= lr * v
    history = federate(one, sites, rounds=2, progress=False)
    for (name, p), v in zip(trainable(net).items(), velocity, strict=True):
        torch.testing.assert_close(history.state.params[name], p.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(history.state.buffers[f"{MOMENT}{name}|momentum_buffer"], v, rtol=1e-4, atol=1e-6)
    kept = federate(replace(one, momentum="keep"), sites, rounds=2, progress=False)
    assert weights_sha256(kept.state.params) != weights_sha256(history.state.params)


@pytest.mark.parametrize("optimiser", [
    torch.optim.AdamW, momentum_sgd, lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True), torch.optim.NAdam])
def test_one_site_trains_as_if_it_kept_them(optimiser):
    settings = {"optimiser": optimiser, "steps": 1, "lr": 1e-2}
    alone, kept = (federate(averaging(**settings, momentum=how), blob_sites((3,)), rounds=4, progress=False)
                   for how in ("average", "keep"))
    assert weights_sha256(alone.state.params) == weights_sha256(kept.state.params)
    moments = kept.site_states["site-0"].of("optimiser").own
    assert weights_sha256({MOMENT + key: t for key, t in moments.items()}) == weights_sha256(alone.state.buffers)
    assert not alone.site_states["site-0"].of("optimiser").own, "nothing is kept twice"


def test_moments_are_no_part_of_the_model():
    one = averaging()
    history = federate(one, blob_sites(SIZES), rounds=2, progress=False)
    assert set(history.state.model) == set(trainable(one.model)) and len(history.state.buffers) == 3 * 4
    assert all(history.state.model[name].equal(p) for name, p in trainable(one.model).items())
    sent, plain = (federate(averaging(momentum=how), blob_sites(SIZES), rounds=1, progress=False).sites()["bytes"]
                   for how in ("average", "keep"))
    weights = sum(4 * p.numel() for p in trainable(one.model).values())
    assert set(sent - plain) == {2 * weights + 4 * 4}  # two moments of Adam, and a count of steps per tensor


def test_the_same_bits_in_processes_after_an_interruption_and_in_a_second_run(tmp_path):
    sites, one = blob_sites(SIZES), averaging()
    whole = sha(federate(one, sites, rounds=3, progress=False))
    assert sha(federate(one, sites, rounds=3, progress=False)) == whole
    smoothed = AveragedWeights(strategy=FedAvg(), decay=0.5)  # a mean beside the run, which it leaves as it is
    assert sha(federate(one, sites, rounds=3, progress=False, strategy=smoothed)) == whole
    with Processes(workers=2) as engine:
        assert sha(federate(one, sites, rounds=3, progress=False, engine=engine)) == whole
    federate(one, sites, rounds=2, progress=False, checkpoint=tmp_path / "run")
    assert sha(federate(one, sites, rounds=3, progress=False, checkpoint=tmp_path / "run")) == whole


@pytest.mark.parametrize("strategy", [FedAvg(weights="uniform"), FedAvg(sample=0.5), FedProx(mu=0.1)])
def test_strategies_that_take_a_mean_average_them(strategy):
    history = federate(averaging(), blob_sites(SIZES), rounds=4, strategy=strategy, progress=False)
    assert any(bool(t.any()) for t in history.state.buffers.values())


def test_statistics_of_batch_norm_are_averaged_beside_them_or_kept():
    def buffers(how):
        one = averaging(model=BatchNet(), crop=(8, 8, 8), buffers=how)
        return set(federate(one, blob_sites(SIZES), rounds=1, progress=False).state.buffers)

    assert buffers("average") - buffers("keep") == {
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert all(name.startswith(MOMENT) for name in buffers("keep"))


def test_a_weight_without_a_gradient_sends_zeros():
    class Idle(TinyNet):
        def __init__(self):
            super().__init__()
            self.idle = torch.nn.Parameter(torch.ones(2))

    history = federate(averaging(model=Idle()), blob_sites((1, 2)), rounds=2, progress=False)
    assert history.state.params["idle"].equal(torch.ones(2))
    assert not history.state.buffers[f"{MOMENT}idle|exp_avg"].any()
    assert history.state.buffers[f"{MOMENT}first.weight|exp_avg"].any()


def test_single_updates_are_kept_without_them(tmp_path):
    engine = KeepUpdates(engine=Local(), folder=tmp_path / "kept")
    federate(averaging(), blob_sites(SIZES), rounds=1, engine=engine, progress=False)
    kept = [load_file(file) for file in sorted((tmp_path / "kept" / "round-0000").iterdir())]
    assert len(kept) == len(SIZES) and all(set(one) == set(trainable(TinyNet())) for one in kept)


class Mine(Privacy):
    """A technique of a notebook: it leaves out a layer."""

    def protect(self, update, state, rng):
        return replace(update, delta={name: t * ("last" not in name) for name, t in update.delta.items()})


NOISY = LocalGaussian(clip=1.0, noise_multiplier=1.0, delta=0.1)


@pytest.mark.parametrize(("settings", "part"), [
    *[(dict(privacy=privacy), type(privacy).__name__) for privacy in (
        TopK(keep=0.1), NOISY, DPSGD(clip=1.0, noise_multiplier=1.0, sample_rate=0.5, delta=0.1), Mine(),
        AtSites(sites=["site-0"], technique=NOISY), PersonalLayers(names=("last*",)), PartialSharing(fraction=0.1))],
    (dict(aggregation=SecureAggregation(threshold=2), strategy=FedAvg(weights="uniform")), "SecureAggregation"),
    (dict(strategy=CoordinateMedian()), "CoordinateMedian"), (dict(strategy=NormBound(bound=1.0)), "NormBound"),
    (dict(strategy=Ditto(lam=0.1)), "Ditto"), (dict(admission=Admission(max_norm=1.0)), "Admission"),
    (dict(topology=ring), "Ring"), (dict(topology=Buffered(size=2)), "Buffered"),
    (dict(topology=Gossip(graph=networkx.complete_graph([f"site-{k}" for k in range(3)]))), "Gossip"),
    (dict(topology=Tree(regions={"a": ["site-0", "site-1"], "b": ["site-2"]})), "Tree"),
])
def test_what_protects_judges_or_combines_weights_only_is_refused_before_the_run(settings, part):
    with pytest.raises(ValueError, match=rf"{part}[\s\S]*momentum='keep'"):
        each_round(averaging(), blob_sites(SIZES), **settings)
    each_round(averaging(momentum="keep"), blob_sites(SIZES), **settings)


def test_fednova_knows_no_mean_of_momenta():
    with pytest.raises(ValueError, match="momentum='restart'"):
        each_round(averaging(optimiser=momentum_sgd), blob_sites(SIZES), strategy=FedNova())


class Warmup(torch.optim.SGD):
    """Counts its steps in its groups."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


class Lists(torch.optim.SGD):
    """Keeps a list per weight."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["history"] = [None]


@pytest.mark.parametrize(("optimiser", "says"), [
    (plain_sgd, "SGD keeps nothing from step to step; say momentum='keep'"),
    (Warmup, r"Warmup keeps 'number\|group 0\|k', which has no mean"),
    (Lists, r"Lists keeps a list \(first.weight, history\)"), (torch.optim.LBFGS, "LBFGS evaluates the loss several"),
])
def test_what_has_no_mean_is_refused_before_the_run(optimiser, says):
    with pytest.raises(ValueError, match=says):
        each_round(averaging(optimiser=optimiser), blob_sites(SIZES))


def test_the_gate_lets_only_the_moments_of_the_run_pass():
    one, site = averaging(), blob_sites((2,))[0]
    state = ServerState(round=0, params=one.initial(), buffers=one.initial_buffers())
    (finished,) = each_round(one, [site], rounds=1)
    assert finished.state.buffers.keys() == state.buffers.keys()
    assert all(t.shape == state.buffers[name].shape for name, t in finished.state.buffers.items())
    update = one.fit(one.prepare(site, state, site_state=_own(), seed=1), site, state, site_state=_own(), seed=1)
    check_update(update, like=state.params, buffers=state.buffers, site=site.name)
    name = next(iter(update.buffers))
    for wrong in ({}, {**update.buffers, MOMENT + "image|sum": torch.ones(1)},
                  {**update.buffers, name: torch.full_like(update.buffers[name], torch.nan)}):
        with pytest.raises(PrivacyError, match="buffer"):
            check_update(replace(update, buffers=wrong), like=state.params, buffers=state.buffers, site=site.name)


class Hides(Aggregation):
    """Says that it hides updates, and does nothing."""

    hides_updates = True

    def mask(self, update, state, rng):
        return update


@pytest.mark.parametrize("parts", [dict(privacy=NOISY), dict(privacy=Privacy(), aggregation=Hides())])
def test_a_site_sends_no_moments_beside_what_is_protected_though_nobody_checked_the_run(parts):
    one, site = averaging(), blob_sites((2,))[0]
    state = ServerState(round=0, params=one.initial(), buffers=one.initial_buffers())
    with pytest.raises(PrivacyError, match="nor averaged moments"):
        SiteTask(trainer=one, seed=0, **parts)(site, state, SiteState())
    assert SiteTask(trainer=one, seed=0, privacy=Privacy())(site, state, SiteState()).buffers


def _own() -> SiteState:
    return SiteState()
