"""Workflow x strategy on thirteen generated sites, from the narrow public model: the Dice of each, and its interval.

    .venv/bin/python benchmarks/workflows.py [--seeds 0 1 2] [--only TEXT]

Thirteen sites as in Li et al. 2019, here of 2 to 6 training patients and 2 held out, with equal gradient steps in every
arm; but FedNova takes two passes over each site's patients, as many steps on average. Arms with plain SGD stand apart:
SCAFFOLD and FedNova need it, and what they are compared with is FedAvg with plain SGD. The server's learning rates
were chosen among three each with seeds 10 and 11.
Writes `benchmarks/results/workflows.{json,csv,png}` and the section of docs/workflows.md between its two marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from common import RESULTS, between_marks, fill, sweep, write
from fedlab.core.types import Site
from fedlab.data.phantom.generator import GENERATOR
from fedlab.data.store import load_sites, save_sites
from fedlab.evidence.differences import difference, mean_dice

SITES, HELD_OUT = 13, 2
SIZES = (4, 4, 4, 5, 5, 6, 6, 6, 7, 7, 8, 8, 8)
ROUNDS, STEPS = 6, 3
BUFFER = 4  # updates after which the asynchronous server moves: it takes more steps, each of fewer updates
SHAPE, SPACING_MM, CROP = (48, 64, 48), 3.0, (24, 24, 24)
LR, SGD_LR = 2e-3, 0.05
PREPARED = Path("runs/thirteen-sites") / GENERATOR
WORKFLOWS = ("data lake", "each alone", "star", "ring", "once round", "peers: ring", "peers: exponential",
             "peers: complete", "tree", "rings in a tree", "peers of regions", "buffered")
STRATEGIES = ("FedAvg", "uniform", "FedProx", "FedAdam", "FedYogi", "FedAdagrad", "server momentum", "FedBN",
              "Ditto", "median", "trimmed mean", "multi-Krum", "geometric median", "norm bound", "half the sites",
              "FedAvg, plain SGD", "SCAFFOLD, plain SGD", "FedNova, plain SGD")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A workflow and a strategy, by the names in this file."""

    workflow: str
    strategy: str = "FedAvg"


def arms() -> list[Arm]:
    """Every strategy at the star, averaging in every workflow, and some other strategies where they are not refused."""
    found = [Arm(workflow="star", strategy=strategy) for strategy in STRATEGIES]
    found += [Arm(workflow=workflow) for workflow in ("data lake", "each alone", *WORKFLOWS[3:])]
    found += [Arm(workflow=workflow, strategy="FedProx") for workflow in ("ring", "peers: ring", "tree")]
    found += [Arm(workflow="tree", strategy="FedAdam"), Arm(workflow="buffered", strategy="server momentum")]
    return [Arm(workflow="public"), *found]


def prepare(seeds: Sequence[int]) -> None:
    """Generates the sites of each seed once, for all arms."""
    import fedlab as fl

    for seed in seeds:
        if not (PREPARED / f"seed-{seed}" / "done").is_file():
            save_sites(fl.make_cohort(seed=seed, sizes=SIZES, shape=SHAPE, spacing_mm=SPACING_MM, held_out=HELD_OUT),
                       PREPARED / f"seed-{seed}")
            (PREPARED / f"seed-{seed}" / "done").touch()


def prepared(seed: int) -> list[Site]:
    """The sites of a seed."""
    return load_sites(PREPARED / f"seed-{seed}")


