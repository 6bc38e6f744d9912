"""Every setting that changes privacy beside every other it can stand with, in tables made from lists.

Each combination is measured or refused: the noise that is really added, the ε that is charged, the budget that stops.
The expected values are worked out here. Noise by its formula, ε by accountants that share no code with fedlab's:
Rényi divergences by a sum over whole orders (above) and by an integral over any order (below), numerical composition by
privacy losses rounded down (below) and up (above), noise without sampling by the exact profile of a Gaussian.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy import optimize, special, stats
from test_dpsgd import equipped

from chance import FALSE_ALARM, seeded
from cohorts import TinyNet, blob_sites
from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError
from fedlab.core.types import ServerState, Site, SiteState
from fedlab.deploy.plan import Plan, built
from fedlab.deploy.policy import Budget, Required, SitePolicy
from fedlab.faults.sites import DropOut, Faulty
from fedlab.privacy.accounting.ledger import Ledger
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.at_sites import AtSites
from fedlab.privacy.base import Privacy
from fedlab.privacy.dp.clipping import AdaptiveClip
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.privacy.secure_aggregation.secure_sum import SecureAggregation
from fedlab.privacy.sparse.partial_sharing import SVT, SparseVector
from fedlab.run.admission import Admission
from fedlab.run.federate import federate
from fedlab.run.local import Local
from fedlab.strategies import FedAvg
from fedlab.topologies import star
from trainers import trainer

DELTA, CLIP, SIGMA, BITS = 0.003, 0.2, 1.5, 1.3
#: What the bits of an adaptive clip leave for the gradients, of a noise multiplier of 1.5: (1.5⁻² - 2.6⁻²)^(-1/2).
BESIDE_BITS = 1.8364
ACCOUNTANTS = ("rdp", "prv", "gdp")


def test_the_noise_beside_bits_is_the_number_worked_out_by_hand():
    assert 1 / BESIDE_BITS**2 + 1 / (2 * BITS) ** 2 == pytest.approx(1 / SIGMA**2, rel=1e-4)


# Accountants of this file

class Bounds(NamedTuple):
    """What a right ε lies between."""

    low: float
    high: float


@cache
def epsilon(accountant: str, rate: float, sigma: float, steps: int, delta: float = DELTA) -> Bounds:
    """Bounds of the ε of Gaussian steps on records drawn at a rate; without sampling, "prv" is exact as "gdp" is."""
    if accountant == "rdp":
        return Bounds(_by_any_order(rate, sigma, steps, delta), _by_whole_orders(rate, sigma, steps, delta))
    if rate == 1:
        exact = _exact(math.sqrt(steps) / sigma, delta)
        return Bounds(exact, exact + 1e-6)
    low, high = _by_losses(rate, sigma, steps, delta)
    return Bounds(low, high + 0.03)  # fedlab states the upper end of a grid whose error is 0.01 either way


def to_epsilon(divergence: float, order: float, delta: float) -> float:
    """Balle et al. 2020, theorem 21."""
    return divergence + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def _by_whole_orders(rate: float, sigma: float, steps: int, delta: float) -> float:
    """Mironov et al. 2019, section 3.3: a binomial sum."""
    found = []
    for order in range(2, 64):
        k = np.arange(order + 1)
        with np.errstate(divide="ignore"):
            terms = (np.log(special.comb(order, k)) + special.xlogy(order - k, 1 - rate) + k * math.log(rate)
                     + (k * k - k) / (2 * sigma**2))
        found.append(to_epsilon(steps * special.logsumexp(terms) / (order - 1), order, delta))
    return min(found) + 1e-9


def _by_any_order(rate: float, sigma: float, steps: int, delta: float) -> float:
    """The same divergence as an integral over the drawn value, at the best of all real orders."""
    x = np.linspace(-14 * sigma, 14 * sigma + 80, 40_000)
    logs = np.logaddexp(math.log1p(-rate) if rate < 1 else -np.inf, math.log(rate) + (2 * x - 1) / (2 * sigma**2))
    mass = stats.norm.logpdf(x, scale=sigma) + math.log(x[1] - x[0])

    def at(order: float) -> float:
        return to_epsilon(steps * special.logsumexp(mass + order * logs) / (order - 1), order, delta)

    return float(optimize.minimize_scalar(at, bounds=(1.01, 60), method="bounded", options={"xatol": 1e-6}).fun) - 1e-6


def profile(mu: float, found: float) -> float:
    """δ of the Gaussian mechanism at an ε (Balle and Wang 2018, theorem 8)."""
    return float(stats.norm.cdf(mu / 2 - found / mu) - math.exp(found) * stats.norm.cdf(-mu / 2 - found / mu))


def _exact(mu: float, delta: float) -> float:
    return float(optimize.brentq(lambda e: profile(mu, e) - delta, 0.0, 200.0, xtol=1e-12))


def _by_losses(rate: float, sigma: float, steps: int, delta: float) -> Bounds:
    """Composition of privacy losses on a grid, the larger of adding and removing a record."""
    width, reach = 5e-4, 8.0
    edges = width * np.arange(round(-reach / width), round(reach / width) + 1)

    def below(losses: np.ndarray, mean: float) -> np.ndarray:
        """The probability under a normal of that mean that log(1 - q + q exp((2x - 1) / 2σ²)) is below a loss."""
        inside = np.maximum(np.exp(losses) - (1 - rate), 1e-300) / rate
        return np.where(np.exp(losses) > 1 - rate,
                        stats.norm.cdf(sigma**2 * np.log(inside) + 0.5, loc=mean, scale=sigma), 0.0)

    removed = np.diff((1 - rate) * below(edges, 0.0) + rate * below(edges, 1.0))
    added = np.diff(1 - below(-edges, 0.0))  # the loss the other way round is minus this one
    found = []
    for one in (removed, added):
        assert one.sum() == pytest.approx(1, abs=1e-12)
        size = steps * (len(one) - 1) + 1
        together = np.fft.irfft(np.fft.rfft(one, 2**size.bit_length()) ** steps, 2**size.bit_length())[:size]
        lowest = steps * edges[0] + width * np.arange(size)  # every loss rounded down

        def left(e: float, together: np.ndarray = together, lowest: np.ndarray = lowest) -> float:
            return float(np.sum(together * np.maximum(0.0, -np.expm1(e - lowest)))) - delta

        found.append(optimize.brentq(left, 0.0, 100.0, xtol=1e-9))
    return Bounds(max(found), max(found) + steps * width)


def within(found: float, bounds: Bounds) -> bool:
    return bounds.low <= found <= bounds.high


def assert_deviation(noise: torch.Tensor, expected: float) -> None:
    """That Gaussian noise of mean 0 has this deviation: chi-square, both sides."""
    n = noise.numel()
    statistic = float((noise.double() / expected).square().sum())
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], n)
    assert low < statistic < high, (math.sqrt(statistic / n), n)


# DP-SGD at a site

class Sgd(NamedTuple):
    """A combination of settings of DP-SGD; `rate` is what a site of five patients draws with."""

    secure: bool
    adaptive: bool
    drawn: tuple[str, float]
    per_layer: bool
    accountant: str

    @property
    def rate(self) -> float:
        name, value = self.drawn
        return value / 5 if name == "batch" else value

    @property
    def refused(self) -> str | None:
        """Why this combination has no guarantee."""
        if self.adaptive and self.per_layer:
            return "follows the norm of the whole vector"
        return "exact only without sampling" if self.accountant == "gdp" and self.rate < 1 else None

    def technique(self, **more) -> DPSGD:
        clip = AdaptiveClip(start=CLIP, bit_noise=BITS, lr=0.05) if self.adaptive else CLIP
        return DPSGD(**{"clip": clip, "noise_multiplier": SIGMA, "delta": DELTA, "per_layer": self.per_layer,
                        "accountant": self.accountant, "secure_mode": self.secure, self.drawn[0]: self.drawn[1],
                        **more})


SGD = [Sgd(*row) for row in itertools.product((False, True), (False, True), (
    ("batch", 2.0), ("batch", 5.0), ("sample_rate", 0.37), ("sample_rate", 1.0)), (False, True), ACCOUNTANTS)]
FIVE = blob_sites((5,))[0]
STEPS = 24


def no_gradient(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss that leaves nothing but the noise in a gradient, whoever is drawn."""
    return 0 * output.sum()


