"""The states of the sites of one run, on disk while the sites are not at work."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file

from fedlab.core.errors import RunError
from fedlab.core.files import replacing
from fedlab.core.text import counted
from fedlab.core.types import SiteState

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["SiteStates", "pack_site_state", "unpack_site_state"]

_FORMAT = "fedlab-site-state-1"
_PREFIX, _LOCK = "fedlab-site-states-", "in-use.lock"
#: Seconds after which a new temporary folder is locked.
_NEW = 60


class SiteStates(Mapping[str, SiteState]):
    """The states of the sites of one run, by name: one file per site, so that memory does not grow with sites.

    `states["site-01"]` reads a copy. The keys of a round (`SiteState.secrets`) stay in this process.

    Args:
        names: of the sites; each is enrolled, so that a lost state is noticed.
        folder: of the files; by default a temporary folder that is removed with this object.
    """

    def __init__(self, names: Sequence[str] = (), *, folder: Path | str | None = None) -> None:
        if folder is None:
            folder = _temporary_folder(of=self)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._enrolled = dict.fromkeys(names)
        self._saved: dict[str, str | None] = {}  # site -> SHA-256 of its file, once it is needed
        self._secrets: dict[str, dict[str, Any]] = {}

    def __getitem__(self, site: str) -> SiteState:
        if site not in self._enrolled:
            raise KeyError(site)
        if site not in self._saved:
            return SiteState(enrolled=True)
        try:
            data = self.path(site).read_bytes()
        except OSError as error:
            raise RunError(f"the state of {site} is missing ({error}); restore it from a copy, or start the run over"
                           ) from error
        return unpack_site_state(data, what=str(self.path(site)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._enrolled)

    def __len__(self) -> int:
        return len(self._enrolled)

    @contextmanager
    def working(self, site: str) -> Iterator[SiteState]:
        """The state of a site for its work in a round, written when the work is done.

        Work that fails leaves the state as it was, but for its ledger: what was charged stays charged.
        """
        state = self.get(site) or SiteState()
        known = copy.deepcopy(state.ledger)
        state.secrets = self._secrets.setdefault(site, {})
        try:
            yield state
        except BaseException:
            if state.ledger != known and self.folder.is_dir():  # the folder goes with the run
                before = self.get(site) or SiteState()
                before.ledger = state.ledger
                self.save(site, before)
            raise
        self.save(site, state)

    def with_secrets(self, site: str) -> SiteState:
        """A state with the site's keys of this round only, for an exchange of messages."""
        return SiteState(secrets=self._secrets.setdefault(site, {}), owner="aggregation")

    def save(self, site: str, state: SiteState) -> None:
        """Writes a site's state whole."""
        tensors, header = _flattened(state, {})
        with replacing(self.path(site)) as scratch:
            save_file(tensors, scratch, metadata=header)
        self._enrolled.setdefault(site)
        self._saved[site] = None

    def path(self, site: str) -> Path:
        """The file of a site."""
        return self.folder / f"{quote(site, safe='')}.safetensors"

    def link_to(self, folder: Path) -> dict[str, str | None]:
        """Puts the files into another folder too, without copying where the file system allows.

        Returns:
            The SHA-256 of each site's file; None for a site that keeps nothing yet.
        """
        for site, digest in self._saved.items():
            _link(self.path(site), folder / self.path(site).name)
            if digest is None:
                self._saved[site] = hashlib.sha256(self.path(site).read_bytes()).hexdigest()
        return {site: self._saved.get(site) for site in self}

    @classmethod
    def restored(cls, folder: Path, saved: Mapping[str, str | None], *, to: Path) -> SiteStates:
        """The states that `link_to` put into a folder.

        Raises:
            RunError: a file is missing or is not what was written.
        """
        states = cls(list(saved), folder=to)
        for site, digest in saved.items():
            if digest is None:
                states.path(site).unlink(missing_ok=True)
                continue
            source = folder / states.path(site).name
            try:
                unpack_site_state(source.read_bytes(), expected=digest, what=str(source))
            except OSError as error:
                raise RunError(f"{source} is missing ({error}); remove the run's folder to start over") from error
            _link(source, states.path(site))
            states._saved[site] = digest
        return states

    def __repr__(self) -> str:
        return f"<SiteStates of {counted(len(self), 'site')} in {self.folder}>"


