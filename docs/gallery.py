"""Builds the documentation site: notebooks, pages and the reference, with a search, for reading without a network.

    python docs/gallery.py [--no-run] [--out runs/gallery] [NOTEBOOK ...]

Every notebook runs in a kernel of its own, the one it names, with the parameters it is committed with. A live widget
of JupyterLab is a picture here. With --no-run the notebooks are shown as they are committed, which takes seconds. At
the end every link of the site is followed; a broken one makes this program fail.
"""

from __future__ import annotations

import argparse
import html
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import nbformat
from bs4 import BeautifulSoup
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbconvert.preprocessors import ExtractOutputPreprocessor
from pygments.formatters import HtmlFormatter
from tqdm.auto import tqdm

from links import broken_links
from pages import REPOSITORY, Page, Places, markdown_files, markdown_page, page_of, source_page
from search import write_index

TEMPLATES = Path(__file__).resolve().parent / "templates"
MARK = "gallery.css"  # the style sheet; written first, so that the next build knows the folder as its own
WIDGET = "application/vnd.jupyter.widget-view+json"
#: The form that is shown of an output, first choice first: a picture before a live widget.
FORMS = ["image/png", "image/svg+xml", "image/jpeg", "text/html", "text/markdown", "text/plain"]
#: The tag of the cell whose picture stands for its notebook on the start page.
THUMBNAIL = "thumbnail"
#: The namespaces in the order of a study: patients, training, federation, privacy, evidence, viewing, and the rest.
NAMESPACES = ("data", "training", "strategies", "run", "topologies", "privacy", "checks", "evidence", "view", "faults",
              "engines", "deploy", "core")
#: The end of a notebook's promise, which the start page says once for all of them.
TIME_IT_TAKES = re.compile(r",\s+in\s+about\s[^.]*?\([^)]*\)")
#: Markdown that only MathJax could show; loading that takes another machine.
TEX = re.compile(r"\$\$|\\begin\{|(?<![\w$\\])\$[^\s$][^$\n]*\$")


def execute(notebook: Any, folder: Path, *, timeout_s: int = 900) -> float:
    """Runs all cells of a notebook in `folder` and stores the outputs in it; returns the seconds that took.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message names the cell and the error.
    """
    started = time.monotonic()
    kernel = notebook.metadata.get("kernelspec", {}).get("name", "python3")
    client = NotebookClient(notebook, timeout=timeout_s, kernel_name=kernel,
                            extra_arguments=["--IPKernelApp.log_level=ERROR"],  # not that TCP within a machine is plain
                            resources={"metadata": {"path": str(folder)}})
    client.execute()
    return time.monotonic() - started


def without_live_widgets(notebook: Any) -> None:
    """Removes the state of widgets, and outputs that are only widgets, such as progress bars: they need a kernel."""
    notebook.metadata.pop("widgets", None)  # it holds all that the browser was sent: megabytes of scans
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs
                            if WIDGET not in output.get("data", {}) or set(output["data"]) & set(FORMS[:4])]


def notebook_page(notebook: Any, path: Path, places: Places, *, seconds: float | None) -> Page:
    """A notebook as a page; its pictures become files in a folder NAME_files of the site, itself one to download.

    The cell with the tag "thumbnail" has the picture of the start page, its last one.

    Raises:
        ValueError: the notebook has no title, or TeX, which would have to be loaded from elsewhere; or it has run and
            its cell with the tag "thumbnail" shows no picture.
    """
    name = path.stem
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (found := TEX.search(cell.source)):
            raise ValueError(f"{name}: the site loads no MathJax, so write {found[0]!r} without TeX, as in ε or x²")
    without_live_widgets(notebook)
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    exporter.display_data_priority = FORMS
    exporter.register_preprocessor(ExtractOutputPreprocessor(enabled=True))
    body, resources = exporter.from_notebook_node(
        notebook, resources={"unique_key": name, "output_files_dir": f"{name}_files"})
    for file, content in (resources["outputs"] or {}).items():
        (places.out / file).parent.mkdir(parents=True, exist_ok=True)
        (places.out / file).write_bytes(content)

    soup = BeautifulSoup(body, "html.parser")
    places.localise(soup, path.resolve())
    shutil.copyfile(path, places.out / path.name)
    chosen = soup.select(f".celltag_{THUMBNAIL} img")
    if seconds is not None and not chosen:
        raise ValueError(f'{name}: the cell with the tag "{THUMBNAIL}" shows no picture; tag a cell with a figure')
    for picture in soup.select("img"):
        picture["alt"] = ""  # the text around a figure says what it shows
    for number, figure in enumerate(soup.select("a.figure"), 1):
        figure["id"] = f"figure-{number}"
        figure.insert_after(soup.new_tag("a", attrs={
            "class": "anchor-link", "href": f"#{figure['id']}", "aria-label": "address of this figure"}))
    return page_of(soup, kind="notebook", name=name, seconds=seconds,
                   figure=str(chosen[-1]["src"]) if chosen else None)


