"""Pages with pictures of scans: those of `fedlab show`, and those of `fedlab evaluate` with its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from fedlab.core.errors import DataError
from fedlab.core.text import counted
from fedlab.core.types import Patient
from fedlab.data.readers.folders import find_patients, read_patient
from fedlab.data.readers.layouts import list_patients
from fedlab.data.readers.patient_files import PatientFiles
from fedlab.training.metrics import predict
from fedlab.view.label_layers import Prediction, ViewSettings, make_case
from fedlab.view.live_viewer import live_viewer
from fedlab.view.report_page import Section, write_report
from fedlab.view.slices import show_patient

__all__ = ["evaluation_page", "scan_page"]

_MOST = 20  # patients that a page has pictures of


def scan_page(scan: Path, out: Path, *, prediction: Path | None = None, model: nn.Module | None = None,
              spacing_mm: float | None = None, layout: str | None = None, label_convention: str | None = None) -> Path:
    """Writes a self-contained page with pictures of scans: four modalities, the expert's labels, a prediction.

    Args:
        scan: a patient's folder, one of its files, or a folder of patients, of which the first 20 are shown.
        out: path of the new page.
        prediction: a NIfTI file of a single patient's label map, with the values 1, 2 and 4.
        model: segments each patient, in place of `prediction`.
        spacing_mm: voxel size of model and pictures; None keeps the scan's own.
        layout, label_convention: as in `fedlab.data.readers.folders.find_patients`.

    Raises:
        DataError: there is no patient, or the files cannot be used.
        RunError: `out` exists.
        ValueError: a prediction for several patients, or on another grid.
    """
    found = _files(scan, layout, label_convention)
    if prediction is not None and len(found) > 1:
        raise ValueError(f"{scan} has {len(found)} patients and there is one prediction; name one patient's folder")
    sections = []
    for files in list(found.values())[:_MOST]:
        patient = read_patient(files, spacing_mm=spacing_mm)
        sections += _pictures(patient, prediction if model is None else predict(model, patient),
                              title="" if len(found) == 1 else patient.id)
    left = f" The first {_MOST} of {len(found)} patients are shown." if len(found) > _MOST else ""
    title = next(iter(found)) if len(found) == 1 else scan.resolve().name
    return write_report(out, title=title, sections=sections, lead=(
        "Axial slices with the most tumour, in radiological convention: the patient's right is on the left." + left))


def evaluation_page(out: Path, result: Mapping[str, Any], scores: pd.DataFrame,
                    pictures: Sequence[tuple[Patient, torch.Tensor]], *, title: str) -> Path:
    """Writes the page of an evaluation: mean scores, a row per patient, and pictures of patients.

    Args:
        out: path of the new page.
        result: the content of summary.json.
        scores: Dice by patient (rows) and region.
        pictures: patients with the model's regions or probabilities on the same grid.
        title: of the page.

    Raises:
        RunError: `out` exists.
    """
    lead = f"{counted(result['patients'], 'patient')} segmented, {result['labelled'] or 'none'} with an expert's label."
    cards = {f"mean Dice, {name}": f"{value:.2f}" for name, value in result.get("dice", {}).items()}
    sections = [Section(title="Dice of each patient", table=scores, caption=result["empty_regions"])] \
        if result["labelled"] else []
    for patient, regions in pictures:
        sections += _pictures(patient, regions, title=patient.id)
    which = f"the {len(pictures)} patients with the lowest Dice" if result["labelled"] else "the first patients"
    notes = [f"Scores are those of the written label maps, on each patient's own grid. Pictures are at the "
             f"{result['spacing_mm']:g} mm at which the model works, where its Dice can differ by a few hundredths."]
    if len(pictures) < result["patients"]:
        notes.append(f"Pictures are of {which}; label maps of all are beside this page.")
    return write_report(out, title=title, lead=lead, results=cards, sections=sections, notes=notes)


def _pictures(patient: Patient, prediction: Prediction | None, *, title: str) -> list[Section]:
    """A slice of a patient; without a title, which means a page of one patient, also the viewer in three dimensions."""
    sections = [Section(title=title, figure=show_patient(patient, prediction))]
    if not title:
        case = make_case(patient, {} if prediction is None else {"prediction": prediction})
        settings = ViewSettings(layer=next(iter(case.layers), None), crosshair=case.centre())
        sections.append(Section(live=live_viewer([case], settings)))
    return sections


def _files(scan: Path, layout: str | None, label_convention: str | None) -> dict[str, PatientFiles]:
    """The patients that a path means: all of a folder, or the one whose folder or file it is."""
    if not scan.exists():
        raise DataError(f"there is no file or folder {scan}")
    find = partial(find_patients, layout=layout, label_convention=label_convention)
    if scan.is_file():
        return find(scan.parent.parent, only=_own(scan, scan.parent.parent, layout))
    try:
        return find(scan)
    except DataError:
        if not (own := _own(scan, scan.parent, layout)):
            raise
        return find(scan.parent, only=own)


def _own(scan: Path, folder: Path, layout: str | None) -> list[str]:
    """The patient of a folder whose own folder or file is `scan`; for a file nobody is an error."""
    try:
        listed = list_patients(folder, layout=layout).files
    except DataError:
        listed = {}
    path = scan.resolve()
    found = [name for name, files in listed.items() for one in [*files.images.values(), files.label]
             if one is not None and path in (one.resolve(), one.resolve().parent)]
    if not found and scan.is_file():
        raise DataError(f"{scan} is no patient's file; expected one in a folder that 'fedlab data inspect' can read")
    return found[:1]
