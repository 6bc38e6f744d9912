"""Who comes to a site: distributions of patients, one patient's drawn tumour, and sites that differ in both.

Every setting is a keyword argument, and every object prints as the code that makes it, so a site of one's own is

    SiteProfile(scanner=Scanner(field_t=1.5), population=Population(low_grade=0.4, median_ml=60.0))

and `make_cohort(profiles=[...])` takes one such profile per site. `site_profiles` draws sites that are all different.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from fedlab.core.seeds import derive
from fedlab.data.phantom.contrast import Look, Scanner, draw_scanners
from fedlab.data.sites.partition import sizes_from_shares

__all__ = ["FETS_SIZES", "Growth", "Population", "SiteProfile", "draw_growth", "site_profiles", "site_sizes"]

#: Patients of the 17 institutions of FeTS 2021, partitioning_1 (Pati et al. 2021).
FETS_SIZES = (129, 14, 5, 9, 22, 34, 12, 8, 4, 8, 6, 9, 27, 3, 11, 34, 6)
#: Limits of a whole tumour's volume [ml].
SMALLEST_ML, LARGEST_ML = 3.0, 250.0


@dataclass(frozen=True, kw_only=True)
class Population:
    """The distribution of a site's patients.

    Args:
        low_grade: share of patients without any enhancing tumour.
        multifocal: share of patients with more than one focus.
        median_ml: median volume of the whole tumour [ml]; about 90 among the 285 patients of BraTS 2018.
        spread: standard deviation of the logarithm of that volume; volumes are limited to 3 to 250 ml.
        age: mean age [years], with a standard deviation of 10: atrophy and wide ventricles increase with it.
        lesions: amount of other white-matter lesions, from 0 (few) to 1 (many).
        necrotic, solid, cystic, diffuse: relative frequencies of cores with an enhancing rim around necrosis, of cores
            that enhance or are cellular throughout, of cysts, and of large cores that infiltrate and hardly enhance.
            Without enhancement a necrotic core becomes a diffuse one.
        operated: share of patients with a resection cavity, which is fluid and carries no label.
        faint: share of patients whose oedema and solid tumour are hardly brighter than normal tissue on FLAIR and T2;
            twice as large among low-grade patients.
        mismatch: share of the low-grade patients with T2/FLAIR mismatch: bright on T2, suppressed on FLAIR.
        calcified, bleeding: shares of patients with calcification and with blood products in the core.

    Raises:
        ValueError: a share outside [0, 1], a median outside 5 to 250 ml, an age outside 18 to 90 years, a negative
            spread or frequency, or no frequency above 0.
    """

    low_grade: float = 0.12
    multifocal: float = 0.08
    median_ml: float = 90.0
    spread: float = 0.6
    age: float = 58.0
    lesions: float = 0.5
    necrotic: float = 0.6
    solid: float = 0.15
    cystic: float = 0.1
    diffuse: float = 0.15
    operated: float = 0.0
    faint: float = 0.1
    mismatch: float = 0.25
    calcified: float = 0.1
    bleeding: float = 0.15

    def __post_init__(self) -> None:
        shares = ("low_grade", "multifocal", "lesions", "operated", "faint", "mismatch", "calcified", "bleeding")
        limits = {name: (0.0, 1.0) for name in shares} | {
            name: (0.0, math.inf) for name in ("spread", "necrotic", "solid", "cystic", "diffuse")} | {
            "median_ml": (5.0, LARGEST_ML), "age": (18.0, 90.0)}
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be between {low:g} and {high:g}, got {getattr(self, name)}")
        if not sum(self.cores) > 0:
            raise ValueError("one of necrotic, solid, cystic and diffuse must be above 0, got 0 for all")

    @property
    def cores(self) -> tuple[float, float, float, float]:
        """The frequencies of necrotic, solid, cystic and diffuse cores."""
        return self.necrotic, self.solid, self.cystic, self.diffuse


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One tumour's drawn parameters.

    Attributes:
        diffusion: in white matter [mm²/day]; much less in grey matter.
        proliferation: [1/day].
        volume_ml: whole tumour, with the cavity if there is one.
        core_share: tumour core as a share of the whole tumour.
        necrotic_share: necrotic or non-enhancing part as a share of the core; 1 for low grade.
        foci: number of seeds.
        push: strength of the mass effect: share of the mass that is new, in [0, 0.8].
        roughness: lobulation of the core and raggedness of the borders, in [0, 1].
        edge_mm: softness of the border of oedema.
        diffuse: from a core that displaces tissue (0) to one that infiltrates along it (1).
        patchy: from one necrosis in the middle of a rim (0) to enhancing patches anywhere in the core (1).
        tilt: unevenness of the rim's width, in [0, 1].
        operated: whether the middle of the core is a resection cavity.
        calcified, bleeding: amount of calcification and of blood products in the core, in [0, 1].
        look: contrast of the tumour's tissues.
    """

    diffusion: float
    proliferation: float
    volume_ml: float
    core_share: float
    necrotic_share: float
    foci: int
    push: float
    roughness: float
    edge_mm: float
    diffuse: float = 0.0
    patchy: float = 0.0
    tilt: float = 0.3
    operated: bool = False
    calcified: float = 0.0
    bleeding: float = 0.0
    look: Look = field(default_factory=Look)

    @property
    def low_grade(self) -> bool:
        """Whether nothing enhances."""
        return self.necrotic_share >= 1.0

    @property
    def core_mm(self) -> float:
        """Radius of a ball of the core's volume [mm]."""
        return _radius_mm(self.volume_ml * self.core_share)

    @property
    def mass_mm(self) -> float:
        """Radius of a ball of what displaces the brain, the core and a part of the oedema [mm]."""
        return _radius_mm(self.volume_ml * (0.6 * self.core_share + 0.4))

    @property
    def invasion_mm(self) -> float:
        """Length over which the density falls by e at the border, sqrt(diffusion / proliferation) [mm]."""
        return math.sqrt(self.diffusion / self.proliferation)


