"""A technique that only some sites use, such as a site whose policy requires it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedlab.core.kit import Kit
from fedlab.core.protocols import Run
from fedlab.core.types import Site, SiteState, Update
from fedlab.privacy.base import Privacy, layers_at, technique_at

__all__ = ["AtSites"]


class AtSites(Privacy):
    """A technique for the named sites; the others train and send without it.

    `federate(..., privacy=AtSites(sites=("site-01",), technique=DPSGD(...)), aggregation=SecureAggregation(...))`:
    every update is masked, and one site trains privately as well. The guarantee holds for the patients of the named
    sites only: no other site appears in `Round.spent` or has a ledger.

    Args:
        sites: names of the sites.
        technique: works at each site alone, without a part at the server.

    Raises:
        ValueError: no site, a site named twice, not a technique, or a technique with a part at the server.
    """

    def __init__(self, *, sites: Sequence[str], technique: Privacy) -> None:
        self.sites, self.technique = tuple(sites), technique
        if isinstance(sites, str) or not self.sites or len(set(self.sites)) != len(self.sites):
            raise ValueError(f"sites are the names of one or more different sites, got {sites!r}")
        if not isinstance(technique, Privacy):
            raise ValueError(f"technique is a privacy technique, got {technique!r}; an aggregation concerns all sites "
                             "and is given as federate(..., aggregation=...)")
        if technique.works_at_server:
            raise ValueError(f"{technique!r} has a part at the server, which concerns all sites; join it to this "
                             "with +")

    @property
    def units(self) -> frozenset[str]:  # type: ignore[override]
        """Those of the technique at the named sites; at the others nothing is promised, see `technique_at`."""
        return frozenset().union(*(self.at(site).units for site in self.sites))

    def at(self, site: str) -> Privacy:
        return technique_at(self.technique, site) if site in self.sites else Privacy()

    def check_order(self, *, before: Sequence[Privacy], after: Sequence[Privacy]) -> None:
        for site in self.sites:
            for layer in layers_at(self.technique.layers, site):
                layer.check_order(before=layers_at(before, site), after=layers_at(after, site))

    def check(self, run: Run) -> None:
        unknown = sorted(set(self.sites) - set(run.names))
        if unknown:
            raise ValueError(f"{unknown} are not sites of the run, which has {list(run.names)}")
        self.technique.check(run)

    def check_site(self, site: Site, run: Run) -> None:
        self.at(site.name).check_site(site, run)

    def equip(self, kit: Kit, site: Site, state: SiteState) -> Kit:
        return self.at(site.name).equip(kit, site, state)

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        return self.at(update.site).protect(update, state, rng)
