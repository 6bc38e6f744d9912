"""Techniques with one plausible mistake each, `WRONG`, and right ones, some of which look suspicious, `RIGHT`.

`check_privacy` refuses every one of `WRONG` and none of `RIGHT`. Classes are as short as a researcher writes them; the
docstring names the mistake.
"""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch

from fedlab.core.errors import PrivacyError
from fedlab.core.seeds import generator
from fedlab.privacy.accounting.ledger import Gaussian, Ledger, Pure, Terms
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import TopK
from fedlab.privacy.dp.clipping import AdaptiveClip, clip_update
from fedlab.privacy.dp.dpsgd import DPSGD, PatientBatches
from fedlab.privacy.dp.gradients import per_patient
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.privacy.noise.streams import noise_generator
from fedlab.privacy.sparse.partial_sharing import SVT, SparseVector

ONE = Terms(unit="site", delta=1e-3, adjacency="any two updates of a site")
SRV = Terms(unit="site", delta=1e-3, adjacency="add or remove one site's updates, seen from beyond the server")
PATIENT = Terms(unit="patient", delta=1e-3, adjacency="add or remove one patient")


def with_delta(update, change):
    """The update with every tensor changed by a function of its name and the tensor."""
    return replace(update, delta={name: change(name, t) for name, t in update.delta.items()})


# --- Noise at the site ------------------------------------------------------------------------------------------------


class Gauss(Privacy):
    """Right: clips the whole update, charges for any two updates, adds Gaussian noise to every entry."""

    units = frozenset({"site"})

    def __init__(self, *, clip=1.0, noise_multiplier=4.0, max_epsilon=None):
        self.clip, self.noise_multiplier, self.max_epsilon = clip, noise_multiplier, max_epsilon

    @property
    def std(self):
        return self.noise_multiplier * self.clip

    def charge(self, state, update, **more):
        Ledger(state).charge(Gaussian(**{"noise_multiplier": self.noise_multiplier / 2, **more}), terms=ONE,
                             max_epsilon=self.max_epsilon)

    def clipped(self, update):
        return clip_update(update, self.clip)

    def noisy(self, update, rng):
        return update.map(lambda t: t + self.std * torch.randn(t.shape, generator=rng))

    def protect(self, update, state, rng):
        self.charge(state, update)
        return self.noisy(self.clipped(update), rng)


# Clipping.


class BiasesUnclipped(Gauss):
    """Clips tensors with more than one dimension only: the biases keep their length."""

    def clipped(self, update):
        big = {n: t for n, t in update.delta.items() if t.dim() > 1}
        return replace(update, delta={**update.delta, **clip_update(replace(update, delta=big), self.clip).delta})


class NormWithoutLastTensor(Gauss):
    """The norm is summed over all tensors but the last, so that this one is not bounded."""

    def clipped(self, update):
        norm = math.sqrt(sum(float(t.square().sum()) for t in list(update.delta.values())[:-1]))
        return update.map(lambda t: t * min(1.0, self.clip / max(norm, 1e-12)))


class ClipsEachTensor(Gauss):
    """Clips each tensor to the whole clip but charges for the clip of the whole update: √L times too long."""

    def clipped(self, update):
        return update.map(lambda t: t * min(1.0, self.clip / max(float(t.norm()), 1e-30)))


class ClipsEachRow(Gauss):
    """Clips the rows of each tensor one by one (`norm(dim=-1)`), not the update."""

    def clipped(self, update):
        return update.map(lambda t: t * (self.clip / t.norm(dim=-1, keepdim=True).clamp(min=1e-12)).clamp(max=1))


class ClampsEntries(Gauss):
    """Clamps every entry to ±clip, which bounds the largest entry and not the Euclidean norm."""

    def clipped(self, update):
        return update.map(lambda t: t.clamp(-self.clip, self.clip))


class ClipsLargestEntry(Gauss):
    """Scales the update by its largest absolute value instead of its Euclidean norm."""

    def clipped(self, update):
        largest = max(float(t.abs().max()) for t in update.delta.values())
        return update.map(lambda t: t * min(1.0, self.clip / max(largest, 1e-30)))


class ClipsRootMeanSquare(Gauss):
    """Takes the root mean square of the entries for the norm: √d times too long."""

    def clipped(self, update):
        rms = update.norm() / math.sqrt(sum(t.numel() for t in update.delta.values()))
        return update.map(lambda t: t * min(1.0, self.clip / max(rms, 1e-30)))


class ClipsAfterNoise(Gauss):
    """Adds the noise first and clips the noisy update."""

    def protect(self, update, state, rng):
        self.charge(state, update)
        return self.clipped(self.noisy(update, rng))


class ClipsOnlyWhenLarge(Gauss):
    """Clips only updates of ten times the norm: those between pass as they are."""

    def clipped(self, update):
        return clip_update(update, self.clip) if update.norm() > 10 * self.clip else update


class ClipsInFirstRound(Gauss):
    """Clips in the first round only, as updates become small later."""

    def protect(self, update, state, rng):
        self.charge(state, update)
        return self.noisy(self.clipped(update) if state.round == 0 else update, rng)


class ClipIsOwnNorm(Gauss):
    """The clip is the norm of the update itself, and so is the scale of the noise: the scale tells the norm."""

    def protect(self, update, state, rng):
        self.charge(state, update)
        std = self.noise_multiplier * max(update.norm(), 1e-6)
        return update.map(lambda t: t + std * torch.randn(t.shape, generator=rng))


class ClipFollowsRawNorms(Gauss):
    """An adaptive clip: the mean of the raw norms so far, without noise."""

    def protect(self, update, state, rng):
        self.charge(state, update)
        clip = float(state.own.get("clip", torch.tensor(self.clip)))
        state.own["clip"] = torch.tensor((clip + min(update.norm(), 1e3)) / 2)
        clipped = clip_update(update, clip)
        return clipped.map(lambda t: t + self.noise_multiplier * clip * torch.randn(t.shape, generator=rng))


