"""Tiny sites and networks that tests train on in a moment."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fedlab.core.types import Patient, Site


def oblique(spacing_mm: tuple[float, float, float] = (1.5, 2.0, 3.0)) -> np.ndarray:
    """An affine of axes that are turned by 20 and 10 degrees, unequal voxel sizes, and a corner off the origin."""
    (c, s), (k, t) = ((np.cos(angle), np.sin(angle)) for angle in np.deg2rad([20.0, 10.0]))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ [[1, 0, 0], [0, k, -t], [0, t, k]] * spacing_mm
    affine[:3, 3] = -31.0, 17.0, 5.0
    return affine


#: Of voxels of 1.5 x 2 x 3 mm.
OBLIQUE = oblique()


def blob_patient(name: str, *, seed: int, shape: tuple[int, int, int] = (16, 16, 16)) -> Patient:
    """Noise with a bright nested block as tumour."""
    rng = torch.Generator().manual_seed(seed)
    image = torch.randn(4, *shape, generator=rng)
    label = torch.zeros(shape, dtype=torch.uint8)
    label[3:12, 3:12, 3:12] = 2
    label[5:10, 5:10, 5:10] = 1
    label[6:9, 6:9, 6:9] = 4
    image += label.float() * 0.8
    return Patient(name, image, label, oblique((1.5, 3.0, 6.0)))


def blob_sites(sizes: tuple[int, ...] = (3, 2)) -> list[Site]:
    """Sites of the given numbers of training patients, one held-out patient each."""
    return [
        Site(name=f"site-{k}", train=[blob_patient(f"s{k}p{i}", seed=100 * k + i) for i in range(size)],
             val=[blob_patient(f"s{k}held", seed=100 * k + 99)])
        for k, size in enumerate(sizes)
    ]


class TinyNet(nn.Module):
    """Two convolutions: a network small enough to train by hand."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Conv3d(4, 6, 3, padding=1)
            self.last = nn.Conv3d(6, 3, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(torch.relu(self.first(image)))
        return out


class Scaled(TinyNet):
    """TinyNet with a parameter of shape ()."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image) * self.scale


class BatchNet(TinyNet):
    """TinyNet with batch norm, whose statistics training moves, and a constant that it does not."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.norm = nn.BatchNorm3d(6)
        self.register_buffer("scale", torch.tensor(0.7))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(torch.relu(self.norm(self.first(image * self.scale))))
        return out
