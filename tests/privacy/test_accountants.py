"""Our ε against dp-accounting, an implementation that shares no code with ours.

`tests/privacy/accountant_reference.csv` holds what dp-accounting 0.6.0 gave for drawn and extreme settings (see
`benchmarks/accountant_reference.py`): by Rényi orders, and, between its columns low and high, the true ε: from privacy
loss distributions with every loss rounded down, and up.
"""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from opacus.accountants.analysis.rdp import compute_rdp
from scipy.stats import norm

from fedlab.privacy.accounting import mechanisms
from fedlab.privacy.accounting.ledger import Concentrated, Gaussian, Pure, epsilon_of, noise_multiplier_for
from fedlab.privacy.accounting.mechanisms import _ORDERS, _renyi_of_step, renyi_of

REFERENCE = Path(__file__).with_name("accountant_reference.csv")


def read() -> list[dict[str, float | str]]:
    with REFERENCE.open(encoding="utf-8", newline="") as file:
        return [{k: v if k == "kind" else float(v) for k, v in row.items()} for row in csv.DictReader(file)]


ROWS = read()
GAUSSIAN = [row for row in ROWS if row["kind"] == "gaussian"]


def releases(row):
    found = []
    if row["steps"]:
        found.append(Gaussian(noise_multiplier=row["noise_multiplier"], sample_rate=row["sample_rate"],
                              steps=int(row["steps"])))
    if row["pure_times"]:
        found.append(Pure(epsilon=row["pure_epsilon"], times=int(row["pure_times"])))
    return found


def assert_not_below(ours: float, row) -> None:
    assert ours >= row["low"] * (1 - 1e-7), (ours, row)


def test_the_reference_covers_what_it_should():
    assert len(GAUSSIAN) >= 230 and len(ROWS) - len(GAUSSIAN) >= 45
    for row in ROWS:  # to 2 %, or 0.0002 where ε is tiny
        assert 0 <= row["low"] <= row["high"] <= row["low"] + 0.02 * (row["high"] + 0.01) + 1e-9, row
    for name, least, most in (("noise_multiplier", 0.3, 60), ("sample_rate", 5e-4, 1), ("steps", 1, 7000),
                              ("delta", 1e-12, 0.2), ("high", 0.01, 1000)):
        values = [row[name] for row in GAUSSIAN]
        assert min(values) <= least and max(values) >= most, name


def test_renyi_is_never_below_the_truth_and_agrees_with_the_reference():
    """With dp-accounting's Rényi ε within 0.1 %, or 0.01 where ε is small (there theirs has other orders)."""
    for row in ROWS:
        ours = epsilon_of(releases(row), delta=row["delta"])
        assert_not_below(ours, row)
        if row["kind"] == "gaussian":
            assert ours <= row["renyi"] * 1.001 + 0.01, row
            # Theirs bounds fractions of orders more loosely, so ours may be less; how far, the truth says.
            assert ours >= min(row["renyi"] * 0.999 - 0.01, row["low"]), row


def test_prv_is_never_below_the_truth_and_within_its_error():
    """Its stated error is 0.01; the reference itself is known to 2 %."""
    rows = [row for row in GAUSSIAN if row["sample_rate"] < 1 and row["high"] < 20]
    assert len(rows) >= 100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for row in rows:
            ours = epsilon_of(releases(row), delta=row["delta"], accountant="prv")
            assert_not_below(ours, row)
            assert 0 <= ours <= row["high"] + 0.0205, row


@pytest.mark.parametrize("accountant", ["gdp", "prv"])
def test_without_sampling_the_exact_value_is_between_the_bounds(accountant):
    rows = [row for row in GAUSSIAN if row["sample_rate"] == 1]
    assert len(rows) >= 50
    for row in rows:
        ours = epsilon_of(releases(row), delta=row["delta"], accountant=accountant)
        assert_not_below(ours, row)
        assert ours <= row["high"] * (1 + 1e-7) + 1e-6, row


def test_mixed_mechanisms_are_never_below_the_truth():
    """Gaussian steps and pure releases, pure ones at their worst; at most 1.5 times the true ε, plus 0.2."""
    rows = [row for row in ROWS if row["kind"] != "gaussian"]
    for row in rows:
        ours = epsilon_of(releases(row), delta=row["delta"])
        assert_not_below(ours, row)
        assert ours <= 1.5 * row["high"] + 0.2, row
    sampled = [row for row in rows if row["kind"] == "mixed" and row["high"] < 10]
    assert len(sampled) >= 15
    for row in sampled:  # basic composition: sound, and nothing more is claimed
        assert_not_below(epsilon_of(releases(row), delta=row["delta"], accountant="prv"), row)


