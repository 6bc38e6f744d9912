"""The generated patients: anatomy, tumours, contrast, sites, cache and the BraTS layout."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import fedlab
from fedlab.core.errors import DataError
from fedlab.core.types import Site
from fedlab.data.cache import path_of
from fedlab.data.phantom.anatomy import (
    Grid,
    coordinates,
    draw_tissue,
    draw_warp,
    jacobian,
    sample_atlas,
    smooth_fields,
)
from fedlab.data.phantom.contrast import (
    TISSUES,
    GradientEcho,
    InversionRecovery,
    Look,
    Relaxation,
    Scanner,
    SpinEcho,
    draw_tissues,
    enhance,
)
from fedlab.data.phantom.generator import DISTRACTORS, RawPatient, _atlas, generate_patient, make_cohort, write_brats
from fedlab.data.phantom.population import (
    FETS_SIZES,
    Growth,
    Population,
    SiteProfile,
    draw_growth,
    site_profiles,
    site_sizes,
)
from fedlab.data.phantom.tumour import grow, mass_effect, pressure, segment
from warm import PYTHON

VISIBLE = math.log(0.16 / 0.84)  # a density of 0.16 as logarithm of the odds
COARSE = {"shape": (32, 32, 32), "spacing_mm": 6.0, "progress": False, "workers": 0}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def fresh(cache: Path, tmp_path: Path) -> Path:
    """A cache that holds the coarse atlas, which takes seconds to build, and no patients."""
    coarse_patient(cache)
    for path in cache.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            if json.loads(file.metadata()["settings"]).get("spacing_mm") == 6.0:
                shutil.copy(path, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def default_cohort(cache: Path) -> list[Site]:
    """Two patients of each of the 13 default sites, on the default grid."""
    return make_cohort(sizes=[2] * 13, held_out=1, cache=cache, progress=False, workers=0)


def patients(cohort: list[Site]) -> list:
    return [patient for site in cohort for patient in (*site.val, *site.train)]


def coarse_patient(cache: Path, **changes) -> RawPatient:
    settings = {"seed": 0, "site": "site-01", "index": 0, "profile": site_profiles(1)[0],
                "grid": Grid(shape=(32, 32, 32), spacing_mm=6.0), "cache": cache}
    return generate_patient(**(settings | changes))


# Anatomy


def test_smooth_fields_have_mean_0_and_deviation_1():
    field = smooth_fields(np.random.default_rng(0), 40, (32, 32, 32), 3.0, 12.0)
    assert field.shape == (40, 32, 32, 32)
    assert abs(float(field.mean())) < 0.05
    assert abs(float(field.std()) - 1) < 0.1
    step = float((field[:, 1:] - field[:, :-1]).std())
    assert 0.1 < step < 0.6  # neighbours 3 mm apart differ little in a field of 12 mm


def test_jacobian_of_a_scaling_is_its_determinant():
    grid = Grid(shape=(32, 32, 32), spacing_mm=6.0)
    doubled = grid.coordinates() * torch.tensor([2.0, 1.0, 0.5]).view(3, 1, 1, 1)
    assert torch.allclose(jacobian(doubled, 6.0), torch.ones(32, 32, 32), atol=1e-4)
    assert float(jacobian(-grid.coordinates(), 6.0).max()) < 0  # a mirror image is detected


@pytest.mark.parametrize("seed", range(4))
def test_no_deformation_folds(seed: int):
    grid, rng = Grid(), np.random.default_rng(seed)
    warp = draw_warp(rng, grid)
    growth = replace(draw_growth(rng, Population()), push=0.7, volume_ml=250.0)
    positions = warp(mass_effect(grid.coordinates(), torch.tensor([20.0, -10.0, 15.0]), growth))
    determinant = jacobian(positions, grid.spacing_mm)
    assert float(determinant.min()) > 0
    assert float(determinant.max()) < 8
    assert float((positions - grid.coordinates()).abs().max()) > 5  # the map is not trivial


def test_the_default_grid_holds_the_whole_brain(default_cohort: list[Site]):
    for patient in patients(default_cohort):
        brain = patient.image[0] != 0
        for axis in range(3):
            for end in (0, -1):
                assert not brain.select(axis, end).any()
        assert 1000 < float(brain.sum()) * 0.027 < 2100  # ml


# Tumours


def test_every_patient_has_a_tumour_inside_the_brain(default_cohort: list[Site]):
    for patient in patients(default_cohort):
        assert patient.label.dtype == torch.uint8
        assert set(patient.label.unique().tolist()) <= {0, 1, 2, 4}
        volume = float((patient.label > 0).sum()) * 0.027
        assert 8 < volume < 260
        assert bool((patient.image[:, patient.label > 0].abs().sum(0) > 0).all())
        assert bool(torch.isfinite(patient.image).all())


def test_volumes_and_grades_resemble_brats():
    rng = np.random.default_rng(0)
    drawn = [draw_growth(rng, Population()) for _ in range(2000)]
    volumes = np.array([g.volume_ml for g in drawn])
    assert 80 < np.median(volumes) < 100
    assert volumes.min() >= 3 and volumes.max() <= 250
    assert 0.10 <= np.mean([g.low_grade for g in drawn]) <= 0.15
    assert 0.05 <= np.mean([g.foci > 1 for g in drawn]) <= 0.11
    enhancing = np.array([g.volume_ml * g.core_share * (1 - g.necrotic_share) for g in drawn])
    assert 10 < np.median(enhancing) < 30
    high = [g.necrotic_share for g in drawn if not g.low_grade]
    assert np.mean([n < 0.15 for n in high]) > 0.1 and np.mean([n > 0.7 for n in high]) > 0.1
    assert all(0.003 <= g.proliferation <= 0.08 and g.diffusion <= 0.9001 for g in drawn)


def test_shares_of_a_population_are_respected(cache: Path):
    scanner = Scanner()
    never = SiteProfile(scanner=scanner, population=Population(low_grade=0.0))
    always = SiteProfile(scanner=scanner, population=Population(low_grade=1.0))
    for index in range(3):
        assert not (coarse_patient(cache, profile=always, index=index).label == 4).any()
    assert any((coarse_patient(cache, profile=never, index=i).label == 4).any() for i in range(3))


def growth_of(**changes) -> Growth:
    plain = Growth(diffusion=0.3, proliferation=0.012, volume_ml=60.0, core_share=0.4, necrotic_share=0.5, foci=1,
                   push=0.0, roughness=0.4, edge_mm=1.0)
    return replace(plain, **changes)


def visible(seed: int, white: torch.Tensor, grey: torch.Tensor, growth: Growth, centre: tuple[float, ...],
            midline: float = -100.0) -> torch.Tensor:
    """Where cells grown from a centre are dense enough to be seen, on a grid of 3 mm."""
    across = coordinates(white.shape, 3.0)[0] - midline
    grown = grow(np.random.default_rng(seed), white, grey, across, growth, 3.0, torch.tensor([centre]))
    assert bool(torch.isfinite(grown.spread).all()) and bool(torch.isfinite(grown.inside).all())
    return grown.spread > VISIBLE * growth.invasion_mm


def test_a_tumour_crosses_no_fluid_and_prefers_white_matter():
    white, grey = torch.zeros(2, 40, 40, 40)
    white[:20], grey[20:30] = 1.0, 1.0  # fluid from 30 on
    inside = visible(0, white, grey, growth_of(volume_ml=100.0, core_share=0.1), (-1.5, 0.0, 0.0))
    assert not inside[31:].any()
    into_white = 20 - int(inside[:20].any(2).any(1).nonzero().min())
    into_grey = int(inside[20:30].any(2).any(1).sum())
    assert into_white > into_grey > 0


def test_fast_diffusion_is_limited_for_stability():
    white = torch.ones(40, 40, 40)
    for diffusion, grown in ((0.1, True), (0.9, True), (100.0, False)):
        growth = growth_of(diffusion=diffusion, volume_ml=200.0, core_share=0.1)
        assert bool(visible(1, white, white * 0, growth, (0.5, 0.0, 0.0)).any()) == grown  # diluted, but no NaN


def test_growth_stops_at_the_drawn_volume():
    white = torch.ones(48, 48, 48)
    for volume in (20.0, 120.0):
        grown = float(visible(2, white, white * 0, growth_of(volume_ml=volume), (1.0, 0.0, 0.0)).sum()) * 0.027
        assert volume * 0.95 < grown < volume * 1.5


def test_the_falx_is_crossed_through_white_matter_only():
    white = torch.ones(48, 48, 48)
    white[22:26] = 0.2  # cortex on both sides of the falx
    right = coordinates(white.shape, 3.0)[0] > 0
    large = growth_of(volume_ml=200.0, core_share=0.2)
    closed = visible(3, white, 1 - white, large, (22.0, 0.0, 0.0), midline=0.0)
    assert closed[right].any() and not closed[~right].any()
    white[22:26, 20:28, 20:28] = 1.0  # a bridge of 24 x 24 mm
    opened = visible(3, white, 1 - white, large, (22.0, 0.0, 0.0), midline=0.0)
    assert opened[~right].any()
    assert opened[23, 20:28, 20:28].sum() > 2 * opened[23].sum() / 3  # next to the falx they are at the bridge


def test_the_mass_shifts_the_midline_by_hand():
    # 60 ml, core 0.4: mass 60 (0.6 * 0.4 + 0.4) = 38.4 ml, radius³ = 9167 mm³, of which 0.5 is new. At 40 mm from the
    # seed: 40 - (64000 - 4584 (1 - e^-6.98))^(1/3) = 0.979 mm, half as much again towards the midline: 1.47 mm.
    centre = torch.tensor([40.0, 0.0, 0.0])
    midline = torch.zeros(3, 1, 1, 1)
    moved = midline - mass_effect(midline, centre, growth_of(push=0.5))
    assert torch.allclose(moved.flatten(), torch.tensor([-1.468, 0.0, 0.0]), atol=2e-3)  # away from the tumour
    growths = [growth_of(push=0.8, volume_ml=volume) for volume in (15, 60, 240)]
    shifts = [float((mass_effect(midline, centre, growth) - midline)[0]) for growth in growths]
    assert shifts[0] < 0.8 < shifts[1] < 3 < shifts[2] < 12
    assert torch.equal(mass_effect(midline, centre, growth_of(push=0.0, volume_ml=200)), midline)


def test_ventricles_move_and_are_pressed_flat(cache: Path):
    atlas, affine = _atlas(6.0, cache)
    grid, centre = Grid(shape=(32, 32, 32), spacing_mm=6.0), torch.tensor([35.0, 0.0, 15.0])
    warp = draw_warp(np.random.default_rng(0), grid)

    def ventricles(volume_ml: float) -> tuple[float, float]:
        """Their volume [ml] and the place of their centre from right to left [mm]."""
        growth = growth_of(push=0.8, volume_ml=volume_ml)
        positions = warp(mass_effect(grid.coordinates(), centre, growth))
        maps = sample_atlas(atlas, affine, positions)
        draw_tissue(np.random.default_rng(1), maps, positions, grid, rim=0, scalp=0, lesions=0,
                    press=pressure(grid.coordinates(), centre, growth))
        share = maps["ventricle"]
        return float(share.sum()) * 0.216, float((share * grid.coordinates()[0]).sum() / share.sum())

    (small, before), (large, after) = ventricles(10.0), ventricles(200.0)
    assert large < 0.9 * small and after < before - 1.5


def ends(label: torch.Tensor) -> float:
    """Voxels in the outermost slice relative to the largest slice, the largest of the six directions."""
    areas = [(label > 0).sum(tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    return max(float(a[a > 0][end] / a.max()) for a in areas for end in (0, -1))


def test_tumours_do_not_end_in_planes(default_cohort: list[Site], cache: Path):
    for patient in patients(default_cohort):
        assert ends(patient.label) <= 0.12
    grid = Grid(shape=(96, 96, 96), spacing_mm=2.0)
    for index, profile in enumerate(site_profiles(6, seed=4)):
        fine = generate_patient(seed=4, site="site-01", index=index, profile=profile, grid=grid, cache=cache)
        assert ends(fine.label) <= 0.12


def test_enhancement_is_a_ring_of_uneven_width(cache: Path):
    from scipy import ndimage

    profile = SiteProfile(scanner=Scanner(), population=Population(
        low_grade=0.0, multifocal=0.0, median_ml=100.0, spread=0.2, solid=0.0, cystic=0.0, diffuse=0.0))
    closed, uneven = [], []
    for index in range(10):
        made = generate_patient(seed=1, site="rings", index=index, profile=profile, grid=Grid(), cache=cache)
        label = made.label.numpy()
        dead, core = ndimage.binary_opening(label == 1), (label == 1) | (label == 4)
        around = ndimage.binary_dilation(dead) & ~(label == 1) & (made.image[0] > 0).numpy()
        closed.append((label[around] == 4).mean())
        width = ndimage.distance_transform_edt(core, 3.0)[around & (label == 4)]  # from necrosis to the core's surface
        uneven.append(np.quantile(width, 0.9) / np.quantile(width, 0.1))
    assert np.median(closed) > 0.75  # of what touches necrosis, most enhances
    assert np.median(uneven) >= 1.7


def test_oedema_spares_the_cortex(cache: Path):
    rng, shape = np.random.default_rng(0), (48, 48, 48)
    points = coordinates(shape, 3.0)
    cortex = ((points[1] / 9).floor() % 2 == 0).float()  # stripes of 9 mm
    none = torch.zeros(shape)
    tissue = {"white": 1 - cortex, "cortex": cortex, "csf": none, "ventricle": none, "brain": none + 1,
              "depth": none + 30}
    across = points[0] + 100  # one hemisphere
    growth = growth_of(volume_ml=90.0, core_share=0.2)
    grown = grow(rng, tissue["white"], cortex, across, growth, 3.0, torch.zeros(1, 3))
    label = segment(rng, grown, tissue, across, growth, 3.0).label
    assert float((label > 0).sum()) * 0.027 == pytest.approx(90, rel=0.06)  # without fragments
    assert float(((label == 1) | (label == 4)).sum()) * 0.027 == pytest.approx(18, rel=0.02)
    oedema = label == 2
    assert (oedema & (cortex > 0)).sum() < 0.2 * oedema.sum()  # a half of the tissue is cortex


def test_an_operated_patient_has_a_cavity_without_label(cache: Path):
    profile = SiteProfile(scanner=Scanner(noise=0.0, bias=0.0), population=Population(
        low_grade=0.0, operated=1.0, median_ml=120.0, spread=0.0, multifocal=0.0, bleeding=0.0, calcified=0.0))
    raw = generate_patient(seed=0, site="site-01", index=5, profile=profile, grid=Grid(), cache=cache)
    assert not (raw.label == 1).any() and (raw.label == 4).any()
    from scipy import ndimage

    tumour = raw.label.numpy() > 0
    wider = ndimage.binary_dilation(tumour)
    hole = ndimage.binary_erosion(ndimage.binary_fill_holes(wider) & ~wider)  # far from its wall
    assert hole.sum() * 0.027 > 1
    flair, t2 = raw.image[0].numpy(), raw.image[3].numpy()
    assert np.median(t2[hole]) > 1.5 * np.median(t2[tumour]) and np.median(flair[hole]) < 0.8 * np.median(flair[tumour])


def test_what_resembles_a_tumour_is_named(cache: Path):
    def hyperintensities(**population) -> int:
        raw = coarse_patient(cache, profile=SiteProfile(scanner=Scanner(), population=Population(**population)))
        assert set(raw.distractors.unique().tolist()) <= {0, *DISTRACTORS}
        assert not (raw.distractors[raw.label > 0]).any() and not (raw.distractors[raw.image[0] == 0]).any()
        return int((raw.distractors == 1).sum())

    assert DISTRACTORS[1] == "white-matter hyperintensity"
    assert hyperintensities(age=80.0, lesions=1.0) > 3 * hyperintensities(age=25.0, lesions=0.0) + 10


# Contrast: every expected number is computed by hand from the equation


def test_spin_echo_by_hand():
    # 0.7 (1 - e^-1) e^-0.5 = 0.7 * 0.632121 * 0.606531
    assert SpinEcho(tr_ms=800, te_ms=40).signal(Relaxation(0.7, 800, 80)) == pytest.approx(0.268380, abs=1e-5)


def test_gradient_echo_by_hand():
    # E1 = e^-0.02 = 0.980199, 30 degrees: 0.5 * 0.019801 / (1 - 0.866025 * 0.980199) = 0.0655139; T2* = 50: e^-0.1
    got = GradientEcho(tr_ms=20, te_ms=5, flip_deg=30).signal(Relaxation(1.0, 1000, 100))
    assert got == pytest.approx(0.0655139 * 0.904837, abs=1e-5)
    # at 90 degrees it is a saturation recovery: 1 - E1
    flat = GradientEcho(tr_ms=500, te_ms=0, flip_deg=90).signal(Relaxation(1.0, 500, 100))
    assert flat == pytest.approx(0.632121, abs=1e-5)


def test_inversion_recovery_by_hand_and_its_null():
    # |1 - 2 e^-2.5 + e^-9| e^-1.2 = 0.835953 * 0.301194
    got = InversionRecovery(tr_ms=9000, te_ms=120, ti_ms=2500).signal(Relaxation(1.0, 1000, 100))
    assert got == pytest.approx(0.251784, abs=1e-5)
    null = 1000 * math.log(2 / (1 + math.exp(-9)))
    at_null = InversionRecovery(tr_ms=9000, te_ms=0, ti_ms=null).signal(Relaxation(1.0, 1000, 100))
    assert at_null == pytest.approx(0.0, abs=1e-6)
    before = InversionRecovery(tr_ms=9000, te_ms=0, ti_ms=100).signal(Relaxation(1.0, 1000, 100))
    assert before > 0.8  # magnitude, not sign


def test_contrast_agent_by_hand():
    # 1/1500 + 4.5 * 0.2 / 1000 = 0.00156667 per ms at 3 T
    tissue = enhance(Relaxation(0.9, 1500, 100), 0.2, 3.0)
    assert tissue.t1 == pytest.approx(638.298, abs=1e-2)
    assert tissue.t2 == pytest.approx(1 / (0.01 + 5.9 * 0.2 / 1000))
    assert tissue.pd == 0.9
    t1w = SpinEcho(tr_ms=600, te_ms=10)
    assert t1w.signal(tissue) > 1.3 * t1w.signal(Relaxation(0.9, 1500, 100))


@pytest.mark.parametrize("field_t", [1.5, 3.0])
def test_tissues_have_the_usual_contrast(field_t: float):
    for seed in range(10):
        tissue = draw_tissues(np.random.default_rng(seed), field_t)
        scanner = Scanner(field_t=field_t)
        flair, t1, _, t2 = ({name: s.signal(tissue[name]) for name in tissue} for s in scanner.sequences)
        assert flair["oedema"] > 1.15 * flair["white"] and flair["csf"] < 0.6 * flair["white"]
        assert t1["white"] > t1["grey"] > t1["csf"]
        assert t2["csf"] > t2["oedema"] > t2["white"]
        share = (tissue["oedema"].t2 - tissue["white"].t2) / (tissue["oedema_fluid"].t2 - tissue["white"].t2)
        assert 0.6 <= share <= 0.85


def look(seed: int, **settings) -> list[dict[str, float]]:
    """Signal of one patient's tissues on FLAIR, T1, T1c and T2 at 3 T, relative to white matter."""
    tissue = draw_tissues(np.random.default_rng(seed), 3.0, Look(**settings))
    return [{name: sequence.signal(tissue[name]) / sequence.signal(tissue["white"]) for name in tissue}
            for sequence in Scanner().sequences]


