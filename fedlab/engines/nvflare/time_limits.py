"""Calls from the server to sites: side by side, each with a time limit, and given up early when a site is gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from fedlab.core.errors import FedlabError, PrivacyError

__all__ = ["Calls", "Ended"]


class Ended(BaseException):
    """The job is to end. No `Exception`: else it would be taken for a failure of the sites, and the run would go on."""


class _Call(Protocol):
    def ask(self, method: str, arguments: tuple[Any, ...], *, seconds: float) -> Any: ...

    def hang_up(self) -> None: ...


class _Line(Protocol):
    def dial(self) -> _Call: ...


class Calls:
    """Asks sites and hands on what they answer, as it comes.

    NVFLARE doesn't tell a caller that a site has gone: the call lasts until its time is up. So while a site works it
    is asked now and then whether it is there. One that stays silent for `patience` seconds is given up for this
    question; the next question begins with whether it is back.

    Args:
        sites: the ways to the sites that take part in this job, by name; see `fedlab.engines.nvflare.cancellable`.
        seconds: longest time for an answer.
        patience: seconds without a sign of life after which a site counts as gone.
        aborted: whether the job is to end.

    Attributes:
        silent: names of the sites that were gone when last asked.
    """

    def __init__(self, sites: Mapping[str, _Line], *, seconds: float, patience: float = 30.0,
                 aborted: Callable[[], bool] = lambda: False) -> None:
        self.sites, self.seconds, self.patience, self.aborted = dict(sites), seconds, patience, aborted
        self.silent: set[str] = set()

    def ask(self, names: Sequence[str], method: str, arguments: Mapping[str, tuple[Any, ...]],
            ) -> Iterator[tuple[str, Any]]:
        """Each site's answer to a call, or an exception that says why there is none.

        Args:
            names: of the sites.
            method: one that `SitePart` publishes.
            arguments: of the call, by site.

        Raises:
            Ended: the job is to end.
        """
        self._wait_for_anybody()
        answers: SimpleQueue[tuple[str, Any]] = SimpleQueue()

        def answer(name: str) -> None:
            answers.put((name, self._one(name, method, arguments[name])))

        for name in names:
            _begin(partial(answer, name))
        for _ in names:
            yield self._next(answers)

    def _next(self, answers: SimpleQueue[tuple[str, Any]]) -> tuple[str, Any]:
        came = None
        while came is None:
            with suppress(Empty):
                came = answers.get(timeout=1.0)
            if self.aborted():
                raise Ended
        return came

    def _wait_for_anybody(self) -> None:
        """While everybody is gone there is nothing to ask: rounds would pass with nobody in them."""
        while self.sites and self.silent.issuperset(self.sites):
            if self.aborted():
                raise Ended
            if not any(self._is_there(name, within=min(5.0, self.patience)) for name in self.sites):
                time.sleep(1.0)

    def _one(self, name: str, method: str, arguments: tuple[Any, ...]) -> Any:
        """What a site answers; an exception is returned, not raised."""
        if name not in self.sites:
            return FedlabError(f"{name} was not connected when this job began")
        beat = min(5.0, self.patience / 3)
        if name in self.silent and not self._is_there(name, within=beat):
            return FedlabError(f"{name} is not connected")
        outcome: SimpleQueue[Any] = SimpleQueue()
        call = self.sites[name].dial()
        _begin(lambda: outcome.put(self._call(call, name, method, arguments)))
        heard = time.monotonic()
        while not self.aborted():
            try:
                return outcome.get(timeout=beat)
            except Empty:
                if self._is_there(name, within=beat):
                    heard = time.monotonic()
                elif time.monotonic() - heard > self.patience:
                    call.hang_up()
                    self.silent.add(name)
                    return FedlabError(f"{name} has given no sign of life for {self.patience:g} s")
        call.hang_up()
        return FedlabError("the job is to end")

    def _call(self, call: _Call, name: str, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            told = call.ask(method, arguments, seconds=self.seconds)
        except Exception as error:  # NVFLARE's own, of several kinds, about the way there or what was raised there
            if getattr(error, "cause_type", type(error).__name__) == "TimeoutError":
                return FedlabError(f"{name} has not answered within {self.seconds:g} s")
            return FedlabError(f"{name} could not be asked: {str(getattr(error, 'cause', error))[:2000]}")
        match told:
            case {"value": value, **rest} if not rest:
                return value
            case {"error": str() as kind, "text": str() as text, **rest} if not rest:
                clean = "".join(sign for sign in text[:4000] if sign.isprintable() or sign == "\n")
                return (PrivacyError if kind == "PrivacyError" else FedlabError)(clean)
        return FedlabError(f"{name} answered with a {type(told).__name__} that fedlab doesn't send")

    def _is_there(self, name: str, *, within: float) -> bool:
        try:
            self.sites[name].dial().ask("alive", (), seconds=within)
        except Exception:  # whatever NVFLARE raises, there is no sign of life
            return False
        self.silent.discard(name)
        return True


def _begin(work: Callable[[], None]) -> None:
    """Work in a thread that nobody waits for when the process ends: a call to a site that is gone takes its time."""
    threading.Thread(target=work, daemon=True, name="fedlab-call").start()
