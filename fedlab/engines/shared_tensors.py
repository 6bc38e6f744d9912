"""Objects sent between two processes of one machine: pickled, with their tensors in shared memory.

The values of an object's tensors are copied once, into one anonymous piece of memory whose file descriptor is handed
over; the other process maps it. It has no name, so nothing is left behind when a process is killed; it never touches a
disk, and the size of /dev/shm does not limit it. Only the description of the tensors goes through a pipe. Classes and
functions of a notebook or a script travel as code (cloudpickle); both ends belong to one user, and nothing is stored.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import struct
import weakref
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NamedTuple, cast

import torch

__all__ = ["Arrived", "Parcel", "receive"]

_HEAD = struct.Struct("<Q")
#: Tensors begin at multiples of this many bytes.
_ALIGNED = 64


class Parcel:
    """An object as it was when it was packed; may be sent to several processes.

    Args:
        thing: any object that can be pickled. Its tensors arrive on the CPU.
    """

    def __init__(self, thing: Any) -> None:
        text = io.BytesIO()
        storages = _pack(thing, text)
        self.text = text.getvalue()
        self.size = sum(_padded(storage.nbytes()) for storage in storages)
        self._handle: int | None = None
        if self.size:
            self._handle = os.memfd_create("fedlab", os.MFD_CLOEXEC)
            weakref.finalize(self, os.close, self._handle)
            os.truncate(self._handle, self.size)
            with mmap.mmap(self._handle, self.size) as memory:
                _copy(storages, memory)

    def send(self, connection: Connection) -> None:
        """Hands it to the process at the other end of a connection."""
        connection.send_bytes(_HEAD.pack(self.size) + self.text)
        if self._handle is not None:
            send_handle(connection, self._handle, 0)  # only Windows asks which process


class Arrived(NamedTuple):
    """A parcel that was received and is not unpickled yet."""

    text: bytes
    memory: mmap.mmap | None

    def open(self) -> Any:
        """The object; its tensors map the shared memory, and changing them changes those of no other process."""
        return _Unpickler(self.text, self.memory).load()


def receive(connection: Connection) -> Arrived:
    """The next parcel, which can execute code when it is opened: only for a pipe to a process that this one started.

    Raises:
        EOFError, OSError: the other end is closed.
    """
    message = connection.recv_bytes()
    (size,) = _HEAD.unpack_from(message)
    memory = None
    if size:
        handle = recv_handle(connection)
        try:
            memory = mmap.mmap(handle, size, access=mmap.ACCESS_COPY)
        finally:
            os.close(handle)
    return Arrived(message[_HEAD.size:], memory)


def _pack(thing: Any, text: io.BytesIO) -> list[torch.UntypedStorage]:
    """Pickles an object without the values of its tensors; returns their storages, in order."""
    import cloudpickle

    found: list[torch.UntypedStorage] = []
    places: dict[int, int] = {}
    end = 0

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def persistent_id(self, item: Any) -> Any:
            nonlocal end
            if isinstance(item, torch.storage.TypedStorage):
                storage, dtype = item._untyped_storage, item.dtype
            elif isinstance(item, torch.UntypedStorage):
                storage, dtype = item, None
            else:
                return None
            key = int(storage._cdata)  # several tensors may share one storage
            if key not in places:
                places[key] = end
                found.append(storage)
                end += _padded(storage.nbytes())
            return places[key], storage.nbytes(), dtype

    Pickler(text, protocol=pickle.HIGHEST_PROTOCOL).dump(thing)
    return found


def _copy(storages: list[torch.UntypedStorage], memory: mmap.mmap) -> None:
    place = 0
    for storage in storages:
        if storage.nbytes():
            numbers = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            torch.frombuffer(memory, dtype=torch.uint8, count=storage.nbytes(), offset=place).copy_(numbers)
        place += _padded(storage.nbytes())


class _Unpickler(pickle.Unpickler):
    def __init__(self, text: bytes, memory: mmap.mmap | None) -> None:
        super().__init__(io.BytesIO(text))
        self._memory = memory
        self._known: dict[int, torch.UntypedStorage] = {}

    def persistent_load(self, pid: Any) -> Any:
        place, size, dtype = cast("tuple[int, int, torch.dtype | None]", pid)
        if size == 0 or self._memory is None:
            storage = torch.UntypedStorage(0)
        elif place in self._known:
            storage = self._known[place]
        else:
            storage = torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=place).untyped_storage()
            self._known[place] = storage
        if dtype is None:
            return storage
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _padded(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
