"""Fast 3-D convolutions on a CPU, for any network: none takes torch's slow path, narrow layers fill the vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["FastConvolutions"]

#: Up to this many values in batch × channels × the first two axes, torch convolves one float32 volume on the CPU by
#: unfolding it 27-fold (aten/src/ATen/native/Convolution.cpp, use_mkldnn; torch 2.13).
_FEW = 20480
#: Channels that oneDNN computes together: those that fill a vector of AVX-512.
_BLOCK = 16
_LAST = torch.channels_last_3d


class FastConvolutions(TorchFunctionMode):
    """Within this context 3-D convolutions on the CPU are computed in an equivalent way that oneDNN is fast at.

    Results and gradients of any order are the same up to rounding. The way depends on shape, batch and type alone,
    never on a clock, so a run repeats bit for bit:

    - One float32 volume is computed as a batch of two, its halves along the first axis, which overlap.
    - A kernel of one voxel is a matrix product.
    - Where a number of channels is no multiple of 16, the layer is computed channels-last, which its gradients gain
      most from. Up to 8 output channels leave half of a vector empty: neighbours along the last axis are then taken
      as one voxel of twice the channels.
    - Trilinear upsampling is computed channels-last.

    Measured on AVX-512 without AMX by `benchmarks/step.py`.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return (func if torch.compiler.is_compiling() else _FASTER.get(func, func))(*args, **(kwargs or {}))


def _conv3d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, stride: Any = 1, padding: Any = 0,
            dilation: Any = 1, groups: int = 1) -> torch.Tensor:
    kernel = weight.shape[2:]
    mine = _ours(x, weight)
    weight = _leaving(weight) if mine else weight
    if not mine or (padding == "same" and any(k % 2 == 0 for k in kernel)):
        return torch.conv3d(x, weight, bias, stride, padding, dilation, groups)
    if torch.is_autocast_enabled("cpu"):
        x = x.to(torch.get_autocast_dtype("cpu"))
    stride, dilation = _three(stride), _three(dilation)
    if padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    padding = _three(0 if padding == "valid" else padding)
    if math.prod(kernel) == 1 and groups == 1 and not any(padding):
        seen = x[:, :, ::stride[0], ::stride[1], ::stride[2]]
        flat = torch.bmm(weight.flatten(1).expand(len(x), -1, -1), seen.flatten(2))
        out: torch.Tensor = flat.view(len(x), -1, *seen.shape[2:])
        out = out if bias is None else out + bias.to(out.dtype).view(-1, 1, 1, 1)
        return out.contiguous(memory_format=_format(x))
    if kernel[0] > 1 and kernel[1:] == (1, 1):  # torch judges by the last two axes
        across, kernels = x.transpose(2, 4), weight.transpose(2, 4)
        return _conv3d(across, kernels, bias, stride[::-1], padding[::-1], dilation[::-1], groups).transpose(2, 4)
    narrow = groups == 1 and any(n % _BLOCK for n in weight.shape[:2])
    convolve = _channels_last if narrow else torch.conv3d
    if _slow(x) and groups == 1:
        return _in_halves(convolve, x, weight, bias, stride, padding, dilation)
    return convolve(x, weight, bias, stride, padding, dilation, groups)


def _conv_transpose3d(x: torch.Tensor, weight: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
    if _ours(x, weight):
        weight = _leaving(weight)
        if _slow(x) and not torch.is_autocast_enabled("cpu"):
            return torch.conv_transpose3d(x.expand(2, -1, -1, -1, -1), weight, *others, **named)[:1]
    return torch.conv_transpose3d(x, weight, *others, **named)


def _interpolate(x: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
    if not _ours(x, x):
        return F.interpolate(x, *others, **named)
    last = _leaving(x).contiguous(memory_format=_LAST)
    return F.interpolate(last, *others, **named).contiguous(memory_format=_format(x))


_FASTER: dict[Any, Callable[..., torch.Tensor]] = {
    torch.conv3d: _conv3d, torch.conv_transpose3d: _conv_transpose3d, F.interpolate: _interpolate}


def _ours(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether these are plain tensors, a batch on the CPU in a type that oneDNN has, and not under `vmap`."""
    return (x.dim() == 5 and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
            and type(weight) in (torch.Tensor, torch.nn.Parameter) and torch.backends.mkldnn.is_available()
            and not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in (x, weight)))


def _slow(x: torch.Tensor) -> bool:
    return len(x) == 1 and x.dtype == torch.float32 and math.prod(x.shape[:4]) <= _FEW


def _three(value: Any) -> tuple[int, int, int]:
    a, b, c = (value,) * 3 if isinstance(value, int) else tuple(value) * (3 // len(value))
    return a, b, c


def _format(x: torch.Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=_LAST) and not x.is_contiguous()
    return _LAST if last else torch.contiguous_format


def _leaving(x: torch.Tensor) -> torch.Tensor:
    """The same values, whose gradient comes back in their own format.

    Other layers are slow at a mixture, and fused optimisers take a gradient of other strides for one of their own.
    """
    if x.requires_grad:
        memory_format, x = _format(x), x.view_as(x)
        x.register_hook(lambda gradient: gradient.contiguous(memory_format=memory_format))
    return x


def _in_halves(convolve: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
               stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> torch.Tensor:
    """The convolution of one volume as that of its halves; of two copies of it if the result has an odd length."""
    reach = dilation[0] * (weight.shape[2] - 1) + 1
    length = (x.shape[2] + 2 * padding[0] - reach) // stride[0] + 1
    if length % 2:
        return convolve(x.expand(2, -1, -1, -1, -1), weight, bias, stride, padding, dilation)[:1]
    padded = F.pad(x, (0, 0, 0, 0, padding[0], padding[0]))
    seen, second = (length // 2 - 1) * stride[0] + reach, length // 2 * stride[0]
    halves = torch.cat([padded[:, :, :seen], padded[:, :, second:second + seen]])
    out = convolve(halves, weight, bias, stride, (0, *padding[1:]), dilation)
    return out.transpose(0, 1).flatten(1, 2)[None]


def _channels_last(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: Sequence[int],
                   padding: Sequence[int], dilation: Sequence[int], groups: int = 1) -> torch.Tensor:
    kept, outputs = _format(x), len(weight)
    along_last = weight.shape[4], stride[2], padding[2], dilation[2]
    paired = outputs <= _BLOCK // 2 and x.shape[4] % 2 == 0 and along_last == (3, 1, 1, 1)
    x = _leaving(x).contiguous(memory_format=_LAST)
    if paired:  # voxels 2 j and 2 j + 1 see 2 j - 1 to 2 j + 2, which are two pairs after a voxel of padding
        x = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, 1, 1)).unflatten(3, (-1, 2)).flatten(4).permute(0, 4, 1, 2, 3)
        both = torch.stack([F.pad(weight, (0, 1)), F.pad(weight, (1, 0))]).unflatten(5, (2, 2))
        weight = both.permute(0, 1, 6, 2, 3, 4, 5).flatten(2, 3).flatten(0, 1)
        bias, padding = None if bias is None else bias.repeat(2), (*padding[:2], 0)
    out = torch.conv3d(x, weight, bias, stride, padding, dilation, groups)
    if paired:
        out = out.permute(0, 2, 3, 4, 1).unflatten(4, (2, outputs)).flatten(3, 4).permute(0, 4, 1, 2, 3)
    return out.contiguous(memory_format=kept)