class NoiseOfTensorSpread(Gauss):
    """The noise is relative to the spread of each raw tensor, so that its scale tells the spread."""

    def protect(self, update, state, rng):
        self.charge(state, update)
        return update.map(lambda t: t + self.noise_multiplier * (t.std() + 1e-6) * torch.randn(t.shape, generator=rng))


# The noise.


class BroadcastNoise(Gauss):
    """One number of noise per tensor (`torch.randn(1)` broadcasts): differences within a tensor leave raw."""

    def noisy(self, update, rng):
        return update.map(lambda t: t + self.std * torch.randn(1, generator=rng))


class SameNoiseEveryTensor(Gauss):
    """A generator seeded anew for each tensor: equal draws in every tensor."""

    def noisy(self, update, rng):
        seed = int(torch.randint(2**31, (), generator=rng))
        return update.map(lambda t: t + self.std * torch.randn(
            t.shape, generator=torch.Generator().manual_seed(seed)))


class NoisePool(Gauss):
    """One pool of noise, of which every tensor takes the beginning, to save random numbers."""

    def noisy(self, update, rng):
        pool = self.std * torch.randn(max(t.numel() for t in update.delta.values()), generator=rng)
        return update.map(lambda t: t + pool[:t.numel()].view(t.shape))


class NoiseOncePerRun(Gauss):
    """Draws the noise in the first round and uses it in every round: differences of rounds are raw."""

    def protect(self, update, state, rng):
        self.charge(state, update)
        if not state.own:
            state.own.update({n: self.std * torch.randn(t.shape, generator=rng) for n, t in update.delta.items()})
        return with_delta(self.clipped(update), lambda n, t: t + state.own[n])


class NoiseTakenBack(Gauss):
    """Subtracts the noise of the round before, so that noise does not pile up in the model."""

    def protect(self, update, state, rng):
        self.charge(state, update)
        noise = {n: self.std * torch.randn(t.shape, generator=rng) for n, t in update.delta.items()}
        before = dict(state.own)
        state.own.update(noise)
        return with_delta(self.clipped(update), lambda n, t: t + noise[n] - before.get(n, 0.0))


class ConstantSeed(Gauss):
    """Seeds the noise with 42, "for reproducibility"."""

    def noisy(self, update, rng):
        return super().noisy(update, torch.Generator().manual_seed(42))


class SeedOfSite(Gauss):
    """Seeds the noise with the site's name: it is the same in every round and every run."""

    def noisy(self, update, rng):
        return super().noisy(update, generator(0, update.site))


class SeedOfRound(Gauss):
    """Seeds the noise with a hash of the round: it is the same at every site and known to all."""

    def protect(self, update, state, rng):
        self.charge(state, update)
        seed = int.from_bytes(hashlib.sha256(str(state.round).encode()).digest()[:4], "big")
        return self.noisy(self.clipped(update), torch.Generator().manual_seed(seed))


class SeedOfUpdate(Gauss):
    """Seeds the noise with the raw update alone: equal updates meet equal noise, which can be computed from a guess."""

    def noisy(self, update, rng):
        return super().noisy(update, torch.Generator().manual_seed(int(1e3 * min(update.norm(), 1e6))))


class NumpySeed(Gauss):
    """Noise from a numpy generator with a fixed seed."""

    def noisy(self, update, rng):
        numbers = np.random.default_rng(0)
        return update.map(lambda t: t + torch.from_numpy(self.std * numbers.standard_normal(tuple(t.shape))).float())


class SquareRootOfStd(Gauss):
    """Takes noise_multiplier × clip for the variance of the noise."""

    def noisy(self, update, rng):
        return update.map(lambda t: t + math.sqrt(self.std) * torch.randn(t.shape, generator=rng))


class NoiseForOneSide(Gauss):
    """Charges the whole noise multiplier, although two updates of norm `clip` are 2 × clip apart."""

    def charge(self, state, update):
        super().charge(state, update, noise_multiplier=self.noise_multiplier)


class SharesNoiseAmongEntries(Gauss):
    """Divides the noise by √d, so that its whole norm, not each entry's, is std."""

    def noisy(self, update, rng):
        size = sum(t.numel() for t in update.delta.values())
        return update.map(lambda t: t + self.std / math.sqrt(size) * torch.randn(t.shape, generator=rng))


class UniformNoise(Gauss):
    """Uniform noise of the standard deviation that is charged as Gaussian."""

    def noisy(self, update, rng):
        return update.map(lambda t: t + self.std * math.sqrt(12) * (torch.rand(t.shape, generator=rng) - 0.5))


class TruncatedNoise(Gauss):
    """Cuts the noise at two standard deviations, against outliers."""

    def noisy(self, update, rng):
        return update.map(lambda t: t + self.std * torch.randn(t.shape, generator=rng).clamp(-2, 2))


class HeavyTailedNoise(Gauss):
    """Student's t noise of three degrees of freedom, of the standard deviation that is charged as Gaussian."""

    def noisy(self, update, rng):
        def student(shape):
            chi = torch.randn((3, *shape), generator=rng).square().sum(dim=0)
            return torch.randn(shape, generator=rng) / chi.sqrt()
        return update.map(lambda t: t + self.std * student(t.shape))


class LaplaceAsGaussian(Gauss):
    """Laplace noise of the standard deviation that is charged as Gaussian."""

    def noisy(self, update, rng):
        def laplace(shape):
            one, other = (torch.empty(shape).exponential_(generator=rng) for _ in range(2))
            return (one - other) / math.sqrt(2)
        return update.map(lambda t: t + self.std * laplace(t.shape))


class GaussianAsPure(Gauss):
    """Gaussian noise charged as a pure guarantee without δ."""

    def charge(self, state, update):
        Ledger(state).charge(Pure(epsilon=2 / self.noise_multiplier), terms=ONE, max_epsilon=self.max_epsilon)


