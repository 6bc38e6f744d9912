"""Laplace noise in floating point, repeatable from a seed for research, or from the operating system's entropy."""

from __future__ import annotations

import os

import torch

__all__ = ["laplace", "random_bits"]

#: Values drawn at a time: small enough for a processor's cache.
_CHUNK = 2**17


def random_bits(size: int, rng: torch.Generator | None) -> torch.Tensor:
    """Uniform whole numbers from 0 to 2³¹ - 1, int32, from a seeded generator or, for None, the operating system."""
    if rng is not None:
        return torch.empty(size, dtype=torch.int32).random_(generator=rng)
    return torch.frombuffer(bytearray(os.urandom(4 * size)), dtype=torch.int32).bitwise_and_(2**31 - 1)


def laplace(size: int, rng: torch.Generator | None) -> torch.Tensor:
    """Laplace noise of scale 1, float32, from 31 random bits each: none beyond ±21.5, where one in 2³¹ would lie.

    Args:
        size: number of values.
        rng: a seeded generator, or None for the operating system's entropy.
    """
    noise = torch.empty(size, dtype=torch.float32)
    for start in range(0, size, _CHUNK):
        bits = random_bits(min(_CHUNK, size - start), rng)
        uniform = bits.sub_(2**30).to(torch.float32).add_(0.5).mul_(2.0**-30)  # -1 to 1, finest around 0: the tails
        noise[start:start + _CHUNK] = uniform.abs().log_().copysign_(uniform)
    return noise
