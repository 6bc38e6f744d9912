"""Widgets that leave a picture behind where there is no kernel: in exported and in reopened notebooks."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from typing import Any

from fedlab.view.style import Picture

__all__ = ["display_live", "live_bundle"]


def live_bundle(widget: Any, *, text: str, html: str, picture: Callable[[], Picture] | None = None) -> dict[str, Any]:
    """What a notebook is given to show: the live widget, and the same as it is now without a kernel.

    Args:
        widget: an ipywidgets widget.
        text: for terminals.
        html: self-contained, for notebooks without a kernel.
        picture: draws a figure for what shows PNG only; not called in other threads than the main one, since
            matplotlib's settings, which it changes for a moment, are the whole process's.
    """
    bundle: dict[str, Any] = {"text/plain": text, "text/html": html}
    if picture is not None and threading.current_thread() is threading.main_thread():
        bundle["image/png"] = base64.b64encode(picture()._repr_png_()[0]).decode("ascii")
    view = widget._repr_mimebundle_()
    live = view[0] if isinstance(view, tuple) else view
    return bundle | {name: data for name, data in live.items() if name.startswith("application/")}


def display_live(make: Callable[[], dict[str, Any]]) -> Callable[[], None]:
    """Displays a bundle in the running cell; what is returned puts a new one in its place, from any thread."""
    from IPython.display import display

    handle: Any = display(make(), raw=True, display_id=True)  # type: ignore[no-untyped-call]
    return lambda: None if handle is None else handle.update(make(), raw=True)
