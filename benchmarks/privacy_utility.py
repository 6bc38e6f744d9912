"""Dice against ε: what each privacy technique costs on a generated cohort, and the recipe that costs least.

    .venv/bin/python benchmarks/privacy_utility.py [--seeds 0 1 2] [--only TEXT]

Four sites, 104 patients to train on and 24 held out. The network is first trained on 96 public patients of other
sites, then fine-tuned by the four sites together, with and without privacy; some arms start from random weights.
Writes `benchmarks/results/privacy_utility.{json,csv,png}`. The noise of an arm is set by Rényi divergences; the ε
published for it is what the numerical accountant proves (`proven`), which `--restate` computes anew from the table,
without training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from common import RESULTS, write

SITES, PER_SITE, HELD_OUT, PUBLIC = 4, 32, 6, 96
SHAPE = (48, 64, 48)
DELTA = 1e-3  # below 1 / 104 patients in all and below 1 / 26 patients of a site
PRETRAIN_STEPS = 2500
EPSILONS = (8.0, 3.0, 1.0, 0.3)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    Args:
        technique: "none", "DP-SGD", "site-level Gaussian" or "sparse vector".
        epsilon: not exceeded at the end of the run; infinite for "none".
        start: "pretrained" or "random" weights.
        layers: which parameters train: "all", or "norms and head".
        rounds, steps: federated rounds and gradient steps of a site in each.
        lr: learning rate of the first round.
        clip: clipping norm.
        crops: crops of a patient in each step.
    """

    technique: str = "none"
    epsilon: float = math.inf
    start: str = "pretrained"
    layers: str = "all"
    rounds: int = 10
    steps: int = 2
    lr: float = 1e-3
    clip: float = 1.0
    crops: int = 2

    @property
    def recipe(self) -> str:
        """What the arms of one line in the figure share."""
        return f"{self.technique}, {self.start} weights, {self.layers}"


def arms(seed: int) -> list[Arm]:
    """What is compared: every recipe without noise and with it; what costs most and reaches least on seed 0 only."""
    small: dict[str, Any] = {"layers": "norms and head"}
    found = [Arm(start="random", lr=5e-3), Arm(lr=2e-3), Arm(lr=1e-2, **small)]
    found += [Arm(technique="DP-SGD", epsilon=epsilon, lr=3e-3, **small) for epsilon in EPSILONS]
    if seed == 0:
        found += [Arm(technique="DP-SGD", epsilon=8.0, lr=3e-4),
                  Arm(technique="DP-SGD", epsilon=8.0, start="random", lr=5e-3)]
    for epsilon in (8.0, 1.0):
        found += [Arm(technique="site-level Gaussian", epsilon=epsilon, lr=1e-2, clip=0.3, **small),
                  Arm(technique="sparse vector", epsilon=epsilon, lr=1e-2, clip=0.03, **small)]
    return found


