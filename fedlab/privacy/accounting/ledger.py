"""The privacy ledger of a site: what it has released, and the ε that provably follows from it."""

from __future__ import annotations

import json
import math
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any, Literal, get_args

from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError
from fedlab.core.settings import check_choice, check_positive
from fedlab.core.types import ServerState, SiteState, Spent, Update, rounded_up
from fedlab.privacy.accounting.mechanisms import (
    RELEASES,
    Accountant,
    Concentrated,
    Gaussian,
    Pure,
    Release,
    epsilon_of,
)

__all__ = ["PATIENT_ZEROED", "SITE_ZEROED", "SUMMED_ZEROED", "Accountant", "Concentrated", "Gaussian", "HasLedger",
           "Ledger", "Pure", "Terms", "check_statement", "check_terms", "epsilon_of", "noise_multiplier_for"]

Unit = Literal["patient", "site"]
HasLedger = SiteState | ServerState

_FORMAT = "fedlab-ledger-2"
#: The least and the largest noise multiplier that `noise_multiplier_for` tries.
_LEAST_NOISE, _MOST_NOISE = 1e-3, 1000.0

#: What DP-SGD hides, and noise at the server: a contribution replaced by nothing ("zero-out"). Their sums are divided
#: by an expected number that follows from the number of patients or sites, which stays as it is.
PATIENT_ZEROED = "zero-out: add or remove one patient's contribution; the number of patients is public"
SITE_ZEROED = "zero-out: add or remove one site's updates, seen from beyond the server; the number of sites is public"
#: What noise of the sites in a secure sum hides.
SUMMED_ZEROED = "one site's update replaced by zeros, who takes part is public; the server sees the noisy sum only"
#: Statements that imply another, so that their releases add up to it: what hides whether a patient is there at all
#: hides the patient where the number of patients is public. The other is what ledgers said once.
_IMPLIES = {"add or remove one patient": PATIENT_ZEROED,
            "add or remove one site's updates, seen from beyond the server": SITE_ZEROED,
            "one site's update replaced by zeros; the server sees the noisy sum only": SUMMED_ZEROED}


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The meaning of an ε. All entries of a ledger for one unit have the same terms.

    Args:
        unit: whose data is protected, one "patient" or a whole "site".
        delta: probability with which the guarantee may fail, below 1 over the number of units.
        adjacency: the change of the data that stays hidden, in words, and what is taken as public, such as
            `PATIENT_ZEROED`.
        accountant: "rdp" (Mironov 2017; Mironov et al. 2019), "prv" (Gopi et al. 2021; tighter, slower), or "gdp"
            (Dong et al. 2019; exact, for noise without sampling only).

    Raises:
        ValueError: a setting is out of range.
    """

    unit: Unit
    delta: float
    adjacency: str
    accountant: Accountant = "rdp"

    def __post_init__(self) -> None:
        check_choice(get_args(Unit), unit=self.unit)
        check_choice(get_args(Accountant), accountant=self.accountant)
        if not (isinstance(self.delta, Real) and 0 < self.delta < 1):
            raise ValueError(f"delta lies between 0 and 1 and below 1 over the number of {self.unit}s, "
                             f"got {self.delta}")
        if not self.adjacency:
            raise ValueError("adjacency says in words which change of the data stays hidden, got an empty text")

    def spent(self, releases: Sequence[Release]) -> Spent:
        """The statement of what these releases together have spent."""
        epsilon = epsilon_of(releases, delta=self.delta, accountant=self.accountant)
        return Spent(epsilon=epsilon, delta=self.delta, unit=self.unit, accountant=self.accountant,
                     adjacency=self.adjacency)

    def check_delta(self, units: int, *, where: str = "") -> None:
        """Raises `ValueError` if δ is not below 1 over the number of units, which are counted `where`."""
        if self.delta >= 1 / units:
            raise ValueError(f"delta is below 1 over the number of {self.unit}s (1/{units}{where}), got {self.delta}: "
                             f"otherwise giving one {self.unit} away entirely would satisfy the guarantee")

    def check_budget(self, releases: Sequence[Release], max_epsilon: float | None, *,
                     what: str = "the first round") -> None:
        """Raises `ValueError` if releases alone exceed a budget, or if these terms cannot account for them."""
        once = self.spent(releases).epsilon
        if max_epsilon is not None and once > max_epsilon:
            raise ValueError(f"{what} alone costs ε = {rounded_up(once, 4)}, more than the budget of {max_epsilon:g}; "
                             "add noise (see noise_multiplier_for), release less, or raise the budget")


def check_statement(update: Update, parts: Sequence[Any]) -> None:
    """Refuses an update that states less privacy as spent than the run's techniques or aggregation spend in a round.

    Raises:
        PrivacyError: it says nothing about a unit, or its statement cannot be that of the technique.
    """
    stated = {one.unit: one for one in update.spent}
    for part in parts:
        least = part.least_spent(update)
        missing = sorted(part.units - stated.keys())
        seeded = getattr(part, "secure_mode", None) is False  # then no statement of it is without the remark
        if missing or (seeded and not all(stated[unit].repeats for unit in part.units)) or (least is not None and (
                stated[least.unit]._replace(epsilon=0.0, repeats=False) != least._replace(epsilon=0.0)
                or stated[least.unit].epsilon < least.epsilon * (1 - 1e-9))):
            expected = (least and least._replace(repeats=seeded)) or " and ".join(
                f"an ε per {unit}" for unit in missing or sorted(part.units))
            raise PrivacyError(f"the update of {update.site} states {'; '.join(map(str, update.spent)) or 'nothing'} "
                               f"as spent; under {part!r} it is at least {expected}. Update the software of the site, "
                               "or leave it out")


def noise_multiplier_for(
    *, target_epsilon: float, delta: float, sample_rate: float, steps: int, accountant: Accountant = "rdp"
) -> float:
    """The smallest noise multiplier, to 0.1 %, with which all steps together stay within a target ε.

    Args:
        target_epsilon: not to be exceeded over all steps.
        delta, accountant: as in `Terms`.
        sample_rate: expected share of records in a step.
        steps: of all rounds together.

    Raises:
        ValueError: a setting is out of range, or no noise multiplier up to 1000 reaches the target. None below 0.001 is
            tried: where δ alone allows as much, there is no smallest one.
    """
    check_positive(target_epsilon=target_epsilon)
    Terms(unit="patient", delta=delta, adjacency="any", accountant=accountant)

    def spent(noise_multiplier: float) -> float:
        release = Gaussian(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
        return epsilon_of([release], delta=delta, accountant=accountant)

    low, high = 0.2, 1.0
    while low > _LEAST_NOISE and spent(low) <= target_epsilon:
        low, high = max(low / 2, _LEAST_NOISE), low
    while spent(high) > target_epsilon:
        low, high = high, min(2 * high, _MOST_NOISE)
        if low == _MOST_NOISE:
            raise ValueError(f"no noise multiplier up to {_MOST_NOISE:g} gives ε = {target_epsilon} at δ = {delta} "
                             f"over {steps} steps with accountant {accountant!r}; take fewer steps or a larger ε")
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(middle) > target_epsilon else (low, middle)
    return high


class Ledger:
    """A site's record of everything it has released under a guarantee, kept in its state.

    One ledger holds the releases of all runs of a site, whatever they train: the patients are the same. It only grows:
    the entries of a round stay when the round is run again, and count once if the round enters exactly
    the same again.

    Args:
        state: of the site or the server; every charge is written into `state.ledger` at once.

    Raises:
        PrivacyError: the record is damaged.
    """

    def __init__(self, state: HasLedger) -> None:
        self._record = state.ledger
        self._note = _parse(self._record) if self._record else _blank()

    @classmethod
    def open(cls, state: HasLedger, *, site: str, round: int | None, stream: str | None) -> Ledger:
        """The ledger of a site at the beginning of a round, or of work outside of any round.

        The entries that the same round made before with the same stream are set aside: a round that is run again draws
        the same noise, so that what it enters again counts once. With `stream` None, for noise from the operating
        system, everything counts anew.

        Args:
            state: of the site.
            site: whose ledger it must be.
            round: None outside of rounds.
            stream: identifies the random numbers of this round and everything that they are added to.

        Raises:
            PrivacyError: the ledger is damaged, or of another site.
        """
        ledger = cls(state)
        ledger._claim(site)
        stream = f"once-{secrets.token_hex(8)}" if stream is None else stream
        known = ledger._all()
        again = [(e["round"], e["stream"]) == (round, stream) for e in known]
        kept, aside = ([e for e, same in zip(known, again, strict=True) if same is which] for which in (False, True))
        ledger._note.update(round=round, stream=stream, entries=kept, before=aside)
        ledger._write()
        return ledger

    def charge(self, release: Release, *, terms: Terms, max_epsilon: float | None = None,
               repeatable: bool = True, seeded: bool | None = None) -> None:
        """Enters a release before it happens, under terms that are equal for all entries of a unit.

        Args:
            release, terms: what will be released, and the meaning of its guarantee.
            max_epsilon: the site's budget for this unit; None for none.
            repeatable: whether the round, run again, draws the same noise. Noise from the operating system does not
                repeat: the entries of this round then stay, however often it is run.
            seeded: whether the noise is drawn from the seed of the run, which `Spent.repeats` then states; by default
                as `repeatable`.

        Raises:
            PrivacyBudgetExhausted: the total would exceed the budget; nothing is entered.
            PrivacyError: the unit's entries have other terms, so that they cannot be added up with this one.
        """
        self._check_terms(terms)
        now, entries = (self._note["round"], self._note["stream"]), self._note["entries"]
        stream = now[1]
        if not repeatable:
            stream = f"once-{secrets.token_hex(8)}"
            entries = [{**e, "stream": stream} if (e["round"], e["stream"]) == now else e for e in entries]
        entries = [*entries, {"round": now[0], "stream": stream, "terms": asdict(terms),
                              "kind": type(release).__name__, "release": asdict(release),
                              "seeded": repeatable if seeded is None else seeded}]
        after = terms.spent(_releases(_joined(entries, self._note["before"]), terms.unit)).epsilon
        if max_epsilon is not None and not after <= max_epsilon:
            before = next((s.epsilon for s in self.spent() if s.unit == terms.unit), 0.0)
            raise PrivacyBudgetExhausted(
                f"the budget is ε = {max_epsilon:g} per {terms.unit} at δ = {terms.delta:g}; {rounded_up(before, 4)} "
                f"is spent and this release would make it {rounded_up(after, 4)}")
        self._note.update(entries=entries, stream=stream)
        self._write()

    def bind(self, content: str) -> None:
        """Ties this round's noise to the update it was added to, such as by its hash, before anything is sent.

        The same noise on two different updates would cancel in their difference.

        Raises:
            PrivacyError: the noise of this round has been used for another update.
        """
        key = f"{self._note['round']}|{self._note['stream']}"
        if self._note["noise_on"].setdefault(key, content) != content:
            raise PrivacyError(
                "this round was run before with the same weights, settings and seed, but training gave another "
                "update: other scans, or arithmetic that does not repeat. The same noise on both would cancel out. "
                "Go on with another seed, or with noise from the operating system (secure_mode=True)")
        self._write()

    def releases(self, unit: Unit | None = None) -> list[Release]:
        """The releases so far, in order; of one unit or of all."""
        return _releases(self._all(), unit)

    def spent(self) -> tuple[Spent, ...]:
        """The privacy spent so far, one statement per unit; empty if nothing was released under a guarantee."""
        found = {unit: [e for e in self._all() if e["terms"]["unit"] == unit] for unit in get_args(Unit)}
        return tuple(_common(entries).spent(_releases(entries, None))._replace(
            repeats=any(e["seeded"] for e in entries)) for entries in found.values() if entries)

    def charged(self, unit: Unit) -> bool:
        """Whether this round's entries hold one for `unit`."""
        return any(e["terms"]["unit"] == unit for e in self._of_round())

    @property
    def seeded(self) -> bool:
        """Whether noise that this round's entries rest on is drawn from the seed of the run."""
        return any(e["seeded"] for e in self._of_round())

    def merge(self, other: Ledger) -> None:
        """Takes in the entries of another copy of this ledger; entries of both count once.

        Raises:
            PrivacyError: the other is of another site, its entries have other terms, or the two disagree about what
                was sent.
        """
        self._claim(other._note["site"])
        for entry in other._all():
            self._check_terms(Terms(**entry["terms"]))
        ours, theirs = self._note["noise_on"], other._note["noise_on"]
        if any(ours[key] != theirs[key] for key in ours.keys() & theirs.keys()):
            raise PrivacyError("two copies of the ledger disagree about what was sent in a round: one of them is of "
                               "another run with the same seed; give that run a folder or a site name of its own")
        self._note.update(entries=_joined(self._all(), other._all()), before=[], noise_on={**theirs, **ours},
                          in_file=self._note["in_file"] or other._note["in_file"])
        self._write()

    def note(self) -> dict[str, Any]:
        """The whole ledger as plain values, as a file holds it."""
        out: dict[str, Any] = json.loads(json.dumps(self._note))
        return out

    def close(self, *, in_file: bool) -> None:
        """Ends a round; a ledger that a file holds too (`in_file`) is refused without that file from then on."""
        self._note.update(entries=self._all(), before=[], in_file=self._note["in_file"] or in_file)
        self._write()

    def _claim(self, site: str | None) -> None:
        known = self._note["site"]
        if known is not None and site is not None and known != site:
            raise PrivacyError(f"the ledger is of another site ({known!r}, not {site!r}); give each site its own "
                               "ledger back, or a new state if it has never taken part")
        self._note["site"] = known if site is None else site

    def _check_terms(self, terms: Terms) -> None:
        """Refuses other terms than those of the unit's entries so far, or than they imply."""
        for entry in self._all():
            known = Terms(**entry["terms"])
            if known.unit == terms.unit and _implied(known) != _implied(terms):
                raise PrivacyError(f"earlier releases ({known}) cannot be added up with this one ({terms}); use the "
                                   "same δ, adjacency and accountant")

    def _of_round(self) -> list[dict[str, Any]]:
        now = (self._note["round"], self._note["stream"])
        return [entry for entry in self._note["entries"] if (entry["round"], entry["stream"]) == now]

    def _all(self) -> list[dict[str, Any]]:
        return _joined(self._note["entries"], self._note["before"])

    def _write(self) -> None:
        self._record.clear()
        self._record.update(self.note())

    def __repr__(self) -> str:
        spent = "; ".join(map(str, self.spent())) or "nothing released under a guarantee"
        return f"<Ledger of {self._note['site'] or 'a site'}: {spent}>"


