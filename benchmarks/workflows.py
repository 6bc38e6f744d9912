"""Workflow x strategy on thirteen generated sites: the mean Dice of each, as a share of pooled training.

    .venv/bin/python benchmarks/workflows.py [--seeds 0 1 2] [--only TEXT]

Thirteen sites as in Li et al. 2019, here of 2 to 6 training patients and 2 held out, at a small shape and with equal
gradient steps in every arm; but FedNova takes two passes over each site's patients, as many steps on average. Arms with
plain SGD stand apart: SCAFFOLD and FedNova need it, and what they are compared with is FedAvg with plain SGD.
Writes `benchmarks/results/workflows.{json,csv,png}`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from common import RESULTS, sweep, write

SITES, HELD_OUT = 13, 2
SIZES = (4, 4, 4, 5, 5, 6, 6, 6, 7, 7, 8, 8, 8)
ROUNDS, STEPS = 8, 4
BUFFER = 4  # updates after which the asynchronous server moves: it takes more steps, each of fewer updates
SHAPE, SPACING_MM, CROP = (32, 40, 32), 4.5, (16, 16, 16)
LR, SGD_LR = 5e-3, 0.05
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
    return [*found, Arm(workflow="tree", strategy="FedAdam"), Arm(workflow="buffered", strategy="server momentum")]


def strategy_of(name: str, model: Any) -> tuple[Any, Any]:
    """The strategy and, where it takes one, the privacy technique of that name."""
    import fedlab as fl
    from fedlab.privacy.personal_layers import norms

    made: dict[str, Callable[[], Any]] = {
        "FedAvg": fl.FedAvg, "FedAvg, plain SGD": fl.FedAvg, "FedBN": fl.FedAvg,
        "FedNova, plain SGD": fl.strategies.FedNova,
        "uniform": lambda: fl.FedAvg(weights="uniform"), "half the sites": lambda: fl.FedAvg(sample=0.5),
        "FedProx": lambda: fl.strategies.FedProx(mu=0.01), "Ditto": lambda: fl.strategies.Ditto(lam=0.1),
        "FedAdam": lambda: fl.strategies.FedOpt(rule="adam", server_lr=1e-2),
        "FedYogi": lambda: fl.strategies.FedOpt(rule="yogi", server_lr=1e-2),
        "FedAdagrad": lambda: fl.strategies.FedOpt(rule="adagrad", server_lr=0.1),
        "server momentum": lambda: fl.strategies.FedOpt(rule="momentum", server_lr=0.3),
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
    """Trains one arm and scores it on the held-out patients of all sites, and each site's own model on its own."""
    import torch

    import fedlab as fl

    sites = fl.make_cohort(seed=seed, sites=SITES, patients=sum(SIZES), sizes=SIZES, shape=SHAPE,
                           spacing_mm=SPACING_MM, held_out=HELD_OUT, workers=0, progress=False)
    model = fl.segresnet(seed=seed)
    strategy, privacy = strategy_of(arm.strategy, model)
    plain = arm.strategy.endswith("plain SGD")
    rounds, steps = {"once round": (1, ROUNDS * STEPS), "buffered": (ROUNDS * SITES // BUFFER, STEPS)}.get(
        arm.workflow, (ROUNDS, STEPS))
    trainer = fl.SiteTrainer(
        model=model, crop=CROP, tumour_share=0.5, augment=fl.training.augmentation(flips=(0,)),
        **({"epochs": 2} if "FedNova" in arm.strategy else {"steps": steps}),
        lr=SGD_LR if plain else LR if arm.workflow == "once round" else fl.training.PolyDecay(start=LR, rounds=rounds),
        **({"optimiser": torch.optim.SGD} if plain else {}))
    settings: dict[str, Any] = {"rounds": rounds, "seed": seed, "progress": False}

    def mean_dice(params: Any, patients: Any) -> float:
        fl.core.load_weights(model, params)
        return float(fl.evaluate(model, patients, precision="fp32")["dice"].mean())

    row: dict[str, Any] = {"workflow": arm.workflow, "strategy": arm.strategy, "seed": seed}
    if arm.workflow == "each alone":
        alone = fl.run.local_only(trainer, sites, **settings)
        return row | {"mean": sum(mean_dice(h.state.params, sites) for h in alone.values()) / SITES,
                      "own": sum(mean_dice(alone[s.name].state.params, [s]) for s in sites) / SITES}
    if arm.workflow == "data lake":
        history = fl.run.centralised(trainer, sites, **settings)
        return row | {"mean": mean_dice(history.state.params, sites)}
    history = fl.federate(trainer, sites, strategy=strategy, privacy=privacy,
                          topology=topology_of(arm.workflow, [site.name for site in sites]), **settings)
    params = history.state.params
    row |= {"mean": mean_dice(params, sites), "megabytes": float(history.table()["bytes"].sum()) / 1e6}
    personal = strategy if arm.strategy == "Ditto" else privacy
    if personal is not None:
        own = {site.name: personal.local(params, history.site_states[site.name]) for site in sites}
    else:
        own = dict(history.state.models) if arm.workflow.startswith("peers: ") else {}
    return row | ({"own": sum(mean_dice(own[s.name], [s]) for s in sites) / SITES} if own else {})


def figure(table: pd.DataFrame, path: Path) -> None:
    """Share of pooled training, a bar an arm, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from fedlab.view.colours import style

    style()
    order = table.groupby("arm")["share"].mean().sort_values()
    drawn, axes = plt.subplots(figsize=(8, 0.27 * len(order) + 1), layout="constrained")
    axes.barh(order.index, order, color="#9CC4E0")
    axes.scatter(table["share"], table["arm"], s=9, color="#003A66", zorder=3)
    axes.axvline(1, color="#444", linewidth=1)
    axes.set(xlabel="mean Dice of held-out patients over that of pooled training, a dot a seed", xlim=(0, None))
    axes.margins(y=0.01)
    axes.tick_params(labelsize=8)
    drawn.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="only arms whose code holds this text; nothing is written")
    parser.add_argument("--folder", type=Path, default=Path("runs/workflows"), help="rows, kept for the next time")
    options = parser.parse_args()
    chosen = [arm for arm in arms() if options.only in repr(arm)]
    table = sweep(score, [(arm, seed) for seed in options.seeds for arm in chosen], options.folder, "arms")
    if options.only:
        print(table.round(3).to_string())
        return
    lake = table[table["workflow"] == "data lake"].set_index("seed")["mean"]
    table["share"] = table["mean"] / table["seed"].map(lake)
    table["arm"] = table["workflow"] + ", " + table["strategy"]
    table.round(4).to_csv(RESULTS / "workflows.csv", index=False)
    figure(table, RESULTS / "workflows.png")
    means = table.groupby(["workflow", "strategy"], sort=False)[["mean", "own", "share", "megabytes"]].mean().round(3)
    print(means.to_string())
    write("workflows", {"seeds": options.seeds, "arms": {
        f"{workflow}, {strategy}": {k: float(v) for k, v in row.dropna().items()}
        for (workflow, strategy), row in means.iterrows()}})


if __name__ == "__main__":
    main()
