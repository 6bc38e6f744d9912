"""Scans in formats other than NIfTI, which fedlab does not read but names, with what converts them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

__all__ = ["find_other_format"]

#: Ends of names of scans in other formats, with the format and what converts it.
_FORMATS = {
    (".mha", ".mhd"): ("MetaImage", "for example with SimpleITK.ReadImage and WriteImage"),
    (".nrrd", ".nhdr"): ("NRRD", "for example with SimpleITK.ReadImage and WriteImage"),
    (".mgz", ".mgh"): ("FreeSurfer", "for example with mri_convert"),
    (".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".rar"): ("archive", ""),
    (".img", ".hdr", ".img.gz", ".hdr.gz"): ("Analyze or two-file NIfTI", "one file each, with nibabel.load and save"),
}


def find_other_format(root: Path) -> tuple[Path, str, str] | None:
    """The first scan in another format among the first entries below a folder, its format, and what converts it."""
    for path in filter(Path.is_file, sorted(islice(root.rglob("*"), 1000))):
        if found := next((kind for ends, kind in _FORMATS.items() if path.name.lower().endswith(ends)), None):
            return path, *found
        try:
            with path.open("rb") as file:
                if file.read(132)[128:] == b"DICM":
                    return path, "DICOM", "for example with dcm2niix"
        except OSError:
            continue
    return None