class Measured(NamedTuple):
    noise: torch.Tensor  # in units of the clip, on the sum
    bits: torch.Tensor  # noise on the sum of the bits
    drawn: int


def measured(technique: DPSGD, state: SiteState, *, rate: float) -> Measured:
    """One round at a site of five, step by step: the noise, from the gradients and from how an adaptive clip moves."""
    kit = equipped(technique, FIVE, seed=seeded(0), state=state, steps=STEPS, loss=no_gradient, crop=(4, 4, 4))
    noise, bits, drawn, expected = [], [], 0, rate * 5
    for image, target in kit.loader:
        clip = kit.optimiser.max_grad_norm
        whole = math.sqrt(sum(c * c for c in clip)) if isinstance(clip, list) else clip
        kit.optimiser.zero_grad(set_to_none=True)
        kit.backward(kit, image, target)
        kit.optimiser.step()
        noise.append(torch.cat([p.grad.flatten() for p in kit.model.parameters()]).double() * expected / whole)
        drawn += len(image)
        if isinstance(technique.clip, AdaptiveClip):
            share = 0.5 - math.log(kit.optimiser.max_grad_norm / clip) / 0.05
            bits.append((share - 0.5) * expected - len(image) / 2)  # every gradient is 0, within the clip
    kit.close()
    return Measured(torch.cat(noise), torch.tensor(bits, dtype=torch.float64), drawn)


