"""The command `fedlab assess`: evidence on the techniques of a file, in a run directory."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedlab.apps.comparison import sole_use
from fedlab.apps.comparison_data import Folder, Phantoms
from fedlab.core.errors import RunError
from fedlab.core.files import write_json, write_whole
from fedlab.core.workers import Workers
from fedlab.evidence.assessment import assess
from fedlab.evidence.presets import presets
from fedlab.evidence.report import Evidence
from fedlab.training.public_model import public_model
from fedlab.training.trainer import SiteTrainer, augmentation

__all__ = ["Assessment", "assess_file"]


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """The settings of `fedlab assess`.

    Args:
        source: of the patients; generated ones are new in every seed.
        file: of Python, with a dictionary `techniques`, or a function of that name of the sites and the trainer, and
            if it likes a `trainer`; the presets without one.
        rounds, seeds: as of `fedlab.evidence.assess`.
        steps: of a site per round, where the file brings no trainer.
    """

    source: Phantoms | Folder
    file: Path | None = None
    rounds: int = 10
    steps: int = 10
    seeds: int = 3


def assess_file(settings: Assessment, out: Path, *, progress: bool = True) -> Evidence:
    """Assesses the techniques of a file; writes page.html, evidence.json and scores.csv, and continues what is there.

    Raises:
        RunError: the file defines no techniques, the folder holds a finished assessment, or another process works in
            it.
        ValueError: as of `fedlab.evidence.assess`.
    """
    if (out / "page.html").is_file():
        raise RunError(f"{out} holds a finished assessment, {out / 'page.html'}; choose another --out")
    given = _read(settings.file)
    trainer = given.get("trainer") or SiteTrainer(
        model=public_model("collection"), steps=settings.steps, lr=1e-3, batch_size=2, crop=(24, 24, 24),
        tumour_share=0.5, augment=augmentation(flips=(0,)))
    techniques = given.get("techniques", partial(presets, rounds=settings.rounds))
    out.mkdir(parents=True, exist_ok=True)
    with sole_use(out):
        with Workers() as workers:
            sites = {seed: settings.source.prepare(seed=seed, workers=workers) for seed in (
                range(settings.seeds) if isinstance(settings.source, Phantoms) else (0,))}
        first = sites[0]
        found = assess(techniques(first, trainer) if callable(techniques) else techniques,
                       sites.__getitem__ if len(sites) > 1 else first, trainer, rounds=settings.rounds,
                       seeds=settings.seeds, public=isinstance(settings.source, Phantoms), out=out / "arms",
                       progress=progress)
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
