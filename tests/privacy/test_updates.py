"""Site-level differential privacy: the clip bounds, the noise is what it says, the ledger adds up, traps refuse."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, norm

import irregular
from chance import FALSE_ALARM, SIGMAS, seeded
from cohorts import blob_sites
from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError
from fedlab.core.types import Cohort, ServerState, SiteState, Update
from fedlab.core.weights import weights_sha256
from fedlab.privacy.accounting.ledger import Gaussian, Ledger, Terms, epsilon_of
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import SharePercentile, TopK
from fedlab.privacy.dp.clipping import AdaptiveClip, clip_update
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.privacy.noise import on_grid
from fedlab.privacy.noise.continuous import standard_normal
from fedlab.privacy.personal_layers import PersonalLayers
from fedlab.run.federate import each_round, federate
from fedlab.strategies import CoordinateMedian, FedAvg, weighted_mean
from states import kept_as
from trainers import trainer

UNIFORM = FedAvg(weights="uniform")


def update(site: str = "a", **tensors: torch.Tensor) -> Update:
    return Update(site=site, delta=tensors or {"w": torch.zeros(3)}, weight=7.0, metrics={"loss": 0.5})


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def server() -> ServerState:
    return ServerState(round=0, params={})


def central(**changes):
    return CentralGaussian(**({"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3} | changes))


def local(**changes):
    return LocalGaussian(**({"clip": 1.0, "noise_multiplier": 4.0, "delta": 1e-3} | changes))


def assert_standard_normal(values: torch.Tensor, std: float) -> None:
    """Mean, second and fourth moment of independent normal values, each within `SIGMAS` standard errors."""
    z = values.double().flatten() / std
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - expected) < SIGMAS * math.sqrt(variance / z.numel()), power


# Clipping

@settings(max_examples=80, deadline=None)
@given(irregular.tensors(), st.floats(1e-6, 1e5), st.booleans())
def test_no_update_is_longer_than_the_clipping_norm(values, clip, per_layer):
    before = update(**{f"t{k}": torch.tensor(v) for k, v in enumerate(values)})
    after = clip_update(before, clip, per_layer=per_layer)
    assert after.norm() <= clip * (1 + 1e-12)
    bound = clip / math.sqrt(len(values)) if per_layer else clip
    for name, t in before.delta.items():
        length = float(t.double().norm()) if per_layer else before.norm()
        if length <= bound:
            assert after.delta[name].equal(t)
        else:
            torch.testing.assert_close(after.delta[name].double(), t.double() * bound / length, rtol=1e-5, atol=1e-12)


def test_half_precision_is_clipped_within_the_norm_too():
    after = clip_update(update(w=torch.randn(1000, generator=rng()).bfloat16()), 1.0)
    assert 1 - 1e-5 < after.norm() <= 1


def test_flat_and_per_layer_clipping_by_hand():
    long = update(a=torch.tensor([3.0, 0.0]), b=torch.tensor([0.0, 4.0]))
    flat = clip_update(long, 1.0)
    torch.testing.assert_close(flat.delta["a"], torch.tensor([0.6, 0.0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(flat.delta["b"], torch.tensor([0.0, 0.8]), rtol=1e-5, atol=0)
    layers = clip_update(long, math.sqrt(2) * 3.5, per_layer=True)  # 3.5 for each
    assert layers.delta["a"].tolist() == [3.0, 0.0]
    torch.testing.assert_close(layers.delta["b"], torch.tensor([0.0, 3.5]), rtol=1e-5, atol=0)


def test_an_update_just_as_long_as_the_norm_is_left_as_it_is():
    for per_layer, clip in ((False, 5.0), (True, 5 * math.sqrt(2))):
        after = clip_update(update(b=torch.tensor([[3.0, 4.0]]), a=torch.zeros(3)), clip, per_layer=per_layer)
        assert after.delta["b"].tolist() == [[3.0, 4.0]] and list(after.delta) == ["b", "a"]


def test_double_precision_stays_so_under_a_clip():
    third = update(w=torch.tensor([1 / 3, -2 / 3], dtype=torch.float64))
    assert clip_update(third, 1.0).delta["w"].tolist() == [1 / 3, -2 / 3]
    shorter = clip_update(third, 0.5).delta["w"]
    assert shorter.dtype == torch.float64 and 0.5 * (1 - 1e-5) < float(shorter.norm()) < 0.5


# Noise

@pytest.mark.chance
def test_noise_has_the_moments_of_a_normal_distribution():
    assert_standard_normal(standard_normal((400, 500), rng(seeded(0))), 1.0)


@pytest.mark.chance
def test_noise_of_the_operating_system_is_normal_and_independent():
    values = standard_normal((400, 501), None)
    assert values.shape == (400, 501) and values.dtype == torch.float64
    assert_standard_normal(values, 1.0)
    flat = values.flatten()
    assert kstest(flat.numpy(), "norm").pvalue > FALSE_ALARM
    for lag in (1, 2, 3, flat.numel() // 2):
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) < SIGMAS / math.sqrt(flat.numel() - lag)
    big = standard_normal((2**18 + 5,), None)  # more than a chunk
    assert big.unique().numel() == big.numel()
    assert standard_normal((), None).shape == () and standard_normal((0,), None).numel() == 0


@pytest.mark.chance
@pytest.mark.parametrize("secure", [False, True])
def test_noise_at_the_site_has_the_stated_deviation(secure):
    zeros = update(a=torch.zeros(200, 300), b=torch.zeros(70_000))
    technique, state = local(clip=0.5, noise_multiplier=3.0, secure_mode=secure), SiteState()
    noisy = technique.protect(zeros, state, rng(seeded(0)))
    for t in noisy.delta.values():
        assert t.dtype == torch.float32
        assert_standard_normal(t, 1.5)
    joint = noisy.delta["a"].flatten()[:60_000] @ noisy.delta["b"][:60_000] / 1.5**2
    assert abs(float(joint)) < SIGMAS * math.sqrt(60_000)
    again = technique.protect(zeros, SiteState(), rng(seeded(0)))
    assert again.delta["a"].equal(noisy.delta["a"]) is not secure
    told = state.diagnostics
    assert float(told["norm before clipping"]) == 0 and float(told["norm of the noise"]) == pytest.approx(
        1.5 * math.sqrt(130_000), rel=0.01)


@pytest.mark.chance
@pytest.mark.parametrize("secure", [False, True])
def test_noise_at_the_server_has_the_stated_deviation_over_the_expected_cohort(secure):
    zeros = Update(site="mean", delta={"w": torch.zeros(200_000, dtype=torch.float64)}, weight=1.0)
    technique = central(clip=0.5, noise_multiplier=2.0, secure_mode=secure)
    out = technique.release(zeros, Cohort(0, (), 10, 0.3), server(), rng(seeded(0)))
    assert_standard_normal(out.delta["w"], 2.0 * 0.5 / 3)
    ones = zeros.map(torch.ones_like)
    shifted = technique.release(ones, Cohort(0, ("a", "b"), 10, 0.3), server(), rng(seeded(0)))
    assert float(shifted.delta["w"].mean()) == pytest.approx(2 / 3, abs=SIGMAS / 3 / math.sqrt(200_000))


class Record(Privacy):
    """Keeps what leaves a site, and what the server moves by."""

    def __init__(self):
        self._seen, self._moves = {}, []

    def protect(self, update, state, rng):
        flat = torch.cat([t.flatten() for t in update.delta.values()])
        self._seen[update.site, len([s for s, _ in self._seen if s == update.site])] = flat
        return update

    def release(self, mean, cohort, state, rng):
        self._moves.append(torch.cat([t.flatten() for t in mean.delta.values()]))
        return mean


def assert_uncorrelated(vectors) -> None:
    for a, b in itertools.combinations(vectors, 2):
        a, b = a.double(), b.double()
        assert abs(float(a @ b / (a.norm() * b.norm()))) < SIGMAS / math.sqrt(a.numel())


@pytest.mark.chance
def test_noise_is_independent_between_sites_and_rounds():
    record = Record()  # a clip so small, and so much noise, that updates are nothing but noise
    federate(trainer(), blob_sites((1, 1)), privacy=local(clip=1e-3, noise_multiplier=1e4) + record, rounds=3,
             progress=False, seed=seeded(0))
    assert len(record._seen) == 6
    assert_uncorrelated(record._seen.values())
    for noise in record._seen.values():
        assert_standard_normal(noise, 10.0)
    record = Record()
    federate(trainer(), blob_sites((1, 1)), privacy=record + central(clip=1e-3, noise_multiplier=1e4), rounds=4,
             strategy=UNIFORM, progress=False, seed=seeded(0))
    assert_uncorrelated(record._moves)


# Sensitivity

@settings(max_examples=40, deadline=None)
@given(irregular.tensors(), irregular.tensors())
def test_two_updates_of_a_site_differ_by_at_most_twice_the_clip(one, other):
    names = [f"t{k}" for k in range(4)]
    one, other = ({n: torch.tensor(([*v, *[[0.0]] * 4])[k] + [0.0] * 5)[:5] for k, n in enumerate(names)}
                  for v in (one, other))
    technique = local(clip=0.7, noise_multiplier=1e-9)
    first, second = (technique.protect(update(**t), SiteState(), rng()) for t in (one, other))
    apart = replace(first, delta={n: first.delta[n].double() - second.delta[n].double() for n in names}).norm()
    assert apart <= 2 * 0.7 * (1 + 1e-6)  # rounding of the noise aside


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("clip", [0.7, AdaptiveClip(start=0.7, bit_noise=0.8)])
def test_one_site_moves_the_noised_sum_by_no_more_than_the_ledger_says(length, clip):
    """The same noise with and without a site: what differs, in units of the noise, is at most 1 / noise_multiplier."""
    technique, states, outs = central(clip=clip, noise_multiplier=1.5), [], []
    others = [update(f"s{k}", w=torch.randn(50, generator=rng(k))) for k in range(3)]
    odd = update("odd", w=length * torch.ones(50))
    for cohort in (others, [*others, odd]):
        state = server()
        sent = [technique.protect(u, SiteState(), rng()) for u in cohort]
        mean = UNIFORM.combine(sent)
        outs.append(technique.release(mean, Cohort(0, tuple(u.site for u in sent), 10, 0.4), state, rng(9)))
        states.append(state)
    apart = float((outs[0].delta["w"] - outs[1].delta["w"]).norm()) * 4
    cost = (apart / (technique.noise_on_updates * 0.7)) ** 2
    if isinstance(clip, AdaptiveClip):
        moved = [math.log(float(state.broadcast["clipping norm"])) for state in states]
        bits = (moved[0] - moved[1]) / clip.lr * 4
        assert abs(bits) == pytest.approx(0.5)
        cost += (bits / clip.bit_noise) ** 2
    assert cost <= 1.5**-2 * (1 + 1e-6)
    assert cost > 0.9 * 1.5**-2 or length < 1  # and the noise is not more than is needed


# What is spent

def test_ledgers_of_the_sites_equal_the_closed_form():
    """Against the exact δ of the Gaussian mechanism (Balle and Wang 2018, theorem 8), written out here."""
    history = federate(trainer(), blob_sites(), privacy=local(accountant="gdp"), rounds=4, progress=False)
    for done, epsilon in enumerate(history.spent().xs("site-1", level="site")["epsilon"], start=1):
        mu = math.sqrt(done) * 2 / 4.0  # a sensitivity of 2 clips under noise of 4 clips
        delta = norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu)
        assert delta == pytest.approx(1e-3, rel=1e-5)
    assert set(history.spent()["adjacency"]) == {"any two updates of a site"}
    assert "loss" not in history.sites()


def test_sampling_of_sites_saves_nothing_at_the_sites():
    history = federate(trainer(), blob_sites((1, 1)), privacy=local(), strategy=FedAvg(sample=0.5), rounds=5,
                       progress=False)
    for site in ("site-0", "site-1"):
        taken = history.spent().xs(site, level="site")["epsilon"]
        assert list(taken) == [epsilon_of([Gaussian(noise_multiplier=2.0)] * n, delta=1e-3)
                               for n in range(1, len(taken) + 1)]
    assert len(history.spent()) < 10


def test_the_ledger_of_the_server_equals_the_closed_form_with_sampling_and_empty_rounds():
    from opacus.accountants import RDPAccountant

    history = federate(trainer(), blob_sites((1, 1)), privacy=central(), rounds=8, progress=False,
                       strategy=FedAvg(weights="uniform", sample=0.3))
    assert any(not record["sites"] for record in history.records), "a round in which nobody was drawn"
    spent = history.spent().xs("server", level="site")["epsilon"]
    assert len(spent) == 8 and history.spent().index.get_level_values("site").unique().tolist() == ["server"]
    for done, epsilon in enumerate(spent, start=1):
        accountant = RDPAccountant()
        accountant.history = [(1.0, 0.3, done)]
        assert epsilon == epsilon_of([Gaussian(noise_multiplier=1.0, sample_rate=0.3, steps=done)], delta=1e-3)
        assert epsilon == pytest.approx(accountant.get_epsilon(delta=1e-3), rel=0.01)
    assert "add or remove one site's updates" in history.guarantee()


def test_a_budget_at_the_server_ends_the_run_in_time():
    limit = epsilon_of([Gaussian(noise_multiplier=1.0)] * 3, delta=1e-3)
    history = federate(trainer(), blob_sites(), privacy=central(max_epsilon=limit), strategy=UNIFORM, rounds=9,
                       progress=False)
    assert len(history.records) == 3 and history.spent()["epsilon"].max() == limit
    assert "the server stops moving the model" in history.stopped
    run = each_round(trainer(), blob_sites(), privacy=local(max_epsilon=5.0), rounds=99)
    with pytest.raises(PrivacyBudgetExhausted, match="no site is left"):
        list(run)


def test_the_server_without_its_ledger_refuses():
    run = each_round(trainer(), blob_sites(), privacy=central(), strategy=UNIFORM, rounds=3)
    state = next(run).state
    assert Ledger(state).releases("site") == [Gaussian(noise_multiplier=1.0)]
    with pytest.raises(PrivacyError, match="without the server's ledger"):
        next(each_round(trainer(), blob_sites(), privacy=central(), strategy=UNIFORM, rounds=3,
                        state=replace(state, ledger={})))


def test_noise_of_the_operating_system_is_charged_each_time_a_round_is_run():
    for secure, charges in ((False, 1), (True, 2)):
        one, ledger = trainer(), {}
        for _ in range(2):  # the second time as after a crash, of which the ledger alone survived
            finished = next(each_round(one, blob_sites((1,)), privacy=local(secure_mode=secure),
                                       site_states=kept_as({"site-0": SiteState(ledger=ledger)})))
            ledger = finished.site_states["site-0"].ledger
        assert len(Ledger(finished.site_states["site-0"]).releases()) == charges


def test_what_never_repeats_stays_in_the_ledger_beside_what_does():
    terms = {"terms": Terms(unit="site", delta=1e-3, adjacency="x")}
    step, state = Gaussian(noise_multiplier=1.0), SiteState()
    here = {"site": "a", "stream": "s"}
    Ledger.open(state, round=0, **here).charge(step, **terms)
    opened = Ledger.open(state, round=1, **here)
    opened.charge(step, **terms)
    opened.charge(step, repeatable=False, **terms)
    assert opened.charged("site")
    again = Ledger.open(state, round=1, **here)
    assert len(again.releases()) == 3 and not again.charged("site")


# Runs

@pytest.mark.parametrize("technique", [
    LocalGaussian(clip=1e3, noise_multiplier=1e-12), CentralGaussian(clip=1e3, noise_multiplier=1e-12),
    CentralGaussian(clip=AdaptiveClip(start=1e3, bit_noise=1e-12), noise_multiplier=1e-12, secure_mode=True),
    LocalGaussian(clip=1e3, noise_multiplier=1e-12, per_layer=True, secure_mode=True)], ids=repr)
def test_without_clip_and_noise_a_run_equals_a_plain_one(technique):
    plain = federate(trainer(), blob_sites(), strategy=UNIFORM, rounds=2, progress=False)
    private = federate(trainer(), blob_sites(), strategy=UNIFORM, privacy=technique, rounds=2, progress=False)
    for name, p in plain.state.params.items():
        torch.testing.assert_close(private.state.params[name], p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("technique", [
    local(), local(per_layer=True), central(), central(clip=AdaptiveClip(start=0.1, bit_noise=1.0))], ids=repr)
def test_a_resumed_run_equals_a_whole_one(technique, tmp_path):
    strategy = FedAvg(weights="uniform", sample=0.7)
    whole = federate(trainer(), blob_sites(), privacy=technique, strategy=strategy, rounds=4, progress=False)
    for rounds in (1, 3, 4):
        history = federate(trainer(), blob_sites(), privacy=technique, strategy=strategy, rounds=rounds,
                           progress=False, checkpoint=tmp_path / "run")
    assert weights_sha256(history.state.params) == weights_sha256(whole.state.params)
    assert history.spent().equals(whole.spent()) and not whole.spent().empty
    assert history.state.namespaces.keys() == whole.state.namespaces.keys()
    assert history.state.broadcast == whole.state.broadcast and history.state.ledger == whole.state.ledger


def test_the_server_learns_neither_losses_nor_numbers_of_patients():
    technique = central(clip=AdaptiveClip(start=0.1, bit_noise=1.0))
    table = federate(trainer(), blob_sites((3, 2)), privacy=technique, strategy=UNIFORM, rounds=1,
                     progress=False).sites()
    assert set(table["weight"]) == {1.0} and set(table.columns) == {"within_clip", "norm", "weight", "steps", "bytes"}
    assert (table["norm"] <= 0.1).all()


def test_the_noisy_mean_does_not_depend_on_the_order_of_the_updates():
    technique, outs = central(), []
    plain = [update(f"s{k}", w=torch.randn(40, generator=rng(k))) for k in range(6)]
    updates = [technique.protect(one, SiteState(), rng()) for one in plain]
    for order in (updates, updates[::-1], updates[3:] + updates[:3]):
        mean = UNIFORM.combine(iter(order))
        cohort = Cohort(0, tuple(u.site for u in order), 6, 1.0)
        outs.append(technique.release(mean, cohort, server(), rng(1)).delta["w"])
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=0, atol=1e-14)


# Adaptive clipping

def simulate(technique, norms, rounds, *, sample=1.0, seed=0):
    """Rounds of clip, bits, noise and broadcast on updates of given norms; the clipping norm after each."""
    state, clips, draws = server(), [], rng(seed)
    for number in range(rounds):
        site_state = SiteState(broadcast=dict(state.broadcast))
        chosen = [k for k in range(len(norms)) if float(torch.rand((), generator=draws)) < sample]
        sent = [technique.protect(update(f"s{k}", w=torch.tensor([float(norms[k]), 0.0])), site_state, draws)
                for k in chosen]
        mean = UNIFORM.combine(sent)
        technique.release(mean, Cohort(number, tuple(u.site for u in sent), len(norms), sample), state, draws)
        clips.append(float(state.broadcast["clipping norm"]))
    return clips


@pytest.mark.parametrize("quantile,start", [(0.5, 0.05), (0.8, 10.0)])
def test_the_clipping_norm_settles_at_the_quantile_of_the_norms(quantile, start):
    norms = torch.exp(torch.randn(100, generator=rng(4)))  # log-normal, as norms of updates are
    clip = AdaptiveClip(start=start, bit_noise=5.0, quantile=quantile)
    clips = simulate(central(clip=clip, noise_multiplier=1.0), norms, 90, sample=0.5)
    share = float((norms <= math.exp(sum(map(math.log, clips[-40:])) / 40)).double().mean())
    assert share == pytest.approx(quantile, abs=0.08)  # 4 standard errors (0.02): p = 6e-5


def test_the_clipping_norm_moves_by_hand():
    technique = central(clip=AdaptiveClip(start=1.0, bit_noise=1e-9, quantile=0.25, lr=0.4), noise_multiplier=1e-9)
    clips = simulate(technique, [0.5, 2.0, 3.0, 4.0], 2)
    assert clips[0] == pytest.approx(1.0)  # one of four is within, as wanted
    assert simulate(technique, [0.5, 0.6, 3.0, 4.0], 1)[0] == pytest.approx(math.exp(-0.4 * 0.25), rel=1e-6)
    state = server()
    technique.release(update(w=torch.zeros(2)), Cohort(0, (), 4, 0.5), state, rng())  # nobody drawn
    assert float(state.broadcast["clipping norm"]) == pytest.approx(math.exp(-0.4 * 0.25), rel=1e-6)


def test_bits_are_summed_to_the_half_and_noised_once(monkeypatch):
    rule = AdaptiveClip(start=1.0, bit_noise=3.0)
    assert rule.noised(-2.5, rng(3)) == -2.5 + 3 * float(standard_normal((), rng(3)))
    monkeypatch.setattr(on_grid, "rounded_gaussian", lambda count, *, scale, key: np.zeros(count, np.int64))
    for bits, exact in ((-2.5, -2.5), (0.1 * 15, 1.5), (0.0, 0.0), (-1.5 + 1e-9, -1.5), (32_767.5, 32_767.5)):
        assert rule.noised(bits, None) == exact


def test_the_clipping_norm_stays_where_float32_can_hold_it():
    rule = AdaptiveClip(start=1.0, bit_noise=3.0, quantile=0.3, lr=0.5)
    assert rule.moved(2.0, 0.7) == pytest.approx(2 * math.exp(-0.5 * 0.4), rel=1e-15)
    assert rule.moved(2.0, -1e9) == pytest.approx(1e30, rel=1e-12) and rule.moved(2.0, 1e9) == 1e-30
    assert rule.moved(1e30, -1.0) == pytest.approx(1e30, rel=1e-12) and rule.moved(1e-30, 1.0) == 1e-30


def test_bits_take_their_part_of_the_budget():
    for z, bit_noise in ((1.0, 2.0), (0.7, 0.4), (3.0, 10.0)):
        technique = central(clip=AdaptiveClip(start=1.0, bit_noise=bit_noise), noise_multiplier=z)
        together = Gaussian(noise_multiplier=z)
        apart = [Gaussian(noise_multiplier=technique.noise_on_updates), Gaussian(noise_multiplier=2 * bit_noise)]
        assert epsilon_of(apart, delta=1e-5, accountant="gdp") == pytest.approx(
            epsilon_of([together], delta=1e-5, accountant="gdp"), rel=1e-6)
    assert central(clip=AdaptiveClip(start=1.0, bit_noise=2.0)).noise_on_updates == pytest.approx(1.0328, abs=1e-4)


def test_sites_and_server_use_the_same_clipping_norm_in_a_run():
    technique, clip = central(clip=AdaptiveClip(start=0.05, bit_noise=1.0)), 0.05
    for finished in each_round(trainer(), blob_sites(), privacy=technique, strategy=UNIFORM, rounds=3):
        used = [float(state.diagnostics["norm after clipping"]) for state in finished.site_states.values()]
        assert used == pytest.approx([clip, clip], rel=1e-5)
        before, clip = clip, float(finished.state.broadcast["clipping norm"])
        assert clip != before


def test_bits_that_do_not_arrive_are_noticed():
    technique = central(clip=AdaptiveClip(start=1.0, bit_noise=1.0))
    mean = Update(site="mean", delta={"w": torch.zeros(2)}, weight=2.0)
    with pytest.raises(PrivacyError, match="weighted_mean"):
        technique.release(mean, Cohort(0, ("a", "b"), 2, 1.0), server(), rng())
    both = [replace(update("a"), metrics={"x": 1.0, "y": 2.0}, weight=1.0),
            replace(update("b"), metrics={"x": 4.0}, weight=3.0)]
    assert weighted_mean(both).metrics == {"x": pytest.approx(13 / 4)}


# Order and bad settings

def test_what_changes_updates_goes_before_the_clip_of_the_server():
    SharePercentile() + PersonalLayers(names=["first*"]) + central()
    for late in (TopK(), local(), central(), PersonalLayers(names=["first*"])):
        with pytest.raises(ValueError, match="before CentralGaussian"):
            central() + late
        with pytest.raises(ValueError, match="before CentralGaussian"):
            Privacy() + central() + Privacy() + late

    class Looks(Privacy):  # reads updates and changes none
        def equip(self, kit, site, state):
            return kit

    central() + Looks() + Privacy()


def test_a_sparse_code_does_not_survive_noise_and_error_feedback_may_stand_on_either_side():
    stack = TopK(keep=0.1, error_feedback=True) + local(noise_multiplier=0.1) + TopK(keep=0.5, error_feedback=True)
    first = TopK(keep=0.1).protect(update(w=torch.randn(100, generator=rng())), SiteState(), rng())
    assert first.nbytes < 400 and local().protect(first, SiteState(), rng()).nbytes == 400
    state = SiteState()
    out = stack.protect(update(w=torch.randn(100, generator=rng())), state, rng())
    assert int((out.delta["w"] != 0).sum()) == 50 and len([s for s in state.namespaces.values() if s]) == 2


@dataclass(frozen=True)
class Median(FedAvg):
    """A mean in name only."""

    uniform_mean = False

    def combine(self, updates):
        collected = list(updates)
        return replace(collected[0], site="mean")


@pytest.mark.parametrize("strategy", [Median(), FedAvg(), FedAvg(weights="steps"), CoordinateMedian()], ids=repr)
def test_noise_at_the_server_refuses_all_but_a_plain_mean(strategy):
    with pytest.raises(ValueError, match=r"FedAvg\(weights='uniform'\)"):
        federate(trainer(), blob_sites(), privacy=Privacy() + central(), strategy=strategy, progress=False)


@pytest.mark.parametrize("technique,strategy,match", [
    (local(delta=0.5), UNIFORM, "1/2"), (central(delta=0.6), UNIFORM, "1/2"),
    (local(max_epsilon=0.1), UNIFORM, "first round alone costs"),
    (central(max_epsilon=0.1), UNIFORM, "first round alone costs"),
    (central(accountant="gdp"), FedAvg(weights="uniform", sample=0.5), "gdp")], ids=repr)
def test_what_cannot_work_is_refused_before_the_first_round(technique, strategy, match):
    with pytest.raises(ValueError, match=match):
        each_round(trainer(), blob_sites(), privacy=technique, strategy=strategy)


@pytest.mark.parametrize("make", [local, central])
@pytest.mark.parametrize("setting", [
    {"clip": 0.0}, {"clip": -1.0}, {"clip": math.inf}, {"clip": math.nan}, {"clip": "1"}, {"noise_multiplier": 0.0},
    {"noise_multiplier": -1.0}, {"noise_multiplier": math.nan}, {"delta": 0.0}, {"delta": 1.0}, {"max_epsilon": 0.0},
    {"accountant": "moments"}], ids=repr)
def test_settings_out_of_range_are_refused(make, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} (is|lies)"):
        make(**setting)


@pytest.mark.parametrize("setting,match", [
    ({"start": 0.0}, "start"), ({"bit_noise": 0.0}, "bit_noise"), ({"quantile": 1.0}, "quantile"), ({"lr": 0}, "lr"),
    ({"bit_noise": 0.5}, "exceed half"), ({"bit_noise": math.nan}, "bit_noise is"),
    ({"bit_noise": math.inf}, "bit_noise is"), ({"quantile": 0.0}, "quantile")])
def test_adaptive_settings_out_of_range_are_refused(setting, match):
    with pytest.raises(ValueError, match=match):
        central(clip=AdaptiveClip(**({"start": 1.0, "bit_noise": 2.0} | setting)))
    with pytest.raises(ValueError, match="per_layer=False"):
        central(clip=AdaptiveClip(start=1.0, bit_noise=2.0), per_layer=True)


def test_techniques_print_as_the_code_that_makes_them():
    for technique in (local(secure_mode=True), central(clip=AdaptiveClip(start=1.0, bit_noise=2.0), max_epsilon=8.0)):
        assert repr(eval(repr(technique))) == repr(technique)
