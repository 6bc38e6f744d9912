"""The federated run: it knows no engine's inner life, no differential privacy and no plotting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fedlab.core.errors import PrivacyBudgetExhausted
from fedlab.core.seeds import generator
from fedlab.core.types import Round, ServerState, Site
from fedlab.core.weights import load_weights
from fedlab.privacy.base import Privacy
from fedlab.run.admission import Admission
from fedlab.run.checkpoint import Checkpoint
from fedlab.run.desk import Desk
from fedlab.run.history import History
from fedlab.run.local import Elsewhere, Engine, Local
from fedlab.run.site_task import SiteTask, enrol
from fedlab.run.trace import Trace
from fedlab.strategies.averaging import FedAvg, Strategy
from fedlab.topologies.workflows import Topology, star
from fedlab.training.trainer import SiteTrainer

__all__ = ["each_round", "federate"]


def each_round(
    trainer: SiteTrainer, sites: Sequence[Site | str], *, strategy: Strategy | None = None,
    privacy: Privacy | None = None, rounds: int = 10, topology: Topology = star,
    engine: Engine | Elsewhere | None = None, admission: Admission | None = None,
    seed: int = 0, state: ServerState | None = None,
) -> Iterator[Round]:
    """Runs round after round, yielding each as it ends: `next(run)`, look, `next(run)`.

    Args:
        trainer: trains locally, from the weights its model had when the trainer was made.
        sites: with unique names and at least one training patient each; or names of sites that the engine reaches
            elsewhere.
        strategy: `FedAvg()` by default.
        privacy: a technique or several joined by `+`; none by default.
        rounds: number of the last round, so a resumed run ends where the whole run would.
        topology: who exchanges weights with whom: `star`, `ring`, `Gossip(...)`, `Tree(...)`, `Buffered(...)`.
        engine: where sites work; this process by default. `Processes()`, or with the loop elsewhere too, `NVFlare()`.
        admission: rules by which a run goes on without sites that fail; by default the first failure ends it.
        seed: one seed gives bit-equal weights on one machine.
        state: where to go on from; the beginning by default.

    Raises:
        ValueError: no site, an empty site, two sites of one name, no round, or parts that don't work together.
        SiteError: a site failed.
        PrivacyBudgetExhausted: no site may take part any more.
        PrivacyError: a technique refused or failed; nothing was sent.
    """
    strategy = FedAvg() if strategy is None else strategy
    privacy = Privacy() if privacy is None else privacy
    engine = Local() if engine is None else engine
    sites = _placed(sites, engine)
    _check_run(sites, rounds)
    _check_server(strategy, privacy, topology, admission)
    task = SiteTask(trainer=trainer, privacy=privacy, seed=seed, strategy=strategy)
    if isinstance(engine, Elsewhere):
        return engine.rounds(task, sites, rounds=rounds, topology=topology, admission=admission, state=state)
    topology.check_run(sites=sites, strategy=strategy)
    strategy.check_run(trainer=trainer, sites=sites, privacy=privacy)
    privacy.check_run(trainer=trainer, sites=sites, strategy=strategy, rounds=rounds)
    if state is None:
        state = strategy.begin(trainer.initial())
        for site in sites:
            enrol(engine.memory.setdefault(site.name, {}))
    return _rounds(task, sites, rounds, topology, engine, admission, state)


def _rounds(task: SiteTask, sites: Sequence[Site], rounds: int, topology: Topology, engine: Engine,
            admission: Admission | None, state: ServerState) -> Iterator[Round]:
    for _ in range(state.round, rounds):
        started = time.perf_counter()
        cohort = task.strategy.select(sites, generator(task.seed, "select", state.round))
        desk = Desk(task, sites, cohort, engine, admission, state)
        state = desk.run(topology)
        yield Round(number=desk.number, state=state, cohort=tuple(desk.asked), sites=desk.seen, spent=desk.spent,
                    metrics=dict(topology.metrics(state)), seconds=time.perf_counter() - started, absent=desk.absent)


def federate(
    trainer: SiteTrainer, sites: Sequence[Site | str], *, strategy: Strategy | None = None,
    privacy: Privacy | None = None, rounds: int = 10, topology: Topology = star,
    engine: Engine | Elsewhere | None = None, admission: Admission | None = None,
    seed: int = 0, validate: Callable[[torch.nn.Module, int], dict[str, float]] | None = None,
    on_round: Callable[[Round], None] | Sequence[Callable[[Round], None]] = (),
    checkpoint: Path | str | None = None, trace: Path | str | None = None, progress: bool = True,
) -> History:
    """Runs all rounds and returns their history, with the final weights in `history.state` and in the trainer's model.

    Args:
        trainer, sites, strategy, privacy, rounds, topology, engine, admission, seed: as in `each_round`.
        validate: called with the global model and the round's number after each round; what it returns, such as
            the Dice of held-out patients, joins the round's metrics.
        on_round: called with each finished round; one or several, such as `[CsvTracker(path="rounds.csv"), show]`.
        checkpoint: a folder that the run is saved in after every round. If it holds the beginning of this same
            run, the run goes on from there, to the bit-equal result.
        trace: a file that says who took part when, line by line and chained by hashes; see `fedlab.run.trace`.
        progress: show a progress bar.

    Raises:
        ValueError, SiteError, PrivacyError: as in `each_round`. When the privacy budgets of all sites are used up
            the run ends early instead, and `history.stopped` says so.
        RunError: the checkpoint or the trace is of a run with other settings, or damaged.
    """
    strategy = FedAvg() if strategy is None else strategy
    privacy = Privacy() if privacy is None else privacy
    engine = Local() if engine is None else engine
    sites = _placed(sites, engine)
    _check_run(sites, rounds)
    history = History(rounds=rounds, privacy=repr(privacy))
    settings = {"trainer": repr(trainer), "strategy": repr(strategy), "privacy": repr(privacy), "seed": str(seed),
                "topology": repr(topology), "admission": repr(admission)}
    saved = None
    if checkpoint is not None:
        patients = "; ".join(f"{s.name}: {' '.join(p.id for p in s.train)}" for s in sites)
        saved = Checkpoint.open(checkpoint, start=trainer.initial(), describe={**settings, "sites": patients})
        history.state, engine.memory, records = saved.load() or (None, engine.memory, [])
        history.records.extend(records)
    run = each_round(trainer, sites, strategy=strategy, privacy=privacy, rounds=rounds, topology=topology,
                     engine=engine, admission=admission, seed=seed, state=history.state)
    traced = None if trace is None else Trace.open(
        trace, settings={**settings, "engine": repr(engine), "rounds": str(rounds)}, sites=sites, state=history.state,
        start=trainer.initial(), resumable=saved is not None)
    with history.progress(enabled=progress) as show:
        for finished in _until_exhausted(run, history):
            if validate is not None:
                metrics = validate(_with_weights(trainer, finished.state), finished.number)
                finished = replace(finished, metrics={**finished.metrics, **metrics})
            history.add(finished)
            if traced is not None:
                traced.add(finished)  # before the checkpoint: a round that is repeated shows, a missing one would not
            if saved is not None:
                saved.save(finished.state, engine.memory, history.records)
            show()
            for call in on_round if isinstance(on_round, Sequence) else (on_round,):
                call(finished)
    if traced is not None:
        traced.end(round=0 if history.state is None else history.state.round, stopped=history.stopped)
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


def _placed(sites: Sequence[Site | str], engine: Engine | Elsewhere) -> list[Site]:
    if isinstance(engine, Elsewhere):
        return engine.placed(sites)
    named = [site for site in sites if isinstance(site, str)]
    if named:
        raise ValueError(f"the sites {named} are only named; that will do for an engine that reaches them elsewhere, "
                         f"such as NVFlare(...), but {engine!r} needs them with their patients")
    return [site for site in sites if not isinstance(site, str)]


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


def _check_server(strategy: Strategy, privacy: Privacy, topology: Topology, admission: Admission | None) -> None:
    """Refuses what works at one server where no one server sees all updates, or where its proof would not hold."""
    if getattr(strategy, "one_server", False) and not topology.one_server:
        raise ValueError(f"{strategy!r} needs all updates of a round at one server, which {topology!r} doesn't "
                         "have; use topology=star")
    if (privacy.works_at_server or privacy.before or privacy.after) and not topology.one_server:
        raise ValueError(f"{privacy!r} works on the mean of all updates at one server, which {topology!r} doesn't "
                         "have; use topology=star, or a technique that protects each update at its site")
    if admission is not None and privacy.works_at_server and admission.min_sites > 1:
        raise ValueError(f"whether a round counts would show how many sites took part, which {privacy!r} does not "
                         "account for; use min_sites=1")
    if admission is not None and privacy.masked and admission.max_norm is not None:
        raise ValueError(f"{privacy!r} hides every update, so max_norm can't be checked; leave it out")
