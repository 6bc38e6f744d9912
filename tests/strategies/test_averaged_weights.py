"""The moving mean of the weights is the one worked out from the rounds of a run without it."""

from __future__ import annotations

import copy
import pickle

import networkx
import pytest
import torch

from cohorts import blob_sites
from fedlab.checks.strategy import check_strategy
from fedlab.core.types import Update
from fedlab.core.weights import trainable
from fedlab.evidence.arms import Arm
from fedlab.privacy.dp.site_level import CentralGaussian
from fedlab.run.baselines import centralised
from fedlab.run.federate import each_round, federate
from fedlab.strategies import SCAFFOLD, AveragedWeights, FedAvg, FedOpt, Krum
from fedlab.topologies import Gossip
from fedlab.training.trainer import SiteTrainer
from trainers import plain_sgd, trainer

MOMENTUM = FedOpt(rule="momentum", server_lr=0.7, beta1=0.3)


def weights(state) -> torch.Tensor:
    return torch.cat([t.double().flatten() for t in state.params.values()])


@pytest.mark.parametrize("inner", [FedAvg(weights="uniform", sample=0.7), MOMENTUM], ids=repr)
@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_training_is_unchanged_and_the_mean_is_that_of_its_rounds(inner, decay, one_thread):
    at, strategy = trainer(steps=1), AveragedWeights(decay=decay, strategy=inner)
    plain = [weights(r.state) for r in each_round(at, blob_sites((3, 2, 1)), strategy=inner, rounds=4, seed=3)]
    states = [r.state for r in each_round(at, blob_sites((3, 2, 1)), rounds=4, seed=3, strategy=strategy)]
    assert all(torch.equal(a, weights(b)) for a, b in zip(plain, states, strict=True))
    assert len({tuple(w.tolist()) for w in plain}) == 4
    shares = torch.tensor([decay**3, decay**2, decay, 1], dtype=torch.float64)
    expected = (torch.stack(plain) * shares[:, None]).sum(0) / shares.sum()
    torch.testing.assert_close(weights(strategy.averaged(states[-1])), expected, rtol=1e-6, atol=1e-7)
    assert states[-1].round == strategy.averaged(states[-1]).round == 4


def test_the_mean_by_hand():
    strategy = AveragedWeights(decay=0.5)
    state = strategy.begin({"w": torch.tensor([1.0, -1.0]), "v": torch.tensor([[8.0]])})
    for w, v in (([1.0, 0.0], 1.0), ([2.0, 1.0], 1.0)):
        mean = Update(site="mean", weight=1.0, delta={"w": torch.tensor(w), "v": torch.tensor([[v]])})
        state = strategy.step(state, mean)
    averaged = strategy.averaged(state)  # of (2, -1), 9 and (4, 0), 10 in shares of 1 and 2 thirds
    torch.testing.assert_close(averaged.params["w"], torch.tensor([10 / 3, -1 / 3]))
    torch.testing.assert_close(averaged.params["v"], torch.tensor([[29 / 3]]))
    assert averaged.params["w"].dtype == torch.float32
    assert state.params["w"].tolist() == [4.0, 0.0]


@pytest.mark.parametrize("data", ["sites", "pooled", "each"])
def test_an_arm_is_scored_with_the_mean(data):
    strategy, sites = AveragedWeights(decay=0.5), blob_sites((2,))
    arm = Arm(trainer=trainer(steps=1), rounds=3, data=data, strategy=strategy)
    expected = federate(trainer(steps=1), sites, strategy=strategy, rounds=3, progress=False).state
    if data == "pooled":
        expected = centralised(trainer(steps=1), sites, strategy=strategy, rounds=3, progress=False).state
    history = arm.train(sites)
    assert torch.equal(weights(history.state), weights(strategy.averaged(expected)))
    loaded = trainable(arm.trainer.model)
    assert all(torch.equal(loaded[name], p) for name, p in history.state.params.items())


def test_it_asks_what_its_strategy_asks():
    sgd = SiteTrainer(model=trainer().model, steps=2, crop=(8, 8, 8), lr=0.01, optimiser=plain_sgd)
    with pytest.raises(ValueError, match="peers have no server"):
        federate(sgd, blob_sites(), strategy=AveragedWeights(decay=0.9, strategy=SCAFFOLD()), rounds=1,
                 topology=Gossip(graph=networkx.path_graph(2)))
    with pytest.raises(ValueError, match="uniform"):
        next(each_round(trainer(), blob_sites((2, 2)), privacy=CentralGaussian(clip=1.0, noise_multiplier=1.0),
                        strategy=AveragedWeights(decay=0.9, strategy=Krum(attackers=0)), rounds=1))
    bound = next(each_round(trainer(steps=1), blob_sites((2, 2)), rounds=1,
                            privacy=CentralGaussian(clip=1.0, noise_multiplier=1.0),
                            strategy=AveragedWeights(decay=0.9, strategy=FedAvg(weights="uniform"))))
    assert bound.spent["server"][0].epsilon > 0


@pytest.mark.parametrize("decay", [0, 1, -0.5, 1.5, float("nan"), "0.9"])
def test_wrong_settings_are_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        AveragedWeights(decay=decay)


def test_a_state_without_a_mean_is_refused():
    strategy = AveragedWeights(decay=0.9)
    with pytest.raises(ValueError, match="at least one round"):
        strategy.averaged(strategy.begin({"w": torch.zeros(2)}))


@pytest.mark.parametrize("inner", [FedAvg(), MOMENTUM], ids=repr)
def test_check_strategy_finds_nothing(inner):
    assert check_strategy(AveragedWeights(decay=0.9, strategy=inner))


def test_it_is_printed_as_the_code_that_makes_it_and_copied():
    strategy = AveragedWeights(decay=0.9, strategy=MOMENTUM)
    assert eval(repr(strategy)) == strategy == copy.deepcopy(strategy) == pickle.loads(pickle.dumps(strategy))
