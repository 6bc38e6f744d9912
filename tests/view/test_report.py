"""A report is one file that loads nothing, escapes everything and overwrites nothing."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from fedlab.core.errors import RunError
from fedlab.view.report_page import Section, save_figure, write_report
from fedlab.view.run_figures import cross_site_heatmap


class Page(HTMLParser):
    """The page as a browser reads it: the tags with their attributes, and the text."""

    VOID = frozenset({"meta", "img", "br", "link", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def small_figure() -> Figure:
    figure = Figure(figsize=(4, 2))
    figure.add_subplot().plot([1, 2])
    return figure


def sections() -> list[Section]:
    table = pd.DataFrame({"WT": [0.81234, np.nan], "patients": [24, 123456], "kind": ["a <b>", "c"]},
                         index=pd.Index(["federated", "local"], name="arm"))
    heat = cross_site_heatmap(pd.DataFrame({"Bern": [0.8]}, index=["federated"]))
    return [Section(title="Dice", text="First.\n\nSecond\nline.", table=table, caption="How well."),
            Section(title="Curves", figure=small_figure(), caption="Loss falls."),
            Section(title="Sites", figure=heat), Section(figure=small_figure(), alt="Two points <1>.")]


def written(tmp_path: Path, **changed: object) -> str:
    arguments = {"title": "A run", "lead": "One paragraph.", "sections": sections(),
                 "results": {"mean Dice": "0.79"}, "settings": {"seed": 0, "training": {"lr": 4e-3, "shape": (3, 4)}},
                 "versions": {"fedlab": "0.1.0"}, "notes": ["Reference: Li et al., https://doi.org/10.1000/x"]}
    path = write_report(tmp_path / "report.html", **(arguments | changed))  # type: ignore[arg-type]
    return path.read_text(encoding="utf-8")


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    html = written(tmp_path)
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "form", "base"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "srcset", "action", "data", "poster", "background"}:
                assert value is not None and value.startswith(("data:image/png;base64,", "#")), (tag, name)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert "https://doi.org/10.1000/x" in page.text  # an address is allowed as text


def test_the_page_is_well_formed_and_says_everything(tmp_path: Path) -> None:
    page = Page(written(tmp_path))
    assert page.open == []
    for words in ("A run", "One paragraph.", "mean Dice", "0.79", "First.", "Second line.", "How well.", "0.812",
                  "training, lr", "0.004", "training, shape", "3, 4", "fedlab 0.1.0", "Li et al."):
        assert words in page.text
    assert page.tags[0] == ("html", {"lang": "en"})
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [link["href"] for link in page.all("a")]
    assert links == ["#part-1", "#part-2", "#part-3", "#notes", "#settings"]
    assert {str(link)[1:] for link in links} <= set(ids)


def test_figures_are_pngs_with_words_for_who_does_not_see_them(tmp_path: Path) -> None:
    images = Page(written(tmp_path)).all("img")
    for image in images:
        source = image["src"]
        assert source is not None
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG\r\n")
    assert images[0]["alt"] == "Loss falls."
    assert "federated from 0.80 to 0.80" in str(images[1]["alt"])
    assert images[2]["alt"] == "Two points <1>."
    assert (images[0]["width"], images[0]["height"]) == ("384", "192")
    with pytest.raises(ValueError, match="caption= or alt="):
        Section(title="Silent", figure=small_figure())


def test_tables_have_heads_dashes_and_aligned_numbers(tmp_path: Path) -> None:
    html = re.sub(' data-label="[^"]*"', "", written(tmp_path))  # a phone's head of the column
    assert '<tr><th scope="row">federated</th><td class="number">0.812</td><td class="number">24</td>' in html
    assert '<td class="number">–</td><td class="number">123\N{NARROW NO-BREAK SPACE}456</td><td>c</td>' in html
    assert '<th scope="col">arm</th>' in html
    assert "nan" not in Page(html).text.lower()


EVIL = '<script>alert("x")</script><img src=x onerror=y>\'"&'


def test_everything_is_escaped(tmp_path: Path) -> None:
    table = pd.DataFrame({EVIL: [EVIL]}, index=pd.Index([EVIL], name=EVIL))
    html = written(tmp_path, title=EVIL, lead=EVIL, results={EVIL: EVIL}, settings={EVIL: {EVIL: EVIL}},
                   versions={EVIL: EVIL}, notes=[EVIL],
                   sections=[Section(title=EVIL, text=EVIL, table=table, caption=EVIL),
                             Section(title=EVIL, figure=small_figure(), caption=EVIL, alt=EVIL)])
    page = Page(html)
    assert not page.all("script")
    assert len(page.all("img")) == 1
    assert page.all("img")[0]["alt"] == EVIL
    assert page.text.count(EVIL) >= 15


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    written(tmp_path)
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(RunError, match="exists already and is not overwritten"):
        written(tmp_path, title="Another")
    assert (tmp_path / "report.html").read_bytes() == before
    saved = save_figure(small_figure(), tmp_path / "figures" / "curves.png", dpi=50)
    assert saved.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RunError, match="exists already"):
        save_figure(small_figure(), saved)
    with pytest.raises(ValueError, match=r"written as \.png"):
        save_figure(small_figure(), tmp_path / "curves.pdf")


def test_same_content_same_bytes_and_a_bare_page_works(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert written(tmp_path / "a") == written(tmp_path / "b")
    bare = Page(write_report(tmp_path / "bare.html", title="Bare", lead="Only this.", sections=[]).read_text())
    assert not bare.all("table") and not bare.all("nav") and not bare.all("dl")


def test_the_verdict_stands_first_and_figures_before_tables_before_notes(tmp_path: Path) -> None:
    table = pd.DataFrame({"HD95 [mm]": [12.345]}, index=pd.Index(["federated"], name="arm"))
    one = Section(title="Both", figure=small_figure(), table=table, caption="Both of them.", note="A footnote.")
    html = written(tmp_path, verdict="The answer.", sections=[one])
    text = html.partition("</style>")[2]
    places = [text.index(words) for words in ("The answer.", "One paragraph.", "<img", "<table", "A footnote.")]
    assert places == sorted(places)
    assert '<td class="number" data-label="HD95 [mm]">12.3</td>' in html


def test_a_figure_opens_at_full_size_without_a_script(tmp_path: Path) -> None:
    page = Page(written(tmp_path))
    assert len(page.all("details")) == len(page.all("img")) == 3
