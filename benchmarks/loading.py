"""Does loading bound training? What a batch costs to load against what it costs to train on.

    .venv/bin/python benchmarks/loading.py

Patients are generated. Reading is timed on one of them blown up to the grid of a BraTS release, 240 x 240 x 155 voxels
of 1 mm, gzip-compressed int16 with noise, and then on every step of the demo's default training.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import nibabel as nib
import numpy as np
import torch

from common import write
from fedlab.apps.comparison import Job
from fedlab.apps.comparison_data import Phantoms
from fedlab.core.types import ServerState, Site, SiteState
from fedlab.data.phantom.generator import make_cohort, write_brats
from fedlab.data.readers.folders import find_patients, read_cohort
from fedlab.training.trainer import SiteTrainer

STEPS = 20


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Median processor time after one warm-up: it is the same on a busy machine."""
    work()
    times = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return median(times)


def full_size(source: Path, target: Path) -> None:
    """A generated patient of 3 mm as a BraTS release would hold it: 1 mm, the whole field of view, noise."""
    rng = np.random.default_rng(0)
    for path in sorted(source.glob("*.nii.gz")):
        image = nib.load(path)
        fine = np.asanyarray(image.dataobj).repeat(3, 0).repeat(3, 1).repeat(3, 2)
        if "_seg" not in path.name:
            fine = np.where(fine > 0, fine + rng.integers(0, 16, fine.shape), 0)
        out = np.zeros((240, 240, 155), dtype=image.get_data_dtype())
        cut = [min(a, b) for a, b in zip(out.shape, fine.shape, strict=True)]
        out[: cut[0], : cut[1], : cut[2]] = fine[: cut[0], : cut[1], : cut[2]]
        target.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(out, np.diag([-1.0, -1.0, 1.0, 1.0])), target / path.name)


def steps(trainer: SiteTrainer, site: Site) -> tuple[float, float]:
    """Seconds of a step's loading, and of a whole step."""
    state = ServerState(round=0, params=trainer.initial())

    def load() -> None:
        for _ in trainer.prepare(site, state, site_state=SiteState(), seed=0).loader:
            pass

    def train() -> None:
        own = SiteState()
        trainer.fit(trainer.prepare(site, state, site_state=own, seed=0), site, state, site_state=own, seed=0)

    prepare = seconds(lambda: trainer.prepare(site, state, site_state=SiteState(), seed=0))
    return (seconds(load) - prepare) / STEPS, (seconds(train) - prepare) / STEPS


def main() -> None:
    torch.set_num_threads(1)  # as in the worker processes
    result: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        (site,) = make_cohort(sites=1, patients=8, shape=Phantoms.shape, cache=base / "cache", workers=0, held_out=0)
        demo = Job(source=Phantoms()).trainer()
        for name, crop in (("demo: 32 voxels", demo.crop), ("24 voxels", (24, 24, 24))):
            trainer = SiteTrainer(model=demo.model, lr=1e-3, steps=STEPS, crop=crop, augment=demo.augment,
                                  tumour_share=demo.tumour_share)
            loading, step = steps(trainer, site)
            result[name] = {"ms to load a batch": round(1000 * loading, 2), "ms of a step": round(1000 * step, 2),
                            "loading / the rest of a step": round(loading / (step - loading), 3)}
        write_brats(base / "small", sites=1, patients=2, shape=Phantoms.shape, cache=base / "cache", workers=0)
        name = min(find_patients(base / "small"))
        full_size(base / "small" / name, base / "big" / name)
        kept = read_cohort(base / "big", spacing_mm=3.0, cache=base / "kept", progress=False)
        cold = seconds(lambda: read_cohort(base / "big", spacing_mm=3.0, examine=False, progress=False)[0])
        job = Job(source=Phantoms())
        trained_on = sum(Phantoms.sizes) - len(Phantoms.sizes) * int(Phantoms.held_out)
        crops = len(Phantoms.sizes) * job.rounds * job.steps * job.batch_size / trained_on
        own = result["demo: 32 voxels"]["ms of a step"] / 1000 / demo.batch_size * crops  # type: ignore[index]
        result["reading a patient of 240 x 240 x 155"] = {
            "s from the scans to 3 mm": round(cold, 2), "s from the cache": round(seconds(lambda: kept[0]), 4),
            "crops of a patient in a demo": round(crops),
            "from the scans / one arm's training on the patient": round(cold / own, 2)}
    write("loading", result)


if __name__ == "__main__":
    main()
