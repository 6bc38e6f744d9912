"""Notebooks in JupyterLab, in a real browser, without a network, as displayed after Run All Cells.

The tumour is on screen if its colours are present with the overlay and absent without it, while the brain stays.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbformat.v4 import new_code_cell, new_notebook

from lab import BRAIN, Pixels, Seen, Visit, coloured, differing, grey, pixels, wait_for, with_parameters

#: Seconds until a test fails; a shared machine may need a part of them.
PATIENCE = 600

DASHBOARD = """
import fedlab as fl
sites = fl.make_cohort(sizes=(3, 3), held_out=1, shape=(32, 40, 32), spacing_mm=4.5, seed=0, workers=0, progress=False)
trainer = fl.SiteTrainer(model=fl.segresnet(filters=8, seed=0), steps=1, crop=(16, 16, 16))
run = fl.view.BackgroundRun(trainer, sites, rounds=500, seed=0, validate=fl.view.SiteDice(sites=sites))
"""


def test_first_federated_run(visit: Callable[..., Visit], repository: Path, seen: Seen) -> None:
    notebook = visit(with_parameters(repository / "notebooks" / "01_first_federated_run.ipynb",
                                     sizes=(4, 3, 3), held_out=1, rounds=2, steps=1))
    notebook.run_all()
    wait_for(lambda: notebook.finished() or notebook.image("patients-figure") is not None, seconds=PATIENCE,
             why="the patients are not shown")
    seen.time("01: Run All to the first tumour", time.monotonic() - notebook.started)
    wait_for(notebook.finished, seconds=PATIENCE, why="the notebook has not finished")
    seen.time("01: Run All to the end", time.monotonic() - notebook.started)

    patient = notebook.image("patients-figure")
    assert patient is not None
    height, width = patient.shape[:2]  # two rows of three panels; the reference is the second of the lower row
    without, reference = patient[:height // 2 - 20], patient[height // 2 + 20:-150, width // 3:2 * width // 3]
    assert grey(without) > 1000 and grey(reference) > 1000, "there is no brain"
    assert coloured(reference) > 100 and coloured(without) < 20, "the tumour is in the panel of the reference only"

    dashboard = notebook.cell("dashboard")
    wait_for(lambda: "2 of 2 rounds" in dashboard.inner_text(), seconds=30,
             why="the dashboard does not say that all rounds are done")
    assert dashboard.locator("svg").count() >= 3, "the dashboard's curves are missing"
    bar = notebook.cell("arms").locator(".jupyter-widgets:has(.progress-bar-success)")
    wait_for(lambda: bar.count() and "2/2" in bar.first.inner_text(), seconds=30,
             why="the progress bar is not a widget that has reached its end")
    notebook.check_quiet()


def test_predictions_in_3d(visit: Callable[..., Visit], repository: Path, seen: Seen) -> None:
    notebook = visit(with_parameters(repository / "notebooks" / "06_visualise_predictions_in_3d.ipynb",
                                     sizes=(3, 3), held_out=1, rounds=1, steps=3))
    notebook.run_all()
    wait_for(lambda: notebook.finished() or notebook.cell("show").locator("canvas").count(), seconds=PATIENCE,
             why="no canvas")
    wait_for(lambda: grey(shot(notebook)) > BRAIN, seconds=PATIENCE, why="the canvas stays blank")
    began = notebook.began("show")
    assert began is not None
    seen.time("06: the viewer's cell to its first picture", time.time() - began)
    wait_for(notebook.finished, seconds=PATIENCE, why="the notebook has not finished")
    seen.time("06: Run All to the end", time.monotonic() - notebook.started)

    cell = notebook.cell("show")
    choose(cell, "arm", "reference")
    wait_for(lambda: coloured(shot(notebook)) > 100, seconds=120, why="the colours of the tumour are missing")
    reference = keep(seen, notebook, "06-reference")
    drag(notebook, cell, "opacity", 0.0)
    wait_for(lambda: coloured(shot(notebook)) < 20, seconds=120, why="the tumour stays at opacity 0")
    bare = keep(seen, notebook, "06-without-overlay")
    assert grey(bare) > BRAIN and differing(reference, bare) > 100, "only the tumour disappears"
    drag(notebook, cell, "opacity", 1.0)
    wait_for(lambda: coloured(shot(notebook)) > 100, seconds=120, why="the tumour does not reappear")

    for arm in ("public", "federated"):
        before = settled(notebook)
        choose(cell, "arm", arm)
        wait_for(lambda before=before: differing(before, shot(notebook)) > 100, seconds=120,
                 why="another arm gives the same overlay")
        assert volume(cell, "WT") > 1, f"the model {arm} predicts no tumour, so no test sees a prediction"
        assert coloured(keep(seen, notebook, f"06-{arm}")) > 100, f"the tumour predicted by {arm} is not on screen"
    full = settled(notebook)
    drag(notebook, cell, "axial", 0.15)
    wait_for(lambda: differing(full, shot(notebook)) > 500, seconds=120, why="another slice gives the same picture")
    keep(seen, notebook, "06-other-slice")
    seen.keep("06-controls", cell.screenshot())
    notebook.check_quiet()


def test_dashboard(visit: Callable[..., Visit], seen: Seen) -> None:
    cells = [new_code_cell(DASHBOARD.strip(), id="run"), new_code_cell("fl.RunDashboard(run)", id="dashboard")]
    python = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    notebook = visit(new_notebook(cells=cells, metadata=python))
    notebook.run_all()
    wait_for(notebook.finished, seconds=PATIENCE, why="the dashboard is not displayed")
    cell = notebook.cell("dashboard")

    def state(word: str) -> int | None:
        """Rounds finished if the dashboard is in this state, else None."""
        found = re.search(rf"● {word} — (\d+) of 500 rounds", cell.inner_text())
        return int(found[1]) if found else None

    def press(button: str) -> None:
        cell.locator("button").filter(has_text=button).click()

    def sent() -> list[str]:
        """Megabytes sent per site, from the table."""
        head, *rows = cell.locator("table tr").all()
        column = head.locator("th").all_inner_texts().index("sent [MB]")
        return [row.locator("td").nth(column).inner_text() for row in rows]

    wait_for(lambda: state("ready") == 0, seconds=30, why="the dashboard is not drawn")
    press("Start")
    wait_for(lambda: (state("running") or 0) >= 2, seconds=PATIENCE, why="the rounds do not continue")
    press("Pause")
    wait_for(lambda: state("paused") is not None, seconds=120, why="it does not pause")
    paused, bytes_then = state("paused"), sent()
    assert paused is not None and len(bytes_then) == 2
    time.sleep(2)
    assert state("paused") == paused, "a paused run continues"
    press("Step")
    wait_for(lambda: state("paused") == paused + 1, seconds=120, why="a step is not one round")
    assert all(float(now) > float(then) for now, then in zip(sent(), bytes_then, strict=True)), "no number has changed"
    assert cell.locator("svg").count() >= 5, "curves are missing"
    seen.keep("dashboard-paused", cell.screenshot())
    press("Continue")
    wait_for(lambda: (state("running") or 0) > paused + 1, seconds=120, why="it does not continue")
    press("Stop")
    wait_for(lambda: state("stopped") is not None, seconds=120, why="it does not stop")
    assert cell.locator("button").filter(has_text="Continue").is_disabled(), "a stopped run can be continued"
    notebook.no_errors_in_cells()
    notebook.check_quiet()


def test_playground(visit: Callable[..., Visit], seen: Seen) -> None:
    cells = [new_code_cell("import fedlab as fl\nfl.view.PrivacyPlayground(steps=150, auto=False)",
                           id="playground")]
    python = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    notebook = visit(new_notebook(cells=cells, metadata=python))
    notebook.run_all()
    wait_for(notebook.finished, seconds=PATIENCE, why="the playground is not displayed")
    cell = notebook.cell("playground")

    def seen_by_the_attacker() -> float | None:
        """The correlation within FLAIR, once the attack on these settings has ended."""
        found = re.search(r"within them FLAIR (-?\d\.\d\d)", cell.inner_text())
        return float(found[1]) if found else None

    assert seen_by_the_attacker() is None, "there was no attack yet"
    cell.locator("button").filter(has_text="Reconstruct").click()
    wait_for(lambda: seen_by_the_attacker() is not None, seconds=PATIENCE, why="the attack does not end")
    plain = seen_by_the_attacker()
    seen.keep("playground", cell.screenshot())
    cell.get_by_text("add noise").click()
    wait_for(lambda: seen_by_the_attacker() is None, seconds=60, why="the attack on other settings is still shown")
    cell.locator("button").filter(has_text="Reconstruct").click()
    wait_for(lambda: seen_by_the_attacker() is not None, seconds=PATIENCE, why="the second attack does not end")
    noisy = seen_by_the_attacker()
    assert plain is not None and noisy is not None and plain > noisy + 0.05, (plain, noisy)
    notebook.check_quiet()


def shot(notebook: Visit) -> Pixels:
    """The viewer's canvas as displayed."""
    return pixels(notebook.cell("show").locator("canvas").first.screenshot())