def _radius_mm(volume_ml: float) -> float:
    return float((volume_ml * 1000 * 3 / (4 * math.pi)) ** (1 / 3))


def draw_growth(rng: np.random.Generator, population: Population) -> Growth:
    """The parameters of one patient's tumour.

    The length of invasion sqrt(D / rho) is drawn first (3 to 9 mm), since the shape depends on it, then rho.
    """
    def chance(share: float) -> bool:
        return bool(rng.random() < share)

    volume = population.median_ml * math.exp(population.spread * rng.standard_normal())
    low_grade = chance(population.low_grade)
    necrotic, solid, cystic, diffuse = population.cores
    frequencies = np.array([0.0, solid, cystic, diffuse + necrotic] if low_grade else population.cores)
    kind = int(rng.choice(4, p=frequencies / frequencies.sum()))
    operated = chance(population.operated)
    core = float(np.clip(rng.beta(2.2, 3.0) + 0.04, 0.06, 0.9))
    if chance(0.5 if low_grade else 0.08):
        core = float(rng.uniform(0.7, 0.95))  # hardly any oedema
    shape = {"diffuse": 0.0, "patchy": float(rng.uniform(0.0, 0.15)), "tilt": float(rng.beta(2.0, 3.0))}
    if kind == 0:  # an enhancing rim around necrosis
        dead, fluid = float(rng.beta(4.0, 4.0)), float(rng.uniform(0.3, 0.7))
        if chance(0.25):  # several necroses
            shape["patchy"] = float(rng.uniform(0.5, 0.9))
    elif kind == 1:
        dead, fluid = float(rng.beta(1.0, 6.0)), float(rng.uniform(0.0, 0.3))
        shape["patchy"] = float(rng.uniform(0.2, 0.8))
    elif kind == 2:  # a thin wall, or a nodule where the rim is thick
        dead, fluid = float(rng.uniform(0.65, 0.93)), float(rng.uniform(0.75, 1.0))
        shape["tilt"] = float(rng.uniform(0.2, 1.0))
    else:
        dead, fluid = float(rng.uniform(0.75, 0.985)), float(rng.uniform(0.0, 0.45))
        shape |= {"diffuse": float(rng.uniform(0.4, 1.0)), "patchy": float(rng.uniform(0.6, 1.0))}
    if operated:
        dead = float(rng.uniform(0.5, 0.85))
    length = float(np.clip(math.exp(rng.normal(math.log(5.0), 0.3)), 3.0, 9.0))
    proliferation = float(np.clip(math.exp(rng.normal(math.log(0.015), 0.6)), 0.003, min(0.08, 0.9 / length**2)))
    faint = chance(min(1.0, population.faint * (2 if low_grade else 1)))
    push = float(rng.uniform(0.25, 0.8)) * (1 - 0.6 * shape["diffuse"])
    return Growth(
        diffusion=length**2 * proliferation, proliferation=proliferation,
        volume_ml=float(np.clip(volume, SMALLEST_ML, LARGEST_ML)), core_share=core,
        necrotic_share=1.0 if low_grade else dead,
        foci=int(1 + chance(population.multifocal) * rng.integers(1, 3)),
        push=float(rng.uniform(0.0, 0.1)) if operated else push,
        roughness=float(rng.uniform(0.15, 1.0)), edge_mm=float(math.exp(rng.uniform(math.log(0.5), math.log(3.0)))),
        **shape, operated=operated and not low_grade,
        calcified=float(rng.uniform(0.2, 1.0)) * chance(population.calcified),
        bleeding=float(rng.uniform(0.2, 1.0)) * chance(population.bleeding),
        look=Look(faint=float(rng.uniform(0.6, 1.0)) if faint else float(rng.uniform(0.0, 0.45)), fluid=fluid,
                  mismatch=float(rng.uniform(0.5, 1.0)) * (low_grade and chance(population.mismatch)),
                  uptake=float(math.exp(rng.uniform(math.log(0.15), math.log(0.8))))),
    )


