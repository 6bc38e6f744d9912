"""Patients from folders or from a generator, and how they are distributed over sites.

Read `readers/folders` first for own data and `phantom/generator` for generated data. `sites` holds partitions,
statistics, fingerprints and harmonisation; `cards` describes a data set. May import `privacy` and the packages below
it.

Example:
    >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
    >>> statistics = [fl.data.site_statistics(site) for site in sites]
    >>> differences = fl.data.heterogeneity(statistics)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
