"""Li et al. 2019: sharing the largest changes, and the sparse vector technique with the ε it really composes to.

W. Li, F. Milletarì, D. Xu et al., Privacy-preserving Federated Brain Tumour Segmentation, MLMI 2019, arXiv 1910.00962,
section 2.3, after R. Shokri and V. Shmatikov, Privacy-Preserving Deep Learning, CCS 2015. What is proven, and how, is
in `fedlab.privacy.sparse.sparse_vector`. Patient counts, numbers of steps and the names of tensors left out are public.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from fedlab.core.errors import PrivacyError
from fedlab.core.types import Memory, Site, Tensors, Update
from fedlab.privacy.accounting.ledger import Accountant, Ledger, Pure, Terms, epsilon_of
from fedlab.privacy.base import Privacy
from fedlab.privacy.sparse.sparse_vector import (
    ADJACENCY,
    LaplaceScales,
    SparseVectorCost,
    laplace,
    random_bits,
    select,
    sparse_vector_cost,
)

if TYPE_CHECKING:
    import pandas as pd

    from fedlab.strategies.averaging import Strategy
    from fedlab.training.trainer import SiteTrainer

__all__ = ["SVT", "PartialSharing", "SparseVector", "composed_epsilon"]


def composed_epsilon(techniques: Mapping[str, SVT | SparseVector | SparseVectorCost], *, parameters: int,
                     rounds: Sequence[int] = (1, 10, 100)) -> pd.DataFrame:
    """A table of what settings are said to cost and what they provably do, per site.

    Args:
        techniques: name -> technique, or the cost of one.
        parameters: number of weights that may be shared.
        rounds: after how many rounds.

    Returns:
        One row per technique: values released a round, ε stated ("no guarantee"), ε of one value, δ, and the proven ε
        after so many rounds.
    """
    import pandas as pd

    rows = {}
    for name, technique in techniques.items():
        cost = technique if isinstance(technique, SparseVectorCost) else technique.cost(parameters)
        rows[name] = {"values a round": cost.released, "ε stated, no guarantee": cost.stated,
                      "ε of one value": cost.per_value, "δ": cost.delta,
                      **{f"ε, {n} round{'s' * (n > 1)}": cost.epsilon(rounds=n) for n in rounds}}
    return pd.DataFrame.from_dict(rows, orient="index")


class PartialSharing(Privacy):
    """Shares the largest changes of the weights and keeps whole layers at home. No formal guarantee.

    Which weights change most depends on the patients, and their exact values are sent: nothing is proven, and a
    patient can be reconstructed from the largest gradients alone. Li et al. 2019, section 2.3; Shokri and Shmatikov
    2015. For error feedback, or a share of each layer, see `fedlab.privacy.compression`.

    Args:
        fraction: of the weights that may be shared, above 0 and at most 1.
        exclude: names of tensors that are never shared, or patterns of them with "*" and "?", such as
            ["conv_final.*"].
        clip: values are cut to [-clip, clip]; None for no cut.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(self, *, fraction: float, exclude: Sequence[str] = (), clip: float | None = None) -> None:
        _check_fraction(fraction)
        if clip is not None:
            _check_positive(clip=clip)
        self.fraction, self.exclude, self.clip = fraction, _patterns(exclude), clip

    def check_run(self, *, trainer: SiteTrainer, sites: Sequence[Site], strategy: Strategy, rounds: int) -> None:
        _shared(trainer.initial(), self.exclude)

    def protect(self, update: Update, memory: Memory, rng: torch.Generator) -> Update:
        names = _shared(update.delta, self.exclude)
        flat = _flat(update, names)
        largest = flat.abs().topk(_count(self.fraction, flat.numel()), sorted=False).indices
        values = flat.index_select(0, largest)
        if self.clip is not None:
            values.clamp_(-self.clip, self.clip)
        return _sparse(update, names, largest, values)