@pytest.mark.chance
@pytest.mark.parametrize("row", SGD, ids=repr)
def test_dp_sgd_beside_every_setting(row):
    if row.refused:
        with pytest.raises(ValueError, match=row.refused):
            row.technique().equip(equipped(DPSGD(clip=1.0, noise_multiplier=0.0, sample_rate=1.0), FIVE), FIVE,
                                  SiteState(owner="privacy"))
        return
    once, twice = (epsilon(row.accountant, row.rate, SIGMA, n * STEPS) for n in (1, 2))
    assert once.high < 0.9 * twice.low
    state = SiteState(owner="privacy")
    found = measured(row.technique(max_epsilon=0.95 * twice.low), state, rate=row.rate)

    assert_deviation(found.noise, BESIDE_BITS if row.adaptive else SIGMA)
    if row.adaptive:
        assert_deviation(found.bits, BITS)
    low, high = stats.binom.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], 5 * STEPS, row.rate)
    assert low <= found.drawn <= high

    (spent,) = Ledger(state).spent()
    assert within(spent.epsilon, once), (spent.epsilon, once)
    assert (spent.unit, spent.delta, spent.repeats) == ("patient", DELTA, not row.secure)
    with pytest.raises(PrivacyBudgetExhausted, match="would make it"):
        measured(row.technique(max_epsilon=0.95 * twice.low), state, rate=row.rate)
    assert Ledger(state).spent() == (spent,)
    with pytest.raises(PrivacyBudgetExhausted):
        measured(row.technique(max_epsilon=0.99 * once.low), fresh := SiteState(owner="privacy"), rate=row.rate)
    assert not fresh.ledger
    measured(row.technique(max_epsilon=1.001 * twice.high), state, rate=row.rate)
    assert within(Ledger(state).spent()[0].epsilon, twice)


# Noise on updates, in whole runs

#: Unequal sites, their names out of alphabetical order.
SITES = [replace(site, name=name) for site, name in zip(blob_sites((3, 1, 2, 4)), ("zeta", "alpha", "mu", "beta"),
                                                      strict=True)]
