"""These tests need NVFLARE, which `make install` brings; where the variable CI is set, its absence is an error."""

from __future__ import annotations

import os
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # tests/cohorts.py and tests/runs.py


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if any(distributions(name="nvflare")):
        return
    if os.environ.get("CI"):
        raise pytest.UsageError("NVFLARE is not installed here, but CI runs its tests: make install")
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="NVFLARE is not installed here (make install brings it)"))
