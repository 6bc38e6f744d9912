"""One patient in slices and in 3-D: `show`, with NiiVue, itkwidgets or a still picture as its backend."""

from __future__ import annotations

import importlib.util
import os
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from fedlab.core.extras import MissingExtra, install_command
from fedlab.core.settings import check_choice
from fedlab.core.types import MODALITIES, Patient
from fedlab.view.label_layers import REFERENCE, Case, Prediction, View, ViewSettings, make_case
from fedlab.view.widget_snapshot import running_kernel

if TYPE_CHECKING:
    from fedlab.view.picture import Picture

__all__ = ["Backend", "Viewer", "show"]

Backend: TypeAlias = Literal["auto", "niivue", "itk", "static"]
_DPI = 110  # of the picture that a notebook keeps
_POSTER_DPI = 80  # of the picture shown until the canvas is ready
_SAVED = ("Drag in a slice to move the crosshair, scroll to page through slices, drag the head to turn it. Slices are "
          "in radiological convention: the patient's right (R) is on the left.")


class Viewer:
    """A viewer of one patient. As the last value of a cell it is displayed; elsewhere use `display(viewer)`.

    A notebook also stores a still picture, for pages without a kernel and for converters.

    Attributes:
        case: the patient and the layers over it.
        backend: "niivue", "itk" or "static".
    """

    def __init__(self, case: Case, settings: ViewSettings, backend: str, height: int) -> None:
        self.case, self.backend = case, backend
        self._settings, self._height = settings, height
        self._panel: Any = None
        self._still: tuple[bytes, dict[str, int]] | None = None

    @property
    def panel(self) -> Any:
        """Canvas and controls of the interactive backend, created on first use; None for the static one."""
        if self._panel is None and self.backend == "niivue":
            from fedlab.view.niivue import NiiVuePanel

            self._panel = NiiVuePanel(self.case, self._settings, height=self._height, poster=self._poster()[0])
        elif self._panel is None and self.backend == "itk":
            from fedlab.view.itk import ItkPanel

            self._panel = ItkPanel(self.case, self._settings, self._replace_poster())
        return self._panel

    @property
    def settings(self) -> ViewSettings:
        """What is shown now; the controls of the interactive backend change it."""
        return self._settings if self._panel is None else self._panel.settings

    def picture(self, *, every: bool = True) -> Picture:
        """The current view as a figure: one row per layer, the reference and the arms, or only the layer shown."""
        from fedlab.view.static_view import draw_case

        errors = self.settings.region is not None
        layers = [name for name in self.case.layers if not (errors and name == REFERENCE)] if every else None
        return draw_case(self.case, self.settings, layers=layers or None)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the viewer as a page that opens from disk in a browser, without a kernel and a network.

        It holds the finite modalities and all layers of the patient; the layer, view and place shown now come first.

        Raises:
            RunError: the file exists already, or ipyniivue is not installed.
            ValueError: a name that does not end in .html.
        """
        from fedlab.view.live_viewer import live_viewer
        from fedlab.view.report_page import Section, write_report

        if Path(path).suffix.lower() != ".html":
            raise ValueError(f"a viewer is saved as a page, .html, got {Path(path).name!r}; picture().savefig writes "
                             "images")
        live = live_viewer([self.case], self.settings)
        return write_report(Path(path), title=self.case.patient.id, lead=_SAVED, sections=[Section(live=live)])

    def close(self) -> None:
        """Frees the widgets in the browser and in the kernel."""
        if self._panel is not None:
            self._panel.close()

    def __repr__(self) -> str:
        layers = ", ".join(self.case.layers) or "no labels"
        return f"<Viewer of {self.case.patient.id}: {layers}; backend {self.backend!r}>"

    def _poster(self) -> tuple[bytes, dict[str, int]]:
        """The first view as a picture, drawn once."""
        if self._still is None:
            self._still = self.picture(every=False)._repr_png_(dpi=_POSTER_DPI)
        return self._still

    def _replace_poster(self) -> Callable[[str | None], None]:
        """Displays a still picture; what is returned takes it away, or puts the reason over it that it stays."""
        from IPython.display import display

        png, size = self._poster()
        bundle, metadata = {"image/png": png, "text/plain": repr(self)}, {"image/png": size}
        handle: Any = display(bundle, raw=True, metadata=metadata, display_id=True)  # type: ignore[no-untyped-call]

        def report(missing: str | None) -> None:
            if missing is None:
                handle.update({"text/plain": repr(self)}, raw=True)
                return
            picture = f'<img width="{size["width"]}" src="data:image/png;base64,{b64encode(png).decode("ascii")}">'
            handle.update({"text/plain": missing, "text/html": f"<p>{escape(missing)}</p>{picture}"}, raw=True)

        return report

    def _ipython_display_(self) -> None:
        """Displays a still picture at once; the canvas replaces it when the browser has loaded it."""
        from IPython.display import display

        if self.backend == "itk":
            self._panel = None  # itkwidgets shows a viewer where it was made, and only there
            _ = self.panel
            return
        show_bundle: Any = display
        if self.backend == "niivue" and self._panel is None:
            png, size = self._poster()
            show_bundle = display({"image/png": png, "text/plain": repr(self)},  # type: ignore[no-untyped-call]
                                  raw=True, metadata={"image/png": size}, display_id=True).update
        bundle, metadata = self._repr_mimebundle_()
        show_bundle(bundle, raw=True, metadata=metadata)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        widget = self.panel.widget if self.backend == "niivue" else None  # it starts while we draw
        drawn = self.picture()
        png, size = drawn._repr_png_(dpi=_DPI)
        bundle: dict[str, Any] = {"text/plain": f"{self!r}\n{drawn.alt}", "image/png": png}
        if widget is not None:
            bundle = widget._repr_mimebundle_() | bundle
        return bundle, {"image/png": size}


def show(patient: Patient, prediction: Prediction | Mapping[str, Prediction] | None = None, *,
         modality: str = MODALITIES[0], view: View = "all", arm: str | None = None, overlay: str = "labels",
         opacity: float = 0.6, labels: Sequence[int] = (1, 2, 4), crosshair: tuple[int, int, int] | None = None,
         backend: Backend = "auto", height: int = 520) -> Viewer:
    """Shows a patient in linked slices and in 3-D: four modalities, the expert's labels, and predictions of arms.

    Controls beside the canvas change every choice; volumes [ml] and Dice of the layer stand next to them.

    Args:
        patient: axes right, anterior, superior, as `read_patient` and `make_cohort` return it.
        prediction: compared with the reference: one prediction, or name of an arm -> prediction. Each is a label map
            (X, Y, Z), regions or probabilities (3, X, Y, Z), a nibabel image, or the path of a NIfTI file.
        modality: one of `MODALITIES`.
        view: "all" (three planes and 3-D), "axial", "coronal", "sagittal" or "3-D".
        arm: the layer over the scan, "reference" or an arm; by default the first arm, else the reference.
        overlay: "labels", the false positives and negatives of a region as "errors WT", "errors TC" or "errors ET",
            or "none".
        opacity: of the overlay, from 0 to 1.
        labels: which of 1 (NCR), 2 (ED) and 4 (ET) are drawn.
        crosshair: voxel of the patient's grid where the planes meet; by default in the largest part of the tumour.
        backend: "niivue" (interactive), "itk" (itkwidgets), "static" (matplotlib), or "auto": "niivue" in a notebook
            where ipyniivue is installed, else "static".
        height: of the interactive canvas in pixels.

    Raises:
        ValueError: a prediction on another grid, invalid labels, NaN, or an unknown choice.
        RunError: the backend cannot work here; the message says what to do.

    Example:
        >>> patient = fl.make_cohort(sites=1, patients=2, shape=(32, 32, 32), spacing_mm=6.0)[0].train[0]
        >>> viewer = fl.show(patient, {"public": fl.predict(fl.public_model(), patient)})
        >>> path = viewer.save("patient.html")  # one file, opens without a network
    """
    arms: Mapping[str, Prediction] = {} if prediction is None else (
        prediction if isinstance(prediction, Mapping) else {"prediction": prediction})
    case = make_case(patient, arms)
    if arm is None:
        arm = next(iter(arms), REFERENCE if REFERENCE in case.layers else None)
    settings = ViewSettings(modality=modality, view=view, layer=arm, overlay=overlay, opacity=opacity,
                            labels=tuple(labels), crosshair=case.centre())
    if arm is not None:
        case.layer(arm)
    if settings.region is not None and REFERENCE not in case.layers:
        raise ValueError(f"patient {patient.id} has no label map, so there is no error map; overlay='labels' shows the "
                         "prediction")
    if crosshair is not None:
        grid = tuple(patient.image.shape[1:])
        if len(crosshair) != 3 or not all(0 <= voxel < size for voxel, size in zip(crosshair, grid, strict=True)):
            raise ValueError(f"crosshair is a voxel of the grid {grid}, got {crosshair}")
        x, y, z = (min(max(voxel - part.start, 0), part.stop - part.start - 1)
                   for voxel, part in zip(crosshair, case.box, strict=True))
        settings = replace(settings, crosshair=(x, y, z))
    case.grey(modality)  # an image that cannot be shown raises here, not while the notebook draws it
    return Viewer(case, settings, _usable(backend), height)


def _usable(backend: str) -> str:
    """Resolves "auto", and checks that the backend can work here."""
    check_choice(get_args(Backend), backend=backend)
    if backend == "auto":
        return "niivue" if _in_notebook() and _installed("ipyniivue", "ipywidgets") else "static"
    if backend == "niivue" and not _installed("ipyniivue", "ipywidgets"):
        raise MissingExtra("backend='niivue' needs ipyniivue and ipywidgets, which are not installed. Install them "
                           f"with: {install_command('lab')}, or use backend='static'")
    if backend == "itk":
        from fedlab.view.itk import require

        require()
    return backend


def _installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


def _in_notebook() -> bool:
    return running_kernel() is not None
