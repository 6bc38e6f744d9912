"""Folders of scans in every layout, with balls as brains or with generated patients, and functions that damage them."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from fedlab.data.readers.nifti import from_ras

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SHAPE = (30, 34, 26)
OLD = {"FLAIR": "flair", "T1": "t1", "T1c": "t1ce", "T2": "t2", "label": "seg"}
NEW = {"FLAIR": "t2f", "T1": "t1n", "T1c": "t1c", "T2": "t2w", "label": "seg"}
UPENN = {"FLAIR": "_FLAIR", "T1": "_T1", "T1c": "_T1GD", "T2": "_T2", "label": "_segm"}
#: The values of fedlab's labels 1 core, 2 oedema, 4 enhancing in each convention.
WRITTEN = {"brats2021": {1: 1, 2: 2, 4: 4}, "brats2023": {1: 1, 2: 2, 4: 3}, "brats2024": {1: 1, 2: 2, 4: 3},
           "msd": {1: 2, 2: 1, 4: 3}, "brats2013": {1: 1, 2: 2, 4: 4}, "brats2024ped": {1: 2, 2: 4, 4: 1}}


def brain_and_label(shape=SHAPE):
    """A ball as a brain, with a tumour in its right anterior superior part on RAS axes."""
    axes = np.meshgrid(*[np.arange(n) - n / 2 + 0.5 for n in shape], indexing="ij")
    brain = sum((a / (0.42 * n)) ** 2 for a, n in zip(axes, shape, strict=True)) < 1
    away = sum((a - n / 8) ** 2 for a, n in zip(axes, shape, strict=True))
    label = np.zeros(shape, np.uint8)
    label[away < 36], label[away < 16], label[away < 6] = 2, 4, 1
    label[~brain] = 0
    return brain, label


def write_patient(folder, name="P1", *, affine=LPS, suffix=".nii.gz", label=True, seed=0, shape=SHAPE, dtype=np.int16):
    """One BraTS 2021 patient, stored with the axes of `affine`."""
    home = Path(folder) / name
    home.mkdir(parents=True)
    brain, tumour = brain_and_label(shape)
    rng = np.random.default_rng(seed)
    for i, kind in enumerate(("flair", "t1", "t1ce", "t2")):
        image = (brain * (rng.integers(100, 400, shape) + 300 * i + 500 * (tumour > 0))).astype(dtype)
        nib.save(nib.Nifti1Image(from_ras(image, affine), affine), home / f"{name}_{kind}{suffix}")
    if label:
        nib.save(nib.Nifti1Image(from_ras(tumour, affine), affine), home / f"{name}_seg{suffix}")
    return home


def rewrite(path, change):
    image = nib.load(path)
    data, affine = change(np.asanyarray(image.dataobj).copy(), image.affine.copy())
    os.unlink(path)
    nib.save(nib.Nifti1Image(data, affine), path)


def poke_header(path, **fields):
    raw = bytearray(gzip.decompress(Path(path).read_bytes()))
    header = nib.Nifti1Header(bytes(raw[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.binaryblock
    Path(path).write_bytes(gzip.compress(bytes(raw)))


class Raw(NamedTuple):
    """A patient in stored order: images by modality, labels 1/2/4, one affine."""

    id: str
    images: dict[str, np.ndarray]
    label: np.ndarray | None
    affine: np.ndarray


def ball(name="P1", *, affine=LPS, seed=0, shape=SHAPE):
    """The patient that `write_patient` writes."""
    brain, tumour = brain_and_label(shape)
    rng = np.random.default_rng(seed)
    images = {modality: from_ras((brain * (rng.integers(100, 400, shape) + 300 * i + 500 * (tumour > 0)))
                                 .astype(np.int16), affine) for i, modality in enumerate(("FLAIR", "T1", "T1c", "T2"))}
    return Raw(name, images, from_ras(tumour, affine), affine)


def load_raw(folder, name):
    """A patient of a folder in the layout of BraTS 2021, as stored."""
    volumes = {modality: nib.load(folder / name / f"{name}_{kind}.nii.gz") for modality, kind in OLD.items()}
    arrays = {modality: np.asanyarray(image.dataobj) for modality, image in volumes.items()}
    label = arrays.pop("label")
    return Raw(name, arrays, label, volumes["FLAIR"].affine)


def recode(label, convention):
    """Labels 1/2/4 in the values of a convention."""
    out = np.zeros_like(label)
    for inside, outside in WRITTEN[convention].items():
        out[label == inside] = outside
    return out


def save(array, affine, path, dtype=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array if dtype is None else array.astype(dtype), affine), path)


def save_files(raw, home, *, names=OLD, mark="_", convention="brats2021", suffix=".nii.gz", dtype=None):
    """One patient's folder."""
    for modality, array in raw.images.items():
        save(array, raw.affine, home / f"{home.name}{mark}{names[modality]}{suffix}", dtype)
    if raw.label is not None:
        save(recode(raw.label, convention), raw.affine, home / f"{home.name}{mark}seg{suffix}", dtype)


