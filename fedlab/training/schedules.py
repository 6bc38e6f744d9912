"""Learning rates as functions of the round."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedlab.core.settings import check_positive, check_whole, check_within

__all__ = ["CosineDecay", "PolyDecay"]


@dataclass(frozen=True, kw_only=True)
class PolyDecay:
    """A learning rate that falls to 0 over the rounds: start * (1 - round / rounds) ** power (Myronenko 2018, 3.2)."""

    start: float
    rounds: int
    power: float = 0.9

    def __post_init__(self) -> None:
        check_positive(start=self.start)
        check_whole(rounds=self.rounds)
        check_within(power=self.power)

    def __call__(self, round: int) -> float:
        return float(self.start * max(0.0, 1 - round / self.rounds) ** self.power)


@dataclass(frozen=True, kw_only=True)
class CosineDecay:
    """A learning rate that rises to `start` in equal steps over `warmup` rounds, then falls to 0 as half a cosine.

    The warm-up keeps the first steps of an adaptive optimiser, whose moments are not known yet, from spoiling weights
    that were trained before (Loshchilov and Hutter 2017, arXiv 1608.03983; Goyal et al. 2017, arXiv 1706.02677).

    Raises:
        ValueError: a rate or a number of rounds out of range, or a warm-up as long as the run.
    """

    start: float
    rounds: int
    warmup: int = 0

    def __post_init__(self) -> None:
        check_positive(start=self.start)
        check_whole(rounds=self.rounds)
        check_whole(least=0, warmup=self.warmup)
        if self.warmup >= self.rounds:
            raise ValueError(f"warmup is shorter than the {self.rounds} rounds of the run, got {self.warmup}")

    def __call__(self, round: int) -> float:
        if round < self.warmup:
            return self.start * (round + 1) / (self.warmup + 1)
        if round >= self.rounds:
            return 0.0
        return self.start * 0.5 * (1 + math.cos(math.pi * (round - self.warmup) / (self.rounds - self.warmup)))
