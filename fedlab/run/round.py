"""One round with an aggregation server: the code that every run with a server takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fedlab.core.protocols import Run, Topology
from fedlab.core.types import Round, ServerState, Update
from fedlab.core.weights import weights_sha256
from fedlab.privacy.noise.streams import noise_generator
from fedlab.run.arrivals import Arrivals, Void
from fedlab.run.server_ledger import server_ledger, stated
from fedlab.strategies.averaging import TooFewUpdates

__all__ = ["Star", "Workflow", "one_round", "star", "with_buffers"]


def one_round(run: Run, state: ServerState) -> Round:
    """Select, train, combine, release, step: from the server's state before a round to the finished round.

    Raises:
        PrivacyBudgetExhausted: every site of the cohort has withdrawn.
        FedlabError: a site failed, or too few updates were received, and the run has no admission rules.
    """
    state = state.copy()
    arrivals = Arrivals(run, state, run.select(state))
    try:
        keys = run.aggregation.before(arrivals)  # none, unless sums are secure
        answers = run.engine.train(run.task, state, arrivals.cohort, run.site_states)
        updates = arrivals.admit(answers, state, arrivals.cohort)  # a stream: one update is in memory at a time
        mean = _combine(run, updates, arrivals)
        mean = run.aggregation.after(mean, keys, arrivals)
        mean = _release(run, mean, arrivals, state)
        moved = with_buffers(run.strategy.step(state, mean), state, mean)
    except Void as error:
        moved = _void(run, arrivals, state, error)
    return arrivals.close(moved)


def with_buffers(moved: ServerState, state: ServerState, mean: Update) -> ServerState:
    """The state after the strategy's step, with the buffers of the mean; raises `ValueError` if it lacks them."""
    if mean.buffers.keys() != state.buffers.keys():
        raise ValueError("the strategy's mean lacks the network's buffers, such as the statistics of batch norm; "
                         "combine with fedlab.strategies.weighted_mean, or say SiteTrainer(buffers='keep')")
    return replace(moved, buffers={name: mean.buffers[name].to(b.dtype) for name, b in state.buffers.items()})


def _combine(run: Run, updates: Iterator[Update], arrivals: Arrivals) -> Update:
    """The mean; zeros where noise at the server must hide that no site took part."""
    try:
        return run.strategy.combine(updates)
    except TooFewUpdates:
        if arrivals.present or not run.privacy.works_at_server:
            raise
    return _nothing(run)


def _void(run: Run, arrivals: Arrivals, state: ServerState, error: Exception) -> ServerState:
    """The state after a round without a usable mean; noise at the server hides that it had none."""
    unmoved = arrivals.void(error)
    if arrivals.released or not run.privacy.works_at_server:
        return unmoved
    mean = _release(run, _nothing(run), arrivals, state)
    return with_buffers(run.strategy.step(state, mean), state, mean)


def _nothing(run: Run) -> Update:
    zeros = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in run.trainer.initial().items()}
    return Update(site="mean", delta=zeros, weight=1.0)


def _release(run: Run, mean: Update, arrivals: Arrivals, state: ServerState) -> Update:
    """The mean after the techniques' part at the server."""
    # Noise depends on the mean to which it is added: two runs of one seed on other data never share it.
    rng = noise_generator(run.seed, "release", state.round, known := weights_sha256(mean.delta))
    with server_ledger(run, state, known):
        out = run.privacy.release(mean, arrivals.took_part, state.of("privacy"), rng)
    arrivals.charge(stated(out.spent, state))
    return out


class Workflow:
    """Base of the workflows, `fedlab.core.protocols.Topology`: nothing to check and no numbers about the state."""

    one_server: ClassVar[bool] = False

    def check(self, run: Run) -> None: ...

    def metrics(self, state: ServerState) -> Mapping[str, float]:
        return {}


@dataclass(frozen=True)
class Star(Workflow):
    """An aggregation server in the middle: broadcast, train at every site, combine, move (Rieke et al. 2020).

    The server sees every update, unless secure aggregation hides them; sites see the global model only.
    """

    one_server: ClassVar[bool] = True

    def __call__(self, run: Run, state: ServerState) -> Round:
        return one_round(run, state)

    def messages(self, names: Sequence[str]) -> list[tuple[str, str]]:
        return [("server", name) for name in names] + [(name, "server") for name in names]


star: Topology = Star()
