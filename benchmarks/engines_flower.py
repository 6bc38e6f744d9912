"""The arm of the engines' benchmark on Flower's simulation; started by engines.py with the interpreter of its own
environment, which has Flower besides what fedlab needs.

    python benchmarks/engines_flower.py DATA ROUNDS OUT

A Flower client runs fedlab's task of a site on the weights that came; the server adds the updates up as fedlab's
FedAvg does, in the order of the sites. So what is compared is the way there and back, and the bits are the same.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

import engines_task
import fedlab as fl
from fedlab.data.store import load_sites
from fedlab.privacy.base import Privacy
from fedlab.run.site_task import SiteTask

#: Seconds until all of Flower's nodes must be there.
PATIENCE = 300
_task: SiteTask | None = None


def task() -> SiteTask:
    """The task of a site, made once in each process."""
    global _task
    if _task is None:
        torch.set_num_threads(1)
        _task = SiteTask(trainer=engines_task.make_trainer(), privacy=Privacy(), seed=0)
    return _task


def client(data: Path) -> ClientApp:
    """Trains one site on the weights that came and answers with the update."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        site = load_sites(data)[int(context.node_config["partition-id"])]
        state = fl.core.ServerState(round=int(message.content["round"]["number"]),
                                    params=dict(message.content["weights"].to_torch_state_dict()))
        update = task()(site, state, fl.core.SiteState())
        told = ConfigRecord({"site": update.site, "weight": update.weight, "steps": update.steps})
        return Message(RecordDict({"delta": ArrayRecord.from_torch_state_dict(dict(update.delta)), "told": told}),
                       reply_to=message)

    return app


def server(names: Sequence[str], rounds: int, note: Callable[[Any], None],
           states: list[fl.core.ServerState]) -> ServerApp:
    """Plain averaging; the last state is put into `states`."""
    app = ServerApp()

    @app.main()
    def loop(grid: Grid, context: Context) -> None:
        strategy = fl.FedAvg()
        state = strategy.begin(task().trainer.initial())
        nodes, end = list(grid.get_node_ids()), time.monotonic() + PATIENCE
        while len(nodes) < len(names):
            if time.monotonic() > end:
                raise RuntimeError(f"{len(nodes)} of {len(names)} nodes have come in {PATIENCE} seconds")
            time.sleep(0.05)
            nodes = list(grid.get_node_ids())
        for number in range(rounds):
            weights = ArrayRecord.from_torch_state_dict(dict(state.params))
            asked = [Message(RecordDict({"weights": weights, "round": ConfigRecord({"number": number})}),
                             dst_node_id=node, message_type="train") for node in nodes]
            answers = [update_of(reply, number) for reply in grid.send_and_receive(asked)]
            updates = sorted(answers, key=lambda update: names.index(update.site))
            state = strategy.step(state, strategy.combine(iter(updates)))
            note(number)
        states.append(state)

    return app


def update_of(reply: Message, number: int) -> fl.Update:
    if reply.has_error():
        raise RuntimeError(f"a Flower client failed: {reply.error}")
    told = reply.content["told"]
    return fl.Update(site=str(told["site"]), weight=float(told["weight"]), steps=int(told["steps"]), round=number,
                     delta=dict(reply.content["delta"].to_torch_state_dict()))


def run(data: Path, sites: Sequence[fl.Site], rounds: int, note: Callable[[Any], None]) -> fl.core.ServerState:
    states: list[fl.core.ServerState] = []
    run_simulation(server([site.name for site in sites], rounds, note, states), client(data), num_supernodes=len(sites),
                   backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    if not states:
        raise RuntimeError("Flower's server ended without a state; see what it printed")
    return states[0]


if __name__ == "__main__":
    data, count, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    try:
        engines_task.main("Flower simulation", lambda *settings: run(data, *settings), data, count, out)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # threads of Flower's would wait for ever for a simulation that has failed
