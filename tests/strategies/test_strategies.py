"""What strategies do at the server equals their papers' formulas, written out, and FedAvg where theory says so."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings

import irregular
from cohorts import blob_sites
from fedlab.core.types import Site, Update
from fedlab.privacy.dp.site_level import CentralGaussian
from fedlab.privacy.secure_aggregation.secure_sum import SecureAggregation
from fedlab.run.federate import each_round
from fedlab.strategies import (
    SCAFFOLD,
    CoordinateMedian,
    Ditto,
    FedAvg,
    FedNova,
    FedOpt,
    FedProx,
    GeometricMedian,
    Krum,
    NormBound,
    TooFewUpdates,
    TrimmedMean,
)
from trainers import plain_sgd, trainer

ROBUST = [CoordinateMedian(), TrimmedMean(trim=0.25), Krum(attackers=1), Krum(attackers=2, chosen=3),
          GeometricMedian(), GeometricMedian(weights="uniform"), NormBound(bound=2.0)]


def update(site: str, values: list[float], weight: float = 1.0, steps: int = 1) -> Update:
    """Two tensors, so that a strategy that mixes them up is found out."""
    return Update(site=site, delta={"a": torch.tensor(values[:1]), "b": torch.tensor(values[1:])}, weight=weight,
                  steps=steps)


def made(rows, weights=None, steps=None) -> list[Update]:
    weights, steps = weights or [1.0] * len(rows), steps or [1] * len(rows)
    return [update(f"s{k:02}", list(map(float, row)), w, t) for k, (row, w, t) in enumerate(zip(rows, weights, steps,
                                                                                                 strict=True))]


def flat(mean: Update) -> list[float]:
    assert all(t.dtype == torch.float64 for t in mean.delta.values())
    return [*mean.delta["a"].tolist(), *mean.delta["b"].flatten().tolist()]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def distance(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


# Naive references


def median(values):
    ordered, n = sorted(values), len(values)
    return ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2


def naive_krum(rows, f, m):
    scores = []
    for i, row in enumerate(rows):
        others = sorted(distance(row, other) ** 2 for j, other in enumerate(rows) if j != i)
        scores.append((sum(others[:len(rows) - f - 2]), i))
    best = [rows[i] for _, i in sorted(scores)[:m]]
    return [sum(column) / m for column in zip(*best, strict=True)]


@settings(max_examples=40, deadline=None)
@given(irregular.rows(least=5, most=9, width=3, reach=100))
def test_median_and_trimmed_mean_are_the_naive_ones(rows):
    updates = made(rows)
    columns = list(zip(*rows, strict=True))
    assert flat(CoordinateMedian().combine(iter(updates))) == pytest.approx([median(c) for c in columns], abs=1e-9)
    cut = math.ceil(len(rows) / 4)
    trimmed = [sum(sorted(c)[cut:len(rows) - cut]) / (len(rows) - 2 * cut) for c in columns]
    assert flat(TrimmedMean(trim=0.25).combine(iter(updates))) == pytest.approx(trimmed, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("f,m", [(0, 1), (1, 1), (1, 3), (2, 1), (2, 5)])
def test_krum_is_the_naive_one(f, m):
    rows = torch.randn(7, 3, generator=torch.Generator().manual_seed(10 * f + m)).tolist()
    mean = Krum(attackers=f, chosen=m).combine(iter(made(rows)))
    assert flat(mean) == pytest.approx(naive_krum(rows, f, m), rel=1e-6, abs=1e-9)
    assert mean.weight == m


def test_krum_by_hand():
    # Four close together on a line, one far away. With f=1 the sum goes over the 5 - 1 - 2 = 2 nearest neighbours.
    updates = made([[0, 0, 0], [1, 0, 0], [3, 0, 0], [4.5, 0, 0], [100, 0, 0]])
    strategy = Krum(attackers=1)
    assert strategy.scores(updates) == pytest.approx([1 + 9, 1 + 4, 2.25 + 4, 2.25 + 12.25, 95.5**2 + 97**2])
    assert flat(strategy.combine(updates)) == [1, 0, 0]


def test_the_geometric_median_minimises_the_weighted_distances():
    rng = torch.Generator().manual_seed(0)
    for n in (3, 6, 9):
        rows = torch.randn(n, 3, generator=rng, dtype=torch.float32).tolist()
        weights = torch.rand(n, generator=rng).add(0.5).tolist()
        found = flat(GeometricMedian().combine(made(rows, weights)))

        def cost(point, rows=rows, weights=weights):
            return sum(w * distance(point, row) for w, row in zip(weights, rows, strict=True))

        best = cost(found)
        for axis, sign, size in itertools.product(range(3), (1, -1), (1e-2, 1e-3)):
            near = [x + sign * size * (k == axis) for k, x in enumerate(found)]
            assert cost(near) > best - 1e-9
        assert best < cost([sum(c) / n for c in zip(*rows, strict=True)])


def test_the_geometric_median_by_hand():
    # On a line it is the weighted median; of an equilateral triangle the centre.
    line = made([[0, 0, 0], [1, 0, 0], [10, 0, 0]])
    assert flat(GeometricMedian().combine(line)) == pytest.approx([1, 0, 0], abs=1e-5)
    heavy = made([[0, 0, 0], [1, 0, 0], [10, 0, 0]], weights=[1, 1, 5])
    assert flat(GeometricMedian().combine(heavy)) == pytest.approx([10, 0, 0], abs=1e-5)
    assert flat(GeometricMedian(weights="uniform").combine(heavy)) == pytest.approx([1, 0, 0], abs=1e-5)
    triangle = made([[0, 0, 0], [1, 0, 0], [0.5, math.sqrt(3) / 2, 0]])
    assert flat(GeometricMedian().combine(triangle)) == pytest.approx([0.5, math.sqrt(3) / 6, 0], abs=1e-6)


def test_norm_bound_by_hand():
    mean = NormBound(bound=2.0).combine(made([[3, 0, 4], [0, 1, 0]], weights=[1, 3]))
    assert flat(mean) == pytest.approx([1.2 / 4, 3 / 4, 1.6 / 4], rel=1e-12) and mean.weight == 4


def test_no_more_is_trimmed_than_the_share_and_one_update_is_left():
    rows = [[k * k, -k, (7 * k) % 30] for k in range(30)]
    middle = [sorted(column)[3:27] for column in zip(*rows, strict=True)]  # 0.1 * 30 is above 3 in binary
    assert flat(TrimmedMean(trim=0.1).combine(made(rows))) == pytest.approx([sum(c) / 24 for c in middle])
    assert flat(TrimmedMean(trim=0.49).combine(made([[1, 5, 0], [2, -3, 8]]))) == [1.5, 1, 4]
    assert flat(TrimmedMean(trim=0.49).combine(made([[1, 5, 0], [9, -3, 8], [2, 4, 1]]))) == [2, 4, 1]


def test_what_robust_means_say_of_weight_and_steps():
    updates = made([[0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 2, 1], [90, 0, 0]], weights=[1, 2, 4, 8, 16],
                   steps=[1, 3, 5, 7, 9])
    for one in updates:
        one.metrics["loss"] = 1.0
    for strategy in (CoordinateMedian(), TrimmedMean(trim=0.2)):
        mean = strategy.combine(updates)
        assert (mean.site, mean.weight, mean.steps, dict(mean.metrics)) == ("mean", 5, 25, {})
    for strategy, weight in ((GeometricMedian(), 31), (GeometricMedian(weights="uniform"), 5),
                             (GeometricMedian(weights="steps"), 25)):
        mean = strategy.combine(updates)
        assert (mean.weight, mean.steps, dict(mean.metrics)) == (weight, 25, {})
    best = Krum(attackers=1, chosen=2).combine(updates)  # 1 + 1, and the first of three with 1 + 2
    assert (best.weight, best.steps, dict(best.metrics)) == (2, 6, {}) and flat(best) == [0, 0.5, 1]
    kept = NormBound(bound=100.0, weights="steps").combine(updates)
    assert (kept.weight, kept.steps, kept.metrics) == (25, 25, {"loss": 1.0})


def test_an_update_just_as_long_as_the_bound_is_kept():
    assert flat(NormBound(bound=5.0).combine(made([[3, 0, 4]]))) == [3, 0, 4]
    third = NormBound(bound=1.0).combine(made([[0, 3, 0]]))
    assert flat(third) == [0, 1, 0]


def test_the_geometric_median_stops_where_it_is_told():
    """One step of Weiszfeld from the median of 0, 1 and 10 on a line, with distances of at least a half."""
    line = made([[0, 0, 0], [1, 0, 0], [10, 0, 0]], weights=[2, 1, 3])
    pull = [2 / 1, 1 / 0.5, 3 / 9]
    found = flat(GeometricMedian(iterations=1, nu=0.5).combine(line))
    assert found == pytest.approx([(pull[1] * 1 + pull[2] * 10) / sum(pull), 0, 0], rel=1e-12)
    twice = [2 / found[0], 1 / 0.5, 3 / (10 - found[0])]
    assert flat(GeometricMedian(iterations=2, nu=0.5).combine(line)) == pytest.approx(
        [(twice[1] + twice[2] * 10) / sum(twice), 0, 0], rel=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_is_the_paper_s_sum(momentum):
    rows, weights, steps = [[1, 2, 3], [4, -5, 6], [-7, 8, 9]], [3.0, 1.0, 2.0], [2, 5, 11]
    mean = FedNova(momentum=momentum).combine(iter(made(rows, weights, steps)))
    # The j-th of tau gradients enters the last weights 1 + rho + ... + rho^(tau - j) times.
    lengths = [sum(sum(momentum**k for k in range(tau - j)) for j in range(tau)) for tau in steps]
    p = [w / sum(weights) for w in weights]
    expected = [dot(p, lengths) * sum(pi * row[c] / a for pi, row, a in zip(p, rows, lengths, strict=True))
                for c in range(3)]
    assert flat(mean) == pytest.approx(expected, rel=1e-6)
    assert mean.weight == 6 and mean.steps == 18
    assert flat(mean) != pytest.approx(flat(FedAvg().combine(made(rows, weights, steps))), rel=1e-2)


def test_an_update_of_no_steps_counts_as_one_of_one_step():
    mean = FedNova().combine(made([[2, 0, 0], [4, 8, 0]], weights=[1, 3], steps=[0, 4]))
    length = (1 * 1 + 3 * 4) / 4
    assert flat(mean) == pytest.approx([(2 / 1 + 3 * 4 / 4) / 4 * length, 3 * 8 / 4 / 4 * length, 0])


class Nearly(torch.optim.SGD):
    """Another optimiser with the settings of SGD."""


def bound(strategy, optimiser=torch.optim.SGD, *, kept="keep", **settings):
    trainer = SimpleNamespace(optimiser=lambda p, lr: optimiser(p, lr=lr, **settings), momentum=kept)
    return strategy.bind(SimpleNamespace(trainer=trainer))


def test_fednova_reads_the_momentum_of_the_run():
    assert bound(FedNova(weights="uniform"), momentum=0.75, kept="restart") == FedNova(weights="uniform", momentum=0.75)
    assert bound(FedNova(momentum=0.75), momentum=0.75, kept="restart").momentum == 0.75
    assert bound(FedNova()).momentum == 0 and bound(FedNova(momentum=0.0)).momentum == 0
    for other in (dict(momentum=0.9, nesterov=True), dict(momentum=0.9, dampening=0.1), dict(momentum=1.0),
                  dict(momentum=1.5), dict(optimiser=torch.optim.Adam), dict(optimiser=Nearly)):
        with pytest.raises(ValueError, match=r"knows the path of torch\.optim\.SGD"):
            bound(FedNova(), **{"kept": "restart"} | other)
    for wrong in (0.0, 0.5):
        with pytest.raises(ValueError, match=rf"momentum={wrong:g}\) is not for this run, whose .* momentum 0.75"):
            bound(FedNova(momentum=wrong), momentum=0.75, kept="restart")
    with pytest.raises(ValueError, match="counts the steps of one round"):
        bound(FedNova(), momentum=0.01)


def test_fednova_s_lengths_are_how_often_sgd_adds_a_gradient():
    for tau, momentum in itertools.product((1, 2, 7), (0.0, 0.5, 0.9)):
        p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        sgd = torch.optim.SGD([p], 1.0, momentum=momentum)
        for _ in range(tau):
            p.grad = -torch.ones(1, dtype=torch.float64)
            sgd.step()
        assert FedNova(momentum=momentum)._length(tau) == pytest.approx(p.item(), rel=1e-12)


def naive_fedopt(strategy, deltas, start):
    """Algorithm 2 of Reddi et al. 2021 with numbers, one coordinate at a time."""
    out = []
    for x, column in zip(start, zip(*deltas, strict=True), strict=True):
        m, v = 0.0, strategy.tau**2
        for d in column:
            if strategy.rule == "momentum":
                m = strategy.beta1 * m + d
                x += strategy.server_lr * m
                continue
            m = strategy.beta1 * m + (1 - strategy.beta1) * d
            if strategy.rule == "adagrad":
                v += d * d
            elif strategy.rule == "yogi":
                v -= (1 - strategy.beta2) * d * d * (1 if v > d * d else -1 if v < d * d else 0)
            else:
                v = strategy.beta2 * v + (1 - strategy.beta2) * d * d
            x += strategy.server_lr * m / (math.sqrt(v) + strategy.tau)
        out.append(x)
    return out


@pytest.mark.parametrize("rule", ["adam", "yogi", "adagrad", "momentum"])
def test_fedopt_is_algorithm_2(rule):
    strategy = FedOpt(rule=rule, server_lr=0.1, beta1=0.8, beta2=0.9, tau=1e-2)
    deltas = [[0.1, -0.02, 0.0], [-0.3, 0.001, 0.2], [0.05, 0.05, 0.05], [1.0, 0.0, -1e-4]]
    state = strategy.begin({"a": torch.tensor([1.0]), "b": torch.tensor([2.0, -3.0])})
    for k, row in enumerate(deltas):
        before = {group: {n: t.clone() for n, t in slots.items()} for group, slots in state.moments.items()}
        state_before = state
        state = strategy.step(state, strategy.combine([update("s", row)]))
        assert state.round == k + 1
        assert all(t.equal(state_before.moments[g][n]) for g, slots in before.items() for n, t in slots.items())
    found = [*state.params["a"].tolist(), *state.params["b"].tolist()]
    assert found == pytest.approx(naive_fedopt(strategy, deltas, [1.0, 2.0, -3.0]), rel=1e-5)
    assert all(t.dtype == torch.float64 for slots in state.moments.values() for t in slots.values())


def test_yogi_keeps_a_square_that_equals_the_new_one():
    strategy = FedOpt(rule="yogi", server_lr=2.0, beta1=0.5, tau=0.5)
    state = strategy.step(strategy.begin({"a": torch.ones(1), "b": torch.zeros(2)}), update("mean", [0.5, -0.5, 0.0]))
    assert state.moments["variance"]["a"].item() == state.moments["variance"]["b"][0].item() == 0.25
    assert state.params["a"].item() == 1 + 2 * 0.25 / (0.5 + 0.5)


def test_fedopt_counts_in_float64_beside_a_model_in_half_precision():
    """tau² = 1e-12 is 0 in half precision."""
    strategy = FedOpt(rule="adagrad", server_lr=1.0, beta1=0.0, tau=1e-6)
    start = {"a": torch.ones(1, dtype=torch.float16), "b": torch.zeros(2, dtype=torch.float16)}
    state = strategy.step(strategy.begin(start), update("mean", [1e-6, 0.0, 0.0]))
    assert state.moments["variance"]["a"].item() == pytest.approx(2e-12, rel=1e-6)
    assert state.moments["variance"]["b"].tolist() == pytest.approx([1e-12] * 2, rel=1e-12, abs=0)
    assert state.params["a"].item() == pytest.approx(1 + 1 / (2**0.5 + 1), abs=1e-3)
    assert state.params["a"].dtype == torch.float16


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_the_weighted_mean_of_metrics_and_buffers_by_hand(order):
    """Weights 1, 3 and 4; of counts the largest in any order; of metrics those that every update has."""
    updates = [update("zurich", [4.0, 0.0, 0.0], weight=1.0, steps=7),
               update("aachen", [0.0, 8.0, 0.0], weight=3.0, steps=2),
               update("mainz", [0.0, 0.0, 2.0], weight=4.0, steps=1)]
    for one, loss, count, mean in zip(updates, (8.0, 0.0, 1.0), (5, 9, 2), (0.0, 4.0, -1.0), strict=True):
        one.metrics.update({"loss": loss} | ({"only": 1.0} if count == 9 else {}))
        one.buffers.update(count=torch.tensor(count), mean=torch.tensor([mean]))
    found = FedAvg().combine(updates[k] for k in order)
    assert flat(found) == [0.5, 3.0, 1.0] and (found.site, found.weight, found.steps) == ("mean", 8, 10)
    assert found.metrics == {"loss": (8 * 1 + 0 * 3 + 1 * 4) / 8}
    assert found.buffers["count"].item() == 9 and found.buffers["mean"].item() == (0 + 12 - 4) / 8
    by_steps = FedAvg(weights="steps").combine(updates[k] for k in order)
    assert by_steps.metrics["loss"] == pytest.approx((8 * 7 + 1) / 10) and by_steps.weight == 10


def test_sites_are_drawn_one_by_one_from_the_given_stream():
    sites, strategy = [Site(name=name, train=[]) for name in "zurich aachen mainz bern ulm".split()], FedAvg(sample=0.4)
    kinds = set()
    for seed in range(20):
        stream, draws = (torch.Generator().manual_seed(seed) for _ in range(2))
        expected = [site for site in sites if float(torch.rand(1, generator=draws, dtype=torch.float64)) < 0.4]
        found = strategy.select(sites, stream)
        assert found == expected and torch.equal(stream.get_state(), draws.get_state())
        kinds.add(len(found))
    assert len(kinds) > 2
    untouched = torch.Generator().manual_seed(0)
    assert FedAvg().select(sites, untouched) == sites
    assert torch.equal(untouched.get_state(), torch.Generator().manual_seed(0).get_state())


def test_a_run_begins_with_a_copy_of_the_weights():
    weights = {"a": torch.nn.Parameter(torch.tensor([1.0])), "b": torch.nn.Parameter(torch.tensor([2.0, 3.0]))}
    state = FedAvg().begin(weights)
    with torch.no_grad():
        weights["b"] += 1
    assert state.round == 0 and state.params["b"].tolist() == [2.0, 3.0] and not state.params["a"].requires_grad
    later = FedAvg(server_lr=0.5).step(replace(state, round=6), update("mean", [4.0, -2.0, 0.0]))
    assert later.round == 7 and later.params["a"].tolist() == [3.0] and later.params["b"].tolist() == [1.0, 3.0]


def test_a_strategy_that_weighs_or_draws_in_its_own_way_says_so():
    class Weighs(FedAvg):
        def _weight(self, update):
            return 1.0

    class Draws(FedAvg):
        def select(self, sites, rng):
            return sites[:1]

    assert FedAvg().independent_draws and not Draws().independent_draws and Draws(weights="uniform").uniform_mean
    assert Weighs().independent_draws and not Weighs(weights="uniform").uniform_mean
    assert not FedNova(weights="uniform").uniform_mean and FedOpt(
        rule="adam", server_lr=0.1, weights="uniform").uniform_mean


# Where theory says FedAvg


UPDATES = made(torch.randn(6, 3, generator=torch.Generator().manual_seed(3)).tolist(), [1, 2, 3, 4, 5, 6], [4] * 6)


@pytest.mark.parametrize("strategy,like", [
    (FedNova(), FedAvg()), (FedNova(momentum=0.9), FedAvg()), (FedNova(weights="uniform"), FedAvg(weights="uniform")),
    (TrimmedMean(trim=0.0), FedAvg(weights="uniform")), (Krum(attackers=0, chosen=6), FedAvg(weights="uniform")),
    (NormBound(bound=1e6), FedAvg()), (FedProx(mu=0.3), FedAvg()), (Ditto(lam=0.3), FedAvg()),
    (FedOpt(rule="momentum", server_lr=1.0, beta1=0.0), FedAvg()),
    # Squares begin at tau², beside which those of a round vanish: the step is the mean over (√v + tau) = about 2 tau.
    (FedOpt(rule="adam", server_lr=1e9 * (1 + 0.99**0.5), beta1=0.0, tau=1e9), FedAvg()),
    (FedOpt(rule="yogi", server_lr=2e9, beta1=0.0, tau=1e9), FedAvg()),
    (FedOpt(rule="adagrad", server_lr=2e9, beta1=0.0, tau=1e9), FedAvg()),
    (SCAFFOLD(sites=6, steps=4, lr=0.1), FedAvg(weights="uniform")),
], ids=lambda s: repr(s)[:60])
def test_combining_and_stepping_is_fedavg(strategy, like):
    params = {"a": torch.tensor([1.0], dtype=torch.float64), "b": torch.tensor([0.0, -2.0], dtype=torch.float64)}
    ours = strategy.step(strategy.begin(params), strategy.combine(iter(UPDATES)))
    plain = like.step(like.begin(params), like.combine(iter(UPDATES)))
    for name, p in plain.params.items():
        torch.testing.assert_close(ours.params[name] - params[name], p - params[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("strategy", [s for s in ROBUST if not isinstance(s, Krum)], ids=repr)
def test_one_update_alone_is_what_comes_out(strategy):
    alone = [update("s", [0.5, -0.25, 1.0], weight=7.0)]
    assert flat(strategy.combine(alone)) == pytest.approx([0.5, -0.25, 1.0], abs=1e-12)
    assert flat(strategy.combine([replace(u, site=f"s{k}") for k, u in enumerate(alone * 5)])) == pytest.approx(
        [0.5, -0.25, 1.0], abs=1e-12)


# Attackers


ATTACKS = {"sign flipped and scaled": lambda honest: [-50 * x for x in honest], "huge": lambda honest: [1e30] * 3,
           "huge in one": lambda honest: [honest[0], 1e20, honest[2]], "opposite": lambda honest: [-x for x in honest]}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("strategy", [
    CoordinateMedian(), TrimmedMean(trim=0.3), Krum(attackers=2), Krum(attackers=2, chosen=4), GeometricMedian(),
    NormBound(bound=1.8)], ids=repr)
def test_robust_strategies_resist_two_attackers_of_seven(strategy, attack):
    honest = torch.tensor([1.0, -1.0, 1.0]) + 0.1 * torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    truth = honest.mean(dim=0).tolist()
    bad = ATTACKS[attack](truth)
    updates = made([*honest.tolist(), bad, bad])
    found = flat(strategy.combine(updates))
    assert dot(found, truth) > 0, "it moves the wrong way"
    if isinstance(strategy, NormBound):
        assert distance(found, truth) < 4 / 7 * 1.8 + 0.2  # two of seven, each at most twice the bound away
    else:
        assert distance(found, truth) < 0.35
    if attack != "opposite":
        mean = flat(FedAvg().combine(updates))
        assert distance(mean, truth) > 10 or dot(mean, truth) < 0, "the attack would not even harm the plain mean"


def test_more_attackers_than_a_strategy_withstands_win():
    updates = made([[1, 1, 1]] * 3 + [[-9, -9, -9]] * 4)
    for strategy in (CoordinateMedian(), TrimmedMean(trim=0.25), Krum(attackers=2), GeometricMedian()):
        assert dot(flat(strategy.combine(updates)), [1, 1, 1]) < 0


@pytest.mark.parametrize("strategy", [CoordinateMedian(), TrimmedMean(trim=0.25), Krum(attackers=1),
                                      GeometricMedian(weights="uniform")], ids=repr)
def test_a_claimed_weight_buys_nothing(strategy):
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(5)).tolist()
    assert flat(strategy.combine(made(rows))) == flat(strategy.combine(made(rows, weights=[1e9, 1, 1, 1, 1, 1])))


@pytest.mark.parametrize("strategy", ROBUST, ids=repr)
def test_the_order_of_arrival_changes_nothing(strategy):
    updates = made(torch.randn(7, 3, generator=torch.Generator().manual_seed(5)).tolist(), [1, 2, 3, 4, 5, 6, 7])
    ours, other = strategy.combine(iter(updates)), strategy.combine(reversed(updates))
    assert flat(ours) == pytest.approx(flat(other), rel=1e-12, abs=1e-15)


# What is not finite, too few, or wrong


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("strategy", [*ROBUST, FedAvg(), FedNova(), FedOpt(rule="adam", server_lr=0.1)], ids=repr)
def test_what_is_not_finite_is_refused(strategy, bad):
    updates = made([[1, 2, 3]] * 7)
    updates[2] = update("s02", [1, bad, 3])
    with pytest.raises(ValueError, match="NaN or infinite"):
        strategy.combine(iter(updates))
    state = strategy.begin({"a": torch.ones(1), "b": torch.ones(2)})
    with pytest.raises(ValueError, match="NaN or infinite"):
        strategy.step(state, update("mean", [1, bad, 3]))


def test_a_model_that_overflows_is_refused():
    strategy = FedAvg(server_lr=10.0)
    with pytest.raises(ValueError, match="would become NaN or infinite in b"):
        strategy.step(strategy.begin({"a": torch.ones(1), "b": torch.ones(2)}), update("mean", [1, 3e38, 1]))


@pytest.mark.parametrize("strategy", [*ROBUST, FedNova(), FedAvg()], ids=repr)
def test_no_update_at_all(strategy):
    with pytest.raises(TooFewUpdates, match="no update to combine"):
        strategy.combine(iter([]))


def test_krum_needs_enough_updates_and_sites():
    with pytest.raises(TooFewUpdates, match="needs 5 updates, it received 4"):
        Krum(attackers=1).combine(made([[1, 1, 1]] * 4))
    with pytest.raises(ValueError, match="needs 5 updates, the run has 2 sites"):
        each_round(trainer(), blob_sites(), strategy=Krum(attackers=1))
    assert Krum(attackers=1, chosen=8).needed == 9


@pytest.mark.parametrize("make,match", [
    (lambda: FedProx(mu=-1.0), "mu"), (lambda: FedProx(mu=math.nan), "mu"), (lambda: Ditto(lam=-0.1), "lam"),
    (lambda: Ditto(lam=math.inf), "lam"), (lambda: FedOpt(rule="sgd", server_lr=1.0), "rule"),
    (lambda: FedOpt(rule="adam", server_lr=0.0), "server_lr"),
    (lambda: FedOpt(rule="adam", server_lr=0.1, beta1=1.0), "beta1"),
    (lambda: FedOpt(rule="yogi", server_lr=0.1, beta2=-0.1), "beta2"),
    (lambda: FedOpt(rule="yogi", server_lr=0.1, tau=0.0), "tau"), (lambda: FedNova(momentum=1.0), "momentum"),
    (lambda: FedNova(weights="steps"), "weights"), (lambda: SCAFFOLD(sites=0, steps=1, lr=0.1), "sites"),
    (lambda: SCAFFOLD(sites=2, steps=1.5, lr=0.1), "steps"), (lambda: SCAFFOLD(sites=2, steps=1, lr=0.0), "lr"),
    (lambda: SCAFFOLD(sites=2, steps=1, lr=0.1, weights="patients"), "weights is 'uniform'"),
    (lambda: CoordinateMedian(weights="patients"), "weights is 'uniform'"),
    (lambda: TrimmedMean(trim=0.5), "trim"), (lambda: TrimmedMean(trim=0.1, weights="steps"), "weights is 'uniform'"),
    (lambda: Krum(attackers=-1), "attackers"), (lambda: Krum(attackers=1, chosen=0), "chosen"),
    (lambda: Krum(attackers=1, weights="patients"), "weights is 'uniform'"),
    (lambda: GeometricMedian(iterations=0), "iterations"), (lambda: GeometricMedian(nu=0.0), "nu"),
    (lambda: NormBound(bound=0.0), "bound"), (lambda: NormBound(bound=math.inf), "bound"),
    (lambda: NormBound(bound=1.0, sample=0.0), "sample"), (lambda: FedProx(mu=0.1, server_lr=-1.0), "server_lr")])
def test_settings_out_of_range_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


EVERY = [*ROBUST, FedProx(mu=0.1), Ditto(lam=0.1), FedNova(), FedOpt(rule="adam", server_lr=0.1),
         SCAFFOLD(sites=3, steps=2, lr=0.1)]


@pytest.mark.parametrize("strategy", EVERY, ids=repr)
def test_strategies_print_as_the_code_that_makes_them_and_can_be_keys(strategy):
    assert eval(repr(strategy)) == strategy and hash(strategy) == hash(eval(repr(strategy)))


# Noise at the server and secure aggregation


CENTRAL = CentralGaussian(clip=1.0, noise_multiplier=1.0, delta=1e-3)
SECURE = SecureAggregation(clip=1.0, threshold=2)


@pytest.mark.parametrize("hidden", [{"privacy": CENTRAL}, {"aggregation": SECURE}], ids=["noise", "masks"])
@pytest.mark.parametrize("strategy", [
    CoordinateMedian(), TrimmedMean(trim=0.25), TrimmedMean(trim=0.0), GeometricMedian(weights="uniform"),
    NormBound(bound=1.0, weights="uniform"), FedNova(weights="uniform"), FedAvg(), FedProx(mu=0.1), Ditto(lam=0.1),
    FedOpt(rule="adam", server_lr=0.1), FedAvg(weights="steps")], ids=repr)
def test_noise_and_masks_at_the_server_refuse_all_but_a_uniform_mean(strategy, hidden):
    with pytest.raises(ValueError, match=r"FedAvg\(weights='uniform'\)"):
        each_round(trainer(optimiser=plain_sgd), blob_sites(), strategy=strategy, **hidden)


@pytest.mark.parametrize("hidden", [
    {"privacy": CENTRAL}, {"aggregation": SecureAggregation(clip=1.0, threshold=4)}], ids=repr)
def test_noise_and_masks_at_the_server_refuse_krum(hidden):
    with pytest.raises(ValueError, match=r"FedAvg\(weights='uniform'\)"):
        each_round(trainer(), blob_sites((1,) * 5), strategy=Krum(attackers=1), **hidden)


def test_a_strategy_that_combines_in_its_own_way_claims_no_uniform_mean():
    class Own(FedAvg):
        def combine(self, updates):
            return super().combine(updates)

    assert FedAvg(weights="uniform").uniform_mean and FedProx(mu=0.1, weights="uniform").uniform_mean
    assert not FedAvg().uniform_mean and not Own(weights="uniform").uniform_mean
    with pytest.raises(ValueError, match=r"FedAvg\(weights='uniform'\)"):
        each_round(trainer(), blob_sites(), strategy=Own(weights="uniform"), privacy=CENTRAL)


@pytest.mark.parametrize("strategy", [
    FedProx(mu=0.1, weights="uniform"), Ditto(lam=0.1, weights="uniform"),
    FedOpt(rule="yogi", server_lr=0.1, weights="uniform")], ids=repr)
def test_they_work_with_a_uniform_mean(strategy):
    for hidden in ({"privacy": CENTRAL}, {"aggregation": SECURE}):
        finished = list(each_round(trainer(steps=1), blob_sites(), strategy=strategy, rounds=2, **hidden))
        assert finished[-1].state.round == 2 and len(finished[-1].sites) == 2
