"""The evidence on techniques as a value: a table, a figure of utility and leakage against ε, and a page to hand on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlab.core.files import filled_in, write_new
from fedlab.core.types import Spent, rounded_up
from fedlab.evidence.differences import Difference, Share
from fedlab.evidence.findings import Finding

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Assessed", "Evidence"]

#: Colour-blind safe colours (Okabe & Ito 2008) and marks of the attacks in the figure.
_MARKS = (("#D55E00", "●"), ("#0072B2", "■"), ("#009E73", "▲"), ("#CC79A7", "◆"))
#: The frame of the figure in pixels: left, the strip without a guarantee, right; top and bottom of both panels.
_LEFT, _STRIP, _RIGHT = 70, 470, 760
_PANELS = ((34, 214), (250, 380))


@dataclass(frozen=True, kw_only=True)
class Assessed:
    """The evidence on one technique.

    Attributes:
        technique: the code that makes it.
        dice: its mean Dice minus 0, with the interval over held-out patients.
        to_none: its Dice minus that without protection; None for "none" itself.
        to_start: its Dice minus that of the untouched start model; None for "start" itself.
        kept: the share of the gain over the start that it keeps; None for "start" and "none".
        spent: the proven ε of one training, the largest over sites and seeds, one per unit; empty without a guarantee.
        guarantee: the whole statement: ε, δ, unit, adjacency, accountant; or "no formal guarantee".
        findings: of the attacks, by their names.
        not_tried: names of attacks that do not fit the technique, with the reason.
        megabytes: sent per site and round; NaN where the guarantee covers it.
        seconds: of one training, the mean over seeds.
        stopped: why a training ended early; empty if none did.
    """

    technique: str
    dice: Difference
    to_none: Difference | None = None
    to_start: Difference | None = None
    kept: Share | None = None
    spent: Sequence[Spent] = ()
    guarantee: str = "no formal guarantee"
    findings: Mapping[str, Finding] = field(default_factory=dict)
    not_tried: Mapping[str, str] = field(default_factory=dict)
    megabytes: float = math.nan
    seconds: float = math.nan
    stopped: str = ""

    @property
    def epsilon(self) -> float:
        """The largest proven ε over units; infinite without a guarantee."""
        return max((one.epsilon for one in self.spent), default=math.inf)


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """What techniques cost, what they prove, and what attacks still learn; made by `fedlab.evidence.assess`.

    Attributes:
        techniques: by name; "start" is the untouched model, "none" the training without protection.
        scores: one row per seed, technique, held-out patient and region, as `fedlab.evaluate` returns them.
        settings: of the assessment, such as sites, patients, rounds, seeds and versions.
    """

    techniques: Mapping[str, Assessed]
    scores: pd.DataFrame
    settings: Mapping[str, Any]

    def __getitem__(self, name: str) -> Assessed:
        if name not in self.techniques:
            raise ValueError(f"no technique {name!r} was assessed; there are {', '.join(self.techniques)}")
        return self.techniques[name]

    def table(self) -> pd.DataFrame:
        """One row per technique: numbers with interval and n as text, "–" where there is none."""
        import pandas as pd

        attacks = self._attacks()
        rows = {name: {
            "Dice": _of(one.dice, "{:.3f}"), "minus none": _of(one.to_none), "minus start": _of(one.to_start),
            "gain kept": "–" if one.kept is None else str(one.kept),
            "proven ε": ", ".join(f"{rounded_up(s.epsilon)} per {s.unit}" for s in one.spent) or "–",
            **{attack: _beside_chance(one.findings[attack]) if attack in one.findings else "–" for attack in attacks},
            "MB per site and round": "–" if math.isnan(one.megabytes) else f"{one.megabytes:.2f}",
            "seconds": "–" if math.isnan(one.seconds) else f"{one.seconds:.0f}"}
            for name, one in self.techniques.items()}
        return pd.DataFrame.from_dict(rows, orient="index")

    def sentences(self) -> dict[str, str]:
        """Of each technique: what it keeps, what it proves, and which attacks succeeded; a claim only where clear."""
        return {name: self._sentence(name) for name in self.techniques if name != "start"}

    def figure(self) -> str:
        """Dice and the attackers' advantage against the proven ε, an SVG element; numbers are those of `table`."""
        drawn = [name for name in self.techniques if name != "start"]
        proven = sorted(self[name].epsilon for name in drawn if math.isfinite(self[name].epsilon))
        low, high = (math.floor(math.log10(proven[0])), math.ceil(math.log10(proven[-1]) + 1e-9)) if proven else (0, 1)
        bare = [name for name in drawn if not self[name].spent]
        places = {name: _STRIP + (_RIGHT - _STRIP) * (bare.index(name) + 0.5) / len(bare) if name in bare else
                  _LEFT + 20 + (_STRIP - _LEFT - 60) * (math.log10(self[name].epsilon) - low) / (high - low)
                  for name in drawn}
        # Of several points above about one ε every second one has its number on the left.
        left = {name for k, name in enumerate(drawn)
                if sum(abs(places[one] - places[name]) < 12 for one in drawn[:k]) % 2}
        intervals = {name: self[name].dice for name in drawn}
        ends = [value for one in [*intervals.values(), self["start"].dice]
                for value in (one.value, one.low, one.high) if math.isfinite(value)]
        dice = _Axis(min(ends), max(ends), *_PANELS[0])
        attacks = [name for name in self._attacks() if any(math.isfinite(one.findings[name].high) for one in
                                                           self.techniques.values() if name in one.findings)]
        leaks = [(name, attack, _advantage(found)) for name in drawn
                 for attack in attacks if (found := self[name].findings.get(attack))]
        leak = _Axis(min([0.0, *(low for _, _, (_, low, _) in leaks)]), 1.0, *_PANELS[1])
        marks = {attack: _MARKS[place % len(_MARKS)] for place, attack in enumerate(attacks)}
        return filled_in(
            "fedlab.evidence", "evidence.svg", left=_LEFT, strip=_STRIP, right=_RIGHT, panels=_PANELS, marks=marks,
            dice=dice.ticks(), leak=leak.ticks(), start=dice(self["start"].dice.value), chance=leak(0.0),
            epsilons=[(_power(k), _LEFT + 20 + (_STRIP - _LEFT - 60) * (k - low) / (high - low))
                      for k in range(low, high + 1, 1 + (high - low) // 9)] if proven else [],
            points=[{"number": number, "name": name, "left": name in left, "x": round(places[name], 1),
                     "y": dice(intervals[name].value), "low": dice(intervals[name].low),
                     "high": dice(intervals[name].high)}
                    for number, name in enumerate(drawn, 1)],
            leaks=[{"x": round(places[name] + 7 * (attacks.index(attack) - (len(attacks) - 1) / 2), 1),
                    "y": leak(value), "low": leak(least), "high": leak(most), "colour": marks[attack][0],
                    "mark": marks[attack][1], "text": f"{name}, {self[name].findings[attack].attack}"}
                   for name, attack, (value, least, most) in leaks],
            text=" ".join(self.sentences().values()))

    def save(self, path: Path | str) -> Path:
        """Writes one self-contained page: what was tried, against whom, what was found, and what it does not show.

        Raises:
            RunError: the file exists already.
        """
        page = filled_in("fedlab.evidence", "evidence_page.html", evidence=self, threats=self._threats(),
                         results=self._repr_html_())
        return write_new(path, page.encode())

    def as_json(self) -> dict[str, Any]:
        """All numbers and statements as plain values; None for a number that is not there."""
        return {"settings": dict(self.settings), "sentences": self.sentences(),
                "techniques": {name: _plain(asdict(one)) for name, one in self.techniques.items()}}

    def __repr__(self) -> str:
        return f"<Evidence: {' '.join(self.sentences().values())}>"

    def _repr_html_(self) -> str:
        return filled_in("fedlab.evidence", "evidence_cell.html", evidence=self, table=self.table(),
                         sentences=self.sentences(), figure=self.figure(),
                         drawn=[name for name in self.techniques if name != "start"])

    def _attacks(self) -> list[str]:
        return list(dict.fromkeys(attack for one in self.techniques.values() for attack in one.findings))

    def _threats(self) -> dict[str, Finding]:
        """One finding of each attack, for its threat model."""
        return {attack: next(one.findings[attack] for one in self.techniques.values() if attack in one.findings)
                for attack in self._attacks()}

    def _sentence(self, name: str) -> str:
        one = self[name]
        parts = [f"reaches Dice {_of(one.dice, '{:.3f}')}"]
        if one.kept is not None:
            parts.append("keeps no share that can be stated, as none has no clear gain over start"
                         if math.isnan(one.kept.value) else f"keeps {one.kept} of the gain over start")
        parts.append(f"guarantees {one.guarantee}" if one.spent else "gives no formal guarantee")
        bounds = {attack: f for attack, f in one.findings.items() if math.isinf(f.high)}
        parts += [f"{attack} show {f.measure} {f.number}" for attack, f in bounds.items()]
        clear = [f"{attack} ({f.measure} {f.number}, chance {f.chance:.2f})" for attack, f in one.findings.items()
                 if f.is_clear and attack not in bounds]
        others = [attack for attack, f in one.findings.items() if not f.is_clear and attack not in bounds]
        parts += [f"leaks to {', '.join(clear)}"] * bool(clear)
        parts += [f"shows no leak to {', '.join(others)}, which proves nothing"] * bool(others)
        early = f" A training ended early: {one.stopped}." if one.stopped else ""
        return f"{name}: {'; '.join(parts)}.{early}"


class _Axis:
    """A vertical axis of the figure: values to pixels, and round numbers on it."""

    def __init__(self, low: float, high: float, top: float, bottom: float) -> None:
        room = 0.06 * (high - low) or 0.05
        self.low, self.high, self.top, self.bottom = low - room, high + room, top, bottom

    def __call__(self, value: float) -> float | None:
        if not math.isfinite(value):
            return None
        return round(self.bottom - (self.bottom - self.top) * (value - self.low) / (self.high - self.low), 1)

    def ticks(self) -> list[tuple[str, float | None]]:
        step = 10 ** math.floor(math.log10((self.high - self.low) / 3))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 6)
        first = math.ceil(self.low / step)
        return [(f"{k * step:.6g}", self(k * step)) for k in range(first, math.floor(self.high / step) + 1)]


def _of(one: Difference | None, form: str = "{:+.3f}") -> str:
    """A difference with its interval and n."""
    if one is None:
        return "–"
    interval = (f" ({form} to {form}; " if math.isfinite(one.low) else " (no interval; ").format(one.low, one.high)
    return f"{form.format(one.value)}{interval}n = {one.patients})"


def _power(exponent: int) -> str:
    """A power of ten on an axis: "0.1", "10", "10⁶"."""
    superscript = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{10.0**exponent:g}" if abs(exponent) < 4 else f"10{superscript}"


def _beside_chance(found: Finding) -> str:
    """The number of a finding; a lower bound, such as of ε, has no chance to stand beside."""
    return found.number if math.isinf(found.high) else found.number.replace(", n", f", chance {found.chance:.2f}, n")


def _advantage(found: Finding) -> tuple[float, float, float]:
    """Value and limits on the scale from 0, chance, to 1, the largest value of AUC, correlation and share."""
    room = 1 - found.chance
    value, low, high = ((number - found.chance) / room if room > 0 else 0.0
                        for number in (found.value, found.low, found.high))
    return value, low, high


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