def test_looks_of_tumours():
    for seed in range(10):
        plain, faint = look(seed), look(seed, faint=1.0)
        assert 1 < faint[0]["oedema"] < 1.25 < plain[0]["oedema"]
        solid, mismatch, cyst = look(seed, fluid=0.0), look(seed, fluid=0.0, mismatch=1.0), look(seed, fluid=1.0)
        assert mismatch[3]["core"] > 1.15 * solid[3]["core"]  # brighter on T2, darker on FLAIR
        assert mismatch[0]["core"] < 0.9 * solid[0]["core"]
        assert cyst[0]["core"] < look(seed, fluid=0.5)[0]["core"] and cyst[3]["core"] > 1.15 * solid[3]["core"]
        assert plain[0]["calcification"] < 0.6 and plain[3]["calcification"] < 0.6  # dark on FLAIR and T2
        assert plain[1]["blood_products"] > 1.1  # bright on T1
        assert plain[0]["oedema"] > plain[0]["oedema_b"] > 1  # two sub-classes


def test_t1_can_be_flat():
    flat = SpinEcho(tr_ms=1050, te_ms=21)
    white, grey = (Relaxation(*TISSUES[name][1]) for name in ("white", "grey"))
    # 0.70 (1 - e^-1.16667) e^-0.28378 = 0.36293 and 0.81 (1 - e^-0.73944) e^-0.21429 = 0.34167
    assert flat.signal(white) / flat.signal(grey) == pytest.approx(1.0622, abs=1e-4)
    usual = SpinEcho(tr_ms=400, te_ms=8)
    assert usual.signal(white) / usual.signal(grey) > 1.2


