"""What supports a claim about a run: comparisons, contributions of sites, and what attackers learn.

Read `assessment` first, then `attacked` and `findings`. May import `checks` and the packages below it.

Example:
    >>> audit = fl.evidence.CanaryAudit(canaries=50)
    >>> audit(fl.privacy.LocalGaussian(clip=1.0, noise_multiplier=2.0, delta=1e-3)).refuted
    False
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
