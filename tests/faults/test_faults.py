"""Sites that fail, lie or attack: the server goes on without them, says why, and nothing of theirs is in the model."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cohorts import blob_sites
from fedlab.core.errors import FedlabError, PrivacyError, SiteError
from fedlab.core.gate import check_update
from fedlab.core.types import Round, SiteState, Spent, Update
from fedlab.core.weights import weights_sha256
from fedlab.evidence.contributions import KeepUpdates
from fedlab.faults.sites import (
    Corrupt,
    Crash,
    DropOut,
    Faulty,
    Joins,
    Leaves,
    PoisonedLabels,
    Replay,
    Scale,
    SignFlip,
    Straggler,
    _FaultyTrainer,
)
from fedlab.privacy.accounting.ledger import Ledger
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.run.admission import Admission
from fedlab.run.federate import each_round, federate
from fedlab.run.history import History
from fedlab.run.local import Local
from fedlab.run.recipe import recipe
from fedlab.strategies.averaging import FedAvg
from fedlab.topologies.buffered import Buffered
from fedlab.training.trainer import SiteTrainer
from trainers import trainer

BAD = "site-1"


def run(*faults, rounds=3, admission=None, seed=0, **more):
    """A run of three sites with these faults; moments restart, so that a round is the same whatever went before."""
    settings = dict(momentum="restart") | more.pop("training", {})
    return federate(trainer(**settings), blob_sites((2, 2, 1)), rounds=rounds, progress=False,
                    engine=Faulty(engine=Local(), faults=faults, seed=seed), admission=admission, **more)


def rules(**more):
    return Admission(**({"deadline": 3600.0, "max_norm": 50.0} | more))


def weights(history):
    return weights_sha256(history.state.params)


#: A fault in round 1, and what is recorded of it.
EXCLUDED = [
    (DropOut(sites=(BAD,), rounds=(1,)), "the site did not respond"),
    (Straggler(seconds=7200, sites=(BAD,), rounds=(1,)), "late: it took 7.2e\\+03 s, the deadline is 3600 s"),
    (Crash(sites=(BAD,), rounds=(1,)), "stage 'fit': RuntimeError: a simulated crash after 1 batches"),
    (Crash(after=9, sites=(BAD,), rounds=(1,)), "after 9 batches"),
    (Replay(sites=(BAD,), rounds=(1,)), "answers round 0, not 1"),
    (Scale(factor=1e4, sites=(BAD,), rounds=(1,)), "its norm is .* the rules allow 50"),
    (SignFlip(factor=1e4, sites=(BAD,), rounds=(1,)), "its norm is"),
    (Corrupt(how="nan", sites=(BAD,), rounds=(1,)), "NaN or infinite"),
    (Corrupt(how="inf", sites=(BAD,), rounds=(1,)), "NaN or infinite"),
    (Corrupt(how="shape", sites=(BAD,), rounds=(1,)), "of shape"),
    (Corrupt(how="integers", sites=(BAD,), rounds=(1,)), "floating point"),
    (Corrupt(how="names", sites=(BAD,), rounds=(1,)), "other tensors"),
    (Corrupt(how="missing", sites=(BAD,), rounds=(1,)), "other tensors"),
    (Corrupt(how="weight", sites=(BAD,), rounds=(1,)), "weight nan"),
    (Corrupt(how="overflow", sites=(BAD,), rounds=(1,)), "its norm is"),
    (Corrupt(how="sender", sites=(BAD,), rounds=(1,)), "nothing under its name; an update of 'elsewhere' was received"),
    (Corrupt(how="garbage", sites=(BAD,), rounds=(1,)), "other tensors"),
    (Corrupt(how="no update", sites=(BAD,), rounds=(1,)), "an object that is no update was received"),
]


@pytest.fixture(scope="module")
def without():
    """The run in which the site is simply absent in round 1."""
    return run(DropOut(sites=(BAD,), rounds=(1,)), admission=rules())


@pytest.mark.parametrize("fault, reason", EXCLUDED, ids=lambda value: repr(value)[:60])
def test_an_excluded_update_is_recorded_and_leaves_no_bit_in_the_model(fault, reason, without):
    history = run(fault, admission=rules())
    absent = [record["absent"] for record in history.records]
    assert absent[0] == absent[2] == {} and set(absent[1]) == {BAD}
    assert re.search(reason, absent[1][BAD]), absent[1]
    assert set(history.records[1]["sites"]) == {"site-0", "site-2"}
    assert history.absent()["reason"].to_dict() == {(1, BAD): absent[1][BAD]}
    assert weights(history) == weights(without)


@pytest.mark.parametrize("fault", [f for f, _ in EXCLUDED if not isinstance(f, Straggler | Scale | SignFlip)
                                   and f != Corrupt(how="overflow", sites=(BAD,), rounds=(1,))], ids=repr)
def test_without_rules_a_failure_ends_the_run(fault):
    with pytest.raises((FedlabError, ValueError)) as caught:
        run(fault)
    assert BAD in str(caught.value)
    if isinstance(fault, DropOut | Crash):
        assert isinstance(caught.value, SiteError) and (caught.value.site, caught.value.round) == (BAD, 1)


@pytest.mark.parametrize("fault", [
    PoisonedLabels(sites=(BAD,)), SignFlip(sites=(BAD,)), Scale(factor=3.0, sites=(BAD,)),
    Replay(sites=(BAD,), disguised=True)], ids=repr)
def test_an_attack_that_no_rule_sees_changes_the_model(fault):
    honest, attacked = run(rounds=2), run(fault, rounds=2)
    assert weights(honest) != weights(attacked)
    assert weights(attacked) == weights(run(fault, rounds=2))
    assert all(math.isfinite(float(t.abs().max())) for t in attacked.state.params.values())


def test_sign_flip_and_scale_by_hand():
    sent = {}
    for name, fault in (("honest", []), ("flipped", [SignFlip(sites=(BAD,))]), ("scaled", [Scale(factor=4.0)])):
        engine = Faulty(engine=Local(), faults=fault)
        kept = sent.setdefault(name, {})

        class Watch(Faulty):
            def train(self, task, state, cohort, states, kept=kept):
                for answer in super().train(task, state, cohort, states):
                    kept[answer.site] = answer
                    yield answer

        next(each_round(trainer(), blob_sites(), engine=Watch(engine=engine.engine, faults=fault)))
    for name, tensor in sent["honest"][BAD].delta.items():
        assert torch.equal(sent["flipped"][BAD].delta[name], -tensor)
        assert torch.equal(sent["scaled"][BAD].delta[name], 4 * tensor)
        assert torch.equal(sent["flipped"]["site-0"].delta[name], sent["honest"]["site-0"].delta[name])


def test_poisoned_labels_are_drawn_where_they_should_be():
    site = blob_sites((2,))[0]
    poisoned = PoisonedLabels(labels={4: 1, 1: 2}).at_site(site)
    before, after = site.train[0].label, poisoned.train[0].label
    assert torch.equal(after == 1, before == 4) and torch.equal(after == 2, (before == 2) | (before == 1))
    assert len(poisoned.train) == 2 and len(poisoned.train[0:1]) == 1 and poisoned.val is site.val
    assert int((site.train[0].label == 4).sum()) > 0  # the site's own patients stay as they are
    assert all(int(patient.label.max()) == 0 for patient in PoisonedLabels().at_site(site).train)


def test_drop_out_comes_as_often_as_it_should():
    fault = DropOut(probability=0.3)
    struck = sum(fault.strikes(f"site-{k}", number, seed=5) for k in range(20) for number in range(100))
    # 2000 draws at 0.3: outside 600 ± 80 with probability 1e-4 (four standard deviations of 20.5).
    assert abs(struck - 600) < 80
    assert not any(DropOut(probability=0.0).strikes("a", n, 0) for n in range(50))
    assert [DropOut(rounds=range(2, 4)).strikes("a", n, 0) for n in range(5)] == [False, False, True, True, False]


def test_a_site_may_join_late_and_leave():
    history = run(Joins(round=2, sites=("site-2",)), Leaves(round=1, sites=("site-0",)), admission=rules())
    assert [sorted(record["sites"]) for record in history.records] == [["site-0", "site-1"], ["site-1"],
                                                                     ["site-1", "site-2"]]
    assert "the site joins in round 2" in history.records[0]["absent"]["site-2"]
    assert "the site left before round 1" in history.records[2]["absent"]["site-0"]


def test_a_buffer_does_not_wait_for_a_site_that_left():
    history = run(Leaves(round=0, sites=("site-0",)), admission=rules(), rounds=4,
                  topology=Buffered(size=1, seconds={"site-0": 1.0, "site-1": 1.4, "site-2": 9.0}))
    assert [sorted(record["sites"]) for record in history.records] == [[], ["site-1"], [], ["site-1"]]


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_site_that_joins_late_is_new_to_its_ledger_and_a_lost_ledger_is_not(tmp_path, interrupted):
    privacy = LocalGaussian(clip=1.0, noise_multiplier=1.0, delta=1e-3)
    late = Joins(round=2, sites=("site-2",))
    if interrupted:
        run(late, rounds=2, admission=rules(deadline=None), privacy=privacy, checkpoint=tmp_path / "run")
    history = run(late, rounds=4, admission=rules(deadline=None), privacy=privacy, checkpoint=tmp_path / "run")
    spent = history.spent()["epsilon"].unstack("site").droplevel("unit")
    assert spent["site-2"].isna().tolist() == [True, True, False, False]
    assert spent.loc[2, "site-2"] == pytest.approx(spent.loc[0, "site-1"])  # its first release, not its third
    assert spent.loc[3, "site-2"] < spent.loc[3, "site-1"]

    engine = Faulty(engine=Local(), faults=[late])
    rounds = each_round(trainer(), blob_sites((2, 2, 1)), rounds=4, privacy=privacy, engine=engine,
                        admission=rules(deadline=None))
    states = next(rounds).site_states
    assert states["site-2"].updates == 0 and not Ledger(states["site-2"]).spent()
    states.save("site-1", SiteState())  # this one has released something, and lost its record of it
    assert "no state from the rounds before" in next(rounds).absent["site-1"]


ALL = [DropOut(probability=0.4), Replay(probability=0.5, sites=("site-0",)), Crash(probability=0.3),
       Corrupt(how="nan", probability=0.2), Straggler(seconds=9e9, probability=0.2), Joins(round=1, sites=("site-2",)),
       PoisonedLabels(sites=("site-1",)), SignFlip(probability=0.5)]


def test_a_run_with_faults_repeats_and_resumes_to_equal_bits(tmp_path):
    whole = run(*ALL, rounds=5, admission=rules(), seed=3, training={"momentum": "keep"})
    assert {len(record["absent"]) for record in whole.records} > {0} or any(r["absent"] for r in whole.records)
    for rounds in (2, 3, 5):
        resumed = run(*ALL, rounds=rounds, admission=rules(), seed=3, training={"momentum": "keep"},
                      checkpoint=tmp_path / "run")
    assert weights(resumed) == weights(whole)
    assert [r["absent"] for r in resumed.records] == [r["absent"] for r in whole.records]
    assert weights(run(*ALL, rounds=5, admission=rules(), seed=4, training={"momentum": "keep"})) != weights(whole)


def test_a_replay_survives_a_resume(tmp_path):
    old = Replay(sites=(BAD,), rounds=(3,), disguised=True)
    whole = run(old, rounds=4)
    run(old, rounds=2, checkpoint=tmp_path / "run")
    resumed = run(old, rounds=4, checkpoint=tmp_path / "run")
    assert weights(resumed) == weights(whole)
    assert resumed.records[3]["sites"][BAD]["norm"] == whole.records[0]["sites"][BAD]["norm"]


def test_a_round_with_too_few_updates_leaves_the_model():
    lonely = DropOut(sites=("site-0", "site-1"), rounds=(1,))
    history = run(lonely, admission=rules(min_sites=2))
    assert "round was void: 1 updates were received, the round needs 2" in history.records[1]["absent"]["site-2"]
    states = [finished.state for finished in each_round(
        trainer(), blob_sites((2, 2, 1)), rounds=2, admission=rules(min_sites=2),
        engine=Faulty(engine=Local(), faults=[lonely]))]
    assert weights_sha256(states[0].params) == weights_sha256(states[1].params) and states[1].round == 2
    nobody = run(DropOut(rounds=(0,)), rounds=1, admission=rules())
    assert weights(nobody) == weights_sha256(trainer().initial()) and len(nobody.records[0]["absent"]) == 3


def test_finite_updates_that_overflow_together_leave_the_model():
    strategy = FedAvg(server_lr=2.0)
    history = run(Corrupt(how="overflow", rounds=(1,)), admission=Admission(), strategy=strategy)
    assert all("NaN or infinite" in reason for reason in history.records[1]["absent"].values())
    assert len(history.records[1]["absent"]) == 3
    assert all(bool(torch.isfinite(t).all()) for t in history.state.params.values())
    with pytest.raises(ValueError, match="check the norms of the updates"):
        run(Corrupt(how="overflow", rounds=(1,)), strategy=strategy)


def test_faults_print_as_code_and_refuse_wrong_settings():
    engine = Faulty(engine=Local(), faults=[DropOut(probability=0.3, sites=("a",)), Straggler(seconds=5)], seed=2)
    again = eval(repr(engine))
    assert repr(again) == repr(engine) and again.faults == engine.faults
    for wrong in (lambda: DropOut(probability=1.1), lambda: DropOut(sites="site-0"), lambda: Straggler(seconds=0),
                  lambda: Corrupt(how="odd"), lambda: Faulty(engine=Local(), faults=["drop out"])):
        with pytest.raises(ValueError):
            wrong()


def test_a_sabotaged_trainer_prints_like_the_honest_one_and_leaves_it_alone():
    honest = trainer()
    before = repr(honest)
    engine = Faulty(engine=Local(), faults=[Crash(rounds=(0,), sites=("site-0",))])
    finished = next(each_round(honest, blob_sites(), engine=engine, admission=rules()))
    assert set(finished.absent) == {"site-0"} and repr(honest) == before and "fit" not in vars(honest)
    faulty = _FaultyTrainer(stands_for=honest, seeded=((Crash(), 0),))
    assert repr(faulty) == before and recipe(faulty) == recipe(honest)


class Unspeakable:
    def __str__(self):
        raise RecursionError("there is no word for it")

    def __repr__(self):
        return "Unspeakable()"


garbage = st.recursive(
    st.none() | st.booleans() | st.integers(-10**400, 10**400) | st.floats() | st.text(max_size=5)
    | st.binary(max_size=5) | st.builds(Unspeakable) | st.builds(object) | st.just(torch.ones(2))
    | st.just(torch.tensor(math.nan)),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner)
    | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3), max_leaves=5)
tensors = st.sampled_from([
    torch.ones(3), torch.ones(3).double() * 1e300, torch.ones(3).to_sparse(), torch.ones(3, device="meta"),
    torch.ones(3, requires_grad=True), torch.ones(3, dtype=torch.complex64), torch.ones(3).to(torch.float8_e4m3fn),
    torch.ones(3).half(), torch.full((3,), 3e38), torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)])
spent = st.builds(Spent, garbage | st.floats(), garbage | st.floats(), garbage | st.just("site"), garbage | st.text(),
                  garbage | st.text())
HONEST = dict(site="a", delta={"w": torch.ones(3)}, weight=1.0, steps=1, metrics={"loss": 0.5}, spent=(), encoded=None,
              round=0, seconds=0.1)
FIELDS = {"site": garbage, "delta": garbage | st.fixed_dictionaries({"w": garbage | tensors}), "weight": garbage,
          "steps": garbage, "metrics": garbage | st.dictionaries(st.text(max_size=3), garbage, max_size=2),
          "spent": garbage | st.tuples(spent), "encoded": garbage, "round": garbage, "seconds": garbage}


@settings(max_examples=400, deadline=None)
@example({"spent": (Spent(torch.ones(2), 0.0, "site", "", ""),)})
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), st.none(), min_size=1, max_size=3).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names})))
def test_garbage_in_an_update_is_a_privacy_error_or_harmless(changes):
    update = Update(**(HONEST | changes))
    try:
        admitted = check_update(update, like={"w": torch.zeros(3)}, site="a")
    except PrivacyError as error:
        assert str(error)
        return
    # What passes can be reckoned with, shown and written down.
    strategy = FedAvg()
    mean = strategy.combine(iter([admitted, replace(admitted, site="b")]))
    state = strategy.step(strategy.begin({"w": torch.zeros(3)}), mean)
    assert all(bool(torch.isfinite(t).all()) for t in state.params.values())
    history = History(rounds=1)
    numbers = {**admitted.metrics, "norm": admitted.norm(), "weight": admitted.weight, "steps": float(admitted.steps),
               "bytes": float(admitted.nbytes), "seconds": admitted.seconds}
    history.add(Round(number=0, state=state, cohort=("a",), sites={"a": numbers}, spent={"a": admitted.spent},
                      metrics={}, seconds=0.0))
    assert history.guarantee() and repr(history) and len(history.sites()) == 1


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), st.none(), min_size=1, max_size=3).flatmap(
    lambda names: st.fixed_dictionaries({name: FIELDS[name] for name in names if name != "delta"})))
def test_garbage_never_ends_a_run_with_rules(changes):
    class Garbled:
        def train(self, task, state, cohort, states):
            for site in cohort:
                honest = Update(site=site.name, delta={n: torch.zeros_like(p) for n, p in state.params.items()},
                                weight=1.0, round=state.round)
                yield replace(honest, **changes) if site.name == BAD else honest

    finished = next(each_round(TRAINER, SITES, engine=Garbled(), admission=Admission()))
    assert "site-0" in finished.sites and (BAD in finished.absent) != (BAD in finished.sites)


TRAINER, SITES = trainer(), blob_sites()


@pytest.mark.parametrize("privacy, told", [
    (None, True), (LocalGaussian(clip=1.0, noise_multiplier=1.0, delta=0.01), False),
    (CentralGaussian(clip=1.0, noise_multiplier=1.0, delta=0.01), False)])
def test_under_a_guarantee_the_text_of_a_sites_error_does_not_reach_the_server(privacy, told):
    class Quotes(SiteTrainer):
        def fit(self, kit, site, state, **more):
            if site.name == "site-0":
                raise RuntimeError("Mr Miller's scan is upside down")
            return super().fit(kit, site, state, **more)

    plain = trainer()
    quoting = Quotes(model=plain.model, steps=1, crop=plain.crop, augment=None)
    finished = next(each_round(quoting, blob_sites(), strategy=FedAvg(weights="uniform"), privacy=privacy, rounds=1,
                               admission=Admission()))
    assert finished.absent.keys() == {"site-0"} and finished.sites.keys() == {"site-1"}
    assert ("Miller" in finished.absent["site-0"]) is told


def test_updates_that_are_turned_away_are_not_kept_and_break_nothing(tmp_path):
    engine = KeepUpdates(engine=Faulty(engine=Local(), faults=[Corrupt(sites=["site-0"], how="nan")]),
                         folder=tmp_path / "updates")
    finished = next(each_round(trainer(), blob_sites(), engine=engine, admission=Admission(), rounds=1))
    assert finished.absent.keys() == {"site-0"}
    assert [file.stem for file in (tmp_path / "updates" / "round-0000").iterdir()] == ["site-1"]
