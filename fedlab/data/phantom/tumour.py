"""Gliomas in a patient's own anatomy: a mass that displaces the brain, and cells that spread from it.

The mass is a lobulated body; oedema and infiltration spread from it by reaction and diffusion, faster in white than
in grey matter and not at all through fluid or bone: dc/dt = div(D grad c) + rho c (1 - c), the Fisher-Kolmogorov
equation (Swanson et al. 2000; Harpold et al. 2007). The parameters are drawn from the ranges that these papers
estimate from patients: D up to 0.9 mm²/day in white matter, rho 0.003 to 0.08 per day. Neither mass nor cells cross
the falx: from one hemisphere to the other the way leads through white matter, the corpus callosum or the brain stem.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedlab.data.phantom.anatomy import BRAIN_MM, coordinates, rotation, sample, smooth_fields
from fedlab.data.phantom.population import Growth

__all__ = ["GROWTH_MM", "Grown", "Tumour", "draw_seeds", "grow", "mass_effect", "pressure", "segment"]

#: Voxel edge [mm] of the grid on which tumours grow, independent of the patient's grid; it holds the whole brain.
GROWTH_MM = 4.0
_MAX_STEPS = 140
_VISIBLE = 0.16  # density above which imaging shows the tumour (Swanson et al. 2000)
#: Diffusion in white matter relative to grey matter.
WHITE_TO_GREY = 20.0
_PASSABLE = 0.4  # white matter at the midline that connects the hemispheres
_FAR_MM = 200.0  # distance of what cannot be reached


@dataclass(frozen=True, eq=False)
class Grown:
    """A grown tumour on the patient's grid, both in mm, shape (X, Y, Z).

    Attributes:
        spread: logarithm of the odds of the cells' density times the length of invasion: it falls by about 1 per mm.
        inside: depth below the surface of the mass, negative outside.
    """

    spread: torch.Tensor
    inside: torch.Tensor


@dataclass(frozen=True, eq=False)
class Tumour:
    """A tumour on the patient's grid.

    Attributes:
        label: uint8, shape (X, Y, Z), BraTS labels.
        oedema, necrosis, enhancing, cavity: fractions of each voxel, float32, shape (X, Y, Z).
    """

    label: torch.Tensor
    oedema: torch.Tensor
    necrosis: torch.Tensor
    enhancing: torch.Tensor
    cavity: torch.Tensor


def mass_effect(points: torch.Tensor, centre: torch.Tensor, growth: Growth) -> torch.Tensor:
    """The original positions of tissue that the tumour has displaced to `points`, both of shape (3, X, Y, Z) [mm].

    A ball of tissue swells by the mass that is new; outside it the volume of tissue is kept, so the displacement falls
    with the square of the distance. Tissue gives way towards the midline and not towards the skull.
    """
    offset = points - centre.view(3, 1, 1, 1)
    distance = offset.square().sum(0).sqrt().clamp_min(1e-3)
    cubed = distance**3
    radius = growth.mass_mm
    before = (cubed - growth.push * radius**3 * (1 - torch.exp(-cubed / radius**3))).clamp_min(0) ** (1 / 3)
    semi = torch.tensor(BRAIN_MM).view(3, 1, 1, 1) * 0.46  # of the brain's ellipsoid
    room = ((1.02 - (points / semi).square().sum(0).sqrt()) / 0.35).clamp(0, 1)
    inward = -centre / centre.norm().clamp_min(1.0)
    lean = 1 + 0.5 * (torch.tensordot(inward, offset, dims=1) / distance).clamp_min(0)
    before_points: torch.Tensor = points - ((1 - before / distance) * room * lean).clamp(max=0.7) * offset
    return before_points


def pressure(points: torch.Tensor, centre: torch.Tensor, growth: Growth) -> torch.Tensor:
    """How far sulci and ventricles are pressed flat, 0 to 1, shape (X, Y, Z): most beside the mass."""
    distance = (points - centre.view(3, 1, 1, 1)).square().sum(0).sqrt()
    return min(1.0, growth.push / 0.6) * torch.exp(-(distance - growth.mass_mm).clamp_min(0) / 15)


def draw_seeds(rng: np.random.Generator, good: torch.Tensor, growth: Growth) -> torch.Tensor:
    """Centres of the foci [mm], shape (foci, 3), the main one first, out of possible places (N, 3)."""
    first = good[int(rng.integers(len(good)))]
    seeds = [first]
    distance = (good - first).norm(dim=1)
    near = good[(distance > min(1.3 * growth.core_mm + 6, 40.0)) & (distance < 1.8 * growth.core_mm + 30)]
    for _ in range(growth.foci - 1 if len(near) else 0):
        seeds.append(near[int(rng.integers(len(near)))])
    return torch.stack(seeds)


def grow(rng: np.random.Generator, white: torch.Tensor, grey: torch.Tensor, across: torch.Tensor, growth: Growth,
         spacing_mm: float, seeds: torch.Tensor) -> Grown:
    """The mass at the seeds, and cells spread from it until what is visible reaches the drawn volume.

    Args:
        white, grey: tissue fractions, shape (X, Y, Z).
        across: distance from the midline [mm], negative on the left, shape (X, Y, Z).
        seeds: centres of the foci, shape (foci, 3) [mm] from the grid's centre.
    """
    shape = [max(4, math.ceil(n * spacing_mm / GROWTH_MM)) for n in white.shape]
    points = coordinates(shape, GROWTH_MM)
    tissue = sample(torch.stack((white, grey, across)), points, spacing_mm).numpy()
    side = tissue[2] > 0
    inside = _mass(rng, points, tissue[0], side, growth, seeds)
    density = _spread(rng, tissue[:2], side, inside, growth)
    spread = growth.invasion_mm * np.log(density / (1 - density))
    # Each side of the falx is interpolated on its own, so that nothing leaks across by interpolation.
    fields = torch.from_numpy(np.stack((spread, inside)).astype(np.float32))
    both = torch.cat([_continued(fields, torch.from_numpy(side == own)) for own in (True, False)])
    fine = sample(both, coordinates(white.shape, spacing_mm), GROWTH_MM)
    chosen = torch.where(across > 0, fine[:2], fine[2:])
    return Grown(chosen[0], chosen[1])


def _continued(fields: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Fields (C, X, Y, Z) with the mean of known neighbours where they are not known."""
    weight = known[None, None].float()
    total = torch.nn.functional.avg_pool3d(fields[None] * weight, 3, 1, 1)
    mean = (total / torch.nn.functional.avg_pool3d(weight, 3, 1, 1).clamp_min(1e-6))[0]
    return torch.where(known, fields, torch.where(mean == 0, -_FAR_MM, mean))


