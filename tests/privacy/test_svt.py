"""Partial sharing and the sparse vector: against a loop written from the paper, and against what they claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from chance import FALSE_ALARM, SIGMAS, seeded
from cohorts import blob_sites
from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError
from fedlab.core.types import SiteState, Update
from fedlab.privacy.accounting.ledger import Ledger, Pure, epsilon_of
from fedlab.privacy.compression import encode_sparse
from fedlab.privacy.noise.continuous import laplace, random_bits
from fedlab.privacy.sparse import partial_sharing as svt
from fedlab.privacy.sparse.partial_sharing import SVT, PartialSharing, SparseVector, composed_epsilon
from fedlab.privacy.sparse.sparse_vector import LaplaceScales, select, sparse_vector_cost
from fedlab.run.federate import federate
from trainers import trainer

PUBLISHED = dict(fraction=0.4, epsilon_threshold=1.0, epsilon_release=1.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def update(**tensors):
    return Update(site="here", delta=tensors, weight=3.0)


def random_update(seed=0, scale=1e-4):
    rng = generator(seed)
    return update(a=scale * torch.randn(5, 4, generator=rng), b=scale * torch.randn(11, generator=rng),
                  c=scale * torch.randn(2, 3, 2, generator=rng))


# The same draws as a loop written from the paper


def naive(weights, *, gamma, tau, count, passes, draws):
    """Li et al. 2019, one weight at a time; `draws` holds the noise in the order in which it was drawn."""
    threshold = tau + draws.next_one()
    shared, left = {}, list(range(len(weights)))
    for _ in range(passes):
        noise = draws.next_many(len(left))
        accepted = [i for i, nu in zip(left, noise, strict=True)
                    if abs(max(-gamma, min(gamma, weights[i]))) + nu >= threshold]
        if len(accepted) > count - len(shared):
            keys = draws.next_many(len(accepted))
            accepted = [i for _, i in sorted(zip(keys, accepted, strict=True))][:count - len(shared)]
        shared |= dict.fromkeys(sorted(accepted))
        if len(shared) == count:
            break
        left = [i for i in left if i not in shared]
    out = [0.0] * len(weights)
    for i, noise in zip(shared, draws.next_many(len(shared)), strict=True):
        noisy = max(-gamma, min(gamma, weights[i])) + noise
        out[i] = max(-gamma, min(gamma, noisy))
    return out


class Draws:
    """What a technique drew, scaled as it scales it, to be drawn again."""

    def __init__(self, monkeypatch, scales):
        self.scales, self.noise, self.at = scales, [], 0
        monkeypatch.setattr(svt, "laplace", lambda size, rng: self._keep(laplace(size, rng)))
        monkeypatch.setattr(svt, "random_bits", lambda size, rng: self._keep(random_bits(size, rng), key=True))

    def _keep(self, drawn, key=False):
        self.noise.append((drawn.clone().double(), key))
        return drawn

    def next_one(self):
        return float(self.next_many(1)[0])

    def next_many(self, size):
        drawn, key = self.noise[self.at]
        scale = 1.0 if key else self.scales.threshold if self.at == 0 else (
            self.scales.release if self.at == len(self.noise) - 1 else self.scales.query)
        self.at += 1
        assert drawn.numel() == size
        return (scale * drawn).tolist()


@pytest.mark.parametrize("technique", [
    SVT(**PUBLISHED),
    SVT(**PUBLISHED, passes=1),
    SVT(**PUBLISHED | dict(fraction=0.9), threshold=1e-4),
    SVT(**PUBLISHED | dict(fraction=1.0), epsilon_query=0.5, threshold=9e-5, passes=7),
    SVT(fraction=0.3, epsilon_threshold=5.0, epsilon_query=8.0, epsilon_release=20.0, threshold=5e-5),
    SparseVector(fraction=0.4, epsilon=8.0),
    SparseVector(fraction=0.9, epsilon=500.0, selection=0.9, threshold=5e-5),
], ids=str)
def test_it_equals_a_loop_written_from_the_paper(technique, monkeypatch):
    several = 0
    for seed in range(12):
        sent = random_update(seed)
        flat = torch.cat([t.flatten() for t in sent.delta.values()])
        count = math.ceil(technique.fraction * flat.numel())
        draws = Draws(monkeypatch, technique.scales(flat.numel()))
        found = technique.protect(sent, SiteState(), generator(seed))
        several += len(draws.noise) > 3
        again = naive(flat.double().tolist(), gamma=technique.clip, tau=technique.threshold, count=count,
                      passes=technique.passes, draws=draws)
        assert draws.at == len(draws.noise)
        together = torch.cat([t.flatten() for t in found.delta.values()])
        torch.testing.assert_close(together, torch.tensor(again), rtol=1e-5, atol=1e-10)
        assert [t.shape for t in found.delta.values()] == [t.shape for t in sent.delta.values()]
    assert several or technique.passes == 1  # passes with too many, or more than one pass, were met


def test_without_noise_to_speak_of_it_shares_what_is_above_the_threshold():
    sent = random_update()
    quiet = SVT(fraction=1.0, epsilon_threshold=1e9, epsilon_query=1e9, epsilon_release=1e9, threshold=5e-5, passes=3)
    found = quiet.protect(sent, SiteState(), generator())
    for name, t in sent.delta.items():
        clipped = t.clamp(-1e-4, 1e-4)
        torch.testing.assert_close(found.delta[name], clipped.where(t.abs() >= 5e-5, 0.0), rtol=1e-5, atol=1e-10)


def test_one_seed_repeats_and_the_operating_system_does_not():
    sent = random_update()
    for technique in (SVT(**PUBLISHED), SparseVector(fraction=0.5, epsilon=1.0)):
        one, two = (technique.protect(sent, SiteState(), generator(3)) for _ in range(2))
        assert all(torch.equal(one.delta[n], two.delta[n]) for n in sent.delta)
    secure = SparseVector(fraction=1.0, epsilon=1.0, secure_mode=True, clip=1e3)
    one, two = (secure.protect(sent, SiteState(), generator(3)) for _ in range(2))
    assert not torch.equal(one.delta["a"], two.delta["a"])
    state = SiteState()
    ledger = Ledger.open(state, site="here", round=0, stream="s")
    secure.protect(sent, state, generator())
    ledger = Ledger.open(state, site="here", round=0, stream="s")  # run again: what was released stays
    assert len(ledger.releases()) == 2


# Noise


@pytest.mark.chance
@pytest.mark.parametrize("source", [generator(seeded(1)), None], ids=["seeded", "entropy"])
def test_noise_is_laplace(source):
    n = 400_000
    noise = laplace(n, source).double().numpy()
    assert np.isfinite(noise).all()
    for power, expected in ((1, 1.0), (2, 2.0), (4, 24.0)):  # E|X|^k = k!
        error = math.sqrt((math.factorial(2 * power) - expected**2) / n)
        assert abs(np.mean(np.abs(noise) ** power) - expected) < SIGMAS * error
    assert abs(noise.mean()) < SIGMAS * math.sqrt(2 / n)
    assert stats.kstest(noise, "laplace").pvalue > FALSE_ALARM
    assert 10 < np.abs(noise).max() < 21.6


@pytest.mark.chance
def test_noise_of_two_calls_is_independent():
    rng = generator(seeded(2))
    one, two = laplace(300_000, rng), laplace(300_000, rng)
    signs = float((one.sign() * two.sign()).mean())
    sizes = np.corrcoef(one.abs().numpy(), two.abs().numpy())[0, 1]
    neighbours = np.corrcoef(one[:-1].numpy(), one[1:].numpy())[0, 1]
    assert max(abs(signs), abs(sizes), abs(neighbours)) < SIGMAS / math.sqrt(300_000)


@pytest.mark.chance
def test_of_a_pass_with_too_many_a_random_part_is_kept():
    rng, times = generator(seeded(4)), 4000
    picked = torch.zeros(20)
    for _ in range(times):
        kept = select(torch.ones(20), threshold=0.5, count=5, passes=1, noise=torch.zeros,
                      order=lambda found: random_bits(found, rng))
        assert kept.unique().numel() == 5
        picked[kept] += 1
    # Without replacement counts vary a little less than a multinomial's, so the test is on the safe side.
    assert stats.chisquare(picked.numpy()).pvalue > FALSE_ALARM


def test_equal_keys_still_give_the_exact_number():
    kept = select(torch.ones(9), threshold=0.5, count=4, passes=1, noise=torch.zeros,
                  order=lambda found: torch.tensor([5, 1, 5, 5, 0, 5, 5, 5, 5], dtype=torch.int32))
    assert sorted(kept.tolist()) == [0, 1, 2, 4]


# The guarantee, seen from outside


def bounds(successes, trials, error):
    """Clopper and Pearson's interval for a probability."""
    low = stats.beta.ppf(error, successes, trials - successes + 1) if successes else 0.0
    high = stats.beta.ppf(1 - error, successes + 1, trials - successes) if successes < trials else 1.0
    return low, high


