"""Gliomas grown by reaction and diffusion in a patient's own anatomy.

Tumour cells diffuse faster in white than in grey matter, not at all through fluid or bone, and divide until the
tissue is full: dc/dt = div(D grad c) + rho c (1 - c), the Fisher-Kolmogorov equation (Swanson et al. 2000; Harpold et
al. 2007). The parameters are drawn from the ranges that these papers estimate from patients: D up to 0.9 mm²/day in
white matter, rho 0.003 to 0.08 per day.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedlab.data.phantom.anatomy import coordinates, sample, smooth_fields

__all__ = ["GROWTH_MM", "Growth", "Population", "Tumour", "draw_growth", "grow", "mass_effect", "segment"]

#: Voxel edge [mm] of the grid on which tumours grow, independent of the patient's grid.
GROWTH_MM = 3.0
_BOX = 40  # voxels along an edge of the box around the seed: 120 mm
_MAX_STEPS = 140
_NO_TUMOUR = math.log(1e-6)  # logarithm of the odds where there is no tumour
#: Diffusion in white matter relative to grey matter.
WHITE_TO_GREY = 10.0


@dataclass(frozen=True, kw_only=True)
class Population:
    """The distribution of a site's patients.

    Args:
        low_grade: share of patients without any enhancing tumour.
        multifocal: share of patients with more than one focus.
        median_ml: median volume of the whole tumour [ml]; about 90 among the 285 patients of BraTS 2018.
        spread: standard deviation of the logarithm of that volume; volumes are limited to 10 to 250 ml.
        lesions: amount of other white-matter lesions, from 0 (young patients) to 1 (old patients).

    Raises:
        ValueError: a share outside [0, 1], a median outside 10 to 250 ml or a negative spread.
    """

    low_grade: float = 0.12
    multifocal: float = 0.15
    median_ml: float = 90.0
    spread: float = 0.6
    lesions: float = 0.5

    def __post_init__(self) -> None:
        for name, low, high in (("low_grade", 0, 1), ("multifocal", 0, 1), ("lesions", 0, 1), ("median_ml", 10, 250),
                                ("spread", 0, math.inf)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be between {low} and {high}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One tumour's drawn parameters.

    Attributes:
        diffusion: in white matter [mm²/day]; a tenth of it in grey matter.
        proliferation: [1/day].
        volume_ml: whole tumour.
        core_share: tumour core as a share of the whole tumour.
        necrotic_share: necrotic or non-enhancing part as a share of the core; 1 for low grade.
        foci: number of seeds.
        push: strength of the mass effect, in [0, 0.7].
        roughness: deviation of the borders from the level sets of the density.
        edge: softness of the borders, in units of the logarithm of the odds of the density.
    """

    diffusion: float
    proliferation: float
    volume_ml: float
    core_share: float
    necrotic_share: float
    foci: int
    push: float
    roughness: float
    edge: float

    @property
    def low_grade(self) -> bool:
        """Whether nothing enhances."""
        return self.necrotic_share >= 1.0

    @property
    def radius_mm(self) -> float:
        """Radius of a ball of the tumour's volume [mm]."""
        return float((self.volume_ml * 1000 * 3 / (4 * math.pi)) ** (1 / 3))


@dataclass(frozen=True, eq=False)
class Tumour:
    """A grown tumour on the patient's grid.

    Attributes:
        label: uint8, shape (X, Y, Z), BraTS labels.
        oedema, necrosis, enhancing: fractions of each voxel, float32, shape (X, Y, Z).
    """

    label: torch.Tensor
    oedema: torch.Tensor
    necrosis: torch.Tensor
    enhancing: torch.Tensor


