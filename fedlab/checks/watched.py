"""The parts of a rehearsal, each standing for one of a real run, and what they note while they work."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedlab.core.gate import check_update
from fedlab.core.kit import Kit
from fedlab.core.protocols import Exchange, Run, Strategy
from fedlab.core.seeds import derive
from fedlab.core.types import Answer, Cohort, Patient, ServerState, Site, SiteState, Tensors, Update
from fedlab.privacy.accounting.ledger import Ledger, Terms
from fedlab.privacy.accounting.mechanisms import RELEASES, Release
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy
from fedlab.privacy.noise.streams import noise_generator
from fedlab.run.local import Local
from fedlab.run.recipe import recipe_sha256
from fedlab.run.site_states import SiteStates
from fedlab.run.site_task import SiteTask
from fedlab.training.trainer import SiteTrainer

__all__ = ["LATE", "Charge", "CountingTrainer", "Recorder", "Rehearsal", "SameNoise", "Script", "ScriptedTrainer",
           "StandingStrategy", "StatesInMemory", "Step", "Watched", "WatchedAggregation"]

#: The number of the last round of a rehearsal of several: a schedule has changed noise and charges by then.
LATE = 100

#: The update that training gives at a site, from the site's name and the round.
Script = Callable[[str, int], Tensors]


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
    given: Tensors  # a copy of its input; empty in a quick rehearsal
    buffers: Tensors  # that came with its input
    returned: object
    in_place: tuple[str, ...]  # names of tensors of its input that it changed
    foreign: tuple[str, ...]  # as in `_Before.foreign`
    charged: tuple[Charge, ...]  # entries that it made in the ledger


@dataclass(kw_only=True)
class Rehearsal:
    """The observations of a rehearsal; rounds, counted from 0, places of layers and names of sites are keys."""

    quick: bool = False  # whether nothing is compared that only a first look needs
    round: int = 0  # how many went before the present one, whose number in the run may be larger
    steps: list[Step] = field(default_factory=list)
    trained: dict[int, dict[str, Tensors]] = field(default_factory=dict)  # round -> site -> result of training
    # (round, layer) -> entries of the first site's equip(), and of release().
    equipped: dict[tuple[int, int], tuple[Charge, ...]] = field(default_factory=dict)
    settled: dict[tuple[int, int], tuple[Charge, ...]] = field(default_factory=dict)
    gradients: dict[tuple[int, str], list[list[torch.Tensor]]] = field(default_factory=dict)  # of each step, noisy
    batches: dict[tuple[int, str], list[set[int]]] = field(default_factory=dict)  # patients of each step, if counted
    foreign: list[str] = field(default_factory=list)  # as in `_Before.foreign`, of equip() and release()
    unseeded: set[int] = field(default_factory=set)  # layers that entered noise as one that no seed repeats
    sent: dict[int, dict[str, Update]] = field(default_factory=dict)  # round -> site -> the update that left it
    released: dict[int, dict[int, Update]] = field(default_factory=dict)  # round -> layer -> of release() or after()
    moved: dict[int, Update] = field(default_factory=dict)  # round -> the update that moved the model
    broadcasts: dict[int, Tensors] = field(default_factory=dict)  # round -> that the server sends after it
    states: Any = field(default_factory=dict)
    error: Exception | None = None  # what ended the run early

    @property
    def broadcast(self) -> Tensors:
        """The last that the server sends."""
        return self.broadcasts[max(self.broadcasts)] if self.broadcasts else {}

    def watch(self, layer: int, update: Update, state: SiteState, hook: Callable[[], Any]) -> Any:
        """Calls protect() or mask() of a layer, whose own the state is, and notes what it does."""
        before = _Before(state, quick=self.quick)
        given = {} if self.quick else {name: t.clone() for name, t in update.delta.items()}
        out = hook()
        self.unseeded |= before.unseeded(layer)
        changed = tuple(n for n, t in given.items() if recipe_sha256(t) != recipe_sha256(update.delta.get(n, t)))
        self.steps.append(Step(layer=layer, round=self.round, site=update.site, given=given, buffers=update.buffers,
                               returned=out, in_place=changed, foreign=before.foreign(), charged=before.charged()))
        return out

    def count(self, site: str, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of a loader; the patients in each are told by the brightness that `marked` gives them."""
        noted = self.batches.setdefault((self.round, site), [])
        for image, target in loader:
            rows = image.reshape(-1, math.prod(image.shape[-4:])) if image.numel() else image.new_zeros(0, 1)
            noted.append({round(float(value)) - 1 for value in rows.amax(dim=1)})
            yield image, target

    def note_gradients(self, optimiser: torch.optim.Optimizer) -> None:
        """Notes the gradients of each step just before it is taken."""
        steps = self.gradients[next(reversed(self.gradients))]
        steps.append([torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
                      for group in optimiser.param_groups for p in group["params"] if p.requires_grad])


