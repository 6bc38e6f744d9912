"""Files that are written whole or not at all, new files that replace nothing, and texts from templates."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedlab.core.errors import FedlabError, RunError

__all__ = ["filled_in", "replacing", "write_json", "write_new", "write_whole"]


def write_new(path: str | os.PathLike[str], data: bytes, *, error: type[FedlabError] = RunError) -> Path:
    """Writes a file that must not exist yet, and makes the folders above it.

    Raises:
        FedlabError: of the type `error`, if the file exists already.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError as exists:
        raise error(f"{path} exists already and is not overwritten: remove it, or give another path") from exists
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, renamed into its place if the block ends without an exception."""
    scratch = path.with_name(path.name + ".part")
    yield scratch
    os.replace(scratch, path)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file beside its predecessor, forces it onto the disk and renames it into place."""
    with replacing(path) as scratch, scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if os.name == "posix":  # the renaming itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON that people can read, as a whole file."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False).encode())


def filled_in(package: str, name: str, /, **values: Any) -> str:
    """A text from the jinja2 template `templates/NAME.j2` of a package; every value that it names must be given."""
    import jinja2

    template = (files(package) / "templates" / f"{name}.j2").read_text(encoding="utf-8")
    text: str = jinja2.Template(template, trim_blocks=True, keep_trailing_newline=True,
                                undefined=jinja2.StrictUndefined).render(**values)
    return text
