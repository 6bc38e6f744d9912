"""Makes the three pictures of the README: the viewer, the dashboard and the playground, as JupyterLab shows them.

    python tests/browser/pictures.py [--out docs/pictures]

They are photographs of a browser that runs this checkout, so run this again when one of the three looks otherwise.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import nbformat
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from lab import BRAIN, Lab, Visit, chromium, differing, grey, pixels, wait_for

REPOSITORY = Path(__file__).resolve().parents[2]
WINDOW = {"width": 1250, "height": 1700}  # tall enough for the whole of each output
WIDTH, COLOURS = 1000, 256  # pixels of a picture, and colours of its palette
CELLS = {
    "start": """
import fedlab as fl
sites = fl.make_cohort(sizes=(7, 6, 5), held_out=2, shape=(48, 64, 48), seed=0, workers=0, progress=False)
model = fl.public_model("collection")
patient = max((one for site in sites for one in site.val), key=lambda one: float((one.label == 4).sum()))
found = fl.core.regions_to_labels(fl.predict(model, patient) >= 0.5)
trainer = fl.SiteTrainer(model=model, steps=4, clip_norm=1.0, tumour_share=0.5,
                         lr=fl.training.CosineDecay(start=2e-3, rounds=10, warmup=1))
noise = fl.DPSGD(clip=1.0, noise_multiplier=2.0, sample_rate=0.5, delta=1e-2)
at_one = fl.privacy.AtSites(sites=[sites[0].name], technique=noise)""",
    "viewer": 'fl.show(patient, {"model": found}, arm="model", modality="T1c")',
    "dashboard": """
run = fl.view.BackgroundRun(trainer, sites, rounds=10, seed=0, privacy=at_one, validate=fl.view.SiteDice(sites=sites))
fl.RunDashboard(run.start())""",
    "wait": "history = run.wait()",
    "playground": "fl.view.PrivacyPlayground()",
}


def settled(cell: Any, *, seconds: float) -> bytes:
    """A screenshot of a cell's output once it has not changed for some seconds."""
    output = cell.locator(".jp-OutputArea-output").last
    shots = [output.screenshot()]

    def still() -> bool:
        time.sleep(seconds)
        shots.append(output.screenshot())
        return differing(pixels(shots[-1]), pixels(shots[-2])) == 0

    wait_for(still, seconds=600, why="the picture keeps changing")
    return shots[-1]


def small(png: bytes) -> Image.Image:
    """A picture of the width and with the colours that the README needs."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    size = (WIDTH, round(picture.height * WIDTH / picture.width))
    return picture.resize(size, Image.Resampling.LANCZOS).quantize(COLOURS, kmeans=3, dither=Image.Dither.NONE)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the three pictures of the README in a browser.")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "docs" / "pictures", help="the folder of the pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fedlab-") as place, chromium() as browser:
        folder = Path(place) / "notebooks"
        folder.mkdir()
        cells = [new_code_cell(source.strip(), id=name) for name, source in CELLS.items()]
        python = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        nbformat.write(new_notebook(cells=cells, metadata=python), folder / "pictures.ipynb")
        lab = Lab(Path(place), folder)
        try:
            lab.wait()
            visit = Visit(browser, lab, "pictures.ipynb")
            visit.page.set_viewport_size(WINDOW)
            visit.run_all()
            wait_for(visit.finished, seconds=900, why="the cells have not finished")
            viewer = visit.cell("viewer")
            wait_for(lambda: grey(pixels(viewer.locator("canvas").first.screenshot())) > BRAIN, seconds=120,
                     why="there is no brain in the viewer")
            for name, seconds in (("viewer", 1.0), ("dashboard", 1.0), ("playground", 10.0)):
                file = out / f"{name}.png"
                small(settled(visit.cell(name), seconds=seconds)).save(file, optimize=True)
                print(f"{file}: {file.stat().st_size / 1e3:.0f} kB", flush=True)
            visit.close()
        finally:
            lab.stop()


if __name__ == "__main__":
    matplotlib.use("Agg")
    main()
