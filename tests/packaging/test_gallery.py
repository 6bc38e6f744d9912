"""The gallery is whole: built from a notebook it needs no other machine, and broken links in it are found."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import fedlab
from runs import whole_site
from warm import PYTHON

FIGURE = """
from matplotlib.figure import Figure
from IPython.display import display

class Alive(Figure):
    def _repr_mimebundle_(self, **kwargs):
        return {"application/vnd.jupyter.widget-view+json": {"model_id": "0", "version_major": 2, "version_minor": 0},
                "image/png": self._repr_png_(), "text/plain": "alive only in JupyterLab"}

    def _repr_png_(self):
        import base64, io
        file = io.BytesIO()
        self.savefig(file, format="png")
        return base64.b64encode(file.getvalue()).decode()

figure = Alive(figsize=(1, 1))
figure.add_subplot().plot([1, 2])
figure
"""
BAR = "from ipywidgets import IntProgress\nIntProgress(value=3)"


@pytest.fixture(scope="module")
def links(repository: Path) -> ModuleType:
    """docs/links.py, which is a program beside the package."""
    spec = importlib.util.spec_from_file_location("links", repository / "docs" / "links.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(source: str) -> Any:
    """A cell of code whose figure stands for the notebook on the start page."""
    return new_code_cell(source, metadata={"tags": ["thumbnail"]})


def build(repository: Path, folder: Path, *cells: Any, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Runs docs/gallery.py on a notebook of these cells, into `folder`/site."""
    folder.mkdir(exist_ok=True)
    notebook = new_notebook(cells=[new_markdown_cell("# Small\n\nYou will see **one** figure."), *cells])
    nbformat.write(notebook, folder / "01_small.ipynb")
    command = [*PYTHON, str(repository / "docs" / "gallery.py"), str(folder / "01_small.ipynb"), *options,
               "--out", str(folder / "site")]
    return subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "IPYTHONDIR": str(folder / "ipython")})


