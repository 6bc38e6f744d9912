"""A trained model on folders of scans: predictions on each patient's own grid, scores only where there are labels."""

from __future__ import annotations

import csv
import json
import os
import pickle
from statistics import mean

import nibabel
import numpy as np
import pytest
import torch
from monai.networks.nets import BasicUNet
from safetensors.torch import save_file

from fedlab.apps.cli import main
from fedlab.apps.evaluation import describe_evaluation, evaluate_folder
from fedlab.core.errors import DataError, RunError
from fedlab.core.regions import labels_to_regions
from fedlab.core.weights import trainable, weights_sha256
from fedlab.data.readers.conventions import CONVENTIONS, describe, from_internal
from fedlab.deploy.plan import Plan, built
from fedlab.deploy.weights_file import load_run_weights, save_run_weights
from fedlab.privacy.base import Privacy
from fedlab.strategies.averaging import FedAvg
from fedlab.topologies import star
from fedlab.training.networks import load_model
from fedlab.training.public_model import public_model
from fedlab.training.trainer import SiteTrainer
from folders import write_patient
from runs import command, contents, finished_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return finished_demo(tmp_path_factory.getbasetemp()).folder


@pytest.fixture(scope="module")
def scans(tmp_path_factory, demo):
    """Three generated patients in BraTS layout; the second has no label, the third lies on a grid of its own."""
    base = tmp_path_factory.mktemp("apply")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        command("data", "phantom", "--out", base / "scans", "--sites", 1, "--patients", 3, "--shape", "48,64,48")
    (base / "scans" / "site-01-001" / "site-01-001_seg.nii.gz").unlink()
    for path in (base / "scans" / "site-01-002").iterdir():
        image = nibabel.load(path)
        cut = image.slicer[1:, :-2, 2:].as_reoriented(np.array([[2, 1], [0, -1], [1, 1]]))
        data = np.asanyarray(cut.dataobj).copy()
        path.unlink()
        nibabel.save(nibabel.Nifti1Image(data, cut.affine), path)
    return base / "scans"


@pytest.fixture(scope="module")
def evaluated(demo, scans, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "new" / "out"
    printed = command("evaluate", demo / "model.safetensors", "--data", scans, "--out", out)
    return out, printed


def rows_of(file) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum()) if a.any() or b.any() else 1.0


REGIONS = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}


def test_predictions_lie_on_each_patients_own_grid(evaluated, scans):
    out, _ = evaluated
    assert {p.name for p in out.iterdir()} == {"scores.csv", "summary.json", "page.html",
                                               *(f"site-01-00{k}_pred.nii.gz" for k in range(3))}
    grids = set()
    for home in sorted(p for p in scans.iterdir() if p.is_dir()):
        scan = nibabel.load(home / f"{home.name}_flair.nii.gz")
        found = nibabel.load(out / f"{home.name}_pred.nii.gz")
        assert found.shape == scan.shape and np.allclose(found.affine, scan.affine)
        labels = np.asanyarray(found.dataobj)
        assert labels.dtype == np.uint8 and set(np.unique(labels)) <= {0, 1, 2, 4}
        assert (labels > 0).any()
        grids.add((found.shape, nibabel.aff2axcodes(found.affine)))
    assert len(grids) == 2


def test_scores_are_those_of_the_written_predictions(evaluated, scans):
    out, printed = evaluated
    rows = {(row["patient"], row["region"]): row for row in rows_of(out / "scores.csv")}
    found = json.loads((out / "summary.json").read_text())
    for region, labels in REGIONS.items():
        values = []
        for name in ("site-01-000", "site-01-002"):
            guess = np.asanyarray(nibabel.load(out / f"{name}_pred.nii.gz").dataobj)
            truth = np.asanyarray(nibabel.load(scans / name / f"{name}_seg.nii.gz").dataobj)
            values.append(dice(np.isin(guess, labels), np.isin(truth, labels)))
            assert float(rows[name, region]["dice"]) == pytest.approx(values[-1], abs=1e-6)
            assert float(rows[name, region]["reference_ml"]) == pytest.approx(np.isin(truth, labels).sum() * 0.027)
        assert found["dice"][region] == pytest.approx(mean(values), abs=1e-6)
    assert found["dice"]["mean"] == pytest.approx(mean(found["dice"][r] for r in REGIONS), abs=1e-12)
    # The model has seen half a minute of training, yet a tumour moved or turned would miss altogether.
    assert found["dice"]["WT"] > 0.2
    assert f"{found['dice']['WT']:9.3f}" in printed and str(out) in printed


