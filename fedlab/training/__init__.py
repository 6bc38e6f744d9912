"""Local training at one site, without a federation: the trainer, losses, networks and metrics.

Read `trainer` first, then `metrics`. May import `core`.

Example:
    >>> fl.training.PolyDecay(start=2e-3, rounds=10)(0)
    0.002
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
