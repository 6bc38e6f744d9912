"""Widgets with a static copy for exported and reopened notebooks, which have no kernel."""

from __future__ import annotations

import base64
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlab.view.picture import Picture

__all__ = ["display_snapshot", "running_kernel", "snapshot"]


def running_kernel() -> Any:
    """The kernel of the notebook that runs this process; None elsewhere."""
    return getattr(sys.modules["IPython"].get_ipython(), "kernel", None) if "IPython" in sys.modules else None


def snapshot(widget: Any, *, text: str, html: str, picture: Callable[[], Picture] | None = None) -> dict[str, Any]:
    """The display data of a widget, with its present state as text, self-contained HTML and PNG.

    The PNG is for converters that accept nothing else. `picture` is called in the main thread only, because
    matplotlib's settings, which it changes for a moment, belong to the whole process.
    """
    bundle: dict[str, Any] = {"text/plain": text, "text/html": html}
    if picture is not None and threading.current_thread() is threading.main_thread():
        bundle["image/png"] = base64.b64encode(picture()._repr_png_()[0]).decode("ascii")
    view = widget._repr_mimebundle_()
    data = view[0] if isinstance(view, tuple) else view
    return bundle | {name: value for name, value in data.items() if name.startswith("application/")}


def display_snapshot(make: Callable[[], dict[str, Any]]) -> Callable[[], None]:
    """Displays a bundle in the running cell; returns a function that renews it, from any thread."""
    from IPython.display import display

    handle: Any = display(make(), raw=True, display_id=True)  # type: ignore[no-untyped-call]
    return lambda: None if handle is None else handle.update(make(), raw=True)