@pytest.mark.parametrize("noise,rate", [(0.5, 0.01), (1.1, 0.1), (2.0, 0.5), (0.7, 0.9)])
def test_orders_between_whole_numbers_equal_opacus_series(noise, rate):
    orders = [1.01, 1.5, 2.4, 5.5, 9.9, 64, 128]
    ours = dict(zip(_ORDERS, _renyi_of_step(noise, rate), strict=True))
    theirs = compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=orders)
    for order, expected in zip(orders, theirs, strict=True):
        assert ours[order] == pytest.approx(expected, rel=1e-9, abs=1e-10)
        assert ours[order] >= expected * (1 - 1e-12)


@pytest.mark.parametrize("noise,rate,order", [(1.45, 0.18, 1.5), (0.6, 0.02, 2.4), (20.0, 0.3, 9.9), (4.0, 0.3, 76.0)])
def test_orders_equal_the_integral_at_thirty_digits(noise, rate, order):
    import mpmath

    with mpmath.workdps(30):
        def integrand(z):
            ratio = 1 - rate + rate * mpmath.exp((2 * z - 1) / (2 * mpmath.mpf(noise) ** 2))
            return mpmath.npdf(z, 0, noise) * ratio**order

        edges = sorted({*np.linspace(-14 * noise, order + 14 * noise, 40).tolist()})
        exact = float(mpmath.log(mpmath.quad(integrand, edges)) / (order - 1))
    index = min(range(len(_ORDERS)), key=lambda k: abs(_ORDERS[k] - order))
    assert _ORDERS[index] == pytest.approx(order)
    assert _renyi_of_step(noise, rate)[index] == pytest.approx(exact, rel=1e-9, abs=1e-11)
    assert _renyi_of_step(noise, rate)[index] >= exact


def test_an_epsilon_is_never_negative():
    for accountant in ("rdp", "prv", "gdp"):
        release = Gaussian(noise_multiplier=20.0, sample_rate=1.0 if accountant == "gdp" else 0.05)
        assert epsilon_of([release], delta=0.5, accountant=accountant) == 0
        assert epsilon_of([release, Pure(epsilon=0.3)], delta=0.5, accountant=accountant) <= 0.3


def test_one_gaussian_step_is_as_concentrated_as_it_should_be():
    """Without sampling a Gaussian step is exactly 1 / (2 σ²)-concentrated (Bun and Steinke 2016)."""
    for noise, steps in ((1.0, 1), (4.0, 30)):
        same = epsilon_of([Concentrated(rho=1 / (2 * noise**2), times=steps)], delta=1e-5)
        assert epsilon_of([Gaussian(noise_multiplier=noise, steps=steps)], delta=1e-5) == pytest.approx(same, rel=1e-6)


def test_the_noise_that_a_target_needs_is_enough_by_the_reference():
    """Settings of the reference, turned round: with the noise we find, the reference's noise is not too little."""
    rows = [row for row in GAUSSIAN if 0.5 < row["low"] < 10 and row["sample_rate"] > 0.01][:12]
    assert len(rows) == 12
    for row in rows:
        noise = noise_multiplier_for(target_epsilon=row["low"], delta=row["delta"], sample_rate=row["sample_rate"],
                                     steps=int(row["steps"]))
        assert noise >= row["noise_multiplier"] * (1 - 1e-6) and math.isfinite(noise), row


HOSTILE = [  # noise multiplier, sampling rate, steps, δ
    (0.2, 1e-9, 10**6, 1e-5), (0.2, 1e-6, 10**6, 1e-5), (0.2, 0.5, 10**6, 1e-5), (1e3, 1e-6, 10**6, 1e-5),
    (1e-3, 0.01, 10, 1e-5), (1e6, 0.1, 10**6, 1e-6), (1.1, 1e-12, 10**9, 1e-5), (1.0, 0.9999999, 3, 1e-5),
    (0.3, 0.9, 10**6, 0.5), (1.0, 0.01, 1000, 1e-15), (1.0, 0.01, 1000, 1e-300)]


