"""A small federated run in which a privacy technique is watched: real task, real server, chosen updates."""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, NamedTuple

import torch

from fedlab.checks.small_runs import noise_site, small_trainer
from fedlab.core.gate import check_update
from fedlab.core.global_generators import seeded
from fedlab.core.kit import Kit
from fedlab.core.protocols import Exchange, Run, Strategy
from fedlab.core.types import Answer, Cohort, Patient, ServerState, Site, SiteState, Tensors, Update
from fedlab.privacy.accounting.ledger import Ledger, Terms
from fedlab.privacy.accounting.mechanisms import RELEASES, Release
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy
from fedlab.privacy.noise.streams import noise_generator
from fedlab.privacy.secure_aggregation.secure_sum import SecureAggregation
from fedlab.run.federate import each_round
from fedlab.run.local import Local
from fedlab.run.recipe import recipe_sha256
from fedlab.run.site_states import SiteStates
from fedlab.run.site_task import SiteTask
from fedlab.strategies.averaging import FedAvg
from fedlab.training.trainer import SiteTrainer

__all__ = ["DECOY", "Charge", "Rehearsal", "Script", "Stage", "Step", "Watched", "make_stage", "rehearse"]

#: A namespace that belongs to no part of the rehearsal.
DECOY = "another technique"
#: The update that training gives at a site, from the site's name and the round.
Script = Callable[[str, int], Tensors]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A technique, and the other parts of the runs in which it is watched."""

    technique: Privacy
    trainer: SiteTrainer
    sites: Sequence[Site]  # all with the same number of patients
    strategy: Strategy
    aggregation: Aggregation

    @property
    def like(self) -> Tensors:
        """Tensors with the names and shapes of an update."""
        return self.trainer.initial()

    @property
    def parts(self) -> tuple[Any, ...]:
        """The layers of the technique and the aggregation after them, in the order in which they work at a site."""
        return (*self.technique.layers, self.aggregation)

    def name(self, place: int) -> str:
        """The name of the class of a part."""
        return type(self.parts[place]).__name__

    def alone(self) -> Stage:
        """The stage with its first site only, unless updates are hidden in a sum of several."""
        return self if self.aggregation.hides_updates else replace(self, sites=self.sites[:1])

    def remade(self, settings: Callable[[Any], Mapping[str, Any]]) -> Stage:
        """The stage with parts made anew with other settings, those that `settings` returns for a part."""
        *layers, aggregation = (_remade(part, settings(part)) for part in self.parts)
        return replace(self, technique=functools.reduce(operator.add, layers), aggregation=aggregation)

    def seeded(self) -> Stage:
        """The stage with noise that repeats with the seed, so that the influence of an update shows."""
        return self.remade(lambda part: {"secure_mode": False} if getattr(part, "secure_mode", False) else {})


def _remade(part: Any, settings: Mapping[str, Any]) -> Any:
    if not settings or is_dataclass(part):
        return replace(part, **settings) if settings else part
    other = copy.copy(part)
    vars(other).update(settings)
    return other


def make_stage(technique: Privacy, *, trainer: SiteTrainer | None, sites: Sequence[Site] | None,
               strategy: Strategy | None, aggregation: Aggregation) -> Stage:
    """The given parts, and for the rest a small SegResNet and sites of noise with patients enough for a `batch`."""
    if sites is None:
        least = aggregation.sites or aggregation.threshold if isinstance(aggregation, SecureAggregation) else 1
        batch = max((float(getattr(layer, "batch", None) or 0) for layer in technique.layers), default=0.0)
        sites = [noise_site(number, max(8, math.ceil(2 * batch))) for number in range(max(3, least))]
    return Stage(technique=technique, sites=sites, strategy=strategy or FedAvg(weights="uniform"),
                 trainer=trainer or small_trainer(model=_network(), steps=1, lr=1.0, batch_size=4),
                 aggregation=aggregation)


def _network() -> torch.nn.Module:
    from monai.networks.nets import SegResNet  # seconds to import

    with seeded(0):
        return SegResNet(spatial_dims=3, init_filters=8, in_channels=4, out_channels=3, blocks_down=(1, 1),
                         blocks_up=(1,), act=("RELU", {"inplace": False}))


class Charge(NamedTuple):
    """An entry of a ledger."""

    release: Release
    terms: Terms


@dataclass(frozen=True, kw_only=True)
class Step:
    """One call of a layer's protect(), or of the aggregation's mask(), at one site."""

    layer: int  # its place in the technique; the aggregation comes after the last
    round: int
    site: str
    given: Tensors  # a copy of its input
    returned: object
    in_place: tuple[str, ...]  # names of tensors of its input that it changed
    foreign: tuple[str, ...]  # as in `_Before.foreign`
    charged: tuple[Charge, ...]  # entries that it made in the ledger


@dataclass(kw_only=True)
class Rehearsal:
    """The observations of a rehearsal; numbers of rounds, places of layers and names of sites are keys."""

    round: int = 0  # the present one
    steps: list[Step] = field(default_factory=list)
    trained: dict[int, dict[str, Tensors]] = field(default_factory=dict)  # round -> site -> result of training
    equipped: dict[int, tuple[Charge, ...]] = field(default_factory=dict)  # layer -> entries of its first equip()
    settled: dict[int, tuple[Charge, ...]] = field(default_factory=dict)  # layer -> entries of its first release()
    foreign: list[str] = field(default_factory=list)  # as in `_Before.foreign`, of equip() and release()
    sent: dict[int, dict[str, Update]] = field(default_factory=dict)  # round -> site -> the update that left it
    released: dict[int, dict[int, Update]] = field(default_factory=dict)  # round -> layer -> of release() or after()
    moved: dict[int, Update] = field(default_factory=dict)  # round -> the update that moved the model
    states: Mapping[str, SiteState] = field(default_factory=dict)
    broadcast: Tensors = field(default_factory=dict)
    error: Exception | None = None  # what ended the run early

    def watch(self, layer: int, update: Update, state: SiteState, hook: Callable[[], Any]) -> Any:
        """Calls protect() or mask() of a layer, whose own the state is, and notes what it does."""
        before, given = _Before(state), {name: t.clone() for name, t in update.delta.items()}
        out = hook()
        changed = tuple(n for n, t in given.items() if recipe_sha256(t) != recipe_sha256(update.delta.get(n, t)))
        self.steps.append(Step(layer=layer, round=self.round, site=update.site, given=given, returned=out,
                               in_place=changed, foreign=before.foreign(), charged=before.charged()))
        return out


class _Before:
    """The state of a party before a hook, as the hook is given it, to find out what the hook changes."""

    def __init__(self, state: SiteState | ServerState) -> None:
        self._state = state
        self._namespaces = {owner: recipe_sha256(slots) for owner, slots in state.namespaces.items()}
        self._ledger = copy.deepcopy(state.ledger)

    def charged(self) -> tuple[Charge, ...]:
        """The new entries of the ledger."""
        old = self._ledger.get("entries", [])
        new = Ledger(self._state).note()["entries"]
        return tuple(Charge(RELEASES[e["kind"]](**e["release"]), Terms(**e["terms"])) for e in new[len(old):])

    def foreign(self) -> tuple[str, ...]:
        """Other owners whose namespace the hook has changed; the hook's own, if it holds anything but tensors."""
        now, own = self._state.namespaces, self._state.owner
        changed = [owner for owner in {**self._namespaces, **now} if owner != own
                   and self._namespaces.get(owner, recipe_sha256({})) != recipe_sha256(now.get(owner, {}))]
        valid = all(isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in now.get(own, {}).items())
        return tuple(changed) if valid else (*changed, own)


