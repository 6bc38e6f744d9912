"""The site and a report in a browser, from the disk: they fit a desk and a phone, and the search finds everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from runs import finished_demo, whole_site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_site(tmp_path_factory.getbasetemp()).folder


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


#: What lies outside the window of a page, and text smaller than 9 pixels, also in drawings that are scaled down.
FAULTS = """() => {
  const found = [], wide = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > wide) found.push("the page scrolls sideways");
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.data.trim(), holder = texts.currentNode.parentElement;
    const box = holder.getBoundingClientRect(), drawing = holder.closest("svg[viewBox]");
    if (!text || holder.closest("script, style, noscript") || box.width < 2 || box.height < 2) continue;
    const scale = drawing ? drawing.getBoundingClientRect().width / drawing.viewBox.baseVal.width : 1;
    const size = parseFloat(getComputedStyle(holder).fontSize) * scale;
    if (size < 9) found.push(`${size.toFixed(1)} px: ${text.slice(0, 60)}`);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_demo(tmp_path_factory.getbasetemp()).folder / "report.html"


def layout_faults(browser: Any, pages: list[Path], width: int) -> dict[str, list[str]]:
    page = browser.new_page(viewport={"width": width, "height": 900})
    try:
        found = {}
        for path in pages:
            page.goto(path.as_uri())
            found[path.name] = page.evaluate(FAULTS)
        return {name: faults for name, faults in found.items() if faults}
    finally:
        page.close()


@pytest.mark.parametrize("width", [1400, 390])
def test_every_page_fits_a_desk_and_a_phone(browser: Any, site: Path, report: Path, width: int) -> None:
    pages = [path for path in sorted(site.rglob("*.html")) if "source" not in path.relative_to(site).parts
             and 'http-equiv="refresh"' not in path.read_text("utf-8")]
    assert len(pages) > 30 and layout_faults(browser, [*pages, report], width) == {}


def test_a_page_that_does_not_fit_is_noticed(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<p style="width: 50rem">wide</p><p style="font-size: 8px">tiny</p>'
                    '<svg viewBox="0 0 1000 100" width="200"><text y="50" font-size="20">drawn</text></svg>')
    assert layout_faults(browser, [page], 390) == {
        "page.html": ["the page scrolls sideways", "8.0 px: tiny", "4.0 px: drawn"]}
