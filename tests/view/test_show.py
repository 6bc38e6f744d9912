"""`fedlab.show`: the picture, the controls and the data for the browser; invalid input is refused with a reason."""

from __future__ import annotations

import gzip
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

import fedlab as fl
from cohorts import blob_patient
from fedlab.training.metrics import score
from fedlab.view import itk
from fedlab.view import viewer as show_module
from fedlab.view.colours import LABEL_COLOURS
from fedlab.view.label_layers import ViewSettings, as_labels, make_case
from fedlab.view.niivue import NiiVuePanel
from fedlab.view.static_view import draw_case

SHAPE = (20, 24, 16)
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def patient() -> fl.Patient:
    """A head in the middle of its grid, a tumour towards the right, the front and the top, voxels of three sizes."""
    rng = torch.Generator().manual_seed(5)
    image = torch.zeros(4, *SHAPE)
    image[:, 3:17, 4:21, 2:14] = torch.rand(4, 14, 17, 12, generator=rng) + 0.5
    label = torch.zeros(SHAPE, dtype=torch.uint8)
    label[10:15, 13:19, 7:12] = 2
    label[11:14, 14:18, 8:11] = 1
    label[12:14, 15:17, 9:11] = 4
    return fl.Patient("p-1", image, label, np.array([[2.0, 0, 0, -20], [0, 1.5, 0, 7], [0, 0, 3.0, 5], [0, 0, 0, 1]]))


@pytest.fixture
def guess(patient: fl.Patient) -> torch.Tensor:
    """The labels, two voxels to the left."""
    return torch.roll(patient.label, -2, 0)


def panel_of(viewer: fl.view.Viewer) -> NiiVuePanel:
    assert isinstance(viewer.panel, NiiVuePanel)
    return viewer.panel


def sent(layer: Any) -> nib.Nifti1Image:
    """The volume as the browser receives it."""
    return nib.Nifti1Image.from_bytes(layer.data)


# What is shown


