"""Shapley values on games known by hand, and the contributions of sites to a run."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cohorts import TinyNet, blob_sites
from fedlab.core.errors import PrivacyError, RunError
from fedlab.core.weights import weights_sha256
from fedlab.evidence.contributions import (
    Contributions,
    KeepUpdates,
    dice_on,
    leave_one_out,
    shapley,
    site_contributions,
)
from fedlab.privacy.dp.site_level import CentralGaussian
from fedlab.run.federate import federate
from fedlab.run.local import Local
from fedlab.strategies import FedAvg
from fedlab.topologies import ring
from fedlab.view.run_figures import contributions_figure
from trainers import trainer

SITES = ["a", "b", "c", "d"]


def table_game(worths):
    """A game of four players from 16 numbers."""
    return lambda coalition: worths[sum(1 << k for k, site in enumerate(SITES) if site in coalition)]


games = st.lists(st.floats(-1, 1), min_size=16, max_size=16).map(table_game)


def test_a_game_known_by_hand():
    """One seller and two buyers of one good: the seller gets 2/3, each buyer 1/6 (Shapley 1953)."""
    def worth(coalition):
        return float("seller" in coalition and len(coalition) > 1)

    values = shapley(worth, ["seller", "x", "y"])
    assert values.value == pytest.approx({"seller": 2 / 3, "x": 1 / 6, "y": 1 / 6}) and values.evaluations == 8
    assert leave_one_out(worth, ["seller", "x", "y"]).value == {"seller": 1.0, "x": 0.0, "y": 0.0}


@settings(max_examples=60, deadline=None)
@given(games)
def test_values_add_up_exactly_and_sampled(game):
    total = game(frozenset(SITES)) - game(frozenset())
    assert sum(shapley(game, SITES).value.values()) == pytest.approx(total, abs=1e-9)
    sampled = shapley(game, SITES, permutations=5)
    assert sum(sampled.value.values()) == pytest.approx(total, abs=1e-9) and sampled.evaluations <= 16
    truncated = shapley(game, SITES, permutations=5, tolerance=0.2)
    assert abs(sum(truncated.value.values()) - total) <= 0.2 + 1e-9 and truncated.evaluations <= sampled.evaluations


@settings(max_examples=40, deadline=None)
@given(games)
def test_twins_get_the_same_and_nobody_pays_for_nothing(game):
    def twins(coalition):  # whether it was a or b that came makes no difference, and d never does
        return game(frozenset({"a", "b", "c"} & coalition if {"a", "b"} <= coalition or not {"a", "b"} & coalition
                              else ({"a"} | coalition) - {"b", "d"}))

    values = shapley(twins, SITES)
    assert values.value["a"] == pytest.approx(values.value["b"], abs=1e-9)
    assert values.value["d"] == pytest.approx(0, abs=1e-9)
    assert shapley(twins, SITES, permutations=4).value["d"] == 0


def test_sampling_comes_as_near_as_its_error_says():
    game = table_game([math.sin(3 * k) + 0.4 * bin(k).count("1") for k in range(16)])
    exact = shapley(game, SITES).value
    sampled = shapley(game, SITES, permutations=400, seed=1)
    for site in SITES:  # 4 sites beyond 4 standard errors: probability below 3e-4
        assert 0 < sampled.error[site] < 0.1
        assert abs(sampled.value[site] - exact[site]) < 4 * sampled.error[site]
    again = shapley(game, SITES, permutations=400, seed=1)
    assert again.value == sampled.value != shapley(game, SITES, permutations=400, seed=2).value


@pytest.mark.parametrize("wrong", [dict(permutations=1), dict(tolerance=-1.0), dict(tolerance=math.nan)])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError):
        shapley(len, SITES, **wrong)
    with pytest.raises(ValueError, match="give permutations="):
        shapley(len, [str(k) for k in range(13)])


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A run of three sites whose updates were kept, interrupted and resumed."""
    base = tmp_path_factory.mktemp("kept")
    for rounds in (1, 2):
        engine = KeepUpdates(engine=Local(), folder=base / "updates")
        history = federate(trainer(), blob_sites((3, 2, 1)), rounds=rounds, engine=engine, progress=False,
                           checkpoint=base / "run")
    return history, base / "updates"


def test_keeping_updates_changes_nothing(kept):
    plain = federate(trainer(), blob_sites((3, 2, 1)), rounds=2, progress=False)
    assert weights_sha256(plain.state.params) == weights_sha256(kept[0].state.params)


