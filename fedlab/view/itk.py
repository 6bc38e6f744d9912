"""itkwidgets as a backend, with the local parts of its viewer (`fedlab.view.itk_parts`).

On import, itkwidgets 1.0a55 takes over the kernel's queue of cells and runs no further cell until its viewer answers
from the browser. Where none can answer, `require` refuses; where none does, `ItkPanel` ends the wait.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from fedlab.core.errors import RunError
from fedlab.core.extras import MissingExtra, install_command
from fedlab.view import itk_parts
from fedlab.view.label_layers import Case, ViewSettings
from fedlab.view.widget_snapshot import running_kernel

__all__ = ["ItkPanel", "require"]

_INSTEAD = "backend='niivue' shows the same, backend='static' without a browser"
#: Seconds in which the page has to answer, and then to draw. Time in which a cell runs does not count.
_ANSWER, _DRAW = 90.0, 300.0
_PAUSE = 0.25  # seconds between two looks
_PLANES = {"all": "Volume", "3-D": "Volume", "sagittal": "XPlane", "coronal": "YPlane", "axial": "ZPlane"}


def require() -> None:
    """Raises `RunError` with the remedy where itkwidgets cannot work; it is not imported."""
    if importlib.util.find_spec("itkwidgets") is None:
        raise MissingExtra("backend='itk' needs itkwidgets, which is not installed. Install it with: "
                           f"{install_command('itk')}; {_INSTEAD}")
    if not _asked_by_lab():
        raise RunError("backend='itk' works in JupyterLab only: without a browser to show its viewer there is nothing "
                       f"to see; {_INSTEAD}")
    if itk_parts.installed() is None:
        raise RunError("itkwidgets contains no viewer, and its parts are not set up here. Run once, with a network: "
                       f"fedlab itk install; then reload the page of JupyterLab. {_INSTEAD}")
    if (file := _switched_off()) is not None:
        raise RunError(f"JupyterLab's extension {itk_parts.NAME}, which shows the viewer, is disabled in {file}. Run "
                       f"'jupyter labextension enable {itk_parts.NAME}' and reload the page; {_INSTEAD}")


def _asked_by_lab() -> bool:
    """Whether JupyterLab runs the current cell: it sends the id of the cell, unlike nbconvert and nbval."""
    kernel = running_kernel()
    request = kernel.get_parent() if kernel is not None else {}
    return "cellId" in (request or {}).get("metadata", {})


def _switched_off() -> Path | None:
    """The file of JupyterLab's settings that disables the extension; the user's own settings win."""
    from jupyter_core.paths import jupyter_config_path

    for folder in map(Path, jupyter_config_path()):
        file = folder / "labconfig" / "page_config.json"
        if file.is_file():
            settings = json.loads(file.read_text(encoding="utf-8"))
            known = settings.get("disabledExtensions", {})
            if isinstance(known, dict) and itk_parts.NAME in known:
                return file if known[itk_parts.NAME] else None
    return None


class ItkPanel:
    """One modality with labels over it in the interface of itkwidgets, which accepts no colour table from Python.

    Args:
        case: patient and layers.
        settings: what is shown at first.
        report: called once: with None when the picture is drawn, else with the reason why there is none.
    """

    def __init__(self, case: Case, settings: ViewSettings, report: Callable[[str | None], None]) -> None:
        from ngff_zarr import to_ngff_image

        self.settings = settings
        overlay = settings.values(case, settings.layer)
        # Its axes are LPS, slowest first: x and y are reversed, and the origin is the opposite corner.
        scale = dict(zip("xyz", case.patient.spacing_mm, strict=True))
        last = np.array([case.shape[0] - 1, case.shape[1] - 1, 0])
        corner = case.affine[:3, :3] @ last + case.affine[:3, 3]
        origin = dict(zip("xyz", (float(v) for v in corner * (-1, -1, 1)), strict=True))

        def lps(array: Any) -> Any:
            return to_ngff_image(np.ascontiguousarray(array[::-1, ::-1].T), dims=("z", "y", "x"), scale=scale,
                                 translation=origin, name=case.patient.id)

        layers = {} if overlay is None else {"label_image": lps(overlay)}
        self.widget = _viewers().view(image=lps(case.grey(settings.modality)), ui_collapsed=False, **layers)
        self.widget.set_view_mode(_PLANES[settings.view])
        if overlay is not None:
            self.widget.set_label_image_blend(settings.opacity)
        self._guard = asyncio.get_running_loop().create_task(_watch(self.widget, report))

    def close(self) -> None:
        """Does nothing: itkwidgets keeps its viewers until the page is closed."""


def _viewers() -> Any:
    """itkwidgets. It wants imjoy_elfinder, a file manager that needs pydantic 1, to be there but does not use it."""
    if importlib.util.find_spec("imjoy_elfinder") is None:
        sys.modules["imjoy_elfinder"] = ModuleType("imjoy_elfinder")
        try:
            import itkwidgets
        finally:
            del sys.modules["imjoy_elfinder"]
    import itkwidgets

    return itkwidgets


async def _watch(widget: Any, report: Callable[[str | None], None]) -> None:
    """Waits for the viewer; if it does not come in time, lets the following cells run without it."""
    from itkwidgets.cell_watcher import CellWatcher

    watcher, rpc = CellWatcher(), widget.viewer_rpc
    for limit, arrived, missing in (
            (_ANSWER, lambda: hasattr(rpc, "itk_viewer"),
             "the page of JupyterLab did not answer. If it was open while 'fedlab itk install' ran, reload it and run "
             "the cell again"),
            (_DRAW, lambda: watcher.viewer_ready(rpc.parent), "the browser did not draw the picture; the console of "
             "its developer tools says why")):
        for _ in range(int(limit / _PAUSE)):
            if arrived():
                break
            await asyncio.sleep(_PAUSE)
        else:
            watcher.viewers.data.pop(rpc.parent, None)
            if watcher.results:  # values asked of a viewer that does not answer
                watcher.results.clear()
                watcher.current_request = None
            watcher.create_task(watcher.execute_next_request)
            report(f"itkwidgets was given up after {limit:g} s: {missing}. {_INSTEAD}")
            return
    widget.set_image_color_map("Grayscale")
    report(None)
