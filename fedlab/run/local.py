"""All sites in this process, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedlab.core.errors import FedlabError, PrivacyBudgetExhausted, PrivacyError, SiteError
from fedlab.core.types import Answer, Failure, Messages, ServerState, Site, Update, Withdrawal
from fedlab.privacy.accounting.ledger import HasLedger, Ledger
from fedlab.privacy.accounting.ledger_file import LedgerFile
from fedlab.run.failed_site import FailedSite
from fedlab.run.site_states import SiteStates
from fedlab.run.site_task import SiteTask, SiteWork

__all__ = ["Local", "answer_of", "exchange_here", "with_ledger"]


def exchange_here(task: SiteTask, step: str, inboxes: Messages, sites: Sequence[Site],
                  states: SiteStates) -> tuple[Messages, list[Failure]]:
    """One exchange between sites whose keys are in this process: the messages of each site, and the failed sites."""
    answers: dict[str, Mapping[str, bytes]] = {}
    failures: list[Failure] = []
    for site in sites:
        try:
            answers[site.name] = task.aggregation.answer(step, site.name, inboxes.get(site.name, {}),
                                                         states.with_secrets(site.name))
        except FedlabError as error:
            failures.append(Failure(site.name, error))
        except Exception as error:
            # The server adds the round.
            failures.append(Failure(site.name, SiteError(site.name, 0, "exchange", f"{type(error).__name__}: {error}")))
            failures[-1].error.__cause__ = error
    return answers, failures


class Local:
    """Runs the sites of a cohort in turn in this process; one update is in memory at a time.

    Args:
        ledgers: a folder in which the privacy ledger of every site, and of the server where it adds noise, outlives
            the run: read before each of their rounds and saved before the result is handed on; see `LedgerFile`.
            Without it ledgers end with the run and its checkpoint.
        debug: keep the live objects of a failed site in `failed`, by its name, until it fails again: model, state,
            batch, exception and more, see `FailedSite`.

    Example:
        >>> fl.Local(ledgers="ledgers")  # privacy spent outlives this session
        Local(ledgers='ledgers')
    """

    def __init__(self, *, ledgers: Path | str | None = None, debug: bool = False) -> None:
        self.ledgers = None if ledgers is None else Path(ledgers)
        self.debug = debug
        self.failed: dict[str, FailedSite] = {}

    def train(self, task: SiteTask, state: ServerState, cohort: Sequence[Site], states: SiteStates) -> Iterator[Answer]:
        """The answer of each site, in the order of the cohort."""
        for site in cohort:
            answer = answer_of(site.name, lambda site=site: self._work(task, state, site, states))  # type: ignore[misc]
            if self.debug and isinstance(answer, Failure) and answer.error.work is not None:
                self.failed[site.name] = FailedSite.of(answer.error)
            yield answer

    def _work(self, task: SiteTask, state: ServerState, site: Site, states: SiteStates) -> Update:
        with states.working(site.name) as site_state:
            try:
                with with_ledger(self.ledgers, site.name, site_state, engine="Local"):
                    return task(site, state, site_state)
            except FedlabError as error:
                if error.work is None:  # it failed at its ledger's file
                    error.work = SiteWork(site, state, site_state, task.trainer, task.guarded)
                raise

    exchange = staticmethod(exchange_here)

    def __repr__(self) -> str:
        settings = [] if self.ledgers is None else [f"ledgers={str(self.ledgers)!r}"]
        return f"Local({', '.join(settings + (['debug=True'] if self.debug else []))})"


def answer_of(site: str, work: Callable[[], Update]) -> Answer:
    """The update that a site's work returns, or what it raises as the server sees it."""
    try:
        return work()
    except PrivacyBudgetExhausted as error:
        return Withdrawal(site, str(error))
    except FedlabError as error:
        return Failure(site, error)


@contextmanager
def with_ledger(ledgers: Path | None, site: str, state: HasLedger, *, engine: str) -> Iterator[None]:
    """Around a site's work in a round: its ledger is read from its file before, and saved after the work succeeded.

    `ledgers` is the folder of these files; None if the ledger is in `state` only and was never in a file.

    Raises:
        PrivacyError: see `LedgerFile.kept`; or the ledger is in a file that the engine does not name.
    """
    if ledgers is not None:
        with LedgerFile(ledgers, site).kept(state):
            yield
        return
    if state.ledger and Ledger(state).note()["in_file"]:
        raise PrivacyError(f"the ledger of {site} is kept in a file, which may hold more than this copy: say "
                           f"{engine}(ledgers=…) with its folder")
    yield
