"""What privacy costs: a site's ledger of what it has released, and the ε that provably follows from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch

from fedlab.errors import PrivacyBudgetExhausted, PrivacyError
from fedlab.types import Memory, Spent

__all__ = ["Accountant", "Gaussian", "Ledger", "Pure", "Terms", "epsilon_of", "noise_multiplier_for"]

Accountant = Literal["rdp", "prv", "gdp"]
Unit = Literal["patient", "site"]

_GROUP, _FORMAT = "ledger", "fedlab-ledger-1"
#: Rényi orders at which a guarantee is tried; any order gives a valid ε, more orders a smaller one.
_ORDERS = (*(1 + x / 100 for x in range(1, 10)), *(1 + x / 10 for x in range(1, 100)), *range(11, 64),
           *(64 * 2 ** (x / 4) // 1 for x in range(0, 21)))


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Steps of the Gaussian mechanism on Poisson-sampled records.

    Args:
        noise_multiplier: standard deviation of the noise over the sensitivity.
        sample_rate: probability with which a record takes part in a step; 1 for all of them.
        steps: how many.

    Raises:
        ValueError: a number out of its range.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier is a positive number, got {self.noise_multiplier}; "
                             "without noise there is no guarantee to account for")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate is above 0 and at most 1, got {self.sample_rate}")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps is a positive whole number, got {self.steps!r}")


@dataclass(frozen=True, kw_only=True)
class Pure:
    """Releases of a mechanism that is ε-differentially private, δ = 0, such as Laplace noise or the sparse vector.

    Args:
        epsilon: of one release.
        times: how many.

    Raises:
        ValueError: a number out of its range.
    """

    epsilon: float
    times: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon is a positive number, got {self.epsilon}")
        if not isinstance(self.times, int) or self.times < 1:
            raise ValueError(f"times is a positive whole number, got {self.times!r}")


Release = Gaussian | Pure


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


def epsilon_of(releases: Iterable[Release], *, delta: float, accountant: Accountant = "rdp") -> float:
    """The ε that all releases together provably satisfy at δ: 0 for none, infinite where nothing can be proven.

    Rényi: orders add up; an ε-DP release has order α at most min(ε, α ε² / 2) (Bun and Steinke 2016, proposition
    3.3). Pure releases alone are also bounded by their sum. Under "prv" and "gdp" the pure ones are added to the ε
    of the Gaussian ones (basic composition).

    Args:
        releases: what was released, of one unit and adjacency.
        delta: in (0, 1).
        accountant: as in `Terms`.

    Raises:
        ValueError: "gdp" for sampled records, for which it is an approximation and no proof.
    """
    gaussian: dict[tuple[float, float], int] = {}
    pure: dict[float, int] = {}
    for release in releases:
        if isinstance(release, Gaussian):
            key = release.noise_multiplier, release.sample_rate
            gaussian[key] = gaussian.get(key, 0) + release.steps
        else:
            pure[release.epsilon] = pure.get(release.epsilon, 0) + release.times
    return _epsilon(tuple(sorted((*key, steps) for key, steps in gaussian.items())), tuple(sorted(pure.items())),
                    delta, accountant)


@lru_cache(maxsize=4096)
def _epsilon(gaussian: tuple[tuple[float, float, int], ...], pure: tuple[tuple[float, int], ...], delta: float,
             accountant: Accountant) -> float:
    basic = math.fsum(epsilon * times for epsilon, times in pure)
    if not gaussian and not pure:
        return 0.0
    if not gaussian:
        return min(basic, _renyi(gaussian, pure, delta))
    if accountant == "rdp":
        return min(_renyi(gaussian, pure, delta), basic + _renyi(gaussian, (), delta))
    return basic + (_prv(gaussian, delta) if accountant == "prv" else _gdp(gaussian, delta))


def _renyi(gaussian: tuple[tuple[float, float, int], ...], pure: tuple[tuple[float, int], ...],
           delta: float) -> float:
    orders = np.array(_ORDERS, dtype=float)
    total = np.zeros_like(orders)
    for noise_multiplier, sample_rate, steps in gaussian:
        total += steps * np.array(_renyi_of_step(noise_multiplier, sample_rate))
    for epsilon, times in pure:
        total += times * np.minimum(epsilon, orders * epsilon**2 / 2)
    # Balle et al. 2020, theorem 21: from Rényi divergence to ε at δ.
    found = total + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    return float(max(0.0, np.nanmin(found))) if not np.isnan(found).all() else math.inf


@lru_cache(maxsize=4096)
def _renyi_of_step(noise_multiplier: float, sample_rate: float) -> tuple[float, ...]:
    from opacus.accountants.analysis.rdp import compute_rdp

    return tuple(np.atleast_1d(compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1,
                                           orders=list(_ORDERS))))


def _prv(gaussian: tuple[tuple[float, float, int], ...], delta: float) -> float:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(gaussian)
    try:
        return float(accountant.get_epsilon(delta=delta))  # the upper end of its error interval
    except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
        raise PrivacyError(f"the PRV accountant fails for {gaussian} at δ = {delta} ({error}); "
                           "say accountant='rdp'") from error


def _gdp(gaussian: tuple[tuple[float, float, int], ...], delta: float) -> float:
    from scipy.optimize import brentq
    from scipy.stats import norm

    if any(sample_rate < 1 for _, sample_rate, _ in gaussian):
        raise ValueError("accountant 'gdp' is exact only without sampling (sample_rate 1); for sampled records it is "
                         "an approximation that may claim too small an ε: say accountant='rdp' or 'prv'")
    mu = math.sqrt(math.fsum(steps / noise_multiplier**2 for noise_multiplier, _, steps in gaussian))

    def excess(epsilon: float) -> float:  # Balle and Wang 2018, theorem 8
        tail = norm.logcdf(-epsilon / mu - mu / 2) + epsilon
        return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(min(tail, 700)) - delta)

    if excess(0.0) <= 0:
        return 0.0
    high = mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1e-6  # the zCDP bound lies above
    return float(brentq(excess, 0.0, high, xtol=1e-9)) + 1e-8


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


class Ledger:
    """A site's record of everything it has released under a guarantee. It lives in the site's memory.

    Args:
        memory: the site's; every charge is written into it at once.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._note: dict[str, Any] = {"format": _FORMAT, "site": None, "model": None, "round": None, "stream": None,
                                      "entries": []}
        if _GROUP in memory:
            self._note = _parse(memory[_GROUP])

    @classmethod
    def open(cls, memory: Memory, *, site: str, model: str, round: int, stream: str | None) -> Ledger:
        """The ledger of a site at the beginning of a round.

        Entries of the same round and stream go: the round is run again and draws the very same noise, so nothing
        new is released. With `stream` None, noise from the operating system, they stay.

        Args:
            memory: the site's.
            site: whose ledger it must be.
            model: a name of the model's tensors and shapes; a ledger belongs to one model.
            round: number of the round.
            stream: names the random numbers of this round and all that they are added to.

        Raises:
            PrivacyError: the ledger is damaged or of another site or model.
        """
        ledger = cls(memory)
        for key, here in (("site", site), ("model", model)):
            known = ledger._note[key]
            if known is not None and known != here:
                raise PrivacyError(f"the ledger is of another {key} ({known!r}, not {here!r}); give {site} its own "
                                   "ledger back, or a new memory if it never took part")
            ledger._note[key] = here
        ledger._note["entries"] = [e for e in ledger._note["entries"]
                                   if stream is None or (e["round"], e["stream"]) != (round, stream)]
        ledger._note.update(round=round, stream=stream)
        ledger._write()
        return ledger

    def charge(self, release: Release, *, terms: Terms, max_epsilon: float | None = None) -> None:
        """Enters a release before it happens.

        Args:
            release: what will be released.
            terms: what its guarantee means; equal for all entries of a unit.
            max_epsilon: the site's budget for this unit; None for none.

        Raises:
            PrivacyBudgetExhausted: the total would exceed the budget; nothing is entered.
            PrivacyError: the unit's entries have other terms, with which this one cannot be added up.
        """
        for entry in self._note["entries"]:
            known = Terms(**entry["terms"])
            if known.unit == terms.unit and known != terms:
                raise PrivacyError(f"what was released before cannot be added up with this: {known} there, {terms} "
                                   "here; use the same δ, adjacency and accountant")
        after = epsilon_of([*self.releases(terms.unit), release], delta=terms.delta, accountant=terms.accountant)
        if max_epsilon is not None and after > max_epsilon:
            before = next((s.epsilon for s in self.spent() if s.unit == terms.unit), 0.0)
            raise PrivacyBudgetExhausted(
                f"the budget is ε = {max_epsilon:g} per {terms.unit} at δ = {terms.delta:g}; {before:.4g} is spent "
                f"and this release would make it {after:.4g}")
        self._note["entries"].append({
            "round": self._note["round"], "stream": self._note["stream"], "terms": asdict(terms),
            "kind": type(release).__name__, "release": asdict(release)})
        self._write()

    def releases(self, unit: Unit | None = None) -> list[Release]:
        """What has been released, in order; of one unit or of all."""
        return [_KINDS[e["kind"]](**e["release"]) for e in self._note["entries"]
                if unit is None or e["terms"]["unit"] == unit]

    def spent(self) -> tuple[Spent, ...]:
        """The privacy spent so far, one statement per unit; none where nothing was released under a guarantee."""
        out = []
        for unit in get_args(Unit):
            terms = next((Terms(**e["terms"]) for e in self._note["entries"] if e["terms"]["unit"] == unit), None)
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

    def _write(self) -> None:
        text = json.dumps(self._note, ensure_ascii=False).encode()
        self._memory[_GROUP] = {"json": torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    def __repr__(self) -> str:
        spent = "; ".join(map(str, self.spent())) or "nothing released under a guarantee"
        return f"<Ledger of {self._note['site'] or 'a site'}: {spent}>"


_KINDS: Mapping[str, type[Gaussian] | type[Pure]] = {"Gaussian": Gaussian, "Pure": Pure}


def _parse(group: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A ledger's note, every entry checked: a damaged ledger is refused, not repaired."""
    try:
        note = json.loads(bytes(group["json"].numpy()).decode())
        if note["format"] != _FORMAT or note.keys() != {"format", "site", "model", "round", "stream", "entries"}:
            raise ValueError(f"its format is {note['format']!r}, expected {_FORMAT!r}")
        for entry in note["entries"]:
            Terms(**entry["terms"])
            _KINDS[entry["kind"]](**entry["release"])
    except (KeyError, TypeError, ValueError) as error:
        raise PrivacyError(f"the site's ledger is damaged ({error}); restore it from a copy: without it nobody knows "
                           "what was spent") from error
    out: dict[str, Any] = note
    return out
