"""Folders with dataset.json: the Medical Segmentation Decathlon and the raw data of nnU-Net.

The Decathlon keeps the modalities of a patient in one 4-D file that dataset.json lists (Antonelli et al. 2022). nnU-Net
keeps one file per modality, named by its channel: imagesTr/CASE_0000.nii.gz, _0001, ... (Isensee et al. 2021).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlab.core.errors import DataError
from fedlab.core.text import counted
from fedlab.core.types import MODALITIES
from fedlab.data.readers.findings import Finding, Severity
from fedlab.data.readers.patient_files import Listing, PatientFiles, is_nifti, is_valid_id, stem

__all__ = ["list_msd", "looks_like_msd"]

_MAX_BYTES = 2**26
_FOLDERS = ("imagesTr", "imagesTs")
_NAMES = {"FLAIR": r"flair|t2.?f", "T1c": r"t1.?(c|ce|gd|post)", "T1": r"t1.?(w|n)?", "T2": r"t2.?w?"}
_CHANNEL = re.compile(r"(?P<id>.+)_(?P<channel>\d{4})")
#: Words in the name of a region of nnU-Net -> what is in this region but in no smaller one.
_REGIONS = ((r"whole|\bwt\b", "oedema"), (r"core|\btc\b", "non-enhancing core"), (r"enhanc|\bet\b", "enhancing tumour"))


def looks_like_msd(folder: Path) -> bool:
    """Whether a folder has imagesTr or imagesTs."""
    return any((folder / name).is_dir() for name in _FOLDERS)


def list_msd(folder: Path) -> Listing:
    """The patients of a folder with dataset.json, training cases with their labels and test cases without.

    Raises:
        DataError: dataset.json is missing or invalid, or does not assign the volumes to the modalities.
    """
    path = folder / "dataset.json"
    described = _read(path)
    channels = _channels(described, path)
    order = ", ".join(sorted(channels, key=lambda name: channels[name]))
    entries = [*_entries(described, "training"), *_entries(described, "test")]
    scans = {name: _scans(folder / name) for name in _FOLDERS}
    listed = {Path(str(entry.get("image"))).name for entry in entries}
    stored = [scan for found in scans.values() for scan in found]
    layout = "nnunet" if any(_CHANNEL.fullmatch(stem(scan)) for scan in stored) \
        and listed.isdisjoint(scan.name for scan in stored) else "msd"
    files: dict[str, PatientFiles] = {}
    if layout == "nnunet":
        findings = _by_channel(folder, scans, channels, files)
        reason = f"dataset.json, and one file per modality for {counted(len(files), 'patient')} in the order {order}"
    else:
        findings = _by_entry(folder, entries, channels, files)
        findings += [Finding(stem(scan), "not-in-table", f"dataset.json does not list {name}/{scan.name}; ignored",
                             "warning") for name in _FOLDERS for scan in scans[name] if stem(scan) not in files]
        reason = f"dataset.json lists {len(files)} 4-D volumes in the order {order}"
    if not files:
        raise DataError(f"{path} lists no patient under 'training' or 'test', and no file of imagesTr or imagesTs is "
                        f"named CASE_0000.nii.gz")
    return Listing(folder=folder, layout=layout, files=dict(sorted(files.items())), findings=tuple(findings),
                   reason=reason, described=_labels(described))


def _scans(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if is_nifti(path)) if folder.is_dir() else []


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path}: {path.stat().st_size:,} bytes are too many for a dataset.json")
        described = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; only it assigns volumes or channels to the modalities") from error
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
    """The meaning of each value; None if it is not described."""
    labels = described.get("labels")
    if not isinstance(labels, dict) or not labels:
        return None
    try:
        if any(isinstance(values, list) for values in labels.values()):  # regions of nnU-Net, which overlap
            regions = {name: {int(value) for value in (values if isinstance(values, list) else [values])}
                       for name, values in labels.items()}
            inner = {value: min((name for name in regions if value in regions[name]), key=lambda n: len(regions[n]))
                     for value in set().union(*regions.values())}
            return {value: next((part for words, part in _REGIONS if re.search(words, name.lower())), name[:80])
                    for value, name in inner.items()}
        if all(isinstance(value, int) for value in labels.values()):  # nnU-Net maps names to values
            labels = {value: name for name, value in labels.items()}
        return {int(value): str(name)[:80] for value, name in labels.items()}
    except (TypeError, ValueError, ArithmeticError):
        return None


def _entries(described: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    listed = described.get(key, [])
    if not isinstance(listed, list):
        raise DataError(f"dataset.json: expected a list under {key!r}, got {type(listed).__name__}")
    return [entry if isinstance(entry, dict) else {"image": entry} for entry in listed]


def _by_channel(folder: Path, scans: Mapping[str, list[Path]], channels: Mapping[str, int],
                files: dict[str, PatientFiles]) -> list[Finding]:
    """Adds the patients of nnU-Net's raw data to `files`; returns findings."""
    findings: list[Finding] = []
    for name in _FOLDERS:
        labels = {stem(path): path for path in _scans(folder / name.replace("images", "labels"))}
        found: dict[str, dict[int, Path]] = {patient: {} for patient in labels}
        for scan in scans[name]:
            if match := _CHANNEL.fullmatch(stem(scan)):
                found.setdefault(match["id"], {})[int(match["channel"])] = scan
            else:
                findings.append(Finding(stem(scan), "unknown-file", f"{name}/{scan.name} is ignored: expected a name "
                                        f"such as CASE_0000.nii.gz", "warning"))
        for patient, own in found.items():
            if patient in files:
                findings.append(Finding(patient, "two-folders", "imagesTr and imagesTs both hold it"))
                continue
            if not is_valid_id(patient):
                findings.append(Finding(patient, "unusable", "a file name must be printable and contain no \\"))
                continue
            findings += [Finding(patient, "missing-modality", f"no {modality}: {name}/{patient}_{channel:04d}.nii.gz")
                         for modality, channel in channels.items() if channel not in own]
            if name == "imagesTr" and patient not in labels:
                findings.append(Finding(patient, "no-label", f"labelsTr holds no {patient}.nii.gz", "warning"))
            images = {modality: own[channels[modality]] for modality in MODALITIES if channels[modality] in own}
            files[patient] = PatientFiles(id=patient, images=images, label=labels.get(patient), layout="nnunet")
    return findings


