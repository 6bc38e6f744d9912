"""The attacks of an assessment: one step on a patch as the technique sends it, and canaries that refute a lie."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cohorts import blob_patient
from fedlab.core.types import ServerState, Site
from fedlab.evidence.arms import Arm
from fedlab.evidence.attacked import Canaries, Case, NotApplicable, SentReconstruction, one_step_each
from fedlab.evidence.inversion import one_step_update, patch_net, tumour_patch
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import TopK
from fedlab.privacy.dp.clipping import clip_update
from fedlab.privacy.dp.site_level import LocalGaussian
from fedlab.privacy.secure_aggregation.secure_sum import SecureAggregation
from fedlab.strategies.averaging import FedAvg
from trainers import trainer


class Quiet(LocalGaussian):
    """Charges for its noise and adds a third of it."""

    def protect(self, update, state, rng):
        clipped, noisy = clip_update(update, self.clip), super().protect(update, state, rng)
        return replace(noisy, delta={name: clipped.delta[name] + (t - clipped.delta[name]) / 3
                                     for name, t in noisy.delta.items()})


def case(privacy: Privacy | None = None, **settings: object) -> Case:
    sites = [Site("s", [blob_patient(f"p{k}", seed=k) for k in range(2)], [blob_patient(f"v{k}", seed=9 + k)
                                                                           for k in range(3)])]
    own = trainer(model=patch_net(width=4))
    arm = Arm(trainer=own, rounds=1, strategy=FedAvg(weights="uniform"), privacy=privacy, **settings)
    return Case(arm=arm, sites=sites, seed=0, state=ServerState(round=1, params=own.initial()))


def test_the_step_on_a_patch_is_sent_as_the_technique_sends_it():
    patches = [tumour_patch(patient, 8) for patient in case().sites[0].train]
    plain, thin = (one_step_each(case(technique), patches) for technique in (None, TopK(keep=0.1)))
    for (image, regions), whole, few in zip(patches, plain, thin, strict=True):
        wanted = one_step_update(case().model(), image, regions, lr=0.1).delta
        for name, t in wanted.items():
            torch.testing.assert_close(whole.delta[name], t, rtol=1e-4, atol=1e-7)
        sent = torch.cat([t.flatten() for t in few.delta.values()])
        assert int(sent.count_nonzero()) == int(np.ceil(0.1 * sent.numel()))


def test_reconstruction_is_scored_beside_the_prior_and_left_out_where_no_update_is_seen():
    attack = SentReconstruction(patients=2, crop=8, steps=3)
    found = attack.found([attack.try_on(case())])
    assert found.attack == "SentReconstruction(patients=2, crop=8, steps=3)" and found.trials == 2
    assert found.measure == "correlation within channels" and -1 <= found.low <= found.high <= 1
    with pytest.raises(NotApplicable, match="only the sum"):
        attack.try_on(case(aggregation=SecureAggregation(threshold=2)))


def test_canaries_refute_noise_that_is_three_times_too_small_and_not_the_right_one():
    attack, settings = Canaries(canaries=200), dict(clip=1.0, noise_multiplier=6.0, delta=1e-3)
    right, wrong = (attack.found([attack.try_on(case(kind(**settings)))]) for kind in (LocalGaussian, Quiet))
    assert right.measure == "ε of one round" and "REFUTED is the claim of ε = " in wrong.measure
    assert wrong.low > right.low and right.trials == 200 and right.attack == "Canaries(canaries=200)"
    with pytest.raises(NotApplicable, match="sum under encryption"):
        attack.try_on(case(aggregation=SecureAggregation(threshold=2)))
