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

__all__ = ["Folder", "Phantoms", "equal_sizes"]


@dataclass(frozen=True, kw_only=True)
class Phantoms:
    """Generated patients as the data of a job; see `fedlab.data.phantom.generator.make_cohort`.

    Args:
        sizes: patients of each site, held-out patients included. The default has 51 patients to train on, of whom three
            sites have three each, and 48 held out.
        held_out: patients held out per site, or their share.

    Raises:
        ValueError: a site with fewer than two patients, or a grid too small for a brain.
    """

    sizes: tuple[int, ...] = (22, 16, 13, 11, 10, 9, 9, 9)
    shape: tuple[int, int, int] = (48, 64, 48)
    spacing_mm: float = 3.0
    held_out: int | float = 6

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ValueError("a comparison needs at least one site, got none")
        if min(self.sizes) < 2:
            raise ValueError(f"a site needs at least two patients, one to train on and one to hold out; got the sizes "
                             f"{', '.join(map(str, self.sizes))}")
        Grid(shape=self.shape, spacing_mm=self.spacing_mm)

    def state(self) -> str:
        """Empty: no file is read."""
        return ""

    def prepare(self, *, seed: int, workers: Workers) -> list[Site]:
        return make_cohort(sizes=self.sizes, shape=self.shape, spacing_mm=self.spacing_mm, seed=seed,
                           held_out=self.held_out, workers=workers)


def equal_sizes(sites: int, patients: int) -> tuple[int, ...]:
    """Patients of each of `sites` sites of one size.

    Raises:
        ValueError: no site, or patients that do not divide into the sites.
    """
    if sites < 1:
        raise ValueError(f"a comparison needs at least one site, got {sites}")
    if patients < 2 * sites:
        raise ValueError(f"{sites} sites need at least {2 * sites} patients, one each to train on and one to hold out; "
                         f"got {patients}")
    if patients % sites:
        raise ValueError(f"{patients} patients do not divide into {sites} equal sites; "
                         f"use {patients // sites * sites} patients")
    return (patients // sites,) * sites


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
