"""The gate: the check that every update passes before it leaves a site, and again before it enters the model."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fedlab.core.errors import PrivacyError
from fedlab.core.types import Spent, Tensors, Update

__all__ = ["check_update"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Products of three numbers of this size are still finite in float64.
_LARGEST = 1e90


def check_update(update: object, *, like: Tensors, site: str, buffers: Tensors | None = None) -> Update:
    """The update if it is safe to pass on.

    Args:
        update: returned by a technique or sent by a site.
        like: tensors whose names and shapes its delta must have.
        site: that must have made it.
        buffers: tensors whose names, shapes and types its buffers must have; none by default.

    Raises:
        PrivacyError: not an `Update`, of another site, other names or shapes, not floating point, NaN or infinite, or
            an invalid weight, number of steps, metrics, spent privacy, size or time.
    """
    if not isinstance(update, Update):
        raise PrivacyError(f"expected an Update from {site}, got {type(update).__name__}; a technique's protect() "
                           "returns the update it was given, changed with update.map(...)")
    if not isinstance(update.site, str) or update.site != site:
        raise PrivacyError(f"expected an update of {site}, got one that says it is of {_shown(update.site)!r}")
    for what, given, expected in (("tensors", update.delta, like), ("buffers", update.buffers, buffers or {})):
        if not isinstance(given, Mapping) or given.keys() != expected.keys():
            names = [_shown(name) for name in given.keys() ^ expected.keys()] if isinstance(given, Mapping) else []
            raise PrivacyError(f"the update of {site} has other {what} than the model: "
                               f"{sorted(names)[:3] or 'no names'}")
        for name, tensor in given.items():
            named, types = (name, _FLOATS) if what == "tensors" else (f"the buffer {name}", (expected[name].dtype,))
            _check_tensor(tensor, expected[name], f"the update of {site} has {named}", types=types)
    for what, value, right, valid in (
        ("weight", update.weight, _number(update.weight) and update.weight > 0, "a positive number"),
        ("steps", update.steps, _count(update.steps), "a count"),
        ("seconds", update.seconds, _number(update.seconds) and update.seconds >= 0, "a number of seconds"),
        ("encoded", update.encoded, update.encoded is None or (_count(update.encoded) and update.encoded > 0),
         "a count of bytes or None"),
        ("round", update.round, update.round is None or _count(update.round), "a round's number or None"),
        ("metrics", update.metrics, isinstance(update.metrics, Mapping) and all(
            isinstance(k, str) and (_number(v) or (isinstance(v, float) and math.isnan(v)))
            for k, v in update.metrics.items()), "numbers by name"),
        ("spent", update.spent, isinstance(update.spent, tuple) and all(map(_is_spent, update.spent)),
         "statements of privacy spent"),
    ):
        if not right:
            raise PrivacyError(f"the update of {site} has {what} {_shown(value)}, expected {valid}")
    return update


def _check_tensor(tensor: object, like: torch.Tensor, what: str, *, types: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in types or tensor.layout is not torch.strided:
        kind = "floating point" if types is _FLOATS else str(types[0])
        raise PrivacyError(f"{what} as something other than a dense {kind} tensor")
    if tensor.shape != like.shape:
        raise PrivacyError(f"{what} of shape {tuple(tensor.shape)}, expected {tuple(like.shape)}")
    if tensor.is_meta or tensor.requires_grad:
        raise PrivacyError(f"{what} {'without values' if tensor.is_meta else 'with its history of gradients'}; send "
                           "plain values, such as tensor.detach()")
    # A float64 may be finite and yet infinite in the model.
    if not torch.isfinite(tensor.to(like.dtype)).all():
        raise PrivacyError(f"{what} with NaN or infinite values")


def _number(value: object) -> bool:
    """Whether it is a number whose products are finite in float64."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_spent(value: object) -> bool:
    return (isinstance(value, Spent) and (_number(value.epsilon) or isinstance(value.epsilon, float))
            and value.epsilon >= 0 and _number(value.delta) and 0 <= value.delta < 1 and isinstance(value.unit, str)
            and value.unit in ("patient", "site") and isinstance(value.accountant, str)
            and isinstance(value.adjacency, str) and isinstance(value.repeats, bool))


def _shown(value: object) -> str:
    """Any value in a few words."""
    try:
        return str(value)[:80]
    except Exception as error:
        return f"a {type(value).__name__} that cannot be shown ({type(error).__name__})"
