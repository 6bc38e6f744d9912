"""Warm worker processes: started once, one torch thread each.

Two processes of one thread each train faster than one process of two threads. Importing MONAI takes seconds of
processor time, so the workers are forked from one server that has imported everything already.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from queue import Empty
from types import TracebackType
from typing import Any

import torch

from fedlab.core.settings import check_whole

__all__ = ["Stopped", "Workers", "available_cores", "forkserver", "script_not_imported", "settle", "tell"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_messages: Queue[Any] | None = None
_stop: Event | None = None


class Stopped(Exception):
    """The parent asked its workers to stop; raised in a worker by `tell`."""


def available_cores() -> int:
    """Number of processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def forkserver() -> ForkServerContext:
    """The context that makes worker processes: forked from a process that has imported everything and has no threads.

    Unlike a fork of the kernel itself, this is safe in a notebook.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fedlab.core.warm_imports"])
    return context


@contextmanager
def script_not_imported() -> Iterator[None]:
    """A process that is started here does not run the user's script again.

    So a script needs no main guard, and may be read from standard input, where there is no file to import.
    """
    main = vars(sys.modules["__main__"])
    hidden: dict[str, Any] = {name: main[name] for name in ("__file__", "__spec__") if name in main}
    main |= dict.fromkeys(hidden)
    try:
        yield
    finally:
        main |= hidden


@dataclass(frozen=True)
class _Warned:
    """The message with which a worker tells of a warning."""

    text: str


class Workers(ProcessPoolExecutor):
    """A pool of warm processes, by default one per core, whose tasks can send messages to the parent with `tell`.

    In a `with` block they end with it, and at once if it raises.
    """

    def __init__(self, count: int | None = None) -> None:
        check_whole(optional=True, workers=count)
        context = forkserver()
        self._inbox: Queue[Any] = context.Queue()
        self._halt = context.Event()
        super().__init__(count or available_cores(), mp_context=context, initializer=_settle,
                         initargs=(self._inbox, self._halt))

    def messages(self) -> Iterator[Any]:
        """The messages received since the last call, oldest first; a worker's warnings are given here anew."""
        while True:
            try:
                message = self._inbox.get_nowait()
            except Empty:
                return
            if isinstance(message, _Warned):
                warnings.warn(message.text, stacklevel=2)
            else:
                yield message

    def stop(self) -> None:
        """Ends running tasks at their next `tell`; waiting tasks never start."""
        self._halt.set()
        self.shutdown(wait=True, cancel_futures=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if error is not None:
            self.stop()
        self.shutdown()
        deque(self.messages(), maxlen=0)  # gives the warnings that nobody has waited for


def tell(message: Any) -> None:
    """In a worker: sends a message to the parent, or raises `Stopped` if it asked for that. Elsewhere: nothing."""
    if _stop is not None and _stop.is_set():
        raise Stopped
    if _messages is not None:
        _messages.put(message)


def _settle(messages: Queue[Any], stop: Event) -> None:
    global _messages, _stop
    _messages, _stop = messages, stop
    warnings.showwarning = lambda message, *_, **__: messages.put(_Warned(str(message)))
    settle()


def settle() -> None:
    """In a new worker: sets one torch thread, keeps freed memory, ignores Ctrl-C, and ends with its parent."""
    torch.set_num_threads(1)
    _keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops its workers in order
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _keep_memory() -> None:
    """glibc keeps what is freed for the next step; else every large activation goes back to the system, page by page.

    The same as `MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` in the environment, which only count from the
    start of a program on.
    """
    with suppress(AttributeError, OSError):  # of other systems
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the most that glibc takes
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)  # a killed parent must not leave workers behind