def test_relaxation_depends_on_field_strength():
    low, high = (dict(zip(TISSUES, column, strict=True)) for column in zip(*TISSUES.values(), strict=True))
    assert all(high[name].t1 > low[name].t1 for name in ("white", "grey", "blood"))


def test_noise_and_bias_are_bounded():
    profiles = site_profiles(60, seed=3)
    assert max(p.scanner.noise for p in profiles) <= 0.06
    assert {p.scanner.field_t for p in profiles} == {1.5, 3.0}
    assert len({repr(p) for p in profiles}) == 60
    assert eval(repr(profiles[0])) == profiles[0]  # prints as the code that makes it
    with pytest.raises(ValueError, match="noise"):
        Scanner(noise=0.2)
    with pytest.raises(ValueError, match="tesla"):
        Scanner(field_t=7.0)
    with pytest.raises(ValueError, match="low_grade"):
        Population(low_grade=1.5)


# The task


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def test_thresholding_does_not_solve_it(default_cohort: list[Site]):
    levels = np.arange(-1.0, 4.0, 0.1)
    scores = np.zeros((4, len(patients(default_cohort)), len(levels)))
    for number, patient in enumerate(patients(default_cohort)):
        brain = (patient.image[0] != 0).numpy()
        whole = (patient.label > 0).numpy()[brain]
        for channel in range(4):
            values = patient.image[channel].float().numpy()[brain]
            scores[channel, number] = [dice(values > level, whole) for level in levels]
    assert scores.mean(1).max() < 0.7  # one threshold for all, the best modality, chosen in retrospect
    assert scores[0].max(1).mean() < 0.8  # the best FLAIR threshold per patient
    assert scores[0].mean(0).max() > 0.45  # but the tumour is visible