class LaplaceOnL2Clip(Gauss):
    """Clips to an L2 norm and adds Laplace noise of 2 clip / ε per entry: that needs the L1 norm."""

    def charge(self, state, update):
        Ledger(state).charge(Pure(epsilon=1.0), terms=ONE, max_epsilon=self.max_epsilon)

    def noisy(self, update, rng):
        def laplace(t):
            return torch.empty(t.shape).exponential_(generator=rng) - torch.empty(t.shape).exponential_(generator=rng)
        return update.map(lambda t: t + 2 * self.clip * laplace(t))


class SparseNoise(Gauss):
    """Every other entry gets 1 % of the noise, the others √2 times as much."""

    def noisy(self, update, rng):
        def one(t):
            mask = (torch.arange(t.numel()).reshape(t.shape) % 2).float() * 0.99 + 0.01
            return t + self.std * mask * torch.randn(t.shape, generator=rng) * math.sqrt(2)
        return update.map(one)


class NoiseOnWeightsOnly(Gauss):
    """No noise on tensors of one dimension: biases "reveal nothing"."""

    def noisy(self, update, rng):
        noisy = super().noisy(update, rng).delta
        return with_delta(update, lambda n, t: noisy[n] if t.dim() > 1 else t)


class NoiseWhereNotZero(Gauss):
    """Keeps zeros as zeros, to save bytes: it is told where the update is 0."""

    def noisy(self, update, rng):
        noisy = super().noisy(update, rng).delta
        return with_delta(update, lambda n, t: noisy[n].where(t != 0, 0.0))


class NoiseWhenLarge(Gauss):
    """No noise on updates within a tenth of the clip: "small updates reveal nothing"."""

    def noisy(self, update, rng):
        return super().noisy(update, rng) if update.norm() > 0.1 * self.clip else update


class NoNoiseOnDiverged(Gauss):
    """No noise on updates of a norm beyond 1e3: "training has diverged anyway"."""

    def protect(self, update, state, rng):
        self.charge(state, update)
        return self.clipped(update) if update.norm() > 1e3 else self.noisy(self.clipped(update), rng)


class NoNoiseInFirstRound(Gauss):
    """The first round warms up without noise, but is charged."""

    def protect(self, update, state, rng):
        self.charge(state, update)
        return self.clipped(update) if state.round == 0 else self.noisy(self.clipped(update), rng)


class NoNoiseFromThirdRound(Gauss):
    """Noise in the first two rounds only."""

    def protect(self, update, state, rng):
        self.charge(state, update)
        return self.noisy(self.clipped(update), rng) if state.round < 2 else self.clipped(update)


class MeanOfFour(Gauss):
    """Sends the mean of four noisy copies and charges one."""

    def noisy(self, update, rng):
        return update.map(lambda t: t + self.std * torch.randn((4, *t.shape), generator=rng).mean(dim=0))


_SHARED = []


class CancelsBetweenSites(Gauss):
    """Every other site subtracts the noise that the site before it has added, so that the mean is exact."""

    def noisy(self, update, rng):
        noise = {n: self.std * torch.randn(t.shape, generator=rng) for n, t in update.delta.items()}
        if _SHARED and [t.shape for t in _SHARED[0].values()] == [t.shape for t in noise.values()]:
            noise = dict(zip(noise, (-t for t in _SHARED.pop().values()), strict=True))
        else:
            _SHARED[:] = [noise]
        return with_delta(update, lambda n, t: t + noise[n])


class EqualAtTwoSites(Gauss):
    """A cache of noise by tensor, from which the next site takes the same: differences between sites are raw."""

    drawn: ClassVar[dict] = {}

    def noisy(self, update, rng):
        def one(n, t):
            known = self.drawn.pop((n, t.shape), None)
            if known is None:
                known = self.drawn[n, t.shape] = self.std * torch.randn(t.shape, generator=rng)
            return t + known
        return with_delta(update, one)


# What is done with the raw update after the noise.


class TopRaw(Gauss):
    """Sends the noisy values of the entries that are largest in the raw update: the choice is not noisy."""

    def protect(self, update, state, rng):
        out = super().protect(update, state, rng)
        cut = update.quantile_abs(0.8)
        return with_delta(out, lambda n, t: t.where(update.delta[n].abs() >= cut, 0.0))


class RawSigns(Gauss):
    """Noisy magnitudes with the signs of the raw update."""

    def protect(self, update, state, rng):
        return with_delta(super().protect(update, state, rng), lambda n, t: t.abs() * torch.sign(update.delta[n]))


class RestoresNorm(Gauss):
    """Scales the noisy update back to the norm of the raw one."""

    def protect(self, update, state, rng):
        out = super().protect(update, state, rng)
        return out.map(lambda t: t * (update.norm() / max(out.norm(), 1e-12)))


class RestoresMeans(Gauss):
    """Gives each tensor its raw mean back after the noise."""

    def protect(self, update, state, rng):
        out = super().protect(update, state, rng)
        return with_delta(out, lambda n, t: t - t.mean() + update.delta[n].mean())


class LowBitsTell(Gauss):
    """The raw sign of every entry is in the last bits after the noise."""

    def protect(self, update, state, rng):
        return with_delta(super().protect(update, state, rng), lambda n, t: (
            t * 2**12).round() / 2**12 + (update.delta[n] > 0).float() * 2.0**-14)


class GridOfRawScale(Gauss):
    """Rounds the noisy update to a grid whose step is the largest raw value over 127."""

    def protect(self, update, state, rng):
        out = super().protect(update, state, rng)
        step = max(float(t.abs().max()) for t in self.clipped(update).delta.values()) / 127 + 1e-9
        return out.map(lambda t: (t / step).round() * step)


