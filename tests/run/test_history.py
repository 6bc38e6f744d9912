"""The record of a run against numbers by hand, of sites that differ in everything."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import irregular
from fedlab.core.types import REPEATS, Round, ServerState, Spent
from fedlab.run.history import History

ADJACENCY = "add or remove one patient"


def spent(epsilon, unit="patient", delta=1e-3):
    return Spent(epsilon, delta, unit, "rdp", ADJACENCY)


def finished(number, sites, **others):
    settings = dict(spent={}, metrics={}, seconds=1.5, absent={}) | others
    state = ServerState(round=number + 1, params={"w": torch.zeros(1)})
    return Round(number=number, state=state, cohort=tuple(sites), sites=sites, **settings)


def numbers(loss, weight, steps, size):
    return {"loss": loss, "norm": 1.0, "weight": weight, "steps": steps, "bytes": size}


def history(*rounds):
    made = History(rounds=9)
    for one in rounds:
        made.add(one)
    return made


SITES = {"zurich": numbers(2.0, 1.0, 7.0, 100.0), "aachen": numbers(0.5, 3.0, 2.0, 30.0),
         "mainz": numbers(1.0, 4.0, 1.0, 7.0)}


def test_the_guarantee_states_the_worst_site_in_any_order():
    """ε of 5, 1 and 3 at three sites: 5 is stated, whether its site comes first, last or between."""
    epsilons = {"zurich": 3.0, "aachen": 5.0, "mainz": 1.0}
    for order in (["aachen", "zurich", "mainz"], ["mainz", "aachen", "zurich"], ["zurich", "mainz", "aachen"]):
        one = finished(0, SITES, spent={name: (spent(epsilons[name]),) for name in order})
        assert history(one).guarantee() == f"ε = 5 at δ = 0.001 per patient ({ADJACENCY}, rdp accountant) at aachen"


@given(irregular.names(3), st.lists(irregular.epsilons(), min_size=3, max_size=3, unique=True))
def test_the_guarantee_states_the_worst_of_unequal_epsilons(names, epsilons):
    shown = dict(zip(names, SITES.values(), strict=True))
    one = finished(0, shown, spent={name: (spent(e),) for name, e in zip(names, epsilons, strict=True)})
    said = history(one).guarantee()
    worst = max(zip(epsilons, names, strict=True))
    assert said.endswith(f" at {worst[1]}")
    stated = float(said.removeprefix("ε = ").split()[0])
    assert worst[0] <= stated <= worst[0] * 1.01 + 1e-4  # rounded up, never down


def test_the_guarantee_is_that_of_the_last_round_in_which_each_site_took_part():
    first = finished(0, SITES, spent={"aachen": (spent(4.0),), "mainz": (spent(1.0),)})
    second = finished(1, {"mainz": SITES["mainz"]}, spent={"mainz": (spent(2.0), spent(7.0, "site"))})
    said = history(first, second).guarantee()
    assert said.startswith("ε = 4 at") and "at aachen, none at zurich; ε = 7" in said
    assert said.endswith("per site (add or remove one patient, rdp accountant) at mainz, none at aachen, zurich")


def test_noise_at_the_server_covers_sites_that_have_spent_nothing_themselves():
    one = finished(0, SITES, spent={"server": (spent(2.0, "site"),), "mainz": (spent(5.0),)})
    said = history(one).guarantee()
    assert "at server; " in said and "at mainz, none at aachen, zurich" in said
    assert said.count("none at") == 1


def test_the_guarantee_says_that_the_noise_of_some_site_repeats():
    """Of three sites one takes its noise from the seed of the run, in whatever order they are and whatever ε it has."""
    for seeded in SITES:
        for order in (list(SITES), list(SITES)[::-1]):
            one = finished(0, SITES, spent={name: (spent(2.0 + len(name))._replace(repeats=name == seeded),)
                                            for name in order})
            assert history(one).guarantee().endswith(f"; {REPEATS}")
    none = finished(0, SITES, spent={name: (spent(2.0)._replace(repeats=False),) for name in SITES})
    assert REPEATS not in history(none).guarantee()


def test_the_loss_of_a_round_is_weighted_and_bytes_add_up():
    table = history(finished(0, SITES)).table()
    assert table.loc[0, "loss"] == pytest.approx((2.0 * 1 + 0.5 * 3 + 1.0 * 4) / 8)
    assert table.loc[0, "bytes"] == 137 and table.loc[0, "seconds"] == 1.5


def test_a_loss_that_one_site_withholds_is_no_loss_of_the_round():
    bare = {name: value for name, value in SITES["mainz"].items() if name != "loss"}
    table = history(finished(0, {**SITES, "mainz": bare}), finished(1, SITES)).table()
    assert math.isnan(table.loc[0, "loss"]) and table.loc[1, "loss"] > 0


def test_a_metric_of_an_earlier_round_is_still_the_last_known_one():
    made = history(finished(0, SITES, metrics={"Dice": 0.25}), finished(1, SITES))
    assert "Dice 0.250" in repr(made)


def test_tables_have_one_row_per_round_and_site():
    made = history(finished(0, SITES, absent={"bonn": "late"}), finished(1, {"mainz": SITES["mainz"]}))
    assert list(made.sites().index) == [(0, "zurich"), (0, "aachen"), (0, "mainz"), (1, "mainz")]
    assert made.sites().loc[(0, "aachen"), "steps"] == 2
    assert made.absent().loc[(0, "bonn"), "reason"] == "late" and made.spent().empty


@pytest.mark.parametrize("sites, name", [(["site-02"], "site-02, rounds:"), (["a", "b"], "rounds:"), ([], "rounds:")])
def test_a_progress_bar_has_the_name_of_a_site_that_trains_alone(sites, name, capsys):
    with History(rounds=3).progress(enabled=True, sites=sites):
        pass
    bars = [bar for bar in capsys.readouterr().err.split("\r") if bar.strip()]
    assert bars and all(bar.startswith(name) for bar in bars)
