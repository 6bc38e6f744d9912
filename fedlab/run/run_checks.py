"""What is refused before the first round, whatever the parts of a run: its numbers and names, and where proofs fail."""

from __future__ import annotations

from collections import Counter
from urllib.parse import quote

from fedlab.core.protocols import Run
from fedlab.core.settings import check_whole
from fedlab.privacy.accounting.ledger import check_terms
from fedlab.privacy.base import Privacy, layers_at
from fedlab.run.server_ledger import SERVER

__all__ = ["check_moments", "check_numbers", "check_server"]

#: Characters of a site's name in the names of files; most file systems allow 255 for the whole name.
_LONGEST_NAME = 200


def check_numbers(run: Run) -> None:
    """Refuses a run without sites or rounds, and names that files cannot have or that occur twice."""
    if not run.sites:
        raise ValueError("a run needs at least one site, got none")
    for name, count in Counter(run.names).items():
        if not isinstance(name, str) or not 0 < len(quote(name, safe="")) <= _LONGEST_NAME:
            raise ValueError(f"a site's name has 1 to {_LONGEST_NAME} characters, since files are named after it; "
                             "others than A-Z, a-z, 0-9 and -_.~ count as three or more. Got "
                             f"{str(name)[:40]!r}, {len(str(name))} characters")
        if name == SERVER:
            raise ValueError(f"a site cannot be named {SERVER!r}, which stands for the server in ledgers and messages")
        if count > 1:
            raise ValueError(f"site names are unique within a run, but {name!r} occurs {count} times")
    check_whole(rounds=run.rounds)


def check_moments(run: Run) -> None:
    """Refuses averaged moments where a part of the run protects, judges or combines weights only."""
    if run.trainer.momentum != "average":
        return
    protects = any(type(layer) is not Privacy for layer in run.privacy.layers)
    hides = bool(run.aggregation.units) or run.aggregation.hides_updates
    bounded = run.admission is not None and run.admission.max_norm is not None
    for refuses, part, why in (
            (protects, run.privacy, "works on the update's weights only, and moments tell as much of the patients"),
            (hides, run.aggregation, "hides the update's weights only, and moments tell as much of the patients"),
            (not getattr(run.strategy, "takes_buffers", True), run.strategy, "judges and combines weights only"),
            (bounded, run.admission, "judges weights only"),
            (not run.topology.one_server, run.topology, "has no server at which all moments of a round meet")):
        if refuses:
            raise ValueError(f"the trainer averages the optimiser's moments, but {part!r} {why}; say "
                             "SiteTrainer(momentum='keep', ...)")


def check_server(run: Run) -> None:
    """Refuses parts that need one server with all updates where there is none, or where their proofs do not hold."""
    if getattr(run.strategy, "one_server", False) and not run.topology.one_server:
        raise ValueError(f"{run.strategy!r} needs all updates of a round at one server, which {run.topology!r} does "
                         "not have; use topology=star")
    if run.privacy.works_at_server and not run.topology.one_server:
        raise ValueError(f"{run.privacy!r} works on the mean of all updates at one server, which {run.topology!r} does "
                         "not have; use topology=star, or a technique that protects each update at its site")
    # One ledger adds up what all techniques at a site spend, and one what those at the server spend.
    check_terms([layer for layer in run.privacy.layers if layer.works_at_server], sites=len(run.sites))
    for name in run.names:
        check_terms([layer for layer in layers_at(run.privacy.layers, name) if not layer.works_at_server],
                    sites=len(run.sites))
    if run.guarded and getattr(run.admission, "deadline", None) is not None:
        raise ValueError("no guarantee covers the time that a site takes, so it is not sent and admission cannot apply "
                         "a deadline; leave deadline out, and limit the wait with NVFlare(seconds=...)")
    if run.admission is not None and run.privacy.works_at_server and run.admission.min_sites > 1:
        raise ValueError(f"whether a round counts would show how many sites took part, which {run.privacy!r} does not "
                         "account for; use min_sites=1")
