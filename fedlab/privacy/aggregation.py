"""How the server forms the sum of a cohort's updates: in the open, unless it is secure aggregation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from fedlab.core.errors import PrivacyError
from fedlab.core.protocols import Exchange, Run
from fedlab.core.types import SiteState, Update

__all__ = ["Aggregation"]


class Aggregation:
    """Sums in the open: the server sees every update. The hooks do nothing; override them for secure sums.

    Attributes:
        units: what the noise protects that is added before an update is hidden; the sites' ledgers are charged for it.
        hides_updates: whether the server sees the sum of the updates only.
        steps: names of the exchanges of messages between the sites.
    """

    units: frozenset[str] = frozenset()
    hides_updates: ClassVar[bool] = False
    steps: ClassVar[tuple[str, ...]] = ()

    def bind(self, run: Run) -> Aggregation:
        """The aggregation with what it reads from the run, such as the number of sites.

        Raises:
            ValueError: it cannot work with the rest of the run.
        """
        return self

    def before(self, exchange: Exchange) -> Any:
        """At the server, before training: agree with the sites on the keys of this round."""
        return None

    def mask(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        """At a site, after all techniques: hide the update."""
        return update

    def answer(self, step: str, site: str, inbox: Mapping[str, bytes], state: SiteState) -> Mapping[str, bytes]:
        """At a site: its messages, by recipient, in answer to an inbox of messages, by sender.

        Raises:
            PrivacyError: there is no such step.
        """
        raise PrivacyError(f"{self!r} exchanges no messages; step {step[:40]!r} is unknown")

    def after(self, mean: Update, keys: Any, exchange: Exchange) -> Update:
        """At the server, when all updates are in: the mean of the updates from the mean of the hidden ones."""
        return mean

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
