"""Trainers of tiny networks, and the plain training that they are compared with."""

from __future__ import annotations

import torch

from cohorts import TinyNet
from fedlab.core.regions import labels_to_regions
from fedlab.training.trainer import SiteTrainer


def trainer(**changes: object) -> SiteTrainer:
    settings: dict[str, object] = dict(model=TinyNet(), lr=1e-2, steps=3, crop=(16, 16, 16), augment=None,
                                       precision="fp32")
    return SiteTrainer(**(settings | changes))  # type: ignore[arg-type]


def plain_sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr)


def batches(patients, order):
    """Whole volumes as crops: with the crop as large as the volume nothing is random but the order."""
    for pick in order:
        yield (torch.stack([patients[i].image.float() for i in pick]),
               torch.stack([labels_to_regions(patients[i].label) for i in pick]))
