"""A small federated run in which a privacy technique is watched: real task, real server, chosen updates."""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import numpy as np
import torch

from fedlab.checks.small_runs import noise_site, small_trainer
from fedlab.checks.watched import (
    LATE,
    CountingTrainer,
    Recorder,
    Rehearsal,
    SameNoise,
    Script,
    ScriptedTrainer,
    StandingStrategy,
    StatesInMemory,
    Watched,
    WatchedAggregation,
)
from fedlab.core.changes import changed_elsewhere
from fedlab.core.global_generators import seeded
from fedlab.core.protocols import Strategy
from fedlab.core.types import Patient, Site, SiteState, Tensors
from fedlab.core.weights import load_weights
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy
from fedlab.privacy.secure_aggregation.secure_sum import SecureAggregation
from fedlab.run.federate import each_round
from fedlab.run.site_states import SiteStates
from fedlab.strategies.averaging import FedAvg
from fedlab.training.trainer import SiteTrainer

__all__ = ["DECOY", "Stage", "make_stage", "marked", "other_patient", "rehearse"]

#: A namespace that belongs to no part of the rehearsal.
DECOY = "another technique"


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

    def unlimited(self) -> Stage:
        """The stage without budgets, so that each rehearsal reaches its last round."""
        return self.remade(lambda part: {"max_epsilon": None} if getattr(part, "max_epsilon", None) else {})


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
                 trainer=trainer or small_trainer(model=_network(per_patient="patient" in technique.units), steps=1,
                                                  lr=1.0, batch_size=4),
                 aggregation=aggregation)


def _network(*, per_patient: bool) -> torch.nn.Module:
    """A small SegResNet; a smaller network where every patient's gradient is computed by itself."""
    from monai.networks.nets import SegResNet  # seconds to import

    with seeded(0):
        if per_patient:
            return torch.nn.Sequential(torch.nn.Conv3d(4, 8, 3, padding=1), torch.nn.GroupNorm(1, 8), torch.nn.ReLU(),
                                       torch.nn.Conv3d(8, 3, 1))
        return SegResNet(spatial_dims=3, init_filters=8, in_channels=4, out_channels=3, blocks_down=(1, 1),
                         blocks_up=(1,), act=("RELU", {"inplace": False}))


def marked(site: Site) -> Site:
    """The site with each patient's scan filled with a number of its own, by which `Rehearsal.count` tells patients."""
    return replace(site, train=[Patient(p.id, torch.full_like(p.image, k + 1.0), p.label, p.affine)
                                for k, p in enumerate(site.train)])


def other_patient(patient: Patient) -> Patient:
    """Another patient under the same id: a bright scan that is all tumour, of other voxels."""
    label = None if patient.label is None else torch.full_like(patient.label, 4)
    return Patient(patient.id, patient.image * 1e4, label, patient.affine @ np.diag([3.0, 3.0, 3.0, 1.0]))


def rehearse(stage: Stage, *, script: Script | None = None, rounds: int = 1, seed: int = 0, checked: bool = True,
             catch: bool = False, quick: bool = False, count: bool = False, absent: Sequence[str] = ()) -> Rehearsal:
    """A run of the stage's parts, through the real task of a site and the real server; the model does not move.

    Args:
        stage: its parts are not changed unless they change themselves.
        script: the updates that training gives; None to train.
        rounds, seed: of the run; the last of several rounds has the number `LATE`.
        checked: whether the technique's check() and check_site() are called first.
        catch: whether an error is noted in the result instead of raised.
        quick: whether the checks of what hooks change are left out.
        count: whether patients are counted instead of trained on; the sites' scans are `marked`.
        absent: names of sites that are not drawn.
    """
    seen = Rehearsal(quick=quick)
    sites = [replace(site, train=SameNoise(site.train)) for site in stage.sites]
    seen.states = states = StatesInMemory() if quick else SiteStates()
    for site in sites:
        states.save(site.name, SiteState(enrolled=True, namespaces={DECOY: {"x": torch.ones(2)}}))
    trainer: Any = stage.trainer if script is None else ScriptedTrainer(stage.trainer, script, seen)
    trainer = CountingTrainer(stage.trainer, seen) if count else trainer
    strategy: Any = StandingStrategy(stage.strategy, seen, absent)
    aggregation = WatchedAggregation(stage.aggregation, seen, len(stage.technique.layers), seed)
    state = None
    try:
        for last in [*([rounds - 2] if rounds > 1 else []), LATE if rounds > 1 else 0]:
            # With the weights of its start, which a run loads anyway, a network that passed is known to have passed.
            # Weights that the user has loaded since stay, and the run refuses them.
            if not changed_elsewhere(stage.trainer.model):
                load_weights(stage.trainer.model, stage.trainer.initial_model())
            for finished in each_round(
                    trainer, sites, strategy=strategy, aggregation=aggregation, rounds=last + 1, seed=seed, state=state,
                    privacy=Watched(stage.technique, seen, seed=seed, checked=checked), site_states=states,
                    engine=Recorder(seen)):
                state, seen.round = finished.state, seen.round + 1
            state = replace(state, round=LATE) if state is not None else None
    except Exception as error:
        if not catch:
            raise
        seen.error = error
    return seen
