from .accounting.ledger import Ledger, Terms, noise_multiplier_for
from .accounting.ledger_file import LedgerFile
from .accounting.mechanisms import Concentrated, Gaussian, Pure, epsilon_of
from .aggregation import Aggregation
from .at_sites import AtSites
from .base import Privacy
from .compression import Quantise, ScaledSign, SharePercentile, TopK
from .dp.clipping import AdaptiveClip, clip_update
from .dp.dpsgd import DPSGD
from .dp.site_level import CentralGaussian, LocalGaussian
from .dp.validators import check_private, fix_private
from .personal_layers import PersonalLayers, norms, norms_and_head
from .secure_aggregation.secure_sum import SecureAggregation
from .sparse.partial_sharing import SVT, PartialSharing, SparseVector, composed_epsilon

__all__ = [
    "DPSGD", "SVT", "AdaptiveClip", "Aggregation", "AtSites", "CentralGaussian", "Concentrated", "Gaussian", "Ledger",
    "LedgerFile", "LocalGaussian", "PartialSharing", "PersonalLayers", "Privacy", "Pure", "Quantise", "ScaledSign",
    "SecureAggregation", "SharePercentile", "SparseVector", "Terms", "TopK", "check_private", "clip_update",
    "composed_epsilon", "epsilon_of", "fix_private", "noise_multiplier_for", "norms", "norms_and_head",
]
