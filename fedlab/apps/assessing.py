"""The command `fedlab assess`: evidence on the techniques of a file, in a run directory."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fedlab.apps.comparison import Job, sole_use
from fedlab.apps.comparison_data import Phantoms
from fedlab.core.errors import RunError
from fedlab.core.files import write_json, write_whole
from fedlab.core.workers import Workers
from fedlab.evidence.assessment import assess
from fedlab.evidence.presets import presets
from fedlab.evidence.report import Evidence

__all__ = ["assess_file"]


def assess_file(job: Job, out: Path, *, file: Path | None = None, seeds: int = 3, progress: bool = True) -> Evidence:
    """Assesses the techniques of a file; writes page.html, evidence.json and scores.csv, and continues what is there.

    Args:
        job: its source, rounds and trainer. Generated patients are new ones in every seed.
        out: the run directory.
        file: of Python, with a dictionary `techniques`, or a function of that name of the sites and the trainer, and
            perhaps a `trainer` and a dictionary `attacks`; `fedlab.evidence.presets` without one.
        seeds: number of trainings of each technique.

    Raises:
        RunError: the file defines no techniques, the folder holds a finished assessment, or another process works in
            it.
        ValueError: as of `fedlab.evidence.assess`.
    """
    if (out / "page.html").is_file():
        raise RunError(f"{out} holds a finished assessment, {out / 'page.html'}; choose another --out")
    given = _read(file)
    trainer = given.get("trainer") or job.trainer()
    techniques = given.get("techniques", partial(presets, rounds=job.rounds))
    generated = isinstance(job.source, Phantoms)
    out.mkdir(parents=True, exist_ok=True)
    with sole_use(out):
        with Workers() as workers:
            sites = [job.source.prepare(seed=seed, workers=workers) for seed in range(seeds if generated else 1)]
        found = assess(techniques(sites[0], trainer) if callable(techniques) else techniques,
                       sites.__getitem__ if generated else sites[0], trainer, rounds=job.rounds, seeds=seeds,
                       attacks=given.get("attacks"), public=generated, out=out / "arms", progress=progress)
        write_whole(out / "scores.csv", found.scores.to_csv(index=False).encode())
        write_json(out / "evidence.json", found.as_json())
        found.save(out / "page.html")
    return found


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        given = runpy.run_path(str(path))
        techniques = given["techniques"]
    except Exception as error:
        raise RunError(f"{path} defines no techniques ({type(error).__name__}: {error}); expected a dictionary "
                       "`techniques` by name, or a function techniques(sites, trainer) that returns one") from error
    if not isinstance(techniques, Mapping) and not callable(techniques):
        raise RunError(f"{path}: techniques is {techniques!r}, expected a dictionary by name, or a function")
    return given
