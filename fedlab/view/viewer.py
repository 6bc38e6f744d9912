"""One patient, to look at from all sides: `show`, behind which stand NiiVue, itkwidgets or a plain picture."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

from fedlab.core.errors import RunError
from fedlab.core.types import MODALITIES, Patient
from fedlab.view.presentation import Look, View, picture
from fedlab.view.style import Picture
from fedlab.view.volumes import REFERENCE, Case, Prediction, make_case

__all__ = ["Backend", "Viewer", "show"]

Backend: TypeAlias = Literal["auto", "niivue", "itk", "static"]
_DPI = 110  # of the picture that a notebook keeps
_POSTER_DPI = 80  # of the one that is seen until the canvas is ready


class Viewer:
    """A patient on show. As the last value of a cell it appears; elsewhere `display(viewer)` shows it.

    What a notebook keeps is a picture, so that a page without a kernel, or a converter, has something to show.

    Attributes:
        case: the patient and the layers over it.
        backend: "niivue", "itk" or "static".
        panel: canvas and controls of the interactive backend; None for the static one.
    """

    def __init__(self, case: Case, look: Look, backend: str, height: int) -> None:
        self.case, self.backend = case, backend
        self._look, self._height = look, height
        self._panel: Any = None

    @property
    def panel(self) -> Any:
        """Canvas and controls of the interactive backend, made when they are first asked for; None for the static."""
        if self._panel is None and self.backend == "niivue":
            from fedlab.view.niivue import NiiVuePanel

            self._panel = NiiVuePanel(self.case, self._look, height=self._height, poster=self._poster())
        elif self._panel is None and self.backend == "itk":
            from fedlab.view.itk import ItkPanel

            self._panel = ItkPanel(self.case, self._look)
        return self._panel

    @property
    def look(self) -> Look:
        """What is shown now; the controls of the interactive backend change it."""
        look: Look = self._look if self._panel is None or self.backend != "niivue" else self._panel.look
        return look

    def picture(self, *, every: bool = True) -> Picture:
        """What is shown, as a matplotlib figure.

        Args:
            every: a row for each layer, the reference and the arms; else only the one that is chosen.
        """
        layers = list(self.case.layers) if every and self.look.region is None else None
        if every and self.look.region is not None:
            layers = [name for name in self.case.layers if name != REFERENCE] or None
        return picture(self.case, self.look, layers=layers)

    def close(self) -> None:
        """Frees what the interactive view holds in the browser and in the kernel."""
        if self._panel is not None:
            self._panel.close()

    def __repr__(self) -> str:
        layers = ", ".join(self.case.layers) or "no labels"
        return f"<Viewer of {self.case.patient.id}: {layers}; backend {self.backend!r}>"

    def _poster(self) -> bytes:
        return self.picture(every=False)._repr_png_(dpi=_POSTER_DPI)[0]

    def _ipython_display_(self) -> None:
        """A still picture at once; the canvas takes its place when the browser has what it needs."""
        from IPython.display import display

        place: Any = None
        if self.backend == "niivue" and self._panel is None:
            png, size = self.picture(every=False)._repr_png_(dpi=_POSTER_DPI)
            place = display({"image/png": png, "text/plain": repr(self)}, raw=True,  # type: ignore[no-untyped-call]
                            metadata={"image/png": size}, display_id=True)
        bundle, metadata = self._repr_mimebundle_()
        if place is None:
            display(bundle, raw=True, metadata=metadata)  # type: ignore[no-untyped-call]
        else:
            place.update(bundle, raw=True, metadata=metadata)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        drawn = self.picture()
        png, size = drawn._repr_png_(dpi=_DPI)
        bundle: dict[str, Any] = {"text/plain": f"{self!r}\n{drawn.alt}", "image/png": png}
        if self.backend == "niivue":
            live = self.panel.widget._repr_mimebundle_()
            bundle |= {kind: data for kind, data in live.items() if kind not in bundle}
        return bundle, {"image/png": size}


def show(patient: Patient, prediction: Prediction | Mapping[str, Prediction] | None = None, *,
         modality: str = MODALITIES[0], view: View = "all", arm: str | None = None, overlay: str = "labels",
         opacity: float = 0.6, labels: Sequence[int] = (1, 2, 4), crosshair: tuple[int, int, int] | None = None,
         backend: Backend = "auto", height: int = 380) -> Viewer:
    """A patient in linked slices and in 3-D: four modalities, the expert's labels, and what arms predicted.

    The controls choose modality, plane, arm, overlay (labels, or where false positives and false negatives of a region
    lie), its opacity, which labels are drawn, and where the planes meet; volumes [ml] and Dice of what is shown stand
    beside it. The arguments say where they start.

    Args:
        patient: axes right, anterior, superior, as `read_patient` and `make_cohort` give it.
        prediction: what to compare with the reference: one prediction, or name of an arm -> prediction. Each is a
            label map (X, Y, Z), regions or probabilities (3, X, Y, Z), a nibabel image, or the path of a NIfTI file.
        modality: one of `MODALITIES`.
        view: "all" (three planes and 3-D), "axial", "coronal", "sagittal" or "3-D".
        arm: which layer is over the scan at first, "reference" or an arm; by default the first arm, else the
            reference.
        overlay: "labels", "errors WT", "errors TC", "errors ET" or "none".
        opacity: of the overlay, from 0 to 1.
        labels: which of 1 (NCR), 2 (ED) and 4 (ET) are drawn.
        crosshair: voxel of the patient's grid where the planes meet; by default where there is most tumour.
        backend: "niivue" (interactive), "itk" (itkwidgets), "static" (matplotlib), or "auto": "niivue" in a notebook
            where ipyniivue is installed, else "static".
        height: of the interactive canvas in pixels.

    Raises:
        ValueError: a prediction on another grid or elsewhere, values that are no labels, NaN, an unknown choice.
        RunError: the backend asked for can't work here; the message says what to do.
    """
    arms: Mapping[str, Prediction] = {} if prediction is None else (
        prediction if isinstance(prediction, Mapping) else {"prediction": prediction})
    case = make_case(patient, arms)
    if arm is None:
        arm = next(iter(arms), REFERENCE if REFERENCE in case.layers else None)
    look = Look(modality=modality, view=view, layer=arm, overlay=overlay, opacity=opacity, labels=tuple(labels),
                crosshair=case.centre())
    if arm is not None:
        case.layer(arm)
    if look.region is not None and REFERENCE not in case.layers:
        raise ValueError(f"patient {patient.id} has no label map, so there is no error map; overlay='labels' shows the "
                         "prediction")
    if crosshair is not None:
        look = replace(look, crosshair=_inside(case, crosshair))
    case.grey(modality)  # an image that can't be shown says so here, not while the notebook draws it
    return Viewer(case, look, _chosen(backend), height)


def _inside(case: Case, crosshair: tuple[int, int, int]) -> tuple[int, int, int]:
    grid = tuple(case.patient.image.shape[1:])
    if len(crosshair) != 3 or not all(0 <= place < size for place, size in zip(crosshair, grid, strict=True)):
        raise ValueError(f"crosshair is a voxel of the grid {grid}, got {crosshair}")
    x, y, z = (min(max(place - part.start, 0), part.stop - part.start - 1)
               for place, part in zip(crosshair, case.box, strict=True))
    return x, y, z


def _chosen(backend: str) -> str:
    """The backend that is used, or the reason why it can't be."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend is one of {', '.join(map(repr, get_args(Backend)))}, got {backend!r}")
    if backend == "auto":
        return "niivue" if _in_notebook() and _installed("ipyniivue", "ipywidgets") else "static"
    if backend == "niivue" and not _installed("ipyniivue", "ipywidgets"):
        raise RunError("backend='niivue' needs ipyniivue and ipywidgets, which are not installed: pip install -e . in "
                       "the checkout of fedlab brings them; backend='static' needs neither")
    if backend == "itk":
        from fedlab.view.itk import require

        require()
    return backend


def _installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


def _in_notebook() -> bool:
    """Whether this is the kernel of a notebook, where widgets can be shown."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None
