"""Normal head anatomy: the MNI152 tissue maps, deformed smoothly and differently for every patient.

The maps are the ICBM 2009a symmetric template (Fonov et al. 2011), which is part of the nilearn package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from fedlab.data.brain import bounding_box

__all__ = ["ATLAS_CHANNELS", "DEPTH_MM", "Grid", "Warp", "build_atlas", "centred", "coordinates", "draw_tissue",
           "draw_warp", "jacobian", "rotation", "sample", "sample_atlas", "smooth_fields"]

#: Centre of the template's brain [mm, MNI], placed at the centre of every grid.
CENTRE_MM = (0.0, -16.5, 5.5)
#: Extent of the template's brain [mm].
BRAIN_MM = (145.0, 182.0, 156.0)
#: Channels of the atlas: tissue fractions, weights of regions, two distances scaled to [0, 1], and residual detail.
ATLAS_CHANNELS = ("white", "grey", "csf", "brain", "deep_grey", "ventricle", "depth", "near_ventricle", "detail")
#: Depth below the brain's surface at which the channel "depth" reaches 1 [mm].
DEPTH_MM = 50.0
#: Distance from a ventricle over which the channel "near_ventricle" falls by e [mm].
NEAR_MM = 8.0
_BRAIN_SCALE = 0.92  # mean size of a brain along an axis, relative to the (large) template
_STD_OF_SPLINE = (151 / 315) ** 1.5  # of a cubic B-spline field with standard normal coefficients


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A voxel grid centred on the brain, axes pointing right, anterior, superior.

    Args:
        shape: voxels along X, Y, Z.
        spacing_mm: edge of a voxel in mm.

    Raises:
        ValueError: the grid is too small to hold a whole brain, or the voxels are outside 1 to 8 mm.
    """

    shape: tuple[int, int, int] = (64, 64, 64)
    spacing_mm: float = 3.0

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ValueError(f"shape must be three positive voxel counts, got {self.shape}")
        if not 1.0 <= self.spacing_mm <= 8.0:
            raise ValueError(f"spacing_mm must be between 1 and 8 mm, got {self.spacing_mm}")
        extent = [n * self.spacing_mm for n in self.shape]
        if any(e < 0.86 * b for e, b in zip(extent, BRAIN_MM, strict=True)):
            # Multiples of 16 are a size that every network and the command line take.
            need = [16 * math.ceil(0.86 * b / self.spacing_mm / 16) for b in BRAIN_MM]
            raise ValueError(
                f"{self.shape} voxels of {self.spacing_mm:g} mm cover {'x'.join(f'{e:g}' for e in extent)} mm, which "
                f"would cut the brain off; use at least {tuple(need)} voxels or a larger spacing_mm"
            )

    @property
    def affine(self) -> NDArray[np.float64]:
        """Voxel index -> mm, shape (4, 4)."""
        matrix = np.diag([self.spacing_mm] * 3 + [1.0])
        matrix[:3, 3] = [c - (n - 1) / 2 * self.spacing_mm for c, n in zip(CENTRE_MM, self.shape, strict=True)]
        return matrix

    def coordinates(self, factor: int = 1) -> torch.Tensor:
        """Positions relative to `CENTRE_MM` [mm], shape (3, X, Y, Z); voxels `factor` times as large."""
        return coordinates([max(2, math.ceil(n / factor)) for n in self.shape], self.spacing_mm * factor)


