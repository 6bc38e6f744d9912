"""What the frame does for every technique: ledgers, budgets, refusals, messages between sites."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from chance import SIGMAS, seeded
from cohorts import blob_sites
from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError, RunError
from fedlab.core.types import ServerState, SiteState
from fedlab.core.weights import weights_sha256
from fedlab.faults.sites import Faulty
from fedlab.privacy.accounting.ledger import Gaussian, Ledger, Terms, epsilon_of
from fedlab.privacy.accounting.ledger_file import LedgerFile
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy
from fedlab.run.admission import Admission
from fedlab.run.federate import each_round, federate, make_run
from fedlab.run.local import Local
from fedlab.run.server_ledger import SERVER, server_ledger, stated
from fedlab.strategies import FedAvg
from trainers import trainer

TERMS = Terms(unit="site", delta=1e-2, adjacency="any two updates of a site")
STEP = Gaussian(noise_multiplier=2.0)


class Noise(Privacy):
    """The least that a technique with a guarantee does."""

    units = frozenset({"site"})

    def __init__(self, *, max_epsilon=None):
        self.max_epsilon = max_epsilon

    def protect(self, update, state, rng):
        Ledger(state).charge(STEP, terms=TERMS, max_epsilon=self.max_epsilon)
        scale = min(1.0, 0.05 / update.norm())
        return update.map(lambda t: t * scale + 0.2 * torch.randn(t.shape, generator=rng))


def test_epsilon_is_stated_every_round_and_equals_the_closed_form():
    history = federate(trainer(), blob_sites(), privacy=Noise(), rounds=3, progress=False)
    table = history.spent()
    assert list(table.xs("site-0", level="site")["epsilon"]) == [
        epsilon_of([STEP] * n, delta=1e-2) for n in (1, 2, 3)]
    assert set(table["adjacency"]) == {TERMS.adjacency} and set(table["delta"]) == {1e-2}
    assert "per site" in history.guarantee() and "rdp accountant" in repr(history)
    assert "loss" not in history.table()  # no guarantee covers it


def test_without_a_guarantee_the_run_says_so():
    history = federate(trainer(), blob_sites(), rounds=1, progress=False)
    assert history.spent().empty and "no formal guarantee" in repr(history)


def test_a_site_with_a_budget_withdraws_in_time_and_the_run_ends_when_none_is_left():
    limit = epsilon_of([STEP] * 2, delta=1e-2)
    history = federate(trainer(), blob_sites(), privacy=Noise(max_epsilon=limit), rounds=5, progress=False)
    assert len(history.records) == 2 and "no site is left" in history.stopped and "budget" in repr(history)
    assert history.spent()["epsilon"].max() == limit
    run = each_round(trainer(), blob_sites(), privacy=Noise(max_epsilon=limit), rounds=5)
    next(run), next(run)
    with pytest.raises(PrivacyBudgetExhausted, match="site-0 takes no part in round 2"):
        next(run)


def test_one_site_withdraws_and_the_others_go_on():
    class Uneven(Noise):
        def protect(self, update, state, rng):
            self.max_epsilon = 0.1 if update.site == "site-1" else None
            return super().protect(update, state, rng)

    finished = next(each_round(trainer(), blob_sites(), privacy=Uneven()))
    assert list(finished.sites) == ["site-0"] and "budget is ε = 0.1" in finished.absent["site-1"]


def test_six_rounds_with_crashes_equal_six_without(tmp_path):
    whole = federate(trainer(), blob_sites(), privacy=Noise(), rounds=6, progress=False)

    def crash(finished):
        if finished.number in (0, 2, 3):
            raise KeyboardInterrupt

    for _ in range(4):
        try:
            history = federate(trainer(), blob_sites(), privacy=Noise(), rounds=6, progress=False,
                               checkpoint=tmp_path / "run", on_round=crash)
        except KeyboardInterrupt:
            continue
    assert weights_sha256(history.state.params) == weights_sha256(whole.state.params)
    assert history.spent().equals(whole.spent())


def test_a_site_without_its_state_or_its_ledger_refuses():
    run = each_round(trainer(), blob_sites(), privacy=Noise(), rounds=4)
    first = next(run)
    with pytest.raises(PrivacyError, match=r"no state from the rounds before.*nothing was sent"):
        next(each_round(trainer(), blob_sites(), privacy=Noise(), state=first.state, rounds=4))
    kept = first.site_states["site-0"]
    kept.ledger.clear()
    first.site_states.save("site-0", kept)
    with pytest.raises(PrivacyError, match=r"its ledger is missing.*nothing was sent"):
        next(run)


def test_a_state_that_is_lost_or_damaged_on_disk_is_refused():
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9])):
        for admission in (None, Admission()):
            run = each_round(trainer(), blob_sites(), privacy=Noise(), rounds=2, admission=admission)
            damage(next(run).site_states.path("site-0"))
            if admission is None:
                with pytest.raises(RunError, match="restore it from a copy"):
                    next(run)
            else:  # the others go on
                finished = next(run)
                assert list(finished.sites) == ["site-1"] and "restore it from a copy" in finished.absent["site-0"]


def test_a_ledger_of_another_site_is_refused():
    run = each_round(trainer(), blob_sites(), privacy=Noise(), rounds=4)
    states = next(run).site_states
    one, other = states["site-0"], states["site-1"]
    states.save("site-0", other)
    states.save("site-1", one)
    with pytest.raises(PrivacyError, match="another site"):
        next(run)


def test_a_promise_without_a_charge_is_refused():
    class Promise(Privacy):
        units = frozenset({"patient"})

    with pytest.raises(PrivacyError, match="entered nothing into the ledger"):
        next(each_round(trainer(), blob_sites(), privacy=Promise()))


def test_other_weights_under_the_same_round_get_other_noise_and_are_charged():
    one = trainer()
    first = next(each_round(one, blob_sites((1,)), privacy=Noise()))
    again = {name: p + 0.1 for name, p in one.initial().items()}
    other = next(each_round(one, blob_sites((1,)), privacy=Noise(), state=FedAvg().begin(again),
                            site_states=first.site_states))
    assert len(Ledger(other.site_states["site-0"]).releases()) == 2
    assert first.spent["site-0"][0].epsilon < Ledger(other.site_states["site-0"]).spent()[0].epsilon


def test_noise_at_the_server_sees_the_cohort_and_keeps_its_state():
    seen = []

    class Server(Privacy):
        def release(self, mean, cohort, state, rng):
            state.own["rounds"] = count = state.own.get("rounds", torch.zeros(())) + 1
            state.broadcast["rounds"] = count
            seen.append((cohort.round, len(cohort), cohort.sites, cohort.sample, float(count)))
            return mean

        def equip(self, kit, site, state):
            assert not state.own  # what the server keeps for itself is not shown to sites
            seen.append(float(state.broadcast["rounds"]) if state.broadcast else None)
            return kit

    list(each_round(trainer(), blob_sites((1, 1)), privacy=Server(), rounds=2))
    assert seen == [None, None, (0, 2, 2, 1.0, 1.0), 1.0, 1.0, (1, 2, 2, 1.0, 2.0)]


def test_each_technique_of_a_sum_has_a_namespace_of_its_own():
    class Counts(Privacy):
        def __init__(self, *, by):
            self.by = by

        def protect(self, update, state, rng):
            state.own["count"] = state.own.get("count", torch.zeros(())) + self.by
            return update

        def release(self, mean, cohort, state, rng):
            state.own["count"] = state.own.get("count", torch.zeros(())) + self.by
            return mean

    *_, last = each_round(trainer(), blob_sites((1, 1)), privacy=Counts(by=1) + Counts(by=10), rounds=3)
    for kept in (last.site_states["site-1"].namespaces, last.state.namespaces):
        assert sorted(float(slots["count"]) for slots in kept.values() if "count" in slots) == [3, 30]


def test_a_round_without_any_site_still_releases():
    class Server(Privacy):
        def release(self, mean, cohort, state, rng):
            return mean.map(lambda t: t + 1 / (cohort.sites * cohort.sample))

    one = trainer()
    run = each_round(one, blob_sites((1, 1)), privacy=Server(), strategy=FedAvg(sample=0.01), rounds=1)
    finished = next(run)
    assert finished.cohort == () and not finished.sites
    for name, p in finished.state.params.items():
        torch.testing.assert_close(p, one.initial()[name] + 50)


@pytest.mark.chance
def test_sites_are_sampled_independently_with_the_stated_probability():
    sites = blob_sites((1, 1, 1))
    taken = [len(FedAvg(sample=0.3).select(sites, torch.Generator().manual_seed(seeded(k)))) for k in range(3000)]
    share = sum(taken) / 9000
    assert abs(share - 0.3) < SIGMAS * (0.3 * 0.7 / 9000) ** 0.5
    with pytest.raises(ValueError, match="sample is above 0 and at most 1"):
        FedAvg(sample=0.0)


class Talk(Aggregation):
    """Sites greet each other before training and take leave after it."""

    steps = ("hello", "receive", "bye")

    def __init__(self, *, silent=()):
        self.silent = silent
        self._log = []

    def before(self, exchange):
        said = exchange.send("hello", {})
        inboxes = {site: {other: box[site] for other, box in said.items() if site in box} for site in exchange.names}
        exchange.send("receive", inboxes)
        return {"met": list(exchange.names)}

    def answer(self, step, site, inbox, state):
        if (step, site) in self.silent:
            raise PrivacyError(f"{site} says nothing")
        self._log.append((step, site, {k: v.decode() for k, v in inbox.items()}))
        if step == "hello":
            state.secrets["word"] = f"{step} from {site}"
            return {other: state.secrets["word"].encode() for other in {"site-0", "site-1"} - {site}}
        return {"server": state.secrets["word"].encode()} if step == "bye" else {}

    def mask(self, update, state, rng):
        self._log.append(("mask", update.site, state.secrets["word"]))
        return update

    def after(self, mean, keys, exchange):
        names = " ".join(exchange.names).encode()
        answers = exchange.send("bye", {site: {"server": names} for site in exchange.names})
        self._log.append((keys, {site: m["server"].decode() for site, m in answers.items()}))
        return mean


def test_messages_between_sites_go_by_way_of_the_server():
    talk = Talk()
    run = each_round(trainer(), blob_sites((1, 1)), aggregation=talk, rounds=2)
    finished = next(run)
    once = [("hello", "site-0", {}), ("hello", "site-1", {}),
            ("receive", "site-0", {"site-1": "hello from site-1"}),
            ("receive", "site-1", {"site-0": "hello from site-0"}),
            ("mask", "site-0", "hello from site-0"), ("mask", "site-1", "hello from site-1"),
            ("bye", "site-0", {"server": "site-0 site-1"}), ("bye", "site-1", {"server": "site-0 site-1"}),
            ({"met": ["site-0", "site-1"]}, {"site-0": "hello from site-0", "site-1": "hello from site-1"})]
    assert talk._log == once
    # Keys live in the process for the round only: neither a site's state nor the server's holds them.
    for kept in (finished.site_states["site-0"], pickle.loads(pickle.dumps(finished.site_states["site-0"]))):
        assert not kept.secrets and "aggregation" not in kept.namespaces
    assert not finished.state.namespaces.get("aggregation")
    assert not any(b"hello from" in path.read_bytes() for path in finished.site_states.folder.iterdir())
    next(run)
    assert talk._log == once * 2


def test_a_site_that_fails_in_an_exchange_ends_the_run_or_is_left_out_of_its_round():
    for step in ("hello", "receive", "bye"):
        with pytest.raises(PrivacyError, match="site-1 says nothing"):
            next(each_round(trainer(), blob_sites((1, 1)), aggregation=Talk(silent=[(step, "site-1")])))
    for step in ("hello", "receive"):  # before training: it is not asked to train
        talk = Talk(silent=[(step, "site-1")])
        finished = next(each_round(trainer(), blob_sites((1, 1)), aggregation=talk, admission=Admission()))
        assert list(finished.sites) == ["site-0"] and finished.absent == {"site-1": "site-1 says nothing"}
        assert not any(entry[:2] == ("mask", "site-1") for entry in talk._log)
    talk = Talk(silent=[("bye", "site-1")])  # its update is in the mean already
    with pytest.warns(UserWarning, match="site-1 sent its update but left the exchange of messages after it"):
        finished = next(each_round(trainer(), blob_sites((1, 1)), aggregation=talk, admission=Admission()))
    assert list(finished.sites) == ["site-0", "site-1"] and not finished.absent
    assert talk._log[-1] == ({"met": ["site-0", "site-1"]}, {"site-0": "hello from site-0"})


def test_an_aggregation_of_no_messages_refuses_them():
    with pytest.raises(PrivacyError, match="exchanges no messages"):
        Aggregation().answer("hello", "site-0", {}, SiteState())


def test_an_aggregation_is_no_technique():
    for make in (lambda: Noise() + Talk(), lambda: make_run(trainer(), blob_sites(), privacy=Talk())):
        with pytest.raises((TypeError, ValueError), match="aggregation="):
            make()
    with pytest.raises(ValueError, match="privacy="):
        make_run(trainer(), blob_sites(), aggregation=Noise())


def test_under_a_guarantee_nothing_leaves_beside_values():
    class Kept(Noise):
        """Noise on tensors of one dimension; the others times 0, which leaves -0.0 where the update was negative."""

        def protect(self, update, state, rng):
            out = super().protect(update, state, rng)
            delta = {name: torch.stack([update.delta[name], noisy])[1] if noisy.dim() < 2 else update.delta[name] * 0
                     for name, noisy in reversed(out.delta.items())}
            delta[next(iter(delta))].raw = update
            assert any(bool(torch.signbit(t).any()) for t in delta.values() if t.dim() > 1)
            return replace(out, delta=delta)

    class Sees(FedAvg):
        def combine(self, updates):
            seen.extend(updates := list(updates))
            return super().combine(updates)

    seen, model = [], trainer()
    next(each_round(model, blob_sites(), privacy=Kept(), strategy=Sees()))
    for update in seen:
        assert list(update.delta) == list(model.initial())
        for t in update.delta.values():
            assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
            assert t.is_contiguous() and not vars(t) and (t.dim() < 2 or not torch.signbit(t).any())


class AtServer(Privacy):
    """Noise at the server, which states as spent what `says` makes of the ledger's statement."""

    says = staticmethod(lambda spent: spent)

    def release(self, mean, cohort, state, rng):
        ledger = Ledger(state)
        ledger.charge(STEP, terms=TERMS)
        return replace(mean, spent=self.says(ledger.spent()))


