"""docs/architecture.md is true: drawing, reading list and the table of what to change where."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "architecture.md").read_text("utf-8")


def test_the_drawing_and_the_reading_list_are_those_of_today(repository: Path) -> None:
    done = subprocess.run([sys.executable, str(repository / "docs" / "architecture.py"), "--check"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_drawing_shows_every_package_in_the_order_of_imports(repository: Path) -> None:
    import tomllib

    layers = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"][0]
    drawing = (repository / "docs" / "architecture.svg").read_text("utf-8")
    assert re.findall(r'font-weight="600"[^>]*>(\w+)<', drawing) == layers["layers"]
    assert drawing.count("marker-end") >= len(layers["layers"]) - 1


def test_the_table_of_changes_names_files_that_exist(repository: Path, page: str) -> None:
    table = page.partition("## I want to change")[2]
    rows = [row for row in table.splitlines() if row.startswith("| ") and "](" in row]
    assert len(rows) >= 18
    for label, link in re.findall(r"\[([\w/]+\.py)\]\(([\w./]+)\)", table):
        assert (repository / "docs" / link).is_file() and link.endswith(f"/{label}"), link
    assert page.count("I want to change") >= 1 and "architecture" in (repository / "README.md").read_text("utf-8")
