"""Further techniques with one plausible mistake each, which the checks were not written against."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from mistakes import ONE, PATIENT, SRV, Gauss, HandMade, Server, dp, with_delta

from fedlab.core.errors import PrivacyBudgetExhausted
from fedlab.privacy.accounting.ledger import Concentrated, Gaussian, Ledger, Pure
from fedlab.privacy.base import Privacy
from fedlab.privacy.dp.clipping import clip_update
from fedlab.privacy.dp.dpsgd import DPSGD, PatientBatches
from fedlab.privacy.dp.gradients import per_patient
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.privacy.noise.streams import noise_generator

# Noise at the site.


class AntitheticHalves(Gauss):
    """The second half of a tensor gets the noise of the first with the other sign, so that its mean stays."""

    def noisy(self, update, rng):
        def one(t):
            half = self.std * torch.randn((t.numel() + 1) // 2, generator=rng)
            return t + torch.cat([half, -half])[:t.numel()].view(t.shape)
        return update.map(one)


class RedrawsUntilAligned(Gauss):
    """Draws noise again until the noisy update points the way of the clipped one."""

    def noisy(self, update, rng):
        for _ in range(20):
            out = super().noisy(update, rng)
            if sum(float((out.delta[n] * t).sum()) for n, t in update.delta.items()) >= 0:
                break
        return out


class ClampsToRawRange(Gauss):
    """Clamps every noisy tensor to the range of the clipped one, against outliers."""

    def noisy(self, update, rng):
        out = super().noisy(update, rng)
        return with_delta(out, lambda n, t: t.clamp(update.delta[n].min(), update.delta[n].max()))


class ForgetsSquareRoot(Gauss):
    """Compares the sum of squares with the clip: with a clip below 1, updates up to √clip pass unclipped."""

    def clipped(self, update):
        squares = sum(float(t.double().square().sum()) for t in update.delta.values())
        return update.map(lambda t: t * min(1.0, self.clip / max(squares, 1e-30)))


class DecayingNoise(Gauss):
    """The noise decays with the rounds, as learning rates do; the charge does not grow."""

    def protect(self, update, state, rng):
        self.charge(state, update)
        std = self.std / (1 + state.round)
        return self.clipped(update).map(lambda t: t + std * torch.randn(t.shape, generator=rng))


class SignsAsNoise(Gauss):
    """Adds plus or minus one standard deviation at random: two values, charged as Gaussian noise."""

    def noisy(self, update, rng):
        return update.map(lambda t: t + self.std * (torch.randint(0, 2, t.shape, generator=rng) * 2 - 1))


class NoiseOfOneChannel(Gauss):
    """Draws the noise of one output channel and adds it to all of them."""

    def noisy(self, update, rng):
        return update.map(lambda t: t + self.std * torch.randn(t.shape[1:], generator=rng))


class WholeNumbersOfNoise(Gauss):
    """Rounds the noise, not the noisy update, to whole standard deviations: the remainder is raw."""

    def noisy(self, update, rng):
        return update.map(lambda t: t + self.std * torch.randn(t.shape, generator=rng).round())


class ShuffledEntries(Gauss):
    """Takes shuffled entries of the update itself for noise."""

    def noisy(self, update, rng):
        def one(t):
            mixed = t.flatten()[torch.randperm(t.numel(), generator=rng)].view(t.shape)
            return t + self.noise_multiplier * mixed + 1e-3 * torch.randn(t.shape, generator=rng)
        return update.map(one)


class DropoutAsNoise(Gauss):
    """Drops half of the entries at random and charges it as Gaussian noise."""

    def noisy(self, update, rng):
        return update.map(lambda t: 2 * t * torch.randint(0, 2, t.shape, generator=rng))


class RelativeNoise(Gauss):
    """Multiplies each entry by 1 + noise: entries near 0 stay near 0."""

    def noisy(self, update, rng):
        return update.map(lambda t: t * (1 + self.std * torch.randn(t.shape, generator=rng)))


class RandomSigns(Gauss):
    """Sends plus or minus the clip with a probability that follows the entry, charged as Gaussian noise."""

    def noisy(self, update, rng):
        return update.map(lambda t: self.clip * (2.0 * (torch.rand(t.shape, generator=rng) < torch.sigmoid(
            20 * t / self.clip)) - 1))


class WeighsAfterClip(Gauss):
    """Multiplies the clipped update by the number of patients, to weigh sites in the sum."""

    def protect(self, update, state, rng):
        self.charge(state, update)
        return self.noisy(self.clipped(update).map(lambda t: t * update.weight), rng)


class SharesClipAmongPatients(Gauss):
    """Says that each of n patients moves the update by clip / n, and adds noise for that."""

    units = frozenset({"patient"})

    def protect(self, update, state, rng):
        Ledger(state).charge(Concentrated(rho=0.5 / self.noise_multiplier**2), terms=PATIENT,
                             max_epsilon=self.max_epsilon)
        std = self.std / update.weight
        return self.clipped(update).map(lambda t: t + std * torch.randn(t.shape, generator=rng))


class HalfTheRho(Gauss):
    """Charges ρ = 1 / (2 σ²) for updates that are two clips apart: a quarter of what is due."""

    def charge(self, state, update):
        Ledger(state).charge(Concentrated(rho=0.5 / self.noise_multiplier**2), terms=ONE,
                             max_epsilon=self.max_epsilon)


class RawMomentum(Gauss):
    """Adds the momentum of the clipped updates, without noise, to the noisy one."""

    def protect(self, update, state, rng):
        out, clipped = super().protect(update, state, rng), self.clipped(update)
        sent = with_delta(out, lambda n, t: t + 0.9 * state.own.get(n, torch.zeros_like(t)))
        state.own.update({n: 0.9 * state.own.get(n, torch.zeros_like(t)) + t for n, t in clipped.delta.items()})
        return sent


class ChargesEvenRounds(Gauss):
    """Charges every other round in full, the rounds between as next to nothing."""

    def charge(self, state, update):
        super().charge(state, update, **({} if state.round % 2 == 0 else {"noise_multiplier": 1e5}))


class SendsANoisyNorm(Gauss):
    """Sends the norm of the update with a little noise of its own, which is not charged."""

    sends = frozenset({"norm"})

    def protect(self, update, state, rng):
        out = super().protect(update, state, rng)
        norm = min(update.norm(), 1e6) + 0.01 * float(torch.randn((), generator=rng))
        return replace(out, metrics={"norm": norm})


class MixesHalfRaw(LocalGaussian):
    """Sends the mean of the noisy and the clipped update."""

    def protect(self, update, state, rng):
        out, clipped = super().protect(update, state, rng), clip_update(update, self.clip)
        return with_delta(out, lambda n, t: (t + clipped.delta[n]) / 2)


class LaplaceOfHalfTheScale(Gauss):
    """Laplace noise of clip / ε on updates of L1 norm `clip`, two of which are 2 × clip apart."""

    def charge(self, state, update):
        Ledger(state).charge(Pure(epsilon=1.0), terms=ONE, max_epsilon=self.max_epsilon)

    def clipped(self, update):
        norm = sum(float(t.abs().double().sum()) for t in update.delta.values())
        return update.map(lambda t: t * min(1.0, 0.999 * self.clip / max(norm, 1e-12)))

    def noisy(self, update, rng):
        def laplace(t):
            return torch.empty(t.shape).exponential_(generator=rng) - torch.empty(t.shape).exponential_(generator=rng)
        return update.map(lambda t: t + self.clip * laplace(t))


class ThresholdWithoutNoise(Gauss):
    """Sends noise only where the clipped update is above a threshold; the choice is without noise."""

    def noisy(self, update, rng):
        out = super().noisy(update, rng)
        return with_delta(out, lambda n, t: t.where(update.delta[n].abs() > 1e-3, 1e-4 * t))


class WeightAfterRounds(Gauss):
    """From the second round on the weight is one more for an update that was clipped in the round before."""

    def protect(self, update, state, rng):
        out = super().protect(update, state, rng)
        weight = 1.0 + float(state.own.get("clipped", torch.zeros(())))
        state.own["clipped"] = torch.tensor(float(update.norm() > self.clip))
        return replace(out, weight=weight)


# Noise at the server.


class ServerClampsToRawRange(Server):
    """Clamps the noisy mean to the range of the raw one."""

    def release(self, mean, cohort, state, rng):
        out = super().release(mean, cohort, state, rng)
        return with_delta(out, lambda n, t: t.clamp(mean.delta[n].min(), mean.delta[n].max()))


class ServerRestsEveryOtherRound(Server):
    """Adds noise in even rounds only, and charges all."""

    def noised(self, mean, cohort, rng):
        return super().noised(mean, cohort, rng, std=None if cohort.round % 2 == 0 else 0.0)


class ServerKeepsItsNoise(Server):
    """Draws the noise once and adds it in every round."""

    def release(self, mean, cohort, state, rng):
        out = super().release(mean, cohort, state, rng)
        raw = {n: t.double() * len(cohort) / cohort.sites for n, t in mean.delta.items()}
        for n, t in out.delta.items():
            state.own.setdefault(n, t - raw[n])
        return with_delta(out, lambda n, t: raw[n] + state.own[n])


class ServerRestoresNorm(CentralGaussian):
    """Scales the noisy mean to the norm of the raw one."""

    def release(self, mean, cohort, state, rng):
        out = super().release(mean, cohort, state, rng)
        return out.map(lambda t: t * (mean.norm() / max(out.norm(), 1e-12)))


class ServerCountsClipped(Server):
    """Broadcasts the share of updates that were clipped, without noise."""

    sends = frozenset({"clipped"})

    def protect(self, update, state, rng):
        return replace(super().protect(update, state, rng), metrics={"clipped": float(update.norm() > self.clip)})

    def release(self, mean, cohort, state, rng):
        state.broadcast["clipped"] = torch.tensor(mean.metrics.get("clipped", 0.0))
        return super().release(mean, cohort, state, rng)


class ServerSkipsFirstTensor(Server):
    """No noise on the first tensor: the stem is "generic"."""

    def noised(self, mean, cohort, rng):
        first = next(iter(mean.delta))
        out = super().noised(mean, cohort, rng)
        return with_delta(out, lambda n, t: mean.delta[n] * len(cohort) / cohort.sites if n == first else t)


# DP-SGD.


class SetsPrior(HandMade):
    """Sets the bias of the last layer to the log-odds of tumour among the site's patients before training."""

    def equip(self, kit, site, state):
        share = torch.stack([(p.label > 0).float().mean() for p in site.train]).mean().clamp(1e-3, 1 - 1e-3)
        with torch.no_grad():
            list(kit.model.parameters())[-1].fill_(float(torch.logit(share)))
        return super().equip(kit, site, state)


