"""The tumour inside the translucent brain as a plain picture: no OpenGL, no mesh, a fraction of a second.

Every voxel column along the line of sight is looked at once: where it first enters a body, and how that body's surface
is turned to the light. Orthographic, from the front, the patient's right and above.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
from matplotlib.colors import to_rgb

if TYPE_CHECKING:
    from fedlab.view.presentation import Look
    from fedlab.view.volumes import Case

__all__ = ["rendered"]

Grey: TypeAlias = npt.NDArray[np.float32]

_PIXELS = 96
_TURN, _TILT = np.deg2rad(35.0), np.deg2rad(22.0)  # from the front towards the patient's right, and up
_LIGHT = np.array([-0.4, 0.55, 0.75])  # right, up and towards the eye in the picture


def rendered(case: Case, look: Look, layers: Mapping[str | None, npt.NDArray[np.uint8] | None],
             colours: Mapping[int, tuple[str, float]]) -> dict[str | None, Grey]:
    """A picture of each layer inside the brain, shape (pixels, pixels, 3), from 0 to 1.

    Args:
        case: whose brain.
        look: its opacity applies to the overlay.
        layers: name -> values in the box, None for the brain alone.
        colours: value -> colour; what isn't in it isn't drawn.
    """
    places, outside = _places(case)
    brain = case.grey(look.modality) > 0
    skin, rim = _shaded(_smoothed(_turned(brain.view(np.uint8), places, outside) > 0))
    pictures: dict[str | None, Grey] = {}
    for name, values in layers.items():
        image = np.zeros((_PIXELS, _PIXELS, 3), dtype=np.float32)
        turned = np.zeros((_PIXELS,) * 3, dtype=np.uint8) if values is None else _turned(values, places, outside)
        # From the inside to the outside: the core shows through what enhances, both through the oedema and the brain.
        for value in (value for value in (1, 4, 2, 3) if value in colours):
            body = turned == value
            if body.any():
                light, _ = _shaded(_smoothed(body))
                colour, opacity = colours[value]
                cover = (light > 0) * opacity * (1.0 if value == 1 else 0.8 if value == 4 else 0.5)
                lit = np.asarray(to_rgb(colour), dtype=np.float32) * light[..., None]
                image = image * (1 - cover[..., None]) + lit * cover[..., None]
        glass = np.where(skin > 0, 0.2 + 0.55 * rim, 0)[..., None]
        pictures[name] = np.clip(image * (1 - 0.5 * glass) + 0.9 * glass * skin[..., None], 0, 1).astype(np.float32)
    return pictures


def _places(case: Case) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Which voxel of the box lies at each (row, column, depth) of the picture, and where there is none."""
    spacing, shape = np.asarray(case.patient.spacing_mm), np.asarray(case.shape)
    step = float(np.linalg.norm(shape * spacing)) * 0.74 / _PIXELS
    sin, cos = np.sin(_TURN), np.cos(_TURN)
    away = np.array([-sin * np.cos(_TILT), -cos * np.cos(_TILT), -np.sin(_TILT)])  # from the eye into the head
    right = np.array([-cos, sin, 0.0])  # of the picture: seen from the front, the patient's left lies there
    down = np.cross(away, right)
    matrix = np.stack([down, right, away], axis=1) * step / spacing[:, None]
    pixel = np.arange(_PIXELS) - (_PIXELS - 1) / 2
    flat, outside = np.zeros((_PIXELS,) * 3, dtype=np.intp), np.zeros((_PIXELS,) * 3, dtype=np.bool_)
    for axis in range(3):
        rows, columns, depths = (pixel * part for part in matrix[axis])
        place = np.rint(rows[:, None, None] + columns[None, :, None] + depths + (shape[axis] - 1) / 2).astype(np.intp)
        outside |= (place < 0) | (place >= shape[axis])
        flat = flat * shape[axis] + np.clip(place, 0, shape[axis] - 1)
    return flat, outside


def _turned(values: npt.NDArray[np.uint8], places: npt.NDArray[np.intp],
            outside: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    turned = values.ravel()[places]
    turned[outside] = 0
    return turned


def _smoothed(body: npt.NDArray[np.bool_]) -> Grey:
    from scipy.ndimage import uniform_filter

    return np.asarray(uniform_filter(body.astype(np.float32), 3), dtype=np.float32)


def _shaded(body: Grey) -> tuple[Grey, Grey]:
    """How bright each pixel's surface is, 0 where there is none, and how far it is turned away from the eye."""
    inside = body > 0.4
    hit = inside.any(axis=2)
    surface = np.stack([*np.indices(hit.shape), np.where(hit, inside.argmax(axis=2), 0)])
    normal = []
    for axis in range(3):
        step = np.zeros((3, 1, 1), dtype=np.intp)
        step[axis] = 2
        (x, y, z), (i, j, k) = np.maximum(surface - step, 0), np.minimum(surface + step, _PIXELS - 1)
        normal.append(np.subtract(body[x, y, z], body[i, j, k]))
    down, right, away = normal
    outward = np.stack([right, -down, -away], axis=2)
    outward /= np.maximum(np.linalg.norm(outward, axis=2, keepdims=True), 1e-6)
    light = 0.35 + 0.65 * np.clip(outward @ (_LIGHT / np.linalg.norm(_LIGHT)), 0, 1)
    return (light * hit).astype(np.float32), ((1 - np.clip(outward[..., 2], 0, 1)) ** 2 * hit).astype(np.float32)
