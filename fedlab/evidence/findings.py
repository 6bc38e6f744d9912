"""What an attack found: one number with its interval, its number of trials, and the value that guessing gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import Literal, get_args

from fedlab.core.settings import check_choice, check_whole

__all__ = ["Finding", "Threat", "Who"]

Who = Literal["server", "site", "recipient of the model"]


@dataclass(frozen=True, kw_only=True)
class Threat:
    """A threat model: an attack means nothing without it.

    Args:
        who: attacks: the server, another site of the run, or a recipient of the model.
        sees: what the attacker observes and knows.
        wants: what the attacker wants to learn.

    Raises:
        ValueError: another attacker, or an empty description.
    """

    who: Who
    sees: str
    wants: str

    def __post_init__(self) -> None:
        check_choice(get_args(Who), who=self.who)
        if not self.sees.strip() or not self.wants.strip():
            raise ValueError("a threat says what the attacker sees and what the attacker wants, in words")

    def __str__(self) -> str:
        return f"the {self.who} sees {self.sees} and wants to know {self.wants}"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One number that an attack reached; it prints as a sentence with interval and number of trials.

    A finding that is clear of chance shows a leak. One that is not shows nothing: a better attack may succeed. A
    reconstruction below what the attacker's prior knowledge gives is none.

    Args:
        attack: the code that makes it.
        threat: its threat model.
        measure: what the number is, such as "AUC".
        value: the number; more is a greater leak.
        low, high: limits of its 95 % interval; `high` is infinite for a lower bound.
        trials: number of trials that the interval rests on.
        chance: the value of guessing, or of the attacker's prior knowledge alone.

    Raises:
        ValueError: numbers that are not ordered as low ≤ value ≤ high, or no trial.
    """

    attack: str
    threat: Threat
    measure: str
    value: float
    low: float
    high: float
    trials: int
    chance: float

    def __post_init__(self) -> None:
        check_whole(trials=self.trials)
        if not self.low <= self.value <= self.high or math.isinf(self.value) or not math.isfinite(self.chance):
            raise ValueError(f"expected low ≤ value ≤ high and a finite chance, got {self.low}, {self.value}, "
                             f"{self.high} and {self.chance}")

    @property
    def is_clear(self) -> bool:
        """Whether the interval lies above chance; for an AUC, whose sign an attacker may turn, also below."""
        return self.low > self.chance or self.is_inverted

    @property
    def is_inverted(self) -> bool:
        """Whether an AUC lies below chance: the attacker has the wrong sign and may turn it."""
        return self.measure == "AUC" and self.high < self.chance

    @property
    def verdict(self) -> str:
        """In words, whether this is a leak; never that there is none."""
        if self.is_inverted:
            return f"inverted sign: an attacker who turns it reaches {2 * self.chance - self.value:.2f}"
        if self.high < self.chance:
            return "below chance: this attack learns nothing, which is no proof of protection"
        return "clear of chance" if self.is_clear else "not clear of chance, which is no proof of protection"

    @property
    def number(self) -> str:
        """The number with its interval and the number of trials."""
        interval = (f"95 % interval {self.low:.2f} to {self.high:.2f}" if math.isfinite(self.high) else
                    f"at least {self.low:.2f} with 95 % confidence")
        return f"{self.value:.2f} ({interval}, n = {self.trials})"

    def __str__(self) -> str:
        return (f"{self.attack}: {self.measure} {self.number}; chance {self.chance:.2f}; {self.verdict}. "
                f"{self._threat()}")

    def _repr_html_(self) -> str:
        return (f"<p><b>{escape(self.measure)} {escape(self.number)}</b>, chance {self.chance:.2f}: "
                f"{escape(self.verdict)}<br>{escape(self._threat())}<br><code>{escape(self.attack)}</code></p>")

    def _threat(self) -> str:
        return f"Threat: {self.threat}."
