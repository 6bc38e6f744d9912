"""NIfTI files from outside: a header's claims are checked before they are used, and grids are mapped both ways."""

from __future__ import annotations

import gzip
import logging
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

import nibabel as nib
import numpy as np
import torch

from fedlab.core.errors import DataError
from fedlab.core.files import write_new

__all__ = ["MAX_VOXELS", "Volume", "axis_weights", "from_ras", "read_volume", "resample", "same_grid",
           "to_ras", "turn", "turn_volume", "write_label"]

#: Largest volume that is read: seven times a BraTS grid of 240 x 240 x 155 voxels.
MAX_VOXELS = 2**26
_CHUNK = 2**20
_GZIP_MAGIC = b"\x1f\x8b"
_SILENT = logging.getLogger(f"{__name__}.silent")  # nibabel would print what it repairs in a header
_SILENT.addHandler(logging.NullHandler())
_SILENT.propagate = False
_UNITS = {1: ("metres", 1e3), 3: ("microns", 1e-3)}  # code of xyzt_units; any other is read as mm
_HEADER_BYTES: dict[int, Any] = {348: nib.Nifti1Header, 540: nib.Nifti2Header}


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """One 3-D volume, or several on one grid, as stored.

    Attributes:
        path: the file.
        shape: voxels along the three stored axes in space.
        affine: float64, shape (4, 4), stored voxel index -> mm in RAS, whatever unit the header states.
        codes: the header's sform and qform codes.
        array: the voxels in stored order, shape (X, Y, Z), or (X, Y, Z, channels) for a 4-D file; None where only
            the header was read.
        channels: number of volumes in a 4-D file, 0 for a 3-D file.
        notes: oddities that do not prevent reading.
    """

    path: Path
    shape: tuple[int, int, int]
    affine: np.ndarray
    codes: tuple[int, int]
    array: np.ndarray | None = field(default=None, repr=False)
    channels: int = 0
    notes: tuple[str, ...] = ()

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along the three stored axes in mm."""
        x, y, z = (float(v) for v in np.linalg.norm(self.affine[:3, :3], axis=0))
        return x, y, z


def read_volume(path: str | os.PathLike[str], *, voxels: bool = True, series: bool = False) -> Volume:
    """Reads a NIfTI-1 or NIfTI-2 file; compression is detected from its bytes, not from its name.

    Memory is allocated only after the header's claims agree with the file size, and a compressed file is read to its
    end so that its checksum is verified.

    Args:
        path: a `.nii` or `.nii.gz` file.
        voxels: False reads only the header.
        series: whether a 4-D file, several volumes on one grid, is accepted.

    Raises:
        DataError: the file is missing, truncated or corrupt, or its header is invalid for a brain scan; its `code`
            tells which.
    """
    path = Path(path)
    try:
        if not os.path.isfile(path):  # a pipe would block forever
            raise DataError("not a file, or a broken or circular link", code="no-file")
        with path.open("rb") as raw:
            packed = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            stream = gzip.GzipFile(fileobj=raw) if packed else raw
            return _read_stream(cast("IO[bytes]", stream), path, packed, voxels, series)
    except DataError as error:
        raise DataError(f"{path.name}: {error}", code=error.code) from error
    except (OSError, EOFError, zlib.error) as error:
        code = "truncated" if isinstance(error, EOFError) else \
            "corrupt" if isinstance(error, (gzip.BadGzipFile, zlib.error)) else "no-file"
        raise DataError(f"{path.name}: cannot be read ({error}); copy it again from its source", code=code) from error
    except (ValueError, ArithmeticError, KeyError, nib.filebasedimages.ImageFileError,
            nib.spatialimages.HeaderDataError) as error:
        raise DataError(f"{path.name}: not a valid NIfTI file ({error})", code="wrong-header") from error


def _read_stream(stream: IO[bytes], path: Path, packed: bool, voxels: bool, series: bool) -> Volume:
    """The volume in a file; errors are without the file's name."""
    head = stream.read(max(_HEADER_BYTES))
    header = _parse_header(head)
    shape = _shape(header, series)
    grid = shape[0], shape[1], shape[2]
    dtype = header.get_data_dtype()
    if dtype.kind not in "uif" or dtype.itemsize > 8:
        raise _wrong(f"voxels of type {dtype} are not grey values; expected integers or floats of at most 64 bits")
    place, claimed = float(header["vox_offset"]), math.prod(shape) * dtype.itemsize
    if not 0 < place <= 16 * _CHUNK:  # also refuses NaN
        raise _wrong(f"the header places the voxels at byte {place:g}; expected 352 or slightly more")
    offset, size = int(place), path.stat().st_size
    # deflate compresses by a factor of at most about 1032
    if offset + claimed > (1032 * size if packed else size):
        raise DataError(f"the header claims {claimed:,} bytes of voxels, more than this file of {size:,} bytes can "
                        f"hold; it is truncated or its header is wrong", code="oversized")
    affine, codes, notes = _geometry(header, grid)
    return Volume(path=path, shape=grid, affine=affine, codes=codes,
                  array=_read_voxels(stream, head, header, offset, shape) if voxels else None,
                  channels=shape[3] if len(shape) == 4 else 0, notes=tuple(f"{path.name}: {note}" for note in notes))


