"""A site's privacy ledger in a file of its own, which neither a crash nor an old copy can shorten."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedlab.core.errors import PrivacyError
from fedlab.core.files import locked, write_whole
from fedlab.core.types import SiteState, Spent
from fedlab.privacy.accounting.ledger import Accountant, HasLedger, Ledger, Pure, Terms

__all__ = ["LedgerFile"]


class LedgerFile:
    """The ledger of one site, as JSON with a checksum.

    The file is written whole beside its predecessor, forced onto the disk and renamed into place before the update
    that it accounts for leaves the site. The entries of the file, of the site's state and of a restored checkpoint are
    joined: equal entries count once, so that a round run again bit for bit costs nothing more, and an old copy of one
    of them lowers nothing. Only a return of all of them to an earlier state goes unnoticed.

    The folder outlives a run: the releases of later runs of the same site add to those of earlier ones, as they must
    while the site trains on the same patients. An empty file beside the ledger marks that it exists, so that a later
    run notices its loss.

    Args:
        folder: of the ledgers, made if missing; several sites may share it.
        site: name of the site.
    """

    def __init__(self, folder: Path | str, site: str) -> None:
        self.site = site
        path = Path(folder) / f"{quote(site, safe='')}.ledger.json"
        self.path = path.resolve() if path.is_symlink() else path  # a link stays one, and what it names is charged
        self._begun = self.path.with_suffix(".begun")

    @contextmanager
    def kept(self, state: HasLedger) -> Iterator[None]:
        """Around a site's work in a round: the ledger is read into its state before and saved after it.

        Nothing is saved if the work fails, since nothing has left the site then.

        Raises:
            PrivacyError: the file is damaged, of another site, missing though it was kept before, or in use by
                another run.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.with_name(f"{self.path.name}.lock"), PrivacyError(
                f"another run is using {self.path}; run one after the other, or both would spend the same budget")):
            self.restore(state)
            yield
            self.save(state)

    def charging(self, *, delta: float, accountant: Accountant = "rdp",
                 max_epsilon: float | None = None) -> Callable[[Spent], None]:
        """A function that enters noised statistics into this file, on disk before they leave the site.

        `site_statistics(site, epsilon=0.5, charge=LedgerFile(folder, site.name).charging(delta=1e-3))` charges the
        ledger that `federate(engine=Local(ledgers=folder), privacy=DPSGD(delta=1e-3, …), …)` continues. Every release
        counts anew. Only entries of one unit add up: statistics of patients count per patient; a guarantee per site
        covers updates, not statistics.

        Args:
            delta, accountant: those of the technique that trains at the site; others cannot be added up with them.
            max_epsilon: the site's budget per patient, for statistics and training together.

        Returns:
            A function that takes the release's own ε and raises `PrivacyBudgetExhausted` or `PrivacyError`, as
            `Ledger.charge` does, or `ValueError` for a release that is not ε-private with δ = 0.
        """
        Terms(unit="patient", delta=delta, adjacency="any", accountant=accountant)  # wrong settings raise at once

        def enter(spent: Spent) -> None:
            if spent.delta != 0:
                raise ValueError(f"a release with δ = 0 was expected, got {spent}; enter it with Ledger.charge()")
            terms = Terms(unit=spent.unit, delta=delta, adjacency=spent.adjacency, accountant=accountant)
            state = SiteState()
            with self.kept(state):
                ledger = Ledger.open(state, site=self.site, round=None, stream=None)
                ledger.charge(Pure(epsilon=spent.epsilon), terms=terms, max_epsilon=max_epsilon, seeded=spent.repeats)

        return enter

    def restore(self, state: HasLedger) -> None:
        """Merges the file into the ledger of a state."""
        if self.path.is_file():
            Ledger(state).merge(self.read())
        elif self._begun.exists() or (state.ledger and Ledger(state).note()["in_file"]):
            raise PrivacyError(f"the ledger of {self.site} was kept in {self.path}, which is missing; restore it: "
                               "without it the privacy spent is unknown")

    def save(self, state: HasLedger) -> None:
        """Writes the ledger of a state, if it has one, over the file."""
        if not state.ledger:
            return
        ledger = Ledger(state)
        ledger.close(in_file=True)
        note = ledger.note()
        text = json.dumps({"sha256": _checksum(note), "ledger": note}, indent=1, ensure_ascii=False)
        write_whole(self.path, (text + "\n").encode())
        self._begun.touch()

    def read(self) -> Ledger:
        """A copy of the ledger in the file.

        Raises:
            PrivacyError: the file is missing, damaged or of another site.
        """
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["sha256"] != _checksum(found["ledger"]):
                raise ValueError("its content does not fit its checksum")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PrivacyError(f"{self.path} is missing or damaged ({error}); restore it from a copy: without it the "
                               f"privacy spent by {self.site} is unknown") from error
        ledger = Ledger(SiteState(ledger=found["ledger"]))
        if ledger.note()["site"] != self.site:
            raise PrivacyError(f"{self.path} is the ledger of {ledger.note()['site']!r}, not of {self.site!r}; put "
                               "each site's own file back")
        return ledger

    def __repr__(self) -> str:
        return f"LedgerFile({str(self.path.parent)!r}, {self.site!r})"


def _checksum(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
