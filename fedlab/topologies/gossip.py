"""Peer to peer: sites mix their models with those of their neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedlab.core.protocols import Run
from fedlab.core.types import Round, ServerState, Tensors
from fedlab.run.arrivals import Arrivals, Void
from fedlab.run.round import Workflow
from fedlab.strategies.averaging import TooFewUpdates, square_distance
from fedlab.topologies.combining import after_update, check_plain_mean, combined

__all__ = ["Gossip"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Gossip(Workflow):
    """Peer to peer: each site has its own model and mixes it with its neighbours' after training (Lian et al. 2017).

    The weights of the mixture are those of Metropolis and Hastings, 1 / (1 + the larger of the two degrees): the
    mixing matrix is symmetric and its rows add up to 1, so that the sites' mean is kept. A site that is absent keeps
    its model, and its neighbours give its share to their own. `ServerState.models` holds the sites' models, `params`
    their mean, which no party has in a deployment; `Round.metrics["consensus distance"]` is the root mean squared
    distance from it. Each site sees its neighbours' models.

    Args:
        graph: an undirected, connected networkx graph whose nodes are the names of the sites or 0, 1, …, in the order
            of the sites; such as `networkx.cycle_graph(4)`.

    Raises:
        ValueError: a directed, empty or disconnected graph.
    """

    graph: Any

    def __post_init__(self) -> None:
        import networkx

        if not isinstance(self.graph, networkx.Graph) or self.graph.is_directed():
            raise ValueError(f"graph is an undirected networkx graph, got {self.graph!r}")
        if len(self.graph) == 0 or not networkx.is_connected(self.graph):
            raise ValueError("the graph is empty or falls apart into parts that never exchange anything; connect it")

    def check(self, run: Run) -> None:
        check_plain_mean(run.strategy, "peers have no server to combine updates or to step with them")
        if set(self.graph) not in (set(run.names), set(range(len(run.names)))):
            raise ValueError(f"the graph's nodes are the sites' names, {sorted(run.names)}, or 0 to "
                             f"{len(run.names) - 1}; got {sorted(map(str, self.graph))}")

    def __call__(self, run: Run, state: ServerState) -> Round:
        state = state.copy()
        arrivals = Arrivals(run, state, run.select(state))
        models: dict[str, Tensors] = {name: state.models.get(name, state.model) for name in run.names}
        try:
            if not arrivals.cohort:
                raise TooFewUpdates("no site was drawn")
            for update in arrivals.train(replace(state, models=models), arrivals.cohort):
                models[update.site] = after_update(models[update.site], update)
            after = self.mixed(state, models, run.names, arrivals.present)
        except Void as error:
            after = arrivals.void(error)
        return arrivals.close(after)

    def mixed(self, state: ServerState, models: Mapping[str, Tensors], names: Sequence[str],
              present: Sequence[str]) -> ServerState:
        """The state after the models of all sites were mixed with those of their neighbours that are present."""
        weights = self.mixing(names, present)
        mixed = {name: combined(weights[name], models) for name in names}
        mean = combined({name: 1 / len(names) for name in names}, mixed)
        return replace(state.holding(mean), round=state.round + 1, models=mixed)

    def mixing(self, names: Sequence[str], present: Sequence[str]) -> dict[str, dict[str, float]]:
        """The mixing matrix, one row per site: the share of each model in the site's next one."""
        graph = self._named(names)
        degree = dict(graph.degree)
        rows = {}
        for name in names:
            row = {other: 1 / (1 + max(degree[name], degree[other])) for other in names
                   if graph.has_edge(name, other) and name in present and other in present}
            rows[name] = {name: 1 - sum(row.values()), **row}
        return rows

    def _named(self, names: Sequence[str]) -> Any:
        """The graph with the sites' names as its nodes."""
        import networkx

        return networkx.relabel_nodes(self.graph, {k: name for k, name in enumerate(names) if k in self.graph})

    def messages(self, names: Sequence[str]) -> list[tuple[str, str]]:
        graph = self._named(names)
        return [(a, b) for a in names for b in names if graph.has_edge(a, b)]

    def metrics(self, state: ServerState) -> Mapping[str, float]:
        squares = [square_distance(state.params, model) for model in state.models.values()]
        return {"consensus distance": math.sqrt(sum(squares) / len(squares))} if squares else {}

    def __repr__(self) -> str:
        return f"Gossip(graph=networkx.Graph({sorted(map(tuple, map(sorted, self.graph.edges)))!r}))"
