"""All sites in this process, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

from fedlab.core.errors import FedlabError, PrivacyBudgetExhausted, PrivacyError
from fedlab.core.types import Failure, Memory, Round, ServerState, Site, Update, Withdrawal
from fedlab.privacy.accounting.ledger import Ledger
from fedlab.privacy.accounting.ledger_file import LedgerFile
from fedlab.privacy.base import Inboxes, PartialExchange
from fedlab.run.admission import Admission
from fedlab.run.failed_site import FailedSite
from fedlab.run.site_task import SiteTask
from fedlab.topologies.workflows import Topology

__all__ = ["Answer", "Elsewhere", "Engine", "Local", "answer_of", "exchange_here", "kept"]

#: What an engine brings from a site: its update, or that it withdraws, or that it broke down.
Answer = Update | Withdrawal | Failure


class Engine(Protocol):
    """Where sites work. `memory` holds what each site keeps, as far as it lives in this process."""

    memory: dict[str, Memory]

    def run(self, task: SiteTask, state: ServerState, cohort: Sequence[Site]) -> Iterator[Answer]:
        """What comes of the task at each site of the cohort, as it comes."""
        ...

    def exchange(self, task: SiteTask, step: str, inboxes: Inboxes, sites: Sequence[Site]) -> Inboxes:
        """What the sites answer in one exchange of messages, as sender -> recipient -> message.

        Raises:
            PartialExchange: some of them failed.
        """
        ...


@runtime_checkable
class Elsewhere(Protocol):
    """An engine that runs the loop itself somewhere else, such as at a server, and brings its rounds back."""

    memory: dict[str, Memory]

    def placed(self, sites: Sequence[Site | str]) -> list[Site]:
        """The sites, with a stand-in for each that is only named."""
        ...

    def rounds(self, task: SiteTask, sites: Sequence[Site], *, rounds: int, topology: Topology,
               admission: Admission | None, state: ServerState | None) -> Iterator[Round]:
        """The rounds as they are finished, from the state on, or from the beginning."""
        ...


class Local:
    """Runs the sites of a cohort in turn in this process; one update is in memory at a time.

    Args:
        ledgers: a folder in which every site's privacy ledger is kept, saved before the site's update is handed on
            and read before each of its rounds; see `LedgerFile`. Without it ledgers live in memory and checkpoints
            only.
        debug: keep what a site that fails was working with in `failed`, by the name of the site: the model, its
            memory, the patients' batch, the exception and more, see `FailedSite`.
    """

    def __init__(self, *, ledgers: Path | str | None = None, debug: bool = False) -> None:
        self.ledgers = None if ledgers is None else Path(ledgers)
        self.debug = debug
        self.memory: dict[str, Memory] = {}
        self.failed: dict[str, FailedSite] = {}

    def run(self, task: SiteTask, state: ServerState, cohort: Sequence[Site]) -> Iterator[Answer]:
        for site in cohort:
            yield self._answer(task, state, site)

    def _answer(self, task: SiteTask, state: ServerState, site: Site) -> Answer:
        memory = self.memory.setdefault(site.name, {})

        def work() -> Update:
            with kept(self.ledgers, site.name, memory, engine="Local"):
                return task(site, state, memory)

        answer = answer_of(site.name, work)
        if self.debug and isinstance(answer, Failure):
            self.failed[site.name] = FailedSite.of(answer.error, task=task, site=site, state=state, memory=memory)
        return answer

    def exchange(self, task: SiteTask, step: str, inboxes: Inboxes, sites: Sequence[Site]) -> Inboxes:
        return exchange_here(task, step, inboxes, sites, self.memory)

    def __repr__(self) -> str:
        settings = [] if self.ledgers is None else [f"ledgers={str(self.ledgers)!r}"]
        return f"Local({', '.join(settings + (['debug=True'] if self.debug else []))})"


def answer_of(site: str, work: Callable[[], Update]) -> Answer:
    """What comes of a site's work: the update that it returns, or what it raises as what the server is told."""
    try:
        return work()
    except PrivacyBudgetExhausted as error:
        return Withdrawal(site, str(error))
    except FedlabError as error:
        return Failure(site, error)


def exchange_here(task: SiteTask, step: str, inboxes: Inboxes, sites: Sequence[Site],
                  memories: dict[str, Memory]) -> Inboxes:
    """An exchange of messages between sites whose memories lie in this process.

    Raises:
        PartialExchange: some of them failed.
    """
    answers: dict[str, Mapping[str, bytes]] = {}
    failures: list[Failure] = []
    for site in sites:
        memory = memories.setdefault(site.name, {})
        try:
            answers[site.name] = task.privacy.at_site(step, site.name, inboxes.get(site.name, {}), memory)
        except FedlabError as error:
            failures.append(Failure(site.name, error))
    if failures:
        raise PartialExchange(answers, failures)
    return answers


def kept(ledgers: Path | None, site: str, memory: Memory, *, engine: str) -> AbstractContextManager[None]:
    """Around a site's work in a round: its ledger is read from its file before, and saved after it succeeded.

    Args:
        ledgers: the folder of the ledgers, or None: the ledger lives in `memory` only, and must not have been in a
            file.
        site: name of the site.
        memory: the site's own.
        engine: name of the engine that asks, for its message.

    Raises:
        PrivacyError: see `LedgerFile.kept`; or the ledger is in a file of which nothing is said here.
    """
    return _unkept(site, memory, engine) if ledgers is None else LedgerFile(ledgers, site).kept(memory)


@contextmanager
def _unkept(site: str, memory: Memory, engine: str) -> Iterator[None]:
    """A round of a site whose ledger is in no file, and must not have been in one."""
    if "ledger" in memory and Ledger(memory).note()["in_file"]:
        raise PrivacyError(f"the ledger of {site} is kept in a file, which may know more than this copy: say "
                           f"{engine}(ledgers=…) with its folder")
    yield
