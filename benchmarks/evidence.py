"""All presets on the default cohort from the narrow public model: utility, guarantee and leakage side by side.

    .venv/bin/python benchmarks/evidence.py [--seeds 3] [--rounds 10] [--folder runs/evidence] [--quick]

Eight unequal sites of generated patients, 51 to train on and 48 held out, new ones in every seed. What is done is kept
in the folder, so an interrupted benchmark goes on. Writes `benchmarks/results/evidence.{json,html,svg}` and the section
of docs/evidence.md between its two marks. `--quick` tries every step on a few tiny patients and writes nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

import fedlab as fl
from common import RESULTS, between_marks, fill, write
from fedlab.apps.comparison import Job
from fedlab.apps.comparison_data import Phantoms
from fedlab.core.workers import Workers

#: Set on generated patients of other seeds: about the median norm of an update, and of a patient's gradient.
CLIP, GRADIENT_CLIP = 0.3, 0.3
DELTA, EPSILON = 1e-3, 8.0


def cohorts(source: Phantoms, seeds: int) -> list[Sequence[fl.Site]]:
    with Workers() as workers:
        return [source.prepare(seed=seed, workers=workers) for seed in range(seeds)]


def section(found: fl.evidence.Evidence, options: argparse.Namespace) -> str:
    """The tables and the figure of docs/evidence.md."""
    table = found.table()
    drawn = [name for name in found.techniques if name != "start"]
    table.index = pd.Index([f"{drawn.index(name) + 1} {name}" if name in drawn else name for name in table.index])
    costs = ["Dice", "minus none", "minus start", "gain kept", "proven ε", "MB per site and round", "seconds"]

    def lines(columns: Sequence[str]) -> str:
        shown = [[str(name), *(str(row[column]) for column in columns)] for name, row in table.iterrows()
                 if any(row[column] != "–" for column in columns)]
        rows = [["technique", *columns], ["---"] * (len(columns) + 1), *shown]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    about = (f"`benchmarks/evidence.py` trains every preset for {options.rounds} rounds of 6 steps from "
             f"`fl.public_model(\"collection\")` on eight sites and 51 training patients, with {options.seeds} seeds, "
             "each with sites and patients of its own. The techniques that take an ε reach "
             f"{EPSILON:g} at δ = {DELTA:g} over all rounds. 95 % intervals; Dice is paired over held-out patients. "
             "[The whole page](../benchmarks/results/evidence.html) has the guarantees in full.")
    picture = ("![Dice and the advantage of attackers against the proven ε of each technique]"
               "(../benchmarks/results/evidence.svg)")
    return "\n\n".join([
        fill(about), picture, "What each technique costs and proves, with its number in the figure:", lines(costs),
        "What attackers reach:", lines([str(column) for column in table if column not in costs])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("runs/evidence"), help="kept for the next time")
    parser.add_argument("--quick", action="store_true", help="tiny patients, one seed, one round; writes nothing")
    options = parser.parse_args()
    rounds, seeds = (1, 1) if options.quick else (options.rounds, options.seeds)
    small = {"sizes": (3, 3), "shape": (32, 32, 32), "spacing_mm": 6.0, "held_out": 1} if options.quick else {}
    sites = cohorts(Phantoms(**small), seeds)
    trainer = Job(source=Phantoms(), rounds=rounds, steps=6, lr=2e-3).trainer()
    if options.quick:
        trainer = fl.SiteTrainer(model=torch.nn.Conv3d(4, 3, 1), lr=1e-2, steps=1, crop=(16, 16, 16), augment=None)
    presets = fl.evidence.presets(sites[0], trainer, rounds=rounds, epsilon=EPSILON, delta=DELTA, clip=CLIP,
                                  gradient_clip=GRADIENT_CLIP)
    attacks = {"canaries": fl.evidence.Canaries(canaries=20), "membership": fl.evidence.SentMembership(),
               "reconstruction": fl.evidence.SentReconstruction(patients=1, crop=8, steps=2)} if options.quick else None
    found = fl.assess(presets, sites.__getitem__, trainer, rounds=rounds, seeds=seeds, public=True,
                               attacks=attacks, out=None if options.quick else options.folder)
    print(found.table().T.to_string())
    if options.quick:
        return
    for name, text in (("html", None), ("svg", found.figure())):
        path = RESULTS / f"evidence.{name}"
        path.unlink(missing_ok=True)
        if text is None:
            found.save(path)
        else:
            path.write_text(text, encoding="utf-8")
    between_marks("evidence", section(found, options))
    write("evidence", found.as_json())


if __name__ == "__main__":
    main()
