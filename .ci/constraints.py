"""Writes constraints.txt anew from the environment that runs this program; `make constraints` makes one for it.

The comment at the top of the file stays. Versions are without local suffixes, names canonical; pip and the package
itself are left out.
"""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path

FILE = Path(__file__).parents[1] / "constraints.txt"
LEFT_OUT = {"pip", "fedlab-workbench"}


def main() -> None:
    before = FILE.read_text("utf-8").splitlines()
    installed = {re.sub(r"[-_.]+", "-", one.name).lower(): one.version.split("+")[0] for one in distributions()}
    pins = sorted(f"{name}=={version}" for name, version in installed.items() if name not in LEFT_OUT)
    FILE.write_text("\n".join([*(line for line in before if line.startswith("#")), *pins, ""]), encoding="utf-8")
    gone, new = set(before) - set(pins), set(pins) - set(before)
    print(f"constraints.txt: {len(new)} new lines, {sum(not line.startswith('#') for line in gone)} gone")


if __name__ == "__main__":
    main()
