"""Li et al. 2019: sharing the largest changes, and the sparse vector technique with the ε it really composes to.

W. Li, F. Milletarì, D. Xu et al., Privacy-preserving Federated Brain Tumour Segmentation, MLMI 2019, arXiv 1910.00962,
section 2.3, after R. Shokri and V. Shmatikov, Privacy-Preserving Deep Learning, CCS 2015. What is proven, and how, is
in `fedlab.privacy.sparse.sparse_vector`. Patient counts, numbers of steps and the names of tensors left out are public.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from fedlab.core.errors import PrivacyError
from fedlab.core.protocols import Run
from fedlab.core.settings import check_patterns, check_positive, check_share, check_whole
from fedlab.core.tensors import flatten, matching, unflatten
from fedlab.core.text import counted
from fedlab.core.types import SiteState, Spent, Tensors, Update
from fedlab.privacy.accounting.ledger import Accountant, Ledger, Pure, Terms, epsilon_of
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import entries, largest, sparse_bytes
from fedlab.privacy.noise.continuous import laplace, random_bits
from fedlab.privacy.sparse.sparse_vector import (
    ADJACENCY,
    LaplaceScales,
    SparseVectorCost,
    exact_release,
    grid_step,
    select,
    sparse_vector_cost,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["SVT", "PartialSharing", "SparseVector", "composed_epsilon"]


def composed_epsilon(techniques: Mapping[str, SVT | SparseVector | SparseVectorCost], *, parameters: int,
                     rounds: Sequence[int] = (1, 10, 100)) -> pd.DataFrame:
    """A table of the ε that is claimed for settings and the ε that they provably satisfy, per site.

    Args:
        techniques: name -> technique, or the cost of one.
        parameters: number of weights that may be shared.
        rounds: numbers of rounds for which ε is proven.

    Returns:
        One row per technique: values released per round, ε stated ("no guarantee"), ε of one value, δ, and the proven
        ε after each number of rounds.
    """
    import pandas as pd

    rows = {}
    for name, technique in techniques.items():
        cost = technique if isinstance(technique, SparseVectorCost) else technique.cost(parameters)
        rows[name] = {"values per round": cost.released, "ε stated, no guarantee": cost.stated,
                      "ε of one value": cost.per_value, "δ": cost.delta,
                      **{f"ε, {counted(n, 'round')}": cost.epsilon(rounds=n) for n in rounds}}
    return pd.DataFrame.from_dict(rows, orient="index")


class PartialSharing(Privacy):
    """Shares the largest changes of the weights; whole layers may stay at the site. No formal guarantee.

    The choice of the weights depends on the patients, and exact values are sent: nothing is proven, and a patient can
    be reconstructed from the largest gradients alone. For error feedback, or a share of each layer, see
    `fedlab.privacy.compression`.

    Args:
        fraction: of the weights that may be shared, above 0 and at most 1.
        exclude: names of tensors that are never shared, or patterns of them with "*" and "?", such as
            ["conv_final.*"].
        clip: values are clipped to [-clip, clip]; None for no clip.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, *, fraction: float, exclude: Sequence[str] = (), clip: float | None = None) -> None:
        check_share(fraction=fraction)
        check_positive(clip=clip, optional=True)
        check_patterns(exclude=exclude)
        self.fraction, self.exclude, self.clip = fraction, list(exclude), clip

    def check(self, run: Run) -> None:
        _shared(run.trainer.initial(), self.exclude)
        if names := list(run.trainer.initial_buffers()):
            raise ValueError(f"the network's buffers, such as {names[0]}, would be sent whole, which PartialSharing is "
                             "to prevent; say SiteTrainer(buffers='keep'), or use group norm")

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        shared = _shared(update.delta, self.exclude)
        flat = _flat(update, shared)
        chosen = largest(flat, self.fraction)
        values = flat.index_select(0, chosen)
        if self.clip is not None:
            values.clamp_(-self.clip, self.clip)
        return _sparse(update, shared, chosen, values)


