"""itkwidgets as a backend, fenced in: it hangs a notebook rather than fail, so all it needs is checked before.

itkwidgets 1.0a55 is a thin shell: on import it takes over the kernel's queue of cells, and runs no further cell until
its viewer answers from the browser. The viewer itself is not part of the package. It comes from an address in the
internet that is written into itkwidgets, with parts from a CDN. Hence two conditions that can't be waived: a browser
must be there, and somebody must have agreed to run that code beside the scans.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from fedlab.core.errors import RunError
from fedlab.view.presentation import Look, painted
from fedlab.view.volumes import Case

__all__ = ["ALLOWED", "ItkPanel", "require"]

#: Environment variable that agrees to code from the internet.
ALLOWED = "FEDLAB_ITK_FROM_INTERNET"
_INSTEAD = "backend='niivue' shows the same from what is installed, backend='static' without a browser"
_EXTENSION = "imjoy-jupyterlab-extension"
_PATIENCE = 3.0  # seconds to reach the viewer's address


def require() -> None:
    """Checks that itkwidgets can work here, without importing it.

    Raises:
        RunError: it is not installed, no JupyterLab is at the other end, nobody agreed to code from the internet, or
            the viewer's address can't be reached; with what to do.
    """
    spec = importlib.util.find_spec("itkwidgets")
    if spec is None or spec.origin is None:
        raise RunError("backend='itk' needs itkwidgets, which is not installed: pip install -e '.[itk]' in the "
                       f"checkout of fedlab; {_INSTEAD}")
    if not _asked_by_lab():
        raise RunError("backend='itk' works in JupyterLab only: no browser at the other end could show its viewer, and "
                       f"the notebook would wait for it for ever; {_INSTEAD}")
    host, port = _viewer_host(Path(spec.origin).parent)
    if os.environ.get(ALLOWED) != "1":
        raise RunError(f"itkwidgets brings no viewer along: it would run code from {host} and a CDN beside the scans. "
                       f"Where that is allowed, say so with os.environ['{ALLOWED}'] = '1'; {_INSTEAD}")
    if (file := _switched_off()) is not None:
        raise RunError(f"JupyterLab's extension {_EXTENSION}, which itkwidgets talks through, is switched off in "
                       f"{file}, since it asks a CDN for scripts at every start; where that is allowed, run 'jupyter "
                       f"labextension enable {_EXTENSION}' and open JupyterLab anew; {_INSTEAD}")
    try:
        socket.create_connection((host, port), timeout=_PATIENCE).close()
    except OSError as error:
        raise RunError(f"itkwidgets' viewer can't be reached at {host} ({error}), and the notebook would wait for it "
                       f"for ever: connect to the internet and try again; {_INSTEAD}") from error


def _asked_by_lab() -> bool:
    """Whether the cell that runs came from JupyterLab, which says which cell it is, unlike nbconvert and nbval."""
    if "IPython" not in sys.modules:
        return False
    kernel = getattr(sys.modules["IPython"].get_ipython(), "kernel", None)
    request = kernel.get_parent() if kernel is not None else {}
    return "cellId" in (request or {}).get("metadata", {})


def _switched_off() -> Path | None:
    """The file of JupyterLab's settings that disables the extension of itkwidgets; the user's own comes first."""
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
    """Where the viewer comes from, as itkwidgets has it written down; read, not imported."""
    text = (package / "viewer_config.py").read_text(encoding="utf-8")
    found = re.search(r"ITK_VIEWER_SRC\s*=\s*\(?\s*[\"']([^\"']+)[\"']", text)
    address = urlsplit(found.group(1)) if found else None
    if address is None or address.hostname is None:
        raise RunError("this version of itkwidgets doesn't say where its viewer is: pip install -e '.[itk]' brings "
                       f"the one that fedlab knows; {_INSTEAD}")
    return address.hostname, address.port or 443


class ItkPanel:
    """One modality with the labels over it in itkwidgets' own interface.

    Its colours and controls are its own: it takes no colour table from Python.
    """

    def __init__(self, case: Case, look: Look) -> None:
        import itkwidgets
        from ngff_zarr import to_ngff_image

        self.look = look
        over = painted(case, look, look.layer)
        # It counts in LPS, with the slowest axis first: x and y turn round, and their origin is the other corner.
        scale = dict(zip("xyz", case.patient.spacing_mm, strict=True))
        last = np.array([case.shape[0] - 1, case.shape[1] - 1, 0])
        corner = case.affine[:3, :3] @ last + case.affine[:3, 3]
        origin = dict(zip("xyz", (float(v) for v in corner * (-1, -1, 1)), strict=True))

        def turned(array: Any) -> Any:
            return to_ngff_image(np.ascontiguousarray(array[::-1, ::-1].T), dims=("z", "y", "x"), scale=scale,
                                 translation=origin, name=case.patient.id)

        layers = {} if over is None else {"label_image": turned(over)}
        self.widget = itkwidgets.view(image=turned(case.grey(look.modality)), **layers)

    def close(self) -> None:
        """Nothing to free here: itkwidgets keeps its viewers until the page is left."""
