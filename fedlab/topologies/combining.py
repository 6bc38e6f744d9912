"""What several workflows share: models after updates, sums of models, and refusing strategies that need a server."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedlab.core.protocols import Strategy
from fedlab.core.types import Tensors, Update
from fedlab.strategies.averaging import FedAvg, moved

__all__ = ["after_update", "check_plain_mean", "combined"]


def after_update(model: Tensors, update: Update) -> Tensors:
    """A model after one site's update: its weights moved, its buffers those of the update."""
    return {**moved({name: model[name] for name in model if name not in update.buffers}, update.delta, 1.0),
            **{name: b.to(model[name].dtype) for name, b in update.buffers.items()}}


def combined(weights: Mapping[str, float], models: Mapping[str, Tensors]) -> Tensors:
    """A weighted sum of models, accumulated in float64; of whole numbers, which only buffers are, the largest."""
    def value(name: str, like: torch.Tensor) -> torch.Tensor:
        if not like.is_floating_point():
            return torch.stack([models[site][name] for site in weights]).amax(dim=0)
        total = torch.zeros_like(like, dtype=torch.float64)
        return sum((w * models[site][name].double() for site, w in weights.items()), total).to(like.dtype)

    return {name: value(name, like) for name, like in models[next(iter(weights))].items()}


def check_plain_mean(strategy: Strategy, why: str) -> None:
    """Refuses a strategy whose part at the server would silently not run."""
    own = type(strategy)
    if own.combine is not FedAvg.combine or own.step is not FedAvg.step or getattr(strategy, "server_lr", 1.0) != 1:
        raise ValueError(f"{why}, which {strategy!r} relies on; use FedAvg() or a strategy that only changes the "
                         "training at the sites, such as FedProx")
