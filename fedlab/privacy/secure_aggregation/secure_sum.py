"""Secure aggregation: the server learns the sum of the updates and nothing about a single one."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from fedlab.core.errors import PrivacyError
from fedlab.core.protocols import Exchange, Run
from fedlab.core.settings import check_whole
from fedlab.core.tensors import flatten, unflatten
from fedlab.core.types import SiteState, Spent, Tensors, Update
from fedlab.privacy.accounting.ledger import SUMMED_ZEROED, Concentrated, Ledger, Terms
from fedlab.privacy.aggregation import Aggregation, SumFailed
from fedlab.privacy.dp.clipping import AdaptiveClip
from fedlab.privacy.dp.site_level import CentralGaussian
from fedlab.privacy.noise.discrete_gaussian import MAX_LOG2_SIGMA, discrete_gaussian
from fedlab.privacy.secure_aggregation import protocol
from fedlab.privacy.secure_aggregation.crypto import Words, add_streams

__all__ = ["SecureAggregation"]

#: Clipping norm if none is given and no noise depends on it: longer than the updates of any usual training.
_WIDE_CLIP = 100.0
#: Steps of the fixed point within the clipping norm, and of the noise within its standard deviation, at least.
_FINEST_CLIP, _FINEST_NOISE = 12, 8
#: The sum's noise is given room for this many standard deviations before it wraps around: probability 1e-31.
_ROOM = 12
#: Updates are scaled this much shorter than allowed, more than all rounding of the floating point steps before.
_MARGIN = 2.0**-40

_Vector = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class SecureAggregation(Aggregation):
    """The server receives the sum of the updates; each update alone is uniformly random bits to it.

    Bonawitz et al. (2017, "Practical secure aggregation for privacy-preserving machine learning",
    doi 10.1145/3133956.3133982). Each site clips its update to a Euclidean norm of `clip`, writes it as whole numbers
    modulo 2 to the power of `bits`, and adds a stream of its own and one shared with each other site, which cancel in
    the sum. Any `threshold` of the sites can remove the rest of the masks when others drop out, before or after they
    sent their update; with fewer, nothing is revealed and the round is void, as where a site lies in an exchange or
    sends what is no masked update (see `Admission`). Every update counts the same and the sum is exact: the model is
    that of `FedAvg(weights="uniform")`, up to the fixed point.

    **Noise.** With a `noise_multiplier` each site adds discrete Gaussian noise before it masks (Canonne, Kamath and
    Steinke 2020, arXiv 2004.00010), so that the server sees only a noised sum (Kairouz, Liu and Steinke 2021, arXiv
    2102.06387). The shares of `threshold - colluding` sites suffice for noise of standard deviation
    `noise_multiplier` × `clip` on the sum; more sites bring more noise. The guarantee is per site, for its update
    replaced by zeros, and as strong as the cryptography; the ledgers of the sites are charged. Updates are rounded
    towards zero, which never lengthens them, so rounding costs no privacy (the paper rounds at random and needs fewer
    bits). Without a noise multiplier there is no formal guarantee: a sum can reveal its terms.

    **Threat model.** A server that follows the protocol and reads all messages, with up to `colluding` sites; once the
    keys are exchanged, also a server that lies about the survivors, asks for a round again with other survivors, or
    shows its sites different models (Pasquini et al. 2022, arXiv 2111.07380): the hash of the model enters the keys,
    and a site helps to unmask one sum per round only. A server that distributes *forged keys* from the beginning is
    not detected: sites have no identities of their own here; in a deployment the transport must provide them. A site
    that sends a meaningless update spoils the sum unnoticed, as in any average. Not hidden: who takes part, numbers of
    steps, the sum itself, and the model. Numbers of patients and losses stay at the site.

    `federate(..., aggregation=SecureAggregation(threshold=3))`; the number of sites is read from the run.

    Args:
        threshold: sites that must stay until the end of a round; more than half of all sites + `colluding`.
        clip: clipping norm of an update, in the unit of the weights; bounds the whole numbers. Without noise 100 by
            default: longer updates are shortened, which `SiteState.diagnostics` shows.
        bits: of each number in a message, 20 to 40. 32 is the size of a float32; more takes twice the time.
        colluding: number of sites that may pass their secrets to the server; they count as adding no noise.
        noise_multiplier: standard deviation of the noise on the sum over `clip`; None for no noise.
        delta: of the guarantee, below 1 over the number of sites; given if and only if there is noise.
        max_epsilon, secure_mode: see `Privacy`. Keys and masks always come from the operating system.
        sites: number of sites; read from the run.

    Raises:
        ValueError: a setting is out of range, or too few bits for the sum of so many sites.

    Example:
        >>> sites = fl.make_cohort(sizes=(3, 3, 3), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
        >>> trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16))
        >>> mean = fl.FedAvg(weights="uniform")
        >>> fl.federate(trainer, sites, strategy=mean, aggregation=fl.SecureAggregation(threshold=2), rounds=1)
        <History: 1 of 1 round...; no formal guarantee>
    """

    hides_updates: ClassVar[bool] = True
    steps: ClassVar[tuple[str, ...]] = ("keys", "shares", "receive", "agree", "unmask")

    threshold: int
    clip: float | None = None
    bits: int = 32
    colluding: int = 0
    noise_multiplier: float | None = None
    delta: float | None = None
    max_epsilon: float | None = None
    secure_mode: bool = False
    sites: int | None = None

    def __post_init__(self) -> None:
        self._check_settings()
        if self.sites is not None:
            self._check_sites(self.sites)

    @property
    def units(self) -> frozenset[str]:  # type: ignore[override]
        """{"site"} with noise, else empty."""
        return frozenset() if self.noise_multiplier is None else frozenset({"site"})

    @property
    def resolution(self) -> float:
        """The step of the fixed point, in the unit of the weights."""
        return self._clip / self._fixed_point[0]

    def bind(self, run: Run) -> SecureAggregation:
        if not run.topology.one_server:
            raise ValueError(f"{self!r} hides updates from one server that adds all of them up, which {run.topology!r} "
                             "does not have; use topology=star")
        if getattr(run.strategy, "uniform_mean", False) is not True:
            raise ValueError(f"masks cancel in a plain mean in which every update counts the same, which "
                             f"{run.strategy!r} is not; use FedAvg(weights='uniform')")
        if self.sites not in (None, len(run.sites)):
            raise ValueError(f"secure aggregation is set up for {self.sites} sites, the run has {len(run.sites)}; "
                             "leave sites out, it is read from the run")
        sample = float(getattr(run.strategy, "sample", 1.0))
        if sample != 1:
            raise ValueError(f"sites drawn at random (sample {sample:g}) can be fewer than the threshold of "
                             f"{self.threshold}, which would leave rounds without a sum; use sample=1")
        if run.admission is not None and run.admission.max_norm is not None:
            raise ValueError(f"{self!r} hides every update, so max_norm cannot be checked; leave it out")
        for layer in run.privacy.layers:
            if isinstance(layer, CentralGaussian) and isinstance(layer.clip, AdaptiveClip):
                raise ValueError("an AdaptiveClip sends the server one bit about each site's update, which secure "
                                 "aggregation hides; give CentralGaussian a fixed clip")
            if isinstance(layer, CentralGaussian) and self.noise_multiplier is not None:
                raise ValueError("noise before the sum is hidden can make an update longer than CentralGaussian's clip "
                                 "covers; give noise_multiplier to one of them only")
        if self.noise_multiplier is not None and "site" in run.privacy.units:
            raise ValueError(f"{run.privacy!r} states ε per site for another change than noise in a secure sum does "
                             f"({SUMMED_ZEROED}), so that the two cannot be added up; give noise to one of them only")
        if self.noise_multiplier is not None:
            self._terms.check_budget([self._release], self.max_epsilon)
        return replace(self, sites=len(run.sites))

    def least_spent(self, update: Update) -> Spent | None:
        return None if self.noise_multiplier is None else self._terms.spent([self._release])

    def before(self, exchange: Exchange) -> dict[str, Any]:
        notes: dict[str, Any] = {"shown": exchange.shown}
        with _sum_or_void():
            keys = protocol.collect_keys(exchange.send("keys", {}), notes, threshold=self.threshold)
            shares = protocol.hand_on_shares(exchange.send("shares", keys), notes, threshold=self.threshold)
            exchange.send("receive", shares)
        return notes

    def answer(self, step: str, site: str, inbox: Mapping[str, bytes], state: SiteState) -> Mapping[str, bytes]:
        match step:
            case "keys":
                return protocol.publish_keys(site, state.secrets)
            case "shares":
                return protocol.share_secrets(site, inbox, state.secrets, threshold=self.threshold,
                                              sites=self._sites)
            case "receive":
                return protocol.receive_shares(site, inbox, state.secrets, threshold=self.threshold)
            case "agree":
                return protocol.agree(site, inbox, state.secrets, threshold=self.threshold)
            case "unmask":
                return protocol.reveal(site, inbox, state.secrets, threshold=self.threshold)
        raise PrivacyError(f"secure aggregation has no step {step!r}, only {self.steps}")

    def mask(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        flat = _flat(update.delta)
        whole, norm = self._whole_numbers(flat)
        keys = protocol.mask_keys(update.site, state.secrets, round=state.round, shown=state.shown,
                                  update=hashlib.sha256(whole.tobytes()).digest())
        masked = whole.view(self._word)  # modulo the word size, as all that follows
        state.diagnostics["norm before masking"] = torch.tensor(norm)
        if self.noise_multiplier is not None:
            # Every masking counts: the same noise in the sums of other sites is no second protection.
            Ledger(state).charge(self._release, terms=self._terms, max_epsilon=self.max_epsilon, repeatable=False,
                                 seeded=not self.secure_mode)
            seed = os.urandom(32) if self.secure_mode else bytes(
                torch.randint(256, (32,), generator=rng, dtype=torch.uint8).tolist())
            masked += discrete_gaussian(len(whole), log2_sigma=self._fixed_point[1], key=seed).astype(self._word)
        add_streams(masked, keys)
        masked &= self._word.type(2**self.bits - 1)
        flat[:] = masked
        return replace(update, delta=_shaped(flat, update.delta), weight=1.0, metrics={},
                       encoded=-(-len(whole) * self.bits // 8))

    def after(self, mean: Update, keys: dict[str, Any], exchange: Exchange) -> Update:
        with _sum_or_void():
            return self._unmasked(mean, keys, exchange)

    def _unmasked(self, mean: Update, keys: dict[str, Any], exchange: Exchange) -> Update:
        confirmed = exchange.send("agree", protocol.name_survivors(keys, exchange.names, threshold=self.threshold))
        answers = exchange.send("unmask", _by_recipient(confirmed))
        protocol.collect_answers(answers, keys, threshold=self.threshold)
        survivors, streams = protocol.unmask_keys(keys)
        if mean.weight != len(survivors):
            raise PrivacyError(f"the masks are those of {len(survivors)} sites, the updates have weights that sum to "
                               f"{mean.weight:g}; they must be of the same sites and count one each")
        total = self._sum(_flat(mean.delta), len(survivors))
        add_streams(total, streams)
        total &= self._word.type(2**self.bits - 1)
        signed = total.astype(np.float64)
        signed[total >> self._word.type(self.bits - 1) > 0] -= 2.0**self.bits
        return replace(mean, delta=_shaped(signed * (self.resolution / len(survivors)), mean.delta))

    @property
    def _sites(self) -> int:
        if self.sites is None:
            raise ValueError(f"{self!r} is not bound to a run; say sites=, or pass it to federate(aggregation=...)")
        return self.sites

    @property
    def _clip(self) -> float:
        return _WIDE_CLIP if self.clip is None else self.clip

    @property
    def _word(self) -> np.dtype[Any]:
        return np.dtype(np.uint32 if self.bits <= 32 else np.uint64)

    @property
    def _release(self) -> Concentrated:
        # Kairouz et al. 2021, proposition 14: the sum of h shares of variance s**2, seen with and without an update of
        # norm D in d numbers, is (D / (s sqrt(h)) + tau sqrt(d))**2 / 2 concentrated private. D / (s sqrt(h)) is 1 over
        # the noise multiplier, and tau = 10 * sum of exp(-2 pi**2 s**2 k / (k + 1)) is below 1e-250000 for s >= 2**8:
        # the factor below is far more than it can add, and more than all rounding here.
        return Concentrated(rho=(1 + 1e-9) / (2 * float(self.noise_multiplier or 0) ** 2))

    @property
    def _terms(self) -> Terms:
        return Terms(unit="site", delta=self.delta or 0.0, adjacency=SUMMED_ZEROED)

    @cached_property
    def _fixed_point(self) -> tuple[float, int]:
        """Steps of the fixed point within the clipping norm, and the logarithm (base 2) of a site's noise in steps.

        With noise, the finest fixed point that the bits allow in which the noise of a site is a power of two.
        """
        if self.noise_multiplier is None:
            # An upper bound of the norm of a site's whole numbers, and so of each of them.
            return float((2 ** (self.bits - 1) - 1) // self._sites), 0
        # In steps of a share's standard deviation, sum of the updates and room for the noise of all sites.
        honest = math.sqrt(self.threshold - self.colluding)
        needed = self._sites * honest / self.noise_multiplier + _ROOM * math.sqrt(self._sites)
        log2_sigma = min(MAX_LOG2_SIGMA, math.floor(math.log2((2 ** (self.bits - 1) - 1) / needed)))
        return 2**log2_sigma * honest / self.noise_multiplier, log2_sigma

    def _whole_numbers(self, flat: _Vector) -> tuple[np.ndarray[tuple[int], np.dtype[np.signedinteger]], float]:
        """The update in steps of the fixed point, shortened to the clip, and its norm before. Changes `flat`."""
        # In whatever order n squares are added in float64, the relative error is below n * 2**-52, and half that of the
        # root; the factor's margin covers it and the rounding of each product. Truncation lengthens nothing.
        with np.errstate(over="ignore"):
            norm = math.sqrt(float(np.dot(flat, flat))) * (1 + len(flat) * 2.0**-52)
        if not math.isfinite(norm):  # a mask would hide it
            raise PrivacyError("the update holds NaN, infinite or far too large values; look at the loss of this site")
        clip = self._clip
        factor = self._fixed_point[0] / clip * min(1.0, clip / norm if norm > 0 else 1.0) * (1 - _MARGIN)
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
            raise PrivacyError("the combined update is not the mean of masked updates; nothing may change them between "
                               "SecureAggregation at the site and at the server")
        return nearest.astype(np.uint64).astype(self._word)

    def _check_settings(self) -> None:
        check_whole(least=0, threshold=self.threshold, bits=self.bits, colluding=self.colluding)
        if not 20 <= self.bits <= 40:
            raise ValueError(f"bits lies between 20 and 40, got {self.bits}")
        for name in ("clip", "noise_multiplier", "max_epsilon"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 1e-9 <= value <= 1e9):
                raise ValueError(f"{name} is a positive number between 1e-9 and 1e9, got {value!r}")
        if self.clip is None and self.noise_multiplier is not None:
            raise ValueError("noise is calibrated to clip, the norm that updates are clipped to: give both")
        if (self.noise_multiplier is None) != (self.delta is None):
            raise ValueError(f"give noise_multiplier and delta together or neither, got {self.noise_multiplier} and "
                             f"{self.delta}")
        if self.delta is not None:
            _ = self._terms  # refuses a δ that is out of range
        if self.noise_multiplier is None and (self.max_epsilon is not None or self.secure_mode):
            raise ValueError("max_epsilon and secure_mode concern noise; give a noise_multiplier too")
        if self.threshold < self.colluding + 2:
            raise ValueError(f"threshold is at least 2 more than colluding, so that two sites remain whose sum hides "
                             f"each, got threshold={self.threshold} and colluding={self.colluding}")

    def _check_sites(self, sites: int) -> None:
        check_whole(least=2, sites=sites)
        if self.colluding > sites - 2:
            raise ValueError(f"colluding lies between 0 and {sites - 2}, so that two sites remain whose sum hides "
                             f"each, got {self.colluding}")
        least = max((sites + self.colluding) // 2 + 1, self.colluding + 2)
        if not least <= self.threshold <= sites:
            raise ValueError(f"threshold lies between {least} and {sites} for {sites} sites of which "
                             f"{self.colluding} collude, got {self.threshold}; with fewer the server could have two "
                             "lists of survivors confirmed and uncover single updates")
        if sites * 2**self.bits > 2**51:
            raise ValueError(f"sums of {sites} sites at {self.bits} bits exceed 2^51, above which they are not "
                             f"exact in float64; take at most {51 - math.ceil(math.log2(sites))} bits")
        if self.delta is not None:
            self._terms.check_delta(sites)
        reach, log2_sigma = self._fixed_point
        if reach < 2**_FINEST_CLIP or (self.noise_multiplier is not None and log2_sigma < _FINEST_NOISE):
            noise = "" if self.noise_multiplier is None else (f" and 2^{log2_sigma} within the noise of a site "
                                                              f"(noise_multiplier {self.noise_multiplier:g})")
            raise ValueError(f"{self.bits} bits leave {reach:.0f} steps within the clipping norm for sums of {sites} "
                             f"sites{noise}; at least {2**_FINEST_CLIP} and 2^{_FINEST_NOISE} are needed: take more "
                             "bits, or noise nearer to clip")


@contextmanager
def _sum_or_void() -> Iterator[None]:
    """At the server: a refusal means that this round has no sum."""
    try:
        yield
    except PrivacyError as error:
        raise SumFailed(str(error)) from error


def _by_recipient(sent: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
    """Messages by sender, handed on to their recipients."""
    inboxes: dict[str, dict[str, bytes]] = {}
    for sender, messages in sent.items():
        for recipient, message in messages.items():
            inboxes.setdefault(recipient, {})[sender] = message
    return inboxes


def _flat(delta: Tensors) -> _Vector:
    """A copy of all values in the order of the tensors' names, the same at every site."""
    return flatten({name: delta[name] for name in sorted(delta)}, torch.float64).numpy()


def _shaped(flat: _Vector, like: Tensors) -> dict[str, torch.Tensor]:
    found = unflatten(torch.from_numpy(flat), {name: like[name] for name in sorted(like)})
    return {name: found[name] for name in like}
