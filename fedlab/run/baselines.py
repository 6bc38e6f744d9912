"""Baselines of federated learning: all data in one place, and each site alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedlab.core.types import Site
from fedlab.core.weights import load_weights
from fedlab.run.federate import federate
from fedlab.run.history import History
from fedlab.training.trainer import SiteTrainer

__all__ = ["centralised", "local_only", "pooled"]


def pooled(sites: Sequence[Site]) -> Site:
    """One site that holds every site's patients: a central data lake."""
    return Site(name="pooled", train=[p for s in sites for p in s.train], val=[p for s in sites for p in s.val],
                same=tuple(person for s in sites for person in s.same),
                remarks=tuple(dict.fromkeys(remark for s in sites for remark in s.remarks)))


def centralised(trainer: SiteTrainer, sites: Sequence[Site], **settings: Any) -> History:
    """Trains on all data pooled, with as many gradient steps as all sites together take in a federated run.

    The trainer is that of the federated run; other settings, such as rounds, seed and checkpoint, go to `federate`.
    """
    load_weights(trainer.model, trainer.initial_model())
    if trainer.steps is not None:
        trainer = replace(trainer, steps=trainer.steps * len(sites))
    return federate(trainer, [pooled(sites)], **settings)


def local_only(trainer: SiteTrainer, sites: Sequence[Site], **settings: Any) -> dict[str, History]:
    """Trains each site alone, from the same start and with the same steps as in a federated run; see `centralised`."""
    return {site.name: federate(trainer, [site], **settings) for site in sites}
