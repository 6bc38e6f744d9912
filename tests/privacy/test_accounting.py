"""The ledger and the ε it proves."""

from __future__ import annotations

import json
import math

import pytest

from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError
from fedlab.core.types import SiteState
from fedlab.privacy.accounting.ledger import Gaussian, Ledger, Pure, Terms, epsilon_of, noise_multiplier_for

PATIENT = Terms(unit="patient", delta=1e-3, adjacency="add or remove one patient")
STEP = Gaussian(noise_multiplier=1.1, sample_rate=0.1, steps=20)


def opened(state, *, site="a", round=0, stream="s"):
    return Ledger.open(state, site=site, round=round, stream=stream)


def test_rdp_equals_opacus_accountant():
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(1.1, 0.1, 60)]
    theirs = accountant.get_epsilon(delta=1e-3)
    ours = epsilon_of([STEP] * 3, delta=1e-3)
    assert ours <= theirs + 1e-9  # more orders are tried, and rounding is bounded
    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("noise,steps", [(1.0, 1), (4.0, 30), (0.7, 3)])
def test_gdp_is_exact_and_the_others_lie_above_it(noise, steps):
    from scipy.stats import norm

    release = Gaussian(noise_multiplier=noise, steps=steps)
    exact = epsilon_of([release], delta=1e-5, accountant="gdp")
    mu = math.sqrt(steps) / noise
    assert norm.cdf(mu / 2 - exact / mu) - math.exp(exact) * norm.cdf(-exact / mu - mu / 2) <= 1e-5
    assert norm.cdf(mu / 2 - (exact - 1e-4) / mu) - math.exp(exact - 1e-4) * norm.cdf(
        -(exact - 1e-4) / mu - mu / 2) > 1e-5
    for accountant in ("rdp", "prv"):
        assert exact <= epsilon_of([release], delta=1e-5, accountant=accountant) + 1e-9


def test_gdp_refuses_sampled_records():
    with pytest.raises(ValueError, match="say accountant='rdp'"):
        epsilon_of([STEP], delta=1e-3, accountant="gdp")


def test_pure_releases_add_up_or_less():
    assert epsilon_of([Pure(epsilon=0.5, times=2)], delta=1e-6) == pytest.approx(1.0)
    many = epsilon_of([Pure(epsilon=0.01, times=10_000)], delta=1e-6)
    assert many < 100 / 2  # basic composition gives 100
    mixed = epsilon_of([STEP, Pure(epsilon=0.5)], delta=1e-3)
    assert epsilon_of([STEP], delta=1e-3) < mixed <= epsilon_of([STEP], delta=1e-3) + 0.5
    assert epsilon_of([], delta=1e-3) == 0


@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_noise_multiplier_for_reaches_the_target(accountant):
    noise = noise_multiplier_for(target_epsilon=3, delta=1e-3, sample_rate=0.2, steps=50, accountant=accountant)
    used = Gaussian(noise_multiplier=noise, sample_rate=0.2, steps=50)
    less = Gaussian(noise_multiplier=noise * 0.99, sample_rate=0.2, steps=50)
    assert epsilon_of([used], delta=1e-3, accountant=accountant) <= 3
    assert epsilon_of([less], delta=1e-3, accountant=accountant) > 3


def test_a_ledger_over_rounds_equals_the_whole():
    state = SiteState()
    for number in range(6):
        opened(state, round=number, stream=str(number)).charge(STEP, terms=PATIENT)
    (spent,) = Ledger(state).spent()
    assert spent.epsilon == epsilon_of([Gaussian(noise_multiplier=1.1, sample_rate=0.1, steps=120)], delta=1e-3)
    assert (spent.delta, spent.unit, spent.adjacency) == (1e-3, "patient", "add or remove one patient")


def test_a_repeated_round_counts_once_if_its_noise_is_the_same_and_twice_if_not():
    state = SiteState()
    for stream in ("same", "same"):
        opened(state, round=0, stream=stream).charge(STEP, terms=PATIENT)
    assert len(Ledger(state).releases()) == 1
    opened(state, round=0, stream="other weights").charge(STEP, terms=PATIENT)
    assert len(Ledger(state).releases()) == 2
    for _ in range(2):
        opened(state, round=0, stream=None).charge(STEP, terms=PATIENT)
    assert len(Ledger(state).releases()) == 4


def test_a_budget_is_not_exceeded():
    state = SiteState()
    ledger = opened(state)
    limit = epsilon_of([STEP] * 2, delta=1e-3)
    ledger.charge(STEP, terms=PATIENT, max_epsilon=limit)
    ledger.charge(STEP, terms=PATIENT, max_epsilon=limit)
    with pytest.raises(PrivacyBudgetExhausted, match="this release would make it"):
        ledger.charge(STEP, terms=PATIENT, max_epsilon=limit)
    assert Ledger(state).spent()[0].epsilon == limit


def test_units_are_kept_apart_and_terms_may_not_differ():
    ledger = opened(SiteState())
    ledger.charge(STEP, terms=PATIENT)
    ledger.charge(Pure(epsilon=1), terms=Terms(unit="site", delta=1e-2, adjacency="any two updates of a site"))
    assert [s.unit for s in ledger.spent()] == ["patient", "site"]
    with pytest.raises(PrivacyError, match="same δ, adjacency"):
        ledger.charge(STEP, terms=Terms(unit="patient", delta=1e-5, adjacency="add or remove one patient"))


def test_foreign_and_damaged_ledgers_are_refused():
    state = SiteState()
    opened(state).charge(STEP, terms=PATIENT)
    with pytest.raises(PrivacyError, match="another site"):
        opened(state.copy(), site="b")
    assert opened(SiteState(ledger={**state.ledger, "model": "m"})).releases()  # once, a ledger was of one network
    text = json.dumps(state.ledger)
    for bad in (["{"], {"format": "fedlab-ledger-2"}, json.loads(text.replace("1.1", "0.0")),
                json.loads(text.replace("fedlab-ledger-2", "fedlab-ledger-3")), {**state.ledger, "more": 1},
                {**state.ledger, "entries": [1]}, {**state.ledger, "noise_on": {"0|s": 1}}):
        with pytest.raises(PrivacyError, match="damaged"):
            Ledger(SiteState(ledger=bad))


@pytest.mark.parametrize("make", [
    lambda: Gaussian(noise_multiplier=0), lambda: Gaussian(noise_multiplier=math.nan),
    lambda: Gaussian(noise_multiplier=1, sample_rate=0), lambda: Gaussian(noise_multiplier=1, sample_rate=1.1),
    lambda: Gaussian(noise_multiplier=1, steps=0), lambda: Pure(epsilon=-1), lambda: Pure(epsilon=math.inf),
    lambda: Pure(epsilon=1, times=0), lambda: Terms(unit="scan", delta=0.1, adjacency="x"),
    lambda: Terms(unit="site", delta=0, adjacency="x"), lambda: Terms(unit="site", delta=1, adjacency="x"),
    lambda: Terms(unit="site", delta=0.1, adjacency=""),
    lambda: Terms(unit="site", delta=0.1, adjacency="x", accountant="moments"),
    lambda: noise_multiplier_for(target_epsilon=0, delta=0.1, sample_rate=1, steps=1),
    lambda: noise_multiplier_for(target_epsilon=1e-9, delta=1e-9, sample_rate=1, steps=10_000),
])
def test_wrong_settings_are_refused(make):
    with pytest.raises(ValueError):
        make()