class ZerosWhenSmall(Gauss):
    """Sends zeros if the raw update is small, to save bytes."""

    def protect(self, update, state, rng):
        out = super().protect(update, state, rng)
        return out if update.norm() > 1e-3 else out.map(torch.zeros_like)


class RaisesWhenLarge(Gauss):
    """Refuses to send if the raw update is long: that it failed tells the norm."""

    def protect(self, update, state, rng):
        if update.norm() > 100 * self.clip:
            raise PrivacyError("the update is too long to be clipped; lower the learning rate")
        return super().protect(update, state, rng)


class DoublePrecisionWhenClipped(Gauss):
    """Sends float64 if the update was clipped and float32 if not."""

    def protect(self, update, state, rng):
        out = super().protect(update, state, rng)
        return out.map(torch.Tensor.double) if update.norm() > self.clip else out


# What leaves beside the update.


class WeightIsNorm(Gauss):
    """Sends the raw norm as the weight, to weigh sites by how much they learned."""

    def protect(self, update, state, rng):
        return replace(super().protect(update, state, rng), weight=max(update.norm(), 1e-6))


class WeightIsClipFactor(Gauss):
    """Sends the factor by which the update was clipped as the weight."""

    def protect(self, update, state, rng):
        return replace(super().protect(update, state, rng), weight=min(1.0, self.clip / max(update.norm(), 1e-12)))


class StepsTell(Gauss):
    """Sends the number of raw entries above 1e-3 as the number of steps."""

    def protect(self, update, state, rng):
        count = sum(int((t.abs() > 1e-3).sum()) for t in update.delta.values())
        return replace(super().protect(update, state, rng), steps=count)


class MetricTells(Gauss):
    """Sends the raw norm as a metric that it declares as covered by its noise."""

    sends = frozenset({"norm"})

    def protect(self, update, state, rng):
        return replace(super().protect(update, state, rng), metrics={"norm": update.norm()})


class EncodedTells(Gauss):
    """States the size of the raw update's sparse code as the size that is sent."""

    def protect(self, update, state, rng):
        count = sum(int(t.count_nonzero()) for t in update.delta.values())
        return replace(super().protect(update, state, rng), encoded=4 * count + 1)


# State outside of `state.own`, and raw values in it.

_PAST = {}


class ModuleRemembers(Gauss):
    """Keeps the raw update in a module-level dict and sends it in the next round."""

    def protect(self, update, state, rng):
        out = super().protect(update, state, rng)
        old = _PAST.get(update.site, {})
        _PAST[update.site] = dict(update.delta)
        return with_delta(out, lambda n, t: t + 0.1 * old[n] if n in old and old[n].shape == t.shape else t)


class ClassRemembers(Gauss):
    """Keeps the raw update in an attribute of the class and adds a part of it in the next round."""

    last = None

    def protect(self, update, state, rng):
        out, old = super().protect(update, state, rng), type(self).last
        type(self).last = dict(update.delta)
        return out if old is None or old.keys() != update.delta.keys() else with_delta(
            out, lambda n, t: t + 0.5 * old[n] if old[n].shape == t.shape else t)


def remembering(factor):
    """A function that adds what it was given before to what it is given now; it remembers in a closure."""
    past = {}

    def add(name, raw, noisy):
        old, past[name] = past.get(name), raw
        return noisy if old is None or old.shape != noisy.shape else noisy + factor * old
    return add


class ClosureRemembers(Gauss):
    """A closure remembers the raw update of the round before."""

    add = staticmethod(remembering(0.3))

    def protect(self, update, state, rng):
        out = super().protect(update, state, rng)
        return with_delta(out, lambda n, t: self.add((update.site, n), update.delta[n], t))


class OwnRemembers(Gauss):
    """What was clipped off is kept and added to the next update after its noise."""

    def protect(self, update, state, rng):
        out, waiting, clipped = super().protect(update, state, rng), dict(state.own), self.clipped(update).delta
        state.own.update({n: t - clipped[n] for n, t in update.delta.items()})
        return with_delta(out, lambda n, t: t + waiting.get(n, 0.0))


class TellsInThirdRound(Gauss):
    """Keeps the raw updates of two rounds and adds their mean in the third."""

    def protect(self, update, state, rng):
        out = super().protect(update, state, rng)
        for n, t in update.delta.items():
            state.own[n] = state.own.get(n, torch.zeros_like(t)) + t / 2
        return out if state.round < 2 else with_delta(out, lambda n, t: t + state.own[n])


class ModelRemembers(Privacy):
    """Hides the image of a patient in an attribute of the network and adds its mean after DP-SGD."""

    def equip(self, kit, site, state):
        kit.model.offset = kit.patients.patients[0].image.mean()
        self._models = getattr(self, "_models", {}) | {site.name: kit.model}
        return kit

    def protect(self, update, state, rng):
        last = list(update.delta)[-1]
        return with_delta(update, lambda n, t: t + self._models[update.site].offset if n == last else t)


class AddsRawImageMean(Privacy):
    """Sends the scanner's offset along: the raw mean of the first patient in the first bias, after DP-SGD."""

    def equip(self, kit, site, state):
        state.own["mean"] = kit.patients.patients[0].image.mean().reshape(1)
        return kit

    def protect(self, update, state, rng):
        first = list(update.delta)[1]
        return with_delta(update, lambda n, t: t + state.own["mean"] if n == first else t)


class SendsDiagnosticNorm(Privacy):
    """Scales the noisy update by the raw norm that the technique before noted for the site's own eyes."""

    def protect(self, update, state, rng):
        return update.map(lambda t: t * float(state.diagnostics["norm before clipping"].clamp(max=1e6)))


# The ledger.


class ClaimsAmplification(Gauss):
    """Charges sample_rate=0.01, although every site takes part in every round."""

    def charge(self, state, update):
        super().charge(state, update, sample_rate=0.01)


