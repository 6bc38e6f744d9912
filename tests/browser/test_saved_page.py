"""`fl.show(...).save(...)` and a report: live 3-D in one file, opened from disk in a real browser without a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedlab as fl
from fedlab.view.label_layers import ViewSettings, make_case
from fedlab.view.live_viewer import live_viewer
from fedlab.view.report_page import Section, write_report
from lab import Pixels, Seen, coloured, differing, grey, pixels, tiles, wait_for

PATIENCE = 120  # seconds
SIZE = (64, 64, 64)  # of the demo, at 3 mm
MM = 3.0


@pytest.fixture(scope="module")
def patients() -> list[fl.Patient]:
    """Four heads of the demo's size, a tumour of three parts in each, noise that does not pack well."""
    found = []
    x, y, z = np.indices(SIZE)
    for number in range(4):
        rng = np.random.default_rng(number)
        head = (((x - 31.5) / 26) ** 2 + ((y - 31.5) / 30) ** 2 + ((z - 31.5) / 24) ** 2 < 1).astype(np.float32)
        image = head * (2 + 0.5 * rng.standard_normal((4, *SIZE)).astype(np.float32))
        away = np.sqrt((x - 40 - number) ** 2 + (y - 38) ** 2 + (z - 34) ** 2)
        label = np.select([away < 5, away < 8, away < 12], [1, 4, 2], 0).astype(np.uint8)
        affine = np.diag([MM, MM, MM, 1.0])
        affine[:3, 3] = -96
        found.append(fl.Patient(f"site-{number}", torch.from_numpy(image), torch.from_numpy(label), affine))
    return found


class Opened:
    """A page from disk, offline, with all that it asked for and all that its console said."""

    def __init__(self, browser: Any, path: Path, width: int = 1400) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 1000}, offline=True)
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(path.as_uri())
        self.viewer, self.canvas = self.page.locator(".fedlab-viewer"), self.page.locator(".canvas canvas").first
        self.viewer.scroll_into_view_if_needed()
        wait_for(lambda: self.canvas.get_attribute("data-millilitres") is not None, seconds=PATIENCE,
                 why=lambda: f"the 3-D view is not drawn: {self.errors}")

    def views(self) -> dict[str, Pixels]:
        """The views once they no longer change."""
        shots = [tiles(self.canvas)]

        def still() -> bool:
            shots.append(tiles(self.canvas))
            return shots[-1].keys() == shots[-2].keys() and not any(
                differing(shots[-1][name], shots[-2][name]) for name in shots[-1])

        wait_for(still, seconds=PATIENCE, why="the picture keeps changing")
        return shots[-1]

    def press(self, text: str) -> None:
        self.viewer.get_by_role("button", name=text, exact=True).click()

    def choose(self, menu: str, option: str) -> None:
        self.viewer.locator(".controls label", has_text=menu).locator("select").select_option(label=option)


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    pages: list[Opened] = []

    def open_page(path: Path, width: int = 1400) -> Opened:
        pages.append(Opened(browser, path, width))
        return pages[-1]

    yield open_page
    for one in pages:
        one.context.close()
        assert one.errors == [], one.errors
        assert all(address.startswith(("file:", "data:", "blob:")) for address in one.requests), one.requests


def hue(picture: Pixels, colour: str) -> int:
    """Number of pixels near the hue of a colour: green, yellow, red, blue or magenta."""
    red, green, blue = np.moveaxis(picture, -1, 0)
    found = {"green": (green > red + 0.15) & (green > blue + 0.08), "yellow": (red > blue + 0.2) & (green > blue + 0.2),
             "red": (red > green + 0.25) & (red > blue + 0.2), "magenta": (red > green + 0.25) & (blue > green + 0.25),
             "blue": (blue > red + 0.2) & (blue > green + 0.15)}
    return int(found[colour].sum())


