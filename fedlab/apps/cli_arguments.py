"""What the command groups share: the parser, how a command is added, and the arguments that several of them take."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from functools import reduce
from pathlib import Path
from typing import Any, NoReturn

from fedlab.core.files import packaged_toml

__all__ = ["FLAG", "HELP", "LAYOUT", "READING", "REQUIRED_PATH", "Arguments", "Parser", "add_command", "add_group",
           "new_path", "read_shape"]

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


class Parser(argparse.ArgumentParser):
    """A parser that proposes what a mistyped command or option may mean, and prints its help if none is given."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **settings)
        self.formatter_class = argparse.RawDescriptionHelpFormatter

    def error(self, message: str) -> NoReturn:
        if re.fullmatch("the following arguments are required: (COMMAND|WHAT)", message):
            self.print_help(sys.stderr)
            self.exit(2)
        if found := re.match("argument (?:COMMAND|WHAT): invalid choice: '([^']*)'", message):
            message = (f"there is no command {found[1]!r}{_meant(found[1], _names(HELP), 'fedlab ')}; "
                       f"'{self.prog} --help' lists all")
        super().error(message)

    def refuse(self, unknown: Iterable[str], options: argparse.Namespace) -> NoReturn:
        """Ends the program for arguments that no parser knows; `options` is what was understood of the others."""
        known: Parser = options.parser
        words = [word.partition("=")[0] for word in unknown]
        proposed = "".join(_meant(word, known._option_string_actions, near=0.7) for word in words[:1])
        known.error(f"unrecognized arguments: {' '.join(words)}{proposed}")


def _names(texts: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """The words of every command in help.toml, such as "data inspect"."""
    for name, value in texts.items():
        if isinstance(value, dict) and "help" in value:
            yield f"{before}{name}"
            yield from _names(value, f"{before}{name} ")


def _meant(typed: str, names: Iterable[str], before: str = "", *, near: float = 0.6) -> str:
    """A question with the names most alike what was typed; of a name of several words the last may stand alone."""
    alike = {name: max(SequenceMatcher(None, typed.lower(), one).ratio() for one in (name, name.split()[-1]))
             for name in names}
    best = sorted((name for name in alike if alike[name] >= near), key=lambda name: -alike[name])
    best = [name for name in best if alike[name] > alike[best[0]] - 0.1][:3]
    return f" (did you mean {' or '.join(repr(before + name) for name in best)}?)" if best else ""


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int | None] | None = None,
                arguments: Arguments | None = None) -> Parser:
    """Adds a command, with its texts from help.toml, to argparse's sub-parsers.

    Args:
        commands: what `add_subparsers` or `add_group` returns.
        name: all words of the command, such as "data inspect".
        run: does the work; returns the exit status, None for 0. None for a command that has commands of its own.
        arguments: of the command. `options` of what `run` receives has the option for each attribute.
    """
    texts: dict[str, Any] = reduce(lambda level, word: level[word], name.split(), HELP)
    parser: Parser = commands.add_parser(
        name.split()[-1], help=texts["help"], description=texts.get("about", texts["help"]).strip())
    lines = {**HELP["shared"], **texts.get("arguments", {})}
    options = {}
    for names, settings in (arguments or {}).items():
        first, *others = names.split()
        action = parser.add_argument(first, *others, help=lines[first], **settings)
        if action.option_strings:
            options[action.dest] = first
    parser.set_defaults(command=run, options=options, parser=parser)
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
