"""The frame of every privacy technique: hooks around local training and aggregation."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from fedlab.core.errors import PrivacyError
from fedlab.core.gate import check_update
from fedlab.core.kit import Kit
from fedlab.core.protocols import Run
from fedlab.core.types import Cohort, ServerState, Site, SiteState, Update

__all__ = ["Privacy", "importable"]


class Privacy:
    """A privacy technique. Every hook is the identity: override those that the technique needs.

    `a + b` applies a, then b at the site, and b, then a at the server, as layers of an onion; each layer has its own
    `state.own`.

    A technique with a proven guarantee enters what it releases into the site's ledger
    (`fedlab.privacy.accounting.ledger.Ledger(state).charge(...)`) and names the unit it protects in `units`; a round
    in which the ledger was not charged for such a unit is refused. Without units the technique has no formal
    guarantee and is labelled so.

    Attributes:
        units: what the guarantee given at the site protects: {"patient"}, {"site"} or both.
        keeps_tensors: whether some tensors of the model stay at each site, so that the global model is not whole.
    """

    units: frozenset[str] = frozenset()
    keeps_tensors: bool = False

    @property
    def layers(self) -> tuple[Privacy, ...]:
        """The techniques of a sum, in the order in which they work at a site; one technique is its own only layer."""
        return (self,)

    @property
    def works_at_server(self) -> bool:
        """Whether it changes the mean of the updates at a server."""
        return any(type(layer).release is not Privacy.release for layer in self.layers)

    def at(self, site: str) -> Privacy:
        """The part that works at a site: all of it, unless sites differ; see `AtSites`."""
        return self

    def check_order(self, *, before: Sequence[Privacy], after: Sequence[Privacy]) -> None:
        """When joined by `+`: raises `ValueError` if this technique cannot stand between those."""

    def check(self, run: Run) -> None:
        """Before the first round: raises `ValueError` if the technique cannot work with the rest of the run.

        The patients of the sites are not known here; `check_site` is asked at each site.
        """

    def check_site(self, site: Site, run: Run) -> None:
        """Before the first round, at a site: raises `ValueError` if the technique cannot work with its patients."""

    def equip(self, kit: Kit, site: Site, state: SiteState) -> Kit:
        """Before local training, at the site: wrap the model, the optimiser or the loader."""
        return kit

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        """The last thing before an update leaves the site."""
        return update

    def release(self, mean: Update, cohort: Cohort, state: ServerState, rng: torch.Generator) -> Update:
        """At the server, between combining the cohort's updates and moving the model.

        Args:
            mean: the combination, float64; zeros if no site took part.
            cohort: the sites that took part.
            state: the server's; `state.own` is kept from round to round, `state.broadcast` goes to the sites.
            rng: source of the noise.
        """
        return mean

    def __add__(self, other: Privacy) -> Privacy:
        if not isinstance(other, Privacy):
            raise TypeError(f"only privacy techniques are joined by +, got {other!r}; an aggregation is given as "
                            "federate(..., aggregation=...)")
        return _Sum(*self.layers, *other.layers)

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({settings})"


class _Sum(Privacy):
    """Several techniques in order; made by `+`."""

    def __init__(self, *layers: Privacy) -> None:
        for place, layer in enumerate(layers):
            layer.check_order(before=layers[:place], after=layers[place + 1:])
        self._layers = layers
        self.units = frozenset().union(*(layer.units for layer in layers))

    @property
    def layers(self) -> tuple[Privacy, ...]:
        return self._layers

    def at(self, site: str) -> Privacy:
        here = [part for layer in self.layers for part in layer.at(site).layers if type(part) is not Privacy]
        if len(here) == len(self.layers) and all(map(operator.is_, here, self.layers)):
            return self
        return _Sum(*here) if len(here) > 1 else here[0] if here else Privacy()

    def check(self, run: Run) -> None:
        for layer in self.layers:
            layer.check(run)

    def check_site(self, site: Site, run: Run) -> None:
        for layer in self.layers:
            layer.check_site(site, run)

    def equip(self, kit: Kit, site: Site, state: SiteState) -> Kit:
        for owner, layer in self._owned(state.owner):
            kit = layer.equip(kit, site, state.of(owner))
        return kit

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        for owner, layer in self._owned(state.owner):
            update = check_update(layer.protect(update, state.of(owner), rng), like=update.delta, site=update.site)
        return update

    def release(self, mean: Update, cohort: Cohort, state: ServerState, rng: torch.Generator) -> Update:
        for owner, layer in reversed(list(self._owned(state.owner))):
            mean = layer.release(mean, cohort, state.of(owner), rng)
        return mean

    def _owned(self, owner: str) -> Iterator[tuple[str, Privacy]]:
        """Each layer and the owner of its namespace."""
        return ((f"{owner} {place}", layer) for place, layer in enumerate(self.layers))

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.layers))


def importable(technique: Privacy) -> tuple[str, ...]:
    """Whether another machine can make this technique; a remote engine checks before it sends one.

    Returns:
        Names of the modules beyond fedlab that hold its classes and functions: every site must have them.

    Raises:
        PrivacyError: a part of it is defined in a notebook cell, in a script that was started, or in a function, from
            which no other process can import it.
    """
    modules = set()
    for layer in technique.layers:
        for part in _parts(layer):
            module, name = getattr(part, "__module__", None), getattr(part, "__qualname__", "")
            if module == "builtins":
                continue
            found: Any = sys.modules.get(module or "")
            for step in name.split("."):
                found = getattr(found, step, None)
            if module == "__main__" or found is not part:
                raise PrivacyError(
                    f"{name or repr(part)} of {layer!r} is defined in a notebook, a script or a function, from which "
                    "other sites cannot import it: write it into a file (fedlab export technique, or %%writefile "
                    "my_technique.py as the first line of its cell), have that file approved at every site, and import "
                    "it from there")
            modules.add(module or "")
    return tuple(sorted(name for name in modules if name.partition(".")[0] != "fedlab"))


def _parts(value: Any) -> Iterator[Any]:
    """The classes and functions that an object is made of, those in its settings included."""
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        yield value
        return
    yield type(value)
    if isinstance(value, Mapping):
        inner = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        inner = list(value)
    elif is_dataclass(value):
        inner = [getattr(value, f.name) for f in fields(value)]
    else:
        inner = [v for k, v in vars(value).items() if not k.startswith("_")] if isinstance(value, Privacy) else []
    for item in inner:
        yield from _parts(item)
