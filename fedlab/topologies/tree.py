"""Hierarchical workflows: regional servers, and another workflow between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise

from fedlab.core.protocols import Run, Topology
from fedlab.core.types import Round, ServerState, Site, Tensors, Update
from fedlab.run.arrivals import Arrivals, Void
from fedlab.run.round import Star, Workflow, star, with_buffers
from fedlab.strategies.averaging import TooFewUpdates
from fedlab.topologies.combining import after_update
from fedlab.topologies.cyclic import Ring
from fedlab.topologies.gossip import Gossip

__all__ = ["Tree", "star"]

Regions = Mapping[str, Sequence[Site]]


@dataclass(frozen=True, kw_only=True)
class Tree(Workflow):
    """Regional servers combine their sites' updates, then another workflow connects the regions.

    With `within=star, between=star` it is hierarchical federated averaging (Liu et al. 2020); by the mean over all
    sites it equals the star when updates count by patients. `within=ring` or `between=ring` or `between=Gossip(...)`
    make the hybrids of Rieke et al. 2020. A regional server sees the updates of its own sites, those above it only
    the combined update of a region.

    Args:
        regions: names of the sites of each region; every site is in one.
        within: `star` or `ring`, inside a region.
        between: `star`, `ring` or a `Gossip` whose nodes are the regions.

    Raises:
        ValueError: no region, an empty one, a site in two, or a workflow that is not possible at its place.
    """

    regions: Mapping[str, Sequence[str]]
    within: Topology = star
    between: Topology = star

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

    def check(self, run: Run) -> None:
        members = {name for region in self.regions.values() for name in region}
        if set(run.names) != members:
            raise ValueError(f"the regions hold each site of the run; these differ: {sorted(set(run.names) ^ members)}")
        self.within.check(run)
        self.between.check(replace(run, sites=tuple(Site(name=region, train=()) for region in self.regions)))

    def __call__(self, run: Run, state: ServerState) -> Round:
        state = state.copy()
        arrivals = Arrivals(run, state, run.select(state))
        drawn = {site.name: site for site in arrivals.cohort}
        order = {name: place for place, name in enumerate(drawn)}
        present = {region: [drawn[name] for name in sorted(names, key=lambda name: order.get(name, 0)) if name in drawn]
                   for region, names in self.regions.items()}
        present = {region: sites for region, sites in present.items() if sites}
        try:
            if not present:
                raise TooFewUpdates("no site was drawn")
            after = self._between(run, state, arrivals, present)
        except Void as error:
            after = arrivals.void(error)
        return arrivals.close(after)

    def _between(self, run: Run, state: ServerState, arrivals: Arrivals, present: Regions) -> ServerState:
        """The state after the upper workflow combined the regions' updates as it combines sites' updates."""
        if isinstance(self.between, Star):
            mean = run.strategy.combine(self._regional(run, state, arrivals, present))
            return with_buffers(run.strategy.step(state, mean), state, mean)
        if isinstance(self.between, Gossip):
            names = list(self.regions)
            models: dict[str, Tensors] = {name: state.models.get(name, state.model) for name in names}
            received = []
            for update in self._regional(run, replace(state, models=models), arrivals, present):
                models[update.site] = after_update(models[update.site], update)
                received.append(update.site)
            return self.between.mixed(state, models, names, received)
        model = state.model
        for region in present:
            for update in self._regional(run, state.holding(model), arrivals, {region: present[region]}):
                model = after_update(model, update)
        return replace(state.holding(model), round=state.round + 1)

    def _regional(self, run: Run, state: ServerState, arrivals: Arrivals, regions: Regions) -> Iterator[Update]:
        """The update of each region, which counts like that of a site."""
        for region, members in regions.items():
            start = replace(state.at(region), models={})
            if isinstance(self.within, Star):
                with suppress(TooFewUpdates):  # a region all of whose sites are absent sends nothing
                    yield replace(run.strategy.combine(arrivals.train(start, members)), site=region)
                continue
            model, received = start.model, []
            for site in members:
                for update in arrivals.train(start.holding(model), [site]):
                    model = after_update(model, update)
                    received.append(replace(update, delta={}, buffers={}))
            if received:
                yield Update(site=region, delta={name: model[name] - p for name, p in start.params.items()},
                             buffers={name: model[name] for name in start.buffers},
                             weight=sum(update.weight for update in received), steps=sum(u.steps for u in received))

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
