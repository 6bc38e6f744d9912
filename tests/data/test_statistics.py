"""Statistics of a site: withheld values, the noise and its guarantee, and sums over sites."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

import irregular
from chance import FALSE_ALARM, SIGMAS, seeded
from cohorts import blob_patient
from fedlab.core.errors import DataError
from fedlab.core.types import MODALITIES, REGIONS, Patient, Site, Spent
from fedlab.data.sites.harmonisation import Harmonisation, fit_harmonisation
from fedlab.data.sites.heterogeneity import heterogeneity, jensen_shannon, wasserstein
from fedlab.data.sites.partition import Partition
from fedlab.data.sites.statistics import (
    PARTS,
    RAW,
    Distribution,
    Domain,
    SiteStatistics,
    combine,
    contributions,
    site_statistics,
)
from fedlab.privacy.noise.laplace import discrete_laplace, noisy
from fedlab.view.site_figures import heterogeneity_figure, intensity_figure, partition_figure

COARSE = Domain(intensity=tuple(np.linspace(-3, 5, 9).tolist()))
NAMED = replace(COARSE, spacings=("1.5x3x6",), shapes=("16x16x16", "8x8x8"))


def blob_site(name: str, count: int, *, held: int = 0, scale: float = 1.0, shift: float = 0.0) -> Site:
    patients = [blob_patient(f"{name}-{number}", seed=1000 * len(name) + number) for number in range(count + held)]
    patients = [replace(p, image=p.image * scale + shift) for p in patients]
    return Site(name, patients[:count], patients[count:])


# --- Laplace noise -------------------------------------------------------------------------------------------------

@pytest.mark.chance
@pytest.mark.parametrize("scale", [Fraction(1, 3), Fraction(2), Fraction(37, 5), Fraction(10**6, 7)])
def test_the_noise_has_the_moments_of_the_discrete_laplace_distribution(scale: Fraction) -> None:
    """Mean and variance."""
    n, rng = 20_000, random.Random(seeded(1))
    draws = np.array([discrete_laplace(scale=scale, rng=rng) for _ in range(n)], dtype=float)
    true = stats.dlaplace(1 / float(scale))
    variance, kurtosis = true.stats("vk")
    assert abs(draws.mean()) < SIGMAS * math.sqrt(variance / n)
    assert abs(np.square(draws).mean() / variance - 1) < SIGMAS * math.sqrt((float(kurtosis) + 2) / n)


@pytest.mark.chance
def test_the_noise_has_the_right_probabilities() -> None:
    """Chi-squared."""
    n, rng, scale = 20_000, random.Random(seeded(2)), Fraction(3, 2)
    draws = np.array([discrete_laplace(scale=scale, rng=rng) for _ in range(n)])
    ends = np.arange(-5, 6)
    seen = [(draws <= -6).sum(), *[(draws == k).sum() for k in ends], (draws >= 6).sum()]
    true = stats.dlaplace(1 / float(scale))
    expected = n * np.array([true.cdf(-6), *true.pmf(ends), true.sf(5)])
    assert stats.chisquare(seen, expected).pvalue > FALSE_ALARM


def test_one_unit_more_is_hidden_by_the_noise() -> None:
    """The definition itself: no output is more than e^(1/scale) times as likely for a neighbouring count."""
    scale, n = Fraction(2), 40_000
    rng = random.Random(3)
    draws = [np.bincount(np.clip(np.array(noisy([start] * n, scale=scale, rng=rng)) + 4, 0, 9), minlength=10)
             for start in (0, 1)]
    for here, there in (draws, draws[::-1]):
        slack = 4.5 * np.sqrt(here) + 4.5 * np.sqrt(math.exp(0.5) ** 2 * there)
        assert (here <= math.exp(0.5) * there + slack).all()
    assert (draws[0] > math.exp(0.3) * draws[1] + 200).any()  # the bound is nearly reached


def test_a_scale_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="scale must be above 0"):
        discrete_laplace(scale=Fraction(0), rng=random.Random(0))


# --- what one patient can change -----------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(image=hnp.arrays(np.float32, (4, 3, 5, 2), elements=st.floats(-2.0**100, 2.0**100, width=32)),
       label=st.none() | hnp.arrays(np.uint8, (3, 5, 2), elements=st.sampled_from([0, 1, 2, 4])),
       affine=irregular.affines(), scale=st.floats(0.1, 20))
def test_no_patient_contributes_more_than_declared(image, label, affine: np.ndarray, scale: float) -> None:
    """Adversarial images: the vectors are non-negative whole parts that sum to at most one patient each."""
    image[0, 0, 0, 0] = 1.0
    patient = Patient("p", torch.from_numpy(image), None if label is None else torch.from_numpy(label),
                      affine @ np.diag([scale, scale, scale, 1]))
    told = contributions(patient, domain=NAMED)
    assert len(told) == 1 + 4 + 3 + 2
    for name, counts in told.items():
        assert counts.dtype == np.int64 and (counts >= 0).all(), name
        assert counts.sum() <= PARTS, name


def test_the_noise_covers_the_removal_of_a_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise, the counts change by at most the declared Q · PARTS when any patient is removed."""
    seen: list[tuple[list[int], Fraction]] = []

    def no_noise(counts, *, scale, rng):
        counts = list(counts)
        seen.append((counts, scale))
        return counts

    monkeypatch.setattr("fedlab.data.sites.statistics.noisy", no_noise)
    epsilon = 2.0
    site = blob_site("a", 6, held=2)
    everyone = [*site.train, *site.val]
    odd = [replace(everyone[0], image=everyone[0].image * 1e4), replace(everyone[1], label=None),
           replace(everyone[2], image=torch.ones(4, 16, 16, 16))]
    everyone = [*odd, *everyone[3:]]

    def counted(patients: list[Patient]) -> tuple[np.ndarray, list[Fraction]]:
        seen.clear()
        site_statistics(Site("a", patients), domain=NAMED, epsilon=epsilon, seed=0)
        return np.concatenate([counts for counts, _ in seen]), [scale for _, scale in seen]

    whole, scales = counted(everyone)
    assert len(set(scales)) == 1 and len(scales) == 10
    declared = scales[0] * Fraction(epsilon)
    assert declared == 10 * PARTS
    changes = [np.abs(whole - counted([p for p in everyone if p is not gone])[0]).sum() for gone in everyone]
    assert max(changes) <= declared
    assert max(changes) > 0.99 * declared  # the declared sensitivity is not larger than needed


