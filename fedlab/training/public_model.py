"""Two networks trained on generated patients alone, for a first segmentation and as the start of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import nn

from fedlab.core.settings import check_choice
from fedlab.training.networks import load_model

__all__ = ["public_card", "public_file", "public_model"]

_FOLDER = Path(__file__).parent / "public"


def public_model(name: Literal["broad", "collection"] = "broad") -> nn.Module:
    """A SegResNet with weights that no patient's scan has touched; `public_card` says how it was trained and scored.

    Trainings that begin with it take it as their network: `SiteTrainer(model=public_model("collection"))`. It expects
    voxels of 3 mm; `predict` takes the mean over a scan and its mirror image.

    Args:
        name: "broad", trained on patients and scanners as different as the generator makes them, or "collection",
            trained as on a public collection: research scanners of 3 T and large enhancing tumours alone.

    Raises:
        ValueError: another name.

    Example:
        >>> trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=4)
    """
    return load_model(public_file(name))[0]


def public_card(name: Literal["broad", "collection"] = "broad") -> str:
    """The model card of a public model, in Markdown: its training, its scores and what it lacks."""
    return public_file(name).with_suffix(".md").read_text(encoding="utf-8")


def public_file(name: Literal["broad", "collection"] = "broad") -> Path:
    """The file of a public model, as `fedlab.training.load_model` reads it; raises `ValueError` for another name."""
    check_choice(("broad", "collection"), name=name)
    return _FOLDER / f"{name}.safetensors"