class _Before:
    """The state of a party before a hook, as the hook is given it, to find out what the hook changes."""

    def __init__(self, state: SiteState | ServerState, *, quick: bool = False) -> None:
        self._state, self._quick = state, quick
        self._namespaces = {} if quick else {owner: recipe_sha256(slots) for owner, slots in state.namespaces.items()}
        self._entries = len(state.ledger.get("entries", []))

    def charged(self) -> tuple[Charge, ...]:
        """The new entries of the ledger."""
        new = self._state.ledger.get("entries", [])
        new = Ledger(self._state).note()["entries"] if len(new) > self._entries and not self._quick else new
        return tuple(Charge(RELEASES[e["kind"]](**e["release"]), Terms(**e["terms"])) for e in new[self._entries:])

    def unseeded(self, layer: int) -> set[int]:
        """The layer, if one of the new entries is of noise that no seed repeats."""
        return {layer for entry in self._state.ledger.get("entries", [])[self._entries:] if not entry["seeded"]}

    def foreign(self) -> tuple[str, ...]:
        """Other owners whose namespace the hook has changed; the hook's own, if it holds anything but tensors."""
        if self._quick:
            return ()
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
        seen = self.seen
        seen.gradients[seen.round, site.name] = []
        kit.seed = derive(self.seed, "equip", site.name, seen.round)  # in a run it depends on what is remembered, too
        kit.optimiser.register_step_pre_hook(lambda optimiser, args, kwargs: seen.note_gradients(optimiser))
        for place, layer in enumerate(self.layers):
            own = state.of(f"layer {place}")
            before = _Before(own, quick=seen.quick)
            kit = layer.equip(kit, site, own)
            seen.foreign.extend(before.foreign())
            seen.unseeded |= before.unseeded(place)
            seen.equipped.setdefault((seen.round, place), before.charged())
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
            before = _Before(own, quick=self.seen.quick)
            mean = self.layers[place].release(mean, cohort, own, rng)
            self.seen.foreign.extend(before.foreign())
            self.seen.unseeded |= before.unseeded(place)
            self.seen.settled[self.seen.round, place] = before.charged()
            self.seen.released.setdefault(self.seen.round, {})[place] = mean
        self.seen.broadcasts[self.seen.round] = dict(state.broadcast)
        return mean

    def __repr__(self) -> str:
        return repr(self.stands_for)


class _InPlaceOf:
    """Stands for another part of a run and does the same, except for what is overridden here."""

    def __init__(self, part: Any) -> None:
        self.stands_for = part

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stands_for, name)


class ScriptedTrainer(_InPlaceOf):
    """Goes through a whole round but returns an update that was chosen beforehand, by the rounds that were `seen`."""

    def __init__(self, trainer: SiteTrainer, script: Script, seen: Rehearsal | None = None) -> None:
        super().__init__(trainer)
        self.script, self.seen = script, seen

    def fit(self, kit: Kit, site: Site, state: ServerState, *, site_state: SiteState, seed: int) -> Update:
        delta = dict(self.script(site.name, state.round if self.seen is None else self.seen.round))
        norm = Update(site=site.name, delta=delta, weight=1.0).norm()
        return Update(site=site.name, delta=delta, weight=float(len(site.train)), steps=1, buffers=state.buffers,
                      metrics={"loss": 1 / (1 + norm) if math.isfinite(norm) else 0.5})


