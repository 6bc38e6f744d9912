"""Follows every link of a static site without a network: all that it loads must be in it, all targets must exist.

    python docs/links.py FOLDER
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Attributes through which a page loads something while it is shown. A `link` that is only a reference is left out.
LOADS = {"img": ["src", "srcset"], "script": ["src"], "iframe": ["src"], "source": ["src", "srcset"], "audio": ["src"],
         "video": ["src", "poster"], "embed": ["src"], "object": ["data"], "input": ["src"], "track": ["src"],
         "image": ["href", "xlink:href"], "use": ["href", "xlink:href"], "link": ["href"], "form": ["action"]}
CSS = re.compile(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""")
#: A script that loads something from an address that it spells out.
SCRIPT = re.compile(r"""(?:\bimport\b\s*\(?|\bfrom\b|\bfetch\(|\bimportScripts\(|\.src\s*=|\.href\s*=
                         |\bnew\s+(?:Worker|WebSocket|EventSource)\()
                        \s*['"`]((?:(?:https?|wss?):)?//[^'"`]+)""", re.VERBOSE)


class Contents(HTMLParser):
    """The parts of a page that links concern.

    Attributes:
        tags: every tag with its attributes.
        anchors: ids and names that a link can point to.
        texts: the content of its `style` and `script` tags, under these names.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.anchors = {"top", ""}
        self.texts: dict[str, list[str]] = {"style": [], "script": []}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        self.anchors |= {found.get("id", ""), found.get("name", "") if tag == "a" else ""}
        if tag in self.texts:
            self.texts[tag].append("")
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in self.texts:
            self.texts[self._inside][-1] += data


def broken_links(site: Path) -> list[str]:
    """The broken links of a site, one line each.

    Checked are pages (`.html`) and style sheets (`.css`). An `<a href>` to another machine is a citation: it is
    allowed and not followed.

    Args:
        site: the folder of the site.

    Raises:
        ValueError: there is no page in that folder.
    """
    site = site.resolve()
    _contents.cache_clear()  # pages may have changed since the last call
    pages = sorted(site.rglob("*.html"))
    if not pages:
        raise ValueError(f"there is no page (.html) in {site}")
    problems = [f"{page.relative_to(site)}: {problem}" for page in pages for problem in _of_page(page, site)]
    for sheet in sorted(site.rglob("*.css")):
        problems += [f"{sheet.relative_to(site)}: {problem}"
                     for address in _in_css(sheet.read_text("utf-8")) for problem in _loaded(address, sheet, site)]
    return problems


def _of_page(page: Path, site: Path) -> Iterator[str]:
    contents = _contents(page)
    for tag, attributes in contents.tags:
        if tag == "base" and "href" in attributes:
            yield f"<base href={attributes['href']!r}> would turn every link of the page"
        if tag in ("a", "area") and "href" in attributes:
            yield from _pointed_to(attributes["href"], page, site)
        for name in LOADS.get(tag, ()):
            for address in _addresses(tag, attributes, name):
                yield from _loaded(address, page, site)
        if tag == "meta" and attributes.get("http-equiv", "").lower() == "refresh":
            yield from _pointed_to(attributes.get("content", "").partition("url=")[2].strip("'\" "), page, site)
        for address in _in_css(attributes.get("style", "")):
            yield from _loaded(address, page, site)
    for address in (address for text in contents.texts["style"] for address in _in_css(text)):
        yield from _loaded(address, page, site)
    for address in (address for text in contents.texts["script"] for address in SCRIPT.findall(text)):
        yield f"a script loads {address} from another machine"


def _addresses(tag: str, attributes: dict[str, str], name: str) -> list[str]:
    value = attributes.get(name, "").strip()
    if tag == "link" and {"canonical", "author", "license"} & set(attributes.get("rel", "").split()):
        return []
    if name == "srcset":
        return [part.split()[0] for part in value.split(",") if part.split()]
    return [value] if value else []


def _in_css(text: str) -> list[str]:
    return [(one or other).strip() for one, other in CSS.findall(text)]


def _loaded(address: str, page: Path, site: Path) -> Iterator[str]:
    """The problems of an address whose content is loaded to show the page."""
    if address.startswith("data:"):
        return
    if urlsplit(address).scheme or address.startswith("//"):
        yield f"loads {address} from another machine"
    else:
        yield from _inside(address, page, site)


def _pointed_to(address: str, page: Path, site: Path) -> Iterator[str]:
    """The problems of an address that a reader may go to."""
    parts = urlsplit(address)
    if parts.scheme in ("http", "https"):
        if not parts.hostname or "." not in parts.hostname:
            yield f"links to {address}, which is no place that others can reach"
    elif parts.scheme == "mailto":
        return
    elif parts.scheme or address.startswith("//"):
        yield f"links to {address}, which only works on some machines"
    else:
        yield from _inside(address, page, site)


def _inside(address: str, page: Path, site: Path) -> Iterator[str]:
    parts = urlsplit(address)
    path = unquote(parts.path)
    if path.startswith("/"):
        yield f"{address} begins at the root of a server; the site must work in any folder"
        return
    target = (page.parent / path).resolve() if path else page
    if not target.is_relative_to(site):
        yield f"{address} leads out of the site"
    elif target.is_dir():
        yield f"{address} is a folder; name the page in it"
    elif not target.exists():
        yield f"{address} doesn't exist"
    elif target.suffix == ".html" and not {parts.fragment, unquote(parts.fragment)} & _contents(target).anchors:
        yield f"{address}: {target.name} has no such place"


@cache
def _contents(page: Path) -> Contents:
    return Contents(page.read_text("utf-8"))


if __name__ == "__main__":
    found = broken_links(Path(sys.argv[1]))
    print("\n".join(found) or "every link holds")
    sys.exit(bool(found))
