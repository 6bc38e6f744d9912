"""The sum of clipped gradients on the grid of its noise, exact: what `secure_mode` takes instead of Opacus's sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fedlab.privacy.noise.continuous import standard_normal
from fedlab.privacy.noise.on_grid import GaussianGrid

__all__ = ["ExactSum", "add_normal"]


@dataclass(kw_only=True)
class ExactSum:
    """Whole numbers of steps, of which each patient moves those of a sum by no more than the noise covers.

    Every gradient is clipped and rounded towards zero on its own, before anything is added, so that the sums with and
    without a patient differ by exactly that patient's whole numbers.

    Args:
        noise_multiplier: standard deviation of the noise over the clipping norm.
        patients: in a sum at most.
        per_layer: clip each of the L tensors to clip / √L.

    Raises:
        ValueError: the noise is too little or too much to be drawn exactly.
    """

    noise_multiplier: float
    patients: int
    per_layer: bool = False
    _sums: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._grid(1.0)  # noise that cannot be drawn exactly is refused

    def add(self, gradients: Sequence[torch.Tensor], clip: float) -> None:
        """Clips and adds the gradients of some patients: one tensor per parameter, patients first."""
        grid = self._grid(clip)
        norms = torch.stack([g.double().reshape(len(g), -1).norm(dim=1) for g in gradients])
        bound = grid.inner(sum(g[0].numel() for g in gradients))
        norms, bound = (norms, bound / math.sqrt(len(norms))) if self.per_layer else (norms.norm(dim=0)[None], bound)
        factors = (bound / norms).clamp(max=1).expand(len(gradients), -1) / grid.step
        found = [(g.double() * f.view(-1, *[1] * (g.dim() - 1))).trunc_().sum(dim=0)
                 for g, f in zip(gradients, factors, strict=True)]
        self._sums = [a + b for a, b in zip(self._sums, found, strict=True)] if self._sums else found

    def release(self, parameters: Sequence[torch.Tensor], clip: float, expected: float) -> None:
        """Sets the gradients to the sum with its noise over the expected number; the next sum begins at zero."""
        grid, sums = self._grid(clip), self._sums or [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        self._sums = []
        noised = grid.noised({str(k): total * grid.step for k, total in enumerate(sums)})
        for p, total in zip(parameters, noised.values(), strict=True):
            p.grad = (total / expected).to(p.dtype)

    def _grid(self, clip: float) -> GaussianGrid:
        return GaussianGrid(reach=clip, std=self.noise_multiplier * clip, terms=self.patients)


def add_normal(parameters: Sequence[torch.Tensor], std: float, rng: torch.Generator) -> None:
    """Adds Gaussian noise to the gradients, drawn on the CPU from a stream of 256 bits, wherever they are."""
    for p in parameters:
        noise = std * standard_normal(p.shape, rng)
        p.grad = noise.to(p) if p.grad is None else p.grad + noise.to(p)
