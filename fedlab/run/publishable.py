"""What may be published of a run: decided here, for every table, tracker, figure, report and card.

`Round.server_only` names the kinds of numbers of a round that no guarantee of the run covers; `published` leaves them
out. The server's own record, `History.records`, `History.sites()` and the trace, keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from fedlab.core.protocols import Run
from fedlab.core.types import Round

__all__ = ["OnPublicPatients", "Validate", "hidden_in", "published", "server_only", "validated"]

#: Called with the global model and the round's number; numbers by name.
Validate = Callable[[nn.Module, int], dict[str, float]]


def server_only(run: Run, spent: Mapping[str, object], *, void: bool = False) -> frozenset[str]:
    """The kinds of a round's numbers that are for the server only under the guarantee of a run.

    Args:
        run: the run.
        spent: privacy spent, by site; under "server" that of noise at the server.
        void: whether the round was void.

    Returns:
        A subset of {"seconds", "sites"}. Time grows with the patients that a site draws and with the sites that take
        part, so no guarantee covers it. Noise at the server hides whether a site has taken part, and so every number
        about single sites: their names, how many they are, their bytes and weights, what their own ledgers hold.
        Where the noise is added at the sites, what a site sends is covered by its own guarantee, and that it takes
        part is public.
    """
    if not run.guarded:
        return frozenset()
    at_server = "server" in spent or (void and run.privacy.works_at_server)
    return frozenset({"seconds", "sites"} if at_server else {"seconds"})


@dataclass(frozen=True)
class OnPublicPatients:
    """`federate(validate=OnPublicPatients(f))`: the patients that `f` scores are public, such as generated ones.

    Where noise at the server protects all data of a site, numbers of patients of the sites are for the server only;
    those of patients who are at none of the sites may be published.
    """

    validate: Validate
    public: ClassVar[bool] = True

    def __call__(self, model: nn.Module, number: int) -> dict[str, float]:
        return self.validate(model, number)


def validated(finished: Round, validate: Validate, model: nn.Module) -> Round:
    """A round with the numbers that `validate` finds; see `OnPublicPatients` about which of them are public."""
    private = "sites" in finished.server_only and not getattr(validate, "public", False)
    return replace(finished, metrics={**finished.metrics, **validate(model, finished.number)},
                   server_only=finished.server_only | ({"validation"} if private else set()))


def hidden_in(record: Mapping[str, Any]) -> frozenset[str]:
    """The kinds of numbers in a round's record that must not leave the server."""
    if "server_only" in record:
        return frozenset(record["server_only"])
    # A record of an earlier version does not say it.
    return frozenset({"seconds"} if record["spent"] else ()) | ({"sites"} if "server" in record["spent"] else set())


def published(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a round's record, as `record_of` makes it, that may leave the server."""
    hidden, out = hidden_in(record), dict(record)
    if "seconds" in hidden:
        out.pop("seconds", None)
    if "validation" in hidden:
        out["metrics"] = {}
    if "sites" in hidden:
        at_server = {name: spent for name, spent in record["spent"].items() if name == "server"}
        out |= {"sites": {}, "absent": {}, "void": None, "spent": at_server}
    return out
