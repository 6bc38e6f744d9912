"""What an optimiser keeps between rounds: one run of six rounds of one step is one round of six steps."""

from __future__ import annotations

import pytest
import torch

from cohorts import TinyNet, blob_sites
from fedlab.core.errors import SiteError
from fedlab.run.federate import federate
from fedlab.strategies import Ditto
from trainers import trainer

O = torch.optim  # noqa: E741


class Warmup(O.SGD):
    """Counts its steps in its groups, as Prodigy ("k", "d") and schedule-free optimisers ("k", "weight_sum") do."""

    def __init__(self, params, lr):
        super().__init__(params, lr=lr, momentum=0.9)
        for group in self.param_groups:
            group.update(k=0, scale=1.0, warm=True)

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["scale"] *= 0.9
            group["warm"] = group["k"] < 2
            group["lr"] = (0.02 if group["warm"] else 0.05) * group["scale"]
            assert type(group["k"]) is int and type(group["warm"]) is bool
        return super().step(closure)


class Decaying(O.SGD):
    """Changes the learning rate itself."""

    def step(self, closure=None):
        out = super().step(closure)
        for group in self.param_groups:
            group["lr"] *= 0.5
        return out


class WholeSteps(O.Optimizer):
    """Keeps its step as a Python number, as many published optimisers do."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("step", 0)
                state.setdefault("rate", 0.1)
                state["step"] += 1
                state["rate"] *= 0.9
                assert isinstance(state["step"], int) and isinstance(state["rate"], float)
                p.add_(p.grad, alpha=-group["lr"] * state["rate"] * (state["step"] % 2))


class Lists(WholeSteps):
    """Keeps a list."""

    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["history"] = [None] * 3


class Texts(Warmup):
    """Keeps a text in its groups."""

    def step(self, closure=None):
        super().step(closure)
        self.param_groups[0]["phase"] = f"after {self.param_groups[0]['k']}"


class Elsewhere(WholeSteps):
    """Keeps a state that belongs to no weight."""

    def step(self, closure=None):
        super().step(closure)
        self.state["all"]["count"] = 1


def two_groups(parameters, lr):
    parameters = list(parameters)
    return O.AdamW([{"params": parameters[:2], "lr": 1e-3}, {"params": parameters[2:]}], lr=lr)


OPTIMISERS = {
    "AdamW": O.AdamW, "Adam, amsgrad": lambda p, lr: O.Adam(p, lr=lr, amsgrad=True), "NAdam": O.NAdam, "RAdam": O.RAdam,
    "SGD, Nesterov": lambda p, lr: O.SGD(p, lr=lr, momentum=0.9, nesterov=True), "Adagrad": O.Adagrad, "Rprop": O.Rprop,
    "RMSprop": lambda p, lr: O.RMSprop(p, lr=1e-3, centered=True, momentum=0.9), "ASGD": O.ASGD, "Adamax": O.Adamax,
    "Adafactor": O.Adafactor, "Adadelta": lambda p, lr: O.Adadelta(p), "two groups": two_groups, "Warmup": Warmup,
    "Decaying": Decaying, "WholeSteps": WholeSteps,
}


def weights(optimiser, *, rounds, steps, strategy=None, **settings):
    one = trainer(optimiser=optimiser, steps=steps, batch_size=1, **settings)
    history = federate(one, blob_sites((1,)), rounds=rounds, strategy=strategy, progress=False)
    return history.state.params, history.site_states["site-0"].of("optimiser").own


@pytest.mark.parametrize("name", OPTIMISERS)
def test_moments_go_on_from_round_to_round(name):
    split, own = weights(OPTIMISERS[name], rounds=6, steps=1)
    whole, _ = weights(OPTIMISERS[name], rounds=1, steps=6)
    for key, p in whole.items():
        torch.testing.assert_close(split[key], p, rtol=1e-5, atol=1e-6)
    assert not whole["last.bias"].equal(TinyNet().last.bias)
    assert all(isinstance(t, torch.Tensor) for t in own.values())


def test_only_what_an_optimiser_changes_in_its_groups_is_kept():
    assert not any("group" in key for key in weights(two_groups, rounds=2, steps=1)[1])
    kept = weights(Warmup, rounds=2, steps=1)[1]
    assert {key: kept[key].item() for key in kept if "group" in key and "lr" not in key} == {
        "number|group 0|k": 2, "number|group 0|scale": pytest.approx(0.81), "number|group 0|warm": False}


def test_a_schedule_of_the_trainer_sets_the_learning_rate_anew():
    _, own = weights(Decaying, rounds=2, steps=1, lr=lambda round: 0.1 / (1 + round))
    assert not any(key.endswith("|lr") for key in own)


@pytest.mark.parametrize("optimiser, says", [
    (Lists, r"Lists keeps a list \(first.weight, history\)"), (Texts, r"Texts keeps a str \(group 0, phase\)"),
    (Elsewhere, r"Elsewhere keeps a \w+ \(all\)"),
])
def test_what_cannot_be_kept_is_refused_by_name(optimiser, says):
    with pytest.raises(SiteError, match=rf"{says}[\s\S]*momentum='restart'"):
        weights(optimiser, rounds=1, steps=1)
    weights(optimiser, rounds=2, steps=1, momentum="restart")


def test_dittos_own_optimiser_counts_for_itself():
    _, own = weights(Warmup, rounds=2, steps=1, strategy=Ditto(lam=0.1))
    assert own["number|group 0|k"].item() == 2


def test_fused_optimisers_go_on_where_the_step_is():
    split, _ = weights(lambda p, lr: O.AdamW(p, lr=lr, fused=True), rounds=4, steps=1)
    whole, _ = weights(lambda p, lr: O.AdamW(p, lr=lr, fused=True), rounds=1, steps=4)
    for key, p in whole.items():
        torch.testing.assert_close(split[key], p, rtol=1e-5, atol=1e-6)


def test_an_optimiser_that_evaluates_the_loss_itself_is_refused_before_it_steps():
    with pytest.raises(SiteError, match="LBFGS evaluates the loss several times per step"):
        weights(O.LBFGS, rounds=1, steps=1)
