"""A saved viewer: what the page holds, that it admits only its own scripts, and what it refuses."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

import fedlab as fl
from cohorts import blob_patient
from fedlab.core.errors import RunError
from fedlab.view import live_viewer
from fedlab.view.report_page import Section, write_report


@pytest.fixture(scope="module")
def patient() -> fl.Patient:
    return blob_patient("p-1", seed=0)


def packed_data(page: str) -> dict[str, Any]:
    """What the page holds of the patients."""
    found = re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def unpacked(text: str) -> bytes:
    return gzip.decompress(base64.b64decode(text))


def test_voxels_labels_and_numbers_are_those_of_the_case(patient: fl.Patient, tmp_path: Path) -> None:
    viewer = fl.show(patient, {"a": patient.label.roll(1, 0)}, modality="T2", labels=(1, 4), crosshair=(9, 8, 7))
    data = packed_data(viewer.save(tmp_path / "patient.html").read_text("utf-8"))
    (one,) = data["cases"]
    for name in fl.core.MODALITIES:
        scan = nib.Nifti1Image.from_bytes(unpacked(one["modalities"][name]["data"]))
        assert np.array_equal(np.asarray(scan.dataobj), viewer.case.grey(name))
        assert np.allclose(scan.affine, viewer.case.affine, atol=1e-4), "NIfTI stores float32"
    for name, layer in one["layers"].items():
        voxels = np.frombuffer(unpacked(layer["data"]), np.uint8).reshape(viewer.case.shape, order="F")
        assert np.array_equal(voxels, viewer.case.layer(name))
    assert [fact["dice"] for fact in one["layers"]["a"]["facts"]] == [fact.dice for fact in viewer.case.facts("a")]
    assert {fact["dice"] for fact in one["layers"]["reference"]["facts"]} == {None}
    assert data["shown"] == {"modality": "T2", "layer": "a", "overlay": "labels", "opacity": 0.6, "view": 3,
                             "hidden": [2]}
    assert [at + start for at, start in zip(one["crosshair"], one["start"], strict=True)] == [9, 8, 7]


def test_grey_values_are_given_back_as_intensities(patient: fl.Patient) -> None:
    case = fl.show(patient).case
    low, high = case.grey_range("T1")
    scan, grey = patient.image[1][case.box].numpy(), case.grey("T1")
    inside = (grey > 10) & (grey < 255)
    assert inside.sum() > 100
    given_back = low + (grey[inside].astype(float) - 10) / 245 * (high - low)
    assert np.abs(given_back - scan[inside]).max() <= (high - low) / 245


def test_only_the_scripts_of_the_page_may_run(patient: fl.Patient, tmp_path: Path) -> None:
    nasty = replace(patient, id="</script><script>alert(1)</script>")
    page = fl.show(nasty, {"<b>arm</b>": patient.label}).save(tmp_path / "patient.html").read_text("utf-8")
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", page, re.DOTALL)
    assert [kind.split("=")[0] for kind, _ in scripts] == [" type", " type", ""], "data, NiiVue packed, our own"
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    wanted = [scripts[2][1].encode(), unpacked(scripts[1][1])]
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" for text in wanted]
    assert policy[1] == ("default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
                         f"script-src {' '.join(hashes)}; connect-src data:")
    assert "alert(1)" not in page.replace("\\u003c/script>\\u003cscript>alert(1)\\u003c/script>", "").replace(
        "&lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt;", ""), "names from outside are text"


def test_a_modality_with_nan_is_left_out(patient: fl.Patient, tmp_path: Path) -> None:
    image = patient.image.clone()
    image[1, 5, 5, 5] = torch.nan
    page = fl.show(replace(patient, image=image)).save(tmp_path / "patient.html").read_text("utf-8")
    assert list(packed_data(page)["cases"][0]["modalities"]) == ["FLAIR", "T1c", "T2"]


def test_the_same_viewer_gives_the_same_bytes(patient: fl.Patient, tmp_path: Path) -> None:
    one, other = (fl.show(patient).save(tmp_path / f"{name}.html") for name in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_refusals(patient: fl.Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    viewer = fl.show(patient)
    with pytest.raises(ValueError, match=r"saved as a page, \.html, got 'patient\.png'"):
        viewer.save(tmp_path / "patient.png")
    page = viewer.save(tmp_path / "patient.html")
    with pytest.raises(RunError, match="exists already"):
        viewer.save(page)
    live = live_viewer.live_viewer([viewer.case], viewer.settings)
    with pytest.raises(ValueError, match="at most one live viewer, got 2"):
        write_report(tmp_path / "two.html", title="t", lead="l", sections=[Section(live=live), Section(live=live)])
    with pytest.raises(ValueError, match="at least one patient"):
        live_viewer.live_viewer([], viewer.settings)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    live_viewer.niivue_script.cache_clear()
    with pytest.raises(RunError, match=r"needs ipyniivue, which is not installed. Install it with: pip install"):
        live_viewer.live_viewer([viewer.case], viewer.settings)


def test_another_ipyniivue_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "widget.js").write_text("export{Ab as default};")

    class Found:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: Found)
    live_viewer.niivue_script.cache_clear()
    with pytest.raises(RunError, match=r"built in another way than version 2\.4"):
        live_viewer.niivue_script()
    live_viewer.niivue_script.cache_clear()
