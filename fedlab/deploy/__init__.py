"""Sites that are not in this process: plans, messages, a site's settings, its policy and its host.

Read `plan` first, then `host`. May import `faults` and the packages below it.

Example:
    >>> policy = fl.deploy.SitePolicy(max_rounds=50, budgets={"patient": fl.deploy.Budget(epsilon=3.0, delta=1e-5)})
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
