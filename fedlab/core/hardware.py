"""What this machine computes with, and in which precision."""

from __future__ import annotations

import torch

__all__ = ["pick_device", "pick_precision"]


def pick_device(device: str) -> torch.device:
    """`"auto"` is the GPU if there is one, else the CPU; any other value is torch's name of a device."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of convolutions.

    `"auto"` is bf16 on GPUs that support it and on CPUs with AMX tiles, where it is several times faster, else fp32.
    It depends on the hardware alone, so a run repeats bit for bit on its machine.

    Raises:
        ValueError: an unknown precision.
    """
    choices = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if precision in choices:
        return choices[precision]
    if precision != "auto":
        raise ValueError(f"precision is 'auto', 'bf16' or 'fp32', got {precision!r}")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.cpu.get_capabilities().get("amx_bf16", False) else torch.float32
