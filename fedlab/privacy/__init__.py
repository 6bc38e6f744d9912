"""Privacy techniques: what changes an update or the training to protect patients, and the ledger of privacy spent.

Read `base` first, then `dp/dpsgd`. `accounting` holds ledgers, `noise` every sampler, `dp` differential privacy,
`sparse` and `compression` partial updates, `secure_aggregation` sums that hide their terms.
May import `strategies`, `training` and `core`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
