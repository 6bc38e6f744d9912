"""What a site keeps of a run, on the site's own disk."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from fedlab.core.errors import PrivacyError, RunError
from fedlab.core.files import write_whole
from fedlab.core.types import SiteState
from fedlab.run.site_states import pack_site_state, unpack_site_state

__all__ = ["SiteSnapshots"]

_FILE = re.compile(r"from-(\d{6})\.state")
_KEPT = 4
_DIGEST = 32


class SiteSnapshots:
    """The state of one site in one run: a file for each of its last rounds, so that a round can be repeated.

    `from-000003.state` is the state before round 3 and, until the site takes part again, before every later round. A
    round that a server asks for again, after a restart, starts from the same state as the first time; round 0 starts
    the run anew. The keys of a round (`SiteState.secrets`) stay in this process; `sums.json` says of each round which
    sum of hidden updates this site has helped to unmask, so that it helps with no other after a restart either.

    Args:
        folder: of this run, made if missing.
        site: name of the site.
        run: name of the run.

    Raises:
        PrivacyError: `sums.json` is damaged or missing.
    """

    def __init__(self, folder: Path | str, *, site: str, run: str) -> None:
        self.folder, self.site, self.run = Path(folder), site, run
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sums = self.folder / "sums.json"
        if not self._numbers() and not (self.folder / "joined").exists():
            self._write(0, SiteState(enrolled=True))
            write_whole(self._sums, b"{}")
            write_whole(self.folder / "joined", b"")
        self._saved = self._read_sums()
        self._secrets: dict[str, Any] = {"past": dict(self._saved)}

    def before(self, round: int) -> SiteState:
        """The state that this site's work in a round starts from.

        Raises:
            PrivacyError: the files are damaged or missing, or do not reach back to the round.
        """
        if round == 0:
            return SiteState(enrolled=True, secrets=self._secrets)
        known = [number for number in self._numbers() if number <= round]
        if not known:
            raise PrivacyError(f"{self.site} has no state of this run before round {round}: its files in {self.folder} "
                               f"begin at {self._numbers()[:1]}; restore them, or begin a new run")
        path = self._path(known[-1])
        try:
            data = path.read_bytes()
            state = unpack_site_state(data[_DIGEST:], what=str(path), expected=data[:_DIGEST].hex(), site=self.site,
                                      run=self.run, number=known[-1])
        except (OSError, RunError) as error:
            raise PrivacyError(f"{path} is damaged ({error}); restore it from a copy, or begin a new run") from error
        state.secrets = self._secrets
        return state

    def with_secrets(self) -> SiteState:
        """A state with the site's keys of this round only, for an exchange of messages."""
        return SiteState(secrets=self._secrets, owner="aggregation")

    def save_sums(self) -> None:
        """Writes which sums this site has helped to unmask, if there is a new one."""
        if self._secrets["past"] != self._saved:
            write_whole(self._sums, json.dumps(self._secrets["past"]).encode())
            self._saved = dict(self._secrets["past"])

    def _read_sums(self) -> dict[int, str]:
        try:
            return {int(round): str(summed) for round, summed in json.loads(self._sums.read_bytes()).items()}
        except (OSError, ValueError, AttributeError) as error:
            raise PrivacyError(f"{self._sums.name} of this run at {self.site} is damaged or missing "
                               f"({type(error).__name__}); restore it from a copy, or begin a new run: it says which "
                               "sums this site has helped to unmask") from error

    def save(self, state: SiteState, round: int) -> None:
        """Writes the state after a round; states of later rounds, which are now undone, are removed."""
        self._write(round + 1, state)
        undone = [number for number in self._numbers() if number > round + 1]
        for number in (*undone, *self._numbers()[:-_KEPT - len(undone)]):
            self._path(number).unlink(missing_ok=True)

    def _numbers(self) -> list[int]:
        found = (_FILE.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def _path(self, number: int) -> Path:
        return self.folder / f"from-{number:06d}.state"

    def _write(self, number: int, state: SiteState) -> None:
        data = pack_site_state(state, site=self.site, run=self.run, number=number)
        write_whole(self._path(number), hashlib.sha256(data).digest() + data)
