"""The generated patients: how many per second, how they are distributed beside real ones, and how they look.

    .venv/bin/python benchmarks/phantom.py                        # patients per second, 64 x 64 x 64, cold cache
    .venv/bin/python benchmarks/phantom.py measure --real DIR     # distributions, beside a folder in the BraTS layout
    .venv/bin/python benchmarks/phantom.py sheet                  # 60 patients in three planes

`measure` and `sheet` write the figures of docs/phantom.md. Of real patients only distributions are drawn.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common import RESULTS, write
from fedlab.core.workers import available_cores
from fedlab.data.brain import bounding_box
from fedlab.data.phantom.anatomy import Grid
from fedlab.data.phantom.generator import generate_patient, make_cohort
from fedlab.data.phantom.population import site_profiles

PATIENTS = 48
SITES, PER_SITE, SEED = 13, 8, 0
FINE = Grid(shape=(96, 96, 96), spacing_mm=2.0)
LABELS = {"oedema": 2, "non-enhancing": 1, "enhancing": 4}
COLOURS = {1: (0.85, 0.33, 0.25), 2: (0.2, 0.7, 0.55), 4: (0.95, 0.8, 0.25)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="speed", choices=["speed", "measure", "sheet"])
    parser.add_argument("--real", type=Path, help="folder of real patients in the BraTS layout, for measure")
    options = parser.parse_args()
    {"speed": speed, "measure": lambda: measure(options.real), "sheet": sheet}[options.what]()


def speed() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        def generate(seed: int) -> float:
            started = time.perf_counter()
            make_cohort(sites=4, patients=PATIENTS, shape=(64, 64, 64), seed=seed, cache=Path(scratch))
            return time.perf_counter() - started

        first, second = generate(0), generate(1)  # the first also resamples the template and starts the imports
    write("phantom", {"patients": PATIENTS, "cores": available_cores(), "seconds with everything cold": round(first, 1),
                      "seconds": round(second, 1), "patients per second": round(PATIENTS / second, 2)})


def generated(per_site: int) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Images and labels of the first patients of 13 default sites at 2 mm."""
    for site, profile in enumerate(site_profiles(SITES, SEED), 1):
        for index in range(per_site):
            raw = generate_patient(seed=SEED, site=f"site-{site:02d}", index=index, profile=profile, grid=FINE)
            yield raw.image.numpy().astype(np.float32), raw.label.numpy()