def sites_of(seed: int, cache: str) -> tuple[list[Any], list[Any]]:
    """The private cohort and the public one, of other sites with other scanners."""
    from fedlab import make_cohort

    private = make_cohort(seed=seed, sizes=[PER_SITE] * SITES, sites=SITES, patients=PER_SITE * SITES, shape=SHAPE,
                          held_out=HELD_OUT, cache=cache, workers=0, progress=False)
    public = make_cohort(seed=1000 + seed, sites=8, patients=PUBLIC, sizes=[PUBLIC // 8] * 8, shape=SHAPE, held_out=1,
                         cache=cache, workers=0, progress=False)
    return private, public


def kept(seed: int, folder: str) -> Path:
    """Where the pretrained weights of a seed are."""
    from fedlab.data.phantom.generator import GENERATOR

    return Path(folder) / f"{GENERATOR}-{PRETRAIN_STEPS}-{seed}.safetensors"


def pretrain(seed: int, folder: str) -> None:
    """Trains on the public patients and keeps the weights, unless they are there."""
    if kept(seed, folder).is_file():
        return
    import torch
    from safetensors.torch import save_file

    from fedlab import SiteTrainer, segresnet
    from fedlab.run import centralised
    from fedlab.training import PolyDecay, augmentation

    torch.set_num_threads(1)
    _, public = sites_of(seed, f"{folder}/cache")
    rounds = PRETRAIN_STEPS // 10
    trainer = SiteTrainer(model=segresnet(filters=8, seed=seed), steps=10, lr=PolyDecay(start=5e-3, rounds=rounds),
                          batch_size=2, crop=(24, 24, 24), tumour_share=0.5, augment=augmentation(flips=(0,)))
    from fedlab.run.baselines import pooled

    history = centralised(trainer, [pooled(public)], rounds=rounds, seed=seed, progress=False)
    save_file(dict(history.state.params), kept(seed, folder))


def measure(arm: Arm | None, seed: int, folder: str) -> dict[str, Any]:
    """What `score` finds, or found before: an interrupted benchmark goes on."""
    name = hashlib.sha256(f"{kept(seed, folder).name} {arm!r}".encode()).hexdigest()[:16]
    path = Path(folder) / f"{name}.json"
    if not path.is_file():
        path.write_text(json.dumps(score(arm, seed, folder)), encoding="utf-8")
    row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return row


def score(arm: Arm | None, seed: int, folder: str) -> dict[str, Any]:
    """Trains one arm and scores it on the held-out patients; no arm scores the pretrained weights themselves."""
    import torch
    from safetensors.torch import load_file

    from fedlab import SiteTrainer, evaluate, federate, segresnet, summary
    from fedlab.core.weights import load_weights
    from fedlab.privacy.personal_layers import norms_and_head
    from fedlab.training import PolyDecay, augmentation

    torch.set_num_threads(1)
    sites, _ = sites_of(seed, f"{folder}/cache")
    model = segresnet(filters=8, seed=seed)
    if arm is None or arm.start == "pretrained":
        load_weights(model, load_file(kept(seed, folder)))
    row: dict[str, Any] = {"seed": seed, "recipe": "pretrained only", "epsilon": math.nan}
    if arm is not None:
        if arm.layers == "norms and head":
            few = set(norms_and_head(model))
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in few)
        trainer = SiteTrainer(model=model, steps=arm.steps, lr=PolyDecay(start=arm.lr, rounds=arm.rounds),
                              batch_size=PER_SITE - HELD_OUT, crop=(24, 24, 24), tumour_share=0.5,
                              augment=augmentation(flips=(0,)))
        from fedlab import FedAvg

        history = federate(trainer, sites, strategy=FedAvg(weights="uniform"), privacy=private(arm),
                           rounds=arm.rounds, seed=seed, progress=False)
        row |= {"recipe": arm.recipe, "epsilon": arm.epsilon, "guarantee": history.guarantee(), "arm": repr(arm)}
    dice = summary(evaluate(model, sites))["dice"]
    return row | {region: round(float(dice[region]), 4) for region in dice.index}


def private(arm: Arm) -> Any:
    """The technique of an arm, its noise set for the arm's ε over the whole run."""
    from fedlab.privacy.accounting.ledger import noise_multiplier_for
    from fedlab.privacy.base import Privacy

    if arm.technique == "none":
        return Privacy()
    if arm.technique == "DP-SGD":
        from fedlab.privacy.dp.dpsgd import DPSGD

        noise = noise_multiplier_for(target_epsilon=arm.epsilon, delta=DELTA, sample_rate=1.0,
                                     steps=arm.rounds * arm.steps)
        return DPSGD(clip=arm.clip, noise_multiplier=noise, sample_rate=1.0, crops=arm.crops, delta=DELTA,
                     max_epsilon=arm.epsilon)
    if arm.technique == "site-level Gaussian":
        from fedlab.privacy.dp.site_level import CentralGaussian

        noise = noise_multiplier_for(target_epsilon=arm.epsilon, delta=DELTA, sample_rate=1.0, steps=arm.rounds)
        return CentralGaussian(clip=arm.clip, noise_multiplier=noise, delta=DELTA, max_epsilon=arm.epsilon)
    from fedlab.privacy.sparse.partial_sharing import SparseVector

    return SparseVector(fraction=0.1, epsilon=arm.epsilon, rounds=arm.rounds, delta=DELTA, clip=arm.clip)


