"""Techniques that send less of an update: they save bytes and give no formal guarantee.

Each encodes the update as bytes and returns the decoded bytes, so `Update.encoded` is the true length of a message from
which the receiver, who knows the model's tensors, recovers exactly the update that is averaged. With `error_feedback` a
site adds what it left out to its next update (Seide et al. 2014; Karimireddy et al. 2019, arXiv 1901.09847); the rest
is kept in the site's state and never sent as such. All of these may stand before a technique that clips and adds noise,
since the clip bounds any update; after it they cost no privacy either, but error feedback then carries old noise along.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from fedlab.core.errors import PrivacyError
from fedlab.core.settings import check_positive, check_share
from fedlab.core.tensors import flatten, unflatten
from fedlab.core.types import SiteState, Tensors, Update
from fedlab.privacy.base import Privacy

__all__ = ["Quantise", "ScaledSign", "SharePercentile", "TopK", "decode_levels", "decode_sparse", "encode_levels",
           "encode_sparse", "entries", "largest", "sparse_bytes"]

_DENSE, _BITMAP, _INDICES = b"\x00", b"\x01", b"\x02"


class SharePercentile(Privacy):
    """Share only the largest changes, clamped to a bound (Shokri and Shmatikov, CCS 2015; Li et al. 2019).

    The share `keep` of all entries with the largest absolute values is sent, ties included, each clamped to [−bound,
    bound]; the others count as 0. No formal guarantee: the choice of the entries and their values are functions of the
    patients.

    Args:
        keep: share of the entries that is sent, above 0 and at most 1.
        bound: largest absolute value sent, in the unit of the weights; None for no bound.
        error_feedback: add what was left out to the next update, see the module.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(self, *, keep: float = 0.1, bound: float | None = None, error_feedback: bool = False) -> None:
        check_share(keep=keep)
        check_positive(bound=bound, optional=True)
        self.keep, self.bound, self.error_feedback = keep, bound, error_feedback

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        def encode(wanted: Tensors) -> bytes:
            size = flatten(wanted).abs()
            cut = float(size.kthvalue(size.numel() - entries(self.keep, size.numel()) + 1).values)
            kept = {name: t.where(t.abs() >= cut, 0.0) for name, t in wanted.items()}
            if self.bound is not None:
                kept = {name: t.clamp(-self.bound, self.bound) for name, t in kept.items()}
            return encode_sparse(kept)

        return _send(self, update, state, encode, decode_sparse)


class TopK(Privacy):
    """Send exactly a share of the entries, the largest ones, of the whole update or of each tensor.

    The usual sparsification of distributed training (Aji and Heafield 2017; Lin et al. 2018, "deep gradient
    compression"); with error feedback every change is sent eventually (Stich et al. 2018, arXiv 1809.07599). No formal
    guarantee.

    Args:
        keep: share of the entries that is sent, above 0 and at most 1; at least one entry.
        per_layer: choose within each tensor, so that no layer is left out.
        error_feedback: add what was left out to the next update, see the module.

    Raises:
        ValueError: `keep` is out of range.
    """

    def __init__(self, *, keep: float = 0.01, per_layer: bool = False, error_feedback: bool = False) -> None:
        check_share(keep=keep)
        self.keep, self.per_layer, self.error_feedback = keep, per_layer, error_feedback

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        def encode(wanted: Tensors) -> bytes:
            if self.per_layer:
                return encode_sparse({name: self._largest(t) for name, t in wanted.items()})
            return encode_sparse({"all": self._largest(flatten(wanted))})

        return _send(self, update, state, encode, decode_sparse)

    def _largest(self, t: torch.Tensor) -> torch.Tensor:
        flat = t.flatten()
        chosen = largest(flat, self.keep)
        return torch.zeros_like(flat).index_copy_(0, chosen, flat[chosen])


