"""One arm of the engines' benchmark on an engine of fedlab, in a process of its own; started by engines.py.

    python benchmarks/engines_arm.py ENGINE DATA ROUNDS OUT
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import engines_task
import fedlab as fl


def nvflare_simulation() -> Any:
    """NVFLARE's simulator: a process a site, on this machine, without encryption."""
    return fl.engines.NVFlare(env=fl.engines.Simulation(threads=1))


def nvflare_mtls() -> Any:
    """NVFLARE as hospitals would run it: server and sites with certificates, mutually authenticated, on loopback."""
    return fl.engines.NVFlare(env=fl.engines.ProofOfConcept(threads=1))


#: How each engine is made; it is made, and started, after the clock has started.
ENGINES: dict[str, Callable[[], Any]] = {
    "Local": fl.Local, "Processes": fl.engines.Processes, "NVFlare simulation": nvflare_simulation,
    "NVFlare mTLS": nvflare_mtls}


def run(engine: str, sites: Sequence[fl.Site], rounds: int, note: Callable[[Any], None]) -> fl.core.ServerState:
    history = fl.federate(engines_task.make_trainer(), sites, rounds=rounds, engine=ENGINES[engine](), on_round=note,
                          progress=False)
    if history.state is None:
        raise RuntimeError("the run has no last state")
    return history.state


if __name__ == "__main__":
    name, data, count, out = sys.argv[1:]
    engines_task.main(name, lambda *settings: run(name, *settings), Path(data), int(count), Path(out))
