"""A patient made by hand is checked when it is made: nothing is dropped or misread later."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedlab.core.errors import DataError
from fedlab.core.regions import labels_to_regions
from fedlab.core.types import Patient

IMAGE = torch.zeros(4, 4, 5, 6)
LABEL = torch.tensor([0, 1, 2, 4], dtype=torch.uint8).repeat(30).view(4, 5, 6)
PATIENT = Patient("P1", IMAGE, LABEL, np.eye(4))


@pytest.mark.parametrize(("change", "reason"), [
    ({"label": torch.where(LABEL == 4, 3, LABEL)}, "holds the values 3; expected 1 core, 2 oedema, 4 enhancing"),
    ({"label": torch.where(LABEL == 2, torch.tensor(255, dtype=torch.uint8), LABEL)}, "holds the values 255"),
    ({"label": LABEL.float()}, r"a uint8 tensor of shape \(4, 5, 6\), got torch.float32"),
    ({"label": LABEL.long()}, "got torch.int64"),
    ({"label": LABEL[None]}, r"got torch.uint8 of shape \(1, 4, 5, 6\)"),
    ({"label": labels_to_regions(LABEL)}, r"of shape \(3, 4, 5, 6\); regions become labels"),
    ({"label": LABEL[:-1]}, r"of shape \(3, 5, 6\)"),
    ({"label": LABEL.numpy()}, "label is a uint8 tensor"),
    ({"image": IMAGE[:3]}, r"shape \(4, X, Y, Z\) with FLAIR, T1, T1c, T2, got torch.float32 of shape \(3, 4, 5"),
    ({"image": IMAGE[0]}, r"of shape \(4, 5, 6\)"),
    ({"image": IMAGE.double()}, "float16 or float32 tensor"),
    ({"image": IMAGE.int()}, "got torch.int32"),
    ({"image": IMAGE.numpy()}, "float16 or float32 tensor"),
    ({"image": None}, "got NoneType"),
    ({"affine": np.ones((4, 4))}, "affine is an invertible array"),
    ({"affine": np.zeros((4, 4))}, "affine is an invertible array"),
    ({"affine": np.diag([1.0, np.nan, 1, 1])}, "finite values"),
    ({"affine": np.diag([1.0, np.inf, 1, 1])}, "finite values"),
    ({"affine": np.eye(3)}, r"shape \(4, 4\)"),
    ({"affine": None}, "got None"),
])
def test_what_is_no_patient_is_refused_by_name(change, reason):
    with pytest.raises(DataError, match=f"patient P1: .*{reason}"):
        replace(PATIENT, **change)


def test_sound_patients_are_taken_as_they_are():
    from monai.data import MetaTensor

    for image in (IMAGE, IMAGE.half(), MetaTensor(IMAGE)):
        for label in (LABEL, None, MetaTensor(LABEL), torch.zeros_like(LABEL)):
            assert Patient("P1", image, label, np.diag([-2.0, 1, 3, 1])).image is image
