"""The commands that set up the viewer of itkwidgets, `fedlab itk`."""

from __future__ import annotations

import argparse
from typing import Any

from fedlab.apps.cli_arguments import add_command, add_group

__all__ = ["add_itk"]


def add_itk(commands: Any) -> None:
    """Adds `itk` and its own commands to argparse's sub-parsers."""
    kinds = add_group(commands, "itk")
    add_command(kinds, "itk install", _install)
    add_command(kinds, "itk remove", _remove)


def _install(options: argparse.Namespace) -> None:
    from fedlab.view.itk_parts import install

    print("fetching the viewer of itkwidgets with npm, 53 MB")
    print(f"{install()}: the viewer of itkwidgets, which needs no network from now on. Reload open pages of JupyterLab")


def _remove(options: argparse.Namespace) -> None:
    from fedlab.view.itk_parts import remove

    folder = remove()
    print("the viewer of itkwidgets is not set up here" if folder is None else f"{folder} is deleted")
