"""The most work that a site does in a round, and the range of a clipping norm that the server broadcasts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedlab.core.errors import PrivacyError
from fedlab.core.settings import check_positive, check_whole
from fedlab.core.types import Tensors, Update
from fedlab.deploy.required import is_number
from fedlab.privacy.dp.clipping import CLIPPING_NORM, AdaptiveClip
from fedlab.strategies.client_drift import Ditto

__all__ = ["Limits", "clips_in"]

_UNITS = {"steps": "optimiser steps per round", "batch": "patients per step", "passes": "passes per round",
          "crops": "crops of a patient per gradient"}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a site does in a round at most. None is no limit.

    Args:
        max_steps: optimiser steps; `Ditto` takes twice the steps of the trainer.
        max_batch: patients per step, on average where they are drawn at random.
        max_crops: random crops of a patient per gradient (`DPSGD(crops=…)`).
        max_passes: passes over the site's patients, on average, and passes of `SVT` or `SparseVector` over the weights.
        broadcast_clip: least and largest clipping norm of an `AdaptiveClip`: its start, and the norm that a server
            broadcasts with the weights of a round. A server that broadcasts a huge norm receives unclipped updates.

    Raises:
        ValueError: a limit that is not positive, or an invalid range.
    """

    max_steps: int | None = None
    max_batch: float | None = None
    max_crops: int | None = None
    max_passes: float | None = None
    broadcast_clip: tuple[float, float] | None = None

    def check_limits(self) -> None:
        """Raises `ValueError` for an invalid limit."""
        check_whole(optional=True, max_steps=self.max_steps, max_crops=self.max_crops)
        check_positive(optional=True, max_batch=self.max_batch, max_passes=self.max_passes)
        clip = self.broadcast_clip
        if clip is not None and not (isinstance(clip, Sequence) and len(clip) == 2 and all(map(is_number, clip))
                                     and 0 < clip[0] <= clip[1] < math.inf):
            raise ValueError(f"broadcast_clip is the least and the largest clipping norm, such as [0.01, 10.0], got "
                             f"{clip!r}")

    def check_work(self, trainer: Any, parts: Sequence[Any], *, patients: int) -> None:
        """Before a run: raises `PrivacyError` if a round of it takes more than this site allows.

        Args:
            trainer: of the run.
            parts: its strategy, the techniques that work at this site, its aggregation.
            patients: that the site trains on.
        """
        for what, limit, planned in self._planned(trainer, parts, max(1, patients)):
            if limit is not None and not (is_number(planned) and planned <= limit):
                raise PrivacyError(f"max_{what}: this site allows at most {limit} {_UNITS[what]}, the plan has "
                                   f"{planned}")
        for part in parts:
            if self.broadcast_clip is not None and isinstance(clip := getattr(part, "clip", None), AdaptiveClip):
                self.check_clip(clip.start)

    def check_clip(self, clip: float) -> None:
        """Raises `PrivacyError` for the clipping norm of a round that is no norm or beyond the range."""
        least, most = self.broadcast_clip or (0.0, math.inf)
        if not (0 < clip < math.inf and least <= clip <= most):
            raise PrivacyError(f"broadcast_clip: this site allows a clipping norm between {least:g} and {most:g}, the "
                               f"server asks for {clip:g}")

    def check_sent(self, update: Update) -> None:
        """Before an update leaves: raises `PrivacyError` if it took more steps than this site allows."""
        if self.max_steps is not None and update.steps > self.max_steps:
            raise PrivacyError(f"max_steps: this site allows at most {self.max_steps} steps per round, this one took "
                               f"{update.steps}")

    def limit_lines(self) -> Iterator[str]:
        """The limits in words."""
        for name in ("max_steps", "max_batch", "max_crops", "max_passes"):
            if (limit := getattr(self, name)) is not None:
                yield f"at most {limit} {_UNITS[name.removeprefix('max_')]} ({name})"
        if self.broadcast_clip is not None:
            yield "a broadcast clipping norm lies between {:g} and {:g}".format(*self.broadcast_clip)

    def _planned(self, trainer: Any, parts: Sequence[Any], patients: int) -> Iterator[tuple[str, float | None, Any]]:
        """What is limited, the limit, and what the plan has."""
        times = 2 if any(isinstance(part, Ditto) for part in parts) else 1
        steps = trainer.steps or math.ceil(trainer.epochs * patients / trainer.batch_size)
        drawn = [*(part.batch for part in parts if getattr(part, "batch", None) is not None),
                 *(part.sample_rate * patients for part in parts if getattr(part, "sample_rate", None) is not None)]
        batch = max(drawn, default=trainer.batch_size)
        passes = steps * batch / patients if drawn or trainer.steps else trainer.epochs
        for part in parts:
            if (crops := getattr(part, "crops", None)) is not None:
                yield "crops", self.max_crops, crops
            if (tries := getattr(part, "passes", None)) is not None:
                yield "passes", self.max_passes, tries
        yield "steps", self.max_steps, times * steps
        yield "batch", self.max_batch, batch
        yield "passes", self.max_passes, times * passes


def clips_in(*groups: Tensors) -> Iterator[float]:
    """The clipping norms among tensors that a server broadcasts or that a technique keeps.

    Raises:
        PrivacyError: one that is no single number.
    """
    for tensor in (group[CLIPPING_NORM] for group in groups if CLIPPING_NORM in group):
        if not isinstance(tensor, torch.Tensor) or tensor.numel() != 1:
            raise PrivacyError(f"the {CLIPPING_NORM} of a round is one number, got a tensor of shape "
                               f"{tuple(tensor.shape)}")
        yield float(tensor)