STILL = dict(lr=1e-30, crop=(4, 4, 4), steps=1)


def run(privacy: Privacy, *, sites: list[Site] = SITES, away: bool = False, strategy: FedAvg | None = None, **more):
    """Two rounds in which no site learns anything, so that the model moves by the noise alone; one site may be away."""
    faults = [DropOut(sites=("mu",), rounds=(1,))] if away else []
    starts = trainer(**STILL).initial()
    history = federate(trainer(**STILL), sites, privacy=privacy, rounds=2, seed=seeded(1), progress=False,
                       strategy=strategy or FedAvg(weights="uniform"), engine=Faulty(engine=Local(), faults=faults),
                       admission=Admission(), **more)
    moved = torch.cat([(history.state.params[k].double() - starts[k].double()).flatten() for k in starts])
    return history, moved


def charged(history, site: str, unit: str = "site") -> float:
    """The ε of a site at the end of a run."""
    table = history.spent().reset_index()
    return float(table[(table["site"] == site) & (table["unit"] == unit)]["epsilon"].iloc[-1])


LOCAL = list(itertools.product((False, True), (False, True), ACCOUNTANTS, (False, True), ("patients", "uniform")))


@pytest.mark.chance
@pytest.mark.parametrize(("secure", "per_layer", "accountant", "away", "weights"), LOCAL)
def test_local_noise_beside_every_setting(secure, per_layer, accountant, away, weights):
    technique = LocalGaussian(clip=CLIP, noise_multiplier=4.0, delta=DELTA, per_layer=per_layer, secure_mode=secure,
                              accountant=accountant)
    history, moved = run(technique, away=away, strategy=FedAvg(weights=weights))
    variance = 0.0
    for absent in ((), ("mu",) if away else ()):
        counts = [len(s.train) if weights == "patients" else 1 for s in SITES if s.name not in absent]
        variance += sum(w * w for w in counts) / sum(counts) ** 2
    assert_deviation(moved, 4.0 * CLIP * math.sqrt(variance))
    for site in SITES:  # two updates differ by twice the clip: half the noise multiplier; an absent site pays nothing
        times = 1 if away and site.name == "mu" else 2
        assert within(charged(history, site.name), epsilon(accountant, 1.0, 2.0, times))
    assert history.spent()["repeats"].any() == (not secure)


CENTRAL = list(itertools.product((False, True), (False, True), (False, True), ACCOUNTANTS, (1.0, 0.6), (False, True)))


@pytest.mark.chance
@pytest.mark.parametrize(("secure", "adaptive", "per_layer", "accountant", "sample", "away"), CENTRAL)
def test_noise_at_the_server_beside_every_setting(secure, adaptive, per_layer, accountant, sample, away):
    def technique(**more) -> CentralGaussian:
        clip = AdaptiveClip(start=CLIP, bit_noise=BITS, lr=1e-16) if adaptive else CLIP
        return CentralGaussian(clip=clip, noise_multiplier=SIGMA, delta=DELTA, per_layer=per_layer,
                               secure_mode=secure, accountant=accountant, **more)

    strategy = FedAvg(weights="uniform", sample=sample)
    refused = ("whole vector" if adaptive and per_layer else
               "exact only without sampling" if accountant == "gdp" and sample < 1 else None)
    if refused:
        with pytest.raises(ValueError, match=refused):
            run(technique(), strategy=strategy)
        return
    history, moved = run(technique(), away=away, strategy=strategy)
    # Divided by the expected number of sites, whoever is drawn or absent.
    assert_deviation(moved, (BESIDE_BITS if adaptive else SIGMA) * CLIP * math.sqrt(2) / (4 * sample))
    once, twice = (epsilon(accountant, sample, SIGMA, n) for n in (1, 2))
    assert within(charged(history, "server"), twice)
    assert history.spent()["repeats"].any() == (not secure)
    stopped, _ = run(technique(max_epsilon=0.5 * (once.high + twice.low)), away=away, strategy=strategy)
    assert within(charged(stopped, "server"), once) and "the server stops" in stopped.stopped
    with pytest.raises(ValueError, match="more than the budget"):
        run(technique(max_epsilon=0.99 * once.low), strategy=strategy)


