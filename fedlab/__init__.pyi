from . import (
    checks,
    core,
    data,
    deploy,
    engines,
    evidence,
    faults,
    privacy,
    run,
    strategies,
    topologies,
    training,
    view,
)
from .checks.privacy import check_privacy
from .core.errors import FedlabError, PrivacyError
from .core.types import Patient, Site, Update
from .data.phantom.generator import make_cohort
from .data.readers.folders import read_cohort, read_sites
from .evidence.arms import Arm
from .evidence.assessment import assess
from .evidence.comparison import compare_arms
from .evidence.differences import difference
from .evidence.runs import runs
from .evidence.sweeps import sweep
from .privacy.base import Privacy
from .privacy.dp.dpsgd import DPSGD
from .privacy.secure_aggregation.secure_sum import SecureAggregation
from .run.federate import each_round, federate
from .run.local import Local
from .strategies.averaging import FedAvg
from .training.metrics import evaluate, predict, summary
from .training.networks import segresnet
from .training.public_model import public_model
from .training.trainer import SiteTrainer
from .view.colours import style
from .view.dashboard import RunDashboard
from .view.slices import compare
from .view.viewer import show

__version__: str

__all__ = [
    "DPSGD", "Arm", "FedAvg", "FedlabError", "Local", "Patient", "Privacy", "PrivacyError", "RunDashboard",
    "SecureAggregation", "Site", "SiteTrainer", "Update", "assess", "check_privacy", "checks", "compare",
    "compare_arms", "core", "data", "deploy", "difference", "each_round", "engines", "evaluate", "evidence",
    "faults", "federate", "make_cohort", "predict", "privacy", "public_model", "read_cohort", "read_sites", "run",
    "runs", "segresnet", "show", "strategies", "style", "summary", "sweep", "topologies", "training", "view",
]
