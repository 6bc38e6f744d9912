"""Where sites train outside this process: worker processes, remote hosts and NVIDIA FLARE.

Read `processes` first. The engine in this process is `run.Local`. May import `deploy` and the packages below it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
