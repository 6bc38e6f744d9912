"""What this machine computes with, and in which precision."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from fedlab.core.convolution import FastConvolutions
from fedlab.core.settings import check_choice

__all__ = ["calling", "computed_in", "pick_device", "pick_precision", "precision_for"]


def pick_device(device: str) -> torch.device:
    """The GPU for "auto" if there is one, else the CPU; any other value is torch's name of a device."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of convolutions.

    `"auto"` is bf16 on GPUs that support it and on CPUs with AMX tiles, where it is several times faster, else fp32.
    It depends on the hardware alone, and on oneDNN's `ONEDNN_MAX_CPU_ISA`, never on a clock, so a run repeats bit for
    bit on its machine. On processors with AVX-512 BF16 but without AMX, bf16 did not repeat to the last bit.

    Raises:
        ValueError: an unknown precision.
    """
    check_choice(("auto", "bf16", "fp32"), precision=precision)
    fast = precision == "bf16" or (precision == "auto" and (
        torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bf16()))
    return torch.bfloat16 if fast else torch.float32


def _cpu_has_bf16() -> bool:
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if limit not in ("", "ALL", "DEFAULT") and "AMX" not in limit:
        return False
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def precision_for(model: nn.Module, precision: str, device: torch.device) -> torch.dtype:
    """The dtype that a network computes in: that of its weights, or for float32 as `pick_precision` says.

    Raises:
        ValueError: an unknown precision, or one given for weights of another type than float32.
    """
    picked = pick_precision(precision, device)
    weights = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if weights is torch.float32:
        return picked
    if precision != "auto":
        raise ValueError(f"the network's weights are {weights} and compute in that type: leave precision at 'auto', or "
                         f"say model.float() for precision={precision!r}")
    return weights


def computed_in(model: nn.Module, precision: str, device: str) -> str:
    """The precision that a trainer's setting stands for on this machine, such as "bf16" for "auto"."""
    names = {torch.bfloat16: "bf16", torch.float32: "fp32"}
    return names.get(precision_for(model, precision, pick_device(device)), precision)


@contextmanager
def calling(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """A block in which a network computes in a precision, by autocast for bf16 and fp16, with fast convolutions."""
    half = dtype in (torch.bfloat16, torch.float16)
    fast = FastConvolutions() if device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, dtype=dtype if half else torch.bfloat16, enabled=half), fast:
        yield
