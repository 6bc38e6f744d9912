"""What the frame does for every technique: ledgers, budgets, refusals, messages between sites."""

from __future__ import annotations

import pytest
import torch

from cohorts import blob_sites
from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError
from fedlab.core.weights import weights_sha256
from fedlab.privacy.accounting.ledger import Gaussian, Ledger, Terms, epsilon_of
from fedlab.privacy.base import Privacy
from fedlab.run.federate import each_round, federate
from fedlab.run.local import Local
from fedlab.strategies import FedAvg
from trainers import trainer

TERMS = Terms(unit="site", delta=1e-2, adjacency="any two updates of a site")
STEP = Gaussian(noise_multiplier=2.0)


class Noise(Privacy):
    """The least that a technique with a guarantee does."""

    units = frozenset({"site"})

    def __init__(self, *, max_epsilon=None):
        self.max_epsilon = max_epsilon

    def protect(self, update, memory, rng):
        Ledger(memory).charge(STEP, terms=TERMS, max_epsilon=self.max_epsilon)
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
    with pytest.raises(PrivacyBudgetExhausted, match="site-0 takes no part from round 2 on"):
        next(run)


def test_one_site_withdraws_and_the_others_go_on():
    class Uneven(Noise):
        def protect(self, update, memory, rng):
            self.max_epsilon = 0.1 if update.site == "site-1" else None
            return super().protect(update, memory, rng)

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


def test_a_site_without_its_memory_or_its_ledger_refuses():
    engine = Local()
    run = each_round(trainer(), blob_sites(), privacy=Noise(), engine=engine, rounds=4)
    state = next(run).state
    with pytest.raises(PrivacyError, match=r"no memory of the rounds before.*nothing was sent"):
        next(each_round(trainer(), blob_sites(), privacy=Noise(), state=state, rounds=4))
    del engine.memory["site-0"]["ledger"]
    with pytest.raises(PrivacyError, match=r"its ledger is missing.*nothing was sent"):
        next(run)


def test_a_ledger_of_another_site_is_refused():
    engine = Local()
    run = each_round(trainer(), blob_sites(), privacy=Noise(), engine=engine, rounds=4)
    next(run)
    engine.memory["site-0"], engine.memory["site-1"] = engine.memory["site-1"], engine.memory["site-0"]
    with pytest.raises(PrivacyError, match="another site"):
        next(run)


def test_a_promise_without_a_charge_is_refused():
    class Promise(Privacy):
        units = frozenset({"patient"})

    with pytest.raises(PrivacyError, match="entered nothing into the ledger"):
        next(each_round(trainer(), blob_sites(), privacy=Promise()))


def test_other_weights_under_the_same_round_get_other_noise_and_are_charged():
    engine = Local()
    one = trainer()
    first = next(each_round(one, blob_sites((1,)), privacy=Noise(), engine=engine))
    again = {name: p + 0.1 for name, p in one.initial().items()}
    state = FedAvg().begin(again)
    next(each_round(one, blob_sites((1,)), privacy=Noise(), engine=engine, state=state))
    assert len(Ledger(engine.memory["site-0"]).releases()) == 2
    assert first.spent["site-0"][0].epsilon < Ledger(engine.memory["site-0"]).spent()[0].epsilon


def test_noise_at_the_server_sees_the_cohort_and_keeps_its_memory():
    seen = []

    class Server(Privacy):
        def release(self, mean, cohort, memory, rng):
            count = memory.get("broadcast", {"rounds": torch.zeros(())})["rounds"] + 1
            memory["broadcast"] = {"rounds": count}
            seen.append((cohort.round, len(cohort), cohort.sites, cohort.sample, float(count)))
            return mean

        def equip(self, kit, site, memory):
            seen.append(float(memory["broadcast"]["rounds"]) if memory["broadcast"] else None)
            return kit

    list(each_round(trainer(), blob_sites((1, 1)), privacy=Server(), rounds=2))
    assert seen == [None, None, (0, 2, 2, 1.0, 1.0), 1.0, 1.0, (1, 2, 2, 1.0, 2.0)]


def test_a_round_without_any_site_still_releases():
    class Server(Privacy):
        def release(self, mean, cohort, memory, rng):
            return mean.map(lambda t: t + 1 / (cohort.sites * cohort.sample))

    one = trainer()
    run = each_round(one, blob_sites((1, 1)), privacy=Server(), strategy=FedAvg(sample=0.01), rounds=1)
    finished = next(run)
    assert finished.cohort == () and not finished.sites
    for name, p in finished.state.params.items():
        torch.testing.assert_close(p, one.initial()[name] + 50)


def test_sites_are_sampled_independently_with_the_stated_probability():
    sites = blob_sites((1, 1, 1))
    taken = [len(FedAvg(sample=0.3).select(sites, torch.Generator().manual_seed(k))) for k in range(3000)]
    share = sum(taken) / 9000
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / 9000) ** 0.5  # p = 6e-5 for a right sampler
    with pytest.raises(ValueError, match="probability"):
        FedAvg(sample=0.0)


def test_messages_between_sites_go_by_way_of_the_server():
    log = []

    class Talk(Privacy):
        before, after = ("hello", "receive"), ("bye",)

        def at_site(self, step, site, inbox, memory):
            log.append((step, site, {k: v.decode() for k, v in inbox.items()}))
            others = {"site-0", "site-1"} - {site}
            return {other: f"{step} from {site}".encode() for other in others} if step == "hello" else {
                "server": b"x"} if step == "bye" else {}

        def at_server(self, step, sent, memory, arrived):
            if step == "trained":
                return {site: {"server": " ".join(arrived).encode()} for site in arrived}
            if step == "bye":
                memory["_answers"] = {site: torch.tensor(len(m["server"])) for site, m in sent.items()}
            return super().at_server(step, sent, memory, arrived)

        def release(self, mean, cohort, memory, rng):
            log.append({k: int(v) for k, v in memory["_answers"].items()})
            return mean

    finished = next(each_round(trainer(), blob_sites((1, 1)), privacy=Privacy() + Talk()))
    assert log == [("hello", "site-0", {}), ("hello", "site-1", {}),
                   ("receive", "site-0", {"site-1": "hello from site-1"}),
                   ("receive", "site-1", {"site-0": "hello from site-0"}),
                   ("bye", "site-0", {"server": "site-0 site-1"}), ("bye", "site-1", {"server": "site-0 site-1"}),
                   {"site-0": 1, "site-1": 1}]
    assert "_answers" not in finished.state.memory
    with pytest.raises(ValueError, match="only one technique"):
        Talk() + Talk()
