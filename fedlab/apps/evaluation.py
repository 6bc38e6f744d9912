"""A trained model on a folder of scans: label maps on the patients' own grids, scores where labelled, and a page."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from fedlab.core.errors import RunError
from fedlab.core.extras import MissingExtra
from fedlab.core.files import write_json, write_whole
from fedlab.core.hardware import pick_device
from fedlab.core.regions import REGION_ORDER, labels_to_regions
from fedlab.core.text import counted
from fedlab.core.types import Patient
from fedlab.core.weights import trainable, weights_sha256
from fedlab.data.readers.conventions import convention_of_layout, describe
from fedlab.data.readers.folders import read_cohort, read_label, save_prediction, to_native
from fedlab.data.readers.scan import native_volume
from fedlab.deploy.weights_file import load_run_weights
from fedlab.training.metrics import COLUMNS, predict, score_rows, summary
from fedlab.training.networks import load_model

__all__ = ["describe_evaluation", "evaluate_folder", "open_model"]

#: Rows of patients that a terminal shows, and patients that the page has pictures of.
_MOST_ROWS, _MOST_PICTURES = 50, 20


def evaluate_folder(model_file: Path, data: Path, out: Path, *, layout: str | None = None,
                    label_convention: str | None = None, skip_broken: bool = False, spacing_mm: float | None = None,
                    name: str = "", progress: bool = True) -> dict[str, Any]:
    """Segments every patient of a folder and writes predictions, scores.csv, page.html and summary.json.

    The model sees each patient resampled to the voxel size it was trained at. Its prediction is resampled back to the
    patient's own grid, written as `<ID>_pred.nii.gz` with the label values of the folder's own convention, and scored
    against the expert's labels. Without a label map the convention is that of the layout. The page has pictures of the
    patients with the lowest Dice; without the extra `lab` there is no page.

    Args:
        model_file: a run directory, its model.safetensors, or weights.safetensors of `fedlab deploy submit`.
        data, layout, label_convention: as in `fedlab.data.readers.folders.read_cohort`; labels are optional.
        out: a directory that does not exist yet.
        skip_broken: whether to leave out patients whose files have errors.
        spacing_mm: voxel size that the model was trained at, where its file does not state it.
        name: of the model on the page; by default that of its run.

    Returns:
        The content of summary.json: patients, conventions of the label maps and their meaning, Dice and HD95 [mm] per
        region over the labelled patients, the rule for empty regions, the model's hash.

    Raises:
        RunError: `out` exists, or the model cannot be read.
        DataError: the folder cannot be used.
        ValueError: the voxel size is not known, or is another one than the file states.
    """
    if out.exists():
        raise RunError(f"{out} exists and is left as it is; choose another --out")
    model, spacing_mm = open_model(model_file, spacing_mm)
    found = read_cohort(data, layout=layout, label_convention=label_convention, spacing_mm=spacing_mm,
                        broken="skip" if skip_broken else "raise", progress=progress)
    model.to(pick_device("auto"))
    out.mkdir(parents=True)
    rows: list[dict[str, str | float]] = []
    conventions: dict[str, str] = {}
    pictures: list[tuple[float, Patient, torch.Tensor]] = []
    for files in tqdm(found.files.values(), desc="segmenting", unit="patient", disable=not progress):
        patient = found.read(files.id)
        regions = predict(model, patient)
        labels = to_native(regions, patient=patient, files=files)
        convention = files.label_convention or convention_of_layout(files.layout)
        conventions[convention] = describe(convention)
        save_prediction(out / f"{files.id}_pred.nii.gz", labels, files=files, label_convention=convention)
        reference = read_label(files)[0] if files.label is not None else None
        scored = score_rows(labels_to_regions(torch.from_numpy(labels)), reference, patient=files.id, site="",
                            spacing_mm=native_volume(files).spacing_mm)
        rows += scored
        dice = np.nan_to_num([float(row["dice"]) for row in scored], nan=2.0).mean()
        pictures.append((float(dice), patient, regions))
        pictures = sorted(pictures, key=lambda one: one[0])[:_MOST_PICTURES]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    write_whole(out / "scores.csv", table.to_csv(index=False).encode())
    result: dict[str, Any] = {
        "patients": len(found), "labelled": sum(files.label is not None for files in found.files.values()),
        "label_conventions": conventions, "spacing_mm": spacing_mm, "model_sha256": weights_sha256(trainable(model)),
    }
    if result["labelled"]:
        means = summary(table)
        result |= {key: means[key][[*REGION_ORDER, "mean"]].to_dict() for key in ("dice", "hd95_mm")}
        result["empty_regions"] = means.attrs["rule"]
    _write_page(out, result, table, [(patient, regions) for _, patient, regions in pictures],
                title=f"{name or _named(model_file)} on {data.resolve().name}")
    write_json(out / "summary.json", result)
    return result


def _write_page(out: Path, result: dict[str, Any], scores: pd.DataFrame,
                pictures: Sequence[tuple[Patient, torch.Tensor]], *, title: str) -> None:
    try:
        from fedlab.apps.scan_page import evaluation_page
    except MissingExtra as error:
        warnings.warn(f"no page is written: {error}", stacklevel=3)
    else:
        evaluation_page(out / "page.html", result, dice_by_patient(scores), pictures, title=title)


def _named(model_file: Path) -> str:
    """A model as a page calls it: by its run."""
    path = model_file.resolve()
    return path.name if path.is_dir() else path.parent.name if path.name == "model.safetensors" else path.stem


def dice_by_patient(scores: pd.DataFrame) -> pd.DataFrame:
    """Dice of each labelled patient (rows, in the order of the table) for WT, TC, ET and their mean."""
    labelled = scores[scores["reference_ml"].notna()]
    wide = labelled.pivot_table(index="patient", columns="region", values="dice", sort=False)
    wide = wide.reindex(columns=list(REGION_ORDER))
    return wide.assign(mean=wide.mean(axis=1)).rename_axis(columns=None)


def describe_evaluation(result: dict[str, Any], scores: pd.DataFrame | None = None) -> str:
    """The result of `evaluate_folder` in a few lines for a terminal; with scores.csv also a row per patient."""
    written = "; ".join(f"{name}: {meaning}" for name, meaning in result["label_conventions"].items())
    lines = [f"{counted(result['patients'], 'patient')} segmented, {result['labelled'] or 'none'} with an expert's "
             f"label{'' if result['labelled'] else ', so there is no score'}", f"values of the label maps: {written}"]
    if result["labelled"]:
        each = dice_by_patient(scores) if scores is not None else pd.DataFrame()
        wide = max([10, *(len(str(patient)) + 2 for patient in each.index)])
        if len(each):
            lines.append(f"{'Dice of':<{wide}}" + "".join(f"{name:>9}" for name in each))
            lines += [f"{patient:<{wide}}" + "".join(f"{value:9.3f}" for value in row)
                      for patient, row in each.head(_MOST_ROWS).iterrows()]
            lines += [f"… {len(each) - _MOST_ROWS} more patients in scores.csv"] * (len(each) > _MOST_ROWS) + [""]
        lines.append(f"{'mean':<{wide}}" + "".join(f"{name:>9}" for name in result["dice"]))
        lines += [f"{name:<{wide}}" + "".join(f"{value:9.{digits}f}" for value in result[key].values())
                  for name, key, digits in (("Dice", "dice", 3), ("HD95 [mm]", "hd95_mm", 1))]
        lines.append(result["empty_regions"])
    return "\n".join(lines)


def open_model(model_file: Path, spacing_mm: float | None) -> tuple[nn.Module, float]:
    """The model of a file or of a finished run, and the voxel size in mm that it was trained at.

    Raises:
        RunError: there is none, or it cannot be read.
        ValueError: the voxel size is not known, or is another one than the file states.
    """
    if model_file.is_dir():
        run, model_file = model_file, model_file / "model.safetensors"
        if not model_file.is_file():
            unfinished = (run / "job.json").is_file() and not (run / "summary.json").is_file()
            raise RunError(f"{run} has no model.safetensors: " + (
                f"the run is not finished; continue with: fedlab resume {run}" if unfinished else
                "expected a run directory of 'fedlab demo' or 'fedlab run', or the file of a model"))
    model = load_run_weights(model_file)
    if model is None:
        model, stated = load_model(model_file)
        if spacing_mm not in (None, stated):
            raise ValueError(f"the model was trained at {stated:g} mm, got spacing_mm={spacing_mm:g}; leave it out")
        return model, stated
    if spacing_mm is None:
        raise ValueError(f"{model_file} does not state the voxel size that it was trained at; pass spacing_mm= as the "
                         "sites of the run have it")
    return model, spacing_mm