# --- noised statistics ---------------------------------------------------------------------------------------------

def test_noised_statistics_state_their_cost_and_charge_the_ledger_first() -> None:
    site = blob_site("a", 12)
    charged: list[Spent] = []
    told = site_statistics(site, domain=COARSE, epsilon=3.0, charge=charged.append, seed=0)
    assert told.spent == (Spent(3.0, 0.0, "patient", "Laplace", "add or remove one patient", True),) == tuple(charged)

    def empty(spent: Spent) -> None:
        raise RuntimeError("no budget left")

    with pytest.raises(RuntimeError, match="no budget left"):
        site_statistics(site, epsilon=3.0, charge=empty)
    assert told.train is None and told.held_out is None
    assert told.spacing_mm == {} and told.shape == {}  # the domain does not name them


def test_noise_is_seeded_or_fresh() -> None:
    site = blob_site("a", 8)
    settings_ = {"domain": NAMED, "epsilon": 50.0}
    assert site_statistics(site, seed=1, **settings_) == site_statistics(site, seed=1, **settings_)
    assert site_statistics(site, seed=1, **settings_) != site_statistics(site, seed=2, **settings_)
    assert site_statistics(site, **settings_) != site_statistics(site, **settings_)


@pytest.mark.chance
def test_noised_counts_are_unbiased_with_the_declared_spread() -> None:
    """80 seeds; the mean of the count, and the spread within 0.35: 5 standard errors of a Laplace law's."""
    site, q = blob_site("a", 20), 3
    few = replace(COARSE, modalities=("T1",), regions=("WT",))
    counts = [site_statistics(site, domain=few, epsilon=3.0, seed=seeded(seed)).patients for seed in range(80)]
    sd = math.sqrt(2) * q / 3.0
    assert abs(np.mean(counts) - 20) < SIGMAS * sd / math.sqrt(80)
    assert np.std(counts) == pytest.approx(sd, rel=0.35)


