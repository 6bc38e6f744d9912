"""A tiny federated run in which a privacy technique is watched: real sites, task and server, chosen updates."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from fedlab.core.seeds import generator
from fedlab.core.types import Cohort, Memory, Patient, ServerState, Site, Tensors, Update
from fedlab.privacy.accounting.ledger import Ledger, Terms
from fedlab.privacy.accounting.mechanisms import RELEASES, Release
from fedlab.privacy.base import Inboxes, Privacy, check_update
from fedlab.run.federate import each_round
from fedlab.run.local import Answer, Local
from fedlab.run.site_task import SiteTask
from fedlab.strategies.averaging import FedAvg, Strategy
from fedlab.training.trainer import Kit, SiteTrainer

__all__ = ["DECOY", "Charge", "Rehearsal", "Script", "Stage", "Step", "Watched", "make_stage", "plain_descent",
           "rehearse", "unlike_randomness"]

#: A group of memory that belongs to nobody in the rehearsal.
DECOY = "somebody else's"
#: Groups of memory that belong to the task, the trainer and the server, and the decoy.
_NOT_OURS = ("joined", "broadcast", "optimiser", DECOY)
#: What a site's training shall give: of the site's name and the round, the change of the weights.
Script = Callable[[str, int], Tensors]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What rehearsals take place with.

    Attributes:
        trainer: trains for real; one step a round.
        sites: all of the same number of patients.
        strategy: combines the updates.
    """

    trainer: SiteTrainer
    sites: Sequence[Site]
    strategy: Strategy

    @property
    def like(self) -> Tensors:
        """Tensors with the names and shapes of an update."""
        return self.trainer.initial()


def make_stage(technique: Privacy, *, trainer: SiteTrainer | None, sites: Sequence[Site] | None,
               strategy: Strategy | None) -> Stage:
    """What was given, and for the rest a small SegResNet and sites of noise, as many as the technique asks for."""
    layers = technique._layers()
    if sites is None:
        count = max((int(getattr(layer, "sites", 3)) for layer in layers), default=3)
        batch = max((float(getattr(layer, "batch", None) or 0) for layer in layers), default=0.0)
        sites = [Site(f"site-{number}", [_patient(number, k) for k in range(max(8, math.ceil(2 * batch)))])
                 for number in range(count)]
    if trainer is None:
        trainer = SiteTrainer(model=_network(), steps=1, lr=1.0, optimiser=plain_descent, batch_size=4,
                              crop=(8, 8, 8), augment=None, precision="fp32", device="cpu")
    return Stage(trainer=trainer, sites=sites, strategy=strategy or FedAvg(weights="uniform"))


