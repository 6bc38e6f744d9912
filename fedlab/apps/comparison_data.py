"""Where the data of a job come from: generated, or a folder of scans."""

from __future__ import annotations

from dataclasses import dataclass

from fedlab.core.types import Site
from fedlab.core.workers import Workers
from fedlab.data.phantom.anatomy import Grid
from fedlab.data.phantom.cohort import make_cohort
from fedlab.data.readers.brats import read_sites

__all__ = ["Folder", "Phantoms"]


@dataclass(frozen=True, kw_only=True)
class Phantoms:
    """A generated cohort as the data of a job; see `fedlab.data.phantom.cohort.make_cohort`.

    Args:
        sites: number of sites.
        patients: of all sites together.
        shape: voxels of the common grid.
        spacing_mm: edge of a voxel in mm.
        held_out: patients that each site holds out, a number or a share.
        equal: whether all sites have the same number of patients, else sizes as unequal as in a real study.

    Raises:
        ValueError: numbers that do not fit each other, or a grid that does not hold a brain.
    """

    sites: int = 4
    patients: int = 72
    shape: tuple[int, int, int] = (48, 64, 48)
    spacing_mm: float = 3.0
    held_out: int | float = 1 / 3
    equal: bool = True

    def __post_init__(self) -> None:
        if self.sites < 1:
            raise ValueError(f"a cohort has at least one site, got {self.sites}")
        if self.patients < 2 * self.sites:
            raise ValueError(f"{self.sites} sites need at least {2 * self.sites} patients, one each to train on and "
                             f"one to hold out; got {self.patients}")
        if self.equal and self.patients % self.sites:
            raise ValueError(f"{self.patients} patients do not divide into {self.sites} equal sites; "
                             f"use {self.patients // self.sites * self.sites} patients")
        Grid(shape=self.shape, spacing_mm=self.spacing_mm)

    def prepare(self, *, seed: int, workers: Workers) -> list[Site]:
        sizes = [self.patients // self.sites] * self.sites if self.equal else None
        return make_cohort(sites=self.sites, patients=self.patients, shape=self.shape, spacing_mm=self.spacing_mm,
                           seed=seed, held_out=self.held_out, sizes=sizes, workers=workers)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder of scans and its institution table as the data of a job; see `fedlab.data.readers.brats.read_sites`.

    Args:
        data: folder in one of `fedlab.data.readers.layouts.LAYOUTS`, or a CSV table of paths.
        table: CSV file with the columns Partition_ID and Subject_ID.
        spacing_mm: edge of a voxel in mm.
        held_out: patients that each site holds out, a number or a share.
        layout: where it can't be found out.
        label_convention: one of `fedlab.data.readers.conventions.CONVENTIONS`, where it can't be found out.
        skip_broken: whether to go on without patients whose files have errors.

    Raises:
        ValueError: a voxel size that is none.
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

    def prepare(self, *, seed: int, workers: Workers) -> list[Site]:
        return read_sites(self.data, self.table, spacing_mm=self.spacing_mm, held_out=self.held_out, seed=seed,
                          layout=self.layout, label_convention=self.label_convention,
                          broken="skip" if self.skip_broken else "raise")