class CountingTrainer(_InPlaceOf):
    """Takes no step: it only goes through the batches that it is given, and notes whose they are."""

    def __init__(self, trainer: SiteTrainer, seen: Rehearsal) -> None:
        super().__init__(trainer)
        self.seen = seen

    def fit(self, kit: Kit, site: Site, state: ServerState, *, site_state: SiteState, seed: int) -> Update:
        steps = sum(1 for _ in self.seen.count(site.name, kit.loader))
        return Update(site=site.name, delta={name: torch.zeros_like(p) for name, p in state.params.items()},
                      weight=float(len(site.train)), steps=steps, buffers=state.buffers)


class StandingStrategy(_InPlaceOf):
    """Draws every site but those that are `absent`, and leaves the model where it is: only what sites keep tells one
    round from the next.
    """

    def __init__(self, strategy: Strategy, seen: Rehearsal, absent: Sequence[str] = ()) -> None:
        super().__init__(strategy)
        self.seen, self.absent = seen, absent

    def bind(self, run: Run) -> StandingStrategy:
        return StandingStrategy(self.stands_for.bind(run), self.seen, self.absent)

    def select(self, sites: Sequence[Site], rng: torch.Generator) -> Sequence[Site]:
        return [site for site in sites if site.name not in self.absent]

    def step(self, state: ServerState, mean: Update) -> ServerState:
        self.seen.moved[self.seen.round] = mean
        return replace(state, round=state.round + 1)


class WatchedAggregation(Aggregation):
    """An aggregation that is watched in mask() and after(), as the layer after the last one."""

    def __init__(self, aggregation: Aggregation, seen: Rehearsal, layer: int, seed: int) -> None:
        self.stands_for, self.seen, self.layer, self.seed = aggregation, seen, layer, seed
        vars(self).update({name: getattr(aggregation, name) for name in ("units", "hides_updates", "before", "answer")})

    def bind(self, run: Run) -> Aggregation:
        return WatchedAggregation(self.stands_for.bind(run), self.seen, self.layer, self.seed)

    def mask(self, update: Update, state: SiteState, rng: torch.Generator) -> Any:
        rng = noise_generator(self.seed, "mask", update.site, self.seen.round)
        return self.seen.watch(self.layer, update, state, lambda: self.stands_for.mask(update, state, rng))

    def after(self, mean: Update, keys: Any, exchange: Exchange) -> Update:
        out = self.stands_for.after(mean, keys, exchange)
        self.seen.released.setdefault(self.seen.round, {})[self.layer] = out
        return out

    def __repr__(self) -> str:
        return repr(self.stands_for)


class Recorder(Local):
    """Sites in this process; it notes what each of them sends."""

    def __init__(self, seen: Rehearsal) -> None:
        super().__init__()
        self.seen = seen

    def train(self, task: SiteTask, state: ServerState, cohort: Sequence[Site], states: SiteStates) -> Iterator[Answer]:
        sent = self.seen.sent.setdefault(self.seen.round, {})
        if self.seen.quick:  # the recipe of its parts is not asked for in every run
            task = replace(task, identity=dict.fromkeys(("trainer", "strategy", "privacy", "aggregation"), "rehearsal"))
        for answer in super().train(task, state, cohort, states):
            if isinstance(answer, Update):
                sent[answer.site] = answer
            yield answer


class StatesInMemory(SiteStates):
    """States of sites without files."""

    def __init__(self) -> None:
        self.folder, self._enrolled, self._saved, self._secrets = Path(tempfile.gettempdir()), {}, {}, {}
        self._states: dict[str, SiteState] = {}

    def __getitem__(self, site: str) -> SiteState:
        state = self._states[site].copy()
        state.secrets = {}
        for slots in (*state.namespaces.values(), state.diagnostics, state.broadcast):
            slots.update({name: t.clone() for name, t in slots.items()})
        return state

    def save(self, site: str, state: SiteState) -> None:
        self._states[site] = state
        self._enrolled.setdefault(site)


class SameNoise(list[Patient]):
    """Patients that count as the same data whatever they are, so that two rehearsals meet the same noise."""

    def content_sha256(self) -> str:
        return "the patients of a rehearsal"
