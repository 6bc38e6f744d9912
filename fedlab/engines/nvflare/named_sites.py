"""Sites as a server takes them: by name. How many patients they have is their own affair."""

from __future__ import annotations

from collections.abc import Sequence

from fedlab.core.protocols import Topology
from fedlab.core.types import Site
from fedlab.engines.remote import away
from fedlab.run.site_task import SiteTask

__all__ = ["unseen_sites"]

_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)


def unseen_sites(task: SiteTask, names: Sequence[str], *, rounds: int, topology: Topology) -> list[Site]:
    """Sites with as few stand-ins for patients as the parts of the run need to find themselves working together.

    Each site checks the run with its own number when it begins; what is checked here is the rest.

    Raises:
        ValueError: with no number of patients the parts work together.
    """
    last: ValueError | None = None
    for patients in _SIZES:
        sites = [away(name, patients=patients) for name in names]
        try:
            topology.check_run(sites=sites, strategy=task.strategy)
            task.strategy.check_run(trainer=task.trainer, sites=sites, privacy=task.privacy)
            task.privacy.check_run(trainer=task.trainer, sites=sites, strategy=task.strategy, rounds=rounds)
            return sites
        except ValueError as error:
            if last is not None and str(error) == str(last):
                raise  # not about patients
            last = error
    raise last or ValueError("no site is named")
