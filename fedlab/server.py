"""The federated run: it knows no engine's inner life, no differential privacy and no plotting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fedlab.checkpoint import Checkpoint
from fedlab.engines.local import Engine, Local
from fedlab.errors import PrivacyBudgetExhausted
from fedlab.history import History
from fedlab.models import load_weights, weights_sha256
from fedlab.privacy.base import Inboxes, Privacy, check_update
from fedlab.seeds import derive, generator
from fedlab.strategies import FedAvg, Strategy
from fedlab.task import SiteTask, enrol
from fedlab.topology import Topology, star
from fedlab.training import SiteTrainer
from fedlab.types import Cohort, Memory, Round, ServerState, Site, Spent, Update, Withdrawal

__all__ = ["each_round", "federate"]


def each_round(
    trainer: SiteTrainer, sites: Sequence[Site], *, strategy: Strategy | None = None, privacy: Privacy | None = None,
    rounds: int = 10, topology: Topology = star, engine: Engine | None = None, seed: int = 0,
    state: ServerState | None = None,
) -> Iterator[Round]:
    """Runs round after round, yielding each as it ends: `next(run)`, look, `next(run)`.

    Args:
        trainer: trains locally, from the weights its model had when the trainer was made.
        sites: with unique names and at least one training patient each.
        strategy: `FedAvg()` by default.
        privacy: a technique or several joined by `+`; none by default.
        rounds: number of the last round, so a resumed run ends where the whole run would.
        topology: a function such as `star`.
        engine: where sites work; this process by default.
        seed: one seed gives bit-equal weights on one machine.
        state: where to go on from; the beginning by default.

    Raises:
        ValueError: no site, an empty site, two sites of one name, or no round.
        SiteError: a site failed.
        PrivacyBudgetExhausted: no site may take part any more.
        PrivacyError: a technique refused or failed; nothing was sent.
    """
    _check_run(sites, rounds)
    strategy = FedAvg() if strategy is None else strategy
    privacy = Privacy() if privacy is None else privacy
    engine = Local() if engine is None else engine
    privacy.check_run(trainer=trainer, sites=sites, strategy=strategy, rounds=rounds)
    task = SiteTask(trainer=trainer, privacy=privacy, seed=seed)
    if state is None:
        state = strategy.begin(trainer.initial())
        for site in sites:
            enrol(engine.memory.setdefault(site.name, {}))
    return _rounds(task, sites, strategy, rounds, topology, engine, state)


def _rounds(task: SiteTask, sites: Sequence[Site], strategy: Strategy, rounds: int, topology: Topology,
            engine: Engine, state: ServerState) -> Iterator[Round]:
    for _ in range(state.round, rounds):
        yield (finished := _one_round(task, sites, strategy, topology, engine, state))
        state = finished.state


def _one_round(task: SiteTask, sites: Sequence[Site], strategy: Strategy, topology: Topology, engine: Engine,
               state: ServerState) -> Round:
    started, number, privacy = time.perf_counter(), state.round, task.privacy
    cohort = strategy.select(sites, generator(task.seed, "select", number))
    memory: Memory = {group: dict(tensors) for group, tensors in state.memory.items()}
    seen: dict[str, dict[str, float]] = {}
    spent: dict[str, tuple[Spent, ...]] = {}
    absent: dict[str, str] = {}

    def train(state: ServerState, sites: Sequence[Site]) -> Iterator[Update]:
        expected = {site.name for site in sites}
        for update in engine.run(task, state, sites):
            if update.site not in expected:
                raise ValueError(f"an update of {update.site!r} came; still expected were {sorted(expected)}")
            expected.remove(update.site)
            if isinstance(update, Withdrawal):
                absent[update.site] = update.reason
                continue
            check_update(update, like=state.params, site=update.site)  # the server trusts no engine
            seen[update.site] = {**update.metrics, "norm": update.norm(), "weight": update.weight,
                                 "steps": float(update.steps), "bytes": float(update.nbytes)}
            spent[update.site] = update.spent
            yield update
        if cohort and not seen:
            raise PrivacyBudgetExhausted("no site is left: " + "; ".join(absent.values()))

    def release(mean: Update) -> Update:
        inboxes = privacy.at_server("trained", {}, memory, tuple(seen)) if privacy.after else {}
        _exchange(task, engine, privacy.after, inboxes, [s for s in cohort if s.name in seen], memory, tuple(seen))
        took_part = Cohort(number, tuple(seen), len(sites), getattr(strategy, "sample", 1.0))
        mean = privacy.unmask(mean, took_part, memory)
        # Noise that depends on what it is added to: two runs of one seed on other data never share it.
        seed = derive(task.seed, weights_sha256(mean.delta))
        out = privacy.release(mean, took_part, memory, generator(seed, "release", number))
        if out.spent:
            spent["server"] = out.spent
        return out

    _exchange(task, engine, privacy.before, {}, cohort, memory, ())
    if cohort:
        moved = topology(state, cohort, strategy=strategy, train=train, release=release)
    else:  # nobody was drawn: the model stays, but for noise that hides just that
        nothing = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in task.trainer.initial().items()}
        moved = strategy.step(state, release(Update(site="mean", delta=nothing, weight=1.0)))
    kept = {group: tensors for group, tensors in memory.items() if not group.startswith("_")}
    return Round(number=number, state=replace(moved, memory=kept), cohort=tuple(site.name for site in cohort),
                 sites=seen, spent=spent, metrics={}, seconds=time.perf_counter() - started, absent=absent)


def _exchange(task: SiteTask, engine: Engine, steps: Sequence[str], inboxes: Inboxes, sites: Sequence[Site],
              memory: Memory, arrived: Sequence[str]) -> None:
    """Messages between the sites, handed on by the server, one step after the other."""
    for step in steps:
        sent = engine.exchange(task, step, inboxes, sites)
        inboxes = task.privacy.at_server(step, sent, memory, arrived)


def federate(
    trainer: SiteTrainer, sites: Sequence[Site], *, strategy: Strategy | None = None, privacy: Privacy | None = None,
    rounds: int = 10, topology: Topology = star, engine: Engine | None = None, seed: int = 0,
    validate: Callable[[torch.nn.Module, int], dict[str, float]] | None = None,
    on_round: Callable[[Round], None] | None = None, checkpoint: Path | str | None = None, progress: bool = True,
) -> History:
    """Runs all rounds and returns their history, with the final weights in `history.state` and in the trainer's model.

    Args:
        trainer, sites, strategy, privacy, rounds, topology, engine, seed: as in `each_round`.
        validate: called with the global model and the round's number after each round; what it returns, such as
            the Dice of held-out patients, joins the round's metrics.
        on_round: called with each finished round.
        checkpoint: a folder that the run is saved in after every round. If it holds the beginning of this same
            run, the run goes on from there, to the bit-equal result.
        progress: show a progress bar.

    Raises:
        ValueError, SiteError, PrivacyError: as in `each_round`. When the privacy budgets of all sites are used up
            the run ends early instead, and `history.stopped` says so.
        RunError: the checkpoint is of a run with other settings, or damaged.
    """
    strategy = FedAvg() if strategy is None else strategy
    privacy = Privacy() if privacy is None else privacy
    engine = Local() if engine is None else engine
    _check_run(sites, rounds)
    history = History(rounds=rounds, privacy=repr(privacy))
    saved = None
    if checkpoint is not None:
        start = trainer.initial()
        saved = Checkpoint.open(checkpoint, start=start, describe={
            "trainer": repr(trainer), "strategy": repr(strategy), "privacy": repr(privacy), "seed": str(seed),
            "topology": getattr(topology, "__name__", repr(topology)),
            "sites": "; ".join(f"{s.name}: {' '.join(p.id for p in s.train)}" for s in sites),
        })
        history.state, engine.memory, records = saved.load() or (None, engine.memory, [])
        history.records.extend(records)
    run = each_round(trainer, sites, strategy=strategy, privacy=privacy, rounds=rounds, topology=topology,
                     engine=engine, seed=seed, state=history.state)
    with history.progress(enabled=progress) as show:
        for finished in _until_exhausted(run, history):
            if validate is not None:
                metrics = validate(_with_weights(trainer, finished.state), finished.number)
                finished = replace(finished, metrics=metrics)
            history.add(finished)
            if saved is not None:
                saved.save(finished.state, engine.memory, history.records)
            show()
            if on_round is not None:
                on_round(finished)
    if history.state is not None:
        _with_weights(trainer, history.state)
    return history


def _until_exhausted(run: Iterator[Round], history: History) -> Iterator[Round]:
    """The rounds of a run, ending early when no site has any privacy budget left."""
    try:
        yield from run
    except PrivacyBudgetExhausted as error:
        history.stopped = str(error)


def _with_weights(trainer: SiteTrainer, state: ServerState) -> torch.nn.Module:
    load_weights(trainer.model, state.params)
    return trainer.model


def _check_run(sites: Sequence[Site], rounds: int) -> None:
    if not sites:
        raise ValueError("a run needs at least one site, got none")
    names = [site.name for site in sites]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ValueError(f"site names are unique within a cohort, but these occur twice: {doubled}")
    empty = [site.name for site in sites if len(site.train) == 0]
    if empty:
        raise ValueError(f"these sites have no patient to train on: {empty}; leave them out or give them patients")
    if rounds < 1:
        raise ValueError(f"rounds is a positive whole number, got {rounds}")
