"""The table of runs on disk, in Python and on the command line, and results as JSON."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest

from fedlab.apps.cli import main
from fedlab.core.errors import RunError
from fedlab.evidence.runs import runs
from runs import Run, command, finished_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Run:
    return finished_demo(tmp_path_factory.getbasetemp())


@pytest.fixture
def folder(demo, tmp_path):
    """Two finished runs, one with a federated model that is better by 0.1, an interrupted one, and another folder."""
    for name in ("first", "second", "stopped"):
        shutil.copytree(demo.folder, tmp_path / name)
    scores = pd.read_csv(tmp_path / "second" / "scores.csv")
    scores.loc[scores["arm"] == "federated", "dice"] += 0.1
    scores.to_csv(tmp_path / "second" / "scores.csv", index=False)
    (tmp_path / "stopped" / "summary.json").unlink()
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_the_table_says_what_the_runs_found(folder, demo):
    table = runs(folder).table(by="dice")
    assert list(table.index) == ["second", "first", "stopped"]
    summary = json.loads((demo.folder / "summary.json").read_text())
    expected = summary["dice"]["federated"]["mean"]
    assert table["dice"].tolist()[:2] == pytest.approx([expected + 0.1, expected])
    assert table.loc["first", ["main", "arms", "guarantee", "patients", "seed", "state"]].tolist() == [
        "federated", "public, pooled, local_own, local_others", "none", 10, 0, "finished"]
    assert table["low"].isna().all()  # four held-out patients: no interval
    assert table.loc["stopped", "state"] == "not finished" and pd.isna(table.loc["stopped", "dice"])


def test_two_runs_are_compared_on_the_patients_that_both_have(folder):
    found = runs(folder)
    one = found.difference("second", "first")
    assert one.value == pytest.approx(0.1) and one.patients == 4
    assert set(found.scores("first", "second")["arm"]) == {"first", "second"}
    with pytest.raises(RunError, match="is not finished, so there are no scores; continue it with: fedlab resume"):
        found.difference("first", "stopped")
    with pytest.raises(RunError, match="there is no run 'third'; there are"):
        found["third"]
    with pytest.raises(RunError, match="there is no folder"):
        runs(folder / "nowhere")


def test_the_command_lists_runs_and_every_result_can_be_json(folder, capsys):
    printed = command("runs", folder)
    assert "second" in printed and "not finished" in printed
    rows = json.loads(command("runs", folder, "--json"))
    assert {row["run"] for row in rows} == {"first", "second", "stopped"}
    assert [row["low"] for row in rows] == [None] * 3
    verified = json.loads(command("verify", folder / "first", "--json"))
    assert verified["ok"] is True and verified["rounds"] == 2
    assert json.loads(command("resume", folder / "first", "--json"))["main"] == "federated"
    assert "is complete" in capsys.readouterr().err
    assert main(["runs", str(folder), "--sort", "colour"]) == 1
    assert "--sort is one of" in capsys.readouterr().err


def test_a_folder_without_runs_is_said_to_have_none(tmp_path):
    assert command("runs", tmp_path) == "no run\n"
    assert json.loads(command("runs", tmp_path, "--json")) == []
    assert "no run" in repr(runs(tmp_path))


def test_an_epsilon_of_an_earlier_record_is_listed_with_the_remark_on_repeating_noise(folder):
    path = folder / "first" / "history.json"
    history = json.loads(path.read_text())
    history["federated"][-1]["spent"] = {"site-01": [{
        "epsilon": 1.5, "delta": 1e-3, "unit": "site", "accountant": "rdp", "adjacency": "any two updates of a site"}]}
    path.write_text(json.dumps(history))
    assert runs(folder)["first"].guarantee() == (
        "ε = 1.5 at δ = 0.001 per site (any two updates of a site, rdp accountant); noise repeats with the seed: for "
        "research, low bits not covered")
