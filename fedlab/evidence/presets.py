"""Usual techniques, ready for `fedlab.evidence.assess`, with those of other frameworks at their own settings."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedlab.core.settings import check_positive, check_whole
from fedlab.core.types import Site
from fedlab.privacy.accounting.ledger import noise_multiplier_for
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import SharePercentile, TopK
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.privacy.secure_aggregation.secure_sum import SecureAggregation
from fedlab.privacy.sparse.partial_sharing import SVT, SparseVector
from fedlab.training.trainer import SiteTrainer

__all__ = ["presets"]

#: Defaults of NVFLARE 2.9's SVTPrivacy: share of the values, ε of their choice, ε of each value, γ and τ of a step.
_NVFLARE_SVT = {"fraction": 0.1, "choice": 0.1, "value": 0.1, "clip": 1e-5, "threshold": 1e-6}


def presets(sites: Sequence[Site], trainer: SiteTrainer, *, rounds: int, epsilon: float = 8.0, delta: float = 1e-3,
            clip: float = 0.3, gradient_clip: float = 0.3) -> dict[str, Privacy | Aggregation]:
    """Techniques by name: none, thinning, noise of each kind, secure aggregation, NVFLARE's and Flower's filters.

    The techniques of this package that take an ε reach it over all rounds. Those of other frameworks are written as the
    technique of this package with the same arithmetic, so that the ledger states what their noise proves:

    - NVFLARE 2.9, `PercentilePrivacy()`: the 10 % of smallest changes are left out, the rest is clamped to 0.01 per
      step.
    - NVFLARE 2.9, `SVTPrivacy()`: its noise, clip of 1e-5 per step and threshold. The positions are drawn without
      replacement here; with replacement, its default, nothing is proven.
    - Flower, `LocalDpMod`: it has no default; with `clip` as clipping norm and as sensitivity, and `epsilon` and
      `delta`, of which it states that each round satisfies them. Its noise has the standard deviation
      sensitivity × √(2 ln(1.25 / δ)) / ε.

    Args:
        sites, trainer, rounds: of the assessment; the trainer states its steps.
        epsilon: of all rounds, per site, or per patient with DP-SGD.
        delta: of the guarantees, below 1 over the number of sites and of the patients of each.
        clip: clipping norm of an update, in the unit of the weights. Choose it on public patients.
        gradient_clip: clipping norm of a patient's gradient.

    Raises:
        ValueError: a setting is out of range, or the trainer states epochs.
    """
    check_whole(rounds=rounds)
    check_positive(epsilon=epsilon, delta=delta, clip=clip, gradient_clip=gradient_clip)
    if trainer.steps is None:
        raise ValueError("the presets are calibrated for a number of steps per round, but the trainer states epochs; "
                         "say SiteTrainer(steps=...)")
    steps = trainer.steps
    sigma, sampled = (noise_multiplier_for(target_epsilon=epsilon, delta=delta, sample_rate=rate, steps=times)
                      for rate, times in ((1.0, rounds), (0.25, rounds * steps)))
    flower = math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    return {
        "none": Privacy(),
        "top 10 %": TopK(keep=0.1),
        "SVT, as published": SVT(fraction=0.1, epsilon_threshold=1.0, epsilon_release=1.0, delta=delta),
        "SVT, corrected": SparseVector(fraction=0.1, epsilon=epsilon, rounds=rounds, delta=delta, clip=clip / 10),
        "local noise": LocalGaussian(clip=clip, noise_multiplier=2 * sigma, delta=delta),
        "central noise": CentralGaussian(clip=clip, noise_multiplier=sigma, delta=delta),
        "DP-SGD": DPSGD(clip=gradient_clip, noise_multiplier=sampled, sample_rate=0.25, crops=2, delta=delta),
        "secure aggregation": SecureAggregation(threshold=len(sites) // 2 + 1),
        "NVFLARE PercentilePrivacy": SharePercentile(keep=0.9, bound=0.01 * steps),
        "NVFLARE SVTPrivacy": _nvflare_svt(sum(t.numel() for t in trainer.initial().values()), steps, delta),
        "Flower LocalDpMod": LocalGaussian(clip=clip, noise_multiplier=flower, delta=delta),
    }


def _nvflare_svt(parameters: int, steps: int, delta: float) -> SVT:
    """`SVT` with the scales of NVFLARE's noise, which has the number of values where the paper has their share."""
    s = _NVFLARE_SVT
    count = math.ceil(s["fraction"] * parameters)
    threshold = s["choice"] / (1 + (2 * count) ** (2 / 3))
    return SVT(fraction=s["fraction"], clip=s["clip"] * steps, threshold=s["threshold"] * steps, delta=delta,
               epsilon_threshold=threshold, epsilon_query=s["fraction"] * (s["choice"] - threshold) / count,
               epsilon_release=s["fraction"] * s["value"] / 2)
