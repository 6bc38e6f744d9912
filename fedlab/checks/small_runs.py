"""The small trainer and the sites of noise that checks run on, and comparisons bit by bit."""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlab.core.global_generators import seeded
from fedlab.core.types import Patient, Site
from fedlab.training.trainer import SiteTrainer

__all__ = ["lost_settings", "noise_site", "other_random_numbers", "plain_descent", "small_trainer"]


def plain_descent(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Plain SGD: the update of one step is −lr times its gradient."""
    return torch.optim.SGD(parameters, lr=lr)


def small_trainer(**settings: Any) -> SiteTrainer:
    """Plain SGD on whole patients, of a network of 23 weights unless another `model` is given."""
    with seeded(0):
        network = nn.Sequential(nn.Conv3d(4, 2, 1), nn.GroupNorm(1, 2), nn.ReLU(), nn.Conv3d(2, 3, 1))
    return SiteTrainer(**{"model": network, "optimiser": plain_descent, "batch_size": 1, "crop": (8, 8, 8),
                          "augment": None, "precision": "fp32", "device": "cpu", **settings})


def noise_site(number: int, patients: int, *, held_out: int = 0) -> Site:
    """A site whose patients are noise of 8³ voxels with a nested block as tumour."""
    made = []
    for k in range(patients + held_out):
        image = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(1000 * number + k))
        label = torch.zeros(8, 8, 8, dtype=torch.uint8)
        label[1:6, 1:6, 1:6], label[2:5, 2:5, 2:5], label[3, 3, 3] = 2, 1, 4
        made.append(Patient(f"s{number}p{k}", image + label.float(), label, np.eye(4)))
    return Site(f"site-{number}", made[:patients], made[patients:])


@contextmanager
def other_random_numbers(seed: int) -> Iterator[None]:
    """Other global random numbers, as if other code had run before; the old ones come back afterwards."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    for start in (torch.default_generator.manual_seed, np.random.seed, random.seed):
        start(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def lost_settings(part: object) -> list[str]:
    """The arguments of an object's constructor that cannot be read from it as attributes of their names."""
    return [name for name, parameter in inspect.signature(type(part).__init__).parameters.items()
            if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            and not hasattr(part, name)]
