"""The round loop: streaming means, fail-closed updates, checkpoints that resume to equal bits."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import irregular
from cohorts import TinyNet, blob_sites
from fedlab.core.errors import PrivacyError, RunError
from fedlab.core.gate import check_update
from fedlab.core.types import Spent, Update
from fedlab.core.weights import weights_sha256
from fedlab.privacy.base import Privacy
from fedlab.run.federate import each_round, federate
from fedlab.strategies import FedAvg, weighted_mean
from trainers import trainer


def update(site: str, values: list[float], weight: float = 1.0, **more: object) -> Update:
    return Update(site=site, delta={"w": torch.tensor(values)}, weight=weight, **more)  # type: ignore[arg-type]


@settings(max_examples=50, deadline=None)
@given(irregular.updates(), st.randoms(use_true_random=False))
def test_streaming_mean_is_the_naive_mean_in_any_order(updates, random):
    total = math.fsum(u.weight for u in updates)
    mean = weighted_mean(iter(updates))
    for name, kind in (("a", "delta"), ("b", "delta"), ("mean", "buffers")):
        found, parts = getattr(mean, kind)[name].reshape(-1), [getattr(u, kind)[name].reshape(-1) for u in updates]
        naive = [math.fsum(float(t[k]) * u.weight for t, u in zip(parts, updates, strict=True)) / total
                 for k in range(len(found))]
        assert found.tolist() == pytest.approx(naive, rel=1e-12, abs=1e-9)
    assert mean.buffers["count"].tolist() == [max(int(u.buffers["count"][k]) for u in updates) for k in range(2)]
    assert set(mean.delta) == {"a", "b"} and set(mean.buffers) == {"mean", "count"}
    assert mean.weight == pytest.approx(total) and mean.steps == sum(u.steps for u in updates)
    assert mean.metrics["loss"] == pytest.approx(math.fsum(u.metrics["loss"] * u.weight for u in updates) / total)
    random.shuffle(updates)
    for name, t in weighted_mean(updates).delta.items():
        torch.testing.assert_close(t, mean.delta[name], rtol=1e-12, atol=1e-9)


def test_fedavg_by_hand():
    strategy = FedAvg()
    state = strategy.begin({"w": torch.tensor([1.0, 2.0])})
    mean = strategy.combine(iter([update("a", [1.0, 0.0], 3.0), update("b", [0.0, 4.0], 1.0)]))
    moved = strategy.step(state, mean)
    assert mean.delta["w"].tolist() == [0.75, 1.0] and mean.weight == 4.0
    assert moved.params["w"].tolist() == [1.75, 3.0] and moved.round == 1
    assert FedAvg(server_lr=0.5).step(state, mean).params["w"].tolist() == [1.375, 2.5]
    assert FedAvg(weights="uniform").combine([update("a", [1.0, 0.0], 3.0), update("b", [0.0, 4.0], 1.0)]) \
        .delta["w"].tolist() == [0.5, 2.0]
    by_steps = [update("a", [1.0, 0.0], 3.0, steps=1), update("b", [0.0, 4.0], 1.0, steps=3)]
    assert FedAvg(weights="steps").combine(by_steps).delta["w"].tolist() == [0.25, 3.0]


def test_only_one_update_is_held_while_combining():
    alive, most = [], 0

    class Watched(dict):
        def __del__(self):
            alive.remove(1)

    def stream():
        nonlocal most
        for i in range(5):
            alive.append(1)
            most = max(most, len(alive))
            yield Update(site=f"s{i}", delta=Watched(w=torch.ones(3)), weight=1.0)

    weighted_mean(stream())
    assert most <= 2  # the one in hand and the one just asked for


@pytest.mark.parametrize("wrong", [dict(weights="size"), dict(server_lr=0.0), dict(server_lr=float("nan"))])
def test_fedavg_refuses_wrong_settings(wrong):
    with pytest.raises(ValueError):
        FedAvg(**wrong)


def test_nothing_to_combine():
    with pytest.raises(ValueError, match="no update to combine"):
        FedAvg().combine([])


class Broken(Privacy):
    def __init__(self, spoil):
        self.spoil = spoil

    def protect(self, update, state, rng):
        return self.spoil(update)


@pytest.mark.parametrize("spoil, message", [
    (lambda u: None, "expected an Update"),
    (lambda u: u.delta, "expected an Update"),
    (lambda u: u.map(lambda t: t * torch.nan), "NaN"),
    (lambda u: u.map(lambda t: t / 0), "NaN or infinite"),
    (lambda u: u.map(lambda t: t.flatten()), "of shape"),
    (lambda u: u.map(lambda t: t.int()), "floating point"),
    (lambda u: replace(u, delta={"other": torch.ones(1)}), "other tensors"),
    (lambda u: replace(u, delta={}), "other tensors"),
    (lambda u: replace(u, site="someone else"), "someone else"),
    (lambda u: replace(u, weight=float("nan")), "weight nan"),
    (lambda u: replace(u, weight=0.0), "weight 0"),
])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_technique_that_fails_sends_nothing(spoil, message, stacked):
    sent = []
    privacy = Broken(spoil) + Privacy() if stacked else Broken(spoil)
    with pytest.raises(PrivacyError, match=message) as caught:
        for finished in each_round(trainer(), blob_sites(), privacy=privacy, rounds=1):
            sent.append(finished)
    assert not sent and "nothing was sent" in str(caught.value)


def test_an_engine_cannot_smuggle_an_update_past_the_server():
    class Rogue:
        def __init__(self, made):
            self.made = made

        def train(self, task, state, cohort, states):
            yield self.made(state)

    def poisoned(state):
        return Update(site="site-0", delta={n: t * torch.nan for n, t in state.params.items()}, weight=1.0)

    def foreign(state):
        return Update(site="elsewhere", delta=dict(state.params), weight=1.0)

    with pytest.raises(PrivacyError, match="NaN"):
        next(each_round(trainer(), blob_sites(), engine=Rogue(poisoned)))
    with pytest.raises(ValueError, match="received an update of 'elsewhere'"):
        next(each_round(trainer(), blob_sites(), engine=Rogue(foreign)))


def test_hooks_run_in_order_at_the_site_and_in_reverse_at_the_server():
    calls = []

    class Named(Privacy):
        def __init__(self, name):
            self.name = name

        def equip(self, kit, site, state):
            calls.append(f"equip {self.name}")
            return kit

        def protect(self, update, state, rng):
            calls.append(f"protect {self.name}")
            return update

        def release(self, mean, cohort, state, rng):
            calls.append(f"release {self.name} {len(cohort)}")
            return mean

    privacy = Named("a") + Named("b") + Named("c")
    next(each_round(trainer(), blob_sites((1,)), privacy=privacy))
    assert calls == ["equip a", "equip b", "equip c", "protect a", "protect b", "protect c",
                     "release c 1", "release b 1", "release a 1"]
    assert repr(privacy) == "Named(name='a') + Named(name='b') + Named(name='c')"


def test_release_changes_the_mean_before_the_model_moves():
    class Nothing(Privacy):
        def release(self, mean, cohort, state, rng):
            return mean.map(torch.zeros_like)

    one = trainer()
    finished = next(each_round(one, blob_sites(), privacy=Nothing()))
    assert weights_sha256(finished.state.params) == weights_sha256(one.initial())


def test_rounds_can_be_stepped_through_and_equal_a_whole_run():
    sites = blob_sites()
    run = each_round(trainer(), sites, rounds=3)
    first = next(run)
    assert first.number == 0 and first.cohort == ("site-0", "site-1")
    assert set(first.sites["site-0"]) == {"loss", "norm", "weight", "steps", "bytes", "seconds"}
    assert first.sites["site-0"]["bytes"] == 4 * sum(p.numel() for p in TinyNet().parameters())
    last = list(run)[-1]
    whole = federate(trainer(), sites, rounds=3, progress=False)
    assert weights_sha256(last.state.params) == weights_sha256(whole.state.params)


def test_an_interrupted_run_resumes_to_equal_bits(tmp_path):
    sites = blob_sites()
    whole = federate(trainer(), sites, rounds=4, progress=False)

    def interrupt(finished):
        if finished.number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(trainer(), sites, rounds=4, checkpoint=tmp_path / "run", on_round=interrupt, progress=False)
    (tmp_path / "run" / "round-0003.part").mkdir()  # a kill while round 3 was being written
    resumed = federate(trainer(), sites, rounds=4, checkpoint=tmp_path / "run", progress=False)
    assert weights_sha256(resumed.state.params) == weights_sha256(whole.state.params)
    assert list(resumed.table().index) == [0, 1, 2, 3]
    assert resumed.table()["loss"].tolist() == whole.table()["loss"].tolist()
    again = federate(trainer(), sites, rounds=4, checkpoint=tmp_path / "run", progress=False)
    assert weights_sha256(again.state.params) == weights_sha256(whole.state.params)


def test_a_checkpoint_refuses_other_runs_and_damage(tmp_path):
    sites, folder = blob_sites(), tmp_path / "run"
    federate(trainer(), sites, rounds=1, checkpoint=folder, progress=False)
    with pytest.raises(RunError, match="seed: 0 there, 1 here"):
        federate(trainer(), sites, rounds=1, checkpoint=folder, seed=1, progress=False)
    with pytest.raises(RunError, match="start_sha256"):
        federate(trainer(model=TinyNet(seed=9)), sites, rounds=1, checkpoint=folder, progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="not empty and holds no fedlab run"):
        federate(trainer(), sites, rounds=1, checkpoint=tmp_path / "mine", progress=False)
    note = folder / "round-0001" / "round.json"
    content = json.loads(note.read_text())
    note.write_text(json.dumps(content | {"state_sha256": "0" * 64}))
    with pytest.raises(RunError, match="its content is not what was written"):
        federate(trainer(), sites, rounds=2, checkpoint=folder, progress=False)
    (folder / "round-0001" / "state.safetensors").write_bytes(b"not tensors")
    with pytest.raises(RunError, match="damaged"):
        federate(trainer(), sites, rounds=2, checkpoint=folder, progress=False)


def test_history_shows_itself():
    history = federate(trainer(), blob_sites(), rounds=2, progress=False,
                       validate=lambda model, number: {"Dice": 0.5 + number / 10})
    assert "2 of 2 rounds" in repr(history) and "Dice 0.600" in repr(history)
    assert "<table" in history._repr_html_() and list(history.table()["Dice"]) == [0.5, 0.6]
    assert list(history.sites().loc[0].index) == ["site-0", "site-1"]


def test_quantiles_norms_and_bytes_of_an_update():
    one = update("a", [3.0, -4.0, 0.0, 1.0])
    assert one.norm() == pytest.approx(26**0.5) and one.nbytes == 16
    assert [one.quantile_abs(q) for q in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0.0, 0.0, 1.0, 3.0, 4.0]
    with pytest.raises(ValueError, match=r"q is at least 0 and at most 1, got 1\.5"):
        one.quantile_abs(1.5)
    assert check_update(one, like={"w": torch.zeros(4)}, site="a") is one


def test_spent_says_what_it_means():
    spent = Spent(epsilon=2.345, delta=1e-5, unit="patient", accountant="RDP", adjacency="add or remove one patient")
    assert str(spent) == "ε = 2.35 at δ = 1e-05 per patient (add or remove one patient, RDP accountant)"
