"""The command `fedlab lab`: JupyterLab on the notebooks, open at the first of them."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from fedlab.apps.cli_arguments import add_command
from fedlab.core.errors import RunError
from fedlab.core.extras import need

__all__ = ["add_lab"]

_FIRST = "00_welcome.ipynb"
#: A folder of notebooks and data cards: in the wheel, and where `fedlab lab` copies it to.
_PACKAGED, _COPY = Path(__file__).resolve().parents[1] / "series", Path("fedlab-series")


def add_lab(commands: Any) -> None:
    """Adds `lab` to argparse's sub-parsers."""
    add_command(commands, "lab", _lab, {
        "--folder": {"type": Path, "metavar": "DIR"},
        "further": {"nargs": "*", "metavar": "-- OPTION"}})


def _lab(options: argparse.Namespace) -> None:
    need("lab", "jupyterlab", what="fedlab lab")
    folder = _notebooks() if options.folder is None else options.folder
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}; name one with notebooks, or leave it out")
    command = [sys.executable, "-m", "jupyterlab", f"--notebook-dir={folder.resolve()}",
               # Without a question about news, without a column of dates beside the names of files.
               f"--LabApp.app_settings_dir={Path(__file__).with_name('lab_settings')}"]
    if (folder / _FIRST).is_file():
        command.append(f"--LabApp.default_url=/lab/tree/{_FIRST}")
    print(f"fedlab: opening JupyterLab on {folder}; Ctrl-C ends it", file=sys.stderr, flush=True)
    os.execv(command[0], [*command, *options.further])


def _notebooks() -> Path:
    """The notebooks of fedlab: of this folder, of the checkout that is installed, or a copy of those in the wheel."""
    known = (Path("notebooks"), _COPY / "notebooks", Path(__file__).resolve().parents[2] / "notebooks")
    found = next((folder for folder in known if (folder / _FIRST).is_file()), None)
    if found is None and _PACKAGED.is_dir():
        if _COPY.exists():
            raise RunError(f"{_COPY} is in the way: the notebooks would be copied there, and nothing is overwritten. "
                           "Move it, or name a folder of notebooks with --folder")
        shutil.copytree(_PACKAGED, _COPY)
        print(f"fedlab: the notebooks are copied to {_COPY.resolve()}; they are yours to change", file=sys.stderr)
        found = _COPY / "notebooks"
    return found or Path()