def test_images_are_normalised_over_the_brain(default_cohort: list[Site]):
    patient = default_cohort[0].train[0]
    assert patient.image.dtype == torch.float16 and patient.image.shape == (4, 64, 64, 64)
    inside = patient.image[:, patient.image[0] != 0].float()
    assert torch.allclose(inside.mean(1), torch.zeros(4), atol=2e-2)
    assert torch.allclose(inside.std(1), torch.ones(4), atol=2e-2)
    assert patient.spacing_mm == (3.0, 3.0, 3.0)


# Sites


def test_sizes_follow_the_real_profile():
    sizes = site_sizes(13, 285)
    assert sum(sizes) == 285 and len(sizes) == 13
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 10 * sizes[-1] and min(sizes) >= 2
    assert site_sizes(17, sum(FETS_SIZES))[0] == pytest.approx(129, rel=0.12)
    assert sum(site_sizes(40, 500)) == 500
    assert site_sizes(3, 6) == [2, 2, 2]
    with pytest.raises(ValueError, match="need 26 patients"):
        site_sizes(13, 20)


def test_sites_differ_in_who_comes():
    profiles = site_profiles(20, seed=0)
    people = [profile.population for profile in profiles]
    low, median, age = (np.array([getattr(p, name) for p in people]) for name in ("low_grade", "median_ml", "age"))
    assert low.min() < 0.02 and 0.6 < low.max() <= 0.8 and 0.2 < low.mean() < 0.4
    assert 15 <= median.min() < 20 and 120 < median.max() <= 150
    assert age.min() < 42 and age.max() > 68
    assert 5 <= sum(p.operated > 0 for p in people) <= 10 and max(p.operated for p in people) > 0.2
    assert max(p.faint for p in people) > 0.3 and max(p.multifocal for p in people) <= 0.14
    scanners = [profile.scanner for profile in profiles]
    assert max(s.bias for s in scanners) > 0.2 and sum(min(s.coverage) < 1 for s in scanners) >= 2
    assert max(s.slice_mm[1] for s in scanners if s.slice_axis[1] == 0) > 3  # thick sagittal T1
    assert sum(3 <= size <= 9 for size in site_sizes(13, 285)) >= 4
    for profile in profiles:
        assert eval(repr(profile)) == profile  # prints as the code that makes it


