"""check_strategy() accepts the strategies of fedlab and names what is wrong with broken ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from fedlab.checks.strategy import check_strategy
from fedlab.core.types import Update
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
from trainers import trainer

NAMES = {"settings", "select", "shapes and dtypes", "purity", "determinism", "order", "one update", "weights",
         "uniform mean", "precision", "not finite", "no update", "fits the run", "state", "resume"}
GOOD = [
    FedAvg(), FedAvg(weights="uniform", sample=0.6, server_lr=0.5), FedAvg(weights="steps"), FedProx(mu=0.1),
    FedProx(mu=0.1, weights="uniform"), Ditto(lam=0.5), FedNova(), FedNova(weights="uniform"),
    SCAFFOLD(), SCAFFOLD(sites=4, steps=2, lr=0.1), SCAFFOLD(sites=5, steps=1, lr=0.1, sample=0.6),
    *(FedOpt(rule=rule, server_lr=0.1) for rule in ("adam", "yogi", "adagrad", "momentum")),
    FedOpt(rule="adam", server_lr=0.1, weights="uniform"), CoordinateMedian(), TrimmedMean(trim=0.2),
    Krum(attackers=1), Krum(attackers=3, chosen=4), GeometricMedian(), GeometricMedian(weights="uniform"),
    NormBound(bound=1.0), NormBound(bound=1.0, weights="uniform")]


@pytest.mark.parametrize("strategy", GOOD, ids=repr)
def test_strategies_of_fedlab_pass(strategy):
    report = check_strategy(strategy)
    assert report and report.warned == () and {finding.check for finding in report.findings} == NAMES


def test_one_that_is_for_another_optimiser_is_given_a_trainer():
    strategy = FedNova(momentum=0.9)
    assert check_strategy(strategy, raise_=False).failed == ("fits the run",)
    one = trainer(steps=2, crop=(8, 8, 8), momentum="restart",
                  optimiser=lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9))
    assert check_strategy(strategy, trainer=one)


# Each of these has one defect; the check that must name it stands beside it.


@dataclass(frozen=True, kw_only=True)
class Halves(FedAvg):
    """Forgets to divide."""

    def combine(self, updates):
        mean = super().combine(updates)
        return mean.map(lambda t: t * mean.weight)


@dataclass(frozen=True, kw_only=True)
class Float32(FedAvg):
    def combine(self, updates):
        collected = list(updates)
        total = sum(u.weight for u in collected)
        if not collected:
            raise ValueError("nothing")
        delta = {name: sum(u.delta[name].float() * (u.weight / total) for u in collected).double()
                 for name in collected[0].delta}
        if not all(torch.isfinite(t).all() for t in delta.values()):
            raise ValueError("not finite")
        return Update(site="mean", delta=delta, weight=total, steps=1)


@dataclass(frozen=True, kw_only=True)
class InPlace(FedAvg):
    def combine(self, updates):
        return super().combine(replace(u, delta={n: t.mul_(1.0 + 1e-3) for n, t in u.delta.items()}) for u in updates)


@dataclass(frozen=True, kw_only=True)
class StepsInPlace(FedAvg):
    def step(self, state, mean):
        for name, p in state.params.items():
            p.add_(mean.delta[name].to(p.dtype))
        return replace(super().step(state, mean), params=state.params)


@dataclass(frozen=True, kw_only=True)
class FirstOnly(FedAvg):
    def combine(self, updates):
        return weighted_mean(replace(u, weight=u.weight / (1 + k)) for k, u in enumerate(updates))


class Remembers(FedAvg):
    """Momentum kept in the strategy."""

    def step(self, state, mean):
        last = getattr(self, "last", None)
        object.__setattr__(self, "last", mean.delta)
        return super().step(state, mean if last is None else replace(
            mean, delta={name: t + 0.5 * last[name] for name, t in mean.delta.items()}))


class RemembersAtTheSite(FedAvg):
    """A count of rounds that a resumed run doesn't have."""

    def equip(self, kit, site, state, site_state):
        object.__setattr__(self, "rounds", getattr(self, "rounds", 0) + 1)
        for group in kit.optimiser.param_groups:
            group["lr"] /= self.rounds
        return kit


@dataclass(frozen=True, kw_only=True)
class HidesNaN(FedAvg):
    def combine(self, updates):
        return super().combine(u.map(torch.nan_to_num) for u in updates)


