"""fedlab: privacy-preserving federated learning on 3-D brain-tumour MRI, in a notebook."""

from importlib import metadata as _metadata


def _refuse_namesake() -> None:
    """The package index's `fedlab` is another project that installs modules under the same name.

    Beside it, which of the two a module comes from depends on the order they were installed in.

    Raises:
        ImportError: that project is installed in this environment.
    """
    try:
        other = _metadata.distribution("fedlab")
    except _metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"another project's package is installed under the name fedlab (distribution 'fedlab' {other.version}, "
        f"in {other.locate_file('')}); fedlab-workbench cannot run beside it. Remove it, then put back what it may "
        "have overwritten:\n"
        "    python -m pip uninstall fedlab\n"
        "    python -m pip install --force-reinstall --no-deps -e .    (in the checkout of fedlab-workbench)",
        name="fedlab",
    )


_refuse_namesake()

__version__ = "0.1.0"

__all__ = ["__version__"]
