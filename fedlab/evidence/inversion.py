"""Gradient inversion: the reconstruction of a patch of a scan from the update that was computed from it.

J. Geiping, H. Bauermeister, H. Dröge, M. Moeller, Inverting Gradients: How easy is it to break privacy in federated
learning?, NeurIPS 2020, arXiv 2003.14053. An adversary who sees a site's update and knows the model looks for the image
whose gradient has the direction of the update. Here the case is the easiest for the adversary: one plain step on one
patch whose labels are known. A failure of this attack proves nothing; its success shows that the update is no secret.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call

from fedlab.core.global_generators import seeded
from fedlab.core.seeds import derive, generator
from fedlab.core.settings import check_positive, check_whole
from fedlab.core.types import Tensors, Update
from fedlab.core.weights import check_fit, trainable
from fedlab.training.trainer import DiceBCE

__all__ = ["Inversion", "invert_update", "one_step_update", "patch_net"]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Inversion:
    """The result of an attack."""

    image: torch.Tensor  # the reconstruction, float32, (4, X, Y, Z), in the units of a network's input
    distance: float  # 1 − cosine between the update and that of the reconstruction; 0 is a perfect match
    steps: int
    seconds: float  # wall time

    def correlation(self, truth: torch.Tensor) -> float:
        """Pearson correlation of the reconstruction with the patch of the update, over all channels and voxels.

        1 is the patch itself up to brightness and contrast; 0 is unrelated to it.

        Raises:
            ValueError: a patch of another shape, or one without any contrast.
        """
        if truth.shape != self.image.shape:
            raise ValueError(f"the truth has shape {tuple(truth.shape)}, the reconstruction "
                             f"{tuple(self.image.shape)}; give the patch of the update")
        pair = torch.stack([self.image.double().flatten(), truth.double().flatten()])
        if bool((pair.std(dim=1) == 0).any()):
            raise ValueError("the patch or its reconstruction has the same value everywhere, so there is no "
                             "correlation; take a patch with tissue in it")
        return float(torch.corrcoef(pair)[0, 1])

    def __repr__(self) -> str:
        grid = "x".join(map(str, self.image.shape[1:]))
        return (f"<Inversion of a {grid} patch: {self.steps} steps in {self.seconds:.1f} s, "
                f"distance {self.distance:.3f}>")


def patch_net(*, width: int = 16, seed: int = 0) -> nn.Module:
    """A small network for patches that is quick to attack: convolutions of 3³, 3³ and 1³, and a smooth activation.

    It maps images (B, 4, X, Y, Z) to logits (B, 3, X, Y, Z) by way of `width` channels.

    Raises:
        ValueError: `width` below 1.
    """
    check_whole(width=width)
    with seeded(derive(seed, "patch_net")):
        return nn.Sequential(nn.Conv3d(4, width, 3, padding=1), nn.Softplus(beta=4),
                             nn.Conv3d(width, width, 3, padding=1), nn.Softplus(beta=4), nn.Conv3d(width, 3, 1))


def one_step_update(model: nn.Module, image: torch.Tensor, regions: torch.Tensor, *, lr: float = 0.1,
                    loss: Loss | None = None, site: str = "site") -> Update:
    """The update of a site that takes one plain gradient step on one patch: −lr times the gradient.

    Args:
        model: does not change.
        image: (4, X, Y, Z).
        regions: (3, X, Y, Z), as of `labels_to_regions`.
        lr: learning rate.
        loss: of logits and regions; `DiceBCE()` by default.
        site: the sender.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    if image.dim() != 4 or regions.dim() != 4 or image.shape[1:] != regions.shape[1:]:
        raise ValueError(f"expected an image (4, X, Y, Z) and its regions (3, X, Y, Z), got {tuple(image.shape)} and "
                         f"{tuple(regions.shape)}")
    params = {name: p.detach() for name, p in trainable(model).items()}
    gradient = _gradient(model, params, image.float()[None], regions.float()[None], loss or DiceBCE(), keep=False)
    return Update(site=site, delta={name: -lr * g for name, g in zip(params, gradient, strict=True)}, weight=1.0,
                  steps=1)


