"""Simulated faults of a federation: sites that fail, attack, are late or leave.

`Faulty(engine=Local(), faults=[DropOut(probability=0.3)], seed=0)` is an engine like any other. Without rules of
admission the first failure ends a run, so also give `federate(..., admission=Admission(...))`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, Literal, cast, get_args

import torch

from fedlab.core.errors import SiteError
from fedlab.core.kit import Kit
from fedlab.core.protocols import Engine, Trainer
from fedlab.core.seeds import generator
from fedlab.core.settings import check_choice, check_positive
from fedlab.core.types import Answer, Failure, Messages, Patient, ServerState, Site, SiteState, Tensors, Update
from fedlab.run.site_states import SiteStates
from fedlab.run.site_task import SiteTask

__all__ = ["Corrupt", "Crash", "DropOut", "Fault", "Faulty", "Joins", "Leaves", "PoisonedLabels", "Replay", "Scale",
           "SignFlip", "Straggler"]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One kind of fault, at some sites in some rounds. Every hook does nothing: override those that the fault needs.

    Whether it strikes depends on the seed, the site and the round only, so that a resumed run has the same faults.

    Args:
        sites: names of the sites that it may strike; by default all.
        rounds: numbers of the rounds in which it may strike, such as (0, 3) or range(5, 9); by default all.
        probability: of a strike at such a site in such a round.

    Raises:
        ValueError: an invalid probability, or a text where several names are expected.
    """

    sites: Collection[str] | None = None
    rounds: Collection[int] | None = None
    probability: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability is between 0 and 1, got {self.probability!r}")
        if isinstance(self.sites, str):
            raise ValueError(f"sites are several names, such as ({self.sites!r},); got the text {self.sites!r}")

    def strikes(self, site: str, round: int, seed: int) -> bool:
        """Whether it strikes a site in a round."""
        if not all(chosen is None or name in chosen for name, chosen in ((site, self.sites), (round, self.rounds))):
            return False
        rng = generator(seed, "strikes", site, round)
        return self.probability == 1 or float(torch.rand((), generator=rng, dtype=torch.float64)) < self.probability

    def keeps_away(self) -> str | None:
        """Why the site does not take part in a round in which the fault strikes, or None."""
        return None

    def at_site(self, site: Site) -> Site:
        """The site with the data on which it trains instead."""
        return site

    def in_training(self, kit: Kit) -> Kit:
        """The kit that trains at the site instead, after privacy techniques have wrapped it."""
        return kit

    def remember(self, update: Update, kept: dict[str, torch.Tensor]) -> None:
        """In every round, whether it strikes or not: keeps parts of an update in a namespace of the site's state."""

    def send(self, update: Update, kept: Tensors, rng: torch.Generator) -> object:
        """The object that the server receives in place of the update."""
        return update


@dataclass(frozen=True, kw_only=True)
class DropOut(Fault):
    """The site does not answer, for example without a connection or during a restart."""

    def keeps_away(self) -> str | None:
        return "the site did not respond"


@dataclass(frozen=True, kw_only=True)
class Joins(Fault):
    """The site takes part from `round` on.

    It is enrolled from the start of the run, so a technique with a ledger knows that it has released nothing yet.
    """

    round: int

    def strikes(self, site: str, round: int, seed: int) -> bool:
        return round < self.round and super().strikes(site, round, seed)

    def keeps_away(self) -> str | None:
        return f"the site joins in round {self.round}"


@dataclass(frozen=True, kw_only=True)
class Leaves(Fault):
    """The site takes part in the rounds before `round` and never returns."""

    round: int

    def strikes(self, site: str, round: int, seed: int) -> bool:
        return round >= self.round and super().strikes(site, round, seed)

    def keeps_away(self) -> str | None:
        return f"the site left before round {self.round}"


@dataclass(frozen=True, kw_only=True)
class Straggler(Fault):
    """The site is slow, by a simulated clock: its update states `seconds` more, and no time passes.

    A server with `Admission(deadline=...)` leaves it out.

    Raises:
        ValueError: not a positive number.
    """

    seconds: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(seconds=self.seconds)

    def send(self, update: Update, kept: Tensors, rng: torch.Generator) -> object:
        return replace(update, seconds=update.seconds + self.seconds)


