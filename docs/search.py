"""The index of the site's search: one entry per section of a page, and per name of the reference."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from bs4 import BeautifulSoup, Tag

#: Characters of a section that are searched.
LONGEST = 6000


def write_index(site: Path, kinds: dict[str, str]) -> int:
    """Writes `search-index.js`, which a page loads as a script, so that the search also works from a disk.

    Args:
        site: the folder of the site, with all its pages.
        kinds: page, relative to the site -> its kind, such as "notebook".

    Returns:
        The number of entries.
    """
    entries, names = list[dict[str, str]](), set[str]()
    for page, kind in kinds.items():
        for entry in _entries(site / page, page, kind):
            if kind == "reference":
                if entry["h"] in names:  # a name at the top of fedlab is in its namespace too
                    continue
                names.add(entry["h"])
            entries.append(entry)
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    (site / "search-index.js").write_text(f"window.fedlabSearch({text});\n", "utf-8")
    return len(entries)


def _entries(path: Path, page: str, kind: str) -> Iterator[dict[str, str]]:
    soup = BeautifulSoup(path.read_text("utf-8"), "html.parser")
    for tag in soup.select("style, script, nav, .contents, .anchor-link, .headerlink"):
        tag.decompose()
    main = soup.find("main")
    if isinstance(main, Tag):
        yield from _names(main, page, kind) if kind == "reference" else _sections(main, page, kind)


def _sections(main: Tag, page: str, kind: str) -> Iterator[dict[str, str]]:
    """An entry per heading, with the text up to the next one."""
    title = main.find("h1")
    heading, anchor, texts = "", "", list[str]()
    for part in main.descendants:
        if isinstance(part, Tag) and part.name in ("h1", "h2", "h3"):
            if texts:
                yield _entry(kind, title, heading, page + anchor, texts)
            heading = "" if part.name == "h1" else _flat(part.get_text())
            anchor, texts = f"#{part['id']}" if part.get("id") and heading else "", []
        elif isinstance(part, str):
            texts.append(part)
    yield _entry(kind, title, heading, page + anchor, texts)


def _names(main: Tag, page: str, kind: str) -> Iterator[dict[str, str]]:
    """An entry per public name: its signature and docstring."""
    module = ".".join(Path(page).with_suffix("").parts[1:])
    for section in main.select("section[id]"):
        yield {"k": kind, "t": module, "h": str(section["id"]), "u": f"{page}#{section['id']}",
               "x": _flat(section.get_text(" "))[:LONGEST]}


def _entry(kind: str, title: Tag | None, heading: str, address: str, texts: list[str]) -> dict[str, str]:
    return {"k": kind, "t": _flat(title.get_text()) if title else "", "h": heading, "u": address,
            "x": _flat("".join(texts))[:LONGEST]}


def _flat(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("¶", "")).strip()
