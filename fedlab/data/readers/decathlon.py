"""Folders of the Medical Segmentation Decathlon: 4-D volumes described by dataset.json (Antonelli et al. 2022)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlab.core.errors import DataError
from fedlab.core.types import MODALITIES
from fedlab.data.readers.findings import Finding
from fedlab.data.readers.patient_files import Listing, PatientFiles, is_nifti, is_valid_id, stem

__all__ = ["list_msd", "looks_like_msd"]

_MAX_BYTES = 2**26
_FOLDERS = ("imagesTr", "imagesTs")
_NAMES = {"FLAIR": r"flair|t2.?f", "T1c": r"t1.?(c|ce|gd|post)", "T1": r"t1.?(w|n)?", "T2": r"t2.?w?"}


def looks_like_msd(folder: Path) -> bool:
    """Whether a folder has the layout of the Decathlon: imagesTr or imagesTs, and dataset.json."""
    return (folder / "dataset.json").is_file() and any((folder / name).is_dir() for name in _FOLDERS)


def list_msd(folder: Path) -> Listing:
    """The patients that dataset.json lists, training cases with their labels and test cases without.

    Raises:
        DataError: dataset.json is missing or invalid, or does not assign the volumes to the modalities.
    """
    path = folder / "dataset.json"
    described = _read(path)
    channels = _channels(described, path)
    files: dict[str, PatientFiles] = {}
    findings: list[Finding] = []
    for number, entry in enumerate([*_entries(described, "training"), *_entries(described, "test")]):
        image, label = (entry.get(key) for key in ("image", "label"))
        patient = stem(Path(image)) if isinstance(image, str) else ""
        if not isinstance(image, str) or not is_valid_id(patient):
            findings.append(Finding(f"entry {number}", "unusable",
                                    f"the image in dataset.json is not a file name: {str(image)[:80]!r}"))
        elif patient in files:
            findings.append(Finding(patient, "two-folders", "dataset.json lists it twice"))
        else:
            files[patient], problems = _files(folder, patient, image, label, channels)
            findings += problems
    findings += _unlisted(folder, files)
    if not files:
        raise DataError(f"{path} lists no patient under 'training' or 'test'")
    order = ", ".join(sorted(channels, key=lambda name: channels[name]))
    return Listing(folder=folder, layout="msd", files=dict(sorted(files.items())), findings=tuple(findings),
                   reason=f"dataset.json lists {len(files)} 4-D volumes in the order {order}",
                   described=_labels(described))


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path}: {path.stat().st_size:,} bytes are too many for a dataset.json")
        described = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; only it assigns the volumes of a 4-D file to the modalities") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({type(error).__name__}: {str(error)[:200]})") from error
    if not isinstance(described, dict):
        raise DataError(f"{path}: expected an object with modality, labels and training; got "
                        f"{type(described).__name__}")
    return described


def _channels(described: Mapping[str, Any], path: Path) -> dict[str, int]:
    modality = described.get("modality", described.get("channel_names"))
    if not isinstance(modality, dict) or not all(str(key).isdecimal() and len(str(key)) < 4 for key in modality):
        raise DataError(f"{path}: expected 'modality' such as {{\"0\": \"FLAIR\", \"1\": \"T1w\", ...}}, got "
                        f"{str(modality)[:200]}")
    channels: dict[str, int] = {}
    for key, text in modality.items():
        name = next((name for name, words in _NAMES.items() if re.fullmatch(words, str(text).strip().lower())), None)
        if name in channels:
            raise DataError(f"{path}: two volumes are named {name}: {str(modality)[:200]}")
        if name is not None:
            channels[name] = int(key)
    if missing := [name for name in MODALITIES if name not in channels]:
        raise DataError(f"{path}: no {' and no '.join(missing)} among the modalities {str(modality)[:200]}")
    return channels


def _labels(described: Mapping[str, Any]) -> dict[int, str] | None:
    labels = described.get("labels")
    if not isinstance(labels, dict) or not labels:
        return None
    if all(isinstance(value, int) for value in labels.values()):  # nnU-Net maps names to values
        labels = {value: name for name, value in labels.items()}
    try:
        return {int(value): str(name)[:80] for value, name in labels.items()}
    except (TypeError, ValueError):
        return None


def _entries(described: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    listed = described.get(key, [])
    if not isinstance(listed, list):
        raise DataError(f"dataset.json: expected a list under {key!r}, got {type(listed).__name__}")
    return [entry if isinstance(entry, dict) else {"image": entry} for entry in listed]


def _files(folder: Path, patient: str, image: str, label: Any,
           channels: Mapping[str, int]) -> tuple[PatientFiles, list[Finding]]:
    findings: list[Finding] = []
    paths: dict[str, Path] = {}
    for kind, text in (("image", image), ("label", label)):
        if text is None:
            continue
        if not isinstance(text, str) or _is_outside(text):
            findings.append(Finding(patient, "outside", f"dataset.json gives the {kind} {str(text)[:80]!r}; expected "
                                    f"a path below the data set's folder"))
        elif stem(Path(text)) != patient:
            findings.append(Finding(patient, "foreign-file", f"its {kind} {Path(text).name} carries another patient's "
                                    f"id"))
        elif not os.path.isfile(folder / text):
            message = f"dataset.json names the {kind} {text}, which is missing"
            findings.append(Finding(patient, "missing-modality", message) if kind == "image" else
                            Finding(patient, "no-label", message, "warning"))
        else:
            paths[kind] = folder / text
    images = dict.fromkeys(MODALITIES, paths["image"]) if "image" in paths else {}
    return PatientFiles(id=patient, images=images, label=paths.get("label"), layout="msd", channels=channels), findings


def _is_outside(text: str) -> bool:
    parts = text.replace("\\", "/").split("/")
    return "\0" in text or text.startswith(("/", "\\")) or ".." in parts or ":" in parts[0]


def _unlisted(folder: Path, files: Mapping[str, PatientFiles]) -> list[Finding]:
    return [Finding(stem(path), "not-in-table", f"dataset.json does not list {name}/{path.name}; ignored", "warning")
            for name in _FOLDERS if (folder / name).is_dir()
            for path in sorted((folder / name).iterdir()) if is_nifti(path) and stem(path) not in files]
