"""Techniques that send less of an update. They save bytes and promise no privacy: no formal guarantee.

Each writes what it sends as bytes and goes on with what those bytes say, so `Update.encoded` is the true length of a
message from which the receiver, who knows the model's tensors, recovers the very update that is averaged. With
`error_feedback` a site adds what it could not send to its next update (Seide et al. 2014; Karimireddy et al. 2019,
arXiv 1901.09847), kept in the site's state and never sent as such. Before a technique that clips and adds
noise, all of these are safe, since the clip bounds whatever comes; after it they cost no privacy either, but error
feedback would then carry old noise along.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from fedlab.core.errors import PrivacyError
from fedlab.core.types import SiteState, Tensors, Update
from fedlab.privacy.base import Privacy

__all__ = ["Quantise", "ScaledSign", "SharePercentile", "TopK", "decode_levels", "decode_sparse", "encode_levels",
           "encode_sparse"]

_DENSE, _BITMAP, _INDICES = b"\x00", b"\x01", b"\x02"


class SharePercentile(Privacy):
    """Share only the largest changes, held within a bound (Shokri and Shmatikov, CCS 2015; Li et al. 2019).

    Of all entries of the update the share `keep` with the largest absolute values is sent, ties included, each
    clamped to [−bound, bound]; the others count as 0. No formal guarantee: which entries are large, and their values,
    are functions of the patients.

    Args:
        keep: share of the entries that is sent, above 0 and at most 1.
        bound: largest absolute value sent, in the unit of the weights; None for no bound.
        error_feedback: remember what was left out, see the module.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(self, *, keep: float = 0.1, bound: float | None = None, error_feedback: bool = False) -> None:
        _check_share(keep)
        if bound is not None and not 0 < bound < math.inf:
            raise ValueError(f"bound is a positive number or None, got {bound}")
        self.keep, self.bound, self.error_feedback = keep, bound, error_feedback

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        def encode(wanted: Tensors) -> bytes:
            size = torch.cat([t.flatten() for t in wanted.values()]).abs()
            cut = _kth_largest(size, _count(self.keep, size.numel()))
            kept = {name: t.where(t.abs() >= cut, 0.0) for name, t in wanted.items()}
            if self.bound is not None:
                kept = {name: t.clamp(-self.bound, self.bound) for name, t in kept.items()}
            return encode_sparse(kept)

        return _send(self, update, state, encode, decode_sparse)


class TopK(Privacy):
    """Send exactly a share of the entries, the largest ones, of the whole update or of each tensor.

    The usual sparsification of distributed training (Aji and Heafield 2017; Lin et al. 2018, "deep gradient
    compression"); with error feedback every change arrives in the end (Stich et al. 2018, arXiv 1809.07599). No
    formal guarantee.

    Args:
        keep: share of the entries that is sent, above 0 and at most 1; at least one entry.
        per_layer: choose within each tensor, so that no layer is left out.
        error_feedback: remember what was left out, see the module.

    Raises:
        ValueError: `keep` out of its range.
    """

    def __init__(self, *, keep: float = 0.01, per_layer: bool = False, error_feedback: bool = False) -> None:
        _check_share(keep)
        self.keep, self.per_layer, self.error_feedback = keep, per_layer, error_feedback

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        def encode(wanted: Tensors) -> bytes:
            flat = [t.flatten() for t in wanted.values()]
            kept = torch.cat([self._largest(t) for t in (flat if self.per_layer else [torch.cat(flat)])])
            return encode_sparse(_shaped(kept, wanted))

        return _send(self, update, state, encode, decode_sparse)

    def _largest(self, flat: torch.Tensor) -> torch.Tensor:
        chosen = flat.abs().topk(_count(self.keep, flat.numel()), sorted=False).indices
        return torch.zeros_like(flat).index_copy_(0, chosen, flat[chosen])


class ScaledSign(Privacy):
    """Send one bit per entry, its sign, and one number per tensor, the mean absolute value.

    The scaled sign of Karimireddy et al. 2019 (arXiv 1901.09847), which learns with error feedback and may not
    without. 0 counts as positive, except in a tensor of zeros only. No formal guarantee.

    Args:
        error_feedback: remember what was left out, see the module.
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
    """Round every entry at random to one of 2^bits − 1 evenly spaced values, right on average.

    The stochastic quantisation of QSGD (Alistarh et al. 2017, arXiv 1610.02132), scaled by the largest absolute value
    of each tensor instead of its norm and with plain codes of `bits` bits, not Elias codes. A value between two
    levels goes up with the probability that makes its expectation right. No formal guarantee.

    Args:
        bits: of each entry, sign included, 2 to 16.
        error_feedback: remember what rounding left out, see the module; not needed, since rounding is unbiased.

    Raises:
        ValueError: `bits` out of its range.
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
                codes.append((level.floor() + up).clamp(-top, top).long() + top)
                scales.append(scale)
            return encode_levels(codes, scales, bits=self.bits)

        return _send(self, update, state, encode, partial(decode_levels, bits=self.bits))


