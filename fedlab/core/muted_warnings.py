"""Warnings of other libraries that say nothing to fedlab's users."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["muted"]

_LOCK = threading.Lock()
_users: Counter[str] = Counter()
_filters: dict[str, object] = {}


@contextmanager
def muted(message: str) -> Iterator[None]:
    """A block in which warnings that begin with `message` are not shown, in any thread.

    `warnings.catch_warnings` replaces all filters of the process and puts the old ones back: of two threads that do so
    at once, the later one leaves the other's filters in place for good.
    """
    with _LOCK:
        _users[message] += 1
        if _users[message] == 1:
            warnings.filterwarnings("ignore", message)
            _filters[message] = warnings.filters[0]
    try:
        yield
    finally:
        with _LOCK:
            _users[message] -= 1
            if not _users[message]:
                with suppress(ValueError):  # somebody else has reset the filters
                    warnings.filters.remove(_filters.pop(message))  # type: ignore[attr-defined]
