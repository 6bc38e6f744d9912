"""The segmentation network, and models on disk."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fedlab.core.errors import RunError
from fedlab.core.files import replacing
from fedlab.core.global_generators import seeded
from fedlab.core.types import MODALITIES, REGIONS, Tensors
from fedlab.core.weights import check_fit, load_weights, trainable

__all__ = ["load_model", "save_model", "segresnet"]


def segresnet(*, filters: int = 8, dropout: float = 0.0, seed: int = 0, mirror: bool = False,
              window: int | None = None) -> nn.Module:
    """MONAI's SegResNet, the encoder-decoder of Myronenko 2018 without the VAE branch, as in Li et al. 2019.

    It maps images (B, 4, X, Y, Z) to logits (B, 3, X, Y, Z), one sigmoid channel per region of
    `fedlab.core.types.REGIONS`; X, Y and Z divide by 8. Group norm only, nothing in place in its activations.

    Args:
        filters: width of the first level; 8 has 1.2 million parameters, the paper's network has 32.
        dropout: probability of dropping a channel after the first convolution (the paper's 0.2).
        seed: of the initial weights.
        mirror: whether `predict` takes the mean over a scan and its mirror image where it is not told otherwise.
        window: voxels per axis of the windows that `predict` takes a scan in where it is not told otherwise, best those
            of the crops that the network is trained on: group norm makes what a layer sees depend on all of its input.

    Raises:
        ValueError: `filters` is not a positive multiple of 8 (group norm has 8 groups), or `window` not of 8.

    Example:
        >>> model = fl.segresnet(filters=8, seed=0)
        >>> f"{sum(weights.numel() for weights in model.parameters()):,}"
        '1,176,843'
    """
    if filters < 8 or filters % 8:
        raise ValueError(f"filters is a positive multiple of 8 (group norm has 8 groups), got {filters}")
    if window is not None and (not isinstance(window, int) or window < 8 or window % 8):
        raise ValueError(f"window is a positive multiple of 8 voxels, as X, Y and Z are, got {window}")
    from monai.networks.nets import SegResNet  # seconds to import

    with seeded(seed):
        model = SegResNet(
            spatial_dims=3, init_filters=filters, in_channels=len(MODALITIES), out_channels=len(REGIONS),
            dropout_prob=dropout or None, act=("RELU", {"inplace": False}),
        )
    # Tumour is rare, so every voxel begins with a probability near 0.1 (Lin et al. 2017, section 4.1).
    nn.init.constant_(model.conv_final[2].conv.bias, -2.0)
    settings = {"filters": filters, "dropout": dropout, "seed": seed} | (
        {"mirror": True} if mirror else {}) | ({"window": window} if window else {})
    model.__dict__["settings"] = settings
    model.__dict__["_built"] = (segresnet, settings)  # see fedlab.deploy.objects.built
    return model


def save_model(path: Path | str, model: nn.Module, *, spacing_mm: float, params: Tensors | None = None) -> Path:
    """Writes a SegResNet made by `segresnet` as safetensors, with the settings to make it again.

    Args:
        path: a file that does not exist yet; missing folders are made.
        model: gives the settings and, without `params`, the weights.
        spacing_mm: voxel size the model was trained at.
        params: weights to save in place of the model's own.

    Raises:
        RunError: the file exists.
        ValueError: the model was not made by `segresnet`, or `params` are not of such a model.
    """
    path = Path(path)
    settings = getattr(model, "settings", None)
    if not isinstance(settings, dict):
        raise ValueError("only models made by fedlab.segresnet can be saved with their settings; "
                         "save other models with safetensors.torch.save_model")
    if path.exists():
        raise RunError(f"{path} exists and is not overwritten; choose another name")
    params = trainable(model) if params is None else params
    check_fit(trainable(model), params)
    tensors = {name: p.detach().cpu().contiguous() for name, p in params.items()}
    header = {"format": "fedlab-model-1", "segresnet": json.dumps(settings), "spacing_mm": repr(spacing_mm),
              "modalities": ",".join(MODALITIES), "regions": ",".join(REGIONS)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        save_file(tensors, scratch, metadata=header)
    return path


def load_model(path: Path | str) -> tuple[nn.Module, float]:
    """Reads a model written by `save_model`, without executing anything from the file.

    Returns:
        The network with its weights, and the voxel size in mm it was trained at.

    Raises:
        RunError: missing, damaged or not a fedlab model.
    """
    path = Path(path)
    if not path.is_file():
        raise RunError(f"there is no model file {path}; a run writes one as model.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise RunError(f"{path} is not a readable safetensors file ({error}); fedlab loads no other format") from error
    if header.get("format") != "fedlab-model-1":
        raise RunError(f"{path} was not written by fedlab (its header says format={header.get('format')!r}, "
                       "expected 'fedlab-model-1')")
    if header.get("modalities") != ",".join(MODALITIES) or header.get("regions") != ",".join(REGIONS):
        raise RunError(f"{path} expects channels {header.get('modalities')} and gives {header.get('regions')}; "
                       f"this fedlab uses {','.join(MODALITIES)} and {','.join(REGIONS)}")
    try:
        model = segresnet(**json.loads(header["segresnet"]))
        load_weights(model, tensors)
        return model, float(header["spacing_mm"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged: its settings and its weights do not make a model ({error})") from error
