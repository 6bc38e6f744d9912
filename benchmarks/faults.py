"""Fault x strategy on thirteen generated sites, from the narrow public model: which strategy withstands what.

    .venv/bin/python benchmarks/faults.py [--seeds 0 1 2] [--only TEXT]

Sites, start and training are those of `workflows.py`; where sites lie, three of the thirteen do, in every round.
Every arm has rules of admission, so that failing sites cost their round only. Writes
`benchmarks/results/faults.{json,csv,png}` and the section of docs/faults.md between its two marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from common import RESULTS, between_marks, fill, sweep, write
from workflows import CROP, LR, ROUNDS, SITES, STEPS, compared, packed, prepare, prepared, unpacked

LIARS = 3
#: Norms of the admission rule and of the strategy that bounds norms, about twice and once the median honest update's.
LARGEST, BOUND = 3.0, 1.5
FAULTS = ("none", "drop-out 30 %", "crash 30 %", "NaN", "replay, disguised", "poisoned labels",
          "sign-flip", "sign-flip x 5", "scaled x 10")
STRATEGIES = ("mean", f"mean, norms under {LARGEST:g}", "norm bound", "median", "trimmed mean", "multi-Krum",
              "geometric median")


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
        "mean": lambda: fl.FedAvg(weights="uniform"),
        f"mean, norms under {LARGEST:g}": lambda: fl.FedAvg(weights="uniform"),
        "norm bound": lambda: fl.strategies.NormBound(weights="uniform", bound=BOUND),
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

    sites = prepared(seed)
    liars = [site.name for site in sites[::SITES // LIARS][:LIARS]]
    model = fl.public_model("collection")
    trainer = fl.SiteTrainer(model=model, steps=STEPS, crop=CROP, tumour_share=0.5, clip_norm=1.0,
                             augment=fl.training.augmentation(flips=(0,)),
                             lr=fl.training.PolyDecay(start=LR, rounds=ROUNDS))
    rules = fl.run.Admission(max_norm=LARGEST if "norms under" in arm.strategy else None)
    history = fl.federate(trainer, sites, strategy=strategy_of(arm.strategy), admission=rules, rounds=ROUNDS, seed=seed,
                          engine=Faulty(engine=Local(), faults=fault_of(arm.fault, liars), seed=seed), progress=False)
    fl.core.load_weights(model, history.state.params)
    norms = [numbers["norm"] for record in history.records for numbers in record["sites"].values()]
    return {"scores": packed(fl.evaluate(model, sites, precision="fp32")),
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


def section(means: pd.DataFrame, table: pd.DataFrame, seeds: Sequence[int]) -> str:
    """The table of docs/faults.md: mean Dice, and in brackets its difference to the mean of updates without a fault."""
    rows = []
    for fault in FAULTS:
        cells = [means.loc[f"{fault}, {strategy}"] for strategy in STRATEGIES]
        texts = [f"{cell.dice:.2f}" + (f" ({cell.gap:+.2f})" if cell.low > 0 or cell.high < 0 else "")
                 for cell in cells]
        rows.append(f"| {fault} | {' | '.join(texts)} |")
    honest = table[(table["fault"] == "none") & (table["strategy"] == "mean")]["median norm"].median()
    about = ("`benchmarks/faults.py`: nine faults against seven ways to combine updates, from the narrow public model, "
             "on the thirteen sites of [the comparison of workflows](workflows.md#workflows-and-strategies-compared), "
             f"seeds {', '.join(map(str, seeds))}. Three of the thirteen sites lie, or send NaN, in every round. Mean "
             f"Dice of {int(means['patients'].max())} held-out patients; in brackets its difference to the mean of "
             "updates without a fault, where the paired 95 % interval excludes 0. The median norm of an honest update "
             f"is {honest:.2g}.")
    head = [f"| fault | {' | '.join(STRATEGIES)} |", "|---" * (len(STRATEGIES) + 1) + "|"]
    more = ("[faults.csv](../benchmarks/results/faults.csv) has the Dice of each seed, the share of updates that were "
            "left out and the norms of updates.")
    picture = "![Fault by strategy: mean Dice of held-out patients](../benchmarks/results/faults.png)"
    return "\n\n".join([fill(about), "\n".join([*head, *rows]), picture, fill(more)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="only arms whose code holds this text; nothing is written")
    parser.add_argument("--folder", type=Path, default=Path("runs/faults"), help="rows, kept for the next time")
    options = parser.parse_args()
    prepare(options.seeds)
    jobs = [(arm, seed) for seed in options.seeds for fault in FAULTS for strategy in STRATEGIES
            if options.only in repr(arm := Arm(fault=fault, strategy=strategy))]
    table = sweep(score, jobs, options.folder, "arms").assign(
        arm=[f"{arm.fault}, {arm.strategy}" for arm, _ in jobs], fault=[arm.fault for arm, _ in jobs],
        strategy=[arm.strategy for arm, _ in jobs], seed=[seed for _, seed in jobs])
    if options.only:
        print(unpacked(table).groupby(["arm", "seed"])["dice"].mean().round(3).to_string())
        print(table[["arm", "seed", "left out", "median norm"]].to_string())
        return
    means = compared(table, "none, mean")
    each = unpacked(table).groupby(["arm", "seed"], sort=False)["dice"].mean().rename("mean Dice").reset_index()
    each.merge(table[["arm", "seed", "left out", "median norm"]]).round(4).to_csv(RESULTS / "faults.csv", index=False)
    shown = means["dice"].to_numpy().reshape(len(FAULTS), len(STRATEGIES))
    figure(pd.DataFrame(shown, index=FAULTS, columns=STRATEGIES), RESULTS / "faults.png")
    between_marks("faults", section(means, table, options.seeds))
    write("faults", {"seeds": options.seeds, "arms": {
        arm: {name: float(value) for name, value in row.round(4).items()} for arm, row in means.iterrows()}})


if __name__ == "__main__":
    main()
