"""A tiny federated run in which a privacy technique is watched: real sites, task and server, chosen updates."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from fedlab.core.gate import check_update
from fedlab.core.kit import Kit
from fedlab.core.protocols import Exchange, Run, Strategy, Trainer
from fedlab.core.seeds import generator
from fedlab.core.types import Answer, Cohort, Patient, ServerState, Site, SiteState, Tensors, Update
from fedlab.privacy.accounting.ledger import Ledger, Terms
from fedlab.privacy.accounting.mechanisms import RELEASES, Release
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy
from fedlab.run.federate import each_round
from fedlab.run.local import Local
from fedlab.run.site_states import SiteStates
from fedlab.run.site_task import SiteTask
from fedlab.strategies.averaging import FedAvg
from fedlab.training.trainer import SiteTrainer

__all__ = ["DECOY", "Charge", "Rehearsal", "Script", "Stage", "Step", "Watched", "make_stage", "plain_descent",
           "rehearse", "unlike_randomness"]

#: A namespace that belongs to no part of the rehearsal.
DECOY = "another technique"
#: The update that a site's training shall give, from the site's name and the round.
Script = Callable[[str, int], Tensors]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The parts of a rehearsal besides the technique.

    Attributes:
        trainer: trains for real; one step per round.
        sites: all of the same number of patients.
        strategy: combines the updates.
        aggregation: adds them up.
    """

    trainer: SiteTrainer
    sites: Sequence[Site]
    strategy: Strategy
    aggregation: Aggregation

    @property
    def like(self) -> Tensors:
        """Tensors with the names and shapes of an update."""
        return self.trainer.initial()

    def alone(self) -> Stage:
        """The stage with its first site only, unless updates are hidden in a sum of several."""
        return self if self.aggregation.hides_updates else replace(self, sites=self.sites[:1])


def make_stage(technique: Privacy, *, trainer: SiteTrainer | None, sites: Sequence[Site] | None,
               strategy: Strategy | None, aggregation: Aggregation) -> Stage:
    """The given parts, and for the rest a small SegResNet and sites of noise with patients enough for a `batch`."""
    if sites is None:
        wanted: Any = getattr(aggregation, "sites", None) or getattr(aggregation, "threshold", 0)
        count = max(3, int(wanted))
        batch = max((float(getattr(layer, "batch", None) or 0) for layer in technique.layers), default=0.0)
        sites = [Site(f"site-{number}", [_patient(number, k) for k in range(max(8, math.ceil(2 * batch)))])
                 for number in range(count)]
    if trainer is None:
        trainer = SiteTrainer(model=_network(), steps=1, lr=1.0, optimiser=plain_descent, batch_size=4,
                              crop=(8, 8, 8), augment=None, precision="fp32", device="cpu")
    return Stage(trainer=trainer, sites=sites, strategy=strategy or FedAvg(weights="uniform"), aggregation=aggregation)


def plain_descent(parameters: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Plain SGD: the update is the step's gradient times −lr."""
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


@dataclass(frozen=True)
class _Scripted:
    """A trainer that goes through all of a round but returns an update that was chosen beforehand."""

    stands_for: Trainer
    script: Script

    def fit(self, kit: Kit, site: Site, state: ServerState, *, site_state: SiteState, seed: int) -> Update:
        return Update(site=site.name, delta=dict(self.script(site.name, state.round)), weight=float(len(site.train)),
                      steps=1, metrics={"loss": 0.5})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stands_for, name)


class _SameNoise(list[Patient]):
    """Patients that count as the same data whatever they are, so that two rehearsals meet the same noise."""

    def content_sha256(self) -> str:
        return "the patients of a rehearsal"


class Charge(NamedTuple):
    """An entry of a ledger."""

    release: Release
    terms: Terms


