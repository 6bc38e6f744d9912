"""Viewers, figures, the dashboard, the playground and report pages.

Read `viewer` first, then `run_figures`. Needs the extra `lab`. May import `engines` and the packages below it; only
`apps` may import it.
"""

import lazy_loader

from fedlab.core.extras import LAB, need

need("lab", *LAB, what="fedlab.view")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
