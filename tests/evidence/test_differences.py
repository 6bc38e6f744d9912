"""Paired differences of Dice: the values, the intervals against theory, and the inputs without an interval."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from fedlab.evidence.differences import Difference, difference, share_kept


def scores(arms: dict[str, dict[tuple[str, str], tuple[float, float, float]]], *, lacks=(), seed=None) -> pd.DataFrame:
    """Rows of scores, from arm -> (site, patient) -> Dice of TC, WT, ET; the reference of the patients that `lacks`
    names has no ET."""
    rows = [{"arm": arm, "site": site, "patient": patient, "region": region, "dice": dice, "hd95_mm": 1.0,
             "reference_ml": 0.0 if region == "ET" and patient in lacks else 1.0, "predicted_ml": 1.0,
             **({} if seed is None else {"seed": seed})}
            for arm, of in arms.items() for (site, patient), values in of.items()
            for region, dice in zip(("TC", "WT", "ET"), values, strict=True)]
    return pd.DataFrame(rows)


def test_the_value_is_the_difference_of_the_means_by_hand():
    table = scores({"a": {("s", "1"): (0.9, 0.6, 0.3), ("t", "2"): (0.5, 0.5, 0.8)},
                    "b": {("t", "2"): (0.1, 0.4, 0.4), ("s", "1"): (0.3, 0.6, 0.6)}})
    found = difference(table, "a", "b")
    # TC: (0.6 + 0.4) / 2 = 0.5, WT: (0 + 0.1) / 2 = 0.05, ET: (-0.3 + 0.4) / 2 = 0.05
    assert found.value == pytest.approx(0.2)
    assert difference(table, "a", "b", region="WT").value == pytest.approx(0.05)
    assert difference(table, "b", "a").value == pytest.approx(-0.2)
    assert (found.patients, found.sites, found.seeds) == (2, 2, 1)
    assert math.isnan(found.low) and math.isnan(found.high) and not found.is_clear
    assert "no interval from fewer than 6 patients" in str(found)


def test_a_patient_without_the_region_does_not_count_under_skip():
    table = scores({"a": {("s", "1"): (1, 1, 1.0), ("s", "2"): (1, 1, 0.4)},
                    "b": {("s", "1"): (1, 1, 0.0), ("s", "2"): (1, 1, 0.3)}}, lacks="1")
    assert difference(table, "a", "b", region="ET").value == pytest.approx(0.55)
    assert difference(table, "a", "b", region="ET", empty="skip").value == pytest.approx(0.1)
    assert difference(table, "a", "b", empty="skip").value == pytest.approx(0.1 / 3)


def test_local_models_count_on_their_own_and_on_other_sites_patients():
    patients = [("s", "1"), ("t", "2"), ("u", "3")]
    table = scores({"federated": dict.fromkeys(patients, (0.8,) * 3),
                    **{f"local {site}": {p: ((0.7 if p[0] == site else value),) * 3 for p in patients}
                       for site, value in (("s", 0.2), ("t", 0.4), ("u", 0.6))}})
    assert difference(table, "federated", "local_own").value == pytest.approx(0.1)
    # patient 1: mean of 0.4 and 0.6, patient 2: of 0.2 and 0.6, patient 3: of 0.2 and 0.4
    assert difference(table, "federated", "local_others").value == pytest.approx(0.8 - (0.5 + 0.4 + 0.3) / 3)
    assert difference(table, "federated", "local t").value == pytest.approx(0.8 - (0.4 + 0.7 + 0.4) / 3)


def test_the_interval_is_that_of_a_stratified_mean():
    random = np.random.default_rng(3)
    sizes = {"big": 30, "middle": 12, "small": 5}
    gaps = {(site, f"{site}{k}"): float(random.normal(0.05, 0.1)) for site, n in sizes.items() for k in range(n)}
    table = scores({"a": {key: (0.5 + gap,) * 3 for key, gap in gaps.items()}, "b": dict.fromkeys(gaps, (0.5,) * 3)})
    found = difference(table, "a", "b", draws=20_000)
    by_site = [np.array([gap for (at, _), gap in gaps.items() if at == site]) for site in sizes]
    variance = sum(len(v) * v.var(ddof=1) for v in by_site) / 47**2  # Cochran 1977, (5.7), shares as in the sample
    assert found.value == pytest.approx(np.mean(list(gaps.values())))
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.04)
    assert (found.low + found.high) / 2 == pytest.approx(found.value, abs=0.1 * math.sqrt(variance))
    assert found == difference(table.sample(frac=1, random_state=1), "a", "b", draws=20_000)  # in any order of rows


def test_the_interval_covers_the_truth_in_about_95_of_100_comparisons():
    random = np.random.default_rng(0)
    sites = [("a", 12), ("b", 6), ("c", 2), ("d", 1), ("e", 3)]
    names = [(site, f"{site}{k}") for site, n in sites for k in range(n)]
    covered = 0
    for _ in range(300):
        gaps = random.normal(0.1, 0.1, size=len(names))
        found = difference(scores({"a": {n: (0.5 + g,) * 3 for n, g in zip(names, gaps, strict=True)},
                                   "b": dict.fromkeys(names, (0.5,) * 3)}), "a", "b", draws=400)
        covered += found.low <= 0.1 <= found.high
    assert 0.89 <= covered / 300 <= 0.985  # binomial(300, 0.93) leaves this range with probability below 0.005


def test_sites_of_one_patient_do_not_make_the_interval_narrow():
    gaps = dict(zip([(f"s{k}", str(k)) for k in range(8)], [0.3, -0.2, 0.25, -0.1, 0.2, -0.15, 0.3, 0.1], strict=True))
    found = difference(scores({"a": {k: (0.5 + g,) * 3 for k, g in gaps.items()},
                               "b": dict.fromkeys(gaps, (0.5,) * 3)}), "a", "b")
    error = np.std(list(gaps.values()), ddof=1) / math.sqrt(8)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_seeds_bring_their_own_patients():
    one = {("s", str(k)): (0.6,) * 3 for k in range(4)}
    other = {("s", str(k)): (0.5,) * 3 for k in range(4)}
    table = pd.concat([scores({"a": one, "b": other}, seed=0),
                       scores({"a": {k: (0.9,) * 3 for k in one}, "b": other}, seed=1)])
    found = difference(table, "a", "b")
    assert (found.value, found.patients, found.seeds, found.sites) == (pytest.approx(0.25), 8, 2, 1)
    assert found.is_clear and "8 patients of 1 site, 2 seeds" in str(found)


def test_what_cannot_be_compared_is_refused():
    table = scores({"a": {("s", "1"): (1, 1, 1), ("s", "2"): (1, 1, 1)}, "b": {("s", "1"): (1, 1, 1)}})
    with pytest.raises(ValueError, match="'a' and 'b' were not scored on the same patients"):
        difference(table, "a", "b")
    with pytest.raises(ValueError, match="no arm 'c' in the scores; there are a, b"):
        difference(table, "a", "c")
    with pytest.raises(ValueError, match="region is one of"):
        difference(table, "a", "b", region="core")


@pytest.mark.parametrize("low, high, clear", [
    (0.01, 0.2, True), (-0.2, -0.01, True), (-0.1, 0.1, False), (-0.2, 0.0, False), (0.0, 0.2, False),
    (math.nan, math.nan, False)])
def test_a_difference_is_clear_where_its_interval_is_on_one_side_of_0(low, high, clear):
    found = Difference(one="a", other="b", value=(low + high) / 2, low=low, high=high, patients=9, sites=3, seeds=1,
                       region="mean", empty="brats")
    assert found.is_clear is clear


def test_a_share_of_a_gain_is_stated_only_where_the_gain_is_clear():
    """Twelve patients at three sites. A gain of 0.2 in each, of which half is kept; and one that half of them lose."""
    def scores(gains):
        rows = [{"site": f"s{k % 3}", "patient": f"p{k}", "region": region, "arm": arm, "hd95_mm": 1.0,
                 "dice": 0.5 + 0.01 * k + share * gain, "reference_ml": 1.0, "predicted_ml": 1.0}
                for k, gain in enumerate(gains) for region in ("WT", "TC", "ET")
                for arm, share in (("public", 0.0), ("half", 0.5), ("whole", 1.0))]
        return pd.DataFrame(rows)

    kept = share_kept(scores([0.2] * 12), "half", full="whole", start="public")
    assert (kept.value, kept.low, kept.high) == pytest.approx((0.5, 0.5, 0.5)) and kept.patients == 12
    unclear = share_kept(scores([0.2, 0.2, 0.2, -0.18, -0.19, -0.2] * 2), "half", full="whole", start="public")
    assert unclear.gain.low < 0 < unclear.gain.value < unclear.gain.high
    assert math.isnan(unclear.value) and math.isnan(unclear.low)
