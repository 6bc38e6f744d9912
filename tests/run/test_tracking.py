"""Trackers: every number of every round once, a resumed run in the same tracker run, a clear word where one lacks."""

from __future__ import annotations

import sys

import pandas as pd
import pytest
import torch

from cohorts import blob_sites
from fedlab.core.errors import RunError
from fedlab.core.types import Round, ServerState, Spent
from fedlab.run.federate import federate
from fedlab.run.trackers import CsvTracker, MLflowTracker, TensorBoardTracker, numbers
from trainers import trainer

SPENT = Spent(1.5, 1e-3, "patient", "rdp", "add or remove one patient")


def finished(number, dice=0.5):
    return Round(number=number, state=ServerState(round=number + 1, params={"w": torch.zeros(1)}), cohort=("a", "b"),
                 sites={"a": {"loss": 0.25, "weight": 3.0}}, spent={"a": (SPENT,)}, metrics={"Dice": dice}, seconds=2.0,
                 absent={"b": "late"})


def test_numbers_of_a_round():
    assert list(numbers(finished(0))) == [
        ("", "seconds", 2.0), ("", "sites in the model", 1.0), ("", "Dice", 0.5), ("a", "loss", 0.25),
        ("a", "weight", 3.0),
        ("a", "epsilon at delta 0.001 per patient, add or remove one patient, rdp accountant", 1.5)]


def test_csv_has_every_number_and_goes_on(tmp_path):
    path = tmp_path / "new" / "rounds.csv"
    first = CsvTracker(path=path)
    for number in range(3):
        first(finished(number, dice=number / 10))
    with path.open("a") as file:
        file.write("3,,Di")  # a kill in the middle of a row
    again = CsvTracker(path=path)
    for number in (2, 3):  # round 2 is run again
        again(finished(number, dice=number / 10))
    table = pd.read_csv(path)
    dice = table[table["name"] == "Dice"]
    assert dice["round"].tolist() == [0, 1, 2, 3] and dice["value"].tolist() == [0.0, 0.1, 0.2, 0.3]
    assert len(table) == 4 * 6 and table["site"].isna().sum() == 4 * 3


def test_csv_overwrites_nothing(tmp_path):
    path = tmp_path / "rounds.csv"
    CsvTracker(path=path)(finished(0))
    before = path.read_bytes()
    with pytest.raises(RunError, match="exists and is not overwritten"):
        CsvTracker(path=path)(finished(0))
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RunError, match="another table"):
        CsvTracker(path=tmp_path / "mine.csv")(finished(4))
    assert path.read_bytes() == before and (tmp_path / "mine.csv").read_text() == "a,b\n1,2\n"


def test_a_run_tells_several_trackers(tmp_path):
    heard = []
    history = federate(trainer(), blob_sites(), rounds=2, progress=False, on_round=[
        CsvTracker(path=tmp_path / "rounds.csv"), lambda done: heard.append(done.number)])
    table = pd.read_csv(tmp_path / "rounds.csv")
    assert heard == [0, 1]
    loss = table[(table["name"] == "loss") & (table["site"] == "site-1")]["value"].tolist()
    assert loss == history.sites()["loss"].unstack("site")["site-1"].tolist()


@pytest.mark.parametrize("make, library", [
    (lambda folder: CsvTracker(path=folder / "rounds.csv"), "csv"),
    (lambda folder: MLflowTracker(run_file=folder / "id", uri=(folder / "mlruns").as_uri()), "mlflow"),
    (lambda folder: TensorBoardTracker(folder=folder / "events"), "tensorboard")], ids=["csv", "mlflow", "tensorboard"])
def test_one_tracker_is_of_one_run(make, library, tmp_path, monkeypatch):
    pytest.importorskip(library, reason="not installed: pip install -e '.[tracking]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracker = make(tmp_path)
    federate(trainer(), blob_sites(), rounds=2, progress=False, on_round=tracker)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match="choose another"):
        federate(trainer(), blob_sites(), rounds=2, progress=False, on_round=tracker, seed=1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_tracker_replaces_rounds_that_are_run_again(tmp_path):
    tracker = CsvTracker(path=tmp_path / "rounds.csv")
    for number, dice in ((0, 0.1), (1, 0.2), (2, 0.3), (1, 0.4), (2, 0.5)):  # resumed from the checkpoint of round 0
        tracker(finished(number, dice=dice))
    table = pd.read_csv(tmp_path / "rounds.csv")
    assert table[table["name"] == "Dice"]["value"].tolist() == [0.1, 0.4, 0.5]


@pytest.mark.parametrize("tracker, module", [
    (lambda folder: MLflowTracker(run_file=folder / "id"), "mlflow"),
    (lambda folder: TensorBoardTracker(folder=folder / "events"), "torch.utils.tensorboard.writer")])
def test_a_missing_tracker_names_the_command(tracker, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'fedlab-workbench\[tracking\]'"):
        tracker(tmp_path)(finished(0))
    assert not any(tmp_path.iterdir())


def test_mlflow_goes_on_in_the_same_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: pip install -e '.[tracking]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlruns").as_uri()

    def tracker():
        return MLflowTracker(run_file=tmp_path / "run" / "mlflow-run", uri=uri, settings={"strategy": "FedAvg()"})

    first = tracker()
    first(finished(0, dice=0.1))
    first(finished(1, dice=float("nan")))
    with pytest.raises(RunError, match="an earlier run"):
        tracker()(finished(0))
    again = tracker()
    again(finished(2, dice=0.3))
    again.end()
    client = mlflow.MlflowClient(tracking_uri=uri)
    run, = client.search_runs([client.get_experiment_by_name("fedlab").experiment_id])
    assert run.info.run_id == (tmp_path / "run" / "mlflow-run").read_text().strip() and run.info.status == "FINISHED"
    assert run.data.params["strategy"] == "FedAvg()"
    steps = client.get_metric_history(run.info.run_id, "Dice")
    assert [(m.step, m.value) for m in steps] == [(0, 0.1), (2, 0.3)]
    assert [m.step for m in client.get_metric_history(run.info.run_id, "a/loss")] == [0, 1, 2]
    (tmp_path / "run" / "mlflow-run").write_text("not an id")
    with pytest.raises(RunError, match="does not hold the id"):
        tracker()(finished(3))


def test_tensorboard_goes_on_in_the_same_folder(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install -e '.[tracking]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardTracker(folder=tmp_path)
    for number in range(3):
        first(finished(number, dice=number / 10))
    with pytest.raises(RunError, match="an earlier run"):
        TensorBoardTracker(folder=tmp_path)(finished(0))
    import time

    time.sleep(1.1)  # event files are called by the second
    again = TensorBoardTracker(folder=tmp_path)
    for number in (2, 3):
        again(finished(number, dice=0.9))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    shown = [(e.step, pytest.approx(e.value)) for e in events.Scalars("Dice")]
    assert shown == [(0, 0.0), (1, 0.1), (2, 0.9), (3, 0.9)]
    assert "a/loss" in events.Tags()["scalars"]
