"""Releases under a guarantee, and the ε that provably follows from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from fedlab.core.muted_warnings import muted
from fedlab.core.settings import check_choice, check_positive, check_share, check_whole

__all__ = ["RELEASES", "Accountant", "Concentrated", "Gaussian", "Pure", "Release", "epsilon_of", "renyi_of"]

Accountant = Literal["rdp", "prv", "gdp"]

#: Rényi orders at which a guarantee is tried; any order gives a valid ε, more orders a smaller one.
_ORDERS = (*(1 + x / 100 for x in range(1, 10)), *(1 + x / 10 for x in range(1, 100)), *range(11, 64),
           *(64 * 2 ** (x / 4) // 1 for x in range(0, 21)))
#: Error of ε in numerical composition, and values of its grid at most: seconds and a few hundred MiB.
_PRV_ERROR, _LARGEST_GRID = 0.01, 2**22
#: Kinds of Gaussian steps that are composed numerically at most; the smallest δ beside which rounding in Fourier
#: transforms of 53 bits counts for nothing.
_MOST_KINDS, _SMALLEST_DELTA = 64, 1e-12


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Steps of the Gaussian mechanism on Poisson-sampled records.

    Args:
        noise_multiplier: standard deviation of the noise over the sensitivity.
        sample_rate: probability with which a record takes part in a step; 1 if every record does.

    Raises:
        ValueError: a setting is out of range.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        check_positive(noise_multiplier=self.noise_multiplier)
        check_share(sample_rate=self.sample_rate)
        check_whole(steps=self.steps)


@dataclass(frozen=True, kw_only=True)
class Pure:
    """Releases of an ε-differentially private mechanism (δ = 0), such as Laplace noise or the sparse vector.

    Raises:
        ValueError: a setting is out of range.
    """

    epsilon: float
    times: int = 1

    def __post_init__(self) -> None:
        check_positive(epsilon=self.epsilon)
        check_whole(times=self.times)


@dataclass(frozen=True, kw_only=True)
class Concentrated:
    """Releases of a ρ-zero-concentrated private mechanism (Bun and Steinke 2016), such as discrete Gaussian noise.

    Args:
        rho: of one release: its Rényi divergence of order α is at most ρ α, for every α.

    Raises:
        ValueError: a setting is out of range.
    """

    rho: float
    times: int = 1

    def __post_init__(self) -> None:
        check_positive(rho=self.rho)
        check_whole(times=self.times)


Release = Gaussian | Pure | Concentrated
#: The kinds of release by the name that a ledger writes.
RELEASES: Mapping[str, type[Gaussian] | type[Pure] | type[Concentrated]] = {
    "Gaussian": Gaussian, "Pure": Pure, "Concentrated": Concentrated}

#: Noise multiplier, sample rate and number of steps of each kind of Gaussian step; ε and number of pure releases.
_Gaussians = tuple[tuple[float, float, int], ...]
_Pures = tuple[tuple[float, int], ...]


def epsilon_of(releases: Iterable[Release], *, delta: float, accountant: Accountant = "rdp") -> float:
    """The ε that all releases together provably satisfy at δ: 0 for none, infinite where nothing can be proven.

    Under "rdp" Rényi divergences add up, order by order: at order α an ε-DP release has at most min(ε, α ε² / 2) (Bun
    and Steinke 2016, proposition 3.3), a ρ-zCDP release at most ρ α. Pure releases alone are also bounded by their
    sum. Under "prv" and "gdp" the ε of pure releases is added to that of the Gaussian ones (basic composition). Where
    "prv" would need a large grid, δ is below 1e-12, or Rényi divergences give a smaller ε, theirs is taken: both are
    proven.

    Args:
        releases: of one unit and adjacency.
        delta: in (0, 1).
        accountant: as in `Terms`.

    Raises:
        ValueError: δ is not between 0 and 1; an unknown accountant; "gdp" for sampled records, for which it is an
            approximation, not a proof; "prv" or "gdp" for concentrated releases, of which only the Rényi divergence is
            known.
    """
    if not (isinstance(delta, Real) and 0 < delta < 1):
        raise ValueError(f"delta lies between 0 and 1, got {delta}")
    check_choice(get_args(Accountant), accountant=accountant)
    gaussian, pure, rho = _kinds(releases)
    if rho and accountant != "rdp":
        raise ValueError(f"accountant {accountant!r} cannot account for concentrated releases, such as discrete "
                         "Gaussian noise, of which only the Rényi divergence is known; say accountant='rdp'")
    return _epsilon(gaussian, pure, rho, delta, accountant)


def renyi_of(releases: Iterable[Release]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Rényi orders, and the divergence at each that the releases together allow at most; NaN where none is known."""
    return np.array(_ORDERS, dtype=float), _renyi_divergences(*_kinds(releases))


def _kinds(releases: Iterable[Release]) -> tuple[_Gaussians, _Pures, float]:
    """The releases by kind, and the sum of the ρ of concentrated ones."""
    gaussian: dict[tuple[float, float], int] = {}
    pure: dict[float, int] = {}
    rhos = []
    for release in releases:
        if isinstance(release, Gaussian):
            key = release.noise_multiplier, release.sample_rate
            gaussian[key] = gaussian.get(key, 0) + release.steps
        elif isinstance(release, Concentrated):
            rhos.append(release.rho * release.times)
        else:
            pure[release.epsilon] = pure.get(release.epsilon, 0) + release.times
    return (tuple(sorted((*key, steps) for key, steps in gaussian.items())), tuple(sorted(pure.items())),
            math.fsum(rhos))