def exposed(seen, seen_next_to_it, trials, *, epsilon, delta=0.0, error=FALSE_ALARM):
    """Events that are likelier for one input than (ε, δ)-privacy allows given the other, beyond doubt."""
    events = set(seen) | set(seen_next_to_it)
    return [event for event in events for one, two in ((seen, seen_next_to_it), (seen_next_to_it, seen))
            if bounds(one.get(event, 0), trials, error)[0]
            > math.exp(epsilon) * bounds(two.get(event, 0), trials, error)[1] + delta]


def choices(magnitude, *, scales, threshold, count, trials, noisy_threshold, passes=1):
    rng, seen = generator(seeded(5)), {}
    for _ in range(trials):
        noise = scales.threshold * float(laplace(1, rng)) if noisy_threshold else 0.0
        kept = select(magnitude, threshold=threshold + noise, count=count, passes=passes,
                      noise=lambda n: scales.query * laplace(n, rng), order=lambda n: random_bits(n, rng))
        event = f"{len(kept)} found"
        seen[event] = seen.get(event, 0) + 1
    return seen


@pytest.mark.chance
@pytest.mark.parametrize("noisy_threshold", [True, False])
def test_the_choice_keeps_its_promise_and_without_threshold_noise_is_caught(noisy_threshold):
    trials, weights = 12_000, 40
    scales = LaplaceScales(threshold=1 / 0.2, query=2 / 1.8, release=1.0)
    cost = sparse_vector_cost(clip=1.0, scales=scales, released=1, delta=1e-5)
    assert cost.selection == pytest.approx(2.0)
    settings = dict(scales=scales, threshold=2.31, count=1, trials=trials, noisy_threshold=noisy_threshold)
    nothing, everything = (choices(magnitude, **settings) for magnitude in (torch.zeros(weights), torch.ones(weights)))
    error = FALSE_ALARM if noisy_threshold else 1e-5
    assert bool(exposed(nothing, everything, trials, epsilon=cost.selection, error=error)) is not noisy_threshold


