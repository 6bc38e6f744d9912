"""Sites that are not in this process: plans, messages, a site's settings, its policy and its host.

Read `plan` first, then `host`. May import `faults` and the packages below it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
