"""Conversion of label maps to the overlapping regions TC, WT and ET, and back."""

from __future__ import annotations

import torch

from fedlab.core.types import REGIONS

__all__ = ["REGION_ORDER", "labels_to_regions", "regions_to_labels"]

#: The order of regions in tables, figures and files, the largest first. Channels have that of `REGIONS`.
REGION_ORDER = ("WT", "TC", "ET")


def labels_to_regions(label: torch.Tensor) -> torch.Tensor:
    """BraTS labels (1 core, 2 oedema, 4 enhancing), shape (..., X, Y, Z), as float regions (..., 3, X, Y, Z).

    The regions overlap and have the order of `fedlab.core.types.REGIONS`: TC = 1 or 4, WT = 1, 2 or 4, ET = 4
    (Menze et al. 2015).
    """
    enhancing = label == 4
    core = enhancing | (label == 1)
    return torch.stack((core, core | (label == 2), enhancing), dim=-4).float()


def regions_to_labels(regions: torch.Tensor) -> torch.Tensor:
    """The inverse of `labels_to_regions`: bool or 0/1 regions (3, X, Y, Z) as a uint8 label map (X, Y, Z).

    If predicted regions contradict each other, the innermost takes precedence: enhancing over core over whole tumour.
    """
    tc, wt, et = (regions[REGIONS.index(name)].bool() for name in ("TC", "WT", "ET"))
    label = torch.zeros(regions.shape[1:], dtype=torch.uint8)
    label[wt] = 2
    label[tc] = 1
    label[et] = 4
    return label