@dataclass(frozen=True, kw_only=True)
class SiteProfile:
    """What distinguishes a site: its scanner and its patients."""

    scanner: Scanner = field(default_factory=Scanner)
    population: Population = field(default_factory=Population)


def site_profiles(sites: int, seed: int = 0) -> list[SiteProfile]:
    """Scanners and populations of `sites` sites, all different.

    The range of each setting is divided evenly among the sites: low-grade share 0 to 0.8, most of them below 0.4;
    median volume 15 to 150 ml; mean age 38 to 72 years; resection cavities at two sites of five.

    Raises:
        ValueError: `sites` below 1.
    """
    from scipy.stats.qmc import LatinHypercube

    if sites < 1:
        raise ValueError(f"sites must be at least 1, got {sites}")
    rng = np.random.default_rng(derive(seed, "profiles", sites))
    places = LatinHypercube(d=14, rng=rng).random(sites)
    return [SiteProfile(scanner=scanner, population=_population(*map(float, place)))
            for scanner, place in zip(draw_scanners(sites, rng), places, strict=True)]


def _population(low_grade: float, multifocal: float, median: float, spread: float, age: float, lesions: float,
                necrotic: float, solid: float, cystic: float, diffuse: float, operated: float, faint: float,
                mismatch: float, bleeding: float) -> Population:
    """A population from the position of each setting in its range, 0 to 1."""
    def common(base: float, place: float) -> float:  # from a third of the base to three times as much
        return round(base * 3 ** (2 * place - 1), 2)

    return Population(
        low_grade=round(0.8 * low_grade**1.7, 3), multifocal=round(0.02 + 0.12 * multifocal, 3),
        median_ml=round(15 * 10**median, 1), spread=round(0.45 + 0.35 * spread, 2), age=round(38 + 34 * age, 1),
        lesions=round(lesions, 2), necrotic=common(0.6, necrotic), solid=common(0.15, solid),
        cystic=common(0.1, cystic), diffuse=common(0.15, diffuse),
        operated=round(max(0.0, operated - 0.6) * 0.75, 3), faint=round(0.4 * faint**1.5, 3),
        mismatch=round(0.5 * mismatch, 3), calcified=round(0.05 + 0.15 * mismatch, 3),
        bleeding=round(0.05 + 0.3 * bleeding, 3))


def site_sizes(sites: int, patients: int, at_least: int = 2) -> list[int]:
    """Very unequal numbers of patients per site: the profile of FeTS 2021 scaled to `patients`, largest site first.

    Raises:
        ValueError: fewer than `at_least` patients per site.
    """
    if sites < 1 or patients < sites * at_least:
        raise ValueError(f"{sites} sites of at least {at_least} patients need {sites * at_least} patients, "
                         f"got {patients}; lower sites or held_out, or raise patients")
    known = np.sort(np.array(FETS_SIZES, float))[::-1]
    shares = np.exp(np.interp(np.linspace(0, len(known) - 1, sites), np.arange(len(known)), np.log(known)))
    return sizes_from_shares(shares, patients, at_least)