@dataclass(frozen=True, kw_only=True)
class Crash(Fault):
    """Training ends with an exception in the middle of the round; nothing is sent.

    Args:
        after: number of batches before the exception, at most all; by default half of them.
    """

    after: int | None = None

    def in_training(self, kit: Kit) -> Kit:
        batches = len(cast("Any", kit.loader))
        after = batches // 2 if self.after is None else self.after
        trained = count(1)

        def backward(kit_now: Kit, image: torch.Tensor, target: torch.Tensor) -> float | None:
            loss = kit.backward(kit_now, image, target) if after > 0 else None
            if next(trained) >= min(after, batches):
                raise RuntimeError(f"a simulated crash after {after} batches")
            return loss

        return replace(kit, backward=backward)


@dataclass(frozen=True, kw_only=True)
class PoisonedLabels(Fault):
    """The site trains on wrong labels, by mistake or not (Tolpegin et al. 2020).

    It needs an engine on this machine.

    Args:
        labels: label -> wrong label; by default tumour becomes healthy tissue.
    """

    labels: Mapping[int, int] = field(default_factory=lambda: {1: 0, 2: 0, 4: 0})

    def at_site(self, site: Site) -> Site:
        from monai.data.dataset import Dataset

        patients: Any = Dataset(site.train, transform=partial(_relabelled, labels=self.labels))
        return replace(site, train=patients)  # patients get their labels when they are read


@dataclass(frozen=True, kw_only=True)
class SignFlip(Fault):
    """The site sends minus `factor` times its update, to undo the others' training (Li et al. 2019, RSA)."""

    factor: float = 1.0

    def send(self, update: Update, kept: Tensors, rng: torch.Generator) -> object:
        return update.map(lambda tensor: tensor * -self.factor)


@dataclass(frozen=True, kw_only=True)
class Scale(Fault):
    """The site sends `factor` times its update, so that the mean becomes its model (Bagdasaryan et al. 2020)."""

    factor: float

    def send(self, update: Update, kept: Tensors, rng: torch.Generator) -> object:
        return update.map(lambda tensor: tensor * self.factor)


@dataclass(frozen=True, kw_only=True)
class Replay(Fault):
    """The site sends its first update again.

    Args:
        disguised: whether the old update claims to answer the present round. Then no server can detect it; robust
            strategies can only limit its effect.
    """

    disguised: bool = False

    def remember(self, update: Update, kept: dict[str, torch.Tensor]) -> None:
        if not kept:
            numbers = torch.tensor([update.weight, float(update.round or 0)], dtype=torch.float64)
            kept.update({"weight, round": numbers, **{f"delta|{k}": t.clone() for k, t in update.delta.items()}})

    def send(self, update: Update, kept: Tensors, rng: torch.Generator) -> object:
        weight, number = kept["weight, round"].tolist()
        delta = {name.removeprefix("delta|"): t for name, t in kept.items() if name.startswith("delta|")}
        return replace(update, delta=delta, weight=weight, round=update.round if self.disguised else int(number))


How = Literal["nan", "inf", "shape", "integers", "names", "missing", "weight", "overflow", "sender", "garbage",
              "no update"]


@dataclass(frozen=True, kw_only=True)
class Corrupt(Fault):
    """The server receives an invalid update.

    Args:
        how: "nan" or "inf" in one place of the update; tensors of another "shape", of "integers", under other "names",
            or one "missing"; an invalid "weight"; numbers that are finite and "overflow" in the mean; the name of
            another "sender"; "garbage" in every field; or "no update" but another object.

    Raises:
        ValueError: an unknown word.
    """

    how: How = "nan"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(get_args(How), how=self.how)

    def send(self, update: Update, kept: Tensors, rng: torch.Generator) -> object:
        garbage: Any = dict(delta=[b"\x00"], weight="many", steps=-1.5, metrics="none", spent={"epsilon": 0},
                            encoded="small", round=None, seconds=[])
        changes: Mapping[str, Callable[[], object]] = {
            "nan": lambda: _with_one_entry(update, math.nan, rng),
            "inf": lambda: _with_one_entry(update, math.inf, rng),
            "shape": lambda: update.map(lambda t: t[None]),
            "integers": lambda: update.map(torch.Tensor.int),
            "names": lambda: replace(update, delta={f"other.{name}": t for name, t in update.delta.items()}),
            "missing": lambda: replace(update, delta=dict(list(update.delta.items())[1:])),
            "weight": lambda: replace(update, weight=math.nan),
            "overflow": lambda: update.map(lambda t: torch.full_like(t, torch.finfo(t.dtype).max)),
            "sender": lambda: replace(update, site="elsewhere"),
            "garbage": lambda: Update(update.site, **garbage),
            "no update": lambda: "<html>502 Bad Gateway</html>",
        }
        return changes[self.how]()


