"""Differential privacy per patient: DP-SGD at the site, with Opacus."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import SystemRandom
from typing import Any

import torch
from torch import nn

from fedlab.core.hardware import pick_device, pick_precision
from fedlab.core.kit import Kit, PatientCrops
from fedlab.core.protocols import Run
from fedlab.core.settings import check_choice, check_positive, check_share, check_whole
from fedlab.core.types import Site, SiteState, Spent, Update
from fedlab.core.weights import trainable
from fedlab.privacy.accounting.ledger import PATIENT_ZEROED, Accountant, Gaussian, Ledger, Terms
from fedlab.privacy.base import Privacy
from fedlab.privacy.dp.clipping import CLIPPING_NORM, AdaptiveClip, check_clip, noise_beside_bits
from fedlab.privacy.dp.exact_sum import ExactSum, add_normal
from fedlab.privacy.dp.gradients import MODES, Gradients, per_patient
from fedlab.privacy.dp.validators import Loss, require_private
from fedlab.privacy.noise.streams import noise_generator

__all__ = ["DPSGD", "PatientBatches"]


class DPSGD(Privacy):
    """Patient-level DP-SGD: every patient's gradient is clipped, noise is added to their sum (Abadi et al. 2016).

    In each step every patient of the site takes part independently with the same probability (Poisson sampling, for
    which the accountant's amplification is proven). The gradient of a patient is the mean over `crops` random crops (De
    et al. 2022, arXiv 2204.13650, augmentation multiplicity), since crops of one patient are not independent records.
    Opacus (Yousefpour et al. 2021) scales it down to the clipping norm, adds up, adds Gaussian noise and divides by the
    *expected* number of patients. A step that draws no patient is taken too, with noise only. All steps of a round
    enter the site's ledger before the first is taken.

    The guarantee is per patient of this site, for all scans of one patient replaced by nothing, and covers the weights
    of all rounds; the same patient at two sites spends both ledgers. Not covered, and taken as public: the number of
    patients (`Update.weight`, sampling rate and expected batch follow from it), the number of steps, their duration,
    which grows with the patients drawn, and that the site did not fail. Losses stay at the site. With `secure_mode` sum
    and noise are exact on a public grid (`ExactSum`), given gradients that do not depend on the rest of the batch: to
    the last bit those of "backward" only. Without it ε is that of noise in real numbers.

    Every gradient is clipped, so the step length no longer depends on the loss: learning rates that suit plain
    training are mostly too small. `SiteState.diagnostics` holds the norms of the patients' gradients, from which a clip
    can be chosen on public data; they stay at the site, as does the present norm of an `AdaptiveClip`.

    Args:
        clip: clipping norm of a patient's gradient, or an `AdaptiveClip`, whose bits are then those of the patients,
            summed with noise at the site. Opacus's adaptive optimiser is not used: it counts patients as 0 or 1 where
            the proof of Andrew et al. 2021 (theorem 1) needs -1/2 or 1/2, and divides by the true size of a batch,
            which is private (and may be 0). Infinite only without noise.
        noise_multiplier: standard deviation of the noise over the clipping norm; see `noise_multiplier_for`. With an
            `AdaptiveClip` that of gradients and bits together. 0 for no noise and no formal guarantee.
        delta, accountant, max_epsilon: see `Privacy`.
        batch: expected number of patients per step, at most the site's number; or
        sample_rate: probability with which each patient takes part in a step. Exactly one of the two is given. The
            trainer sets the number of steps per round: with `epochs`, give its `batch_size` the same number.
        crops: random crops of a patient that make up one gradient.
        per_layer: clip each of the L tensors to clip / √L (McMahan et al. 2018, arXiv 1710.06963).
        gradients: how gradients of single patients are computed: "backward" is the fastest and leanest here, takes any
            network, and is the only one for half precision; see `fedlab.privacy.dp.gradients.per_patient`.
        secure_mode: as in `Privacy`, for noise and sampling. Opacus's own secure mode needs torchcsprng, which no
            current torch supports.

    Raises:
        ValueError: a setting is out of range; before the first round also a network or a loss that mixes patients, a
            site with fewer patients than `batch`, or δ of at least 1 over a site's number of patients.

    Example:
        >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
        >>> trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16))
        >>> technique = fl.DPSGD(clip=1.0, noise_multiplier=1.0, batch=2, delta=1e-3)
        >>> print(fl.federate(trainer, sites, privacy=technique, rounds=1).guarantee())
        ε = 3.04 at δ = 0.001 per patient (zero-out: ...
    """

    def __init__(self, *, clip: float | AdaptiveClip, noise_multiplier: float, delta: float = 1e-5,
                 batch: float | None = None, sample_rate: float | None = None, crops: int = 1, per_layer: bool = False,
                 gradients: Gradients = "backward", accountant: Accountant = "rdp", max_epsilon: float | None = None,
                 secure_mode: bool = False) -> None:
        self.clip, self.noise_multiplier, self.delta, self.batch = clip, noise_multiplier, delta, batch
        self.sample_rate, self.crops, self.per_layer, self.gradients = sample_rate, crops, per_layer, gradients
        self.accountant, self.max_epsilon, self.secure_mode = accountant, max_epsilon, secure_mode
        self._terms = Terms(unit="patient", delta=delta, adjacency=PATIENT_ZEROED, accountant=accountant)
        self._check_settings()

    @property
    def units(self) -> frozenset[str]:  # type: ignore[override]
        """{"patient"}; empty without noise."""
        return frozenset({"patient"}) if self.noise_multiplier > 0 else frozenset()

    @property
    def noise_on_gradients(self) -> float:
        """Standard deviation over the clipping norm of the noise on the sum of gradients; see `noise_beside_bits`."""
        return noise_beside_bits(self.clip, self.noise_multiplier)

    def check_order(self, *, before: Sequence[Privacy], after: Sequence[Privacy]) -> None:
        if any(isinstance(other, DPSGD) for other in (*before, *after)):
            raise ValueError("DPSGD stands once in a run: each of two would wrap the training of the other")

    def check(self, run: Run) -> None:
        device = pick_device(run.trainer.device)
        self._check_training(run.trainer.model, run.trainer.loss, device, pick_precision(run.trainer.precision, device))

    def check_site(self, site: Site, run: Run) -> None:
        self._check_patients(site)
        patients, trainer = len(site.train), run.trainer
        steps = trainer.steps or math.ceil((trainer.epochs or 1) * patients / trainer.batch_size)
        if self.units:
            self._terms.check_budget([self._release(patients, steps)], self.max_epsilon,
                                     what=f"a round of {steps} steps")

    def least_spent(self, update: Update) -> Spent | None:
        if not self.units:
            return None
        known = [] if self.sample_rate is None else [self._release(1, max(1, update.steps))]  # a batch hides the rate
        return self._terms.spent(known)

    def equip(self, kit: Kit, site: Site, state: SiteState) -> Kit:
        self._check_training(kit.model, kit.objective, kit.device, kit.dtype)
        self._check_patients(site)
        rate, steps = self._rate(len(kit.patients)), len(kit.loader)  # type: ignore[arg-type]
        if self.units:
            Ledger(state).charge(self._release(len(kit.patients), steps), terms=self._terms,
                                 max_epsilon=self.max_epsilon, repeatable=not self.secure_mode)
        training = _Steps(self, kit, state, expected=rate * len(kit.patients))
        before = kit.close

        def close() -> None:
            training.finish()
            before()

        batches = PatientBatches(kit.patients, sample_rate=rate, steps=steps, crops=self.crops,
                                 rng=None if self.secure_mode else noise_generator(kit.seed, "patients"))
        return replace(kit, loader=batches, optimiser=training.optimiser, backward=training.backward, close=close)

    def _rate(self, patients: int) -> float:
        return self.sample_rate if self.sample_rate is not None else (self.batch or 0) / patients

    def _release(self, patients: int, steps: int) -> Gaussian:
        return Gaussian(noise_multiplier=self.noise_multiplier, sample_rate=self._rate(patients), steps=steps)

    def _check_settings(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier is a positive number, or 0 for no noise and no guarantee, got "
                             f"{self.noise_multiplier}")
        check_clip(self.clip, noise_multiplier=self.noise_multiplier, per_layer=self.per_layer)
        if (self.batch is None) == (self.sample_rate is None):
            raise ValueError("give either batch, the expected number of patients per step, or sample_rate, got "
                             f"batch={self.batch} and sample_rate={self.sample_rate}")
        check_positive(batch=self.batch, max_epsilon=self.max_epsilon, optional=True)
        if self.sample_rate is not None:
            check_share(sample_rate=self.sample_rate)
        check_whole(crops=self.crops)
        check_choice(MODES, gradients=self.gradients)
        if self.units and self.sample_rate is not None:  # no site's number of patients is needed
            self._terms.check_budget([self._release(1, 1)], self.max_epsilon, what="one step")

    def _check_patients(self, site: Site) -> None:
        patients = len(site.train)
        if self.batch is not None and self.batch > patients:
            raise ValueError(f"batch is {self.batch:g} patients per step, but {site.name} has only {patients}; give "
                             "sample_rate, which fits sites of any size, or a smaller batch")
        if self.units:
            self._terms.check_delta(patients, where=f" at {site.name}")
        ids = [patient.id for patient in site.train]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"{site.name} has patients more than once: {twice[:3]}; each would be protected less than "
                             "stated. Keep one scan of each patient, or merge the scans into one patient")

    def _check_training(self, model: nn.Module, loss: Loss, device: torch.device, dtype: torch.dtype) -> None:
        if self.gradients != "backward" and dtype != torch.float32:
            raise ValueError(f"gradients={self.gradients!r} needs float32: in half precision the rounding of one "
                             "patient's gradient would depend on the other patients of the batch. Say precision='fp32' "
                             "in the trainer, or gradients='backward', which takes patients one by one")
        if self.per_layer and any(p.dim() == 0 for p in trainable(model).values()):
            raise ValueError("clipping per layer does not support parameters of shape (): say per_layer=False")
        require_private(model, loss, gradients=self.gradients, device=device)


class PatientBatches:
    """Batches of patients drawn independently: every step takes each of them with the same probability.

    Iterating gives images (patients, crops, 4, x, y, z) and regions (patients, crops, 3, x, y, z), both empty for a
    step that draws no patient. The draw comes from `rng`, or from the operating system's entropy for None.
    """

    def __init__(self, patients: PatientCrops, *, sample_rate: float, steps: int, crops: int = 1,
                 rng: torch.Generator | None) -> None:
        self.patients, self.sample_rate, self.steps, self.crops, self.rng = patients, sample_rate, steps, crops, rng

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(self.steps):
            drawn = [[self.patients[i] for _ in range(self.crops)] for i in self._taken()]
            if drawn:
                yield (torch.stack([torch.stack([image for image, _ in one]) for one in drawn]),
                       torch.stack([torch.stack([target for _, target in one]) for one in drawn]))
            else:
                yield torch.empty(0), torch.empty(0)

    def _taken(self) -> list[int]:
        if self.rng is None:
            system = SystemRandom()
            values = [system.random() for _ in range(len(self.patients))]
        else:
            values = torch.rand(len(self.patients), generator=self.rng, dtype=torch.float64).tolist()
        return [i for i, value in enumerate(values) if value < self.sample_rate]


class _Steps:
    """The noisy steps of one round at one site: patients' gradients go to Opacus's optimiser one after the other.

    Opacus's virtual steps clip the gradients that they are given and add them up; the real step, which
    `SiteTrainer.fit` takes, adds the noise. So at most one group of gradients is held at a time. In `secure_mode` an
    `ExactSum` does both; elsewhere than on the CPU, where torch takes seeds of 64 bits only, noise is drawn on the CPU.
    """

    def __init__(self, technique: DPSGD, kit: Kit, state: SiteState, *, expected: float) -> None:
        self.technique, self.state, self.expected = technique, state, expected
        self.parameters: list[Any] = list(trainable(kit.model).values())
        self.norms: list[float] = []  # of the gradients of this step's patients
        self.seen: list[float] = []
        self.beyond = 0
        self.summed, self.noised, self.taken = 0.0, 0.0, 0  # squared norms of sums and noise, and the number of steps
        self.rng = None if technique.secure_mode else noise_generator(kit.seed, "bits")
        self.noise = noise_generator(kit.seed, "noise")
        self.exact = ExactSum(noise_multiplier=technique.noise_on_gradients, patients=len(kit.patients),
                              per_layer=technique.per_layer) if technique.secure_mode and technique.units else None
        self.opacus_draws = self.exact is None and kit.device.type == "cpu"
        self.optimiser = self._wrapped(kit)

    def _wrapped(self, kit: Kit) -> Any:
        from opacus.optimizers import DPOptimizer, DPPerLayerOptimizer  # seconds to import

        clip: Any = self.technique.clip
        if isinstance(clip, AdaptiveClip):
            clip = float(self.state.own.get(CLIPPING_NORM, clip.start))
        clip = min(clip, torch.finfo(torch.float32).max)
        kind = DPOptimizer
        if self.technique.per_layer:
            tensors = sum(p.requires_grad for group in kit.optimiser.param_groups for p in group["params"])
            kind, clip = DPPerLayerOptimizer, [clip / math.sqrt(tensors)] * tensors
        optimiser = kind(kit.optimiser, max_grad_norm=clip, expected_batch_size=self.expected, generator=self.noise,
                         noise_multiplier=self.technique.noise_on_gradients if self.opacus_draws else 0.0)
        optimiser.attach_step_hook(self._after_noise)
        return optimiser

    def backward(self, kit: Kit, image: torch.Tensor, target: torch.Tensor) -> float | None:
        """Adds up the clipped gradients of a batch; its mean loss, or None for an empty batch."""
        losses = []
        for found in per_patient(kit, image, target, self.technique.gradients):
            losses.append(found.loss)
            whole = torch.stack([g.reshape(len(g), -1).norm(dim=1) for g in found.gradients]).norm(dim=0)
            self.norms.extend(whole.tolist())
            if self.exact is not None:
                self.exact.add(found.gradients, self.optimiser.max_grad_norm)
                continue
            for p, gradient in zip(self.parameters, found.gradients, strict=True):
                p.grad_sample = gradient
            self.optimiser.signal_skip_step(True)
            self.optimiser.step()
        for p in self.parameters:
            p.grad_sample = p.new_zeros((0, *p.shape))
        return sum(losses) / len(losses) if losses else None

    def _after_noise(self, optimiser: Any) -> None:
        """Between Opacus's noise and the step itself."""
        technique, clip = self.technique, optimiser.max_grad_norm
        if self.exact is not None:
            self.exact.release(self.parameters, clip, self.expected)
        elif not self.opacus_draws:
            add_normal(self.parameters, technique.noise_on_gradients * clip / self.expected, self.noise)
        if self.exact is None:
            self._measure(clip)
        within = sum(norm <= clip for norm in self.norms)
        if isinstance(technique.clip, AdaptiveClip):
            bits = technique.clip.noised(within - len(self.norms) / 2, self.rng)
            optimiser.max_grad_norm = technique.clip.moved(clip, 0.5 + bits / self.expected)
        self.beyond += len(self.norms) - within
        self.seen.extend(self.norms)
        self.norms = []

    def _measure(self, clip: float) -> None:
        """Adds up the squared norms of the sum of clipped gradients and, as expected, of its noise."""
        self.summed += sum(float(p.summed_grad.double().square().sum()) for p in self.parameters)
        self.noised += (self.technique.noise_on_gradients * clip)**2 * sum(p.numel() for p in self.parameters)
        self.taken += 1

    def finish(self) -> None:
        """Leaves the network as it was found; keeps at the site the clipping norm and the diagnostics."""
        for p in self.parameters:
            p.grad = None
            for left in ("grad_sample", "summed_grad"):
                p.__dict__.pop(left, None)
        if isinstance(self.technique.clip, AdaptiveClip):
            self.state.own[CLIPPING_NORM] = torch.tensor(self.optimiser.max_grad_norm, dtype=torch.float64)
        if self.taken and self.technique.units:
            self.state.diagnostics.update({
                name: torch.tensor(math.sqrt(squares / self.taken), dtype=torch.float64)
                for name, squares in (("norm of the clipped sum", self.summed), ("norm of the noise", self.noised))})
        self.state.diagnostics.update({
            "norms of patients' gradients": torch.tensor(self.seen, dtype=torch.float64),
            "share beyond the clipping norm": torch.tensor(self.beyond / max(1, len(self.seen)), dtype=torch.float64),
        })
