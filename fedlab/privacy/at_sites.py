"""A technique that only some sites use, such as the one whose policy insists on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fedlab.core.types import Memory, Site, Update
from fedlab.privacy.base import Privacy

if TYPE_CHECKING:
    from fedlab.strategies.averaging import Strategy
    from fedlab.training.trainer import Kit, SiteTrainer

__all__ = ["AtSites"]


class AtSites(Privacy):
    """A technique for the named sites; at the others nothing happens.

    `AtSites(sites=("site-01",), technique=DPSGD(...)) + SecureAggregation(...)`: everybody's update is masked, and one
    site trains privately as well. The guarantee holds for the patients of the named sites only: `Round.spent` and the
    ledgers say so, as no other site states anything.

    Args:
        sites: names of the sites.
        technique: what works at each site by itself, without a part at the server and without messages between sites.

    Raises:
        ValueError: no site, a site named twice, or a technique with a part at the server or with messages.
    """

    def __init__(self, *, sites: Sequence[str], technique: Privacy) -> None:
        self.sites, self.technique = tuple(sites), technique
        if isinstance(sites, str) or not self.sites or len(set(self.sites)) != len(self.sites):
            raise ValueError(f"sites are the names of one or more different sites, got {sites!r}")
        own = [type(layer) for layer in technique._layers()]
        if technique.works_at_server or technique.before or technique.after or technique.masked or any(
                cls.unmask is not Privacy.unmask for cls in own):
            raise ValueError(f"{technique!r} has a part at the server or exchanges messages, which concerns all sites; "
                             "put it beside this with +")

    @property
    def units(self) -> frozenset[str]:  # type: ignore[override]
        return self.technique.units

    def at(self, site: str) -> Privacy:
        return self.technique if site in self.sites else Privacy()

    def check_order(self, *, before: Sequence[Privacy], after: Sequence[Privacy]) -> None:
        for site in self.sites:
            self.technique.check_order(before=_there(before, site), after=_there(after, site))

    def check_run(self, *, trainer: SiteTrainer, sites: Sequence[Site], strategy: Strategy, rounds: int) -> None:
        own = [site for site in sites if site.name in self.sites]
        unknown = sorted(set(self.sites) - {site.name for site in own})
        if unknown:
            raise ValueError(f"{unknown} are no sites of the run, which has {[site.name for site in sites]}")
        self.technique.check_run(trainer=trainer, sites=own, strategy=strategy, rounds=rounds)

    def equip(self, kit: Kit, site: Site, memory: Memory) -> Kit:
        return self.technique.equip(kit, site, memory) if site.name in self.sites else kit

    def protect(self, update: Update, memory: Memory, rng: torch.Generator) -> Update:
        return self.technique.protect(update, memory, rng) if update.site in self.sites else update


def _there(layers: Sequence[Privacy], site: str) -> list[Privacy]:
    """What of these layers works at a site."""
    return [part for layer in layers for part in layer.at(site)._layers() if type(part) is not Privacy]
