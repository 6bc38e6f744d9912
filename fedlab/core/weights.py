"""Weights and buffers by name: which of a model are trained, how they are put into it, and their hash."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import nn

from fedlab.core.changes import note_versions
from fedlab.core.types import Patient, Tensors

__all__ = ["check_fit", "load_weights", "patient_sha256", "trainable", "weights_sha256"]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes and updates carry, by name.

    Raises:
        ValueError: the model has none, or one of complex numbers.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in found.items():
        if not p.is_floating_point():
            raise ValueError(f"the parameter {name} is {p.dtype}; fedlab trains real floating point numbers only: keep "
                             "real and imaginary parts as two parameters (torch.view_as_complex joins them)")
    if not found:
        raise ValueError("the model has no trainable parameter: set requires_grad=True on the weights to train")
    return found


def load_weights(model: nn.Module, params: Tensors) -> None:
    """Copies tensors, such as those of `ServerState.model`, into trainable parameters and buffers of `model`.

    Raises:
        ValueError: names or shapes differ, or running statistics of batch or instance norm are left out.
    """
    own: dict[str, torch.Tensor] = {**trainable(model)}
    needed = {key for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)
              for key, _ in module.named_buffers(prefix=name, recurse=False)}
    own |= {name: b for name, b in model.named_buffers() if name in params or name in needed}
    if needed - params.keys() and own.keys() - needed <= params.keys():
        raise ValueError(f"the model's statistics are missing: {sorted(needed - params.keys())[:3]}; load "
                         "ServerState.model, which holds weights and buffers")
    check_fit(own, params)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(params[name])
    note_versions(model)


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
