"""What trains at a site in one round."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from fedlab.core.hardware import calling

__all__ = ["Kit", "PatientCrops"]


class PatientCrops(Protocol):
    """Training patients of a site: each access draws a random crop of one patient, image and regions."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass
class Kit:
    """What trains at a site in one round; a privacy technique may replace any of it before training.

    Attributes:
        model: called with images (B, 4, x, y, z), gives logits (B, 3, x, y, z), or several for a loss that takes them.
        optimiser: over the model's trainable parameters.
        loader: yields batches of images and regions; its length is the number of steps.
        patients: the crops that the loader draws from.
        objective: loss of logits and regions.
        device, dtype: where and in which precision the model is called.
        seed: of everything random at this site in this round.
        backward: fills the gradients from a batch and returns its loss, or None for an empty batch.
        close: called after training, whether it succeeded or failed.
        batch: images and regions of the last batch drawn, for debugging.
    """

    model: nn.Module
    optimiser: torch.optim.Optimizer
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]]
    patients: PatientCrops
    objective: Callable[[Any, torch.Tensor], torch.Tensor]
    device: torch.device
    dtype: torch.dtype
    seed: int
    backward: Callable[[Kit, torch.Tensor, torch.Tensor], float | None]
    close: Callable[[], None] = lambda: None
    batch: tuple[torch.Tensor, torch.Tensor] | None = None

    def loss(self, image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, in float32.

        MONAI's `DeepSupervisionLoss` is given outputs in one tensor, (B, outputs, 3, x, y, z), as the list it takes.
        """
        with calling(self.device, self.dtype):
            logits = self.model(image.double() if self.dtype is torch.float64 else image)
        if isinstance(logits, torch.Tensor) and logits.dim() > target.dim():
            from monai.losses import DeepSupervisionLoss  # seconds to import

            if isinstance(self.objective, DeepSupervisionLoss):
                logits = logits.unbind(1)
        outputs = [one.float() for one in logits] if isinstance(logits, list | tuple) else logits.float()
        return self.objective(outputs, target)
