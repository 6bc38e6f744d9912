"""Differential privacy for every patient: DP-SGD at the site, with Opacus."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import SystemRandom
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fedlab.core.hardware import pick_device, pick_precision
from fedlab.core.seeds import derive, generator
from fedlab.core.types import Memory, Site
from fedlab.core.weights import trainable
from fedlab.privacy.accounting.ledger import Accountant, Gaussian, Ledger, Terms, epsilon_of
from fedlab.privacy.base import Privacy
from fedlab.privacy.dp.gradients import MODES, Gradients, per_patient
from fedlab.privacy.dp.site_level import AdaptiveClip
from fedlab.privacy.dp.validators import Loss, check_loss, check_private
from fedlab.privacy.noise.gaussian import standard_normal
from fedlab.training.trainer import Crops, Kit

if TYPE_CHECKING:
    from fedlab.strategies.averaging import Strategy
    from fedlab.training.trainer import SiteTrainer

__all__ = ["DPSGD", "PatientBatches"]

_GROUP, _CLIP = "dpsgd", "clipping norm"
_ADJACENCY = "add or remove one patient"
#: Networks that `check_private` has found fit in this process, and for which gradients.
_FIT: WeakKeyDictionary[nn.Module, set[Gradients]] = WeakKeyDictionary()


class DPSGD(Privacy):
    """Patient-level DP-SGD: every patient's gradient is clipped, noise is added to their sum (Abadi et al. 2016).

    In each step every patient of the site takes part with the same probability, independently (Poisson sampling,
    which the accountant's amplification is proven for). The gradient of a patient is the mean over `crops` random
    crops (De et al. 2022, arXiv 2204.13650, augmentation multiplicity): crops of one patient are no records of their
    own. Opacus (Yousefpour et al. 2021) scales it down to the clipping norm, adds up, adds Gaussian noise and divides
    by the *expected* number of patients. A step that draws nobody is taken like any other: only noise. All steps of a
    round enter the site's ledger before the first.

    The guarantee is per patient of this site, for adding or removing one patient with all scans of that patient, and
    it covers the weights of all rounds; the same patient at two sites spends both ledgers. Not covered, and taken as
    public: the number of patients (`Update.weight`, sampling rate and expected batch follow from it), the number of
    steps, how long they took, which grows with the patients drawn, and that the site did not fail. Losses stay at the
    site. Whoever knows the seed of the run can repeat noise and sampling and so undo the protection: `secure_mode`
    takes both from the operating system instead. Noise is accounted as real numbers; floating point leaves gaps that
    `secure_mode` makes useless to an attacker as far as is known (Mironov 2012; Holohan and Braghin 2021).

    Every gradient is clipped, so the step length no longer depends on the loss: learning rates that suit plain
    training are mostly too small. Memory group "diagnostics" keeps the norms of the patients' gradients, from which to
    choose a clip on public data; it stays at the site, as does the clip that an `AdaptiveClip` has arrived at.

    Args:
        clip: clipping norm of a patient's gradient, or an `AdaptiveClip`: its bits are then the patients', summed with
            noise at the site. Opacus's own adaptive optimiser is not used: it counts patients as 0 or 1 where the
            proof of Andrew et al. 2021 (theorem 1) needs -1/2 or 1/2, and divides by the true size of a batch, which is
            private (and may be 0). Infinite only without noise.
        noise_multiplier: standard deviation of the noise over the clipping norm; see `noise_multiplier_for`. With an
            `AdaptiveClip` that of gradients and bits together. 0 for no noise and no formal guarantee.
        delta: of the guarantee, below 1 over the site's number of patients.
        batch: expected number of patients per step, at most the site's number; or
        sample_rate: probability with which each patient takes part in a step. Exactly one of the two is given. How
            many steps a round has is the trainer's matter: with `epochs`, give its `batch_size` the same number.
        crops: random crops of a patient that make up one gradient.
        per_layer: clip each of the L tensors to clip / √L of its own (McMahan et al. 2018, arXiv 1710.06963).
        gradients: how gradients of single patients are computed: "backward" is the fastest and leanest here, takes
            any network, and alone works in half precision; see `fedlab.privacy.dp.gradients.per_patient`.
        accountant: "rdp", "prv", or "gdp" where every patient takes part in every step; see `Terms`.
        max_epsilon: the site's budget; it takes no further part rather than exceed it.
        secure_mode: noise and sampling from the operating system's entropy, no two runs alike. Opacus's own
            secure mode needs torchcsprng, which exists for no current torch.

    Raises:
        ValueError: a setting out of its range; before the first round also a network or a loss that mixes patients,
            a site with fewer patients than `batch`, or δ of at least 1 over a site's number of patients.
    """

    def __init__(self, *, clip: float | AdaptiveClip, noise_multiplier: float, delta: float = 1e-5,
                 batch: float | None = None, sample_rate: float | None = None, crops: int = 1, per_layer: bool = False,
                 gradients: Gradients = "backward", accountant: Accountant = "rdp", max_epsilon: float | None = None,
                 secure_mode: bool = False) -> None:
        self.clip, self.noise_multiplier, self.delta, self.batch = clip, noise_multiplier, delta, batch
        self.sample_rate, self.crops, self.per_layer, self.gradients = sample_rate, crops, per_layer, gradients
        self.accountant, self.max_epsilon, self.secure_mode = accountant, max_epsilon, secure_mode
        self._terms = Terms(unit="patient", delta=delta, adjacency=_ADJACENCY, accountant=accountant)
        self._check_settings()

    @property
    def units(self) -> frozenset[str]:  # type: ignore[override]
        """{"patient"}; nothing without noise."""
        return frozenset({"patient"}) if self.noise_multiplier > 0 else frozenset()

    @property
    def noise_on_gradients(self) -> float:
        """Standard deviation over the clipping norm of the noise on the sum of gradients: more where bits are noised.

        z⁻² = z_gradients⁻² + (2 × bit_noise)⁻² (Andrew et al. 2021, theorem 1).
        """
        if not isinstance(self.clip, AdaptiveClip) or self.noise_multiplier == 0:
            return self.noise_multiplier
        return float((self.noise_multiplier**-2 - (2 * self.clip.bit_noise) ** -2) ** -0.5)

    def check_order(self, *, before: Sequence[Privacy], after: Sequence[Privacy]) -> None:
        if any(isinstance(other, DPSGD) for other in (*before, *after)):
            raise ValueError("DPSGD stands once in a run: two of them would each wrap the training of the other")

    def check_run(self, *, trainer: SiteTrainer, sites: Sequence[Site], strategy: Strategy, rounds: int) -> None:
        device = pick_device(trainer.device)
        self._check_training(trainer.model, trainer.loss, device, pick_precision(trainer.precision, device))
        for site in sites:
            self._check_site(site)
            patients = len(site.train)
            steps = trainer.steps or math.ceil((trainer.epochs or 1) * patients / trainer.batch_size)
            self._check_budget(self._rate(patients), steps)

    def equip(self, kit: Kit, site: Site, memory: Memory) -> Kit:
        self._check_training(kit.model, kit.objective, kit.device, kit.dtype)
        self._check_site(site)
        rate, steps = self._rate(len(kit.patients)), len(kit.loader)  # type: ignore[arg-type]
        if self.units:
            release = Gaussian(noise_multiplier=self.noise_multiplier, sample_rate=rate, steps=steps)
            Ledger(memory).charge(release, terms=self._terms, max_epsilon=self.max_epsilon,
                                  repeatable=not self.secure_mode)
        training = _Steps(self, kit, memory, expected=rate * len(kit.patients))
        before = kit.close

        def close() -> None:
            training.finish()
            before()

        batches = PatientBatches(kit.patients, sample_rate=rate, steps=steps, crops=self.crops,
                                 rng=None if self.secure_mode else generator(kit.seed, "patients"))
        return replace(kit, loader=batches, optimiser=training.optimiser, backward=training.backward, close=close)

    def _rate(self, patients: int) -> float:
        return self.sample_rate if self.sample_rate is not None else (self.batch or 0) / patients

    def _check_settings(self) -> None:
        if not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier is a positive number, or 0 for no noise and no guarantee, got "
                             f"{self.noise_multiplier}")
        start = self.clip.start if isinstance(self.clip, AdaptiveClip) else self.clip
        if not (start > 0 and (start < math.inf or self.noise_multiplier == 0)):
            raise ValueError(f"clip is a positive number, finite where there is noise, got {self.clip}")
        if isinstance(self.clip, AdaptiveClip) and self.per_layer:
            raise ValueError("an AdaptiveClip follows the norm of the whole gradient: say per_layer=False, or give a "
                             "fixed clip")
        if isinstance(self.clip, AdaptiveClip) and self.clip.bit_noise <= self.noise_multiplier / 2:
            raise ValueError(f"bit_noise must exceed half the noise multiplier ({self.noise_multiplier / 2:g}), got "
                             f"{self.clip.bit_noise:g}: the bits alone would spend the privacy of the step; take "
                             f"{2 * self.noise_multiplier:g}")
        if (self.batch is None) == (self.sample_rate is None):
            raise ValueError("give either batch, the expected number of patients per step, or sample_rate, got "
                             f"batch={self.batch} and sample_rate={self.sample_rate}")
        if self.batch is not None and not 0 < self.batch < math.inf:
            raise ValueError(f"batch is a positive number of patients, got {self.batch}")
        if self.sample_rate is not None and not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate is above 0 and at most 1, got {self.sample_rate}")
        if not isinstance(self.crops, int) or self.crops < 1:
            raise ValueError(f"crops is a positive whole number, got {self.crops!r}")
        if self.gradients not in MODES:
            raise ValueError(f"gradients is one of {', '.join(map(repr, MODES))}, got {self.gradients!r}")
        if self.max_epsilon is not None and not 0 < self.max_epsilon < math.inf:
            raise ValueError(f"max_epsilon is a positive number or None, got {self.max_epsilon}")
        if self.sample_rate is not None:
            self._check_budget(self.sample_rate, 1)

    def _check_budget(self, rate: float, steps: int) -> None:
        """Whether so many steps can be accounted for and are within the budget."""
        if not self.units:
            return
        release = Gaussian(noise_multiplier=self.noise_multiplier, sample_rate=rate, steps=steps)
        once = epsilon_of([release], delta=self.delta, accountant=self.accountant)
        if self.max_epsilon is not None and once > self.max_epsilon:
            raise ValueError(f"{steps} steps alone cost ε = {once:.4g}, more than the budget of {self.max_epsilon:g}; "
                             "raise noise_multiplier (see noise_multiplier_for) or the budget")

    def _check_site(self, site: Site) -> None:
        patients = len(site.train)
        if self.batch is not None and self.batch > patients:
            raise ValueError(f"batch is {self.batch:g} patients per step, but {site.name} has only {patients}; say "
                             "sample_rate, which fits sites of any size, or a smaller batch")
        if self.units and self.delta >= 1 / patients:
            raise ValueError(f"delta is below 1 over the number of patients (1/{patients} at {site.name}), got "
                             f"{self.delta}: otherwise giving one patient away entirely would satisfy the guarantee")
        ids = [patient.id for patient in site.train]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"{site.name} has patients more than once: {twice[:3]}; each would be protected less than "
                             "stated. Keep one scan of each, or merge them into one patient")

    def _check_training(self, model: nn.Module, loss: Loss, device: torch.device, dtype: torch.dtype) -> None:
        if self.gradients != "backward" and dtype != torch.float32:
            raise ValueError(f"gradients={self.gradients!r} needs float32: in half precision the rounding of one "
                             "patient's gradient would depend on who else is in the batch. Say precision='fp32' in the "
                             "trainer, or gradients='backward', which takes patients one by one")
        if self.per_layer and any(p.dim() == 0 for p in trainable(model).values()):
            raise ValueError("clipping per layer takes no parameter without dimensions (a single number of shape ()): "
                             "say per_layer=False")
        check_loss(loss, device=device)
        if self.gradients not in _FIT.setdefault(model, set()):
            fitness = check_private(model, gradients=self.gradients, loss=loss if device.type == "cpu" else None)
            if not fitness:
                raise ValueError(repr(fitness))
            _FIT[model].add(self.gradients)


class PatientBatches:
    """Batches of patients drawn independently: every step takes each of them with the same probability.

    Iterating gives images (patients, crops, 4, x, y, z) and regions (patients, crops, 3, x, y, z), both empty for a
    step that draws nobody.

    Args:
        patients: one random crop of a patient per access.
        sample_rate: the probability.
        steps: how many batches.
        crops: random crops of each patient taken.
        rng: where the draw comes from; None for the operating system's entropy.
    """

    def __init__(self, patients: Crops, *, sample_rate: float, steps: int, crops: int = 1,
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

    Opacus's virtual steps clip what they are given and add it up; the real step, which `SiteTrainer.fit` takes, adds
    the noise. So no more than one group of gradients is held, and nobody's for a step that drew nobody.
    """

    def __init__(self, technique: DPSGD, kit: Kit, memory: Memory, *, expected: float) -> None:
        self.technique, self.memory, self.expected = technique, memory, expected
        self.parameters: list[Any] = list(trainable(kit.model).values())
        self.norms: list[float] = []  # of the gradients of this step's patients
        self.seen: list[float] = []
        self.beyond = 0
        self.optimiser = self._wrapped(kit)
        self.rng = None if technique.secure_mode else generator(kit.seed, "bits")

    def _wrapped(self, kit: Kit) -> Any:
        from opacus.optimizers import DPOptimizer, DPPerLayerOptimizer  # seconds to import

        clip: Any = self.technique.clip
        if isinstance(clip, AdaptiveClip):
            clip = float(self.memory.get(_GROUP, {}).get(_CLIP, clip.start))
        clip = min(clip, torch.finfo(torch.float32).max)
        kind = DPOptimizer
        if self.technique.per_layer:
            tensors = sum(p.requires_grad for group in kit.optimiser.param_groups for p in group["params"])
            kind, clip = DPPerLayerOptimizer, [clip / math.sqrt(tensors)] * tensors
        source = torch.Generator(kit.device).manual_seed(derive(kit.seed, "noise"))
        optimiser = kind(kit.optimiser, max_grad_norm=clip, expected_batch_size=self.expected, generator=source,
                         noise_multiplier=0.0 if self.technique.secure_mode else self.technique.noise_on_gradients)
        optimiser.attach_step_hook(self._after_noise)
        return optimiser

    def backward(self, kit: Kit, image: torch.Tensor, target: torch.Tensor) -> float | None:
        """Sum of the clipped gradients of a batch; its mean loss, or None for a batch of nobody."""
        losses = []
        for found in per_patient(kit, image, target, self.technique.gradients):
            losses.append(found.loss)
            for p, gradient in zip(self.parameters, found.gradients, strict=True):
                p.grad_sample = gradient
            self.norms.extend(_norms(found.gradients))
            self.optimiser.signal_skip_step(True)
            self.optimiser.step()
        for p in self.parameters:
            p.grad_sample = p.new_zeros((0, *p.shape))
        return sum(losses) / len(losses) if losses else None

    def _after_noise(self, optimiser: Any) -> None:
        """Between Opacus's noise and the step itself."""
        technique, clip = self.technique, optimiser.max_grad_norm
        if technique.secure_mode:
            scale = technique.noise_on_gradients * clip / self.expected
            for p in optimiser.params:
                noise = standard_normal(p.shape, None).to(p.device) * scale
                p.grad = (p.grad.double() + noise).to(p.dtype)
        within = sum(norm <= clip for norm in self.norms)
        if isinstance(technique.clip, AdaptiveClip):
            bits = within - len(self.norms) / 2 + technique.clip.bit_noise * float(standard_normal((), self.rng))
            optimiser.max_grad_norm = technique.clip.moved(clip, 0.5 + bits / self.expected)
        self.beyond += len(self.norms) - within
        self.seen.extend(self.norms)
        self.norms = []

    def finish(self) -> None:
        """Leaves the network as it was found and keeps at the site what the next round and its owner need."""
        for p in self.parameters:
            p.grad = None
            for left in ("grad_sample", "summed_grad"):
                p.__dict__.pop(left, None)
        if isinstance(self.technique.clip, AdaptiveClip):
            self.memory[_GROUP] = {_CLIP: torch.tensor(self.optimiser.max_grad_norm, dtype=torch.float64)}
        self.memory["diagnostics"] = {
            **self.memory.get("diagnostics", {}),
            "norms of patients' gradients": torch.tensor(self.seen, dtype=torch.float64),
            "share beyond the clipping norm": torch.tensor(self.beyond / max(1, len(self.seen)), dtype=torch.float64),
        }


def _norms(gradients: Sequence[torch.Tensor]) -> list[float]:
    """Norm of each patient's whole gradient."""
    whole: list[float] = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0).tolist()
    return whole
