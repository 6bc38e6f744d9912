"""A tiny demo run, made once for all tests that look at a finished run, and its processes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
from filelock import FileLock

from fedlab.apps.cli import main
from warm import PYTHON

SMALL = ("--sites", "2", "--patients", "10", "--rounds", "2", "--steps", "2", "--shape", "48,64,48")


class Run(NamedTuple):
    """A folder that a command made, and what it printed."""

    folder: Path
    printed: str


def command(*arguments: object) -> str:
    """Runs the command line in this process and returns what it printed; it must succeed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([str(argument) for argument in arguments]) == 0
    return printed.getvalue()


@cache
def finished_demo(base: Path) -> Run:
    """The demo at its smallest, uninterrupted, seed 0. Tests only read it.

    Several pytest processes train it once, and each reads a copy.
    """
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo-made-once"
    folder, printed = made / "run", made / "printed.txt"
    made.mkdir(exist_ok=True)
    with FileLock(made / "lock"), pytest.MonkeyPatch.context() as patch:
        if not printed.is_file():
            patch.setenv("FEDLAB_CACHE", str(made / "cache"))
            printed.write_text(command("demo", *SMALL, "--contributions", "--out", folder), encoding="utf-8")
    own = base / "finished-demo"
    shutil.copytree(folder, own)
    return Run(own, printed.read_text(encoding="utf-8").replace(str(folder), str(own)))


@cache
def whole_site(base: Path) -> Run:
    """The documentation site of the notebooks as they are stored, and of one that would fail. Tests only read it.

    Several pytest processes build it once.
    """
    repository = Path(__file__).parents[1]
    made = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site-made-once"
    printed = made / "printed.txt"
    made.mkdir(exist_ok=True)
    with FileLock(made / "lock"):
        if not printed.is_file():
            fails = nbformat.v4.new_code_cell("1 / 0", metadata={"tags": ["thumbnail"]})
            title = nbformat.v4.new_markdown_cell("# Fails\n\nNothing.")
            nbformat.write(nbformat.v4.new_notebook(cells=[title, fails]), made / "fails.ipynb")
            notebooks = [*sorted((repository / "notebooks").glob("*.ipynb")), made / "fails.ipynb"]
            done = subprocess.run([*PYTHON, repository / "docs" / "gallery.py", *notebooks, "--no-run", "--out",
                                   made / "site"], capture_output=True, text=True, timeout=600,
                                  env={**os.environ, "PYTHONPATH": str(repository)})
            assert done.returncode == 0, done.stdout + done.stderr
            printed.write_text(done.stdout, encoding="utf-8")
    return Run(made / "site", printed.read_text(encoding="utf-8"))


def contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of change of every file below a folder."""
    return {str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in sorted(folder.rglob("*")) if path.is_file()}


def wait_for(what: Callable[[], object], *, seconds: float, why: str) -> None:
    """Waits until `what` is true and fails with `why` where it doesn't become so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"waited {seconds:g} s: {why}"
        time.sleep(0.05)


class Background:
    """The command line in a process group of its own, to be killed or interrupted."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.log = log
        # A process that is started with Ctrl-C ignored, as shells do in the background, would go on ignoring it.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with log.open("wb") as file:
                self.process = subprocess.Popen([sys.executable, "-m", "fedlab.apps.cli", *arguments], stdout=file,
                                                stderr=subprocess.STDOUT, start_new_session=True)
        finally:
            signal.signal(signal.SIGINT, before)

    def interrupt(self) -> None:
        """Ctrl-C, which a terminal sends to the whole group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def left(self) -> bool:
        """Whether any process of the group still runs."""
        if Path("/proc/self/stat").is_file():
            return any(group == self.process.pid and state != "Z" for state, group in _states())
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def end(self) -> None:
        """Ends whatever is left, so that a failed test leaves nothing behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _states() -> list[tuple[str, int]]:
    """State and process group of every process, from Linux' process table."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rsplit(")", 1)[1].split()
            found.append((fields[0], int(fields[2])))
    return found
