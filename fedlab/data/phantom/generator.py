"""Generated patients that need no download: gliomas in real human anatomy, scanned at very different sites.

Every patient is the MNI152 anatomy deformed (`fedlab.data.phantom.anatomy`), with a tumour grown in it
(`fedlab.data.phantom.tumour`), imaged by the site's scanner (`fedlab.data.phantom.contrast`). The same seed, site and
number give the same patient.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from fedlab.core.errors import DataError
from fedlab.core.seeds import derive
from fedlab.core.text import counted
from fedlab.core.types import Patient, Site
from fedlab.core.workers import Workers, script_not_imported
from fedlab.data.brain import bounding_box, normalise
from fedlab.data.cache import load, path_of, store
from fedlab.data.phantom.anatomy import (
    BRAIN_MM,
    CENTRE_MM,
    DEPTH_MM,
    Grid,
    build_atlas,
    centred,
    draw_tissue,
    draw_warp,
    sample_atlas,
    smooth_fields,
)
from fedlab.data.phantom.contrast import acquire
from fedlab.data.phantom.population import Growth, SiteProfile, draw_growth, site_profiles, site_sizes
from fedlab.data.phantom.tumour import Tumour, draw_seeds, grow, mass_effect, pressure, segment

__all__ = ["DISTRACTORS", "RawPatient", "SiteProfile", "generate_patient", "make_cohort", "site_profiles", "site_sizes",
           "write_brats"]

#: Changes whenever the same settings would give other patients; part of every cache key.
GENERATOR = "fedlab-phantom-38"
#: What resembles a tumour, by its number in `RawPatient.distractors`.
DISTRACTORS = {1: "white-matter hyperintensity", 2: "scar", 3: "choroid plexus", 4: "meninges", 5: "fat", 6: "vessel"}
_NAMES = ("lesion", "scar", "choroid", "meninges", "fat", "blood")  # the tissues of these numbers
_FILES = ("flair", "t1", "t1ce", "t2")


@dataclass(frozen=True, eq=False)
class RawPatient:
    """A generated patient as delivered by a scanner and an expert.

    Attributes:
        id: "<site>-<number>".
        image: int16, shape (4, X, Y, Z), order of `fedlab.core.types.MODALITIES`; > 0 in the brain, 0 outside.
        label: uint8, shape (X, Y, Z), BraTS labels.
        affine: voxel index -> mm in RAS, shape (4, 4).
        distractors: uint8, shape (X, Y, Z): what resembles a tumour and is none, numbered as in `DISTRACTORS`.
    """

    id: str
    image: torch.Tensor
    label: torch.Tensor
    affine: NDArray[np.float64]
    distractors: torch.Tensor

    def prepared(self) -> Patient:
        """The patient for a network: z-scored over the brain, float16."""
        with _one_thread():
            image = normalise(self.image.float(), self.image[0] > 0).half()
        return Patient(self.id, image, self.label, self.affine)


@dataclass(frozen=True, kw_only=True)
class _Order:
    """Everything that determines one patient."""

    seed: int
    site: str
    index: int
    profile: SiteProfile
    grid: Grid

    @property
    def id(self) -> str:
        return f"{self.site}-{self.index:03d}"

    @property
    def settings(self) -> str:
        return json.dumps({"what": "patient", "order": repr(self), **_versions()}, sort_keys=True)


def generate_patient(*, seed: int, site: str, index: int, profile: SiteProfile, grid: Grid,
                     cache: Path | None = None) -> RawPatient:
    """One patient, bit-equal for equal arguments.

    Args:
        seed: of all patients.
        index: number of the patient at the site, from 0.
        cache: folder that stores the resampled template; see `make_cohort`.

    Raises:
        DataError: no tumour grew, which the ranges of the parameters should exclude.
    """
    order = _Order(seed=seed, site=site, index=index, profile=profile, grid=grid)
    rng = np.random.default_rng(derive(seed, "patient", site, index))
    atlas, affine = _atlas(grid.spacing_mm, _folder(cache))
    with _one_thread():
        growth = draw_growth(rng, profile.population)
        warp = centred(draw_warp(rng, grid), atlas, affine)
        half = warp(grid.coordinates(2))
        good = _white_matter(sample_atlas(atlas, affine, half, ("white", "depth")), half, grid, growth)
        seeds = draw_seeds(rng, good, growth)
        centre = seeds[0]
        pushed = warp(mass_effect(grid.coordinates(2), centre, growth))
        work = _crop(grid, sample_atlas(atlas, affine, pushed, ("brain",)))
        points = work.coordinates()
        positions = warp(mass_effect(points, centre, growth))
        maps = sample_atlas(atlas, affine, positions)
        tissue, brain = draw_tissue(rng, maps, positions, work, rim=profile.scanner.rim, scalp=profile.scanner.scalp,
                                    lesions=profile.population.lesions, age=profile.population.age,
                                    press=pressure(points, centre, growth))
        across = positions[0] + CENTRE_MM[0]
        grey = tissue["grey"] + tissue["deep_grey"]
        grown = grow(rng, tissue["white"], grey, across, growth, work.spacing_mm, seeds)
        tumour = segment(rng, grown, {
            "white": tissue["white"], "cortex": tissue["grey"], "csf": tissue["csf"], "ventricle": maps["ventricle"],
            "brain": brain.float(), "depth": maps["depth"] * DEPTH_MM}, across, growth, work.spacing_mm)
        if not (tumour.label * brain).any():
            raise DataError(f"patient {order.id} of seed {seed} has no tumour: {growth}")
        fractions = _with_tumour(rng, tissue, tumour, growth, work)
        image = acquire(rng, fractions, profile.scanner, work.spacing_mm, maps["detail"] * 2 - 1, growth.look)
        scale = torch.from_numpy(rng.uniform(250, 700, 4).astype(np.float32)).view(4, 1, 1, 1)
        image = (image * scale).round().clamp(1, 32767) * brain
    pad = [n for big, small in zip(grid.shape[::-1], work.shape[::-1], strict=True) for n in [(big - small) // 2] * 2]
    image, label, others = (torch.nn.functional.pad(volume, pad) for volume in (
        image.to(torch.int16), tumour.label * brain, _distractors(fractions, tumour)))
    return RawPatient(order.id, image, label, grid.affine, others)


def _crop(grid: Grid, maps: Mapping[str, torch.Tensor]) -> Grid:
    """The smallest grid with the same centre that holds the brain: half the voxels, half the work."""
    inside = (maps["brain"] > 0.02).nonzero()
    shape = []
    for axis, n in enumerate(grid.shape):
        middle = (maps["brain"].shape[axis] - 1) / 2
        reach = 2 * float((inside[:, axis] - middle).abs().max()) + 3
        # Not smaller than a grid may be; an even number of voxels is removed, so that the centre stays.
        need = max(2 * reach, 0.87 * BRAIN_MM[axis] / grid.spacing_mm + 1)
        shape.append(n - 2 * max(0, math.floor((n - need) / 2)))
    return Grid(shape=(shape[0], shape[1], shape[2]), spacing_mm=grid.spacing_mm)


def _white_matter(maps: Mapping[str, torch.Tensor], template: torch.Tensor, grid: Grid, growth: Growth) -> torch.Tensor:
    """Points in the white matter of the cerebrum, deeper for larger cores [mm from the grid's centre], shape (N, 3)."""
    least = min(max(6.0, 0.65 * growth.core_mm), 18.0)
    x, y, z = (template[i] + CENTRE_MM[i] for i in range(3))
    cerebrum = (z > -28) & ~((y < -25) & (z < -4)) & ((x.abs() > 10) | (z > 8))
    good = (maps["white"] > 0.45) & (maps["depth"] * DEPTH_MM > least) & cerebrum
    if not good.any():
        raise DataError(f"no white matter to seed a tumour in on {grid}")
    return grid.coordinates(2)[:, good].T


def _with_tumour(rng: np.random.Generator, tissue: Mapping[str, torch.Tensor], tumour: Tumour, growth: Growth,
                 grid: Grid) -> dict[str, torch.Tensor]:
    """The fractions with the tumour in place of the tissue it replaced; most tissues in two sub-classes."""
    inside = sum(tissue.values())
    left = 1 - (tumour.oedema + tumour.necrosis + tumour.enhancing + tumour.cavity)
    out = {name: part * left for name, part in tissue.items()}
    length = max(8.0, 0.5 * growth.core_mm)
    mixed = smooth_fields(rng, 3, grid.shape, grid.spacing_mm, length)
    broad = smooth_fields(rng, 2, grid.shape, grid.spacing_mm, 22.0)
    small = smooth_fields(rng, 2, grid.shape, grid.spacing_mm, max(5.0, grid.spacing_mm))
    out |= {"oedema": tumour.oedema * inside, "enhancing": tumour.enhancing * inside, "core": tumour.necrosis * inside,
            "cavity": tumour.cavity * inside}
    # Blood and calcium lie in clumps in the core.
    core = out["core"] + out["enhancing"]
    for name, amount, field in (("blood_products", growth.bleeding, small[0]), ("calcification", growth.calcified,
                                                                              small[1])):
        if amount > 0:
            clump = torch.sigmoid(6 * (0.8 * field + 0.6 * mixed[0] - 2.4 + 1.4 * amount)) * (core > 0.1)
            for part in ("core", "enhancing"):
                out[name] = out.get(name, 0) + out[part] * clump
                out[part] = out[part] * (1 - clump)
    shift = {"core": float(rng.normal(0, 1.5)), "oedema": float(rng.normal(-0.5, 1)), "enhancing": -0.5}
    for name, field, steep in (("core", mixed[0], 4.0), ("oedema", mixed[1], 1.5), ("enhancing", mixed[2], 3.0),
                               ("white", broad[0], 2.0), ("grey", broad[1], 2.0)):
        other = torch.sigmoid(steep * field + shift.get(name, 0.0)) * out[name]
        out[f"{name}_b"] = other
        out[name] = out[name] - other
    return out


def _distractors(fractions: Mapping[str, torch.Tensor], tumour: Tumour) -> torch.Tensor:
    """The number of the distractor that fills most of a voxel, and at least two fifths; 0 in tumour."""
    most, which = torch.stack([fractions[name] for name in _NAMES]).max(0)
    return ((which + 1) * (most >= 0.4) * (tumour.label == 0)).to(torch.uint8)


def make_cohort(*, sites: int = 13, patients: int = 285, shape: Sequence[int] = (64, 64, 64), spacing_mm: float = 3.0,
                seed: int = 0, held_out: int | float = 0.2, sizes: Sequence[int] | None = None,
                profiles: Sequence[SiteProfile] | None = None, cache: Path | str | None = None,
                workers: Executor | int | None = None, progress: bool = True) -> list[Site]:
    """Sites of very unequal size with generated patients.

    Args:
        sites: number of sites.
        patients: total number of patients, held-out patients included.
        shape: voxels along X, Y, Z.
        spacing_mm: voxel edge; 64 voxels of 3 mm hold every brain completely.
        seed: the same seed gives the same patients.
        held_out: patients of each site that are never trained on: a count, or a fraction of the site's patients
            (rounded; at least one, unless it is 0).
        sizes: patients per site, in place of `sites` and `patients`; by default the scaled profile of FeTS 2021.
        profiles: scanner and population per site; by default drawn by `site_profiles`.
        cache: folder for generated patients; by default $FEDLAB_CACHE or `.fedlab-cache` in the current folder. A
            file that does not match its settings and checksum is generated anew.
        workers: an executor, or a number of processes to start; 0 generates in this process. By default one
            process per core.
        progress: whether to show a progress bar.

    Returns:
        Sites "site-01", "site-02", ... with z-scored float16 images and uint8 labels.

    Raises:
        ValueError: settings that contradict each other.

    Example:
        >>> fl.make_cohort(sizes=(9, 5), held_out=2, shape=(32, 32, 32), spacing_mm=6.0)
        [<Site site-01: 7 patients to train on, 2 held out>, <Site site-02: 3 patients to train on, 2 held out>]
    """
    sizes = _sizes(sites, patients, held_out, sizes)
    held = [_held_out(size, held_out, number) for number, size in enumerate(sizes, 1)]
    orders = _orders(sizes, profiles, shape, spacing_mm, seed)
    raw = _generate(orders, _folder(cache), workers, progress)
    made: list[Site] = []
    for number, (size, count) in enumerate(zip(sizes, held, strict=True), 1):
        prepared = [next(raw).prepared() for _ in range(size)]
        made.append(Site(f"site-{number:02d}", prepared[count:], prepared[:count]))
    return made


def write_brats(out: Path | str, *, sites: int = 13, patients: int = 285, shape: Sequence[int] = (64, 64, 64),
                spacing_mm: float = 3.0, seed: int = 0, sizes: Sequence[int] | None = None,
                profiles: Sequence[SiteProfile] | None = None, cache: Path | str | None = None,
                workers: Executor | int | None = None, progress: bool = True) -> Path:
    """The patients of `make_cohort` as a folder in the layout of BraTS 2021, stored axes left, posterior, superior.

    Writes `<ID>/<ID>_{flair,t1,t1ce,t2,seg}.nii.gz` (int16 intensities, uint8 labels) and `partitioning.csv` with
    the columns Partition_ID (number of the site, from 1) and Subject_ID, into a new or empty folder, and returns it.
    The settings are those of `make_cohort`.

    Raises:
        DataError: `out` is not empty.
        ValueError: settings that contradict each other.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not empty; nothing is overwritten, choose another folder")
    orders = _orders(_sizes(sites, patients, 0, sizes), profiles, shape, spacing_mm, seed)
    rows = []
    for order, raw in zip(orders, _generate(orders, _folder(cache), workers, progress), strict=True):
        _write_patient(out / raw.id, raw)
        rows.append((int(order.site.removeprefix("site-")), raw.id))
    with (out / "partitioning.csv").open("x", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("Partition_ID", "Subject_ID"), *rows])
    return out


def _write_patient(folder: Path, raw: RawPatient) -> None:
    import nibabel

    folder.mkdir(parents=True)
    volumes = dict(zip(_FILES, raw.image.numpy(), strict=True)) | {"seg": raw.label.numpy()}
    for name, volume in volumes.items():
        image = nibabel.Nifti1Image(volume, raw.affine)
        image.header.set_xyzt_units("mm", "sec")
        to_lps = np.array([[0, -1], [1, -1], [2, 1]])
        nibabel.save(image.as_reoriented(to_lps), folder / f"{raw.id}_{name}.nii.gz")


def _sizes(sites: int, patients: int, held_out: int | float, sizes: Sequence[int] | None) -> Sequence[int]:
    at_least = max(2, held_out + 1) if isinstance(held_out, int) else 2
    return site_sizes(sites, patients, at_least=at_least) if sizes is None else sizes


def _orders(sizes: Sequence[int], profiles: Sequence[SiteProfile] | None, shape: Sequence[int], spacing_mm: float,
            seed: int) -> list[_Order]:
    grid = Grid(shape=cast("tuple[int, int, int]", tuple(map(int, shape))), spacing_mm=float(spacing_mm))
    if profiles is None:
        profiles = site_profiles(len(sizes), seed)
    if len(profiles) != len(sizes):
        raise ValueError(f"expected one profile per site, got {len(sizes)} sites and {len(profiles)} profiles")
    return [_Order(seed=seed, site=f"site-{number:02d}", index=index, profile=profile, grid=grid)
            for number, (size, profile) in enumerate(zip(sizes, profiles, strict=True), 1) for index in range(size)]


def _held_out(size: int, held_out: int | float, number: int) -> int:
    if size < 1:
        raise ValueError(f"site {number} has {counted(size, 'patient')}; a site needs at least one")
    if isinstance(held_out, int):
        count = held_out
    elif 0.0 <= held_out < 1.0:
        count = min(size - 1, max(1, round(size * held_out))) if held_out else 0
    else:
        raise ValueError(f"held_out must be a count or a fraction below 1, got {held_out}")
    if not 0 <= count < size:
        raise ValueError(f"site {number} has {counted(size, 'patient')}: {count} held out would leave none to train on")
    return count


def _generate(orders: Sequence[_Order], cache: Path, workers: Executor | int | None,
              progress: bool) -> Iterator[RawPatient]:
    """The ordered patients in order, from the cache where it is valid."""
    if missing := [order for order in orders if not path_of(cache, order.settings).exists()]:
        with ExitStack() as stack:
            made: Iterator[None] = map(partial(_make, cache=cache), missing)
            if workers != 0:
                pool = workers if isinstance(workers, Executor) else stack.enter_context(Workers(workers))
                made = _make_in(pool, missing, cache)
            for _ in tqdm(made, "generating patients", len(missing), unit="patient", disable=not progress):
                pass
    for order in orders:
        raw = _recall(order, cache)
        if raw is None:  # an invalid file, of which `load` has warned
            _make(order, cache)
            raw = _recall(order, cache)
        if raw is None:
            raise DataError(f"patient {order.id} cannot be stored in {cache}; does another program write there?")
        yield raw


def _make_in(pool: Executor, orders: Sequence[_Order], cache: Path) -> Iterator[None]:
    _atlas(orders[0].grid.spacing_mm, cache)  # once, before the workers need it
    with script_not_imported():
        futures = [pool.submit(_make, order, cache) for order in orders]
    try:
        yield from (future.result() for future in as_completed(futures))
    finally:
        for future in futures:  # after an error or Ctrl-C the remaining patients are not needed
            future.cancel()


def _make(order: _Order, cache: Path) -> None:
    raw = generate_patient(seed=order.seed, site=order.site, index=order.index, profile=order.profile,
                           grid=order.grid, cache=cache)
    box = bounding_box((raw.image[0] != 0).numpy())
    store(cache, order.settings, {"image": raw.image[(slice(None), *box)].contiguous(),
                                  "label": raw.label[box].contiguous(),
                                  "distractors": raw.distractors[box].contiguous(),
                                  "corner": torch.tensor([side.start for side in box])})


def _recall(order: _Order, cache: Path) -> RawPatient | None:
    tensors = load(cache, order.settings)
    if tensors is None:
        return None
    box = tuple(slice(int(c), int(c) + n) for c, n in zip(tensors["corner"], tensors["label"].shape, strict=True))
    full = {name: torch.zeros((*tensors[name].shape[:-3], *order.grid.shape), dtype=tensors[name].dtype)
            for name in ("image", "label", "distractors")}
    for name, volume in full.items():
        volume[..., box[0], box[1], box[2]] = tensors[name]
    return RawPatient(order.id, full["image"], full["label"], order.grid.affine, full["distractors"])


@lru_cache(maxsize=2)
def _atlas(spacing_mm: float, cache: Path) -> tuple[torch.Tensor, NDArray[np.float64]]:
    """The atlas in float32 for a voxel size, from the cache or built and cached."""
    settings = json.dumps({"what": "atlas", "spacing_mm": spacing_mm, **_versions()}, sort_keys=True)
    tensors = load(cache, settings)
    if tensors is None:
        atlas, affine = build_atlas(spacing_mm=spacing_mm)
        tensors = {"atlas": atlas, "affine": torch.from_numpy(affine)}
        store(cache, settings, tensors)
    # The channels of a voxel are adjacent in memory, since they are read together.
    table = (tensors["atlas"].permute(1, 2, 3, 0).float() / 255).contiguous()
    return table.permute(3, 0, 1, 2), tensors["affine"].numpy()


def _versions() -> dict[str, str]:
    return {"generator": GENERATOR,
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy", "scipy", "nilearn")}}


def _folder(cache: Path | str | None) -> Path:
    return Path(cache or os.environ.get("FEDLAB_CACHE") or ".fedlab-cache").absolute()


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread, so that the results do not depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
