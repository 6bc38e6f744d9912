"""Every name at the top of fedlab has an example in its docstring, and what the example shows is true."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

import fedlab

#: Numbers that depend on the machine are written as "...".
FLAGS = doctest.ELLIPSIS


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated patients, kept for all examples."""
    return tmp_path_factory.mktemp("patients")


@pytest.mark.parametrize("name", fedlab.__all__)
def test_the_example_shows_what_it_says(name: str, tmp_path: Path, patients: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDLAB_CACHE", str(patients))
    docstring = getattr(fedlab, name).__doc__
    example = doctest.DocTestParser().get_doctest(docstring, {"fl": fedlab, "__name__": name}, name, None, None)
    assert example.examples, f"fedlab.{name} has no example; add one to its docstring"
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(example, out=said.append)
    assert result.failed == 0, "".join(said)