def draw_growth(rng: np.random.Generator, population: Population) -> Growth:
    """The parameters of one patient's tumour.

    The length of invasion sqrt(D / rho) is drawn first (3 to 9 mm), since the shape depends on it, then rho.
    """
    volume = float(np.clip(population.median_ml * math.exp(population.spread * rng.standard_normal()), 10.0, 250.0))
    low_grade = bool(rng.random() < population.low_grade)
    core = float(np.clip(rng.beta(2.2, 3.0) + 0.04, 0.06, 0.9))
    if rng.random() < (0.5 if low_grade else 0.08):
        core = float(rng.uniform(0.7, 0.95))  # hardly any oedema
    kind = rng.random()
    if low_grade:
        necrotic = 1.0
    elif kind < 0.25:
        necrotic = float(rng.uniform(0.0, 0.15))  # nearly all of the core enhances
    elif kind < 0.4:
        necrotic = float(rng.uniform(0.6, 0.85))  # thin or patchy enhancing rim
    else:
        necrotic = float(rng.beta(4.0, 5.0))
    length = float(np.clip(math.exp(rng.normal(math.log(5.0), 0.3)), 3.0, 9.0))
    proliferation = float(np.clip(math.exp(rng.normal(math.log(0.015), 0.6)), 0.003, min(0.08, 0.9 / length**2)))
    return Growth(
        diffusion=length**2 * proliferation, proliferation=proliferation, volume_ml=volume, core_share=core,
        necrotic_share=necrotic,
        foci=int(1 + (rng.random() < population.multifocal) * rng.integers(1, 3)),
        push=float(rng.uniform(0.0, 0.7) * (0.6 + 0.4 * core)),
        roughness=float(math.exp(rng.uniform(math.log(0.35), math.log(1.1)))),
        edge=float(rng.uniform(0.04, 0.13)),
    )


def mass_effect(points: torch.Tensor, centre: torch.Tensor, growth: Growth) -> torch.Tensor:
    """The original positions of tissue that the tumour has displaced to `points`, both of shape (3, X, Y, Z) [mm].

    The map moves points towards the seed at `centre` by a share `push` with a Gaussian decay, so it does not fold for
    a push below 1.
    """
    offset = points - centre.view(3, 1, 1, 1)
    reach = max(12.0, 0.9 * growth.radius_mm)
    return points - growth.push * torch.exp(-offset.square().sum(0) / (2 * reach**2)) * offset


def grow(rng: np.random.Generator, white: torch.Tensor, grey: torch.Tensor, growth: Growth, spacing_mm: float,
         centre: torch.Tensor) -> torch.Tensor:
    """Logarithm of the odds of the tumour's density, log(c / (1 - c)), float32, on the patient's grid.

    Explicit steps in a box of 120 mm at 3 mm, until the visible part (c > 0.16, Swanson et al. 2000) reaches the
    drawn volume.

    Args:
        white, grey: tissue fractions, shape (X, Y, Z).
        centre: the first seed, shape (3,) [mm] from the grid's centre.
    """
    local = coordinates((_BOX, _BOX, _BOX), GROWTH_MM)
    half = torch.tensor([(n - 1) / 2 * spacing_mm for n in white.shape]).view(3, 1, 1, 1)
    where = local + centre.view(3, 1, 1, 1)
    tissue = (sample(torch.stack((white, grey)), where, spacing_mm) * ((where.abs() <= half).all(0))).numpy()
    mixed = smooth_fields(rng, 2, local.shape[1:], GROWTH_MM, 14.0).numpy()
    solid = tissue.sum(0) > 0.4
    diffusion = growth.diffusion * (tissue[0] + tissue[1] / WHITE_TO_GREY) * np.exp(0.5 * mixed[0]) * solid
    rate = growth.proliferation * np.exp(0.35 * mixed[1]) * solid
    # The explicit scheme is unstable above 1/6: faster diffusion is limited.
    dt = min(0.5 / growth.proliferation, GROWTH_MM**2 / 6 / growth.diffusion)
    number = np.minimum(diffusion * dt / GROWTH_MM**2, 1 / 6).astype(np.float32)
    sides = [[tuple(part if own == a else slice(None) for own in range(3)) for part in (slice(0, -1), slice(1, None))]
             for a in range(3)]  # of the faces between voxels along each axis
    # Harmonic mean of the diffusivities on both sides of a face, 0 if one of them is 0.
    faces = [np.asarray(2 * number[low] * number[high] / (number[low] + number[high] + 1e-12), dtype=np.float32)
             for low, high in sides]
    density = _seeds(rng, local.numpy(), tissue[0] * solid, growth)
    gain = (rate * dt).astype(np.float32)
    wanted = growth.volume_ml * 1000 / GROWTH_MM**3
    for _ in range(_MAX_STEPS):
        change = gain * density * (1 - density)
        for (low, high), face in zip(sides, faces, strict=True):
            flux = (density[high] - density[low]) * face
            change[low] += flux
            change[high] -= flux
        density = np.clip(density + change, 0, 1, out=change)
        if np.count_nonzero(density > 0.16) >= wanted:
            break
    density = np.clip(density, 1e-6, 1 - 1e-6)
    odds = torch.from_numpy(np.log(density / (1 - density)))
    for a in range(3):  # outside the box the border value is used: there must be no tumour there
        odds.select(a, 0).fill_(_NO_TUMOUR)
        odds.select(a, _BOX - 1).fill_(_NO_TUMOUR)
    points = coordinates(white.shape, spacing_mm) - centre.view(3, 1, 1, 1)
    return sample(odds[None], points, GROWTH_MM)[0]


