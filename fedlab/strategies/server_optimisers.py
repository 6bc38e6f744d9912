"""Optimisers at the server, which use the mean of the updates as a gradient."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from fedlab.core.settings import check_choice, check_positive, check_within
from fedlab.core.types import ServerState, Tensors, Update
from fedlab.strategies.averaging import FedAvg, moved

__all__ = ["FedOpt"]

_FIRST, _SECOND = "momentum", "variance"  # groups of ServerState.moments


@dataclass(frozen=True, kw_only=True)
class FedOpt(FedAvg):
    """An optimiser at the server: FedAdam, FedYogi, FedAdagrad (Reddi et al., ICLR 2021, arXiv 2003.00295) or momentum.

    Coordinates whose updates are small or rare get larger steps, and noise of single rounds averages out, which helps
    where FedAvg is slow or unsteady. "momentum" is FedAvgM (Hsu et al. 2019, arXiv 1909.06335), and FedAvg with beta1=0
    and server_lr=1. The server keeps one or two more copies of the model, in float64. After noise it costs no privacy.

    Args:
        rule: "adam" forgets old squares at a fixed rate, "yogi" only as fast as the new ones differ, "adagrad" never;
            "momentum" uses no squares.
        server_lr: length of the server's step. For the first three about what a coordinate moves in a round: begin
            with 0.01, with "adagrad" 0.1. For "momentum" a multiple of the mean: begin with 1.
        beta1: share of the past in the moving mean of the updates; the paper takes 0 with "adagrad".
        beta2: share of the past in the moving mean of their squares, for "adam" and "yogi".
        tau: added to the root of the squares: the larger, the less the rule adapts.

    Raises:
        ValueError: a setting out of its range.
    """

    rule: Literal["adam", "yogi", "adagrad", "momentum"]
    server_lr: float = field()  # no default: the scale depends on the rule
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(("adam", "yogi", "adagrad", "momentum"), rule=self.rule)
        check_within(below=1, beta1=self.beta1, beta2=self.beta2)
        check_positive(tau=self.tau)

    def step(self, state: ServerState, mean: Update) -> ServerState:
        zeros = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in state.params.items()}
        new = 1.0 if self.rule == "momentum" else 1 - self.beta1
        first = {name: m * self.beta1 + mean.delta[name].double() * new
                 for name, m in state.moments.get(_FIRST, zeros).items()}
        if self.rule == "momentum":
            return self._moved(state, first, {_FIRST: first})
        before = state.moments.get(_SECOND, {name: z + self.tau**2 for name, z in zeros.items()})
        second = {name: self._squares(v, mean.delta[name].double().square()) for name, v in before.items()}
        direction = {name: m / (second[name].sqrt() + self.tau) for name, m in first.items()}
        return self._moved(state, direction, {_FIRST: first, _SECOND: second})

    def _squares(self, v: torch.Tensor, squared: torch.Tensor) -> torch.Tensor:
        if self.rule == "adagrad":
            return v + squared
        if self.rule == "yogi":
            return v - (1 - self.beta2) * squared * torch.sign(v - squared)
        return self.beta2 * v + (1 - self.beta2) * squared

    def _moved(self, state: ServerState, direction: Tensors, moments: dict[str, Tensors]) -> ServerState:
        return replace(state, round=state.round + 1, params=moved(state.params, direction, self.server_lr),
                       moments={**state.moments, **moments})
