"""The interactive viewer: NiiVue's linked slices and 3-D view (ipyniivue), with controls beside it.

The browser gets bytes, cropped to the head, and only of the modality and the layer that are shown: choosing another
one replaces the voxels of the same two volumes. Nothing is fetched from anywhere: ipyniivue brings its script along.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import anywidget
import ipywidgets
import nibabel as nib
import numpy as np
import numpy.typing as npt
import traitlets
from ipyniivue import MultiplanarType, NiiVue, ShowRender, SliceType
from ipyniivue import Volume as NiiVueVolume
from ipyniivue.traits import LUT
from matplotlib.colors import to_rgb

from fedlab.core.types import MODALITIES
from fedlab.view.presentation import OVERLAYS, VIEWS, Look, colours_of, legend_of, painted
from fedlab.view.slices import COLOURS
from fedlab.view.style import arm_label
from fedlab.view.volumes import REFERENCE, Case

__all__ = ["NiiVuePanel"]

_SLICES: Mapping[str, SliceType] = {
    "all": SliceType.MULTIPLANAR, "axial": SliceType.AXIAL, "coronal": SliceType.CORONAL,
    "sagittal": SliceType.SAGITTAL, "3-D": SliceType.RENDER,
}
_SHORT = {1: "NCR", 2: "ED", 4: "ET"}
_PLANES = ("sagittal", "coronal", "axial")  # in the order of the axes x, y, z that they cut
_LARGEST = max(COLOURS)
_POSTER = """
export default {
  render({ model, el }) {
    const image = document.createElement("img");
    image.src = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
    image.style.cssText = "position: absolute; z-index: 1; width: 100%; object-fit: contain; background: white;"
      + `height: ${model.get("height")}px`;
    el.style.cssText = "position: relative; height: 0; overflow: visible";
    el.append(image);
    const step_aside = () => { if (model.get("covered")) image.remove(); };
    model.on("change:covered", step_aside);
    step_aside();
  }
};
"""


class _Poster(anywidget.AnyWidget):
    """A still picture over the canvas until the browser has loaded the volumes; without WebGL it stays."""

    _esm = _POSTER
    png = traitlets.Bytes().tag(sync=True)
    height = traitlets.Int().tag(sync=True)
    covered = traitlets.Any().tag(sync=True)


class _Layer(NiiVueVolume):  # type: ignore[misc]
    """A volume whose voxels can be replaced, and that doesn't take back a copy of them from the browser."""

    @traitlets.validate("id")
    def _validate_no_change(self, proposal: Any) -> Any:
        return proposal["value"]

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state({name: value for name, value in state.items() if not name.startswith("chunk_")})

    def repaint(self, array: npt.NDArray[np.uint8], affine: npt.NDArray[np.float64]) -> None:
        """Replaces the voxels, here for a browser that opens later and in the one that is open."""
        self.data = _nifti(array, affine)
        self.send({"type": "buffer_change", "data": {"attr": "img", "type": "uint8"}},
                  buffers=[array.tobytes(order="F")])


def _nifti(array: npt.NDArray[np.uint8], affine: npt.NDArray[np.float64]) -> bytes:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    data: bytes = image.to_bytes()
    return data


