"""Sweeps: every setting with every seed once, the figures of plain comparisons, and what is done is not done again."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from cohorts import blob_patient, blob_sites
from fedlab.core.errors import RunError
from fedlab.evidence.arms import Arm
from fedlab.evidence.runs import runs
from fedlab.evidence.sweeps import search, sweep
from fedlab.privacy import LocalGaussian
from fedlab.training.metrics import evaluate
from fedlab.view.interval_figures import runs_figure, sweep_figure
from trainers import trainer

SITES = [replace(site, val=[blob_patient(f"{site.name}h{k}", seed=1000 * n + k) for k in range(3)])
         for n, site in enumerate(blob_sites((3, 1, 2)))]


def make(*, clip: float | None, rounds: int, seed: int) -> Arm:
    assert seed in (0, 5)
    technique = None if clip is None else LocalGaussian(clip=clip, noise_multiplier=2.0, delta=1e-2)
    return Arm(trainer=trainer(), rounds=rounds, privacy=technique)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    grid = {"clip": [None, 0.5], "rounds": [1, 2]}
    return folder, grid, sweep(make, grid, sites=SITES, seeds=(0, 5), out=folder, workers=1, progress=False)


def test_a_sweep_has_one_row_per_setting_and_seed(swept):
    _, _, found = swept
    table = found.table()
    assert len(table) == 2 * 2 * 2 and not table[["clip", "rounds", "seed"]].duplicated().any()
    private = table["clip"] == 0.5
    assert all("ε" in text for text in table[private]["guarantee"])
    assert all(text == "no formal guarantee" for text in table[~private]["guarantee"])
    assert set(table["patients"]) == {9}
    assert (table["low"] <= table["mean"]).all() and (table["mean"] <= table["high"]).all()
    twice = table.groupby("rounds")["MB"].sum()
    assert twice[2] == pytest.approx(2 * twice[1])


def test_its_dice_is_that_of_the_model(swept):
    _, _, found = swept
    used = trainer()
    plain = Arm(trainer=used, rounds=2)
    plain.train(SITES, seed=5)
    dice = evaluate(used.model, SITES).groupby("region")["dice"].mean().mean()
    table = found.table()
    row = table[table["clip"].isna() & (table["rounds"] == 2) & (table["seed"] == 5)]
    assert row["mean"].item() == pytest.approx(dice)


def test_a_sweep_that_grows_trains_only_what_is_new(swept):
    folder, grid, _ = swept
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("scores.csv")}
    assert len(before) == 8
    more = sweep(make, {**grid, "rounds": [1, 2, 3]}, sites=SITES, seeds=(0, 5), out=folder, workers=1, progress=False)
    assert len(more.table()) == 12
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_it_shows_as_table_and_figure(swept):
    _, _, found = swept
    over = found.over_seeds()
    assert set(over["seeds"]) == {2} and set(over["patients"]) == {9} and len(over) == 4
    assert "<table" in found._repr_html_() and "rounds" in repr(found)
    figure = sweep_figure(found)
    (ax,) = figure.axes
    assert ax.get_ylabel() == "mean Dice" and "9 patients, 2 seeds" in ax.get_title("left") and len(ax.containers) == 2
    assert f"{over['dice'][0]:.2f}" in figure.alt


@pytest.mark.parametrize(("grid", "message"), [
    ({}, "at least one setting"), ({"clip": []}, "at least one value"), ({"clip": [1, 1], "rounds": [1]}, "twice")])
def test_grids_without_a_meaning_are_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        sweep(make, grid, sites=SITES)


def test_local_models_are_refused():
    with pytest.raises(ValueError, match="one model each"):
        sweep(lambda rounds: Arm(trainer=trainer(), rounds=rounds, data="each"), {"rounds": [1]}, sites=SITES,
              progress=False, workers=1)


def test_runs_on_disk_are_drawn_with_their_intervals(tmp_path):
    rows = ["site,patient,region,dice,hd95_mm,reference_ml,predicted_ml,arm"]
    rows += [f"a,p{k},{region},{0.5 + k / 100},1,1,1,federated" for k in range(8) for region in ("WT", "TC", "ET")]
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps({"format": "fedlab-job-2", "seed": 0}))
        (folder / "scores.csv").write_text("\n".join(rows))
        (folder / "summary.json").write_text(json.dumps({"main": "federated", "dice": {}, "versions": {}}))
    figure = runs_figure(runs(tmp_path), "one", "two")
    (ax,) = figure.axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["one", "two"]
    ((line, _, (bars,)),) = ax.containers
    assert line.get_xdata()[0] == pytest.approx(0.535)
    low, high = bars.get_segments()[0][:, 0]
    assert math.isfinite(low) and low < 0.535 < high
    with pytest.raises(RunError, match="no run 'three'"):
        runs_figure(runs(tmp_path), "three")


def test_a_search_proposes_from_earlier_scores_and_trains_each_proposal_once(tmp_path):
    """The same call goes on where it was stopped, and more trials begin with the same ones."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    def of(rounds: int, clip: float | None) -> Arm:
        return make(clip=clip, rounds=rounds, seed=0)

    space = {"rounds": IntDistribution(1, 2), "clip": CategoricalDistribution((None, 0.5))}
    common = {"sites": SITES, "at_once": 2, "out": tmp_path, "workers": 1, "progress": False}
    found = search(of, space, trials=3, **common)
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("scores.csv")}
    assert len(trained) == len(found.settings) <= 3
    more = search(of, space, trials=5, **common)
    assert list(more.settings)[:len(found.settings)] == list(found.settings)
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    dice = more.table().set_index(["rounds", "clip"])["mean"]
    best = more.best()
    assert dice.max() == dice.loc[[(best["rounds"], best["clip"])]].item()
    assert more.comparison.difference(*list(more.settings)[:2]).patients == 9


@pytest.mark.parametrize(("settings", "message"), [
    ({"trials": 0, "space": {"rounds": None}}, "trials"), ({"trials": 1, "space": {}}, "at least one setting"),
    ({"trials": 1, "at_once": 0, "space": {"rounds": None}}, "at_once")])
def test_a_search_without_a_meaning_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        search(make, sites=SITES, **settings)