@lru_cache(maxsize=4096)
def _epsilon(gaussian: _Gaussians, pure: _Pures, rho: float, delta: float, accountant: Accountant) -> float:
    basic = math.fsum(epsilon * times for epsilon, times in pure)
    if not gaussian and not pure and not rho:
        return 0.0
    if not gaussian and not rho:
        return min(basic, _renyi(gaussian, pure, rho, delta))
    if accountant == "gdp":
        return basic + _gdp(gaussian, delta)
    renyi = min(_renyi(gaussian, pure, rho, delta), basic + _renyi(gaussian, (), rho, delta))
    return renyi if accountant == "rdp" else min(renyi, basic + _prv(gaussian, delta))


def _renyi_divergences(gaussian: _Gaussians, pure: _Pures, rho: float) -> npt.NDArray[np.float64]:
    orders = np.array(_ORDERS, dtype=float)
    total = rho * orders
    for noise_multiplier, sample_rate, steps in gaussian:
        total += steps * np.array(_renyi_of_step(noise_multiplier, sample_rate))
    for epsilon, times in pure:
        total += times * np.minimum(epsilon, orders * epsilon**2 / 2)
    return total


def _renyi(gaussian: _Gaussians, pure: _Pures, rho: float, delta: float) -> float:
    orders, total = np.array(_ORDERS, dtype=float), _renyi_divergences(gaussian, pure, rho)
    # Balle et al. 2020, theorem 21: from Rényi divergence to ε at δ.
    found = total + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    return float(max(0.0, np.nanmin(found))) if not np.isnan(found).all() else math.inf


@lru_cache(maxsize=4096)
def _renyi_of_step(noise_multiplier: float, sample_rate: float) -> tuple[float, ...]:
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = np.array(_ORDERS, dtype=float)
    found, opacus = np.empty_like(orders), (orders == orders.round()) & (orders < 64)
    found[opacus] = compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1,
                                orders=[int(order) for order in orders[opacus]])
    for which in (~opacus & (orders < 64), orders >= 64):
        found[which] = _renyi_by_quadrature(noise_multiplier, sample_rate, orders[which])
    return tuple(found + 4e-13 / (orders - 1))  # above the rounding error, measured against 40 digits


def _renyi_by_quadrature(noise_multiplier: float, sample_rate: float, orders: npt.NDArray[np.float64]
                         ) -> npt.NDArray[np.float64]:
    """Rényi divergence of a sampled step at orders where Opacus' series take seconds (fractions) or overflow (large).

    By the trapezoidal rule over the expectation of Mironov et al. 2019, section 3.3, whose error falls
    exponentially: the integrand is analytic within π σ² of the real line and as narrow as a normal density.
    """
    from scipy.special import logsumexp

    if sample_rate == 1:
        return orders / (2 * noise_multiplier**2)
    step = min(noise_multiplier, noise_multiplier**2) / 8
    reach = 12 * noise_multiplier  # beyond it lies e^-72 of the mass
    if (orders.max() + 2 * reach) / step > 1e6:  # so little noise that the small whole orders decide
        return np.full_like(orders, np.nan)
    z = np.arange(-reach, orders.max() + reach + step, step)
    ratio = np.logaddexp(math.log1p(-sample_rate), math.log(sample_rate) + (2 * z - 1) / (2 * noise_multiplier**2))
    mass = -(z**2) / (2 * noise_multiplier**2) + math.log(step / noise_multiplier / math.sqrt(2 * math.pi))
    return np.array([logsumexp(mass + order * ratio) / (order - 1) for order in orders])


def _prv(gaussian: _Gaussians, delta: float) -> float:
    """By numerical composition (Gopi et al. 2021); infinite where that fails, is not exact or needs a larger grid."""
    if all(sample_rate == 1 for _, sample_rate, _ in gaussian):
        return _gdp(gaussian, delta)  # no sampling, no need to approximate
    if len(gaussian) > _MOST_KINDS or delta < _SMALLEST_DELTA:
        return math.inf
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV

    accountant = PRVAccountant()
    accountant.history = list(gaussian)
    # log(1 - q) at q = 1 is minus infinity, rightly; the warning is about a bound on the accountant's grid.
    with np.errstate(all="ignore"), muted("Optimal order is"):
        try:
            domain = accountant._get_domain(  # only plans the grid
                prvs=[PoissonSubsampledGaussianPRV(rate, noise) for noise, rate, _ in gaussian],
                num_self_compositions=[steps for *_, steps in gaussian], eps_error=_PRV_ERROR, delta_error=delta / 1000)
            if not domain.size * len(gaussian) <= _LARGEST_GRID:
                return math.inf
            epsilon = float(accountant.get_epsilon(delta=delta, eps_error=_PRV_ERROR))  # its error's upper end
        except (RuntimeError, ValueError, ArithmeticError, MemoryError):
            return math.inf
    return math.inf if math.isnan(epsilon) else max(0.0, epsilon)  # negative where δ alone suffices


def _gdp(gaussian: _Gaussians, delta: float) -> float:
    from scipy.optimize import brentq
    from scipy.stats import norm

    if any(sample_rate < 1 for _, sample_rate, _ in gaussian):
        raise ValueError("accountant 'gdp' is exact only without sampling (sample_rate 1); for sampled records it may "
                         "claim too small an ε: say accountant='rdp' or 'prv'")
    mu = math.sqrt(math.fsum(steps / noise_multiplier**2 for noise_multiplier, _, steps in gaussian))

    def excess(epsilon: float) -> float:  # Balle and Wang 2018, theorem 8
        tail = norm.logcdf(-epsilon / mu - mu / 2) + epsilon
        return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(min(tail, 700)) - delta)

    if excess(0.0) <= 0:
        return 0.0
    high = mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1e-6  # the zCDP bound lies above
    return float(brentq(excess, 0.0, high, xtol=1e-9)) + 1e-8
