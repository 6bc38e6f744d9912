"""How far more rounds bring a federation towards pooled training, from the public model and from random weights.

    .venv/bin/python benchmarks/rounds.py [--seeds 0 1 2] [--starts collection random] [--folder runs/rounds]

The federated and the pooled arm of `fedlab demo`, and for the demo's rounds the federated one with moments kept at the
sites in place of averaged, with as many gradient steps in each, on new sites in every seed. The learning rates are
those of the demo, chosen for 32 rounds from the public model; they are taken for more rounds and for random weights
untried. What is done is kept in the folder, so an interrupted benchmark goes on. Writes
`benchmarks/results/rounds.json` and the section of docs/workflows.md between its two marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from common import between_marks, fill, write
from fedlab.apps.comparison import Job, arms_of
from fedlab.apps.comparison_data import Phantoms
from fedlab.core.types import Site
from fedlab.data.phantom.generator import GENERATOR
from fedlab.data.store import load_sites, save_sites
from fedlab.evidence.arms import Arm
from fedlab.evidence.comparison import ArmComparison, compare_arms
from fedlab.evidence.differences import mean_dice

Start = Literal["collection", "random"]
STARTS: tuple[Start, ...] = ("collection", "random")
ROUNDS = (32, 96)
#: Rounds with a third arm, with moments kept at the sites.
COMPARED = 32


def name_of(arm: str, start: str, rounds: int) -> str:
    return f"{arm}, {rounds} rounds, {start}"


def arms_at(rounds: int) -> tuple[str, ...]:
    return ("federated", "kept", "pooled") if rounds == COMPARED else ("federated", "pooled")


def arms(seed: int, starts: Sequence[Start], folder: Path) -> dict[str, Arm]:
    """The arms for every start and number of rounds; each number has a learning-rate schedule of its own."""
    found = {}
    for start in starts:
        for rounds in ROUNDS:
            made = arms_of(Job(source=Phantoms(), start=start, rounds=rounds, seed=seed), folder)
            whole = made["federated"]
            made["kept"] = replace(whole, trainer=replace(whole.trainer, momentum="keep"))
            found |= {name_of(arm, start, rounds): made[arm] for arm in arms_at(rounds)}
    return found


def cohort(folder: Path, seed: int) -> list[Site]:
    """The demo's sites of a seed, generated once."""
    prepared = folder / GENERATOR / f"seed-{seed}"
    if not (prepared / "done").is_file():
        save_sites(Phantoms().prepare(seed=seed, workers=0), prepared)
        (prepared / "done").touch()
    return load_sites(prepared)


def rows_of(found: ArmComparison, seeds: Sequence[int], starts: Sequence[Start]) -> list[dict[str, Any]]:
    """One row per start and number of rounds: Dice of the arms, their differences, and the minutes of training."""
    rows = []
    for start in starts:
        for rounds in ROUNDS:
            names = {arm: name_of(arm, start, rounds) for arm in arms_at(rounds)}
            dice = {arm: mean_dice(found.paired_scores, name) for arm, name in names.items()}
            seconds = {arm: sum(found.histories[seed, name].table()["seconds"].sum() for seed in seeds)
                       for arm, name in names.items()}
            minutes = {arm: value / len(seeds) / 60 for arm, value in seconds.items()}
            gaps = {arm: found.difference(names["federated"], names[arm]) for arm in arms_at(rounds)[1:]}
            rows.append({"start": start, "rounds": rounds, "patients": gaps["pooled"].patients, **dice,
                         "ratio": dice["federated"][0] / dice["pooled"][0], "minutes of training": minutes,
                         **{f"federated minus {other}": (gap.value, gap.low, gap.high) for other, gap in gaps.items()}})
    return rows


def section(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> str:
    """The table of docs/workflows.md."""
    lines = []
    for row in rows:
        dice = ["{:.3f} ({:.3f} to {:.3f})".format(*row[arm]) for arm in ("federated", "pooled")]
        gaps = ["{:+.3f} ({:+.3f} to {:+.3f})".format(*row[f"federated minus {arm}"])
                if f"federated minus {arm}" in row else "–" for arm in ("kept", "pooled")]
        start = {"collection": "public model", "random": "random weights"}[row["start"]]
        lines.append(f"| {start} | {row['rounds']} | {' | '.join([*dice, *gaps])} | {row['ratio']:.3f} "
                     f"| {row['minutes of training']['federated']:.1f} |")
    about = ("`benchmarks/rounds.py` trains the federated and the pooled arm of `fedlab demo`, and for its rounds also "
             "the federated one with moments kept at the sites in place of averaged, with as many gradient steps in "
             f"each, on seeds {', '.join(map(str, seeds))}: eight sites and 51 training patients each. Mean "
             f"Dice of WT, TC and ET on {rows[0]['patients']} held-out patients with 95 % intervals, paired over "
             "patients; minutes of one federated run on one core beside another arm. The learning rates were chosen "
             "for 32 rounds from the public model.")
    head = ["| start | rounds | federated | pooled | minus moments kept | minus pooled | ratio to pooled | minutes |",
            "|---|---|---|---|---|---|---|---|"]
    return "\n\n".join([fill(about), "\n".join([*head, *lines])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS)
    parser.add_argument("--folder", type=Path, default=Path("runs/rounds"), help="kept for the next time")
    options = parser.parse_args()
    folder, starts = options.folder, options.starts
    found = compare_arms(lambda seed: cohort(folder, seed), lambda seed: arms(seed, starts, folder),
                         seeds=options.seeds, out=folder)
    rows = rows_of(found, options.seeds, options.starts)
    between_marks("workflows", section(rows, options.seeds), by="rounds")
    write("rounds", {"seeds": options.seeds, "rows": rows})


if __name__ == "__main__":
    main()
