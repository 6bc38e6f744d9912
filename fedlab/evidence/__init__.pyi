from .arms import Arm
from .assessment import assess, default_attacks
from .attacked import Attack, Canaries, Case, ModelMembership, NotApplicable, SentMembership, SentReconstruction
from .canaries import Audit, CanaryAudit
from .comparison import ArmComparison, compare_arms
from .contributions import Contributions, KeepUpdates, dice_on, site_contributions
from .differences import Difference, Share, difference, share_kept
from .findings import Finding, Threat
from .inference import PropertyInference, SiteInference
from .inversion import Inversion, invert_update, one_step_update, patch_net, tumour_patch
from .membership import RMIA, LossThreshold, Membership, RoundMembership, UpdateMembership, shadow_models
from .presets import presets
from .reconstruction import Reconstructed, Reconstruction, tissue_prior
from .report import Assessed, Evidence
from .runs import RunOnDisk, RunTable, runs
from .sweeps import Sweep, search, sweep

__all__ = [
    "RMIA", "Arm", "ArmComparison", "Assessed", "Attack", "Audit", "Canaries", "CanaryAudit", "Case", "Contributions",
    "Difference", "Evidence", "Finding", "Inversion", "KeepUpdates", "LossThreshold", "Membership", "ModelMembership",
    "NotApplicable", "PropertyInference", "Reconstructed", "Reconstruction", "RoundMembership", "RunOnDisk", "RunTable",
    "SentMembership", "SentReconstruction", "Share", "SiteInference", "Sweep", "Threat", "UpdateMembership", "assess",
    "compare_arms", "default_attacks", "dice_on", "difference", "invert_update", "one_step_update", "patch_net",
    "presets", "runs", "search", "shadow_models", "share_kept", "site_contributions", "sweep", "tissue_prior",
    "tumour_patch",
]
