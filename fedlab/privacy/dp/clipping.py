"""Clipping of updates: to a fixed norm, or to one that follows a quantile of their norms."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real

import torch

from fedlab.core.settings import check_positive
from fedlab.core.types import Update
from fedlab.privacy.noise.continuous import standard_normal
from fedlab.privacy.noise.on_grid import GaussianGrid

__all__ = ["CLIPPING_NORM", "AdaptiveClip", "check_clip", "clip_update", "noise_beside_bits"]

#: Under this name the norm of an `AdaptiveClip` is kept at a site, or broadcast by the server.
CLIPPING_NORM = "clipping norm"
#: Clipping aims this much below the norm, so that rounding to float32 cannot lift an update above it.
_MARGIN = 1e-6
#: The smallest norm that an `AdaptiveClip` moves to, one over the largest; exp of more overflows.
_SMALLEST, _LARGEST_POWER = 1e-30, 700.0
#: Bits in a sum at most: a range for exact noise.
_MOST_BITS = 2**16


def clip_update(update: Update, clip: float, *, per_layer: bool = False) -> Update:
    """The update, scaled down to a Euclidean norm of at most `clip` if it is longer.

    Args:
        update: its tensors are float32 or float64; half precision becomes float32.
        clip: clipping norm, in the unit of the weights.
        per_layer: clip each of the L tensors to clip / √L (McMahan et al. 2018, arXiv 1710.06963, "flat" and
            "per-layer" clipping), which keeps the whole within `clip` too.
    """
    bound = clip / math.sqrt(len(update.delta)) if per_layer else clip

    def shorter(t: torch.Tensor, norm: float) -> torch.Tensor:
        t = t if t.dtype in (torch.float32, torch.float64) else t.float()
        return t if norm <= bound else (t.double() * (bound / norm * (1 - _MARGIN))).to(t.dtype)

    whole = update.norm()
    return replace(update, delta={
        name: shorter(t, float(t.double().norm()) if per_layer else whole) for name, t in update.delta.items()})


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """A clipping norm that follows a quantile of the norms of the updates (Andrew et al. 2021, arXiv 1905.03871).

    Each site says, in one bit, whether its update was within the clipping norm. The server adds noise to the sum of
    the bits and moves the norm by a factor of exp(−lr × (noisy share − quantile)); it reaches the sites with the
    weights of the next round.

    Args:
        start: clipping norm of the first round, in the unit of the weights; too small a norm costs a few rounds.
        bit_noise: standard deviation of the noise on the sum of the bits. It takes a part of the same privacy budget,
            so the updates get more noise: 3 % more at twice the noise multiplier. The paper takes a twentieth of the
            expected cohort, which suits hundreds of sites; it must exceed half the noise multiplier.
        quantile: share of updates that should be within the norm.
        lr: how fast the norm moves; the paper's 0.2 changes it by at most about 20 % per round.

    Raises:
        ValueError: a setting is out of range.
    """

    start: float
    bit_noise: float
    quantile: float = 0.5
    lr: float = 0.2

    def __post_init__(self) -> None:
        check_positive(start=self.start, bit_noise=self.bit_noise, lr=self.lr)
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile is a share between 0 and 1, got {self.quantile}")

    def moved(self, clip: float, share: float) -> float:
        """The next clipping norm, after `share` of the updates (with noise) were within `clip`.

        It stays within 1e-30 and 1e30, however large the noise: float32 holds no other norms.
        """
        factor = math.exp(min(-self.lr * (share - self.quantile), _LARGEST_POWER))
        return min(max(clip * factor, _SMALLEST), 1 / _SMALLEST)

    def noised(self, bits: float, rng: torch.Generator | None) -> float:
        """The sum of bits of ±1/2 with its noise: exact on a grid from the operating system where `rng` is None."""
        if rng is not None:
            return bits + self.bit_noise * float(standard_normal((), rng))
        halves = torch.tensor([round(2 * bits) / 2], dtype=torch.float64)  # a mean times its number is off by rounding
        return float(GaussianGrid(reach=0.5, std=self.bit_noise, terms=_MOST_BITS).noised({"sum": halves})["sum"])


def check_clip(clip: float | AdaptiveClip, *, noise_multiplier: float, per_layer: bool) -> None:
    """Raises `ValueError` for a clipping norm that is out of range or does not suit the noise."""
    if not isinstance(clip, AdaptiveClip):
        if not (isinstance(clip, Real) and 0 < clip and (clip < math.inf or noise_multiplier == 0)):
            raise ValueError(f"clip is a positive number, finite if there is noise, got {clip!r}")
        return
    if per_layer:
        raise ValueError("an AdaptiveClip follows the norm of the whole vector: say per_layer=False, or give a fixed "
                         "clip")
    if clip.bit_noise <= noise_multiplier / 2:
        raise ValueError(f"bit_noise must exceed half the noise multiplier ({noise_multiplier / 2:g}), got "
                         f"{clip.bit_noise:g}: the bits alone would spend the privacy of the release; take "
                         f"{2 * noise_multiplier:g}")


def noise_beside_bits(clip: float | AdaptiveClip, noise_multiplier: float) -> float:
    """The noise multiplier of the clipped sum: larger than that of the whole release if bits are noised too.

    Sum and bits are one Gaussian release: z⁻² = z_sum⁻² + (2 × bit_noise)⁻², since a bit of ±1/2 counts half (Andrew
    et al. 2021, theorem 1).
    """
    if not isinstance(clip, AdaptiveClip) or noise_multiplier == 0:
        return noise_multiplier
    return 1 / math.sqrt(noise_multiplier**-2 - (2 * clip.bit_noise) ** -2)
