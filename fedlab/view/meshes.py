"""Tumours and brains as meshes and label maps for other programs: 3D Slicer, ITK-SNAP, MeshLab, 3-D printers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedlab.core.errors import DataError
from fedlab.core.files import write_new
from fedlab.core.settings import check_choice, check_within
from fedlab.core.types import Patient
from fedlab.data.readers.nifti import write_label
from fedlab.view.colours import REGION_LABELS
from fedlab.view.label_layers import REFERENCE, Prediction, as_labels, make_case, patient_grid

__all__ = ["Surface", "export_labels", "surface"]

Part: TypeAlias = Literal["WT", "TC", "ET", "NCR", "ED", "brain"]
#: Part of a tumour -> its labels.
PARTS: dict[str, tuple[int, ...]] = {**REGION_LABELS, "NCR": (1,), "ED": (2,)}
# 3D Slicer reads a mesh as LPS unless its header says otherwise (vtkMRMLModelStorageNode).
_SPACE = "SPACE=RAS"


@dataclass(frozen=True, kw_only=True, eq=False)
class Surface:
    """A closed triangle mesh in the scanner's coordinates.

    Attributes:
        name: of the enclosed part, such as "WT of site-01-003".
        vertices: float32, shape (V, 3), mm in RAS.
        faces: int32, shape (F, 3), indices of vertices, counter-clockwise seen from outside.
    """

    name: str
    vertices: npt.NDArray[np.float32]
    faces: npt.NDArray[np.int32]

    @property
    def volume_ml(self) -> float:
        """Enclosed volume in ml, by the divergence theorem."""
        a, b, c = (self.vertices[self.faces[:, corner]].astype(np.float64) for corner in range(3))
        return abs(float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum())) / 6000

    @property
    def bounds_mm(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Smallest and largest coordinates in mm, RAS."""
        low, high = (tuple(edge.tolist()) for edge in (self.vertices.min(axis=0), self.vertices.max(axis=0)))
        return low, high

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a binary STL or PLY file in mm and RAS, as its header states.

        Raises:
            DataError: the name does not end in .stl or .ply, or the file exists already.
        """
        write = {".stl": _stl, ".ply": _ply}.get(Path(path).suffix.lower())
        if write is None:
            raise DataError(f"{path}: expected a name that ends in .stl or .ply")
        return write_new(path, write(self), error=DataError)

    def __repr__(self) -> str:
        return f"<Surface of {self.name}: {len(self.faces):,} triangles around {self.volume_ml:.1f} ml>"


def surface(patient: Patient, prediction: Prediction | None = None, *, part: Part = "WT",
            smooth_mm: float = 0.0) -> Surface:
    """The surface of a part of a tumour, or of the brain, by marching cubes (Lewiner et al. 2003).

    Args:
        patient: its scan defines the brain, the nonzero voxels, and the coordinates.
        prediction: labels in any form that `show` accepts; by default the patient's own label map.
        part: "WT", "TC", "ET", "NCR", "ED" or "brain".
        smooth_mm: standard deviation of a Gaussian filter against the steps between voxels; it also shrinks thin
            parts, so the surface no longer encloses the volume of the labels.

    Raises:
        ValueError: no labels, invalid labels, labels without `part`, or a `smooth_mm` that is negative or leaves
            nothing.
    """
    check_choice((*PARTS, "brain"), part=part)
    check_within(below=20, smooth_mm=smooth_mm)
    case = make_case(patient, {} if prediction is None else {"prediction": prediction})
    if part == "brain":
        body = (patient.image[(slice(None), *case.box)] != 0).any(dim=0).cpu().numpy()
    elif not case.layers:
        raise ValueError(f"patient {patient.id} has no label map; give a prediction, or part='brain'")
    else:
        body = np.isin(case.layer(REFERENCE if prediction is None else "prediction"), PARTS[part])
    if not body.any():
        raise ValueError(f"there is no {part} in the labels of patient {patient.id}, so it has no surface")
    from scipy.ndimage import gaussian_filter
    from skimage.measure import marching_cubes

    padded = np.pad(body.astype(np.float32), 1)  # an empty rim closes the surface at the edge of the box
    if smooth_mm:
        padded = gaussian_filter(padded, [smooth_mm / size for size in patient.spacing_mm])
    if padded.max() <= 0.5:
        raise ValueError(f"smoothing by {smooth_mm} mm leaves nothing of the {part} of patient {patient.id}; "
                         "smooth less")
    # "ascent" although the field falls outwards: for "descent" skimage orders faces clockwise, seen from outside.
    points, faces, _, _ = marching_cubes(padded, level=0.5, gradient_direction="ascent", allow_degenerate=False)
    vertices = (points - 1) @ case.affine[:3, :3].T + case.affine[:3, 3]
    if np.linalg.det(case.affine[:3, :3]) < 0:
        faces = faces[:, ::-1]
    return Surface(name=f"{part} of {patient.id}", vertices=vertices.astype(np.float32),
                   faces=np.ascontiguousarray(faces, dtype=np.int32))


def export_labels(path: str | os.PathLike[str], patient: Patient, prediction: Prediction | None = None) -> Path:
    """Writes labels as a NIfTI file with the patient's grid and affine, and the values 1, 2 and 4 of BraTS.

    For a scan read from disk, `fedlab evaluate` writes predictions on the grid of the file itself.

    Args:
        path: a name that ends in .nii or .nii.gz.
        patient: defines grid and affine.
        prediction: labels in any form that `show` accepts; by default the patient's own label map.

    Raises:
        DataError: the file exists already, or its name ends otherwise.
        ValueError: no labels, or invalid labels.
    """
    if prediction is None and patient.label is None:
        raise ValueError(f"patient {patient.id} has no label map; give a prediction")
    labels = as_labels(patient, patient.label if prediction is None else prediction)  # type: ignore[arg-type]
    return write_label(path, np.ascontiguousarray(labels), like=patient_grid(patient))


def _stl(mesh: Surface) -> bytes:
    corners = mesh.vertices[mesh.faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    row: Any = [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("unused", "<u2")]
    rows = np.zeros(len(corners), dtype=row)
    rows["normal"], rows["corners"] = normals, corners
    head = f"binary STL, mm, {_SPACE}, {mesh.name}".encode("ascii", "replace")[:80].ljust(80)
    return b"".join((head, len(rows).to_bytes(4, "little"), rows.tobytes()))


def _ply(mesh: Surface) -> bytes:
    name = mesh.name.encode("ascii", "replace").decode().replace("\n", " ")
    head = "\n".join(["ply", "format binary_little_endian 1.0", f"comment {_SPACE}", f"comment mm, {name}",
                      f"element vertex {len(mesh.vertices)}", *(f"property float {axis}" for axis in "xyz"),
                      f"element face {len(mesh.faces)}", "property list uchar int vertex_indices", "end_header\n"])
    row: Any = [("count", "u1"), ("corners", "<i4", 3)]
    faces = np.zeros(len(mesh.faces), dtype=row)
    faces["count"], faces["corners"] = 3, mesh.faces
    return head.encode("ascii") + mesh.vertices.astype("<f4").tobytes() + faces.tobytes()
