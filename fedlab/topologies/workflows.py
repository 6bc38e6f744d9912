"""Who exchanges weights with whom in a round: the workflows that Rieke et al. 2020 draw.

A topology is a value that is called once a round. What it must remember it puts into the state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, pairwise
from typing import Any, Protocol

import torch

from fedlab.core.types import ServerState, Site, Tensors, Update
from fedlab.strategies.averaging import FedAvg, Strategy, moved, square_distance

__all__ = ["Buffered", "Gossip", "NoUpdates", "Release", "Ring", "Star", "Topology", "Train", "Tree", "ring", "star"]


class NoUpdates(Exception):
    """Nothing came that could be combined: the round has no effect."""


#: Runs local training at some sites from a given state; yields the updates that were admitted.
Train = Callable[[ServerState, Sequence[Site]], Iterator[Update]]
#: What privacy does to the combined update before the model moves.
Release = Callable[[Update], Update]


class Topology(Protocol):
    """One round: from the state before it and its cohort to the state after it.

    Attributes:
        one_server: whether all updates of a round meet in one server's mean: what noise at the server and secure
            aggregation need.
    """

    @property
    def one_server(self) -> bool: ...

    def check_run(self, *, sites: Sequence[Site], strategy: Strategy) -> None:
        """Before the first round: raises `ValueError` if the workflow can't work with these."""

    def __call__(self, state: ServerState, cohort: Sequence[Site], *, sites: Sequence[Site], strategy: Strategy,
                 train: Train, release: Release) -> ServerState:
        """The state after the round of a cohort out of all sites."""
        ...

    def messages(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """Who sends weights to whom in a round of these sites, as (sender, receiver)."""
        ...

    def metrics(self, state: ServerState) -> Mapping[str, float]:
        """Numbers about the state after a round."""
        ...


@dataclass(frozen=True)
class Star:
    """An aggregation server in the middle: broadcast, train at every site, combine, move (Rieke et al. 2020).

    The server sees every update, unless secure aggregation hides them; sites see the global model only.
    """

    one_server: bool = field(default=True, init=False, repr=False)

    def check_run(self, *, sites: Sequence[Site], strategy: Strategy) -> None: ...

    def __call__(self, state: ServerState, cohort: Sequence[Site], *, sites: Sequence[Site], strategy: Strategy,
                 train: Train, release: Release) -> ServerState:
        mean = strategy.combine(some(train(state, cohort)))
        return strategy.step(state, release(mean))

    def messages(self, names: Sequence[str]) -> list[tuple[str, str]]:
        return [("server", name) for name in names] + [(name, "server") for name in names]

    def metrics(self, state: ServerState) -> Mapping[str, float]:
        return {}


@dataclass(frozen=True)
class Ring:
    """Cyclic weight transfer: each site goes on from what the site before it made of the model (Chang et al. 2018).

    With `rounds=1` and more steps it is institutional incremental learning; Sheller et al. 2018 compare both with
    federated averaging and find that the last sites of a cycle count most. Each site sees what its predecessor did to
    the model; there is no server. Sites can't work at the same time.
    """

    one_server: bool = field(default=False, init=False, repr=False)

    def check_run(self, *, sites: Sequence[Site], strategy: Strategy) -> None:
        _need_plain(strategy, "a ring has no server to combine updates or to step with them")

    def __call__(self, state: ServerState, cohort: Sequence[Site], *, sites: Sequence[Site], strategy: Strategy,
                 train: Train, release: Release) -> ServerState:
        params = state.params
        for site in cohort:
            for update in train(replace(state, params=params), [site]):
                params = moved(params, update.delta, 1.0)
        return replace(state, round=state.round + 1, params=params)

    def messages(self, names: Sequence[str]) -> list[tuple[str, str]]:
        return [(name, names[(k + 1) % len(names)]) for k, name in enumerate(names)] if len(names) > 1 else []

    def metrics(self, state: ServerState) -> Mapping[str, float]:
        return {}


star: Topology = Star()
ring: Topology = Ring()


@dataclass(frozen=True, kw_only=True, eq=False)
class Gossip:
    """Peer to peer: each site has its own model and mixes it with its neighbours' after training (Lian et al. 2017).

    The weights of the mixture are those of Metropolis and Hastings, 1 / (1 + the larger of the two degrees): the
    mixing matrix is symmetric and its rows add up to 1, so that the sites' mean is kept. A site that is absent keeps
    its model, and its neighbours keep its share for their own. `ServerState.models` holds the sites' models, `params`
    their mean, which no one would have in a deployment; `Round.metrics["consensus distance"]` is the root of the
    mean squared distance from it. Each site sees its neighbours' models.

    Args:
        graph: an undirected, connected networkx graph whose nodes are the names of the sites or 0, 1, …, in the order
            of the sites; such as `networkx.cycle_graph(4)` or `networkx.complete_graph(4)`.

    Raises:
        ValueError: a directed, empty or disconnected graph.
    """

    graph: Any
    one_server: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        import networkx

        if not isinstance(self.graph, networkx.Graph) or self.graph.is_directed():
            raise ValueError(f"graph is an undirected networkx graph, got {self.graph!r}")
        if len(self.graph) == 0 or not networkx.is_connected(self.graph):
            raise ValueError("the graph is empty or falls apart: what one part learns would never reach the other; "
                             "connect it")

    def check_run(self, *, sites: Sequence[Site], strategy: Strategy) -> None:
        _need_plain(strategy, "peers have no server to combine updates or to step with them")
        names = {site.name for site in sites}
        if set(self.graph) not in (names, set(range(len(sites)))):
            raise ValueError(f"the graph's nodes are the sites' names, {sorted(names)}, or 0 to {len(sites) - 1}; got "
                             f"{sorted(map(str, self.graph))}")

    def __call__(self, state: ServerState, cohort: Sequence[Site], *, sites: Sequence[Site], strategy: Strategy,
                 train: Train, release: Release) -> ServerState:
        names = [site.name for site in sites]
        models: dict[str, Tensors] = {name: state.models.get(name, state.params) for name in names}
        present = []
        for update in train(replace(state, models=models), cohort):
            models[update.site] = moved(models[update.site], update.delta, 1.0)
            present.append(update.site)
        weights = self.mixing(names, present)
        mixed = {name: _combined(weights[name], models) for name in names}
        mean = _combined({name: 1 / len(names) for name in names}, mixed)
        return replace(state, round=state.round + 1, params=mean, models=mixed)

    def mixing(self, names: Sequence[str], present: Sequence[str]) -> dict[str, dict[str, float]]:
        """The mixing matrix, a row for each site: which share each model has in its next one."""
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
        squares = [square_distance(model, state.params) for model in state.models.values()]
        return {"consensus distance": math.sqrt(sum(squares) / len(squares))} if squares else {}

    def __repr__(self) -> str:
        return f"Gossip(graph=networkx.Graph({sorted(map(tuple, map(sorted, self.graph.edges)))!r}))"


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Regional servers combine their sites' updates, then another workflow goes on between the regions.

    With `within=star, between=star` it is hierarchical federated averaging (Liu et al. 2020); by the mean over all
    sites it equals the star when updates count by patients. `within=ring` or `between=ring` or `between=Gossip(...)`
    make the hybrids of Rieke et al. 2020. A regional server sees the updates of its own sites, those above it only
    what came of a region.

    Args:
        regions: names of the sites of each region; every site is in one.
        within: `star` or `ring`, inside a region.
        between: `star`, `ring` or a `Gossip` whose nodes are the regions.

    Raises:
        ValueError: no region, an empty one, a site in two, or a workflow that can't stand where it is put.
    """

    regions: Mapping[str, Sequence[str]]
    within: Topology = star
    between: Topology = star
    one_server: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        members = [name for names in self.regions.values() for name in names]
        doubled = sorted({name for name in members if members.count(name) > 1})
        if not self.regions or not all(self.regions.values()) or doubled:
            raise ValueError("regions name at least one site each, and a site is in one region only; got "
                             f"{dict(self.regions)!r}" + (f" with {doubled} in several" if doubled else ""))
        if not isinstance(self.within, Star | Ring):
            raise ValueError(f"inside a region sites work as a star or a ring, got {self.within!r}")
        if not isinstance(self.between, Star | Ring | Gossip):
            raise ValueError(f"between regions is a star, a ring or a Gossip, got {self.between!r}")

    def check_run(self, *, sites: Sequence[Site], strategy: Strategy) -> None:
        names, members = {site.name for site in sites}, {name for region in self.regions.values() for name in region}
        if names != members:
            raise ValueError(f"the regions hold each site of the run; these differ: {sorted(names ^ members)}")
        self.within.check_run(sites=sites, strategy=strategy)
        self.between.check_run(sites=self._as_sites(self.regions), strategy=strategy)

    def __call__(self, state: ServerState, cohort: Sequence[Site], *, sites: Sequence[Site], strategy: Strategy,
                 train: Train, release: Release) -> ServerState:
        def region(state: ServerState, regions: Sequence[Site]) -> Iterator[Update]:
            """What a region has made of the model; between regions it counts like a site."""
            for one in regions:
                members = [site for site in cohort if site.name in self.regions[one.name]]
                came: list[Update] = []
                start = replace(state.at(one.name), models={})
                if isinstance(self.within, Star):
                    with suppress(NoUpdates):  # a region whose sites all stayed away has nothing to say
                        yield replace(strategy.combine(some(train(start, members))), site=one.name)
                    continue
                params = start.params
                for site in members:
                    for update in train(replace(start, params=params), [site]):
                        params = moved(params, update.delta, 1.0)
                        came.append(replace(update, delta={}))
                if came:
                    yield Update(site=one.name, delta=difference(params, start.params),
                                 weight=sum(update.weight for update in came), steps=sum(u.steps for u in came))

        present = [name for name, names in self.regions.items() if any(site.name in names for site in cohort)]
        return self.between(state, self._as_sites(present), sites=self._as_sites(self.regions), strategy=strategy,
                            train=region, release=release)

    def messages(self, names: Sequence[str]) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for region, members in self.regions.items():
            inside = [name for name in members if name in names]
            if isinstance(self.within, Ring) and inside:  # from the regional server through its sites and back
                found += pairwise([region, *inside, region])
            else:
                found += [(region, name) for name in inside] + [(name, region) for name in inside]
        return found + self.between.messages(list(self.regions))

    def metrics(self, state: ServerState) -> Mapping[str, float]:
        return self.between.metrics(state)

    @staticmethod
    def _as_sites(regions: Iterable[str]) -> list[Site]:
        return [Site(name=name, train=[]) for name in regions]


@dataclass(frozen=True, kw_only=True)
class Buffered:
    """Asynchronous federated averaging with a buffer (FedBuff, Nguyen et al. 2022), in simulated time.

    Sites never wait: each trains at its own speed from the model that it was given last, and the server moves as soon
    as `size` updates are in its buffer. An update that `s` server steps have overtaken counts 1 / sqrt(1 + s) times.
    A round of the run is one server step.

    Args:
        size: updates in the buffer.
        seconds: how long a site takes for a round, by site; a site that isn't named takes 1 s.

    Raises:
        ValueError: a size below 1 or a time that is not positive.
    """

    size: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    one_server: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"size is a positive whole number, got {self.size!r}")
        if not all(0 < value < math.inf for value in self.seconds.values()):
            raise ValueError(f"seconds are positive, got {dict(self.seconds)!r}")

    def check_run(self, *, sites: Sequence[Site], strategy: Strategy) -> None:
        unknown = sorted(self.seconds.keys() - {site.name for site in sites})
        if unknown or self.size > len(sites):
            raise ValueError(f"a buffer of {self.size} updates from {len(sites)} sites"
                             + (f", and times of sites that aren't there: {unknown}" if unknown else ""))
        if strategy.sample < 1:
            raise ValueError("sites come when they are ready, so the strategy draws none: leave its sample at 1")

    def __call__(self, state: ServerState, cohort: Sequence[Site], *, sites: Sequence[Site], strategy: Strategy,
                 train: Train, release: Release) -> ServerState:
        ready = {s.name: float(state.moments.get("ready", {}).get(s.name, self.seconds.get(s.name, 1.0)))
                 for s in cohort}
        begun = {s.name: int(state.moments.get("begun", {}).get(s.name, 0)) for s in cohort}
        first = sorted(cohort, key=lambda site: (ready[site.name], site.name))[:self.size]
        now = ready[first[-1].name]
        overtaken = {site.name: state.round - begun[site.name] for site in first}
        updates = (update.map(partial(torch.mul, other=1 / math.sqrt(1 + overtaken[update.site])))
                   for update in train(state, first))
        try:
            after = strategy.step(state, release(strategy.combine(some(updates))))
        except NoUpdates:  # the clock goes on all the same, or a site that is gone would be waited for for ever
            after = replace(state, round=state.round + 1)
        models = {site.name: state.at(site.name).params for site in cohort}
        for site in first:
            models[site.name] = after.params
            ready[site.name] = now + self.seconds.get(site.name, 1.0)
            begun[site.name] = after.round
        clock: dict[str, Mapping[str, float]] = {"ready": ready, "begun": begun, "overtaken": overtaken,
                                                 "clock": {"seconds": now}}
        kept = {group: {name: torch.tensor(float(value), dtype=torch.float64) for name, value in slots.items()}
                for group, slots in clock.items()}
        return replace(after, models=models, moments={**after.moments, **kept})

    def messages(self, names: Sequence[str]) -> list[tuple[str, str]]:
        return star.messages(names)

    def metrics(self, state: ServerState) -> Mapping[str, float]:
        if "overtaken" not in state.moments:
            return {}
        late = [float(value) for value in state.moments["overtaken"].values()]
        return {"staleness": sum(late) / len(late), "clock": float(state.moments["clock"]["seconds"])}


def some(updates: Iterator[Update]) -> Iterator[Update]:
    """The updates, of which there must be one.

    Raises:
        NoUpdates: there is none.
    """
    first = next(updates, None)
    if first is None:
        raise NoUpdates
    return chain([first], updates)


def difference(after: Tensors, before: Tensors) -> Tensors:
    """What has changed, in the order of the model."""
    return {name: after[name] - p for name, p in before.items()}


def _combined(weights: Mapping[str, float], models: Mapping[str, Tensors]) -> Tensors:
    """A weighted sum of models, accumulated in float64."""
    like = models[next(iter(weights))]
    return {name: sum((w * models[site][name].double() for site, w in weights.items()),
                      torch.zeros_like(p, dtype=torch.float64)).to(p.dtype) for name, p in like.items()}


def _need_plain(strategy: Strategy, why: str) -> None:
    """Refuses a strategy whose part at the server would silently not be done."""
    own = type(strategy)
    if own.combine is not FedAvg.combine or own.step is not FedAvg.step or getattr(strategy, "server_lr", 1.0) != 1:
        raise ValueError(f"{why}, which {strategy!r} relies on; use FedAvg() or a strategy that only changes the "
                         "training at the sites, such as FedProx")
