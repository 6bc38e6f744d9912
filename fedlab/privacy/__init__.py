"""Privacy techniques: what changes an update or the training to protect patients, and the ledger of privacy spent.

Read `base` first, then `dp/dpsgd`. `accounting` holds ledgers, `noise` every sampler, `dp` differential privacy,
`sparse` and `compression` partial updates, `secure_aggregation` sums that hide their terms.
May import `strategies`, `training` and `core`.

Example:
    >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
    >>> trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16))
    >>> technique = fl.privacy.LocalGaussian(clip=1.0, noise_multiplier=2.0, delta=1e-3)
    >>> print(fl.federate(trainer, sites, privacy=technique, rounds=1).guarantee())
    ε = 3.54 at δ = 0.001 per site (any two updates of a site, rdp accountant) at site-02; ...
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