def test_with_a_large_epsilon_the_noise_is_negligible() -> None:
    site = blob_site("a", 30)
    exact = site_statistics(site, domain=NAMED, minimum=1)
    close = site_statistics(site, domain=NAMED, epsilon=1e4, seed=0)
    assert close.patients == pytest.approx(30, abs=0.1)
    assert close.spacing_mm["1.5x3x6"] == pytest.approx(30, abs=0.1)
    for name in MODALITIES:
        assert np.abs(close.intensity[name].shares() - exact.intensity[name].shares(COARSE.intensity)).max() < 0.01
        assert close.intensity[name].mean == pytest.approx(exact.intensity[name].mean, abs=0.1)


def test_too_few_patients_for_the_noise_are_withheld() -> None:
    told = site_statistics(blob_site("a", 2), domain=COARSE, minimum=20, epsilon=10.0, seed=0)
    assert told.patients is None and not told.intensity and told.spent


# --- statistics without noise --------------------------------------------------------------------------------------

def test_a_small_site_releases_nothing() -> None:
    told = site_statistics(blob_site("a", 3, held=1), minimum=5)
    assert told.patients is None and told.train is None
    assert not (told.intensity or told.volumes_ml or told.spacing_mm or told.shape)
    assert "fewer than 5" in told.withheld[0]