class NiiVuePanel:
    """Canvas, controls, legend and numbers of one case, kept in step.

    Attributes:
        case: who is shown.
        look: what is shown now.
        canvas: the NiiVue widget.
        poster: a still picture in its place until the browser has drawn it; for good where there is no WebGL.
        controls: the ipywidgets by name: modality, view, arm, overlay, opacity, NCR, ED, ET, sagittal, coronal, axial.
        numbers: volumes and Dice of what is shown.
        legend: what the colours mean.
        widget: all of it, to be displayed.
    """

    def __init__(self, case: Case, look: Look, *, height: int, poster: bytes) -> None:
        self.case, self.look = case, look
        self._moving = False
        self.poster = _Poster(png=poster, height=height)
        self.canvas = NiiVue(
            height=height, slice_type=_SLICES[look.view], multiplanar_show_render=ShowRender.ALWAYS,
            multiplanar_layout=MultiplanarType.ROW,
            is_radiological_convention=True, sagittal_nose_left=True, show_all_orientation_markers=True,
            font_color=(1.0, 1.0, 1.0, 0.9), crosshair_width=0.8 / max(case.patient.spacing_mm),  # voxels
            crosshair_color=(0.5, 0.83, 1.0, 0.8), show_3d_crosshair=False, drag_and_drop_enabled=False,
            log_level="error",
            # In 3-D the brain is glass, and what enhances shows through the oedema.
            gradient_opacity=0.6, render_overlay_blend=0.45)
        self._scan = _Layer(data=_nifti(case.grey(look.modality), case.affine), name="scan.nii", colormap="gray",
                            cal_min=0.0, cal_max=255.0, opacity=1.0)
        self._over = _Layer(data=_nifti(self._painted(look), case.affine), name="overlay.nii", opacity=look.opacity,
                            colormap_label=self._colours(look), cal_min=0.0, cal_max=float(_LARGEST))
        self.canvas.load_volumes([self._scan, self._over])
        self.canvas.on_location_change(self._located)
        # The browser writes it once it has drawn a volume; no kernel, busy or not, has a part in it.
        ipywidgets.jsdlink((self.canvas, "_volume_object_3d_data"), (self.poster, "covered"))
        self.numbers, self.legend = ipywidgets.HTML(), ipywidgets.HTML()
        self.controls = _controls(case, look)
        for control in self.controls.values():
            control.observe(self._changed, names="value")
        self._write()
        self._point()
        self.widget = self._arranged()

    def close(self) -> None:
        """Frees the canvas in the browser and the bytes in the kernel."""
        for part in (self.canvas, self.poster, self._scan, self._over, *self.controls.values(), self.numbers,
                     self.legend, self.widget):
            part.close()

    def _arranged(self) -> Any:
        controls = self.controls
        first = ipywidgets.HBox([controls[name] for name in ("modality", "view", "arm", "overlay")],
                                layout=ipywidgets.Layout(flex_flow="row wrap"))
        second = ipywidgets.HBox([*(controls[name] for name in _PLANES), controls["opacity"]],
                                 layout=ipywidgets.Layout(flex_flow="row wrap"))
        labels = ipywidgets.HBox([controls[name] for name in _SHORT.values()])
        side = ipywidgets.VBox([self.numbers, labels, self.legend], layout=ipywidgets.Layout(width="270px"))
        wide = ipywidgets.Layout(flex="1 1 auto", display="block")  # in a flexible box a canvas is 0 pixels wide
        middle = ipywidgets.HBox([ipywidgets.Box([self.poster, self.canvas], layout=wide), side])
        return ipywidgets.VBox([first, middle, second])

    def _changed(self, change: Any) -> None:
        """One of the controls moved: what is shown follows, and only what changed is sent."""
        if self._moving:
            return
        before, value = self.look, {name: control.value for name, control in self.controls.items()}
        self.look = look = replace(
            before, modality=value["modality"], view=value["view"], layer=value["arm"], overlay=value["overlay"],
            opacity=value["opacity"], labels=tuple(label for label, name in _SHORT.items() if value[name]),
            crosshair=tuple(value[plane] - self.case.box[axis].start for axis, plane in enumerate(_PLANES)))
        if look.modality != before.modality:
            self._scan.repaint(self.case.grey(look.modality), self.case.affine)
        if (look.layer, look.overlay) != (before.layer, before.overlay):
            self._over.repaint(self._painted(look), self.case.affine)
        if (look.labels, look.region) != (before.labels, before.region):
            self._over.colormap_label = self._colours(look)
        if look.opacity != before.opacity:
            self._over.opacity = look.opacity
        if look.view != before.view:
            self.canvas.set_slice_type(_SLICES[look.view])
        if look.crosshair != before.crosshair:
            self._point()
        if (look.layer, look.overlay, look.labels) != (before.layer, before.overlay, before.labels):
            self._write()

    def _painted(self, look: Look) -> npt.NDArray[np.uint8]:
        values = painted(self.case, look, look.layer)
        return np.zeros(self.case.shape, dtype=np.uint8) if values is None else np.ascontiguousarray(values)

    def _colours(self, look: Look) -> LUT:
        """A colour for each value from 0 on; the values of labels that aren't drawn are clear."""
        shown = colours_of(replace(look, opacity=1.0))
        rows = [tuple(round(255 * part) for part in (*to_rgb(shown[value][0]), shown[value][1])) if value in shown
                else (0, 0, 0, 0) for value in range(_LARGEST + 1)]
        return LUT(lut=[part for row in rows for part in row], min=0, max=_LARGEST)

    def _point(self) -> None:
        """Puts the crosshair into the middle of its voxel; the viewer counts in fractions of the box."""
        self.canvas.scene.crosshair_pos = [
            (voxel + 0.5) / size for voxel, size in zip(self.look.crosshair, self.case.shape, strict=True)]

    def _located(self, location: dict[str, Any]) -> None:
        """Somebody clicked into a slice: the sliders follow, and send nothing back."""
        found = [min(max(int(place * size), 0), size - 1)
                 for place, size in zip(location["frac"], self.case.shape, strict=False)]
        if len(found) != 3:
            return
        self._moving = True
        try:
            for axis, plane in enumerate(_PLANES):
                self.controls[plane].value = found[axis] + self.case.box[axis].start
        finally:
            self._moving = False
        self.look = replace(self.look, crosshair=(found[0], found[1], found[2]))

    def _write(self) -> None:
        look = self.look
        self.numbers.value = self.case.table(look.layer) if look.layer is not None else (
            f"<b>{html.escape(self.case.patient.id)}</b><br>no label map, no prediction")
        self.legend.value = "".join(
            f'<div><span style="display:inline-block;width:.9em;height:.9em;background:{colour}"></span> '
            f"{html.escape(name)}</div>" for colour, name in legend_of(look).items()) + (
            "<div>R, L: the patient's right and left</div>")