@pytest.fixture(scope="module")
def site(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of one small notebook."""
    folder = tmp_path_factory.mktemp("gallery")
    done = build(repository, folder, shown(FIGURE), new_code_cell("figure"), new_code_cell(BAR),
                 new_code_cell("print(6 * 7)"),
                 new_markdown_cell("## Two words\n\nSee [above](01_small.ipynb#Small) and [1](https://arxiv.org/abs/1)."))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every link holds" in done.stdout
    return folder / "site"


def test_notebook_shows_what_it_computed(site: Path) -> None:
    page = BeautifulSoup((site / "01_small.html").read_text("utf-8"), "html.parser")
    shown = "".join(output.get_text() for output in page.select(".output_wrapper"))
    assert shown.split() == ["42"], "the PNG comes before other forms of a live output, a dead progress bar goes"
    assert "print(6 * 7)" in " ".join(page.select_one("article").get_text().split())
    picture, last = page.select("article img")
    assert last["src"] != picture["src"]
    assert (site / picture["src"]).read_bytes().startswith(b"\x89PNG")
    assert picture.parent["href"] == picture["src"], "a figure opens at full size"
    assert [one["id"] for one in page.select("a.figure")] == ["figure-1", "figure-2"]
    assert page.select_one('a.anchor-link[href="#figure-2"]'), "and has an address of its own"
    assert not page.select("article script"), "no widget waits for a kernel"
    assert page.select_one('a[href="01_small.html#Small"]'), "links between notebooks lead to their pages"


def test_a_notebook_can_be_downloaded_as_it_is(site: Path) -> None:
    page = BeautifulSoup((site / "01_small.html").read_text("utf-8"), "html.parser")
    link = page.select_one("a[download]")
    assert link and (site / str(link["href"])).read_bytes() == (site.parent / "01_small.ipynb").read_bytes()


def test_index_has_the_map(site: Path) -> None:
    page = BeautifulSoup((site / "index.html").read_text("utf-8"), "html.parser")
    (entry,) = page.select(".map li")
    assert "01 Small" in " ".join(entry.get_text().split()) and "You will see one figure." in entry.get_text()
    shown = BeautifulSoup((site / "01_small.html").read_text("utf-8"), "html.parser").select("article img")
    assert entry.select_one("img")["src"] == shown[0]["src"], "the figure of the cell with the tag thumbnail"
    assert entry.select_one('a[href="01_small.html"]')


def test_the_start_page_leads_to_every_page_and_namespace(site: Path, repository: Path) -> None:
    page = BeautifulSoup((site / "index.html").read_text("utf-8"), "html.parser")
    names = [path.stem for path in (repository / "docs").glob("*.md")]
    cards = {str(link["href"]) for link in page.select(".topics li > a")}
    assert len(names) >= 7 and cards == {f"{name}.html" for name in [*names, "contributing", "changelog"]}
    assert {str(link["href"]) for link in page.select("nav.series li a")} == {"01_small.html", *cards}
    assert "Hospitals that cannot pool their scans" in page.get_text(" ", strip=True).replace("\n", " ")
    assert (site / str(page.select_one(".start img")["src"])).stat().st_size > 10_000
    namespaces = [name for name in fedlab.__all__ if isinstance(getattr(fedlab, name), ModuleType)]
    assert {f"reference/fedlab/{name}.html" for name in namespaces} == {
        str(link["href"]) for link in page.select("dl.names a")}


def test_pages_are_rendered_with_their_tables_pictures_and_sources(site: Path) -> None:
    page = BeautifulSoup((site / "workflows.html").read_text("utf-8"), "html.parser")
    assert page.select("article table") and page.select("article .highlight .k, article .highlight .kn")
    assert (site / str(page.select_one("article img")["src"])).read_bytes().startswith(b"\x89PNG")
    assert page.select_one('article a[href="faults.html"]') and page.select_one('article a[href$="workflows.csv"]')
    assert page.find(string=re.compile("Notebook 07")), "a link to a notebook that is not in the site is plain text"
    assert page.select_one('h2#workflows-and-strategies-compared'), "headings have the ids that code hosts give them"
    page = BeautifulSoup((site / "architecture.html").read_text("utf-8"), "html.parser")
    assert "<!--" not in page.get_text() and (site / str(page.select_one("article img")["src"])).suffix == ".svg"
    source = BeautifulSoup((site / "source/fedlab/run/federate.html").read_text("utf-8"), "html.parser")
    assert "def federate(" in source.select_one("main").get_text()


def test_the_search_knows_notebooks_pages_and_reference(site: Path) -> None:
    text = (site / "search-index.js").read_text("utf-8")
    assert text.startswith("window.fedlabSearch([") and "</" not in text
    entries = json.loads(text.removeprefix("window.fedlabSearch(").removesuffix(");\n"))
    assert {entry["k"] for entry in entries} == {"notebook", "page", "data card", "reference"}
    found = {(entry["k"], entry["h"] or entry["t"]): entry for entry in entries}
    assert "print(6 * 7)" in found["notebook", "Small"]["x"]
    assert found["notebook", "Two words"]["u"] == "01_small.html#Two-words"
    assert found["page", "Faults and strategies compared"]["u"] == "faults.html#faults-and-strategies-compared"
    assert "rounds" in found["reference", "federate"]["x"]
    names = [entry["h"] for entry in entries if entry["k"] == "reference"]
    assert len(set(names)) == len(names) > 100
    for entry in entries:
        file, _, anchor = entry["u"].partition("#")
        assert not anchor or f'id="{anchor}"' in (site / file).read_text("utf-8"), entry["u"]
    own = [page for page in site.rglob("*.html") if page.name != "index.html" and site / "files" not in page.parents]
    assert all('id="search"' in page.read_text("utf-8") for page in own)  # but not what a page offers as a file


def test_notebooks_can_be_shown_without_running_them(tmp_path_factory: pytest.TempPathFactory) -> None:
    site = whole_site(tmp_path_factory.getbasetemp())
    assert "every link holds" in site.printed
    page = BeautifulSoup((site.folder / "fails.html").read_text("utf-8"), "html.parser")
    assert "1 / 0" in " ".join(page.select_one("article").get_text().split()) and not page.select(".output_wrapper")


def test_reference_has_every_public_name(site: Path) -> None:
    page = BeautifulSoup((site / "reference" / "fedlab.html").read_text("utf-8"), "html.parser")
    namespaces = [name for name in fedlab.__all__ if isinstance(getattr(fedlab, name), ModuleType)]
    first = [str(term["id"]) for term in page.select(".group dt[id]")]
    assert sorted([*first, *namespaces]) == sorted(fedlab.__all__), "each name at the top, once"
    assert len(page.select(".group")) == len(namespaces)
    for namespace in namespaces:
        inner = (site / "reference" / "fedlab" / f"{namespace}.html").read_text("utf-8")
        names = getattr(fedlab, namespace).__all__
        assert not [name for name in names if f'<section id="{name}">' not in inner], namespace
        listed = {str(link["href"]) for link in page.select(f'.group a[href^="fedlab/{namespace}.html"]')}
        assert listed == {f"fedlab/{namespace}.html", *(f"fedlab/{namespace}.html#{name}" for name in names)}
    inner = (site / "reference" / "fedlab" / "run.html").read_text("utf-8")
    section = BeautifulSoup(inner[inner.index('<section id="federate">'):].partition("</section>")[0], "html.parser")
    assert "rounds" in section.get_text() and section.find(string="Raises:"), "its docstring is laid out"
    assert section.find(string="Example:") and section.select(".highlight, .codehilite"), "its example is code"


def test_loads_nothing_from_elsewhere(site: Path) -> None:
    number = 0
    for file in site.rglob("*.html"):
        tags = "".join(re.findall(r"<(?:script|img|link)\b[^>]*>", file.read_text("utf-8")))  # all of it takes long
        page = BeautifulSoup(tags.replace("<script", "<img"), "html.parser")  # the code of a script is no page
        loaded = [tag.get("src") or tag.get("href") for tag in page.select("img[src], link[rel=stylesheet]")]
        assert not [address for address in loaded if address.startswith(("http:", "https:", "//"))]
        number += len(loaded)
    assert number > 100


def test_a_planted_broken_link_is_found(site: Path, tmp_path: Path, repository: Path, links: ModuleType) -> None:
    assert links.broken_links(site) == []
    copy = tmp_path / "site"  # of two pages that lead to each other
    copy.mkdir()
    shutil.copyfile(site / "gallery.css", copy / "gallery.css")
    for name, other in (("01_small.html", "index.html"), ("index.html", "01_small.html")):
        body = f'<article><a href="{other}">1</a></article>'
        (copy / name).write_text(f'<link rel="stylesheet" href="gallery.css">{body}', "utf-8")
    assert links.broken_links(copy) == []
    page = copy / "01_small.html"
    page.write_text(page.read_text("utf-8").replace("</article>", '<a href="02_gone.html">next</a></article>'), "utf-8")
    assert links.broken_links(copy) == ["01_small.html: 02_gone.html doesn't exist"]
    done = subprocess.run([sys.executable, str(repository / "docs" / "links.py"), str(copy)], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 1 and "02_gone.html" in done.stdout
    (copy / "gallery.css").unlink()
    assert "01_small.html: gallery.css doesn't exist" in links.broken_links(copy)


@pytest.mark.parametrize("html, problem", [
    ('<a href="#here">', None), ('<a href="#">', None), ('<a href="other.html#place">', None),
    ('<a href="https://doi.org/10.1/x">', None), ('<img src="data:image/png;base64,AA">', None),
    ('<a href="mailto:a@example.org">', None), ('<link rel="canonical" href="https://example.org/">', None),
    ('<style>p { background: url(data:image/png;base64,AA) }</style>', None), ('<a href="a%20b.html">', None),
    ('<h2 id="%CE%B5"><a href="#%CE%B5">', None), ('<h2 id="ε"><a href="#%CE%B5">', None),
    ('<script>const said = "see https://example.org";</script>', None),
    ('<a href="#gone">', "no such place"), ('<a href="other.html#gone">', "no such place"),
    ('<a href="gone.html">', "doesn't exist"), ('<img src="gone.png">', "doesn't exist"),
    ('<img srcset="other.html 1x, gone.png 2x">', "doesn't exist"), ('<a href="/other.html">', "root of a server"),
    ('<a href="../page.html">', "out of the site"), ('<a href="file:///x.html">', "only works on some machines"),
    ('<a href="http://localhost:8888/lab">', "no place that others can reach"), ('<a href=".">', "is a folder"),
    ('<img src="https://example.org/a.png">', "another machine"),
    ('<script src="//cdn.example.org/mathjax.js"></script>', "another machine"),
    ('<link rel="stylesheet" href="https://example.org/a.css">', "another machine"),
    ('<style>@import "https://example.org/a.css";</style>', "another machine"),
    ('<p style="background: url(https://example.org/a.png)">', "another machine"),
    ('<script type="module">import x from "https://example.org/x.mjs";</script>', "another machine"),
    ('<script>fetch("https://example.org/x.json")</script>', "another machine"),
    ('<meta http-equiv="refresh" content="0; url=gone.html">', "doesn't exist"),
    ('<base href="https://example.org/">', "turn every link"),
])
def test_links(links: ModuleType, tmp_path: Path, html: str, problem: str | None) -> None:
    (tmp_path / "page.html").write_text(f'<p id="here">{html}', "utf-8")
    for name in ("other.html", "a b.html"):
        (tmp_path / name).write_text('<h2 id="place">', "utf-8")
    found = links.broken_links(tmp_path)
    assert len(found) == (problem is not None), found
    assert problem is None or problem in found[0]


def test_style_sheets_are_read(links: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<p>", "utf-8")
    (tmp_path / "a.css").write_text("@font-face { src: url('https://example.org/f.woff2') }", "utf-8")
    assert links.broken_links(tmp_path) == ["a.css: loads https://example.org/f.woff2 from another machine"]


def test_a_folder_without_pages_is_no_site(links: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no page"):
        links.broken_links(tmp_path)


def test_a_failing_notebook_stops_the_build(repository: Path, tmp_path: Path) -> None:
    done = build(repository, tmp_path, shown("1 / 0"))
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    again = build(repository, tmp_path, shown("1"), new_markdown_cell("The sum $x$."))
    assert "loads no MathJax" in again.stderr, "what a failed build leaves is no obstacle to the next one"


def test_tex_is_refused(repository: Path, tmp_path: Path) -> None:
    done = build(repository, tmp_path, shown("1"), new_markdown_cell("The sum $x^2$."))
    assert done.returncode == 1 and "loads no MathJax" in done.stderr


@pytest.mark.parametrize("cells, found", [([new_code_cell(FIGURE)], 0), ([shown(FIGURE), shown("figure")], 2)])
def test_a_notebook_without_one_thumbnail_is_refused_before_it_runs(
        repository: Path, tmp_path: Path, cells: list[Any], found: int) -> None:
    done = build(repository, tmp_path, *cells)
    assert done.returncode == 1 and "running notebooks" not in done.stderr
    assert '01_small.ipynb: expected one cell with the tag "thumbnail"' in done.stderr
    assert f"found {found}. Tag the cell" in done.stderr
    assert not (tmp_path / "site").exists(), "an earlier site is still there"


def test_a_thumbnail_without_a_figure_is_refused(repository: Path, tmp_path: Path) -> None:
    done = build(repository, tmp_path, new_code_cell(FIGURE), shown("print(1)"))
    assert done.returncode == 1 and 'the cell with the tag "thumbnail" shows no picture' in done.stderr


def test_nothing_else_is_overwritten(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "thesis.txt").write_text("mine")
    done = build(repository, tmp_path)
    assert done.returncode == 1 and "holds something else" in done.stderr
    assert (tmp_path / "site" / "thesis.txt").read_text() == "mine"
