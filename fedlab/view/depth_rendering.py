"""The tumour inside the translucent brain, rendered in a fraction of a second without OpenGL or meshes.

For each pixel the first voxel of a body along the line of sight is found, and shaded by the direction of the surface
there. Orthographic, seen from the front, from the patient's right and from above.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedlab.view.label_layers import Case
from fedlab.view.view_settings import ViewSettings

__all__ = ["rendered"]

Image: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]

_PIXELS = 96
_TURN, _TILT = np.deg2rad(35.0), np.deg2rad(22.0)  # from the front towards the patient's right, and up
_LIGHT = np.array([-0.4, 0.55, 0.75]) / np.linalg.norm([-0.4, 0.55, 0.75])  # right, up and towards the viewer
# Drawn from the inside out, with a factor of the opacity: the core shows through the enhancing tumour, both through
# the oedema. Label 3 occurs in error maps only.
_COVER = {1: 1.0, 4: 0.8, 2: 0.5, 3: 0.5}


def rendered(case: Case, settings: ViewSettings,
             layers: Mapping[str | None, Bytes | None]) -> dict[str | None, Bytes]:
    """One RGB image per layer, shape (pixels, pixels, 3): the layer inside the brain.

    Args:
        case: gives the brain.
        settings: gives modality, colours and opacity.
        layers: name -> values in the box, None for the brain alone.
    """
    from matplotlib.colors import to_rgb

    colours = settings.colours()
    skin, rim = _shaded(_rotated(case, case.grey(settings.modality) > 0).astype(bool))
    glass = np.where(skin > 0, 0.2 + 0.55 * rim, 0)[..., None]
    images: dict[str | None, Bytes] = {}
    for name, values in layers.items():
        image = np.zeros((_PIXELS, _PIXELS, 3), dtype=np.float32)
        rotated = np.zeros((_PIXELS,) * 3, dtype=np.uint8) if values is None else _rotated(case, values)
        for value in (value for value in _COVER if value in colours):
            light, _ = _shaded(np.equal(rotated, value))
            colour, opacity = colours[value]
            cover = ((light > 0) * opacity * _COVER[value])[..., None]
            image = image * (1 - cover) + np.asarray(to_rgb(colour)) * light[..., None] * cover
        image = np.clip(image * (1 - 0.5 * glass) + 0.9 * glass * skin[..., None], 0, 1)
        images[name] = np.rint(255 * image).astype(np.uint8)
    return images


def _rotated(case: Case, values: Bytes | npt.NDArray[np.bool_]) -> Bytes:
    """The values seen from the viewer, axes row, column and depth: the nearest voxel, 0 outside the box."""
    from scipy.ndimage import affine_transform

    spacing, shape = np.asarray(case.patient.spacing_mm), np.asarray(case.shape)
    step = float(np.linalg.norm(shape * spacing)) * 0.74 / _PIXELS
    sin, cos = np.sin(_TURN), np.cos(_TURN)
    away = np.array([-sin * np.cos(_TILT), -cos * np.cos(_TILT), -np.sin(_TILT)])  # from the viewer into the head
    right = np.array([-cos, sin, 0.0])  # in the picture: seen from the front, the patient's left is there
    matrix = np.stack([np.cross(away, right), right, away], axis=1) * step / spacing[:, None]
    offset = (shape - 1) / 2 - matrix @ np.full(3, (_PIXELS - 1) / 2)
    return np.asarray(affine_transform(values.view(np.uint8), matrix, offset, (_PIXELS,) * 3, order=0))


def _shaded(body: npt.NDArray[np.bool_]) -> tuple[Image, Image]:
    """Brightness of the surface at each pixel, 0 where there is none, and how far it turns away from the viewer."""
    from scipy.ndimage import uniform_filter

    smooth = uniform_filter(body.astype(np.float32), 3)
    inside = smooth > 0.4
    hit = inside.any(axis=2)
    surface = np.stack([*np.indices(hit.shape), np.where(hit, inside.argmax(axis=2), 0)])
    normal = []
    for axis in range(3):
        step = np.zeros((3, 1, 1), dtype=np.intp)
        step[axis] = 2
        before, after = np.maximum(surface - step, 0), np.minimum(surface + step, _PIXELS - 1)
        normal.append(smooth[tuple(before)] - smooth[tuple(after)])
    down, right, away = normal
    outward = np.stack([right, -down, -away], axis=2)
    outward /= np.maximum(np.linalg.norm(outward, axis=2, keepdims=True), 1e-6)
    light = 0.35 + 0.65 * np.clip(outward @ _LIGHT, 0, 1)
    return (light * hit).astype(np.float32), ((1 - np.clip(outward[..., 2], 0, 1)) ** 2 * hit).astype(np.float32)