def _send(technique: SharePercentile | TopK | ScaledSign | Quantise, update: Update, state: SiteState,
          encode: Callable[[Tensors], bytes], decode: Callable[[bytes, Tensors], Tensors]) -> Update:
    """The update that the receiver decodes; with error feedback, what it lacks waits in the site's state."""
    wanted: Tensors = {name: t.detach().float() for name, t in update.delta.items()}
    waiting = state.own
    if technique.error_feedback and waiting:
        if {name: t.shape for name, t in waiting.items()} != {name: t.shape for name, t in wanted.items()}:
            raise PrivacyError(f"what {update.site} has yet to send is of another model; give it a new state")
        wanted = {name: t + waiting[name] for name, t in wanted.items()}
    wire = encode(wanted)
    sent = decode(wire, wanted)
    if technique.error_feedback:
        waiting.update({name: t - sent[name] for name, t in wanted.items()})
    return replace(update, delta=sent, encoded=len(wire))


def encode_sparse(delta: Tensors) -> bytes:
    """Tensors with many zeros as bytes: the shortest of three codes.

    One byte names the code. Dense: every entry. Bitmap: one bit per entry, then the entries that aren't 0. Indices:
    their positions, then the entries, shorter than a bitmap below one in 32. Entries are little-endian float32 and
    positions uint32, counted through all tensors in their order.

    Args:
        delta: finite tensors; rounded to float32.
    """
    flat = _flat(delta)
    places = np.flatnonzero(flat)
    values = flat[places].astype("<f4").tobytes()
    if 4 * places.size < math.ceil(flat.size / 8) and flat.size <= 2**32:
        return _INDICES + places.astype("<u4").tobytes() + values
    if math.ceil(flat.size / 8) + len(values) < 4 * flat.size:
        return _BITMAP + np.packbits(flat != 0).tobytes() + values
    return _DENSE + flat.astype("<f4").tobytes()


def decode_sparse(wire: bytes, like: Tensors) -> Tensors:
    """What `encode_sparse` wrote, float32.

    Args:
        wire: the bytes.
        like: tensors of the names and shapes that were written.

    Raises:
        ValueError: bytes of another length or code than such tensors have.
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
            raise ValueError(f"no code begins with {wire[:1]!r}")
    except (ValueError, IndexError) as error:
        raise ValueError(f"{len(wire)} bytes are no sparse code of {size} entries: {error}") from error
    return _shaped(torch.from_numpy(flat), like)


def encode_levels(codes: list[torch.Tensor], scales: list[float], *, bits: int) -> bytes:
    """Evenly spaced levels as bytes: for each tensor its scale, then its codes of `bits` bits each, without gaps.

    The scale is a little-endian float32; a tensor of scale 0 sends no codes; each tensor fills up its last byte.

    Args:
        codes: whole numbers from 0 to 2^bits − 1, one per entry.
        scales: the absolute value of the outermost levels, at least 0.
        bits: 1 to 16.
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
    """What `encode_levels` wrote, float32: one bit stands for −scale and scale, more for −scale … 0 … scale.

    Args:
        wire: the bytes.
        like: tensors of the names and shapes that were written.
        bits: of a code.

    Raises:
        ValueError: bytes of another length than such tensors have.
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
        if 8 * len(packed) < t.numel() * bits:
            raise ValueError(f"{len(wire)} bytes end within tensor {name}")
        ones = np.unpackbits(np.frombuffer(packed, np.uint8), count=t.numel() * bits).reshape(-1, bits)
        numbers = np.zeros(t.numel())
        for place in range(bits):
            numbers += ones[:, place] * 2.0**place
        out[name] = torch.from_numpy((factor * (numbers - middle) / middle).astype(np.float32)).reshape(t.shape)
    if at != len(wire):
        raise ValueError(f"{len(wire)} bytes came, {at} make up the tensors")
    return out


def _flat(delta: Tensors) -> np.ndarray:
    return torch.cat([t.detach().float().flatten() for t in delta.values()]).numpy()


def _shaped(flat: torch.Tensor, like: Tensors) -> Tensors:
    pieces = flat.split([t.numel() for t in like.values()])
    return {name: piece.reshape(t.shape) for (name, t), piece in zip(like.items(), pieces, strict=True)}


def _check_share(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ValueError(f"keep is the share of entries that is sent, above 0 and at most 1, got {keep}")


def _count(share: float, size: int) -> int:
    return max(1, min(size, math.ceil(share * size - 1e-9)))  # 0.1 of 30 is 3, whatever 0.1 * 30 is in binary


def _kth_largest(size: torch.Tensor, k: int) -> float:
    return float(size.kthvalue(size.numel() - k + 1).values)