def test_the_server_states_what_its_ledger_holds_or_the_round_ends():
    assert federate(trainer(), blob_sites(), privacy=AtServer(), rounds=2, progress=False).spent()[
        "epsilon"].max() == epsilon_of([STEP] * 2, delta=1e-2)
    for says, expected in ((lambda spent: tuple(s._replace(epsilon=s.epsilon / 2) for s in spent), "ledger it is ε"),
                           (lambda spent: (TERMS.spent([STEP]),), "ledger it is ε"),  # one round, without the remark
                           (lambda spent: tuple(s._replace(unit="patient") for s in spent), "ledger it is nothing")):
        technique = AtServer()
        technique.says = says
        with pytest.raises(PrivacyError, match=expected):
            federate(trainer(), blob_sites(), privacy=technique, rounds=2, progress=False)


def test_the_server_may_state_more_than_its_ledger_holds_and_nothing_else():
    state = ServerState(round=0, params={})
    ledger = Ledger.open(state, site=SERVER, round=0, stream="x")
    ledger.charge(STEP, terms=TERMS)
    proven, = ledger.spent()
    for fine in ((), (proven,), (proven._replace(epsilon=2 * proven.epsilon),),
                 (proven._replace(epsilon=proven.epsilon * (1 - 1e-10)),)):
        assert stated(fine, state) == fine
    nothing = ServerState(round=0, params={})
    Ledger.open(nothing, site=SERVER, round=0, stream="x").charge(Gaussian(noise_multiplier=1e9), terms=TERMS)
    zero, = Ledger(nothing).spent()
    assert zero.epsilon == 0 and stated((zero,), nothing) == (zero,)
    for change in (dict(epsilon=proven.epsilon * (1 - 1e-8)), dict(epsilon=math.nan), dict(delta=1e-3),
                   dict(accountant="prv"), dict(adjacency="any"), dict(repeats=not proven.repeats)):
        with pytest.raises(PrivacyError, match="by the server's ledger it is ε"):
            stated((proven, proven._replace(**change)), state)
    for other in (ServerState(round=0, params={}), state):
        with pytest.raises(PrivacyError, match="by the server's ledger it is nothing"):
            stated((proven._replace(unit="patient"),), other)


