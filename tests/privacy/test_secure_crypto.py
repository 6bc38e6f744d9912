"""The parts of secure aggregation: shares of secrets, agreed keys, sealed messages, mask streams, integer noise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from chance import FALSE_ALARM, SIGMAS, keyed
from fedlab.core.errors import PrivacyError
from fedlab.core.types import SiteState
from fedlab.privacy.accounting.ledger import Concentrated, Gaussian, Ledger, Pure, Terms, epsilon_of
from fedlab.privacy.noise.discrete_gaussian import discrete_gaussian
from fedlab.privacy.secure_aggregation.crypto import (
    add_streams,
    join_secret,
    new_key,
    pair_key,
    public_key,
    seal,
    split_secret,
    stream,
    unseal,
)


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 9), st.integers(0, 6), st.randoms(use_true_random=False))
def test_any_threshold_of_the_shares_gives_the_secret_back(secret, threshold, more, random):
    shares = dict(enumerate(split_secret(secret, threshold=threshold, count=threshold + more)))
    chosen = random.sample(sorted(shares), threshold)
    assert join_secret({k: shares[k] for k in chosen}) == secret


@pytest.mark.chance
def test_fewer_shares_fit_every_secret():
    """Two shares of a threshold of three, with any secret, lie on one polynomial: they rule nothing out."""
    shares = split_secret(bytes(32), threshold=3, count=5)
    for pair in itertools.combinations(range(5), 2):
        points = {k: shares[k] for k in pair}
        with pytest.raises(PrivacyError, match="do not belong together"):  # a random number of 521 bits, not of 256
            join_secret(points)
    # Each share by itself is uniform, whatever the secret: 4000 splits of a secret of zeros.
    firsts = [int.from_bytes(split_secret(bytes(32), threshold=2, count=1)[0], "big") / 2**521 for _ in range(4000)]
    assert stats.kstest(firsts, "uniform").pvalue > FALSE_ALARM  # the polynomials come from the operating system


def test_the_modulus_of_the_shares_is_prime():
    sympy = pytest.importorskip("sympy")
    assert sympy.isprime(2**521 - 1)


def test_shares_that_are_none_are_refused():
    shares = dict(enumerate(split_secret(bytes(32), threshold=2, count=3)))
    for wrong in (b"", b"\xff" * 66, shares[0] + b"\0"):
        with pytest.raises(PrivacyError, match="share of a secret"):
            join_secret({0: wrong, 1: shares[1]})


def test_two_sites_agree_on_a_key_for_one_purpose_and_context():
    a, b, c = new_key(), new_key(), new_key()
    settings = {"purpose": "mask", "context": b"round"}
    one = pair_key(a, public_key(b), **settings)
    assert one == pair_key(b, public_key(a), **settings) and len(one) == 32
    others = {pair_key(c, public_key(b), **settings), pair_key(a, public_key(b), purpose="seal", context=b"round"),
              pair_key(a, public_key(b), purpose="mask", context=b"other")}
    assert len(others | {one}) == 4
    for nothing in (bytes(32), b"short"):  # a point of order 1 would give everybody the same key
        with pytest.raises(PrivacyError, match="not an X25519 key"):
            pair_key(a, nothing, **settings)


def test_a_sealed_message_opens_as_it_was_or_not_at_all():
    key = new_key()
    sealed = seal(key, b"message", about=b"x to y")
    assert unseal(key, sealed, about=b"x to y") == b"message" and b"message" not in sealed
    assert seal(key, b"message", about=b"x to y") != sealed
    for changed in (sealed[:-1], bytes(len(sealed)), b""):
        with pytest.raises(PrivacyError, match="changed on its way"):
            unseal(key, changed, about=b"x to y")
    for wrong_key, about in ((new_key(), b"x to y"), (key, b"y to x")):
        with pytest.raises(PrivacyError, match="changed on its way"):
            unseal(wrong_key, sealed, about=about)


def test_streams_are_chacha20():
    """The first block for a key and nonce of zeros (RFC 8439, appendix A.1, vector 1)."""
    first = stream(bytes(32)).update(bytes(64))
    assert first.hex() == ("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
                           "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586")
    assert stream(bytes(32), start=64).update(bytes(64)) == stream(bytes(32)).update(bytes(128))[64:]


@pytest.mark.parametrize("word", [np.uint32, np.uint64])
@pytest.mark.parametrize("threads", [1, 3])
def test_streams_are_added_modulo_the_word_in_any_number_of_threads(word, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for count in (0, 1, 1000, 2**15 * 4 + 17):
            start = np.random.default_rng(0).integers(0, 2**32, count).astype(word)
            found = start.copy()
            keys = [(bytes([k]) * 32, 1 if k % 2 else -1) for k in range(4)]
            add_streams(found, keys)
            wanted = start.copy()
            for key, sign in keys:
                mask = np.frombuffer(stream(key).update(bytes(wanted.nbytes)), word)
                wanted = wanted + mask if sign > 0 else wanted - mask
            np.testing.assert_array_equal(found, wanted)
            add_streams(found, [(key, -sign) for key, sign in keys])
            np.testing.assert_array_equal(found, start)
    finally:
        torch.set_num_threads(before)


@pytest.mark.chance
@pytest.mark.parametrize("log2_sigma", [1, 2, 5])
def test_discrete_gaussian_values_are_as_frequent_as_the_formula_says(log2_sigma):
    """Chi-square over all values expected five times or more and both tails."""
    count, sigma = 400_000, 2**log2_sigma
    drawn = discrete_gaussian(count, log2_sigma=log2_sigma, key=keyed(bytes([log2_sigma]) * 32))
    values = np.arange(-10 * sigma, 10 * sigma + 1)
    p = np.exp(-(values / sigma) ** 2 / 2)
    p /= p.sum()
    bulk = p * count >= 5
    inside = np.isin(drawn, values[bulk])
    seen = [*np.bincount(drawn[inside] - values[bulk][0], minlength=bulk.sum()), (~inside).sum()]
    assert stats.chisquare(seen, [*p[bulk] * count, (1 - p[bulk].sum()) * count]).pvalue > FALSE_ALARM


@pytest.mark.chance
@pytest.mark.parametrize("log2_sigma", [1, 8, 16, 24])
def test_discrete_gaussian_moments(log2_sigma):
    """Mean, variance and fourth moment."""
    count = 600_000  # more than one stream
    unit = discrete_gaussian(count, log2_sigma=log2_sigma, key=keyed(b"moments." * 4)) / 2.0**log2_sigma
    assert abs(unit.mean()) < SIGMAS / count**0.5
    assert abs((unit**2).mean() - 1) < SIGMAS * (2 / count) ** 0.5
    assert abs((unit**4).mean() - 3) < SIGMAS * (96 / count) ** 0.5
    neighbours = np.corrcoef(unit[1:], unit[:-1])[0, 1]
    assert abs(neighbours) < SIGMAS / count**0.5
    if log2_sigma == 24:  # fine enough to be compared with the normal distribution
        assert stats.kstest(unit, "norm").pvalue > FALSE_ALARM


@pytest.mark.chance
def test_discrete_gaussian_repeats_with_its_key_in_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = discrete_gaussian(600_000, log2_sigma=20, key=bytes(32))
        torch.set_num_threads(3)
        np.testing.assert_array_equal(discrete_gaussian(600_000, log2_sigma=20, key=bytes(32)), one)
    finally:
        torch.set_num_threads(before)
    other = discrete_gaussian(600_000, log2_sigma=20, key=keyed(b"\1" * 32))
    assert abs(np.corrcoef(one, other)[0, 1]) < SIGMAS / 600_000**0.5
    assert discrete_gaussian(0, log2_sigma=4, key=bytes(32)).shape == (0,)
    for wrong in (0, 25):
        with pytest.raises(ValueError, match="between 1 and 24"):
            discrete_gaussian(1, log2_sigma=wrong, key=bytes(32))


def test_sums_of_discrete_gaussians_are_near_one_by_the_bound_of_the_paper():
    """Kairouz et al. 2021: log probabilities of a sum of n differ from a discrete Gaussian's by at most tau."""
    sigma, shares = 0.8, 3
    values = np.arange(-60, 61)
    one = np.exp(-(values / sigma) ** 2 / 2)
    total = one / one.sum()
    for _ in range(shares - 1):
        total = np.convolve(total, one / one.sum(), mode="same")
    wide = np.exp(-(values**2) / (2 * shares * sigma**2))
    wide /= wide.sum()
    tau = 10 * sum(math.exp(-2 * math.pi**2 * sigma**2 * k / (k + 1)) for k in range(1, shares))
    near = np.abs(values) <= 5
    gap = np.abs(np.log(total[near] / wide[near])).max()
    assert 1e-4 * tau < gap <= tau


