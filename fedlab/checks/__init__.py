"""Contract checks for techniques, strategies and engines, for users' own classes as much as for fedlab's.

Read `privacy` first: `check_privacy` tries a technique before a run depends on it. May import `topologies` and the
packages below it.

Example:
    >>> bool(fl.checks.check_strategy(fl.FedAvg(weights="uniform")))
    True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
