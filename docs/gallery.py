"""Builds the gallery: a static site of the executed notebooks and the API reference, for reading without a network.

    python docs/gallery.py [--out runs/gallery] [NOTEBOOK ...]

Every notebook runs in a kernel of its own, the one it names, with the parameters it is committed with. What a widget
shows alive in JupyterLab is a picture here. At the end every link of the site is followed; a broken one makes this
program fail.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from bs4 import BeautifulSoup
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ExtractOutputPreprocessor
from pygments.formatters import HtmlFormatter

from links import broken_links

REPOSITORY = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).resolve().parent / "templates"
MARK = "gallery.css"  # the style sheet; the first file of a build, so that the next one knows the folder as its own
WIDGET = "application/vnd.jupyter.widget-view+json"
#: What is shown of an output that comes in several forms, first choice first: a picture before a live widget.
FORMS = ["image/png", "image/svg+xml", "image/jpeg", "text/html", "text/markdown", "text/plain"]
#: Markdown that only MathJax could show; loading that takes another machine.
TEX = re.compile(r"\$\$|\\begin\{|(?<![\w$\\])\$[^\s$][^$\n]*\$")


@dataclass(frozen=True, kw_only=True)
class Page:
    """A notebook on the site.

    Attributes:
        name: of its file, without the ending.
        title: its first heading.
        promise: its first paragraph, what the reader will do, as HTML.
        body: the notebook, as HTML.
        figure: the picture for the index, relative to the site; None where it has none.
        seconds: how long it ran.
    """

    name: str
    title: str
    promise: str
    body: str
    figure: str | None
    seconds: float


def execute(notebook: Any, folder: Path, *, timeout_s: int = 900) -> float:
    """Runs all cells of a notebook in `folder`, outputs into itself; how many seconds that took.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; says which and how.
    """
    started = time.monotonic()
    kernel = notebook.metadata.get("kernelspec", {}).get("name", "python3")
    client = NotebookClient(notebook, timeout=timeout_s, kernel_name=kernel,
                            resources={"metadata": {"path": str(folder)}})
    client.execute()
    return time.monotonic() - started


def without_live_widgets(notebook: Any) -> None:
    """Removes what only lives with a kernel: the state of widgets, and outputs that are nothing else, as progress bars.
    """
    notebook.metadata.pop("widgets", None)  # it holds all that the browser was sent: megabytes of scans
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs
                            if WIDGET not in output.get("data", {}) or set(output["data"]) & set(FORMS[:4])]


def render(notebook: Any, name: str, out: Path, *, seconds: float) -> Page:
    """Turns an executed notebook into a page; its pictures become files in `out`/`name`_files.

    Raises:
        ValueError: the notebook has no title, or TeX, which would have to be loaded from elsewhere.
    """
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (found := TEX.search(cell.source)):
            raise ValueError(f"{name}: the site loads no MathJax, so write {found[0]!r} without TeX, as in ε or x²")
    without_live_widgets(notebook)
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.display_data_priority = FORMS
    exporter.register_preprocessor(ExtractOutputPreprocessor(enabled=True))
    body, resources = exporter.from_notebook_node(
        notebook, resources={"unique_key": name, "output_files_dir": f"{name}_files"})
    for path, content in (resources["outputs"] or {}).items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(content)

    soup = BeautifulSoup(body, "html.parser")
    for link in soup.select('a[href*=".ipynb"]'):
        link["href"] = str(link["href"]).replace(".ipynb", ".html")
    for picture in soup.select("img"):
        picture["loading"] = "lazy"
        picture["alt"] = ""  # the text around a figure says what is to be seen
    title, promise = soup.find("h1"), soup.find("p")
    if title is None or promise is None:
        raise ValueError(f"{name}: a notebook begins with a title and a paragraph that says what the reader will do")
    pictures = soup.select("img")
    return Page(name=name, title=_words(title), promise=promise.decode_contents(), body=str(soup),
                figure=str(pictures[-1]["src"]) if pictures else None, seconds=seconds)


def write_reference(out: Path) -> None:
    """Writes the reference of fedlab's public names into `out`: a page for the top and one per namespace."""
    import pdoc

    import fedlab

    for package in (fedlab, *(getattr(fedlab, name) for name in dir(fedlab))):
        for name in getattr(package, "__all__", ()):
            getattr(package, name)  # pdoc sees only names that are loaded, and takes a module of the same name for them
    footer = f"fedlab {fedlab.__version__}"
    pdoc.render.configure(docformat="google", search=False, show_source=False, footer_text=footer,
                          template_directory=TEMPLATES)
    pdoc.pdoc("fedlab", "!fedlab\\.apps", "!fedlab\\..+\\..+", output_directory=out)


def build(notebooks: Sequence[Path], out: Path) -> list[str]:
    """Builds the site from notebooks, in their order; what is broken in it, a line each.

    Args:
        notebooks: files; none of them is changed.
        out: a folder for the site; whatever an earlier build left there is gone.

    Raises:
        ValueError: the folder holds something else than a gallery.
    """
    if out.exists() and not (out / MARK).exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds something else than a gallery; name another folder or remove it yourself")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    colours = HtmlFormatter(style="default").get_style_defs(".highlight")
    (out / MARK).write_text((TEMPLATES / MARK).read_text("utf-8") + colours + "\n", "utf-8")
    pages = []
    for path in notebooks:
        print(f"gallery: running {path.name}", end=" ", flush=True)
        notebook = nbformat.read(path, as_version=4)
        seconds = execute(notebook, path.resolve().parent)  # where its paths, as ../data_cards, lead
        print(f"({seconds:.0f} s)", flush=True)
        pages.append(render(notebook, path.stem, out, seconds=seconds))
    write_pages(pages, out)
    print("gallery: writing the reference", flush=True)
    write_reference(out / "reference")
    return broken_links(out)


def write_pages(pages: Sequence[Page], out: Path) -> None:
    """Writes the index and a page for each notebook."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    _write(out / "index.html", environment, "index.html.j2", {"pages": pages})
    around = zip([None, *pages], pages, [*pages[1:], None], strict=False)
    for before, page, after in around:
        _write(out / f"{page.name}.html", environment, "notebook.html.j2",
               {"pages": pages, "page": page, "before": before, "after": after})


def _write(file: Path, environment: jinja2.Environment, template: str, values: Mapping[str, object]) -> None:
    file.write_text(environment.get_template(template).render(values), "utf-8")


def _words(heading: Any) -> str:
    """The text of a heading without the sign that links to it."""
    return str(heading.get_text()).rstrip("¶").strip()


def main(arguments: Iterable[str] | None = None) -> int:
    """The command line; 0 where the site is whole, 1 where a link in it is broken."""
    parser = argparse.ArgumentParser(description="Build the static gallery of notebooks and the API reference.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="which notebooks; all in notebooks/ by default")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "gallery", help="the folder of the site")
    chosen = parser.parse_args(None if arguments is None else list(arguments))
    problems = build(chosen.notebooks or sorted((REPOSITORY / "notebooks").glob("*.ipynb")), chosen.out)
    for problem in problems:
        print(f"gallery: {problem}", file=sys.stderr)
    if not problems:
        print(f"gallery: every link holds; open {chosen.out / 'index.html'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
