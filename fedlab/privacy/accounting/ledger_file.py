"""A site's privacy ledger in a file of its own, which no crash and no old copy can make forget anything."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from fedlab.core.errors import PrivacyError
from fedlab.core.types import Memory, Spent
from fedlab.privacy.accounting.ledger import Accountant, Ledger, Terms

__all__ = ["LedgerFile"]


class LedgerFile:
    """The ledger of one site, as JSON with a checksum.

    The file is written whole beside its predecessor, forced onto the disk and renamed into place, before the update
    that it accounts for leaves the site. What the file, the site's memory and a restored checkpoint know is put
    together: entries that are the same count once, so that a round run again bit for bit costs nothing more, and an
    old copy of one of them lowers nothing. Only if all of them are put back to an earlier state, nobody can tell.

    A folder outlives a run: what later runs of the same site release is added to what earlier ones did, as it must be
    while they train on the same patients.

    Args:
        folder: where the ledgers are kept, made if missing; several sites may share it.
        site: name of the site.
    """

    def __init__(self, folder: Path | str, site: str) -> None:
        self.site = site
        self.path = Path(folder) / f"{quote(site, safe='')}.ledger.json"

    @contextmanager
    def kept(self, memory: Memory) -> Iterator[None]:
        """Around a site's work in a round: the ledger is read into `memory` before and saved after it.

        Nothing is saved where the work fails, since nothing has left the site then.

        Raises:
            PrivacyError: the file is damaged, of another site, missing though it was kept before, or in use by
                another run.
        """
        from filelock import FileLock, Timeout

        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(self.path.name + ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise PrivacyError(f"another run is using {self.path} right now; run one after the other, or both would "
                               "spend the same budget") from error
        try:
            self.restore(memory)
            yield
            self.save(memory)
        finally:
            lock.release()

    def charging(self, *, delta: float, accountant: Accountant = "rdp",
                 max_epsilon: float | None = None) -> Callable[[Spent], None]:
        """What enters noised statistics into this file, on disk before they leave; see `Ledger.charging`.

        `site_statistics(site, epsilon=0.5, charge=LedgerFile(folder, site.name).charging(delta=1e-3))` spends from the
        ledger that `federate(engine=Local(ledgers=folder), privacy=DPSGD(delta=1e-3, …), …)` goes on with.
        """
        Terms(unit="patient", delta=delta, adjacency="any", accountant=accountant)  # refused here, not when it is late

        def enter(spent: Spent) -> None:
            memory: Memory = {}
            with self.kept(memory):
                Ledger._enter(memory, spent, site=self.site, delta=delta, accountant=accountant,
                              max_epsilon=max_epsilon)

        return enter

    def restore(self, memory: Memory) -> None:
        """Reads the file into the ledger of `memory`, which keeps what it knows besides."""
        if self.path.is_file():
            known = self.read()
            ledger = Ledger(memory)
            ledger.merge(known)
        elif "ledger" in memory and Ledger(memory).note()["in_file"]:
            raise PrivacyError(f"the ledger of {self.site} was kept in {self.path}, which is missing; restore it: "
                               "rounds since this copy may be noted there only")

    def save(self, memory: Memory) -> None:
        """Writes the ledger of `memory`, if it has one, over the file."""
        if "ledger" not in memory:
            return
        ledger = Ledger(memory)
        ledger.close(in_file=True)
        note = ledger.note()
        text = json.dumps({"sha256": _checksum(note), "ledger": note}, indent=1, ensure_ascii=False)
        scratch = self.path.with_name(self.path.name + ".part")
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, self.path)
        if os.name == "posix":  # the renaming itself must reach the disk too
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def read(self) -> Ledger:
        """What the file says, as a ledger of its own; changing it changes no file.

        Raises:
            PrivacyError: there is no file, or it is damaged or of another site.
        """
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["sha256"] != _checksum(found["ledger"]):
                raise ValueError("its content does not fit its checksum")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PrivacyError(f"{self.path} is missing or damaged ({error}); restore it from a copy: without it "
                               f"nobody knows what {self.site} has spent") from error
        text = json.dumps(found["ledger"], ensure_ascii=False).encode()
        ledger = Ledger({"ledger": {"json": torch.frombuffer(bytearray(text), dtype=torch.uint8)}})
        if found["ledger"]["site"] != self.site:
            raise PrivacyError(f"{self.path} is the ledger of {found['ledger']['site']!r}, not of {self.site!r}; put "
                               "each site's own file back")
        return ledger

    def __repr__(self) -> str:
        return f"LedgerFile({str(self.path.parent)!r}, {self.site!r})"


def _checksum(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