class SVT(Privacy):
    """The sparse vector technique as Li et al. 2019 published it, with the ε that its noise composes to.

    A weight's change w is shared if |clip(w, γ)| + Lap(2qs/ε₂) reaches τ + Lap(s/ε₁), as clip(clip(w, γ) + Lap(qs/ε₃),
    γ), until the fraction q is shared; s = γ. The paper states (ε₁ + ε₂ + ε₃)-differential privacy. That needs the
    number of shared values where the noise has the fraction: for N weights the noise is N times too small for it, and
    what it gives sums to ε₁ + N ε₂ + 2 N ε₃ (the 2: values lie in [-γ, γ], 2γ wide), millions for ε₃ = 1. The ledger
    is charged with what can be proven, value by value. Use `SparseVector` to choose the ε yourself.

    Unit: a whole site, and with it each of its patients. Adjacency: any two updates of a site.

    Args:
        fraction: q, of the weights to share; the paper used 0.1 to 0.4.
        epsilon_threshold: ε₁.
        epsilon_release: ε₃.
        epsilon_query: ε₂; None for the paper's (2qs)^(2/3) ε₁.
        clip: γ, of the change over the whole round, in units of the weights. (NVFLARE divides by the number of steps
            first: γ times steps here.)
        threshold: τ.
        delta: of the guarantee, below 1 over the number of sites; for composing values and rounds.
        exclude: as in `PartialSharing`.
        passes: how often all weights not yet shared are tried, at most; fewer than q are shared if that is too few.
        accountant: that composes values and rounds.
        max_epsilon: the site's budget for the run; None for none.
        secure_mode: noise from the operating system. Without it noise repeats with the seed of the run, and whoever
            knows the seed can subtract it: for research.

    Raises:
        ValueError: a setting out of its range.
    """

    units = frozenset({"site"})

    def __init__(self, *, fraction: float, epsilon_threshold: float, epsilon_release: float,
                 epsilon_query: float | None = None, clip: float = 1e-4, threshold: float = 1e-6, delta: float = 1e-5,
                 exclude: Sequence[str] = (), passes: int = 100, accountant: Accountant = "rdp",
                 max_epsilon: float | None = None, secure_mode: bool = False) -> None:
        _check_positive(epsilon_threshold=epsilon_threshold, epsilon_release=epsilon_release)
        if epsilon_query is not None:
            _check_positive(epsilon_query=epsilon_query)
        self.fraction, self.epsilon_threshold, self.epsilon_release = fraction, epsilon_threshold, epsilon_release
        self.epsilon_query, self.clip, self.threshold, self.delta = epsilon_query, clip, threshold, delta
        self.exclude, self.passes, self.accountant = _patterns(exclude), passes, accountant
        self.max_epsilon, self.secure_mode = max_epsilon, secure_mode
        _check_settings(self)

    def scales(self, parameters: int) -> LaplaceScales:
        """The published noise: it doesn't depend on how many weights there are."""
        return LaplaceScales(threshold=self.clip / self.epsilon_threshold,
                             query=2 * self.fraction * self.clip / self._query(),
                             release=self.fraction * self.clip / self.epsilon_release)

    def cost(self, parameters: int) -> SparseVectorCost:
        """What a round costs where `parameters` weights may be shared, proven, beside what the paper states."""
        return _cost(self, parameters, self.epsilon_threshold + self._query() + self.epsilon_release)

    def check_run(self, *, trainer: SiteTrainer, sites: Sequence[Site], strategy: Strategy, rounds: int) -> None:
        _check_start(self, trainer, sites)

    def protect(self, update: Update, memory: Memory, rng: torch.Generator) -> Update:
        return _release(self, update, memory, rng)

    def _query(self) -> float:
        if self.epsilon_query is not None:
            return self.epsilon_query
        return float((2 * self.fraction * self.clip) ** (2 / 3) * self.epsilon_threshold)


