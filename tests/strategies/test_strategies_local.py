"""What strategies change at the sites equals their papers' algorithms, survives a restart and goes with DP-SGD."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cohorts import TinyNet, blob_sites
from fedlab.core.seeds import generator
from fedlab.core.types import ServerState, SiteState, Spent, Update
from fedlab.core.weights import trainable, weights_sha256
from fedlab.privacy.compression import TopK
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.privacy.personal_layers import PersonalLayers, norms
from fedlab.privacy.secure_aggregation.secure_sum import SecureAggregation
from fedlab.run.baselines import local_only
from fedlab.run.federate import each_round, federate
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
    client_drift,
)
from fedlab.topologies.buffered import Buffered
from fedlab.topologies.tree import Tree
from fedlab.training.defaults import DiceBCE
from fedlab.training.networks import segresnet
from fedlab.training.schedules import PolyDecay
from trainers import batches, plain_sgd, trainer

LR, STEPS = 0.2, 3
UNIFORM = FedAvg(weights="uniform")


def sgd(**changes):
    """Whole volumes of one patient a site: nothing is random, so a test can repeat each step."""
    return trainer(**({"optimiser": plain_sgd, "lr": LR, "steps": STEPS, "batch_size": 1} | changes))


def gradient(params, patient):
    model, loss = TinyNet(), DiceBCE()
    image, target = next(batches([patient], [[0]]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(params[name])
    loss(model(image), target).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def descend(start, patient, term, steps=STEPS):
    """Plain SGD with a term in the gradient, written out."""
    params = {name: p.clone() for name, p in start.items()}
    for _ in range(steps):
        slope = gradient(params, patient)
        params = {name: p - LR * (slope[name] + term(name, p)) for name, p in params.items()}
    return params


def close(found, expected, **tolerance):
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p, **({"rtol": 1e-4, "atol": 1e-6} | tolerance))


def different(found, expected):
    return max(float((found[name] - p).abs().max()) for name, p in expected.items())


# FedProx


def test_fedprox_is_the_proximal_gradient():
    site, mu, params = blob_sites((1,))[0], 2.0, trainer().initial()
    history = federate(sgd(), [site], strategy=FedProx(mu=mu), rounds=2, progress=False)
    for _ in range(2):
        params = descend(params, site.train[0], lambda name, p, begin=params: mu * (p - begin[name]))
    close(history.state.params, params)
    plain = federate(sgd(), [site], rounds=2, progress=False)
    assert different(plain.state.params, params) > 1e-3


def test_a_weak_pull_is_one_too_at_the_site_and_in_its_own_model():
    site, start = blob_sites((1,))[0], trainer().initial()
    pulled = descend(start, site.train[0], lambda name, p: 0.4 * (p - start[name]))
    prox = federate(sgd(), [site], strategy=FedProx(mu=0.4), rounds=1, progress=False)
    close(prox.state.params, pulled, atol=1e-7)
    ditto = federate(sgd(), [site], strategy=Ditto(lam=0.4), rounds=1, progress=False)
    close(Ditto(lam=0.4).local(ditto.state.params, ditto.site_states["site-0"]), pulled, atol=1e-7)
    assert different(ditto.state.params, pulled) > 1e-4
    close(ditto.state.params, descend(start, site.train[0], lambda name, p: 0.0))


def test_a_term_is_added_to_the_gradient_in_the_weights_precision_and_stands_alone_where_there_is_none():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = (nn.Parameter(torch.full((2,), v)) for v in (1.0, 3.0))
            self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    model, named = Two(), []
    optimiser = torch.optim.SGD([model.used, model.unused], lr=0.1)

    def term(name, p):
        named.append(name)
        assert not torch.is_grad_enabled()
        return torch.full((2,), 2.0, dtype=torch.float64)

    client_drift._add_to_gradient(SimpleNamespace(model=model, optimiser=optimiser), term)
    (5 * model.used).sum().backward()
    optimiser.step()
    assert named == ["used", "unused"] and model.frozen.grad is None
    for p, gradient, moved in ((model.used, 7.0, 0.3), (model.unused, 2.0, 2.8)):
        assert p.grad.dtype == torch.float32 and p.grad.tolist() == [gradient] * 2
        assert p.tolist() == pytest.approx([moved] * 2)


def test_a_pull_and_a_control_lie_where_the_site_trains():
    class Elsewhere:
        """A tensor that lies elsewhere until it is moved."""

        def __init__(self, *values):
            self.values, self.seen = values, []

        def __sub__(self, other):
            return self

        def to(self, device):
            self.seen.append(device)
            return torch.tensor(self.values)

    model = nn.ParameterDict({"w": nn.Parameter(torch.tensor([1.0, -2.0]))})
    kit = SimpleNamespace(model=model, optimiser=torch.optim.SGD(model.values(), lr=0.5), device="there")
    anchor, control = Elsewhere(0.0, 1.0), Elsewhere(0.25, 0.5)
    client_drift._pull(kit, 3.0, to={"w": anchor})
    state = ServerState(round=0, params={"w": torch.zeros(2)}, moments={"control variate": {"w": control}})
    assert SCAFFOLD(sites=2, steps=3, lr=0.5).equip(kit, None, state, SiteState()) is kit
    assert anchor.seen == control.seen == ["there"]
    kit.optimiser.step()
    assert model["w"].grad.tolist() == [3.25, -8.5] and model["w"].tolist() == [-0.625, 2.25]


def test_without_a_pull_it_is_fedavg_to_the_bit():
    plain, prox, ditto = (federate(trainer(), blob_sites(), strategy=s, rounds=2, progress=False).state.params
                          for s in (FedAvg(), FedProx(mu=0.0), Ditto(lam=0.5)))
    assert weights_sha256(plain) == weights_sha256(prox) == weights_sha256(ditto)


def test_the_pull_comes_after_dp_sgd_s_clipping():
    site, clip, mu = blob_sites((1,))[0], 0.05, 1.9 / LR
    technique = DPSGD(clip=clip, noise_multiplier=0.0, sample_rate=1.0)
    found = federate(sgd(), [site], strategy=FedProx(mu=mu), privacy=technique, rounds=1, progress=False).state.params
    start = trainer().initial()

    def by_hand(pull_is_clipped):
        params, longest = dict(start), 0.0
        for _ in range(STEPS):
            slope = gradient(params, site.train[0])
            pull = {name: mu * (p - start[name]) for name, p in params.items()}
            both = {name: slope[name] + pull[name] if pull_is_clipped else slope[name] for name in params}
            norm = torch.cat([g.flatten() for g in both.values()]).norm()
            longest = max(longest, float(torch.cat([g.flatten() for g in pull.values()]).norm()))
            both = {name: g * min(1.0, clip / float(norm)) for name, g in both.items()}
            extra = 0 if pull_is_clipped else 1
            params = {name: p - LR * (both[name] + extra * pull[name]) for name, p in params.items()}
        return params, longest

    expected, longest = by_hand(False)
    assert longest > 1.5 * clip, "the pull is too short for clipping to show"
    close(found, expected)
    assert different(found, by_hand(True)[0]) > 1e-3


def test_the_pull_works_with_noise_and_charges_the_ledger():
    technique = DPSGD(clip=0.5, noise_multiplier=1.0, delta=1e-2, batch=1)
    runs = [federate(sgd(), blob_sites((2, 2)), strategy=s, privacy=technique, rounds=2, progress=False)
            for s in (FedAvg(), FedProx(mu=0.5))]
    assert "per patient" in runs[1].guarantee() and runs[0].guarantee() == runs[1].guarantee()
    assert different(runs[0].state.params, runs[1].state.params) > 1e-4


def test_personal_layers_are_pulled_to_the_site_s_own():
    sites, mu = blob_sites((1,)), 2.0
    technique = PersonalLayers(names=["last.*"])
    history = federate(sgd(), sites, strategy=FedProx(mu=mu), privacy=technique, rounds=2, progress=False)
    params = trainer().initial()
    for _ in range(2):
        params = descend(params, sites[0].train[0], lambda name, p, begin=params: mu * (p - begin[name]))
    close(technique.local(history.state.params, history.site_states["site-0"]), params)


# SCAFFOLD


def unlike_sites():
    """Four sites whose scanners differ so much that what one learns misleads the others."""
    return [replace(site, train=[replace(p, image=p.image * scale) for p in site.train])
            for site, scale in zip(blob_sites((1, 1, 1, 1)), (1.0, -1.0, 2.0, -0.5), strict=True)]


@pytest.mark.parametrize("sample,server_lr", [(1.0, 1.0), (0.6, 0.5)])
def test_scaffold_is_algorithm_1_with_option_ii(sample, server_lr):
    sites, rounds = unlike_sites(), 4
    strategy = SCAFFOLD(sites=4, steps=STEPS, lr=LR, sample=sample, server_lr=server_lr)
    run = each_round(sgd(), sites, strategy=strategy, rounds=rounds, seed=7)

    x = trainer().initial()
    c = {name: torch.zeros_like(p) for name, p in x.items()}
    own = {site.name: dict(c) for site in sites}
    sizes = set()
    for number, finished in enumerate(run):
        cohort = strategy.select(sites, generator(7, "select", number))
        sizes.add(len(cohort))
        dx, dc = ({name: torch.zeros_like(p) for name, p in x.items()} for _ in range(2))
        for site in cohort:
            mine = own[site.name]
            y = descend(x, site.train[0], lambda name, p, mine=mine, c=c: c[name] - mine[name])
            new = {name: mine[name] - c[name] + (x[name] - y[name]) / (STEPS * LR) for name in x}
            for name in x:
                dx[name] += (y[name] - x[name]) / len(cohort)
                dc[name] += (new[name] - mine[name]) / len(cohort)
            own[site.name] = new
        x = {name: p + server_lr * dx[name] for name, p in x.items()}
        c = {name: t + len(cohort) / len(sites) * dc[name] for name, t in c.items()}
        close(finished.state.params, x)
        close(finished.state.moments["control variate"], c, atol=1e-5)
        for site in sites:
            kept = finished.site_states[site.name].of("strategy").own or {n: torch.zeros_like(p) for n, p in x.items()}
            close(kept, own[site.name], atol=1e-5)
        mean = {name: sum(own[site.name][name] for site in sites) / len(sites) for name in x}
        close(finished.state.moments["control variate"], mean, atol=1e-5)
    assert len(sizes) > (sample < 1), "sampling drew cohorts of one size only"
    plain = federate(sgd(), sites, strategy=FedAvg(weights="uniform", sample=sample, server_lr=server_lr),
                     rounds=rounds, seed=7, progress=False)
    assert different(plain.state.params, x) > 1e-4


def test_scaffold_s_first_round_is_fedavg_to_the_bit_and_one_site_is_plain_training():
    sites = blob_sites((1, 2))
    first = SCAFFOLD(sites=2, steps=STEPS, lr=LR)
    ours, plain = (federate(sgd(), sites, strategy=s, rounds=1, progress=False).state.params for s in (first, UNIFORM))
    assert weights_sha256(ours) == weights_sha256(plain)
    alone = SCAFFOLD(sites=1, steps=STEPS, lr=LR)
    ours, plain = (federate(sgd(), sites[:1], strategy=s, rounds=3, progress=False).state.params
                   for s in (alone, UNIFORM))
    close(ours, plain, rtol=1e-5)


def test_scaffold_follows_a_falling_learning_rate():
    decay, sites = PolyDecay(start=LR, rounds=4), blob_sites((1, 1))
    history = federate(sgd(lr=decay), sites, strategy=SCAFFOLD(sites=2, steps=STEPS, lr=decay), rounds=3,
                       progress=False)
    before = federate(sgd(lr=decay), sites, strategy=SCAFFOLD(sites=2, steps=STEPS, lr=decay), rounds=2,
                      progress=False).state
    slope = {name: (before.params[name] - p) / (STEPS * decay(2)) for name, p in history.state.params.items()}
    close(history.state.moments["control variate"], slope, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="learning rate of round 4 is 0"):
        SCAFFOLD(sites=2, steps=STEPS, lr=decay)._travel(4)


def test_scaffold_s_control_of_the_server_by_hand():
    """Two of five sites with 4 steps of length 0.25: c ← 0.6 c - 0.4 Δ / (4 · 0.25), and what others keep stays."""
    strategy, kept = SCAFFOLD(sites=5, steps=4, lr=0.25, server_lr=0.5), {"v": torch.ones(1)}
    state = replace(strategy.begin({"w": torch.tensor([1.0, 2.0])}), moments={"workflow": kept})
    for delta, control, w in (([2.0, -1.0], [-0.8, 0.4], [2.0, 1.5]), ([0.5, 3.0], [-0.68, -0.96], [2.25, 3.0])):
        mean = Update(site="mean", delta={"w": torch.tensor(delta, dtype=torch.float64)}, weight=2.0, steps=8)
        state = strategy.step(state, mean)
        found = state.moments["control variate"]["w"]
        assert found.tolist() == pytest.approx(control) and found.dtype == torch.float32
        assert state.params["w"].tolist() == pytest.approx(w) and state.moments["workflow"] is kept


def test_a_site_s_control_by_hand():
    """c_i ← c_i - c - Δ / (3 · 0.5); its first is that of zeros."""
    strategy, site_state = SCAFFOLD(sites=2, steps=3, lr=lambda round: 0.5 if round == 7 else 0.0), SiteState()
    state = replace(strategy.begin({"w": torch.tensor([1.0, 2.0])}), round=7,
                    moments={"control variate": {"w": torch.tensor([0.5, -4.0])}})
    for delta, own in (([3.0, 0.75], [-2.5, 3.5]), ([1.5, -6.0], [-4.0, 11.5])):
        sent = Update(site="a", delta={"w": torch.tensor(delta)}, weight=9.0, steps=3)
        strategy.remember(None, None, state, sent, site_state, 0)
        assert site_state.own["w"].tolist() == pytest.approx(own) and site_state.own["w"].dtype == torch.float32


def test_scaffold_divides_by_positive_numbers_only():
    for rate in (0.0, -0.1, float("inf")):
        with pytest.raises(ValueError, match=f"the learning rate of round 2 is {rate}, by which"):
            SCAFFOLD(sites=2, steps=3, lr=lambda round, rate=rate: rate)._travel(2)
    assert SCAFFOLD(sites=2, steps=3, lr=lambda round: 0.5 + round)._travel(2) == 7.5
    for missing in ({"steps": 3}, {"lr": 0.1}):
        with pytest.raises(ValueError, match="is not bound to a run"):
            SCAFFOLD(sites=2, **missing)._travel(0)


def test_a_schedule_is_that_of_the_run_if_it_is_in_all_of_its_rounds():
    sites, strategy = blob_sites((1, 1)), SCAFFOLD(lr=lambda round: 0.1 if round < 3 else 0.2)
    one = sgd(lr=lambda round: 0.1)
    each_round(one, sites, strategy=strategy, rounds=3)
    with pytest.raises(ValueError, match="is not for this run"):
        each_round(one, sites, strategy=strategy, rounds=4)
    with pytest.raises(ValueError, match="is not for this run"):  # one number and a schedule are never the same
        each_round(one, sites, strategy=SCAFFOLD(lr=0.1), rounds=1)


def test_a_site_s_control_comes_from_what_it_sent():
    technique = LocalGaussian(clip=0.01, noise_multiplier=1.0, delta=1e-2)
    history = federate(sgd(), blob_sites((1, 1)), strategy=SCAFFOLD(sites=2, steps=STEPS, lr=LR), privacy=technique,
                       rounds=1, progress=False)
    controls = [history.site_states[f"site-{k}"].of("strategy").own for k in (0, 1)]
    mean = {name: (controls[0][name] + controls[1][name]) / 2 for name in controls[0]}
    close(history.state.moments["control variate"], mean)  # of the noisy updates: nothing else is known to both


def test_noise_at_the_server_also_hides_how_many_came():
    spent = (Spent(1.0, 1e-3, "site", "rdp", "any"),)
    strategy = SCAFFOLD(sites=10, steps=1, lr=1.0, sample=0.5)
    state = strategy.begin({"w": torch.zeros(1)})
    delta = {"w": torch.ones(1)}
    for came in (1, 4, 9):
        moved = strategy.step(state, Update(site="mean", delta=delta, weight=float(came), steps=came, spent=spent))
        assert float(moved.moments["control variate"]["w"]) == -0.5
        open_mean = strategy.step(state, Update(site="mean", delta=delta, weight=float(came), steps=came))
        assert float(open_mean.moments["control variate"]["w"]) == pytest.approx(-came / 10)
    nobody = strategy.step(moved, Update(site="mean", delta={"w": torch.zeros(1)}, weight=1.0))
    assert float(nobody.moments["control variate"]["w"]) == -0.5
    central = CentralGaussian(clip=1.0, noise_multiplier=0.5, delta=1e-3)
    history = federate(sgd(), blob_sites((1, 1)), strategy=SCAFFOLD(sites=2, steps=STEPS, lr=LR), privacy=central,
                       rounds=2, progress=False)
    assert "per site" in history.guarantee()


@pytest.mark.parametrize("changes,strategy,match", [
    ({"optimiser": trainer().optimiser}, {}, r"optimiser=torch\.optim\.SGD"),
    ({"optimiser": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)}, {}, "moments"),
    ({"optimiser": lambda p, lr: torch.optim.SGD(p, lr, maximize=True)}, {}, "moments"),
    ({"steps": None, "epochs": 1}, {}, "steps= in place of epochs=1"),
    ({}, {"sites": 3}, r"this run, which has \{'sites': 2, 'steps': 3, 'lr': 0\.2\}"),
    ({}, {"steps": 2}, "not for this run"),
    ({}, {"lr": 0.1}, "not for this run")])
def test_scaffold_refuses_what_it_is_not_made_for(changes, strategy, match):
    wrong = SCAFFOLD(**({"sites": 2, "steps": STEPS, "lr": LR} | strategy))
    with pytest.raises(ValueError, match=match):
        each_round(sgd(**changes), blob_sites((1, 1)), strategy=wrong)


def test_scaffold_refuses_masks_and_workflows_without_one_server():
    strategy, sites = SCAFFOLD(sites=3, steps=STEPS, lr=LR), blob_sites((1, 1, 1))
    for hidden in (SecureAggregation(clip=1.0, threshold=2),
                   SecureAggregation(clip=1.0, threshold=2, noise_multiplier=1.0, delta=1e-3)):
        with pytest.raises(ValueError, match="hidden by"):
            each_round(sgd(), sites, strategy=strategy, aggregation=hidden)
    for topology in (Tree(regions={"a": ["site-0"], "b": ["site-1", "site-2"]}), Buffered(size=2)):
        for one in (strategy, FedNova()):
            with pytest.raises(ValueError, match="at one server"):
                each_round(sgd(), sites, strategy=one, topology=topology)


# FedNova


@pytest.mark.parametrize("strategy,changes,match", [
    (FedNova(), {"optimiser": trainer().optimiser}, "is another"),
    (FedNova(), {"optimiser": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.5, dampening=0.1),
                 "momentum": "restart"}, r"no dampening .* is SGD with \{'lr'"),
    (FedNova(), {"optimiser": lambda p, lr: torch.optim.SGD(p, lr, momentum=1.0), "momentum": "restart"},
     r"momentum below 1.* 'momentum': 1\.0"),
    (FedNova(momentum=0.0), {"optimiser": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)}, r"momentum 0\.9"),
    (FedNova(), {"optimiser": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)}, "momentum='restart'"),
    (FedNova(momentum=0.9), {}, r"momentum=0\.9\) is not for this run"),
    (FedNova(momentum=0.9), {"optimiser": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)}, "momentum='restart'"),
    (FedNova(momentum=0.9), {"optimiser": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9, nesterov=True),
                             "momentum": "restart"}, "no Nesterov")])
def test_fednova_refuses_optimisers_whose_path_it_does_not_know(strategy, changes, match):
    with pytest.raises(ValueError, match=match):
        each_round(sgd(**changes), blob_sites(), strategy=strategy)


def test_strategies_read_their_settings_from_the_run():
    """Number of sites, steps, learning rate and momentum: to the bit as where they are given."""
    heavy = {"optimiser": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), "momentum": "restart"}
    for given, read, changes in ((SCAFFOLD(sites=2, steps=STEPS, lr=LR), SCAFFOLD(), {}),
                                 (FedNova(momentum=0.0), FedNova(), {}),
                                 (FedNova(momentum=0.9), FedNova(), {"steps": None, "epochs": 2, **heavy})):
        ours, theirs = (federate(sgd(**changes), blob_sites((1, 2)), strategy=s, rounds=2, progress=False)
                        for s in (read, given))
        assert weights_sha256(ours.state.params) == weights_sha256(theirs.state.params)
    with pytest.raises(ValueError, match="not bound to a run"):
        SCAFFOLD()._travel(0)


def test_fednova_is_fedavg_with_equal_steps_only():
    for settings, same in (({"steps": 2}, True), ({"steps": None, "epochs": 1}, False)):
        nova, plain = (federate(sgd(**settings), blob_sites((1, 4)), strategy=s, rounds=1, progress=False).state.params
                       for s in (FedNova(), FedAvg()))
        assert (different(nova, plain) < 1e-6) is same


# Ditto


def test_ditto_trains_each_site_s_own_model_towards_the_global_one():
    sites, lam = blob_sites((1, 1)), 2.0
    strategy = Ditto(lam=lam)
    run = each_round(sgd(), sites, strategy=strategy, rounds=3)
    shared = trainer().initial()
    own = {site.name: shared for site in sites}
    for finished in run:
        for site in sites:
            own[site.name] = descend(own[site.name], site.train[0],
                                     lambda name, p, shared=shared: lam * (p - shared[name]))
            found = strategy.local(finished.state.params, finished.site_states[site.name])
            close(found, own[site.name])
            assert list(found) == list(finished.state.params)
        shared = finished.state.params
    assert different(own["site-0"], own["site-1"]) > 1e-3
    assert strategy.local(shared, SiteState()) == dict(shared)


@pytest.mark.parametrize("momentum", ["keep", "restart"])
def test_without_a_pull_ditto_is_training_alone_to_the_bit(momentum):
    sites = blob_sites((2, 3))
    history = federate(trainer(momentum=momentum), sites, strategy=Ditto(lam=0.0), rounds=3, progress=False)
    alone = local_only(trainer(momentum=momentum), sites, rounds=3, progress=False)
    for site in sites:
        own = Ditto(lam=0.0).local(history.state.params, history.site_states[site.name])
        assert weights_sha256(own) == weights_sha256(alone[site.name].state.params)


def test_a_strong_pull_holds_ditto_at_the_global_model():
    sites, strategy = blob_sites((1, 1)), Ditto(lam=1 / LR)  # each step ends at the target
    run = each_round(sgd(), sites, strategy=strategy, rounds=2)
    first = next(run)
    own = strategy.local(first.state.params, next(run).site_states["site-0"])
    step = gradient(first.state.params, sites[0].train[0])
    assert different(own, first.state.params) <= LR * max(float(g.abs().max()) for g in step.values()) * 1.5


def test_ditto_works_with_privacy_and_nothing_of_it_leaves():
    technique = DPSGD(clip=0.5, noise_multiplier=1.0, delta=1e-2, batch=1)
    runs = {}
    for strategy in (FedAvg(), Ditto(lam=0.5), Ditto(lam=0.0)):
        history = federate(sgd(), blob_sites((2, 2)), strategy=strategy, privacy=technique, rounds=1, progress=False)
        runs[repr(strategy)] = history
        assert bool(history.site_states["site-0"].of("strategy").own) is isinstance(strategy, Ditto)
    assert len({run.guarantee() for run in runs.values()}) == 1
    with pytest.raises(ValueError, match="without PersonalLayers"):
        each_round(trainer(), blob_sites(), strategy=Ditto(lam=1.0),
                   privacy=TopK(keep=0.5) + PersonalLayers(names=["last.*"]))


# FedBN


def test_fedbn_keeps_the_norms_at_the_sites():
    class Normed(TinyNet):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(2, 6)

        def forward(self, image):
            return self.last(torch.relu(self.norm(self.first(image))))

    model = Normed()
    assert norms(model) == ["norm.weight", "norm.bias"]
    history = federate(trainer(model=model), blob_sites(), privacy=PersonalLayers(names=norms(model)), rounds=2,
                       progress=False)
    assert history.state.params["norm.weight"].equal(torch.ones(6))
    kept = [history.site_states[f"site-{k}"].of("privacy").own["norm.weight"] for k in (0, 1)]
    assert not kept[0].equal(kept[1]) and not kept[0].equal(torch.ones(6))
    names = norms(segresnet())
    assert len(names) == 2 * sum("GroupNorm" in type(m).__name__ for m in segresnet().modules())
    assert set(names) < set(trainable(segresnet()))
    with pytest.raises(ValueError, match="no normalisation layer"):
        norms(TinyNet())


# A stopped run goes on to the same bits


RESUMED = [FedAvg(sample=0.7), FedProx(mu=0.1), Ditto(lam=0.5), FedNova(), SCAFFOLD(sites=5, steps=2, lr=LR),
           SCAFFOLD(sites=5, steps=2, lr=LR, sample=0.7), *(FedOpt(rule=rule, server_lr=0.05) for rule in
                                                            ("adam", "yogi", "adagrad", "momentum")),
           CoordinateMedian(), TrimmedMean(trim=0.2), Krum(attackers=1, chosen=2), GeometricMedian(),
           NormBound(bound=0.1)]


@pytest.mark.parametrize("strategy", RESUMED, ids=repr)
def test_a_run_stopped_after_two_rounds_goes_on_to_the_same_bits(strategy, tmp_path):
    sites = blob_sites((1, 2, 1, 1, 1))

    def run(rounds, **more):
        one = sgd(steps=2, crop=(8, 8, 8), momentum="restart" if isinstance(strategy, FedNova) else "keep")
        if not isinstance(strategy, SCAFFOLD | FedNova):
            one = trainer(steps=2, crop=(8, 8, 8), batch_size=1)
        history = federate(one, sites, strategy=strategy, rounds=rounds, progress=False, **more)
        groups = {f"{site}|{group}|{name}": t for site, state in history.site_states.items()
                  for group, slots in state.namespaces.items() for name, t in slots.items()}
        moments = {f"{group}|{name}": t for group, slots in history.state.moments.items() for name, t in slots.items()}
        return weights_sha256(history.state.params), weights_sha256(moments), weights_sha256(groups), groups

    whole = run(4)
    stopped = run(2, checkpoint=tmp_path / "run")
    resumed = run(4, checkpoint=tmp_path / "run")
    assert stopped[0] != whole[0]
    assert resumed[:3] == whole[:3]
    if isinstance(strategy, Ditto | SCAFFOLD):
        assert any("|strategy|" in key for key in whole[3])
