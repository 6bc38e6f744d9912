from .admission import Admission
from .baselines import centralised, local_only, pooled
from .federate import each_round, federate, make_run
from .history import History
from .local import Local
from .publishable import OnPublicPatients
from .recipe import recipe_sha256
from .round import one_round
from .site_states import SiteStates
from .trace import Verdict, verify
from .trackers import CsvTracker, MLflowTracker, TensorBoardTracker

__all__ = [
    "Admission", "CsvTracker", "History", "Local", "MLflowTracker", "OnPublicPatients", "SiteStates",
    "TensorBoardTracker", "Verdict", "centralised", "each_round", "federate", "local_only", "make_run", "one_round",
    "pooled", "recipe_sha256", "verify",
]
