"""Objects sent between two processes of one machine, with their tensors in shared memory.

torch saves an object into an anonymous piece of memory whose file descriptor is handed over; the other process maps its
tensors. The memory has no name, so nothing is left behind when a process is killed; it never touches a disk, and the
size of /dev/shm does not limit it. Classes and functions of a notebook or a script travel as code (cloudpickle); both
ends belong to one user, and nothing is stored.
"""

from __future__ import annotations

import io
import os
import pickle
import weakref
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import torch

__all__ = ["SharedObject"]

#: Bytes up to which an object goes through the connection itself: a process may hold a limited number of descriptors.
_SMALL = 2**16


class SharedObject:
    """An object as it was when it was packed; it can be sent to several processes.

    Args:
        packed: its bytes, or the descriptor of the memory that holds them, which is closed with this object.
    """

    def __init__(self, packed: bytes | int) -> None:
        self._packed = packed
        if isinstance(packed, int):
            weakref.finalize(self, os.close, packed)

    @classmethod
    def of(cls, value: Any) -> SharedObject:
        """Packs any object that can be pickled. Its tensors arrive on the CPU."""
        import cloudpickle

        shared = cls(handle := os.memfd_create("fedlab", os.MFD_CLOEXEC))
        torch.save(value, _path(handle), pickle_module=cloudpickle, pickle_protocol=pickle.HIGHEST_PROTOCOL)
        return shared if shared.nbytes > _SMALL else cls(os.pread(handle, _SMALL, 0))

    @classmethod
    def receive(cls, connection: Connection) -> SharedObject:
        """The next object, which can execute code when it is opened: only for a pipe to a process of one's own.

        Raises:
            EOFError, OSError: the other end is closed.
        """
        return cls(connection.recv_bytes() or recv_handle(connection))

    @property
    def nbytes(self) -> int:
        """Size of the packed object."""
        return len(self._packed) if isinstance(self._packed, bytes) else os.fstat(self._packed).st_size

    def send(self, connection: Connection) -> None:
        """Hands it to the process at the other end of a connection."""
        if isinstance(self._packed, bytes):
            connection.send_bytes(self._packed)
            return
        connection.send_bytes(b"")
        send_handle(connection, self._packed, 0)  # only Windows asks which process

    def open(self) -> Any:
        """The object; its tensors map the shared memory, and changing them changes those of no other process."""
        if isinstance(self._packed, bytes):
            return torch.load(io.BytesIO(self._packed), map_location="cpu", weights_only=False)
        return torch.load(_path(self._packed), map_location="cpu", mmap=True, weights_only=False)


def _path(handle: int) -> str:
    return f"/proc/self/fd/{handle}"
