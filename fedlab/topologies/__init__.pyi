from .workflows import Buffered, Gossip, Topology, Tree, ring, star

__all__ = [
    "Buffered", "Gossip", "Topology", "Tree", "ring", "star",
]
