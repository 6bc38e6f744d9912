"""Admission: a filter over the answers of one round, which refuses updates, counts them and notes who is absent."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from time import perf_counter

import torch

from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError, RunError, SiteError
from fedlab.core.gate import check_update
from fedlab.core.protocols import Run
from fedlab.core.types import Answer, Cohort, Failure, Messages, Round, ServerState, Site, Spent, Update, Withdrawal
from fedlab.privacy.accounting.ledger import check_statement
from fedlab.privacy.aggregation import SumFailed, shown_sha256
from fedlab.privacy.base import layers_at
from fedlab.run.publishable import server_only
from fedlab.run.site_errors import reason_of
from fedlab.strategies.averaging import NotFinite, TooFewUpdates

__all__ = ["Arrivals", "Void"]

#: Reasons for which a round leaves the model as it is, if the admission rules allow that.
Void = (TooFewUpdates, NotFinite, SumFailed)


class Arrivals:
    """What the server receives in one round, of a cohort that was drawn. It trusts no engine and no site.

    Attributes:
        cohort: the sites that still take part.
        present: names of the sites whose update was admitted, in order.
        withdrawn: the sites that have withdrawn in this round, and the reasons.
        released: whether the techniques' part at the server has been done.
    """

    def __init__(self, run: Run, state: ServerState, cohort: Sequence[Site]) -> None:
        self.run, self.state, self.cohort = run, state, tuple(cohort)
        self._started = perf_counter()
        self._copies = Counter(sender for sender, _ in run.topology.messages([site.name for site in cohort]))
        self._drawn = {site.name for site in cohort}
        self._asked: list[str] = []
        self._seen: dict[str, dict[str, float]] = {}
        self._spent: dict[str, tuple[Spent, ...]] = {}
        self._absent: dict[str, str] = {}
        self._void: str | None = None
        self.withdrawn: dict[str, str] = {}
        self.released = False

    @property
    def present(self) -> tuple[str, ...]:
        return tuple(self._seen)

    @property
    def took_part(self) -> Cohort:
        """The sites whose updates are in the mean, as techniques at the server see them."""
        return Cohort(self.state.round, self.present, len(self.run.sites), self.run.strategy.sample)

    def train(self, state: ServerState, sites: Sequence[Site]) -> Iterator[Update]:
        """Local training at some sites from a given state; the updates that may enter the model, one by one."""
        return self.admit(self.run.engine.train(self.run.task, state, sites, self.run.site_states), state, sites)

    def admit(self, answers: Iterable[Answer], state: ServerState, sites: Sequence[Site]) -> Iterator[Update]:
        """The updates among the answers of these sites that may enter the model.

        Args:
            answers: of an engine; one is in memory at a time.
            state: that the sites were shown.
            sites: that were asked.

        Raises:
            PrivacyBudgetExhausted: every site of the cohort has withdrawn.
            FedlabError: a site failed and the run has no admission rules.
        """
        waiting = {site.name for site in sites}
        self._asked += [site.name for site in sites]
        silent = "it sent nothing"
        try:
            for answer in answers:
                sender = getattr(answer, "site", None)
                if not isinstance(answer, Answer) or not isinstance(sender, str) or sender not in waiting:
                    stray = f"an update of {sender!r}" if isinstance(sender, str) else "an object that is no update"
                    if self.run.admission is None:
                        raise ValueError(f"received {stray}; still expected: {sorted(waiting)}")
                    silent = f"it sent nothing under its name; {stray[:120]} was received and left out"
                    continue
                waiting.remove(sender)
                if (reason := self._refuse(answer, state)) is not None:
                    self._absent[sender] = reason
                elif isinstance(answer, Update):
                    self._note(answer)
                    yield answer
        finally:
            if isinstance(answers, Generator):  # sites that are still at work end with a round that breaks off
                answers.close()
        self._absent |= dict.fromkeys(waiting, silent)
        if self.withdrawn and self.withdrawn.keys() >= self._drawn:
            raise PrivacyBudgetExhausted("no site is left: " + "; ".join(self._absent.values()))

    def charge(self, spent: tuple[Spent, ...]) -> None:
        """Notes that the mean was released, and the privacy spent by noise at the server."""
        self.released = True
        if spent:
            self._spent["server"] = spent

    @property
    def names(self) -> Sequence[str]:
        """The sites that still take part in an exchange of messages: all before training, then those present."""
        return self.present if self._asked else tuple(site.name for site in self.cohort)

    @property
    def shown(self) -> str:
        return shown_sha256(self.state)

    def send(self, step: str, inboxes: Messages) -> Messages:
        """One exchange of messages between the sites that still take part; a site that fails is left out."""
        names = set(self.names)
        asked = [site for site in self.cohort if site.name in names]
        sent: Messages
        failures: list[Failure]
        sent, failures = self.run.engine.exchange(self.run.task, step, inboxes, asked, self.run.site_states)
        failures = [Failure(name, error.in_round(self.state.round) if isinstance(error, SiteError) else error)
                    for name, error in failures]
        for failure in failures:
            if self.run.admission is None:
                raise failure.error
            reason = self._refuse(failure, self.state) or "it failed"
            if self._asked:  # its update is in the model
                warnings.warn(f"{failure.site} sent its update but left the exchange of messages after it: {reason}",
                              stacklevel=2)
            else:
                self._absent[failure.site] = reason
        gone = {failure.site for failure in failures}
        self.cohort = tuple(site for site in self.cohort if site.name not in gone)
        return sent

    def void(self, error: Exception) -> ServerState:
        """The state after a round that cannot move the model, if the admission rules allow such a round."""
        if self.run.admission is None and (self._seen or not isinstance(error, TooFewUpdates)):
            raise error
        self._void = str(error)
        names = self._seen if self._asked else [site.name for site in self.cohort]
        self._absent |= {name: f"the round was void: {error}" for name in names}
        self._seen.clear()
        return replace(self.state, round=self.state.round + 1)

    def close(self, moved: ServerState) -> Round:
        """The finished round.

        Raises:
            RunError: the model would hold NaN or infinite values and the run has no admission rules.
        """
        admission = self.run.admission
        if admission is not None and 0 < len(self._seen) < admission.min_sites:
            moved = self.void(TooFewUpdates(f"{len(self._seen)} updates were received, the round needs "
                                            f"{admission.min_sites}"))
        if not _finite(moved):
            # Every update was finite, but their sum, or a square of the server's optimiser, is not.
            if admission is None:
                raise RunError(f"after round {self.state.round} the model would hold NaN or infinite values; check "
                               "the norms of its updates, and bound them with admission=Admission(max_norm=...)")
            moved = self.void(NotFinite("the model would hold NaN or infinite values"))
        drawn = [name for name in self._drawn if name in self._absent and name not in self._asked]
        return Round(number=self.state.round, state=moved, cohort=(*sorted(drawn), *self._asked), sites=self._seen,
                     spent=self._spent, metrics=dict(self.run.topology.metrics(moved)), absent=self._absent,
                     seconds=perf_counter() - self._started, site_states=self.run.site_states, void=self._void,
                     server_only=server_only(self.run, self._spent, void=self._void is not None))

    def _refuse(self, answer: Answer, state: ServerState) -> str | None:
        """Why an answer has no place in the model, or None."""
        if isinstance(answer, Withdrawal):
            self.withdrawn[answer.site] = answer.reason
            return answer.reason
        try:
            if isinstance(answer, Failure):
                raise answer.error
            shown = state.at(answer.site)
            check_update(answer, like=shown.params, buffers=shown.buffers, site=answer.site)
            if answer.round != self.state.round:
                raise PrivacyError(f"the update of {answer.site} answers round {answer.round}, not "
                                   f"{self.state.round}")
            check_statement(answer, [*layers_at(self.run.privacy.layers, answer.site), self.run.aggregation])
            self._spent[answer.site] = answer.spent  # it has left its site, whether it is admitted or not
        except Exception as error:
            if self.run.admission is None:
                raise
            return reason_of(error, guarded=self.run.guarded) if isinstance(answer, Failure) else str(error)
        return None if self.run.admission is None else self.run.admission.refuse(answer)

    def _note(self, update: Update) -> None:
        size = update.nbytes * max(1, self._copies[update.site])
        self._seen[update.site] = {**update.metrics, "norm": update.norm(), "weight": update.weight,
                                   "steps": float(update.steps), "bytes": float(size)}
        if update.seconds > 0:  # withheld under a guarantee
            self._seen[update.site]["seconds"] = update.seconds


def _finite(state: ServerState) -> bool:
    groups = (state.model, *state.models.values(), *state.moments.values())
    return all(bool(torch.isfinite(tensor).all()) for group in groups for tensor in group.values())