def _mass(rng: np.random.Generator, points: torch.Tensor, white: NDArray[np.float32], side: NDArray[np.bool_],
          growth: Growth, seeds: torch.Tensor) -> NDArray[np.float32]:
    """Depth below the surface of the mass [mm]: lobulated ellipsoids, of which satellites are smaller."""
    where = points.numpy()
    gates = where[:, side & ~np.roll(side, 1, 0) & (np.minimum(white, np.roll(white, 1, 0)) > _PASSABLE)]
    lobes = smooth_fields(rng, 2, where.shape[1:], GROWTH_MM, max(9.0, 0.9 * growth.core_mm)).numpy()
    lumps = smooth_fields(rng, 1, where.shape[1:], GROWTH_MM, 9.0).numpy()[0]
    rough = np.exp(growth.roughness * (0.17 * lobes[0] + 0.13 * lumps) + 0.1 * lobes[1])
    sizes = np.array([1.0, *rng.uniform(0.08, 0.35, len(seeds) - 1)])
    radii = growth.core_mm * np.cbrt(sizes / sizes.sum())
    inside = np.full(where.shape[1:], -_FAR_MM, np.float32)
    for seed, radius in zip(seeds.numpy(), radii, strict=True):
        axes = np.exp(rng.normal(0, 0.2, 3))
        turn = (rotation(rng.uniform(-math.pi, math.pi, 3)) / (axes / np.cbrt(axes.prod()))).T.astype(np.float32)
        distance = _length(turn, where - seed.reshape(3, 1, 1, 1))
        if gates.size:  # the other hemisphere is reached through the nearest gate
            way = _length(turn, gates - seed.reshape(3, 1))
            gate = gates[:, way.argmin()].reshape(3, 1, 1, 1)
            detour = way.min() + _length(turn, where - gate)
        else:
            detour = np.full_like(distance, _FAR_MM)
        home = side.flat[np.square(where - seed.reshape(3, 1, 1, 1)).sum(0).argmin()]
        inside = np.maximum(inside, radius - np.where(side == home, distance, detour) * rough)
    return np.asarray(inside, dtype=np.float32)


def _length(turn: NDArray[np.float32], offset: NDArray[np.float32]) -> NDArray[np.float32]:
    """Length of vectors (3, ...) after a linear map."""
    return np.asarray(np.sqrt(np.square(np.tensordot(turn, offset, 1)).sum(0)), dtype=np.float32)