@dataclass(kw_only=True, eq=False)
class Faulty:
    """An engine whose sites have faults.

    A fault keeps its values in the state of the site and strikes as the seed says, so a run that is resumed from a
    checkpoint has the same faults. Faults apply in their order.

    Args:
        engine: where the sites work.
        faults: that may strike.
        seed: of the strikes.

    Raises:
        ValueError: an object that is no fault.
    """

    engine: Engine
    faults: Sequence[Fault]
    seed: int = 0

    def __post_init__(self) -> None:
        for fault in self.faults:
            if not isinstance(fault, Fault):
                raise ValueError(f"faults are objects such as DropOut(probability=0.3), got {fault!r}")

    def train(self, task: SiteTask, state: ServerState, cohort: Sequence[Site], states: SiteStates) -> Iterator[Answer]:
        """The answer of each site, or the failure that a fault caused."""
        reached = []
        for site in cohort:
            reasons = [reason for _, fault in self._at_work(site.name, state.round) if (reason := fault.keeps_away())]
            if reasons:
                yield Failure(site.name, SiteError(site.name, state.round, "reach", reasons[0]))
            else:
                reached.append(site)
        if not reached:
            return
        seeded = tuple((fault, self._seed(index)) for index, fault in enumerate(self.faults))
        trainer: Any = _FaultyTrainer(stands_for=task.trainer, seeded=seeded)
        for answer in self.engine.train(replace(task, trainer=trainer), state, reached, states):
            # A fault may turn an update into any object: the server has to check it.
            yield cast("Answer", self._sent(answer, state.round, states)) if isinstance(answer, Update) else answer

    def exchange(self, task: SiteTask, step: str, inboxes: Messages, sites: Sequence[Site],
                 states: SiteStates) -> tuple[Messages, list[Failure]]:
        """The exchange of the inner engine."""
        return self.engine.exchange(task, step, inboxes, sites, states)

    def _at_work(self, site: str, round: int) -> list[tuple[int, Fault]]:
        """The faults that strike a site in a round, with their places."""
        return [(index, fault) for index, fault in enumerate(self.faults)
                if fault.strikes(site, round, self._seed(index))]

    def _sent(self, update: Update, round: int, states: SiteStates) -> object:
        site = update.site
        with states.working(site) as site_state:
            kept = [site_state.of(f"fault {index}").own for index in range(len(self.faults))]
            for fault, values in zip(self.faults, kept, strict=True):
                fault.remember(update, values)
        sent: object = update
        for index, fault in self._at_work(site, round):
            if isinstance(sent, Update):
                sent = fault.send(sent, kept[index], generator(self._seed(index), "send", site, round))
        return sent

    def _seed(self, index: int) -> int:
        return generator(self.seed, "fault", index).initial_seed()


@dataclass(frozen=True, kw_only=True)
class _FaultyTrainer:
    """A trainer that trains like the user's, except where a fault strikes. Both make the same run by content.

    Attributes:
        stands_for: the user's trainer.
        seeded: faults and their seeds.
    """

    stands_for: Trainer
    seeded: tuple[tuple[Fault, int], ...]

    def prepare(self, site: Site, state: ServerState, *, site_state: SiteState, seed: int) -> Kit:
        for fault in self._at_work(site.name, state.round):
            site = fault.at_site(site)
        return self.stands_for.prepare(site, state, site_state=site_state, seed=seed)

    def fit(self, kit: Kit, site: Site, state: ServerState, *, site_state: SiteState, seed: int) -> Update:
        for fault in self._at_work(site.name, state.round):
            kit = fault.in_training(kit)
        return self.stands_for.fit(kit, site, state, site_state=site_state, seed=seed)

    def _at_work(self, site: str, round: int) -> list[Fault]:
        return [fault for fault, seed in self.seeded if fault.strikes(site, round, seed)]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "stands_for":
            raise AttributeError(name)  # while it is copied or unpickled, `stands_for` is not set yet
        return getattr(self.stands_for, name)

    def __repr__(self) -> str:
        return repr(self.stands_for)


def _relabelled(patient: Patient, labels: Mapping[int, int]) -> Patient:
    """The patient with other labels."""
    if patient.label is None:
        return patient
    label = patient.label.clone()
    for right, wrong in labels.items():
        label[patient.label == right] = wrong
    return replace(patient, label=label)


def _with_one_entry(update: Update, value: float, rng: torch.Generator) -> Update:
    """The update with one entry of its delta replaced."""
    delta = {name: tensor.clone() for name, tensor in update.delta.items()}
    names = list(delta)
    flat = delta[names[int(torch.randint(len(names), (), generator=rng))]].view(-1)
    flat[int(torch.randint(flat.numel(), (), generator=rng))] = value
    return replace(update, delta=delta)