class SparseVector(Privacy):
    """The sparse vector technique with noise for the ε that you ask for (Lyu, Su and Li 2017, algorithm 7).

    The noise is calibrated to the number of shared values c, each position is shared once, and the whole, positions
    and values of all rounds, satisfies ε at δ. Values get Laplace noise whose scale is the smallest with which the
    ledger's accountant stays within ε: it grows about as √(c rounds), where a sum of ε would need c rounds.

    Expect little: at an ε worth having, the choice of positions is close to chance and the noise of a value many times
    the clip. A smaller fraction means less noise on each value.

    Unit: a whole site, and with it each of its patients. Adjacency: any two updates of a site.

    Args:
        fraction: of the weights to share; at least one is.
        epsilon: of `rounds` rounds together.
        rounds: for which ε shall suffice; a site that takes part in more spends more, see `max_epsilon`.
        selection: part of ε that is spent on choosing positions, between 0 and 1. Threshold and comparisons divide it
            as 1 : (2c)^(2/3), which minimises the variance of a comparison (Lyu, Su and Li 2017).
        clip, threshold, delta, exclude, passes, accountant, max_epsilon, secure_mode: as in `SVT`.

    Raises:
        ValueError: a setting out of its range.
    """

    units = frozenset({"site"})

    def __init__(self, *, fraction: float, epsilon: float, rounds: int = 1, selection: float = 0.1,
                 clip: float = 1e-4, threshold: float = 1e-6, delta: float = 1e-5, exclude: Sequence[str] = (),
                 passes: int = 100, accountant: Accountant = "rdp", max_epsilon: float | None = None,
                 secure_mode: bool = False) -> None:
        _check_positive(epsilon=epsilon)
        if not isinstance(rounds, int) or rounds < 1:
            raise ValueError(f"rounds is a positive whole number, got {rounds!r}")
        if not 0 < selection < 1:
            raise ValueError(f"selection is the part of ε spent on positions, between 0 and 1, got {selection}")
        self.fraction, self.epsilon, self.rounds, self.selection = fraction, epsilon, rounds, selection
        self.clip, self.threshold, self.delta, self.exclude = clip, threshold, delta, _patterns(exclude)
        self.passes = passes
        self.accountant, self.max_epsilon, self.secure_mode = accountant, max_epsilon, secure_mode
        _check_settings(self)

    def scales(self, parameters: int) -> LaplaceScales:
        """The least noise with which the rounds stay within ε, for so many weights."""
        count = _count(self.fraction, parameters)
        budget = self.selection * self.epsilon / self.rounds
        threshold = budget / (1 + (2 * count) ** (2 / 3))
        per_value = _per_value(self.epsilon, self.rounds, budget, count, self.delta, self.accountant)
        return LaplaceScales(threshold=self.clip / threshold, query=2 * count * self.clip / (budget - threshold),
                             release=2 * self.clip / per_value)

    def cost(self, parameters: int) -> SparseVectorCost:
        """What a round costs where `parameters` weights may be shared."""
        return _cost(self, parameters, None)

    def check_run(self, *, trainer: SiteTrainer, sites: Sequence[Site], strategy: Strategy, rounds: int) -> None:
        _check_start(self, trainer, sites)

    def protect(self, update: Update, memory: Memory, rng: torch.Generator) -> Update:
        return _release(self, update, memory, rng)


@lru_cache(maxsize=256)
def _per_value(epsilon: float, rounds: int, selection: float, count: int, delta: float,
               accountant: Accountant) -> float:
    """The largest ε of each of `count` values a round that, with the selection's, stays within `epsilon`; to 0.01 %."""
    low = (epsilon / rounds - selection) / count * (1 - 1e-9)  # a sum always fits
    high = 2 * epsilon
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        releases = [Pure(epsilon=selection * (1 + 1e-9), times=rounds), Pure(epsilon=middle, times=count * rounds)]
        fits = epsilon_of(releases, delta=delta, accountant=accountant) <= epsilon
        low, high = (middle, high) if fits else (low, middle)
    return low


def _cost(technique: SVT | SparseVector, parameters: int, stated: float | None) -> SparseVectorCost:
    return sparse_vector_cost(clip=technique.clip, scales=technique.scales(parameters), stated=stated,
                              released=_count(technique.fraction, parameters), delta=technique.delta,
                              accountant=technique.accountant)


def _release(technique: SVT | SparseVector, update: Update, memory: Memory, rng: torch.Generator) -> Update:
    """Charges the ledger, chooses positions, adds noise to their values."""
    names = _shared(update.delta, technique.exclude)
    flat = _flat(update, names).clamp_(-technique.clip, technique.clip)
    cost, scales = technique.cost(flat.numel()), technique.scales(flat.numel())
    terms = Terms(unit="site", delta=technique.delta, adjacency=ADJACENCY, accountant=technique.accountant)
    for ledger in (Ledger(dict(memory)), Ledger(memory)):  # a copy first: all of it fits the budget, or none is entered
        for release in cost.releases():
            ledger.charge(release, terms=terms, max_epsilon=technique.max_epsilon,
                          repeatable=not technique.secure_mode)
    source = None if technique.secure_mode else rng
    threshold = technique.threshold + scales.threshold * float(laplace(1, source))
    chosen = select(flat.abs(), threshold=threshold, count=cost.released, passes=technique.passes,
                    noise=lambda tried: laplace(tried, source).mul_(scales.query),
                    order=lambda found: random_bits(found, source))
    values = laplace(chosen.numel(), source).mul_(scales.release).add_(flat.index_select(0, chosen))
    shared = torch.tensor(chosen.numel() / flat.numel(), dtype=torch.float64)
    memory["diagnostics"] = {**memory.get("diagnostics", {}), "share of the weights sent": shared}
    return _sparse(update, names, chosen, values.clamp_(-technique.clip, technique.clip))


