"""Output of the command line that neither an unknown character nor a closed pipe can stop, and warnings as notes."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any

__all__ = ["robust_streams", "warnings_as_notes"]


class _Descriptor(io.FileIO):
    """An open file descriptor; what is written after its reader has closed the pipe is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
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
            present = getattr(sys, name)
            if present is getattr(sys, f"__{name}__"):  # None where the shell has closed it
                number = os.open(os.devnull, os.O_WRONLY) if present is None else present.fileno()
                file = io.BufferedWriter(_Descriptor(number, "w", closefd=False))
                stream = io.TextIOWrapper(file, encoding=getattr(present, "encoding", "utf-8"),
                                          errors="backslashreplace",
                                          line_buffering=getattr(present, "line_buffering", True))
                stack.callback(_flush, stream)
                stack.enter_context(redirect(stream))
        yield


@contextmanager
def warnings_as_notes(worded: Callable[[str], str]) -> Iterator[None]:
    """Within the block, a warning is a note on standard error: once, in the user's words, clear of progress bars.

    Warnings of worker processes arrive here too (`fedlab.core.workers`).
    """
    said: set[str] = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        from tqdm import tqdm

        text = worded(str(message)).strip()
        if text not in said:
            said.add(text)
            tqdm.write(f"note: {text}", file=sys.stderr)

    usual = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


def _flush(stream: io.TextIOWrapper) -> None:
    with suppress(OSError):  # reported where the command ended
        stream.flush()
