"""The check of a patient's values, made when a `fedlab.core.types.Patient` is made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedlab.core.errors import DataError

__all__ = ["check_patient"]


def check_patient(patient: str, image: object, label: object, affine: object, modalities: Sequence[str]) -> None:
    """Refuses a type, shape or label value that no patient has, and an affine that cannot be inverted.

    Raises:
        DataError: with the patient's id, what was expected and what was given.
    """
    if not isinstance(image, torch.Tensor) or image.dtype not in (torch.float16, torch.float32) \
            or image.ndim != 4 or len(image) != len(modalities):
        raise DataError(f"patient {patient}: image is a float16 or float32 tensor of shape ({len(modalities)}, X, Y, "
                        f"Z) with {', '.join(modalities)}, got {_form(image)}")
    if label is not None:
        if not isinstance(label, torch.Tensor) or label.dtype != torch.uint8 or label.shape != image.shape[1:]:
            raise DataError(f"patient {patient}: label is a uint8 tensor of shape {tuple(image.shape[1:])}, got "
                            f"{_form(label)}; regions become labels with fedlab.core.regions_to_labels")
        if wrong := set(label.flatten().bincount().nonzero().flatten().tolist()) - {0, 1, 2, 4}:
            raise DataError(f"patient {patient}: label holds the values {', '.join(map(str, sorted(wrong)))}; expected "
                            f"1 core, 2 oedema, 4 enhancing; fedlab.data.readers.conventions.to_internal translates "
                            f"other conventions")
    if not isinstance(affine, np.ndarray) or affine.shape != (4, 4) or affine.dtype.kind not in "fiu" \
            or not np.isfinite(affine).all() or np.linalg.cond(affine[:3, :3]) > 1e6:
        raise DataError(f"patient {patient}: affine is an invertible array of shape (4, 4) with finite values, got "
                        f"{affine!r}")


def _form(value: object) -> str:
    """Type and shape of an array, for the text of an error."""
    return f"{getattr(value, 'dtype', type(value).__name__)} of shape {tuple(getattr(value, 'shape', ()))}"
