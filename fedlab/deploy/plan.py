"""A run as plain data: what a server sends to sites in place of objects; see `fedlab.deploy.objects`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import Any

import torch

from fedlab.core.errors import FedlabError
from fedlab.core.types import Site, Tensors
from fedlab.core.weights import load_weights, trainable, weights_sha256
from fedlab.deploy.messages import strict_json
from fedlab.deploy.objects import Approve, Json, Load, built, check_plain, describe, follows, make
from fedlab.privacy.base import Privacy
from fedlab.run.admission import Admission
from fedlab.run.site_task import SiteTask
from fedlab.strategies.averaging import Strategy
from fedlab.topologies.workflows import Topology
from fedlab.training.trainer import SiteTrainer

__all__ = ["Approve", "Json", "Plan", "built", "describe", "make"]

_LONGEST = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run as plain data. Its hash is the name of the run.

    Attributes:
        trainer, strategy, privacy, topology, admission: as `describe` gives them.
        rounds: number of the last round.
        seed: of the run.
        sites: names of all sites, in order.
        model: `weights_sha256` of the first weights.
    """

    trainer: Json
    strategy: Json
    privacy: Json
    topology: Json
    admission: Json
    rounds: int
    seed: int
    sites: tuple[str, ...]
    model: str

    def __post_init__(self) -> None:
        if not _whole(self.rounds, 1) or not _whole(self.seed, -2**63):
            raise ValueError(f"rounds is a positive whole number and seed one of 64 bits, got {str(self.rounds)[:40]} "
                             f"and {str(self.seed)[:40]}")
        if not isinstance(self.sites, tuple) or not 1 <= len(self.sites) <= 10_000 or not all(
                isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable() for name in self.sites):
            raise ValueError(f"sites are the names of one or more sites, got {str(self.sites)[:200]}")
        if len(set(self.sites)) != len(self.sites):
            raise ValueError(f"site names are unique within a run, got {str(self.sites)[:200]}")
        if not isinstance(self.model, str) or re.fullmatch("[0-9a-f]{64}", self.model) is None:
            raise ValueError(f"model is the SHA-256 of the first weights, got {str(self.model)[:80]!r}")

    @classmethod
    def of(cls, *, trainer: SiteTrainer, strategy: Strategy, privacy: Privacy, topology: Topology,
           admission: Admission | None, rounds: int, seed: int, sites: Sequence[Site | str]) -> Plan:
        """The plan of a run.

        Raises:
            ValueError: something that can't travel, or that other processes would make differently.
            PrivacyError: a technique that is defined in a notebook, a script or a function.
        """
        names = tuple(site if isinstance(site, str) else site.name for site in sites)
        plan = cls(trainer=describe(trainer), strategy=describe(strategy), privacy=describe(privacy),
                   topology=describe(topology), admission=describe(admission), rounds=rounds, seed=seed, sites=names,
                   model=weights_sha256(trainer.initial()))
        for what, value, told in (("strategy", strategy, plan.strategy), ("privacy", privacy, plan.privacy),
                                  ("topology", topology, plan.topology), ("trainer", trainer, plan.trainer)):
            again = repr(make(told, approve=lambda module: None))
            if _without_addresses(again) != _without_addresses(repr(value)):
                raise ValueError(f"at the sites the {what} would be {again[:300]}, here it is {repr(value)[:300]}; its "
                                 "constructor arguments must be kept as they are in attributes of the same name")
        _check_rebuilt(trainer, make(plan.trainer, approve=lambda module: None))
        return plan

    @property
    def run(self) -> str:
        """The run's name: a hash of everything in the plan."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:32]

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all modules that sites must have approved."""
        found: set[str] = set()
        for part in (self.trainer, self.strategy, self.privacy, self.topology, self.admission):
            check_plain(part, found.add)
        return tuple(sorted(found))

    def to_json(self) -> str:
        """The plan as text, the same for equal plans."""
        return json.dumps({"format": "fedlab-plan-1", **{f.name: getattr(self, f.name) for f in fields(self)}},
                          sort_keys=True, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, *, sender: str = "the server") -> Plan:
        """The plan that a text says; nothing is imported or made.

        Raises:
            FedlabError: the text is no plan.
        """
        if not isinstance(text, str) or len(text) > _LONGEST:
            raise FedlabError(f"the message of {sender} was refused: a plan is text of at most {_LONGEST} signs")
        note = strict_json(text.encode("utf-8", "surrogatepass"), sender=sender)
        if not isinstance(note, dict) or note.keys() != {"format", *(f.name for f in fields(cls))} \
                or note.pop("format") != "fedlab-plan-1" or not isinstance(note["sites"], list):
            raise FedlabError(f"the message of {sender} was refused: it is no plan of this version of fedlab")
        try:
            plan = cls(**{**note, "sites": tuple(note["sites"])})
            for part in (plan.trainer, plan.strategy, plan.privacy, plan.topology, plan.admission):
                check_plain(part, lambda module: None)
        except (ValueError, TypeError) as error:
            raise FedlabError(f"the message of {sender} was refused: {error}") from error
        return plan

    def task(self, start: Tensors, *, approve: Approve, load: Load = import_module) -> SiteTask:
        """What runs at a site, with a trainer that begins with these weights.

        Args:
            start: the first weights.
            approve, load: as in `fedlab.deploy.objects.make`.

        Raises:
            PrivacyError: a module that isn't approved, or a plan that names or calls what it must not.
            ValueError: weights of another model, or settings that don't fit.
        """
        if weights_sha256(start) != self.model:
            raise ValueError("the weights that came are not those that the plan begins with")
        for part in (self.trainer, self.strategy, self.privacy, self.topology, self.admission):
            check_plain(part, approve)
        privacy = make(self.privacy, approve=approve, load=load)
        strategy = make(self.strategy, approve=approve, load=load)
        if not isinstance(privacy, Privacy):
            raise ValueError(f"the plan's privacy is no technique but a {type(privacy).__name__}")
        if not follows(type(strategy), Strategy):
            raise ValueError(f"the plan's strategy is a {type(strategy).__name__}, which has not all that one has")
        self._check_size(start, approve, load)
        trainer = make(self.trainer, approve=approve, load=load)
        if not isinstance(trainer, SiteTrainer):
            raise ValueError(f"the plan's trainer is no SiteTrainer but a {type(trainer).__name__}")
        load_weights(trainer.model, start)
        # A copy takes the weights that the model has now for the start of its runs.
        return SiteTask(trainer=replace(trainer), privacy=privacy, seed=self.seed, strategy=strategy)

    def make_topology(self, *, approve: Approve, load: Load = import_module) -> Topology:
        """The plan's topology, to be checked against the run."""
        topology: Topology = make(self.topology, approve=approve, load=load)
        if not follows(type(topology), Topology) or not callable(topology):
            raise ValueError(f"the plan's topology is a {type(topology).__name__}, which has not all that one has")
        return topology

    def _check_size(self, start: Tensors, approve: Approve, load: Load) -> None:
        """Refuses a model of a library that would be larger than its weights, before it takes any memory."""
        match self.trainer:
            case {"with": {"model": {"make": str() as name} as model}} if name.startswith(("fedlab.", "monai.")):
                with torch.device("meta"):
                    shapes = {name: p.shape for name, p in trainable(make(model, approve=approve, load=load)).items()}
                if shapes != {name: t.shape for name, t in start.items()}:
                    raise ValueError("the weights that came are of another model than the plan's")

    def __repr__(self) -> str:
        return f"<Plan {self.run}: {self.rounds} rounds of {len(self.sites)} sites, model {self.model[:12]}>"


def _check_rebuilt(here: SiteTrainer, there: SiteTrainer) -> None:
    """Refuses a model that differs from what its making gives in more than trainable weights."""
    remedy = ("make the model with fedlab.deploy.built(factory, …) and change nothing of it afterwards but its "
              "trainable weights, or put the change into the factory")
    if repr(here.model) != repr(there.model):
        raise ValueError(f"the model has been changed since it was made: {remedy}")
    shapes = [{name: (p.shape, p.dtype) for name, p in trainable(t.model).items()} for t in (here, there)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"other weights of the model are trained here than in what its making gives: {remedy}")
    still = [{name: t for name, t in trainer.model.state_dict().items() if name not in trainable(trainer.model)
              and isinstance(t, torch.Tensor)} for trainer in (here, there)]
    if weights_sha256(still[0]) != weights_sha256(still[1]):
        raise ValueError(f"weights of the model that aren't trained don't travel, and here they aren't those that its "
                         f"making gives: {remedy}")


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63
