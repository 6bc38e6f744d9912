"""What the server takes in and refuses in a round, of sites that answer as they please."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cohorts import blob_sites
from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError, RunError, SiteError
from fedlab.core.protocols import Run
from fedlab.core.types import Cohort, Failure, ServerState, Site, Spent, Update, Withdrawal
from fedlab.core.weights import weights_sha256
from fedlab.privacy.accounting.ledger import Gaussian, Ledger, Terms
from fedlab.privacy.aggregation import Aggregation, SumFailed
from fedlab.privacy.at_sites import AtSites
from fedlab.privacy.base import Privacy
from fedlab.privacy.dp.site_level import CentralGaussian
from fedlab.privacy.noise.streams import noise_generator
from fedlab.run.admission import Admission
from fedlab.run.arrivals import Arrivals
from fedlab.run.federate import each_round
from fedlab.run.round import Star, star
from fedlab.strategies.averaging import FedAvg, NotFinite
from trainers import trainer

NAMES = ("zurich", "aachen", "mainz")
SPENT = Spent(1.5, 1e-3, "site", "rdp", "add or remove one site")


class Answers:
    """An engine whose sites answer with these updates."""

    def __init__(self, *updates):
        self.updates = updates

    def train(self, task, state, cohort, states):
        yield from self.updates


def update(site, *, round=4, move=1.0, **settings):
    return Update(**dict(site=site, delta={"w": torch.tensor([move])}, weight=2.0, steps=3, round=round) | settings)


def make_run(*updates, **parts):
    usual = dict(trainer=trainer(), sites=tuple(Site(name=name, train=[]) for name in NAMES), strategy=FedAvg(),
                 privacy=Privacy(), aggregation=Aggregation(), topology=star, engine=Answers(*updates), admission=None,
                 rounds=9, seed=0)
    return Run(**usual | parts)


def one_round(*updates, state=None, **parts):
    run = make_run(*updates, **parts)
    return run.topology(run, state or ServerState(round=4, params={"w": torch.tensor([10.0])}))


@pytest.mark.parametrize("round", [3, 5, 0, None])
def test_an_update_that_answers_another_round_is_refused(round):
    with pytest.raises(PrivacyError, match=f"aachen answers round {round}, not 4"):
        one_round(update("zurich"), update("aachen", round=round))
    kept = one_round(update("zurich"), update("aachen", round=round, move=7.0), admission=Admission())
    assert kept.state.params["w"].item() == 11 and f"answers round {round}" in kept.absent["aachen"]
    assert tuple(kept.sites) == ("zurich",) and kept.absent["mainz"] == "it sent nothing"


@pytest.mark.parametrize(("admitted", "moves"), [(1, False), (2, True), (3, True)])
def test_a_round_counts_from_the_least_number_of_sites_on(admitted, moves):
    updates = [update(name) for name in NAMES[:admitted]]
    found = one_round(*updates, admission=Admission(min_sites=2))
    assert found.state.round == 5 and found.state.params["w"].item() == (11 if moves else 10)
    assert tuple(found.sites) == (NAMES[:admitted] if moves else ())
    assert ("the round was void" in found.absent.get("zurich", "")) is not moves
    assert found.void == (None if moves else "1 updates were received, the round needs 2")


LIMITS = Admission(deadline=2.0, max_weight=5.0, max_steps=7, max_norm=3.0)


@pytest.mark.parametrize(("settings", "reason"), [
    (dict(seconds=2.0, weight=5.0, steps=7, move=3.0), None), (dict(seconds=2.1), "late"), (dict(weight=5.1), "weight"),
    (dict(steps=8), "8 steps"), (dict(move=-3.1), "norm is 3.1"), (dict(steps=7, weight=1.0), None)])
def test_each_rule_of_admission_holds_at_its_limit_and_not_beyond(settings, reason):
    found = LIMITS.refuse(update("zurich", **settings))
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("setting", [
    dict(min_sites=0), dict(max_void=0), dict(min_sites=1.5), dict(deadline=0.0), dict(max_norm=-1.0),
    dict(max_weight=0.0), dict(max_steps=0), dict(max_norm=float("nan"))], ids=repr)
def test_rules_out_of_their_range_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Admission(**setting)


def test_the_mean_of_unequal_sites_and_the_bytes_by_hand():
    found = one_round(update("zurich", weight=1.0, move=4.0), update("aachen", weight=3.0, move=0.0),
                      update("mainz", weight=4.0, move=1.0))
    assert found.state.params["w"].item() == 10 + (4 + 0 + 4) / 8
    assert [numbers["bytes"] for numbers in found.sites.values()] == [4.0] * 3
    assert [numbers["norm"] for numbers in found.sites.values()] == [4.0, 0.0, 1.0]


def test_a_site_answers_once_in_a_round():
    answers = update("zurich"), update("zurich", move=5.0), update("aachen", move=3.0)
    with pytest.raises(ValueError, match=r"an update of 'zurich'; still expected: \['aachen', 'mainz'\]"):
        one_round(*answers)
    kept = one_round(*answers, admission=Admission())
    assert kept.state.params["w"].item() == 12 and tuple(kept.sites) == ("zurich", "aachen")
    assert kept.absent == {"mainz": "it sent nothing under its name; an update of 'zurich' was received and left out"}


def test_what_is_left_out_says_who_is_missed():
    for stray in (Update(site=None, delta={}, weight=1.0), "zurich", SimpleNamespace(site="zurich")):
        with pytest.raises(ValueError, match="received an"):
            one_round(stray)
        kept = one_round(stray, update("mainz"), admission=Admission())
        assert set(kept.absent) == {"zurich", "aachen"} and kept.state.params["w"].item() == 11
        assert "was received and left out" in kept.absent["zurich"]
    for stray, said in ((Update(site=None, delta={}, weight=1.0), "an object that is no update"),
                        (update("x" * 200), f"an update of '{'x' * 106}")):  # 120 characters of it
        kept = one_round(stray, update("mainz"), admission=Admission())
        assert kept.absent["zurich"] == f"it sent nothing under its name; {said} was received and left out"


def test_a_round_goes_on_until_every_site_has_withdrawn():
    gone = [Withdrawal(name, f"{name} has used up its budget") for name in NAMES]
    found = one_round(gone[2], update("aachen", move=3.0), gone[0])
    assert found.state.params["w"].item() == 13 and found.cohort == NAMES and found.void is None
    assert found.absent == {"mainz": gone[2].reason, "zurich": gone[0].reason}
    silent = one_round(gone[0], gone[1])
    assert silent.state.round == 5 and silent.state.params["w"].item() == 10 and "no site of the cohort" in silent.void
    assert silent.absent == {"zurich": gone[0].reason, "aachen": gone[1].reason, "mainz": "it sent nothing"}
    with pytest.raises(PrivacyBudgetExhausted, match=r"no site is left: aachen has .* budget; mainz .*; zurich"):
        one_round(gone[1], gone[2], gone[0])


def test_a_site_that_fails_ends_the_round_or_is_left_out_of_it():
    failed = Failure("aachen", SiteError("aachen", 4, "fit", "out of memory"))
    with pytest.raises(SiteError, match="out of memory"):
        one_round(update("zurich"), failed)
    kept = one_round(update("zurich"), failed, update("mainz", move=4.0), admission=Admission())
    assert "out of memory" in kept.absent["aachen"] and set(kept.absent) == {"aachen"}
    assert kept.state.params["w"].item() == 12.5


def test_sites_at_work_end_with_a_round_that_breaks_off():
    closed = []

    class Watched(Answers):
        def train(self, task, state, cohort, states):
            try:
                yield from self.updates
            finally:
                closed.append(1)

    with pytest.raises(PrivacyError, match="answers round 3"):
        one_round(engine=Watched(update("zurich", round=3), update("aachen")))
    assert closed == [1]


def test_the_record_of_a_round_by_hand():
    found = one_round(update("mainz", move=-3.0, weight=4.0, steps=7, metrics={"loss": 0.5}, seconds=0.5),
                      update("zurich", encoded=3))
    assert found.number == 4 and found.cohort == NAMES and found.void is None and 0 < found.seconds < 60
    assert found.absent == {"aachen": "it sent nothing"} and found.metrics == {} and not found.server_only
    assert found.spent == {"mainz": (), "zurich": ()}
    assert found.sites == {
        "mainz": {"loss": 0.5, "norm": 3.0, "weight": 4.0, "steps": 7.0, "bytes": 4.0, "seconds": 0.5},
        "zurich": {"norm": 1.0, "weight": 2.0, "steps": 3.0, "bytes": 3.0}}


def test_who_sends_weights_to_whom_in_a_star():
    assert star.messages(("b", "a")) == [("server", "b"), ("server", "a"), ("b", "server"), ("a", "server")]


def test_bytes_count_once_for_every_message_of_a_workflow():
    class Often(Star):
        def messages(self, names):
            return [("zurich", "aachen"), ("server", "aachen"), ("zurich", "server"), ("aachen", "server")]

        def metrics(self, state):
            return {"moved": state.params["w"].item()}

    found = one_round(*map(update, NAMES), topology=Often())
    assert {name: numbers["bytes"] for name, numbers in found.sites.items()} == {
        "zurich": 8.0, "aachen": 4.0, "mainz": 4.0}
    assert found.metrics == {"moved": 11.0}


class Stated(Privacy):
    """What it spends is not known here; that it is stated is."""

    units = frozenset({"site"})


def test_a_statement_is_expected_of_the_sites_at_which_a_technique_works():
    some = AtSites(sites=("aachen",), technique=Stated())
    found = one_round(update("aachen"), update("mainz", move=3.0), privacy=some, admission=Admission())
    assert "states nothing as spent" in found.absent["aachen"] and found.state.params["w"].item() == 13
    with pytest.raises(PrivacyError, match="aachen states nothing as spent"):
        one_round(update("aachen"), privacy=some)


def test_why_a_site_failed_stays_there_under_a_guarantee():
    failed = Failure("aachen", SiteError("aachen", 4, "fit", "ValueError: scan of A. Meier"))
    wrong = update("mainz", delta={"v": torch.ones(1)})
    for privacy, told in ((Privacy(), True), (Stated(), False)):
        found = one_round(failed, wrong, privacy=privacy, admission=Admission())
        assert ("Meier" in found.absent["aachen"]) is told and "failed" in found.absent["aachen"]
        assert "other tensors than the model: ['v', 'w']" in found.absent["mainz"]


def test_who_has_withdrawn_is_known_while_a_round_goes_on():
    arrivals = Arrivals(make_run(), state := ServerState(round=4, params={}), make_run().sites)
    assert not list(arrivals.admit([Withdrawal("mainz", "no budget")], state, arrivals.cohort))
    assert arrivals.withdrawn == {"mainz": "no budget"} and not arrivals.present


def test_what_a_refused_update_has_spent_is_spent():
    spent = (SPENT,)
    found = one_round(update("aachen", move=3.0, spent=spent), update("mainz", spent=spent), privacy=Stated(),
                      admission=Admission(max_norm=2.0))
    assert found.spent == {"aachen": spent, "mainz": spent} and "its norm is 3" in found.absent["aachen"]
    assert found.state.params["w"].item() == 11
    unsaid = one_round(update("aachen"), update("mainz", spent=spent), privacy=Stated(), admission=Admission())
    assert set(unsaid.spent) == {"mainz"} and "states nothing as spent" in unsaid.absent["aachen"]


@pytest.mark.parametrize("part", ["moments", "models"])
def test_a_state_that_is_not_finite_is_no_state(part):
    class Overflows(FedAvg):
        def step(self, state, mean):
            bad = {"aachen": {"v": torch.ones(2), "w": torch.tensor([1.0, torch.inf])}, "zurich": {"w": torch.ones(1)}}
            return replace(super().step(state, mean), **{part: bad})

    with pytest.raises(RunError, match="after round 4 the model would hold NaN"):
        one_round(update("zurich"), strategy=Overflows())
    kept = one_round(update("zurich"), strategy=Overflows(), admission=Admission())
    assert kept.state.round == 5 and kept.state.params["w"].item() == 10 and not getattr(kept.state, part)
    assert kept.void == "the model would hold NaN or infinite values" and not kept.sites
    assert kept.absent["zurich"] == f"the round was void: {kept.void}"


class Talks(Answers):
    """Sites that also exchange messages; those of `lost` fail in it."""

    def __init__(self, *updates, lost=()):
        super().__init__(*updates)
        self.lost, self.calls = lost, []

    def train(self, task, state, cohort, states):
        self.calls.append((task, state, [site.name for site in cohort], states))
        yield from [one for one in self.updates if one.site in {site.name for site in cohort}]

    def exchange(self, task, step, inboxes, sites, states):
        names = [site.name for site in sites]
        self.calls.append((task, step, inboxes, names, states))
        return {name: {"mainz": step.encode()} for name in names}, [
            Failure(name, error) for name, error in self.lost if name in names]


def arrivals_of(engine, *, at=(0, 1, 2), **parts):
    run = make_run(engine=engine, task="task", site_states="states", **parts)
    state = ServerState(round=4, params={"w": torch.tensor([10.0])})
    return Arrivals(run, state, [run.sites[k] for k in at]), state


NO_KEY = ("aachen", SiteError("aachen", 0, "exchange", "KeyError"))


def test_who_fails_in_an_exchange_is_left_out_of_what_follows():
    engine = Talks(update("mainz", move=5.0), update("zurich"), lost=[NO_KEY])
    arrivals, state = arrivals_of(engine, admission=Admission())
    sent = arrivals.send("keys", {"mainz": {"zurich": b"?"}})
    assert sent == {name: {"mainz": b"keys"} for name in NAMES}
    assert tuple(site.name for site in arrivals.cohort) == arrivals.names == ("zurich", "mainz")
    arrivals.send("shares", {})
    taken = list(arrivals.train(state, arrivals.cohort))
    assert [one.site for one in taken] == ["mainz", "zurich"] == list(arrivals.names)
    arrivals.send("sums", {})
    assert engine.calls == [
        ("task", "keys", {"mainz": {"zurich": b"?"}}, list(NAMES), "states"),
        ("task", "shares", {}, ["zurich", "mainz"], "states"), ("task", state, ["zurich", "mainz"], "states"),
        ("task", "sums", {}, ["zurich", "mainz"], "states")]
    done = arrivals.close(replace(state, round=5))
    assert done.cohort == ("aachen", "zurich", "mainz") and done.site_states == "states"
    assert done.absent == {"aachen": "site 'aachen' failed in round 4 at stage 'exchange': KeyError"}


def test_an_exchange_in_which_a_site_fails_ends_a_round_without_rules():
    for error, match in ((NO_KEY[1], "failed in round 4"), (PrivacyError("keys of another round"), "another round")):
        arrivals, _ = arrivals_of(Talks(lost=[("aachen", error)]))
        with pytest.raises(type(error), match=match):
            arrivals.send("keys", {})


def test_a_failure_without_words_is_a_failure():
    arrivals, state = arrivals_of(Talks(lost=[("aachen", PrivacyError(""))]), admission=Admission())
    arrivals.send("keys", {})
    assert arrivals.close(state).absent == {"aachen": "it failed"}


def test_a_site_that_leaves_after_its_update_stays_in_the_mean():
    arrivals, state = arrivals_of(Talks(*map(update, NAMES), lost=[NO_KEY]), admission=Admission())
    list(arrivals.train(state, arrivals.cohort))
    with pytest.warns(UserWarning, match="aachen sent its update but left .* after it: .* failed in round 4"):
        arrivals.send("sums", {})
    assert arrivals.present == NAMES and [site.name for site in arrivals.cohort] == ["zurich", "mainz"]
    assert not arrivals.close(state).absent


def test_a_round_that_is_void_before_it_trains_counts_all_of_its_sites_absent():
    arrivals, _ = arrivals_of(Talks(lost=[NO_KEY]), admission=Admission(), at=(2, 1))
    arrivals.send("keys", {})
    unmoved = arrivals.void(SumFailed("too few keys"))
    done = arrivals.close(unmoved)
    assert unmoved.round == 5 and unmoved.params["w"].item() == 10 and done.void == "too few keys"
    assert done.cohort == ("aachen", "mainz") and done.absent["mainz"] == "the round was void: too few keys"
    assert "KeyError" in done.absent["aachen"]
    without_rules, _ = arrivals_of(Talks())
    with pytest.raises(SumFailed):
        without_rules.void(SumFailed("too few keys"))


def test_sites_may_be_asked_one_after_the_other():
    arrivals, state = arrivals_of(Talks(*map(update, NAMES)))
    other = replace(state, params={"w": torch.tensor([1.0])})
    for k, shown in ((2, state), (0, other)):
        assert [one.site for one in arrivals.train(shown, [arrivals.cohort[k]])] == [NAMES[k]]
    arrivals.charge((SPENT,))
    assert arrivals.released and arrivals.took_part == Cohort(4, ("mainz", "zurich"), 3, 1.0)
    done = arrivals.close(replace(state, round=5))
    assert done.cohort == ("mainz", "zurich") and done.spent["server"] == (SPENT,)
    assert arrivals.run.engine.calls[1] == ("task", other, ["zurich"], "states")


def test_an_update_is_checked_against_what_its_site_was_shown():
    shape = {"mainz": {"w": torch.zeros(3), "count": torch.tensor(3)}}
    state = ServerState(round=4, params={"w": torch.zeros(2)}, buffers={"count": torch.tensor(1)}, models=shape)
    arrivals = Arrivals(make_run(), state, make_run().sites)
    right = update("mainz", delta={"w": torch.ones(3)}, buffers={"count": torch.tensor(5)})
    assert list(arrivals.admit([right], state, arrivals.cohort)) == [right]
    for wrong in (replace(right, buffers={}), replace(right, buffers={"count": torch.tensor(0.5)})):
        with pytest.raises(PrivacyError, match="the update of mainz has"):
            list(Arrivals(make_run(), state, make_run().sites).admit([wrong], state, arrivals.cohort))


class AtServer(Privacy):
    def release(self, mean, cohort, state, rng):
        return mean


def test_numbers_that_noise_at_the_server_hides_are_for_the_server_only():
    for charged, void, hidden in ((True, False, {"seconds", "sites"}), (False, True, {"seconds", "sites"}),
                                  (False, False, {"seconds"})):
        arrivals, state = arrivals_of(Talks(update("mainz")), privacy=AtServer(), admission=Admission())
        list(arrivals.train(state, arrivals.cohort))
        arrivals.charge((SPENT,) if charged else ())
        moved = arrivals.void(SumFailed("no sum")) if void else state
        assert arrivals.close(moved).server_only == hidden


class Doubles(Aggregation):
    """Agrees on keys before the training, and doubles the mean after it."""

    def __init__(self):
        self._calls = []

    def before(self, exchange):
        self._calls.append(("before", exchange))
        return {"keys": exchange.names}

    def after(self, mean, keys, exchange):
        self._calls.append(("after", keys, exchange))
        return mean.map(lambda t: 2 * t)


def test_every_part_of_a_round_is_given_what_it_works_with():
    aggregation, engine = Doubles(), Talks(update("mainz", move=5.0), update("aachen"))
    found = one_round(engine=engine, aggregation=aggregation, task="task", site_states="states")
    (_, exchange), (_, keys, again) = aggregation._calls
    assert isinstance(exchange, Arrivals) and again is exchange and keys == {"keys": NAMES}
    (task, state, names, states), = engine.calls
    assert (task, names, states, state.round, state.params["w"].item()) == ("task", list(NAMES), "states", 4, 10)
    assert found.state.params["w"].item() == 10 + 2 * 3


def test_buffers_of_a_round_are_the_mean_in_the_types_of_the_model():
    before = ServerState(round=4, params={"w": torch.tensor([10.0])}, buffers={
        "mean": torch.tensor([1.0]), "count": torch.tensor(7), "half": torch.tensor([1.0], dtype=torch.float16)})
    sent = [update(name, weight=weight, buffers={"mean": torch.tensor([mean]), "count": torch.tensor(count),
                                                 "half": torch.tensor([mean], dtype=torch.float16)})
            for name, weight, mean, count in (("zurich", 1.0, 4.0, 3), ("mainz", 3.0, 8.0, 9))]
    found = one_round(*sent, state=before).state.buffers
    assert (found["mean"].item(), found["count"].item(), found["half"].item()) == ((4 + 24) / 4, 9, 7)
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in before.buffers.items()}


# Techniques at the server


class Adds(Privacy):
    """Adds 2 at the server, and notes what it saw."""

    def __init__(self):
        self._cohorts, self._draws, self._means = [], [], []

    def release(self, mean, cohort, state, rng):
        self._cohorts.append(cohort)
        self._means.append(mean)
        self._draws.append(float(torch.rand((), generator=rng)))
        state.own["calls"] = torch.tensor(len(self._cohorts))
        return mean.map(lambda t: t + 2)


def at_server(*updates, privacy=None, double=False, **parts):
    privacy, start = privacy or Adds(), {"w": torch.tensor([10.0], dtype=torch.float64 if double else torch.float32)}
    initial = SimpleNamespace(initial=lambda: {"w": torch.tensor([7.0])})
    return privacy, one_round(*updates, privacy=privacy, trainer=initial, state=ServerState(round=4, params=start),
                              **parts)


def test_a_technique_at_the_server_sees_the_sites_in_the_mean():
    before = ServerState(round=4, params={"w": torch.tensor([10.0])})
    technique = Adds()
    found = one_round(update("mainz", move=5.0), update("zurich"), Withdrawal("aachen", "no budget"), state=before,
                      privacy=technique, strategy=FedAvg(sample=0.999))
    assert technique._cohorts == [Cohort(4, ("mainz", "zurich"), 3, 0.999)]
    assert found.state.params["w"].item() == 10 + 3 + 2
    assert found.state.of("privacy").own["calls"] == 1 and not before.namespaces


def test_noise_hides_that_no_site_took_part():
    for admission in (None, Admission()):
        technique, found = at_server(admission=admission)
        assert found.state.params["w"].item() == 12 and found.state.round == 5 and found.void is None
        assert technique._cohorts == [Cohort(4, (), 3, 1.0)]
        mean, = technique._means
        assert (mean.site, mean.weight, mean.steps) == ("mean", 1.0, 0) and mean.delta["w"].dtype == torch.float64


def test_noise_hides_that_the_updates_had_no_mean():
    huge = [update(name, move=0.0, delta={"w": torch.tensor([1.5e308], dtype=torch.float64)}) for name in NAMES]
    technique, found = at_server(*huge, admission=Admission(), double=True)
    assert found.state.params["w"].item() == 12 and found.state.round == 5 and "NaN or infinite" in found.void
    assert technique._cohorts == [Cohort(4, (), 3, 1.0)] and not found.sites


def test_a_mean_is_released_once_though_the_step_fails():
    class Fails(FedAvg):
        def step(self, state, mean):
            raise NotFinite("the model would become NaN")

    technique, found = at_server(update("zurich"), admission=Admission(), strategy=Fails())
    assert found.state.params["w"].item() == 10 and found.state.round == 5 and len(technique._cohorts) == 1
    with pytest.raises(NotFinite):
        at_server(update("zurich"), strategy=Fails())


def test_noise_at_the_server_depends_on_the_seed_the_round_and_the_mean():
    def draw(move=1.0, round=4, seed=0):
        technique = Adds()
        one_round(update("zurich", move=move, round=round), privacy=technique, seed=seed,
                  state=ServerState(round=round, params={"w": torch.tensor([10.0])}))
        return technique._draws

    draws = [draw(), draw(move=2.0), draw(round=3), draw(seed=1)]
    assert draw() == draws[0] and len(set(map(tuple, draws))) == 4
    mean = weights_sha256({"w": torch.tensor([2.0], dtype=torch.float64)})
    assert draws[1] == [float(torch.rand((), generator=noise_generator(0, "release", 4, mean)))]


class Charges(Privacy):
    def release(self, mean, cohort, state, rng):
        ledger = Ledger(state)
        ledger.charge(Gaussian(noise_multiplier=2.0), terms=Terms(unit="site", delta=1e-2, adjacency="any"))
        return replace(mean, spent=ledger.spent())


def test_noise_on_another_mean_is_charged_anew(tmp_path):
    counts = []
    for move in (1.0, 1.0, 2.0):
        engine = Answers(update("zurich", move=move, round=0))
        engine.ledgers = tmp_path
        found = one_round(engine=engine, privacy=Charges(), state=ServerState(
            round=0, params={"w": torch.tensor([10.0])}))
        counts.append(len(Ledger(found.state).releases()))
        assert found.spent["server"] == Ledger(found.state).spent() and found.spent["server"][0].epsilon > 0
    assert counts == [1, 1, 2]


@pytest.mark.parametrize("secure", [False, True])
def test_noise_at_the_server_differs_from_round_to_round_where_no_site_takes_part(secure):
    """Equal noise in two rounds would cancel in the difference of two models."""
    central = CentralGaussian(clip=1.0, noise_multiplier=1.0, delta=1e-3, secure_mode=secure)
    strategy = FedAvg(weights="uniform", sample=1e-9)
    one = trainer()
    first, second = each_round(one, blob_sites((1, 1)), privacy=central, strategy=strategy, rounds=2)
    assert not first.sites and not second.sites
    start = one.initial()["last.weight"].double()
    moves = first.state.params["last.weight"].double() - start, second.state.params["last.weight"].double() - start
    correlation = torch.corrcoef(torch.stack([moves[0].flatten(), (moves[1] - moves[0]).flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.99
