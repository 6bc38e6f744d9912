"""fedlab: privacy-preserving federated learning on 3-D brain-tumour MRI, in a notebook.

At the top are the words of a first notebook. Everything else stands in the namespace of its package, for example
`fedlab.privacy.TopK` or `fedlab.topologies.Gossip`; `fedlab.apps` holds the command line. A name is loaded when it is
first used. Read `core`, `training`, `strategies` and `run` first, and of `privacy` the base and DP-SGD.
"""

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

import lazy_loader as _lazy_loader

__getattr__, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)
