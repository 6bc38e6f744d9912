"""Local training at a site: the one loop, readable top to bottom."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from fedlab.core.hardware import pick_device, pick_precision
from fedlab.core.kit import Kit
from fedlab.core.regions import labels_to_regions
from fedlab.core.seeds import derive, generator
from fedlab.core.settings import check_positive, check_whole
from fedlab.core.types import Patient, ServerState, Site, SiteState, Tensors, Update
from fedlab.core.weights import load_weights, trainable

__all__ = ["Crops", "DiceBCE", "PolyDecay", "SiteTrainer", "augmentation"]


@dataclass(frozen=True, kw_only=True)
class PolyDecay:
    """A learning rate that falls from `start` to 0 over `rounds` rounds (Myronenko 2018, section 3.2).

    Called with the number of a round it returns start * (1 - round / rounds) ** power.
    """

    start: float
    rounds: int
    power: float = 0.9

    def __post_init__(self) -> None:
        if self.start <= 0 or self.rounds < 1 or self.power < 0:
            raise ValueError(f"expected start > 0, rounds >= 1 and power >= 0, got {self!r}")

    def __call__(self, round: int) -> float:
        return float(self.start * max(0.0, 1 - round / self.rounds) ** self.power)


class DiceBCE(nn.Module):
    """Soft Dice of each patient and region, plus `bce` times the binary cross-entropy of each voxel.

    Dice is computed per patient and then averaged, so no patient's loss depends on another patient in the batch: a
    condition of per-patient clipping. Takes logits and 0/1 targets of shape (B, 3, X, Y, Z).
    """

    def __init__(self, *, bce: float = 0.5) -> None:
        super().__init__()
        from monai.losses import DiceLoss  # seconds to import

        self.bce = bce
        self.dice = DiceLoss(sigmoid=True, batch=False, smooth_nr=1.0, smooth_dr=1.0)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        dice: torch.Tensor = self.dice(logits, target)
        return dice + self.bce * nn.functional.binary_cross_entropy_with_logits(logits, target)

    def __repr__(self) -> str:
        return f"DiceBCE(bce={self.bce})"


def augmentation(*, flips: Sequence[int] = (0, 1, 2)) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Mirror flips, and intensity scale and shift by up to a tenth per channel (Myronenko 2018; Li et al. 2019).

    A MONAI `Compose` over {"image": (4, X, Y, Z), "label": (3, X, Y, Z)}.

    Args:
        flips: axes flipped with probability 1/2; (0,) only swaps left and right.

    Raises:
        ValueError: an axis other than 0, 1 or 2.
    """
    if not set(flips) <= {0, 1, 2}:
        raise ValueError(f"flips are axes out of 0, 1 and 2, got {tuple(flips)}")
    from monai import transforms as mt  # seconds to import

    both = ("image", "label")
    changes = mt.Compose([
        *(mt.RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in flips),
        mt.RandScaleIntensityd("image", factors=0.1, prob=1.0, channel_wise=True),
        mt.RandShiftIntensityd("image", offsets=0.1, prob=1.0, channel_wise=True),
    ])
    changes.__dict__["code"] = f"augmentation(flips={tuple(flips)})"
    changes.__dict__["_built"] = (augmentation, {"flips": tuple(flips)})  # see fedlab.deploy.objects.built
    return changes


