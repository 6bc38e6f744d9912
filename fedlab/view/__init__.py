"""Viewers, figures, the dashboard, the playground and report pages.

Read `viewer` first, then `run_figures`. Needs the extra `lab`. May import `engines` and the packages below it; only
`apps` may import it.

Example:
    >>> patient = fl.make_cohort(sites=1, patients=2, shape=(32, 32, 32), spacing_mm=6.0)[0].train[0]
    >>> fl.view.surface(patient, part="WT")
    <Surface of WT of site-01-001: ... triangles around ... ml>
"""

import lazy_loader

from fedlab.core.extras import LAB, need

need("lab", *LAB, what="fedlab.view")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
