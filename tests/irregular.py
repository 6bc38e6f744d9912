"""Irregular inputs, drawn by hypothesis: what tidy numbers hide, such as equal sites, cubic voxels or full batches.

One strategy each, for all tests. Names are out of alphabetical order, sizes are odd, voxels unequal, axes oblique.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from fedlab.core.types import Update

__all__ = ["affines", "epsilons", "groups", "masks", "names", "numbers", "rows", "shapes", "spacings", "tensors",
           "updates", "weights"]

#: Numbers that binary fractions do not hold.
ROUNDED = (0.1, 1 / 3, -0.7, 1e-7, 2.0**-24, 0.0)


def numbers(reach: float) -> st.SearchStrategy[float]:
    """Numbers up to `reach` in float32; many are rounded."""
    rounded = [float(np.float32(x)) for x in ROUNDED if abs(x) <= reach]
    return st.floats(-reach, reach, width=32) | st.sampled_from(rounded)


def rows(*, least: int, most: int, width: int, reach: float) -> st.SearchStrategy[list[list[float]]]:
    """Vectors of one length, one for each site."""
    return st.lists(st.lists(numbers(reach), min_size=width, max_size=width), min_size=least, max_size=most)


def tensors(*, reach: float = 1e4) -> st.SearchStrategy[list[list[float]]]:
    """Up to four vectors of different lengths, odd ones too, and one of a single number."""
    return st.lists(st.lists(numbers(reach), min_size=1, max_size=5), min_size=1, max_size=4)


def shapes() -> st.SearchStrategy[list[tuple[int, ...]]]:
    """Shapes of the tensors of a model: single numbers, primes, unequal sides."""
    return st.lists(st.sampled_from([(), (1,), (7,), (3, 5), (33,), (2, 3, 11)]), min_size=1, max_size=4)


def weights() -> st.SearchStrategy[float]:
    """Numbers of patients, or what a site claims; seldom equal."""
    return st.integers(1, 200).map(float) | st.floats(0.5, 200)


def epsilons() -> st.SearchStrategy[float]:
    """Privacy spent, from hardly any to none left; seldom equal at two sites."""
    return st.floats(1e-3, 50) | st.sampled_from([0.1, 1 / 3, 1.0])


@st.composite
def names(draw: st.DrawFn, count: int) -> list[str]:
    """Different names of sites; from two on, not in alphabetical order."""
    known = [f"{letter}-{number}" for number in (10, 9, 2) for letter in ("zeta", "Alpha", "mü", "beta")]
    found = list(draw(st.permutations(known))[:count])
    return found if count < 2 or found != sorted(found) else found[::-1]


@st.composite
def groups(draw: st.DrawFn, members: int) -> list[list[int]]:
    """All members in batches of different sizes, in any order; some batches are empty."""
    order = draw(st.permutations(range(members)))
    cuts = sorted(draw(st.lists(st.integers(0, members), max_size=4)))
    return [list(order[a:b]) for a, b in zip([0, *cuts], [*cuts, members], strict=True)]


def spacings() -> st.SearchStrategy[tuple[float, float, float]]:
    """Voxels whose three edges, in mm, all differ."""
    return st.permutations([0.4, 0.7, 1.0, 1.5, 2.3, 3.0, 5.5, 6.0]).map(lambda edges: tuple(edges[:3]))


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Voxel axes that are turned about two axes, may be mirrored and exchanged, with unequal edges and any corner."""
    first, second = (np.deg2rad(draw(st.floats(-40, 40))) for _ in range(2))
    about_z = np.array([[np.cos(first), -np.sin(first), 0], [np.sin(first), np.cos(first), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(second), -np.sin(second)], [0, np.sin(second), np.cos(second)]])
    signs = np.diag([draw(st.sampled_from([1.0, -1.0])) for _ in range(3)])
    order = np.eye(3)[list(draw(st.permutations(range(3))))]
    affine = np.eye(4)
    affine[:3, :3] = about_z @ about_x @ order @ signs @ np.diag(draw(spacings()))
    affine[:3, 3] = [draw(st.floats(-90, 90)) for _ in range(3)]
    return affine


@st.composite
def masks(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Two masks on one grid of three different, mostly odd sizes: boxes with holes, that may touch the border."""
    size = [draw(st.sampled_from(sides)) for sides in ((7, 9, 11), (5, 13), (6, 15))]
    rng = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    found = []
    for _ in range(2):
        mask = torch.zeros(size, dtype=torch.bool)
        ends = [sorted(draw(st.tuples(st.integers(0, side - 1), st.integers(0, side - 1)))) for side in size]
        mask[tuple(slice(low, high + 1) for low, high in ends)] = True
        found.append(mask & (torch.rand(size, generator=rng) > draw(st.sampled_from([0.0, 0.2, 0.6]))))
    return found[0], found[1]


@st.composite
def updates(draw: st.DrawFn, *, most: int = 6, reach: float = 1e3) -> list[Update]:
    """Updates of unequal sites: two tensors, a buffer of numbers and one of counts, weights and steps that differ."""
    sites = draw(st.integers(1, most))
    found = []
    for name in draw(names(sites)):
        tensor, single, buffer = (torch.tensor(draw(st.lists(numbers(reach), min_size=n, max_size=n)))
                                  for n in (3, 1, 2))
        found.append(Update(
            site=name, delta={"b": tensor, "a": single[0]}, weight=draw(weights()), steps=draw(st.integers(1, 9)),
            metrics={"loss": draw(st.floats(0, 5))},
            buffers={"mean": buffer, "count": torch.tensor([draw(st.integers(0, 99)), draw(st.integers(0, 9))])}))
    return found
