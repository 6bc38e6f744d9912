"""Secure aggregation: the server learns the sum of the updates and nothing about any one of them."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedlab.core.errors import PrivacyError
from fedlab.core.types import Cohort, Memory, Site, Tensors, Update
from fedlab.privacy.accounting.ledger import Concentrated, Ledger, Terms, epsilon_of
from fedlab.privacy.base import Inboxes, Privacy
from fedlab.privacy.dp.site_level import AdaptiveClip, CentralGaussian
from fedlab.privacy.noise.discrete_gaussian import MAX_LOG2_SIGMA, discrete_gaussian
from fedlab.privacy.secure_aggregation import protocol
from fedlab.privacy.secure_aggregation.crypto import Words, add_streams

if TYPE_CHECKING:
    from fedlab.strategies.averaging import Strategy
    from fedlab.training.trainer import SiteTrainer

__all__ = ["SecureAggregation"]

#: Steps of the fixed point within the clipping norm, and of the noise within its standard deviation, at least.
_FINEST_CLIP, _FINEST_NOISE = 12, 8
#: The sum's noise is given room for this many standard deviations before it wraps around: probability 1e-31.
_ROOM = 12
#: Updates are scaled this much shorter than allowed, more than all rounding of the floating point steps before.
_MARGIN = 2.0**-40
_ADJACENCY = "one site's update replaced by zeros; the server sees the noisy sum only"

_Vector = np.ndarray[tuple[int], np.dtype[np.float64]]


class SecureAggregation(Privacy):
    """The server gets the sum of the updates; each of them alone is, to it, uniformly random bits.

    Bonawitz et al. (2017, "Practical secure aggregation for privacy-preserving machine learning",
    doi 10.1145/3133956.3133982). Each site clips its update to a Euclidean norm of `clip`, writes it as whole numbers
    modulo 2 to the power of `bits`, and adds a stream of its own and one shared with each other site, which cancel in
    the sum. Any `threshold` of the sites can remove what is left of the masks when others drop out, before or after
    they sent their update; with fewer, nothing is revealed and the round fails. Every update counts the same and the
    sum is exact: on the model the result is that of `FedAvg(weights="uniform")`, up to the fixed point.

    **Noise.** With a `noise_multiplier` each site adds discrete Gaussian noise before it masks (Canonne, Kamath and
    Steinke 2020, arXiv 2004.00010), so that the server sees only a noised sum (Kairouz, Liu and Steinke 2021, arXiv
    2102.06387). The shares of `threshold - colluding` sites suffice for noise of standard deviation
    `noise_multiplier` × `clip` on the sum; more sites bring more noise. The guarantee is per site, for its update
    replaced by zeros, and as strong as the cryptography; the ledgers of the sites are charged. Updates are rounded
    towards zero, which lengthens none, so rounding costs no privacy (the paper rounds at random and needs fewer
    bits). Without a noise multiplier there is no formal guarantee: a sum can betray its parts.

    **Against whom.** A server that follows the protocol and reads along, with up to `colluding` sites, and after the
    keys are exchanged also one that lies about who survived. A server that hands round *forged keys* from the
    beginning is not caught: sites have no identities of their own here; in a deployment the transport must give them.
    A site that sends nonsense spoils the sum unnoticed, as in any average. Not hidden: who takes part, numbers of
    steps, the sum itself, and the model. Numbers of patients and losses stay at the site.

    Args:
        sites: number of sites of the run.
        clip: clipping norm of an update, in the unit of the weights; bounds the whole numbers.
        threshold: sites that must stay until the end of a round; more than half of `sites` + `colluding`.
        bits: of each number on its way, 20 to 40. 32 is as much as a float32; more takes twice the time.
        colluding: sites that may pass to the server what they know; they count as adding no noise.
        noise_multiplier: standard deviation of the noise on the sum over `clip`; None for no noise.
        delta: of the guarantee, below 1 over `sites`; given if and only if there is noise.
        max_epsilon: a site's budget; it takes no further part rather than exceed it.
        secure_mode: noise from the operating system. Without it noise repeats with the seed of the run, and the
            server, which knows the seed, can subtract it: for research. Keys and masks always come from the system.

    Raises:
        ValueError: a setting out of its range, or too few bits for the sum of so many sites.
    """

    before = ("keys", "shares", "receive")
    after = ("agree", "unmask")

    def __init__(self, *, sites: int, clip: float, threshold: int, bits: int = 32, colluding: int = 0,
                 noise_multiplier: float | None = None, delta: float | None = None,
                 max_epsilon: float | None = None, secure_mode: bool = False) -> None:
        self.sites, self.clip, self.threshold, self.bits, self.colluding = sites, clip, threshold, bits, colluding
        self.noise_multiplier, self.delta, self.max_epsilon = noise_multiplier, delta, max_epsilon
        self.secure_mode = secure_mode
        self._check_settings()
        self._word = np.dtype(np.uint32 if bits <= 32 else np.uint64)
        self._log2_sigma = 0
        if noise_multiplier is None:
            # Whole numbers of one site have a norm, and so each a size, of at most this.
            self._reach = float((2 ** (bits - 1) - 1) // sites)
            if self._reach < 2**_FINEST_CLIP:
                raise ValueError(f"{bits} bits leave {self._reach:g} steps within the clipping norm for sums of "
                                 f"{sites} sites, at least {2**_FINEST_CLIP} are needed; take more bits")
        else:
            self._plan_noise(noise_multiplier)

    @property
    def units(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.noise_multiplier is None else frozenset({"site"})

    @property
    def masks(self) -> bool:  # type: ignore[override]
        return self.noise_multiplier is None

    @property
    def resolution(self) -> float:
        """The step of the fixed point, in the unit of the weights."""
        return self.clip / self._reach

    def check_order(self, *, before: Sequence[Privacy], after: Sequence[Privacy]) -> None:
        for other in after:
            if type(other).protect is not Privacy.protect or type(other).release is not Privacy.release:
                raise ValueError(f"put {other!r} before SecureAggregation: after it an update is random bits, of which "
                                 "it can make nothing")
        if any(isinstance(layer, CentralGaussian) and isinstance(layer.clip, AdaptiveClip) for layer in before):
            raise ValueError("an AdaptiveClip tells the server a bit about each site's update, which secure "
                             "aggregation hides; give CentralGaussian a fixed clip")

    def check_run(self, *, trainer: SiteTrainer, sites: Sequence[Site], strategy: Strategy, rounds: int) -> None:
        if getattr(strategy, "uniform_mean", False) is not True:
            raise ValueError(f"masks cancel in a plain mean in which every update counts the same, which {strategy!r} "
                             "is not; use FedAvg(weights='uniform')")
        if len(sites) != self.sites:
            raise ValueError(f"secure aggregation is set up for {self.sites} sites, the run has {len(sites)}; say "
                             f"SecureAggregation(sites={len(sites)}, ...)")
        sample = float(getattr(strategy, "sample", 1.0))
        if sample != 1:
            raise ValueError(f"sites drawn at random (sample {sample:g}) can be fewer than the threshold of "
                             f"{self.threshold}, which would end the run; use sample=1")
        if self.noise_multiplier is not None and self.max_epsilon is not None:
            once = epsilon_of([self._release], delta=self._terms.delta)
            if once > self.max_epsilon:
                raise ValueError(f"the first round alone costs ε = {once:.4g}, more than the budget of "
                                 f"{self.max_epsilon:g}; raise noise_multiplier or the budget")

    def at_site(self, step: str, site: str, inbox: Mapping[str, bytes], memory: Memory) -> Mapping[str, bytes]:
        match step:
            case "keys":
                return protocol.publish_keys(site, memory)
            case "shares":
                return protocol.share_secrets(site, inbox, memory, threshold=self.threshold, sites=self.sites)
            case "receive":
                return protocol.receive_shares(site, inbox, memory, threshold=self.threshold)
            case "agree":
                return protocol.agree(site, inbox, memory, threshold=self.threshold)
            case "unmask":
                return protocol.reveal(site, inbox, memory, threshold=self.threshold)
        raise PrivacyError(f"secure aggregation has no step {step!r}, only {(*self.before, *self.after)}")

    def at_server(self, step: str, sent: Inboxes, memory: Memory, arrived: Sequence[str]) -> Inboxes:
        match step:
            case "keys":
                return protocol.collect_keys(sent, memory, threshold=self.threshold)
            case "shares":
                return protocol.hand_on_shares(sent, memory, threshold=self.threshold)
            case "trained":
                return protocol.name_survivors(memory, arrived, threshold=self.threshold)
            case "unmask":
                protocol.collect_answers(sent, memory, threshold=self.threshold)
                return {}
        return super().at_server(step, sent, memory, arrived)

    def protect(self, update: Update, memory: Memory, rng: torch.Generator) -> Update:
        keys = protocol.mask_keys(update.site, memory)
        flat = _flat(update.delta)
        whole, norm = self._whole_numbers(flat)
        masked = whole.view(self._word)  # modulo the word size, as all that follows
        memory["diagnostics"] = {**memory.get("diagnostics", {}), "norm before masking": torch.tensor(norm)}
        if self.noise_multiplier is not None:
            Ledger(memory).charge(self._release, terms=self._terms, max_epsilon=self.max_epsilon,
                                  repeatable=not self.secure_mode)
            seed = os.urandom(32) if self.secure_mode else bytes(
                torch.randint(256, (32,), generator=rng, dtype=torch.uint8).tolist())
            masked += discrete_gaussian(len(whole), log2_sigma=self._log2_sigma, key=seed).astype(self._word)
        add_streams(masked, keys)
        masked &= self._word.type(2**self.bits - 1)
        flat[:] = masked
        return replace(update, delta=_shaped(flat, update.delta), weight=1.0, metrics={},
                       encoded=-(-len(whole) * self.bits // 8))

    def unmask(self, mean: Update, cohort: Cohort, memory: Memory) -> Update:
        survivors, keys = protocol.unmask_keys(memory)
        if survivors != tuple(sorted(cohort.arrived)) or mean.weight != len(cohort):
            raise PrivacyError(f"the masks are those of {survivors}, the updates of {cohort.arrived} with weights that "
                               f"sum to {mean.weight:g}; they must be of the same sites and count one each")
        total = self._sum(_flat(mean.delta), len(cohort))
        add_streams(total, keys)
        total &= self._word.type(2**self.bits - 1)
        signed = total.astype(np.float64)
        signed[total >> self._word.type(self.bits - 1) > 0] -= 2.0**self.bits
        return replace(mean, delta=_shaped(signed * (self.resolution / len(cohort)), mean.delta))

    def _whole_numbers(self, flat: _Vector) -> tuple[np.ndarray[tuple[int], np.dtype[np.signedinteger]], float]:
        """The update in steps of the fixed point, of a norm up to `_reach`, and its norm before. Changes `flat`."""
        # In whatever order n squares are added in float64, the relative error is below n * 2**-52, and half that of the
        # root; the factor's margin covers it and the rounding of each product. Truncation lengthens nothing.
        with np.errstate(over="ignore"):
            norm = math.sqrt(float(np.dot(flat, flat))) * (1 + len(flat) * 2.0**-52)
        if not math.isfinite(norm):  # a mask would hide it
            raise PrivacyError("the update holds NaN, infinite or far too large values; look at the loss of this site")
        factor = self._reach / self.clip * min(1.0, self.clip / norm if norm > 0 else 1.0) * (1 - _MARGIN)
        np.multiply(flat, factor, out=flat)
        return np.trunc(flat, out=flat).astype(f"i{self._word.itemsize}"), norm

    def _sum(self, flat: _Vector, count: int) -> Words:
        """The exact sum of masked updates from their mean.

        The strategy adds whole numbers, exact in float64 as their sum S is below 2**51, and divides once. Then
        round(S / count) * count differs from S by at most S * (2**-52 + 2**-106) < 1/2: the nearest whole number is S.
        """
        np.multiply(flat, count, out=flat)
        nearest = np.rint(flat)
        flat -= nearest
        if not (np.abs(flat, out=flat) <= nearest * 2.0**-51).all() or nearest.max() > count * (2.0**self.bits - 1):
            raise PrivacyError("what came is not the mean of masked updates; nothing may change them between "
                               "SecureAggregation at the site and at the server")
        return nearest.astype(np.uint64).astype(self._word)

    def _plan_noise(self, noise_multiplier: float) -> None:
        """As fine a fixed point as the bits allow in which the noise of a site is a power of two."""
        # In steps of a share's standard deviation, sum of the updates and room for the noise of all sites.
        honest = math.sqrt(self.threshold - self.colluding)
        needed = self.sites * honest / noise_multiplier + _ROOM * math.sqrt(self.sites)
        self._log2_sigma = min(MAX_LOG2_SIGMA, math.floor(math.log2((2 ** (self.bits - 1) - 1) / needed)))
        self._reach = 2**self._log2_sigma * honest / noise_multiplier
        if self._log2_sigma < _FINEST_NOISE or self._reach < 2**_FINEST_CLIP:
            raise ValueError(f"{self.bits} bits hold noise of {noise_multiplier:g} × clip and the sum of {self.sites} "
                             f"sites only with steps too coarse (2^{self._log2_sigma} within the noise of a site, "
                             f"{self._reach:.0f} within clip); take more bits, or noise nearer to clip")
        # Kairouz et al. 2021, proposition 14: the sum of h shares of variance s**2, seen with and without an update of
        # norm D in d numbers, is (D / (s sqrt(h)) + tau sqrt(d))**2 / 2 concentrated private. D / (s sqrt(h)) is 1 over
        # the noise multiplier, and tau = 10 * sum of exp(-2 pi**2 s**2 k / (k + 1)) is below 1e-250000 for s >= 2**8:
        # the factor below is far more than it can add, and more than all rounding here.
        self._release = Concentrated(rho=(1 + 1e-9) / (2 * noise_multiplier**2))
        self._terms = Terms(unit="site", delta=float(self.delta or 0), adjacency=_ADJACENCY)

    def _check_settings(self) -> None:
        for name in ("sites", "threshold", "bits", "colluding"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} is a whole number, got {getattr(self, name)!r}")
        if self.sites < 2:
            raise ValueError(f"sums hide single updates among at least 2 sites, got {self.sites}")
        if not 0 <= self.colluding <= self.sites - 2:
            raise ValueError(f"colluding lies between 0 and {self.sites - 2}, so that two sites remain whose sum hides "
                             f"each, got {self.colluding}")
        least = max((self.sites + self.colluding) // 2 + 1, self.colluding + 2)
        if not least <= self.threshold <= self.sites:
            raise ValueError(f"threshold lies between {least} and {self.sites} for {self.sites} sites of which "
                             f"{self.colluding} collude, got {self.threshold}; with fewer the server could have two "
                             "lists of survivors confirmed and uncover single updates")
        if not 20 <= self.bits <= 40:
            raise ValueError(f"bits lies between 20 and 40, got {self.bits}")
        if self.sites * 2**self.bits > 2**51:
            raise ValueError(f"sums of {self.sites} sites at {self.bits} bits exceed 2^51, above which they are not "
                             f"exact in float64; take at most {51 - math.ceil(math.log2(self.sites))} bits")
        for name in ("clip", "noise_multiplier", "max_epsilon"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 1e-9 <= value <= 1e9):
                raise ValueError(f"{name} is a positive number between 1e-9 and 1e9, got {value!r}")
        if self.clip is None:
            raise ValueError("clip is the norm that updates are clipped to, got None")
        if (self.noise_multiplier is None) != (self.delta is None):
            raise ValueError(f"give noise_multiplier and delta together or neither, got {self.noise_multiplier} and "
                             f"{self.delta}")
        if self.delta is not None and not 0 < self.delta < 1 / self.sites:
            raise ValueError(f"delta lies between 0 and 1 over the number of sites (1/{self.sites}), got {self.delta}")
        if self.noise_multiplier is None and (self.max_epsilon is not None or self.secure_mode):
            raise ValueError("max_epsilon and secure_mode are about noise; give a noise_multiplier too")


def _flat(delta: Tensors) -> _Vector:
    """A copy of all values in the order of the tensors' names, the same at every site."""
    return torch.cat([delta[name].detach().flatten() for name in sorted(delta)]).double().numpy()


def _shaped(flat: _Vector, like: Tensors) -> dict[str, torch.Tensor]:
    names = sorted(like)
    pieces = torch.from_numpy(flat).split([like[name].numel() for name in names])
    found = dict(zip(names, pieces, strict=True))
    return {name: found[name].reshape(like[name].shape) for name in like}