@pytest.mark.chance
@pytest.mark.parametrize("cheat", [False, True])
def test_the_whole_keeps_its_promise_and_too_little_noise_is_caught(cheat, monkeypatch):
    technique, trials = SparseVector(fraction=0.3, epsilon=1.5, selection=0.3, clip=1.0, delta=1e-3), 600
    if cheat:
        monkeypatch.setattr(svt, "laplace", lambda size, rng: laplace(size, rng) / 3)

    def events(sign):
        rng, seen = generator(seeded(6)), {}
        for _ in range(trials):
            (sent,) = technique.protect(update(w=sign * torch.ones(3)), SiteState(), rng).delta.values()
            for event in (("value", float(sent.sum())), ("place", tuple(sent.nonzero()[:, 0].tolist()))):
                if event[0] == "place" or abs(event[1]) == 1.0:
                    seen[event] = seen.get(event, 0) + 1
        return seen

    assert technique.cost(3).released == 1
    found = exposed(events(1.0), events(-1.0), trials, epsilon=technique.cost(3).epsilon(), delta=technique.delta,
                    error=1e-5 if cheat else FALSE_ALARM)
    assert bool(found) is cheat


# What it costs


def test_published_noise_composes_to_millions():
    count, n = 480_000, 1_200_000
    cost = SVT(**PUBLISHED).cost(n)
    query = (2 * 0.4 * 1e-4) ** (2 / 3)
    assert cost.stated == pytest.approx(2.0 + query)
    assert cost.released == count
    assert cost.selection == pytest.approx(1.0 + n * query)
    assert cost.per_value == pytest.approx(2 / 0.4)
    assert count * cost.per_value == pytest.approx(2 * n)
    assert 2e6 < cost.epsilon() <= cost.selection + count * cost.per_value
    assert cost.epsilon() == epsilon_of([Pure(epsilon=cost.selection), Pure(epsilon=cost.per_value, times=count)],
                                        delta=1e-5)
    assert cost.epsilon(rounds=3) == pytest.approx(3 * cost.epsilon())


