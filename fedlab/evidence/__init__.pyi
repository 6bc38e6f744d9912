from .arms import Arm
from .comparison import ArmComparison, compare_arms
from .contributions import Contributions, KeepUpdates, dice_on, site_contributions
from .differences import Difference, difference
from .findings import Finding, Threat
from .inversion import Inversion, invert_update, one_step_update, patch_net
from .membership import RMIA, LossThreshold, Membership, UpdateMembership, shadow_models
from .runs import RunOnDisk, RunTable, runs
from .sweeps import Sweep, sweep

__all__ = [
    "RMIA", "Arm", "ArmComparison", "Contributions", "Difference", "Finding", "Inversion", "KeepUpdates",
    "LossThreshold", "Membership", "RunOnDisk", "RunTable", "Sweep", "Threat", "UpdateMembership", "compare_arms",
    "dice_on", "difference", "invert_update", "one_step_update", "patch_net", "runs", "shadow_models",
    "site_contributions", "sweep",
]
