"""A simulation on this machine: the folder that holds what in a deployment lies at the sites."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from fedlab.core.errors import RunError
from fedlab.core.types import Site
from fedlab.data.store import load_sites, save_sites
from fedlab.deploy.host import SiteHost
from fedlab.deploy.policy import SitePolicy
from fedlab.run.recipe import patients_sha256

__all__ = ["SIMULATION", "prepare_simulation", "simulated_host", "simulated_policy"]

#: Set in the processes of a simulation only: its folder.
SIMULATION = "FEDLAB_SIMULATION"


def prepare_simulation(folder: Path, sites: Sequence[Site], *, modules: Sequence[str]) -> None:
    """Writes the patients of each site into a folder of its own, and the modules that the plan names.

    All of them are approved: the user who simulates has written or chosen them.

    Raises:
        RunError: the folder holds other patients of a site of that name: a run must not continue with others.
    """
    for site in sites:
        place, digest = folder / "data" / site.name, f"{patients_sha256(site.train)} {patients_sha256(site.val)}"
        note = place / "patients.sha256"
        if not place.exists():
            save_sites([site], place)
            note.write_text(digest, encoding="utf-8")
        elif not note.is_file() or note.read_text(encoding="utf-8") != digest:
            raise RunError(f"{folder} holds a simulation in which {site.name} has other patients; choose another "
                           "folder")
    (folder / "modules.json").write_text(json.dumps(sorted(modules)), encoding="utf-8")


def simulated_policy() -> SitePolicy | None:
    """In a simulation, what its sites and server allow: all modules that the researcher's own plan names."""
    if not (folder := os.environ.get(SIMULATION)):
        return None
    modules = json.loads((Path(folder) / "modules.json").read_text(encoding="utf-8"))
    return SitePolicy(installed=tuple(modules), tell_errors=True)


def simulated_host(name: str) -> SiteHost | None:
    """In a simulation, a site with the patients that were written for it; `RunError` if another process uses it."""
    policy = simulated_policy()
    if policy is None:
        return None
    folder = Path(os.environ[SIMULATION])
    return SiteHost(site=load_sites(folder / "data" / name)[0], folder=folder / "sites" / name, policy=policy)
