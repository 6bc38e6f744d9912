"""The pages in docs/ hold as Markdown too: their examples run, their links lead to files and headings that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import folders

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
MARKDOWN = [*PAGES, *(DOCS.parent / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
#: What an example may take for granted: a trainer of a small network and three sites.
GIVEN = """
from cohorts import blob_sites
from trainers import trainer as make_trainer
trainer, sites = make_trainer(), blob_sites((4, 3, 3))
"""


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_there_is_a_page_for_each_topic() -> None:
    assert {path.stem for path in PAGES} >= {"architecture", "engines", "faults", "own_scans", "privacy", "viewing",
                                             "workflows"}


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.stem)
def test_links_hold_on_a_code_host(path: Path) -> None:
    for link in LINK.findall(prose(path)):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_relative_to(DOCS.parent) and target.exists(), f"{path.name}: {link} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(target), re.MULTILINE)
            assert anchor in map(slug, headings), f"{path.name}: {target.name} has no heading #{anchor}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_begins_with_a_title_and_a_sentence_and_fits_a_screen(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert re.match(r"# \S", lines[0]) and lines[1] == "" and re.match(r"\w", lines[2])
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


@pytest.mark.parametrize("path", [path for path in PAGES if "```python" in path.read_text("utf-8")],
                         ids=lambda path: path.stem)
def test_examples_run(path: Path, tmp_path: Path) -> None:
    """All blocks of a page in their order, as a script of its own."""
    for k in range(10):
        folders.write_patient(tmp_path / "scans", f"BraTS2021_{k:05d}", seed=k)
    folders.write_table(tmp_path / "partitioning.csv", ["Partition_ID", "Subject_ID"],
                        [[k % 2, f"BraTS2021_{k:05d}"] for k in range(10)])
    blocks = re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL)
    (tmp_path / "example.py").write_text("\n".join([GIVEN, *blocks]), "utf-8")
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "FEDLAB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(
                              [str(DOCS.parent), str(DOCS.parent / "tests")])})
    assert done.returncode == 0, done.stderr
