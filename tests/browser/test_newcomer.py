"""`make lab` as a newcomer meets it: the welcome notebook is open, runs, shows its patients and asks nothing."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from lab import Lab, Seen, Visit, grey, pixels, wait_for, with_parameters

#: Seconds until a test fails; a shared machine may need a part of them.
PATIENCE = 600
#: Relative luminance of the text in the viewer's controls, and of what lies behind it.
LUMINANCES = """element => {
    const bright = colour => {
        const [red, green, blue, alpha] = [...colour.match(/[\\d.]+/g).map(Number), 1];
        return alpha === 0 ? null : (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255;
    };
    let behind = null;
    for (let one = element; one && behind === null; one = one.parentElement) {
        behind = bright(getComputedStyle(one).backgroundColor);
    }
    return [bright(getComputedStyle(element).color), behind];
}"""


@pytest.fixture
def welcome(browser: Any, repository: Path, tmp_path_factory: pytest.TempPathFactory, seen: Seen) -> Iterator[Visit]:
    """The browser on the JupyterLab of `make lab`, on a copy of the notebooks whose first one has few patients."""
    folder = Path(shutil.copytree(repository / "notebooks", tmp_path_factory.mktemp("newcomer") / "notebooks"))
    first = folder / "00_welcome.ipynb"
    nbformat.write(with_parameters(first, sizes=(3, 3), held_out=1, rounds=1, steps=2), first)
    lab, began = Lab(tmp_path_factory.mktemp("lab"), folder, newcomer=True), time.monotonic()
    try:
        lab.wait()
        visit = Visit(browser, lab, None)
        seen.time("make lab to the open notebook", time.monotonic() - began)
        yield visit
        seen.keep("newcomer-end", visit.page.screenshot())
        visit.close()
    finally:
        killed = lab.stop()
    assert not killed, f"JupyterLab left processes behind: {killed}"


def test_the_welcome_notebook_opens_runs_and_shows_the_patients(welcome: Visit, repository: Path, seen: Seen) -> None:
    assert "fedlab lab -- $(ARGS)" in (repository / "Makefile").read_text("utf-8"), "what make lab starts is tested"
    page = welcome.page
    assert page.evaluate("() => window.jupyterapp.shell.currentWidget.context.path") == "00_welcome.ipynb"
    assert page.locator(".jp-Dialog, .Toastify__toast").count() == 0, "a newcomer is asked nothing"

    welcome.run_all()
    wait_for(welcome.finished, seconds=PATIENCE, why="the notebook has not finished")
    seen.time("00: Run All to the end", time.monotonic() - welcome.started)
    compared = welcome.image("look")
    assert compared is not None and grey(compared) > 1000, "the patients are not shown"
    for theme, light in (("JupyterLab Dark", "false"), ("JupyterLab Light", "true")):
        page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
        page.wait_for_selector(f"body[data-jp-theme-light={light}]", state="attached")
        viewer = welcome.cell("turn")
        wait_for(lambda viewer=viewer: brain(viewer) > 1000, seconds=PATIENCE, why=f"no brain in the viewer, {theme}")
        text, behind = viewer.locator(".widget-label").filter(has_text=re.compile("arm")).first.evaluate(LUMINANCES)
        assert abs(text - behind) > 0.4, f"{theme}: the labels of the viewer cannot be read"
        seen.keep(f"newcomer-{theme.split()[1].lower()}", page.screenshot())
    welcome.check_quiet()
    assert welcome.failed == [], "requests failed"


def brain(cell: Any) -> int:
    """Grey pixels of the viewer in a cell."""
    canvas = cell.locator("canvas")
    return grey(pixels(canvas.first.screenshot())) if canvas.count() else 0
