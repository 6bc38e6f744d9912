"""The pages in docs/ hold as Markdown too: their examples run, their links lead to files and headings that exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

import folders
from warm import PYTHON

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
    done = subprocess.run([*PYTHON, "example.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "FEDLAB_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(
                              [str(DOCS.parent), str(DOCS.parent / "tests")])})
    assert done.returncode == 0, done.stderr


def test_the_table_of_techniques_has_the_audits_of_these_techniques(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run benchmarks/audits.py again when this fails: a technique, its settings or the page has changed since."""
    monkeypatch.syspath_prepend(str(DOCS.parent / "benchmarks"))
    import audits

    rows = json.loads((audits.RESULTS / "audits.json").read_text("utf-8"))["result"]["rows"]
    assert [row["code"] for row in rows[::3]] == list(map(repr, audits.TECHNIQUES))
    assert [row["seed"] for row in rows] == [0, 1, 2] * len(audits.TECHNIQUES)
    page = (DOCS / "privacy.md").read_text("utf-8")
    assert audits.filled(page, rows) == page and audits.filled("| `TopK` | a | b |\n", rows) == "| `TopK` | a | b |\n"
    for row in rows:  # read from the page alone
        (line,) = re.findall(rf"^\| [^|]*`(?:privacy\.)?{row['technique']}`[^|]*\|.*$", page, re.MULTILINE)
        claim, shown = line.split("|")[-3:-1]
        low, *_, high = (float(bound) for bound in re.findall(r"\d+\.\d", shown.split(" at δ")[0]) * 2)
        assert low - 0.05 <= row["shown"] <= high + 0.05 and not row["refuted"]
        if row["claimed"] is None:
            assert claim.strip() == "none" and "δ = 0.0005 per site" in shown
        else:
            terms = row["claimed"]
            stated = float(re.search(r"ε = ([\d.]+) at δ = 0.0005 per", claim)[1])
            assert terms["epsilon"] <= stated < 1.01 * terms["epsilon"] and row["shown"] < stated
            assert all(terms[name] in claim for name in ("unit", "adjacency", "accountant"))
