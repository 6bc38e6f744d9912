"""itkwidgets in JupyterLab without a network: the picture, the tumour's labels, a slider, and the cells that follow."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from nbformat.v4 import new_code_cell, new_notebook

from fedlab.view import itk_parts
from lab import Pixels, Seen, Visit, coloured, differing, grey, pixels, wait_for

#: Moves the slider of the slices, the only visible one without the class of the others.
MOVE = """() => {
    const slider = [...document.querySelectorAll("input[type=range]:not(.slider)")].find(one => one.offsetWidth > 0);
    slider.value = Number(slider.min) + 0.2 * (slider.max - slider.min);
    slider.dispatchEvent(new Event("input", {bubbles: true}));
    slider.dispatchEvent(new Event("change", {bubbles: true}));
}"""
SHOW = """
import fedlab as fl
(site,) = fl.make_cohort(sizes=(2,), held_out=1, shape=(48, 64, 48), spacing_mm=3.0, seed=0, workers=0, progress=False)
fl.show(site.val[0], view="axial", overlay="labels", backend="itk")
"""


def test_itkwidgets_shows_a_tumour(visit: Callable[..., Visit], seen: Seen) -> None:
    if itk_parts.installed() is None:
        pytest.skip("the viewer of itkwidgets is not set up here: fedlab itk install")
    cells = [new_code_cell(SHOW.strip(), id="show"), new_code_cell("print('the next cell runs')", id="next")]
    python = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    notebook = visit(new_notebook(cells=cells, metadata=python))
    notebook.run_all()
    began = time.monotonic()
    wait_for(lambda: (window := shot(notebook)) is not None and grey(window) > 1000 and coloured(window) > 50,
             seconds=300, why="itkwidgets does not show a brain with the colours of a tumour")
    seen.time("itkwidgets: Run All to the tumour", time.monotonic() - began)
    before = shot(notebook)
    assert before is not None
    (viewer,) = (frame for frame in notebook.page.frames if "viewer/index.html" in frame.url)
    viewer.evaluate(MOVE)
    wait_for(lambda: (window := shot(notebook)) is not None and differing(before, window) > 500, seconds=60,
             why="another slice gives the same picture")
    following = notebook.cell("next").locator(".jp-OutputArea-output").filter(has_text="the next cell runs")
    wait_for(following.count, seconds=120, why="the cell after the viewer does not run")
    assert notebook.foreign == [], f"the page sent requests to other machines: {notebook.foreign}"


def shot(notebook: Visit) -> Pixels | None:
    """What itkwidgets draws, as displayed, without its controls at the left and below; None before it is there."""
    window = notebook.cell("show").locator("iframe")
    return pixels(window.first.screenshot())[:550, 440:] if window.count() else None