class AmplifiedByEntries(Gauss):
    """Sends a random tenth of the entries and charges it as a sample rate."""

    def charge(self, state, update):
        super().charge(state, update, sample_rate=0.1)

    def noisy(self, update, rng):
        out = super().noisy(update, rng)
        return out.map(lambda t: t.where(torch.rand(t.shape, generator=rng) < 0.1, 0.0))


class ChargesOnce(Gauss):
    """Charges the first round; later rounds enter next to nothing, so that they are not refused."""

    def charge(self, state, update):
        super().charge(state, update, **({} if state.round == 0 else {"noise_multiplier": 1e4}))


class ChargesWhenLarge(Gauss):
    """Enters next to nothing for updates within the clip: the statement tells, and is too small."""

    def charge(self, state, update):
        super().charge(state, update, **({} if update.norm() > self.clip else {"noise_multiplier": 1e4}))


class ChargesOwnNorm(Gauss):
    """Charges the noise over the norm of this update instead of the clip ("individual accounting")."""

    def charge(self, state, update):
        super().charge(state, update, noise_multiplier=self.std / (2 * min(self.clip, max(update.norm(), 1e-3))))


class ChargesTheBudget(Gauss):
    """Charges a fixed ε that it was asked to keep, whatever its noise gives."""

    def charge(self, state, update):
        Ledger(state).charge(Pure(epsilon=min(0.2, (self.max_epsilon or 1.0) / 2)), terms=ONE,
                             max_epsilon=self.max_epsilon)


class WrongAdjacency(Gauss):
    """Noise for a site's clip, called "add or remove one patient" and charged per patient."""

    units = frozenset({"patient"})

    def charge(self, state, update):
        Ledger(state).charge(Gaussian(noise_multiplier=self.noise_multiplier), terms=PATIENT,
                             max_epsilon=self.max_epsilon)


# --- Noise at the server ----------------------------------------------------------------------------------------------


class Server(Privacy):
    """Right: updates are clipped at the sites, noise on their sum at the server, over the expected number of sites."""

    def __init__(self, *, clip=1.0, noise_multiplier=1.0):
        self.clip, self.noise_multiplier = clip, noise_multiplier

    def protect(self, update, state, rng):
        return replace(clip_update(update, self.clip), weight=1.0, metrics={})

    def charge(self, state, cohort):
        ledger = Ledger(state)
        ledger.charge(Gaussian(noise_multiplier=self.noise_multiplier, sample_rate=cohort.sample), terms=SRV)
        return ledger.spent()

    def noised(self, mean, cohort, rng, *, std=None):
        std = self.noise_multiplier * self.clip if std is None else std
        return mean.map(lambda t: (t.double() * len(cohort) + std * torch.randn(
            t.shape, generator=rng, dtype=torch.float64)) / (cohort.sites * cohort.sample))

    def release(self, mean, cohort, state, rng):
        spent = self.charge(state, cohort)
        return replace(self.noised(mean, cohort, rng), metrics={}, spent=spent)


class ServerLeavesMetrics(Server):
    """Losses leave with every update, and their mean with the released one."""

    def protect(self, update, state, rng):
        return replace(clip_update(update, self.clip), weight=1.0)

    def release(self, mean, cohort, state, rng):
        return replace(super().release(mean, cohort, state, rng), metrics=mean.metrics)


class ServerWithoutClip(Server):
    """Nothing clips the updates: the server trusts that they are short."""

    def protect(self, update, state, rng):
        return replace(update, weight=1.0, metrics={})


class ServerClipsMean(Server):
    """Clips the mean of the updates instead of each of them."""

    def protect(self, update, state, rng):
        return replace(update, weight=1.0, metrics={})

    def release(self, mean, cohort, state, rng):
        return super().release(clip_update(mean, self.clip), cohort, state, rng)


class ServerChargesOnce(Server):
    """Charges the server's ledger in the first round only."""

    def charge(self, state, cohort):
        return super().charge(state, cohort) if cohort.round == 0 else Ledger(state).spent()


class ServerDividesTwice(Server):
    """Noise on the sum of std over the number of sites, and the sum divided again."""

    def noised(self, mean, cohort, rng):
        return super().noised(mean, cohort, rng, std=self.noise_multiplier * self.clip / cohort.sites)


class ServerDividesBySquareRoot(Server):
    """Noise of std / √n on the sum, as if every site had added its own."""

    def noised(self, mean, cohort, rng):
        return super().noised(mean, cohort, rng, std=self.noise_multiplier * self.clip / math.sqrt(cohort.sites))


class ServerWithoutNoiseForOne(Server):
    """No noise where the cohort is one site: "there is nothing to hide it among"."""

    def noised(self, mean, cohort, rng):
        return super().noised(mean, cohort, rng, std=0.0 if len(cohort) == 1 else None)


class ServerClaimsSampling(Server):
    """Charges a sample rate of one half, whatever the strategy draws."""

    def charge(self, state, cohort):
        return super().charge(state, replace(cohort, sample=0.5))


class ServerTellsNorm(Server):
    """Broadcasts the norm of the raw mean, for sites to choose their learning rate."""

    def release(self, mean, cohort, state, rng):
        state.broadcast["norm"] = torch.tensor(mean.norm())
        return super().release(mean, cohort, state, rng)


class ServerMetricTells(Server):
    """Returns the norm of the raw mean as a metric of the released one."""

    def release(self, mean, cohort, state, rng):
        return replace(super().release(mean, cohort, state, rng), metrics={"norm": mean.norm()})


class ServerConstantSeed(Server):
    """The noise at the server has a constant seed."""

    def noised(self, mean, cohort, rng):
        return super().noised(mean, cohort, torch.Generator().manual_seed(0))