@pytest.mark.parametrize(("noise", "rate", "steps", "delta"), HOSTILE)
def test_prv_of_hostile_settings_is_a_number_at_most_that_of_renyi(noise, rate, steps, delta):
    """And at least the ε of one step by its exact formula: composing does not cost less than one step."""
    release = Gaussian(noise_multiplier=noise, sample_rate=rate, steps=steps)
    prv, rdp = (epsilon_of([release], delta=delta, accountant=accountant) for accountant in ("prv", "rdp"))
    assert 0 <= prv <= rdp < math.inf
    if prv < 600:  # exp(ε) is a float
        z = noise**2 * math.log((math.exp(prv) - 1 + rate) / rate) + 0.5 if prv > 0 else 0.5
        tail = norm.sf(z / noise)
        assert (1 - rate) * tail + rate * norm.sf((z - 1) / noise) - math.exp(prv) * tail <= delta


@pytest.mark.parametrize("delta", [1e-6, 1e-9, 1e-11, 1e-12, 1e-14])
@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.01), (1.0, 0.5), (0.7, 0.1), (4.0, 0.3)])
def test_prv_of_one_step_is_not_below_the_exact_formula_at_tiny_deltas(noise, rate, delta):
    release = Gaussian(noise_multiplier=noise, sample_rate=rate)
    prv, rdp = (epsilon_of([release], delta=delta, accountant=accountant) for accountant in ("prv", "rdp"))
    z = noise**2 * math.log((math.exp(prv) - 1 + rate) / rate) + 0.5
    tail = norm.sf(z / noise)
    assert (1 - rate) * tail + rate * norm.sf((z - 1) / noise) - math.exp(prv) * tail <= delta and prv <= rdp
    assert (prv == rdp) is (delta < 1e-12)  # rounding of Fourier transforms counts for nothing above


def test_many_kinds_of_steps_are_composed_by_renyi_divergences():
    kinds = [Gaussian(noise_multiplier=1 + k / 100, sample_rate=0.01) for k in range(70)]
    assert epsilon_of(kinds, delta=1e-5, accountant="prv") == epsilon_of(kinds, delta=1e-5)


# Unlike releases together, by hand

def renyi_epsilon(divergence, delta):
    """ε by Balle et al. 2020, theorem 21, at the best of many orders; `divergence` is a function of the order."""
    orders = 1 + np.geomspace(1e-2, 2e3, 20_001)
    return float(min(divergence(orders) + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)))


MIXED = [Gaussian(noise_multiplier=3.0, steps=4), Pure(epsilon=0.25, times=3), Concentrated(rho=0.01, times=5),
         Gaussian(noise_multiplier=5.0, steps=9), Pure(epsilon=1.5), Gaussian(noise_multiplier=3.0, steps=2),
         Concentrated(rho=0.04), Pure(epsilon=0.25, times=2)]


def mixed(order):
    """σ = 3 in six steps, σ = 5 in nine, ε = 0.25 five times and 1.5 once, ρ = 0.09 in all."""
    return (order * (6 / 18 + 9 / 50 + 0.09) + 5 * np.minimum(0.25, order * 0.25**2 / 2)
            + np.minimum(1.5, order * 1.5**2 / 2))


def test_renyi_divergences_of_unlike_releases_add_up_order_by_order():
    orders, found = renyi_of(MIXED)
    assert len(orders) == len(_ORDERS) and orders.min() == pytest.approx(1.01) and orders.max() == 64 * 32
    np.testing.assert_allclose(found, mixed(orders), rtol=1e-9)
    assert not renyi_of([])[1].any()
    shuffled = renyi_of(iter(MIXED[::-1]))[1]
    np.testing.assert_allclose(shuffled, found, rtol=1e-14)


@pytest.mark.parametrize("delta", [1e-7, 1e-2])
def test_epsilon_of_unlike_releases_is_that_of_their_divergences(delta):
    exact = renyi_epsilon(mixed, delta)
    assert exact * (1 - 1e-4) <= epsilon_of(MIXED, delta=delta) <= exact * 1.002
    concentrated = [release for release in MIXED if isinstance(release, Concentrated)]
    exact = renyi_epsilon(lambda order: 0.09 * order, delta)
    assert exact * (1 - 1e-4) <= epsilon_of(concentrated, delta=delta) <= exact * 1.002


