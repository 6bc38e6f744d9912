"""The page on guarantees: every technique has a row, every statement names a test, and every named test exists."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import fedlab as fl

FORMAL = {"DPSGD", "LocalGaussian", "CentralGaussian", "SparseVector", "SVT", "SecureAggregation", "AtSites"}
#: Those that are no class of `fl.privacy`, and a setting of two of them.
BESIDES = {"AdaptiveClip"}


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "guarantees.md").read_text("utf-8")


@pytest.fixture(scope="module")
def known(repository: Path) -> set[str]:
    """The names of all tests."""
    text = "\n".join(path.read_text("utf-8") for path in (repository / "tests").rglob("test_*.py"))
    return set(re.findall(r"^def (test_\w+)", text, re.MULTILINE))


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the table that begins with a heading."""
    lines = page.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    found = []
    for line in lines[start + 2:]:
        if not line.startswith("|"):
            break
        found.append([cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")])
    return found


def techniques() -> set[str]:
    public = {name: getattr(fl.privacy, name) for name in fl.privacy.__all__}
    return {name for name, value in public.items() if inspect.isclass(value) and value is not fl.privacy.Privacy
            and issubclass(value, (fl.privacy.Privacy, fl.privacy.Aggregation))}


def test_every_technique_has_a_row(page: str) -> None:
    named = {name for cells in rows(page, "technique") for name in re.findall(r"`(\w+)`", cells[0])}
    assert techniques() | BESIDES <= named and len(techniques()) > 10


def test_only_techniques_without_a_unit_are_said_to_give_no_guarantee(page: str) -> None:
    for cells in rows(page, "technique"):
        formal = not cells[1].startswith("no formal guarantee") and "without noise" not in cells[0]
        for name in techniques() & set(re.findall(r"`(\w+)`", cells[0])):
            assert formal == (name in FORMAL) or "without noise" in cells[0], name
    for name in techniques() - FORMAL:  # the default, which no subclass below changes
        assert getattr(fl.privacy, name).units == frozenset(), name
    for name in FORMAL - {"CentralGaussian"}:  # whose noise is at the server, and is in the server's ledger
        assert getattr(fl.privacy, name).units != frozenset(), name


@pytest.mark.parametrize("heading", ["technique", "attack", "pitfall"])
def test_every_row_names_a_test(page: str, heading: str) -> None:
    table = rows(page, heading)
    assert len(table) >= 8
    for cells in table:
        assert re.search(r"`test_\w+`", " ".join(cells)), f"the row {cells[0]!r} names no test that shows it"
        assert len(cells) == len(table[0]), f"the row {cells[0]!r} has {len(cells)} cells"


def test_every_named_test_exists(page: str, known: set[str]) -> None:
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 60 and named <= known, sorted(named - known)


def test_every_pitfall_of_the_list_is_answered(page: str) -> None:
    """The headings of the list of JAX Privacy (2026), in words that the page uses, in their order."""
    words = ["division", "sensitivity", "batch selection", "metadata", "neighbouring", "zero-sized", "not finite",
             "accumulation", "batch norm", "auxiliary", "randomness", "floating point", "finite precision", "auditable",
             "framework", "interfaces", "opaque", "hyperparameters"]
    table = [cells[0] for cells in rows(page, "pitfall")]
    assert len(table) == len(words)
    for word, cell in zip(words, table, strict=True):
        assert word in cell
