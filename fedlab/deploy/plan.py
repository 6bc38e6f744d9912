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

from fedlab.core import protocols
from fedlab.core.errors import FedlabError
from fedlab.core.protocols import Strategy, Topology, Trainer
from fedlab.core.text import counted
from fedlab.core.types import Site, Tensors
from fedlab.core.weights import load_weights, trainable, weights_sha256
from fedlab.deploy.messages import strict_json
from fedlab.deploy.objects import Approve, Load, built, check_plain, describe, follows, make
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy
from fedlab.run.admission import Admission
from fedlab.run.recipe import Json, differences, recipe
from fedlab.training.trainer import SiteTrainer

__all__ = ["Plan", "built", "describe", "make"]

_FORMAT = "fedlab-plan-2"
_PARTS = ("trainer", "strategy", "privacy", "aggregation", "topology", "admission")
_LONGEST = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run as plain data. Its hash is the name of the run.

    Attributes:
        trainer, strategy, privacy, aggregation, topology, admission: as `describe` gives them.
        rounds: number of the last round.
        sites: names of all sites, in order.
        model: `weights_sha256` of the first weights.
    """

    trainer: Json
    strategy: Json
    privacy: Json
    aggregation: Json
    topology: Json
    admission: Json
    rounds: int
    seed: int
    sites: tuple[str, ...]
    model: str

    def __post_init__(self) -> None:
        if not all(type(value) is int and least <= value < 2**63 for value, least in (
                (self.rounds, 1), (self.seed, -2**63))):
            raise ValueError("rounds is a positive whole number and seed a whole number, both of 64 bits, got "
                             f"{str(self.rounds)[:40]} and {str(self.seed)[:40]}")
        if not isinstance(self.sites, tuple) or not 1 <= len(self.sites) <= 10_000 or not all(
                isinstance(name, str) and 0 < len(name) <= 200 and name.isprintable() for name in self.sites):
            raise ValueError(f"sites are the names of one or more sites, got {str(self.sites)[:200]}")
        if len(set(self.sites)) != len(self.sites):
            raise ValueError(f"site names are unique within a run, got {str(self.sites)[:200]}")
        if not isinstance(self.model, str) or re.fullmatch("[0-9a-f]{64}", self.model) is None:
            raise ValueError(f"model is the SHA-256 of the first weights, got {str(self.model)[:80]!r}")

    @classmethod
    def of(cls, *, trainer: Trainer, strategy: Strategy, privacy: protocols.Privacy, topology: Topology,
           admission: protocols.Admission | None, rounds: int, seed: int, sites: Sequence[Site | str],
           aggregation: protocols.Aggregation | None = None) -> Plan:
        """The plan of a run.

        Raises:
            ValueError: something that cannot travel, or of which other processes would make something else.
            PrivacyError: a technique that is defined in a notebook, a script or a function.
        """
        parts = {"trainer": trainer, "strategy": strategy, "privacy": privacy, "topology": topology,
                 "admission": admission, "aggregation": Aggregation() if aggregation is None else aggregation}
        plan = cls(**{name: describe(part) for name, part in parts.items()}, rounds=rounds, seed=seed,
                   sites=tuple(site if isinstance(site, str) else site.name for site in sites),
                   model=weights_sha256(trainer.initial_model()))
        for name, part in parts.items():
            made = recipe(make(getattr(plan, name), approve=lambda module: None))
            if differing := differences(made, recipe(part), name):
                raise ValueError(f"other processes would make another {name} than {repr(part)[:200]}: "
                                 f"{'; '.join(differing[:3])}. Make networks, losses and transforms with "
                                 "fedlab.deploy.built(factory, …) and change nothing but trained weights afterwards; "
                                 "other classes keep each constructor argument unchanged in an attribute of its name")
        return plan

    @property
    def run(self) -> str:
        """The run's name: a hash of everything in the plan."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:32]

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all modules that sites must have approved."""
        found: set[str] = set()
        self._check_parts(found.add)
        return tuple(sorted(found))

    def to_json(self) -> str:
        """The plan as text, the same for equal plans."""
        return json.dumps({"format": _FORMAT, **{f.name: getattr(self, f.name) for f in fields(self)}},
                          sort_keys=True, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, *, sender: str = "the server") -> Plan:
        """The plan of a text; nothing is imported or made.

        Raises:
            FedlabError: the text is no plan.
        """
        refused = f"the message of {sender} was refused"
        if not isinstance(text, str) or len(text) > _LONGEST:
            raise FedlabError(f"{refused}: a plan is text of at most {_LONGEST} characters")
        note = strict_json(text.encode("utf-8", "surrogatepass"), sender=sender)
        if not isinstance(note, dict) or note.keys() != {"format", *(f.name for f in fields(cls))} \
                or note.pop("format") != _FORMAT or not isinstance(note["sites"], list):
            raise FedlabError(f"{refused}: it is no plan of this version of fedlab")
        try:
            plan = cls(**{**note, "sites": tuple(note["sites"])})
            plan._check_parts(lambda module: None)
        except (ValueError, TypeError) as error:
            raise FedlabError(f"{refused}: {error}") from error
        return plan

    def parts(self, start: Tensors, *, approve: Approve, load: Load = import_module) -> dict[str, Any]:
        """The arguments of `fedlab.run.federate.make_run`: the objects of the plan, not yet checked against each other.

        The trainer begins with the weights `start`; `approve` and `load` are as in `fedlab.deploy.objects.make`.

        Raises:
            PrivacyError: a module that is not approved, or a plan that names or calls what it must not.
            ValueError: weights of another model, or settings that do not fit.
        """
        if weights_sha256(start) != self.model:
            raise ValueError("these are not the weights that the plan begins with")
        self._check_parts(approve)
        self._check_size(start, load)
        made = {name: make(getattr(self, name), approve=approve, load=load) for name in _PARTS}
        for name, is_valid, expected in (
            ("trainer", isinstance(made["trainer"], SiteTrainer), "a SiteTrainer"),
            ("strategy", follows(type(made["strategy"]), Strategy), "an object with all methods of a strategy"),
            ("privacy", isinstance(made["privacy"], Privacy), "a privacy technique"),
            ("aggregation", isinstance(made["aggregation"], Aggregation), "an Aggregation"),
            ("topology", follows(type(made["topology"]), Topology) and callable(made["topology"]), "a topology"),
            ("admission", isinstance(made["admission"], Admission | None), "Admission rules or None"),
        ):
            if not is_valid:
                raise ValueError(f"the plan's {name} is {expected}, got a {type(made[name]).__name__}")
        load_weights(made["trainer"].model, start)
        # A copy takes the weights that the model has now for the start of its runs.
        trainer = replace(made["trainer"])
        if trainer.initial_model().keys() != start.keys():
            raise ValueError("the weights that the plan begins with hold other buffers than training moves here")
        return {**made, "trainer": trainer, "rounds": self.rounds, "seed": self.seed,
                "sites": [Site(name=name, train=()) for name in self.sites]}

    def _check_parts(self, approve: Approve) -> None:
        for name in _PARTS:
            check_plain(getattr(self, name), approve)

    def _check_size(self, start: Tensors, load: Load) -> None:
        """Refuses a model of a library that would be larger than its weights, before it takes any memory."""
        match self.trainer:
            case {"with": {"model": {"make": str() as name} as model}} if name.startswith(("fedlab.", "monai.")):
                with torch.device("meta"):
                    network = make(model, approve=lambda module: None, load=load)
                made = {**trainable(network), **{n: b for n, b in network.named_buffers() if n in start}}
                if {name: p.shape for name, p in made.items()} != {name: t.shape for name, t in start.items()}:
                    raise ValueError("these are weights of another model than the plan's")

    def __repr__(self) -> str:
        rounds, sites = counted(self.rounds, "round"), counted(len(self.sites), "site")
        return f"<Plan {self.run}: {rounds} of {sites}, model {self.model[:12]}>"
