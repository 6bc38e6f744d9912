"""How a server chooses its cohort, combines updates and moves the model, and what that changes at the sites.

`averaging` has the mean, `local` what corrects training at the sites, `server_optimisers` what steps with the mean,
`robust` what withstands sites that send nonsense or lies. `topology.Buffered` is the asynchronous one, and FedBN (Li
et al. 2021) is `PersonalLayers(names=norms(model))`, since what stays at a site is a matter of privacy.
"""

from fedlab.strategies.averaging import FedAvg, FedNova, Strategy, TooFewUpdates, weighted_mean
from fedlab.strategies.client_drift import SCAFFOLD, Ditto, FedProx
from fedlab.strategies.robust import CoordinateMedian, GeometricMedian, Krum, NormBound, TrimmedMean
from fedlab.strategies.server_optimisers import FedOpt

__all__ = ["SCAFFOLD", "CoordinateMedian", "Ditto", "FedAvg", "FedNova", "FedOpt", "FedProx", "GeometricMedian", "Krum",
           "NormBound", "Strategy", "TooFewUpdates", "TrimmedMean", "weighted_mean"]