def _by_entry(folder: Path, entries: list[dict[str, Any]], channels: Mapping[str, int],
              files: dict[str, PatientFiles]) -> list[Finding]:
    """Adds the patients that dataset.json lists to `files`; returns findings."""
    findings: list[Finding] = []
    stored = {(name, stem(path)): path
              for name in _FOLDERS for path in _scans(folder / name.replace("images", "labels"))}
    for number, entry in enumerate(entries):
        entry = {key: text.replace("\\", "/") if isinstance(text, str) else text for key, text in entry.items()}
        image = entry.get("image")
        patient = stem(Path(image)) if isinstance(image, str) else ""
        if not isinstance(image, str) or not is_valid_id(patient):
            findings.append(Finding(f"entry {number}", "unusable",
                                    f"the image in dataset.json is not a file name: {str(image)[:80]!r}"))
            continue
        if patient in files:
            findings.append(Finding(patient, "two-folders", "dataset.json lists it twice"))
            continue
        paths: dict[str, Path] = {}
        for kind, text in (("image", image), ("label", entry.get("label"))):
            if text is not None:
                try:
                    paths[kind] = _path(folder, patient, kind, text)
                except DataError as error:
                    severity: Severity = "warning" if error.code == "no-label" else "error"
                    findings.append(Finding(patient, error.code, str(error), severity))
        if "image" in paths and entry.get("label") is None \
                and (unlisted := stored.get((paths["image"].parent.name, patient))) is not None:
            paths["label"] = unlisted
            findings.append(Finding(patient, "not-in-table", f"dataset.json names no label for it; "
                                    f"{unlisted.parent.name}/{unlisted.name}, which has its name, is read", "warning"))
        files[patient] = PatientFiles(id=patient, layout="msd", label=paths.get("label"), channels=channels,
                                      images=dict.fromkeys(MODALITIES, paths["image"]) if "image" in paths else {})
    return findings


def _path(folder: Path, patient: str, kind: str, text: Any) -> Path:
    """The file that dataset.json names for a patient's image or label, or the same one packed or unpacked since."""
    parts = str(text).split("/")
    if not isinstance(text, str) or "\0" in text or not parts[0] or ".." in parts or ":" in parts[0]:
        raise DataError(f"dataset.json gives the {kind} {str(text)[:80]!r}; expected a path below the data set's "
                        f"folder", code="outside")
    if stem(Path(text)) != patient:
        raise DataError(f"its {kind} {Path(text).name} carries another patient's id", code="foreign-file")
    named = folder / text
    unpacked = [named, *(named.with_name(patient + suffix) for suffix in (".nii.gz", ".nii"))]
    if (found := next(filter(os.path.isfile, unpacked), None)) is None:
        raise DataError(f"dataset.json names the {kind} {text}, which is missing",
                        code="missing-modality" if kind == "image" else "no-label")
    return found
