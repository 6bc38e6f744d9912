"""Follows every link of a static site without a network: what it loads must lie in it, where it points must exist.

    python docs/links.py FOLDER
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, Tag

#: Attributes through which a page loads something while it is shown. Of `link` only what is no mere reference.
LOADS = {"img": ["src", "srcset"], "script": ["src"], "iframe": ["src"], "source": ["src", "srcset"], "audio": ["src"],
         "video": ["src", "poster"], "embed": ["src"], "object": ["data"], "input": ["src"], "track": ["src"],
         "image": ["href", "xlink:href"], "use": ["href", "xlink:href"], "link": ["href"], "form": ["action"]}
CSS = re.compile(r"""url\(\s*['"]?([^'")]+)|@import\s+['"]([^'"]+)""")
#: A script that loads something from an address that it spells out.
SCRIPT = re.compile(r"""(?:\bimport\b\s*\(?|\bfrom\b|\bfetch\(|\bimportScripts\(|\.src\s*=|\.href\s*=
                         |\bnew\s+(?:Worker|WebSocket|EventSource)\()
                        \s*['"`]((?:(?:https?|wss?):)?//[^'"`]+)""", re.VERBOSE)


def broken_links(site: Path) -> list[str]:
    """What is wrong with the links of a site, one line each; empty where nothing is.

    Checked are pages (`.html`) and style sheets (`.css`). An `<a href>` to another machine is a citation and allowed;
    it isn't followed.

    Args:
        site: the folder of the site.

    Raises:
        ValueError: there is no page in that folder.
    """
    site = site.resolve()
    _soup.cache_clear()  # of an earlier look at pages that may have changed
    _anchors.cache_clear()
    pages = sorted(site.rglob("*.html"))
    if not pages:
        raise ValueError(f"there is no page (.html) in {site}")
    problems = [f"{page.relative_to(site)}: {problem}" for page in pages for problem in _of_page(page, site)]
    for sheet in sorted(site.rglob("*.css")):
        problems += [f"{sheet.relative_to(site)}: {problem}"
                     for address in _in_css(sheet.read_text("utf-8")) for problem in _loaded(address, sheet, site)]
    return problems


def _of_page(page: Path, site: Path) -> Iterator[str]:
    soup = _soup(page)
    if base := soup.select_one("base[href]"):
        yield f"<base href={base['href']!r}> would turn every link of the page"
    for tag in soup.select("a[href], area[href]"):
        yield from _pointed_to(str(tag["href"]), page, site)
    for name, attributes in LOADS.items():
        for tag in soup.find_all(name):
            for attribute in attributes:
                for address in _addresses(tag, attribute):
                    yield from _loaded(address, page, site)
    for tag in soup.select("meta[http-equiv=refresh i]"):
        yield from _pointed_to(str(tag.get("content", "")).partition("url=")[2].strip("'\" "), page, site)
    styles = [tag.get_text() for tag in soup.select("style")] + [str(tag["style"]) for tag in soup.select("[style]")]
    for address in (address for style in styles for address in _in_css(style)):
        yield from _loaded(address, page, site)
    for tag in soup.select("script"):
        for address in SCRIPT.findall(tag.get_text()):
            yield f"a script loads {address} from another machine"


def _addresses(tag: Tag, attribute: str) -> list[str]:
    value = str(tag.get(attribute) or "").strip()
    if tag.name == "link" and {"canonical", "author", "license"} & set(tag.get("rel") or ()):
        return []
    if attribute == "srcset":
        return [part.split()[0] for part in value.split(",") if part.split()]
    return [value] if value else []


def _in_css(text: str) -> list[str]:
    return [(one or other).strip() for one, other in CSS.findall(text)]


def _loaded(address: str, page: Path, site: Path) -> Iterator[str]:
    """What is wrong with an address whose content is loaded to show the page."""
    if address.startswith("data:"):
        return
    if urlsplit(address).scheme or address.startswith("//"):
        yield f"loads {address} from another machine"
    else:
        yield from _inside(address, page, site)


def _pointed_to(address: str, page: Path, site: Path) -> Iterator[str]:
    """What is wrong with an address that a reader may go to."""
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
    elif target.suffix == ".html" and not {parts.fragment, unquote(parts.fragment)} & {*_anchors(target), ""}:
        yield f"{address}: {target.name} has no such place"


@cache
def _anchors(page: Path) -> frozenset[str]:
    soup = _soup(page)
    return frozenset([*(str(tag["id"]) for tag in soup.select("[id]")),
                      *(str(tag["name"]) for tag in soup.select("a[name]")), "top"])


@cache
def _soup(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text("utf-8"), "html.parser")


if __name__ == "__main__":
    found = broken_links(Path(sys.argv[1]))
    print("\n".join(found) or "every link holds")
    sys.exit(bool(found))
