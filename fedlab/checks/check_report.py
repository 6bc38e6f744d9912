"""The findings of a battery of checks: passed, warned or failed, each with its remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

__all__ = ["CheckReport", "Finding", "verdict"]

_COLOURS = {"passed": "#1B7F4D", "warned": "#A15C00", "failed": "#B3261E"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: its name.
        outcome: "passed", "warned" (it works, but there is something to know) or "failed".
        what: the observation.
        remedy: what to do, unless the check passed.
    """

    check: str
    outcome: Literal["passed", "warned", "failed"]
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.outcome:<7} {self.check}: {self.what}" + (f"\n        → {self.remedy}" if self.remedy else "")


def verdict(check: str, wrong: str | None, right: str, remedy: str, *,
            otherwise: Literal["warned", "failed"] = "failed") -> Finding:
    """The finding of a check that passes as `right`, unless something is `wrong`."""
    if not wrong:
        return Finding(check=check, outcome="passed", what=right)
    return Finding(check=check, outcome=otherwise, what=wrong, remedy=remedy)


class CheckReport:
    """The outcome of all checks; true if none failed.

    Args:
        subject: what was checked, as code.
        findings: in the order of the checks.
    """

    def __init__(self, subject: str, findings: Sequence[Finding]) -> None:
        self.subject = subject
        self.findings = tuple(findings)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return self._checks("failed")

    @property
    def warned(self) -> tuple[str, ...]:
        """Names of the checks with a warning."""
        return self._checks("warned")

    def _checks(self, outcome: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(f.check for f in self.findings if f.outcome == outcome))

    def __bool__(self) -> bool:
        return not self.failed

    def _summary(self) -> str:
        counts = [f"{sum(f.outcome == outcome for f in self.findings)} {outcome}" for outcome in _COLOURS]
        return ", ".join(counts)

    def __str__(self) -> str:
        return "\n".join([f"{self.subject}: {self._summary()}", *map(str, self.findings)])

    def __repr__(self) -> str:
        return f"<CheckReport of {self.subject}: {self._summary()}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><td style="color:{_COLOURS[f.outcome]};font-weight:600">{f.outcome}</td>'
            f'<th style="text-align:left">{escape(f.check)}</th><td style="text-align:left">{escape(f.what)}'
            + (f"<br>→ {escape(f.remedy)}" if f.remedy else "") + "</td></tr>" for f in self.findings)
        return f"<p><code>{escape(self.subject)}</code>: {self._summary()}</p><table>{rows}</table>"
