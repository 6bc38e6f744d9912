"""`make lab` as a newcomer meets it: the welcome notebook is open, runs, shows its patients and asks nothing."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest

from lab import BRAIN, Lab, Seen, Visit, differing, grey, pixels, tiles, wait_for, with_parameters

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
    viewer = welcome.cell("turn")
    wait_for(lambda: brain(viewer) > BRAIN, seconds=PATIENCE, why="no brain in the viewer")
    turn(welcome, viewer)
    viewer.locator("canvas").first.evaluate("canvas => { canvas.width = 0; }")  # as NiiVue does on a busy machine
    wait_for(lambda: brain(viewer) > BRAIN, seconds=60, why="a canvas that was left without a size stays empty")
    for theme, light in 2 * (("JupyterLab Dark", "false"), ("JupyterLab Light", "true")):
        page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
        page.wait_for_selector(f"body[data-jp-theme-light={light}]", state="attached")
        time.sleep(2)  # a canvas may lose its picture when the page is laid out anew
        wait_for(lambda: brain(viewer) > BRAIN, seconds=60, why=f"no brain in the viewer, {theme}")
        text, behind = viewer.locator(".widget-label").filter(has_text=re.compile("arm")).first.evaluate(LUMINANCES)
        assert abs(text - behind) > 0.4, f"{theme}: the labels of the viewer cannot be read"
        seen.keep(f"newcomer-{theme.split()[1].lower()}", page.screenshot())
    welcome.check_quiet()
    assert welcome.failed == [], "requests failed"


def turn(visit: Visit, viewer: Any) -> None:
    """Drags the head in the 3-D view, which then shows another side; the slices stay."""
    canvas, mouse = viewer.locator("canvas").first, visit.page.mouse
    canvas.scroll_into_view_if_needed()
    wait_for(lambda: grey(tiles(canvas).get("3-D", np.zeros((1, 1, 3)))) > BRAIN / 10, seconds=PATIENCE,
             why="no head in 3-D")
    before, box = tiles(canvas), canvas.bounding_box()
    place = next(one for one in json.loads(canvas.get_attribute("data-tiles")) if one["view"] == "3-D")
    x, y = (box[axis] + place[edge] + place[side] / 2
            for axis, edge, side in (("x", "left", "width"), ("y", "top", "height")))
    mouse.move(x, y)
    mouse.down()
    mouse.move(x + 70, y + 20, steps=5)
    mouse.up()
    wait_for(lambda: differing(before["3-D"], tiles(canvas)["3-D"]) > 2000, seconds=60, why="the head does not turn")
    assert differing(before["coronal"], tiles(canvas)["coronal"]) == 0, "a slice has changed too"


def brain(cell: Any) -> int:
    """Grey pixels of the viewer in a cell."""
    canvas = cell.locator("canvas")
    return grey(pixels(canvas.first.screenshot())) if canvas.count() else 0