@settings(max_examples=25, deadline=None)
@given(count=st.integers(5, 14), minimum=st.integers(1, 5), seed=st.integers(0, 1000))
def test_every_bin_has_enough_patients(count: int, minimum: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    patients = []
    for number in range(count):
        image = torch.from_numpy(rng.normal(rng.uniform(-3, 6), rng.uniform(0.05, 2), (4, 6, 6, 6)).astype(np.float32))
        label = torch.from_numpy((rng.random((6, 6, 6)) < rng.random()).astype(np.uint8) * 4)
        patients.append(Patient(f"p{number}", image, label, np.diag([9.0, 9.0, 9.0, 1])))
    told = site_statistics(Site("s", patients), minimum=minimum)
    for name, spread in told.intensity.items():
        edges = np.array(spread.edges)
        for low, high in itertools.pairwise(edges):
            inside = 0
            for patient in patients:
                values = patient.image[MODALITIES.index(name)].numpy()
                below = values >= low if low > edges[0] else np.full(values.shape, True)
                inside += bool((below & ((values < high) | (high == edges[-1]))).any())
            assert inside >= minimum
        assert spread.total == pytest.approx(count, abs=0.01 * len(edges))
    for spread in told.volumes_ml.values():
        assert min(spread.counts) >= minimum and spread.total == count


def test_few_held_out_patients_hide_the_split() -> None:
    told = site_statistics(blob_site("a", 10, held=2), minimum=5)
    assert (told.patients, told.train, told.held_out) == (12, None, None)
    told = site_statistics(blob_site("a", 10, held=5), minimum=5)
    assert (told.patients, told.train, told.held_out) == (15, 10, 5)
    told = site_statistics(blob_site("a", 10), minimum=5)
    assert (told.train, told.held_out) == (10, 0)


@pytest.mark.parametrize(("rare", "expected"), [
    (0, {"3x3x3": 6.0, "2x2x2": 7.0}),
    (2, {"other": 15.0}),  # 2 alone would follow from 15 - 13; with the smaller group they are 8, and 7 remain
    (5, {"2x2x2": 7.0, "3x3x3": 6.0, "1x1x1": 5.0}),
])
def test_the_total_does_not_reveal_rare_voxel_sizes(rare: int, expected: dict[str, float]) -> None:
    patients = []
    for size, count in ((3.0, 6), (2.0, 7), (1.0, rare)):
        patients += [replace(blob_patient(f"{size}-{n}", seed=n), affine=np.diag([size, size, size, 1]))
                     for n in range(count)]
    told = site_statistics(Site("s", patients), minimum=5).spacing_mm
    if rare == 2:
        expected = {"2x2x2": 7.0, "other": 8.0}
    assert told == expected


def test_few_patients_without_a_label_hide_the_volumes() -> None:
    site = blob_site("a", 12)
    bare = [replace(p, label=None) for p in site.train]
    assert site_statistics(site).volumes_ml.keys() == set(REGIONS)
    assert site_statistics(Site("a", [*bare[:2], *site.train[2:]])).volumes_ml == {}
    assert site_statistics(Site("a", [*bare[:6], *site.train[6:]])).volumes_ml["WT"].total == 6
    assert site_statistics(Site("a", bare)).volumes_ml == {}


def test_moments_volumes_and_quantiles_are_those_of_the_patients() -> None:
    site = blob_site("a", 9)
    told = site_statistics(site, minimum=1)
    flair = torch.stack([p.image[0] for p in site.train]).double()
    assert told.intensity["FLAIR"].mean == pytest.approx(float(flair.mean()), rel=0.01, abs=1e-3)
    assert told.intensity["FLAIR"].sd == pytest.approx(float(flair.std()), rel=0.01)
    medians = [float(p.image[3].median()) for p in site.train]
    assert dict(told.intensity["T2"].quantiles)[0.5] == pytest.approx(float(np.mean(medians)), rel=0.02, abs=2e-3)
    voxels = int((site.train[0].label > 0).sum())
    assert told.volumes_ml["WT"].mean == pytest.approx(voxels * 27 / 1000, rel=0.01)
    assert dict(told.volumes_ml["WT"].quantiles)[0.5] == pytest.approx(voxels * 27 / 1000, rel=0.01)
    assert told.shape == {"16x16x16": 9.0} and told.spacing_mm == {"1.5x3x6": 9.0}


def test_a_quantile_is_never_that_of_one_patient() -> None:
    patients = []
    for number in range(11):
        label = torch.zeros(16, 16, 16, dtype=torch.uint8)
        label.view(-1)[:100 * 2**number // 60] = 4
        patients.append(replace(blob_patient(f"p{number}", seed=number), label=label))
    own = {round(int((p.label > 0).sum()) * 27 / 1000, 3) for p in patients}
    told = dict(site_statistics(Site("s", patients), minimum=5).volumes_ml["WT"].quantiles)
    assert 0.5 in told and 0.1 not in told and 0.9 not in told
    assert not own & set(told.values())


def test_raw_scans_are_counted_in_their_own_unit() -> None:
    site = blob_site("a", 6, scale=50.0, shift=400.0)
    told = site_statistics(site, domain=RAW)
    assert told.intensity["T1"].mean == pytest.approx(
        float(np.mean([p.image[1].mean() for p in site.train])), rel=0.01)
    assert 380 < told.intensity["T1"].quantile(0.5) < 420


@pytest.mark.parametrize(("change", "message"), [
    ({"image": torch.zeros(4, 16, 16, 16)}, "empty brain"),
    ({"image": torch.full((4, 16, 16, 16), float("nan"))}, "NaN or Inf"),
    ({"id": "a-1"}, "lists patient a-1 twice"),
])
def test_bad_patients_are_named(change: dict[str, object], message: str) -> None:
    site = blob_site("a", 6)
    bad = Site("a", [replace(site.train[0], **change), *site.train[1:]])
    for epsilon in (None, 1.0):
        with pytest.raises(DataError, match=message):
            site_statistics(bad, epsilon=epsilon)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"minimum": 0}, "minimum"), ({"epsilon": 0.0}, "epsilon"), ({"epsilon": -1.0}, "epsilon"),
    ({"epsilon": math.inf}, "epsilon"), ({"epsilon": math.nan}, "epsilon"), ({"seed": 1}, "belong to noise"),
    ({"charge": print}, "belong to noise"),
])
def test_wrong_settings_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        site_statistics(blob_site("a", 5), **wrong)


