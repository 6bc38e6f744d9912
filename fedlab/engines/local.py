"""All sites in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from fedlab.task import SiteTask
from fedlab.types import Memory, ServerState, Site, Update

__all__ = ["Engine", "Local"]


class Engine(Protocol):
    """Where sites work. `memory` holds what each site keeps, as far as it lives in this process."""

    memory: dict[str, Memory]

    def run(self, task: SiteTask, state: ServerState, cohort: Sequence[Site]) -> Iterator[Update]:
        """The task's update of each site of the cohort, as they come."""
        ...


class Local:
    """Runs the sites of a cohort in turn in this process; one update is in memory at a time."""

    def __init__(self) -> None:
        self.memory: dict[str, Memory] = {}

    def run(self, task: SiteTask, state: ServerState, cohort: Sequence[Site]) -> Iterator[Update]:
        for site in cohort:
            yield task(site, state, self.memory.setdefault(site.name, {}))

    def __repr__(self) -> str:
        return "Local()"
