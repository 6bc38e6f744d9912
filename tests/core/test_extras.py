"""A notebook in a kernel without what it shows its results with."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

import fedlab as fl


def test_a_kernel_with_the_extra_lab_is_let_through() -> None:
    assert fl.core.need_lab() is None


@pytest.mark.parametrize("missing", [["matplotlib"], ["ipyniivue", "jinja2"]])
def test_the_modules_that_are_missing_and_the_command_are_named(
        missing: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> Any:
        return None if name in missing else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    with pytest.raises(ImportError) as refused:
        fl.core.need_lab()
    assert str(refused.value) == (f"this notebook needs {', '.join(missing)}: not installed here. Install with: "
                                  "pip install 'fedlab-workbench[lab]'")
    assert isinstance(refused.value, fl.FedlabError), "a command of fedlab shows it without a traceback"