class Watched(Privacy):
    """A technique whose layers are called as `+` calls them, while each is watched.

    Args:
        technique, seen: what is watched, and where the observations are noted.
        seed: of the noise, which in a run depends on the update or the mean that it is added to; here two inputs meet
            the same noise, so that they alone make the difference.
        checked: whether check() and check_site() are called.
    """

    def __init__(self, technique: Privacy, seen: Rehearsal, *, seed: int, checked: bool = True) -> None:
        self.stands_for, self.seen, self.seed, self.checked = technique, seen, seed, checked
        self.units, self.sends = technique.units, technique.sends

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
            own = state.of(f"layer {place}")
            before = _Before(own)
            kit = layer.equip(kit, site, own)
            self.seen.foreign.extend(before.foreign())
            self.seen.equipped.setdefault(place, before.charged())
        return kit

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        self.seen.trained.setdefault(self.seen.round, {})[update.site] = dict(update.delta)
        rng = noise_generator(self.seed, "protect", update.site, self.seen.round)
        for place, layer in enumerate(self.layers):
            given, own = update, state.of(f"layer {place}")
            out = self.seen.watch(place, given, own, lambda: layer.protect(given, own, rng))  # noqa: B023
            update = out if place == len(self.layers) - 1 else check_update(
                out, like=given.delta, buffers=given.buffers, site=given.site)
        return update

    def release(self, mean: Update, cohort: Cohort, state: ServerState, rng: torch.Generator) -> Update:
        rng = noise_generator(self.seed, "release", cohort.round)
        for place in reversed(range(len(self.layers))):
            own = state.of(f"layer {place}")
            before = _Before(own)
            mean = self.layers[place].release(mean, cohort, own, rng)
            self.seen.foreign.extend(before.foreign())
            self.seen.settled.setdefault(place, before.charged())
            self.seen.released.setdefault(cohort.round, {})[place] = mean
        self.seen.broadcast = state.broadcast
        return mean

    def __repr__(self) -> str:
        return repr(self.stands_for)