@dataclass(frozen=True, kw_only=True)
class Step:
    """One layer's protect(), or the aggregation's mask(), at one site.

    Attributes:
        layer: its place in the technique; the aggregation comes after the last.
        round: number of the round.
        site: name of the site.
        given: the tensors it got, copied.
        returned: the object that it returned.
        in_place: names of tensors of its input that it changed.
        foreign: namespaces that it changed though they are not its own, and non-tensors in its own.
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
    """The observations of a rehearsal.

    Attributes:
        round: number of the present round.
        steps: every call of protect() and mask(), in order.
        trained: the update that training gave: round -> site -> tensors.
        equipped: layer -> what its equip() entered into the ledger of the first site in the first round.
        settled: layer -> what its release() entered into the server's ledger in the first round.
        foreign: namespaces changed by equip() though they are not the layer's own, and non-tensors in its own.
        sent: round -> site -> the update that left the site.
        released: round -> layer -> the result of that layer's release(), or of the aggregation's after().
        moved: round -> the update that moved the model.
        states: of the sites.
        broadcast: tensors that the server sends to the sites at the end.
        error: what ended the run early.
    """

    round: int = 0
    steps: list[Step] = field(default_factory=list)
    trained: dict[int, dict[str, Tensors]] = field(default_factory=dict)
    equipped: dict[int, tuple[Charge, ...]] = field(default_factory=dict)
    settled: dict[int, tuple[Charge, ...]] = field(default_factory=dict)
    foreign: list[str] = field(default_factory=list)
    sent: dict[int, dict[str, Update]] = field(default_factory=dict)
    released: dict[int, dict[int, Update]] = field(default_factory=dict)
    moved: dict[int, Update] = field(default_factory=dict)
    states: Mapping[str, SiteState] = field(default_factory=dict)
    broadcast: Tensors = field(default_factory=dict)
    error: Exception | None = None

    def watch(self, place: int, update: Update, state: SiteState, owner: str, hook: Callable[[SiteState], Any]) -> Any:
        """Calls protect() or mask() of a layer and notes what it does."""
        before, given = _Before(state), {name: t.clone() for name, t in update.delta.items()}
        out = hook(state.of(owner))
        self.steps.append(Step(
            layer=place, round=self.round, site=update.site, given=given, returned=out,
            in_place=tuple(n for n, t in given.items() if n in update.delta and not _same(t, update.delta[n])),
            foreign=before.foreign(state, owner), charged=before.charged(state)))
        return out


class _Before:
    """A party's state before a hook."""

    def __init__(self, state: SiteState | ServerState) -> None:
        self._namespaces = {owner: {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in slots.items()}
                            for owner, slots in state.namespaces.items()}
        self._ledger = copy.deepcopy(state.ledger)

    def charged(self, state: SiteState | ServerState) -> tuple[Charge, ...]:
        """The entries that the ledger holds now and did not hold before."""
        old = self._ledger.get("entries", [])
        new = Ledger(state).note()["entries"]
        return tuple(Charge(RELEASES[e["kind"]](**e["release"]), Terms(**e["terms"])) for e in new[len(old):])

    def foreign(self, state: SiteState, owner: str) -> tuple[str, ...]:
        """Owners whose namespace was changed by a hook of another one; and the hook's own, if it holds non-tensors."""
        found = []
        for other in {**self._namespaces, **state.namespaces}:
            now, known = state.namespaces.get(other, {}), self._namespaces.get(other, {})
            if other == owner:
                odd = not all(isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in now.items())
            else:
                odd = now.keys() != known.keys() or not all(_same(t, now[name]) for name, t in known.items())
            if odd:
                found.append(other)
        return tuple(found)


class Watched(Privacy):
    """A technique whose layers are called as `+` calls them, while each is watched.

    Args:
        technique: to be watched.
        seen: the observations are noted there.
        seed: of the noise at the server. The server's own depends on what it is added to, as it should; here two
            inputs must meet the same noise, so that nothing but them makes the difference.
        checked: whether its check() and check_site() are called.
    """

    def __init__(self, technique: Privacy, seen: Rehearsal, *, seed: int, checked: bool = True) -> None:
        self.stands_for, self.seen, self.seed, self.checked = technique, seen, seed, checked
        self.units = technique.units

    @property
    def layers(self) -> tuple[Privacy, ...]:
        return self.stands_for.layers

    def check(self, run: Run) -> None:
        if self.checked:
            self.stands_for.check(run)

    def check_site(self, site: Site, run: Run) -> None:
        if self.checked:
            self.stands_for.check_site(site, run)

    def equip(self, kit: Kit, site: Site, state: SiteState) -> Kit:
        for place, layer in enumerate(self.layers):
            before, owner = _Before(state), f"layer {place}"
            kit = layer.equip(kit, site, state.of(owner))
            self.seen.foreign.extend(before.foreign(state, owner))
            self.seen.equipped.setdefault(place, before.charged(state))
        return kit

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        self.seen.trained.setdefault(self.seen.round, {})[update.site] = dict(update.delta)
        for place, layer in enumerate(self.layers):
            given = update
            out = self.seen.watch(place, given, state, f"layer {place}",
                                  lambda own: layer.protect(given, own, rng))  # noqa: B023
            update = out if place == len(self.layers) - 1 else check_update(out, like=given.delta, site=given.site)
        return update

    def release(self, mean: Update, cohort: Cohort, state: ServerState, rng: torch.Generator) -> Update:
        rng = generator(self.seed, "release", cohort.round)
        for place in reversed(range(len(self.layers))):
            before = _Before(state)
            mean = self.layers[place].release(mean, cohort, state.of(f"layer {place}"), rng)
            self.seen.settled.setdefault(place, before.charged(state))
            self.seen.released.setdefault(cohort.round, {})[place] = mean
        self.seen.broadcast = state.broadcast
        return mean

    def __repr__(self) -> str:
        return repr(self.stands_for)