class PlainWarmUp(DPSGD):
    """Takes one plain step on the first patient before the private ones, so that training starts well."""

    def equip(self, kit, site, state):
        image, target = kit.patients[0]
        kit.loss(image[None], target[None]).backward()
        kit.optimiser.step()
        kit.optimiser.zero_grad()
        return super().equip(kit, site, state)


class RawPreconditioner(HandMade):
    """Divides the noisy gradient by the root of the raw second moments, as Adam would."""

    def gradient(self, kit, image, target, shapes, rng):
        noisy = super().gradient(kit, image, target, shapes, rng)
        found = [f.gradients for f in per_patient(kit, image, target, "backward")]
        if not found:
            return noisy
        raw = [torch.cat(gs).mean(dim=0) for gs in zip(*found, strict=True)]
        return [g * 0.01 / (r.abs() + 1e-3) for g, r in zip(noisy, raw, strict=True)]


class OneDrawPerRound(HandMade):
    """Draws the patients once per round and takes all steps on them."""

    def batches(self, kit):
        whole = super().batches(kit)
        drawn = whole._taken()
        whole._taken = lambda: drawn
        return whole


class AlwaysTheBrightest(HandMade):
    """Adds the patient with the brightest scan to every batch, since it is the hardest."""

    def batches(self, kit):
        whole = super().batches(kit)
        draw, scans = whole._taken, kit.patients.patients
        hardest = max(range(len(scans)), key=lambda k: float(scans[k].image.mean()))
        whole._taken = lambda: sorted({*draw(), hardest})
        return whole


