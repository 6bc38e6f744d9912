"""Checks of settings, refused in the same words everywhere."""

from __future__ import annotations

import math
from numbers import Integral, Real

__all__ = ["check_positive", "check_whole"]


def check_whole(*, least: int = 1, optional: bool = False, **settings: object) -> None:
    """Raises `ValueError` for a setting that is not a whole number of at least `least`, or None where optional."""
    for name, value in settings.items():
        valid = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
        if not valid and not (optional and value is None):
            kind = "positive whole number" if least == 1 else f"whole number of at least {least}"
            raise ValueError(f"{name} is a {kind}{' or None' if optional else ''}, got {value!r}")


def check_positive(*, optional: bool = False, **settings: object) -> None:
    """Raises `ValueError` for a setting that is not a positive, finite number, or None where optional."""
    for name, value in settings.items():
        valid = isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf
        if not valid and not (optional and value is None):
            raise ValueError(f"{name} is a positive number{' or None' if optional else ''}, got {value!r}")
