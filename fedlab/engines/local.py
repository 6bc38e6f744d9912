"""All sites in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from fedlab.errors import FedlabError, PrivacyBudgetExhausted, PrivacyError
from fedlab.privacy.accounting import Ledger
from fedlab.privacy.base import Inboxes
from fedlab.privacy.ledger_file import LedgerFile
from fedlab.task import SiteTask
from fedlab.types import Failure, Memory, ServerState, Site, Update, Withdrawal

__all__ = ["Answer", "Engine", "Local"]

#: What an engine brings from a site: its update, or that it withdraws, or that it broke down.
Answer = Update | Withdrawal | Failure


class Engine(Protocol):
    """Where sites work. `memory` holds what each site keeps, as far as it lives in this process."""

    memory: dict[str, Memory]

    def run(self, task: SiteTask, state: ServerState, cohort: Sequence[Site]) -> Iterator[Answer]:
        """What comes of the task at each site of the cohort, as it comes."""
        ...

    def exchange(self, task: SiteTask, step: str, inboxes: Inboxes, sites: Sequence[Site]) -> Inboxes:
        """What the sites answer in one exchange of messages, as sender -> recipient -> message."""
        ...


class Local:
    """Runs the sites of a cohort in turn in this process; one update is in memory at a time.

    Args:
        ledgers: a folder in which every site's privacy ledger is kept, saved before the site's update is handed on
            and read before each of its rounds; see `LedgerFile`. Without it ledgers live in memory and checkpoints
            only.
    """

    def __init__(self, *, ledgers: Path | str | None = None) -> None:
        self.ledgers = None if ledgers is None else Path(ledgers)
        self.memory: dict[str, Memory] = {}

    def run(self, task: SiteTask, state: ServerState, cohort: Sequence[Site]) -> Iterator[Answer]:
        for site in cohort:
            memory = self.memory.setdefault(site.name, {})
            try:
                with LedgerFile(self.ledgers, site.name).kept(memory) if self.ledgers else _unkept(site, memory):
                    answer: Answer = task(site, state, memory)
            except PrivacyBudgetExhausted as error:
                answer = Withdrawal(site.name, str(error))
            except FedlabError as error:
                answer = Failure(site.name, error)
            yield answer

    def exchange(self, task: SiteTask, step: str, inboxes: Inboxes, sites: Sequence[Site]) -> Inboxes:
        answers: dict[str, Mapping[str, bytes]] = {}
        for site in sites:
            memory = self.memory.setdefault(site.name, {})
            answers[site.name] = task.privacy.at_site(step, site.name, inboxes.get(site.name, {}), memory)
        return answers

    def __repr__(self) -> str:
        return "Local()" if self.ledgers is None else f"Local(ledgers={str(self.ledgers)!r})"


@contextmanager
def _unkept(site: Site, memory: Memory) -> Iterator[None]:
    """A round of a site whose ledger is in no file, and must not have been in one."""
    if "ledger" in memory and Ledger(memory).note()["in_file"]:
        raise PrivacyError(f"the ledger of {site.name} is kept in a file, which may know more than this copy: say "
                           "Local(ledgers=…) with its folder")
    yield
