"""What a site remembers of a run, on the site's own disk."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from fedlab.core.errors import FedlabError, PrivacyError
from fedlab.core.files import write_whole
from fedlab.core.types import Memory
from fedlab.deploy.messages import pack_memory, unpack_memory
from fedlab.run.site_task import enrol

__all__ = ["SiteMemory"]

_FILE = re.compile(r"from-(\d{6})\.safetensors")
_KEPT = 4


class SiteMemory:
    """The memory of one run at one site: a file for each of its last rounds, so that a round can be run again.

    `from-000003.safetensors` is what the site remembers before round 3 and, until it takes part again, before every
    later one. A round that a server asks for again, after a restart, starts from the very memory that it started from
    first. Groups whose name begins with "_" stay in this process.

    Args:
        folder: of this run, made if missing.
        site: name of the site.
        run: name of the run.
    """

    def __init__(self, folder: Path | str, *, site: str, run: str) -> None:
        self.folder, self.site, self.run = Path(folder), site, run
        self._secrets: Memory = {}
        self._pending: Memory = {}
        self._trained: int | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._files() and not (self.folder / "joined").exists():
            memory: Memory = {}
            enrol(memory)
            self._write(0, memory)
            write_whole(self.folder / "joined", b"")

    def before(self, round: int) -> Memory:
        """The memory that this site's work in a round starts from.

        Raises:
            PrivacyError: the files are damaged or gone, or the round is further back than they reach.
        """
        known = [number for number in self._files() if number <= round]
        if not known:
            raise PrivacyError(f"{self.site} remembers nothing of this run before round {round}: its files in "
                               f"{self.folder} begin at {self._files()[:1]}; restore them, or begin a new run")
        return {**self._read(known[-1]), **self._pending, **self._secrets}

    def keep(self, memory: Memory, round: int) -> None:
        """Saves what the site remembers after a round; later rounds, which are now undone, are forgotten."""
        self._write(round + 1, memory)
        self._split(memory)
        self._trained, self._pending = round, {}
        files = self._files()
        for number in files:
            if number > round + 1 or number in files[:-_KEPT]:
                self._path(number).unlink(missing_ok=True)

    def between(self) -> Memory:
        """The memory for an exchange of messages outside of a round's training."""
        return {**self._read(self._files()[-1]), **self._pending, **self._secrets} if self._files() else {}

    def keep_between(self, memory: Memory, *, before_training: bool) -> None:
        """Keeps what an exchange has changed: for the round to come, or beside what the last one has left."""
        last = self.between()
        self._split(memory)
        changed = {name: slots for name, slots in memory.items() if not name.startswith("_")
                   and not _same(slots, last.get(name))}
        if before_training:
            self._pending.update(changed)
        elif changed and self._trained is not None:
            self._write(self._trained + 1, memory)

    def _split(self, memory: Memory) -> None:
        self._secrets = {name: slots for name, slots in memory.items() if name.startswith("_")}

    def _files(self) -> list[int]:
        found = (_FILE.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def _path(self, number: int) -> Path:
        return self.folder / f"from-{number:06d}.safetensors"

    def _write(self, number: int, memory: Memory) -> None:
        write_whole(self._path(number), pack_memory(memory, site=self.site, run=self.run, number=number))

    def _read(self, number: int) -> Memory:
        try:
            return unpack_memory(self._path(number).read_bytes(), site=self.site, run=self.run, number=number)
        except (OSError, FedlabError) as error:
            raise PrivacyError(f"{self._path(number)} is damaged ({error}); restore it from a copy, or begin a new "
                               "run") from error

    def __repr__(self) -> str:
        return f"<SiteMemory of {self.site} in run {self.run}: before rounds {self._files()}>"


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor] | None) -> bool:
    return other is not None and one.keys() == other.keys() and all(
        t.dtype == other[k].dtype and t.shape == other[k].shape and torch.equal(t, other[k]) for k, t in one.items())