def write_reference(out: Path) -> dict[str, str]:
    """Writes the reference of fedlab's public names into `out`: a page for the top and one per namespace.

    Returns:
        Namespace -> the first sentence of its docstring.

    Raises:
        ValueError: `NAMESPACES` lists other namespaces than there are.
    """
    import pdoc

    import fedlab

    namespaces = {name: getattr(fedlab, name) for name in NAMESPACES}
    if missing := {name for name in dir(fedlab) if hasattr(getattr(fedlab, name), "__path__")} ^ set(namespaces):
        raise ValueError(f"NAMESPACES in {Path(__file__).name} is out of date: {', '.join(sorted(missing))}")
    for package in (fedlab, *namespaces.values()):
        for name in package.__all__:
            getattr(package, name)  # pdoc sees only names that are loaded, and takes a module of the same name for them
    footer = f"fedlab {fedlab.__version__}"
    pdoc.render.configure(docformat="google", search=False, show_source=False, footer_text=footer,
                          template_directory=TEMPLATES)
    pdoc.render.env.filters["code"] = _with_code
    pdoc.render.env.globals["groups"] = [_group(fedlab, name, package) for name, package in namespaces.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # annotations that pdoc cannot evaluate are shown as they are written
        pdoc.pdoc("fedlab", "!fedlab\\.apps", "!fedlab\\..+\\..+", output_directory=out)
    for page in out.rglob("*.html"):
        page.write_text(_without_dead_links(page.read_text("utf-8")), "utf-8")
    return {name: _first_sentence(package) for name, package in namespaces.items()}


def _group(top: Any, name: str, package: Any) -> dict[str, Any]:
    """A namespace on the first page of the reference: its names that are at the top too, and the others."""
    first = {each: _first_sentence(getattr(package, each)) + "." for each in package.__all__ if each in top.__all__}
    return {"name": name, "text": _first_sentence(package), "first": first,
            "rest": [each for each in package.__all__ if each not in first]}


def _with_code(text: str) -> markupsafe.Markup:
    return markupsafe.Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(text, quote=False)))


def _first_sentence(named: Any) -> str:
    return re.split(r"\.(?:\s+(?=[A-Z])|$)", " ".join(str(named.__doc__).split("\n\n")[0].split()))[0]


def _without_dead_links(page: str) -> str:
    """A page of pdoc's without its links to inherited names, which it does not show."""
    shown = set(re.findall(r'\bid="([^"]+)"', page))
    return re.sub(r'<a href="#([^"]+)">(.*?)</a>', lambda link: link[0 if link[1] in shown else 2], page)