@dataclass(kw_only=True, eq=False, repr=False)
class _NoisySharing(Privacy, ABC):
    """The sparse vector technique with any noise: the common part of `SVT` and `SparseVector`."""

    units = frozenset({"site"})
    fraction: float
    clip: float = 1e-4
    threshold: float = 1e-6
    delta: float = 1e-5
    exclude: Sequence[str] = ()
    passes: int = 100
    accountant: Accountant = "rdp"
    max_epsilon: float | None = None
    secure_mode: bool = False

    def __post_init__(self) -> None:
        check_share(fraction=self.fraction)
        check_positive(clip=self.clip)
        check_positive(max_epsilon=self.max_epsilon, optional=True)
        check_whole(passes=self.passes)
        check_patterns(exclude=self.exclude)
        self.exclude = list(self.exclude)
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold is compared with absolute values: 0 or more, got {self.threshold}")
        self._terms = Terms(unit="site", delta=self.delta, adjacency=ADJACENCY, accountant=self.accountant)

    @abstractmethod
    def scales(self, parameters: int) -> LaplaceScales:
        """The noise for a number of weights that may be shared."""

    def cost(self, parameters: int) -> SparseVectorCost:
        """The proven cost of a round for a number of weights that may be shared, beside the ε that is stated."""
        check_whole(parameters=parameters)
        return sparse_vector_cost(clip=self.clip, scales=self.scales(parameters), stated=self._stated(),
                                  released=entries(self.fraction, parameters), delta=self.delta,
                                  accountant=self.accountant)

    def check(self, run: Run) -> None:
        parameters = sum(t.numel() for t in _shared(run.trainer.initial(), self.exclude).values())
        if self.secure_mode:
            grid_step(self.clip, self.scales(parameters))  # noise that cannot be exact is refused
        self._terms.check_delta(len(run.sites))
        self._terms.check_budget(self.cost(parameters).releases(), self.max_epsilon)

    def least_spent(self, update: Update) -> Spent:
        shared = _shared(update.delta, self.exclude)
        return self._terms.spent(self.cost(sum(t.numel() for t in shared.values())).releases())

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        """Charges the ledger, chooses positions, adds noise to their values."""
        shared = _shared(update.delta, self.exclude)
        flat = _flat(update, shared).clamp_(-self.clip, self.clip)
        cost, scales = self.cost(flat.numel()), self.scales(flat.numel())
        for ledger in (Ledger(state.copy()), Ledger(state)):  # a copy first: all fits the budget, or none is entered
            for release in cost.releases():
                ledger.charge(release, terms=self._terms, max_epsilon=self.max_epsilon,
                              repeatable=not self.secure_mode)
        chosen, values = self._exact(flat, scales) if self.secure_mode else self._in_floats(flat, scales, rng)
        sent = torch.tensor(chosen.numel() / flat.numel(), dtype=torch.float64)
        state.diagnostics["share of the weights sent"] = sent
        return _sparse(update, shared, chosen, values.clamp_(-self.clip, self.clip))

    def _exact(self, flat: torch.Tensor, scales: LaplaceScales) -> tuple[torch.Tensor, torch.Tensor]:
        return exact_release(flat, clip=self.clip, scales=scales, threshold=self.threshold, passes=self.passes,
                             count=entries(self.fraction, flat.numel()))

    def _in_floats(self, flat: torch.Tensor, scales: LaplaceScales, rng: torch.Generator
                   ) -> tuple[torch.Tensor, torch.Tensor]:
        threshold = self.threshold + scales.threshold * float(laplace(1, rng))
        chosen = select(flat.abs(), threshold=threshold, count=entries(self.fraction, flat.numel()), passes=self.passes,
                        noise=lambda tried: laplace(tried, rng).mul_(scales.query),
                        order=lambda found: random_bits(found, rng))
        return chosen, laplace(chosen.numel(), rng).mul_(scales.release).add_(flat.index_select(0, chosen))

    def _stated(self) -> float | None:
        return None


@dataclass(kw_only=True, eq=False, repr=False)
class SVT(_NoisySharing):
    """The sparse vector technique as Li et al. 2019 published it, with the ε that its noise composes to.

    A weight's change w is shared if |clip(w, γ)| + Lap(2qs/ε₂) reaches τ + Lap(s/ε₁), as clip(clip(w, γ) + Lap(qs/ε₃),
    γ), until the fraction q is shared; s = γ. The paper states (ε₁ + ε₂ + ε₃)-differential privacy. That would need the
    number of shared values where the noise has the fraction: for N weights the noise is N times too small. Its
    guarantee sums to ε₁ + N ε₂ + 2 N ε₃ (the 2: values lie in [-γ, γ], 2γ wide), millions for ε₃ = 1. The ledger is
    charged with the proven cost, value by value. Use `SparseVector` to choose the ε yourself.

    Unit: a whole site, and with it each of its patients. Adjacency: any two updates of a site. With `secure_mode` noise
    and comparisons are exact on a grid; without it ε is that of noise in real numbers, for research.

    Args:
        fraction: q, of the weights to share; the paper used 0.1 to 0.4.
        epsilon_threshold: ε₁.
        epsilon_release: ε₃.
        epsilon_query: ε₂; None for the paper's (2qs)^(2/3) ε₁.
        clip: γ, of the change over the whole round, in units of the weights. (NVFLARE divides by the number of steps
            first: γ times steps here.)
        threshold: τ.
        exclude: as in `PartialSharing`.
        passes: largest number of times that a weight not yet shared is tried; with too few passes a smaller fraction
            than q is shared.
        delta, accountant, max_epsilon, secure_mode: see `Privacy`; values and rounds are composed.

    Raises:
        ValueError: a setting is out of range.
    """

    epsilon_threshold: float
    epsilon_release: float
    epsilon_query: float | None = None

    def __post_init__(self) -> None:
        check_positive(epsilon_threshold=self.epsilon_threshold, epsilon_release=self.epsilon_release)
        check_positive(epsilon_query=self.epsilon_query, optional=True)
        super().__post_init__()

    def scales(self, parameters: int) -> LaplaceScales:
        """The published noise, the same for any number of weights."""
        return LaplaceScales(threshold=self.clip / self.epsilon_threshold,
                             query=2 * self.fraction * self.clip / self._query(),
                             release=self.fraction * self.clip / self.epsilon_release)

    def _stated(self) -> float:
        return self.epsilon_threshold + self._query() + self.epsilon_release

    def _query(self) -> float:
        return self.epsilon_query or float((2 * self.fraction * self.clip) ** (2 / 3) * self.epsilon_threshold)


