"""A cache of tensors on disk, named after the settings that determine them; invalid files are not used."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fedlab.core.files import replacing

__all__ = ["file_state", "load", "path_of", "store"]


def path_of(cache: Path, settings: str) -> Path:
    """The file with the tensors for these settings."""
    return cache / f"{hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()}.safetensors"


def _checksum(settings: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(settings.encode(), digest_size=32)
    for name in sorted(tensors):
        array = tensors[name].numpy()
        digest.update(f"|{name} {array.dtype.str} {array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def file_state(path: Path) -> list[str | int]:
    """Values that change when a file is written or replaced, even if its size and its time of change are set back.

    The system sets inode and time of the last status change, and no program sets them back; comparing them costs some
    microseconds. Where the system keeps no such time (Windows), it is the SHA-256 of the content.
    """
    state = path.stat()
    if os.name == "posix":
        return [str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    return [str(path.resolve()), hashlib.sha256(path.read_bytes()).hexdigest()]


def store(cache: Path, settings: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a cache file in one step: other processes see the whole file or none."""
    cache.mkdir(parents=True, exist_ok=True)
    with replacing(path_of(cache, settings), shared=True) as scratch:
        scratch.write_bytes(save(dict(tensors), {"settings": settings, "checksum": _checksum(settings, tensors)}))


def load(cache: Path, settings: str) -> dict[str, torch.Tensor] | None:
    """The tensors stored for these settings; None without a file, or with a warning if the file is invalid."""
    path = path_of(cache, settings)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        warnings.warn(f"the cache file {path.name} cannot be read ({error}); it is generated anew", stacklevel=2)
        return None
    if metadata.get("settings") != settings or metadata.get("checksum") != _checksum(settings, tensors):
        warnings.warn(f"the cache file {path.name} is damaged or foreign; it is generated anew", stacklevel=2)
        return None
    return tensors