def test_a_population_is_set_by_keyword():
    def drawn(**settings) -> list[Growth]:
        rng = np.random.default_rng(0)
        return [draw_growth(rng, Population(**settings)) for _ in range(400)]

    assert np.median([g.volume_ml for g in drawn(median_ml=20.0)]) == pytest.approx(20, rel=0.15)
    assert np.mean([g.low_grade for g in drawn(low_grade=0.4)]) == pytest.approx(0.4, abs=0.13)
    assert all(g.diffuse >= 0.4 for g in drawn(necrotic=0.0, solid=0.0, cystic=0.0, diffuse=1.0))
    assert all(g.look.fluid >= 0.75 for g in drawn(necrotic=0.0, solid=0.0, cystic=1.0, diffuse=0.0))
    assert all(g.look.faint >= 0.5 for g in drawn(faint=1.0)) and all(g.look.faint < 0.5 for g in drawn(faint=0.0))
    assert all((g.look.mismatch > 0) == g.low_grade for g in drawn(mismatch=1.0))
    assert all(g.calcified > 0 and g.bleeding == 0 for g in drawn(calcified=1.0, bleeding=0.0))
    assert all(eval(repr(g)) == g for g in drawn()[:20])
    for name, value, message in (("low_grade", 1.5, "between 0 and 1, got 1.5"), ("age", 10, "between 18 and 90"),
                                 ("median_ml", 3, "between 5 and 250"), ("necrotic", -1, "between 0 and inf")):
        with pytest.raises(ValueError, match=message):
            Population(**{name: value})
    with pytest.raises(ValueError, match="must be above 0"):
        Population(necrotic=0, solid=0, cystic=0, diffuse=0)
    with pytest.raises(ValueError, match="coverage must be four shares"):
        Scanner(coverage=(1.0, 0.5, 1.0, 1.0))