def strategy_of(name: str, workflow: str, model: Any) -> tuple[Any, Any]:
    """The strategy and, where it takes one, the privacy technique of that name in a workflow."""
    import fedlab as fl
    from fedlab.privacy.personal_layers import norms

    made: dict[str, Callable[[], Any]] = {
        "FedAvg": fl.FedAvg, "FedAvg, plain SGD": fl.FedAvg, "FedBN": fl.FedAvg,
        "FedNova, plain SGD": fl.strategies.FedNova,
        "uniform": lambda: fl.FedAvg(weights="uniform"), "half the sites": lambda: fl.FedAvg(sample=0.5),
        "FedProx": lambda: fl.strategies.FedProx(mu=0.01), "Ditto": lambda: fl.strategies.Ditto(lam=0.1),
        "FedAdam": lambda: fl.strategies.FedOpt(rule="adam", server_lr=1e-2),
        "FedYogi": lambda: fl.strategies.FedOpt(rule="yogi", server_lr=1e-2),
        "FedAdagrad": lambda: fl.strategies.FedOpt(rule="adagrad", server_lr=1e-2),
        "server momentum": lambda: fl.strategies.FedOpt(
            rule="momentum", server_lr=0.1 if workflow == "buffered" else 0.3),  # it takes more steps
        "SCAFFOLD, plain SGD": fl.strategies.SCAFFOLD,
        "median": fl.strategies.CoordinateMedian, "trimmed mean": lambda: fl.strategies.TrimmedMean(trim=0.2),
        "multi-Krum": lambda: fl.strategies.Krum(attackers=3, chosen=7),
        "geometric median": fl.strategies.GeometricMedian,
        "norm bound": lambda: fl.strategies.NormBound(bound=2.0),
    }
    return made[name](), fl.privacy.PersonalLayers(names=norms(model)) if name == "FedBN" else None


def topology_of(name: str, names: list[str]) -> Any:
    """The workflow of that name for these sites."""
    import networkx as nx

    import fedlab as fl

    regions = {"north": names[:5], "middle": names[5:9], "south": names[9:]}
    made: dict[str, Callable[[], Any]] = {
        "star": lambda: fl.topologies.star, "ring": lambda: fl.topologies.ring,
        "once round": lambda: fl.topologies.ring,
        "peers: ring": lambda: fl.topologies.Gossip(graph=nx.cycle_graph(SITES)),
        "peers: exponential": lambda: fl.topologies.Gossip(graph=nx.circulant_graph(SITES, [1, 2, 4])),
        "peers: complete": lambda: fl.topologies.Gossip(graph=nx.complete_graph(SITES)),
        "tree": lambda: fl.topologies.Tree(regions=regions),
        "rings in a tree": lambda: fl.topologies.Tree(regions=regions, within=fl.topologies.ring),
        "peers of regions": lambda: fl.topologies.Tree(
            regions=regions, between=fl.topologies.Gossip(graph=nx.complete_graph(regions))),
        "buffered": lambda: fl.topologies.Buffered(
            size=BUFFER, seconds={name: 1 + k % 4 for k, name in enumerate(names)}),
    }
    return made[name]()