def build(notebooks: Sequence[Path], out: Path, *, run: bool = True) -> list[str]:
    """Builds the site from notebooks, in their order, and from the Markdown pages of the repository.

    Args:
        notebooks: files; none of them is changed.
        out: a folder for the site; the files of an earlier build are removed.
        run: whether to run the notebooks.

    Returns:
        The broken links of the site, one line each.

    Raises:
        ValueError: the folder is not empty and holds no gallery, or not one cell of a notebook has the tag "thumbnail".
    """
    if out.exists() and not (out / MARK).exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds something else than a gallery; name another folder or remove it yourself")
    for path in notebooks:
        check_thumbnail(path)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    colours = HtmlFormatter(style="default").get_style_defs(".highlight")
    (out / MARK).write_text("\n".join([*((TEMPLATES / name).read_text("utf-8") for name in (MARK, "search.css")),
                                       colours, ""]), "utf-8")
    for script in ("search.js", "copy.js"):
        shutil.copyfile(TEMPLATES / script, out / script)

    texts = markdown_files()
    places = Places(out, {**{path.resolve(): f"{path.stem}.html" for path in notebooks},
                          **{path: f"{name}.html" for path, (_, name) in texts.items()},
                          REPOSITORY / "README.md": "index.html"})
    bar = tqdm(notebooks, desc="gallery: running notebooks", unit="notebook", disable=not run)
    pages = [_notebook(path, places, run=run) for path in bar]
    pages += [markdown_page(path, kind, name, places) for path, (kind, name) in texts.items()]
    print("gallery: writing the reference", flush=True)
    namespaces = write_reference(out / "reference")
    write_pages(pages, places, namespaces)
    kinds = {f"{page.name}.html": page.kind for page in pages}
    kinds |= {f"reference/{name}.html": "reference" for name in ("fedlab", *(f"fedlab/{one}" for one in namespaces))}
    print(f"gallery: {write_index(out, kinds)} entries in the search")
    return broken_links(out)


def check_thumbnail(path: Path) -> None:
    """Raises `ValueError` unless one cell of a notebook has the tag "thumbnail"."""
    cells = nbformat.read(path, as_version=4).cells
    found = sum(THUMBNAIL in cell.metadata.get("tags", ()) for cell in cells)
    if found != 1:
        raise ValueError(f'{path.name}: expected one cell with the tag "{THUMBNAIL}", whose figure stands for the '
                         f"notebook on the start page; found {found}. Tag the cell with the most telling figure")


def _notebook(path: Path, places: Places, *, run: bool) -> Page:
    notebook, seconds = nbformat.read(path, as_version=4), None
    if run:
        seconds = execute(notebook, path.resolve().parent)  # the folder that its relative paths start from
        tqdm.write(f"gallery: {path.name} took {seconds:.0f} s")
    return notebook_page(notebook, path, places, seconds=seconds)


def write_pages(pages: Sequence[Page], places: Places, namespaces: Mapping[str, str]) -> None:
    """Writes the start page, a page for each notebook and Markdown file, and the source files that they link to."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                     undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    notebooks = [page for page in pages if page.kind == "notebook"]
    topics = [page for page in pages if page.kind == "page"]
    brief = [replace(page, promise=TIME_IT_TAKES.sub("", page.promise)) for page in notebooks]
    common: dict[str, Any] = {"notebooks": notebooks, "topics": topics, "root": "", "page": None}

    def write(name: str, template: str, **values: object) -> None:
        file = places.out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(environment.get_template(template).render(common | values), "utf-8")

    readme = markdown_page(REPOSITORY / "README.md", "page", "README", places)
    picture = BeautifulSoup(readme.body, "html.parser").select_one("img")
    write("index.html", "index.html.j2", brief=brief, lead=readme.promise, picture=picture, namespaces=namespaces)
    for series in (notebooks, topics):
        for before, page, after in zip([None, *series], series, [*series[1:], None], strict=False):
            write(f"{page.name}.html", "page.html.j2", page=page, before=before, after=after)
    for page in pages:
        if page.kind == "data card":
            write(f"{page.name}.html", "page.html.j2", page=page, before=None, after=None)
    for path, name in places.sources.items():
        write(name, "source.html.j2", root="../" * name.count("/"), path=path.relative_to(REPOSITORY).as_posix(),
              body=source_page(path))


def main(arguments: Iterable[str] | None = None) -> int:
    """The command line; 0 if every link of the site holds, 1 if one is broken."""
    parser = argparse.ArgumentParser(description="Build the documentation site: notebooks, pages and API reference.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="which notebooks; all in notebooks/ by default")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "runs" / "gallery", help="the folder of the site")
    parser.add_argument("--no-run", action="store_true",
                        help="show the notebooks as they are committed, without outputs")
    chosen = parser.parse_args(None if arguments is None else list(arguments))
    problems = build(chosen.notebooks or sorted((REPOSITORY / "notebooks").glob("*.ipynb")), chosen.out,
                     run=not chosen.no_run)
    for problem in problems:
        print(f"gallery: {problem}", file=sys.stderr)
    if not problems:
        print(f"gallery: every link holds; open {chosen.out / 'index.html'}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
