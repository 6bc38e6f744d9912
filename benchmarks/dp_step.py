"""Time and memory of a DP-SGD step over those of a plain step of the same precision, for each way to get gradients.

    .venv/bin/python benchmarks/dp_step.py [--only backward]

SegResNet with 8 filters, 8 patients of 64³ voxels in every step, one thread, CPU. Times are CPU seconds of the whole
step (gradients, clipping, noise, AdamW), private and plain steps in turn in one process; memory is what one step adds
to the process at its peak, each kind of step in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from common import write
from fedlab.core.kit import Kit
from fedlab.core.types import Patient, Site, SiteState
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.dp.gradients import MODES
from fedlab.privacy.dp.validators import fix_private
from fedlab.strategies import FedAvg
from fedlab.training.networks import segresnet
from fedlab.training.trainer import SiteTrainer

PATIENTS, SIDE, PAIRS = 8, 64, 2


def site() -> Site:
    rng = torch.Generator().manual_seed(0)
    shape = (SIDE, SIDE, SIDE)
    return Site(name="site", train=[
        Patient(f"p{k}", torch.randn(4, *shape, generator=rng), torch.randint(0, 4, shape, generator=rng).byte(),
                np.eye(4)) for k in range(PATIENTS)])


def kit_of(gradients: str, precision: str) -> Kit:
    model = segresnet() if gradients in ("plain", "backward") else fix_private(segresnet(), gradients=gradients)
    trainer = SiteTrainer(model=model, steps=1, batch_size=PATIENTS, crop=(SIDE, SIDE, SIDE), augment=None,
                          precision=precision, device="cpu")
    hospital, state = site(), SiteState()
    kit = trainer.prepare(hospital, FedAvg().begin(trainer.initial()), site_state=state, seed=0)
    kit.model.train()
    if gradients == "plain":
        return kit
    return DPSGD(clip=1.0, noise_multiplier=1.0, sample_rate=1.0, gradients=gradients).equip(kit, hospital, state)


def step(kit: Kit, image: torch.Tensor, target: torch.Tensor) -> float:
    started = time.process_time()
    kit.optimiser.zero_grad(set_to_none=True)
    kit.backward(kit, image, target)
    kit.optimiser.step()
    return time.process_time() - started


def measure_time(gradients: str, precision: str) -> dict[str, list[float]]:
    kits = {"plain": kit_of("plain", precision), gradients: kit_of(gradients, precision)}
    batches = {name: next(iter(kit.loader)) for name, kit in kits.items()}
    seconds: dict[str, list[float]] = {name: [] for name in kits}
    for repeat in range(PAIRS + 1):
        for name, kit in kits.items():
            taken = step(kit, *batches[name])
            if repeat:
                seconds[name].append(taken)
    return seconds


def measure_memory(gradients: str, precision: str) -> dict[str, float]:
    kit = kit_of(gradients, precision)
    image, target = next(iter(kit.loader))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    step(kit, image, target)
    return {"added MiB": (_status("VmHWM") - before) / 1024}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def _in_own_process(*arguments: str) -> dict[str, list[float] | float]:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    found: dict[str, list[float] | float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(only: str | None) -> None:
    table = []
    for precision in ("bf16", "fp32"):
        plain = _in_own_process("memory", "plain", precision)["added MiB"]
        table.append({"precision": precision, "gradients": "plain", "added MiB": round(plain)})
        for gradients in MODES:
            if only not in (None, gradients) or (gradients != "backward" and precision == "bf16"):
                continue  # the latter is refused: see DPSGD
            seconds = _in_own_process("time", gradients, precision)
            memory = _in_own_process("memory", gradients, precision)["added MiB"]
            ratios = [a / b for a, b in zip(seconds[gradients], seconds["plain"], strict=True)]
            table.append({
                "precision": precision, "gradients": gradients, "added MiB": round(memory),
                "time / plain, median": round(statistics.median(ratios), 2),
                "time / plain, range": [round(min(ratios), 2), round(max(ratios), 2)],
                "memory / plain": round(memory / plain, 2)})
            print(table[-1], file=sys.stderr, flush=True)
    write("dp_step", {"network": "SegResNet-8", "voxels": SIDE**3, "patients per step": PATIENTS, "pairs": PAIRS,
                      "threads": 1, "steps": table})


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] in (["time"], ["memory"]):
        what = {"time": measure_time, "memory": measure_memory}[sys.argv[1]]
        print(json.dumps(what(*sys.argv[2:])))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--only", choices=MODES, help="one way to get gradients; all by default")
        main(parser.parse_args().only)