class ScaledSign(Privacy):
    """Send one bit per entry, its sign, and one number per tensor, the mean absolute value.

    The scaled sign of Karimireddy et al. 2019 (arXiv 1901.09847), which converges with error feedback and may not
    without it. 0 counts as positive, except in a tensor of zeros only. No formal guarantee.

    Args:
        error_feedback: add what was left out to the next update, see the module.
    """

    def __init__(self, *, error_feedback: bool = True) -> None:
        self.error_feedback = error_feedback

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        def encode(wanted: Tensors) -> bytes:
            codes = [(t >= 0).long() for t in wanted.values()]
            scales = [float(t.abs().mean()) for t in wanted.values()]
            return encode_levels(codes, scales, bits=1)

        return _send(self, update, state, encode, partial(decode_levels, bits=1))


class Quantise(Privacy):
    """Round every entry at random to one of 2^bits − 1 evenly spaced values, without bias.

    The stochastic quantisation of QSGD (Alistarh et al. 2017, arXiv 1610.02132), scaled by the largest absolute value
    of each tensor instead of its norm and with plain codes of `bits` bits, not Elias codes. A value between two levels
    is rounded up with the probability that preserves its expectation. No formal guarantee.

    Args:
        bits: of each entry, sign included, 2 to 16.
        error_feedback: add the rounding error to the next update, see the module; optional, as rounding is unbiased.

    Raises:
        ValueError: `bits` is out of range.
    """

    def __init__(self, *, bits: int = 8, error_feedback: bool = False) -> None:
        if not isinstance(bits, int) or not 2 <= bits <= 16:
            raise ValueError(f"bits is a whole number from 2 (minus, zero, plus) to 16, got {bits!r}; "
                             "for one bit see ScaledSign")
        self.bits, self.error_feedback = bits, error_feedback

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        top = 2 ** (self.bits - 1) - 1

        def encode(wanted: Tensors) -> bytes:
            codes, scales = [], []
            for t in wanted.values():
                scale = float(t.abs().max()) if t.numel() else 0.0
                level = t.double() / (scale or 1.0) * top
                up = torch.rand(t.shape, generator=rng, dtype=torch.float64) < level - level.floor()
                codes.append((level.floor() + up).long() + top)
                scales.append(scale)
            return encode_levels(codes, scales, bits=self.bits)

        return _send(self, update, state, encode, partial(decode_levels, bits=self.bits))


def _send(technique: SharePercentile | TopK | ScaledSign | Quantise, update: Update, state: SiteState,
          encode: Callable[[Tensors], bytes], decode: Callable[[bytes, Tensors], Tensors]) -> Update:
    """The update that the receiver decodes; with error feedback, the rest is kept in the site's state."""
    wanted: Tensors = {name: t.detach().float() for name, t in update.delta.items()}
    waiting = state.own
    if technique.error_feedback and waiting:
        if {name: t.shape for name, t in waiting.items()} != {name: t.shape for name, t in wanted.items()}:
            raise PrivacyError(f"the rest that {update.site} keeps from earlier updates is of another model; give it a "
                               "new state")
        wanted = {name: t + waiting[name] for name, t in wanted.items()}
    wire = encode(wanted)
    sent = decode(wire, wanted)
    if technique.error_feedback:
        waiting.update({name: t - sent[name] for name, t in wanted.items()})
    return replace(update, delta=sent, encoded=len(wire))


def encode_sparse(delta: Tensors) -> bytes:
    """Finite tensors with many zeros as bytes, rounded to float32: the shortest of three codes, named by a byte.

    Dense: every entry. Bitmap: one bit per entry, then the entries that are not 0. Indices: their positions, then the
    entries, shorter than a bitmap below one in 32. Entries are little-endian float32 and positions uint32, counted
    through all tensors in their order.
    """
    flat = flatten(delta).numpy()
    places = np.flatnonzero(flat)
    values = flat[places].astype("<f4").tobytes()
    if 4 * places.size < math.ceil(flat.size / 8) and flat.size <= 2**32:
        return _INDICES + places.astype("<u4").tobytes() + values
    if math.ceil(flat.size / 8) + len(values) < 4 * flat.size:
        return _BITMAP + np.packbits(flat != 0).tobytes() + values
    return _DENSE + flat.astype("<f4").tobytes()