# --- on the wire, and together --------------------------------------------------------------------------------------

def test_statistics_survive_json_and_damaged_ones_are_refused() -> None:
    site = blob_site("a", 8, held=6)
    for told in (site_statistics(site), site_statistics(site, domain=NAMED, epsilon=4.0, seed=0)):
        assert SiteStatistics.from_json(told.to_json()) == told
    good = json.loads(site_statistics(site).to_json())
    for change in ({"format": "x"}, {"patients": "many"}, {"patients": math.nan}, {"intensity": {"T1": {}}},
                   {"spent": [{"epsilon": -1, "delta": 0, "unit": "patient", "accountant": "", "adjacency": ""}]},
                   {"surprise": 1}, {"spacing_mm": {"1": None}},
                   {"volumes_ml": {"WT": {"edges": [1, 0], "counts": [3], "mean": 1, "sd": 1, "quantiles": []}}}):
        with pytest.raises(DataError):
            SiteStatistics.from_json(json.dumps(good | change))
    for text in ("", "3", "[]", "{}"):
        with pytest.raises(DataError):
            SiteStatistics.from_json(text)


def test_combined_statistics_are_those_of_all_patients() -> None:
    one, two = blob_site("a", 7, held=3), blob_site("bb", 12, held=3, scale=2.0, shift=1.0)
    told = combine([site_statistics(site, minimum=1) for site in (one, two)])
    both = site_statistics(Site("all sites", [*one.train, *two.train], [*one.val, *two.val]), minimum=1)
    assert (told.patients, told.train, told.held_out) == (25, 19, 6)
    for name in MODALITIES:
        assert told.intensity[name].total == pytest.approx(25, abs=0.1)
        np.testing.assert_allclose(told.intensity[name].shares(), both.intensity[name].shares(
            told.intensity[name].edges), atol=0.005)
        assert told.intensity[name].mean == pytest.approx(both.intensity[name].mean, abs=0.015)  # three digits
        assert told.intensity[name].sd == pytest.approx(both.intensity[name].sd, rel=0.01)
        np.testing.assert_allclose([v for _, v in told.intensity[name].quantiles],
                                   [v for _, v in both.intensity[name].quantiles], atol=0.02)
    assert told.volumes_ml["WT"].total == 25
    assert told.spent == ()


def test_combining_keeps_track_of_withheld_sites_and_of_privacy() -> None:
    one, two = blob_site("a", 8), blob_site("bb", 3)
    told = combine([site_statistics(one), site_statistics(two)])
    assert told.patients == 8 and "bb" in told.withheld[0]
    noised = [site_statistics(site, domain=COARSE, epsilon=epsilon, seed=0, minimum=1)
              for site, epsilon in ((one, 2.0), (blob_site("ccc", 8), 6.0))]
    assert combine(noised).spent == noised[1].spent
    assert combine([noised[0], site_statistics(blob_site("dddd", 8))]).spent == ()
    with pytest.raises(ValueError, match="a would be counted twice"):
        combine([noised[0], site_statistics(one)])
    with pytest.raises(ValueError, match="no statistics"):
        combine([])