class StepOfItsLoss(HandMade):
    """Scales each noisy step by the raw loss of its batch."""

    def gradient(self, kit, image, target, shapes, rng):
        noisy = super().gradient(kit, image, target, shapes, rng)
        losses = [found.loss for found in per_patient(kit, image, target, "backward")]
        return [g * (sum(losses) / len(losses) if losses else 1.0) for g in noisy]


class CropsAreRecords(HandMade):
    """Takes two crops of each patient and clips each by itself."""

    def batches(self, kit):
        class Twice(PatientBatches):
            def _taken(self):
                return [k for k in super()._taken() for _ in range(2)]
        return Twice(kit.patients, sample_rate=self.sample_rate, steps=len(kit.loader),
                     rng=noise_generator(kit.seed, "patients"))


class LeavesOutOutliers(HandMade):
    """Leaves out patients with a gradient far above the clip and divides by the number of the others."""

    def gradient(self, kit, image, target, shapes, rng):
        kept = [k for k, found in enumerate(per_patient(kit, image, target, "backward"))
                if math.sqrt(sum(float(g.square().sum()) for g in found.gradients)) < 100 * self.clip]
        self_expected = max(1, len(kept)) / self.expected(kit, image)
        noisy = super().gradient(kit, image[kept], target[kept], shapes, rng)
        return [g / self_expected for g in noisy]


