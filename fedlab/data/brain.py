"""The extent of a brain and its intensities as a network receives them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["bounding_box", "normalise"]


def bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    """The smallest box that holds all set voxels of a mask, which must not be empty: one slice per axis."""
    box = []
    for axis in range(mask.ndim):
        used = np.flatnonzero(mask.any(axis=tuple({*range(mask.ndim)} - {axis})))
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)


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
