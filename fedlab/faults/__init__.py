"""Sites that fail, drop out, lie or attack, to test a run against.

Read `sites` first. May import `evidence` and the packages below it.

Example:
    >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
    >>> trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16))
    >>> engine = fl.faults.Faulty(engine=fl.Local(), faults=[fl.faults.DropOut(sites=["site-02"])])
    >>> run = fl.each_round(trainer, sites, engine=engine, admission=fl.run.Admission(), rounds=1)
    >>> next(run)
    <Round 0: updates of 1 of 2 sites>
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
