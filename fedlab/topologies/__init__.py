"""Workflows other than the aggregation server: ring, gossip, tree and buffered asynchronous aggregation.

Read `cyclic` first, then `gossip`. Each is called with a run and a state, as `fedlab.run.round.one_round` is. May
import `run` and the packages below it.

Example:
    >>> import networkx as nx
    >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
    >>> trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16))
    >>> peers = fl.topologies.Gossip(graph=nx.path_graph(2))
    >>> fl.federate(trainer, sites, topology=peers, rounds=1)
    <History: 1 of 1 round, loss ..., consensus distance 0.000; no formal guarantee>
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
