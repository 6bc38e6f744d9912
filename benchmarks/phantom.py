"""Patients generated per second, at 64 x 64 x 64 voxels with a cold cache.

    .venv/bin/python benchmarks/phantom.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from common import write
from fedlab.core.workers import available_cores
from fedlab.data.phantom.generator import make_cohort

PATIENTS = 48


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        def generate(seed: int) -> float:
            started = time.perf_counter()
            make_cohort(sites=4, patients=PATIENTS, shape=(64, 64, 64), seed=seed, cache=Path(scratch))
            return time.perf_counter() - started

        first, second = generate(0), generate(1)  # the first also resamples the template and starts the imports
    write("phantom", {"patients": PATIENTS, "cores": available_cores(), "seconds with everything cold": round(first, 1),
                      "seconds": round(second, 1), "patients per second": round(PATIENTS / second, 2)})


if __name__ == "__main__":
    main()
