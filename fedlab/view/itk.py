"""itkwidgets as a backend. It can hang a notebook instead of failing, so all its requirements are checked first.

On import, itkwidgets 1.0a55 takes over the kernel's queue of cells and runs no further cell until its viewer answers
from the browser. The viewer is not part of the package: it is loaded from an internet address written into itkwidgets,
with parts from a CDN. Hence two strict requirements: a browser is connected, and the user has agreed to run that code
beside the scans.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from fedlab.core.errors import RunError
from fedlab.core.extras import MissingExtra, install_command
from fedlab.view.label_layers import Case, ViewSettings
from fedlab.view.widget_snapshot import running_kernel

__all__ = ["ALLOWED", "ItkPanel", "require"]

#: Environment variable by which a user agrees to run code from the internet.
ALLOWED = "FEDLAB_ITK_FROM_INTERNET"
_INSTEAD = "backend='niivue' shows the same from installed files, backend='static' without a browser"
_EXTENSION = "imjoy-jupyterlab-extension"
_TIMEOUT = 3.0  # seconds to reach the viewer's address


def require() -> None:
    """Raises `RunError` with the remedy where itkwidgets cannot work; it is not imported."""
    spec = importlib.util.find_spec("itkwidgets")
    if spec is None or spec.origin is None:
        raise MissingExtra("backend='itk' needs itkwidgets, which is not installed. Install it with: "
                           f"{install_command('itk')}; {_INSTEAD}")
    if not _asked_by_lab():
        raise RunError("backend='itk' works in JupyterLab only: without a browser to show its viewer the notebook "
                       f"would wait for it forever; {_INSTEAD}")
    host, port = _viewer_host(Path(spec.origin).parent)
    if os.environ.get(ALLOWED) != "1":
        raise RunError(f"itkwidgets contains no viewer: it would run code from {host} and a CDN beside the scans. To "
                       f"allow that, set os.environ['{ALLOWED}'] = '1'; {_INSTEAD}")
    if (file := _switched_off()) is not None:
        raise RunError(f"JupyterLab's extension {_EXTENSION}, which itkwidgets needs, is disabled in {file}, because "
                       "it requests scripts from a CDN at every start; to allow that, run 'jupyter labextension enable "
                       f"{_EXTENSION}' and reopen JupyterLab; {_INSTEAD}")
    try:
        socket.create_connection((host, port), timeout=_TIMEOUT).close()
    except OSError as error:
        raise RunError(f"the viewer of itkwidgets can't be reached at {host} ({error}), and the notebook would wait "
                       f"for it forever: connect to the internet and try again; {_INSTEAD}") from error


def _asked_by_lab() -> bool:
    """Whether JupyterLab runs the current cell: it sends the id of the cell, unlike nbconvert and nbval."""
    kernel = running_kernel()
    request = kernel.get_parent() if kernel is not None else {}
    return "cellId" in (request or {}).get("metadata", {})


def _switched_off() -> Path | None:
    """The file of JupyterLab's settings that disables the extension of itkwidgets; the user's own settings win."""
    from jupyter_core.paths import jupyter_config_path

    for folder in map(Path, jupyter_config_path()):
        file = folder / "labconfig" / "page_config.json"
        if file.is_file():
            settings = json.loads(file.read_text(encoding="utf-8"))
            known = settings.get("disabledExtensions", {})
            if isinstance(known, dict) and _EXTENSION in known:
                return file if known[_EXTENSION] else None
    return None


def _viewer_host(package: Path) -> tuple[str, int]:
    """Host and port of the viewer, read from the source of itkwidgets without importing it."""
    text = (package / "viewer_config.py").read_text(encoding="utf-8")
    found = re.search(r"ITK_VIEWER_SRC\s*=\s*\(?\s*[\"']([^\"']+)[\"']", text)
    address = urlsplit(found.group(1)) if found else None
    if address is None or address.hostname is None:
        raise RunError("this version of itkwidgets does not name the address of its viewer. Install the version that "
                       f"fedlab supports with: {install_command('itk')}; {_INSTEAD}")
    return address.hostname, address.port or 443


class ItkPanel:
    """One modality with labels over it in the interface of itkwidgets, which accepts no colour table from Python."""

    def __init__(self, case: Case, settings: ViewSettings) -> None:
        import itkwidgets
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
        self.widget = itkwidgets.view(image=lps(case.grey(settings.modality)), **layers)

    def close(self) -> None:
        """Does nothing: itkwidgets keeps its viewers until the page is closed."""
