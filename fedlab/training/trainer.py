"""Local training at a site: the one loop, readable top to bottom."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from fedlab.core.changes import changed_elsewhere, note_versions
from fedlab.core.global_generators import seeded
from fedlab.core.hardware import pick_device, precision_for
from fedlab.core.kit import Kit
from fedlab.core.protocols import Run
from fedlab.core.regions import labels_to_regions
from fedlab.core.seeds import derive, generator
from fedlab.core.settings import check_choice, check_positive, check_whole, check_within
from fedlab.core.types import Patient, ServerState, Site, SiteState, Tensors, Update
from fedlab.core.weights import load_weights, trainable
from fedlab.training.buffers import Buffers, check_buffers
from fedlab.training.defaults import DiceBCE, adamw, augmentation
from fedlab.training.moments import averaged, group_values, initial_moments, kept, new_optimiser, restore, to_average

__all__ = ["Crops", "SiteTrainer"]


class Crops(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """One random crop of a patient per item: image (4, x, y, z) float32 and regions (3, x, y, z) float32.

    Crops are centred on a tumour voxel with probability `tumour_share`, else on any voxel. `crop` is their size in
    voxels, `augment` a MONAI transform over {"image", "label"} or None, and `seed` that of both.

    Raises:
        ValueError: a patient has no label or is smaller than the crop.
    """

    def __init__(self, patients: Sequence[Patient], *, crop: tuple[int, int, int], tumour_share: float,
                 augment: Callable[..., Any] | None, seed: int) -> None:
        from monai.transforms import Randomizable

        for patient in patients:
            grid = tuple(patient.image.shape[1:])
            if patient.label is None:
                raise ValueError(f"patient {patient.id} has no label; training needs labelled patients only")
            if any(c > g for c, g in zip(crop, grid, strict=True)):
                raise ValueError(f"crop {crop} is larger than patient {patient.id} with grid {grid}; "
                                 "use a smaller crop")
        self.patients = patients
        self._size, self._share = crop, tumour_share / (tumour_share + (1 - tumour_share))
        self._random = np.random.RandomState(derive(seed, "crop") % 2**32)
        self._augment = copy.deepcopy(augment)
        if isinstance(self._augment, Randomizable):
            self._augment.set_random_state(seed=derive(seed, "augment") % 2**32)

    def __len__(self) -> int:
        return len(self.patients)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        patient = self.patients[index]
        label: torch.Tensor = patient.label  # type: ignore[assignment]
        box = self._box((label != 0).numpy())
        item: dict[str, Any] = {"image": patient.image[:, *box].float(), "label": labels_to_regions(label[box])}
        if self._augment is not None:
            item = self._augment(item)
        # Metadata of MONAI's tensors would pass through every layer of the network.
        return (torch.as_tensor(item["image"]).as_subclass(torch.Tensor),
                torch.as_tensor(item["label"]).as_subclass(torch.Tensor))

    def _box(self, tumour: np.ndarray) -> tuple[slice, ...]:
        """The box around a random voxel, moved into the volume: MONAI's `RandCropByPosNegLabel` without metadata."""
        voxels = np.flatnonzero(tumour)
        if self._random.rand() < (self._share if len(voxels) else 0.0):
            voxel = voxels[self._random.randint(len(voxels))]
        else:
            voxel = self._random.randint(tumour.size)
        centre = np.unravel_index(voxel, tumour.shape)
        starts = (min(max(int(c) - n // 2, 0), grid - n)
                  for c, n, grid in zip(centre, self._size, tumour.shape, strict=True))
        return tuple(slice(start, start + n) for start, n in zip(starts, self._size, strict=True))


def plain_backward(kit: Kit, image: torch.Tensor, target: torch.Tensor) -> float:
    """Gradients of the mean loss of a batch; raises `FloatingPointError` if it is NaN or infinite."""
    loss = kit.loss(image, target)
    if not math.isfinite(value := float(loss.detach())):
        raise FloatingPointError(f"the loss is {value}; lower the learning rate or look for damaged scans")
    loss.backward()
    return value


def limit_gradient(optimiser: torch.optim.Optimizer, weights: Sequence[nn.Parameter], most: float) -> None:
    """From now on scales a gradient whose norm over all weights is above a limit down to it, right before each step."""
    def limit(*_: object) -> None:
        nn.utils.clip_grad_norm_(weights, most)

    optimiser.register_step_pre_hook(limit)


@dataclass(frozen=True, kw_only=True, repr=False)
class SiteTrainer:
    """Trains a model on one site's patients, starting from the global weights.

    Args:
        model: the network. Its weights when the trainer is made are the start of every run with this trainer; one
            instance serves all sites.
        lr: learning rate, or a function of the round's number such as `fedlab.training.CosineDecay`.
        steps: optimiser steps per round; or
        epochs: passes over the site's patients per round. Exactly one of the two is given.
        batch_size: patients per step.
        crop: voxels of the random crop taken from each patient.
        tumour_share: share of crops centred on tumour.
        augment: a MONAI transform over {"image", "label"}, or None.
        loss: of logits and regions; must not mix patients when used with patient-level privacy.
        optimiser: makes an optimiser from parameters and a learning rate.
        clip_norm: largest norm of a step's gradient over all weights, to which a larger one is scaled down (Pascanu et
            al. 2013); None for no limit. Under DP-SGD it acts on the noisy gradient, at no cost of privacy.
        momentum: between rounds "keep" the optimiser's moments at the site or "restart" them, which Li et al. 2019
            compare, or "average" them with the weights, as Yu et al. (ICML 2019, arXiv 1905.03817) do for SGD. Numbers
            that the optimiser counts in its groups are kept too. Averaged moments leave the sites beside the update,
            which is then larger, with AdamW three times, and are refused where a technique or sums are to protect it.
        buffers: that training moves, such as batch norm's statistics: "average" them with the weights (of whole numbers
            the largest), or "keep" them at each site, whose own model is then `local`; with
            `PersonalLayers(names=norms(model))` that is FedBN (Li et al. 2021). Under a guarantee none leaves a site.
        precision: "auto", "bf16" or "fp32", see `fedlab.core.hardware.pick_precision`; weights of another type than
            float32 compute in their own.
        device: "auto" or a torch device name.

    Raises:
        ValueError: a setting out of its range.

    Example:
        >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
        >>> trainer = fl.SiteTrainer(model=fl.segresnet(), lr=1e-3, steps=4, clip_norm=1.0, crop=(16, 16, 16))
        >>> history = fl.federate(trainer, sites, rounds=1)
    """

    model: nn.Module
    lr: float | Callable[[int], float] = 1e-3
    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 2
    crop: tuple[int, int, int] = (32, 32, 32)
    tumour_share: float = 0.75
    augment: Callable[..., Any] | None = field(default_factory=augmentation)
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = field(default_factory=DiceBCE)
    optimiser: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer] = adamw
    clip_norm: float | None = None
    momentum: Literal["keep", "restart", "average"] = "keep"
    buffers: Literal["average", "keep"] = "average"
    precision: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give either steps or epochs per round, got steps={self.steps} and epochs={self.epochs}")
        check_whole(batch_size=self.batch_size)
        check_whole(optional=True, steps=self.steps, epochs=self.epochs)
        check_within(most=1, tumour_share=self.tumour_share)
        check_positive(optional=True, clip_norm=self.clip_norm)
        check_choice(("keep", "restart", "average"), momentum=self.momentum)
        check_choice(("average", "keep"), buffers=self.buffers)
        if not callable(self.lr):
            check_positive(lr=self.lr)
        precision_for(self.model, self.precision, torch.device("cpu"))
        _ = self._start, self._buffers  # as they are now: runs change the model's weights, never its start
        note_versions(self.model)

    @cached_property
    def _start(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().cpu().clone() for name, p in trainable(self.model).items()}

    @cached_property
    def _buffers(self) -> Buffers:
        return Buffers(self.model, crop=self.crop)

    @cached_property
    def _moments(self) -> dict[str, torch.Tensor]:
        return {} if self.momentum != "average" else initial_moments(
            self.optimiser, self.model, rate=self._rate(0), scheduled=callable(self.lr))

    def __repr__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        made = getattr(self.model, "settings", None)
        settings = ", ".join(f"{k}={v!r}" for k, v in (made or {}).items())
        shown["model"] = f"<{type(self.model).__name__}>" if made is None else f"segresnet({settings})"
        shown["augment"] = getattr(self.augment, "code", repr(self.augment))
        shown["optimiser"] = getattr(self.optimiser, "__name__", repr(self.optimiser))
        return f"SiteTrainer({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def initial(self) -> Tensors:
        """The trainable weights that the model had when the trainer was made."""
        return dict(self._start)

    def initial_buffers(self) -> Tensors:
        """The buffers and moments that sites average, as they were when the trainer was made."""
        return {**(self._buffers.moving if self.buffers == "average" else {}), **self._moments}

    def initial_model(self) -> Tensors:
        """Weights and moving buffers when the trainer was made, as `load_weights` takes them."""
        return {**self._start, **self._buffers.moving}

    def local(self, state: ServerState, site_state: SiteState | None = None) -> Tensors:
        """All tensors of the global model, or with a site's state of its own, in which it keeps its buffers."""
        own = {} if site_state is None else site_state.namespaces.get("buffers", {})
        return {**self.initial_model(), **state.model, **own}

    def check(self, run: Run) -> None:
        """Before the first round.

        Raises:
            ValueError: a round has no positive learning rate, something other than a run has changed the model since
                the trainer was made, or sites would send buffers that a part of the run does not cover.
        """
        check_buffers(run)
        for round in range(run.rounds) if callable(self.lr) else ():
            if not 0 < (rate := self._rate(round)) < math.inf:
                raise ValueError(f"the learning rate of round {round} is {rate} in a run of {run.rounds} rounds; give "
                                 f"the schedule as many rounds as the run: {self.lr!r}")
        if changed_elsewhere(self.model):
            now = {**trainable(self.model), **dict(self.model.named_buffers())}
            if any(not torch.equal(now[name].detach().cpu(), t) for name, t in self.initial_model().items()):
                raise ValueError("the model was changed after the trainer was made, such as by load_state_dict, but a "
                                 "run begins with its weights of that moment; to begin with the present ones make a "
                                 "new trainer, dataclasses.replace(trainer), with the old ones say "
                                 "load_weights(trainer.model, trainer.initial_model())")

    def _rate(self, round: int) -> float:
        return self.lr(round) if callable(self.lr) else self.lr

    def prepare(self, site: Site, state: ServerState, *, site_state: SiteState, seed: int) -> Kit:
        """Model with the global weights, optimiser with the site's moments, loader over its patients.

        The seed is that of the crops, the augmentation and the order of the patients.
        """
        device = pick_device(self.device)
        load_weights(self.model.to(device), self.local(state, site_state))
        optimiser = new_optimiser(self.optimiser, self.model, self._rate(state.round))
        if self.momentum != "restart":
            restore(optimiser, self.model, site_state.own if self.momentum == "keep" else averaged(state.buffers))
        if self.clip_norm is not None:
            limit_gradient(optimiser, list(trainable(self.model).values()), self.clip_norm)
        crops = Crops(site.train, crop=self.crop, tumour_share=self.tumour_share, augment=self.augment, seed=seed)
        wanted = self.steps * self.batch_size if self.steps else (self.epochs or 1) * len(crops)
        sampler = RandomSampler(crops, num_samples=wanted, generator=generator(seed, "order"))
        return Kit(model=self.model, optimiser=optimiser, patients=crops, objective=self.loss, device=device,
                   loader=DataLoader(crops, batch_size=self.batch_size, sampler=sampler),
                   dtype=precision_for(self.model, self.precision, device), seed=seed, backward=plain_backward)

    def fit(self, kit: Kit, site: Site, state: ServerState, *, site_state: SiteState, seed: int) -> Update:
        """Trains for one round and returns the change of the weights from `state`.

        The kit is that of `prepare`, perhaps wrapped by a privacy technique. Moments and buffers to keep go to
        `site_state`; the seed is that of everything random in the training itself, such as dropout.

        Raises:
            FloatingPointError, ValueError: a loss that is not finite, or an optimiser or buffers that cannot be kept.
        """
        losses: list[float | None] = []
        before = group_values(kit.optimiser)
        try:
            with seeded(derive(seed, "fit"), kit.device):
                kit.model.train()
                for image, target in kit.loader:
                    kit.batch = image, target
                    kit.optimiser.zero_grad(set_to_none=True)
                    losses.append(kit.backward(kit, image.to(kit.device), target.to(kit.device)))
                    kit.optimiser.step()
        finally:
            note_versions(self.model)
        if self.momentum != "restart":
            moments = kept(kit.optimiser, self.model, before=before, scheduled=callable(self.lr),
                           earlier=site_state.own)
        if self.momentum == "keep":
            site_state.own.clear()
            site_state.own.update(moments)
        local = trainable(self.model)
        # In the model's order: noise is drawn tensor by tensor.
        delta = {name: p.detach().cpu() - state.params[name] for name, p in local.items()}
        buffers = self._buffers.moved()
        if buffers and self.buffers == "keep":
            site_state.of("buffers").own.update(buffers)
            buffers = {}
        if self.momentum == "average":
            buffers = {**buffers, **to_average(moments, self._moments)}
        known = [loss for loss in losses if loss is not None]  # an empty batch is a step without a loss
        return Update(site=site.name, delta=delta, weight=float(len(site.train)), steps=len(losses),
                      metrics={"loss": float(np.mean(known))} if known else {}, buffers=buffers)
