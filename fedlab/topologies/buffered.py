"""Asynchronous federated averaging, in simulated time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from fedlab.core.errors import PrivacyBudgetExhausted
from fedlab.core.protocols import Run
from fedlab.core.settings import check_whole
from fedlab.core.types import Round, ServerState
from fedlab.run.arrivals import Arrivals, Void
from fedlab.run.round import Workflow, star

__all__ = ["Buffered"]


@dataclass(frozen=True, kw_only=True)
class Buffered(Workflow):
    """Asynchronous federated averaging with a buffer (FedBuff, Nguyen et al. 2022), in simulated time.

    Sites never wait: each trains at its own speed from the model that it received last, and the server moves as soon
    as `size` updates are in its buffer. An update that `s` server steps have overtaken is scaled by 1 / sqrt(1 + s).
    A round of the run is one server step.

    Args:
        size: updates in the buffer.
        seconds: simulated time of a round, by site; 1 s for a site that is not named.

    Raises:
        ValueError: a size below 1 or a time that is not positive.
    """

    size: int
    seconds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_whole(size=self.size)
        if not all(0 < value < math.inf for value in self.seconds.values()):
            raise ValueError(f"seconds are positive, got {dict(self.seconds)!r}")

    def check(self, run: Run) -> None:
        unknown = sorted(self.seconds.keys() - set(run.names))
        if unknown or self.size > len(run.sites):
            raise ValueError(f"a buffer of {self.size} updates from {len(run.sites)} sites"
                             + (f", and times of unknown sites: {unknown}" if unknown else ""))
        if run.trainer.initial_buffers():
            raise ValueError("late updates count less, which the mean of statistics such as batch norm's can't follow: "
                             "leave them at the sites with SiteTrainer(buffers='keep'), or use group norm")
        if run.strategy.sample < 1:
            raise ValueError("sites send when they are ready, so the strategy draws none: leave its sample at 1")

    def __call__(self, run: Run, state: ServerState) -> Round:
        state = state.copy()
        arrivals = Arrivals(run, state, run.select(state))
        names = [site.name for site in arrivals.cohort]
        ready = {name: float(state.moments.get("ready", {}).get(name, self.seconds.get(name, 1.0))) for name in names}
        begun = {name: int(state.moments.get("begun", {}).get(name, 0)) for name in names}
        first = sorted(arrivals.cohort, key=lambda site: (ready[site.name], site.name))[:self.size]
        now = ready[first[-1].name]
        overtaken = {site.name: state.round - begun[site.name] for site in first}
        updates = (update.map(partial(torch.mul, other=1 / math.sqrt(1 + overtaken[update.site])))
                   for update in arrivals.train(state, first))
        try:
            after = run.strategy.step(state, run.strategy.combine(updates))
        except Void as error:  # the clock still advances; otherwise a site that has left would stop it for ever
            after = arrivals.void(error)
        withdrawn = {name: float(state.moments.get("withdrawn", {}).get(name, 0)) for name in names}
        withdrawn |= {site.name: float(site.name in arrivals.withdrawn) for site in first}
        if all(withdrawn.values()):
            raise PrivacyBudgetExhausted(f"no site is left: {', '.join(names)} have withdrawn, the last ones with: "
                                         + "; ".join(arrivals.withdrawn.values()))
        for site in first:
            ready[site.name] = now + self.seconds.get(site.name, 1.0)
            begun[site.name] = after.round
        models = {name: after.model if name in overtaken else state.at(name).model for name in names}
        clock: dict[str, Mapping[str, float]] = {"ready": ready, "begun": begun, "overtaken": overtaken,
                                                 "withdrawn": withdrawn, "clock": {"seconds": now}}
        kept = {group: {name: torch.tensor(float(value), dtype=torch.float64) for name, value in slots.items()}
                for group, slots in clock.items()}
        return arrivals.close(replace(after, models=models, moments={**after.moments, **kept}))

    def messages(self, names: Sequence[str]) -> list[tuple[str, str]]:
        return star.messages(names)

    def metrics(self, state: ServerState) -> Mapping[str, float]:
        if "overtaken" not in state.moments:
            return {}
        late = [float(value) for value in state.moments["overtaken"].values()]
        return {"staleness": sum(late) / len(late), "clock": float(state.moments["clock"]["seconds"])}
