"""Attacks on membership find members of a model that has learnt by heart, and nothing under strong noise."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlab.core.types import Patient, Site, SiteState, Update
from fedlab.evidence.intervals import area_under_roc, mean_interval, share_interval, true_positives
from fedlab.evidence.inversion import patch_net
from fedlab.evidence.membership import RMIA, LossThreshold, RoundMembership, UpdateMembership, shadow_models
from fedlab.privacy.accounting.ledger import Ledger
from fedlab.privacy.dp.site_level import LocalGaussian
from fedlab.run.federate import federate
from fedlab.training.trainer import SiteTrainer


def random_patient(name: str, seed: int) -> Patient:
    """Noise with labels that only learning by heart can tell."""
    rng = torch.Generator().manual_seed(seed)
    label = torch.tensor([0, 1, 2, 4], dtype=torch.uint8)[torch.randint(4, (8, 8, 8), generator=rng)]
    return Patient(name, torch.randn(4, 8, 8, 8, generator=rng), label, np.eye(4))


def patients(first: int, count: int) -> list[Patient]:
    return [random_patient(f"p{k}", k) for k in range(first, first + count)]


MEMBERS, OTHERS, AUXILIARY = patients(0, 10), patients(100, 20), patients(200, 50)


def make_trainer() -> SiteTrainer:
    return SiteTrainer(model=patch_net(width=24), lr=5e-3, epochs=60, batch_size=5, crop=(8, 8, 8), augment=None,
                       precision="fp32")


@pytest.fixture(scope="module")
def trained():
    """A model before and after it has learnt ten patients by heart, and the update between."""
    trainer = make_trainer()
    before = copy.deepcopy(trainer.model)
    state = federate(trainer, [Site("site", MEMBERS)], rounds=1, progress=False).state
    return before, trainer.model, {name: t - trainer.initial()[name] for name, t in state.params.items()}


def test_members_of_a_final_model_are_found(trained):
    found = LossThreshold()(trained[1], members=MEMBERS, others=OTHERS)
    assert found.auc.value > 0.95 and found.auc.low > 0.6 and found.auc.is_clear
    assert found.tpr.low > found.tpr.chance == 1 / 21
    assert found.auc.attack == "LossThreshold(loss=None)" and found.auc.trials == 30 and found.tpr.trials == 10
    assert "n = 30" in str(found) and "0 of 20" in found._repr_html_()


@pytest.mark.parametrize("score", ["drop", "alignment"])
def test_members_are_found_in_the_update_of_a_site(trained, score):
    before, _, delta = trained
    found = UpdateMembership(score=score)(before, delta, members=MEMBERS, others=OTHERS)
    assert found.auc.value > 0.8 and found.auc.low > 0.5
    with pytest.raises(ValueError, match="do not fit the model"):
        UpdateMembership()(patch_net(width=4), delta, members=MEMBERS, others=OTHERS)


def test_members_are_found_with_shadow_models(trained):
    trainer = make_trainer()
    start = trainer.initial()
    shadows = shadow_models(trainer, AUXILIARY[:20], count=2)
    assert all(torch.equal(p, start[name]) for name, p in trainer.model.named_parameters())
    assert not torch.equal(shadows[0][0].weight, shadows[1][0].weight)
    found = RMIA()(trained[1], members=MEMBERS, others=OTHERS, shadows=shadows, population=AUXILIARY[20:])
    assert found.auc.value > 0.9 and found.auc.low > 0.5
    with pytest.raises(ValueError, match="reference models"):
        RMIA()(trained[1], members=MEMBERS, others=OTHERS, shadows=[], population=AUXILIARY)


def test_under_strong_noise_nothing_is_found(trained):
    before, _, delta = trained
    state = SiteState()
    Ledger.open(state, site="site", round=0, stream="0")
    update = Update(site="site", delta=delta, weight=1.0)
    sent = LocalGaussian(clip=update.norm(), noise_multiplier=1.0).protect(
        update, state, torch.Generator().manual_seed(0))
    noisy = copy.deepcopy(before)
    with torch.no_grad():
        for name, p in noisy.named_parameters():
            p += sent.delta[name]
    for found in (LossThreshold()(noisy, members=MEMBERS, others=OTHERS),
                  UpdateMembership()(before, sent.delta, members=MEMBERS, others=OTHERS),
                  UpdateMembership(score="alignment")(before, sent.delta, members=MEMBERS, others=OTHERS)):
        assert not found.auc.is_clear and found.tpr.low <= found.tpr.chance


def test_the_model_is_left_as_it_was(trained):
    model = trained[1].train()
    model.zero_grad()
    before = copy.deepcopy(model.state_dict())
    LossThreshold()(model, members=MEMBERS[:1], others=OTHERS[:1])
    UpdateMembership(score="alignment")(model, trained[2], members=MEMBERS[:1], others=OTHERS[:1])
    assert model.training and all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_bad_groups_are_refused(trained):
    with pytest.raises(ValueError, match="got none"):
        LossThreshold()(trained[1], members=[], others=OTHERS)
    with pytest.raises(ValueError, match="p0 has no label"):
        LossThreshold()(trained[1], members=[replace(MEMBERS[0], label=None)], others=OTHERS)
    with pytest.raises(ValueError, match="score is one of"):
        UpdateMembership(score="guess")


def test_the_area_and_its_interval_by_hand():
    # 3 × 2 pairs: 5 above, 1 tie → 5.5 / 6.
    value, low, high = area_under_roc(np.array([3.0, 2.0, 1.0]), np.array([0.0, 1.0]))
    assert value == pytest.approx(5.5 / 6) and low < value < high
    # At the lower limit θ the score equation holds: (value − θ)² = 1.96² V(θ), N* = 1.5 (Newcombe 2006, method 5).
    variance = low * (1 - low) / 6 * (1 + 1.5 * ((1 - low) / (2 - low) + low / (1 + low)))
    assert value - low == pytest.approx(1.959964 * variance**0.5, rel=1e-5)
    assert area_under_roc(np.ones(20), np.zeros(20))[1:] == (pytest.approx(0.87, abs=0.03), 1.0)


def test_the_attack_on_a_round_takes_as_many_members_as_others_from_the_sites_in_turn(trained):
    before, _, delta = trained
    healthy = replace(MEMBERS[0], id="healthy", label=torch.zeros(8, 8, 8, dtype=torch.uint8))
    sites = [Site("a", [healthy, *MEMBERS[:6]], OTHERS[:3]), Site("b", MEMBERS[6:], OTHERS[3:4]),
             Site("c", MEMBERS[:1])]
    found = RoundMembership(sites=sites, patients=3, crop=32)(before, delta)  # a cube of the whole scan of 8 voxels
    by_hand = UpdateMembership(score="alignment")(before, delta, members=[MEMBERS[0], MEMBERS[6], MEMBERS[0]],
                                                  others=[OTHERS[0], OTHERS[3], OTHERS[1]]).auc
    assert (found.value, found.low, found.high, found.trials) == (by_hand.value, by_hand.low, by_hand.high, 6)
    assert found.threat.who == "site" and "RoundMembership(sites=<a, b, c>" in found.attack
    assert RoundMembership(sites=sites, crop=8)(before, delta).trials == 8  # four are held out
    learnt = RoundMembership(sites=[Site("all", MEMBERS, OTHERS)], patients=10)(before, delta)
    assert learnt.is_clear and learnt.value > 0.5 and learnt.trials == 20


@pytest.mark.parametrize("wrong, message", [
    (dict(sites=[Site("a", MEMBERS)]), "held_out="), (dict(sites=[]), "held_out="),
    (dict(sites=[Site("a", [], OTHERS)]), "held_out="),
    (dict(sites=[Site("a", MEMBERS, [replace(OTHERS[0], label=None)])]), "held_out="),
    (dict(sites=[Site("a", MEMBERS, OTHERS)], every=0), "every is"), (dict(sites=[], patients=-1), "patients is"),
])
def test_an_attack_on_rounds_needs_both_groups(wrong, message):
    with pytest.raises(ValueError, match=message):
        RoundMembership(**wrong)


def test_the_interval_of_the_area_covers_chance():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        _, low, high = area_under_roc(rng.normal(size=12), rng.normal(size=20))
        inside += low <= 0.5 <= high
    assert inside >= 356  # binomial(400, 0.95) is below with a probability of 1e-6


def test_true_positives_shares_and_means_by_hand():
    members, others = np.array([5.0, 3.0, 1.0]), np.array([4.0, *np.zeros(99)])
    assert true_positives(members, others) == (2 + 1, 1, 2 / 101)  # of 100 others one may lie above
    assert true_positives(members, others[:50]) == (1, 0, 1 / 51)
    # Clopper and Pearson: 0 of 10 has the upper limit 1 − 0.025^(1/10).
    assert share_interval(0, 10) == (0.0, 0.0, pytest.approx(1 - 0.025**0.1))
    assert share_interval(10, 10) == (1.0, pytest.approx(0.025**0.1), 1.0)
    # Student's t with one degree of freedom: 12.706 × √(1/2) × √2 / √2 for the values 0 and 1.
    assert mean_interval(np.array([0.0, 1.0])) == (0.5, pytest.approx(0.5 - 6.353, abs=1e-3),
                                                   pytest.approx(0.5 + 6.353, abs=1e-3))
