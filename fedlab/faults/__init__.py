"""Sites that fail, drop out, lie or attack, to test a run against.

Read `sites` first. May import `evidence` and the packages below it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
