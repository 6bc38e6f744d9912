"""Gaussian and Laplace noise in floating point: repeatable from a seed for research, or from the operating system."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["laplace", "random_bits", "standard_normal"]

#: Values made at a time: normal ones from 8 MiB of the operating system's entropy, Laplace ones in a processor's cache.
_CHUNK_NORMAL, _CHUNK_LAPLACE = 2**18, 2**17


def standard_normal(shape: Sequence[int], rng: torch.Generator | None) -> torch.Tensor:
    """Independent standard normal values, float64.

    Those of a generator repeat, and an adversary who knows its seed can subtract them: for research. Without a
    generator they come from the operating system's cryptographic random numbers, each as half the sum of four normals,
    so that the gaps between representable numbers reveal nothing useful about the noise, as far as is known (Mironov
    2012; Holohan and Braghin 2021, arXiv 2107.10138). Exact noise, that of `secure_mode`, is in `on_grid`.

    Args:
        shape: of the result.
        rng: a seeded generator, or None for the operating system's entropy.
    """
    if rng is not None:
        return torch.randn(tuple(shape), generator=rng, dtype=torch.float64)
    flat = np.empty(math.prod(shape))
    for start in range(0, flat.size, _CHUNK_NORMAL):
        part = flat[start:start + _CHUNK_NORMAL]
        bits = np.frombuffer(os.urandom(32 * part.size), dtype=np.uint64) >> np.uint64(11)
        uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1): the logarithm is finite
        radius, angle = np.sqrt(-2 * np.log(uniform[::2])), 2 * np.pi * uniform[1::2]  # Box and Muller 1958
        part[:] = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)]).reshape(4, -1).sum(axis=0) / 2
    return torch.from_numpy(flat).reshape(tuple(shape))


def laplace(size: int, rng: torch.Generator | None) -> torch.Tensor:
    """Laplace noise of scale 1, float32, from 31 random bits each: none beyond ±21.5, where one in 2³¹ would lie."""
    noise = torch.empty(size, dtype=torch.float32)
    for start in range(0, size, _CHUNK_LAPLACE):
        bits = random_bits(min(_CHUNK_LAPLACE, size - start), rng)
        uniform = bits.sub_(2**30).to(torch.float32).add_(0.5).mul_(2.0**-30)  # -1 to 1, finest around 0: the tails
        noise[start:start + _CHUNK_LAPLACE] = uniform.abs().log_().copysign_(uniform)
    return noise


def random_bits(size: int, rng: torch.Generator | None) -> torch.Tensor:
    """Uniform whole numbers from 0 to 2³¹ - 1, int32, from a seeded generator or, for None, the operating system."""
    if rng is not None:
        return torch.empty(size, dtype=torch.int32).random_(generator=rng)
    return torch.frombuffer(bytearray(os.urandom(4 * size)), dtype=torch.int32).bitwise_and_(2**31 - 1)