def _spread(rng: np.random.Generator, tissue: NDArray[np.float32], side: NDArray[np.bool_],
            inside: NDArray[np.float32], growth: Growth) -> NDArray[np.float32]:
    """The density of cells, by explicit steps from the mass."""
    shape = inside.shape
    mixed = smooth_fields(rng, 2, shape, GROWTH_MM, 16.0).numpy()
    solid = tissue.sum(0) > 0.4
    diffusion = growth.diffusion * (tissue[0] + tissue[1] / WHITE_TO_GREY) * np.exp(0.5 * mixed[0]) * solid
    rate = growth.proliferation * np.exp(0.35 * mixed[1]) * solid
    # The explicit scheme is unstable above 1/6: faster diffusion is limited.
    dt = min(0.5 / growth.proliferation, GROWTH_MM**2 / 6 / growth.diffusion)
    number = np.minimum(diffusion * dt / GROWTH_MM**2, 1 / 6).astype(np.float32)
    sides = [[tuple(part if own == a else slice(None) for own in range(3)) for part in (slice(0, -1), slice(1, None))]
             for a in range(3)]  # of the faces between voxels along each axis
    # Harmonic mean of the diffusivities on both sides of a face, 0 if one of them is 0 or the falx lies between.
    faces = [np.asarray(2 * number[low] * number[high] / (number[low] + number[high] + 1e-12)
                        * ((side[low] == side[high]) | (np.minimum(tissue[0][low], tissue[0][high]) > _PASSABLE)),
                        dtype=np.float32) for low, high in sides]
    start = inside - 0.6 * growth.diffuse * growth.core_mm  # what infiltrates begins as a smaller mass
    density = np.asarray(0.98 * solid / (1 + np.exp(np.clip(-start / 2.5, -60, 60))), dtype=np.float32)
    gain = (rate * dt).astype(np.float32)
    wanted = growth.volume_ml * 1000 / GROWTH_MM**3
    counted = (tissue[0] > 0.35) | (inside > 0)  # oedema spares the cortex
    for _ in range(_MAX_STEPS):
        change = gain * density * (1 - density)
        for (low, high), face in zip(sides, faces, strict=True):
            flux = (density[high] - density[low]) * face
            change[low] += flux
            change[high] -= flux
        density = np.clip(density + change, 0, 1, out=change)
        if np.count_nonzero((density > _VISIBLE) & counted) >= wanted:
            break
    return np.clip(density, 1e-6, 1 - 1e-6)


def _cut(score: torch.Tensor, allowed: torch.Tensor, count: int) -> float:
    """The score that `count` of the allowed voxels reach; infinite for no voxel."""
    values = score[allowed].numpy()
    place = max(values.size - count, 0)
    return float(np.partition(values, place)[place]) if count > 0 and values.size else math.inf


