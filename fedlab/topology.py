"""Who exchanges weights with whom in a round. A topology is a function and keeps no state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from fedlab.strategies import Strategy
from fedlab.types import ServerState, Site, Update

__all__ = ["Topology", "star"]

#: Runs local training at some sites from a given state; yields checked updates.
Train = Callable[[ServerState, Sequence[Site]], Iterator[Update]]
#: What privacy does to the combined update before the model moves.
Release = Callable[[Update], Update]


class Topology(Protocol):
    """One round: from the state before it and its cohort to the state after it."""

    def __call__(self, state: ServerState, cohort: Sequence[Site], *, strategy: Strategy, train: Train,
                 release: Release) -> ServerState: ...


def star(state: ServerState, cohort: Sequence[Site], *, strategy: Strategy, train: Train,
         release: Release) -> ServerState:
    """An aggregation server in the middle: broadcast, train at every site, combine, move (Rieke et al. 2020)."""
    mean = strategy.combine(train(state, cohort))
    return strategy.step(state, release(mean))
