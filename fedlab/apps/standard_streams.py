"""Output of the command line that neither an unknown character nor a closed pipe can stop."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

__all__ = ["robust_streams"]


class _Descriptor(io.RawIOBase):
    """An open file descriptor; what is written after its reader has closed the pipe is dropped."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            return os.write(self._number, data)
        except BrokenPipeError:
            return len(data)


@contextmanager
def robust_streams() -> Iterator[None]:
    """Within the block, standard output and error write a character that their encoding lacks as an escape such as
    \\u03b5, and ignore a closed pipe: neither ends the work or changes its exit status.

    Streams that a notebook or a test has put in their place are left alone.
    """
    with ExitStack() as stack:
        for name, redirect in (("stdout", redirect_stdout), ("stderr", redirect_stderr)):
            present, original = getattr(sys, name), getattr(sys, f"__{name}__")
            if present is not original:
                continue
            number = os.open(os.devnull, os.O_WRONLY) if present is None else present.fileno()
            stream = io.TextIOWrapper(
                io.BufferedWriter(_Descriptor(number)), encoding=getattr(present, "encoding", "utf-8"),
                errors="backslashreplace", line_buffering=getattr(present, "line_buffering", True))
            stack.callback(_flush, stream)
            stack.enter_context(redirect(stream))
        yield


def _flush(stream: io.TextIOWrapper) -> None:
    with suppress(OSError):  # reported where the command ended
        stream.flush()