@settings(max_examples=60, deadline=None)
@given(counts=hnp.arrays(np.float64, 6, elements=st.floats(-50, 50)))
def test_noisy_counts_become_shares(counts: np.ndarray) -> None:
    spread = Distribution(edges=tuple(range(7)), counts=tuple(counts.tolist()))
    if spread.total <= 1e-6:
        return
    shares = spread.shares()
    assert (shares >= 0).all() and shares.sum() == pytest.approx(1)
    if (counts >= 0).all():
        np.testing.assert_allclose(shares, counts / counts.sum(), atol=1e-9)
    assert all(a <= b for a, b in itertools.pairwise([spread.quantile(q) for q in (0, 0.1, 0.5, 0.9, 1)]))


# --- how sites differ -----------------------------------------------------------------------------------------------

def spread_of(values: np.ndarray, edges: np.ndarray) -> Distribution:
    return Distribution(edges=tuple(edges.tolist()), counts=tuple(np.histogram(values, edges)[0].tolist()))


def test_distances_agree_with_references() -> None:
    edges = np.linspace(0, 10, 101)
    rng = np.random.default_rng(0)
    a, b = rng.uniform(1, 4, 4000), rng.uniform(3, 7, 4000)
    one, other = spread_of(a, edges), spread_of(b, edges)
    assert wasserstein(one, other) == pytest.approx(stats.wasserstein_distance(a, b), abs=0.02)
    assert wasserstein(one, one) == 0 == jensen_shannon(one, one)
    apart = spread_of(rng.uniform(8, 9, 100), edges)
    assert jensen_shannon(one, apart) == pytest.approx(1.0)
    assert 0 < jensen_shannon(one, other) < 1
    # Two bins that cross within one bin of the other's: half in each outer bin against all in the middle.
    left = Distribution(edges=(0.0, 1.0, 2.0, 3.0), counts=(1.0, 0.0, 1.0))
    right = Distribution(edges=(0.0, 3.0), counts=(2.0,))
    assert wasserstein(left, right) == pytest.approx(2 * (0.5 * 1 / 6 + 0.5 * 0.5 * 1 / 6))


def test_a_shifted_site_stands_out() -> None:
    sites = [blob_site("a", 8), blob_site("bb", 8), blob_site("ccc", 8, shift=1.5), blob_site("dddd", 2)]
    report = heterogeneity([site_statistics(site) for site in sites])
    flair = report.wasserstein["FLAIR"]
    assert flair[0, 1] < 0.1 and flair[0, 2] == pytest.approx(1.5, abs=0.2)
    assert np.isnan(flair[3]).all() and (flair == flair.T)[:3, :3].all()
    table = report.table()
    assert table["FLAIR shift"].idxmax() == "ccc" and np.isnan(table.loc["dddd", "patients"])
    with pytest.raises(ValueError, match="at least two sites"):
        heterogeneity([site_statistics(sites[0])])


def tumour_site(name: str, volumes_ml: np.ndarray, *, enhancing: bool) -> Site:
    """Patients with tumours of these volumes, in voxels of 1 ml."""
    patients = []
    for number, volume in enumerate(volumes_ml):
        label = torch.zeros(16, 16, 16, dtype=torch.uint8)
        label.view(-1)[:int(volume)] = 4 if enhancing else 1
        patients.append(replace(blob_patient(f"{name}{number}", seed=number), label=label,
                                affine=np.diag([10.0, 10.0, 10.0, 1.0])))
    return Site(name, patients)


