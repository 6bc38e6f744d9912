"""Random numbers of noise that repeats with the seed: streams of 256 bits, too many to search through.

`torch.Generator().manual_seed(...)` uses 32 bits of its seed on the CPU: an adversary who sees noise could try all.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

__all__ = ["noise_generator", "noise_stream"]

#: Words of the Mersenne twister's state (Matsumoto and Nishimura 1998), and of what torch writes before them.
_TWISTER, _BEFORE = 624, 3


def noise_stream(seed: int, *names: str | int) -> int:
    """The 256-bit number of the stream called `names`."""
    return int.from_bytes(hashlib.blake2b(_text(seed, *names), digest_size=32).digest(), "big")


def noise_generator(stream: int, *names: str | int) -> torch.Generator:
    """A torch generator on the CPU whose whole state derives from all bits of a stream and the names."""
    rng = torch.Generator().manual_seed(0)
    state = rng.get_state()
    numbers = np.frombuffer(hashlib.shake_256(_text(stream, *names)).digest(4 * _TWISTER), "<u4")
    state.numpy().view("<u8")[_BEFORE:_BEFORE + _TWISTER] = numbers
    return rng.set_state(state)


def _text(*names: str | int) -> bytes:
    return "\x1f".join(map(str, names)).encode()