class MedianClip(HandMade):
    """Clips to the median norm of the batch, and adds noise for that."""

    def gradient(self, kit, image, target, shapes, rng):
        norms = [math.sqrt(sum(float(g.square().sum()) for g in found.gradients))
                 for found in per_patient(kit, image, target, "backward")]
        median = sorted(norms)[len(norms) // 2] if norms else self.clip
        one = HandMade(clip=max(median, 1e-6), noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate)
        return one.gradient(kit, image, target, shapes, rng)


class NoiseDecaysInTheRound(HandMade):
    """Halves the noise from step to step, and charges all steps alike."""

    def equip(self, kit, site, state):
        one = super().equip(kit, site, state)
        inner, factor = one.backward, [self.noise_multiplier]

        def backward(kit, image, target):
            self.noise_multiplier, whole = factor[0], self.noise_multiplier
            factor[0] /= 2
            inner(kit, image, target)
            self.noise_multiplier = whole
        return replace(one, backward=backward)


class WeightIsDrawn(DPSGD):
    """Sends the mean number of patients drawn as the weight."""

    def equip(self, kit, site, state):
        kit = super().equip(kit, site, state)
        draw, state.own["drawn"] = kit.loader._taken, torch.zeros(())

        def taken():
            drawn = draw()
            state.own["drawn"] += len(drawn)
            return drawn
        kit.loader._taken = taken
        return kit

    def protect(self, update, state, rng):
        return replace(update, weight=1.0 + float(state.own["drawn"]))


# What is claimed, beside the noise itself.


class SaysItNeverRepeats(Gauss):
    """Enters noise of the run's seed as noise that no seed repeats."""

    def charge(self, state, update):
        Ledger(state).charge(Gaussian(noise_multiplier=self.noise_multiplier / 2), terms=ONE,
                             max_epsilon=self.max_epsilon, repeatable=False)


class BudgetOfOneRound(Gauss):
    """Compares the ε of this round alone with the budget."""

    def charge(self, state, update):
        release = Gaussian(noise_multiplier=self.noise_multiplier / 2)
        if self.max_epsilon is not None and ONE.spent([release]).epsilon > self.max_epsilon:
            raise PrivacyBudgetExhausted("a round costs more than the budget")
        Ledger(state).charge(release, terms=ONE)


class DeltaOfOneHalf(Gauss):
    """A guarantee that may fail for one site of two."""

    def charge(self, state, update):
        Ledger(state).charge(Gaussian(noise_multiplier=self.noise_multiplier / 2), terms=replace(ONE, delta=0.5),
                             max_epsilon=self.max_epsilon)


class Substitutes(Gauss):
    """Charges for updates that are one clip apart, and calls it the substitution of a site."""

    def charge(self, state, update):
        Ledger(state).charge(Gaussian(noise_multiplier=self.noise_multiplier), max_epsilon=self.max_epsilon,
                             terms=replace(ONE, adjacency="substitute the data of one site"))


class SubstitutesPatient(HandMade):
    """Charges for one patient removed, and calls it the replacement of one."""

    def charge(self, state, kit):
        Ledger(state).charge(Gaussian(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate,
                                      steps=len(kit.loader)), terms=replace(PATIENT, adjacency="replace one patient"),
                             max_epsilon=self.max_epsilon)


class PatientsAsSite(HandMade):
    """DP-SGD against one patient, charged as if it hid the whole site."""

    units = frozenset({"site"})

    def charge(self, state, kit):
        Ledger(state).charge(Gaussian(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate,
                                      steps=len(kit.loader)), terms=ONE, max_epsilon=self.max_epsilon)


class ServerStatesTheRound(Server):
    """States the ε of this round alone as what is spent."""

    def charge(self, state, cohort):
        super().charge(state, cohort)
        return (SRV.spent([Gaussian(noise_multiplier=self.noise_multiplier, sample_rate=cohort.sample)]),)


# Later, and elsewhere.


class NoNoiseAfterTenRounds(Gauss):
    """Noise in the first ten rounds only, "until the model has settled"."""

    def protect(self, update, state, rng):
        self.charge(state, update)
        return self.noisy(self.clipped(update), rng) if state.round < 10 else self.clipped(update)


class LargerClipLater(DPSGD):
    """Doubles the clip after the first round, but not the noise."""

    def equip(self, kit, site, state):
        kit = super().equip(kit, site, state)
        if state.round > 0:
            kit.optimiser.max_grad_norm *= 2
            kit.optimiser.noise_multiplier /= 2
        return kit


class TakesNoiseOffAtServer(Gauss):
    """Remembers each site's noise in the class, and subtracts it from the mean at the server."""

    drawn: ClassVar[dict] = {}

    def noisy(self, update, rng):
        out = super().noisy(update, rng)
        self.drawn[update.site] = {n: t - update.delta[n] for n, t in out.delta.items()}
        return out

    def release(self, mean, cohort, state, rng):
        return with_delta(mean, lambda n, t: t - sum(self.drawn[site][n] for site in cohort.arrived) / len(cohort))


class AddsImageMean(Gauss):
    """Adds the mean of the site's scans to the noisy update, to correct for the scanner."""

    def equip(self, kit, site, state):
        state.own["mean"] = torch.stack([p.image.float().mean() for p in site.train]).mean()
        return kit

    def protect(self, update, state, rng):
        return super().protect(update, state, rng).map(lambda t: t + state.own["mean"])


class Reads(Privacy):
    """Adds what it reads of a site's patients before training to the last tensor, after DP-SGD."""

    def read(self, site):
        raise NotImplementedError

    def equip(self, kit, site, state):
        state.own["read"] = torch.as_tensor(self.read(site), dtype=torch.float32)
        return kit

    def protect(self, update, state, rng):
        last = list(update.delta)[-1]
        return with_delta(update, lambda n, t: t + state.own["read"] if n == last else t)


class ReadsLastPatient(Reads):
    def read(self, site):
        return site.train[len(site.train) - 1].image.float().mean()


class ReadsTumours(Reads):
    def read(self, site):
        return 10 * torch.stack([(p.label > 0).float().mean() for p in site.train]).mean()


class ReadsSpacing(Reads):
    def read(self, site):
        return sum(float(p.affine[0, 0]) for p in site.train) / len(site.train)


class ReadsHeldOut(Reads):
    def read(self, site):
        return torch.stack([p.image.float().mean() for p in site.val]).mean() if len(site.val) else 0.0


class StepsOfBrightScans(DPSGD):
    """Takes one step more where a scan is bright."""

    def equip(self, kit, site, state):
        kit = super().equip(kit, site, state)
        kit.loader.steps += int(max(float(p.image.abs().max()) for p in site.train) > 100)
        return kit


CENTRAL = dict(clip=1.0, noise_multiplier=1.0, delta=1e-3)

WRONG = [
    AntitheticHalves(), RedrawsUntilAligned(), ClampsToRawRange(), ForgetsSquareRoot(clip=0.01), DecayingNoise(),
    SignsAsNoise(), NoiseOfOneChannel(), WholeNumbersOfNoise(), ShuffledEntries(), DropoutAsNoise(), RelativeNoise(),
    RandomSigns(), WeighsAfterClip(), SharesClipAmongPatients(), HalfTheRho(), RawMomentum(), ChargesEvenRounds(),
    SendsANoisyNorm(), MixesHalfRaw(clip=1.0, noise_multiplier=4.0, delta=1e-3), LaplaceOfHalfTheScale(),
    ThresholdWithoutNoise(), WeightAfterRounds(),
    ServerClampsToRawRange(), ServerRestsEveryOtherRound(), ServerKeepsItsNoise(), ServerRestoresNorm(**CENTRAL),
    ServerCountsClipped(), ServerSkipsFirstTensor(),
    SetsPrior(), dp(PlainWarmUp), RawPreconditioner(), OneDrawPerRound(), AlwaysTheBrightest(), StepOfItsLoss(),
    CropsAreRecords(), LeavesOutOutliers(), MedianClip(), NoiseDecaysInTheRound(), dp(WeightIsDrawn),
]

#: Each with the check that names the mistake.
NAMED = [
    (SaysItNeverRepeats(), "determinism"), (BudgetOfOneRound(), "budget"), (DeltaOfOneHalf(), "ledger"),
    (ServerStatesTheRound(), "ledger"), (Substitutes(), "sensitivity"), (SubstitutesPatient(), "sensitivity"),
    (PatientsAsSite(), "sensitivity"), (NoNoiseAfterTenRounds(), "noise"), (dp(LargerClipLater), "sensitivity"),
    (TakesNoiseOffAtServer(), "sensitivity"), (AddsImageMean(), "sensitivity"),
    (dp(DPSGD) + ReadsLastPatient(), "sensitivity"), (dp(DPSGD) + ReadsTumours(), "sensitivity"),
    (dp(DPSGD) + ReadsSpacing(), "sensitivity"), (dp(DPSGD) + ReadsHeldOut(), "sensitivity"),
    (dp(StepsOfBrightScans), "beside the update"),
]
