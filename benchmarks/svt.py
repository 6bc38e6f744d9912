"""The sparse vector: its time beside NVFLARE's filter, what it composes to, and what is left of a real update.

    .venv/bin/python benchmarks/svt.py

Both work on the same vector with the same noise, in turns, on one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import write
from fedlab.core.seeds import generator
from fedlab.core.types import SiteState, Update
from fedlab.data.phantom.generator import make_cohort
from fedlab.privacy.sparse.partial_sharing import SVT, SparseVector, composed_epsilon
from fedlab.privacy.sparse.sparse_vector import LaplaceScales, sparse_vector_cost
from fedlab.run.site_task import SiteTask
from fedlab.strategies import FedAvg
from fedlab.training.networks import segresnet
from fedlab.training.trainer import SiteTrainer

PARAMETERS, CLIP = 4_700_000, 1e-4
FRACTIONS = (0.1, 0.4, 0.9)
#: Of NVFLARE's filter: for choosing positions in all, for each value. These are its own defaults.
CHOICE, VALUE = 0.1, 0.1
TURNS = 7

#: Runs NVFLARE's filter once for every line that comes in, on the vector in the file it is given.
VENDOR = """
import json, logging, sys, time
import numpy as np
import nvflare
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.filters.svt_privacy import SVTPrivacy

logging.disable(logging.CRITICAL)
vector = np.load(sys.argv[1])
for line in sys.stdin:
    svt = SVTPrivacy(tau=1e-6, replace=False, **json.loads(line))
    dxo = DXO(DataKind.WEIGHT_DIFF, data={"w": vector.copy()})
    wall, cpu = time.perf_counter(), time.process_time()
    found = svt.process_dxo(dxo, Shareable(), FLContext()).data["w"]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(json.dumps({"wall": wall, "cpu": cpu, "shared": int(np.count_nonzero(found)),
                      "ledger": svt.get_privacy_spent(), "version": nvflare.__version__}), flush=True)
"""


class Vendor:
    """NVFLARE's filter in a process of its own."""

    def __init__(self, vector: Path) -> None:
        one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        self.process = subprocess.Popen([sys.executable, "-c", VENDOR, str(vector)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env={**os.environ, **one_thread})

    def __call__(self, **settings: float) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(settings) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("NVFLARE's filter did not run (its message is above); install the extra 'nvflare'")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def ours(update: Update, technique: SVT, turn: int) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    found = technique.protect(update, SiteState(), generator(turn, "noise")).delta["w"]
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu,
            "shared": int(found.count_nonzero())}


def like_nvflare(fraction: float) -> SVT:
    """Our technique with the scales of NVFLARE's noise, which it writes with the number of values where q stands."""
    count = int(np.ceil(PARAMETERS * fraction))
    threshold = CHOICE / (1 + (2 * count) ** (2 / 3))
    return SVT(fraction=fraction, clip=CLIP, epsilon_threshold=threshold,
               epsilon_query=fraction * (CHOICE - threshold) / count, epsilon_release=fraction * VALUE / 2)


def timings() -> dict[str, Any]:
    """Seconds of both for each fraction, and how many times as long NVFLARE takes."""
    torch.set_num_threads(1)
    vector = 2e-4 * torch.randn(PARAMETERS, generator=generator(0, "vector"))
    update, out = Update(site="here", delta={"w": vector}, weight=1.0), {}
    with tempfile.TemporaryDirectory() as scratch:
        np.save(Path(scratch) / "vector.npy", vector.numpy())
        vendor = Vendor(Path(scratch) / "vector.npy")
        for fraction in FRACTIONS:
            technique, both = like_nvflare(fraction), {"fedlab": [], "nvflare": []}
            for turn in range(TURNS):
                both["fedlab"].append(ours(update, technique, turn))
                both["nvflare"].append(vendor(fraction=fraction, epsilon=CHOICE, noise_var=VALUE, gamma=CLIP))
            least = {name: {clock: min(r[clock] for r in runs) for clock in ("wall", "cpu")}
                     for name, runs in both.items()}
            last = both["nvflare"][-1]
            cost = technique.cost(PARAMETERS)
            out[f"fraction {fraction}"] = {
                "seconds": {name: round(clocks["wall"], 3) for name, clocks in least.items()},
                "cpu seconds": {name: round(clocks["cpu"], 3) for name, clocks in least.items()},
                "nvflare / fedlab": round(least["nvflare"]["wall"] / least["fedlab"]["wall"], 2),
                "nvflare / fedlab, cpu": round(least["nvflare"]["cpu"] / least["fedlab"]["cpu"], 2),
                "values shared": {"fedlab": both["fedlab"][-1]["shared"], "nvflare": last["shared"]},
                "sum of ε": {"fedlab": cost.selection + cost.released * cost.per_value, "nvflare": last["ledger"]}}
        vendor.close()
    return {"nvflare": last["version"], "parameters": PARAMETERS, "turns": TURNS, **out}


