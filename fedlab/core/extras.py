"""What an extra of the installation brings, and the error that names the command where it is missing."""

from __future__ import annotations

import importlib.util

from fedlab.core.errors import RunError

__all__ = ["LAB", "MissingExtra", "install_command", "need", "need_lab"]

#: Modules that the extra `lab` brings to figures, viewers and pages.
LAB = ("matplotlib", "ipywidgets", "ipyniivue", "jinja2", "mistune", "skimage")


class MissingExtra(RunError, ImportError):
    """A package of an extra is not installed; the message names the command that installs it."""


def install_command(extra: str) -> str:
    """The command that adds an extra to the installation, such as "lab"."""
    return f"pip install 'fedlab-workbench[{extra}]'"


def need(extra: str, *modules: str, what: str) -> None:
    """Raises `MissingExtra` if a top-level module of an extra, which `what` needs, is not installed; imports none."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(f"{what} needs {', '.join(missing)}: not installed here. Install with: "
                           f"{install_command(extra)}")


def need_lab() -> None:
    """Raises `MissingExtra`, with the command that helps, in a kernel without the extra `lab`; for a notebook's top."""
    need("lab", *LAB, what="this notebook")