def test_held_out_counts_and_fractions(cache: Path):
    cohort = make_cohort(sizes=[2, 3, 1], held_out=0.4, cache=cache, **COARSE)
    assert [(len(s.train), len(s.val)) for s in cohort] == [(1, 1), (2, 1), (1, 0)]
    assert [s.name for s in cohort] == ["site-01", "site-02", "site-03"]
    assert len({p.id for p in patients(cohort)}) == 6
    none = make_cohort(sizes=[2], held_out=0, cache=cache, **COARSE)
    assert (len(none[0].train), len(none[0].val)) == (2, 0)
    kept = {p.id for p in cohort[1].val} | {p.id for p in cohort[1].train}
    assert len(kept) == 3
    with pytest.raises(ValueError, match="leave none to train on"):
        make_cohort(sizes=[2, 3], held_out=2, cache=cache, **COARSE)
    with pytest.raises(ValueError, match="fraction below 1"):
        make_cohort(sizes=[2], held_out=1.5, cache=cache, **COARSE)
    with pytest.raises(ValueError, match="one profile per site"):
        make_cohort(sizes=[2, 2], profiles=site_profiles(3), cache=cache, **COARSE)
    with pytest.raises(ValueError, match="cut the brain off"):
        make_cohort(sizes=[2], cache=cache, shape=(32, 32, 32), spacing_mm=3.0, progress=False)
    with pytest.raises(ValueError, match="three positive voxel counts"):
        make_cohort(sizes=[2], cache=cache, shape=(32, 32), spacing_mm=6.0, progress=False)


