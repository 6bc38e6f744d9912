"""The final weights of a submitted run, in a safetensors file that says of which network they are."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fedlab.core.errors import FedlabError, RunError
from fedlab.core.files import replacing
from fedlab.core.types import Tensors
from fedlab.core.weights import load_weights
from fedlab.deploy.messages import strict_json
from fedlab.deploy.objects import make
from fedlab.deploy.plan import Plan
from fedlab.deploy.policy import SitePolicy

__all__ = ["load_run_weights", "save_run_weights"]

_FORMAT = "fedlab-weights-1"


def save_run_weights(path: Path, params: Tensors, *, plan: Plan) -> None:
    """Writes weights with the description of their network in the header."""
    trainer: Any = plan.trainer
    header = {"format": _FORMAT, "model": json.dumps(trainer["with"]["model"], sort_keys=True)}
    with replacing(path) as scratch:
        save_file({name: t.detach().cpu().contiguous() for name, t in params.items()}, scratch, metadata=header)


def load_run_weights(path: Path) -> nn.Module | None:
    """The network of a file of `save_run_weights`, with its weights; None for any other file.

    Nothing from the file is executed: its network is one that a plan may name of fedlab, MONAI and torch.

    Raises:
        RunError: another network, or a damaged file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError):
        return None
    try:
        described = strict_json(header["model"].encode(), sender=str(path))
        model = make(described, approve=partial(SitePolicy().approve, techniques=path.parent))
        if not isinstance(model, nn.Module):
            raise TypeError(f"it describes a {type(model).__name__}")
        load_weights(model, tensors)
        return model
    except (FedlabError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} has no network of fedlab, MONAI or torch, or other weights than its network ({error}); "
                       "for a network from a file of yours, load the weights with safetensors in Python") from error
