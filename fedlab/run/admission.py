"""Rules for the updates that a server admits to the global model, and for sites that fail."""

from __future__ import annotations

from dataclasses import dataclass

from fedlab.core.settings import check_positive, check_whole
from fedlab.core.types import Update

__all__ = ["Admission"]


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Rules by which a run continues without the sites that fail.

    Without rules the first failure ends a run, which suits development. With rules a site that fails, is late or sends
    an invalid update is left out of its round, and `Round.absent` says why. In any case an update must have the model's
    names and shapes, be finite and answer the present round. A round without a usable mean, such as one with fewer
    sites than secure aggregation needs, or with one that lies to it, is void: the model stays as it was, what was spent
    counts, `Round.void` says why, and the next round begins.

    Args:
        min_sites: a round with fewer admitted updates is void.
        max_void: void rounds in succession after which a run ends early, with the reason in `History.stopped`.
        deadline: seconds within which a site must answer, by its own clock.
        max_norm: largest Euclidean norm of an update. It cannot be checked under secure aggregation.
        max_weight: largest weight of an update, such as the number of patients of the largest hospital: an update
            counts by the weight that its sender claims.
        max_steps: largest number of optimiser steps; `FedNova` and `FedAvg(weights="steps")` count by them.

    Raises:
        ValueError: a setting out of its range.
    """

    min_sites: int = 1
    max_void: int = 10
    deadline: float | None = None
    max_norm: float | None = None
    max_weight: float | None = None
    max_steps: float | None = None

    def __post_init__(self) -> None:
        check_whole(min_sites=self.min_sites, max_void=self.max_void)
        check_positive(optional=True, deadline=self.deadline, max_norm=self.max_norm, max_weight=self.max_weight,
                       max_steps=self.max_steps)

    def refuse(self, update: Update) -> str | None:
        """Why an update is refused, or None if it is admitted."""
        if self.deadline is not None and update.seconds > self.deadline:
            return f"late: it took {update.seconds:.3g} s, the deadline is {self.deadline:g} s"
        if self.max_weight is not None and update.weight > self.max_weight:
            return f"its weight is {update.weight:g}, the rules allow {self.max_weight:g}"
        if self.max_steps is not None and update.steps > self.max_steps:
            return f"it took {update.steps} steps, the rules allow {self.max_steps:g}"
        if self.max_norm is not None and (norm := update.norm()) > self.max_norm:
            return f"its norm is {norm:.3g}, the rules allow {self.max_norm:g}"
        return None