# Determinism and cache


def test_a_patient_depends_on_seed_site_and_number_only(cache: Path):
    first = coarse_patient(cache)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    again = coarse_patient(cache)
    torch.set_num_threads(threads)
    assert torch.equal(first.image, again.image) and torch.equal(first.label, again.label)
    for change in ({"seed": 1}, {"site": "site-02"}, {"index": 1}, {"profile": site_profiles(2)[1]}):
        assert not torch.equal(first.image, coarse_patient(cache, **change).image), change
    assert first.image.dtype == torch.int16 and first.image.shape == (4, 32, 32, 32)
    assert torch.equal(first.image[0] > 0, first.image[3] > 0)  # > 0 in the brain in every image, 0 outside


def test_worker_processes_change_nothing(cache: Path, fresh: Path):
    here = make_cohort(sizes=[2, 1], held_out=0, cache=cache, **COARSE)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = make_cohort(sizes=[2, 1], held_out=0, cache=fresh, **(COARSE | {"workers": pool}))
    for a, b in zip(patients(here), patients(there), strict=True):
        assert a.id == b.id
        assert torch.equal(a.image, b.image) and torch.equal(a.label, b.label)
    assert not list(fresh.glob("*.part"))


@pytest.mark.parametrize("from_stdin", [False, True])
def test_a_script_without_a_main_guard_generates_with_workers(cache: Path, fresh: Path, tmp_path_factory, from_stdin):
    settings = COARSE | {"workers": 2}
    code = (f"import fedlab as fl\nprint('started')\nsites = fl.make_cohort(sizes=[2, 1], held_out=0, "
            f"cache={str(fresh)!r}, **{settings!r})\nprint([len(site.train) for site in sites])\n")
    script = tmp_path_factory.mktemp("script") / "script.py"
    script.write_text(code)
    command = [*PYTHON, "-"] if from_stdin else [sys.executable, str(script)]
    done = subprocess.run(command, input=code if from_stdin else None,
                          env={**os.environ, "PYTHONPATH": str(Path(fedlab.__file__).parents[1])},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["started", "[2, 1]"]  # no worker ran the script
    here, there = (patients(make_cohort(sizes=[2, 1], held_out=0, cache=place, **COARSE)) for place in (cache, fresh))
    assert all(torch.equal(a.image, b.image) for a, b in zip(here, there, strict=True))


def cached_files(folder: Path) -> list[Path]:
    """The patients' files; the atlas is the largest."""
    return sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)[:-1]