def test_the_ledger_of_the_server_lies_beside_those_of_the_sites(tmp_path):
    """Of an engine around the one that names the folder; a mean that is noised again is charged once."""
    def release(mean_sha256, *, round=0, seed=3, charge=True, at_server=True, state=None):
        run = SimpleNamespace(seed=seed, privacy=SimpleNamespace(works_at_server=at_server),
                              engine=Faulty(engine=Faulty(engine=Local(ledgers=tmp_path), faults=[]), faults=[]))
        state = state or ServerState(round=round, params={})
        with server_ledger(run, state, mean_sha256):
            if charge:
                Ledger(state).charge(STEP, terms=TERMS)
        return state

    def known():
        return len(LedgerFile(tmp_path, "server").read().releases())

    assert not release("a", charge=False).ledger and not list(tmp_path.glob("*.json"))
    assert not release("a", charge=False, at_server=False).ledger
    first = release("a")
    assert known() == len(Ledger(first).releases()) == 1 and (tmp_path / "server.ledger.json").is_file()
    counts = []
    for changes in ({}, {"mean_sha256": "b"}, {"seed": 4}, {"seed": 4}):
        release(**{"mean_sha256": "a"} | changes)
        counts.append(known())
    assert counts == [1, 2, 3, 3]
    release("a", state=replace(first, round=1))
    assert known() == 4
    assert not release("a", round=1, charge=False).ledger  # its state is lost: a technique that charges refuses
    with pytest.raises(ZeroDivisionError):
        run = SimpleNamespace(seed=9, privacy=SimpleNamespace(works_at_server=True), engine=Local(ledgers=tmp_path))
        with server_ledger(run, state := ServerState(round=0, params={}), "c"):
            Ledger(state).charge(STEP, terms=TERMS)
            raise ZeroDivisionError
    assert known() == 4
    with pytest.raises(PrivacyError, match=r"say Plain\(ledgers="):
        run.engine = type("Plain", (), {})()
        with server_ledger(run, first, "d"):
            pass
