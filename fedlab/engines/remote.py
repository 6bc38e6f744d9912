"""Sites behind a transport: what the server asks of them, and what it makes of their answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedlab.core.errors import FedlabError, SiteError
from fedlab.core.types import Answer, Failure, Memory, Patient, ServerState, Site
from fedlab.deploy.messages import limit_for, pack_state, pack_weights, unpack_answer
from fedlab.deploy.plan import Plan
from fedlab.privacy.base import Inboxes, PartialExchange
from fedlab.run.site_task import SiteTask
from fedlab.strategies.averaging import FedAvg, Strategy

__all__ = ["Ask", "Remote", "Unseen", "away"]

#: Calls a method of `SiteHost` at some sites, each with its own arguments, and yields (site, what came or an error) in
#: any order, for every site once.
Ask = Callable[[Sequence[str], str, dict[str, tuple[Any, ...]]], Iterator[tuple[str, Any]]]

_LARGEST_NOTE = 2**20


class Unseen(list[Patient]):
    """Stand-ins for patients whom this process knows nothing of."""


def away(name: str, *, patients: int) -> Site:
    """A site as a server sees it: a name and how many patients it trains on, without their scans.

    Args:
        name: of the site.
        patients: plans are checked with it; a trace says that the server doesn't know.
    """
    blank = torch.empty(4, 0, 0, 0)
    return Site(name=name, train=Unseen(Patient(f"{name}: patient {k}", blank, None, np.eye(4))
                                        for k in range(patients)))


class Remote:
    """An engine whose sites are reached through a transport.

    It begins the run at each site before its first round there and again after a failure, so that a site that was
    started anew finds its way back. Answers may come in any order; they are handed on in that of the cohort, and one
    that comes early waits in bytes, as it came. What a site's transport throws, or nothing at all, is that site's
    `Failure`. The sites' memory stays with them.

    Args:
        plan: of the run.
        ask: the transport.

    Attributes:
        sent, received: bytes of packed states and of answers, so far.
    """

    def __init__(self, *, plan: Plan, ask: Ask) -> None:
        self.plan, self.ask = plan, ask
        self.memory: dict[str, Memory] = {}
        self.sent = self.received = 0
        self._ready: set[str] = set()

    def run(self, task: SiteTask, state: ServerState, cohort: Sequence[Site]) -> Iterator[Answer]:
        names = [site.name for site in cohort]
        refused = self._begin(task, names, state.round)
        args = self._states(task.strategy, state, [name for name in names if name not in refused])
        limit = limit_for(state.params)
        asked = self._answers("train", args, state.round)
        early: dict[str, Any] = dict(refused)
        for name in names:
            while name not in early:
                sender, came = next(asked)  # every site that was asked comes once
                early[sender] = came
            yield self._read(name, early.pop(name), limit, state.round)

    def exchange(self, task: SiteTask, step: str, inboxes: Inboxes, sites: Sequence[Site]) -> Inboxes:
        names = [site.name for site in sites]
        answers: dict[str, Any] = dict(self._begin(task, names, 0))
        args = {name: (self.plan.run, step, dict(inboxes.get(name, {}))) for name in names if name not in answers}
        for name, came in self._answers("exchange", args, 0):
            answers[name] = came
        sent: dict[str, Mapping[str, bytes]] = {}
        failures = []
        for name in names:
            try:
                sent[name] = _messages(name, answers[name], {*self.plan.sites, "server"})
            except FedlabError as error:
                failures.append(Failure(name, error))
            except Exception as error:
                failures.append(Failure(name, SiteError(name, 0, "reach", f"{type(error).__name__}: {error}")))
        if failures:
            self._ready -= {failure.site for failure in failures}
            raise PartialExchange(sent, failures)
        return sent

    def _begin(self, task: SiteTask, names: Sequence[str], round: int) -> dict[str, Exception]:
        """Begins the run at the sites where it isn't, and returns what refused."""
        new = [name for name in names if name not in self._ready]
        if not new:
            return {}
        plan, start = self.plan.to_json(), pack_weights(task.trainer.initial())
        refused = {}
        for name, came in self._answers("begin", {name: (plan, start) for name in new}, round):
            self.sent += len(start)
            if isinstance(came, Exception):
                refused[name] = came
            else:
                self._ready.add(name)
        return refused

    def _states(self, strategy: Strategy, state: ServerState, names: Sequence[str]) -> dict[str, tuple[Any, ...]]:
        """What each site is shown of the state: one packing for all that see the same."""
        wanted = state.moments if _reads_state(strategy) else {}
        moments = {name: slots for name, slots in wanted.items() if slots.keys() == state.params.keys()}
        shared = None if state.models else pack_state(replace(state, moments=moments))
        args: dict[str, tuple[Any, ...]] = {}
        for name in names:
            packed = shared or pack_state(replace(state.at(name), moments=moments))
            self.sent += len(packed)
            args[name] = (self.plan.run, packed)
        return args

    def _answers(self, method: str, args: dict[str, tuple[Any, ...]], round: int) -> Iterator[tuple[str, Any]]:
        """What came from each of these sites, once: an error for those from which nothing came."""
        waiting = dict.fromkeys(args)
        if not waiting:
            return
        why = "no answer came"
        try:
            for name, came in self.ask(list(args), method, args):
                if name not in waiting:
                    warnings.warn(f"the transport brought an answer of {str(name)[:80]!r}, who was not waited for; "
                                  "it is left out", stacklevel=2)
                    continue
                del waiting[name]
                yield name, came
        except Exception as error:
            why = f"the transport failed: {type(error).__name__}: {error}"
        for name in waiting:
            yield name, SiteError(name, round, "reach", why)

    def _read(self, name: str, came: Any, limit: int, round: int) -> Answer:
        """The answer of a site, whatever came."""
        try:
            if isinstance(came, Exception):
                raise came
            if isinstance(came, bytes | bytearray | memoryview):
                self.received += len(came)
            answer = unpack_answer(came, site=name, limit=limit)
        except FedlabError as error:
            answer = Failure(name, error)
        except Exception as error:
            answer = Failure(name, SiteError(name, round, "reach", f"{type(error).__name__}: {error}"))
        if isinstance(answer, Failure):
            self._ready.discard(name)  # it may have been started anew
        return answer

    def __repr__(self) -> str:
        return f"Remote({len(self.plan.sites)} sites)"


def _reads_state(strategy: Strategy) -> bool:
    """Whether the strategy does something of its own at the sites, for which it may need the server's moments."""
    cls = type(strategy)
    return (getattr(cls, "equip", None) is not FedAvg.equip) or (getattr(cls, "keep", None) is not FedAvg.keep)


def _messages(name: str, came: Any, known: set[str]) -> Mapping[str, bytes]:
    """A site's messages, by recipient."""
    if isinstance(came, Exception):
        raise came
    if not isinstance(came, dict) or not all(
            isinstance(to, str) and to in known and isinstance(message, bytes) and len(message) <= _LARGEST_NOTE
            for to, message in came.items()):
        raise FedlabError(f"the message of {name} was refused: expected short messages to sites of the run, by name")
    return came
