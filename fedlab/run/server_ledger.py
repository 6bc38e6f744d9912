"""The ledger of noise at the server, in the store of the sites' ledgers: it outlives a run, as theirs do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fedlab.core.errors import PrivacyError
from fedlab.core.protocols import Run
from fedlab.core.types import ServerState, Spent
from fedlab.privacy.accounting.ledger import Ledger
from fedlab.run.local import with_ledger

__all__ = ["SERVER", "server_ledger", "stated"]

#: The server among the sites: no site may have this name.
SERVER = "server"


@contextmanager
def server_ledger(run: Run, state: ServerState, mean_sha256: str) -> Iterator[None]:
    """Around the techniques' part at the server: its ledger is read before, and on disk before the model moves.

    It lies beside those of the sites, `server.ledger.json` in the folder that the engine names, such as
    `Local(ledgers=...)`: what later runs release is added to what earlier ones have released, whatever they train. A
    round that is run again to the same mean draws the same noise and counts once.

    Args:
        run: the run.
        state: of the server; its ledger is changed.
        mean_sha256: of the mean to which noise is added.

    Raises:
        PrivacyError: see `LedgerFile.kept`; or the ledger is in a file that the engine does not name.
    """
    if not run.privacy.works_at_server or (state.round > 0 and not state.ledger):
        yield  # a technique that needs its ledger refuses
        return
    with with_ledger(_store(run.engine), SERVER, state, engine=type(run.engine).__name__):
        Ledger.open(state, site=SERVER, round=state.round, stream=f"{run.seed}|{mean_sha256}")
        yield
        if not Ledger(state).releases():  # nothing at the server is accounted for
            state.ledger.clear()


def stated(spent: tuple[Spent, ...], state: ServerState) -> tuple[Spent, ...]:
    """What release() states as spent at the server, if it follows from the server's ledger.

    Raises:
        PrivacyError: it states less, something else, or what no ledger holds.
    """
    known = {one.unit: one for one in Ledger(state).spent()}
    for one in spent:
        proven = known.get(one.unit)
        if proven is None or one._replace(epsilon=0.0) != proven._replace(epsilon=0.0) or not (
                one.epsilon >= proven.epsilon * (1 - 1e-9)):
            raise PrivacyError(f"release() states {one} as spent, but by the server's ledger it is "
                               f"{proven or 'nothing'}; charge Ledger(state) of the state that release() is given, and "
                               "state dataclasses.replace(mean, spent=ledger.spent())")
    return spent


def _store(engine: Any) -> Any:
    """The folder of ledgers of an engine, or of the one that it wraps."""
    while engine is not None:
        if (folder := getattr(engine, "ledgers", None)) is not None:
            return folder
        engine = getattr(engine, "engine", None)
    return None
