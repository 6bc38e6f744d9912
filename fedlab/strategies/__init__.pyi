from .averaged_weights import AveragedWeights
from .averaging import FedAvg, FedNova, TooFewUpdates, weighted_mean
from .client_drift import SCAFFOLD, Ditto, FedProx
from .robust import CoordinateMedian, GeometricMedian, Krum, NormBound, TrimmedMean
from .server_optimisers import FedOpt

__all__ = [
    "SCAFFOLD", "AveragedWeights", "CoordinateMedian", "Ditto", "FedAvg", "FedNova", "FedOpt", "FedProx",
    "GeometricMedian", "Krum", "NormBound", "TooFewUpdates", "TrimmedMean", "weighted_mean",
]