def test_the_summary_says_what_was_evaluated(evaluated, demo):
    found = json.loads((evaluated[0] / "summary.json").read_text())
    assert set(found) == {"patients", "labelled", "label_conventions", "spacing_mm", "model_sha256", "dice", "hd95_mm",
                          "empty_regions"}
    assert (found["patients"], found["labelled"], found["spacing_mm"]) == (3, 2, 3.0)
    assert found["label_conventions"] == {"brats2021": "1 core, 2 oedema, 4 enhancing"}
    assert found["model_sha256"] == json.loads((demo / "summary.json").read_text())["weights_sha256"]
    assert set(found["hd95_mm"]) == {"WT", "TC", "ET", "mean"} and "373.13" in found["empty_regions"]


def test_a_patient_without_a_label_gets_a_prediction_and_no_score(evaluated):
    rows = [row for row in rows_of(evaluated[0] / "scores.csv") if row["patient"] == "site-01-001"]
    assert len(rows) == 3
    assert all(row["dice"] == row["hd95_mm"] == row["reference_ml"] == "" for row in rows)
    assert any(float(row["predicted_ml"]) > 0 for row in rows)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_predictions_have_the_values_of_the_folders_own_convention(demo, tmp_path, monkeypatch, capsys, convention):
    path = write_patient(tmp_path / "scans", "P1") / "P1_seg.nii.gz"
    image = nibabel.load(path)
    stored = from_internal(np.asanyarray(image.dataobj).astype(np.uint8), convention)
    path.unlink()
    nibabel.save(nibabel.Nifti1Image(stored, image.affine), path)
    write_patient(tmp_path / "scans", "P2", label=False)
    # A perfect model at the scans' own voxel size: the prediction is what the expert has drawn.
    monkeypatch.setattr("fedlab.apps.evaluation.open_model", lambda file, spacing_mm: (load_model(file)[0], 1.0))
    monkeypatch.setattr("fedlab.apps.evaluation.predict", lambda model, patient: labels_to_regions(
        patient.label if patient.label is not None else torch.zeros(patient.image.shape[1:])).float())
    assert main(["evaluate", str(demo / "model.safetensors"), "--data", str(tmp_path / "scans"), "--label-convention",
                 convention, "--out", str(tmp_path / "out")]) == 0
    written = nibabel.load(tmp_path / "out" / "P1_pred.nii.gz")
    assert np.array_equal(np.asanyarray(written.dataobj), stored)
    meaning = describe(convention)
    assert written.header["descrip"].item().decode() == f"fedlab, labels {convention}: {meaning}"[:79]
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["label_conventions"] == {convention: meaning} and found["dice"]["mean"] == 1.0
    assert f"values of the label maps: {convention}: {meaning}" in capsys.readouterr().out


def test_weights_of_a_submitted_run_are_evaluated_at_the_voxel_size_that_is_given(demo, scans, tmp_path, capsys):
    unet = {"spatial_dims": 3, "in_channels": 4, "out_channels": 3, "features": (8, 8, 8, 8, 8, 8)}
    for number, model in enumerate((load_model(demo / "model.safetensors")[0], built(BasicUNet, **unet),
                                    built(BasicUNet, **unet, norm="batch"))):
        trainer = SiteTrainer(model=model, steps=1)
        plan = Plan.of(trainer=trainer, strategy=FedAvg(), privacy=Privacy(), topology=star, admission=None, rounds=1,
                       seed=0, sites=["a"])
        trained = {name: tensor + 1 / 64 if tensor.is_floating_point() else tensor + 1
                   for name, tensor in trainer.initial_model().items()}
        params = {name: trained[name] for name in trainable(model)}
        assert (len(trained) > len(params)) is (number == 2)  # the statistics of batch norm
        weights = tmp_path / f"{number}" / "weights.safetensors"
        weights.parent.mkdir()
        save_run_weights(weights, trained, plan=plan)
        loaded = load_run_weights(weights).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.items())
        arguments = ["evaluate", str(weights), "--data", str(scans), "--out", str(tmp_path / f"out{number}")]
        assert main(arguments) == 1
        assert "does not state the voxel size that it was trained at; pass --spacing" in capsys.readouterr().err
        assert main([*arguments, "--spacing", "3"]) == 0
        found = json.loads((tmp_path / f"out{number}" / "summary.json").read_text())
        assert found["model_sha256"] == weights_sha256(params) and found["spacing_mm"] == 3.0


