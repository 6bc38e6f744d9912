"""How a server chooses its cohort, combines updates and moves the global model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from fedlab.types import Memory, ServerState, Site, Tensors, Update

if TYPE_CHECKING:
    from fedlab.privacy.base import Privacy
    from fedlab.training import Kit, SiteTrainer

__all__ = ["FedAvg", "Strategy", "weighted_mean"]


class Strategy(Protocol):
    """How updates become one and how the model moves; and, for some, what training at a site does differently.

    State goes in and comes out; a strategy keeps nothing for itself. What a site must remember for it lies in the
    site's memory, what the server must, in `ServerState.moments`. Inherit from `FedAvg` and override what differs.
    """

    @property
    def sample(self) -> float:
        """Probability with which each site takes part in a round."""
        ...

    def check_run(self, *, trainer: SiteTrainer, sites: Sequence[Site], privacy: Privacy) -> None:
        """Before the first round: raises `ValueError` if the strategy can't work with the rest of the run."""

    def begin(self, params: Tensors) -> ServerState:
        """The server's state before the first round."""
        ...

    def select(self, sites: Sequence[Site], rng: torch.Generator) -> Sequence[Site]:
        """The cohort of a round."""
        ...

    def equip(self, kit: Kit, site: Site, state: ServerState, memory: Memory) -> Kit:
        """At a site, before privacy techniques wrap the kit: change how it trains.

        Whatever of the site's own data enters here goes around the techniques' clipping and noise: use the state and
        what `keep` has kept of protected updates only.
        """
        ...

    def combine(self, updates: Iterable[Update]) -> Update:
        """One update from a cohort's updates, which arrive one by one."""
        ...

    def step(self, state: ServerState, mean: Update) -> ServerState:
        """The state after the model has moved by `mean`."""
        ...

    def keep(self, trainer: SiteTrainer, site: Site, state: ServerState, update: Update, memory: Memory,
             seed: int) -> None:
        """At a site, when its update is ready to leave: what it keeps for itself, in its memory."""


def weighted_mean(updates: Iterable[Update]) -> Update:
    """The mean of the updates by their weights, accumulated in float64 with one update in memory at a time.

    Returns:
        An update of site "mean" whose weight is the sum of the weights and whose tensors are float64; of the metrics,
        the means of those that every update has.

    Raises:
        ValueError: there is no update.
    """
    total: dict[str, torch.Tensor] = {}
    metrics: dict[str, float] = {}
    weight, steps = 0.0, 0
    for update in updates:
        if not total:
            total = {name: tensor.double() * update.weight for name, tensor in update.delta.items()}
            metrics = {name: value * update.weight for name, value in update.metrics.items()}
        else:
            for name, tensor in update.delta.items():
                total[name].add_(tensor.double(), alpha=update.weight)
            metrics = {name: value + update.metrics[name] * update.weight for name, value in metrics.items()
                       if name in update.metrics}
        weight += update.weight
        steps += update.steps
    if not total:
        raise ValueError("no update to combine: no site of the cohort answered")
    for tensor in total.values():
        tensor.div_(weight)
    return Update(site="mean", delta=total, weight=weight, steps=steps,
                  metrics={name: value / weight for name, value in metrics.items()})


@dataclass(frozen=True, kw_only=True)
class FedAvg:
    """Federated averaging (McMahan et al., AISTATS 2017).

    Args:
        weights: what an update counts by: the site's training "patients" (as in the paper and in
            Li et al. 2019), the optimiser "steps" it took, or "uniform".
        server_lr: length of the server's step; 1 moves the model to the mean.
        sample: probability with which each site takes part in a round, independently of the others.

    Raises:
        ValueError: an unknown weighting, a server step that is not positive, or a probability outside (0, 1].
    """

    weights: Literal["patients", "steps", "uniform"] = "patients"
    server_lr: float = 1.0
    sample: float = 1.0

    def __post_init__(self) -> None:
        if self.weights not in ("patients", "steps", "uniform"):
            raise ValueError(f"weights is 'patients', 'steps' or 'uniform', got {self.weights!r}")
        if not 0 < self.server_lr < float("inf"):
            raise ValueError(f"server_lr is a positive number, got {self.server_lr}")
        if not 0 < self.sample <= 1:
            raise ValueError(f"sample is a probability above 0 and at most 1, got {self.sample}")

    def check_run(self, *, trainer: SiteTrainer, sites: Sequence[Site], privacy: Privacy) -> None: ...

    def begin(self, params: Tensors) -> ServerState:
        return ServerState(round=0, params={name: p.detach().clone() for name, p in params.items()})

    @property
    def uniform_mean(self) -> bool:
        """Whether every update counts the same, a condition of noise that is added to the mean."""
        return self.weights == "uniform"

    def select(self, sites: Sequence[Site], rng: torch.Generator) -> Sequence[Site]:
        if self.sample == 1:
            return sites
        chosen = torch.rand(len(sites), generator=rng, dtype=torch.float64) < self.sample
        return [site for site, taken in zip(sites, chosen.tolist(), strict=True) if taken]

    def equip(self, kit: Kit, site: Site, state: ServerState, memory: Memory) -> Kit:
        return kit

    def keep(self, trainer: SiteTrainer, site: Site, state: ServerState, update: Update, memory: Memory,
             seed: int) -> None: ...

    def combine(self, updates: Iterable[Update]) -> Update:
        return weighted_mean(replace(u, weight=self._weight(u)) for u in updates)

    def step(self, state: ServerState, mean: Update) -> ServerState:
        params = {name: p.double().add(mean.delta[name].double(), alpha=self.server_lr).to(p.dtype)
                  for name, p in state.params.items()}
        return replace(state, round=state.round + 1, params=params)

    def _weight(self, update: Update) -> float:
        if self.weights == "uniform":
            return 1.0
        return float(update.steps) if self.weights == "steps" else update.weight