@pytest.mark.parametrize("count", [5, 6, 8, 9, 10, 12, 15, 20, 40, 80])
@pytest.mark.parametrize("seed", [0, 1])
def test_distances_of_tiny_sites_are_right_or_not_known(count: int, seed: int) -> None:
    """Exact up to half of the sum of both standard deviations, or NaN with the reason; never 0 for different sites."""
    rng = np.random.default_rng(seed)
    volumes = [np.clip(median * np.exp(0.6 * rng.standard_normal(count)), 10, 250).astype(int)
               for median in (60, 30, 60)]
    sites = [tumour_site(name, own, enhancing=name != "b") for name, own in zip("abc", volumes, strict=True)]
    told = [site_statistics(site, minimum=5) for site in sites]
    report = heterogeneity(told)
    exact = [volumes[0], np.zeros(count), volumes[2]]
    for a, b in itertools.combinations(range(3), 2):
        found = report.wasserstein["ET volume"][a, b]
        true = stats.wasserstein_distance(exact[a], exact[b])
        domain = 0.1 + 0.2 * (exact[a].mean() + exact[b].mean())  # half of a bin of half an octave
        assert np.isnan(found) or abs(found - true) <= 0.5 * (exact[a].std() + exact[b].std()) + domain
        assert np.isnan(found) == np.isnan(report.jensen_shannon["ET volume"][a, b])
        if np.isnan(found):
            assert any("the distribution of" in reason and "volume ET" in reason and "at least 5 patients" in reason
                       for site in (a, b) for reason in report.reasons.get("abc"[site], ()))
    if count < 10:
        assert np.isnan(report.wasserstein["ET volume"][0]).all() and np.isnan(report.shift["ET volume"]).all()
        assert np.isnan(report.wasserstein["WT volume"][0, 1])
        assert "ET volume not known" in repr(report) and "not known" in report._repr_html_()
        assert "bins of at least 5 patients are too wide" in report._repr_html_()
    elif count == 80:
        assert report.wasserstein["ET volume"][0, 1] == pytest.approx(exact[0].mean(), rel=0.15)
        assert not report.reasons
    assert report.wasserstein["FLAIR"][0, 1] < 0.1  # every patient has all intensities
    assert [dict(each.volumes_ml["ET"].quantiles)[0.5] for each in told][1] == 0


def test_a_site_without_a_region_is_known_to_have_none() -> None:
    told = site_statistics(tumour_site("b", np.full(6, 40), enhancing=False), minimum=5)
    assert (told.volumes_ml["ET"].edges, told.volumes_ml["ET"].counts) == ((0.0, 0.1), (6.0,))
    assert not told.volumes_ml["ET"].coarse and not told.volumes_ml["WT"].coarse


def test_coarse_distributions_stay_out_of_sums_unless_all_are() -> None:
    rng = np.random.default_rng(0)
    few, many = (site_statistics(tumour_site(name, np.clip(60 * np.exp(0.6 * rng.standard_normal(count)), 10, 250),
                                             enhancing=True)) for name, count in (("few", 7), ("many", 60)))
    assert few.volumes_ml["ET"].coarse and not many.volumes_ml["ET"].coarse
    both = combine([few, many])
    assert both.patients == 67 and both.volumes_ml["ET"].total == 60 and not both.volumes_ml["ET"].coarse
    assert both.volumes_ml["ET"].mean == many.volumes_ml["ET"].mean
    assert any(reason.startswith("few: the distribution of") for reason in both.withheld)
    assert combine([few, replace(few, site="other")]).volumes_ml["ET"].coarse
    assert SiteStatistics.from_json(few.to_json()) == few
    older = json.loads(few.to_json())
    for spread in (*older["intensity"].values(), *older["volumes_ml"].values()):
        del spread["coarse"]  # as an earlier version wrote them
    assert not SiteStatistics.from_json(json.dumps(older)).volumes_ml["ET"].coarse


