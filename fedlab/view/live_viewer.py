"""Live 3-D in a file: NiiVue and packed patients in a fragment of HTML that needs no network and no kernel.

NiiVue's script is the one that ipyniivue contains. The page's content policy names the hashes of its two scripts and
allows nothing else; volumes are bytes, cropped to the head, as gzip in base64, unpacked in the browser.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import numpy.typing as npt

from fedlab.core.extras import MissingExtra, install_command
from fedlab.core.files import filled_in
from fedlab.core.types import MODALITIES
from fedlab.view.colours import ERRORS, LABEL_ABBREVIATIONS, LABEL_COLOURS, LABEL_NAMES, REGION_LABELS, arm_label
from fedlab.view.label_layers import REFERENCE, VIEWS, Case, ViewSettings

__all__ = ["LiveViewer", "NiiVueScript", "live_viewer", "nifti_bytes", "niivue_script", "packed", "viewer_script"]

_VIEWS = dict(zip(VIEWS, (3, 0, 1, 2, 4), strict=True))  # NiiVue's numbers of slice types


class NiiVueScript(NamedTuple):
    """ipyniivue's script without its export, and what its minified names stand for."""

    text: str
    widget: str
    instance: str
    niivue: str
    image: str
    mesh: str


@dataclass(frozen=True, kw_only=True)
class LiveViewer:
    """A viewer for a page.

    Attributes:
        html: a fragment, with its scripts.
        policy: what the page's content policy must allow besides inline styles and data: images.
    """

    html: str
    policy: str


@cache
def niivue_script() -> NiiVueScript:
    """NiiVue as ipyniivue contains it; raises `MissingExtra` where it is absent or built in another way."""
    found, command = importlib.util.find_spec("ipyniivue"), install_command("lab")
    if found is None or found.origin is None:
        raise MissingExtra(f"live 3-D needs ipyniivue, which is not installed. Install it with: {command}")
    text = (Path(found.origin).parent / "static" / "widget.js").read_text("utf-8")
    export = re.search(r"export\s*\{\s*([\w$]+) as default\s*\};?\s*$", text)
    names = [re.search(pattern, text) for pattern in (
        r'"Creating new Niivue instance".{0,200}?([\w$]+)=new ([\w$]+)\(',
        r"await ([\w$]+)\.new\([\w$]+,[\w$]+,[\w$]+\.get",
        r"await ([\w$]+)\.readMesh\([\w$]+,[\w$]+,[\w$]+\.gl,[\w$]+\.get")]
    if export is None or None in names or "</script" in text:
        raise MissingExtra("the installed ipyniivue is built in another way than version 2.4, which live 3-D needs. "
                           f"Install that with: {command}")
    (instance, niivue), (image,), (mesh,) = (name.groups() for name in names if name is not None)
    return NiiVueScript(text[:export.start()], export[1], instance, niivue, image, mesh)


def viewer_script(name: str) -> str:
    """A script of this package after viewer.js, without names that others could clash with."""
    parts = [(files("fedlab.view") / "templates" / f"{part}.js").read_text("utf-8") for part in ("viewer", name)]
    return "\n".join(parts)


def packed(data: bytes) -> str:
    """Bytes as gzip in base64; the same bytes give the same text."""
    return base64.b64encode(gzip.compress(data, mtime=0)).decode("ascii")


def nifti_bytes(array: npt.NDArray[np.uint8], affine: npt.NDArray[np.float64]) -> bytes:
    """A volume of bytes as a NIfTI file in mm."""
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    return bytes(image.to_bytes())


def live_viewer(cases: Sequence[Case], settings: ViewSettings) -> LiveViewer:
    """The viewer of some patients, with all finite modalities and all layers of each; `settings` is its first view.

    Raises:
        MissingExtra: ipyniivue is not installed.
        ValueError: no patient, or nothing to show of one.
    """
    from fedlab.view.static_view import draw_case

    if not cases:
        raise ValueError("a live viewer needs at least one patient")
    picture = draw_case(cases[0], settings)
    bundle, bundle_hash = _bundle(niivue_script())
    own = f"(() => {{\n{viewer_script('live_page')}\n}})();"
    parts = {"labels": {value: {"name": LABEL_NAMES[value], "short": LABEL_ABBREVIATIONS[value],
                                "colour": colour, "opacity": 1.0} for value, colour in LABEL_COLOURS.items()},
             "errors": {value: {"name": name, "colour": colour, "opacity": 0.35 if value == 3 else 1.0}
                        for value, (colour, name) in ERRORS.items()}}
    packed_cases = [_packed_case(case) for case in cases]
    packed_cases[0]["crosshair"] = settings.crosshair
    data = {"cases": packed_cases, **parts, "regions": REGION_LABELS, "shown": {
        "modality": settings.modality, "layer": settings.layer, "overlay": settings.overlay,
        "opacity": settings.opacity, "view": _VIEWS[settings.view],
        "hidden": [value for value in LABEL_COLOURS if value not in settings.labels]}}
    html = filled_in("fedlab.view", "live_viewer.html", alt=picture.alt, script=own, bundle=bundle,
                     data=json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
                     poster=base64.b64encode(picture._repr_png_(dpi=90)[0]).decode("ascii"))
    return LiveViewer(html=html, policy=f"script-src {_source(own)} {bundle_hash}; connect-src data:")


@cache
def _bundle(script: NiiVueScript) -> tuple[str, str]:
    """NiiVue as a page holds it, packed, and its hash for the content policy."""
    text = (f"{script.text};globalThis.fedlabNiiVue({{Niivue:{script.niivue},NVImage:{script.image},"
            f"NVMesh:{script.mesh}}});")
    return packed(text.encode()), _source(text)


def _source(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _packed_case(case: Case) -> dict[str, Any]:
    finite = [name for name, volume in zip(MODALITIES, case.patient.image, strict=True) if volume.isfinite().all()]
    modalities = {}
    for name in finite:
        low, high = case.grey_range(name)
        modalities[name] = {"low": low, "high": high, "data": packed(nifti_bytes(case.grey(name), case.affine))}
    layers = {name: {"name": arm_label(name), "data": packed(np.asfortranarray(values).tobytes(order="F")),
                     "facts": [{"region": fact.region, "ml": fact.ml, "dice": None if math.isnan(fact.dice)
                                or name == REFERENCE else fact.dice} for fact in case.facts(name)]}
              for name, values in case.layers.items()}
    return {"patient": case.patient.id, "shape": case.shape, "start": [part.start for part in case.box],
            "crosshair": case.centre(), "modalities": modalities, "layers": layers}
