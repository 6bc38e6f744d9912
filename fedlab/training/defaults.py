"""What a `SiteTrainer` uses unless told otherwise: loss, augmentation and optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

__all__ = ["DiceBCE", "adamw", "augmentation"]


class DiceBCE(nn.Module):
    """Soft Dice of each patient and region, plus `bce` times the binary cross-entropy of each voxel.

    No patient's loss depends on another one in the batch, a condition of per-patient clipping. Takes logits and 0/1
    targets of shape (B, 3, X, Y, Z).
    """

    def __init__(self, *, bce: float = 0.5) -> None:
        super().__init__()
        from monai.losses import DiceLoss  # seconds to import

        self.bce = bce
        self.dice = DiceLoss(sigmoid=True, batch=False, smooth_nr=1.0, smooth_dr=1.0)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if not isinstance(logits, torch.Tensor) or logits.shape != target.shape:
            shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"{len(logits)} tensors"
            raise ValueError(f"expected logits of shape {tuple(target.shape)}, the network gives {shape}; for several "
                             "outputs (deep supervision) say loss=monai.losses.DeepSupervisionLoss(DiceBCE())")
        dice: torch.Tensor = self.dice(logits, target)
        return dice + self.bce * nn.functional.binary_cross_entropy_with_logits(logits, target)

    def __repr__(self) -> str:
        return f"DiceBCE(bce={self.bce})"


def augmentation(*, flips: Sequence[int] = (0, 1, 2)) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Mirror flips, and intensity scale and shift by up to a tenth per channel (Myronenko 2018; Li et al. 2019).

    A MONAI `Compose` over {"image": (4, X, Y, Z), "label": (3, X, Y, Z)}. Each axis of `flips`, out of 0, 1 and 2, is
    flipped with probability 1/2; (0,) only swaps left and right.
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


def adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """AdamW with a weight decay of 1e-5; its second moments look back 100 steps, as suits runs of hundreds of steps."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-5, fused=True)
