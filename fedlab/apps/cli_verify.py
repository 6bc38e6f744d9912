"""The command `fedlab verify`: is the trace of a run whole, and is the model the one that it ends with."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_verify"]

_ABOUT = """\
Checks the trace of a run: one line a round (who took part with which weight, who was absent and why, hashes of the
model before and after), each with the hash of the line before. A line that was changed, removed, added or moved is
found and named; the saved model must be the one that the trace ends with.

Whoever can write the file can also write all of it anew. Note the head, the hash of the last line, where others
can't change it, and give it back later:

  fedlab verify runs/demo                    prints the head
  fedlab verify runs/demo --head 3f9a...     fails unless that line is still there

Exit status: 0 whole, 1 not."""


def add_verify(commands: Any) -> None:
    """Adds `verify` to the command line."""
    parser = commands.add_parser("verify", help="check a run's trace and its model against tampering",
                                 formatter_class=argparse.RawDescriptionHelpFormatter, description=_ABOUT)
    parser.add_argument("path", type=Path, metavar="RUN", help="run directory, or a trace.jsonl")
    parser.add_argument("--head", metavar="HASH", help="the head as it was noted elsewhere")
    parser.set_defaults(command=_verify)


def _verify(options: argparse.Namespace) -> int:
    from fedlab.run.trace import verify

    verdict = verify(options.path, head=options.head)
    print(verdict)
    return 0 if verdict.ok else 1
