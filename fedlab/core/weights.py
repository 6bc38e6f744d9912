"""Weights by name: which of a model are trained, how they are put into it, and their hash."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from fedlab.core.types import Tensors

__all__ = ["check_fit", "load_weights", "trainable", "weights_sha256"]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes and updates carry, by name.

    Raises:
        ValueError: the model has none.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()}
    if not found:
        raise ValueError("the model has no trainable parameter: set requires_grad=True on the weights to train")
    return found


def load_weights(model: nn.Module, params: Tensors) -> None:
    """Copies `params` into the trainable parameters of `model`.

    Raises:
        ValueError: names or shapes differ.
    """
    own = trainable(model)
    check_fit(own, params)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(params[name])


def check_fit(own: Tensors, params: Tensors) -> None:
    """Raises `ValueError` where `params` differ from `own` in names or shapes."""
    if own.keys() != params.keys():
        missing, extra = sorted(own.keys() - params.keys()), sorted(params.keys() - own.keys())
        raise ValueError(f"weights do not fit the model: {len(missing)} missing {missing[:3]}, {len(extra)} unknown "
                         f"{extra[:3]}")
    for name, parameter in own.items():
        if parameter.shape != params[name].shape:
            raise ValueError(f"weights do not fit the model: {name} has shape {tuple(params[name].shape)}, "
                             f"the model expects {tuple(parameter.shape)}")


def weights_sha256(params: Tensors) -> str:
    """SHA-256 over names, shapes and bytes of the tensors, in order of their names."""
    digest = hashlib.sha256()
    for name in sorted(params):
        tensor = params[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
