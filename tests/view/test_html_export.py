"""`jupyter nbconvert --execute --to html`: a picture for each viewer and dashboard, and no address to load from."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from nbconvert import HTMLExporter

WIDGET = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
MADE = """
import fedlab as fl
from cohorts import blob_patient, blob_sites
from tqdm.auto import tqdm
from trainers import trainer
patient = blob_patient('p', seed=0)"""
SHOWN = ["fl.show(patient, {'guess': patient.label}, backend='niivue')", "fl.show(patient, backend='static')",
         "run = fl.view.BackgroundRun(trainer(), blob_sites(), rounds=2)\nrun.start()\nfl.RunDashboard(run)",
         "fl.view.PrivacyPlayground(patient=patient, crop=12, auto=False)"]


def template(repository: Path) -> Path:
    return repository / "fedlab" / "view" / "templates" / "notebook_html"


def addresses(page: str) -> list[str]:
    """The addresses that a browser would load for the page: attributes, style sheets and scripts."""
    soup = BeautifulSoup(page, "html.parser")
    found = [value for tag in soup.find_all(True) for name, value in tag.attrs.items()
             if name in {"src", "srcset", "data", "poster", "action"} or (name == "href" and tag.name != "a")]
    styles = [tag.get_text() for tag in soup.find_all("style")] + [str(tag["style"]) for tag in soup.select("[style]")]
    for style in styles:
        style = re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL)
        found += re.findall(r"url\(\s*['\"]?([^'\")]+)", style) + re.findall(r"@import\s+['\"]([^'\"]+)", style)
    return [address for address in found if not address.startswith(("data:", "#"))]


def test_every_viewer_and_dashboard_is_a_picture_and_nothing_is_loaded(repository: Path, tmp_path: Path) -> None:
    """The plain command, with the settings that `make install` writes."""
    written = re.search(r"^OFFLINE := (.*)$", (repository / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert written is not None
    settings = tmp_path / "jupyter_nbconvert_config.json"
    settings.write_text(written[1].replace("$(CURDIR)", str(repository)))
    assert json.loads(settings.read_text()) == {"HTMLExporter": {"template_name": str(template(repository))}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in (
        MADE, *SHOWN, "history = run.wait()", "for _ in tqdm(range(3), desc='steps'): pass")])
    nbformat.write(notebook, tmp_path / "shown.ipynb")
    command = [sys.executable, "-m", "nbconvert", "--execute", "--to", "html", f"--output-dir={tmp_path}",
               "--ExecutePreprocessor.timeout=300", str(tmp_path / "shown.ipynb")]
    paths = {"JUPYTER_CONFIG_DIR": str(tmp_path), "JUPYTER_PLATFORM_DIRS": "1",
             "PYTHONPATH": os.pathsep.join([str(repository), str(repository / "tests")])}
    done = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "shown.html").read_text("utf-8")
    assert addresses(page) == []
    soup = BeautifulSoup(page, "html.parser")
    assert not soup.find_all(["script", "link", "iframe", "object"]) and STATE not in page
    cells = soup.select(".jp-CodeCell")
    niivue, static, dashboard, playground = (cell.select_one(".jp-Cell-outputWrapper") for cell in cells[1:5])
    for viewer in (niivue, static):
        (picture,) = viewer.select("img")
        assert base64.b64decode(picture["src"].removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert "2 of 2 rounds" in dashboard.get_text() and len(dashboard.select("svg path")) > 10
    assert len(playground.select("img")) >= 4 and playground.select("svg path")
    assert "steps" not in cells[6].select_one(".jp-Cell-outputWrapper").get_text(), "a bar without a kernel"


def test_a_stored_notebook_gives_pictures_and_keeps_no_state_of_widgets(repository: Path) -> None:
    """As saved by JupyterLab with the state of its widgets, which holds the voxels that the browser was sent."""
    view = {WIDGET: {"model_id": "a", "version_major": 2}, "text/plain": "Viewer"}
    outputs = [nbformat.v4.new_output("display_data", data=view | {"image/png": "iVBORw0KGgo="}),
               nbformat.v4.new_output("display_data", data=view)]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("show()", outputs=outputs)])
    notebook.metadata = {"title": "Mine", "widgets": {STATE: {"state": {"a": {"png": "voxels"}}, "version_major": 2}}}
    page, _ = HTMLExporter(template_name=str(template(repository))).from_notebook_node(notebook)
    assert "iVBORw0KGgo=" in page and "voxels" not in page and "<title>Mine</title>" in page
    assert addresses(page) == [] and "<script" not in page
    usual, _ = HTMLExporter(template_name="lab").from_notebook_node(notebook)
    assert addresses(usual), "the usual page loads scripts; else this template is not needed any more"