@pytest.mark.parametrize("epsilon", [0.5, 8.0, 100.0])
@pytest.mark.parametrize("fraction", [1e-6, 0.01, 0.4])
def test_the_corrected_one_costs_what_it_says(epsilon, fraction):
    technique = SparseVector(fraction=fraction, epsilon=epsilon)
    cost = technique.cost(100_000)
    assert 0.99 * epsilon < cost.epsilon() <= epsilon
    assert cost.selection == pytest.approx(0.1 * epsilon)
    assert cost.released * cost.per_value >= 0.899 * epsilon  # never more noise than a plain sum asks for
    assert cost.epsilon(rounds=10) < 10 * epsilon or cost.released == 1
    run = SparseVector(fraction=fraction, epsilon=epsilon, rounds=10).cost(100_000)
    assert 0.99 * epsilon < run.epsilon(rounds=10) <= epsilon < run.epsilon(rounds=11)
    assert run.per_value >= 0.999 * cost.per_value / 10  # no more noise than ten rounds of a tenth
    assert run.per_value > 0.2 * cost.per_value or cost.released == 1


def test_the_table_shows_what_is_stated_beside_what_is_proven():
    table = composed_epsilon({"published": SVT(**PUBLISHED), "corrected": SparseVector(fraction=0.1, epsilon=1.0)},
                             parameters=1_200_000, rounds=(1, 50))
    assert table.loc["published", "ε stated, no guarantee"] < 3 and table.loc["published", "ε, 1 round"] > 2e6
    assert table.loc["corrected", "ε, 1 round"] <= 1 < table.loc["corrected", "ε, 50 rounds"] < 50
    assert set(table["δ"]) == {1e-5}


def test_a_run_shows_the_composed_epsilon():
    for technique in (SVT(**PUBLISHED, delta=1e-2), SparseVector(fraction=0.1, epsilon=2.0, delta=1e-2)):
        history = federate(trainer(), blob_sites(), privacy=technique, rounds=3, progress=False)
        cost = technique.cost(sum(p.numel() for p in trainer().initial().values()))
        spent = history.spent().xs("site-0", level="site")
        assert list(spent["epsilon"]) == [cost.epsilon(rounds=n) for n in (1, 2, 3)]
        assert "per site" in history.guarantee() and "any two updates" in history.guarantee()


def test_a_site_withdraws_before_its_budget_is_spent_and_enters_nothing():
    technique = SparseVector(fraction=0.1, epsilon=2.0, max_epsilon=3.0)
    once = technique.cost(43).epsilon(rounds=1)
    state = SiteState()
    technique.protect(random_update(), state, generator())
    with pytest.raises(PrivacyBudgetExhausted, match="budget is ε = 3"):
        technique.protect(random_update(), state, generator())
    assert len(Ledger(state).releases()) == 2 and Ledger(state).spent()[0].epsilon == once


# Partial sharing


def test_partial_sharing_shares_the_largest_and_leaves_layers_out():
    sent = random_update()
    found = PartialSharing(fraction=0.25, exclude=["b"]).protect(sent, SiteState(), generator())
    assert not found.delta["b"].any()
    rest = torch.cat([sent.delta[n].flatten() for n in "ac"])
    shared = torch.cat([found.delta[n].flatten() for n in "ac"])
    assert int((shared != 0).sum()) == 8 == math.ceil(0.25 * 32)
    assert rest[shared != 0].abs().min() >= rest[shared == 0].abs().max()
    assert torch.equal(shared[shared != 0], rest[shared != 0])
    cut = PartialSharing(fraction=1.0, clip=5e-5).protect(sent, SiteState(), generator())
    assert all(torch.equal(cut.delta[n], t.clamp(-5e-5, 5e-5)) for n, t in sent.delta.items())
    assert PartialSharing(fraction=0.5).units == frozenset()