def _seeds(rng: np.random.Generator, local: NDArray[np.float32], white: NDArray[np.float32],
           growth: Growth) -> NDArray[np.float32]:
    """The initial density: a small ball at the centre of the box and, if multifocal, others in white matter."""
    places = [np.zeros(3, np.float32)]
    distance = np.sqrt((local**2).sum(0))
    low, high = 0.9 * growth.radius_mm, min(1.8 * growth.radius_mm + 8, 54.0)
    candidates = np.argwhere((white > 0.6) & (distance > min(low, 40.0)) & (distance < high))
    for _ in range(growth.foci - 1 if len(candidates) else 0):
        i, j, k = candidates[rng.integers(len(candidates))]
        places.append(local[:, i, j, k])
    start = np.zeros(local.shape[1:], np.float32)
    for number, place in enumerate(places):
        d2 = ((local - place.reshape(3, 1, 1, 1)) ** 2).sum(0)
        start = np.maximum(start, (1.0 if number == 0 else rng.uniform(0.2, 0.9)) * np.exp(-d2 / 40.0))
    return np.asarray(start, dtype=np.float32)


def _threshold(score: NDArray[np.float32], count: int) -> float:
    """The threshold that `count` voxels reach; infinite for no voxel."""
    place = max(score.size - count, 0)
    return float(np.partition(score, place)[place]) if count > 0 else math.inf


def segment(rng: np.random.Generator, odds: torch.Tensor, tissue: dict[str, torch.Tensor], growth: Growth,
            spacing_mm: float) -> Tumour:
    """Whole tumour, core and necrosis where the density, varied smoothly in space, exceeds thresholds.

    The thresholds are those that give the drawn volumes.

    Args:
        odds: from `grow`, shape (X, Y, Z).
        tissue: fractions by name: "white", "csf", "brain", "ventricle".
    """
    shape = odds.shape
    coarse = smooth_fields(rng, 3, shape, spacing_mm, 14.0)
    fine = smooth_fields(rng, 3, shape, spacing_mm, max(6.0, spacing_mm))
    free = tissue["csf"] + tissue["ventricle"]
    base = _fill(odds, free)
    rough = growth.roughness
    edema = base + rough * (0.5 * coarse[0] + 0.3 * fine[0]) + 1.0 * tissue["white"] - 2.0 * free.clamp(0, 1)
    core = base + rough * (0.7 * coarse[1] + 0.2 * fine[1]) - 3.0 * tissue["ventricle"]
    necrosis = core + rough * (0.8 * coarse[2] + 0.5 * fine[2])
    allowed = (tissue["brain"] > 0.5) & (tissue["ventricle"] < 0.5) & (base > -4.0)
    voxels = max(1, round(growth.volume_ml * 1000 / spacing_mm**3))
    whole_cut = _threshold(edema[allowed].numpy(), voxels)
    inside = allowed & (edema >= whole_cut)
    core_cut = _threshold(core[inside].numpy(), max(1, round(int(inside.sum()) * growth.core_share)))
    in_core = inside & (core >= core_cut)
    necrosis_cut = _threshold(necrosis[in_core].numpy(), round(int(in_core.sum()) * growth.necrotic_share))
    label = torch.zeros(shape, dtype=torch.uint8)
    label[inside] = 2
    label[in_core] = 4
    label[in_core & (necrosis >= necrosis_cut)] = 1
    if growth.low_grade:
        label[in_core] = 1
    whole = torch.sigmoid((edema - whole_cut) / growth.edge) * (tissue["ventricle"] < 0.5)
    tumour = torch.minimum(torch.sigmoid((core - core_cut) / growth.edge), whole)
    dead = torch.minimum(torch.sigmoid((necrosis - necrosis_cut) / (1.3 * growth.edge)), tumour)
    dead = tumour if growth.low_grade else dead
    return Tumour(label, whole - tumour, dead, tumour - dead)


def _fill(odds: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """Sulci inside the tumour take the mean of the surrounding tissue."""
    weight = (1 - free).clamp(0.02, 1)[None, None]
    total = torch.nn.functional.avg_pool3d(weight * odds, 3, 1, 1, count_include_pad=False)
    mean = (total / torch.nn.functional.avg_pool3d(weight, 3, 1, 1, count_include_pad=False))[0, 0]
    return torch.where(free > 0.4, mean, odds)
