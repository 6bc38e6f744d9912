"""Calls from the server to sites: in parallel, each with a time limit, and given up early when a site is gone."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from fedlab.core.errors import FedlabError, PrivacyError
from fedlab.deploy.messages import printable

__all__ = ["Ended", "SiteCall", "SiteCalls"]


class Ended(BaseException):
    """The job ends. Not an `Exception`, which would count as a failure of the sites and let the run continue."""


class SiteCall:
    """One call to a site over NVFLARE.

    NVFLARE ends a job only when all of its calls have returned, and a call to a site that is gone returns when its time
    limit is reached, perhaps after hours. So each call gets an abort signal of its own in place of the job's.

    Args:
        proxy: NVFLARE's, of the site.
    """

    def __init__(self, proxy: Any) -> None:
        from nvflare.apis.signal import Signal

        self._signal = Signal()
        self._proxy = self._with_signal(proxy)

    def ask(self, method: str, arguments: tuple[Any, ...], *, seconds: float) -> Any:
        """What the site returns; raises what NVFLARE raises."""
        return getattr(self._proxy(timeout=seconds), method)(*arguments)

    def hang_up(self) -> None:
        """Ends the call at any stage."""
        self._signal.trigger(True)

    def _with_signal(self, proxy: Any) -> Any:
        copied = copy.copy(proxy)
        copied.backend = copy.copy(proxy.backend)
        copied.backend.abort_signal = self._signal
        copied.children = {name: self._with_signal(child) for name, child in proxy.children.items()}
        return copied


class SiteCalls:
    """Asks sites and yields their answers as they arrive.

    NVFLARE does not report that a site is gone: the call lasts until its time limit. So a site at work is asked
    repeatedly whether it is alive. One that stays silent for `patience` seconds is given up for this question; the next
    question first asks whether it is back.

    Args:
        sites: for each site of this job, by name, a function that makes a `SiteCall`.
        seconds: longest time for an answer.
        patience: seconds without a sign of life after which a site counts as gone.
        aborted: whether the job ends.

    Attributes:
        silent: names of the sites that were gone when last asked.
    """

    def __init__(self, sites: Mapping[str, Callable[[], SiteCall]], *, seconds: float, patience: float = 30.0,
                 aborted: Callable[[], bool] = lambda: False) -> None:
        self.sites, self.seconds, self.patience, self.aborted = dict(sites), seconds, patience, aborted
        self.silent: set[str] = set()

    def ask(self, names: Sequence[str], method: str, arguments: Mapping[str, tuple[Any, ...]],
            ) -> Iterator[tuple[str, Any]]:
        """Each site's answer to a call of a method of `SitePart`, or an exception that says why there is none.

        Raises:
            Ended: the job ends.
        """
        self._wait_for_any_site()
        answers: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        for name in names:
            _in_thread(answers, lambda name=name: (name, self._answer_of(name, method, arguments[name])))  # type: ignore[misc]
        for _ in names:
            answer = None
            while answer is None:
                with suppress(Empty):
                    answer = answers.get(timeout=1.0)
                if self.aborted():
                    raise Ended
            yield answer

    def _wait_for_any_site(self) -> None:
        """Waits while all sites are gone: otherwise rounds would pass without any of them."""
        while self.sites and self.silent.issuperset(self.sites):
            if self.aborted():
                raise Ended
            if not any(self._is_alive(name, within=min(5.0, self.patience)) for name in self.sites):
                time.sleep(1.0)

    def _answer_of(self, name: str, method: str, arguments: tuple[Any, ...]) -> Any:
        """What a site answers; an exception is returned, not raised."""
        if name not in self.sites:
            return FedlabError(f"{name} was not connected when this job began")
        beat = min(5.0, self.patience / 3)
        if name in self.silent and not self._is_alive(name, within=beat):
            return FedlabError(f"{name} is not connected")
        outcome: SimpleQueue[Any] = SimpleQueue()
        call = self.sites[name]()
        _in_thread(outcome, partial(self._call, call, name, method, arguments))
        heard = time.monotonic()
        while not self.aborted():
            try:
                return outcome.get(timeout=beat)
            except Empty:
                if self._is_alive(name, within=beat):
                    heard = time.monotonic()
                elif time.monotonic() - heard > self.patience:
                    call.hang_up()
                    self.silent.add(name)
                    return FedlabError(f"{name} has given no sign of life for {self.patience:g} s")
        call.hang_up()
        return FedlabError("the job ends")

    def _call(self, call: SiteCall, name: str, method: str, arguments: tuple[Any, ...]) -> Any:
        try:
            reply = call.ask(method, arguments, seconds=self.seconds)
        except Exception as error:  # several kinds of NVFLARE's, about the connection or raised at the site
            if getattr(error, "cause_type", type(error).__name__) == "TimeoutError":
                return FedlabError(f"{name} has not answered within {self.seconds:g} s")
            return FedlabError(f"{name} could not be asked: {str(getattr(error, 'cause', error))[:2000]}")
        match reply:
            case {"value": value, **rest} if not rest:
                return value
            case {"error": str() as kind, "text": str() as text, **rest} if not rest:
                return (PrivacyError if kind == "PrivacyError" else FedlabError)(printable(text[:4000]))
        return FedlabError(f"{name} answered with a {type(reply).__name__} that fedlab does not send")

    def _is_alive(self, name: str, *, within: float) -> bool:
        try:
            self.sites[name]().ask("alive", (), seconds=within)
        except Exception:  # whatever NVFLARE raises, there is no sign of life
            return False
        self.silent.discard(name)
        return True


def _in_thread(results: SimpleQueue[Any], work: Callable[[], Any]) -> None:
    """Work in a thread that does not delay the end of the process: a call to a site that is gone takes its time."""
    threading.Thread(target=lambda: results.put(work()), daemon=True, name="fedlab-call").start()
