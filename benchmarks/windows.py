"""How much of an arm's Dice depends on the size of the windows in which scans are predicted.

    .venv/bin/python benchmarks/windows.py [--seeds 0 1 2] [--folder runs/windows]

The public model, the federated and the pooled arm of `fedlab demo`, trained on crops of 32³ voxels and scored on the
same held-out patients in windows of several sizes. The demo takes a scan of 48 × 64 × 48 voxels at once, windows of 64.
What is trained is kept in the folder, so an interrupted benchmark goes on. Writes `benchmarks/results/windows.json`
and the section of docs/workflows.md between its two marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from common import between_marks, fill, write
from fedlab.apps.comparison import Job, arms_of
from fedlab.apps.comparison_data import Phantoms
from fedlab.core.types import Tensors
from fedlab.core.weights import load_weights
from fedlab.evidence.arms import Arm
from fedlab.evidence.comparison import compare_arms
from fedlab.evidence.differences import difference, mean_dice
from fedlab.training.metrics import evaluate
from fedlab.training.public_model import public_model
from rounds import cohort

ARMS = ("public", "federated", "pooled")
WINDOWS = (64, 48, 32)
#: Voxels per axis of the crops that the arms learn from.
CROP = 32


def arms(seed: int, folder: Path) -> dict[str, Arm]:
    made = arms_of(Job(source=Phantoms(), seed=seed), folder)
    return {name: made[name] for name in ARMS}


def score(folder: Path, seed: int, arm: str, params: Tensors, window: int) -> pd.DataFrame:
    """The scores of one model on a seed's held-out patients, predicted in windows of one size."""
    torch.set_num_threads(1)
    model = public_model("collection")
    load_weights(model, params)
    return evaluate(model, cohort(folder, seed), window=(window,) * 3).assign(seed=seed, arm=arm, window=window)


def rows_of(scores: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per size: Dice of the arms and what federated gains and lacks."""
    rows = []
    for window in WINDOWS:
        own = scores[scores["window"] == window].drop(columns="window")
        gaps: Mapping[str, Any] = {other: difference(own, "federated", other) for other in ("public", "pooled")}
        dice = {arm: mean_dice(own, arm) for arm in ARMS}
        rows.append({"window": window, "patients": gaps["pooled"].patients, **dice,
                     "ratio": dice["federated"][0] / dice["pooled"][0],
                     **{f"federated minus {other}": (gap.value, gap.low, gap.high) for other, gap in gaps.items()}})
    return rows


def section(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> str:
    """The table of docs/workflows.md."""
    lines = []
    for row in rows:
        dice = ["{:.3f} ({:.3f} to {:.3f})".format(*row[arm]) for arm in ARMS]
        gaps = ["{:+.3f} ({:+.3f} to {:+.3f})".format(*row[f"federated minus {arm}"]) for arm in ("public", "pooled")]
        lines.append(f"| {row['window']}³ | {' | '.join([*dice, *gaps])} | {row['ratio']:.3f} |")
    about = ("`benchmarks/windows.py` trains the public, the federated and the pooled arm of `fedlab demo` on crops "
             f"of {CROP}³ voxels, on seeds {', '.join(map(str, seeds))}, and scores them on the same "
             f"{rows[0]['patients']} held-out patients in windows of several sizes. Mean Dice of WT, TC "
             "and ET with 95 % intervals, paired over patients.")
    head = ["| windows | public | federated | pooled | minus public | minus pooled | ratio to pooled |",
            "|---|---|---|---|---|---|---|"]
    return "\n\n".join([fill(about), "\n".join([*head, *lines])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/windows"), help="kept for the next time")
    options = parser.parse_args()
    folder = options.folder
    found = compare_arms(lambda seed: cohort(folder, seed), lambda seed: arms(seed, folder), seeds=options.seeds,
                         out=folder)
    jobs = [(folder, seed, arm, found.histories[seed, arm].state.params, window)
            for seed in options.seeds for arm in ARMS for window in WINDOWS]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        tables = list(tqdm(pool.map(score, *zip(*jobs, strict=True)), total=len(jobs), desc="scores"))
    rows = rows_of(pd.concat(tables, ignore_index=True))
    between_marks("workflows", section(rows, options.seeds), by="windows")
    write("windows", {"seeds": options.seeds, "crop": CROP, "rows": rows})


if __name__ == "__main__":
    main()