def score(arm: Arm, seed: int) -> dict[str, Any]:
    """Trains one arm; Dice of the held-out patients of all sites, and of each site's own model on its own patients."""
    import torch

    import fedlab as fl

    sites = prepared(seed)
    model = fl.public_model("collection")
    strategy, privacy = strategy_of(arm.strategy, arm.workflow, model)
    plain = arm.strategy.endswith("plain SGD")
    rounds, steps = {"once round": (1, ROUNDS * STEPS), "buffered": (ROUNDS * SITES // BUFFER, STEPS)}.get(
        arm.workflow, (ROUNDS, STEPS))
    trainer = fl.SiteTrainer(
        model=model, crop=CROP, tumour_share=0.5, clip_norm=1.0, augment=fl.training.augmentation(flips=(0,)),
        **({"epochs": 2} if "FedNova" in arm.strategy else {"steps": steps}),
        lr=SGD_LR if plain else LR if arm.workflow == "once round" else fl.training.PolyDecay(start=LR, rounds=rounds),
        **({"optimiser": torch.optim.SGD} if plain else {}))
    settings: dict[str, Any] = {"rounds": rounds, "seed": seed, "progress": False}

    def dice(params: Any, patients: Any) -> pd.DataFrame:
        fl.core.load_weights(model, params)
        return fl.evaluate(model, patients, precision="fp32")

    def own(models: Any) -> float:
        return sum(float(dice(models[site.name], [site])["dice"].mean()) for site in sites) / SITES

    if arm.workflow == "public":
        return {"scores": packed(dice(trainer.initial(), sites))}
    if arm.workflow == "each alone":
        alone = {name: h.state.params for name, h in fl.run.local_only(trainer, sites, **settings).items()}
        others = pd.concat([dice(params, [s for s in sites if s.name != name]) for name, params in alone.items()])
        kept = others.groupby(["site", "patient", "region"], as_index=False)[["dice", "reference_ml"]].mean()
        return {"scores": packed(kept), "own": own(alone)}
    if arm.workflow == "data lake":
        return {"scores": packed(dice(fl.run.centralised(trainer, sites, **settings).state.params, sites))}
    history = fl.federate(trainer, sites, strategy=strategy, privacy=privacy,
                          topology=topology_of(arm.workflow, [site.name for site in sites]), **settings)
    params = history.state.params
    row = {"scores": packed(dice(params, sites)), "megabytes": float(history.table()["bytes"].sum()) / 1e6}
    personal = strategy if arm.strategy == "Ditto" else privacy
    if personal is not None:
        row["own"] = own({site.name: personal.local(params, history.site_states[site.name]) for site in sites})
    elif arm.workflow.startswith("peers: "):
        row["own"] = own(dict(history.state.models))
    return row


def packed(scores: pd.DataFrame) -> list[list[Any]]:
    """Scores as rows for JSON: site, patient, region, Dice and the volume of the reference."""
    rows: list[list[Any]] = scores[["site", "patient", "region", "dice", "reference_ml"]].to_numpy().tolist()
    return rows


def unpacked(table: pd.DataFrame) -> pd.DataFrame:
    """The scores of all rows of a sweep, with columns arm and seed."""
    columns = ["site", "patient", "region", "dice", "reference_ml"]
    return pd.concat([pd.DataFrame(row.scores, columns=columns).assign(arm=row.arm, seed=row.seed)
                      for row in table.itertuples()], ignore_index=True)


def compared(table: pd.DataFrame, main: str) -> pd.DataFrame:
    """One row per arm: mean Dice over the patients of all seeds, and its difference to the arm `main`, with intervals.

    Args:
        table: rows of a sweep with the columns arm, seed and scores.
        main: the arm that the others are compared with.
    """
    scores, rows = unpacked(table), {}
    for arm in table["arm"].unique():
        found = difference(scores, arm, main)
        rows[arm] = dict(zip(("dice", "dice_low", "dice_high"), mean_dice(scores, arm), strict=True)) | {
            "gap": found.value, "low": found.low, "high": found.high, "patients": found.patients}
    return pd.DataFrame.from_dict(rows, orient="index")


def figure(means: pd.DataFrame, path: Path) -> None:
    """Mean Dice minus that of FedAvg at a server, with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from fedlab.view.colours import style

    style()
    shown = means.sort_values("gap")
    drawn, axes = plt.subplots(figsize=(8, 0.27 * len(shown) + 1), layout="constrained")
    axes.errorbar(shown["gap"], range(len(shown)), fmt="o", markersize=4, capsize=2, color="#003A66",
                  xerr=[shown["gap"] - shown["low"], shown["high"] - shown["gap"]])
    axes.set_yticks(range(len(shown)), [called(arm) for arm in shown.index], fontsize=8)
    axes.axvline(0, color="#444", linewidth=1)
    axes.set_xlabel("mean Dice minus that of FedAvg at a server,\n95 % interval over patients", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.margins(y=0.01)
    drawn.savefig(path, dpi=130)


#: Names in the table and the figure.
NAMES = {"public": "public model, untrained", "data lake": "all data pooled",
         "each alone": "each site alone, on others' patients",
         "star": "server", "ring": "ring (cyclic transfer)", "once round": "ring, one single pass",
         "peers: ring": "peers, ring graph", "peers: exponential": "peers, exponential graph",
         "peers: complete": "peers, complete graph", "tree": "tree of three regions",
         "rings in a tree": "three regions, a ring inside each", "peers of regions": "three regions that are peers",
         "buffered": "asynchronous, four updates per step"}


def called(arm: str) -> str:
    """An arm's name for readers."""
    workflow, _, strategy = arm.partition(", ")
    alone = workflow in ("public", "data lake", "each alone")
    return NAMES[workflow] if alone else f"{NAMES[workflow]}, {strategy}"


def section(means: pd.DataFrame, seeds: Sequence[int]) -> str:
    """The table of docs/workflows.md."""
    rows = [f"| {called(arm)} | {row.dice:.3f} ({row.dice_low:.3f} to {row.dice_high:.3f}) | "
            + ("–" if arm == "star, FedAvg" else f"{row.gap:+.3f} ({row.low:+.3f} to {row.high:+.3f})")
            + f" | {'' if pd.isna(row.own) else f'{row.own:.3f}'}"
            + f" | {'' if pd.isna(row.megabytes) else f'{row.megabytes:.0f}'} |"
            for arm, row in means.sort_values("dice", ascending=False).iterrows()]
    better = [called(arm) for arm, row in means.iterrows() if row.low > 0]
    worse = [called(arm) for arm, row in means.iterrows() if row.high < 0]
    about = [
        f"`benchmarks/workflows.py` trains {len(means) - 1} arms from `fl.public_model(\"collection\")`, each with "
        f"seeds {', '.join(map(str, seeds))}: thirteen generated sites of 2 to 6 training patients, {ROUNDS} rounds of "
        f"{STEPS} steps, the same number of gradient steps in every arm but FedNova's. Mean Dice of WT, TC and ET on "
        f"{int(means['patients'].max())} held-out patients, and its difference to FedAvg at a server, with 95 % "
        "intervals, paired over patients. Where each site has a model of its own, its mean Dice on that site's "
        "held-out patients stands beside, without an interval:"]
    found = [f"Better than FedAvg at a server, by an interval that excludes 0: {'; '.join(better) or 'no arm'}.",
             f"Worse: {'; '.join(worse) or 'no arm'}."]
    head = "| arm | mean Dice | minus FedAvg at a server | each site's own model | sent [MB] |"
    table = [head, "|---|---|---|---|---|", *rows]
    picture = ("![Dice of each workflow and strategy minus that of FedAvg at a server]"
               "(../benchmarks/results/workflows.png)")
    return "\n\n".join([*map(fill, about), "\n".join(table), picture, *map(fill, found)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="only arms whose code holds this text; nothing is written")
    parser.add_argument("--folder", type=Path, default=Path("runs/workflows"), help="rows, kept for the next time")
    options = parser.parse_args()
    prepare(options.seeds)
    jobs = [(arm, seed) for seed in options.seeds for arm in arms() if options.only in repr(arm)]
    table = sweep(score, jobs, options.folder, "arms")
    table = table.assign(arm=["public" if a.workflow == "public" else f"{a.workflow}, {a.strategy}" for a, _ in jobs],
                         seed=[seed for _, seed in jobs])
    if options.only:
        print(unpacked(table).groupby(["arm", "seed"])["dice"].mean().round(3).to_string())
        return
    extras = table.reindex(columns=["arm", "megabytes", "own"]).groupby("arm", sort=False).mean()
    means = compared(table, "star, FedAvg").join(extras)
    each = unpacked(table).groupby(["arm", "seed"], sort=False)["dice"].mean().rename("mean Dice").reset_index()
    each.round(4).to_csv(RESULTS / "workflows.csv", index=False)
    figure(means, RESULTS / "workflows.png")
    between_marks("workflows", section(means, options.seeds))
    write("workflows", {"seeds": options.seeds, "arms": {
        arm: {name: float(value) for name, value in row.dropna().round(4).items()} for arm, row in means.iterrows()}})


if __name__ == "__main__":
    main()
