"""The command line: `fedlab demo`, `run`, `resume`, `evaluate`, `verify`, `data`, `site`, `export` and `deploy`."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence

from fedlab.apps.cli_data import add_data
from fedlab.apps.cli_deploy import add_deploy
from fedlab.apps.cli_runs import add_runs
from fedlab.apps.cli_site import add_export, add_site
from fedlab.core.errors import FedlabError

__all__ = ["main"]

_ABOUT = """
    Privacy-preserving federated learning on 3-D brain-tumour MRI.

    Start with 'fedlab demo'. It generates patients of several hospitals, trains one network on them without pooling
    the scans, compares it with each hospital alone and with all data pooled, and writes a report. Then open the
    notebooks ('make lab')."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0 done, 1 an error that is explained, 130 interrupted.

    `fedlab data inspect` has one more, see its help.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int | None = options.command(options)
    except (FedlabError, ValueError, OSError) as error:
        print(f"fedlab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        run = options.out if getattr(options, "resumable", False) else None
        print(f"\nfedlab: interrupted{f'; continue with: fedlab resume {run}' if run else ''}", file=sys.stderr)
        return 130
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("fedlab", description=inspect.cleandoc(_ABOUT),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (add_runs, add_data, add_site, add_export, add_deploy):
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
