"""What every benchmark writes beside its numbers: the machine and the versions they were taken on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from fedlab.apps.comparison_results import versions
from fedlab.core.hardware import pick_precision
from fedlab.data.phantom.generator import GENERATOR

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str]:
    """Processor, cores and memory of this machine, and what its torch can use."""
    capabilities = torch.cpu.get_capabilities()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": str(capabilities.get("cpu_name", platform.processor())),
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "bf16 tiles (AMX)": _tiles(bool(capabilities.get("amx_bf16"))),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        **versions(),
    }


def _tiles(there: bool) -> str:
    used = pick_precision("auto", torch.device("cpu")) == torch.bfloat16
    return "yes" if used else "switched off" if there else "no"


def write(name: str, result: dict[str, Any]) -> None:
    """Writes `benchmarks/results/<name>.json`, the result and the machine, and prints it."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"result": result, "machine": machine()}, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)


def fill(text: str) -> str:
    """A paragraph of a page, in lines of at most 120 characters."""
    return textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False)


def between_marks(page: str, text: str, *, by: str | None = None) -> None:
    """Replaces the section of docs/<page>.md that a benchmark made, by default the one of the page's name."""
    file = RESULTS.parents[1] / "docs" / f"{page}.md"
    marks = [f"<!-- {word} by benchmarks/{by or page}.py -->" for word in ("made", "end of what is made")]
    begin, end = (file.read_text(encoding="utf-8").index(mark) for mark in marks)
    whole = file.read_text(encoding="utf-8")
    file.write_text(f"{whole[:begin]}{marks[0]}\n\n{text}\n\n{whole[end:]}", encoding="utf-8")


def sweep(score: Callable[[Any, int], dict[str, Any]], jobs: Sequence[tuple[Any, int]], folder: Path,
          title: str) -> pd.DataFrame:
    """One row per job, worked off by a process per core; what an interrupted sweep has found is kept in `folder`.

    Args:
        score: a function of a module; called with an arm, which prints as the code that makes it, and a seed.
        jobs: arms and seeds.
        folder: of the rows, by arm and seed.
        title: beside the progress bar.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        rows = pool.map(_kept, [score] * len(jobs), [a for a, _ in jobs], [s for _, s in jobs], [folder] * len(jobs))
        return pd.DataFrame(tqdm(rows, total=len(jobs), desc=title))


def _kept(score: Callable[[Any, int], dict[str, Any]], arm: Any, seed: int, folder: Path) -> dict[str, Any]:
    name = hashlib.sha256(f"{GENERATOR} {score.__module__} {arm!r} {seed}".encode()).hexdigest()[:16]
    path = folder / f"{name}.json"
    if not path.is_file():
        torch.set_num_threads(1)
        path.write_text(json.dumps(score(arm, seed)), encoding="utf-8")
    row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return row
