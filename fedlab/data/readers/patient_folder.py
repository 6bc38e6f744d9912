"""The patients of a folder as a sequence: each is read on access, and the prepared patients can be cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from fedlab.core.errors import DataError
from fedlab.core.regions import labels_to_regions
from fedlab.core.text import counted
from fedlab.core.types import MODALITIES, Patient
from fedlab.core.weights import patient_sha256
from fedlab.core.workers import available_cores
from fedlab.data.cache import file_state, load, store
from fedlab.data.readers.conventions import Convention
from fedlab.data.readers.findings import Finding, bullets, usable
from fedlab.data.readers.patient_files import PatientFiles
from fedlab.data.readers.scan import Grid, on_grid, read_scan

if TYPE_CHECKING:
    import pandas as pd
    from monai.data import CacheDataset

__all__ = ["PatientFolder", "prepare_patient"]

#: Changes whenever the same files would give other patients; part of every cache key.
READER = "fedlab-reader-4"
#: The hash of each patient that this process has read, by the settings and the state of the files that determine it.
_CONTENT: dict[str | None, str] = {}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PatientFolder(Sequence[Patient]):
    """The patients of a folder, sorted by id; each is read on access.

    Attributes:
        folder, layout, reason, files: as in `fedlab.data.readers.patient_files.Listing`.
        convention: the label convention and the reason for it.
        findings: about all patients, those left out included.
        grid: the voxels that patients are resampled to.
        cache: the folder that stores prepared patients, or None.
    """

    folder: Path
    layout: str
    reason: str
    convention: Convention
    files: Mapping[str, PatientFiles]
    findings: tuple[Finding, ...]
    grid: Grid
    cache: Path | None = None

    @property
    def ids(self) -> tuple[str, ...]:
        """The patients' pseudonyms."""
        return tuple(self.files)

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Patient: ...
    @overload
    def __getitem__(self, index: slice) -> PatientFolder: ...

    def __getitem__(self, index: int | slice) -> Patient | PatientFolder:
        return self.subset(self.ids[index]) if isinstance(index, slice) else self.read(self.ids[index])

    def read(self, patient: str) -> Patient:
        """One patient by id.

        Raises:
            KeyError: an unknown id.
            DataError: the files cannot be used.
        """
        found, findings = prepare_patient(self.files[patient], grid=self.grid, cache=self.cache)
        if found is None:
            usable({}, findings, broken="raise", where=self.folder)
            raise DataError(f"{patient}: could not be read")  # only with an error, which `usable` has raised
        return found

    def subset(self, patients: Sequence[str]) -> PatientFolder:
        """The same folder with these patients only, in this order.

        Raises:
            KeyError: an unknown id.
        """
        return replace(self, files={patient: self.files[patient] for patient in patients})

    def content_sha256(self) -> str:
        """The SHA-256 of the patients' ids, images, labels and affines, equal to that of a list of the same patients.

        A patient is read for it once per process, and again when one of the files has changed.

        Raises:
            DataError: files cannot be used.
        """
        digest = hashlib.sha256()
        for patient, files in self.files.items():
            settings = _settings(files, self.grid)
            if settings is None or settings not in _CONTENT:
                _CONTENT[settings] = patient_sha256(self.read(patient))
            digest.update(_CONTENT[settings].encode())
        return digest.hexdigest()

    def dataset(self, *random: Callable[[Any], Any], keep: float = 1.0) -> CacheDataset:
        """A MONAI dataset that reads, resamples and normalises once, and applies random transforms on each access.

        Items are {"image": float32 (4, X, Y, Z), "label": regions (3, X, Y, Z) as float32, "tumour": uint8
        (1, X, Y, Z), "patient": id}; label and tumour are present only for labelled patients.

        Args:
            random: MONAI transforms of such items, for example `RandCropByPosNegLabeld(("image", "label"),
                label_key="tumour", ...)`.
            keep: share of the patients kept in memory.

        Raises:
            ValueError: `keep` is not between 0 and 1.
        """
        if not 0 <= keep <= 1:
            raise ValueError(f"keep must be a share between 0 and 1, got {keep}")
        from monai.data import CacheDataset  # takes seconds to import
        from monai.transforms import Compose, Lambda

        return CacheDataset(list(self.ids), Compose([Lambda(self._item), *random]), cache_rate=keep,
                            num_workers=available_cores(), progress=False)

    def _item(self, patient: str) -> dict[str, Any]:
        found = self.read(patient)
        item: dict[str, Any] = {"image": found.image.float(), "patient": patient}
        if found.label is not None:
            item |= {"label": labels_to_regions(found.label), "tumour": (found.label > 0).to(torch.uint8)[None]}
        return item

    def table(self) -> pd.DataFrame:
        """One row per patient: whether labelled, the columns of tables, and the number of findings."""
        import pandas as pd

        rows = [{"labelled": found.label is not None, **found.columns,
                 "findings": sum(f.patient == name for f in self.findings)} for name, found in self.files.items()]
        return pd.DataFrame(rows, index=pd.Index(self.files, name="patient"))

    def __repr__(self) -> str:
        head = (f"<PatientFolder of {counted(len(self), 'patient')} in {self.folder}: layout {self.layout} "
                f"({self.reason}); {self.convention}>")
        return head + (f"\n{bullets(self.findings)}" if self.findings else "")

    def _repr_html_(self) -> str:
        head, *rest = repr(self).strip("<>").splitlines()
        return f"<p>{escape(head)}</p><pre>{escape(chr(10).join(rest))}</pre>{self.table().to_html(escape=True)}"


def prepare_patient(files: PatientFiles, *, grid: Grid, cache: Path | None) -> tuple[Patient | None, list[Finding]]:
    """A patient on the requested grid, from the cache if the files have not changed; None if there are errors."""
    settings = None if cache is None else _settings(files, grid)
    if cache is not None and settings is not None and (cached := load(cache, settings)) is not None:
        entries = json.loads(bytes(cached["findings"].numpy()).decode())
        return (Patient(files.id, cached["image"], cached.get("label"), cached["affine"].numpy()),
                [Finding(**entry) for entry in entries])
    scan, findings = read_scan(files)
    if scan is None:
        return None, findings
    try:
        patient = on_grid(files.id, scan, grid)
    except DataError as error:
        return None, [*findings, Finding(files.id, error.code, str(error))]
    if cache is not None and settings is not None:
        entries = json.dumps([vars(finding) for finding in findings]).encode()
        tensors = {"image": patient.image.contiguous(), "affine": torch.from_numpy(patient.affine.copy()),
                   "findings": torch.frombuffer(bytearray(entries), dtype=torch.uint8)}
        store(cache, settings, tensors | ({} if patient.label is None else {"label": patient.label.contiguous()}))
    return patient, findings


def _settings(files: PatientFiles, grid: Grid) -> str | None:
    """Everything that determines a prepared patient; None if a file's state cannot be read."""
    named = {modality: files.images[modality] for modality in MODALITIES if modality in files.images}
    try:
        states = {name: file_state(path)
                  for name, path in ({**named, "label": files.label} if files.label else named).items()}
    except OSError:
        return None
    return json.dumps({"what": "real patient", "reader": READER, "id": files.id, "files": states, "grid": repr(grid),
                       "channels": dict(files.channels), "labels": files.label_convention}, sort_keys=True)