def plain_descent(parameters: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """The update is the step's gradient times −lr: what enters it can be read from it."""
    return torch.optim.SGD(parameters, lr=lr)


def _network() -> torch.nn.Module:
    from monai.networks.nets import SegResNet  # seconds to import

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SegResNet(spatial_dims=3, init_filters=8, in_channels=4, out_channels=3, blocks_down=(1, 1),
                         blocks_up=(1,), act=("RELU", {"inplace": False}))


def _patient(site: int, number: int) -> Patient:
    rng = torch.Generator().manual_seed(1000 * site + number)
    image = torch.randn(4, 8, 8, 8, generator=rng)
    label = torch.zeros(8, 8, 8, dtype=torch.uint8)
    label[1:6, 1:6, 1:6] = 2
    label[2:5, 2:5, 2:5] = 1
    label[3, 3, 3] = 4
    return Patient(f"s{site}p{number}", image + label.float(), label, np.eye(4))


@dataclass(frozen=True, kw_only=True, repr=False)
class _Scripted(SiteTrainer):
    """Goes through all of a round but returns an update that was chosen beforehand."""

    script: Script

    def fit(self, kit: Kit, site: Site, state: ServerState, *, memory: Memory, seed: int) -> Update:
        return Update(site=site.name, delta=dict(self.script(site.name, state.round)), weight=float(len(site.train)),
                      steps=1, metrics={"loss": 0.5})


class Charge(NamedTuple):
    """An entry of a ledger."""

    release: Release
    terms: Terms


@dataclass(frozen=True, kw_only=True)
class Step:
    """One layer's protect() at one site.

    Attributes:
        layer: its place in the technique.
        round: number of the round.
        site: name of the site.
        given: the tensors it got, copied.
        returned: what it returned, whatever that is.
        in_place: names of tensors of its input that it changed.
        foreign: groups of memory that it changed though they are not its own.
        charged: what it entered into the ledger.
    """

    layer: int
    round: int
    site: str
    given: Tensors
    returned: object
    in_place: tuple[str, ...]
    foreign: tuple[str, ...]
    charged: tuple[Charge, ...]


@dataclass(kw_only=True)
class Rehearsal:
    """What was seen in a rehearsal.

    Attributes:
        steps: every call of protect(), in order.
        trained: the update that training gave: round -> site -> tensors.
        equipped: layer -> what its equip() entered into the ledger of the first site in the first round.
        settled: layer -> what its release() entered into the server's ledger in the first round.
        foreign: groups of memory changed by equip() though they are not the layer's own, or that hold no tensors.
        sent: round -> site -> what left the site.
        released: round -> layer -> what that layer's release() gave.
        moved: round -> what the model was moved by.
        memory: of the sites, at the end.
        server: the server's memory at the end.
        error: what ended the run early.
    """

    steps: list[Step] = field(default_factory=list)
    trained: dict[int, dict[str, Tensors]] = field(default_factory=dict)
    equipped: dict[int, tuple[Charge, ...]] = field(default_factory=dict)
    settled: dict[int, tuple[Charge, ...]] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    sent: dict[int, dict[str, Update]] = field(default_factory=dict)
    released: dict[int, dict[int, Update]] = field(default_factory=dict)
    moved: dict[int, Update] = field(default_factory=dict)
    memory: dict[str, Memory] = field(default_factory=dict)
    server: Memory = field(default_factory=dict)
    error: Exception | None = None


class Watched(Privacy):
    """A technique whose layers are called as `+` calls them, with an eye on what each does.

    Args:
        technique: to be watched.
        seen: what is seen is noted there.
        seed: of the noise at the server. The server's own depends on what it is added to, as it should; here two
            inputs must meet the same noise, so that nothing but them makes the difference.
        checked: whether its check_run() is asked.
    """

    def __init__(self, technique: Privacy, seen: Rehearsal, *, seed: int, checked: bool = True) -> None:
        self.technique, self.seen, self.seed, self.checked = technique, seen, seed, checked
        self.layers = technique._layers()
        self.units, self.before, self.after = technique.units, technique.before, technique.after
        self._owners: dict[tuple[str, str], int] = {}  # site and group -> layer
        self._round = 0

    @property
    def works_at_server(self) -> bool:
        return self.technique.works_at_server

    @property
    def masked(self) -> bool:
        return self.technique.masked

    def check_run(self, *, trainer: SiteTrainer, sites: Sequence[Site], strategy: Strategy, rounds: int) -> None:
        if self.checked:
            self.technique.check_run(trainer=trainer, sites=sites, strategy=strategy, rounds=rounds)

    def equip(self, kit: Kit, site: Site, memory: Memory) -> Kit:
        for place, layer in enumerate(self.layers):
            before = _copied(memory)
            kit = layer.equip(kit, site, memory)
            self.seen.foreign.extend(self._foreign(site.name, place, before, memory))
            self.seen.equipped.setdefault(place, _new_charges(before, memory))
        return kit

    def protect(self, update: Update, memory: Memory, rng: torch.Generator) -> Update:
        number = Ledger(memory).note()["round"] if self.units else None
        number = len(self.seen.sent) - 1 if number is None else number
        self.seen.trained.setdefault(number, {})[update.site] = dict(update.delta)
        for place, layer in enumerate(self.layers):
            before, given = _copied(memory), {name: t.clone() for name, t in update.delta.items()}
            out = layer.protect(update, memory, rng)
            self.seen.steps.append(Step(
                layer=place, round=number, site=update.site, given=given, returned=out,
                in_place=tuple(n for n, t in given.items() if n in update.delta and not _same(t, update.delta[n])),
                foreign=self._foreign(update.site, place, before, memory), charged=_new_charges(before, memory)))
            update = out if place == len(self.layers) - 1 else check_update(out, like=update.delta, site=update.site)
        return update

    def unmask(self, mean: Update, cohort: Cohort, memory: Memory) -> Update:
        return self.technique.unmask(mean, cohort, memory)

    def release(self, mean: Update, cohort: Cohort, memory: Memory, rng: torch.Generator) -> Update:
        rng = generator(self.seed, "release", cohort.round)
        for place in reversed(range(len(self.layers))):
            before = _copied(memory)
            mean = self.layers[place].release(mean, cohort, memory, rng)
            self.seen.settled.setdefault(place, _new_charges(before, memory))
            self.seen.released.setdefault(cohort.round, {})[place] = mean
        self.seen.server = memory
        return mean

    def at_site(self, step: str, site: str, inbox: Mapping[str, bytes], memory: Memory) -> Mapping[str, bytes]:
        known = set(memory)
        answer = self.technique.at_site(step, site, inbox, memory)
        talker = next(k for k, layer in enumerate(self.layers) if layer.before or layer.after)
        self._owners.update({(site, group): talker for group in memory.keys() - known})
        return answer

    def at_server(self, step: str, sent: Inboxes, memory: Memory, arrived: Sequence[str]) -> Inboxes:
        return self.technique.at_server(step, sent, memory, arrived)

    def __repr__(self) -> str:
        return repr(self.technique)  # noise depends on it

    def _foreign(self, site: str, place: int, before: Memory, memory: Memory) -> tuple[str, ...]:
        """Groups that this layer changed though another made them, and groups that are no tensors by name."""
        found = []
        for group in {**before, **memory}:
            tensors, known = memory.get(group, {}), before.get(group)
            wrong = not isinstance(group, str) or "|" in group or not isinstance(tensors, dict) or not all(
                isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in tensors.items())
            changed = wrong or known is None or known.keys() != tensors.keys() or any(
                not _same(t, tensors[name]) for name, t in known.items())
            if not changed:
                continue
            taken = group in _NOT_OURS  # of the others, a group belongs to the layer that first changes it
            owner = None if taken else self._owners.setdefault((site, group), place)
            shared = group in ("ledger", "diagnostics") and group in memory and not wrong
            if wrong or (owner != place and not shared):
                found.append(str(group))
        return tuple(found)


class _Recorder(Local):
    """Sites in this process, and a note of what each sends."""

    def __init__(self, seen: Rehearsal) -> None:
        super().__init__()
        self.memory, self.seen = seen.memory, seen

    def run(self, task: SiteTask, state: ServerState, cohort: Sequence[Site]) -> Iterator[Answer]:
        self.seen.sent.setdefault(state.round, {})
        for answer in super().run(task, state, cohort):
            if isinstance(answer, Update):
                self.seen.sent[state.round][answer.site] = answer
            yield answer


class _Standing:
    """A strategy whose model stays where it is, so that only what sites remember tells one round from the next."""

    def __init__(self, strategy: Strategy, seen: Rehearsal) -> None:
        self._strategy, self._seen = strategy, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)

    def __repr__(self) -> str:
        return repr(self._strategy)

    def step(self, state: ServerState, mean: Update) -> ServerState:
        self._seen.moved[state.round] = mean
        return replace(state, round=state.round + 1)


