"""The frame of every privacy technique: hooks around local training and aggregation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fedlab.core.errors import PrivacyError
from fedlab.core.gate import check_update
from fedlab.core.kit import Kit
from fedlab.core.protocols import Run
from fedlab.core.types import Cohort, ServerState, Site, SiteState, Spent, Update

__all__ = ["Privacy", "layers_at", "technique_at"]


class Privacy:
    """A privacy technique. Every hook is the identity: override those that the technique needs.

    `a + b` applies a, then b at the site, and b, then a at the server, as layers of an onion; each layer has its own
    `state.own`.

    A technique with a proven guarantee enters what it releases into the site's ledger
    (`fedlab.privacy.accounting.ledger.Ledger(state).charge(...)`) and names the unit it protects in `units`; a round
    in which the ledger was not charged for such a unit is refused. Without units the technique has no formal
    guarantee and is labelled so.

    Settings of one name mean the same in all techniques:
        delta: of the guarantee, below 1 over the number of units.
        accountant: "rdp", "prv" or, where every record takes part in every step, "gdp"; see `Terms`.
        max_epsilon: the budget of a site, or of the server whose noise it is; no further part is taken rather than
            exceed it.
        secure_mode: noise from the operating system, exact on a public grid. Without it, for research, noise repeats
            with the seed, which an adversary may know, such as the server, and subtract, and ε is for real numbers.

    Attributes:
        units: what the guarantee given at the site protects: {"patient"}, {"site"} or both.
        keeps_tensors: whether some tensors of the model stay at each site, so that the global model is not whole.
        sends: names of the metrics that it sends beside the update, which its guarantee covers; under a guarantee all
            others stay at the site.

    Example:
        >>> class Rounded(fl.Privacy):
        ...     def protect(self, update, context):
        ...         return update.map(lambda tensor: (tensor * 1000).round() / 1000)
        >>> Rounded() + fl.privacy.TopK(keep=0.1)
        Rounded() + TopK(keep=0.1, per_layer=False, error_feedback=False)
    """

    units: frozenset[str] = frozenset()
    keeps_tensors: bool = False
    sends: frozenset[str] = frozenset()

    @property
    def layers(self) -> tuple[Privacy, ...]:
        """The techniques of a sum, in the order in which they work at a site; one technique is its own only layer."""
        return (self,)

    @property
    def works_at_server(self) -> bool:
        """Whether it changes the mean of the updates at a server."""
        return any(type(layer).release is not Privacy.release for layer in self.layers)

    def at(self, site: str) -> Privacy:
        """What it is at a site: itself, unless sites differ; see `AtSites` and `technique_at`."""
        return self

    def least_spent(self, update: Update) -> Spent | None:
        """What a site states as spent with such an update at least; None if that does not follow from the settings."""
        return None

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
        self.sends = frozenset().union(*(layer.sends for layer in layers))

    @property
    def layers(self) -> tuple[Privacy, ...]:
        return self._layers

    def at(self, site: str) -> Privacy:
        return technique_at(self, site)

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
            update = check_update(layer.protect(update, state.of(owner), rng), like=update.delta,
                                  buffers=update.buffers, site=update.site)
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


def technique_at(technique: Privacy, site: str) -> Privacy:
    """All that works at a site, with every technique that differs from site to site replaced by what it is there."""
    if all(layer.at(site) is layer for layer in technique.layers):
        return technique
    here = layers_at(technique.layers, site)
    return _Sum(*here) if len(here) > 1 else here[0] if here else Privacy()


def layers_at(layers: Sequence[Privacy], site: str, *, depth: int = 0) -> list[Privacy]:
    """The techniques that these layers are at a site; what one of them returns is asked again, until nothing changes.

    Raises:
        PrivacyError: there is no end to it.
    """
    found: list[Privacy] = []
    for layer in layers:
        here = layer.at(site)
        if here is not layer and depth == 20:
            raise PrivacyError(f"{layer!r} never says what it is at {site}; return a technique whose at() returns "
                               "itself")
        if here is not layer:
            found += layers_at(here.layers, site, depth=depth + 1)
        elif type(layer) is not Privacy:
            found.append(layer)
    return found
