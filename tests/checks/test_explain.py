"""The ε of other frameworks' settings: against densities that are integrated, and mechanisms enumerated by hand."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, stats

from fedlab.checks.explain import (
    explain_flower_adaptive_clipping,
    explain_flower_fixed_clipping,
    explain_flower_local_dp,
    explain_nvflare_percentile,
    explain_nvflare_svt,
)


def delta_of_gaussian(epsilon, distance):
    """δ at ε of two unit normal densities `distance` apart, by integration of what one exceeds e^ε times the other."""
    def excess(x):
        return max(0.0, stats.norm.pdf(x, distance) - math.exp(epsilon + stats.norm.logpdf(x)))
    middle = epsilon / distance + distance / 2  # where the densities' ratio is e^ε
    return integrate.quad(excess, middle, middle + 40, epsabs=1e-14, limit=400)[0]


def is_exact(epsilon, distance, delta):
    return (delta_of_gaussian(epsilon + 1e-5, distance) <= delta
            and delta_of_gaussian(epsilon - 1e-4, distance) >= delta)


# NVFLARE's sparse vector


def laplace_at_least(x):
    return np.where(x > 0, 0.5 * np.exp(-np.abs(x)), 1 - 0.5 * np.exp(-np.abs(x)))


def outcomes(values, *, count, threshold_scale, query_scale, replace, passes):
    """(positions sent, number of passes) -> probability, for NVFLARE's choice from magnitudes, pass by pass.

    Written from the filter's steps: all weights not yet accepted are compared in each pass; once `count` or more are
    accepted, `count` draws are made from all of them. Integrated over the threshold.
    """
    thresholds = np.linspace(-14 * threshold_scale, 14 * threshold_scale, 2001)
    density = np.exp(-np.abs(thresholds) / threshold_scale) / (2 * threshold_scale)
    success = [laplace_at_least((thresholds - abs(v)) / query_scale) for v in values]
    found = {}
    for times in itertools.product(range(1, passes + 2), repeat=len(values)):  # passes + 1: in none of them
        last = sorted(times)[count - 1]
        if last > passes:
            continue
        accepted = [i for i, t in enumerate(times) if t <= last]
        if any(t > last + 1 for t in times):
            continue  # counted once: those not accepted stand at last + 1
        weight = density.copy()
        for p, t in zip(success, times, strict=True):
            weight = weight * (1 - p) ** (min(t, last + 1) - 1) * (p if t <= last else 1)
        mass = integrate.trapezoid(weight, thresholds)
        draws = (itertools.product(accepted, repeat=count) if replace else itertools.combinations(accepted, count))
        draws = [frozenset(draw) for draw in draws]
        for draw in draws:
            found[draw, last] = found.get((draw, last), 0.0) + mass / len(draws)
    return found


def test_the_enumeration_is_one_of_probabilities():
    for replace in (False, True):
        found = outcomes([1.0, 0.2, 0.0], count=2, threshold_scale=1.0, query_scale=2.0, replace=replace, passes=9)
        assert sum(found.values()) == pytest.approx(1, abs=0.05) and sum(found.values()) < 1 + 1e-6


@pytest.mark.parametrize("replace", [False, True])
def test_the_choice_of_positions_keeps_to_its_epsilon_in_all_outcomes(replace):
    """Three weights, two of them sent: every outcome of the filter, for updates as different as clipping allows."""
    gamma, count, budgets = 1.0, 2, dict(epsilon_threshold=1.0, epsilon_query=2.0)
    explained = explain_nvflare_svt(parameters=3, fraction=0.5, gamma=gamma, replace=replace, epsilon=3.0,
                                    epsilon_release=1e-9, delta=1e-12, **budgets)
    proven = 1.0 + 2.0 * 3 / 2  # three accepted at most, of which two are paid for
    assert explained.epsilon == pytest.approx(proven, rel=1e-6)
    cases = [outcomes(values, count=count, threshold_scale=gamma / 1.0, query_scale=2 * count * gamma / 2.0,
                      replace=replace, passes=4)
             for values in itertools.product([0.0, gamma], repeat=3)]
    worst = max(abs(math.log(a[key] / b[key])) for a, b in itertools.combinations(cases, 2) for key in a)
    assert 0.9 < worst < proven


def test_with_replacement_the_filters_own_account_is_too_small():
    """One position of two draws: all draws hit one weight, far more likely if few were accepted."""
    size, count, query = 7, 3, 0.3
    cases = [outcomes([v] * size, count=count, threshold_scale=1 / 0.001, query_scale=2 * count / query, replace=True,
                      passes=2) for v in (0.0, 1.0)]
    worst = max(abs(math.log(cases[0][key] / cases[1][key])) for key in cases[0])
    explained = explain_nvflare_svt(parameters=size, fraction=0.4, gamma=1.0, epsilon=0.301, epsilon_query=query,
                                    epsilon_release=1e-9, delta=1e-12)
    assert worst < explained.epsilon == pytest.approx(0.001 + 0.3 * 7 / 3, rel=1e-6)


def test_the_default_filter_by_hand():
    """118,000 values at ε 0.1 each, and positions at ε₁ + ε₂ N/c, composed by zCDP as by Bun and Steinke 2016."""
    ratio = (2 * 118_000) ** (2 / 3)
    first, second = 0.1 / (1 + ratio), 0.1 * ratio / (1 + ratio)
    rho = 118_000 * 0.1**2 / 2 + (first + 10 * second) ** 2 / 2
    orders = np.linspace(1.01, 3, 4000)
    expected = min(rho * orders + np.log1p(-1 / orders) - np.log(1e-5 * orders) / (orders - 1))
    found = explain_nvflare_svt(parameters=1_180_000)
    assert expected * 0.999 < found.epsilon < 1.03 * expected
    assert "11800.1" in found.reasons[0]  # the filter's own account
    assert found.statement == found.per_round and found.statement.accountant == "rdp"
    ten = explain_nvflare_svt(parameters=1_180_000, rounds=10)
    assert ten.per_round == found.statement and ten.epsilon > 5 * found.epsilon


def test_settings_of_the_brats_example_of_nvflare():
    """Its own account says 2,160,021 for one round; at so large an ε composition saves nothing."""
    found = explain_nvflare_svt(parameters=1_200_012, fraction=0.9, epsilon=0.1, noise_var=2)
    assert "2.16002e+06" in found.reasons[0]
    assert found.epsilon == pytest.approx(2_160_021, rel=0.01)


@pytest.mark.parametrize("settings", [dict(gamma=7.0), dict(tau=3.0), dict(gamma=1e-9, tau=0.0)])
def test_clip_and_threshold_change_nothing(settings):
    assert explain_nvflare_svt(parameters=500, **settings).epsilon == explain_nvflare_svt(parameters=500).epsilon


def test_budgets_are_divided_as_in_the_filter():
    both = explain_nvflare_svt(parameters=10, fraction=0.1, epsilon=1.0, epsilon_threshold=0.25, epsilon_query=0.75,
                               epsilon_release=2.0, replace=False, delta=1e-12)
    assert both.epsilon == pytest.approx(1 + 2)  # one value: no success beyond the one that is sent
    for one in (dict(epsilon_threshold=0.25), dict(epsilon_query=0.75)):
        assert explain_nvflare_svt(parameters=10, fraction=0.1, epsilon=1.0, epsilon_release=2.0, replace=False,
                                   delta=1e-12, **one).epsilon == both.epsilon
    with pytest.raises(ValueError, match="sum to epsilon"):
        explain_nvflare_svt(parameters=10, epsilon=1.0, epsilon_threshold=0.5, epsilon_query=0.6)
    with pytest.raises(ValueError, match="sum to epsilon"):
        explain_nvflare_svt(parameters=10, epsilon=1.0, epsilon_threshold=1.5)


@pytest.mark.parametrize("explained", [
    explain_nvflare_svt(parameters=100, scalars=2),
    explain_nvflare_svt(parameters=100, clips_before_noise=False),
    explain_nvflare_percentile(),
    explain_nvflare_percentile(percentile=100, gamma=1e-12, rounds=3),
    explain_nvflare_percentile(percentile=101),
    explain_nvflare_percentile(gamma=0.0),
    explain_flower_local_dp(clipping_norm=1.0, sensitivity=0.0, epsilon=1.0, delta=1e-5),
    explain_flower_fixed_clipping(noise_multiplier=0.0, clipping_norm=1.0, num_sampled_clients=5),
    explain_flower_adaptive_clipping(noise_multiplier=0.0, num_sampled_clients=5),
], ids=repr)
def test_where_nothing_is_proven_no_epsilon_is_shown(explained):
    assert explained.epsilon == math.inf and explained.statement is None and explained.per_round is None
    for text in (str(explained), repr(explained), explained._repr_html_()):
        assert "no finite ε" in text and "ε = " not in text
    assert explained.reasons


def test_a_percentile_out_of_range_turns_the_filter_off():
    assert "does nothing" in explain_nvflare_percentile(percentile=-1).reasons[0]
    assert "no noise" in explain_nvflare_percentile(percentile=0).reasons[0]


# Flower


@pytest.mark.parametrize(("clip", "sensitivity", "epsilon", "delta", "rounds"), [
    (1.0, 1.0, 1.0, 1e-5, 1), (0.3, 0.7, 0.5, 1e-6, 7), (2.0, 1.0, 8.0, 1e-3, 3), (1.0, 2.0, 0.9, 1e-5, 1)])
def test_local_noise_of_flower_has_the_epsilon_of_its_density(clip, sensitivity, epsilon, delta, rounds):
    found = explain_flower_local_dp(clipping_norm=clip, sensitivity=sensitivity, epsilon=epsilon, delta=delta,
                                    rounds=rounds)
    std = sensitivity * math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    assert is_exact(found.epsilon, 2 * clip * math.sqrt(rounds) / std, delta)
    assert is_exact(found.per_round.epsilon, 2 * clip / std, delta)
    assert found.statement.delta == delta and found.statement.unit == "site"


def test_local_noise_of_flower_keeps_its_promise_only_with_twice_the_clip():
    right = explain_flower_local_dp(clipping_norm=0.5, sensitivity=1.0, epsilon=0.9, delta=1e-5)
    wrong = explain_flower_local_dp(clipping_norm=1.0, sensitivity=1.0, epsilon=0.9, delta=1e-5)
    assert right.epsilon < 0.9 < wrong.epsilon
    assert any("is less than these 2" in reason for reason in wrong.reasons)
    assert not any("is not that of epsilon" in reason for reason in right.reasons)
    # Above 1 the formula fails even then: at ε = 10 the noise is that of a larger ε.
    large = explain_flower_local_dp(clipping_norm=0.5, sensitivity=1.0, epsilon=10.0, delta=1e-5)
    assert large.epsilon > 10 and any("below 1 only" in reason for reason in large.reasons)


def test_a_site_moves_a_weighted_mean_by_twice_its_share_at_most():
    rng = np.random.default_rng(3)
    worst = 0.0
    for _ in range(2000):
        others, size = rng.integers(1, 50, 4), int(rng.integers(1, 200))
        total = others.sum() + size
        others_mean = -1.0 if rng.random() < 0.5 else rng.uniform(-1, 1)  # of norm 1 at most, along one direction
        one, other, new_size = rng.choice([-1.0, 1.0]), rng.uniform(-1, 1), int(rng.integers(1, 200))
        shares = size / total, new_size / (others.sum() + new_size)
        moved = abs((shares[0] * one + (1 - shares[0]) * others_mean)
                    - (shares[1] * other + (1 - shares[1]) * others_mean))
        worst = max(worst, moved / max(shares))
    assert 1.9 < worst <= 2


@pytest.mark.parametrize(("noise", "sites", "share", "rounds"), [
    (1.0, 10, 0.1, 1), (0.7, 4, 0.55, 5), (3.0, 3, 1.0, 2)])
@pytest.mark.parametrize("client_side", [False, True])
def test_fixed_clipping_of_flower_has_the_epsilon_of_its_density(noise, sites, share, rounds, client_side):
    found = explain_flower_fixed_clipping(noise_multiplier=noise, clipping_norm=0.2, num_sampled_clients=sites,
                                          largest_share=share, rounds=rounds, delta=1e-4, client_side=client_side)
    std = noise * 0.2 / sites  # as compute_stdv there
    assert is_exact(found.epsilon, 2 * 0.2 * share * math.sqrt(rounds) / std, 1e-4)
    assert any("trusted to clip" in reason for reason in found.reasons) is client_side
    assert "beyond the server" in found.statement.adjacency


def test_of_an_unknown_share_the_worst_is_assumed():
    known, unknown = (explain_flower_fixed_clipping(noise_multiplier=2.0, clipping_norm=1.0, num_sampled_clients=8, **s)
                      for s in ({"largest_share": 0.125}, {}))
    assert unknown.epsilon > 8 * known.epsilon
    assert "with equal weights" in unknown.reasons[0] and "with equal weights" not in known.reasons[0]
    with pytest.raises(ValueError, match=r"share of at least 0\.125"):
        explain_flower_fixed_clipping(noise_multiplier=2, clipping_norm=1, num_sampled_clients=8, largest_share=0.1)


@pytest.mark.parametrize(("lr", "quantile"), [(0.2, 0.5), (1.5, 0.1)])
def test_adaptive_clipping_of_flower_covers_noise_of_the_wrong_round(lr, quantile):
    """δ at the stated ε, by integration over the noisy count, with the noise that each count leads to."""
    sites, z, count_std, share, delta = 20, 1.2, 1.0, 0.05, 1e-4
    found = explain_flower_adaptive_clipping(noise_multiplier=z, num_sampled_clients=sites, clip_norm_lr=lr,
                                             target_clipped_quantile=quantile, largest_share=share, delta=delta)
    on_updates = (z**-2 - (2 * count_std) ** -2) ** -0.5

    def delta_at(epsilon, clipped):
        def excess(b):  # the count is `clipped` for one update and one less for the other; whose noise is C'/C
            ratio = math.exp(-lr * (b - quantile))
            distance = 2 * share / (on_updates * ratio / sites)
            p, q = (stats.norm.logpdf(b * sites, count, count_std) for count in (clipped, clipped - 1))
            left = epsilon + q - p
            return sites * math.exp(p) * (stats.norm.cdf(distance / 2 - left / distance)
                                          - math.exp(left + stats.norm.logcdf(-distance / 2 - left / distance)))
        middle = clipped / sites
        return integrate.quad(excess, middle - 0.5, middle + 0.5, epsabs=1e-13, limit=400)[0]

    worst = max(delta_at(found.epsilon, clipped) for clipped in (1, sites // 2, sites))
    assert 1e-4 * delta < worst <= delta
    # The multiplier as Flower states it, without the norm that has moved, would promise too much.
    naive = explain_flower_fixed_clipping(noise_multiplier=z, clipping_norm=1.0, num_sampled_clients=sites,
                                          largest_share=share, delta=delta).epsilon
    assert delta_at(naive, sites) > delta


def test_adaptive_clipping_takes_the_noise_on_the_count_that_flower_takes():
    settings = dict(noise_multiplier=1.0, num_sampled_clients=40, largest_share=0.025, rounds=3)
    assert (explain_flower_adaptive_clipping(**settings).statement
            == explain_flower_adaptive_clipping(**settings, clipped_count_stddev=2.0).statement)
    with pytest.raises(ValueError, match="below 2 × clipped_count_stddev"):
        explain_flower_adaptive_clipping(noise_multiplier=1.0, num_sampled_clients=10)


# All


@pytest.mark.parametrize(("explain", "settings"), [
    (explain_nvflare_svt, dict(parameters=0)), (explain_nvflare_svt, dict(parameters=9, fraction=0)),
    (explain_nvflare_svt, dict(parameters=9, delta=1.0)), (explain_nvflare_svt, dict(parameters=9, noise_var=0)),
    (explain_nvflare_percentile, dict(rounds=0)), (explain_nvflare_percentile, dict(percentile=math.nan)),
    (explain_flower_local_dp, dict(clipping_norm=1, sensitivity=1, epsilon=0, delta=1e-5)),
    (explain_flower_local_dp, dict(clipping_norm=1, sensitivity=1, epsilon=1, delta=0)),
    (explain_flower_fixed_clipping, dict(noise_multiplier=-1, clipping_norm=1, num_sampled_clients=2)),
    (explain_flower_adaptive_clipping, dict(noise_multiplier=1, num_sampled_clients=30, clip_norm_lr=0)),
    (explain_flower_adaptive_clipping, dict(noise_multiplier=1, num_sampled_clients=30, clipped_count_stddev=-1)),
])
def test_settings_out_of_range_are_refused(explain, settings):
    with pytest.raises(ValueError, match="got"):
        explain(**settings)


def test_an_explanation_prints_as_sentences_and_in_notebooks():
    found = explain_flower_local_dp(clipping_norm=1.5, sensitivity=2, epsilon=1, delta=1e-5, rounds=4)
    assert str(found).startswith("LocalDpMod(clipping_norm=1.5, sensitivity=2, epsilon=1, delta=1e-05)\none round: ")
    assert f"4 rounds: {found.statement}" in str(found)
    assert "any two updates of a site" in found._repr_html_() and "<li>" in found._repr_html_()


def test_the_table_of_the_page_on_privacy_holds():
    page = (Path(__file__).resolve().parents[2] / "docs" / "privacy.md").read_text("utf-8")
    for found in (explain_nvflare_svt(parameters=1_180_000),
                  explain_flower_local_dp(clipping_norm=1, sensitivity=1, epsilon=0.9, delta=1e-5),
                  explain_flower_fixed_clipping(noise_multiplier=1, clipping_norm=1, num_sampled_clients=10,
                                                largest_share=0.1),
                  explain_flower_adaptive_clipping(noise_multiplier=1, num_sampled_clients=100, largest_share=0.01)):
        assert f"one round | {found.statement} |" in page
