"""Viewers, figures, the dashboard, the playground and report pages.

Read `viewer` first, then `run_figures`. Needs Jupyter only where a function shows a widget. May import `engines` and
the packages below it; only `apps` may import it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
