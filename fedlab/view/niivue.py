"""The interactive viewer: NiiVue's linked slices and 3-D view (ipyniivue), with controls beside it.

The browser receives bytes, cropped to the head, of the modality and the layer shown only: another choice replaces the
voxels of the same two volumes. Nothing is downloaded: ipyniivue contains its script. Import this module inside
functions: it loads ipywidgets.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import numpy as np
import numpy.typing as npt
import traitlets
from ipyniivue import NiiVue, SliceType
from ipyniivue import Volume as NiiVueVolume
from ipyniivue.traits import LUT
from matplotlib.colors import to_rgba

from fedlab.core.files import filled_in
from fedlab.core.types import MODALITIES
from fedlab.view.colours import LABEL_ABBREVIATIONS, LABEL_COLOURS, arm_label
from fedlab.view.label_layers import OVERLAYS, REFERENCE, VIEWS, Case, ViewSettings
from fedlab.view.live_viewer import nifti_bytes, niivue_script, viewer_script
from fedlab.view.slices import AXES

__all__ = ["NiiVuePanel"]

_SLICES: Mapping[str, SliceType] = {
    "all": SliceType.MULTIPLANAR, "axial": SliceType.AXIAL, "coronal": SliceType.CORONAL,
    "sagittal": SliceType.SAGITTAL, "3-D": SliceType.RENDER,
}
_LARGEST = max(LABEL_ABBREVIATIONS)


class Canvas(NiiVue):  # type: ignore[misc]
    """ipyniivue's canvas with fedlab's arrangement of views, surfaces, marks and tools; see templates/viewer.js.

    Attributes:
        shown: what the browser names and draws beside: `NiiVuePanel.shown`.
        beside: gzip of the voxels of the layer shown beside, x fastest; empty if there is none.
    """

    _script = niivue_script()
    _esm = (f"{_script.text}\nexport default (() => {{\nconst inner = {_script.widget}, NVMesh = {_script.mesh}, "
            f"instance = () => {_script.instance};\n{viewer_script('notebook')}\n}})();")
    shown = traitlets.Dict().tag(sync=True)
    beside = traitlets.Bytes().tag(sync=True)


class _Poster(anywidget.AnyWidget):
    """A still picture over the canvas until the browser has drawn the volumes; without WebGL it stays."""

    _esm = (Path(__file__).parent / "templates" / "poster.js").read_text("utf-8")
    png = traitlets.Bytes().tag(sync=True)
    height = traitlets.Int().tag(sync=True)
    covered = traitlets.Any().tag(sync=True)


class _Layer(NiiVueVolume):  # type: ignore[misc]
    """A volume whose voxels can be replaced, and that accepts no copy of them back from the browser."""

    @traitlets.validate("id")
    def _validate_no_change(self, proposal: Any) -> Any:
        return proposal["value"]

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state({name: value for name, value in state.items() if not name.startswith("chunk_")})

    def repaint(self, array: npt.NDArray[np.uint8], affine: npt.NDArray[np.float64]) -> None:
        """Replaces the voxels here, for a browser that connects later, and in the connected one."""
        self.data = nifti_bytes(array, affine)
        self.send({"type": "buffer_change", "data": {"attr": "img", "type": "uint8"}},
                  buffers=[array.tobytes(order="F")])


class NiiVuePanel:
    """Canvas, controls, legend and numbers of one case, kept in step; `widget` is the box to be displayed.

    Attributes:
        canvas: the NiiVue widget.
        poster: a still picture in its place until the browser has drawn it; permanent where there is no WebGL.
        controls: the ipywidgets by name: modality, view, arm, overlay, opacity, NCR, ED, ET, sagittal, coronal, axial.
        numbers, legend: volumes and Dice of the layer shown, and the meaning of the colours.
    """

    def __init__(self, case: Case, settings: ViewSettings, *, height: int, poster: bytes) -> None:
        self.case, self.settings = case, settings
        self._moving = False
        self.poster = _Poster(png=poster, height=height)
        self.canvas = Canvas(height=height, slice_type=_SLICES[settings.view], is_radiological_convention=True,
                             sagittal_nose_left=True, drag_and_drop_enabled=False, log_level="error")
        self._beside: str | None = None
        self._ranges: dict[str, tuple[float, float]] = {}
        self._scan = _Layer(data=nifti_bytes(case.grey(settings.modality), case.affine), name="scan.nii",
                            colormap="gray", cal_min=0.0, cal_max=255.0, opacity=1.0)
        self._over = _Layer(data=nifti_bytes(self._values(), case.affine), name="overlay.nii", opacity=settings.opacity,
                            colormap_label=self._colour_table(), cal_min=0.0, cal_max=float(_LARGEST))
        self.canvas.load_volumes([self._scan, self._over])
        self.canvas.on_location_change(self._clicked)
        # The browser sets it once it has drawn a volume, without the kernel, which may be busy.
        ipywidgets.jsdlink((self.canvas, "_volume_object_3d_data"), (self.poster, "covered"))
        self.numbers, self.legend = ipywidgets.HTML(), ipywidgets.HTML()
        self.controls = _controls(case, settings)
        for control in self.controls.values():
            control.observe(self._changed, names="value")
        self._write()
        self._move_crosshair()
        rows = (("modality", "view", "arm", "overlay"), (*AXES, "opacity"))
        above, below = (ipywidgets.HBox([self.controls[name] for name in row],
                                        layout=ipywidgets.Layout(flex_flow="row wrap")) for row in rows)
        labels = ipywidgets.HBox([self.controls[name] for name in LABEL_ABBREVIATIONS.values()])
        side = ipywidgets.VBox([self.numbers, labels, self.legend], layout=ipywidgets.Layout(width="290px"))
        wide = ipywidgets.Layout(flex="1 1 auto", display="block")  # in a flexible box a canvas is 0 pixels wide
        middle = ipywidgets.HBox([ipywidgets.Box([self.poster, self.canvas], layout=wide), side])
        self.widget = ipywidgets.VBox([above, middle, below])

    def close(self) -> None:
        """Frees the canvas in the browser and the bytes in the kernel."""
        for part in (self.canvas, self.poster, self._scan, self._over, *self.controls.values(), self.numbers,
                     self.legend, self.widget):
            part.close()

    def _changed(self, change: Any) -> None:
        """Updates the view after a control has moved, and sends only what has changed."""
        if self._moving:
            return
        before, value = self.settings, {name: control.value for name, control in self.controls.items()}
        self.settings = now = replace(
            before, layer=value["arm"], **{name: value[name] for name in ("modality", "view", "overlay", "opacity")},
            labels=tuple(label for label, name in LABEL_ABBREVIATIONS.items() if value[name]),
            crosshair=tuple(value[plane] - self.case.box[axis].start for plane, axis in AXES.items()))
        if now.modality != before.modality:
            self._scan.repaint(self.case.grey(now.modality), self.case.affine)
        if (now.layer, now.overlay) != (before.layer, before.overlay):
            self._over.repaint(self._values(), self.case.affine)
        if (now.labels, now.region) != (before.labels, before.region):
            self._over.colormap_label = self._colour_table()
        if now.opacity != before.opacity:
            self._over.opacity = now.opacity
        if now.view != before.view:
            self.canvas.set_slice_type(_SLICES[now.view])
        if now.crosshair != before.crosshair:
            self._move_crosshair()
        if replace(now, crosshair=before.crosshair, view=before.view) != before:
            self._write()

    def _values(self) -> npt.NDArray[np.uint8]:
        values = self.settings.values(self.case, self.settings.layer)
        return np.zeros(self.case.shape, dtype=np.uint8) if values is None else np.ascontiguousarray(values)

    def _colour_table(self) -> LUT:
        """One colour per value from 0 on; labels that are not drawn are transparent."""
        return LUT(lut=_table(replace(self.settings, opacity=1.0)), min=0, max=_LARGEST)

    def _move_crosshair(self) -> None:
        """Puts the crosshair into the centre of its voxel; NiiVue counts in fractions of the box."""
        self.canvas.scene.crosshair_pos = [
            (voxel + 0.5) / size for voxel, size in zip(self.settings.crosshair, self.case.shape, strict=True)]

    def _clicked(self, location: dict[str, Any]) -> None:
        """Moves the sliders to a click into a slice, and sends nothing back."""
        if len(location["frac"]) != 3:
            return
        last = np.subtract(self.case.shape, 1)
        x, y, z = np.clip(np.multiply(location["frac"], self.case.shape).astype(int), 0, last).tolist()
        self._moving = True
        try:
            for plane, axis in AXES.items():
                self.controls[plane].value = (x, y, z)[axis] + self.case.box[axis].start
        finally:
            self._moving = False
        self.settings = replace(self.settings, crosshair=(x, y, z))

    def _shown(self) -> dict[str, Any]:
        """What the browser needs to know besides the two volumes."""
        now, case = self.settings, self.case
        if now.modality not in self._ranges:
            self._ranges[now.modality] = case.grey_range(now.modality)
        low, high = self._ranges[now.modality]
        if (other := case.beside(now.layer)) != self._beside:
            self._beside = other
            self.canvas.beside = b"" if other is None else gzip.compress(case.layer(other).tobytes(order="F"), 1)
        beside = None if other is None or now.overlay == "none" else {
            "name": arm_label(other), "left": other == REFERENCE, "colours": _table(replace(now, overlay="labels"))}
        return {"patient": case.patient.id, "layer": "" if now.layer is None else arm_label(now.layer),
                "modality": now.modality, "low": low, "high": high, "start": [part.start for part in case.box],
                "names": now.names(), "beside": beside}

    def _write(self) -> None:
        layer, case = self.settings.layer, self.case
        self.canvas.shown = self._shown()
        for label, name in LABEL_ABBREVIATIONS.items():
            chip = self.controls[name]
            chip.icon = "check" if label in self.settings.labels else ""
            chip.disabled = self.settings.region is not None
        count = 3 if case.scored(layer) else 1
        rows = [] if layer is None else [
            (fact.region, (f"{fact.ml:.1f}", f"{fact.reference_ml:.1f}", f"{fact.dice:.3f}")[:count])
            for fact in case.facts(layer)]
        self.numbers.value = filled_in("fedlab.view", "layer_numbers.html", patient=case.patient.id, layer=layer,
                                       rows=rows, columns=("", "ml", "reference ml", "Dice")[:count + 1])
        self.legend.value = filled_in("fedlab.view", "colour_legend.html", legend=self.settings.legend())


def _table(settings: ViewSettings) -> list[int]:
    """Red, green, blue and opacity of the values 0 to 4 of the overlay, from 0 to 255, one after the other."""
    table = np.zeros((_LARGEST + 1, 4))
    for value, (colour, opacity) in settings.colours().items():
        table[value] = to_rgba(colour, opacity)
    return list(map(int, np.rint(255 * table).ravel()))


def _controls(case: Case, settings: ViewSettings) -> dict[str, Any]:
    layers: Sequence[tuple[str, str | None]] = [(arm_label(name), name) for name in case.layers] or [("none", None)]
    overlays = OVERLAYS if REFERENCE in case.layers and len(case.layers) > 1 else ("labels", "none")
    menu = ipywidgets.Dropdown
    controls: dict[str, Any] = {
        "modality": menu(options=MODALITIES, value=settings.modality, description="modality"),
        "view": menu(options=[("planes and 3-D", "all"), *((name, name) for name in VIEWS[1:])], value=settings.view,
                     description="plane"),
        "arm": menu(options=layers, value=settings.layer, description="arm"),
        "overlay": menu(options=overlays, value=settings.overlay, description="overlay"),
        "opacity": ipywidgets.FloatSlider(value=settings.opacity, max=1.0, step=0.05, description="opacity"),
    }
    for plane, axis in AXES.items():
        start, size = case.box[axis].start, case.shape[axis]
        controls[plane] = ipywidgets.IntSlider(value=start + settings.crosshair[axis], min=start,
                                               max=start + size - 1, description=plane)
    for name, control in controls.items():
        wide = name in AXES or name == "opacity"
        control.layout = ipywidgets.Layout(width="300px" if wide else "210px")
        control.style = {"description_width": "62px"}
    for label, name in LABEL_ABBREVIATIONS.items():
        controls[name] = ipywidgets.ToggleButton(value=label in settings.labels, description=name,
                                                 tooltip="shown or hidden", layout=ipywidgets.Layout(
                                                     width="82px", border_left=f"10px solid {LABEL_COLOURS[label]}"))
    return controls