def test_any_form_of_a_prediction(patient: fl.Patient, guess: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "guess.nii.gz"
    flipped = nib.Nifti1Image(guess.numpy(), patient.affine).as_reoriented([[0, -1], [1, -1], [2, 1]])
    nib.save(flipped, path)  # stored as LPS, like many scans
    regions = fl.core.labels_to_regions(guess)
    forms: list[Any] = [guess, guess.numpy(), guess.float(), regions, regions > 0, regions * 0.6 + 0.1,
                        regions.bfloat16(), path, str(path), nib.load(path)]
    for form in forms:
        assert np.array_equal(as_labels(patient, form), guess.numpy()), type(form)


def test_cropped_to_the_head_where_it_lies(patient: fl.Patient) -> None:
    case = make_case(patient, {})
    assert case.box == (slice(1, 19), slice(2, 23), slice(0, 16)), "the head and a margin of two voxels"
    here = nib.affines.apply_affine(case.affine, (5, 6, 7))
    assert here == pytest.approx(nib.affines.apply_affine(patient.affine, (6, 8, 7)))
    grey = case.grey("T2")
    assert grey.dtype == np.uint8 and grey.shape == case.shape
    assert (grey[2:16, 2:19, 2:14] >= 10).all() and grey.max() == 255 and not grey[0].any()


def test_viewing_changes_nothing(patient: fl.Patient, guess: torch.Tensor) -> None:
    before = patient.image.clone(), patient.label.clone(), guess.clone()
    viewer = fl.show(patient, {"a": guess}, overlay="errors WT", backend="niivue")
    viewer._repr_mimebundle_()
    panel_of(viewer).controls["modality"].value = "T1c"
    fl.view.surface(patient, guess)
    assert all(torch.equal(*pair) for pair in zip(before, (patient.image, patient.label, guess), strict=True))


def test_facts_are_those_of_the_metrics(patient: fl.Patient, guess: torch.Tensor) -> None:
    case = make_case(patient, {"a": guess})
    known = score(fl.core.labels_to_regions(guess), patient.label, spacing_mm=patient.spacing_mm)
    for fact in case.facts("a"):
        theirs = known[fact.region]
        assert (fact.dice, fact.ml, fact.reference_ml) == pytest.approx(
            (theirs.dice, theirs.predicted_ml, theirs.reference_ml))
        assert fact.ml > 0 and fact.dice < 1


def test_error_map_by_hand(patient: fl.Patient) -> None:
    guess = patient.label.clone()
    guess[0, 0, 5], guess[12, 15, 9] = 4, 0
    case = make_case(patient, {"a": guess})
    x, y, z = (part.start for part in case.box)
    for region, both in (("ET", 7), ("TC", 35), ("WT", 149)):
        errors = case.errors("a", region)
        assert errors[0 - x, 0 - y, 5 - z] == 1 and errors[12 - x, 15 - y, 9 - z] == 2
        assert [int((errors == value).sum()) for value in (1, 2, 3)] == [1, 1, both]


def test_left_and_right_are_not_swapped(patient: fl.Patient) -> None:
    """The tumour lies to the patient's right, front and top: on the left and the upper side of each picture."""
    case = make_case(patient, {})
    drawn = draw_case(case, ViewSettings(layer="reference", crosshair=case.centre(), opacity=1.0))
    axial, coronal, sagittal = (np.asarray(image.get_array()) for image in drawn.axes[0].images[:3])
    for plane in (axial, coronal, sagittal):
        rows, columns = np.nonzero(np.isclose(plane / 255, to_rgb(LABEL_COLOURS[2]), atol=0.01).all(axis=2))
        assert rows.size and rows.mean() < plane.shape[0] / 2 and columns.mean() < plane.shape[1] / 2
    words = [text.get_text() for text in drawn.axes[0].texts]
    assert words.count("R") == 3 and words.count("L") == 3 and words.count("A") == words.count("P") == 1


def test_labels_and_opacity(patient: fl.Patient) -> None:
    case = make_case(patient, {})

    def coloured(**settings: Any) -> list[int]:
        drawn = draw_case(case, ViewSettings(layer="reference", crosshair=case.centre(), view="axial", **settings))
        shown = np.asarray(drawn.axes[0].images[0].get_array()) / 255
        return [int(np.isclose(shown, to_rgb(LABEL_COLOURS[value]), atol=0.01).all(axis=2).sum())
                for value in (1, 2, 4)]

    everything = coloured(opacity=1.0)
    assert all(everything)
    assert coloured(opacity=1.0, labels=(1, 4)) == [everything[0], 0, everything[2]]
    assert coloured(opacity=0.0) == coloured(opacity=1.0, overlay="none") == [0, 0, 0]


def test_static_everywhere_but_in_a_notebook(patient: fl.Patient, guess: torch.Tensor) -> None:
    viewer = fl.show(patient, {"federated": guess})
    assert viewer.backend == "static" and viewer.panel is None
    bundle, size = viewer._repr_mimebundle_()
    assert set(bundle) == {"image/png", "text/plain"} and bundle["image/png"].startswith(b"\x89PNG")
    assert "Dice" in bundle["text/plain"] and " at 0x" not in bundle["text/plain"]
    assert size["image/png"]["width"] > 300
    assert viewer._repr_mimebundle_()[0]["text/plain"] == bundle["text/plain"], "nbval compares it"


def test_auto_is_interactive_in_a_notebook(patient: fl.Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show_module, "_in_notebook", lambda: True)
    assert fl.show(patient).backend == "niivue"
    monkeypatch.setattr(show_module, "_installed", lambda *names: False)
    assert fl.show(patient).backend == "static"


def test_3d_shows_tumour_inside_the_brain(patient: fl.Patient) -> None:
    case = make_case(patient, {})

    def solid(**settings: Any) -> np.ndarray:
        drawn = draw_case(case, ViewSettings(layer="reference", crosshair=case.centre(), view="3-D", **settings))
        return np.asarray(drawn.axes[0].images[0].get_array()) / 255

    whole, bare = solid(), solid(overlay="none")
    assert (np.ptp(bare, axis=2) < 1e-6).all(), "the brain alone is grey"
    assert (bare > 0).any() and (np.ptp(whole, axis=2) > 0.1).sum() > 50
    assert np.abs(whole - solid(labels=(1, 4))).max() > 0.05, "without oedema the core is more visible"


# The interactive backend


def test_widget_and_picture_in_one(patient: fl.Patient, guess: torch.Tensor) -> None:
    bundle, _ = fl.show(patient, guess, backend="niivue")._repr_mimebundle_()
    assert set(bundle) == {WIDGET, "image/png", "text/plain"}
    assert bundle["text/plain"].startswith("<Viewer of p-1: reference, prediction")


def test_a_still_picture_comes_first(patient: fl.Patient, guess: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []

    class Place:
        def update(self, bundle: dict[str, Any], **_: Any) -> None:
            sent.append(bundle)

    def display(bundle: dict[str, Any], **_: Any) -> Place:
        sent.append(bundle)
        return Place()

    monkeypatch.setattr("IPython.display.display", display)
    viewer = fl.show(patient, guess, backend="niivue")
    viewer._ipython_display_()
    still, live = sent
    assert set(still) == {"image/png", "text/plain"} and set(live) == {WIDGET, "image/png", "text/plain"}
    assert panel_of(viewer).poster.png == still["image/png"], "it stays until the browser has drawn the canvas"
    assert panel_of(viewer).poster.covered is None
    viewer._ipython_display_()
    assert len(sent) == 3 and WIDGET in sent[2], "shown again, the canvas is there at once"
    fl.show(patient, guess, backend="static")._ipython_display_()
    assert len(sent) == 4 and WIDGET not in sent[3]


def test_browser_gets_bytes_of_what_is_shown(patient: fl.Patient, guess: torch.Tensor) -> None:
    viewer = fl.show(patient, {"a": guess}, modality="T1c", backend="niivue")
    panel, case = panel_of(viewer), viewer.case
    assert len(panel.canvas.volumes) == 2
    scan, over = (sent(volume) for volume in panel.canvas.volumes)
    assert scan.get_data_dtype() == over.get_data_dtype() == np.uint8
    assert np.array_equal(scan.affine, case.affine) and np.array_equal(over.affine, case.affine)
    assert np.array_equal(np.asarray(scan.dataobj), case.grey("T1c"))
    assert np.array_equal(np.asarray(over.dataobj), guess.numpy()[case.box])
    assert panel.canvas.opts.is_radiological_convention and panel.canvas.opts.is_orientation_text_visible


def test_controls_change_what_is_shown(patient: fl.Patient, guess: torch.Tensor) -> None:
    viewer = fl.show(patient, {"a": guess}, backend="niivue")
    panel, case = panel_of(viewer), viewer.case
    scan, over = panel.canvas.volumes
    posted: list[tuple[Any, Any]] = []
    for volume in (scan, over):
        volume.send = lambda content, buffers=None, of=volume: posted.append((of, buffers[0]))
    panel.controls["modality"].value = "T2"
    assert np.array_equal(np.asarray(sent(scan).dataobj), case.grey("T2"))
    panel.controls["arm"].value = "reference"
    assert np.array_equal(np.asarray(sent(over).dataobj), case.layer("reference"))
    assert [of for of, _ in posted] == [scan, over], "each change sends one volume"
    assert posted[0][1] == case.grey("T2").tobytes(order="F"), "NIfTI counts x fastest"
    assert "Dice" not in panel.numbers.value
    panel.controls["arm"].value = "a"
    panel.controls["overlay"].value = "errors TC"
    assert np.array_equal(np.asarray(sent(over).dataobj), case.errors("a", "TC"))
    assert "false positive TC" in panel.legend.value and "Dice" in panel.numbers.value
    panel.controls["overlay"].value = "none"
    assert not np.asarray(sent(over).dataobj).any()
    panel.controls["opacity"].value = 0.25
    assert over.opacity == 0.25 and scan.opacity == 1.0
    panel.controls["view"].value = "coronal"
    assert panel.canvas.opts.slice_type.name == "CORONAL"
    assert (viewer.settings.modality, viewer.settings.view, viewer.settings.opacity) == ("T2", "coronal", 0.25)


def test_reference_and_an_arm_side_by_side(patient: fl.Patient, guess: torch.Tensor) -> None:
    panel = panel_of(fl.show(patient, {"a": guess, "b": patient.label}, backend="niivue"))

    def beside() -> Any:
        return np.frombuffer(gzip.decompress(panel.canvas.beside), np.uint8).reshape(panel.case.shape, order="F")

    shown = panel.canvas.shown
    assert shown["layer"] == "a" and (shown["beside"]["name"], shown["beside"]["left"]) == ("reference", True)
    assert np.array_equal(beside(), panel.case.layer("reference"))
    assert shown["beside"]["colours"][4:8] == [0xE8, 0x43, 0x2E, 153], "red at the opacity of the overlay, 0.6"
    panel.controls["arm"].value = "reference"
    assert panel.canvas.shown["beside"]["name"] == "a" and not panel.canvas.shown["beside"]["left"]
    assert np.array_equal(beside(), panel.case.layer("a"))
    panel.controls["overlay"].value = "none"
    assert panel.canvas.shown["beside"] is None
    assert panel_of(fl.show(patient, backend="niivue")).canvas.shown["beside"] is None, "there is no arm"


def test_browser_knows_the_names_and_the_intensities(patient: fl.Patient, guess: torch.Tensor) -> None:
    panel = panel_of(fl.show(patient, {"a": guess}, backend="niivue"))
    assert panel.canvas.shown["names"][2] == "oedema" and panel.canvas.shown["modality"] == "FLAIR"
    low, high = panel.canvas.shown["low"], panel.canvas.shown["high"]
    assert 0.5 <= low < 0.55 and 1.45 < high <= 1.5, "percentiles of numbers between 0.5 and 1.5"
    panel.controls["overlay"].value = "errors TC"
    assert panel.canvas.shown["names"] == {1: "false positive TC", 2: "false negative TC", 3: "both TC"}
    assert panel.controls["ED"].disabled, "an error map has no oedema to hide"


def test_a_toggle_for_each_label(patient: fl.Patient) -> None:
    panel = panel_of(fl.show(patient, backend="niivue"))

    def clear() -> list[int]:
        table = np.array(panel.canvas.volumes[1].colormap_label.lut).reshape(-1, 4)
        return [value for value in (0, 1, 2, 4) if table[value, 3] == 0]

    assert clear() == [0]
    panel.controls["ED"].value = False
    assert clear() == [0, 2] and panel.settings.labels == (1, 4)
    panel.controls["NCR"].value = panel.controls["ET"].value = False
    assert clear() == [0, 1, 2, 4]


def test_sliders_and_crosshair_move_together(patient: fl.Patient) -> None:
    viewer = fl.show(patient, crosshair=(12, 15, 9), backend="niivue")
    panel = panel_of(viewer)
    shape, start = viewer.case.shape, [part.start for part in viewer.case.box]
    assert [panel.controls[plane].value for plane in ("sagittal", "coronal", "axial")] == [12, 15, 9]
    panel.controls["axial"].value = 4
    expected = [(12 - start[0] + 0.5) / shape[0], (15 - start[1] + 0.5) / shape[1], (4 - start[2] + 0.5) / shape[2]]
    assert panel.canvas.scene.crosshair_pos == pytest.approx(expected)
    before = list(panel.canvas.scene.crosshair_pos)
    for voxel in range(shape[0]):  # a click in the browser
        place = [(voxel + 0.5) / shape[0], 0.5, 0.999]
        panel.canvas._handle_custom_msg({"event": "location_change", "data": {"frac": place}}, [])
        assert panel.controls["sagittal"].value == voxel + start[0]
        assert panel.controls["axial"].value == panel.controls["axial"].max
    assert panel.canvas.scene.crosshair_pos == before, "what came from the browser isn't sent back"
    assert viewer.settings.crosshair == (shape[0] - 1, shape[1] // 2, shape[2] - 1)


def test_kernel_keeps_no_copy_of_each_modality() -> None:
    large = blob_patient("large", seed=1, shape=(64, 64, 64))
    panel = panel_of(fl.show(large, backend="niivue"))
    panel.controls["modality"].value = "T1"
    tracemalloc.start()
    try:
        for name in (*fl.core.MODALITIES, *fl.core.MODALITIES):
            panel.controls["modality"].value = name
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert grown < 1.5 * 64**3, f"{grown} bytes stay, more than one volume of bytes"
    panel.canvas.volumes[0].set_state({"chunk_img_0": {"chunk_index": 0, "total_chunks": 1, "data_type": "uint8",
                                                       "chunk": memoryview(bytes(64**3))}})
    assert panel.canvas.volumes[0].img is None, "the browser's copy is not kept either"


def test_close_frees_the_widgets(patient: fl.Patient) -> None:
    viewer = fl.show(patient, backend="niivue")
    canvas = panel_of(viewer).canvas
    assert canvas.comm is not None
    viewer.close()
    assert canvas.comm is None and all(volume.comm is None for volume in canvas.volumes)


def test_names_from_outside_are_escaped(patient: fl.Patient, guess: torch.Tensor) -> None:
    nasty = replace(patient, id="<script>1</script>")
    panel = panel_of(fl.show(nasty, {"<b>arm": guess}, backend="niivue"))
    for text in (panel.numbers.value, panel.legend.value):
        assert "<script>" not in text and "<b>arm" not in text
    assert "&lt;script&gt;" in panel.numbers.value


def test_importing_fedlab_loads_no_viewer() -> None:
    code = "import sys, fedlab; print([m for m in ('ipyniivue', 'itkwidgets', 'skimage') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


# Unavailable backends


def test_a_missing_backend_says_the_command(patient: fl.Patient, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="backend is one of 'auto', 'niivue', 'itk', 'static'"):
        fl.show(patient, backend="vtk")  # type: ignore[arg-type]
    monkeypatch.setattr(show_module, "_installed", lambda *names: False)
    with pytest.raises(fl.core.RunError, match=r"pip install 'fedlab-workbench\[lab\]'"):
        fl.show(patient, backend="niivue")


def test_itk_refuses_instead_of_hanging(patient: fl.Patient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(fl.core.RunError, match="JupyterLab only"):
        fl.show(patient, backend="itk")
    monkeypatch.setattr(itk, "_asked_by_lab", lambda: True)
    monkeypatch.setattr("jupyter_core.paths.jupyter_path", lambda *_: [str(tmp_path / "labextensions")])
    with pytest.raises(fl.core.RunError, match=r"fedlab itk install; .*backend='niivue'"):
        fl.show(patient, backend="itk")
    extension = tmp_path / "labextensions" / "fedlab-itkwidgets" / "package.json"
    extension.parent.mkdir(parents=True)
    extension.write_text("{}")
    settings = tmp_path / "labconfig" / "page_config.json"
    settings.parent.mkdir()
    monkeypatch.setattr("jupyter_core.paths.jupyter_config_path", lambda: [str(tmp_path)])
    settings.write_text('{"disabledExtensions": {"fedlab-itkwidgets": true}}')
    with pytest.raises(fl.core.RunError, match="labextension enable fedlab-itkwidgets"):
        fl.show(patient, backend="itk")
    settings.write_text('{"disabledExtensions": {"imjoy-jupyterlab-extension": true}}')
    assert fl.show(patient, backend="itk").backend == "itk"
    monkeypatch.setattr(itk.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(fl.core.RunError, match=r"pip install 'fedlab-workbench\[itk\]'"):
        fl.show(patient, backend="itk")
    assert "itkwidgets" not in sys.modules, "its import alone takes over the notebook's cells"


# Bad input


def test_no_label_no_prediction(patient: fl.Patient) -> None:
    bare = replace(patient, label=None)
    viewer = fl.show(bare, backend="niivue")
    assert "no label map" in panel_of(viewer).numbers.value and viewer._repr_mimebundle_()[0]["image/png"]
    with pytest.raises(ValueError, match="no label map, so there is no error map"):
        fl.show(bare, patient.label, overlay="errors WT")
    shown = fl.show(bare, patient.label, backend="niivue")
    assert panel_of(shown).controls["overlay"].options == ("labels", "none")
    assert "Dice" not in shown._repr_mimebundle_()[0]["text/plain"]


def test_another_shape(patient: fl.Patient) -> None:
    with pytest.raises(ValueError, match=r"has shape \(20, 24, 8\); expected a label map of shape \(20, 24, 16\)"):
        fl.show(patient, {"a": torch.zeros(20, 24, 8)})
    with pytest.raises(ValueError, match=r"or regions \(TC, WT, ET\) of shape \(3, 20, 24, 16\)"):
        fl.show(patient, torch.zeros(4, *SHAPE))
    with pytest.raises(ValueError, match=r"patient p-1: label is a uint8 tensor .* got .* \(20, 24, 15\)"):
        fl.show(replace(patient, label=torch.zeros(20, 24, 15, dtype=torch.uint8)))


def test_another_affine(patient: fl.Patient, guess: torch.Tensor, tmp_path: Path) -> None:
    moved = patient.affine.copy()
    moved[0, 3] += 4.0
    nib.save(nib.Nifti1Image(guess.numpy(), moved), tmp_path / "moved.nii")
    for form in (tmp_path / "moved.nii", nib.load(tmp_path / "moved.nii")):
        with pytest.raises(ValueError, match=r"lies elsewhere: .* \(-16.0, 7.0, 5.0\) mm, the patient's at \(-20.0"):
            fl.show(patient, {"a": form})
    turned = replace(patient, affine=np.diag([-1.0, -1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="point L, P, S"):
        fl.show(turned)


def test_empty_tumour(patient: fl.Patient) -> None:
    nothing = torch.zeros_like(patient.label)
    viewer = fl.show(replace(patient, label=nothing), {"a": nothing, "b": patient.label})
    assert [fact.dice for fact in viewer.case.facts("a")] == [1.0, 1.0, 1.0]
    assert [fact.dice for fact in viewer.case.facts("b")] == [0.0, 0.0, 0.0]
    assert viewer._repr_mimebundle_()[0]["image/png"]
    only = fl.show(replace(patient, label=nothing))
    assert only.settings.crosshair == tuple(size // 2 for size in only.case.shape) and only._repr_mimebundle_()


def test_a_scan_of_zeros(patient: fl.Patient) -> None:
    blank = replace(patient, image=torch.zeros(4, *SHAPE), label=None)
    viewer = fl.show(blank, backend="niivue")
    assert viewer.case.shape == SHAPE and viewer._repr_mimebundle_()[0]["image/png"]


def test_nans(patient: fl.Patient) -> None:
    image = patient.image.clone()
    image[1, 5, 5, 5:8] = torch.nan
    broken = replace(patient, image=image)
    with pytest.raises(ValueError, match="T1 of patient p-1 holds NaN or Inf in 3 voxels"):
        fl.show(broken, modality="T1")
    assert fl.show(broken, modality="T2")._repr_mimebundle_(), "the other modalities can be shown"
    with pytest.raises(ValueError, match="prediction 'a' of patient p-1 holds NaN or Inf: did the training"):
        fl.show(patient, {"a": torch.full((3, *SHAPE), torch.nan)})


def test_a_single_slice(patient: fl.Patient) -> None:
    flat = replace(patient, image=patient.image[..., 9:10], label=patient.label[..., 9:10])
    for backend in ("static", "niivue"):
        viewer = fl.show(flat, backend=backend)  # type: ignore[arg-type]
        assert viewer.case.shape[2] == 1 and viewer._repr_mimebundle_()[0]["image/png"]


def test_a_4d_file(patient: fl.Patient, tmp_path: Path) -> None:
    series = nib.Nifti1Image(np.zeros((*SHAPE, 4), dtype=np.uint8), patient.affine)
    nib.save(series, tmp_path / "series.nii")
    with pytest.raises(ValueError, match="expected one 3-D volume, got the shape"):
        fl.show(patient, tmp_path / "series.nii")
    with pytest.raises(ValueError, match=r"4-D image .* image\.slicer\[\.\.\., 0\]"):
        fl.show(patient, nib.load(tmp_path / "series.nii"))


def test_values_that_are_no_labels(patient: fl.Patient) -> None:
    with pytest.raises(ValueError, match=r"holds the value 3; .*torch\.where\(labels == 3, 4, labels\)"):
        fl.show(patient, torch.where(patient.label == 4, 3, patient.label))
    with pytest.raises(ValueError, match="holds invalid labels"):
        fl.show(patient, torch.rand(SHAPE))
    with pytest.raises(ValueError, match="logits need"):
        fl.show(patient, torch.randn(3, *SHAPE))
    with pytest.raises(ValueError, match="prediction 'a' is a list"):
        fl.show(patient, {"a": [1, 2, 3]})  # type: ignore[dict-item]


def test_thirty_patients_at_once() -> None:
    many = [blob_patient(f"p{number}", seed=number) for number in range(30)]
    with pytest.raises(ValueError, match=r"expected one Patient, got a list of 30 patients; fedlab\.compare"):
        fl.show(many)  # type: ignore[arg-type]
    arms = {"a": [fl.core.labels_to_regions(patient.label) for patient in many]}
    drawn = fl.compare(many, arms)
    assert drawn.get_figheight() <= 45, "too tall for a page"
    assert all(f"p{number}: a, WT Dice 1.00" in drawn.alt for number in range(30))
    assert drawn._repr_png_()[0]


def test_choices_that_do_not_exist(patient: fl.Patient) -> None:
    for settings, words in (({"modality": "T1w"}, "modality is one of 'FLAIR', 'T1', 'T1c', 'T2'"),
                            ({"view": "oblique"}, "view is one of 'all', 'axial'"),
                            ({"overlay": "errors"}, "overlay is one of 'labels'"),
                            ({"opacity": 2.0}, "opacity is at least 0 and at most 1"),
                            ({"labels": [3]}, "labels are some of"),
                            ({"arm": "federated"}, "there is no layer 'federated'; there are reference"),
                            ({"crosshair": (0, 0, 16)}, "crosshair is a voxel of the grid")):
        with pytest.raises(ValueError, match=words):
            fl.show(patient, **settings)
    with pytest.raises(ValueError, match="the arm name 'reference' is reserved"):
        fl.show(patient, {"reference": patient.label})


def test_real_scan_at_full_resolution(real_scans: Path) -> None:
    """A patient at 1 mm: only the head is sent to the browser, as bytes."""
    patient = fl.read_cohort(real_scans / "brats2021_1mm", progress=False)[0]
    viewer = fl.show(patient, {"a": torch.roll(patient.label, 3, 0)}, backend="niivue")
    size = sum(len(volume.data) for volume in panel_of(viewer).canvas.volumes)
    assert size < 0.8 * 240 * 240 * 155, "scan and overlay together are less than one volume of the BraTS grid"
    assert 0.5 < viewer.case.facts("a")[REGION_WT].dice < 1


REGION_WT = fl.core.REGIONS.index("WT")
