"""The command line: `fedlab demo`, `run`, `assess`, `evaluate`, `show`, `lab`, `data`, `site`, `deploy` and others."""

from __future__ import annotations

import argparse
import errno
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fedlab import __version__
from fedlab.apps.cli_arguments import HELP, Parser
from fedlab.apps.cli_data import add_data
from fedlab.apps.cli_deploy import add_deploy
from fedlab.apps.cli_itk import add_itk
from fedlab.apps.cli_lab import add_lab
from fedlab.apps.cli_runs import add_runs
from fedlab.apps.cli_site import add_export, add_site
from fedlab.apps.standard_streams import robust_streams, warnings_as_notes
from fedlab.core.errors import FedlabError

__all__ = ["main"]

#: Errors of a disk that end a command wherever they appear, and the remedy.
_FULL = {errno.ENOSPC: ("the disk is full", "free some space"),
         errno.EDQUOT: ("the disk quota is used up", "free some space"),
         errno.EROFS: ("the file system is read-only", "choose a path on another one")}
_DENIED = "permission denied", "change the permissions, or choose another path"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0 done, 1 an error that is explained, 130 interrupted.

    `fedlab data inspect` has one more, see its help.
    """
    with robust_streams():
        parser = _parser()
        options, unknown = parser.parse_known_args(arguments)
        if unknown:
            parser.refuse(unknown, options)
        try:
            with warnings_as_notes(lambda text: _without_folders(_with_options(text, options))):
                status: int | None = options.command(options)
            sys.stdout.flush()
        except Exception as error:
            text = _explanation(error, options)
            if text is None:
                raise
            print(f"fedlab: {text}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            run = _resumable(options)
            print(f"\nfedlab: interrupted{f'; continue with: fedlab resume {run}' if run else ''}", file=sys.stderr)
            return 130
        return status or 0


def _parser() -> Parser:
    parser = Parser("fedlab", description=HELP["about"].strip())
    parser.add_argument("--version", action="version", version=f"fedlab {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (add_runs, add_lab, add_data, add_site, add_export, add_deploy, add_itk):
        add(commands)
    return parser


def _resumable(options: argparse.Namespace) -> Path | None:
    """The run directory that `fedlab resume` continues, if the command works in one."""
    return options.out if getattr(options, "resumable", False) else None


def _explanation(error: Exception, options: argparse.Namespace) -> str | None:
    """An error in words with a remedy; None for a mistake in fedlab, which needs its traceback."""
    # Errors of a disk can arrive in those of a library or of a site.
    found = re.search(r"(?:Errno|os error) (\d+)\b", str(error))
    number = int(found[1]) if found else getattr(error, "errno", None)
    what, remedy = _FULL.get(number or 0, ("", ""))
    if isinstance(error, PermissionError):
        what, remedy = _DENIED
    if what:
        place = getattr(error, "filename", None) or getattr(options, "out", None)
        run = _resumable(options)
        then = f"continue with: fedlab resume {run}" if run else "repeat the command"
        return f"{what}{f': {place}' if place else ''}; {remedy}, then {then}"
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"there is no file or folder {error.filename}"
    if isinstance(error, FedlabError | ValueError | OSError):
        return _with_options(str(error), options)
    return None


def _with_options(text: str, options: argparse.Namespace) -> str:
    """A message with the options that a user types in place of the keywords of fedlab's functions."""
    text = re.sub(r" \(--[a-z-]+( on the command line)?\)", "", text.replace("broken='skip'", "skip_broken"))
    for name, option in options.options.items():
        keyword = "spacing_mm" if name == "spacing" else name
        text = re.sub(rf"(?<![\w/.-]){keyword}=", f"{option} ", text)
        # Without "=" only a word with an underscore, or one that a message begins with, is a keyword.
        bare = rf"(?<![\w/.-]){keyword}(?![\w/-])" if "_" in keyword else rf"^{keyword}(?= (?:is|must|lies) )"
        text = re.sub(bare, option, text)
    # Keywords that the command has no option for are no remedy here.
    text = re.sub(r"[,;:]? (?:or )?(?:pass|say|give) [a-z_]+=(?: and [a-z_]+=)*(?![\w'])(?: as [\w ]+)?", "", text)
    text = re.sub(r"\((\d+), (\d+), (\d+)\)", r"\1,\2,\3", text)  # a shape as it is typed
    return re.sub(r"\[Errno \d+\] ", "", text)


def _without_folders(text: str) -> str:
    """A text in which each absolute path is its last name alone."""
    return re.sub(r"(?<![\w.])/(?:[^\s:/'\"]+/)+([^\s:/'\"]+)", r"\1", text)


if __name__ == "__main__":
    sys.exit(main())