class _InPlaceOf:
    """Stands for another part of a run and does the same, except for what is overridden here."""

    def __init__(self, part: Any) -> None:
        self.stands_for = part

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stands_for, name)


class _ScriptedTrainer(_InPlaceOf):
    """Goes through a whole round but returns an update that was chosen beforehand."""

    def __init__(self, trainer: SiteTrainer, script: Script) -> None:
        super().__init__(trainer)
        self.script = script

    def fit(self, kit: Kit, site: Site, state: ServerState, *, site_state: SiteState, seed: int) -> Update:
        return Update(site=site.name, delta=dict(self.script(site.name, state.round)), weight=float(len(site.train)),
                      steps=1, metrics={"loss": 0.5}, buffers=state.buffers)


class _StandingStrategy(_InPlaceOf):
    """Draws every site, and leaves the model where it is: only what sites keep tells one round from the next."""

    def __init__(self, strategy: Strategy, seen: Rehearsal) -> None:
        super().__init__(strategy)
        self.seen = seen

    def bind(self, run: Run) -> _StandingStrategy:
        return _StandingStrategy(self.stands_for.bind(run), self.seen)

    def select(self, sites: Sequence[Site], rng: torch.Generator) -> Sequence[Site]:
        return sites

    def step(self, state: ServerState, mean: Update) -> ServerState:
        self.seen.moved[state.round] = mean
        return replace(state, round=state.round + 1)


class _WatchedAggregation(Aggregation):
    """An aggregation that is watched in mask() and after(), as the layer after the last one."""

    def __init__(self, aggregation: Aggregation, seen: Rehearsal, layer: int, seed: int) -> None:
        self.stands_for, self.seen, self.layer, self.seed = aggregation, seen, layer, seed
        vars(self).update({name: getattr(aggregation, name) for name in ("units", "hides_updates", "before", "answer")})

    def bind(self, run: Run) -> Aggregation:
        return _WatchedAggregation(self.stands_for.bind(run), self.seen, self.layer, self.seed)

    def mask(self, update: Update, state: SiteState, rng: torch.Generator) -> Any:
        rng = noise_generator(self.seed, "mask", update.site, self.seen.round)
        return self.seen.watch(self.layer, update, state, lambda: self.stands_for.mask(update, state, rng))

    def after(self, mean: Update, keys: Any, exchange: Exchange) -> Update:
        out = self.stands_for.after(mean, keys, exchange)
        self.seen.released.setdefault(self.seen.round, {})[self.layer] = out
        return out

    def __repr__(self) -> str:
        return repr(self.stands_for)


class _Recorder(Local):
    """Sites in this process; it notes what each of them sends."""

    def __init__(self, seen: Rehearsal) -> None:
        super().__init__()
        self.seen = seen

    def train(self, task: SiteTask, state: ServerState, cohort: Sequence[Site], states: SiteStates) -> Iterator[Answer]:
        self.seen.round = state.round
        sent = self.seen.sent.setdefault(state.round, {})
        for answer in super().train(task, state, cohort, states):
            if isinstance(answer, Update):
                sent[answer.site] = answer
            yield answer


class _SameNoise(list[Patient]):
    """Patients that count as the same data whatever they are, so that two rehearsals meet the same noise."""

    def content_sha256(self) -> str:
        return "the patients of a rehearsal"


def rehearse(stage: Stage, *, script: Script | None = None, rounds: int = 1, seed: int = 0, checked: bool = True,
             catch: bool = False) -> Rehearsal:
    """A run of the stage's parts, through the real task of a site and the real server; the model does not move.

    Args:
        stage: its parts are not changed unless they change themselves.
        script: the updates that training gives; None to train.
        rounds, seed: of the run.
        checked: whether the technique's check() and check_site() are called first.
        catch: whether an error is noted in the result instead of raised.
    """
    seen = Rehearsal()
    sites = [replace(site, train=_SameNoise(site.train)) for site in stage.sites]
    seen.states = states = SiteStates()
    for site in sites:
        states.save(site.name, SiteState(enrolled=True, namespaces={DECOY: {"x": torch.ones(2)}}))
    trainer: Any = stage.trainer if script is None else _ScriptedTrainer(stage.trainer, script)
    strategy: Any = _StandingStrategy(stage.strategy, seen)
    aggregation = _WatchedAggregation(stage.aggregation, seen, len(stage.technique.layers), seed)
    try:
        for _ in each_round(trainer, sites, strategy=strategy, aggregation=aggregation, rounds=rounds, seed=seed,
                            privacy=Watched(stage.technique, seen, seed=seed, checked=checked), site_states=states,
                            engine=_Recorder(seen)):
            pass
    except Exception as error:
        if not catch:
            raise
        seen.error = error
    return seen