@dataclass(kw_only=True, eq=False, repr=False)
class SparseVector(_NoisySharing):
    """The sparse vector technique with noise for a chosen ε (Lyu, Su and Li 2017, algorithm 7).

    The noise is calibrated to the number of shared values c, each position is shared once, and the whole, positions
    and values of all rounds, satisfies ε at δ. Values get Laplace noise of the smallest scale with which the ledger's
    accountant stays within ε: it grows about as √(c rounds), where a sum of ε would need c rounds.

    Expect little: at a meaningful ε the choice of positions is close to chance, and the noise of a value is many times
    the clip. A smaller fraction means less noise on each value.

    Unit: a whole site, and with it each of its patients. Adjacency: any two updates of a site. With `secure_mode` noise
    and comparisons are exact on a grid; without it ε is that of noise in real numbers, for research.

    Args:
        fraction: of the weights to share; at least one is shared.
        epsilon: of `rounds` rounds together.
        rounds: for which ε suffices; a site that takes part in more spends more, see `max_epsilon`.
        selection: part of ε that is spent on choosing positions, between 0 and 1. Threshold and comparisons divide it
            as 1 : (2c)^(2/3), which minimises the variance of a comparison (Lyu, Su and Li 2017).
        clip, threshold, delta, exclude, passes, accountant, max_epsilon, secure_mode: as in `SVT`.

    Raises:
        ValueError: a setting is out of range.
    """

    epsilon: float
    rounds: int = 1
    selection: float = 0.1

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)
        check_whole(rounds=self.rounds)
        if not 0 < self.selection < 1:
            raise ValueError(f"selection is the part of ε spent on positions, between 0 and 1, got {self.selection}")
        super().__post_init__()

    def scales(self, parameters: int) -> LaplaceScales:
        """The least noise with which the rounds stay within ε, for a number of weights."""
        check_whole(parameters=parameters)
        count = entries(self.fraction, parameters)
        budget = self.selection * self.epsilon / self.rounds
        threshold = budget / (1 + (2 * count) ** (2 / 3))
        per_value = _per_value(self.epsilon, self.rounds, budget, count, self.delta, self.accountant)
        return LaplaceScales(threshold=self.clip / threshold, query=2 * count * self.clip / (budget - threshold),
                             release=2 * self.clip / per_value)


@lru_cache(maxsize=256)
def _per_value(epsilon: float, rounds: int, selection: float, count: int, delta: float,
               accountant: Accountant) -> float:
    """The largest ε per value, to 0.01 %, with which all values and the selection together stay within `epsilon`."""
    low = (epsilon / rounds - selection) / count * (1 - 1e-9)  # a sum always fits
    high = 2 * epsilon
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        releases = [Pure(epsilon=selection * (1 + 1e-9), times=rounds), Pure(epsilon=middle, times=count * rounds)]
        fits = epsilon_of(releases, delta=delta, accountant=accountant) <= epsilon
        low, high = (middle, high) if fits else (low, middle)
    return low


def _sparse(update: Update, shared: Tensors, positions: torch.Tensor, values: torch.Tensor) -> Update:
    """The update with `values` at `positions` of its shared tensors in one row, and 0 elsewhere."""
    flat = values.new_zeros(sum(t.numel() for t in shared.values())).index_copy_(0, positions, values)
    parts = unflatten(flat, shared)
    delta = {name: parts[name].to(t.dtype) if name in parts else torch.zeros_like(t)
             for name, t in update.delta.items()}
    size = sum(t.numel() for t in delta.values())
    return replace(update, delta=delta, encoded=sparse_bytes(size, int(values.count_nonzero())))


def _flat(update: Update, shared: Tensors) -> torch.Tensor:
    """The shared tensors in one row, a copy in float32."""
    flat = flatten(shared)
    if not all(map(math.isfinite, flat.aminmax())):  # NaN is both
        raise PrivacyError(f"the update of {update.site} has NaN or infinite values; look at its training")
    return flat


def _shared(tensors: Tensors, exclude: Sequence[str]) -> Tensors:
    """The tensors that may be shared, in the model's order."""
    kept = set(matching(tensors, exclude))
    if kept >= tensors.keys():
        raise ValueError(f"exclude={exclude} leaves nothing to share; exclude fewer tensors")
    return {name: t for name, t in tensors.items() if name not in kept}