def check_terms(parts: Sequence[Any], *, sites: int) -> None:
    """Refuses techniques of one place, a site or the server, whose ε of a unit cannot be added up.

    Known are the terms that a technique has as an attribute; those of others are compared in the ledger.

    Raises:
        ValueError: two of them have another δ, adjacency or accountant for the same unit, or a δ per site is not below
            1 over the number of sites.
    """
    seen: dict[Unit, tuple[Terms, Any]] = {}
    for part in parts:
        terms = getattr(part, "terms", getattr(part, "_terms", None))
        if not isinstance(terms, Terms):
            continue
        if terms.unit == "site":
            terms.check_delta(sites)
        known, other = seen.setdefault(terms.unit, (terms, part))
        if _implied(known) != _implied(terms):
            raise ValueError(f"the ε of {other!r} ({known}) and of {part!r} ({terms}) cannot be added up; use the same "
                             "δ, adjacency and accountant")


def _implied(terms: Terms) -> Terms:
    """The terms as all releases that add up with them state them, too."""
    return replace(terms, adjacency=_IMPLIES.get(terms.adjacency, terms.adjacency))


def _common(entries: Sequence[dict[str, Any]]) -> Terms:
    """The terms of the entries of a unit; of several the ones that they all imply."""
    first, *others = {Terms(**e["terms"]) for e in entries}
    return _implied(first) if others else first


