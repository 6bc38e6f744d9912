"""The two sources of a comparison's data: generated patients, or a folder of scans."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlab.core.types import Site
from fedlab.core.workers import Workers
from fedlab.data.cache import file_state
from fedlab.data.phantom.anatomy import Grid
from fedlab.data.phantom.generator import make_cohort
from fedlab.data.readers.folders import find_patients, read_sites

__all__ = ["Folder", "Phantoms"]


@dataclass(frozen=True, kw_only=True)
class Phantoms:
    """Generated patients as the data of a job; see `fedlab.data.phantom.generator.make_cohort`.

    Args:
        patients: of all sites together.
        equal: whether all sites have the same number of patients; otherwise sizes are as unequal as in a real study.

    Raises:
        ValueError: numbers that contradict each other, or a grid too small for a brain.
    """

    sites: int = 4
    patients: int = 72
    shape: tuple[int, int, int] = (48, 64, 48)
    spacing_mm: float = 3.0
    held_out: int | float = 1 / 3
    equal: bool = True

    def __post_init__(self) -> None:
        if self.sites < 1:
            raise ValueError(f"a comparison needs at least one site, got {self.sites}")
        if self.patients < 2 * self.sites:
            raise ValueError(f"{self.sites} sites need at least {2 * self.sites} patients, one each to train on and "
                             f"one to hold out; got {self.patients}")
        if self.equal and self.patients % self.sites:
            raise ValueError(f"{self.patients} patients do not divide into {self.sites} equal sites; "
                             f"use {self.patients // self.sites * self.sites} patients")
        Grid(shape=self.shape, spacing_mm=self.spacing_mm)

    def state(self) -> str:
        """Empty: no file is read."""
        return ""

    def prepare(self, *, seed: int, workers: Workers) -> list[Site]:
        sizes = [self.patients // self.sites] * self.sites if self.equal else None
        return make_cohort(sites=self.sites, patients=self.patients, shape=self.shape, spacing_mm=self.spacing_mm,
                           seed=seed, held_out=self.held_out, sizes=sizes, workers=workers)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder of scans and its institution table as the data of a job; see `fedlab.data.readers.folders.read_sites`.

    Args:
        data: the folder, or a CSV table of paths.
        table: the institution table.
        skip_broken: whether to leave out patients whose files have errors.

    Raises:
        ValueError: an invalid voxel size.
    """

    data: str
    table: str
    spacing_mm: float = 3.0
    held_out: int | float = 0.2
    layout: str | None = None
    label_convention: str | None = None
    skip_broken: bool = False

    def __post_init__(self) -> None:
        if not 0.1 <= self.spacing_mm <= 20:
            raise ValueError(f"spacing_mm lies between 0.1 and 20 mm, got {self.spacing_mm}")

    @property
    def reading(self) -> dict[str, Any]:
        """How the folder is read, as arguments of `read_sites` and `check_sites`."""
        return {"layout": self.layout, "label_convention": self.label_convention,
                "broken": "skip" if self.skip_broken else "raise"}

    def state(self) -> str:
        """A hash that changes when a scan, a label map or the table is written or replaced.

        Raises:
            DataError: the folder cannot be read.
        """
        patients = find_patients(self.data, **self.reading).values()
        files = {Path(self.table), *(path for p in patients for path in (*p.images.values(), p.label) if path)}
        return hashlib.sha256(json.dumps(sorted(map(file_state, files))).encode()).hexdigest()

    def prepare(self, *, seed: int, workers: Workers) -> list[Site]:
        return read_sites(self.data, self.table, spacing_mm=self.spacing_mm, held_out=self.held_out, seed=seed,
                          **self.reading)
