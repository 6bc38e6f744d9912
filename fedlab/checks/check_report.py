"""The findings of a battery of checks: passed, warned or failed, each with its remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from fedlab.core.files import packaged_toml

__all__ = ["Battery", "CheckReport", "Finding"]

_COLOURS = {"passed": "#1B7F4D", "warned": "#A15C00", "failed": "#B3261E"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one check; "warned" means that it works, but that there is something to know."""

    check: str  # its name
    outcome: Literal["passed", "warned", "failed"]
    what: str  # the observation
    remedy: str = ""  # unless the check passed

    def __str__(self) -> str:
        return f"{self.outcome:<7} {self.check}: {self.what}" + (f"\n        → {self.remedy}" if self.remedy else "")


class Battery:
    """The checks of one kind of part, such as strategies, in the words of `words.toml`."""

    def __init__(self, kind: str) -> None:
        self._words = packaged_toml("fedlab.checks", "words.toml")[kind]

    def verdict(self, words: str, wrong: str | None, *, otherwise: Literal["warned", "failed"] = "failed",
                check: str | None = None, **values: object) -> Finding:
        """The finding of a check that passes unless something is `wrong`.

        Args:
            words: entry of `words.toml`, whose name is that of the check unless `check` is given.
            wrong: the observation, if there is something wrong; `otherwise` is the outcome then.
            values: for the names in braces.
        """
        text, name = self._words[words], check or words
        if not wrong:
            return Finding(check=name, outcome="passed", what=text["passes"].format(**values))
        return Finding(check=name, outcome=otherwise, what=wrong, remedy=text["remedy"].format(**values))


@dataclass(frozen=True)
class CheckReport:
    """The outcome of all checks; true if none failed."""

    subject: str  # what was checked, as code
    findings: Sequence[Finding]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple(dict.fromkeys(f.check for f in self.findings if f.outcome == "failed"))

    @property
    def warned(self) -> tuple[str, ...]:
        """Names of the checks with a warning."""
        return tuple(dict.fromkeys(f.check for f in self.findings if f.outcome == "warned"))

    def __bool__(self) -> bool:
        return not self.failed

    def _summary(self) -> str:
        return ", ".join(f"{sum(f.outcome == outcome for f in self.findings)} {outcome}" for outcome in _COLOURS)

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
