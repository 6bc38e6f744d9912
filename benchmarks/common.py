"""What every benchmark writes beside its numbers: the machine and the versions they were taken on."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from fedlab.results import versions

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str]:
    """Processor, cores and memory of this machine, and what its torch can use."""
    capabilities = torch.cpu.get_capabilities()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": str(capabilities.get("cpu_name", platform.processor())),
        "cores": str(os.cpu_count()),
        "memory": f"{memory:.0f} GiB",
        "bf16 tiles (AMX)": "yes" if capabilities.get("amx_bf16") else "no",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        **versions(),
    }


def write(name: str, result: dict[str, Any]) -> None:
    """Writes `benchmarks/results/<name>.json`, the result and the machine, and prints it."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"result": result, "machine": machine()}, indent=1, ensure_ascii=False)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(text)