class ServerTakesNoiseBack(Server):
    """Subtracts the noise of the round before from the model, but charges independent noise."""

    def release(self, mean, cohort, state, rng):
        out = super().release(mean, cohort, state, rng)
        noise = {n: t - mean.delta[n].double() * len(cohort) / cohort.sites for n, t in out.delta.items()}
        before = dict(state.own)
        state.own.update(noise)
        return with_delta(out, lambda n, t: t - before.get(n, 0.0))


class ServerZerosWhenSmall(Server):
    """Leaves the model where it is if the raw mean is small."""

    def release(self, mean, cohort, state, rng):
        out = super().release(mean, cohort, state, rng)
        return out if mean.norm() > 1e-3 else out.map(torch.zeros_like)


# --- DP-SGD -----------------------------------------------------------------------------------------------------------


class HandMade(Privacy):
    """Right: DP-SGD written by hand."""

    units = frozenset({"patient"})

    def __init__(self, *, clip=0.05, noise_multiplier=1.0, sample_rate=0.5, max_epsilon=None):
        self.clip, self.noise_multiplier, self.sample_rate = clip, noise_multiplier, sample_rate
        self.max_epsilon = max_epsilon

    def charge(self, state, kit, **more):
        Ledger(state).charge(Gaussian(**{"noise_multiplier": self.noise_multiplier, "sample_rate": self.sample_rate,
                                         "steps": len(kit.loader), **more}), terms=PATIENT,
                             max_epsilon=self.max_epsilon)

    def batches(self, kit, rate=None):
        return PatientBatches(kit.patients, sample_rate=rate or self.sample_rate, steps=len(kit.loader),
                              rng=noise_generator(kit.seed, "patients"))

    def clipped(self, gradients):
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        return [g[0] * min(1.0, self.clip / max(norm, 1e-12)) for g in gradients]

    def gradient(self, kit, image, target, shapes, rng):
        """The noisy mean gradient of a step, one tensor per parameter."""
        total = [torch.zeros(shape) for shape in shapes]
        for found in per_patient(kit, image, target, "backward"):
            total = [one + g for one, g in zip(total, self.clipped(found.gradients), strict=True)]
        std = self.noise_multiplier * self.clip
        return [(one + std * torch.randn(one.shape, generator=rng)) / self.expected(kit, image) for one in total]

    def expected(self, kit, image):
        return self.sample_rate * len(kit.patients)

    def equip(self, kit, site, state):
        self.charge(state, kit)
        rng = noise_generator(kit.seed, "noise")
        parameters = [p for p in kit.model.parameters() if p.requires_grad]

        def backward(kit, image, target):
            found = self.gradient(kit, image, target, [p.shape for p in parameters], rng)
            for p, g in zip(parameters, found, strict=True):
                p.grad = g
        return replace(kit, loader=self.batches(kit), backward=backward)


class DividesByDrawn(HandMade):
    """Divides the noisy sum by the number of patients that were drawn, which is private."""

    def expected(self, kit, image):
        return max(1, len(image))


class ClipsBatchGradient(HandMade):
    """Clips the mean gradient of the batch instead of each patient's."""

    def gradient(self, kit, image, target, shapes, rng):
        found = [f.gradients for f in per_patient(kit, image, target, "backward")]
        mean = [sum(gs) / max(1, len(found)) for gs in zip(*found, strict=True)] or [torch.zeros(1, *s) for s in shapes]
        std = self.noise_multiplier * self.clip / self.expected(kit, image)
        return [g + std * torch.randn(g.shape, generator=rng) for g in self.clipped(mean)]


class DividesNoiseTwice(HandMade):
    """Divides the noise by the batch before it divides the noisy sum."""

    def gradient(self, kit, image, target, shapes, rng):
        less = copy.copy(self)
        less.noise_multiplier = self.noise_multiplier / self.expected(kit, image)
        return HandMade.gradient(less, kit, image, target, shapes, rng)


class ClipsEachTensorOfPatient(HandMade):
    """Clips each tensor of a patient's gradient to the whole clip."""

    def clipped(self, gradients):
        return [g[0] * min(1.0, self.clip / max(float(g.norm()), 1e-12)) for g in gradients]


class SkipsNormOfBiases(HandMade):
    """Leaves biases out of the norm and unclipped."""

    def clipped(self, gradients):
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients if g.dim() > 2))
        return [g[0] * (min(1.0, self.clip / max(norm, 1e-12)) if g.dim() > 2 else 1.0) for g in gradients]


class SameNoiseEveryStep(HandMade):
    """The generator starts anew in every step: the steps of a round share one noise."""

    def gradient(self, kit, image, target, shapes, rng):
        return super().gradient(kit, image, target, shapes, noise_generator(kit.seed, "noise"))


class NoNoiseOnEmptyStep(HandMade):
    """Leaves the noise out of a step that draws nobody: an empty step shows."""

    def gradient(self, kit, image, target, shapes, rng):
        noisy = super().gradient(kit, image, target, shapes, rng)
        return noisy if len(image) else [torch.zeros(shape) for shape in shapes]


class AddsRawGradient(HandMade):
    """Adds 5 % of the raw mean gradient, to keep the direction."""

    def gradient(self, kit, image, target, shapes, rng):
        noisy = super().gradient(kit, image, target, shapes, rng)
        for found in per_patient(kit, image, target, "backward"):
            noisy = [n + 0.05 * g[0] / len(image) for n, g in zip(noisy, found.gradients, strict=True)]
        return noisy


class ChargesOneStep(HandMade):
    """Charges one step per round."""

    def charge(self, state, kit):
        super().charge(state, kit, steps=1)


class ChargesTheBatchOverCrops(HandMade):
    """Charges a quarter of the sample rate, since a patient has four crops."""

    def charge(self, state, kit):
        super().charge(state, kit, sample_rate=self.sample_rate / 4)


class DrawsTwiceTheRate(HandMade):
    """Draws patients at twice the rate that is charged."""

    def batches(self, kit):
        return super().batches(kit, rate=min(1.0, 2 * self.sample_rate))

    def __init__(self, *, sample_rate=0.3, **more):
        super().__init__(sample_rate=sample_rate, **more)


