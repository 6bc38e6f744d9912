"""The words of fedlab: patient, site, update, round, server state and privacy spent; errors; weights, seeds and files.

Read `types` first, then `errors`. Lowest layer: it imports no other package of fedlab.

Example:
    >>> fl.core.MODALITIES
    ('FLAIR', 'T1', 'T1c', 'T2')
    >>> len(fl.core.weights_sha256(dict(fl.segresnet().named_parameters())))
    64
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
