"""What the command groups share: how a command is added, and the arguments that several of them take."""

from __future__ import annotations

import argparse
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["add_command", "add_group", "add_layout", "add_reading", "new_path", "read_shape"]


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int | None] | None = None, *, help: str,
                about: str = "") -> argparse.ArgumentParser:
    """Adds a command to argparse's sub-parsers.

    Args:
        commands: what `add_subparsers` or `add_group` returns.
        name: the word that calls it.
        run: does the work; returns the exit status, None for 0. None for a command that has commands of its own.
        help: one line for the list of commands.
        about: the text at the top of its own help, laid out as it is printed.
    """
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=inspect.cleandoc(about) or help,
                                                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(command=run)
    return parser


def add_group(commands: Any, name: str, *, help: str, about: str = "", metavar: str = "COMMAND") -> Any:
    """Adds a command that has commands of its own; returns argparse's sub-parsers for them."""
    return add_command(commands, name, help=help, about=about).add_subparsers(required=True, metavar=metavar)


def add_layout(parser: argparse.ArgumentParser) -> None:
    """Adds --layout and --label-convention, for folders that leave them open."""
    parser.add_argument("--layout", help="brats2018, brats2019, brats2020, brats2021, brats2023, fets, msd or table "
                                         "(default: detected)")
    parser.add_argument("--label-convention", metavar="NAME", help="brats2021 (1/2/4), brats2023 (3 enhancing), "
                        "brats2024 (4 cavity), msd (1 oedema) or brats2013 (3 non-enhancing) (default: detected)")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Adds --layout, --label-convention and --skip-broken, for commands that read patients."""
    add_layout(parser)
    parser.add_argument("--skip-broken", action="store_true",
                        help="leave out patients whose files have errors, instead of stopping")


def read_shape(text: str) -> tuple[int, int, int]:
    """Voxels of a volume from text such as "48,64,48", for argparse."""
    try:
        x, y, z = (int(part) for part in text.replace("x", ",").split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected three whole numbers such as 48,64,48, got {text!r}") from error
    if min(x, y, z) < 32 or any(v % 16 for v in (x, y, z)):
        raise argparse.ArgumentTypeError(f"each number must be a multiple of 16 and at least 32, got {text!r}")
    return x, y, z


def new_path(given: Path | None, name: str, suffix: str = "") -> Path:
    """The path that was given, or by default runs/NAME-TIME."""
    return given if given is not None else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}{suffix}"