SUMMED = list(itertools.product((False, True), (32, 40), (0, 1), (False, True)))


@pytest.mark.chance
@pytest.mark.parametrize(("secure", "bits", "colluding", "away"), SUMMED)
def test_noise_in_secure_sums_beside_every_setting(secure, bits, colluding, away):
    def aggregation(**more) -> SecureAggregation:
        return SecureAggregation(threshold=3, clip=CLIP, bits=bits, colluding=colluding, noise_multiplier=SIGMA,
                                 delta=DELTA, secure_mode=secure, **more)

    history, moved = run(Privacy(), away=away, aggregation=aggregation())
    # 3 - colluding sites bring the stated noise; each site's share is the same, whoever stays.
    share = SIGMA * CLIP / math.sqrt(3 - colluding)
    variance = sum(share**2 / survivors for survivors in (4, 3 if away else 4))
    assert_deviation(moved, math.sqrt(variance))
    once, twice = (epsilon("rdp", 1.0, SIGMA, n) for n in (1, 2))  # the same ρ as Gaussian noise: 1 / (2 · 1.5²)
    for site in SITES:
        paid = once if away and site.name == "mu" else twice
        assert within(charged(history, site.name), Bounds(paid.low, paid.high + 1e-6))
    assert history.spent()["repeats"].any() == (not secure)
    with pytest.raises(ValueError, match="more than the budget"):
        run(Privacy(), aggregation=aggregation(max_epsilon=0.99 * once.low))


# Techniques of several units, and what cannot stand together

def sgd(**more) -> DPSGD:
    return DPSGD(**{"clip": CLIP, "noise_multiplier": SIGMA, "delta": DELTA, "sample_rate": 0.37, **more})


def local(**more) -> LocalGaussian:
    return LocalGaussian(clip=CLIP, noise_multiplier=4.0, delta=DELTA, **more)


def central(**more) -> CentralGaussian:
    return CentralGaussian(**{"clip": CLIP, "noise_multiplier": SIGMA, "delta": DELTA, **more})


def summed(**more) -> SecureAggregation:
    return SecureAggregation(**{"threshold": 3, "clip": CLIP, "noise_multiplier": SIGMA, "delta": DELTA, **more})


BARE = SecureAggregation(threshold=3, clip=CLIP)
ADAPTIVE = AdaptiveClip(start=CLIP, bit_noise=BITS)
#: ε after two rounds of one step: of a patient of zeta, of site zeta at itself, of a site at the server.
PATIENT, AT_SITE, AT_SERVER = (epsilon("rdp", *terms) for terms in ((0.37, SIGMA, 2), (1.0, 2.0, 2), (1.0, SIGMA, 2)))

TOGETHER = [  # techniques, aggregation, ε by (site, unit)
    (sgd() + local(), None, {("zeta", "patient"): PATIENT, ("zeta", "site"): AT_SITE}),
    (sgd() + central(), None, {("zeta", "patient"): PATIENT, ("server", "site"): AT_SERVER}),
    (sgd(clip=ADAPTIVE) + central(clip=ADAPTIVE), None,
     {("zeta", "patient"): PATIENT, ("server", "site"): AT_SERVER}),
    (sgd(), summed(), {("zeta", "patient"): PATIENT, ("zeta", "site"): AT_SERVER}),
    (sgd(), BARE, {("zeta", "patient"): PATIENT}),
    (local() + central(), None, {("zeta", "site"): AT_SITE, ("server", "site"): AT_SERVER}),
    (sgd() + local() + central(), None,
     {("zeta", "patient"): PATIENT, ("zeta", "site"): AT_SITE, ("server", "site"): AT_SERVER}),
    (central(), BARE, {("server", "site"): AT_SERVER}),
    (AtSites(sites=("zeta",), technique=sgd()), summed(),
     {("zeta", "patient"): PATIENT, ("zeta", "site"): AT_SERVER, ("beta", "site"): AT_SERVER}),
    (local() + local(), None, {("zeta", "site"): epsilon("rdp", 1.0, 2.0, 4)}),
    (sgd() + local(max_epsilon=1e-3), None, "more than the budget"),
    (central(), summed(), "to one of them only"),
    (central(clip=ADAPTIVE), BARE, "give CentralGaussian a fixed clip"),
    (local(), summed(), "cannot be added up; give noise to one"),
    (AtSites(sites=("mu",), technique=local()), summed(), "cannot be added up; give noise to one"),
    (SVT(fraction=0.2, epsilon_threshold=1.0, epsilon_release=1.0, delta=DELTA), summed(), "cannot be added up; give"),
    (local(), BARE, {("zeta", "site"): AT_SITE}),
]