class Crops(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """One random crop of a patient per item: image (4, x, y, z) float32 and regions (3, x, y, z) float32.

    Crops are centred on a tumour voxel with probability `tumour_share`, else on any other voxel.

    Args:
        patients: labelled patients.
        crop: size of a crop in voxels.
        tumour_share: between 0 and 1.
        augment: a MONAI transform over {"image", "label"}, or None.
        seed: of the crops and of the augmentation.

    Raises:
        ValueError: a patient has no label or is smaller than the crop.
    """

    def __init__(self, patients: Sequence[Patient], *, crop: tuple[int, int, int], tumour_share: float,
                 augment: Callable[..., Any] | None, seed: int) -> None:
        from monai.transforms import RandCropByPosNegLabeld, Randomizable

        for patient in patients:
            grid = tuple(patient.image.shape[1:])
            if patient.label is None:
                raise ValueError(f"patient {patient.id} has no label; training needs labelled patients only")
            if any(c > g for c, g in zip(crop, grid, strict=True)):
                raise ValueError(f"crop {crop} is larger than patient {patient.id} with grid {grid}; "
                                 "use a smaller crop")
        self.patients = patients
        self._crop = RandCropByPosNegLabeld(
            ("image", "label"), label_key="tumour", spatial_size=crop, pos=tumour_share, neg=1 - tumour_share)
        self._crop.set_random_state(seed=derive(seed, "crop") % 2**32)
        self._augment = copy.deepcopy(augment)
        if isinstance(self._augment, Randomizable):
            self._augment.set_random_state(seed=derive(seed, "augment") % 2**32)

    def __len__(self) -> int:
        return len(self.patients)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        patient = self.patients[index]
        label = patient.label[None]  # type: ignore[index]
        with _untracked():
            cut = self._crop({"image": patient.image, "label": label, "tumour": label})[0]
            item: dict[str, Any] = {"image": cut["image"].float(), "label": labels_to_regions(cut["label"][0])}
            if self._augment is not None:
                item = self._augment(item)
        return torch.as_tensor(item["image"]), torch.as_tensor(item["label"])


@contextmanager
def _untracked() -> Iterator[None]:
    """Plain tensors from MONAI's transforms: MONAI's metadata would pass through every layer of the network."""
    from monai.data import get_track_meta, set_track_meta

    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)


def plain_backward(kit: Kit, image: torch.Tensor, target: torch.Tensor) -> float:
    """Gradients of the mean loss of a batch.

    Raises:
        FloatingPointError: the loss is NaN or infinite.
    """
    loss = kit.loss(image, target)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {float(loss.detach())}; lower the learning rate or look for damaged "
                                 "scans")
    loss.backward()
    return float(loss.detach())


def adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """AdamW with a weight decay of 1e-5; its second moments look back 100 steps, as suits runs of hundreds of steps."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-5, fused=True)


@dataclass(frozen=True, kw_only=True, repr=False)
class SiteTrainer:
    """Trains a model on one site's patients, starting from the global weights.

    Args:
        model: the network. Its weights when the trainer is made are the start of every run with this trainer; one
            instance serves all sites.
        lr: learning rate, or a function of the round's number such as `PolyDecay`.
        steps: optimiser steps per round; or
        epochs: passes over the site's patients per round. Exactly one of the two is given.
        batch_size: patients per step.
        crop: voxels of the random crop taken from each patient.
        tumour_share: share of crops centred on tumour.
        augment: a MONAI transform over {"image", "label"}, or None.
        loss: of logits and regions; must not mix patients when used with patient-level privacy.
        optimiser: makes an optimiser from parameters and a learning rate.
        momentum: "keep" the optimiser's moments at the site between rounds or "restart" them; Li et al. 2019 compare
            the two.
        precision: "auto", "bf16" or "fp32", see `fedlab.core.hardware.pick_precision`.
        device: "auto" or a torch device name.

    Raises:
        ValueError: a setting out of its range.
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
    momentum: Literal["keep", "restart"] = "keep"
    precision: str = "auto"
    device: str = "auto"
    _start: dict[str, torch.Tensor] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give either steps or epochs per round, got steps={self.steps} and epochs={self.epochs}")
        check_whole(batch_size=self.batch_size)
        check_whole(optional=True, steps=self.steps, epochs=self.epochs)
        if not 0 <= self.tumour_share <= 1:
            raise ValueError(f"tumour_share is between 0 and 1, got {self.tumour_share}")
        if self.momentum not in ("keep", "restart"):
            raise ValueError(f"momentum is 'keep' or 'restart', got {self.momentum!r}")
        if not callable(self.lr):
            check_positive(lr=self.lr)
        pick_precision(self.precision, torch.device("cpu"))
        # Runs change the model's weights, never its start.
        self._start.update({name: p.detach().cpu().clone() for name, p in trainable(self.model).items()})

    def __repr__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        shown["model"] = _as_code(self.model)
        shown["augment"] = getattr(self.augment, "code", repr(self.augment))
        shown["optimiser"] = getattr(self.optimiser, "__name__", repr(self.optimiser))
        return f"SiteTrainer({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def initial(self) -> Tensors:
        """The trainable weights that the model had when the trainer was made."""
        return dict(self._start)

    def prepare(self, site: Site, state: ServerState, *, site_state: SiteState, seed: int) -> Kit:
        """Model with the global weights, optimiser with the site's moments, loader over its patients.

        Args:
            site: with the patients to train on.
            state: the server's.
            site_state: the site's; its `own` holds the optimiser's moments.
            seed: of the crops, the augmentation and the order of the patients.
        """
        device = pick_device(self.device)
        load_weights(self.model.to(device), state.params)
        lr = self.lr(state.round) if callable(self.lr) else self.lr
        optimiser = self.optimiser(trainable(self.model).values(), lr)
        if self.momentum == "keep":
            _restore_moments(optimiser, self.model, site_state.own)
        crops = Crops(site.train, crop=self.crop, tumour_share=self.tumour_share, augment=self.augment, seed=seed)
        wanted = self.steps * self.batch_size if self.steps else (self.epochs or 1) * len(crops)
        sampler = RandomSampler(crops, num_samples=wanted, generator=generator(seed, "order"))
        return Kit(model=self.model, optimiser=optimiser, patients=crops, objective=self.loss, device=device,
                   loader=DataLoader(crops, batch_size=self.batch_size, sampler=sampler),
                   dtype=pick_precision(self.precision, device), seed=seed, backward=plain_backward)

    def fit(self, kit: Kit, site: Site, state: ServerState, *, site_state: SiteState, seed: int) -> Update:
        """Trains for one round and returns the change of the weights.

        Args:
            kit: from `prepare`, perhaps wrapped by a privacy technique.
            site: with the patients to train on.
            state: with the global model from which the change is measured.
            site_state: the site's; the optimiser's moments in its `own` are replaced when momentum is kept.
            seed: of everything random in the training itself, such as dropout.

        Raises:
            FloatingPointError: the loss is NaN or infinite.
        """
        losses: list[float | None] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "fit"))
            kit.model.train()
            for image, target in kit.loader:
                kit.batch = image, target
                kit.optimiser.zero_grad(set_to_none=True)
                losses.append(kit.backward(kit, image.to(kit.device), target.to(kit.device)))
                kit.optimiser.step()
        if self.momentum == "keep":
            site_state.own.clear()
            site_state.own.update(_moments(kit.optimiser, self.model))
        local = trainable(self.model)
        # In the model's order: noise is drawn tensor by tensor.
        delta = {name: p.detach().cpu() - state.params[name] for name, p in local.items()}
        return Update(site=site.name, delta=delta, weight=float(len(site.train)), steps=len(losses),
                      metrics=_mean_loss(losses))


def _mean_loss(losses: Sequence[float | None]) -> dict[str, float]:
    """The mean over the batches with a patient: an empty batch is a step without a loss."""
    known = [loss for loss in losses if loss is not None]
    return {"loss": float(np.mean(known))} if known else {}


def _as_code(model: nn.Module) -> str:
    settings = getattr(model, "settings", None)
    if settings is None:
        return f"<{type(model).__name__}>"
    return f"segresnet({', '.join(f'{k}={v!r}' for k, v in settings.items())})"


def _moments(optimiser: torch.optim.Optimizer, model: nn.Module) -> dict[str, torch.Tensor]:
    names = {id(p): name for name, p in trainable(model).items()}
    return {f"{names[id(p)]}|{key}": torch.as_tensor(value).detach().cpu().clone()
            for p, slots in optimiser.state.items() for key, value in slots.items() if value is not None}


def _restore_moments(optimiser: torch.optim.Optimizer, model: nn.Module, kept: dict[str, torch.Tensor]) -> None:
    parameters = trainable(model)
    for key, value in kept.items():
        name, slot = key.rsplit("|", 1)
        parameter = parameters[name]
        optimiser.state[parameter][slot] = value.clone().to(parameter.device if value.dim() else "cpu")