def test_a_saved_patient_is_alive(patients: list[fl.Patient], opened: Any, tmp_path: Path, seen: Seen) -> None:
    patient = patients[0]
    label = patient.label
    arms = {"federated": label.roll(4, 0), "pooled": torch.where(label > 0, 2, 0).to(torch.uint8)}
    page = opened(fl.show(patient, arms).save(tmp_path / "patient.html"))
    seen.keep("saved-patient", page.page.screenshot(full_page=True))
    start = page.views()
    assert set(start) == {"axial beside", "axial", "coronal", "sagittal", "3-D"}
    for name, view in start.items():
        assert coloured(view) > 100 and grey(view) > 1000, f"no tumour or no brain in {name}"
    assert hue(start["axial beside"], "red") > 100 < hue(start["axial beside"], "yellow"), "the reference has all parts"
    assert hue(start["3-D"], "green") > 300 and hue(start["3-D"], "yellow") < 30, "the oedema is opaque"

    page.press("ED")
    core = page.views()
    assert hue(core["3-D"], "green") < 30 and hue(core["3-D"], "yellow") > 100, "its core shows without it"
    assert hue(core["axial"], "green") < 30, "a part is hidden in slices as in 3-D"
    page.press("ED")
    page.press("pooled")
    pooled = page.views()
    assert hue(pooled["axial"], "yellow") < 30 < hue(pooled["axial"], "green"), "the other arm has oedema only"
    assert differing(pooled["axial beside"], start["axial beside"]) < 50, "the reference beside it stays"
    page.press("federated")
    page.choose("overlay", "errors WT")
    errors = page.views()
    for name in ("axial", "3-D"):
        assert hue(errors[name], "magenta") > 100 and hue(errors[name], "blue") > 100, "false positives and negatives"
    page.choose("overlay", "none")
    assert all(coloured(view) < 20 for view in page.views().values())
    page.choose("overlay", "labels")
    page.choose("modality", "T1c")
    assert differing(page.views()["coronal"], start["coronal"]) > 500
    page.choose("view", "3-D")
    assert set(page.views()) == {"3-D"}


def test_surfaces_enclose_the_labels(patients: list[fl.Patient], opened: Any, tmp_path: Path) -> None:
    """The reference is the one layer; surfaces of a ball and of shells are compared with their voxels."""
    page = opened(fl.show(patients[0]).save(tmp_path / "patient.html"))
    found = json.loads(page.canvas.get_attribute("data-millilitres"))
    for value in (1, 2, 4):
        voxels = int((patients[0].label == value).sum()) * MM**3 / 1000
        assert found[str(value)] == pytest.approx(voxels, rel=0.02)


def test_tools_under_the_views(patients: list[fl.Patient], opened: Any, tmp_path: Path) -> None:
    page = opened(fl.show(patients[0], {"a": patients[0].label}).save(tmp_path / "patient.html"))
    before = page.views()["axial"]
    # The largest slices meet in the centre of the ball, voxel (40, 38, 34): -96 mm + 3 mm times each.
    said = page.viewer.locator(".fedlab-cursor").inner_text()
    assert "R 24.0" in said and "A 18.0" in said and "S 6.0" in said and "FLAIR" in said and "core" in said
    box = page.canvas.bounding_box()
    page.page.mouse.move(box["x"] + 8, box["y"] + 30)
    assert "outside" in page.viewer.locator(".fedlab-cursor").inner_text()
    page.viewer.locator(".fedlab-level").evaluate(
        "slider => { slider.value = 230; slider.dispatchEvent(new Event('input')); }")
    assert page.views()["axial"].mean() < 0.7 * before.mean(), "a higher level is darker"
    with page.page.expect_download() as download:
        page.press("Save picture")
    saved = Path(tmp_path / "saved.png")
    download.value.save_as(saved)
    assert download.value.suggested_filename == "site-0.png" and coloured(pixels(saved.read_bytes())) > 500
    assert page.page.evaluate("""() => new Promise(resolve => {
        document.addEventListener("securitypolicyviolation", event => resolve(event.effectiveDirective));
        setTimeout(() => resolve("nothing refused"), 20_000);
        fetch("http://127.0.0.1:9/").catch(() => {}); })""") == "connect-src"
    wait_for(lambda: page.errors, seconds=20, why="the console says nothing of the refusal")
    page.errors.clear()


def test_four_patients_in_a_report(patients: list[fl.Patient], opened: Any, tmp_path: Path, seen: Seen) -> None:
    arms = {"federated": 0, "pooled": 1, "local": 2}
    cases = [make_case(one, {name: one.label.roll(step, 0) for name, step in arms.items()}) for one in patients]
    live = live_viewer(cases, ViewSettings(layer="federated", crosshair=cases[0].centre()))
    path = write_report(tmp_path / "report.html", title="A run", lead="Four patients.",
                        sections=[Section(title="In 3-D", live=live)])
    assert path.stat().st_size < 12e6
    page = opened(path)
    first = page.views()
    page.choose("patient", "site-3")
    other = page.views()
    assert differing(first["axial"], other["axial"]) > 500 and coloured(other["3-D"]) > 100
    narrow = opened(path, 390)
    seen.keep("saved-report-390", narrow.page.screenshot(full_page=True))
    assert narrow.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert all(coloured(view) > 50 for view in narrow.views().values())