def settled(notebook: Visit) -> Pixels:
    """The canvas once it no longer changes."""
    shots = [shot(notebook)]

    def still() -> bool:
        shots.append(shot(notebook))
        return differing(shots[-1], shots[-2]) == 0

    wait_for(still, seconds=120, why="the picture keeps changing")
    return shots[-1]


def keep(seen: Seen, notebook: Visit, name: str) -> Pixels:
    """Keeps a screenshot of the settled canvas, and returns it."""
    picture = settled(notebook)
    seen.keep(name, notebook.cell("show").locator("canvas").first.screenshot())
    return picture


def choose(cell: Any, control: str, option: str) -> None:
    """Selects an option of the drop-down list with this description."""
    cell.locator(".widget-dropdown").filter(has_text=control).locator("select").first.select_option(label=option)


def volume(cell: Any, region: str) -> float:
    """ml of a region in the arm that is shown, from the table beside the canvas."""
    row = cell.locator("tr").filter(has_text=region).first
    return float(row.locator("td").first.inner_text())


def drag(notebook: Visit, cell: Any, control: str, share: float) -> None:
    """Drags the handle of the slider with this description to a share of its length, with the mouse."""
    slider = cell.locator(".widget-slider").filter(has_text=control).first
    slider.scroll_into_view_if_needed()
    track, handle = slider.locator(".noUi-base").bounding_box(), slider.locator(".noUi-handle").bounding_box()
    mouse = notebook.page.mouse
    mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    mouse.down()
    mouse.move(track["x"] + share * track["width"], handle["y"] + handle["height"] / 2, steps=3)
    mouse.up()
