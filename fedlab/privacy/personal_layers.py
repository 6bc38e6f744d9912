"""Personal layers: tensors that each site trains for itself and never sends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from fedlab.core.errors import PrivacyError
from fedlab.core.kit import Kit
from fedlab.core.protocols import Run
from fedlab.core.settings import check_patterns
from fedlab.core.tensors import matching
from fedlab.core.types import Cohort, ServerState, Site, SiteState, Tensors, Update
from fedlab.core.weights import trainable
from fedlab.privacy.base import Privacy

__all__ = ["PersonalLayers", "norms", "norms_and_head"]


class PersonalLayers(Privacy):
    """Some tensors stay at each site, such as the norms or the head.

    Sharing all but the head is FedPer (Arivazhagan et al. 2019, arXiv 1912.00818), all but the norms FedBN (Li et al.
    2021, arXiv 2102.07623): `PersonalLayers(names=norms(model))`, which helps where scanners differ. Before training
    the site loads its own values of these tensors, afterwards it keeps them in its state; in the update they are 0,
    and the server moves them by 0 whatever noise is added, so the global model keeps its first values there. A site's
    own model is `local`; validate that one, since a part of the global model is untrained.

    No formal guarantee: the personal tensors cannot leak directly, but the shared tensors are trained together with
    them. It goes first in a `+`: techniques that clip, sparsify or train privately then see the shared tensors only.

    Args:
        names: names of tensors, or patterns of them with "*" and "?", such as ["*norm*", "conv_final.*"]; see
            `norms` and `norms_and_head`.

    Raises:
        ValueError: names is not a list of at least one name.
    """

    keeps_tensors = True

    def __init__(self, *, names: Sequence[str]) -> None:
        check_patterns(names=names)
        if not names:
            raise ValueError("names is a list of names or patterns of at least one tensor, got none")
        self.names = list(names)

    def local(self, params: Tensors, state: SiteState) -> Tensors:
        """The weights of one site's own model, and the buffers that `SiteTrainer(buffers="keep")` leaves there.

        Args:
            params: of the global model.
            state: of the site; before its first round it has no values of its own.
        """
        owned = {owner: slots for owner, slots in state.namespaces.items() if slots}
        buffers = owned.pop("buffers", {})
        return {**params, **next((slots for slots in owned.values() if all(map(self._personal, slots))), {}), **buffers}

    def check_order(self, *, before: Sequence[Privacy], after: Sequence[Privacy]) -> None:
        for other in before:
            if type(other).equip is not Privacy.equip:
                raise ValueError(f"put PersonalLayers before {other!r}, which wraps the model that the site's own "
                                 "values are loaded into")

    def check(self, run: Run) -> None:
        tensors = trainable(run.trainer.model)
        if len(matching(tensors, self.names)) == len(tensors):
            raise ValueError(f"{self.names} are all tensors of the model, so nothing would be shared; name fewer, or "
                             "see fedlab.run.baselines.local_only")
        shared = run.trainer.initial_buffers()
        for name, module in run.trainer.model.named_modules():
            own = any(self._personal(f"{name}.{key}") for key, _ in module.named_parameters(recurse=False))
            moves = [key for key, _ in module.named_buffers(recurse=False) if f"{name}.{key}" in shared
                     or (key == "running_mean" and run.trainer.buffers == "average")]
            if own and moves:
                raise ValueError(f"the weights of {name} stay at each site, but its running statistics are shared; say "
                                 "SiteTrainer(buffers='keep'), as FedBN does, or use group or instance norm")

    def equip(self, kit: Kit, site: Site, state: SiteState) -> Kit:
        own = {name: p for name, p in trainable(kit.model).items() if self._personal(name)}
        kept, close = state.own, kit.close
        if kept and {n: t.shape for n, t in kept.items()} != {n: p.shape for n, p in own.items()}:
            raise PrivacyError(f"the personal layers that {site.name} keeps, {sorted(kept)[:3]}, are not those of this "
                               "run; give it a new state")
        with torch.no_grad():
            for name, value in kept.items():
                own[name].copy_(value)

        def keep() -> None:
            kept.update({name: p.detach().cpu().clone() for name, p in own.items()})
            close()

        kit.close = keep
        return kit

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        damaged = [name for name, t in update.delta.items() if self._personal(name) and not torch.isfinite(t).all()]
        if damaged:
            raise PrivacyError(f"the personal layers of {update.site} have NaN or infinite values in {damaged[0]}")
        shared = sum(t.numel() * t.element_size() for name, t in update.delta.items() if not self._personal(name))
        return replace(update, delta=self._without(update.delta),
                       encoded=shared if update.encoded is None else update.encoded)

    def release(self, mean: Update, cohort: Cohort, state: ServerState, rng: torch.Generator) -> Update:
        return replace(mean, delta=self._without(mean.delta))

    def _personal(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.names)

    def _without(self, delta: Tensors) -> Tensors:
        return {name: torch.zeros_like(t) if self._personal(name) else t for name, t in delta.items()}


_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._NormBase)


def norms(model: nn.Module) -> list[str]:
    """Names of the trainable tensors of all normalisation layers, which FedBN keeps at a site.

    Raises:
        ValueError: the model has no normalisation layer with weights.
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, _NORMS)}
    found = [name for name in trainable(model) if name.rpartition(".")[0] in layers]
    if not found:
        raise ValueError(f"{type(model).__name__} has no normalisation layer with weights of its own; give its norms "
                         "affine=True, or name the personal tensors yourself")
    return found


def norms_and_head(model: nn.Module) -> list[str]:
    """Names of the trainable tensors of all normalisation layers and of the head.

    The head is the last convolution or linear layer that the model registers: correct for MONAI's SegResNet, UNet,
    BasicUNet and DynUNet without deep supervision. Check the last names.

    Raises:
        ValueError: the model has no convolution or linear layer.
    """
    heads = (nn.Linear, nn.modules.conv._ConvNd)
    last = [name for name, module in model.named_modules() if isinstance(module, heads)][-1:]
    if not last:
        raise ValueError(f"{type(model).__name__} has no convolution or linear layer to take for its head; name the "
                         "personal tensors yourself")
    chosen = {name for name, module in model.named_modules() if isinstance(module, _NORMS)} | {last[0]}
    return [name for name in trainable(model) if name.rpartition(".")[0] in chosen]