def invert_update(
    delta: Tensors, *, model: nn.Module, regions: torch.Tensor, loss: Loss | None = None, steps: int = 250,
    lr: float = 0.1, smoothness: float = 1e-2, channels: int = 4, limit: float = 4.0, seed: int = 0,
    max_seconds: float = 60.0, on_step: Callable[[int, torch.Tensor], bool] | None = None,
) -> Inversion:
    """Reconstructs the patch that an update was computed from.

    Minimises 1 − cosine(update, update of the patch) + smoothness × total variation, with Adam on the signs of the
    gradient, from noise (Geiping et al. 2020, section 4). The cosine is independent of the update's length: clipping
    alone hides nothing.

    Args:
        delta: the update, with the names and shapes of the model's trainable tensors.
        model: with the weights that the update starts from; does not change.
        regions: of the patch, (3, X, Y, Z); known to the adversary.
        loss: of the site; `DiceBCE()` by default.
        steps: at most.
        lr: step of Adam, divided by ten at 3/8, 5/8 and 7/8 of the steps.
        smoothness: weight of the mean total variation.
        channels: of the patch.
        limit: values are clamped to ±limit; a z-scored scan has few beyond 4.
        seed: of the noise at the start.
        max_seconds: time after which the attack ends with its result so far.
        on_step: called with the number of steps taken and the patch so far (4, X, Y, Z); false ends the attack.

    Returns:
        The reconstruction, and how well it explains the update.

    Raises:
        ValueError: an update that is zero everywhere or does not fit the model, or a setting out of its range.
    """
    check_positive(steps=steps, lr=lr, limit=limit, max_seconds=max_seconds)
    _check_update(delta, model)
    started, loss = time.perf_counter(), loss or DiceBCE()
    params = {name: p.detach() for name, p in trainable(model).items()}
    seen = torch.cat([-delta[name].detach().float().flatten() for name in params])
    target = regions.float()[None]
    patch = torch.randn((1, channels, *regions.shape[1:]), generator=generator(seed, "inversion")).requires_grad_()
    optimiser = torch.optim.Adam([patch], lr=lr)
    falls = torch.optim.lr_scheduler.MultiStepLR(optimiser, [round(steps * k / 8) for k in (3, 5, 7)], gamma=0.1)
    taken, distance = 0, torch.tensor(1.0)
    while taken < steps and time.perf_counter() - started < max_seconds:
        gradient = _gradient(model, params, patch, target, loss, keep=True)
        distance = 1 - torch.cosine_similarity(torch.cat([g.flatten() for g in gradient]), seen, dim=0)
        patch.grad, = torch.autograd.grad(distance + smoothness * _variation(patch), [patch])
        patch.grad.sign_()
        optimiser.step()
        falls.step()
        patch.data.clamp_(-limit, limit)
        taken += 1
        if on_step is not None and on_step(taken, patch.detach()[0].clone()) is False:
            break
    return Inversion(image=patch.detach()[0].clone(), distance=float(distance.detach()), steps=taken,
                     seconds=time.perf_counter() - started)


def _gradient(model: nn.Module, params: Tensors, image: torch.Tensor, target: torch.Tensor, loss: Loss, *,
              keep: bool) -> Sequence[torch.Tensor]:
    """Of the loss with respect to the parameters, in their order; differentiable itself if `keep`."""
    weights = {name: p.clone().requires_grad_() for name, p in params.items()}
    value = loss(functional_call(model, weights, (image,)), target)
    gradient: Sequence[torch.Tensor] = torch.autograd.grad(value, list(weights.values()), create_graph=keep)
    return gradient


def _variation(patch: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of neighbouring voxels, summed over the three axes."""
    return torch.stack([patch.diff(dim=axis).abs().mean() for axis in (2, 3, 4)]).sum()


def _check_update(delta: Tensors, model: nn.Module) -> None:
    try:
        check_fit(trainable(model), delta)
    except ValueError as error:
        raise ValueError(f"the update does not fit the model; {error}") from error
    if not any(bool(t.any()) for t in delta.values()):
        raise ValueError("the update is zero everywhere, so it reveals nothing")