@pytest.mark.parametrize(("privacy", "aggregation", "expected"), TOGETHER, ids=repr)
def test_techniques_together_charge_each_unit_or_are_refused(privacy, aggregation, expected):
    more = {} if aggregation is None else {"aggregation": aggregation}
    if isinstance(expected, str):
        with pytest.raises((ValueError, PrivacyError), match=expected):
            run(privacy, **more)
        return
    history, _ = run(privacy, **more)
    found = {where: charged(history, *where) for where in expected}
    assert all(within(found[where], expected[where]) for where in expected), (found, expected)
    noted = {(site, unit) for site, unit in history.spent().reset_index()[["site", "unit"]].itertuples(index=False)}
    units = {unit if site != "server" else "server" for site, unit in expected}
    assert {unit if site != "server" else "server" for site, unit in noted} == units


@pytest.mark.parametrize("make", [
    lambda: sgd() + sgd(), lambda: sgd() + AtSites(sites=("zeta",), technique=sgd()),
    lambda: central() + local(), lambda: central() + central(), lambda: central() + sgd() + local(),
    lambda: AtSites(sites=("zeta",), technique=central()), lambda: sgd(delta=1.0), lambda: central(clip=math.inf),
    lambda: sgd(clip=math.inf), lambda: sgd(clip=AdaptiveClip(start=CLIP, bit_noise=SIGMA / 2)),
    lambda: summed(delta=None), lambda: summed(clip=None), lambda: SecureAggregation(threshold=3, secure_mode=True),
    lambda: SecureAggregation(threshold=3, max_epsilon=1.0), lambda: sgd(batch=2.0)])
def test_what_has_no_guarantee_together_cannot_be_made(make):
    with pytest.raises(ValueError, match=r"expected|got|say|put|both|stands once|part at the server|give|lies"):
        make()


def test_sites_drawn_at_random_and_secure_sums_are_refused():
    with pytest.raises(ValueError, match="drawn at random"):
        run(Privacy(), aggregation=summed(), strategy=FedAvg(weights="uniform", sample=0.9))


def test_delta_is_below_one_over_the_number_of_patients_and_of_sites():
    """zeta has 3 patients, beta 4, and there are 4 sites: 1/4 is refused, anything below it is not."""
    for technique, more in ((sgd(delta=0.25), {}), (central(delta=0.25), {}), (Privacy(), {"aggregation": summed(
            delta=0.25)}), (LocalGaussian(clip=CLIP, noise_multiplier=4.0, delta=0.25), {})):
        with pytest.raises(ValueError, match="delta is below 1 over the number"):
            run(technique, **more)
    assert not run(sgd(delta=0.2499))[0].spent().empty


@pytest.mark.parametrize(("patients", "sites"), list(itertools.product((False, True), repeat=2)))
def test_each_unit_says_itself_whether_its_noise_repeats(patients, sites):
    for privacy, more in ((sgd(secure_mode=patients) + local(secure_mode=sites), {}),
                          (sgd(secure_mode=patients), {"aggregation": summed(secure_mode=sites)}),
                          (sgd(secure_mode=patients) + central(secure_mode=sites), {})):
        table = run(privacy, **more)[0].spent().reset_index()
        assert set(table[table["unit"] == "patient"]["repeats"]) == {not patients}
        assert set(table[table["unit"] == "site"]["repeats"]) == {not sites}


