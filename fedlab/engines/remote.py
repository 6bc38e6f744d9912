"""Sites behind a transport: what the server asks of them, and how it reads their answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedlab.core.errors import FedlabError, SiteError
from fedlab.core.protocols import Run, Strategy
from fedlab.core.text import without_folders
from fedlab.core.types import Answer, Failure, Messages, Round, ServerState, Site
from fedlab.deploy.messages import are_notes, limit_for, pack_state, pack_weights, unpack_answer
from fedlab.deploy.plan import Plan
from fedlab.run.federate import loop
from fedlab.run.site_states import SiteStates
from fedlab.run.site_task import SiteTask
from fedlab.strategies.averaging import FedAvg

__all__ = ["Ask", "Remote"]

#: Calls a method of `SiteHost` at some sites, each with its own arguments, and yields (site, result or exception) in
#: any order, once per site.
Ask = Callable[[Sequence[str], str, dict[str, tuple[Any, ...]]], Iterator[tuple[str, Any]]]


class Remote:
    """An engine whose sites are reached through a transport; a run names them.

    It begins the run at each site before its first round there and again after a failure, so that a restarted site can
    continue. Answers may arrive in any order; they are handed on in that of the cohort, and an early one waits in
    packed form. An exception of the transport, or no answer at all, is a `Failure` of that site. The sites' states stay
    at the sites.

    Args:
        plan: of the run.
        ask: the transport.
        ledgers: a folder in which the ledger of noise at the server outlives the run; see `Local`.

    Attributes:
        sent, received: bytes of packed states and of answers, so far.
    """

    def __init__(self, *, plan: Plan, ask: Ask, ledgers: Path | None = None) -> None:
        self.plan, self.ask, self.ledgers = plan, ask, ledgers
        self.sent = self.received = 0
        self._ready: set[str] = set()

    def rounds(self, run: Run, state: ServerState | None) -> Iterator[Round]:
        """The rounds of a run, whose loop is in this process."""
        return loop(replace(run, site_states=SiteStates()), state)

    def train(self, task: SiteTask, state: ServerState, cohort: Sequence[Site], states: SiteStates) -> Iterator[Answer]:
        """The answer of each site, in the order of the cohort; `states` is not used."""
        names = [site.name for site in cohort]
        early: dict[str, Any] = self._begin(task, names, state.round)
        args = self._states(task.strategy, state, [name for name in names if name not in early])
        asked = self._answers("train", args, state.round)
        for name in names:
            while name not in early:
                sender, answer = next(asked)  # every site that was asked occurs once
                early[sender] = answer
            yield self._read(name, early.pop(name), limit_for(state.model), state.round)

    def exchange(self, task: SiteTask, step: str, inboxes: Messages, sites: Sequence[Site],
                 states: SiteStates) -> tuple[Messages, list[Failure]]:
        """The messages of each site, and the sites that failed; `states` is not used."""
        names = [site.name for site in sites]
        answers: dict[str, Any] = self._begin(task, names, 0)
        args = {name: (self.plan.run, step, dict(inboxes.get(name, {}))) for name in names if name not in answers}
        answers.update(self._answers("exchange", args, 0))
        sent: dict[str, Mapping[str, bytes]] = {}
        failures = []
        for name in names:
            try:
                if isinstance(answers[name], Exception):
                    raise answers[name]
                if not are_notes(answers[name], self.plan.sites):
                    raise FedlabError(f"the message of {name} was refused: expected short messages to sites of the "
                                      "run, by name")
                sent[name] = answers[name]
            except Exception as error:
                failures.append(self._failure(name, error, 0))
        return sent, failures

    def _begin(self, task: SiteTask, names: Sequence[str], round: int) -> dict[str, Any]:
        """Begins the run at the sites where it has not begun; returns the errors of those that refuse."""
        new = [name for name in names if name not in self._ready]
        if not new:
            return {}
        plan, start = self.plan.to_json(), pack_weights(task.trainer.initial_model())
        self.sent += len(start) * len(new)
        answers = dict(self._answers("begin", {name: (plan, start) for name in new}, round))
        refused = {name: answer for name, answer in answers.items() if isinstance(answer, Exception)}
        self._ready |= answers.keys() - refused.keys()
        return refused

    def _states(self, strategy: Strategy, state: ServerState, names: Sequence[str]) -> dict[str, tuple[Any, ...]]:
        """The part of the state that each site is shown, packed once for all that are shown the same."""
        # A strategy that does something of its own at the sites may need the server's moments for it.
        reads = any(getattr(type(strategy), hook, None) is not getattr(FedAvg, hook) for hook in ("equip", "remember"))
        wanted = state.moments if reads else {}
        moments = {name: slots for name, slots in wanted.items() if slots.keys() == state.params.keys()}
        shared = None if state.models else pack_state(replace(state, moments=moments))
        args: dict[str, tuple[Any, ...]] = {}
        for name in names:
            packed = shared or pack_state(replace(state.at(name), moments=moments))
            self.sent += len(packed)
            args[name] = (self.plan.run, packed)
        return args

    def _answers(self, method: str, args: dict[str, tuple[Any, ...]], round: int) -> Iterator[tuple[str, Any]]:
        """The answer of each of these sites, once; an error for those that did not answer."""
        waiting = dict.fromkeys(args)
        if not waiting:
            return
        reason = "the site did not respond"
        try:
            for name, answer in self.ask(list(args), method, args):
                if name not in waiting:
                    warnings.warn(f"the transport brought an unexpected answer of {str(name)[:80]!r}; it is ignored",
                                  stacklevel=2)
                    continue
                del waiting[name]
                yield name, answer
        except Exception as error:
            reason = f"the transport failed: {type(error).__name__}: {error}"
        for name in waiting:
            yield name, SiteError(name, round, "reach", reason)

    def _read(self, name: str, answer: Any, limit: int, round: int) -> Answer:
        """The answer of a site, whatever was received."""
        try:
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, bytes | bytearray | memoryview):
                self.received += len(answer)
            found = unpack_answer(answer, site=name, limit=limit)
        except Exception as error:
            return self._failure(name, error, round)
        return self._failure(name, found.error, round) if isinstance(found, Failure) else found

    def _failure(self, name: str, error: Exception, round: int) -> Failure:
        """The failure of a site, at which the run begins anew: the site may have been restarted."""
        self._ready.discard(name)
        if isinstance(error, SiteError):
            error = error.in_round(round)
        found = error if isinstance(error, FedlabError) else SiteError(name, round, "reach",
                                                                       f"{type(error).__name__}: {error}")
        found.told = without_folders(str(found))  # the site has decided what leaves it
        return Failure(name, found)

    def __repr__(self) -> str:
        return f"Remote({len(self.plan.sites)} sites)"