def test_figures_need_only_statistics() -> None:
    sites = [blob_site("a", 8, held=2), blob_site("bb", 8, shift=0.5), blob_site("ccc", 3)]
    told = [site_statistics(site) for site in sites]
    report = heterogeneity(told)
    for figure in (partition_figure(Partition.of(sites), told), partition_figure(Partition.of(sites)),
                   heterogeneity_figure(report), heterogeneity_figure(report, measure="wasserstein"),
                   intensity_figure(told)):
        assert figure.alt
        png, _ = figure._repr_png_()
        assert png.startswith(b"\x89PNG")
    assert "a 8 and 2" in partition_figure(Partition.of(sites), told).alt
    with pytest.raises(ValueError, match="no site other"):
        partition_figure(Partition.of(sites), [replace(told[0], site="other")])
    with pytest.raises(ValueError, match="measure is"):
        heterogeneity_figure(report, measure="euclid")
    with pytest.raises(ValueError, match="none of the sites"):
        intensity_figure([told[2]])


def test_html_escapes_foreign_text() -> None:
    told = replace(site_statistics(blob_site("a", 8)), site="<script>", shape={"<b>": 8.0})
    assert "<script>" not in told._repr_html_() and "<b>" not in told._repr_html_()
    assert "<script>" not in heterogeneity([told, site_statistics(blob_site("a", 8))])._repr_html_()


# --- harmonisation --------------------------------------------------------------------------------------------------

def test_harmonisation_maps_percentiles_onto_the_landmarks() -> None:
    patient = blob_patient("p", seed=0)
    marks = tuple(np.linspace(-1, 1, 11).tolist())
    percentiles = (1.0, *range(10, 100, 10), 99.0)
    mapped = Harmonisation(percentiles=percentiles, landmarks={"T1": marks})(patient)
    np.testing.assert_allclose(np.percentile(mapped.image[1], percentiles), marks, atol=1e-3)
    assert torch.equal(mapped.image[0], patient.image[0]) and mapped.label is patient.label
    order = patient.image[1].flatten().argsort()
    assert (mapped.image[1].flatten()[order].diff() >= 0).all()  # monotone, beyond the landmarks too
    assert mapped.image[1].max() > 1 and mapped.image[1].min() < -1
    assert torch.equal(patient.image, blob_patient("p", seed=0).image)  # the original is unchanged


def test_harmonisation_copes_with_saturation_and_background() -> None:
    patient = blob_patient("p", seed=0)
    image = patient.image.clamp(max=0.3)
    image[:, :4] = 0
    harmonise = Harmonisation(percentiles=(1.0, 50.0, 90.0, 99.0),
                              landmarks=dict.fromkeys(MODALITIES, (-2.0, 0.0, 1.0, 2.0)))
    mapped = harmonise(replace(patient, image=image.half()))
    assert mapped.image.dtype == torch.float16 and torch.isfinite(mapped.image).all()
    assert (mapped.image[:, :4] == 0).all()
    with pytest.raises(DataError, match="is constant"):
        harmonise(replace(patient, image=torch.ones(4, 16, 16, 16)))


@pytest.mark.parametrize("landmarks", [{"T1": (0.0, 1.0)}, {"T1": (0.0, 0.0, 1.0)}, {"T1": (0.0, 1.0, math.nan)}])
def test_wrong_landmarks_are_refused(landmarks) -> None:
    with pytest.raises(ValueError, match="T1"):
        Harmonisation(percentiles=(1.0, 50.0, 99.0), landmarks=landmarks)


def test_harmonisation_brings_scanners_together(tmp_path: Path) -> None:
    from fedlab.data.phantom.generator import make_cohort

    sites = make_cohort(sizes=[5, 5], held_out=0, shape=(32, 32, 32), spacing_mm=6.0, progress=False, workers=0,
                        cache=tmp_path)
    told = [site_statistics(site) for site in sites]
    harmonise = fit_harmonisation(told)
    before = heterogeneity(told).wasserstein
    after = heterogeneity([site_statistics(harmonise.site(site)) for site in sites]).wasserstein
    for name in MODALITIES:
        assert after[name].max() < 0.5 * before[name].max(), name
    with pytest.raises(ValueError, match="no site released"):
        fit_harmonisation([site_statistics(Site("s", sites[0].train[:2]))])