@dataclass(frozen=True, kw_only=True)
class Counts(FedAvg):
    """Says uniform, but believes the weights."""

    weights: str = "uniform"
    uniform_mean = True

    def combine(self, updates):
        return weighted_mean(updates)


@dataclass(frozen=True, kw_only=True)
class FalseMedian(FedAvg):
    """A median that claims to be a uniform mean."""

    weights: str = "uniform"
    uniform_mean = True

    def combine(self, updates):
        return CoordinateMedian().combine(updates)


@dataclass(frozen=True, kw_only=True)
class IgnoresWeights(FedAvg):
    def combine(self, updates):
        return weighted_mean(replace(u, weight=1.0) for u in updates)


@dataclass(frozen=True, kw_only=True)
class Draws(FedAvg):
    def combine(self, updates):
        return super().combine(updates).map(lambda t: t + 1e-12 * torch.randn_like(t))


@dataclass(frozen=True, kw_only=True)
class DropsATensor(FedAvg):
    def combine(self, updates):
        mean = super().combine(updates)
        return replace(mean, delta=dict(list(mean.delta.items())[1:]))


@dataclass(frozen=True, kw_only=True)
class WidensTheModel(FedAvg):
    def step(self, state, mean):
        after = super().step(state, mean)
        return replace(after, params={name: p.double() for name, p in after.params.items()})


@dataclass(frozen=True, kw_only=True)
class ForgetsTheRound(FedAvg):
    def step(self, state, mean):
        return replace(super().step(state, mean), round=state.round)


@dataclass(frozen=True, kw_only=True)
class PicksItself(FedAvg):
    def select(self, sites, rng):
        return sites[:2]


@dataclass(frozen=True, kw_only=True)
class WritesForOthers(FedAvg):
    def remember(self, trainer, site, state, update, site_state, seed):
        site_state.of("another").own["x"] = torch.ones(1)


@dataclass(frozen=True, kw_only=True)
class EmptyMean(FedAvg):
    def combine(self, updates):
        collected = list(updates)
        return super().combine(collected) if collected else Update(site="mean", delta={}, weight=1.0)


class HidesASetting(FedAvg):
    def __init__(self, *, secret):
        super().__init__()


@pytest.mark.parametrize("strategy,check", [
    (Halves(), "one update"), (Float32(), "precision"), (InPlace(), "purity"), (StepsInPlace(), "purity"),
    (FirstOnly(), "order"), (Remembers(), "purity"), (RemembersAtTheSite(), "resume"), (HidesNaN(), "not finite"),
    (Counts(), "weights"), (Counts(), "uniform mean"), (FalseMedian(), "uniform mean"), (IgnoresWeights(), "weights"),
    (Draws(), "determinism"), (DropsATensor(), "fits the run"), (WidensTheModel(), "shapes and dtypes"),
    (ForgetsTheRound(), "shapes and dtypes"), (PicksItself(), "select"), (WritesForOthers(), "state"),
    (EmptyMean(), "no update"), (HidesASetting(secret=3), "settings")], ids=lambda v: str(v).partition("(")[0])
def test_a_defect_is_named(strategy, check):
    report = check_strategy(strategy, raise_=False)
    assert check in report.failed, str(report)
    assert all(finding.remedy for finding in report.findings if finding.outcome != "passed")
    with pytest.raises(ValueError, match=check):
        check_strategy(strategy)


def test_weights_without_a_word_are_a_warning():
    class Bare:
        """A strategy that inherits nothing."""

        sample = 1.0

        def __init__(self):
            self._plain = FedAvg()

        def __repr__(self):
            return "Bare()"

        def bind(self, run):
            return self

        def combine(self, updates):
            return weighted_mean(updates)

        def __getattr__(self, name):
            if name in ("weights", "uniform_mean", "one_server") or name.startswith("__"):
                raise AttributeError(name)
            return getattr(FedAvg(), name)

    report = check_strategy(Bare())
    assert report and report.warned == ("weights",)


@pytest.mark.parametrize("wrong", [FedAvg, None, "FedAvg"])
def test_what_is_no_strategy_is_refused(wrong):
    with pytest.raises(ValueError, match="inherit from FedAvg"):
        check_strategy(wrong)