def _sparse(update: Update, names: Sequence[str], positions: torch.Tensor, values: torch.Tensor) -> Update:
    """The update with `values` at `positions` of its named tensors laid end to end, and 0 elsewhere."""
    sizes = [update.delta[name].numel() for name in names]
    flat = torch.zeros(sum(sizes), dtype=values.dtype).index_copy_(0, positions, values)
    parts = dict(zip(names, flat.split(sizes), strict=True))
    delta = {name: parts[name].view(t.shape).to(t.dtype) if name in parts else torch.zeros_like(t)
             for name, t in update.delta.items()}
    # The length of what `fedlab.privacy.compression.encode_sparse` would send.
    size, sent = sum(t.numel() for t in delta.values()), int(values.count_nonzero())
    return replace(update, delta=delta, encoded=1 + min(4 * sent + min(math.ceil(size / 8), 4 * sent), 4 * size))


def _flat(update: Update, names: Sequence[str]) -> torch.Tensor:
    """The named tensors laid end to end, a copy in float32."""
    flat = torch.cat([update.delta[name].detach().flatten().to(torch.float32) for name in names])
    if not all(map(math.isfinite, flat.aminmax())):  # NaN is both
        raise PrivacyError(f"the update of {update.site} has NaN or infinite values; look at its training")
    return flat


def _shared(tensors: Tensors, exclude: Sequence[str]) -> list[str]:
    """Names of the tensors that may be shared, in the model's order."""
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in tensors):
            raise ValueError(f"no tensor of the model is called {pattern!r}; its tensors are {list(tensors)[:4]} …")
    names = [name for name in tensors if not any(fnmatchcase(name, pattern) for pattern in exclude)]
    if not names:
        raise ValueError(f"exclude={exclude} leaves nothing to share; exclude fewer tensors")
    return names


def _patterns(exclude: Sequence[str]) -> list[str]:
    if isinstance(exclude, str) or not all(isinstance(name, str) for name in exclude):
        raise ValueError(f"exclude is a list of names or patterns, such as ['conv_final.*'], got {exclude!r}")
    return list(exclude)


def _count(fraction: float, parameters: int) -> int:
    if not isinstance(parameters, int) or parameters < 1:
        raise ValueError(f"parameters is a positive whole number of weights, got {parameters!r}")
    return min(parameters, math.ceil(fraction * parameters))


def _check_settings(technique: SVT | SparseVector) -> None:
    _check_fraction(technique.fraction)
    _check_positive(clip=technique.clip)
    if not 0 <= technique.threshold < math.inf:
        raise ValueError(f"threshold is compared with absolute values: 0 or more, got {technique.threshold}")
    if not isinstance(technique.passes, int) or technique.passes < 1:
        raise ValueError(f"passes is a positive whole number, got {technique.passes!r}")
    if technique.max_epsilon is not None:
        _check_positive(max_epsilon=technique.max_epsilon)
    Terms(unit="site", delta=technique.delta, adjacency=ADJACENCY, accountant=technique.accountant)


def _check_start(technique: SVT | SparseVector, trainer: SiteTrainer, sites: Sequence[Site]) -> None:
    """What can be known before the first round: layers left out, δ against the sites, one round against the budget."""
    tensors = trainer.initial()
    names = _shared(tensors, technique.exclude)
    if technique.delta >= 1 / len(sites):
        raise ValueError(f"delta is below 1 over the number of sites (1/{len(sites)}), got {technique.delta}: "
                         "otherwise giving one site away entirely would satisfy the guarantee")
    once = technique.cost(sum(tensors[name].numel() for name in names)).epsilon()
    if technique.max_epsilon is not None and once > technique.max_epsilon:
        raise ValueError(f"the first round alone costs ε = {once:.4g}, more than the budget of "
                         f"{technique.max_epsilon:g}; share less, add more noise, or raise the budget")


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction of the weights to share is above 0 and at most 1, got {fraction}")


def _check_positive(**settings: float) -> None:
    for name, value in settings.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is a positive number, got {value}")