def _temporary_folder(*, of: SiteStates) -> Path:
    """A folder that is removed with an object. Folders of killed processes are removed when the next one is made.

    The lock in a folder says that it is in use. It ends with its process, and holds between containers too, where
    process numbers are not comparable.
    """
    from filelock import FileLock, Timeout

    for left in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            if time.time() - left.stat().st_mtime > _NEW:  # a newer one may not be locked yet
                with FileLock(left / _LOCK, timeout=0):
                    shutil.rmtree(left, ignore_errors=True)
        except (Timeout, OSError):
            continue  # in use, of another user, or already removed
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    lock = FileLock(folder / _LOCK, thread_local=False)
    lock.acquire()
    weakref.finalize(of, _remove, folder, lock, os.getpid())
    return folder


def _remove(folder: Path, lock: BaseFileLock, owner: int) -> None:
    if os.getpid() == owner:  # a forked copy of the object leaves the folder alone
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    scratch = target.with_suffix(".link")
    scratch.unlink(missing_ok=True)
    try:
        os.link(source, scratch)
    except OSError:
        shutil.copyfile(source, scratch)
    os.replace(scratch, target)


def pack_site_state(state: SiteState, **about: str | int) -> bytes:
    """A site's state as one safetensors file, without its secrets and the server's broadcast.

    `about` are values that must be the same when it is read, such as the run.
    """
    tensors, header = _flattened(state, about)
    return save(tensors, metadata=header)


def _flattened(state: SiteState, about: Mapping[str, str | int]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a state, those of one type end to end, and a header that says where each lies.

    A file of a few large tensors is written several times as fast as one of many.
    """
    groups = {**{f"own|{owner}": slots for owner, slots in state.namespaces.items()}, "diagnostics": state.diagnostics}
    flat: dict[str, list[torch.Tensor]] = {}
    rows: list[tuple[str, str, str, list[int]]] = []
    for group, slots in groups.items():
        for name, tensor in slots.items():
            kind = str(tensor.dtype).removeprefix("torch.")
            flat.setdefault(kind, []).append(tensor.detach().cpu().flatten())
            rows.append((group, name, kind, list(tensor.shape)))
    note = {"format": _FORMAT, "enrolled": state.enrolled, "updates": state.updates, "ledger": state.ledger,
            "groups": list(groups), "tensors": rows, "about": about}
    return {kind: torch.cat(parts) for kind, parts in flat.items()}, {"fedlab": json.dumps(note)}


def unpack_site_state(data: bytes, *, what: str, expected: str | None = None, **about: str | int) -> SiteState:
    """The state from a file of `pack_site_state`.

    Args:
        what: name of the file, for the error.
        expected: SHA-256 of the data; not checked by default.

    Raises:
        RunError: the data are damaged, or about something else.
    """
    try:
        if expected is not None and hashlib.sha256(data).hexdigest() != expected:
            raise ValueError("its content is not what was written")
        length = int.from_bytes(data[:8], "little")
        note = json.loads(json.loads(data[8:8 + length])["__metadata__"]["fedlab"])
        if note["format"] != _FORMAT or note["about"] != about:
            raise ValueError(f"it is about {note['about']}, expected {about}")
        rest = load(data)
        groups: dict[str, dict[str, torch.Tensor]] = {group: {} for group in note["groups"]}
        for group, name, kind, shape in note["tensors"]:
            size = math.prod(shape)
            groups[group][name], rest[kind] = rest[kind][:size].reshape(shape), rest[kind][size:]
        diagnostics = groups.pop("diagnostics")
        return SiteState(enrolled=note["enrolled"], updates=note["updates"], ledger=note["ledger"],
                         diagnostics=diagnostics,
                         namespaces={group.removeprefix("own|"): slots for group, slots in groups.items()})
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise RunError(f"{what} is damaged ({error}); restore it from a copy, or start the run over") from error