def test_contributions_of_a_linear_game(kept):
    """A utility that is linear in the weights, uniform weights: then values follow from the updates themselves."""
    history, folder = kept
    probe = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(3)).double()
             for name, p in history.state.params.items()}
    asked = []

    def utility(params):
        asked.append(1)
        return sum(float((probe[name] * p.double()).sum()) for name, p in params.items())

    found = site_contributions(history, folder, utility)
    size = 4 * sum(p.numel() for p in history.state.params.values())
    assert len(asked) == found.evaluations == 8 and 7 * size < found.stored_bytes < 7 * size + 7 * 1000
    assert found.start == pytest.approx(utility(trainer().initial()))
    assert found.end == pytest.approx(utility(history.state.params))
    assert found.table["shapley"].sum() == pytest.approx(found.end - found.start)
    only = {name: contributions_of(folder, history, name, utility) - found.start for name in found.table.index}
    assert found.table["shapley"].idxmax() in only and "all coalitions" in str(found)
    sampled = site_contributions(history, folder, utility, permutations=6, seed=2)
    assert (sampled.table["standard error"] >= 0).all() and "6 permutations" in sampled._repr_html_()


def contributions_of(folder, history, site, utility):
    from fedlab.evidence.contributions import _model_of

    return utility(_model_of(folder, history, FedAvg(), frozenset({site})))


def test_one_site_alone_is_its_own_steps(kept):
    """The model of a coalition of one: the start plus that site's stored updates, whatever its weight."""
    from safetensors.torch import load_file

    from fedlab.evidence.contributions import _model_of

    history, folder = kept
    alone = _model_of(folder, history, FedAvg(), frozenset({"site-1"}))
    for name, start in trainer().initial().items():
        steps = [load_file(folder / f"round-000{k}" / "site-1.safetensors")[name] for k in range(2)]
        torch.testing.assert_close(alone[name], start + steps[0] + steps[1], rtol=1e-6, atol=1e-7)


def test_updates_of_another_run_are_refused(kept, tmp_path):
    history, folder = kept
    with pytest.raises(RunError, match="do not give the model of this run"):
        site_contributions(history, folder, lambda params: 0.0, strategy=FedAvg(weights="uniform"))
    with pytest.raises(RunError, match="missing or damaged"):
        site_contributions(history, tmp_path, lambda params: 0.0)
    with pytest.raises(RunError, match="another run"):
        federate(trainer(), blob_sites((3, 2, 1)), rounds=1, seed=1, progress=False,
                 engine=KeepUpdates(engine=Local(), folder=folder))
    engine = KeepUpdates(engine=Local(), folder=tmp_path / "used twice")
    federate(trainer(), blob_sites(), rounds=1, progress=False, engine=engine)
    with pytest.raises(RunError, match="another run"):  # and not a word about topologies
        federate(trainer(model=TinyNet(seed=1)), blob_sites(), rounds=1, seed=1, progress=False, engine=engine)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match="holds no updates"):
        federate(trainer(), blob_sites(), rounds=1, progress=False, engine=KeepUpdates(engine=Local(), folder=tmp_path))


def test_updates_that_nobody_may_keep_are_not_kept(tmp_path):
    privacy = CentralGaussian(clip=1.0, noise_multiplier=1.0, delta=1e-3)
    with pytest.raises(PrivacyError, match="single updates cannot be kept"):
        federate(trainer(), blob_sites(), rounds=1, strategy=FedAvg(weights="uniform"), privacy=privacy, progress=False,
                 engine=KeepUpdates(engine=Local(), folder=tmp_path / "updates"))
    assert not (tmp_path / "updates").exists()
    with pytest.raises(ValueError, match="topology=star only"):
        federate(trainer(), blob_sites(), rounds=1, topology=ring, progress=False,
                 engine=KeepUpdates(engine=Local(), folder=tmp_path / "ring"))


def test_dice_is_a_utility_and_leaves_the_model_alone(kept):
    one = trainer()
    utility = dice_on(one.model, blob_sites((1,)))
    assert 0 <= utility(kept[0].state.params) <= 1
    assert weights_sha256(dict(one.model.named_parameters())) == weights_sha256(one.initial())


def test_the_figure_says_what_is_in_it(kept):
    history, folder = kept
    found = site_contributions(history, folder, lambda params: float(params["last.bias"].sum()), permutations=4)
    figure = contributions_figure(found)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(
        found.table.sort_values("shapley").index)
    assert "3 sites" in figure.alt and len(figure.axes[0].patches) == 3
    with pytest.raises(ValueError):
        contributions_figure(Contributions(table=found.table.iloc[:0], start=0, end=0, evaluations=0,
                                           stored_bytes=0, seconds=0, method=""))
