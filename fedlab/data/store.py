"""Prepared sites on disk, memory-mapped, so that several processes share one copy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedlab.core.errors import DataError
from fedlab.core.files import replacing
from fedlab.core.types import Patient, Site

__all__ = ["load_sites", "save_sites"]


def save_sites(sites: Sequence[Site], folder: Path) -> None:
    """Writes one safetensors file per site into `folder`; a file appears only once it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, site in enumerate(sites):
        tensors: dict[str, torch.Tensor] = {}
        for split, patients in (("train", site.train), ("val", site.val)):
            for patient in patients:
                key = f"{split}|{patient.id}|"
                tensors[key + "image"] = patient.image.contiguous()
                tensors[key + "affine"] = torch.from_numpy(np.ascontiguousarray(patient.affine, dtype=np.float64))
                if patient.label is not None:
                    tensors[key + "label"] = patient.label.contiguous()
        order = json.dumps({"train": [p.id for p in site.train], "val": [p.id for p in site.val],
                            "same": [sorted(person) for person in site.same], "remarks": list(site.remarks)})
        with replacing(folder / f"site-{index:03d}.safetensors") as scratch:
            save_file(tensors, scratch, metadata={"site": site.name, "order": order})


def load_sites(folder: Path) -> list[Site]:
    """The sites that `save_sites` wrote to `folder`, in the same order.

    Raises:
        DataError: the folder contains no prepared site, or a damaged one.
    """
    files = sorted(folder.glob("site-*.safetensors"))
    if not files:
        raise DataError(f"{folder} contains no prepared site")
    return [_load_site(file) for file in files]


def _load_site(path: Path) -> Site:
    try:
        with safe_open(path, framework="pt") as file:
            header, names = file.metadata(), set(file.keys())
            order = json.loads(header["order"])

            def read(split: str, patient: str) -> Patient:
                key = f"{split}|{patient}|"
                label = file.get_tensor(key + "label") if key + "label" in names else None
                return Patient(patient, file.get_tensor(key + "image"), label, file.get_tensor(key + "affine").numpy())

            return Site(name=header["site"], train=[read("train", p) for p in order["train"]],
                        val=[read("val", p) for p in order["val"]],
                        same=tuple(map(frozenset, order.get("same", ()))), remarks=tuple(order.get("remarks", ())))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it and prepare the data again") from error
