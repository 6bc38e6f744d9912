from .admission import Admission
from .baselines import centralised, local_only, pooled
from .federate import each_round, federate
from .history import History
from .local import Engine, Local
from .trace import Verdict, verify
from .trackers import CsvTracker, MLflowTracker, TensorBoardTracker

__all__ = [
    "Admission", "CsvTracker", "Engine", "History", "Local", "MLflowTracker", "TensorBoardTracker", "Verdict",
    "centralised", "each_round", "federate", "local_only", "pooled", "verify",
]
