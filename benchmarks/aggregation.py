"""Combining 13 updates, as multiples of the time of copying them.

    .venv/bin/python benchmarks/aggregation.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from common import write
from fedlab.core.types import Tensors, Update
from fedlab.core.weights import trainable
from fedlab.strategies import weighted_mean
from fedlab.training.networks import segresnet

SITES = 13


def best(work: Callable[[], object], times: int = 7) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    torch.set_num_threads(1)
    params = {name: p.detach() for name, p in trainable(segresnet(filters=16)).items()}
    deltas = [{name: torch.randn_like(p) for name, p in params.items()} for _ in range(SITES)]

    def arriving() -> Iterator[Update]:
        return (Update(site=str(i), delta=delta, weight=float(i + 1)) for i, delta in enumerate(deltas))

    def stacked() -> Tensors:
        weights = torch.arange(1.0, SITES + 1, dtype=torch.float64)
        together = {name: torch.stack([delta[name] for delta in deltas]).double() for name in params}
        return {name: torch.einsum("s,s...->...", weights, t) / weights.sum() for name, t in together.items()}

    copies = SITES * best(lambda: {name: p.clone() for name, p in params.items()})
    mean, naive = weighted_mean(arriving()).delta, stacked()
    difference = max(float((mean[name] - naive[name]).abs().max()) for name in params)
    write("aggregation", {
        "sites": SITES, "parameters": sum(p.numel() for p in params.values()), "largest difference": difference,
        "streaming mean in float64 / copies of 13 models": round(best(lambda: weighted_mean(arriving())) / copies, 2),
        "stacked mean in float64 / copies of 13 models": round(best(stacked) / copies, 2),
    })


if __name__ == "__main__":
    main()
