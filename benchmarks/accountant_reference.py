"""Privacy costs by Google's dp-accounting, an implementation independent of ours, as a table that tests read.

    python3.11 -m venv reference && reference/bin/pip install dp-accounting==0.6.0
    reference/bin/python benchmarks/accountant_reference.py tests/privacy/accountant_reference.csv

It has an environment of its own because dp-accounting 0.6.0 wants an older attrs than fedlab's other packages. Each
row is a drawn setting with its ε by Rényi orders and, from privacy loss distributions rounded up and rounded down,
two values with the true ε between them; rows for which they do not meet within some seconds are left out. About 25
minutes on one core.
"""

from __future__ import annotations

import csv
import logging
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant

COLUMNS = ("kind", "noise_multiplier", "sample_rate", "steps", "pure_epsilon", "pure_times", "delta", "renyi", "low",
           "high")
#: How far apart the two values may lie, relative to the larger one plus 0.01.
GAP = 0.02
#: Processor seconds after which no finer grid is tried for a row.
PATIENCE = 8.0
Row = dict[str, Any]


def drawn(count: int, rng: random.Random) -> list[Row]:
    """Settings spread evenly over orders of magnitude, a quarter of them without sampling."""
    rows = []
    for number in range(count):
        sampled = number % 4 != 0
        rate = 10 ** rng.uniform(-3.5, 0) if sampled else 1.0
        noise = 10 ** rng.uniform(-0.4, 1.5)
        rows.append(row("gaussian", noise_multiplier=noise, sample_rate=rate, steps=round(10 ** rng.uniform(0, 4)),
                        delta=10 ** rng.uniform(-8, -1)))
    return rows


def mixed(count: int, rng: random.Random) -> list[Row]:
    """Gaussian steps together with pure releases, and pure releases alone."""
    rows = []
    for number in range(count):
        pure = dict(pure_epsilon=10 ** rng.uniform(-2.5, 0.3), pure_times=round(10 ** rng.uniform(0, 2)),
                    delta=10 ** rng.uniform(-7, -1))
        gaussian = dict(noise_multiplier=10 ** rng.uniform(-0.2, 1.3), sample_rate=10 ** rng.uniform(-2, 0),
                        steps=round(10 ** rng.uniform(0, 3)))
        rows.append(row("pure", **pure) if number % 4 == 0 else row("mixed", **pure, **gaussian))
    return rows


def extreme() -> list[Row]:
    """Corners that chance hardly finds."""
    settings = [(0.3, 0.01, 500, 1e-5), (0.4, 1.0, 300, 1e-6), (0.25, 0.5, 10, 1e-5), (60.0, 1.0, 1, 1e-6),
                (30.0, 0.5, 1000, 1e-9), (1.0, 0.99, 50, 1e-5), (1.0, 0.999999, 5, 1e-5), (5.0, 1e-4, 20000, 1e-6),
                (0.7, 1e-4, 5000, 1e-6), (1.5, 0.3, 3000, 1e-12), (2.0, 0.05, 1, 0.5), (1.0, 0.25, 60, 0.2),
                (100.0, 1.0, 5000, 1e-5), (0.8, 1.0, 1, 1e-10), (10.0, 0.9, 2000, 1e-3), (3.0, 0.001, 10000, 1e-2)]
    return [row("gaussian", noise_multiplier=s, sample_rate=q, steps=steps, delta=d) for s, q, steps, d in settings]


def row(kind: str, **settings: float) -> Row:
    empty: Row = dict.fromkeys(COLUMNS, 0.0)
    rounded = {name: value if isinstance(value, int) else float(f"{value:.6g}") for name, value in settings.items()}
    return {**empty, "noise_multiplier": 0.0, "sample_rate": 0.0, "steps": 0, "pure_times": 0, **rounded, "kind": kind}


def renyi(setting: Row) -> float:
    """ε by Rényi orders, with Laplace noise for the pure releases."""
    accountant = RdpAccountant(np.array([*(1 + x / 10 for x in range(1, 100)), *range(11, 64), *range(64, 2048, 64)]))
    if setting["steps"]:
        step = dp_accounting.PoissonSampledDpEvent(setting["sample_rate"],
                                                   dp_accounting.GaussianDpEvent(setting["noise_multiplier"]))
        accountant.compose(step, setting["steps"])
    if setting["pure_times"]:
        accountant.compose(dp_accounting.LaplaceDpEvent(1 / setting["pure_epsilon"]), setting["pure_times"])
    return float(accountant.get_epsilon(setting["delta"]))


def loss_distribution(setting: Row, interval: float, *, up: bool) -> float:
    """ε from a privacy loss distribution on a grid of `interval`, every loss rounded up, or every one down.

    Pure releases are taken at their worst, which is randomised response.
    """
    parts = []
    if setting["steps"]:
        step = pld.from_gaussian_mechanism(
            setting["noise_multiplier"], pessimistic_estimate=up, value_discretization_interval=interval,
            sampling_prob=setting["sample_rate"], use_connect_dots=up)
        parts.append(step.self_compose(setting["steps"]))
    if setting["pure_times"]:
        step = pld.from_randomized_response(
            2 / (1 + math.exp(setting["pure_epsilon"])), 2, pessimistic_estimate=up,
            value_discretization_interval=interval)
        parts.append(step.self_compose(setting["pure_times"]))
    whole = parts[0] if len(parts) == 1 else parts[0].compose(parts[1])
    return float(whole.get_epsilon_for_delta(setting["delta"]))


def between(setting: Row, about: float) -> tuple[float, float] | None:
    """Two values with the true ε between them, close together; None where that takes too long."""
    began, count = time.process_time(), setting["steps"] + setting["pure_times"]
    interval = max(about, 0.01) * GAP / max(1.0, math.sqrt(count)) / 4
    while time.process_time() - began < PATIENCE:
        low = loss_distribution(setting, interval, up=False)
        high = loss_distribution(setting, interval, up=True)
        if 0 <= low <= high < math.inf and high - low <= GAP * (high + 0.01):
            return low, high
        interval /= 4
    return None


def main(target: Path) -> None:
    logging.disable(logging.WARNING)  # orders that the reference leaves out
    rng = random.Random(20261122)
    settings, kept = [*extreme(), *drawn(230, rng), *mixed(50, rng)], 0
    with target.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for setting in settings:
            about = renyi(setting)
            found = between(setting, about)
            if found is not None:
                low, high = found
                table.writerow({**setting, "renyi": f"{about:.8g}", "low": f"{low:.8g}", "high": f"{high:.8g}"})
                file.flush()
                kept += 1
    print(f"{kept} of {len(settings)} settings")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
