"""The parts of a federated run, as each of them sees the others, and the run that they make up; read `types` first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from fedlab.core.kit import Kit
from fedlab.core.seeds import generator
from fedlab.core.types import (
    Answer,
    Cohort,
    Failure,
    Messages,
    Round,
    ServerState,
    Site,
    SiteState,
    Spent,
    Tensors,
    Update,
)

__all__ = ["Admission", "Aggregation", "Elsewhere", "Engine", "Exchange", "Privacy", "Run", "Strategy", "Topology",
           "Trainer"]


class Trainer(Protocol):
    """Trains at a site; see `fedlab.training.trainer.SiteTrainer`."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def lr(self) -> Any: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def epochs(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def loss(self) -> Any: ...
    @property
    def optimiser(self) -> Any: ...
    @property
    def momentum(self) -> str: ...
    @property
    def buffers(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def device(self) -> str: ...
    def check(self, run: Run) -> None: ...
    def initial(self) -> Tensors: ...
    def initial_buffers(self) -> Tensors: ...
    def initial_model(self) -> Tensors: ...
    def local(self, state: ServerState) -> Tensors: ...
    def prepare(self, site: Site, state: ServerState, *, site_state: SiteState, seed: int) -> Kit: ...
    def fit(self, kit: Kit, site: Site, state: ServerState, *, site_state: SiteState, seed: int) -> Update: ...


class Strategy(Protocol):
    """How updates become one and how the model moves; and, for some, what training at a site does differently.

    State goes in and comes out; a strategy keeps nothing for itself. What a site must remember for it lies in
    `SiteState.own`, what the server must, in `ServerState.moments`. Inherit from `FedAvg` and override what differs.
    """

    @property
    def sample(self) -> float:
        """Probability with which each site takes part in a round."""

    def bind(self, run: Run) -> Strategy:
        """The strategy with what it reads from the run, such as the number of sites.

        Raises:
            ValueError: the strategy cannot work with the rest of the run.
        """

    def begin(self, params: Tensors) -> ServerState:
        """The server's state before the first round."""

    def select(self, sites: Sequence[Site], rng: torch.Generator) -> Sequence[Site]:
        """The cohort of a round."""

    def equip(self, kit: Kit, site: Site, state: ServerState, site_state: SiteState) -> Kit:
        """At a site, before privacy techniques wrap the kit: change how it trains.

        Data of the site that enters here bypasses the techniques' clipping and noise: use the server's state and what
        `remember` has kept of protected updates only.
        """

    def combine(self, updates: Iterable[Update]) -> Update:
        """One update from a cohort's updates, which arrive one by one."""

    def step(self, state: ServerState, mean: Update) -> ServerState:
        """The state after the model has moved by `mean`."""

    def remember(self, trainer: Trainer, site: Site, state: ServerState, update: Update, site_state: SiteState,
                 seed: int) -> None:
        """At a site, when its update is ready to leave: what the site keeps for the next rounds."""


class Privacy(Protocol):
    """What a run needs of a privacy technique; inherit from `fedlab.privacy.base.Privacy`."""

    @property
    def units(self) -> frozenset[str]: ...
    @property
    def layers(self) -> tuple[Any, ...]: ...
    @property
    def works_at_server(self) -> bool: ...
    def at(self, site: str) -> Privacy: ...
    def check(self, run: Run) -> None: ...
    def check_site(self, site: Site, run: Run) -> None: ...
    def equip(self, kit: Kit, site: Site, state: SiteState) -> Kit: ...
    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update: ...
    def release(self, mean: Update, cohort: Cohort, state: ServerState, rng: torch.Generator) -> Update: ...


class Exchange(Protocol):
    """One round's messages between the sites of a cohort, by way of the server."""

    @property
    def names(self) -> Sequence[str]:
        """The sites that still take part, in order."""

    @property
    def shown(self) -> str:
        """`shown_sha256` of the state that the sites are shown in this round."""

    def send(self, step: str, inboxes: Messages) -> Messages:
        """Asks each of these sites for its answer to its inbox (sender -> message); sender -> recipient -> message."""


class Aggregation(Protocol):
    """How a server forms the sum of a cohort's updates: in the open, or so that it sees the sum only.

    Inherit from `fedlab.privacy.aggregation.Aggregation`.
    """

    @property
    def units(self) -> frozenset[str]: ...
    @property
    def hides_updates(self) -> bool: ...
    def bind(self, run: Run) -> Aggregation: ...
    def before(self, exchange: Exchange) -> Any: ...
    def least_spent(self, update: Update) -> Spent | None: ...
    def mask(self, update: Update, state: SiteState, rng: torch.Generator) -> Update: ...
    def answer(self, step: str, site: str, inbox: Mapping[str, bytes], state: SiteState) -> Mapping[str, bytes]: ...
    def after(self, mean: Update, keys: Any, exchange: Exchange) -> Update: ...


class Topology(Protocol):
    """Who exchanges weights with whom: one round, from the state before it to the finished round.

    Attributes:
        one_server: whether all updates of a round meet in one server's mean: what noise at the server and secure
            aggregation need.
    """

    @property
    def one_server(self) -> bool: ...

    def check(self, run: Run) -> None:
        """Before the first round: raises `ValueError` if the workflow cannot work with the rest of the run."""

    def __call__(self, run: Run, state: ServerState) -> Round:
        """The finished round."""

    def messages(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """Who sends weights to whom in a round of these sites, as (sender, receiver)."""

    def metrics(self, state: ServerState) -> Mapping[str, float]:
        """Numbers about the state after a round."""


class Admission(Protocol):
    """Rules by which a run goes on without sites that fail; see `fedlab.run.admission.Admission`."""

    @property
    def min_sites(self) -> int: ...
    @property
    def max_void(self) -> int: ...
    @property
    def max_norm(self) -> float | None: ...
    def refuse(self, update: Update) -> str | None: ...


class Engine(Protocol):
    """Where sites work. A task is a `fedlab.run.site_task.SiteTask`, states are `fedlab.run.site_states.SiteStates`."""

    def train(self, task: Any, state: ServerState, cohort: Sequence[Site], states: Any) -> Iterator[Answer]:
        """The answer of each site of the cohort to the task, one by one."""

    def exchange(self, task: Any, step: str, inboxes: Messages, sites: Sequence[Site],
                 states: Any) -> tuple[Messages, list[Failure]]:
        """What the sites answer in one exchange of messages, as sender -> recipient -> message; and which failed."""


@runtime_checkable
class Elsewhere(Protocol):
    """An engine that runs the loop itself elsewhere, such as at a server, and brings its rounds back."""

    def rounds(self, run: Run, state: ServerState | None) -> Iterator[Round]:
        """The rounds as they are finished, from the state on, or from the beginning."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One federated run: the parts that `fedlab.run.federate.federate` was given, checked and bound to each other.

    Attributes:
        trainer, strategy, privacy, aggregation, topology, engine, admission: the parts.
        sites: all that may take part; those that work elsewhere are names without patients.
        rounds: number of rounds.
        seed: every stream of random numbers derives from it.
        task: what runs at a site in a round, a `fedlab.run.site_task.SiteTask`.
        site_states: what the sites keep during the run, `fedlab.run.site_states.SiteStates`.
    """

    trainer: Trainer
    sites: tuple[Site, ...]
    strategy: Strategy
    privacy: Privacy
    aggregation: Aggregation
    topology: Topology
    engine: Any
    admission: Admission | None
    rounds: int
    seed: int
    task: Any = None
    site_states: Any = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all sites."""
        return tuple(site.name for site in self.sites)

    @property
    def guarded(self) -> bool:
        """Whether a formal guarantee covers the run, so that nothing else about single patients may leave a site."""
        return bool(self.privacy.units or self.privacy.works_at_server or self.aggregation.units)

    def select(self, state: ServerState) -> Sequence[Site]:
        """The cohort of the next round."""
        return self.strategy.select(self.sites, generator(self.seed, "select", state.round))
