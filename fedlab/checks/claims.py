"""What a technique enters into a ledger, as a bound on how well two neighbours can be told apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedlab.checks.check_report import Battery
from fedlab.checks.noise_law import allowed_probability
from fedlab.checks.rehearsal import Stage
from fedlab.checks.watched import Charge, Rehearsal
from fedlab.core.types import Tensors
from fedlab.privacy.accounting.mechanisms import Concentrated, Gaussian, Pure, Release

__all__ = ["PRIVACY", "Claim", "allowed_of", "chi_of", "find_claims"]

Floats = npt.NDArray[np.float64]

PRIVACY = Battery("privacy")

#: Parts of words by which an adjacency says that a contribution is removed.
_GONE = ("zero", "remov", "nothing", "absen", "left out")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """The entries of one layer into a ledger, and the place where its output is seen."""

    layer: int  # its place in the technique
    where: Literal["training", "site", "server"]
    rounds: tuple[tuple[Charge, ...], ...]  # entries of each round

    @property
    def charges(self) -> tuple[Charge, ...]:
        """The entries of the first round that has any."""
        return next(charges for charges in self.rounds if charges)

    @property
    def mu(self) -> float:
        """1 over the noise multiplier of a round's entries together; infinite if one of them is no Gaussian noise."""
        return max(math.sqrt(self.square(1)), 1e-9)  # 0 where the first round is not charged

    def square(self, rounds: int) -> float:
        """The square of `mu` of the first rounds together."""
        return sum(_twice_rho(release) for charges in self.rounds[:rounds] for release, _ in charges)

    @property
    def pure(self) -> bool:
        """Whether all entries are of pure releases."""
        return all(isinstance(release, Pure) for release, _ in self.charges)

    @property
    def gaussian(self) -> bool:
        """Whether all entries are of Gaussian noise."""
        return all(isinstance(release, Gaussian) for release, _ in self.charges)

    @property
    def epsilon(self) -> float:
        """The sum of the ε of a round's pure entries."""
        return sum(release.epsilon * release.times for release, _ in self.charges if isinstance(release, Pure))

    @property
    def chi(self) -> float:
        """An upper bound of √χ² between the outputs of two neighbouring inputs in a round."""
        return chi_of([self], 1)

    @property
    def removes(self) -> bool:
        """Whether neighbours differ by a contribution that is there or not; any other adjacency is that of any two.

        Only words that say so are taken for it: a replacement moves a sum twice as far.
        """
        words = self.charges[0].terms.adjacency.lower()
        return "any two" not in words and any(said in words for said in _GONE)

    @property
    def to_zero(self) -> bool:
        """Whether updates are compared with zeros only, rather than any two of them.

        To add a patient may change the update of a site in any way.
        """
        return self.charges[0].terms.unit == "site" and self.removes

    @property
    def read(self) -> str:
        """How the adjacency is understood, if that is not what its words say."""
        adjacency = self.charges[0].terms.adjacency
        return "" if self.removes or "any two" in adjacency.lower() else (
            f" (the adjacency {adjacency!r} says of no contribution that it is removed, so any two are compared)")

    def output(self, seen: Rehearsal, number: int, site: str) -> Tensors:
        """The output of the layer in a round."""
        if self.where == "training":
            return seen.trained[number][site]
        if self.where == "server":
            return seen.released[number][self.layer].delta
        steps = [s for s in seen.steps if (s.layer, s.round, s.site) == (self.layer, number, site)]
        return steps[-1].returned.delta  # type: ignore[attr-defined, no-any-return]


def find_claims(stage: Stage, seen: Rehearsal) -> list[Claim]:
    """The claims of each layer, and of the aggregation after them, in the rounds of a rehearsal."""
    claims, numbers = [], range(len(seen.moved))
    for place in range(len(stage.parts)):
        calls = {s.round: s.charged for s in reversed(seen.steps) if s.layer == place}  # of the first site
        hidden = place == len(stage.technique.layers)  # a masked update is seen in the sum only
        found: list[tuple[Literal["training", "site", "server"], list[tuple[Charge, ...]]]] = [
            ("training", [seen.equipped.get((number, place), ()) for number in numbers]),
            ("server" if hidden else "site", [calls.get(number, ()) for number in numbers]),
            ("server", [seen.settled.get((number, place), ()) for number in numbers])]
        claims += [Claim(layer=place, where=where, rounds=tuple(rounds)) for where, rounds in found if any(rounds)]
    return claims


def allowed_of(claims: Sequence[Claim], rounds: int) -> Callable[[Floats], Floats]:
    """The largest probability of an event, given that of a neighbour, that the first rounds together allow."""
    mu = math.sqrt(sum(claim.square(rounds) for claim in claims))
    gaussian = all(isinstance(release, Gaussian) for claim in claims for charges in claim.rounds
                   for release, _ in charges)
    return allowed_probability(_divergence_of(claims, rounds), mu=mu if gaussian else math.inf)


def _divergence_of(claims: Sequence[Claim], rounds: int) -> Callable[[Floats], Floats]:
    """The Rényi divergence, by order, that the entries of the first rounds together allow."""
    releases = [release for claim in claims for charges in claim.rounds[:rounds] for release, _ in charges]

    def divergence(orders: Floats) -> Floats:
        total = np.zeros_like(orders)
        for release in releases:
            if isinstance(release, Pure):
                total += release.times * np.minimum(release.epsilon, orders * release.epsilon**2 / 2)
            else:
                total += orders * _twice_rho(release) / 2
        return total
    return divergence


def chi_of(claims: Sequence[Claim], rounds: int) -> float:
    """An upper bound of √χ² between the outputs of two neighbours in the first rounds together.

    Infinite with pure releases: of a large ε a value may be constant in all runs, and yet another for the neighbour.
    """
    if any(isinstance(release, Pure) for claim in claims for charges in claim.rounds for release, _ in charges):
        return math.inf
    # The second moment of the ratio of densities is at most exp(exponent), and exponents add up.
    exponent = sum(claim.square(rounds) for claim in claims)
    return math.sqrt(math.expm1(exponent)) if exponent < 600 else math.inf


def _twice_rho(release: Release) -> float:
    """Twice the ρ of zero-concentrated privacy (Bun and Steinke 2016); infinite for what is no Gaussian noise."""
    if isinstance(release, Gaussian):
        return release.steps / release.noise_multiplier**2
    return 2 * release.rho * release.times if isinstance(release, Concentrated) else math.inf
