"""Where sites train outside this process: worker processes, remote hosts and NVIDIA FLARE.

Read `processes` first. The engine in this process is `run.Local`. May import `deploy` and the packages below it.

Example:
    >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
    >>> trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16))
    >>> with fl.engines.Processes(2) as engine:
    ...     history = fl.federate(trainer, sites, engine=engine, rounds=1)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
