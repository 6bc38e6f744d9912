"""The page of `fedlab data inspect`: one slice a patient, with what is wrong beside it."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from fedlab.core.errors import RunError
from fedlab.core.types import REGIONS
from fedlab.data.readers.inspection import Case, Inspection, Slice
from fedlab.view.slices import COLOURS, NAMES

__all__ = ["write_page"]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 15px/1.45 "DejaVu Sans", sans-serif; color: #222; margin: 2rem; }
h1 { font-size: 1.3rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
p { margin: .2rem 0; overflow-wrap: anywhere; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1rem; margin-top: 1.2rem; }
article { border: 1px solid #ccc; border-radius: 4px; padding: .7rem; }
article.error { border-color: #b3261e; }
h2 { font-size: 1rem; margin: 0 0 .4rem; overflow-wrap: anywhere; }
.shown { background: #000; display: flex; justify-content: center; align-items: center; height: 15rem; color: #bbb; }
.shown img { height: 100%; image-rendering: auto; }
li { overflow-wrap: anywhere; } ul { margin: .4rem 0 0; padding-left: 1.1rem; }
li.error { color: #b3261e; } li.warning { color: #7a4d00; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .9em; }
small { color: #555; }
</style></head><body>
<h1>{{ title }}</h1>
{% for line in summary %}<p>{{ line }}</p>
{% endfor %}<p><small>Axial slices, the patient's right on the left. Tumour:
{% for colour, name in keys %}<span class="key" style="background:{{ colour }}"></span>{{ name }}{% endfor %}
</small></p>
<main>
{% for case in cases %}<article{% if not case.usable %} class="error"{% endif %}>
<h2>{{ case.patient }}</h2>
<div class="shown">{% if case.image %}<img alt="{{ case.alt }}" src="data:image/png;base64,{{ case.image }}">
{% else %}nothing to show{% endif %}</div>
<p>{{ case.facts }}</p>
<p>{{ case.volumes }}</p>
{% if case.findings %}<ul>{% for f in case.findings %}
<li class="{{ f.severity }}">{{ f.severity }} [{{ f.code }}]: {{ f.message }}</li>{% endfor %}</ul>{% endif %}
</article>
{% endfor %}</main></body></html>
"""


def write_page(path: Path | str, inspection: Inspection) -> Path:
    """Writes one self-contained page, nothing loaded from anywhere.

    Raises:
        RunError: the file exists already; nothing is overwritten.
    """
    path = Path(path)
    template = jinja2.Environment(autoescape=True).from_string(_PAGE)
    page = template.render(title=f"Scans in {inspection.folder.name}", summary=inspection.summary()[1:],
                           keys=[(COLOURS[value], NAMES[value]) for value in COLOURS],
                           cases=[_shown(case) for case in inspection.cases])
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("xb") as file:
            file.write(page.encode("utf-8", "replace"))
    except FileExistsError as error:
        raise RunError(f"{path} exists already and is not overwritten: remove it, or give another path") from error
    return path


def _shown(case: Case) -> dict[str, Any]:
    known = [f"{name} {ml:.1f} ml" for name in REGIONS if (ml := case.volumes_ml[name]) is not None]
    facts = [case.label_convention and f"labels {case.label_convention}", case.orientation,
             case.shape and "x".join(map(str, case.shape)),
             case.spacing_mm and " x ".join(f"{s:.3g}" for s in case.spacing_mm) + " mm", ", ".join(case.modalities)]
    return {"patient": case.patient, "usable": case.usable, "facts": " · ".join(fact for fact in facts if fact),
            "volumes": " · ".join(known) or "no tumour volumes", "findings": case.findings,
            "alt": f"axial {case.picture.modality} slice of {case.patient}" if case.picture else "",
            "image": _png(case.picture) if case.picture else ""}


def _png(picture: Slice) -> str:
    """The slice in grey with its labels in colour, square pixels, as base64."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imsave

    shown = np.repeat(picture.grey[..., None], 3, axis=2).astype(np.float32) / 255
    if picture.label is not None:
        for value, colour in COLOURS.items():
            here = picture.label == value
            shown[here] = 0.55 * shown[here] + 0.45 * np.asarray(to_rgb(colour), dtype=np.float32)
    height, width = (max(1, round(n * mm / min(picture.pixel_mm))) for n, mm in
                     zip(picture.grey.shape, picture.pixel_mm, strict=True))
    rows = np.arange(min(height, 1024)) * picture.grey.shape[0] // min(height, 1024)
    columns = np.arange(min(width, 1024)) * picture.grey.shape[1] // min(width, 1024)
    buffer = io.BytesIO()
    imsave(buffer, shown[rows][:, columns], format="png")
    return base64.b64encode(buffer.getvalue()).decode()
