"""The extent of a brain and its intensities as a network receives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["bounding_box", "find_brain", "normalise", "typical_signal"]

_SAMPLE = 200_000  # voxels from which levels are estimated
#: The share of a modality's typical signal that ringing reaches only in the first voxels around the brain.
_WEAK = 0.1
#: The share of the brain's voxels that may be weak, or lie apart from it, without a search for the brain.
_FEW = 0.02


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


def typical_signal(image: NDArray[Any]) -> float:
    """The median absolute value of the voxels that are clearly not background, from a sample of the volume."""
    step = _step(image)
    sample = np.abs(image[::step, ::step, ::step].astype(np.float32))
    clear = sample[sample > 0.1 * np.percentile(sample, 99)]
    return float(np.median(clear)) if clear.size else 0.0


def find_brain(images: Sequence[NDArray[Any]]) -> NDArray[np.bool_] | None:
    """The brain in scans whose background is not exactly 0; None where it is, apart from a rim of one voxel.

    Interpolation by splines rings around a brain that was cut out before, and smoothing blurs it: voxels far from the
    brain are then weak in every modality, but not 0. The brain is the largest region, without holes, in which all
    modalities but one reach a tenth of their typical signal.

    Args:
        images: modalities on one grid, shape (X, Y, Z).
    """
    levels = [(image, level) for image in images if (level := typical_signal(image)) > 0]
    step = _step(images[0])
    sample = [_signal(image[::step, ::step, ::step], level) for image, level in levels]
    strong = np.any([np.abs(part) >= _WEAK for part in sample], axis=0)
    if np.count_nonzero(np.any(sample, axis=0) & ~strong) <= _FEW * np.count_nonzero(strong):
        return None
    from scipy import ndimage

    votes = sum((_signal(image, level) >= _WEAK).astype(np.uint8) for image, level in levels)
    regions, _ = ndimage.label(votes >= max(1, len(levels) - 1))
    sizes = np.bincount(regions.ravel(), minlength=2)[1:]
    brain: NDArray[np.bool_] = ndimage.binary_fill_holes(regions == sizes.argmax() + 1)
    near = ndimage.binary_dilation(brain, np.ones((3, 3, 3)))
    far = np.count_nonzero(np.any([image != 0 for image in images], axis=0) & ~near)
    return brain if far > _FEW * np.count_nonzero(brain) > 0 else None


def _signal(image: NDArray[Any], level: float) -> NDArray[np.float32]:
    """The voxels in units of the typical signal; absolute values where many are negative, as in z-scored scans."""
    signal: NDArray[np.float32] = image.astype(np.float32) / np.float32(level)
    centred = np.count_nonzero(signal <= -_WEAK) > 0.25 * np.count_nonzero(signal >= _WEAK)
    return np.abs(signal) if centred else signal


def _step(image: NDArray[Any]) -> int:
    """Every how many voxels along each axis a volume is sampled."""
    return max(1, round(math.cbrt(image.size / _SAMPLE)))
