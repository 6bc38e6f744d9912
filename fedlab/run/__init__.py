"""A federated run with a server: rounds, the task of a site, admission of updates, checkpoints, history and traces.

Read `round` first, then `site_task`, `arrivals` and `federate`. May import `data` and the packages below it.

Example:
    >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
    >>> trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16))
    >>> fl.run.centralised(trainer, sites, rounds=1)  # all patients in one place, as an upper reference
    <History: 1 of 1 round, loss ...; no formal guarantee>
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
