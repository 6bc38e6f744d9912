"""Workflows other than the aggregation server: ring, gossip, tree and buffered asynchronous aggregation.

Read `cyclic` first, then `gossip`. Each is called with a run and a state, as `fedlab.run.round.one_round` is. May
import `run` and the packages below it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
