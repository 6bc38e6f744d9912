"""An engine around another engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedlab.core.protocols import Engine
from fedlab.core.types import Failure, Messages, Site

__all__ = ["Wrapped"]


class Wrapped:
    """An engine that changes the answers of another engine; messages between sites pass through.

    Attributes:
        engine: the inner engine.
    """

    engine: Engine

    def exchange(self, task: Any, step: str, inboxes: Messages, sites: Sequence[Site],
                 states: Any) -> tuple[Messages, list[Failure]]:
        """The exchange of the inner engine."""
        return self.engine.exchange(task, step, inboxes, sites, states)
