"""What supports a claim about a run: contributions of sites and attacks on updates.

Read `contributions` first, then `inversion`. May import `checks` and the packages below it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
