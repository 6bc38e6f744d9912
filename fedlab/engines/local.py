"""All sites in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from fedlab.errors import PrivacyBudgetExhausted
from fedlab.privacy.base import Inboxes
from fedlab.task import SiteTask
from fedlab.types import Memory, ServerState, Site, Update, Withdrawal

__all__ = ["Engine", "Local"]


class Engine(Protocol):
    """Where sites work. `memory` holds what each site keeps, as far as it lives in this process."""

    memory: dict[str, Memory]

    def run(self, task: SiteTask, state: ServerState, cohort: Sequence[Site]) -> Iterator[Update | Withdrawal]:
        """The task's update of each site of the cohort, as they come, or that the site withdraws."""
        ...

    def exchange(self, task: SiteTask, step: str, inboxes: Inboxes, sites: Sequence[Site]) -> Inboxes:
        """What the sites answer in one exchange of messages, as sender -> recipient -> message."""
        ...


class Local:
    """Runs the sites of a cohort in turn in this process; one update is in memory at a time."""

    def __init__(self) -> None:
        self.memory: dict[str, Memory] = {}

    def run(self, task: SiteTask, state: ServerState, cohort: Sequence[Site]) -> Iterator[Update | Withdrawal]:
        for site in cohort:
            try:
                yield task(site, state, self.memory.setdefault(site.name, {}))
            except PrivacyBudgetExhausted as error:
                yield Withdrawal(site.name, str(error))

    def exchange(self, task: SiteTask, step: str, inboxes: Inboxes, sites: Sequence[Site]) -> Inboxes:
        answers: dict[str, Mapping[str, bytes]] = {}
        for site in sites:
            memory = self.memory.setdefault(site.name, {})
            answers[site.name] = task.privacy.at_site(step, site.name, inboxes.get(site.name, {}), memory)
        return answers

    def __repr__(self) -> str:
        return "Local()"