def test_pure_releases_beside_others_are_added_where_that_is_less():
    """A single release of a large ε costs its ε; 200 small ones less than their sum."""
    noise = Gaussian(noise_multiplier=1.0)
    alone = renyi_epsilon(lambda order: order / 2, 1e-5)
    assert epsilon_of([noise, Pure(epsilon=40.0)], delta=1e-5) == pytest.approx(alone + 40, rel=1e-3)
    many = [noise, Pure(epsilon=0.01, times=200)]
    exact = renyi_epsilon(lambda order: order / 2 + 200 * np.minimum(0.01, order * 0.01**2 / 2), 1e-5)
    assert exact < alone + 0.2 and epsilon_of(many, delta=1e-5) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("accountant", ["gdp", "prv"])
def test_unlike_noise_without_sampling_is_one_gaussian(accountant):
    """μ² = 6 / 9 + 9 / 25: at the ε that is found, δ by theorem 8 of Balle and Wang 2018."""
    steps, mu = [release for release in MIXED if isinstance(release, Gaussian)], math.sqrt(6 / 9 + 9 / 25)
    for delta in (1e-7, 1e-2):
        found = epsilon_of(steps, delta=delta, accountant=accountant)
        for epsilon, within in ((found, True), (found - 1e-6, False)):
            spent = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon + norm.logcdf(-epsilon / mu - mu / 2))
            assert (spent <= delta) == within
        pure = epsilon_of([*steps, Pure(epsilon=0.25, times=3)], delta=delta, accountant=accountant)
        assert found < pure <= found + 0.75 + 1e-9 and (accountant == "prv" or pure == pytest.approx(found + 0.75))


@pytest.mark.parametrize("accountant", ["gdp", "prv"])
def test_only_renyi_divergences_account_for_concentrated_releases(accountant):
    for releases in (MIXED, [Concentrated(rho=1e-9)], [Pure(epsilon=0.1), Concentrated(rho=0.5, times=3)]):
        with pytest.raises(ValueError, match=rf"accountant '{accountant}' cannot account for concentrated releases"):
            epsilon_of(releases, delta=1e-5, accountant=accountant)


@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
def test_pure_releases_alone_cost_at_most_their_sum_and_nothing_costs_nothing(accountant):
    few = [Pure(epsilon=0.5, times=2), Pure(epsilon=2.25)]
    assert epsilon_of(few, delta=1e-9, accountant=accountant) == pytest.approx(3.25)
    exact = renyi_epsilon(lambda order: 3000 * np.minimum(0.02, order * 0.02**2 / 2), 1e-6)
    many = epsilon_of([Pure(epsilon=0.02, times=3000)], delta=1e-6, accountant=accountant)
    assert exact < 30 and many == pytest.approx(exact, rel=2e-3)
    assert epsilon_of(iter(()), delta=1e-6, accountant=accountant) == 0.0


def test_two_kinds_of_sampled_steps_lie_between_each_alone_and_all_at_the_larger_rate():
    """By numerical composition, whose error is 0.01, and by Rényi divergences, which lie above it."""
    one, other = (Gaussian(noise_multiplier=1.2, sample_rate=rate, steps=30) for rate in (0.05, 0.2))
    twice = Gaussian(noise_multiplier=1.2, sample_rate=0.2, steps=60)
    for accountant in ("prv", "rdp"):
        low, between, high = (epsilon_of(some, delta=1e-5, accountant=accountant)
                              for some in ([other], [one, other], [twice]))
        assert low + 0.02 < between < high - 0.5
    assert epsilon_of([one, other], delta=1e-5, accountant="prv") < epsilon_of([one, other], delta=1e-5) - 0.1


def test_where_no_divergence_is_known_nothing_is_proven(monkeypatch):
    steps = ((1e-6, 0.5, 3),)
    monkeypatch.setattr(mechanisms, "_renyi_of_step", lambda noise, rate: (math.nan,) * len(_ORDERS))
    assert mechanisms._renyi(steps, ((0.5, 2),), 0.1, 1e-5) == math.inf
    monkeypatch.setattr(mechanisms, "_renyi_of_step", lambda noise, rate: (math.nan, *(2.0,) * (len(_ORDERS) - 1)))
    exact = min(6 + math.log1p(-1 / order) - math.log(1e-5 * order) / (order - 1) for order in _ORDERS[1:])
    assert mechanisms._renyi(steps, (), 0.0, 1e-5) == pytest.approx(exact, rel=1e-12)
