"""How the server forms the sum of a cohort's updates: in the open, unless it is secure aggregation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from fedlab.core.errors import PrivacyError
from fedlab.core.protocols import Exchange, Run
from fedlab.core.types import ServerState, SiteState, Spent, Update
from fedlab.core.weights import weights_sha256

__all__ = ["Aggregation", "SumFailed", "shown_sha256"]


class SumFailed(PrivacyError):
    """The sum of a round cannot be formed: too few sites are left, or one of them lies. No single update is uncovered.

    The round is void; see `fedlab.run.admission.Admission`.
    """


def shown_sha256(state: ServerState) -> str:
    """SHA-256 of everything in the server's state that the sites of a round are shown."""
    groups = {"params": state.params, "buffers": state.buffers, "broadcast": state.broadcast, **state.moments}
    tensors = {f"{group}|{name}": t for group, slots in groups.items() for name, t in slots.items()}
    return hashlib.sha256(f"{state.round}|{weights_sha256(tensors)}".encode()).hexdigest()


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

    def least_spent(self, update: Update) -> Spent | None:
        """As in `Privacy`."""
        return None

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
