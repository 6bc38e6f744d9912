"""A technique, or a way of aggregation, that a site requires, with limits of its settings."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import fedlab.privacy
from fedlab.core.errors import PrivacyError
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy

__all__ = ["Required", "is_number", "nearest"]


@dataclass(frozen=True, kw_only=True)
class Required:
    """A technique, or a way of aggregation, that a site requires, and limits of its settings.

    Args:
        technique: the name of a class of `fedlab.privacy`, such as "DPSGD" or "SecureAggregation", or "module:Class" of
            an approved file.
        least, most: limits of settings, by name, such as least={"noise_multiplier": 0.8} and most={"clip": 1.0}.
        exactly: settings with a fixed value, such as {"secure_mode": True}.

    Raises:
        ValueError: a limit that is no number of at least 0, a range without a number in it, or a setting that is both
            fixed and limited.
    """

    technique: str
    least: Mapping[str, float] = field(default_factory=dict)
    most: Mapping[str, float] = field(default_factory=dict)
    exactly: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.technique, str) or not self.technique:
            raise ValueError(f"technique is the name of a class, such as 'DPSGD', got {self.technique!r}")
        for name, limit in (*self.least.items(), *self.most.items()):
            if not is_number(limit) or not 0 <= limit < math.inf:
                raise ValueError(f"the limit of {self.technique}'s {name} is a number of at least 0, got {limit!r}")
        for name in (*self.least, *self.most):
            if name in self.exactly or self.least.get(name, 0) > self.most.get(name, math.inf):
                raise ValueError(f"no value of {self.technique}'s {name} is within the limits of {self!r}")
        for name, value in self.exactly.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"the value of {self.technique}'s {name} is finite, got {value!r}")

    @classmethod
    def read(cls, value: Any) -> Required:
        """From site.toml: a name, or a table such as {technique = "DPSGD", min_noise_multiplier = 0.8}.

        Raises:
            ValueError: something else, a technique or setting that fedlab does not have, or an invalid limit,
                since a site would rely on a limit that is not checked.
        """
        if isinstance(value, str):
            value = {"technique": value}
        if not isinstance(value, dict) or "technique" not in value:
            raise ValueError(f"a required technique is a name or a table with 'technique', got {value!r}")
        limits: dict[str, dict[str, Any]] = {"min_": {}, "max_": {}, "": {}}
        for name, limit in value.items():
            kind = name[:4] if name.startswith(("min_", "max_")) else ""
            # The budget of a technique is called max_epsilon itself.
            setting = name if name == "max_epsilon" else name.removeprefix(kind)
            if setting in limits[kind]:
                raise ValueError(f"{kind}{setting} is given twice, got {value!r}")
            limits[kind][setting] = limit
        found = cls(technique=limits[""].pop("technique"), least=limits["min_"], most=limits["max_"],
                    exactly=limits[""])
        found._check_names()
        return found

    def check(self, privacy: Privacy, aggregation: Aggregation) -> None:
        """Raises `PrivacyError` unless a technique or the aggregation is the required one, within its limits."""
        found = [part for part in (*privacy.layers, aggregation) if self.technique in _names(type(part))]
        if not found:
            raise PrivacyError(f"this site insists on {self.technique}, the plan protects with {privacy!r} and "
                               f"{aggregation!r}")
        for relation, name, limit in self._limits():
            for part in found:
                if not _holds(value := getattr(part, name, None), limit, relation):
                    raise PrivacyError(f"this site insists on {self.technique} with {name} of {relation} {limit!r}, "
                                       f"the plan has {value!r}")

    def check_clip(self, clip: float) -> None:
        """Raises `PrivacyError` for the clipping norm of a round, which an `AdaptiveClip` moves, beyond the limits."""
        for relation, name, limit in self._limits():
            if name == "clip" and not _holds(clip, limit, relation):
                raise PrivacyError(f"this site insists on {self.technique} with clip of {relation} {limit!r}, in this "
                                   f"round it is {clip:g}")

    def _limits(self) -> Iterator[tuple[str, str, Any]]:
        for relation, limits in (("at least", self.least), ("at most", self.most), ("exactly", self.exactly)):
            yield from ((relation, name, limit) for name, limit in limits.items())

    def _check_names(self) -> None:
        """Refuses a technique or a setting that fedlab does not have, and a value of another type than its setting."""
        module, _, name = self.technique.rpartition(":")
        if module and not module.startswith("fedlab."):
            return  # of a file, which is read only when it is used
        found = getattr(fedlab.privacy, name, None)
        if not isinstance(found, type) or self.technique not in _names(found) or not issubclass(
                found, Privacy | Aggregation) or found in (Privacy, Aggregation):
            raise ValueError(f"fedlab has no technique {self.technique!r}{nearest(name, dir(fedlab.privacy))}; one of "
                             "a file is named module:Class")
        settings = inspect.signature(found).parameters
        for relation, setting, value in self._limits():
            if setting not in settings:
                raise ValueError(f"{name} has no setting {setting!r}{nearest(setting, settings)}; it has "
                                 f"{', '.join(settings)}")
            default = settings[setting].default
            ordered = re.search(r"\b(int|float)\b", str(settings[setting].annotation)) is not None
            if relation != "exactly" and not ordered:
                raise ValueError(f"{name}'s {setting} is no number; fix it with {setting} = …, without min_ or max_")
            if relation == "exactly" and (isinstance(value, bool) is not isinstance(default, bool)
                                          or ordered is not is_number(value)
                                          or isinstance(default, str) is not isinstance(value, str)):
                raise ValueError(f"{name}'s {setting} is of another type than {value!r}: it is "
                                 f"{settings[setting].annotation}")


def nearest(name: str, known: Collection[str]) -> str:
    """In words, the name that was probably meant; empty if none is similar."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5) or [k for k in known if name and name in k]
    return f" (did you mean {found[0]!r}?)" if found else ""


def is_number(value: Any) -> bool:
    """Whether it is a plain number and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _holds(value: Any, limit: Any, relation: str) -> bool:
    """Whether a setting is within a limit; a missing setting or one that is no number is not."""
    if relation == "exactly":
        same = (is_number(value) and is_number(limit)) or type(value) is type(limit) or (
            isinstance(value, list | tuple) and isinstance(limit, list | tuple))
        return same and bool(value == limit if is_number(value) or isinstance(value, bool | str)
                             else list(value) == list(limit))
    value = getattr(value, "start", value)  # of an AdaptiveClip
    return is_number(value) and bool(value >= limit if relation == "at least" else value <= limit)


def _names(cls: type) -> tuple[str, ...]:
    """The names by which a policy can require a class: only fedlab's own need no module."""
    full = f"{cls.__module__}:{cls.__qualname__}"
    return (full, cls.__qualname__) if cls.__module__.startswith("fedlab.privacy.") else (full,)