def coordinates(shape: Sequence[int], spacing_mm: float) -> torch.Tensor:
    """Positions of a grid's voxels relative to its centre [mm], shape (3, X, Y, Z)."""
    axes = [(torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * spacing_mm for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


@lru_cache(maxsize=64)
def _basis(voxels: int, step: float) -> torch.Tensor:
    """Cubic B-spline basis, shape (voxels, controls), with `step` voxels between control points."""
    controls = math.ceil((voxels - 1) / step) + 4
    a = np.abs(np.arange(voxels)[:, None] / step - (np.arange(controls)[None, :] - 1))
    basis = np.where(a < 1, 2 / 3 - a**2 + a**3 / 2, np.clip(2 - a, 0, None) ** 3 / 6)
    return torch.from_numpy(basis.astype(np.float32))


def smooth_fields(rng: np.random.Generator, count: int, shape: Sequence[int], spacing_mm: float,
                  length_mm: float) -> torch.Tensor:
    """Independent smooth random fields with mean 0 and standard deviation about 1, shape (count, X, Y, Z).

    They are cubic B-splines whose control points are `length_mm`, and at least one voxel, apart.
    """
    step = max(1.0, length_mm / spacing_mm)
    bx, by, bz = (_basis(n, step) for n in shape)
    coefficients = rng.standard_normal((count, bx.shape[1], by.shape[1], bz.shape[1]), dtype=np.float32)
    field = by @ (torch.from_numpy(coefficients) @ bz.T)
    field = (bx @ field.flatten(2)).unflatten(2, (len(by), len(bz)))
    scaled: torch.Tensor = field / _STD_OF_SPLINE
    return scaled


def build_atlas(*, spacing_mm: float) -> tuple[torch.Tensor, NDArray[np.float64]]:
    """The atlas, smoothed for voxels of `spacing_mm` and sampled on a grid 1.5 times finer.

    Returns:
        uint8, shape (channels, X, Y, Z), where 255 represents 1, channels as in `ATLAS_CHANNELS`; and its
        voxel index -> mm affine, shape (4, 4).
    """
    from nilearn import datasets
    from scipy import ndimage

    images = [load(resolution=1) for load in (datasets.load_mni152_wm_template, datasets.load_mni152_gm_template,
                                              datasets.load_mni152_template)]
    white, grey, t1 = (np.asarray(image.dataobj, dtype=np.float32) for image in images)
    box = bounding_box(t1 > 0.05)
    margin = 4  # the template ends inside the brain stem, so its border must not be that of the atlas
    origin = images[0].affine[:3, 3] + [side.start - margin for side in box]
    white, grey, t1 = (np.pad(m[box], margin) for m in (white, grey, t1))
    brain = t1 > 0.05
    total = np.maximum(white + grey, 1.0)
    white, grey = white / total * brain, grey / total * brain
    csf = np.clip(brain - white - grey, 0, 1)
    maps = [white, grey, csf, brain.astype(np.float32), *_regions(grey, csf, brain, origin)]
    maps.append(_detail(t1, white, grey, csf, brain))
    step = spacing_mm / 1.5
    # A blur of a third of a voxel prevents aliasing, since the fine grid is interpolated once more.
    fine = torch.from_numpy(np.stack([ndimage.gaussian_filter(m, 0.3 * spacing_mm, truncate=3) for m in maps]))
    counts = [math.floor((n - 1) / step) + 1 for n in brain.shape]
    axes = [torch.arange(n) * (2 * step / (size - 1)) - 1 for n, size in zip(counts, brain.shape, strict=True)]
    where = torch.stack(torch.meshgrid(*axes, indexing="ij")).flip(0).permute(1, 2, 3, 0)[None]
    out = torch.nn.functional.grid_sample(fine[None], where, align_corners=True)[0]
    affine = np.diag([step, step, step, 1.0])
    affine[:3, 3] = origin
    return out.clamp(0, 1).mul(255).round().to(torch.uint8), affine


def _regions(grey: NDArray[np.float32], csf: NDArray[np.float32], brain: NDArray[np.bool_],
             origin: NDArray[np.float64]) -> list[NDArray[np.float32]]:
    """Deep grey nuclei, ventricles, depth below the surface and nearness to the ventricles, each in [0, 1]."""
    from scipy import ndimage

    depth = _distance(brain)
    x, y, z = np.meshgrid(*[np.arange(n) + o for n, o in zip(brain.shape, origin, strict=True)], indexing="ij",
                          sparse=True)
    middle = (np.abs(x) < 38) & (y > -45) & (y < 28) & (z > -14) & (z < 24)
    deep = grey * middle * (depth > 30)
    fluid = (csf > 0.5) & (np.abs(x) < 40) & (y > -62) & (y < 45) & (z > -22) & (z < 36) & (depth > 28)
    parts, _ = ndimage.label(fluid)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    ventricle = np.isin(parts, np.flatnonzero(sizes > 800))
    near = np.exp(-_distance(~ventricle) / NEAR_MM) * brain
    return [deep, ventricle.astype(np.float32), np.clip(depth / DEPTH_MM, 0, 1), near]


def _distance(mask: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Distance to the nearest voxel outside the mask [mm], computed on a grid of 2 mm, which is eight times as fast."""
    from scipy import ndimage

    distance = ndimage.distance_transform_edt(mask[::2, ::2, ::2]).astype(np.float32) * 2
    size = torch.Size(mask.shape)
    return torch.nn.functional.interpolate(torch.from_numpy(distance)[None, None], size=size, mode="trilinear",
                                           align_corners=True)[0, 0].numpy()


def _detail(t1: NDArray[np.float32], white: NDArray[np.float32], grey: NDArray[np.float32], csf: NDArray[np.float32],
            brain: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The part of the T1 template that the three tissues do not explain (nuclei, tracts, brain stem); 0.5 is none."""
    design = np.stack([m[brain] for m in (white, grey, csf)], axis=1).astype(np.float64)
    weights = np.linalg.lstsq(design[::17], t1[brain][::17].astype(np.float64), rcond=None)[0]
    out = np.full(t1.shape, 0.5, np.float32)
    out[brain] += ((t1[brain] - design @ weights) * 2).astype(np.float32)
    return np.clip(out, 0, 1)


@dataclass(frozen=True, eq=False)
class Warp:
    """A diffeomorphic map from a patient's grid to the template.

    Attributes:
        grid: the patient's grid.
        flow: displacement [mm] on the grid of voxels twice as large, shape (3, X/2, Y/2, Z/2).
        linear: rotation and scale, shape (3, 3), applied after the flow.
        shift: translation [mm], shape (3,).
        middle: position of the centre of the patient's grid [mm], shape (3,).
    """

    grid: Grid
    flow: torch.Tensor
    linear: torch.Tensor
    shift: torch.Tensor
    middle: torch.Tensor

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        """Positions in the template of positions in the patient; both (3, X, Y, Z) in mm from `CENTRE_MM`."""
        points = points + self.middle.view(3, 1, 1, 1)
        moved = points + sample(self.flow, points, self.grid.spacing_mm * 2)
        turned: torch.Tensor = torch.tensordot(self.linear, moved, dims=1)
        return turned + self.shift.view(3, 1, 1, 1)


def sample(volume: torch.Tensor, points: torch.Tensor, spacing_mm: float) -> torch.Tensor:
    """A volume (C, X, Y, Z) centred on the origin, interpolated at points (3, ...) in mm; outside, the border value."""
    half = torch.tensor([(n - 1) / 2 * spacing_mm for n in volume.shape[1:]]).view(3, 1, 1, 1)
    where = (points / half).flip(0).permute(1, 2, 3, 0)[None]
    return torch.nn.functional.grid_sample(volume[None], where, align_corners=True, padding_mode="border")[0]


def draw_warp(rng: np.random.Generator, grid: Grid) -> Warp:
    """A random head: an affine map and a flow of a stationary velocity field (Arsigny et al. 2006)."""
    fit = min(n * grid.spacing_mm / (b + 20) for n, b in zip(grid.shape, BRAIN_MM, strict=True))
    scale = np.minimum(_BRAIN_SCALE * np.exp(rng.normal(0, 0.03) + rng.normal(0, 0.025, 3)), fit)
    linear = rotation(rng.normal(0, math.radians(4), 3)) @ np.diag(1 / scale)
    shift = torch.from_numpy(rng.normal(0, 1.5, 3).astype(np.float32))
    points, h = grid.coordinates(2), grid.spacing_mm * 2
    velocity = 4.0 * smooth_fields(rng, 3, points.shape[1:], h, 60.0)
    velocity += 1.9 * smooth_fields(rng, 3, points.shape[1:], h, 28.0)
    flow = velocity / 32
    while True:
        for _ in range(5):  # scaling and squaring: five doublings undo the division by 32
            flow = flow + sample(flow, points + flow, h)
        if jacobian(points + flow, h).min() > 0.1:
            break
        velocity = velocity / 2
        flow = velocity / 32
    return Warp(grid, flow, torch.from_numpy(linear.astype(np.float32)), shift, torch.zeros(3))


def centred(warp: Warp, atlas: torch.Tensor, affine: NDArray[np.float64]) -> Warp:
    """The same head at the centre of its grid, so that no part of the brain is cut off."""
    points = warp.grid.coordinates(2)
    inside = points[:, sample_atlas(atlas, affine, warp(points), ("brain",))["brain"] > 0.02]
    return replace(warp, middle=(inside.min(1).values + inside.max(1).values) / 2)


def rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rotation by angles about the three axes in turn, shape (3, 3)."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        c, s = math.cos(angle), math.sin(angle)
        turn = np.eye(3)
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
        matrix = turn @ matrix
    return matrix


def jacobian(positions: torch.Tensor, spacing_mm: float) -> torch.Tensor:
    """Determinant of the Jacobian of a map given by its values (3, X, Y, Z) [mm]; positive where it does not fold."""
    gx, gy, gz = torch.gradient(positions, spacing=spacing_mm, dim=(1, 2, 3))
    determinant: torch.Tensor = (gx * torch.linalg.cross(gy, gz, dim=0)).sum(0)
    return determinant


def sample_atlas(atlas: torch.Tensor, affine: NDArray[np.float64], positions: torch.Tensor,
                 channels: Sequence[str] = ATLAS_CHANNELS) -> dict[str, torch.Tensor]:
    """Channels of an atlas in float32 at positions (3, X, Y, Z) in mm from `CENTRE_MM`, by name."""
    origin = torch.tensor([c - affine[i, 3] for i, c in enumerate(CENTRE_MM)], dtype=torch.float32)
    where = (positions.flatten(1) + origin.view(3, 1)) / float(affine[0, 0])
    which = [ATLAS_CHANNELS.index(name) for name in channels]
    sampled = _trilinear(atlas if len(which) == len(atlas) else atlas[which], where)
    return dict(zip(channels, sampled.unflatten(1, positions.shape[1:]), strict=True))


def _trilinear(volume: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """A volume (C, X, Y, Z) interpolated at voxel positions (3, N), as (C, N); outside, the border value.

    For many channels stored together this is three times as fast as torch's `grid_sample` on a CPU.
    """
    size = torch.tensor(volume.shape[1:]).view(3, 1)
    where = torch.minimum(where.clamp_min(0), size - 1)
    low = torch.minimum(where.floor(), size - 2)
    high_x, high_y, high_z = where - low
    low_x, low_y, low_z = 1 - high_x, 1 - high_y, 1 - high_z
    x, y, z = low.int()
    _, ny, nz = volume.shape[1:]
    corners = torch.tensor([0, 1, nz, nz + 1, ny * nz, ny * nz + 1, ny * nz + nz, ny * nz + nz + 1], dtype=torch.int32)
    face = torch.stack((low_x * low_y, low_x * high_y, high_x * low_y, high_x * high_y), 1)
    weights = torch.stack((face * low_z[:, None], face * high_z[:, None]), 2).flatten(1)
    rows = ((x * ny + y) * nz + z)[:, None] + corners
    table = volume.permute(1, 2, 3, 0).flatten(0, 2)
    return torch.nn.functional.embedding_bag(rows, table, mode="sum", per_sample_weights=weights).T.contiguous()


def draw_tissue(rng: np.random.Generator, maps: dict[str, torch.Tensor], positions: torch.Tensor, grid: Grid, *,
                rim: float, scalp: float, lesions: float, age: float = 58.0,
                press: torch.Tensor | float = 0.0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A patient's normal tissue, including structures that resemble a tumour in real scans.

    Args:
        maps: the atlas at `positions`; `maps["ventricle"]` is widened in place.
        positions: in the template, shape (3, X, Y, Z) [mm].
        rim: share of the meninges that brain extraction leaves, in [0, 1].
        scalp: share of fat in what it leaves, in [0, 1].
        lesions: mean amount of white-matter lesions in the site's patients, in [0, 1].
        age: mean of the site's patients [years].
        press: how far sulci and ventricles are pressed flat, in [0, 1].

    Returns:
        Tissue -> fraction of each voxel, shape (X, Y, Z), summing to 1 in the brain; and the brain, bool.
    """
    shape, h = grid.shape, grid.spacing_mm
    years = float(np.clip(age + 10 * rng.standard_normal(), 18, 92))
    fold = smooth_fields(rng, 3, shape, h, max(5.0, h))
    # The template is a mean of many heads: its blurred cortex is sharpened, differently in each patient.
    sharp = float(rng.uniform(1.6, 2.4))
    atrophy = float(np.clip(0.03 * (years - 45) + rng.normal(0, 0.35), -0.6, 2.0))
    logits = torch.stack([torch.log(maps[t] + 2e-3) for t in ("white", "grey", "csf")]) * sharp + 0.7 * fold
    logits[2] += atrophy - 2.0 * press
    # Ventricles grow with age: everything within some millimetres of them becomes fluid.
    widened = math.exp(-min(5.0, abs(float(rng.normal(0, 0.8))) + max(0.0, years - 40) * 0.05) / NEAR_MM)
    ventricle = torch.maximum(maps["ventricle"], torch.sigmoid(25 * (maps["near_ventricle"] - widened)))
    ventricle = ventricle * torch.sigmoid(12 * (ventricle - 0.1 - 1.1 * press))
    maps["ventricle"] = ventricle
    white, grey, csf = torch.softmax(logits, dim=0) * (1 - ventricle)
    csf = csf + ventricle
    rough = smooth_fields(rng, 6, shape, h, 18.0)
    # Brain extraction is imperfect: it leaves too much in some places and cuts into the cortex in others.
    cut = float(rng.uniform(0.0, 2.5)) + 1.2 * rough[0].clamp(-2, 2)
    brain = (maps["brain"] > 0.5) & (maps["depth"] * DEPTH_MM > cut)
    deep = grey * (maps["deep_grey"] / (maps["grey"] + 1e-3)).clamp(0, 1)
    fluid = ventricle * csf
    choroid = fluid * torch.sigmoid(5 * (rough[1] - 0.9)) * 0.7
    # White-matter hyperintensities: caps and bands beside the ventricles, and spots.
    load = 2.0 * lesions - 0.5 + 0.02 * (years - 58) + float(rng.uniform(-0.5, 0.5))
    spots = smooth_fields(rng, 1, shape, h, max(7.0, h))[0]
    score = 2.5 * maps["near_ventricle"] + 0.9 * spots + 0.4 * rough[2] - 2.7 + 0.45 * load
    lesion = white * torch.sigmoid(5 * score)
    # Some patients have an old infarct or gliosis, in white and grey matter.
    scar = torch.sigmoid(6 * (rough[2] + 0.3 * spots - float(rng.uniform(2.7, 7.5))))
    # Two smooth fields are both 0 along winding curves, which serve as vessels.
    tube = torch.exp(-(rough[3].square() + rough[4].square()) / (2 * float(rng.uniform(0.07, 0.15)) ** 2))
    shallow = (1 - maps["depth"] * 3).clamp(0, 1)
    blood = tube * (0.15 + 0.85 * torch.maximum(csf, 0.7 * shallow)) * float(rng.uniform(0.3, 0.9))
    midline = torch.exp(-(positions[0] / 3.0).square()) * (positions[2] > 5) * (maps["depth"] < 0.09)
    surface = torch.exp(-(maps["depth"] * DEPTH_MM / 3).square())
    meninges = rim * surface * torch.sigmoid(3 * rough[5])
    fat = scalp * float(rng.uniform(0.5, 1)) * torch.sigmoid(4 * (rough[1] + 0.3))
    blood = torch.maximum(blood, rim * 0.8 * midline)
    tissue = {"white": (white - lesion) * (1 - scar), "grey": (grey - deep) * (1 - scar),
              "deep_grey": deep * (1 - scar), "csf": csf - choroid, "lesion": lesion * (1 - scar),
              "scar": (white + grey) * scar, "choroid": choroid}
    tissue = {name: part * (1 - meninges) * (1 - blood) * brain for name, part in tissue.items()}
    tissue["meninges"] = meninges * (1 - fat) * (1 - blood) * brain
    tissue["fat"] = meninges * fat * (1 - blood) * brain
    tissue["blood"] = blood * brain
    return tissue, brain
