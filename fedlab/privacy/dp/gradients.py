"""One gradient per patient, computed in four ways that agree: what DP-SGD clips."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from fedlab.core.kit import Kit
from fedlab.core.muted_warnings import muted
from fedlab.core.settings import check_choice
from fedlab.core.weights import trainable

__all__ = ["MODES", "Gradients", "PatientGradients", "per_patient"]

Gradients = Literal["backward", "hooks", "functorch", "ew"]
#: How gradients of single patients can be computed; see `per_patient`.
MODES: tuple[Gradients, ...] = ("backward", "hooks", "functorch", "ew")


class PatientGradients(NamedTuple):
    """Gradients of some patients of a step, float32."""

    loss: float  # mean over these patients
    gradients: list[torch.Tensor]  # (patients, *shape of the parameter) per parameter, in the model's order


def per_patient(kit: Kit, image: torch.Tensor, target: torch.Tensor, how: Gradients) -> Iterator[PatientGradients]:
    """The gradient of each patient's loss, the mean over the patient's crops, always float32.

    "backward" yields one patient at a time, so a step holds the activations and the gradient of one patient; the
    others yield all at once. Gradients are not left on the parameters.

    Args:
        kit: model, loss and precision.
        image: (patients, crops, 4, x, y, z).
        target: (patients, crops, 3, x, y, z).
        how: "backward": a forward and a backward pass per patient, for any network and precision. A patient's gradient
            does not depend on the other patients, not even in its rounding.
            "hooks": Opacus's hooks on layers, in one pass over all patients (Yousefpour et al. 2021).
            "functorch": the whole network under `torch.func.vmap`, without hooks.
            "ew": PyTorch's ExpandedWeights, float32 only.

    Raises:
        FloatingPointError: a loss is NaN or infinite.
        ValueError: `how` is not one of `MODES`.
    """
    check_choice(MODES, gradients=how)
    if how == "backward":
        for one_image, one_target in zip(image, target, strict=True):
            yield _backward(kit, one_image, one_target)
    elif len(image):
        yield {"hooks": _hooks, "functorch": _functorch, "ew": _expanded_weights}[how](kit, image, target)


def _backward(kit: Kit, image: torch.Tensor, target: torch.Tensor) -> PatientGradients:
    parameters = list(trainable(kit.model).values())
    loss = kit.loss(image, target)
    value = _finite(loss)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return PatientGradients(value, [
        torch.zeros_like(p)[None] if g is None else g.float()[None] for p, g in zip(parameters, found, strict=True)])


def _hooks(kit: Kit, image: torch.Tensor, target: torch.Tensor) -> PatientGradients:
    from opacus.grad_sample import GradSampleHooks  # seconds to import

    hooks = GradSampleHooks(kit.model, loss_reduction="mean")
    try:
        with muted("Full backward hook is firing"):  # the first layer's input needs no gradient
            return _collected(kit, kit, image, target)
    finally:
        hooks.cleanup()
        for module in kit.model.modules():  # left behind if a pass failed half-way
            for left in ("activations", "max_batch_len"):
                module.__dict__.pop(left, None)


def _expanded_weights(kit: Kit, image: torch.Tensor, target: torch.Tensor) -> PatientGradients:
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    expanded: Any = call_for_per_sample_grads(kit.model, batch_size=len(image) * image.shape[1], loss_reduction="mean")
    return _collected(kit, replace(kit, model=expanded), image, target)


def _collected(kit: Kit, calling: Kit, image: torch.Tensor, target: torch.Tensor) -> PatientGradients:
    """One pass over all crops of all patients that leaves the gradient of each crop in `grad_sample`."""
    parameters = list(trainable(kit.model).values())
    try:
        loss = calling.loss(image.flatten(0, 1), target.flatten(0, 1))
        value = _finite(loss)
        loss.backward()
        crops = [_of_crops(p, len(image) * image.shape[1]) for p in parameters]
    finally:
        for p in parameters:
            p.grad = None
            p.__dict__.pop("grad_sample", None)
    # Half precision would round norms by 0.4 %, by which clipping would exceed its bound.
    return PatientGradients(value, [g.float().unflatten(0, image.shape[:2]).mean(dim=1) for g in crops])


def _of_crops(parameter: torch.nn.Parameter, crops: int) -> torch.Tensor:
    found = getattr(parameter, "grad_sample", None)
    if isinstance(found, torch.Tensor) and found.shape == (crops, *parameter.shape):
        return found
    if found is None and parameter.grad is None:  # the loss doesn't depend on it
        return parameter.new_zeros((crops, *parameter.shape))
    raise RuntimeError(f"a parameter of shape {tuple(parameter.shape)} got no gradient per patient; "
                       "say gradients='backward'")


def _functorch(kit: Kit, image: torch.Tensor, target: torch.Tensor) -> PatientGradients:
    parameters = {name: p.detach() for name, p in trainable(kit.model).items()}

    def loss_of(parameters: dict[str, torch.Tensor], image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        model: Any = partial(torch.func.functional_call, kit.model, parameters)
        loss: torch.Tensor = replace(kit, model=model).loss(image, target)
        return loss

    each = torch.func.vmap(torch.func.grad_and_value(loss_of), in_dims=(None, 0, 0), randomness="different")
    found, losses = each(parameters, image, target)
    return PatientGradients(_finite(losses.mean()), [found[name].float() for name in parameters])


def _finite(loss: torch.Tensor) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss of a patient is {value}; lower the learning rate or look for damaged scans")
    return value
