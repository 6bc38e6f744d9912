"""Named tensors laid end to end, and chosen by patterns of their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch

from fedlab.core.types import Tensors

__all__ = ["flatten", "matching", "unflatten"]


def flatten(tensors: Tensors, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A copy of all values, shape (N,), in the order of the tensors."""
    return torch.cat([t.detach().flatten().to(dtype) for t in tensors.values()])


def unflatten(flat: torch.Tensor, like: Tensors) -> dict[str, torch.Tensor]:
    """The inverse of `flatten`: views of `flat` with the names and shapes of `like`."""
    pieces = flat.split([t.numel() for t in like.values()])
    return {name: piece.reshape(t.shape) for (name, t), piece in zip(like.items(), pieces, strict=True)}


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that match a pattern with "*" and "?", in order; raises `ValueError` if a pattern matches none."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no tensor of the model is called {pattern!r}; its tensors are {names[:4]} … "
                             f"{names[-2:]}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
