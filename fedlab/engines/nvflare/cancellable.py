"""Calls over NVFLARE that can be given up."""

from __future__ import annotations

import copy
from typing import Any

from nvflare.apis.signal import Signal

__all__ = ["Line"]


class Line:
    """The way to one site.

    NVFLARE ends a job only when all of its calls have returned, and a call to a site that is gone returns when its
    time is up, after hours perhaps. So each call gets a signal of its own in place of the job's.

    Args:
        proxy: NVFLARE's, of the site.
    """

    def __init__(self, proxy: Any) -> None:
        self.proxy = proxy

    def dial(self) -> Call:
        """A call that is about to be made."""
        return Call(self.proxy)


class Call:
    """One call."""

    def __init__(self, proxy: Any) -> None:
        self._signal = Signal()
        self._proxy = self._with_signal(proxy)

    def ask(self, method: str, arguments: tuple[Any, ...], *, seconds: float) -> Any:
        """What the site returns; raises what NVFLARE raises."""
        return getattr(self._proxy(timeout=seconds), method)(*arguments)

    def hang_up(self) -> None:
        """Ends the call, wherever it is."""
        self._signal.trigger(True)

    def _with_signal(self, proxy: Any) -> Any:
        own, backend = copy.copy(proxy), copy.copy(proxy.backend)
        backend.abort_signal = self._signal
        own.backend = backend
        own.children = {name: self._with_signal(child) for name, child in proxy.children.items()}
        return own