class _WatchedSum(Aggregation):
    """An aggregation whose mask() and after() are watched, as the layer after the last one."""

    def __init__(self, aggregation: Aggregation, seen: Rehearsal, place: int) -> None:
        self.stands_for, self.seen, self.place = aggregation, seen, place
        self.units = aggregation.units

    def bind(self, run: Run) -> Aggregation:
        return _WatchedSum(self.stands_for.bind(run), self.seen, self.place)

    def mask(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        out: Update = self.seen.watch(self.place, update, state, state.owner,
                                      lambda own: self.stands_for.mask(update, own, rng))
        return out

    def after(self, mean: Update, keys: Any, exchange: Exchange) -> Update:
        out = self.stands_for.after(mean, keys, exchange)
        self.seen.released.setdefault(self.seen.round, {})[self.place] = out
        return out

    @property
    def hides_updates(self) -> bool:  # type: ignore[override]
        return self.stands_for.hides_updates

    def before(self, exchange: Exchange) -> Any:
        return self.stands_for.before(exchange)

    def answer(self, step: str, site: str, inbox: Mapping[str, bytes], state: SiteState) -> Mapping[str, bytes]:
        return self.stands_for.answer(step, site, inbox, state)


class _Recorder(Local):
    """Sites in this process, and a note of what each sends."""

    def __init__(self, seen: Rehearsal) -> None:
        super().__init__()
        self.seen = seen

    def train(self, task: SiteTask, state: ServerState, cohort: Sequence[Site], states: SiteStates) -> Iterator[Answer]:
        self.seen.round = state.round
        self.seen.sent.setdefault(state.round, {})
        for answer in super().train(task, state, cohort, states):
            if isinstance(answer, Update):
                self.seen.sent[state.round][answer.site] = answer
            yield answer


class _Standing:
    """A strategy whose model stays where it is, so that only what sites keep tells one round from the next."""

    def __init__(self, strategy: Strategy, seen: Rehearsal) -> None:
        self.stands_for, self._seen = strategy, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stands_for, name)

    def bind(self, run: Run) -> _Standing:
        return _Standing(self.stands_for.bind(run), self._seen)

    def step(self, state: ServerState, mean: Update) -> ServerState:
        self._seen.moved[state.round] = mean
        return replace(state, round=state.round + 1)


def rehearse(technique: Privacy, stage: Stage, *, script: Script | None = None, rounds: int = 1, seed: int = 0,
             checked: bool = True, catch: bool = False) -> Rehearsal:
    """A run of the technique on the stage, through the real task of a site and the real server.

    Args:
        technique: not changed unless it changes itself.
        stage: see `Stage`.
        script: the updates that training gives; None to train.
        rounds: how many; the model does not move.
        seed: of the run.
        checked: whether the technique's check() and check_site() are called first.
        catch: whether an error is noted in the result instead of raised.
    """
    seen = Rehearsal()
    sites = [replace(site, train=_SameNoise(site.train)) for site in stage.sites]
    states = SiteStates([site.name for site in sites])
    for site in sites:
        states.save(site.name, SiteState(enrolled=True, namespaces={DECOY: {"x": torch.ones(2)}}))
    seen.states = states
    trainer: Any = stage.trainer if script is None else _Scripted(stage.trainer, script)
    standing: Any = _Standing(stage.strategy, seen)
    try:
        for _ in each_round(trainer, sites, strategy=standing, rounds=rounds, seed=seed, engine=_Recorder(seen),
                            privacy=Watched(technique, seen, seed=seed, checked=checked), site_states=states,
                            aggregation=_WatchedSum(stage.aggregation, seen, len(technique.layers))):
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


def _same(one: Any, other: Any) -> bool:
    """Bit-equal, NaN in the same place included."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return one is other
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(
        one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))
