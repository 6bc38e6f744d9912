"""Checks of settings: a wrong one is refused where it is given, with what was expected."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Integral, Real

__all__ = ["check_choice", "check_patterns", "check_positive", "check_share", "check_whole", "check_within"]


def check_positive(*, optional: bool = False, **settings: object) -> None:
    """Raises `ValueError` for a setting that is not a positive, finite number, or None where optional."""
    for name, value in settings.items():
        valid = isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf
        if not valid and not (optional and value is None):
            raise ValueError(f"{name} is a positive number{' or None' * optional}, got {value!r}")


def check_whole(*, least: int = 1, optional: bool = False, **settings: object) -> None:
    """Raises `ValueError` for a setting that is not a whole number of at least `least`, or None where optional."""
    for name, value in settings.items():
        valid = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
        if not valid and not (optional and value is None):
            kind = "positive whole number" if least == 1 else f"whole number of at least {least}"
            raise ValueError(f"{name} is a {kind}{' or None' * optional}, got {value!r}")


def check_share(**settings: object) -> None:
    """Raises `ValueError` for a setting that is not above 0 and at most 1."""
    for name, value in settings.items():
        if not isinstance(value, Real) or not 0 < float(value) <= 1:
            raise ValueError(f"{name} is above 0 and at most 1, got {value}")


def check_within(*, least: float = 0.0, below: float = math.inf, most: float | None = None, **settings: object) -> None:
    """Raises `ValueError` for a setting that is not a number of at least `least` and below a limit, or at most one."""
    for name, value in settings.items():
        number = float(value) if isinstance(value, Real) else math.nan
        if not least <= number or not (number < below if most is None else number <= most):
            limit = f"at most {most:g}" if most is not None else "finite" if below == math.inf else f"below {below:g}"
            raise ValueError(f"{name} is at least {least:g} and {limit}, got {value}")


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
