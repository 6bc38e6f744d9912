"""Fixtures of the browser tests: a JupyterLab, a Chromium, and a folder for screenshots and timings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from lab import CHROMIUM, Lab, Seen, Visit, chromium, require_chromium


@pytest.fixture(scope="session")
def seen(repository: Path) -> Seen:
    """Screenshots and timings of this run; those of an earlier run are deleted."""
    return Seen(repository / "runs" / "browser")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, per module, since Playwright's event loop must end before other tests start theirs."""
    require_chromium(CHROMIUM, ci=bool(os.environ.get("CI")))
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root folder of JupyterLab."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def jupyter(browser: Any, notebooks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab on an empty folder; all its processes are ended afterwards."""
    lab = Lab(tmp_path_factory.mktemp("lab"), notebooks)
    try:
        lab.wait()
        yield lab
    finally:
        killed = lab.stop()
    assert not killed, f"JupyterLab left processes behind: {killed}"


@pytest.fixture
def visit(browser: Any, jupyter: Lab, notebooks: Path, seen: Seen, request: pytest.FixtureRequest,
          ) -> Iterator[Callable[..., Visit]]:
    """Opens a notebook in JupyterLab; a screenshot of the end is always kept."""
    opened: list[Visit] = []

    def open_notebook(notebook: Any) -> Visit:
        name = f"{request.node.name}.ipynb"
        nbformat.write(notebook, notebooks / name)
        opened.append(Visit(browser, jupyter, name))
        return opened[-1]

    yield open_notebook
    for one in opened:
        seen.keep(f"{request.node.name}-end", one.page.screenshot())
        one.close()