def test_damaged_and_foreign_cache_files_are_made_anew(fresh: Path):
    settings = {"sizes": [2], "held_out": 0, "cache": fresh, **COARSE}
    before = patients(make_cohort(**settings))
    one, other = cached_files(fresh)
    whole = {path: path.read_bytes() for path in (one, other)}
    assert all(torch.equal(a.image, b.image) for a, b in zip(before, patients(make_cohort(**settings)), strict=True))

    flipped = bytearray(whole[one])
    flipped[-100] ^= 1
    damages = {"one bit": bytes(flipped), "cut short": whole[one][:1000], "not ours": b"anything",
               "empty": b"", "of another patient": whole[other]}
    for name, content in damages.items():
        one.write_bytes(content)
        with pytest.warns(UserWarning, match="generated anew"):
            after = patients(make_cohort(**settings))
        assert all(torch.equal(a.image, b.image) for a, b in zip(before, after, strict=True)), name
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the newly generated file is valid
            make_cohort(**settings)


def test_other_settings_use_other_files(fresh: Path):
    names = {path_of(fresh, settings) for settings in ("a", "b", "a")}
    assert len(names) == 2
    make_cohort(sizes=[1], held_out=0, cache=fresh, **COARSE)
    make_cohort(sizes=[1], held_out=0, cache=fresh, seed=1, **COARSE)
    assert len(cached_files(fresh)) == 2


# BraTS layout


def test_brats_folder_reads_back(tmp_path: Path, cache: Path):
    nibabel = pytest.importorskip("nibabel")
    out = write_brats(tmp_path / "brats", sizes=[2, 1], cache=cache, **COARSE)
    with (out / "partitioning.csv").open(encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [["Partition_ID", "Subject_ID"], ["1", "site-01-000"], ["1", "site-01-001"], ["2", "site-02-000"]]
    raw = coarse_patient(cache, profile=site_profiles(2)[0])
    for channel, name in enumerate(("flair", "t1", "t1ce", "t2", "seg")):
        image = nibabel.load(out / "site-01-000" / f"site-01-000_{name}.nii.gz")
        assert "".join(nibabel.aff2axcodes(image.affine)) == "LPS"
        assert image.get_data_dtype() == (np.uint8 if name == "seg" else np.int16)
        assert image.header.get_zooms() == (6.0, 6.0, 6.0)
        ras = nibabel.as_closest_canonical(image)
        assert np.allclose(ras.affine, raw.affine)
        expected = raw.label if name == "seg" else raw.image[channel]
        assert np.array_equal(np.asarray(ras.dataobj), expected.numpy())


def test_nothing_is_overwritten(tmp_path: Path, cache: Path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="nothing is overwritten"):
        write_brats(tmp_path, sizes=[1], cache=cache, **COARSE)
    with pytest.raises(DataError, match="nothing is overwritten"):
        write_brats(tmp_path / "mine.txt", sizes=[1], cache=cache, **COARSE)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
