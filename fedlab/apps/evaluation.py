"""A trained model on a folder of scans: label maps on the patients' own grids, and scores where experts drew labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from fedlab.core.errors import RunError
from fedlab.core.files import write_json
from fedlab.core.hardware import pick_device
from fedlab.core.regions import labels_to_regions
from fedlab.core.types import REGIONS
from fedlab.core.weights import trainable, weights_sha256
from fedlab.data.readers.folders import PatientFiles, read_cohort, read_label, save_prediction, to_native
from fedlab.data.readers.scan import native_volume
from fedlab.training.metrics import COLUMNS, predict, score_rows, summary
from fedlab.training.networks import load_model

__all__ = ["describe_evaluation", "evaluate_folder"]


def evaluate_folder(model_file: Path, data: Path, out: Path, *, layout: str | None = None,
                    label_convention: str | None = None, skip_broken: bool = False,
                    progress: bool = True) -> dict[str, Any]:
    """Segments every patient of a folder and writes predictions, scores.csv and summary.json.

    The model sees each patient resampled to the voxel size it was trained at. Its prediction is resampled back to the
    patient's own grid, written as `<ID>_pred.nii.gz` and scored against the expert's labels.

    Args:
        model_file: model.safetensors of a run.
        data: folder in one of `fedlab.data.readers.layouts.LAYOUTS`, or a CSV table of paths; labels optional.
        out: a directory that does not exist yet.
        layout: of the folder; None to detect it.
        label_convention: of the labels; None to detect it.
        skip_broken: whether to leave out patients whose files have errors.
        progress: show a progress bar.

    Returns:
        The content of summary.json: patients, Dice and HD95 [mm] per region over the labelled ones, the rule for
        empty regions, the model's hash.

    Raises:
        RunError: `out` exists, or the model cannot be read.
        DataError: the folder cannot be used.
    """
    if out.exists():
        raise RunError(f"{out} exists and is left as it is; choose another --out")
    model, spacing_mm = load_model(model_file)
    found = read_cohort(data, layout=layout, label_convention=label_convention, spacing_mm=spacing_mm,
                        broken="skip" if skip_broken else "raise", progress=progress)
    device = pick_device("auto")
    model.to(device)
    out.mkdir(parents=True)
    rows: list[dict[str, str | float]] = []
    for files in tqdm(found.files.values(), desc="segmenting", unit="patient", disable=not progress):
        patient = found.read(files.id)
        labels = to_native(predict(model, patient), patient=patient, files=files)
        save_prediction(out / f"{files.id}_pred.nii.gz", labels, files=files)
        rows += _scores(labels, files)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table.to_csv(out / "scores.csv", index=False)
    result: dict[str, Any] = {
        "patients": len(found), "labelled": sum(files.label is not None for files in found.files.values()),
        "spacing_mm": spacing_mm, "model_sha256": weights_sha256(trainable(model)),
    }
    if result["labelled"]:
        means = summary(table)
        result |= {key: {name: round(float(means[key][name]), digits) for name in (*REGIONS, "mean")}
                   for key, digits in (("dice", 4), ("hd95_mm", 2))}
        result["empty_regions"] = means.attrs["rule"]
    write_json(out / "summary.json", result)
    return result


def describe_evaluation(result: dict[str, Any]) -> str:
    """The result of `evaluate_folder` in a few lines for a terminal."""
    if not result["labelled"]:
        return f"{result['patients']} patients segmented; none has an expert's label, so there is no score"
    lines = [f"{result['patients']} patients segmented, {result['labelled']} with an expert's label",
             f"{'':<10}" + "".join(f"{name:>9}" for name in result["dice"])]
    for name, key in (("Dice", "dice"), ("HD95 [mm]", "hd95_mm")):
        lines.append(f"{name:<10}" + "".join(f"{value:9.3f}" for value in result[key].values()))
    return "\n".join([*lines, result["empty_regions"]])


def _scores(labels: np.ndarray, files: PatientFiles) -> list[dict[str, str | float]]:
    spacing_mm = native_volume(files).spacing_mm
    reference = read_label(files)[0] if files.label is not None else None
    prediction = labels_to_regions(torch.from_numpy(labels))
    return score_rows(prediction, reference, spacing_mm=spacing_mm, site="", patient=files.id)
