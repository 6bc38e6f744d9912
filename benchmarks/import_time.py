"""How long `import fedlab` takes beside `import torch`, and the first words of a run.

    .venv/bin/python benchmarks/import_time.py

Each import is timed in a new process, in turn, so that a busy moment meets all of them. `import fedlab` alone loads no
torch; the second row adds what a first run uses.
"""

from __future__ import annotations

import subprocess
import sys
from statistics import median

from common import write

REPEATS = 9
STATEMENTS = {
    "import torch": "import torch",
    "import fedlab": "import fedlab",
    "import torch, then fedlab": "import torch, fedlab",
    "import fedlab and the words of a run": (
        "import fedlab as fl; fl.federate, fl.SiteTrainer, fl.FedAvg, fl.DPSGD, fl.Site"),
}


def seconds(statement: str) -> float:
    """Wall-clock seconds of a statement in a new process, without the start of Python."""
    code = f"import time; started = time.perf_counter(); {statement}; print(time.perf_counter() - started)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    for statement in STATEMENTS.values():  # files into the cache of the operating system
        seconds(statement)
    taken = [{name: seconds(statement) for name, statement in STATEMENTS.items()} for _ in range(REPEATS)]
    medians = {name: median(row[name] for row in taken) for name in STATEMENTS}
    extra = median(row["import torch, then fedlab"] - row["import torch"] for row in taken)
    write("import_time", {
        "repeats": REPEATS,
        "median seconds": {name: round(value, 3) for name, value in medians.items()},
        "fedlab beyond torch, median of paired differences in s": round(extra, 3),
    })


if __name__ == "__main__":
    main()
