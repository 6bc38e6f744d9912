"""Many rehearsals of one stage, of which only numbers are kept: entries of what is seen, and everything else sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedlab.checks.rehearsal import Stage, rehearse
from fedlab.checks.watched import Rehearsal, Script
from fedlab.core.types import Tensors, Update
from fedlab.run.recipe import recipe_sha256

__all__ = ["Outcome", "Samples", "Sketch", "View", "collect", "numbers_beside", "outcome"]

Floats = npt.NDArray[np.float64]
#: What is seen of a rehearsal in one round.
View = Callable[[Rehearsal, int], Tensors]
#: Everything that is sent beside the delta's values, by name.
Outcome = dict[str, float | str]

#: Entries that are kept of an update at most, and of one tensor in any case.
_ENTRIES, _SMALL = 16_000, 400
#: Fields whose values are looked at elsewhere, or which the server gives.
_APART = {"site", "delta"}


@dataclass(frozen=True)
class Sketch:
    """The entries of an update that are kept: all, or of large tensors some at random."""

    places: Mapping[str, npt.NDArray[np.int64]]
    sizes: Mapping[str, int]  # entries of the whole tensors; of a masked one, about as many as are not masked
    masked: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)  # entries that are left out as always 0

    @classmethod
    def of(cls, like: Tensors) -> Sketch:
        sizes = {name: t.numel() for name, t in like.items()}
        share = min(1.0, _ENTRIES / max(1, sum(sizes.values())))
        rng = np.random.default_rng(0)
        places = {}
        for name, size in sizes.items():
            kept = min(size, max(_SMALL, int(share * size)))
            places[name] = np.arange(size) if kept == size else np.sort(rng.choice(size, kept, replace=False))
        return cls(places, sizes)

    def without(self, zero: npt.NDArray[np.bool_]) -> Sketch:
        """Leaves out entries of a row that are always 0, of tensors that have others too."""
        places, sizes, masked = dict(self.places), dict(self.sizes), dict[str, npt.NDArray[np.int64]]()
        for name, group in self.groups.items():
            if zero[group].any() and not zero[group].all():
                places[name], masked[name] = places[name][~zero[group]], places[name][zero[group]]
                sizes[name] = round(sizes[name] * len(places[name]) / len(self.places[name]))
        return Sketch(places, sizes, masked)

    def masked_are_zero(self, tensors: Tensors) -> bool:
        """Whether all masked entries are 0."""
        return not any(bool(tensors[name].reshape(-1)[place].any()) for name, place in self.masked.items())

    @property
    def groups(self) -> dict[str, slice]:
        """The place of each tensor's entries in a row."""
        ends = np.cumsum([len(place) for place in self.places.values()])
        return {name: slice(int(end) - len(self.places[name]), int(end))
                for name, end in zip(self.places, ends, strict=True)}

    def scale(self, name: str) -> float:
        """Entries of a tensor for each that is kept."""
        return self.sizes[name] / max(1, len(self.places[name]))

    def take(self, tensors: Tensors) -> Floats:
        """The kept entries in a row."""
        return np.concatenate([tensors[name].detach().double().reshape(-1).numpy()[place]
                               for name, place in self.places.items()])


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Runs of one script with different random numbers."""

    entries: Sequence[Floats]  # per view: (runs, rounds, entries); NaN after a run ended early
    sums: Floats  # of each tensor of the last view: (runs, rounds, tensors)
    outcomes: Sequence[Sequence[Outcome]]  # per run and round


def collect(stage: Stage, script: Script | None, *, seeds: Sequence[int], rounds: int, views: Sequence[View],
            sketch: Sketch, site: str, at_server: bool, **settings: Any) -> Samples:
    """Rehearses once per seed; the last of the views is what finally leaves."""
    size = sum(len(place) for place in sketch.places.values())
    entries = [np.full((len(seeds), rounds, size), np.nan) for _ in views]
    sums = np.full((len(seeds), rounds, len(sketch.places)), np.nan)
    outcomes = []
    for row, seed in enumerate(seeds):
        seen = rehearse(stage, script=script, rounds=rounds, seed=seed, catch=True, quick=True, **settings)
        outcomes.append([outcome(seen, site, number, at_server=at_server) for number in range(rounds)])
        for number in sorted(seen.moved):
            for view, kept in zip(views, entries, strict=True):
                shown = view(seen, number)
                kept[row, number] = sketch.take(shown)
            if sketch.masked:
                outcomes[-1][number]["whether masked entries are 0"] = float(sketch.masked_are_zero(shown))
            sums[row, number] = [float(shown[name].double().sum()) for name in sketch.places]
    return Samples(entries=entries, sums=sums, outcomes=outcomes)


def outcome(seen: Rehearsal, site: str, number: int, *, at_server: bool) -> Outcome:
    """Everything that one round of a rehearsal sends beside the values of the delta, and whether it sends anything.

    Args:
        seen: of the rehearsal.
        site: whose update is watched.
        number: of the round.
        at_server: whether the server is trusted and what it passes on is watched; of the site's update only what no
            noise at the server covers.
    """
    update = seen.sent.get(number, {}).get(site)
    if update is None or number not in seen.moved:
        return {"whether it is sent": "nothing" if seen.error is None else f"nothing, but {type(seen.error).__name__}"}
    out: dict[str, float | str] = {"whether it is sent": "sent"}
    out |= {name: value for name, value in numbers_beside(update).items()
            if not at_server or name.partition(" ")[0] in ("weight", "steps", "metrics")}
    if at_server:
        out |= {f"the mean's {name}": value for name, value in numbers_beside(seen.moved[number]).items()}
        out |= {f"broadcast of {name}": float(t) if t.numel() == 1 else recipe_sha256(t)
                for name, t in seen.broadcasts.get(number, {}).items()}
    return out


def numbers_beside(update: Update) -> dict[str, float | str]:
    """Every field of an update but the values of its delta, by name; `fields`, so that no future one is left out."""
    out: dict[str, float | str] = {"delta's types": ", ".join(f"{n} {t.dtype}" for n, t in update.delta.items())}
    for name in sorted({part.name for part in fields(update)} - _APART):
        value = getattr(update, name)
        if name == "metrics":
            out |= {f"metrics {key}": float(number) for key, number in value.items()}
        elif isinstance(value, bool | int | float):
            out[name] = float(value)
        elif isinstance(value, Mapping):
            out |= {f"{name} {key}": recipe_sha256(t) if isinstance(t, torch.Tensor) else repr(t)
                    for key, t in value.items()}
        else:
            out[name] = repr(value)
    return out
