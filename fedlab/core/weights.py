"""Weights by name: which of a model are trained, how they are put into it, and their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import nn

from fedlab.core.types import Patient, Tensors

__all__ = ["check_fit", "flatten", "load_weights", "matching", "patient_sha256", "trainable", "unflatten",
           "weights_sha256"]


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


def patient_sha256(patient: Patient) -> str:
    """SHA-256 over a patient's id, image, label and affine."""
    tensors = {"image": patient.image, "affine": torch.from_numpy(np.ascontiguousarray(patient.affine))}
    if patient.label is not None:
        tensors["label"] = patient.label
    return hashlib.sha256(f"{patient.id}|{weights_sha256(tensors)}".encode()).hexdigest()


def flatten(tensors: Tensors, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A copy of all values, shape (N,), in the order of the tensors."""
    return torch.cat([t.detach().flatten().to(dtype) for t in tensors.values()])


def unflatten(flat: torch.Tensor, like: Tensors) -> dict[str, torch.Tensor]:
    """The inverse of `flatten`: views of `flat` with the names and shapes of `like`."""
    pieces = flat.split([t.numel() for t in like.values()])
    return {name: piece.reshape(t.shape) for (name, t), piece in zip(like.items(), pieces, strict=True)}


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names that equal a pattern with "*" and "?", in their order.

    Raises:
        ValueError: a pattern matches no name.
    """
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no tensor of the model is called {pattern!r}; its tensors are {names[:4]} … "
                             f"{names[-2:]}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