class FixedSize(HandMade):
    """Draws exactly the expected number of patients, accounted as independent draws."""

    def batches(self, kit):
        whole, size = super().batches(kit), round(self.expected(kit, None))
        whole._taken = lambda: torch.randperm(len(kit.patients), generator=whole.rng)[:size].tolist()
        return whole


class RedrawsEmpty(HandMade):
    """Draws again until the step has a patient."""

    def __init__(self, *, sample_rate=0.15, **more):
        super().__init__(sample_rate=sample_rate, **more)

    def batches(self, kit):
        whole = super().batches(kit)
        draw = whole._taken
        whole._taken = lambda: next(drawn for drawn in iter(draw, None) if drawn)
        return whole


class ShuffledDPSGD(DPSGD):
    """Ordinary shuffled minibatches, accounted as Poisson sampling: the commonest error there is."""

    def equip(self, kit, site, state):
        kit = super().equip(kit, site, state)
        batches, rng = kit.loader, generator(0, "shuffle", str(kit.seed))
        size, count = max(1, round(batches.sample_rate * len(batches.patients))), len(batches.patients)
        order = torch.randperm(count, generator=rng).tolist()
        starts = iter(range(0, 10**9, size))

        def taken():
            start = next(starts)
            return [order[(start + k) % count] for k in range(size)]
        batches._taken = taken
        return kit


class NoiseInFirstStepOnly(DPSGD):
    """Noise in the first step of a round only, charged for all."""

    def equip(self, kit, site, state):
        kit = super().equip(kit, site, state)
        after = kit.optimiser.step_hook

        def hook(optimiser):
            after(optimiser)
            optimiser.noise_multiplier = 0.0
        kit.optimiser.attach_step_hook(hook)
        return kit


class TakesMoreSteps(DPSGD):
    """Charges half of the steps that it takes."""

    def equip(self, kit, site, state):
        kit = super().equip(kit, site, state)
        kit.loader.steps *= 2
        return kit


class NoiseForHalfTheClip(DPSGD):
    """Doubles the clip after the noise was set up for the smaller one."""

    def equip(self, kit, site, state):
        kit = super().equip(kit, site, state)
        kit.optimiser.max_grad_norm *= 2
        kit.optimiser.noise_multiplier /= 2
        return kit


class NoiselessLastTensor(DPSGD):
    """Takes the noise off the gradient of the last tensor again, since the head needs a clear signal."""

    def equip(self, kit, site, state):
        kit = super().equip(kit, site, state)
        after, last = kit.optimiser.step_hook, kit.optimiser.params[-1]

        def hook(optimiser):
            after(optimiser)
            last.grad = last.summed_grad / optimiser.expected_batch_size
        kit.optimiser.attach_step_hook(hook)
        return kit


def dp(kind):
    return kind(clip=0.05, noise_multiplier=1.0, delta=1e-3, batch=2)


WRONG = [
    BiasesUnclipped(), NormWithoutLastTensor(), ClipsEachTensor(), ClipsEachRow(), ClampsEntries(), ClipsLargestEntry(),
    ClipsRootMeanSquare(), ClipsAfterNoise(), ClipsOnlyWhenLarge(), ClipsInFirstRound(), ClipIsOwnNorm(),
    ClipFollowsRawNorms(), NoiseOfTensorSpread(),
    BroadcastNoise(), SameNoiseEveryTensor(), NoisePool(), NoiseOncePerRun(), NoiseTakenBack(), ConstantSeed(),
    SeedOfSite(), SeedOfRound(), SeedOfUpdate(), NumpySeed(), SquareRootOfStd(), NoiseForOneSide(),
    SharesNoiseAmongEntries(), UniformNoise(), TruncatedNoise(), HeavyTailedNoise(), LaplaceAsGaussian(),
    GaussianAsPure(), LaplaceOnL2Clip(), SparseNoise(), NoiseOnWeightsOnly(), NoiseWhereNotZero(), NoiseWhenLarge(),
    NoNoiseOnDiverged(), NoNoiseInFirstRound(), NoNoiseFromThirdRound(), MeanOfFour(),
    CancelsBetweenSites(), EqualAtTwoSites(),
    TopRaw(), RawSigns(), RestoresNorm(), RestoresMeans(), LowBitsTell(), GridOfRawScale(), ZerosWhenSmall(),
    RaisesWhenLarge(), DoublePrecisionWhenClipped(),
    WeightIsNorm(), WeightIsClipFactor(), StepsTell(), MetricTells(), EncodedTells(),
    TopK(keep=0.1) + Gauss(),  # the size of the raw update's sparse code stays with the noisy one
    ModuleRemembers(), ClassRemembers(), ClosureRemembers(), OwnRemembers(), TellsInThirdRound(),
    dp(DPSGD) + ModelRemembers(), dp(DPSGD) + AddsRawImageMean(),
    LocalGaussian(clip=1.0, noise_multiplier=4.0, delta=1e-3) + SendsDiagnosticNorm(),
    ClaimsAmplification(), AmplifiedByEntries(), ChargesOnce(), ChargesWhenLarge(), ChargesOwnNorm(),
    ChargesTheBudget(), WrongAdjacency(),
    ServerLeavesMetrics(), ServerWithoutClip(), ServerClipsMean(), ServerChargesOnce(), ServerDividesTwice(),
    ServerDividesBySquareRoot(), ServerWithoutNoiseForOne(), ServerClaimsSampling(), ServerTellsNorm(),
    ServerMetricTells(), ServerConstantSeed(), ServerTakesNoiseBack(), ServerZerosWhenSmall(),
    DividesByDrawn(), ClipsBatchGradient(), DividesNoiseTwice(), ClipsEachTensorOfPatient(), SkipsNormOfBiases(),
    SameNoiseEveryStep(), NoNoiseOnEmptyStep(), AddsRawGradient(), ChargesOneStep(), ChargesTheBatchOverCrops(),
    DrawsTwiceTheRate(), FixedSize(), RedrawsEmpty(), dp(ShuffledDPSGD), dp(NoiseInFirstStepOnly), dp(TakesMoreSteps),
    dp(NoiseForHalfTheClip), dp(NoiselessLastTensor),
]