# Policies of sites

class Offered(NamedTuple):
    """What a plan offers to the site alpha, and what of it holds there."""

    text: str
    privacy: Privacy
    aggregation: Aggregation
    technique: str | None  # that works at the site
    unit: str | None
    secure: bool | None  # None without noise
    adaptive: bool
    max_epsilon: float | None


def offered() -> list[Offered]:
    rows = [Offered("nothing", Privacy(), Aggregation(), None, None, None, False, None)]
    for secure, adaptive, budget in itertools.product((False, True), (False, True), (None, 5.0, 5.1)):
        more = {"secure_mode": secure, "max_epsilon": budget}
        clip = {"clip": ADAPTIVE if adaptive else CLIP}
        for name, technique, unit in (("DPSGD", sgd(**clip, **more), "patient"),
                                      ("CentralGaussian", central(**clip, **more), None)):
            rows.append(Offered(f"{name} {secure} {adaptive} {budget}", technique, Aggregation(), name, unit, secure,
                                adaptive, budget))
        if adaptive:
            continue
        rows.append(Offered(f"LocalGaussian {secure} {budget}", local(**more), Aggregation(), "LocalGaussian", "site",
                            secure, False, budget))
        rows.append(Offered(f"SecureAggregation {secure} {budget}", Privacy(), summed(**more), "SecureAggregation",
                            "site", secure, False, budget))
        for name, technique in (("SVT", SVT(fraction=0.2, epsilon_threshold=1.0, epsilon_release=1.0, delta=DELTA,
                                            **more)),
                                ("SparseVector", SparseVector(fraction=0.2, epsilon=2.0, delta=DELTA, **more))):
            rows.append(Offered(f"{name} {secure} {budget}", technique, Aggregation(), name, "site", secure, False,
                                budget))
        rows.append(Offered(f"DPSGD elsewhere {secure} {budget}", AtSites(sites=("zeta",), technique=sgd(**more)),
                            Aggregation(), None, None, None, False, None))
        rows.append(Offered(f"DPSGD here {secure} {budget}", AtSites(sites=("alpha",), technique=sgd(**more)),
                            Aggregation(), "DPSGD", "patient", secure, False, budget))
    return rows


def required(technique: str, **limits) -> SitePolicy:
    return SitePolicy(require=(Required.read({"technique": technique, **limits}),))


#: A policy, and why it refuses an offer, if it does.
POLICIES = {
    "nothing": (SitePolicy(), lambda o: None),
    "secure_mode": (SitePolicy(secure_mode=True), lambda o: "secure_mode" if o.secure is False else None),
    **{f"budget per {unit}": (SitePolicy(budgets={unit: Budget(epsilon=1.0, delta=DELTA)}),
                              lambda o, unit=unit: None if o.unit == unit else "gives no guarantee per")
       for unit in ("patient", "site")},
    **{f"less delta per {unit}": (SitePolicy(budgets={unit: Budget(epsilon=1.0, delta=DELTA * (1 - 1e-9))}),
                                  lambda o, unit=unit: "at most" if o.unit == unit else "gives no guarantee per")
       for unit in ("patient", "site")},
    **{f"{technique} with noise {least}": (
        required(technique, min_noise_multiplier=least),
        lambda o, technique=technique, allowed=allowed: None if o.technique == technique and allowed else "insists on")
       for technique, least, allowed in (("DPSGD", SIGMA, True), ("DPSGD", SIGMA + 1e-9, False),
                                         ("CentralGaussian", SIGMA, True), ("LocalGaussian", 4.0 + 1e-9, False),
                                         ("SecureAggregation", SIGMA, True))},
    **{f"{technique} with clip {most}": (
        required(technique, max_clip=most),
        lambda o, technique=technique, allowed=allowed: None if o.technique == technique and allowed else "insists on")
       for technique, most, allowed in (("DPSGD", CLIP, True), ("DPSGD", CLIP - 1e-9, False),
                                        ("CentralGaussian", CLIP - 1e-9, False), ("SecureAggregation", CLIP, True))},
    **{f"{technique} with its budget": (
        required(technique, max_epsilon=5.0),
        lambda o, technique=technique: None if o.technique == technique and o.max_epsilon == 5.0 else "insists on")
       for technique in ("DPSGD", "CentralGaussian", "LocalGaussian", "SVT", "SparseVector", "SecureAggregation")},
    **{f"{technique} with secure_mode": (
        required(technique, secure_mode=True),
        lambda o, technique=technique: None if o.technique == technique and o.secure else "insists on")
       for technique in ("DPSGD", "SVT", "SparseVector", "SecureAggregation")},
}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.of(trainer=trainer(model=built(TinyNet, seed=3), optimiser=torch.optim.SGD), strategy=FedAvg(),
                   privacy=Privacy(), topology=star, admission=None, rounds=3, seed=0, sites=("zeta", "alpha"))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("offer", offered(), ids=lambda offer: offer.text)
