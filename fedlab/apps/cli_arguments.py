"""What the command groups share: how a command is added, and the arguments that several of them take."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

from fedlab.core.files import packaged_toml

__all__ = ["FLAG", "HELP", "LAYOUT", "READING", "REQUIRED_PATH", "Arguments", "add_command", "add_group", "new_path",
           "read_shape"]

#: Settings of an argument for argparse's `add_argument`, by its name, or names separated by spaces.
Arguments = Mapping[str, Mapping[str, Any]]

FLAG = {"action": "store_true"}
REQUIRED_PATH = {"type": Path, "required": True}
#: Arguments for folders that leave their layout or label convention open.
LAYOUT: Arguments = {"--layout": {}, "--label-convention": {"metavar": "NAME"}}
#: Arguments of commands that read patients.
READING: Arguments = {**LAYOUT, "--skip-broken": FLAG}
#: The texts of the command line.
HELP = packaged_toml("fedlab.apps", "help.toml")


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int | None] | None = None,
                arguments: Arguments | None = None) -> argparse.ArgumentParser:
    """Adds a command, with its texts from help.toml, to argparse's sub-parsers.

    Args:
        commands: what `add_subparsers` or `add_group` returns.
        name: all words of the command, such as "data inspect".
        run: does the work; returns the exit status, None for 0. None for a command that has commands of its own.
        arguments: of the command. `options` of what `run` receives has the option for each attribute.
    """
    texts: dict[str, Any] = reduce(lambda level, word: level[word], name.split(), HELP)
    parser: argparse.ArgumentParser = commands.add_parser(
        name.split()[-1], help=texts["help"], description=texts.get("about", texts["help"]).strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    lines = {**HELP["shared"], **texts.get("arguments", {})}
    options = {}
    for names, settings in (arguments or {}).items():
        first, *others = names.split()
        action = parser.add_argument(first, *others, help=lines[first], **settings)
        if action.option_strings:
            options[action.dest] = first
    parser.set_defaults(command=run, options=options)
    return parser


def add_group(commands: Any, name: str, *, metavar: str = "COMMAND") -> Any:
    """Adds a command that has commands of its own; returns argparse's sub-parsers for them."""
    return add_command(commands, name).add_subparsers(required=True, metavar=metavar)


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
