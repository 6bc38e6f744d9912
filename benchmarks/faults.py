"""Fault x strategy on thirteen generated sites: what each robust strategy holds, and what not.

    .venv/bin/python benchmarks/faults.py [--seeds 0 1 2] [--only TEXT]

Sites, shape and training are those of `workflows.py`; where sites lie, three of the thirteen do, in every round.
Every arm has rules of admission, so that failing sites cost their round only. Writes
`benchmarks/results/faults.{json,csv,png}`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from common import RESULTS, sweep, write
from workflows import CROP, HELD_OUT, LR, ROUNDS, SHAPE, SITES, SIZES, SPACING_MM, STEPS

LIARS = 3
FAULTS = ("none", "drop-out 30 %", "crash 30 %", "NaN", "replay, disguised", "poisoned labels",
          "sign-flip", "sign-flip x 5", "scaled x 10")
STRATEGIES = ("mean", "mean, norms under 10", "norm bound", "median", "trimmed mean", "multi-Krum", "geometric median")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A fault and a strategy, by the names in this file."""

    fault: str
    strategy: str


def fault_of(name: str, liars: Sequence[str]) -> list[Any]:
    """The faults of that name."""
    from fedlab import faults as ff

    made: dict[str, Callable[[], list[Any]]] = {
        "none": list, "drop-out 30 %": lambda: [ff.DropOut(probability=0.3)],
        "crash 30 %": lambda: [ff.Crash(probability=0.3)], "NaN": lambda: [ff.Corrupt(sites=liars)],
        "replay, disguised": lambda: [ff.Replay(sites=liars, disguised=True)],
        "poisoned labels": lambda: [ff.PoisonedLabels(sites=liars)],
        "sign-flip": lambda: [ff.SignFlip(sites=liars)],
        "sign-flip x 5": lambda: [ff.SignFlip(sites=liars, factor=5.0)],
        "scaled x 10": lambda: [ff.Scale(sites=liars, factor=10.0)],
    }
    return made[name]()


def strategy_of(name: str) -> Any:
    """The strategy of that name."""
    import fedlab as fl

    made: dict[str, Callable[[], Any]] = {
        "mean": lambda: fl.FedAvg(weights="uniform"), "mean, norms under 10": lambda: fl.FedAvg(weights="uniform"),
        "norm bound": lambda: fl.strategies.NormBound(weights="uniform", bound=2.0),
        "median": fl.strategies.CoordinateMedian,
        "trimmed mean": lambda: fl.strategies.TrimmedMean(trim=0.25),
        "multi-Krum": lambda: fl.strategies.Krum(attackers=LIARS, chosen=SITES - 2 * LIARS),
        "geometric median": lambda: fl.strategies.GeometricMedian(weights="uniform"),
    }
    return made[name]()


def score(arm: Arm, seed: int) -> dict[str, Any]:
    """Trains one arm and scores it on the held-out patients of all sites."""
    import fedlab as fl
    from fedlab.faults.sites import Faulty
    from fedlab.run.local import Local

    sites = fl.make_cohort(seed=seed, sites=SITES, patients=sum(SIZES), sizes=SIZES, shape=SHAPE,
                           spacing_mm=SPACING_MM, held_out=HELD_OUT, workers=0, progress=False)
    liars = [site.name for site in sites[::SITES // LIARS][:LIARS]]
    model = fl.segresnet(seed=seed)
    trainer = fl.SiteTrainer(model=model, steps=STEPS, crop=CROP, tumour_share=0.5,
                             augment=fl.training.augmentation(flips=(0,)),
                             lr=fl.training.PolyDecay(start=LR, rounds=ROUNDS))
    rules = fl.run.Admission(max_norm=10.0 if "norms under" in arm.strategy else None)
    history = fl.federate(trainer, sites, strategy=strategy_of(arm.strategy), admission=rules, rounds=ROUNDS, seed=seed,
                          engine=Faulty(engine=Local(), faults=fault_of(arm.fault, liars), seed=seed), progress=False)
    fl.core.load_weights(model, history.state.params)
    norms = [numbers["norm"] for record in history.records for numbers in record["sites"].values()]
    return {"fault": arm.fault, "strategy": arm.strategy, "seed": seed,
            "mean": float(fl.evaluate(model, sites)["dice"].mean()),
            "left out": sum(len(record["absent"]) for record in history.records) / (SITES * ROUNDS),
            "median norm": sorted(norms)[len(norms) // 2] if norms else None}


def figure(means: pd.DataFrame, path: Path) -> None:
    """A matrix: a row a fault, a column a strategy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from fedlab.view.colours import style

    style()
    drawn, axes = plt.subplots(figsize=(8.4, 5), layout="constrained")
    shown = axes.imshow(means.to_numpy(), cmap="Blues", vmin=0, vmax=float(means.max().max()), aspect="auto")
    axes.set_xticks(range(len(means.columns)), means.columns, rotation=25, ha="right", fontsize=8)
    axes.set_yticks(range(len(means)), means.index, fontsize=8)
    for row, values in enumerate(means.to_numpy()):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8,
                      color="white" if value > 0.6 * float(means.max().max()) else "#222")
    drawn.colorbar(shown, label="mean Dice of held-out patients")
    drawn.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", default="", help="only arms whose code holds this text; nothing is written")
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"), help="rows, kept for the next time")
    options = parser.parse_args()
    chosen = [arm for fault in FAULTS for strategy in STRATEGIES
              if options.only in repr(arm := Arm(fault=fault, strategy=strategy))]
    table = sweep(score, [(arm, seed) for seed in options.seeds for arm in chosen], options.folder, "arms")
    if options.only:
        print(table.round(3).to_string())
        return
    means = table.pivot_table(index="fault", columns="strategy", values="mean", sort=False)
    table.round(4).to_csv(RESULTS / "faults.csv", index=False)
    figure(means, RESULTS / "faults.png")
    print(means.round(3).to_string())
    write("faults", {"seeds": options.seeds, "mean Dice": means.round(4).to_dict(orient="index")})


if __name__ == "__main__":
    main()
