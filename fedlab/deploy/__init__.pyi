from .host import SiteHost
from .plan import Plan, built
from .policy import Budget, Required, SitePolicy

__all__ = [
    "Budget", "Plan", "Required", "SiteHost", "SitePolicy", "built",
]
