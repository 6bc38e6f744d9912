"""Intensities as a network is given them."""

from __future__ import annotations

import torch

__all__ = ["normalise"]


def normalise(image: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
    """Each channel with mean 0 and standard deviation 1 over the brain, 0 outside (Li et al. 2019, section 3).

    Args:
        image: float, shape (C, X, Y, Z).
        brain: bool, shape (X, Y, Z).

    Raises:
        ValueError: no voxel of `brain` is set.
    """
    if not brain.any():
        raise ValueError("the brain mask is empty: nothing to normalise over; check that the scan is not blank")
    inside = image[:, brain]
    mean = inside.mean(dim=1).view(-1, 1, 1, 1)
    std = inside.std(dim=1).clamp_min(1e-6).view(-1, 1, 1, 1)
    return (image - mean) / std * brain
