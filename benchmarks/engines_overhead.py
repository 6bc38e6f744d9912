"""Overhead of a round on `Local` over bare PyTorch, in turns within one process; started by engines.py --overhead.

    python benchmarks/engines_overhead.py DATA PAIRS

A round at the demo's settings: every site takes ten steps of AdamW with two crops of 32³ voxels. Bare PyTorch is a loop
over the sites that loads the weights, trains on the same crops with the same convolutions, and averages; it checks,
records and keeps nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler

import fedlab as fl
from fedlab.core.hardware import calling, pick_precision
from fedlab.core.seeds import generator
from fedlab.data.store import load_sites
from fedlab.run.federate import each_round
from fedlab.training.defaults import DiceBCE, adamw
from fedlab.training.trainer import Crops

STEPS, BATCH, CROP, LR = 10, 2, (32, 32, 32), 1e-3


def bare_round(model: torch.nn.Module, weights: dict[str, torch.Tensor], sites: Sequence[fl.Site],
               number: int) -> dict[str, torch.Tensor]:
    """The mean weights after one round."""
    place, loss, dtype = torch.device("cpu"), DiceBCE(), pick_precision("auto", torch.device("cpu"))
    mean = {name: torch.zeros_like(t) for name, t in weights.items()}
    share = 1 / sum(len(site.train) for site in sites)
    for site in sites:
        model.load_state_dict(weights)
        optimiser = adamw(model.parameters(), LR)
        crops = Crops(site.train, crop=CROP, tumour_share=0.75, augment=None, seed=number)
        sampler = RandomSampler(crops, num_samples=STEPS * BATCH, generator=generator(number, "order"))
        for image, target in DataLoader(crops, batch_size=BATCH, sampler=sampler):
            optimiser.zero_grad(set_to_none=True)
            with calling(place, dtype):
                logits = model(image)
            loss(logits.float(), target).backward()
            optimiser.step()
        for name, t in model.state_dict().items():
            mean[name] += len(site.train) * share * t
    return mean


def main(data: Path, pairs: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    sites, model = load_sites(data), fl.segresnet(seed=0)
    trainer = fl.SiteTrainer(model=fl.segresnet(seed=0), lr=LR, steps=STEPS, batch_size=BATCH, crop=CROP, augment=None,
                             momentum="restart", device="cpu")
    rounds = each_round(trainer, sites, rounds=pairs + 1, engine=fl.Local())
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    taken: list[tuple[float, float]] = []
    for number in range(pairs + 1):
        started = time.process_time()
        next(rounds)
        between = time.process_time()
        weights = bare_round(model, weights, sites, number)
        taken.append((between - started, time.process_time() - between))
    ratios = [ours / bare for ours, bare in taken[1:]]  # the first warms up
    return {"sites": len(sites), "steps per site": STEPS, "batch": BATCH, "crop": CROP, "pairs": pairs,
            "cpu seconds of a round": round(statistics.median(ours for ours, _ in taken[1:]), 3),
            "bare PyTorch": round(statistics.median(bare for _, bare in taken[1:]), 3),
            "overhead, median of pairs": round(statistics.median(ratios) - 1, 4),
            "overhead, range": [round(min(ratios) - 1, 4), round(max(ratios) - 1, 4)]}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
