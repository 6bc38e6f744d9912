from .sites import Corrupt, Crash, DropOut, Faulty, Joins, Leaves, PoisonedLabels, Replay, Scale, SignFlip, Straggler

__all__ = [
    "Corrupt", "Crash", "DropOut", "Faulty", "Joins", "Leaves", "PoisonedLabels", "Replay", "Scale", "SignFlip",
    "Straggler",
]
