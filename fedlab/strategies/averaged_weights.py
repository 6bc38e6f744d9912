"""A moving mean of the global weights over the rounds, whatever the strategy that moves them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedlab.core.kit import Kit
from fedlab.core.protocols import Run, Strategy, Trainer
from fedlab.core.settings import check_share
from fedlab.core.types import ServerState, Site, SiteState, Tensors, Update
from fedlab.strategies.averaging import FedAvg

__all__ = ["AveragedWeights"]

_MEAN, _SHARE = "moving mean of the weights", "share of the mean"  # groups of ServerState.moments


@dataclass(frozen=True, kw_only=True)
class AveragedWeights:
    """Keeps a moving mean of the global weights beside them, which evens out what single rounds do.

    Training is that of another strategy and is not changed. The mean is often the better model where the learning rate
    does not fall to 0 (Polyak and Juditsky 1992; in federations Caldarola et al., ECCV 2022, arXiv 2203.11834). It is
    made of weights that are released anyway, so it costs no privacy. The server keeps a copy of the weights in float64.
    A run ends with the weights themselves in `history.state`; `averaged` reads the mean. `Arm` scores the mean.

    Args:
        decay: share of the past in the mean after each round: 0.9 averages over about ten rounds.
        strategy: that moves the model.

    Raises:
        ValueError: a decay outside (0, 1).

    Example:
        >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
        >>> trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16))
        >>> strategy = fl.strategies.AveragedWeights(decay=0.9)
        >>> history = fl.federate(trainer, sites, strategy=strategy, rounds=2)
        >>> fl.core.load_weights(trainer.model, strategy.averaged(history.state).model)
    """

    decay: float
    strategy: Strategy = field(default_factory=FedAvg)

    def __post_init__(self) -> None:
        check_share(decay=self.decay)
        if self.decay == 1:
            raise ValueError("a decay of 1 never takes up the model's weights; give one below 1, such as 0.9")

    def averaged(self, state: ServerState) -> ServerState:
        """The state with the mean in place of the weights; buffers, such as batch norm's statistics, stay the last.

        Raises:
            ValueError: the state holds no mean: it is that before the first round, or of another strategy.
        """
        if _MEAN not in state.moments:
            raise ValueError(f"the state before round {state.round} holds no mean of the weights; run at least one "
                             f"round with strategy={self!r}")
        share = state.moments[_SHARE]["rounds"]
        return replace(state, params={name: (t / share).to(state.params[name].dtype)
                                      for name, t in state.moments[_MEAN].items()})

    def __getattr__(self, name: str) -> Any:
        """What parts of a run ask of some strategies only, such as `one_server`."""
        if name.startswith("_") or name == "strategy":  # while a copy is made, there is no strategy yet
            raise AttributeError(name)
        return getattr(self.strategy, name)

    @property
    def sample(self) -> float:
        return self.strategy.sample

    def bind(self, run: Run) -> AveragedWeights:
        return replace(self, strategy=self.strategy.bind(run))

    def begin(self, params: Tensors) -> ServerState:
        return self.strategy.begin(params)

    def select(self, sites: Sequence[Site], rng: torch.Generator) -> Sequence[Site]:
        return self.strategy.select(sites, rng)

    def equip(self, kit: Kit, site: Site, state: ServerState, site_state: SiteState) -> Kit:
        return self.strategy.equip(kit, site, state, site_state)

    def combine(self, updates: Iterable[Update]) -> Update:
        return self.strategy.combine(updates)

    def remember(self, trainer: Trainer, site: Site, state: ServerState, update: Update, site_state: SiteState,
                 seed: int) -> None:
        self.strategy.remember(trainer, site, state, update, site_state, seed)

    def step(self, state: ServerState, mean: Update) -> ServerState:
        after = self.strategy.step(state, mean)
        zeros = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in after.params.items()}
        none = {"rounds": torch.zeros(1, dtype=torch.float64)}
        new = 1 - self.decay
        kept = {name: t * self.decay + after.params[name].double() * new
                for name, t in state.moments.get(_MEAN, zeros).items()}
        share = state.moments.get(_SHARE, none)["rounds"] * self.decay + new  # below 1 in the first rounds
        return replace(after, moments={**after.moments, _MEAN: kept, _SHARE: {"rounds": share}})
