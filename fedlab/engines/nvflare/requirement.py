"""NVFLARE lives in an environment of its own; who lacks it is told how to get it."""

from __future__ import annotations

from importlib import metadata

from fedlab.core.errors import RunError
from fedlab.core.extras import install_command

__all__ = ["INSTALL", "need_nvflare"]

#: The command that brings NVFLARE, for an environment without the extra `itk`.
INSTALL = install_command("nvflare")


def need_nvflare() -> None:
    """Raises `RunError` with what to do where NVFLARE is missing or of another series than 2.9."""
    try:
        version = metadata.version("nvflare")
    except metadata.PackageNotFoundError:
        raise RunError(f"NVFLARE isn't installed in this environment. Install it with: {INSTALL}\nIt can't stand "
                       "beside itkwidgets (the extra 'itk'), which needs another pydantic; in the checkout, make "
                       "flare makes a second environment for it, .venv-flare") from None
    if version.split(".")[:2] != ["2", "9"]:
        raise RunError(f"fedlab runs on NVFLARE 2.9, here is {version}. Install it with: {INSTALL}")
