"""Checks of settings: a wrong one is refused where it is given, with what was expected."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Real

__all__ = ["check_choice", "check_count", "check_patterns", "check_positive", "check_share"]


def check_positive(*, optional: bool = False, **settings: object) -> None:
    """Raises `ValueError` for a setting that is not a positive, finite number.

    Args:
        optional: accept None too.
        settings: by name.
    """
    for name, value in settings.items():
        if not (optional and value is None) and not (isinstance(value, Real) and 0 < float(value) < math.inf):
            raise ValueError(f"{name} is a positive number{' or None' * optional}, got {value!r}")


def check_count(**settings: object) -> None:
    """Raises `ValueError` for a setting that is not a positive whole number."""
    for name, value in settings.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is a positive whole number, got {value!r}")


def check_share(**settings: float) -> None:
    """Raises `ValueError` for a setting that is not above 0 and at most 1."""
    for name, value in settings.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} is above 0 and at most 1, got {value}")


def check_choice(choices: Collection[str], **settings: object) -> None:
    """Raises `ValueError` for a setting that is not one of the choices."""
    for name, value in settings.items():
        if value not in choices:
            raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}, got {value!r}")


def check_patterns(**settings: object) -> None:
    """Raises `ValueError` for a setting that is not a list of names or patterns of tensors."""
    for name, value in settings.items():
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(n, str) for n in value):
            raise ValueError(f"{name} is a list of names or patterns, such as ['*norm*'], got {value!r}")
