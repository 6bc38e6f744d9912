"""What privacy costs: a site's ledger of what it has released, and the ε that provably follows from it."""

from __future__ import annotations

import json
import math
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, get_args

from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError
from fedlab.core.types import Spent
from fedlab.privacy.accounting.mechanisms import (
    RELEASES,
    Accountant,
    Concentrated,
    Gaussian,
    Pure,
    Release,
    epsilon_of,
)

__all__ = ["Accountant", "Concentrated", "Gaussian", "HasLedger", "Ledger", "Pure", "Terms", "epsilon_of",
           "noise_multiplier_for"]

Unit = Literal["patient", "site"]

_FORMAT = "fedlab-ledger-2"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What an ε of a ledger means; every entry of one unit shares them.

    Args:
        unit: whose data is protected, one "patient" or a whole "site".
        delta: probability with which the guarantee may fail, below 1 over the number of units.
        adjacency: which change of the data goes unnoticed, in words: "add or remove one patient".
        accountant: "rdp" (Mironov 2017; Mironov et al. 2019), "prv" (Gopi et al. 2021; tighter, slower), or "gdp"
            (Dong et al. 2019; exact, for noise without sampling only).

    Raises:
        ValueError: a setting out of its range.
    """

    unit: Unit
    delta: float
    adjacency: str
    accountant: Accountant = "rdp"

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(f"unit is 'patient' or 'site', got {self.unit!r}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta lies between 0 and 1 and below 1 over the number of {self.unit}s, "
                             f"got {self.delta}")
        if self.accountant not in get_args(Accountant):
            raise ValueError(f"accountant is 'rdp', 'prv' or 'gdp', got {self.accountant!r}")
        if not self.adjacency:
            raise ValueError("adjacency says in words which change of the data goes unnoticed, got nothing")


def noise_multiplier_for(
    *, target_epsilon: float, delta: float, sample_rate: float, steps: int, accountant: Accountant = "rdp"
) -> float:
    """The smallest noise multiplier, to 0.1 %, with which so many steps stay within a target ε.

    Args:
        target_epsilon: not to be exceeded over all steps.
        delta: in (0, 1).
        sample_rate: expected share of records in a step.
        steps: of all rounds together.
        accountant: as in `Terms`.

    Raises:
        ValueError: a setting out of its range, or a target that no noise multiplier up to 1000 reaches.
    """
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"target_epsilon is a positive number, got {target_epsilon}")
    Terms(unit="patient", delta=delta, adjacency="any", accountant=accountant)

    def spent(noise_multiplier: float) -> float:
        release = Gaussian(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
        return epsilon_of([release], delta=delta, accountant=accountant)

    low, high = 0.2, 1.0
    while spent(high) > target_epsilon:
        low, high = high, 2 * high
        if high > 1000:
            raise ValueError(f"no noise multiplier up to 1000 gives ε = {target_epsilon} at δ = {delta} over {steps} "
                             f"steps with accountant {accountant!r}; take fewer steps or a larger ε")
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if spent(middle) > target_epsilon else (low, middle)
    return high


class HasLedger(Protocol):
    """A party with a ledger: `fedlab.core.types.SiteState` or `ServerState`."""

    @property
    def ledger(self) -> dict[str, Any]: ...


class Ledger:
    """A site's record of everything it has released under a guarantee, kept in its state.

    It only grows: the entries of a round stay when the round is run again, and count once if the round enters the very
    same again.

    Args:
        state: the party's; every charge is written into `state.ledger` at once.

    Raises:
        PrivacyError: the record is damaged.
    """

    def __init__(self, state: HasLedger) -> None:
        self._record = state.ledger
        self._note = _parse(self._record) if self._record else _blank()

    @classmethod
    def open(cls, state: HasLedger, *, site: str, model: str | None, round: int | None, stream: str | None) -> Ledger:
        """The ledger of a site at the beginning of a round, or of work outside of any.

        What the same round entered before with the same stream is set aside: a round that is run again draws the very
        same noise, so that what it enters again is nothing new. With `stream` None, noise from the operating system,
        everything counts anew.

        Args:
            state: the site's.
            site: whose ledger it must be.
            model: a name of the model's tensors and shapes; a ledger belongs to one model. None where none is
                trained.
            round: number of the round; None outside of rounds.
            stream: names the random numbers of this round and all that they are added to.

        Raises:
            PrivacyError: the ledger is damaged or of another site or model.
        """
        ledger = cls(state)
        ledger._claim(site=site, model=model)
        stream = f"once-{secrets.token_hex(8)}" if stream is None else stream
        known = ledger._all()
        again = [(e["round"], e["stream"]) == (round, stream) for e in known]
        kept, aside = ([e for e, same in zip(known, again, strict=True) if same is which] for which in (False, True))
        ledger._note.update(round=round, stream=stream, entries=kept, before=aside)
        ledger._write()
        return ledger

    def charge(self, release: Release, *, terms: Terms, max_epsilon: float | None = None,
               repeatable: bool = True) -> None:
        """Enters a release before it happens.

        Args:
            release: what will be released.
            terms: what its guarantee means; equal for all entries of a unit.
            max_epsilon: the site's budget for this unit; None for none.
            repeatable: whether the round, run again, draws the very same noise. Noise from the operating system does
                not: what was entered in this round then stays, however often it is run.

        Raises:
            PrivacyBudgetExhausted: the total would exceed the budget; nothing is entered.
            PrivacyError: the unit's entries have other terms, with which this one cannot be added up.
        """
        for entry in self._all():
            known = Terms(**entry["terms"])
            if known.unit == terms.unit and known != terms:
                raise PrivacyError(f"what was released before cannot be added up with this: {known} there, {terms} "
                                   "here; use the same δ, adjacency and accountant")
        now, entries = (self._note["round"], self._note["stream"]), self._note["entries"]
        stream = now[1]
        if not repeatable:
            stream = f"once-{secrets.token_hex(8)}"
            entries = [{**e, "stream": stream} if (e["round"], e["stream"]) == now else e for e in entries]
        entries = [*entries, {"round": now[0], "stream": stream, "terms": asdict(terms),
                              "kind": type(release).__name__, "release": asdict(release)}]
        after = epsilon_of(_releases(_joined(entries, self._note["before"]), terms.unit), delta=terms.delta,
                           accountant=terms.accountant)
        if max_epsilon is not None and not after <= max_epsilon:
            before = next((s.epsilon for s in self.spent() if s.unit == terms.unit), 0.0)
            raise PrivacyBudgetExhausted(
                f"the budget is ε = {max_epsilon:g} per {terms.unit} at δ = {terms.delta:g}; {before:.4g} is spent "
                f"and this release would make it {after:.4g}")
        self._note.update(entries=entries, stream=stream)
        self._write()

    @classmethod
    def enter(cls, state: HasLedger, spent: Spent, *, site: str, delta: float, accountant: Accountant,
              max_epsilon: float | None) -> None:
        """Enters a release that is ε-private with δ = 0 and belongs to no round, such as noised statistics.

        Raises:
            ValueError: the release has a δ.
            PrivacyBudgetExhausted, PrivacyError: as `charge`.
        """
        if spent.delta != 0:
            raise ValueError(f"a release with δ = 0 was expected, got {spent}; enter it with charge()")
        terms = Terms(unit=spent.unit, delta=delta, adjacency=spent.adjacency, accountant=accountant)
        ledger = cls.open(state, site=site, model=None, round=None, stream=None)
        ledger.charge(Pure(epsilon=spent.epsilon), terms=terms, max_epsilon=max_epsilon)

    def bind(self, content: str) -> None:
        """Ties this round's noise to what it was added to, before anything is sent.

        The same noise on two different updates would leave with their difference, without any noise.

        Args:
            content: a name of the update that this round's noise protects, such as a hash of it.

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
        """What has been released, in order; of one unit or of all."""
        return _releases(self._all(), unit)

    def spent(self) -> tuple[Spent, ...]:
        """The privacy spent so far, one statement per unit; none where nothing was released under a guarantee."""
        out = []
        for unit in get_args(Unit):
            terms = next((Terms(**e["terms"]) for e in self._all() if e["terms"]["unit"] == unit), None)
            if terms is not None:
                epsilon = epsilon_of(self.releases(unit), delta=terms.delta, accountant=terms.accountant)
                out.append(Spent(epsilon=epsilon, delta=terms.delta, unit=unit, accountant=terms.accountant,
                                 adjacency=terms.adjacency))
        return tuple(out)

    def charged(self, unit: Unit) -> bool:
        """Whether this round's entries hold one for `unit`."""
        return any(e["terms"]["unit"] == unit and (e["round"], e["stream"]) == (self._note["round"],
                                                                              self._note["stream"])
                   for e in self._note["entries"])

    def merge(self, other: Ledger) -> None:
        """Takes in what another copy of this ledger knows; what both know counts once.

        Raises:
            PrivacyError: the other one is of another site or model, or the two disagree about what was sent.
        """
        self._claim(site=other._note["site"], model=other._note["model"])
        ours, theirs = self._note["noise_on"], other._note["noise_on"]
        if any(ours[key] != theirs[key] for key in ours.keys() & theirs.keys()):
            raise PrivacyError("two copies of the ledger disagree about what was sent in a round: one of them is of "
                               "another run with the same seed; give that run a folder or a site name of its own")
        self._note.update(entries=_joined(self._all(), other._all()), before=[], noise_on={**theirs, **ours},
                          in_file=self._note["in_file"] or other._note["in_file"])
        self._write()

    def note(self) -> dict[str, Any]:
        """The whole ledger as plain values, as it is kept in a file."""
        out: dict[str, Any] = json.loads(json.dumps(self._note))
        return out

    def close(self, *, in_file: bool) -> None:
        """Ends a round.

        Args:
            in_file: whether the ledger is kept in a file too, without which it is not to be believed from now on.
        """
        self._note.update(entries=self._all(), before=[], in_file=self._note["in_file"] or in_file)
        self._write()

    def _claim(self, *, site: str | None, model: str | None) -> None:
        for key, here in (("site", site), ("model", model)):
            known = self._note[key]
            if known is not None and here is not None and known != here:
                raise PrivacyError(f"the ledger is of another {key} ({known!r}, not {here!r}); give each site its own "
                                   "ledger back, or a new state if it never took part")
            self._note[key] = known if here is None else here

    def _all(self) -> list[dict[str, Any]]:
        return _joined(self._note["entries"], self._note["before"])

    def _write(self) -> None:
        self._record.clear()
        self._record.update(self.note())

    def __repr__(self) -> str:
        spent = "; ".join(map(str, self.spent())) or "nothing released under a guarantee"
        return f"<Ledger of {self._note['site'] or 'a site'}: {spent}>"


def _joined(one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """All entries of two records of the same past: each as often as in the one that has it more often."""
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
    return {"format": _FORMAT, "site": None, "model": None, "round": None, "stream": None, "entries": [], "before": [],
            "noise_on": {}, "in_file": False}


def _parse(record: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a ledger's record, every entry checked: a damaged ledger is refused, not repaired."""
    try:
        note: dict[str, Any] = json.loads(json.dumps(record))
        if note["format"] != _FORMAT or note.keys() != _blank().keys():
            raise ValueError(f"its format is {note['format']!r}, expected {_FORMAT!r}")
        for entry in (*note["entries"], *note["before"]):
            Terms(**entry["terms"])
            RELEASES[entry["kind"]](**entry["release"])
        if not all(isinstance(content, str) for content in note["noise_on"].values()):
            raise ValueError("the content that some noise protects is no text")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PrivacyError(f"the site's ledger is damaged ({error}); restore it from a copy: without it the privacy "
                           "spent is unknown") from error
    return note
