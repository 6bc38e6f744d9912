"""What engines around another engine have in common: memory and messages are the inner one's."""

from __future__ import annotations

from collections.abc import Sequence

from fedlab.core.types import Memory, Site
from fedlab.privacy.base import Inboxes
from fedlab.run.local import Engine
from fedlab.run.site_task import SiteTask

__all__ = ["Around"]


class Around:
    """An engine that changes what comes of another one.

    Attributes:
        engine: where the sites work.
    """

    engine: Engine

    @property
    def memory(self) -> dict[str, Memory]:
        """What each site keeps: the inner engine's."""
        return self.engine.memory

    @memory.setter
    def memory(self, kept: dict[str, Memory]) -> None:
        self.engine.memory = kept

    def exchange(self, task: SiteTask, step: str, inboxes: Inboxes, sites: Sequence[Site]) -> Inboxes:
        """Messages between the sites go through."""
        return self.engine.exchange(task, step, inboxes, sites)
