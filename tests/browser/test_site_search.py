"""The documentation site in a browser, from the disk: its search finds pages, notebooks and names, and asks nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def site(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, str(repository / "docs" / "gallery.py"), "--no-run", "--out", str(folder)],
                   check=True, capture_output=True, timeout=300, env={**os.environ, "PYTHONPATH": str(repository)})
    return folder


@pytest.mark.parametrize(("start", "words", "kind", "address"), [
    ("index.html", "multi-krum", "page", "faults.html#faults-and-strategies-compared"),
    ("index.html", "gossip", "reference", "reference/fedlab/topologies.html#Gossip"),
    ("reference/fedlab/privacy.html", "exercises dpsgd", "notebook", "05_opacus_dp_sgd.html"),
    ("source/fedlab/run/federate.html", "inspect folder", "page", "own_scans.html"),
])
def test_the_search_leads_to_what_was_looked_for(browser: Any, site: Path, start: str, words: str, kind: str,
                                                 address: str) -> None:
    page, asked, wrong = browser.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    try:
        page.goto((site / start).as_uri())
        page.keyboard.press("/")
        page.keyboard.type(words)
        link = page.locator("#found li a", has_text=kind).locator(f"xpath=self::*[contains(@href, '{address}')]").first
        link.wait_for()
        link.click()
        page.wait_for_url(f"**/{address}*")
        assert not wrong and all(url.startswith("file://") for url in asked)
    finally:
        page.close()


@pytest.mark.parametrize("path", ["index.html", "workflows.html", "architecture.html", "01_first_federated_run.html",
                                  "reference/fedlab.html"])
def test_a_phone_needs_no_scrolling_sideways(browser: Any, site: Path, path: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    try:
        page.goto((site / path).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert page.locator("#search").is_visible()
    finally:
        page.close()
