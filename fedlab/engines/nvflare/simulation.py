"""Sites and server of this machine only: where a simulation keeps what in a deployment lies at the sites."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from fedlab.core.errors import RunError
from fedlab.core.types import Site
from fedlab.core.weights import weights_sha256
from fedlab.data.store import load_sites, save_sites
from fedlab.deploy.host import SiteHost
from fedlab.deploy.policy import SitePolicy

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
        place, digest = folder / "data" / site.name, _digest(site)
        note = place / "patients.sha256"
        if not place.exists():
            save_sites([site], place)
            note.write_text(digest, encoding="utf-8")
        elif not note.is_file() or note.read_text(encoding="utf-8") != digest:
            raise RunError(f"{folder} holds a simulation in which {site.name} has other patients; choose another "
                           "folder")
    (folder / "modules.json").write_text(json.dumps(sorted(modules)), encoding="utf-8")


def _digest(site: Site) -> str:
    """A hash of all that is written of a site's patients."""
    tensors: dict[str, torch.Tensor] = {}
    for split, patients in (("train", site.train), ("val", site.val)):
        for number, patient in enumerate(patients):
            key = f"{split}|{number}|{patient.id}|"
            tensors |= {f"{key}image": patient.image, f"{key}affine": torch.from_numpy(patient.affine.copy())}
            if patient.label is not None:
                tensors[f"{key}label"] = patient.label
    return weights_sha256(tensors)


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
