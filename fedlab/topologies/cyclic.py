"""Cyclic weight transfer: the model goes from site to site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedlab.core.protocols import Run, Topology
from fedlab.core.types import Round, ServerState
from fedlab.run.arrivals import Arrivals, Void
from fedlab.run.round import Workflow
from fedlab.topologies.combining import after_update, check_plain_mean

__all__ = ["Ring", "ring"]


@dataclass(frozen=True)
class Ring(Workflow):
    """Cyclic weight transfer: each site goes on from the previous site's model (Chang et al. 2018).

    With `rounds=1` and more steps it is institutional incremental learning; Sheller et al. 2018 compare both with
    federated averaging and find that the last sites of a cycle count most. Each site sees how its predecessor changed
    the model; there is no server. Sites cannot work at the same time.
    """

    def check(self, run: Run) -> None:
        check_plain_mean(run.strategy, "a ring has no server to combine updates or to step with them")

    def __call__(self, run: Run, state: ServerState) -> Round:
        state = state.copy()
        arrivals = Arrivals(run, state, run.select(state))
        model = state.model
        try:
            for site in arrivals.cohort:
                for update in arrivals.train(state.holding(model), [site]):
                    model = after_update(model, update)
            after = replace(state.holding(model), round=state.round + 1)
        except Void as error:
            after = arrivals.void(error)
        return arrivals.close(after)

    def messages(self, names: Sequence[str]) -> list[tuple[str, str]]:
        return [(name, names[(k + 1) % len(names)]) for k, name in enumerate(names)] if len(names) > 1 else []


ring: Topology = Ring()
