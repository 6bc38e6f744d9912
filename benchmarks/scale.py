"""Does the time per site and round, or the memory, grow with the number of sites? From 2 to 1,000 sites, star and tree.

    .venv/bin/python benchmarks/scale.py            # about 25 minutes on two idle cores, 10 GB of disk
    .venv/bin/python benchmarks/scale.py --most 64

Every site has three training patients and keeps the moments of AdamW, 9.4 MB for SegResNet with 8 filters. The patients
are 24 generated ones, given out in turn and read from disk when they are asked for. Each arm runs in a process of its
own with one torch thread; seconds are processor seconds of the second round, so that neither first-use costs nor time
spent waiting counts. While an arm of more than 8 sites runs, arms of 8 sites run beside it on the other core, one after
the other: the ratio compares the two under the same load of the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from common import write
from fedlab.core.types import Patient, Round, Site
from fedlab.data.phantom.generator import make_cohort
from fedlab.data.store import load_sites, save_sites
from fedlab.run.federate import each_round
from fedlab.run.round import star
from fedlab.topologies.tree import Tree
from fedlab.training.networks import segresnet
from fedlab.training.trainer import SiteTrainer

SITES = (2, 8, 64, 1000)
POOL, PATIENTS, ROUNDS = 8, 3, 2
#: Sites of the small federation that larger ones are compared with.
SMALL = 8
#: Links between a hospital and the server: Mbit per second, down and up.
LINKS = {"DSL": (50, 10), "office": (100, 100), "research network": (1000, 1000)}


class OnDisk(Sequence[Patient]):
    """Training patients of a prepared site, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return PATIENTS

    def __getitem__(self, index: Any) -> Any:
        return load_sites(self.folder)[0].train[index]


def arm(sites: int, workflow: str, folder: Path) -> None:
    """One arm in this process; prints its figures as JSON."""
    torch.set_num_threads(1)
    cohort = [Site(name=f"site-{k:04d}", train=OnDisk(folder / f"pool-{k % POOL}")) for k in range(sites)]
    names = [site.name for site in cohort]
    count = max(1, round(sites**0.5))
    topology = star if workflow == "star" else Tree(regions={f"region-{r}": names[r::count] for r in range(count)})
    trainer = SiteTrainer(model=segresnet(filters=8), lr=1e-3, steps=2, crop=(24, 24, 24), precision="fp32",
                          device="cpu")
    rounds: list[Round] = []
    seconds, before = [], time.process_time()
    for finished in each_round(trainer, cohort, rounds=ROUNDS, topology=topology, seed=0):
        seconds.append(time.process_time() - before)
        rounds[:] = [finished]
        before = time.process_time()
    print(json.dumps({
        "sites": sites, "workflow": workflow, "processor seconds per site and round": round(seconds[-1] / sites, 4),
        "peak memory [MB]": _peak_mb(),
        "bytes per update": int(rounds[-1].sites[names[0]]["bytes"])}))


def _peak_mb() -> int:
    """Peak memory of this process in MB; `getrusage` would count the process that started it too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return round(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def _start(sites: int, workflow: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--arm", str(sites), workflow, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)})


def _result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, error = process.communicate()
    if process.returncode:
        raise RuntimeError(f"an arm failed: {error[-2000:]}")
    figures: dict[str, Any] = json.loads(out.splitlines()[-1])
    return figures


def _measured(sites: int, workflow: str, folder: Path) -> dict[str, Any]:
    """The figures of an arm; above `SMALL` sites with the ratio to small arms that ran beside it."""
    process = _start(sites, workflow, folder)
    beside: list[float] = []
    while sites > SMALL and process.poll() is None:
        beside.append(_result(_start(SMALL, workflow, folder))["processor seconds per site and round"])
    figures = _result(process)
    if beside:
        mean = statistics.mean(beside)
        spread = 1.96 * statistics.stdev(beside) / len(beside)**0.5 if len(beside) > 1 else math.nan
        own = figures["processor seconds per site and round"]
        figures |= {f"{SMALL} sites beside it": beside,
                    f"ratio to {SMALL} sites": [round(own / high, 3) for high in (mean, mean + spread, mean - spread)]}
    return figures


def links(size: int, sites: Sequence[int]) -> list[dict[str, Any]]:
    """Seconds that a round's weights take over real links: each site's own, and the server's for all of them."""
    return [{"sites": n, "link": name, "seconds at a site": round(8e-6 * size * (1 / down + 1 / up), 2),
             "seconds at a server with 1 Gbit/s": round(8e-9 * size * 2 * n, 2),
             "GB through the server per round": round(2e-9 * size * n, 3)}
            for n in sites for name, (down, up) in LINKS.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=max(SITES), help="largest number of sites")
    parser.add_argument("--arm", nargs=3, metavar=("SITES", "WORKFLOW", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        arm(int(options.arm[0]), options.arm[1], Path(options.arm[2]))
        return
    with tempfile.TemporaryDirectory(prefix="fedlab-scale-") as name:
        folder = Path(name)
        pool = make_cohort(sites=POOL, patients=POOL * (PATIENTS + 1), sizes=[PATIENTS + 1] * POOL, shape=(32, 40, 32),
                           spacing_mm=4.5, held_out=1, seed=0, workers=0)
        for k, site in enumerate(pool):
            save_sites([site], folder / f"pool-{k}")
        jobs = [(n, w) for n in SITES if n <= options.most for w in ("star", "tree")]
        rows = [_measured(sites, workflow, folder) for sites, workflow in tqdm(jobs, desc="arms")]
    write("scale", {"arms": rows, "links": links(rows[0]["bytes per update"], (13, 64, 1000))})


if __name__ == "__main__":
    main()