def _controls(case: Case, look: Look) -> dict[str, Any]:
    layers: Sequence[tuple[str, str | None]] = [(arm_label(name), name) for name in case.layers] or [("none", None)]
    errors = REFERENCE in case.layers and len(case.layers) > 1
    narrow = ipywidgets.Layout(width="220px")
    style = {"description_width": "62px"}
    controls: dict[str, Any] = {
        "modality": ipywidgets.Dropdown(options=MODALITIES, value=look.modality, description="modality"),
        "view": ipywidgets.Dropdown(options=[("planes and 3-D", "all"), *((name, name) for name in VIEWS[1:])],
                                    value=look.view, description="plane"),
        "arm": ipywidgets.Dropdown(options=layers, value=look.layer, description="arm"),
        "overlay": ipywidgets.Dropdown(options=OVERLAYS if errors else ("labels", "none"), value=look.overlay,
                                       description="overlay"),
        "opacity": ipywidgets.FloatSlider(value=look.opacity, min=0.0, max=1.0, step=0.05, description="opacity"),
    }
    for axis, plane in enumerate(_PLANES):
        start, size = case.box[axis].start, case.shape[axis]
        controls[plane] = ipywidgets.IntSlider(value=start + look.crosshair[axis], min=start, max=start + size - 1,
                                               description=plane)
    for control in controls.values():
        control.layout, control.style = narrow, style
    for label, name in _SHORT.items():
        controls[name] = ipywidgets.ToggleButton(value=label in look.labels, description=name,
                                                 tooltip="shown or hidden", layout=ipywidgets.Layout(width="78px"))
    return controls
