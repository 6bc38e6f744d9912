"""Independent random streams from one seed, named by their purpose.

A stream depends on the seed and its names only, never on earlier draws: a resumed run, another engine or another order
of the sites draws the same numbers.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["derive", "generator"]


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names`, for example `derive(0, "fit", site, round)`."""
    text = "\x1f".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A torch generator for the stream called `names`."""
    return torch.Generator().manual_seed(derive(seed, *names))