def test_a_policy_beside_every_offer(name, offer, plan):
    policy, refusal = POLICIES[name]
    expected = refusal(offer)
    if expected is None:
        policy.check_plan(plan, offer.privacy, offer.aggregation, site="alpha")
        return
    with pytest.raises(PrivacyError, match=expected):
        policy.check_plan(plan, offer.privacy, offer.aggregation, site="alpha")


@pytest.mark.parametrize(("kept", "allowed"), [(CLIP, True), (CLIP * (1 + 1e-9), False)])
def test_a_clip_that_moved_beyond_the_policy_is_refused_wherever_it_is_kept(kept, allowed):
    policy, norm = required("DPSGD", max_clip=CLIP), torch.tensor(kept, dtype=torch.float64)
    site = SiteState()
    site.of("privacy 0").own["clipping norm"] = norm
    for server, state in ((ServerState(round=1, params={}, broadcast={"clipping norm": norm}), SiteState()),
                          (ServerState(round=1, params={}), site)):
        if allowed:
            policy.check_round(server, state)
        else:
            with pytest.raises(PrivacyError, match="insists on DPSGD with clip"):
                policy.check_round(server, state)


@pytest.mark.parametrize(("technique", "unit", "bounds"), [
    (sgd(), "patient", (0.37, SIGMA)), (sgd(secure_mode=True), "patient", (0.37, SIGMA)),
    (sgd(clip=ADAPTIVE, secure_mode=True), "patient", (0.37, SIGMA)), (local(), "site", (1.0, 2.0)),
    (local(secure_mode=True), "site", (1.0, 2.0))], ids=repr)
def test_a_budget_of_the_site_ends_where_the_accountant_says(technique, unit, bounds):
    once, twice = (epsilon("rdp", *bounds, n) for n in (1, 2))
    history, _ = run(technique)
    ledger = Ledger(history.site_states["zeta"])
    other = "site" if unit == "patient" else "patient"

    def policy(limit: float, **more) -> SitePolicy:
        return SitePolicy(budgets={more.pop("per", unit): Budget(epsilon=limit, delta=DELTA)}, **more)

    policy(1.001 * twice.high).check_spent(ledger)
    for limit in (0.999 * twice.low, 1.001 * once.high):
        with pytest.raises(PrivacyBudgetExhausted, match="it would have spent"):
            policy(limit).check_spent(ledger)
    with pytest.raises(PrivacyError, match="was not charged per"):
        policy(100.0, per=other).check_spent(ledger)
    strict = policy(1.001 * twice.high, secure_mode=True)
    if technique.secure_mode:
        strict.check_spent(ledger)
    else:
        with pytest.raises(PrivacyError, match="drawn from the seed"):
            strict.check_spent(ledger)