def segment(rng: np.random.Generator, grown: Grown, tissue: dict[str, torch.Tensor], across: torch.Tensor,
            growth: Growth, spacing_mm: float) -> Tumour:
    """Core, oedema and necrosis: the voxels with the highest scores, as many as the drawn volumes hold.

    All scores are in mm. Oedema prefers white matter and spares the cortex. Necrosis lies deep in the core, so that an
    enhancing rim surrounds it, of a width that is uneven by a tilt of the score and by noise.

    Args:
        tissue: fractions by name: "white", "cortex", "csf", "brain", "ventricle"; and "depth" below the
            surface [mm].
        across: distance from the midline [mm], shape (X, Y, Z).
    """
    shape = grown.inside.shape
    coarse = smooth_fields(rng, 4, shape, spacing_mm, max(8.0, 0.7 * growth.core_mm))
    fine = smooth_fields(rng, 3, shape, spacing_mm, max(4.5, spacing_mm))
    rough, core_mm = growth.roughness, growth.core_mm
    # The outermost cortex and what lies against the falx are compressed rather than replaced.
    falx = torch.exp(-across.abs() / 4.5) * (1 - tissue["white"]).clamp_min(0)
    wall = torch.maximum(3 * torch.exp(-tissue["depth"] / 3), (11 + 3 * coarse[2]) * falx)
    core = (1 - growth.diffuse) * grown.inside + growth.diffuse * (
        grown.spread + 3 * rough * coarse[0] + 3 * tissue["white"]) + (0.8 + 1.2 * rough) * fine[0] - wall
    blocked = (tissue["brain"] <= 0.5) | (tissue["ventricle"] >= 0.5)
    allowed = ~blocked & (grown.inside > -0.8 * _FAR_MM)
    voxels = max(1, round(growth.volume_ml * 1000 / spacing_mm**3))
    core_cut = _cut(core, allowed, max(1, round(voxels * growth.core_share)))
    in_core = allowed & (core >= core_cut)
    spare = _smooth(5 * tissue["white"] - 9 * tissue["cortex"] - 9 * tissue["csf"])
    oedema = grown.spread + spare + 2 * rough * coarse[1] + (1.2 + 1.3 * rough) * fine[1] - wall
    oedema = torch.maximum(oedema, 4 * (core - core_cut) + 8)  # a seam of oedema around the core
    around = allowed & ~in_core
    oedema_cut = _cut(oedema, around, voxels - int(in_core.sum()))
    inside = in_core | around & (oedema >= oedema_cut)
    coordinate = coordinates(shape, spacing_mm)
    direction = torch.from_numpy(_unit(rng))
    ring = core - growth.tilt * 0.25 * torch.tensordot(direction, coordinate, dims=1) + core_mm * 0.07 * coarse[2]
    necrosis = (1 - growth.patchy) * ring + growth.patchy * 0.5 * core_mm * coarse[3] + 0.6 * fine[2]
    necrosis_cut = _cut(necrosis, in_core, round(int(in_core.sum()) * growth.necrotic_share))
    dead = in_core & ((necrosis >= necrosis_cut) | growth.low_grade)
    label = torch.zeros(shape, dtype=torch.uint8)
    label[inside] = 2
    label[in_core] = 4
    label[dead] = 0 if growth.operated else 1
    lost = _fragments(label > 0)
    label[lost] = 0
    lost |= _flat_ends(label > 0, torch.maximum(core - core_cut, oedema - oedema_cut))
    label[lost] = 0
    free = 1 - blocked.float() - 0.7 * (lost & ~blocked)
    soft_core = torch.sigmoid((core - core_cut) / (0.5 + growth.diffuse)) * free
    whole = torch.maximum(torch.sigmoid((oedema - oedema_cut) / growth.edge_mm) * free, soft_core)
    soft_dead = soft_core if growth.low_grade else torch.minimum(
        torch.sigmoid((necrosis - necrosis_cut) / 0.6), soft_core)
    none = torch.zeros_like(soft_dead)
    cavity = soft_dead if growth.operated else none
    return Tumour(label, whole - soft_core, none if growth.operated else soft_dead, soft_core - soft_dead, cavity)


def _fragments(inside: torch.Tensor) -> torch.Tensor:
    """Parts that hold less than a fiftieth of the voxels of the largest part."""
    from scipy import ndimage

    parts, _ = ndimage.label(inside.numpy())
    sizes = np.bincount(parts.ravel())
    largest = sizes[1:].max(initial=0)
    sizes[0] = largest
    return torch.from_numpy((50 * sizes < largest)[parts])


def _flat_ends(inside: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """Voxels without which the outermost slice in each of the six directions is at most 0.08 of the largest one.

    Few tumours end in a plane of the grid. What remains of such a slice are the voxels with the highest scores.
    """
    flat = torch.zeros_like(inside)
    for axis in range(3):
        areas = inside.sum(tuple(a for a in range(3) if a != axis))
        used = areas.nonzero()
        for end in {int(used[0]), int(used[-1])} if len(used) > 2 else ():
            kept = max(1, int(0.08 * int(areas.max())))
            if areas[end] > kept:
                here = inside.select(axis, end)
                cut = _cut(score.select(axis, end), here, kept)
                flat.select(axis, end).logical_or_(here & (score.select(axis, end) < cut))
    return flat


def _unit(rng: np.random.Generator) -> NDArray[np.float32]:
    """A random direction, shape (3,)."""
    drawn = rng.standard_normal(3)
    return np.asarray(drawn / np.linalg.norm(drawn), dtype=np.float32)


def _smooth(field: torch.Tensor) -> torch.Tensor:
    """The mean over the voxel and its six neighbours, the voxel itself twice; at the border of the grid unchanged."""
    out = field.clone()
    inner = (slice(1, -1),) * 3
    total = 2 * field[inner]
    for axis in range(3):
        for start in (0, 2):
            place = tuple(slice(start, field.shape[a] - 2 + start) if a == axis else slice(1, -1) for a in range(3))
            total = total + field[place]
    out[inner] = total / 8
    return out
