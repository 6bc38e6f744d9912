"""These tests need NVFLARE, which has an environment of its own; `make` runs them there, with FEDLAB_FLARE=1.

Elsewhere they are skipped; with that variable they fail where NVFLARE is missing.
"""

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
    if os.environ.get("FEDLAB_FLARE"):
        raise pytest.UsageError("FEDLAB_FLARE is set, so these tests must run, but NVFLARE isn't installed here")
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="NVFLARE isn't installed in this environment (pip install "
                                                    "'fedlab-workbench[nvflare]'); make test runs these in another"))
