"""The frame of every privacy technique: three hooks around local training and aggregation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fedlab.errors import PrivacyError
from fedlab.types import Memory, Site, Tensors, Update

if TYPE_CHECKING:
    from fedlab.training import Kit

__all__ = ["Privacy", "check_update"]


class Privacy:
    """A privacy technique. Every hook is the identity: override what the technique needs.

    `a + b` applies a, then b at the site, and b, then a at the server, as layers of an onion.
    """

    def equip(self, kit: Kit, site: Site, memory: Memory) -> Kit:
        """Before local training, at the site: wrap the model, the optimiser or the loader."""
        return kit

    def protect(self, update: Update, memory: Memory, rng: torch.Generator) -> Update:
        """The last thing before an update leaves the site."""
        return update

    def release(self, mean: Update, cohort: int, rng: torch.Generator) -> Update:
        """At the server, between combining `cohort` updates and moving the model."""
        return mean

    def __add__(self, other: Privacy) -> Privacy:
        return _Stack(*self._layers(), *other._layers())

    def _layers(self) -> tuple[Privacy, ...]:
        return (self,)

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({settings})"


class _Stack(Privacy):
    """Several techniques in order; made by `+`."""

    def __init__(self, *layers: Privacy) -> None:
        self.layers = layers

    def equip(self, kit: Kit, site: Site, memory: Memory) -> Kit:
        for layer in self.layers:
            kit = layer.equip(kit, site, memory)
        return kit

    def protect(self, update: Update, memory: Memory, rng: torch.Generator) -> Update:
        for layer in self.layers:
            update = check_update(layer.protect(update, memory, rng), like=update.delta, site=update.site)
        return update

    def release(self, mean: Update, cohort: int, rng: torch.Generator) -> Update:
        for layer in reversed(self.layers):
            mean = layer.release(mean, cohort, rng)
        return mean

    def _layers(self) -> tuple[Privacy, ...]:
        return self.layers

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.layers))


def check_update(update: object, *, like: Tensors, site: str) -> Update:
    """The update if it is safe to pass on.

    Args:
        update: what a technique returned or a site sent.
        like: tensors whose names and shapes it must have.
        site: who must have made it.

    Raises:
        PrivacyError: not an `Update`, of another site, other names or shapes, not floating point, NaN or infinite.
    """
    if not isinstance(update, Update):
        raise PrivacyError(f"expected an Update from {site}, got {type(update).__name__}; a technique's protect() "
                           "returns the update it was given, changed with update.map(...)")
    if update.site != site:
        raise PrivacyError(f"expected an update of {site}, got one that says it is of {update.site!r}")
    if update.delta.keys() != like.keys():
        odd = sorted(update.delta.keys() ^ like.keys())
        raise PrivacyError(f"the update of {site} has other tensors than the model: {odd[:3]}")
    for name, tensor in update.delta.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise PrivacyError(f"the update of {site} holds {name} as something other than a floating point tensor")
        if tensor.shape != like[name].shape:
            raise PrivacyError(f"the update of {site} has {name} of shape {tuple(tensor.shape)}, "
                               f"expected {tuple(like[name].shape)}")
        if not torch.isfinite(tensor).all():
            raise PrivacyError(f"the update of {site} has NaN or infinite values in {name}")
    if not (update.weight > 0 and update.weight < float("inf")):
        raise PrivacyError(f"the update of {site} has weight {update.weight}, expected a positive number")
    return update
