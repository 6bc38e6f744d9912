"""What the values of a run print: their size and origin, never their numbers or keys."""

from __future__ import annotations

from dataclasses import replace

import torch

from fedlab.core.types import Round, ServerState, SiteState, Spent, Update

WEIGHTS = {"a": torch.full((2, 3), 0.125), "b": torch.full((5,), 0.125)}
SPENT = Spent(epsilon=1.5, delta=1e-3, unit="site", accountant="rdp", adjacency="zero-out")
STATE = ServerState(round=2, params=WEIGHTS, buffers={"mean": torch.zeros(2)})
ROUND = Round(number=1, state=STATE, cohort=("east", "west", "north"), sites={}, spent={"west": (SPENT,)},
              metrics={"Dice": 0.75}, seconds=9.0, absent={"north": "crashed"})


def test_an_update_shows_its_size_and_what_it_spent() -> None:
    update = Update(site="west", delta=WEIGHTS, weight=7.0, steps=4, spent=(SPENT,))
    assert repr(update) == f"<Update of west: 2 tensors of 11 numbers, weight 7, 4 steps; {SPENT}>"


def test_states_show_their_size_and_no_secret() -> None:
    assert repr(STATE) == "<ServerState before round 2: 3 tensors of 13 numbers>"
    state = SiteState(round=1, updates=1, secrets={"key": "0.125"}, namespaces={"optimiser": WEIGHTS, "Ditto": {}})
    assert repr(state) == "<SiteState in round 1: 1 update sent, tensors: 2 of optimiser>"
    assert repr(SiteState()) == "<SiteState in round 0: 0 updates sent, tensors: none>"


def test_a_round_shows_who_sent_and_what_was_spent() -> None:
    assert repr(ROUND) == f"<Round 1: updates of 2 of 3 sites; Dice 0.750; west: {SPENT}>"
    assert repr(replace(ROUND, void="too few", spent={})) == (
        "<Round 1: updates of 2 of 3 sites; Dice 0.750; void: too few>")


def test_a_round_whose_sites_are_hidden_shows_nothing_of_them() -> None:
    hidden = replace(ROUND, spent={"server": (SPENT,), "west": (SPENT,)}, void="too few",
                     server_only=frozenset({"seconds", "sites"}))
    assert repr(hidden) == f"<Round 1: Dice 0.750; server: {SPENT}>"
    both = replace(hidden, server_only=hidden.server_only | {"validation"})
    assert repr(both) == f"<Round 1: server: {SPENT}>"