def _joined(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All entries of two records of the same past, each as often as in the record that has it more often."""
    left = Counter(json.dumps(entry, sort_keys=True) for entry in one)
    new = []
    for entry in other:
        key = json.dumps(entry, sort_keys=True)
        if left[key] > 0:
            left[key] -= 1
        else:
            new.append(entry)
    return [*one, *new]


def _releases(entries: Iterable[dict[str, Any]], unit: Unit | None) -> list[Release]:
    return [RELEASES[e["kind"]](**e["release"]) for e in entries if unit is None or e["terms"]["unit"] == unit]


def _blank() -> dict[str, Any]:
    return {"format": _FORMAT, "site": None, "round": None, "stream": None, "entries": [], "before": [],
            "noise_on": {}, "in_file": False}


def _parse(record: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a ledger's record, every entry checked: a damaged ledger is refused, not repaired."""
    try:
        note: dict[str, Any] = json.loads(json.dumps(record))
        note.pop("model", None)  # of a ledger written when each network had its own
        if note["format"] != _FORMAT or note.keys() != _blank().keys():
            raise ValueError(f"its format is {note['format']!r}, expected {_FORMAT!r}")
        for entry in (*note["entries"], *note["before"]):
            Terms(**entry["terms"])
            RELEASES[entry["kind"]](**entry["release"])
            # An entry written before this was noted is taken for one whose noise repeats.
            if not isinstance(entry.setdefault("seeded", True), bool):
                raise ValueError(f"an entry says {entry['seeded']!r} of whether its noise is drawn from a seed")
        if not all(isinstance(content, str) for content in note["noise_on"].values()):
            raise ValueError("an update that noise was added to is not identified by text")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PrivacyError(f"the site's ledger is damaged ({error}); restore it from a copy: without it the privacy "
                           "spent is unknown") from error
    return note
