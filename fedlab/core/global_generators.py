"""Torch's global generators, which all threads of a process share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["seeded"]

_IN_USE = threading.RLock()


@contextmanager
def seeded(seed: int | None = None, device: torch.device | None = None) -> Iterator[None]:
    """A block that uses torch's global generators, one thread of fedlab at a time, and leaves them as they were.

    Args:
        seed: that they begin with; None to go on from where they are.
        device: the GPU whose generator is used too.
    """
    with _IN_USE:
        generators = [torch.default_generator]
        if device is not None and device.type == "cuda":
            torch.cuda.init()
            index = torch.cuda.current_device() if device.index is None else device.index
            generators.append(torch.cuda.default_generators[index])
        before = [one.get_state() for one in generators]
        try:
            if seed is not None:
                for one in generators:
                    one.manual_seed(seed)
            yield
        finally:
            for one, state in zip(generators, before, strict=True):
                one.set_state(state)
