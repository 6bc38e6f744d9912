"""Runs in an environment with the base install alone: two rounds of a federation, then a site that answers a plan.

Called by test_base_install.py; its argument is a new folder, and it prints what it found as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch

import fedlab as fl
from fedlab.core import ServerState, weights_sha256
from fedlab.deploy import Plan, SiteHost, SitePolicy
from fedlab.deploy.messages import pack_state, pack_weights, unpack_answer
from fedlab.privacy import TopK
from fedlab.run import History
from fedlab.topologies import star

SIZE = (32, 32, 32)


def trainer() -> fl.SiteTrainer:
    return fl.SiteTrainer(model=fl.segresnet(filters=8, seed=0), lr=1e-3, steps=1, crop=(16, 16, 16), batch_size=2)


def federated_run(sites: list[fl.Site], folder: Path) -> History:
    """Two rounds of DP-SGD with sparse updates, evaluated, written to tables and a checkpoint."""
    privacy = fl.DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.1, batch=1) + TopK(keep=0.5)
    history = fl.federate(trainer(), sites, strategy=fl.FedAvg(weights="uniform"), privacy=privacy, rounds=2, seed=0,
                          checkpoint=folder / "checkpoint", progress=False)
    assert len(history.table()) == 2 and (history.spent()["epsilon"] > 0).all()
    return history


def answered_plan(site: fl.Site, folder: Path) -> fl.Update:
    """One round of a plan at a site's host, as messages over a wire."""
    task = trainer()
    plan = Plan.of(trainer=task, strategy=fl.FedAvg(), privacy=fl.Privacy(), topology=star, admission=None, rounds=1,
                   seed=0, sites=[site.name])
    start = task.initial()
    with SiteHost(site=site, folder=folder / "site", policy=SitePolicy(max_rounds=5)) as host:
        host.begin(plan.to_json(), pack_weights(start))
        answer = unpack_answer(host.train(plan.run, pack_state(ServerState(round=0, params=start))), site=site.name)
    assert isinstance(answer, fl.Update), answer
    return answer


def refusal(name: str) -> str:
    """What fedlab says where a name needs the extra that is not here."""
    try:
        getattr(fl, name)
    except ImportError as error:
        return str(error)
    return f"fl.{name} loads without the extra"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    sites = fl.make_cohort(sites=2, patients=4, shape=SIZE, spacing_mm=6.0, held_out=0.25, seed=0, workers=0,
                           cache=folder / "cache", progress=False)
    history = federated_run(sites, folder)
    scores = fl.evaluate(trainer().model, sites, progress=False)
    update = answered_plan(sites[0], folder)
    absent = ("matplotlib", "jupyterlab", "ipywidgets", "ipyniivue", "IPython", "ipykernel", "skimage", "mistune",
              "itkwidgets", "nvflare", "mlflow", "pytest")
    print(json.dumps({
        "fedlab": fl.__file__, "rounds": len(history.records), "weights": weights_sha256(history.state.params),
        "patients scored": len(set(scores["patient"])), "weight of the update": update.weight,
        "present": [name for name in absent if importlib.util.find_spec(name) is not None],
        "refusals": {name: refusal(name) for name in ("show", "RunDashboard", "view")},
    }))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