def _wrong(reason: str) -> DataError:
    return DataError(reason, code="wrong-header")


def _parse_header(head: bytes) -> Any:
    for size, kind in _HEADER_BYTES.items():
        if head[:4] in (size.to_bytes(4, "little"), size.to_bytes(4, "big")) and len(head) >= size:
            header = kind(head[:size], check=False)
            header.check_fix(logger=_SILENT, error_level=40)
            if bytes(header["magic"].item())[:2] != b"n+":
                raise _wrong(f"expected header and voxels in one NIfTI file (magic 'n+1' or 'n+2'), got "
                             f"{header['magic'].item()!r}")
            return header
    starts = f"starts with the bytes {head[:4].hex(' ')}" if head else "is empty; copy it again from its source"
    raise DataError(f"not a NIfTI file: it {starts}", code="not-nifti")


def _shape(header: Any, series: bool) -> tuple[int, ...]:
    dims = tuple(int(n) for n in header.get_data_shape())
    while len(dims) > (4 if series else 3) and dims[-1] == 1:
        dims = dims[:-1]
    if len(dims) not in ((3, 4) if series else (3,)) or min(dims) < 1:
        wanted = "a 3-D volume or several in 4-D" if series else "one 3-D volume"
        raise _wrong(f"expected {wanted}, got the shape {dims}")
    if math.prod(dims) > MAX_VOXELS:
        raise DataError(f"the header claims {'x'.join(map(str, dims))} = {math.prod(dims):,} voxels; at most "
                        f"{MAX_VOXELS:,} are read", code="oversized")
    return dims


def _geometry(header: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray, tuple[int, int], list[str]]:
    """The affine, the codes of sform and qform, and oddities."""
    codes = int(header["sform_code"]), int(header["qform_code"])
    if min(codes) < 0 or max(codes) == 0:
        raise _wrong(f"neither sform nor qform of the header states the patient's orientation (codes {codes[0]} and "
                     f"{codes[1]}); left and right would be a guess: write an affine into the header")
    unit, scale = _UNITS.get(int(header["xyzt_units"]) & 7, ("mm", 1.0))
    to_mm = np.diag([scale, scale, scale, 1.0])
    affine = to_mm @ np.asarray(header.get_best_affine(), dtype=np.float64)
    if not np.isfinite(affine).all():
        raise _wrong("the affine holds NaN or Inf")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if spacing.min() < 0.05 or spacing.max() > 30:
        raise _wrong(f"voxels of {' x '.join(f'{s:g}' for s in spacing)} mm; expected 0.05 to 30 mm (is the header in "
                     f"{unit}?)" + ("" if unit == "mm" else "; correct its unit, xyzt_units"))
    axes = affine[:3, :3] / spacing
    if np.abs(axes.T @ axes - np.eye(3)).max() > 0.02:
        raise _wrong("the axes of its affine are not perpendicular; resample it to a rectangular grid")
    apart = min(codes) > 0 and _corner_distance(to_mm @ header.get_qform(), affine, shape) > 1.0
    return affine, codes, ["sform and qform disagree by more than 1 mm; the sform is used"] if apart else []


