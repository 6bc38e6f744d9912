"""Noise of `secure_mode`: exact on a public grid, at the stated scale beside every other setting, never repeated."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from test_dpsgd import NOBODY, equipped, noisy_gradients, pure_noise

from chance import FALSE_ALARM, SIGMAS, keyed, seeded
from cohorts import Scaled, blob_sites
from fedlab.core.errors import PrivacyError
from fedlab.core.types import Cohort, ServerState, SiteState, Update
from fedlab.core.weights import weights_sha256
from fedlab.privacy.at_sites import AtSites
from fedlab.privacy.compression import TopK
from fedlab.privacy.dp import dpsgd
from fedlab.privacy.dp.clipping import AdaptiveClip
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.dp.exact_sum import ExactSum, add_normal
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.privacy.noise import on_grid
from fedlab.privacy.noise.continuous import standard_normal
from fedlab.privacy.noise.on_grid import GaussianGrid, discrete_laplace_steps, rounded_gaussian
from fedlab.privacy.noise.streams import noise_generator
from fedlab.privacy.personal_layers import PersonalLayers
from fedlab.privacy.secure_aggregation import crypto, protocol
from fedlab.privacy.sparse import sparse_vector
from fedlab.privacy.sparse.partial_sharing import SVT, SparseVector
from fedlab.privacy.sparse.sparse_vector import LaplaceScales, grid_step
from fedlab.run.federate import federate
from fedlab.strategies import FedAvg
from trainers import trainer

UNIFORM = FedAvg(weights="uniform")
KEY = keyed(bytes(range(32)))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def update(site: str = "a", **tensors: torch.Tensor) -> Update:
    return Update(site=site, delta=tensors, weight=3.0)


def assert_as_frequent(drawn: np.ndarray, values: np.ndarray, p: np.ndarray) -> None:
    """Chi-square over all values expected five times or more, and the rest together."""
    bulk = p * len(drawn) >= 5
    seen = [int((drawn == value).sum()) for value in values[bulk]]
    expected = p[bulk] * len(drawn)
    rest = len(drawn) - expected.sum()
    assert stats.chisquare([*seen, len(drawn) - sum(seen)], [*expected, rest]).pvalue > FALSE_ALARM


# Samplers

@pytest.mark.chance
@pytest.mark.parametrize("scale", [0.4, 1.0, 3.7, 12.1])
def test_rounded_gaussian_values_are_as_frequent_as_the_normal_law_says(scale):
    values = np.arange(-130, 131)
    p = stats.norm.cdf((values + 0.5) / scale) - stats.norm.cdf((values - 0.5) / scale)
    assert_as_frequent(rounded_gaussian(300_000, scale=scale, key=KEY), values, p)


@pytest.mark.chance
def test_fine_gaussian_values_are_normal_and_independent():
    count, scale = 600_000, 2.0**40 * 1.2345  # more than one stream
    z = rounded_gaussian(count, scale=scale, key=KEY) / scale
    assert stats.kstest(z, "norm").pvalue > FALSE_ALARM
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - expected) < SIGMAS * (variance / count) ** 0.5
    for lag in (1, 2, 2**15):
        assert abs((z[lag:] * z[:-lag]).mean()) < SIGMAS / count**0.5
    assert len(np.unique(z)) > 0.999 * count  # the last bits are noise, too
    low = rounded_gaussian(count, scale=2.0**40, key=KEY) & 15
    assert_as_frequent(low, np.arange(16), np.full(16, 1 / 16) - 1e-12)


@pytest.mark.parametrize(("coarse", "factor"), [(0.7, 20), (5.25, 12), (2.0**-7, 30)])
def test_a_coarse_grid_holds_the_fine_values_rounded(coarse, factor):
    """Equal keys draw equal normal values; half a step is rounded up, for negative values too."""
    fine = rounded_gaussian(50_000, scale=coarse * 2.0**factor, key=KEY)
    found = rounded_gaussian(50_000, scale=coarse, key=KEY)
    exact = (fine + 2**(factor - 1)) >> factor
    edge = (fine + 2**(factor - 1)) % 2**factor == 0  # where the fine value was itself rounded
    assert (found[~edge] == exact[~edge]).all() and edge.mean() < 0.01


@pytest.mark.parametrize("scale", [1.0, 0.7, 5.25, 2.0**-7, (2**23 + 5) * 2.0**17, 2.0**46 / 3])
def test_a_gaussian_value_is_rounded_exactly(scale, monkeypatch):
    """Given k, x and the sign, against fractions: halves, what lies one part of 2**64 beside them, and others."""
    odd = torch.randint(0, 2**62, (40,), generator=rng(2)).tolist()
    beside = [2**63 + sign * 2**power for power in range(0, 62, 3) for sign in (1, -1)]
    fraction, power = math.frexp(scale)
    factor = math.ceil(fraction * 2**24)
    if factor % 2 and power > 32:  # a half, and the smallest part of the product beside it
        odd.append(pow(factor, -1, 2**64) * (2**(87 - power) + 1) % 2**64)
    cases = [(k, x, negative) for k, x, negative in itertools.product(
        (0, 1, 2, 99, 100), (0, 1, 2**63, 2**64 - 1, *beside, *odd), (False, True))]
    ks, xs, negatives = (np.array(column, np.uint64) for column in zip(*cases, strict=True))
    going, tosses = np.arange(len(ks)), []

    def grows(numerators, denominator, first, coins):
        nonlocal going
        assert numerators.dtype == np.uint64 and (numerators == 1).all() and (denominator, first) == (2, 1)
        assert len(numerators) == len(going)
        passed = ks[going] > len(tosses)
        tosses.append(1)
        going = going[passed]
        return passed

    near = ks < 100  # farther values have probability exp(-5000) and are not tried
    words = iter([xs[near], negatives[near] << np.uint64(63)])
    fake = SimpleNamespace(words=lambda count: next(words))
    monkeypatch.setattr(on_grid, "until_it_fails", grows)
    monkeypatch.setattr(on_grid, "exponential", lambda numerators, denominator, coins: np.ones(len(numerators), bool))
    monkeypatch.setattr(on_grid, "_accepted", lambda whole, x, coins: np.ones(len(x), bool))
    monkeypatch.setattr(on_grid, "_BLOCK", len(ks))
    monkeypatch.setattr(on_grid, "drawn", lambda count, key, block: block(fake, count))
    exact = Fraction(factor, 2**24) * Fraction(2) ** power
    expected = [math.floor(exact * (k + Fraction(x, 2**64)) * (-1 if negative else 1) + Fraction(1, 2))
                for k, x, negative in cases if k < 100 and not (negative and k == x == 0)]
    found = rounded_gaussian(len(ks), scale=scale, key=KEY)
    assert found.tolist() == expected and found.dtype == np.int64


@pytest.mark.chance
@pytest.mark.parametrize("scale", [1, 3, 7, 1000])
def test_laplace_values_are_as_frequent_as_the_formula_says(scale):
    values = np.arange(-20 * scale, 20 * scale + 1)
    ratio = math.exp(-1 / scale)
    assert_as_frequent(discrete_laplace_steps(200_000, scale=scale, key=KEY), values,
                       (1 - ratio) / (1 + ratio) * ratio ** np.abs(values))


@pytest.mark.chance
def test_laplace_values_of_a_large_scale_are_laplace():
    drawn = discrete_laplace_steps(300_000, scale=2**45 + 12345, key=KEY) / (2**45 + 12345)
    assert stats.kstest(drawn, "laplace").pvalue > FALSE_ALARM and np.abs(drawn).max() > 9
    assert discrete_laplace_steps(0, scale=5, key=KEY).shape == (0,)


# The grid

def test_a_grid_depends_on_settings_only_and_refuses_what_it_cannot_hold():
    grid = GaussianGrid(reach=1.0, std=4.0)
    assert grid.step == 2.0**-43  # 16 standard deviations, 64, in 2**49 steps
    assert GaussianGrid(reach=3.0, std=0.1, terms=100).step == 2.0**-41  # 300 in at most 2**50
    assert 0.999_999 < grid.inner(1_000_000) < 1
    for std in (1e-30, 0.0):
        with pytest.raises(ValueError, match="cannot be drawn exactly"):
            GaussianGrid(reach=1.0, std=std)
    with pytest.raises(PrivacyError, match="too coarse"):
        GaussianGrid(reach=1.0, std=1e13).inner(1_000_000)
    with pytest.raises(ValueError, match="cannot be drawn exactly"):
        LocalGaussian(clip=1.0, noise_multiplier=1e-30, secure_mode=True)
    with pytest.raises(ValueError, match="cannot be drawn exactly"):
        CentralGaussian(clip=1.0, noise_multiplier=1e-30, secure_mode=True)
    with pytest.raises(ValueError, match="times the clip"):
        grid_step(1.0, LaplaceScales(threshold=1.0, query=1e16, release=1.0))


def test_the_norm_that_a_term_is_clipped_to_takes_off_all_three_errors():
    grid = GaussianGrid(reach=3.0, std=0.1, terms=100)
    share = 1 - Fraction(1, 2**30) - Fraction(49, 2**52) - Fraction(99 * 100, 2**50)
    assert abs(Fraction(grid.inner(49)) - (3 * share - 2 * 7 * Fraction(1, 2**41))) < Fraction(1, 2**50)
    alone = GaussianGrid(reach=1.0, std=4.0)
    exact = 1 - Fraction(1, 2**30) - Fraction(9, 2**52) - 2 * 3 * Fraction(1, 2**43)
    assert abs(Fraction(alone.inner(9)) - exact) < Fraction(1, 2**52)
    coarse = GaussianGrid(reach=1.0, std=1.5 * 2.0**33)  # steps of 2**-12, of which 2000 take off 0.488
    assert coarse.inner(1_000_000) == pytest.approx(1 - 2000 / 2**12, abs=1e-8)
    with pytest.raises(PrivacyError, match="too coarse"):
        coarse.inner(1_100_000)  # 0.512


def test_the_least_noise_on_a_grid_and_noise_without_end():
    assert GaussianGrid(reach=1.0, std=1.01 * 2.0**-57).step == 2.0**-49
    for std in (2.0**-57, math.inf, math.nan):
        with pytest.raises(ValueError, match="cannot be drawn exactly"):
            GaussianGrid(reach=1.0, std=std)


LEAVES = [  # technique, step of its grid by hand: 2 to the power of (exponent of the largest number - 50)
    (LocalGaussian(clip=1.0, noise_multiplier=4.0, secure_mode=True), 2.0**-43),
    (LocalGaussian(clip=0.3, noise_multiplier=0.05, secure_mode=True, accountant="gdp"), 2.0**-51),
    (LocalGaussian(clip=1.0, noise_multiplier=4.0, per_layer=True, secure_mode=True), 2.0**-43),
    (CentralGaussian(clip=1.0, noise_multiplier=1.0, secure_mode=True), 2.0**-35),
    (CentralGaussian(clip=1.0, noise_multiplier=1.0, per_layer=True, secure_mode=True, accountant="prv"), 2.0**-35),
    (CentralGaussian(clip=AdaptiveClip(start=1.0, bit_noise=2.0), noise_multiplier=1.0, secure_mode=True), 2.0**-35),
]


@pytest.mark.parametrize(("technique", "step"), LEAVES, ids=repr)
def test_in_secure_mode_what_leaves_lies_on_a_public_grid(technique, step):
    """Float64 updates whose own last bits are far finer: noise in floating point would leave them visible."""
    for seed in range(3):
        sent = technique.protect(update(a=0.1 * torch.randn(50, generator=rng(seed), dtype=torch.float64),
                                        b=torch.randn(7, generator=rng(9), dtype=torch.float64)), SiteState(), rng())
        if isinstance(technique, CentralGaussian):
            mean = UNIFORM.combine([sent, replace(sent, site="b")])
            sent = technique.release(mean, Cohort(0, ("a", "b"), 8, 0.5), ServerState(round=0, params={}), rng())
            sent = sent.map(lambda t: 4 * t)  # the expected cohort, a power of two
        whole = torch.cat([t.flatten() for t in sent.delta.values()]) / step
        assert torch.equal(whole, whole.round()) and float(whole.abs().max()) > 2**30


def squared(values: list[torch.Tensor]) -> int:
    """The squared norm of whole numbers, exactly."""
    return sum(int(v) ** 2 for t in values for v in t.flatten().tolist())


@pytest.fixture
def quiet(monkeypatch):
    """Noise of nothing but zeros, so that the whole numbers that it covers show."""
    monkeypatch.setattr(on_grid, "rounded_gaussian", lambda count, *, scale, key: np.zeros(count, np.int64))


@pytest.mark.parametrize("technique", [
    CentralGaussian(clip=0.7, noise_multiplier=1.5, secure_mode=True),
    CentralGaussian(clip=0.7, noise_multiplier=1.5, per_layer=True, secure_mode=True),
    CentralGaussian(clip=AdaptiveClip(start=0.7, bit_noise=5.0), noise_multiplier=3.0, secure_mode=True)],
    ids=repr)
def test_one_site_moves_the_grid_by_no_more_than_the_noise_covers(technique, quiet):
    """In exact arithmetic, after rounding, floating point sums and a division: up to the last step of the grid."""
    step = 2.0**-36  # 2**14 sites of norm 0.7 in at most 2**50 steps
    for case, (length, others) in enumerate(itertools.product((1e-3, 0.7, 1.0, 1e6), (0, 3, 40))):
        sites = [update(f"s{k}", w=torch.randn(60, generator=rng(k)), v=torch.randn(9, generator=rng(99 + k)))
                 for k in range(others)]
        odd = update("odd", w=length * torch.randn(60, generator=rng(1000 + case)), v=torch.zeros(9))
        sums = []
        for cohort in (sites, [*sites, odd]):
            sent = [technique.protect(u, SiteState(), rng()) for u in cohort]
            mean = UNIFORM.combine(sent) if sent else odd.map(lambda t: torch.zeros_like(t, dtype=torch.float64))
            out = technique.release(mean, Cohort(0, tuple(u.site for u in sent), 64, 1.0),
                                    ServerState(round=0, params={}), rng())
            sums.append([t * 64 / step for t in out.delta.values()])
        assert all(torch.equal(t, t.round()) for one in sums for t in one)
        moved = squared([a - b for a, b in zip(*sums, strict=True)])
        assert moved <= (Fraction(0.7) / Fraction(step)) ** 2
        if length >= 1 and not technique.per_layer:
            assert moved > (0.999_99 * 0.7 / step) ** 2  # and hardly anything is given away


@pytest.mark.parametrize("per_layer", [False, True])
def test_two_updates_of_a_site_differ_on_the_grid_by_at_most_twice_the_clip(per_layer, quiet):
    technique, step = LocalGaussian(clip=0.7, noise_multiplier=1.5, per_layer=per_layer, secure_mode=True), 2.0**-45
    whole = []
    for seed, sign in ((0, 1), (0, -1), (1, 1e5), (2, 1e-4)):
        one = update(w=sign * torch.randn(300, generator=rng(seed), dtype=torch.float64), v=torch.ones(2).double())
        whole.append([t / step for t in technique.protect(one, SiteState(), rng()).delta.values()])
    for one, other in itertools.combinations(whole, 2):
        assert squared([a - b for a, b in zip(one, other, strict=True)]) <= (2 * Fraction(0.7) / Fraction(step)) ** 2


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("clip", [1e-3, 0.7, 1e4])
def test_a_patient_moves_the_whole_numbers_by_no_more_than_the_noise_covers(per_layer, clip, quiet):
    shapes = [(40, 3), (7,), ()][:2 if per_layer else 3]
    for seed, scale in ((0, 1e-6), (1, 1.0), (2, 1e6)):
        patients = [[scale * torch.randn(2, *shape, generator=rng(seed + k)) for shape in shapes] for k in range(3)]
        parameters = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        steps = GaussianGrid(reach=clip, std=1.1 * clip, terms=6).step
        sums = []
        for left_out in (None, 0):
            exact = ExactSum(noise_multiplier=1.1, patients=6, per_layer=per_layer)
            for k, group in enumerate(patients):
                exact.add([g[1:] for g in group] if k == 0 and left_out == 0 else group, clip)
            exact.release(parameters, clip, 1.0)
            sums.append([p.grad / steps for p in parameters])
        assert all(torch.equal(t, t.round()) for one in sums for t in one)
        moved = squared([a - b for a, b in zip(*sums, strict=True)])
        assert moved <= (Fraction(clip) / Fraction(steps)) ** 2
        own = [g[0].double() for g in patients[0]]  # clipped here as it is written
        length = math.sqrt(sum(float(g.square().sum()) for g in own))
        if not per_layer:
            for a, b, g in zip(*sums, own, strict=True):
                torch.testing.assert_close((a - b) * steps, g * min(1, clip / length), rtol=1e-6, atol=4 * steps)


@pytest.mark.parametrize("per_layer", [False, True])
def test_an_exact_sum_is_the_naive_one(per_layer, monkeypatch):
    """Of 2, 1 and 3 patients, in steps for 100 patients of norm 0.7: at most 2**50 make 70."""
    scales, shapes = [], [(5, 3), (), (7,)][:3 - per_layer]
    monkeypatch.setattr(on_grid, "rounded_gaussian", lambda count, *, scale, key: (
        scales.append(scale), np.zeros(count, np.int64))[1])
    exact = ExactSum(noise_multiplier=1.5, patients=100, per_layer=per_layer)
    expected = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    for seed, count in enumerate((2, 1, 3)):
        group = [size * torch.randn(count, *shape, generator=rng(seed))
                 for size, shape in zip((0.5, 0.01, 0.1), shapes, strict=False)]
        exact.add(group, 0.7)
        for patient in zip(*group, strict=True):
            lengths = [math.sqrt(sum(v * v for v in g.flatten().tolist())) for g in patient]
            for total, g, own in zip(expected, patient, lengths, strict=True):
                bound, length = (0.7 / math.sqrt(2), own) if per_layer else (0.7, math.hypot(*lengths))
                total += g.double() * min(1, bound / length)
    parameters = [torch.ones(shape, requires_grad=True) for shape in shapes]
    exact.release(parameters, 0.7, 4.0)
    for p, total in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, (total / 4).float(), rtol=1e-6, atol=1e-7)
    assert scales == [1.5 * 0.7 * 2.0**43]
    exact.release(parameters, 0.7, 4.0)
    assert not any(p.grad.any() for p in parameters)


def test_an_exact_sum_of_other_parameters_is_refused():
    exact = ExactSum(noise_multiplier=1.0, patients=3)
    exact.add([torch.ones(1, 2), torch.ones(1, 3)], 1.0)
    with pytest.raises(ValueError, match="zip"):
        exact.add([torch.ones(2, 2)], 1.0)
    with pytest.raises(ValueError, match="zip"):
        exact.release([torch.zeros(2, requires_grad=True)], 1.0, 1.0)


def test_a_step_in_secure_mode_is_the_clipped_mean_and_begins_anew(quiet):
    """Against Opacus's clipping, without noise: two steps, so that no sum is left from the first."""
    found = []
    for secure in (False, True):
        technique = DPSGD(clip=0.1, noise_multiplier=1.0 if secure else 0.0, sample_rate=1.0, delta=1e-2,
                          secure_mode=secure)
        kit = equipped(technique, blob_sites((3,))[0], steps=2)
        torch.manual_seed(0)
        image = torch.randn(3, 1, 4, 8, 8, 8)
        target = (torch.randn(3, 1, 3, 8, 8, 8) > 0).float()
        for _ in range(2):
            kit.optimiser.zero_grad(set_to_none=True)
            kit.backward(kit, image, target)
            kit.optimiser.step()
        found.append(torch.cat([p.grad.flatten() for p in kit.model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)
    assert float(found[0].norm()) > 0.01


# The scale of the noise beside other settings

HALF = AdaptiveClip(start=0.2, bit_noise=1.0, lr=1e-16)
BESIDE = (1.5**-2 - 2.0**-2) ** -0.5  # what bits leave of a noise multiplier of 1.5: 2.2678
SCALES = [  # settings, standard deviations over the clip of what is drawn in one release or step
    (DPSGD(clip=0.2, noise_multiplier=1.5, secure_mode=True, **NOBODY), 1.5, None),
    (DPSGD(clip=0.2, noise_multiplier=1.5, secure_mode=True, per_layer=True, **NOBODY), 1.5, None),
    (DPSGD(clip=0.2, noise_multiplier=1.5, secure_mode=True, crops=2, **NOBODY), 1.5, None),
    (DPSGD(clip=0.2, noise_multiplier=1.5, secure_mode=True, gradients="hooks", **NOBODY), 1.5, None),
    (DPSGD(clip=0.2, noise_multiplier=1.5, secure_mode=True, accountant="prv", max_epsilon=9.0, **NOBODY), 1.5, None),
    (DPSGD(clip=HALF, noise_multiplier=1.5, secure_mode=True, **NOBODY), BESIDE, 1.0),
    (CentralGaussian(clip=0.2, noise_multiplier=1.5, secure_mode=True), 1.5, None),
    (CentralGaussian(clip=0.2, noise_multiplier=1.5, secure_mode=True, per_layer=True), 1.5, None),
    (CentralGaussian(clip=HALF, noise_multiplier=1.5, secure_mode=True), BESIDE, 1.0),
    (LocalGaussian(clip=0.2, noise_multiplier=1.5, secure_mode=True), 1.5, None),
    (LocalGaussian(clip=0.2, noise_multiplier=1.5, secure_mode=True, per_layer=True, accountant="gdp"), 1.5, None),
]


@pytest.mark.chance
@pytest.mark.parametrize(("technique", "deviation", "of_bits"), SCALES, ids=repr)
def test_noise_has_the_stated_scale_beside_every_setting(technique, deviation, of_bits, monkeypatch):
    assert pytest.approx(2.2678, abs=1e-4) == BESIDE
    drawn = []

    def watched(count, *, scale, key):
        drawn.append((count, scale))
        return rounded_gaussian(count, scale=scale, key=key)

    monkeypatch.setattr(on_grid, "rounded_gaussian", watched)
    if isinstance(technique, DPSGD):
        noise = pure_noise(technique, steps=60, seed=seeded(0)).flatten()
    else:
        sent = technique.protect(update(w=torch.zeros(9_000), v=torch.zeros(5)), SiteState(), rng(seeded(0)))
        if isinstance(technique, CentralGaussian):
            sent = technique.release(UNIFORM.combine([sent]), Cohort(0, ("a",), 1, 1.0),
                                     ServerState(round=0, params={}), rng(seeded(0)))
        noise = torch.cat([t.flatten() for t in sent.delta.values()]).double() / 0.2
    bound = SIGMAS * (2 / noise.numel()) ** 0.5
    assert abs(float((noise / deviation).square().mean()) - 1) < bound
    assert abs(float((noise / deviation).pow(4).mean()) - 3) < SIGMAS * (96 / noise.numel()) ** 0.5
    if of_bits is not None:  # grid of the bits: 1/2 times 2**16, or 16 standard deviations, in 2**50 steps
        scales = {scale for count, scale in drawn if count == 1 and scale == of_bits * 2.0**34}
        assert scales


@pytest.mark.parametrize("secure", [False, True])
def test_noise_on_the_bits_of_a_clip_does_not_repeat_in_secure_mode(secure):
    rule = AdaptiveClip(start=1.0, bit_noise=3.0)
    clips = []
    for _ in range(2):
        state = ServerState(round=0, params={})
        CentralGaussian(clip=rule, noise_multiplier=1.0, secure_mode=secure).release(
            update(w=torch.zeros(2)), Cohort(0, (), 4, 1.0), state, rng(1))
        kept = SiteState()
        kit = equipped(DPSGD(clip=rule, noise_multiplier=1.0, secure_mode=secure, sample_rate=0.5, delta=1e-2),
                       blob_sites((2,))[0], steps=1, state=kept, seed=5)
        kit.optimiser.zero_grad(set_to_none=True)
        kit.backward(kit, torch.empty(0), torch.empty(0))
        kit.optimiser.step()
        kit.close()
        clips.append((float(state.broadcast["clipping norm"]), float(kept.own["clipping norm"])))
    assert all((one == two) is not secure for one, two in zip(*clips, strict=True))


@pytest.mark.chance
def test_noise_for_other_devices_is_drawn_here(monkeypatch):
    """A GPU's generator has a seed of 64 bits; a site's noise comes from its stream of 256 bits wherever it trains."""
    made = []
    real = dpsgd._Steps.__init__

    def elsewhere(self, technique, kit, state, *, expected):
        real(self, technique, replace(kit, device=torch.device("cuda")), state, expected=expected)
        made.append(self)

    monkeypatch.setattr(dpsgd._Steps, "__init__", elsewhere)
    at = dict(seed=seeded(3), steps=60)
    noise = [pure_noise(DPSGD(clip=0.2, noise_multiplier=1.5, **NOBODY), **at).flatten() for _ in range(2)]
    assert made[0].optimiser.noise_multiplier == 0 and torch.equal(*noise)
    assert abs(float((noise[0] / 1.5).square().mean()) - 1) < SIGMAS * (2 / noise[0].numel()) ** 0.5
    beside_bits = DPSGD(clip=AdaptiveClip(start=0.2, bit_noise=1.0, lr=1e-16), noise_multiplier=1.5, **NOBODY)
    more = pure_noise(beside_bits, **at).flatten() / 2.2678  # (1.5⁻² - 2⁻²)^(-1/2)
    assert abs(float(more.square().mean()) - 1) < SIGMAS * (2 / more.numel()) ** 0.5
    one = torch.zeros(4, requires_grad=True)
    add_normal([one], 2.0, noise_generator(7, "noise"))
    assert torch.equal(one.grad, (2 * standard_normal((4,), noise_generator(7, "noise"))).float())
    one.grad = torch.tensor([1.0, -3.0, 0.5, 8.0])
    add_normal([one], 2.0, noise_generator(7, "noise"))
    more = 2 * standard_normal((4,), noise_generator(7, "noise"))
    assert torch.equal(one.grad, torch.tensor([1.0, -3.0, 0.5, 8.0]) + more.float())


# Sparse vectors

SPARSE = [SparseVector(fraction=0.1, epsilon=1.0, clip=1e-4, threshold=0.0, secure_mode=True),
          SparseVector(fraction=1.0, epsilon=8.0, clip=0.3, rounds=5, accountant="prv", secure_mode=True),
          SVT(fraction=0.4, epsilon_threshold=1.0, epsilon_release=1.0, secure_mode=True),
          SVT(fraction=0.2, epsilon_threshold=50.0, epsilon_release=1e9, passes=3, exclude=["b"], secure_mode=True)]


@pytest.mark.parametrize("technique", SPARSE, ids=repr)
def test_in_secure_mode_low_bits_tell_no_two_updates_apart(technique, monkeypatch):
    """The attack: which of two updates, both known, can noise have taken to what was sent? On a grid both, always.

    With noise in floating point one of them was explained and the other was not, in every trial.
    """
    scales_drawn = []

    def watched(count, *, scale, key):
        scales_drawn.append(scale)
        return discrete_laplace_steps(count, scale=scale, key=key)

    monkeypatch.setattr(sparse_vector, "discrete_laplace_steps", watched)
    weights, clip = 2_000, technique.clip
    candidates = [clip * (2 * torch.rand(weights, generator=rng(seed)) - 1) for seed in (1, 2)]
    asked = technique.scales(weights if technique.exclude else weights + 3)
    step = grid_step(clip, asked)
    assert math.log2(step).is_integer() and clip / step >= 256
    for one in candidates:
        sent = technique.protect(update(a=one, b=torch.zeros(3)), SiteState(), rng()).delta["a"].double() / step
        assert torch.equal(sent, sent.round()) and float(sent.abs().max()) * step <= clip
    for drawn, scale in ((scales_drawn[0], asked.threshold), (scales_drawn[1], asked.query),
                         (scales_drawn[-1], asked.release)):
        assert scale <= drawn * step < scale + step  # whole steps, never less noise than is charged


@pytest.mark.chance
def test_exact_values_have_the_law_that_is_charged():
    """All 20,000 values of one release: of a weight w in [-γ, γ] a share of exp(-(γ - w) / b) / 2 reaches γ."""
    technique = SparseVector(fraction=1.0, epsilon=2_000.0, clip=1.0, threshold=0.0, selection=0.5, passes=10_000,
                             secure_mode=True)
    count, w = 20_000, 0.25
    sent = technique.protect(update(a=torch.full((count,), w)), SiteState(), rng()).delta["a"].double()
    b = technique.scales(count).release
    limit = math.floor(1.0 / grid_step(1.0, technique.scales(count))) * grid_step(1.0, technique.scales(count))
    for edge in (limit, -limit):
        p = math.exp(-abs(edge - w) / b) / 2
        assert stats.binomtest(int((sent == edge).sum()), count, p).pvalue > FALSE_ALARM
    assert stats.binomtest(int((sent > w).sum()), count, 0.5).pvalue > FALSE_ALARM


def test_values_are_rounded_towards_zero_and_noise_too_large_is_refused_before_a_run():
    values = torch.tensor([0.99999, -0.99999, 2.0, -2.0, 1e-9])
    step = grid_step(1.0, LaplaceScales(threshold=1.0, query=1.0, release=1.0))
    assert step == 2.0**-23
    _, noisy = sparse_vector.exact_release(values, clip=1.0, threshold=0.0, count=5, passes=1000, scales=LaplaceScales(
        threshold=1e-12, query=1.0, release=1e-12))  # rounded up to scales of one step
    assert len(noisy) == 5 and float(noisy.abs().max()) <= 1.0
    with pytest.raises(ValueError, match="cannot be drawn exactly"):
        SparseVector(fraction=1.0, epsilon=1e-9, secure_mode=True).protect(
            update(a=torch.zeros(100_000)), SiteState(), rng())


# Runs

@pytest.mark.parametrize("technique", [
    AtSites(sites=("site-1",), technique=DPSGD(clip=HALF, noise_multiplier=1.5, sample_rate=0.5, delta=1e-2, crops=2,
                                               secure_mode=True)),
    LocalGaussian(clip=1.0, noise_multiplier=4.0, per_layer=True, delta=1e-2, secure_mode=True) + TopK(keep=0.5),
    PersonalLayers(names=["first*"]) + CentralGaussian(clip=HALF, noise_multiplier=1.5, delta=1e-2, secure_mode=True),
    SparseVector(fraction=0.2, epsilon=2.0, delta=1e-2, exclude=["last*"], secure_mode=True),
    SVT(fraction=0.2, epsilon_threshold=1.0, epsilon_release=1.0, delta=1e-2, secure_mode=True)], ids=repr)
def test_runs_in_secure_mode_end_are_charged_and_never_repeat(technique):
    runs = [federate(trainer(), blob_sites((3, 3)), privacy=technique, rounds=2, seed=1, progress=False,
                     strategy=FedAvg(weights="uniform", sample=0.9)) for _ in range(2)]
    assert runs[0].spent()["epsilon"].tolist() == runs[1].spent()["epsilon"].tolist() != []
    assert not runs[0].spent()["repeats"].any() and "repeats" not in runs[0].guarantee()
    assert weights_sha256(runs[0].state.params) != weights_sha256(runs[1].state.params)


# Shares

def test_fewer_shares_than_the_threshold_recover_nothing():
    """From the memories of the sites: threshold - 1 of them miss both secrets of every site, threshold have them."""
    names, threshold = ("a", "b", "c", "d", "e"), 3
    notes = {name: {} for name in names}
    keys = {name: protocol.publish_keys(name, notes[name])["server"] for name in names}
    secret = {name: dict(notes[name]["own"]) for name in names}
    sent = {name: protocol.share_secrets(name, keys, notes[name], threshold=threshold, sites=5) for name in names}
    for name in names:
        inbox = {peer: sent[peer][name] for peer in names if peer != name}
        protocol.receive_shares(name, inbox, notes[name], threshold=threshold)
    parts = {"mask": slice(None, crypto.SHARE_BYTES), "self": slice(crypto.SHARE_BYTES, None)}
    for victim, (kind, part) in itertools.product(names, parts.items()):
        share = {k: notes[name]["shares"][victim][part] for k, name in enumerate(names)}
        for some in itertools.combinations(share, threshold):
            assert crypto.join_secret({k: share[k] for k in some}) == secret[victim][kind]
        for some in itertools.combinations(share, threshold - 1):
            try:
                assert crypto.join_secret({k: share[k] for k in some}) != secret[victim][kind]
            except (PrivacyError, OverflowError, ValueError):
                continue  # what the shares give is no secret at all


@pytest.mark.parametrize("secure", [False, True])
def test_a_parameter_that_is_a_single_number_is_clipped_with_the_rest(secure):
    technique = DPSGD(clip=0.1, noise_multiplier=1e-9, sample_rate=1.0, delta=1e-2, secure_mode=secure)
    (gradients,) = noisy_gradients(equipped(technique, blob_sites((1,))[0], steps=1, model=Scaled()))
    assert gradients[-1].shape == () or any(g.shape == () for g in gradients)
    assert math.sqrt(sum(float(g.double().square().sum()) for g in gradients)) == pytest.approx(0.1, rel=1e-4)


def test_exact_noise_on_a_sum_is_refused_beyond_the_sites_that_its_grid_holds():
    """2^14 updates: `GaussianGrid(terms=...)` promises no more."""
    central = CentralGaussian(clip=1.0, noise_multiplier=1.0, delta=1e-5, secure_mode=True)
    central.check(SimpleNamespace(strategy=UNIFORM, sites=range(2**14)))
    beyond = SimpleNamespace(strategy=UNIFORM, sites=range(2**14 + 1))
    with pytest.raises(ValueError, match="sums of at most 16384 sites, the run has 16385"):
        central.check(beyond)
    CentralGaussian(clip=1.0, noise_multiplier=1.0, delta=1e-5).check(beyond)