def nvflare_cost(parameters: int, *, fraction: float, epsilon: float, noise_var: float) -> Any:
    """What NVFLARE's filter provably costs without replacement; with it, its default, nothing is proven."""
    count = int(np.ceil(parameters * fraction))
    threshold = epsilon / (1 + (2 * count) ** (2 / 3))
    scales = LaplaceScales(threshold=1 / threshold, query=2 * count / (epsilon - threshold), release=2 / noise_var)
    stated = epsilon + count * noise_var  # by its own ledger
    return sparse_vector_cost(clip=1.0, scales=scales, released=count, stated=stated, delta=1e-5)


def composed(parameters: int = 1_200_000) -> dict[str, Any]:
    """What settings are said to cost, and what they do."""
    settings = {f"Li et al. 2019, q {q:g}, ε1 {e:g}, ε3 {e:g}": SVT(fraction=q, epsilon_threshold=e, epsilon_release=e)
                for q in (0.1, 0.4) for e in (1.0, 0.001)}
    filters = {"NVFLARE's defaults": dict(fraction=0.1, epsilon=0.1, noise_var=0.1),
               "NVFLARE's brats18 example": dict(fraction=0.9, epsilon=0.001, noise_var=1.0)}
    table = composed_epsilon({**settings, **{name: nvflare_cost(parameters, **s) for name, s in filters.items()},
                              **{f"SparseVector, ε {e} a round": SparseVector(fraction=0.1, epsilon=e)
                                 for e in (1, 8, 100)},
                              "SparseVector, ε 8 over 100 rounds": SparseVector(fraction=0.1, epsilon=8, rounds=100)},
                             parameters=parameters, rounds=(1, 100))
    return {name: {key: float(f"{value:.6g}") for key, value in row.dropna().items()} for name, row in table.iterrows()}


def real_update() -> Update:
    """What one generated site would send after a second round of six steps, unprotected."""
    from fedlab.privacy.base import Privacy

    (site,) = make_cohort(sites=1, patients=6, shape=(48, 64, 48), seed=0, progress=False, workers=1)
    trainer = SiteTrainer(model=segresnet(filters=8), lr=4e-3, steps=6)
    task, own = SiteTask(trainer=trainer, privacy=Privacy(), seed=0), SiteState()
    state = FedAvg().begin(trainer.initial())
    first = task(site, state, own)
    return task(site, FedAvg().step(state, first), own)


def utility(update: Update) -> list[dict[str, float]]:
    """Cosine of what is sent to the true update, and its error over the true update's norm."""
    true = torch.cat([t.flatten() for t in update.delta.values()]).double()

    def compare(technique: Any, **row: float) -> dict[str, float]:
        sent = technique.protect(update, SiteState(), generator(0, "noise")).delta.values()
        flat = torch.cat([t.flatten() for t in sent]).double()
        cost = technique.cost(true.numel())
        return {**row, "ε of the round": cost.epsilon(), "cosine": float(flat @ true / flat.norm() / true.norm()),
                "relative error": float((flat - true).norm() / true.norm())}

    rows = [compare(SVT(fraction=0.4, epsilon_threshold=e, epsilon_release=e, clip=clip), fraction=0.4, clip=clip)
            for e in (1.0, 0.001) for clip in (1e-4, 1e-2)]
    rows += [compare(SparseVector(fraction=fraction, epsilon=epsilon, clip=clip), fraction=fraction, clip=clip)
             for epsilon in (1, 8, 100) for fraction in (0.001, 0.1, 0.4) for clip in (1e-4, 1e-2)]
    return [{key: float(f"{value:.4g}") for key, value in row.items()} for row in rows]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    update = real_update()
    size = sum(t.numel() for t in update.delta.values())
    write("svt", {"time": timings(), "composed": composed(),
                  "a real update": {"norm": update.norm(), "median |change|": update.quantile_abs(0.5),
                                    "parameters": size, "cosine of pure chance, one in three beyond": size**-0.5,
                                    "sent": utility(update)}})


if __name__ == "__main__":
    main()
