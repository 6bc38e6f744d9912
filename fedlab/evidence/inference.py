"""What an update tells of a site as a whole: which site it is, and a property of its patients.

Updates point where a site's data pull, so that a mean of earlier updates recognises the next one (L. Melis, C. Song,
E. De Cristofaro, V. Shmatikov, Exploiting Unintended Feature Leakage in Collaborative Learning, IEEE S&P 2019, arXiv
1805.04049). The attacks compare directions, which clipping does not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fedlab.core.types import Tensors
from fedlab.evidence.findings import Finding, Threat
from fedlab.evidence.intervals import Floats, area_under_roc, share_interval

__all__ = ["PropertyInference", "SiteInference"]


@dataclass(frozen=True, kw_only=True)
class SiteInference:
    """Which site sends an update without a name? The one whose earlier updates, in the mean, point most alike."""

    threat: ClassVar[Threat] = Threat(who="server", sees="an update without a name, and earlier ones with names",
                                      wants="which site sends it")

    def __call__(self, known: Mapping[str, Sequence[Tensors]], updates: Sequence[tuple[str, Tensors]]) -> Finding:
        """Attacks updates.

        Args:
            known: earlier updates of each site, by its name.
            updates: later ones, each with the name that is to be found.

        Returns:
            The share of updates whose site is found; chance is the share of the most frequent site.

        Raises:
            ValueError: fewer than two sites, no update, or one of a site of which none is known.
        """
        names = [name for name, _ in updates]
        if len(known) < 2 or not names or not set(names) <= set(known) or not all(map(len, known.values())):
            raise ValueError(f"expected earlier updates of two or more sites and later ones of these, got "
                             f"{sorted(known)} and {sorted(set(names))}")
        means = {name: np.mean([_direction(one) for one in earlier], axis=0) for name, earlier in known.items()}
        # What all sites have in common says nothing of one of them.
        common = np.mean(list(means.values()), axis=0)
        found = [max(means, key=lambda site: _cosine(_direction(one) - common, means[site] - common))
                 for _, one in updates]
        right = sum(guess == name for guess, name in zip(found, names, strict=True))
        value, low, high = share_interval(right, len(names))
        return Finding(attack=repr(self), threat=self.threat, measure=f"updates ascribed to the right one of "
                       f"{len(known)} sites", value=value, low=low, high=high, trials=len(names),
                       chance=max(map(names.count, names)) / len(names))


@dataclass(frozen=True, kw_only=True)
class PropertyInference:
    """Do a site's patients have a property, such as a large share of low-grade tumours?

    The attacker makes updates of patients with and without it, such as generated ones; what separates their means is
    the direction along which an update is scored.
    """

    threat: ClassVar[Threat] = Threat(who="server", wants="whether the patients of a site have a property",
                                      sees="the update of a site, and the model before it, from which it trains alike "
                                      "on patients of its own")

    def __call__(self, *, own_with: Sequence[Tensors], own_without: Sequence[Tensors], sites_with: Sequence[Tensors],
                 sites_without: Sequence[Tensors]) -> Finding:
        """Attacks updates.

        Args:
            own_with, own_without: of the attacker's own patients, with the property and without.
            sites_with, sites_without: of the sites.

        Returns:
            The AUC: how likely an update with the property has a higher score than one without.

        Raises:
            ValueError: a group is empty.
        """
        if not all(map(len, (own_with, own_without, sites_with, sites_without))):
            raise ValueError("expected one or more updates with and without the property, of the attacker and of sites")
        one, other = (np.mean([_direction(update) for update in group], axis=0) for group in (own_with, own_without))
        middle = (one + other) / 2
        scores = [np.array([_cosine(_direction(update) - middle, one - other) for update in group])
                  for group in (sites_with, sites_without)]
        value, low, high = area_under_roc(*scores)
        return Finding(attack=repr(self), threat=self.threat, measure="AUC", value=value, low=low, high=high,
                       trials=len(sites_with) + len(sites_without), chance=0.5)


def _direction(update: Tensors) -> Floats:
    flat: Floats = torch.cat([update[name].detach().double().flatten() for name in sorted(update)]).numpy()
    return flat / max(float(np.linalg.norm(flat)), 1e-30)


def _cosine(one: Floats, other: Floats) -> float:
    return float(one @ other / max(float(np.linalg.norm(one) * np.linalg.norm(other)), 1e-30))