def test_weights_of_a_network_from_a_users_file_are_refused_with_the_reason(demo, scans, tmp_path, capsys):
    header = {"format": "fedlab-weights-1", "model": json.dumps({"make": "cohorts:TinyNet", "with": {}})}
    save_file({"x": torch.ones(1)}, tmp_path / "weights.safetensors", metadata=header)
    assert main(["evaluate", str(tmp_path / "weights.safetensors"), "--data", str(scans)]) == 1
    assert "load the weights with safetensors in Python" in capsys.readouterr().err


def test_without_any_label_there_is_no_score(demo, scans, tmp_path):
    one = tmp_path / "scans"
    one.mkdir()
    (one / "site-01-001").symlink_to(scans / "site-01-001")
    found = evaluate_folder(demo / "model.safetensors", one, tmp_path / "out", progress=False)
    assert "dice" not in found and (found["patients"], found["labelled"]) == (1, 0)
    assert "no score" in describe_evaluation(found)


def test_the_public_model_segments_a_folder(demo, scans, tmp_path, capsys):
    printed = command("evaluate", "--public", "--data", scans, "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "3 patients segmented" in printed and found["spacing_mm"] == 3.0
    assert found["model_sha256"] == weights_sha256(trainable(public_model()))
    assert len(list((tmp_path / "out").glob("*_pred.nii.gz"))) == 3 and found["dice"]["WT"] > 0.3
    for given in ([], [str(demo / "model.safetensors"), "--public"]):
        assert main(["evaluate", *given, "--data", str(scans), "--out", str(tmp_path / "none")]) == 1
        assert "either the file of a model or --public" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_nothing_is_overwritten(demo, scans, evaluated, capsys):
    before = contents(evaluated[0])
    assert main(["evaluate", str(demo / "model.safetensors"), "--data", str(scans), "--out", str(evaluated[0])]) == 1
    assert "exists and is left as it is" in capsys.readouterr().err
    assert contents(evaluated[0]) == before


class Payload:
    def __init__(self, trace) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_foreign_and_damaged_models_are_refused_and_pickles_never_run(demo, scans, tmp_path, capsys):
    trace, out = tmp_path / "payload-ran", tmp_path / "out"
    torch.save({"weights": Payload(trace)}, tmp_path / "model.pt")
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Payload(trace)))
    whole = (demo / "model.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    for name, says in (("model.pt", "loads no other format"), ("model.safetensors", "loads no other format"),
                       ("short.safetensors", "not a readable safetensors file"), ("none", "there is no model file")):
        assert main(["evaluate", str(tmp_path / name), "--data", str(scans), "--out", str(out)]) == 1
        assert says in capsys.readouterr().err
        assert not out.exists() and not trace.exists()
    with pytest.raises(RunError):
        evaluate_folder(tmp_path / "model.pt", scans, out)


def test_a_folder_without_patients_is_refused_and_leaves_nothing(demo, tmp_path):
    for data in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError):
            evaluate_folder(demo / "model.safetensors", data, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_real_scans_of_a_clinic(demo, tmp_path, real_scans):
    data = real_scans / "brats2021_2mm"
    found = evaluate_folder(demo / "model.safetensors", data, tmp_path / "out", progress=False)
    assert (found["patients"], found["labelled"]) == (5, 5)
    assert all(0 <= value <= 1 for value in found["dice"].values())
    assert found["model_sha256"] == weights_sha256(trainable(load_model(demo / "model.safetensors")[0]))
    for home in sorted(p for p in data.iterdir() if p.is_dir()):
        scan = nibabel.load(home / f"{home.name}_t1ce.nii.gz")
        guess = nibabel.load(tmp_path / "out" / f"{home.name}_pred.nii.gz")
        assert guess.shape == scan.shape and np.allclose(guess.affine, scan.affine)
        row = next(r for r in rows_of(tmp_path / "out" / "scores.csv")
                   if (r["patient"], r["region"]) == (home.name, "WT"))
        truth = np.asanyarray(nibabel.load(home / f"{home.name}_seg.nii.gz").dataobj)
        assert float(row["dice"]) == pytest.approx(dice(np.asanyarray(guess.dataobj) > 0, truth > 0), abs=1e-6)