def write_table(path, heading, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("x", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([heading, *rows])


def write_msd(folder, raws, *, order=("FLAIR", "T1", "T1c", "T2"), convention="msd", test=()):
    """Decathlon: 4-D volumes, dataset.json; patients in `test` have no label."""
    called = {"FLAIR": "FLAIR", "T1": "T1w", "T1c": "t1gd", "T2": "T2w"}
    meant = {1: "non-enhancing tumor", 2: "edema", 4: "enhancing tumour"}
    for raw in raws:
        part = "Ts" if raw.id in test else "Tr"
        save(np.stack([raw.images[m] for m in order], -1), raw.affine, folder / f"images{part}" / f"{raw.id}.nii.gz")
        if part == "Tr":
            save(recode(raw.label, convention), raw.affine, folder / "labelsTr" / f"{raw.id}.nii.gz")
    told = {
        "modality": {str(i): called[m] for i, m in enumerate(order)},
        "labels": {"0": "background", **{str(out): meant[inside] for inside, out in WRITTEN[convention].items()}},
        "training": [{"image": f"./imagesTr/{raw.id}.nii.gz", "label": f"./labelsTr/{raw.id}.nii.gz"}
                     for raw in raws if raw.id not in test],
        "test": [f"./imagesTs/{name}.nii.gz" for name in test],
    }
    (folder / "dataset.json").write_text(json.dumps(told), encoding="utf-8")


def write_nnunet(folder, raws, *, order=("T1", "T1c", "T2", "FLAIR"), convention="msd", regions=False):
    """Raw data of nnU-Net: one file per modality, named by its channel."""
    meant = {1: "non-enhancing", 2: "edema", 4: "enhancing tumor"}
    labels = {"background": 0, **{meant[inside]: out for inside, out in WRITTEN[convention].items()}}
    if regions:
        inner = WRITTEN[convention]
        labels = {"background": 0, "whole tumor": [inner[2], inner[1], inner[4]], "tumor core": [inner[1], inner[4]],
                  "enhancing tumor": [inner[4]]}
    for raw in raws:
        for channel, modality in enumerate(order):
            save(raw.images[modality], raw.affine, folder / "imagesTr" / f"{raw.id}_{channel:04d}.nii.gz")
        save(recode(raw.label, convention), raw.affine, folder / "labelsTr" / f"{raw.id}.nii.gz")
    told = {"channel_names": {str(i): m for i, m in enumerate(order)}, "labels": labels, "numTraining": len(raws),
            "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(told), encoding="utf-8")


def write_paths(folder, raws, *, convention="brats2021"):
    """Files with names of no layout, and a table of their paths."""
    rows = []
    for i, raw in enumerate(raws):
        places = {m: Path("scans") / f"{m.lower()} of {i}.nii.gz" for m in (*raw.images, "label")}
        for modality, array in raw.images.items():
            save(array, raw.affine, folder / places[modality])
        save(recode(raw.label, convention), raw.affine, folder / places["label"])
        rows.append([raw.id, *places.values(), "north" if i else "south"])
    write_table(folder / "paths.csv", ["patient", "flair", "t1", "t1c", "t2", "label", "hospital"], rows)


def write_named(folder, raws, names, place="{id}", *, labels="{id}"):
    """Files of any names: `names` are the ends by modality, `place` and `labels` the folders; `{sub}` is the person."""
    for raw in raws:
        for kind, array in (*raw.images.items(), ("label", raw.label)):
            where = (labels if kind == "label" else place).format(id=raw.id, sub=raw.id.split("_")[0])
            save(array, raw.affine, folder / where / f"{raw.id}{names[kind]}.nii.gz")


def write_layout(folder, layout, raws):
    """Patients in a published layout, with its label convention and its tables."""
    grades = ["HGG" if i % 2 == 0 else "LGG" for i in range(len(raws))]
    if layout == "msd":
        write_msd(folder, raws)
    elif layout == "nnunet":
        write_nnunet(folder, raws)
    elif layout == "table":
        write_paths(folder, raws)
    elif layout == "named":
        write_named(folder, raws, UPENN, "images_structural/{id}", labels="images_segm")
    else:
        for raw, grade in zip(raws, grades, strict=True):
            home = folder / (grade if layout in ("brats2018", "brats2019") else "") / raw.id
            new = layout == "brats2023"
            save_files(raw, home, names=NEW if new else OLD, mark="-" if new else "_",
                       convention="brats2023" if new else "brats2021")
    if layout in ("brats2019", "brats2020"):
        year = layout.removeprefix("brats")
        write_table(folder / "name_mapping.csv", ["Grade", "BraTS_2017_subject_ID", f"BraTS_{year}_subject_ID"],
                    [[grade, "NA", raw.id] for raw, grade in zip(raws, grades, strict=True)])
    if layout == "fets":
        for number, count in ((1, 2), (2, len(raws))):
            write_table(folder / f"partitioning_{number}.csv", ["Partition_ID", "Subject_ID"],
                        [[i % count + 1, raw.id] for i, raw in enumerate(raws)])
    return folder
