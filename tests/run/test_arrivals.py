"""What the server takes in and refuses in a round, of sites that answer as they please."""

from __future__ import annotations

import pytest
import torch

from cohorts import blob_sites
from fedlab.core.errors import PrivacyError
from fedlab.core.protocols import Run
from fedlab.core.types import ServerState, Site, Update
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy
from fedlab.privacy.dp.site_level import CentralGaussian
from fedlab.run.admission import Admission
from fedlab.run.federate import each_round
from fedlab.run.round import star
from fedlab.strategies.averaging import FedAvg
from trainers import trainer

NAMES = ("zurich", "aachen", "mainz")


class Answers:
    """An engine whose sites answer with these updates."""

    def __init__(self, *updates):
        self.updates = updates

    def train(self, task, state, cohort, states):
        yield from self.updates


def update(site, *, round=4, move=1.0, **settings):
    return Update(**dict(site=site, delta={"w": torch.tensor([move])}, weight=2.0, steps=3, round=round) | settings)


def one_round(*updates, admission=None):
    run = Run(trainer=trainer(), sites=tuple(Site(name=name, train=[]) for name in NAMES), strategy=FedAvg(),
              privacy=Privacy(), aggregation=Aggregation(), topology=star, engine=Answers(*updates),
              admission=admission, rounds=9, seed=0)
    return star(run, ServerState(round=4, params={"w": torch.tensor([10.0])}))


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


LIMITS = Admission(deadline=2.0, max_weight=5.0, max_steps=7, max_norm=3.0)


@pytest.mark.parametrize(("settings", "reason"), [
    (dict(seconds=2.0, weight=5.0, steps=7, move=3.0), None), (dict(seconds=2.1), "late"), (dict(weight=5.1), "weight"),
    (dict(steps=8), "8 steps"), (dict(move=-3.1), "norm is 3.1"), (dict(steps=7, weight=1.0), None)])
def test_each_rule_of_admission_holds_at_its_limit_and_not_beyond(settings, reason):
    found = LIMITS.refuse(update("zurich", **settings))
    assert found is None if reason is None else reason in found


def test_the_mean_of_unequal_sites_and_the_bytes_by_hand():
    found = one_round(update("zurich", weight=1.0, move=4.0), update("aachen", weight=3.0, move=0.0),
                      update("mainz", weight=4.0, move=1.0))
    assert found.state.params["w"].item() == 10 + (4 + 0 + 4) / 8
    assert [numbers["bytes"] for numbers in found.sites.values()] == [4.0] * 3
    assert [numbers["norm"] for numbers in found.sites.values()] == [4.0, 0.0, 1.0]


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