def test_concentrated_releases_are_accounted_as_the_gaussian_ones_of_the_same_divergence():
    for noise, times in itertools.product((0.5, 1.0, 4.0), (1, 10)):
        rho = Concentrated(rho=1 / (2 * noise**2), times=times)
        known = epsilon_of([Gaussian(noise_multiplier=noise, steps=times)], delta=1e-5)
        assert epsilon_of([rho], delta=1e-5) == pytest.approx(known, rel=1e-9)
        # The closed form of Bun and Steinke 2016, proposition 1.3, is looser but never below.
        assert epsilon_of([rho], delta=1e-5) <= rho.rho * times + 2 * math.sqrt(rho.rho * times * math.log(1e5))
    mixed = [Concentrated(rho=0.1), Gaussian(noise_multiplier=2.0), Pure(epsilon=0.3)]
    assert epsilon_of(mixed, delta=1e-5) > epsilon_of(mixed[:2], delta=1e-5) > epsilon_of(mixed[:1], delta=1e-5) > 0
    for accountant in ("prv", "gdp"):
        with pytest.raises(ValueError, match="accountant='rdp'"):
            epsilon_of([Concentrated(rho=0.1)], delta=1e-5, accountant=accountant)
    for wrong in ({"rho": 0.0}, {"rho": math.inf}, {"rho": 1.0, "times": 0}):
        with pytest.raises(ValueError):
            Concentrated(**wrong)


def test_concentrated_releases_live_in_a_ledger():
    state = SiteState()
    terms = Terms(unit="site", delta=1e-3, adjacency="one update replaced by zeros")
    Ledger(state).charge(Concentrated(rho=0.2), terms=terms)
    assert Ledger(state).releases() == [Concentrated(rho=0.2)]
    assert Ledger(state).spent()[0].epsilon == epsilon_of([Concentrated(rho=0.2)], delta=1e-3)
