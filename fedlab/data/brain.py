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
#: Shares of a modality's typical signal: below the first a voxel may be background, above the second it is brain.
_WEAK, _SURE = 0.1, 0.2
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
    _, exponent = torch.frexp(image[:, brain].abs().amax(dim=1))
    if exponent.min() < -7 or exponent.max() > 40:  # near the least deviation below, or squares leave float32
        image = torch.ldexp(image, -exponent.view(-1, 1, 1, 1))  # by a power of two, which changes no digit
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
    modalities but one exceed a level that the background does not reach.

    Args:
        images: modalities on one grid, shape (X, Y, Z).
    """
    levels = [(image, level) for image in images if (level := typical_signal(image)) > 0]
    step = _step(images[0])
    sample = [_signal(image[::step, ::step, ::step], level) for image, level in levels]
    strong = np.any([np.abs(part) >= _WEAK for part in sample], axis=0)
    if np.count_nonzero(np.any(sample, axis=0) & ~strong) <= _FEW * np.count_nonzero(strong):
        return None
    from scipy.ndimage import binary_dilation, binary_erosion

    common = np.partition([_signal(image, level) for image, level in levels], min(1, len(levels) - 1), axis=0)
    signal = common[min(1, len(levels) - 1)]  # of all modalities but the weakest
    around = np.ones((3, 3, 3), dtype=np.bool_)
    core = _largest(signal > _SURE)
    edge = binary_dilation(core, around, iterations=2) & ~binary_erosion(core, around)
    brain = _largest(signal > _background(signal[edge]))
    far = np.count_nonzero(np.any([image != 0 for image in images], axis=0) & ~binary_dilation(brain, around))
    return brain if far > _FEW * np.count_nonzero(brain) > 0 else None


def _background(edge: NDArray[np.float32]) -> float:
    """The signal that the background does not reach, where the edge holds as few voxels as between 0.3 and 0.6.

    Ringing falls off with its strength, whereas voxels that the brain fills in part have every signal equally often.
    """
    counts, bounds = np.histogram(edge, bins=30, range=(0.0, 0.6))
    return float(bounds[np.argmax(counts <= 1.5 * counts[15:].mean())])


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest region of a mask, without holes."""
    from scipy.ndimage import binary_fill_holes, label

    regions, _ = label(mask)
    return np.asarray(binary_fill_holes(regions == np.bincount(regions.ravel(), minlength=2)[1:].argmax() + 1))


def _signal(image: NDArray[Any], level: float) -> NDArray[np.float32]:
    """The voxels in units of the typical signal; absolute values where many are negative, as in z-scored scans."""
    signal: NDArray[np.float32] = image.astype(np.float32) / np.float32(level)
    centred = np.count_nonzero(signal <= -_WEAK) > 0.25 * np.count_nonzero(signal >= _WEAK)
    return np.abs(signal) if centred else signal


def _step(image: NDArray[Any]) -> int:
    """Every how many voxels along each axis a volume is sampled."""
    return max(1, round(math.cbrt(image.size / _SAMPLE)))
