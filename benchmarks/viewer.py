"""The viewer on a patient of BraTS's size, 240 x 240 x 155 at 1 mm, in Chromium with WebGL in software.

    .venv/bin/python benchmarks/viewer.py [--times 3]

Times are from the moment the kernel begins with the cell to what can be seen on the page of JupyterLab: a first
picture, and the tumour in all four views of the canvas. Writes `benchmarks/results/viewer.json` and the last
screenshot beside it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

from common import RESULTS, write

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "browser"))
from lab import Lab, Visit, chromium, coloured, grey, tiles, wait_for

PATIENT = """
import numpy as np, torch, torch.nn.functional as F
import fedlab as fl
(site,) = fl.make_cohort(sizes=(1,), held_out=0, shape=(48, 64, 48), spacing_mm=3.0, seed=0, workers=0, progress=False)
small = site.train[0]
room = (48, 48, 24, 24, 5, 6)  # 144 x 192 x 144 voxels of 1 mm, in the field of view of a release of BraTS
image = F.pad(F.interpolate(small.image[None].float(), scale_factor=3, mode="trilinear")[0], room)
label = F.pad(F.interpolate(small.label[None, None].float(), scale_factor=3)[0, 0], room).to(torch.uint8)
patient = fl.Patient(small.id, image, label, np.diag([1.0, 1.0, 1.0, 1.0]))
shifted = {"federated": label.roll(4, 0), "pooled": label.roll(2, 1)}
tuple(patient.image.shape)
"""

CELLS = {"static": "fl.show(patient, shifted, backend='static')", "show": "fl.show(patient, shifted)"}


#: Notes, by the clock, when each picture in an output was first painted; to find out by screenshots takes seconds.
PAINTED = """() => { window.painted = []; const seen = new WeakSet(); const look = () => {
    for (const image of document.querySelectorAll(".jp-OutputArea-output img"))
        if (!seen.has(image) && image.complete && image.naturalWidth > 100) {
            seen.add(image);
            requestAnimationFrame(() => requestAnimationFrame(() => window.painted.push(Date.now() / 1000)));
        }
    setTimeout(look, 20); }; look(); }"""


def first_picture(notebook: Visit, name: str) -> float | None:
    """When the first picture was painted, in seconds of the clock; scrolls to the cell, or nothing is."""
    notebook.cell(name)
    painted = notebook.page.evaluate("() => window.painted")
    return painted[0] if painted else None


def complete(notebook: Visit) -> bool:
    """Whether each of the views of the canvas shows a brain and a tumour."""
    canvas = notebook.cell("show").locator("canvas")
    if not canvas.count() or not canvas.first.is_visible():
        return False
    views = tiles(canvas.first)
    return len(views) >= 4 and all(coloured(view) > 100 and grey(view) > 1000 for view in views.values())


def timed(browser: Any, lab: Lab, folder: Path, name: str) -> dict[str, float]:
    """Runs a notebook with one of `CELLS` and times what its cell shows."""
    cells = [new_code_cell(PATIENT.strip(), id="patient"), new_code_cell(CELLS[name], id=name)]
    python = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(new_notebook(cells=cells, metadata=python), folder / f"{name}.ipynb")
    notebook = Visit(browser, lab, f"{name}.ipynb")
    found = {}
    try:
        notebook.page.evaluate(PAINTED)
        notebook.run_all()
        wait_for(lambda: first_picture(notebook, name), seconds=90, why=f"no picture of {name}")
        found[f"{name}: first picture"] = first_picture(notebook, name) - notebook.began(name)
        if name == "show":
            wait_for(lambda: complete(notebook), seconds=90, why="the 3-D view doesn't come")
            found["show: all four views"] = time.time() - notebook.began(name)
            (RESULTS / "viewer.png").write_bytes(notebook.cell(name).screenshot())
        notebook.check_quiet()
    finally:
        notebook.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, chromium() as browser:
        folder = Path(scratch) / "notebooks"
        folder.mkdir()
        lab = Lab(Path(scratch), folder)
        try:
            lab.wait()
            runs = [{what: seconds for name in CELLS for what, seconds in timed(browser, lab, folder, name).items()}
                    for _ in range(options.times)]
        finally:
            lab.stop()
    write("viewer", {"grid": [240, 240, 155], "times": options.times, "seconds, median": {
        what: round(statistics.median(run[what] for run in runs), 2) for what in runs[0]}})


if __name__ == "__main__":
    main()