def decode_sparse(wire: bytes, like: Tensors) -> Tensors:
    """The inverse of `encode_sparse`, float32, for tensors of the names and shapes of `like`.

    Raises:
        ValueError: the bytes have another length or code than such tensors.
    """
    size = sum(t.numel() for t in like.values())
    flat, body = np.zeros(size, dtype=np.float32), wire[1:]
    try:
        if wire[:1] == _DENSE:
            flat[:] = np.frombuffer(body, "<f4")
        elif wire[:1] == _BITMAP:
            split = math.ceil(size / 8)
            places = np.unpackbits(np.frombuffer(body[:split], np.uint8), count=size).astype(bool)
            flat[places] = np.frombuffer(body[split:], "<f4")
        elif wire[:1] == _INDICES:
            split = len(body) // 2
            flat[np.frombuffer(body[:split], "<u4")] = np.frombuffer(body[split:], "<f4")
        else:
            raise ValueError(f"unknown code {wire[:1]!r}")
    except (ValueError, IndexError) as error:
        raise ValueError(f"{len(wire)} bytes are not a sparse code of {size} entries: {error}") from error
    return unflatten(torch.from_numpy(flat), like)


def encode_levels(codes: list[torch.Tensor], scales: list[float], *, bits: int) -> bytes:
    """Evenly spaced levels as bytes: for each tensor its scale, then its codes of `bits` bits each, without gaps.

    The scale is a little-endian float32; a tensor of scale 0 has no codes; the codes of a tensor fill whole bytes.

    Args:
        codes: whole numbers from 0 to 2^bits − 1, one per entry; bits is 1 to 16.
        scales: the absolute value of the outermost levels, at least 0.
    """
    parts = []
    for code, scale in zip(codes, scales, strict=True):
        written = np.array(scale, dtype="<f4")
        parts.append(written.tobytes())
        if written > 0:
            numbers = code.flatten().numpy().astype(np.uint16)[:, None]
            parts.append(np.packbits((numbers >> np.arange(bits, dtype=np.uint16) & 1).astype(np.uint8)).tobytes())
    return b"".join(parts)


def decode_levels(wire: bytes, like: Tensors, *, bits: int) -> Tensors:
    """The inverse of `encode_levels`, float32: one bit stands for −scale and scale, more for −scale … 0 … scale.

    Raises:
        ValueError: the bytes have another length than such tensors.
    """
    out, at = {}, 0
    middle = 0.5 if bits == 1 else float(2 ** (bits - 1) - 1)
    for name, t in like.items():
        scale, at = wire[at:at + 4], at + 4
        if len(scale) < 4:
            raise ValueError(f"{len(wire)} bytes end before tensor {name} begins")
        out[name] = torch.zeros(t.shape)
        if (factor := float(np.frombuffer(scale, "<f4")[0])) == 0:
            continue
        packed, at = wire[at:at + math.ceil(t.numel() * bits / 8)], at + math.ceil(t.numel() * bits / 8)
        ones = np.unpackbits(np.frombuffer(packed, np.uint8), count=t.numel() * bits).reshape(-1, bits)
        numbers = ones @ 2.0 ** np.arange(bits)
        out[name] = torch.from_numpy((factor * (numbers - middle) / middle).astype(np.float32)).reshape(t.shape)
    if at != len(wire):
        raise ValueError(f"got {len(wire)} bytes, the tensors take {at}")
    return out


def largest(flat: torch.Tensor, share: float) -> torch.Tensor:
    """Positions of a share of the entries, those with the largest absolute values."""
    return flat.abs().topk(entries(share, flat.numel()), sorted=False).indices


def entries(share: float, size: int) -> int:
    """The number of entries that a share of `size` is, at least one."""
    return max(1, min(size, math.ceil(share * size - 1e-9)))  # 0.1 of 30 is 3, whatever 0.1 * 30 is in binary


def sparse_bytes(size: int, nonzero: int) -> int:
    """The length of what `encode_sparse` writes for tensors of `size` entries."""
    return 1 + min(4 * nonzero + min(math.ceil(size / 8), 4 * nonzero), 4 * size)