def rehearse(technique: Privacy, stage: Stage, *, script: Script | None = None, rounds: int = 1, seed: int = 0,
             checked: bool = True, catch: bool = False) -> Rehearsal:
    """A run of the technique on the stage, through the real task of a site and the real server.

    Args:
        technique: not changed unless it changes itself.
        stage: see `Stage`.
        script: what training gives; None to train.
        rounds: how many; the model doesn't move.
        seed: of the run.
        checked: whether the technique's check_run() is asked first.
        catch: whether an error is noted in the result instead of raised.
    """
    seen = Rehearsal()
    seen.memory.update({site.name: {DECOY: {"x": torch.ones(2)}} for site in stage.sites})
    trainer = stage.trainer
    if script is not None:
        settings = {f.name: getattr(trainer, f.name) for f in fields(SiteTrainer) if f.init}
        trainer = _Scripted(**settings, script=script)
        object.__setattr__(trainer, "_start", stage.trainer._start)
    try:
        for _ in each_round(trainer, stage.sites, strategy=_Standing(stage.strategy, seen), rounds=rounds, seed=seed,
                            privacy=Watched(technique, seen, seed=seed, checked=checked), engine=_Recorder(seen)):
            pass
    except Exception as error:
        if not catch:
            raise
        seen.error = error
    return seen


@contextmanager
def unlike_randomness(number: int) -> Iterator[None]:
    """Other global random numbers than usual, as if other code had run before; the old ones come back afterwards."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _new_charges(before: Memory, after: Memory) -> tuple[Charge, ...]:
    """What a ledger holds after a hook that it didn't hold before."""
    old, new = ([] if "ledger" not in m else Ledger({"ledger": m["ledger"]}).note()["entries"] for m in (before, after))
    return tuple(Charge(RELEASES[e["kind"]](**e["release"]), Terms(**e["terms"])) for e in new[len(old):])


def _copied(memory: Memory) -> Memory:
    return {group: {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in tensors.items()}
            for group, tensors in memory.items()}


def _same(one: Any, other: Any) -> bool:
    """Bit-equal, NaN in the same place included."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return one is other
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(
        one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))
