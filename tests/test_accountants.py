"""Our ε against dp-accounting, an implementation that shares no code with ours.

`tests/accountant_reference.csv` holds what dp-accounting 0.6.0 gave (`benchmarks/accountant_reference.py`): between its
columns low and high, privacy loss distributions rounded down and up, lies the true ε, at most 2 % apart.
"""

from __future__ import annotations

import csv
import math
import warnings
from pathlib import Path

import numpy as np
import pytest

from fedlab.privacy.accounting import Gaussian, Pure, epsilon_of
from fedlab.privacy.mechanisms import _ORDERS, _renyi_between, _renyi_of_step

REFERENCE = Path(__file__).with_name("accountant_reference.csv")
#: What the PRV accountant may be above the true ε: its own error of 0.01, taken twice, and 1 %.
PRV_ABOVE = (0.02, 0.01)


def read() -> list[dict[str, float | str]]:
    with REFERENCE.open(encoding="utf-8", newline="") as file:
        return [{k: v if k == "kind" else float(v) for k, v in row.items()} for row in csv.DictReader(file)]


ROWS = read()
GAUSSIAN = [row for row in ROWS if row["kind"] == "gaussian"]


def releases(row):
    found = []
    if row["steps"]:
        found.append(Gaussian(noise_multiplier=row["noise_multiplier"], sample_rate=row["sample_rate"],
                              steps=int(row["steps"])))
    if row["pure_times"]:
        found.append(Pure(epsilon=row["pure_epsilon"], times=int(row["pure_times"])))
    return found


def test_the_reference_covers_what_it_should():
    assert len(GAUSSIAN) >= 200 and len(ROWS) - len(GAUSSIAN) >= 30
    assert all(row["low"] <= row["high"] <= row["low"] + 0.02 * (row["high"] + 0.01) + 1e-9 for row in ROWS)
    for name, least, most in (("noise_multiplier", 0.3, 30), ("sample_rate", 1e-3, 1), ("steps", 1, 9000),
                              ("delta", 1e-8, 0.09), ("high", 0.01, 100)):
        values = [row[name] for row in GAUSSIAN]
        assert min(values) <= least and max(values) >= most, name


def test_renyi_is_never_below_the_true_value_and_agrees_with_the_reference():
    """Within 0.1 % of dp-accounting's Rényi value from above (our orders are finer), never below the true ε."""
    for row in ROWS:
        ours = epsilon_of(releases(row), delta=row["delta"])
        assert ours >= row["low"] * (1 - 1e-6), row
        if row["kind"] == "gaussian":
            assert ours <= row["renyi"] * 1.001 + 1e-9, row
