from .engine import check_engine
from .privacy import check_privacy
from .strategy import check_strategy

__all__ = [
    "check_engine", "check_privacy", "check_strategy",
]