def proven(recipe: str, epsilon: float) -> float:
    """The ε that accountant "prv" proves for the noise of an arm, which for a sparse vector is its own."""
    from fedlab.privacy.accounting.ledger import Gaussian, epsilon_of, noise_multiplier_for

    steps = {"DP-SGD": Arm.rounds * Arm.steps, "site-level Gaussian": Arm.rounds}.get(recipe.split(", ")[0])
    if steps is None or not epsilon < math.inf:
        return epsilon
    noise = noise_multiplier_for(target_epsilon=epsilon, delta=DELTA, sample_rate=1.0, steps=steps)
    return epsilon_of([Gaussian(noise_multiplier=noise, steps=steps)], delta=DELTA, accountant="prv")


def publish(table: pd.DataFrame) -> None:
    """Writes the table with the proven ε, and the figure."""
    table = table.assign(proven=[proven(recipe, epsilon) for recipe, epsilon in zip(table.recipe, table.epsilon,
                                                                                    strict=True)])
    table.to_csv(RESULTS / "privacy_utility.csv", index=False)
    figure(table, RESULTS / "privacy_utility.png")


def figure(table: pd.DataFrame, path: Path) -> None:
    """Mean Dice over seeds against the proven ε, one line per recipe, what has no noise at the right edge."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from fedlab.core.types import rounded_up
    from fedlab.view.colours import style

    style()
    drawn, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for recipe, rows in table[table["epsilon"] < math.inf].groupby("recipe"):
        over = rows.groupby("proven")["mean"]
        axes.errorbar(over.mean().index, over.mean(), yerr=[over.mean() - over.min(), over.max() - over.mean()],
                      marker="o", capsize=3, label=recipe)
    for dashes, (recipe, rows) in zip(("--", ":", "-.", (0, (1, 3))), table[~(table["epsilon"] < math.inf)].groupby(
            "recipe"), strict=False):
        axes.axhline(rows["mean"].mean(), linestyle=dashes, color="#555", label=recipe)
    axes.set(xscale="log", xlabel="ε over the whole run by PRV (DP-SGD: per patient; the others: per site), δ = 0.001",
             ylabel="mean Dice of 24 held-out patients")
    ticks = sorted(proven("DP-SGD", epsilon) for epsilon in EPSILONS)
    axes.set_xticks(ticks, [rounded_up(epsilon) for epsilon in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    drawn.savefig(path, dpi=130)


def run(seeds: Sequence[int], only: str, folder: str, workers: int) -> pd.DataFrame:
    """One row per seed and arm."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(tqdm(pool.map(pretrain, seeds, [folder] * len(seeds)), total=len(seeds), desc="pretraining"))
        jobs = [(arm, seed) for seed in seeds for arm in (None, *(a for a in arms(seed) if only in repr(a)))]
        rows = pool.map(measure, [a for a, _ in jobs], [s for _, s in jobs], [folder] * len(jobs))
        return pd.DataFrame(tqdm(rows, total=len(jobs), desc="arms"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", help="only arms whose code holds this text; nothing is written")
    parser.add_argument("--folder", default="runs/privacy_utility", help="working files, kept for the next time")
    parser.add_argument("--restate", action="store_true", help="only compute every ε anew, from the table")
    options = parser.parse_args()
    if options.restate:
        publish(pd.read_csv(RESULTS / "privacy_utility.csv"))
        return
    Path(options.folder).mkdir(parents=True, exist_ok=True)
    table = run(options.seeds, options.only, options.folder, os.cpu_count() or 1)
    over = table.fillna({"epsilon": math.inf}).groupby(["recipe", "epsilon"])["mean"].agg(["mean", "min", "max"])
    print(over.round(3).to_string())
    if options.only:
        return
    publish(table)
    write("privacy_utility", {"delta": DELTA, "seeds": options.seeds, "mean Dice": {
        f"{recipe}, ε = {epsilon:g}": round(float(value), 4) for (recipe, epsilon), value in over["mean"].items()}})


if __name__ == "__main__":
    main()
