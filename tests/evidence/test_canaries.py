"""Audits stay below the claims of right techniques, refute those of wrong ones, and give the published bounds."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlab.checks.privacy import check_privacy
from fedlab.core.seeds import generator
from fedlab.evidence.audits import (
    alone_refuted,
    best_accuracy,
    epsilon_in_one_run,
    guesses_alone,
    louder,
    make_guesses,
    refuted,
    trade_off,
)
from fedlab.evidence.canaries import CanaryAudit
from fedlab.privacy.accounting.ledger import Ledger
from fedlab.privacy.accounting.mechanisms import Concentrated, Gaussian, Pure, epsilon_of
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import TopK
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.privacy.secure_aggregation.secure_sum import SecureAggregation
from fedlab.privacy.sparse.partial_sharing import SparseVector


class QuietDPSGD(DPSGD):
    """Noise three times too small."""

    @property
    def noise_on_gradients(self):
        return super().noise_on_gradients / 3


class QuietLocal(LocalGaussian):
    """Noise three times too small."""

    def protect(self, update, state, rng):
        Ledger(state).charge(self._release, terms=self._terms)
        norm = max(update.norm() / self.clip, 1.0)
        std = self.noise_multiplier * self.clip / 3
        return update.map(lambda t: t / norm + std * torch.randn(t.shape, generator=rng))


class QuietCentral(CentralGaussian):
    """Noise three times too small."""

    @property
    def noise_on_updates(self):
        return super().noise_on_updates / 3


class LastTensorUnclipped(LocalGaussian):
    """Forgets to clip one tensor."""

    def protect(self, update, state, rng):
        name = list(update.delta)[-1]
        sent = super().protect(replace(update, delta={**update.delta, name: 0 * update.delta[name]}), state, rng)
        return replace(sent, delta={**sent.delta, name: sent.delta[name] + update.delta[name]})


class LastTensorOfPatientUnclipped(DPSGD):
    """Forgets to clip one tensor."""

    def equip(self, kit, site, state):
        kit = super().equip(kit, site, state)
        backward, last = kit.backward, list(kit.model.parameters())[-1]

        def unclipped(kit, image, target):
            loss = backward(kit, image, target)
            for one, label in zip(image, target, strict=True):
                last.summed_grad += torch.autograd.grad(kit.loss(one, label), last)[0]
            return loss
        return replace(kit, backward=unclipped)


class TakesEveryone(DPSGD):
    """Draws nobody: each patient takes part in each step, and the sampling is credited."""

    def equip(self, kit, site, state):
        kit = super().equip(kit, site, state)
        kit.loader._taken = lambda: range(len(kit.patients))
        return kit


class Shuffled(DPSGD):
    """Shuffled batches of one size, charged as if each patient were drawn independently."""

    def equip(self, kit, site, state):
        kit = super().equip(kit, site, state)
        size = max(1, round(kit.loader.sample_rate * len(kit.patients)))
        order = torch.randperm(len(kit.patients), generator=generator(0, str(kit.seed))).tolist()
        starts = iter(range(0, 10**6, size))

        def taken():
            start = next(starts)
            return [order[(start + k) % len(order)] for k in range(size)]
        kit.loader._taken = taken
        return kit


RIGHT = [DPSGD(clip=1.0, noise_multiplier=1.0, sample_rate=1.0, accountant="gdp"),
         DPSGD(clip=0.5, noise_multiplier=0.8, sample_rate=0.5, per_layer=True),
         LocalGaussian(clip=1.0, noise_multiplier=2.0, accountant="gdp"),
         CentralGaussian(clip=2.0, noise_multiplier=0.7, delta=1e-3),
         SparseVector(epsilon=2.0, fraction=0.1)]


@pytest.mark.parametrize("technique", RIGHT, ids=lambda technique: type(technique).__name__)
def test_twenty_audits_of_a_right_technique_stay_below_its_claim(technique):
    audits = [CanaryAudit(canaries=60, seed=seed)(technique) for seed in range(20)]
    assert sum(audit.finding.low > audit.claimed.epsilon or audit.refuted for audit in audits) <= 1
    assert all("in agreement with the claim" in audit.verdict for audit in audits if not audit.refuted)


@pytest.mark.parametrize("technique, part", [(RIGHT[0], 0.4), (RIGHT[2], 0.3), (RIGHT[3], 0.3)])
def test_an_audit_shows_a_good_part_of_the_claim(technique, part):
    """The positive control: an audit that shows nothing would pass every other test."""
    audit = CanaryAudit(canaries=600)(technique)
    assert part * audit.claimed.epsilon < audit.finding.low <= audit.finding.value
    assert 1 < audit.noise < 2.5 and audit.finding.is_clear


def test_under_strong_noise_canaries_are_not_seen():
    audit = CanaryAudit(canaries=200)(LocalGaussian(clip=1.0, noise_multiplier=100.0))
    assert audit.finding.low < 0.05 and not audit.refuted


@pytest.mark.parametrize("kind", [QuietDPSGD, QuietLocal, QuietCentral])
@pytest.mark.parametrize("noise_multiplier", [1.5, 4.0])
def test_noise_three_times_too_small_is_shown(kind, noise_multiplier):
    rate = {"sample_rate": 1.0} if issubclass(kind, DPSGD) else {}
    technique = kind(clip=1.0, noise_multiplier=noise_multiplier, delta=1e-4, **rate)
    audit = CanaryAudit(canaries=800 if rate else 500)(technique)
    assert audit.refuted and audit.finding.low > audit.claimed.epsilon
    assert 1 / 3 <= audit.noise < 0.9 and "REFUTED" in str(audit) and "REFUTED" in audit._repr_html_()


@pytest.mark.parametrize("technique", [LastTensorUnclipped(clip=1.0, noise_multiplier=4.0),
                                       LastTensorOfPatientUnclipped(clip=1.0, noise_multiplier=3.0, sample_rate=1.0),
                                       TakesEveryone(clip=1.0, noise_multiplier=2.0, sample_rate=0.1)],
                         ids=lambda technique: type(technique).__name__)
def test_a_tensor_that_is_not_clipped_and_sampling_that_does_not_happen_are_shown(technique):
    audit = CanaryAudit(canaries=600)(technique)
    assert audit.refuted and audit.finding.low > audit.claimed.epsilon


def test_batches_that_are_shuffled_instead_of_drawn_are_shown():
    """By `check_privacy`: one patient takes part as often as charged, which no output of a round tells."""
    report = check_privacy(Shuffled(clip=1.0, noise_multiplier=1.0, sample_rate=0.25, delta=1e-3), raise_=False)
    assert report.failed == ("draws",)


def test_without_a_claim_the_bound_is_that_for_any_mechanism():
    audit = CanaryAudit(canaries=200)(Privacy())
    assert audit.claimed is None and math.isnan(audit.noise) and not audit.refuted
    # All 160 guesses are right, with a probability of 0.05 if one is right with 0.05^(1/160).
    accuracy = 0.05**(1 / 160)
    assert audit.finding.low == pytest.approx(math.log((accuracy - 1e-5) / (1 - accuracy)), abs=2e-3)
    assert audit.finding.low == audit.most == audit.any_mechanism and "no ε is claimed" in str(audit)
    assert CanaryAudit(canaries=200)(TopK(keep=0.5)).finding.low == audit.finding.low


def test_settings_of_the_audit_and_what_it_refuses():
    batch = CanaryAudit(canaries=50, patients=10)(DPSGD(clip=1.0, noise_multiplier=1.0, batch=5, max_epsilon=0.1))
    assert batch.claimed.epsilon == pytest.approx(epsilon_of([Gaussian(noise_multiplier=1.0, sample_rate=0.5)],
                                                             delta=1e-5))  # five of ten patients, no budget
    fewer = CanaryAudit(canaries=1000)(CentralGaussian(clip=1.0, noise_multiplier=1.0, delta=0.02))
    assert fewer.finding.trials == 49  # δ is below 1 over the number of sites
    both = DPSGD(clip=1.0, noise_multiplier=1.0, sample_rate=1.0) + LocalGaussian(clip=1.0, noise_multiplier=1.0)
    assert CanaryAudit(canaries=20)(both).claimed.unit == "patient"
    assert CanaryAudit(canaries=20)(both, unit="site").claimed.unit == "site"
    with pytest.raises(ValueError, match="no guarantee per patient"):
        CanaryAudit()(LocalGaussian(clip=1.0, noise_multiplier=1.0), unit="patient")
    with pytest.raises(ValueError, match="audit a privacy technique"):
        CanaryAudit()(SecureAggregation(threshold=2))
    with pytest.raises(ValueError, match="canaries is a whole number of at least 10"):
        CanaryAudit(canaries=1)


def test_several_rounds_are_audited_against_what_they_cost_together():
    audit = CanaryAudit(canaries=200, rounds=3)(LocalGaussian(clip=1.0, noise_multiplier=4.0, accountant="gdp"))
    assert audit.claimed.epsilon == pytest.approx(epsilon_of([Gaussian(noise_multiplier=2.0, steps=3)], delta=1e-5,
                                                             accountant="gdp"))
    assert not audit.refuted and audit.finding.low > 0


# Of jax-privacy 2.0.0: auditing._epsilon_one_run and _epsilon_one_run_fdp at significance 0.05.
PUBLISHED = [(1000, 1000, 1000, 1e-5, 5.78228, 12.33457), (1000, 100, 95, 1e-5, 2.16518, 3.3233),
             (1000, 300, 250, 1e-5, 1.347, 2.23566), (200, 60, 60, 1e-3, 2.29874, 4.10174),
             (1000, 500, 300, 1e-2, 0.0, 0.13372), (100, 20, 20, 1e-5, 1.8196, 3.23939)]


@pytest.mark.parametrize("canaries, made, right, delta, one_run, gaussian", PUBLISHED)
def test_the_bounds_are_those_of_jax_privacy(canaries, made, right, delta, one_run, gaussian):
    assert epsilon_in_one_run((made, right), canaries=canaries, delta=delta) == pytest.approx(one_run, abs=1e-4)

    def shown(epsilon_over):
        mu = math.sqrt(epsilon_over)
        return refuted(trade_off([Gaussian(noise_multiplier=1 / mu)]), (made, right), canaries=canaries)

    low, high = 1e-8, 1e3  # of μ²
    for _ in range(45):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if shown(middle) else (low, middle)
    found = epsilon_of([Gaussian(noise_multiplier=1 / math.sqrt(low))], delta=delta, accountant="gdp")
    assert found == pytest.approx(gaussian, abs=2e-4)


def test_trade_off_functions_lie_below_the_truth_and_close_to_it():
    exact = trade_off([Gaussian(noise_multiplier=1.0, steps=2)])
    assert exact(0.5) == pytest.approx(0.5 * math.erfc(1.0))  # Φ(−√2)
    by_divergences = trade_off([Concentrated(rho=1.0)])  # the same Rényi divergences
    for p in (0.01, 0.2, 0.5, 0.9, 0.999):
        assert 0 <= by_divergences(p) <= exact(p) <= p
    assert by_divergences(0.9) > 0.15 and by_divergences(0.0) == 0 and by_divergences(1.0) == 1
    assert trade_off([Pure(epsilon=3.0)])(0.5) == pytest.approx(0.5 * math.exp(-3.0))
    assert trade_off([Pure(epsilon=0.3, times=2)])(0.5) >= 0.5 * math.exp(-0.6)
    # Sampling: a record is in with probability q, and then the noise hides it no worse than without sampling.
    sampled = trade_off([Gaussian(noise_multiplier=1.0, sample_rate=0.1)])
    assert exact(0.5) < sampled(0.5) < 0.5


def test_the_best_accuracy_by_hand():
    assert best_accuracy(trade_off([Gaussian(noise_multiplier=0.5)])) == pytest.approx(0.5 * math.erfc(-1 / 2**0.5))
    assert best_accuracy(trade_off([Pure(epsilon=6.0)])) == pytest.approx(1 / (1 + math.exp(-6.0)), rel=1e-4)
    assert alone_refuted(0.5, (5, 5)) and not alone_refuted(0.5, (4, 4))  # 1/32 and 1/16
    assert guesses_alone(np.array([2.0, 0, 2, 0, 2, 0, 2, 0, 1.5, 2]), np.array([1, 0, 1, 0, 1, 0, 1, 0, 1, 0]) == 1
                         ) == (8, 6)  # the threshold of the first two is 2


def test_a_claim_beyond_what_canaries_can_show_is_said_to_be():
    audit = CanaryAudit(canaries=50)(QuietDPSGD(clip=1.0, noise_multiplier=0.3, sample_rate=1.0))
    assert not audit.refuted and audit.finding.low <= audit.most < audit.claimed.epsilon
    assert f"50 canaries show at most ε = {audit.most:.2f}" in audit.verdict


def test_louder_releases_have_less_noise():
    assert louder([Gaussian(noise_multiplier=3.0, steps=2), Pure(epsilon=1.0), Concentrated(rho=1.0)], 2.0) == [
        Gaussian(noise_multiplier=1.5, steps=2), Pure(epsilon=2.0), Concentrated(rho=4.0)]


def test_guesses_by_hand():
    scores = np.array([4.0, 3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0])
    present = np.array([True, True, False, True, False, True, False, False])
    # All: 3 of the upper 4 and 3 of the lower 4; one at each end; the upper two; none of a tenth or a thirtieth.
    assert make_guesses(scores, present) == [(8, 6), (2, 2), (2, 2)]


@pytest.mark.parametrize("wrong", [dict(guesses=(5, 6)), dict(guesses=(11, 1)), dict(guesses=(5, 5), level=0.0),
                                   dict(guesses=(5, 5), delta=1.0)])
def test_numbers_that_contradict_each_other_are_refused(wrong):
    with pytest.raises(ValueError):
        epsilon_in_one_run(**({"canaries": 10, "delta": 1e-5} | wrong))
