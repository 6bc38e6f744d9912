"""The page of `fedlab data inspect`: one slice per patient, with the problems found beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlab.core.files import filled_in, write_new
from fedlab.core.regions import REGION_ORDER
from fedlab.data.readers.inspection import Case, Inspection
from fedlab.view.colours import LABEL_COLOURS, LABEL_NAMES

__all__ = ["write_page"]


def write_page(path: Path | str, inspection: Inspection) -> Path:
    """Writes one self-contained page that loads nothing; raises `RunError` if the file exists already."""
    page = filled_in("fedlab.view", "inspection_page.html", title=f"Scans in {inspection.folder.name}",
                     summary=inspection.summary()[1:], patients=[_prepared(case) for case in inspection.cases],
                     legend=[(LABEL_COLOURS[value], LABEL_NAMES[value]) for value in LABEL_COLOURS])
    return write_new(path, page.encode("utf-8", "replace"))


def _prepared(case: Case) -> dict[str, Any]:
    """The values of a patient for the template."""
    from fedlab.view.picture import blended, png_base64

    known = [f"{name} {ml:.1f} ml" for name in REGION_ORDER if (ml := case.volumes_ml[name]) is not None]
    facts = [case.label_convention and f"labels {case.label_convention}", case.orientation,
             case.shape and "x".join(map(str, case.shape)),
             case.spacing_mm and " x ".join(f"{s:.3g}" for s in case.spacing_mm) + " mm", ", ".join(case.modalities)]
    prepared = {"case": case, "facts": " · ".join(filter(None, facts)), "volumes": " · ".join(known), "png": None}
    if (picture := case.picture) is not None:
        (rows, columns), (height, width) = picture.grey.shape, picture.pixel_mm
        colours = {value: (colour, 0.45) for value, colour in LABEL_COLOURS.items()}
        prepared |= {"png": png_base64(blended(picture.grey, picture.label, colours)),
                     "proportions": f"{columns * width:g} / {rows * height:g}"}
    return prepared
