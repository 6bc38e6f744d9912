"""Sites and server of this machine only: where a simulation keeps what in a deployment lies at the sites."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from fedlab.data.store import load_sites, save_sites
from fedlab.errors import RunError
from fedlab.site_host import SiteHost
from fedlab.site_policy import SitePolicy
from fedlab.types import Site

__all__ = ["SIMULATION", "prepare_simulation", "simulated_host", "simulated_policy"]

#: Set in the processes of a simulation only: its folder.
SIMULATION = "FEDLAB_SIMULATION"


def prepare_simulation(folder: Path, sites: Sequence[Site], *, modules: Sequence[str]) -> None:
    """Writes the patients of each site into a folder of its own, and which modules the plan may name.

    Args:
        folder: of the simulation.
        sites: with their patients.
        modules: of the plan: whoever simulates has written or chosen them.

    Raises:
        RunError: the folder holds other patients of a site of that name: a run must not go on with others.
    """
    for site in sites:
        place, scratch = folder / "data" / site.name, folder / "data" / f"{site.name}.part"
        shutil.rmtree(scratch, ignore_errors=True)
        save_sites([site], scratch)
        if not place.exists():
            os.replace(scratch, place)
            continue
        same = all(filecmp.cmp(new, place / new.name, shallow=False) for new in scratch.iterdir())
        shutil.rmtree(scratch)
        if not same:
            raise RunError(f"{folder} holds a simulation in which {site.name} has other patients; choose another "
                           "folder")
    (folder / "modules.json").write_text(json.dumps(sorted(modules)), encoding="utf-8")


def simulated_policy() -> SitePolicy | None:
    """In a simulation, what its sites and server allow: all that the researcher's own plan names."""
    if not (folder := os.environ.get(SIMULATION)):
        return None
    modules = json.loads((Path(folder) / "modules.json").read_text(encoding="utf-8"))
    return SitePolicy(installed=tuple(modules), tell_errors=True)


def simulated_host(name: str) -> SiteHost | None:
    """In a simulation, a site with the patients that were written for it.

    Raises:
        RunError: another process is using the site's folder.
    """
    policy = simulated_policy()
    if policy is None:
        return None
    folder = Path(os.environ[SIMULATION])
    return SiteHost(site=load_sites(folder / "data" / name)[0], folder=folder / "sites" / name, policy=policy)
