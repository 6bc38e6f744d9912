from .engine import check_engine
from .explain import (
    Explanation,
    explain_flower_adaptive_clipping,
    explain_flower_fixed_clipping,
    explain_flower_local_dp,
    explain_nvflare_percentile,
    explain_nvflare_svt,
)
from .privacy import check_privacy
from .strategy import check_strategy

__all__ = [
    "Explanation", "check_engine", "check_privacy", "check_strategy", "explain_flower_adaptive_clipping",
    "explain_flower_fixed_clipping", "explain_flower_local_dp", "explain_nvflare_percentile", "explain_nvflare_svt",
]
