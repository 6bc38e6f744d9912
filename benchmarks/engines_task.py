"""What every arm of the engines' benchmark trains, on whom, and when its first gradient was there."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import fedlab as fl
from fedlab.data.store import load_sites, save_sites

PATIENTS, STEPS, LR = 4, 2, 1e-2
SHAPE, SPACING_MM, CROP = (32, 40, 32), 4.5, (16, 16, 16)
#: Where the moment of the first gradient is written, whichever process has it.
STAMP = "FEDLAB_FIRST_GRADIENT"


def make_data(folder: Path, count: int) -> None:
    """Generated sites of four patients each, once for all arms."""
    if not folder.is_dir():
        scratch = folder.with_name(folder.name + ".part")
        save_sites(fl.make_cohort(seed=0, sites=count, patients=count * PATIENTS, sizes=(PATIENTS,) * count, held_out=0,
                                  shape=SHAPE, spacing_mm=SPACING_MM, workers=0, progress=False), scratch)
        scratch.rename(folder)


class StampedSGD(torch.optim.SGD):
    """Plain SGD that notes when the first gradient of the whole run is there; the clock is one for all processes."""

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float) -> None:
        super().__init__(params, lr=lr)
        self.register_step_pre_hook(_note)


def _note(*_: Any) -> None:
    with suppress(FileExistsError), Path(os.environ[STAMP]).open("x", encoding="utf-8") as file:
        file.write(repr(time.monotonic()))


def make_trainer() -> fl.SiteTrainer:
    """The smallest SegResNet of the library: 1.2 million weights go to each site and back."""
    return fl.SiteTrainer(model=fl.segresnet(seed=0), lr=LR, steps=STEPS, batch_size=1, crop=CROP, augment=None,
                          optimiser=StampedSGD, momentum="restart", precision="fp32", device="cpu")


def timed(run: Callable[[Callable[[Any], None]], fl.core.ServerState], rounds: int) -> dict[str, Any]:
    """Runs, and says when the first gradient was there, how long a round took and what the weights are.

    Args:
        run: called with what is to be called after each round; returns the last state.
        rounds: how many.
    """
    ends: list[float] = []
    started = time.monotonic()
    state = run(lambda _: ends.append(time.monotonic()))
    finished = time.monotonic()
    first = float(Path(os.environ[STAMP]).read_text(encoding="utf-8"))
    if len(ends) != rounds:
        raise RuntimeError(f"{len(ends)} rounds came, {rounds} were asked for")
    steady = [later - earlier for earlier, later in pairwise(ends)]
    return {"first_gradient_s": first - started, "round_s": statistics.median(steady), "run_s": finished - started,
            "model_bytes": sum(p.numel() * p.element_size() for p in state.params.values()),
            "weights_sha256": fl.core.weights_sha256(state.params)}


def main(arm: str, run: Callable[[Sequence[fl.Site], int, Callable[[Any], None]], fl.core.ServerState],
         data: Path, rounds: int, out: Path) -> None:
    """One arm in its own process: everything is imported and the patients are there before the clock starts."""
    import torch._dynamo  # by the first step of any optimiser

    torch.set_num_threads(1)
    sites = load_sites(data)
    make_trainer()  # loads MONAI
    row = timed(lambda note: run(sites, rounds, note), rounds)
    out.write_text(json.dumps({"engine": arm, "sites": len(sites), "rounds": rounds, **row}), encoding="utf-8")