def _corner_distance(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """Largest distance in mm between the corners of one grid under two affines."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij")).reshape(3, -1).T
    apart = nib.affines.apply_affine(np.asarray(one) - other, corners)
    return float(np.linalg.norm(apart, axis=1).max())


def same_grid(one: Volume, other: Volume) -> bool:
    """Whether two volumes have the same voxel grid, corners within 0.1 mm."""
    return one.shape == other.shape and _corner_distance(one.affine, other.affine, one.shape) < 0.1


def _read_voxels(stream: IO[bytes], head: bytes, header: Any, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    if offset > len(head):
        head += stream.read(offset - len(head))
    # the system provides the memory only as it is filled
    data = np.empty(math.prod(shape) * header.get_data_dtype().itemsize, dtype=np.uint8)
    start = np.frombuffer(head[offset:offset + data.size], dtype=np.uint8)
    data[:start.size], found = start, start.size
    while found < data.size and (chunk := stream.read(min(4 * _CHUNK, data.size - found))):
        data[found:found + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
        found += len(chunk)
    if found < data.size:
        raise DataError(f"truncated: {data.size:,} bytes of voxels expected, {found:,} found", code="truncated")
    trailing = 0
    while chunk := stream.read(_CHUNK):  # gzip verifies the checksum only at its end
        trailing += len(chunk)
        if trailing > 16 * _CHUNK:
            raise _wrong("more than 16 MiB follow its voxels; its header is wrong")
    array: np.ndarray = data.view(header.get_data_dtype()).reshape(shape, order="F")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    slope, inter = header.get_slope_inter()
    if slope is None or (slope, inter) == (1.0, 0.0):
        return array
    with np.errstate(over="ignore", invalid="ignore"):  # overflow is reported as NaN or Inf
        scaled: np.ndarray = array.astype(np.float32)
        scaled *= np.float32(slope)
        scaled += np.float32(inter)
    return scaled


def turn(array: np.ndarray, affine: np.ndarray, like: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flips and swaps axes so that they point as nearly as possible as those of another affine.

    Args:
        array: shape (X, Y, Z), stored order.
        affine: stored voxel index -> mm in RAS.
        like: the other affine.

    Returns:
        The turned array, a view, and its affine.
    """
    change = nib.orientations.ornt_transform(*map(nib.orientations.io_orientation, (affine, like)))
    return (nib.orientations.apply_orientation(array, change),
            affine @ nib.orientations.inv_ornt_aff(change, array.shape))


def to_ras(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The array with axes that point right, anterior, superior as nearly as possible, and its affine; see `turn`."""
    return turn(array, affine, np.eye(4))


def from_ras(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The inverse of `to_ras`: an array with RAS axes in the stored order that `affine` describes."""
    return np.ascontiguousarray(turn(array, np.eye(4), affine)[0])


def turn_volume(volume: Volume, like: Volume) -> Volume:
    """The same volume with its axes stored in the order and direction of those of another."""
    array = np.empty(volume.shape, dtype=np.bool_) if volume.array is None else volume.array
    array, affine = turn(array, volume.affine, like.affine)
    x, y, z = array.shape[:3]
    return replace(volume, shape=(x, y, z), affine=affine, array=None if volume.array is None else array)


def axis_weights(source: int, target: int, *, scale: float, offset: float) -> torch.Tensor:
    """The weight of every source voxel in every target voxel along one axis.

    In units of source voxels, source voxel j covers [j, j + 1] and target voxel i covers
    [offset + i * scale, offset + (i + 1) * scale]. Coarser targets are the mean over the interval they cover, which
    avoids aliasing; finer ones are interpolated linearly. A grid shifted by whole voxels is copied exactly.

    Returns:
        float32, shape (target, source); rows sum to 1, or to 0 outside the source.
    """
    low = offset + scale * torch.arange(target, dtype=torch.float64)[:, None]
    voxel = torch.arange(source, dtype=torch.float64)[None]
    if scale >= 1:
        weights = (torch.minimum(low + scale, voxel + 1) - torch.maximum(low, voxel)).clamp_min(0)
    else:
        centre = low + scale / 2 - 0.5
        inside = (centre > -0.5) & (centre < source - 0.5)
        weights = (1 - (centre.clamp(0, source - 1) - voxel).abs()).clamp_min(0) * inside
    weights[weights < 1e-6] = 0
    total = weights.sum(dim=1, keepdim=True)
    return (weights / total.clamp_min(1e-6) * (total > 1e-6)).float()


def resample(volume: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Applies one weight matrix per axis.

    Args:
        volume: shape (C, X, Y, Z).
        weights: three matrices of `axis_weights`, shapes (X', X), (Y', Y), (Z', Z).

    Returns:
        float32, shape (C, X', Y', Z').
    """
    spans = []
    for matrix in weights:  # source voxels without weight are removed first
        used = matrix.any(dim=0).nonzero().flatten()
        spans.append(slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1))
    x, y, z = (matrix[:, span] for matrix, span in zip(weights, spans, strict=True))
    out = torch.einsum("cxyz,kz->cxyk", volume[:, spans[0], spans[1], spans[2]].float(), z)
    out = torch.einsum("cxyk,jy->cxjk", out, y)
    return torch.einsum("cxjk,ix->cijk", out, x)


def write_label(path: str | os.PathLike[str], label: np.ndarray, *, like: Volume, description: str = "") -> Path:
    """Writes a uint8 label map, shape (X, Y, Z) in stored order, with the geometry of `like`.

    `description` is cut to the 79 bytes that a NIfTI header has for it.

    Raises:
        DataError: the file exists already, its name ends neither in .nii nor in .nii.gz, or the shape differs.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise DataError(f"{path}: expected a name that ends in .nii or .nii.gz")
    if label.shape != like.shape or label.dtype != np.uint8:
        raise DataError(f"{path}: expected uint8 labels of shape {like.shape}, got {label.dtype} {label.shape}")
    image = nib.Nifti1Image(label, like.affine)
    image.set_sform(like.affine, code=like.codes[0])
    image.set_qform(like.affine, code=like.codes[1])
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode()[:79]
    data = image.to_bytes()
    return write_new(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data, error=DataError)
