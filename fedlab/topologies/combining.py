"""What several workflows share: sums of models, and refusing strategies whose part at the server would not run."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedlab.core.protocols import Strategy
from fedlab.core.types import Tensors
from fedlab.strategies.averaging import FedAvg

__all__ = ["check_plain_mean", "combined", "difference"]


def difference(after: Tensors, before: Tensors) -> Tensors:
    """The change, in the order of the model."""
    return {name: after[name] - p for name, p in before.items()}


def combined(weights: Mapping[str, float], models: Mapping[str, Tensors]) -> Tensors:
    """A weighted sum of models, accumulated in float64."""
    like = models[next(iter(weights))]
    return {name: sum((w * models[site][name].double() for site, w in weights.items()),
                      torch.zeros_like(p, dtype=torch.float64)).to(p.dtype) for name, p in like.items()}


def check_plain_mean(strategy: Strategy, why: str) -> None:
    """Refuses a strategy whose part at the server would silently not run."""
    own = type(strategy)
    if own.combine is not FedAvg.combine or own.step is not FedAvg.step or getattr(strategy, "server_lr", 1.0) != 1:
        raise ValueError(f"{why}, which {strategy!r} relies on; use FedAvg() or a strategy that only changes the "
                         "training at the sites, such as FedProx")
