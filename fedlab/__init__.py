"""fedlab: privacy-preserving federated learning on 3-D brain-tumour MRI, in a notebook.

At the top are the words of a first notebook. Everything else stands in the namespace of its package, for example
`fedlab.privacy.TopK` or `fedlab.topologies.Gossip`; `fedlab.apps` holds the command line. A name is loaded when it is
first used. Examples assume `import fedlab as fl`. Read `core`, `training`, `strategies` and `run` first, and of
`privacy` the base and DP-SGD.
"""

import os as _os
from importlib import metadata as _metadata
from pathlib import Path as _Path

# Threads of torch that wait would spin, and on a busy machine keep the cores from those that they wait for. Read when
# torch is loaded; a setting of the user's own stays.
_os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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

_load, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """A name of the package, loaded when it is first used; the error about another one says where it stands.

    Raises:
        AttributeError: no such name here.
    """
    try:
        return _load(name)
    except AttributeError as error:
        if name.startswith("_"):
            raise
        spaces = [space for space in __all__ if (_Path(__file__).parent / space).is_dir()]
        found = [f"fedlab.{space}.{name}" for space in spaces if name in _load(space).__all__]
        remedy = f"use {' or '.join(found)}" if found else f"it offers {', '.join(sorted(__all__))}"
        raise AttributeError(f"fedlab has no {name!r}; {remedy}", name=name) from error
