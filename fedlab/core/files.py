"""Files that are written whole or not at all, new files that replace nothing, and texts from templates."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlab.core.errors import FedlabError, RunError
from fedlab.core.text import escape_markdown

if TYPE_CHECKING:
    import jinja2

__all__ = ["append_whole", "filled_in", "locked", "packaged_toml", "replacing", "write_json", "write_new",
           "write_whole"]


def write_new(path: str | os.PathLike[str], data: bytes, *, error: type[FedlabError] = RunError) -> Path:
    """Writes a file that must not exist yet, and makes the folders above it; raises `error` if it exists."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = path.open("xb")
    except FileExistsError as exists:
        raise error(f"{path} exists already and is not overwritten: remove it, or give another path") from exists
    try:
        with file:
            file.write(data)
    except BaseException:
        path.unlink(missing_ok=True)  # half a file on a full disk
        raise
    return path


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A file or folder beside `path` to write to, renamed into its place if the block succeeds, removed if it fails.

    Args:
        shared: whether several processes may write the same file at once; each then has its own file to write to.
    """
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part" if shared else f"{path.name}.part")
    try:
        yield scratch
        os.replace(scratch, path)
    except BaseException:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path, refusal: FedlabError) -> Iterator[None]:
    """Holds a lock file; raises `refusal` if another process holds it. The lock of a process that died is free."""
    from filelock import FileLock, Timeout

    try:
        lock = FileLock(path).acquire(timeout=0)
    except Timeout as error:
        raise refusal from error
    with lock:
        yield


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


def append_whole(path: Path, data: bytes) -> None:
    """Adds data to the end of a file and forces them onto the disk. If that fails, the file is as it was before."""
    with path.open("ab", buffering=0) as file:
        before, left = file.tell(), memoryview(data)
        try:
            while left:
                left = left[file.write(left):]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


def write_json(path: Path, content: Any) -> None:
    """Writes JSON that people can read, as a whole file."""
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False).encode())


def packaged_toml(package: str, name: str, /) -> dict[str, Any]:
    """The content of a TOML file of a package."""
    return tomllib.loads((files(package) / name).read_text(encoding="utf-8"))


def filled_in(package: str, name: str, /, **values: Any) -> str:
    """A text from the jinja2 template `templates/NAME.j2` of a package; every value that it names must be given.

    Values in HTML are escaped; those in Markdown need the filter `markdown`.
    """
    text: str = _template(package, name).render(**values)
    return text


@cache
def _template(package: str, name: str) -> jinja2.Template:
    import jinja2

    source = (files(package) / "templates" / f"{name}.j2").read_text(encoding="utf-8")
    html = name.endswith(".html")
    environment = jinja2.Environment(autoescape=html, lstrip_blocks=html, trim_blocks=True, keep_trailing_newline=True,
                                     undefined=jinja2.StrictUndefined)
    environment.filters["markdown"] = escape_markdown
    return environment.from_string(source)