def real(folder: Path) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Images and labels of real patients at 2 mm, axes right, anterior, superior."""
    import nibabel

    for patient in sorted(path for path in folder.iterdir() if path.is_dir()):
        def volume(kind: str, patient: Path = patient) -> NDArray[Any]:
            image = nibabel.as_closest_canonical(nibabel.load(patient / f"{patient.name}_{kind}.nii.gz"))
            assert np.allclose(image.header.get_zooms(), 2.0), f"{patient} is not at 2 mm"
            return np.asarray(image.dataobj)

        yield np.stack([volume(kind) for kind in ("flair", "t1", "t1ce", "t2")]).astype(np.float32), volume("seg")


def describe(image: NDArray[Any], label: NDArray[Any], spacing_mm: float = 2.0) -> dict[str, float]:
    """One patient's volumes, shares, foci, form and contrasts."""
    from scipy import ndimage

    whole, ml = label > 0, spacing_mm**3 / 1000
    row = {"whole tumour [ml]": whole.sum() * ml}
    row |= {f"share of {name}": (label == value).sum() / whole.sum() for name, value in LABELS.items()}
    parts, _ = ndimage.label(whole)
    row["parts above 1 ml"] = int((np.bincount(parts.ravel())[1:] * ml > 1).sum())
    areas = [whole.sum(tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    row["outermost slice"] = max(float(a[a > 0][end] / a.max()) for a in areas for end in (0, -1))
    smooth = ndimage.gaussian_filter(whole.astype(np.float32), 1.0)
    surface = np.sqrt(sum(np.square(g) for g in np.gradient(smooth))).sum() * spacing_mm**2
    row["sphericity"] = np.pi ** (1 / 3) * (6 * whole.sum() * spacing_mm**3) ** (2 / 3) / surface
    brain = image[0] > 0
    for channel, sequence in enumerate(("FLAIR", "T1", "T1c", "T2")):
        values = image[channel]
        for name, value in LABELS.items():
            if (label == value).sum() * ml > 0.5:
                difference = np.median(values[label == value]) - np.median(values[brain & ~whole])
                row[f"{sequence} of {name}"] = float(difference / values[brain].std())
    return row


def measure(folder: Path | None) -> None:
    import matplotlib.pyplot as plt
    import pandas as pd

    from fedlab.view.colours import style

    style()
    ours = pd.DataFrame([describe(*pair) for pair in generated(PER_SITE)])
    theirs = pd.DataFrame([describe(*pair) for pair in real(folder)] if folder else [])
    columns = list(ours.columns)
    figure, panels = plt.subplots(3, 6, figsize=(13, 6.4), layout="constrained")
    chosen = ["whole tumour [ml]", "share of oedema", "share of non-enhancing", "share of enhancing", "sphericity",
              "outermost slice",
              *(f"{sequence} of {name}" for name in LABELS for sequence in ("FLAIR", "T1", "T1c", "T2"))]
    for panel, name in zip(panels.flat, chosen, strict=True):
        panel.hist(ours[name].dropna(), bins=16, color="#8fb3c7")
        for value in theirs[name].dropna() if name in theirs else ():
            panel.axvline(value, color="#c8553d", lw=1.2)
        panel.set_title(name, fontsize=8)
        panel.tick_params(labelsize=7)
        panel.set_yticks([])
    figure.savefig(RESULTS / "phantom_distributions.png", dpi=100)
    quantiles = ours[columns].quantile([0.05, 0.25, 0.5, 0.75, 0.95]).round(3).T
    write("phantom_distributions", {
        "patients": len(ours), "sites": SITES, "grid": "2 mm",
        "quantiles 0.05 0.25 0.5 0.75 0.95": {name: list(quantiles.loc[name]) for name in columns},
        "several parts": round(float((ours["parts above 1 ml"] > 1).mean()), 3),
        "nothing enhances": round(float((ours["share of enhancing"] == 0).mean()), 3),
        "outermost slice above 0.12": round(float((ours["outermost slice"] > 0.12).mean()), 4),
        "real patients": [{name: round(float(value), 3) for name, value in row.items()} for row in
                          theirs.to_dict("records")]})


def sheet() -> None:
    from PIL import Image

    tiles = []
    for image, label in generated(5):
        box = bounding_box(image[0] > 0)
        image, label = image[(slice(None), *box)], label[box]
        brain = image[0] > 0
        scaled = []
        for channel in (0, 2):
            low, high = np.percentile(image[channel][brain], [1, 99.5])
            scaled.append(np.clip((image[channel] - low) / (high - low), 0, 1) * brain)
        columns = []
        for axis in (2, 1, 0):
            place = int((label > 0).sum(tuple(a for a in range(3) if a != axis)).argmax())
            flair, t1c, truth = (np.flipud(np.take(v, place, axis).T) for v in (*scaled, label))
            columns.append(np.concatenate([_framed(_outlined(flair, truth)), _framed(np.stack([t1c] * 3, -1))]))
        tiles.append(np.concatenate(columns, 1))
    rows = [np.concatenate(tiles[start:start + 5], 1) for start in range(0, 60, 5)]
    picture = Image.fromarray((np.concatenate(rows) * 255).astype(np.uint8))
    picture.quantize(64).save(RESULTS / "phantom_sheet.png", optimize=True)


def _outlined(flair: NDArray[Any], truth: NDArray[Any]) -> NDArray[Any]:
    """A slice in grey with the outlines of the label's parts in colour."""
    from scipy import ndimage

    out = np.stack([flair] * 3, -1)
    for value, colour in COLOURS.items():
        part = truth == value
        out[part & ~ndimage.binary_erosion(part)] = colour
    return out


def _framed(picture: NDArray[Any], size: int = 96) -> NDArray[Any]:
    """A picture in the middle of a black square."""
    out = torch.zeros(size, size, 3).numpy()
    height, width = (min(n, size) for n in picture.shape[:2])
    y, x = (size - height) // 2, (size - width) // 2
    out[y:y + height, x:x + width] = picture[:height, :width]
    return out


if __name__ == "__main__":
    main()
