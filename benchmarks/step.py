"""Microseconds per voxel of training, private training and prediction, over those of plain PyTorch on the same network.

    .venv/bin/python benchmarks/step.py [--pairs 7] [--only cpu busy gpu]

- cpu: SegResNet with 8 filters, one thread. Plain PyTorch calls the same network and loss without
  `fedlab.core.convolution`, patients one by one where training is private. Both take turns, and the ratio is the median
  over the turns, so other work on the machine matters little. In float32 and bf16, and once more with
  ONEDNN_MAX_CPU_ISA=AVX512_CORE, which stands for a processor without AMX and bf16.
- busy: a training step on as many threads as cores, alone and beside two busy processes, with waiting threads passive
  (fedlab's setting) and spinning (OpenMP's own); a process that takes longer than a minute is given up.
- gpu: 32 filters and the window of 128 x 128 x 128, contiguous and channels-last, compiled or not, with the share of
  the rate that a large matrix product reaches on the same card.

Writes `benchmarks/results/step.json`; parts that are not asked for, or whose hardware is missing, keep their result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import torch

from common import RESULTS, write
from fedlab.core.hardware import calling
from fedlab.core.kit import Kit
from fedlab.core.types import Patient
from fedlab.privacy.dp.gradients import per_patient
from fedlab.training.defaults import DiceBCE, adamw
from fedlab.training.metrics import predict
from fedlab.training.networks import segresnet

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PATIENCE = 60
Work = Callable[[], Any]


def data(batch: int, side: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    shape = (side, side, side)
    target = (torch.rand(batch, 3, *shape, generator=rng) < 0.1).float()
    return torch.randn(batch, 4, *shape, generator=rng).to(device), target.to(device)


def cases(precision: str) -> dict[str, tuple[int, Work, Work]]:
    """By name: voxels, the work of fedlab, and the same of plain PyTorch."""
    dtype, model, loss = TYPES[precision], segresnet(), DiceBCE()
    place = torch.device("cpu")
    unused: Any = None
    kit = Kit(model=model, optimiser=unused, loader=(), patients=unused, objective=loss, device=place, dtype=dtype,
              seed=0, backward=unused)
    optimiser = adamw(model.parameters(), 1e-3)
    plain_call = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16)

    def plain_loss(image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with plain_call:
            out = model(image)
        return loss(out.float(), target)

    def train(value: torch.Tensor) -> None:
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()

    image, target = data(2, 32)
    alone, alone_target = data(2, 24)
    scan = data(1, 64)[0]
    patient = Patient("p", scan[0], None, np.eye(4))

    def plain_private() -> None:
        for k in range(2):
            torch.autograd.grad(plain_loss(alone[k:k + 1], alone_target[k:k + 1]), list(model.parameters()))

    def plain_prediction() -> None:
        with torch.inference_mode(), plain_call:
            model(scan).float().sigmoid()

    def plain_mirrored() -> None:
        with torch.inference_mode(), plain_call:
            one, other = (model(x).float().sigmoid() for x in (scan, scan.flip(2)))
            (one + other.flip(2)).div(2)

    return {
        "training, 2 x 4 x 32^3": (2 * 32**3, lambda: train(kit.loss(image, target)),
                                   lambda: train(plain_loss(image, target))),
        "private training, 2 patients, 1 crop of 24^3": (
            2 * 24**3, lambda: list(per_patient(kit, alone[:, None], alone_target[:, None], "backward")),
            plain_private),
        "prediction, 64^3": (64**3, lambda: predict(model, patient, mirror=False, precision=precision),
                             plain_prediction),
        "prediction with its mirror image, 64^3": (
            64**3, lambda: predict(model, patient, mirror=True, precision=precision), plain_mirrored),
    }


def measure_cpu(pairs: int) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    rows = []
    baseline: dict[str, float] = {}
    for precision in TYPES:
        for name, (voxels, *works) in cases(precision).items():
            taken = _in_turns(works, pairs)
            ours, plain = (statistics.median(times) / voxels * 1e6 for times in taken)
            baseline.setdefault(name, plain)  # of float32
            rows.append({"what": name, "precision": precision, "µs per voxel": round(ours, 3),
                         "plain PyTorch": round(plain, 3),
                         "ratio": round(statistics.median(a / b for a, b in zip(*taken, strict=True)), 3),
                         "ratio to plain fp32": round(ours / baseline[name], 3)})
    return rows


def _in_turns(works: list[Work], pairs: int) -> list[list[float]]:
    """Processor seconds of each work, taken in turns after one of each to warm up."""
    taken: list[list[float]] = [[] for _ in works]
    for turn in range(pairs + 1):
        for work, times in zip(works, taken, strict=True):
            started = time.process_time()
            work()
            if turn:
                times.append(time.process_time() - started)
    return taken


def one_busy_step() -> float:
    """Seconds of a training step on all threads, by the clock."""
    _, work, _ = cases("fp32")["training, 2 x 4 x 32^3"]
    work()
    started = time.perf_counter()
    for _ in range(5):
        work()
    return (time.perf_counter() - started) / 5


def measure_busy() -> list[dict[str, Any]]:
    rows = []
    for beside in (0, 2):
        for policy in ("PASSIVE", None):
            others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "OMP_WAIT_POLICY": policy or ""}
            if policy is None:  # OpenMP's own: torch is loaded before fedlab can say anything
                del environment["OMP_WAIT_POLICY"]
            seconds = None
            try:
                with suppress(subprocess.TimeoutExpired):
                    done = subprocess.run([sys.executable, __file__, "--part", "step"], env=environment, check=True,
                                          capture_output=True, text=True, timeout=PATIENCE)
                    seconds = round(json.loads(done.stdout.splitlines()[-1]), 3)
            finally:
                for other in others:
                    other.kill()
                    other.wait()
            rows.append({"busy processes beside": beside, "waiting threads": policy or "OpenMP's default",
                         "seconds per step": seconds or f"more than {PATIENCE} s in all"})
    return rows


def measure_gpu(pairs: int, *, device: str = "cuda", side: int = 128, filters: int = 32) -> dict[str, Any]:
    """A training step with bf16 on a card, and its share of the rate of a matrix product of 8192 x 8192 in bf16."""
    from torch.utils.flop_counter import FlopCounterMode

    place, wait = torch.device(device), torch.cuda.synchronize if device == "cuda" else (lambda: None)
    image, target = data(1, side, device)
    size = 8192 if device == "cuda" else 512
    square = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    rate = 2 * size**3 / min(_clocked(lambda: square @ square, wait, pairs))
    rows = []
    for last in (False, True):
        for compiled in (False, True):
            kept = torch.channels_last_3d if last else torch.contiguous_format
            model = segresnet(filters=filters).to(device=place, memory_format=kept)
            called: Any = torch.compile(model) if compiled else model
            loss, optimiser, x = DiceBCE(), adamw(model.parameters(), 1e-3), image.contiguous(memory_format=kept)

            def work(called: Any = called, loss: Any = loss, optimiser: Any = optimiser, x: Any = x) -> None:
                optimiser.zero_grad(set_to_none=True)
                with calling(place, torch.bfloat16):
                    out = called(x)
                loss(out.float(), target).backward()
                optimiser.step()

            row: dict[str, Any] = {"channels-last": last, "compiled": compiled}
            try:
                with FlopCounterMode(display=False) if not compiled else nullcontext() as counted:
                    work()
            except RuntimeError as error:  # no compiler on this machine, say
                rows.append({**row, "failed": str(error).splitlines()[0][:120]})
                continue
            if counted is not None:
                operations = counted.get_total_flops()
            seconds = statistics.median(_clocked(work, wait, pairs))
            rows.append({**row, "ms per step": round(1e3 * seconds, 2),
                         "µs per voxel": round(seconds / side**3 * 1e6, 4),
                         "share of the matrix product's rate": round(operations / seconds / rate, 3)})
    return {"card": torch.cuda.get_device_name() if device == "cuda" else "none",
            "bf16 matrix product, TFLOP/s": round(rate / 1e12, 1), "filters": filters, "voxels": side**3, "steps": rows}


def _clocked(work: Work, wait: Work, times: int) -> list[float]:
    work()
    taken = []
    for _ in range(times):
        wait()
        started = time.perf_counter()
        work()
        wait()
        taken.append(time.perf_counter() - started)
    return taken


def _limited(pairs: int) -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, __file__, "--part", "cpu", "--pairs", str(pairs)], check=True,
                          capture_output=True, text=True, env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"})
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return [row for row in rows if row["precision"] == "fp32"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="turns of each case")
    parser.add_argument("--only", nargs="+", choices=("cpu", "busy", "gpu"), default=["cpu", "busy", "gpu"])
    parser.add_argument("--part", choices=("cpu", "step"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(measure_cpu(options.pairs) if options.part == "cpu" else one_busy_step()))
        return
    file = RESULTS / "step.json"
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["result"] if file.is_file() else {}
    if "cpu" in options.only:
        result["cpu, one thread, SegResNet-8"] = {"as it is": measure_cpu(options.pairs),
                                                  "ONEDNN_MAX_CPU_ISA=AVX512_CORE": _limited(options.pairs)}
    if "busy" in options.only:
        result["busy"] = measure_busy()
    if "gpu" in options.only and torch.cuda.is_available():
        result["gpu"] = measure_gpu(options.pairs)
    write("step", {"pairs": options.pairs, **{k: v for k, v in result.items() if k != "pairs"}})


if __name__ == "__main__":
    main()
