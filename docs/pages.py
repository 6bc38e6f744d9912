"""Pages of the site: Markdown files and notebooks as HTML, and the places that their links lead to."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mistune
from bs4 import BeautifulSoup, Tag
from PIL import Image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

REPOSITORY = Path(__file__).resolve().parents[1]
#: The order of the pages in docs/; a page that is missing here follows in alphabetical order.
ORDER = ("workflows", "faults", "privacy", "guarantees", "evidence", "engines", "viewing", "own_scans", "phantom",
         "scale", "architecture")
#: Files that a page may show or offer for download; they are copied into the site.
COPIED = {".png", ".svg", ".csv", ".json", ".html"}
#: Pixels above which a picture's text cannot be read at the width of a phone.
WIDE = 640


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page of the site.

    Attributes:
        kind: "notebook", "page" or "data card".
        name: of its HTML file, without the ending.
        title: its first heading.
        promise: its first paragraph, as HTML.
        body: the whole page, as HTML.
        contents: id and text of its second-level headings.
        figure: the picture for the start page, relative to the site; None if it has none.
        seconds: how long a notebook ran; None for other pages and for a notebook that was not run.
    """

    kind: str
    name: str
    title: str
    promise: str
    body: str
    contents: tuple[tuple[str, str], ...] = ()
    figure: str | None = None
    seconds: float | None = None


@dataclass
class Places:
    """Where the files of the repository are on the site.

    Links are written for a code host, such as `../notebooks/07_workflows.ipynb`, and lead to the matching page of the
    site. Pictures and tables are copied into the site, Python files become pages of source; a link to anything else
    becomes plain text.

    Attributes:
        out: the folder of the site.
        pages: file of the repository -> page of the site.
        sources: Python files that were linked to, and their pages.
    """

    out: Path
    pages: Mapping[Path, str]
    sources: dict[Path, str] = field(default_factory=dict)

    def localise(self, soup: BeautifulSoup, source: Path) -> None:
        """Turns the links and pictures of a page into those of the site.

        Args:
            soup: the page; changed in place. Its pictures open at full size; those with many details, which a
                phone scrolls instead of shrinking, get the class "broad".
            source: the file that it was made from.
        """
        for tag in soup.select("a[href]"):
            place = self._place(str(tag["href"]), source)
            if place is None:
                tag.unwrap()
            else:
                tag["href"] = place
        for tag in soup.select("img[src]"):
            tag["src"] = self._place(str(tag["src"]), source) or tag["src"]
            tag["loading"] = "lazy"
            file = self.out / str(tag["src"])
            if not str(tag["src"]).startswith("data:") and file.is_file():
                if file.suffix == ".svg" or Image.open(file).width > WIDE:
                    tag["class"] = [*tag.get_attribute_list("class", []), "broad"]
                if tag.find_parent("a") is None:
                    tag.wrap(soup.new_tag("a", attrs={"class": "figure", "href": tag["src"]}))

    def _place(self, link: str, source: Path) -> str | None:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc or not parts.path:
            return link
        target = (source.parent / unquote(parts.path)).resolve()
        anchor = f"#{parts.fragment}" if parts.fragment else ""
        if target in self.pages:
            return self.pages[target] + anchor
        if not target.is_file() or not target.is_relative_to(REPOSITORY):
            return link if (self.out / parts.path).exists() else None  # a notebook's own pictures lie there already
        inside = target.relative_to(REPOSITORY)
        if target.suffix == ".py":
            return self.sources.setdefault(target, f"source/{inside.with_suffix('.html').as_posix()}")
        if target.suffix in COPIED:
            copy = self.out / "files" / inside
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target, copy)
            return f"files/{inside.as_posix()}"
        return None


class _Renderer(mistune.HTMLRenderer):
    """HTML with highlighted code."""

    def block_code(self, code: str, info: str | None = None) -> str:
        try:
            lexer = get_lexer_by_name(info or "text", stripnl=False)
        except ClassNotFound:
            lexer = get_lexer_by_name("text")
        return str(highlight(code, lexer, HtmlFormatter()))


def markdown_files() -> dict[Path, tuple[str, str]]:
    """The Markdown files of the site in their order, each with its kind and the name of its page."""
    pages = sorted((REPOSITORY / "docs").glob("*.md"),
                   key=lambda path: (ORDER.index(path.stem) if path.stem in ORDER else len(ORDER), path.stem))
    found = {path: ("page", path.stem) for path in pages}
    found |= {REPOSITORY / f"{name}.md": ("page", name.lower()) for name in ("CONTRIBUTING", "CHANGELOG")}
    cards = sorted((REPOSITORY / "data_cards").glob("*.md"))
    return found | {path: ("data card", f"card-{path.stem}") for path in cards}


def markdown_page(path: Path, kind: str, name: str, places: Places) -> Page:
    """A Markdown file as a page; YAML at its beginning is shown as code."""
    text = path.read_text("utf-8")
    front = re.match(r"---\n(.*?\n)---\n", text, re.DOTALL)
    if front:
        text = f"{text[front.end():]}\n\n## Fields for machines\n\n```yaml\n{front[1]}```\n"
    text = re.sub(r"^<!--.*?-->$", "", text, flags=re.MULTILINE)
    render = mistune.create_markdown(renderer=_Renderer(), plugins=["table", "url", "strikethrough"])
    soup = BeautifulSoup(str(render(text)), "html.parser")
    for heading in soup.select("h1, h2, h3"):
        heading["id"] = slug(heading.get_text())
    places.localise(soup, path)
    return page_of(soup, kind=kind, name=name)


def page_of(soup: BeautifulSoup, **facts: Any) -> Page:
    """A page from its HTML.

    Raises:
        ValueError: it does not begin with a title and a paragraph.
    """
    title, promise = soup.find("h1"), soup.find("p")
    if not isinstance(title, Tag) or not isinstance(promise, Tag):
        raise ValueError(f"{facts['name']}: a page begins with a title and a paragraph that says what the reader gets")
    for table in soup.select("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "wide"}))
    contents = tuple((str(heading["id"]), words(heading)) for heading in soup.select("h2[id]"))
    return Page(title=words(title), promise=promise.decode_contents(), body=str(soup), contents=contents, **facts)


def source_page(path: Path) -> str:
    """A Python file as highlighted HTML with line numbers that can be linked to."""
    formatter = HtmlFormatter(linenos="inline", anchorlinenos=True, lineanchors="L", linespans="line")
    return str(highlight(path.read_text("utf-8"), get_lexer_by_name("python"), formatter))


def slug(heading: str) -> str:
    """The id that code hosts give a heading: lower case, hyphens for spaces, without punctuation."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def words(heading: Tag) -> str:
    """The text of a heading without the character that links to it."""
    return heading.get_text().rstrip("¶").strip()