def test_left_out_layers_are_neither_sent_nor_paid_for():
    technique = SparseVector(fraction=1.0, epsilon=1.0, exclude=["*b"])
    state = SiteState()
    found = technique.protect(random_update(), state, generator())
    assert not found.delta["b"].any() and found.delta["a"].all()
    assert Ledger(state).releases() == list(technique.cost(32).releases())


@pytest.mark.parametrize("technique", [
    PartialSharing(fraction=0.02), PartialSharing(fraction=0.3), PartialSharing(fraction=1.0), SVT(**PUBLISHED),
    SparseVector(fraction=0.05, epsilon=8.0, exclude=["b"])], ids=str)
def test_bytes_are_those_of_the_sparse_code_and_settings_print_as_code(technique):
    sent = random_update()
    found = technique.protect(sent, SiteState(), generator())
    assert found.encoded == len(encode_sparse(found.delta)) and found.weight == sent.weight
    assert repr(eval(repr(technique))) == repr(technique)


# Refusals


@pytest.mark.parametrize(("change", "said"), [
    (dict(fraction=0.0), "fraction"), (dict(fraction=1.1), "fraction"), (dict(fraction=-0.1), "fraction"),
    (dict(fraction=math.nan), "fraction"), (dict(clip=0.0), "clip"), (dict(clip=-1.0), "clip"),
    (dict(clip=math.inf), "clip"), (dict(threshold=-1e-6), "threshold"), (dict(threshold=math.nan), "threshold"),
    (dict(delta=0.0), "delta"), (dict(delta=1.0), "delta"), (dict(passes=0), "passes"), (dict(passes=1.5), "passes"),
    (dict(max_epsilon=0.0), "max_epsilon"), (dict(accountant="moments"), "accountant"), (dict(exclude="a"), "exclude"),
])
def test_settings_out_of_range_are_refused(change, said):
    for made, least in ((SVT, PUBLISHED), (SparseVector, dict(fraction=0.1, epsilon=1.0))):
        with pytest.raises(ValueError, match=said):
            made(**least | change)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_an_epsilon_that_is_no_positive_number_is_refused(bad):
    for name in ("epsilon_threshold", "epsilon_query", "epsilon_release"):
        with pytest.raises(ValueError, match=name):
            SVT(**PUBLISHED | {name: bad})
    with pytest.raises(ValueError, match="epsilon"):
        SparseVector(fraction=0.1, epsilon=bad)
    with pytest.raises(ValueError, match="clip"):
        PartialSharing(fraction=0.1, clip=bad)


@pytest.mark.parametrize("fraction", [0.0, 1.5, math.nan])
def test_sharing_nothing_or_more_than_all_is_refused(fraction):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        PartialSharing(fraction=fraction)
    with pytest.raises(ValueError, match="rounds"):
        SparseVector(fraction=0.1, epsilon=1.0, rounds=0)
    for selection in (0.0, 1.0):
        with pytest.raises(ValueError, match="selection"):
            SparseVector(fraction=0.1, epsilon=1.0, selection=selection)


@pytest.mark.parametrize(("technique", "said"), [
    (SVT(**PUBLISHED, delta=0.5), "below 1 over the number of sites"),
    (SparseVector(fraction=0.1, epsilon=1.0, exclude=["middle"]), "no tensor of the model is called 'middle'"),
    (PartialSharing(fraction=0.1, exclude=["*"]), "leaves nothing"),
    (SparseVector(fraction=0.1, epsilon=2.0, delta=1e-2, max_epsilon=1.0), "first round alone"),
], ids=str)
def test_a_run_that_cannot_work_is_refused_before_it_begins(technique, said):
    with pytest.raises(ValueError, match=said):
        federate(trainer(), blob_sites(), privacy=technique, rounds=1, progress=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_refused(bad):
    damaged = update(a=torch.zeros(7), b=torch.tensor([0.0, bad, 1.0]))
    for technique in (PartialSharing(fraction=0.5), SVT(**PUBLISHED), SparseVector(fraction=0.5, epsilon=1.0)):
        state = SiteState()
        with pytest.raises(PrivacyError, match="NaN or infinite"):
            technique.protect(damaged, state, generator())
        assert not state.ledger and not state.namespaces and not state.diagnostics
