from .buffered import Buffered
from .cyclic import ring
from .gossip import Gossip
from .tree import Tree, star

__all__ = [
    "Buffered", "Gossip", "Tree", "ring", "star",
]
