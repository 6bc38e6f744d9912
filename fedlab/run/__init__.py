"""A federated run with a server: rounds, the task of a site, admission of updates, checkpoints, history and traces.

Read `round` first, then `site_task`, `arrivals` and `federate`. May import `data` and the packages below it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