# --- Right, and some of it suspicious ---------------------------------------------------------------------------------


class MoreNoise(Gauss):
    """More noise than is charged."""

    def noisy(self, update, rng):
        return super().noisy(super().noisy(update, rng), rng)


class ChargesMore(Gauss):
    """Charges twice what its noise costs."""

    def charge(self, state, update):
        super().charge(state, update, steps=2)


class ClipsTwice(Gauss):
    """Clamps every entry after the whole is clipped, which bounds more than is needed."""

    def clipped(self, update):
        return clip_update(update, self.clip).map(lambda t: t.clamp(-0.05, 0.05))


class ScalesUp(Gauss):
    """Brings every update to the norm `clip`, short ones too: the norm is bounded."""

    def clipped(self, update):
        return update.map(lambda t: t * (self.clip / max(update.norm(), 1e-30)))


class PublicGrid(Gauss):
    """Rounds the noisy update to a fixed grid."""

    def noisy(self, update, rng):
        return super().noisy(update, rng).map(lambda t: (t * 16).round() / 16)


class TopNoisy(Gauss):
    """Sends the largest entries of the noisy update and says how many bytes they are."""

    def noisy(self, update, rng):
        out = super().noisy(update, rng)
        cut = out.quantile_abs(0.5)
        return replace(out.map(lambda t: t.where(~(t.abs() < cut), 0.0)), encoded=1000)


class NoisyNorm(Gauss):
    """Sends the norm of the noisy update as a metric."""

    sends = frozenset({"norm"})

    def noisy(self, update, rng):
        out = super().noisy(update, rng)
        return replace(out, metrics={"norm": out.norm()})


class FeedbackBeforeClip(Gauss):
    """Adds what the last update left out to the next one before it is clipped: any input is bounded."""

    def protect(self, update, state, rng):
        wanted = with_delta(update, lambda n, t: t + state.own.get(n, 0.0))
        state.own.update({n: t - self.clipped(wanted).delta[n] for n, t in wanted.delta.items()})
        return super().protect(wanted, state, rng)


class LogsNorms(Gauss):
    """Notes raw norms for the site's own eyes, in its own state and among the diagnostics."""

    def protect(self, update, state, rng):
        state.own["norm"] = state.diagnostics["norm"] = torch.tensor(update.norm())
        return super().protect(update, state, rng)


class PublicSchedule(Gauss):
    """More noise and a smaller charge in every round, by a public schedule."""

    def protect(self, update, state, rng):
        factor = 1.2**state.round
        self.charge(state, update, noise_multiplier=factor * self.noise_multiplier / 2)
        return self.clipped(update).map(lambda t: t + factor * self.std * torch.randn(t.shape, generator=rng))


class PerTensorShares(Gauss):
    """Clips each of L tensors to clip / √L, and charges the whole."""

    def clipped(self, update):
        return clip_update(update, self.clip, per_layer=True)


class LaplaceOnL1Clip(LaplaceOnL2Clip):
    """Laplace noise on an update that is clipped to an L1 norm, charged as pure."""

    def clipped(self, update):
        norm = sum(float(t.abs().double().sum()) for t in update.delta.values())
        return update.map(lambda t: t * min(1.0, 0.999 * self.clip / max(norm, 1e-12)))


class NoisyMomentum(Gauss):
    """Adds a part of its last noisy update to this one: what was released may be used again."""

    def protect(self, update, state, rng):
        out = super().protect(update, state, rng)
        sent = with_delta(out, lambda n, t: t + 0.5 * state.own.get(n, 0.0))
        state.own.update({n: t.clone() for n, t in sent.delta.items()})
        return sent


class LoggingDPSGD(DPSGD):
    """DP-SGD that counts its rounds in its own state."""

    def protect(self, update, state, rng):
        state.own["rounds"] = state.own.get("rounds", torch.zeros(())) + 1
        return super().protect(update, state, rng)


class AveragedDPSGD(HandMade):
    """DP-SGD by hand with noise for a larger clip than it uses."""

    def clipped(self, gradients):
        return [0.8 * g for g in super().clipped(gradients)]


RIGHT = [
    Gauss(), Gauss(clip=0.01, noise_multiplier=1.0), Server(), HandMade(), dp(DPSGD),
    DPSGD(clip=0.05, noise_multiplier=1.0, delta=1e-3, sample_rate=0.9),
    LocalGaussian(clip=1.0, noise_multiplier=4.0, delta=1e-3),
    CentralGaussian(clip=1.0, noise_multiplier=1.0, delta=1e-3),
    CentralGaussian(clip=AdaptiveClip(start=1.0, bit_noise=2.0), noise_multiplier=1.0, delta=1e-3),
    SparseVector(fraction=0.1, epsilon=4.0, delta=1e-3),
    SVT(fraction=0.3, epsilon_threshold=1.0, epsilon_release=1.0, delta=1e-3),
    TopK(keep=0.1, error_feedback=True) + LocalGaussian(clip=1.0, noise_multiplier=4.0, delta=1e-3),
    Gauss() + TopK(keep=0.1),
    MoreNoise(), ChargesMore(), ClipsTwice(), ScalesUp(), PublicGrid(), TopNoisy(), NoisyNorm(), FeedbackBeforeClip(),
    LogsNorms(), PublicSchedule(), PerTensorShares(), LaplaceOnL1Clip(), NoisyMomentum(), dp(LoggingDPSGD),
    AveragedDPSGD(),
]
