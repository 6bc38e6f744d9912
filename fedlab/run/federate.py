"""The federated run: a loop around one round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedlab.core.errors import PrivacyBudgetExhausted
from fedlab.core.protocols import Elsewhere, Engine, Run, Strategy, Topology
from fedlab.core.types import Round, ServerState, Site
from fedlab.core.weights import load_weights
from fedlab.data.sites.persons import check_one_scan_each
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy, layers_at
from fedlab.run.admission import Admission
from fedlab.run.checkpoint import Checkpoint, full_disk_explained
from fedlab.run.history import History
from fedlab.run.local import Local
from fedlab.run.publishable import Validate, validated
from fedlab.run.recipe import parts_recipe, run_as_code, run_recipe
from fedlab.run.round import star
from fedlab.run.run_checks import check_moments, check_numbers, check_server
from fedlab.run.site_states import SiteStates
from fedlab.run.site_task import SiteTask
from fedlab.run.trace import Trace
from fedlab.strategies.averaging import FedAvg
from fedlab.training.trainer import SiteTrainer

__all__ = ["check_sites", "each_round", "federate", "loop", "make_run"]


def make_run(
    trainer: SiteTrainer, sites: Sequence[Site | str], *, strategy: Strategy | None = None,
    privacy: Privacy | None = None, aggregation: Aggregation | None = None, rounds: int = 10, topology: Topology = star,
    engine: Engine | Elsewhere | None = None, admission: Admission | None = None, seed: int = 0,
) -> Run:
    """The run that these parts make up, each of them checked and bound to the others; arguments as of `each_round`.

    The patients at the sites are not checked here; see `check_sites`.

    Raises:
        ValueError: no site, two sites of one name, no round, or parts that don't work together.
    """
    at = Local() if engine is None else engine
    privacy = Privacy() if privacy is None else privacy
    aggregation = Aggregation() if aggregation is None else aggregation
    if not isinstance(privacy, Privacy) or not isinstance(aggregation, Aggregation):
        raise ValueError(f"techniques are given as privacy=, an aggregation such as SecureAggregation(threshold=...) "
                         f"as aggregation=; got privacy={privacy!r}, aggregation={aggregation!r}")
    run = Run(trainer=trainer, sites=_placed(sites, at), strategy=FedAvg() if strategy is None else strategy,
              privacy=privacy, aggregation=aggregation, topology=topology, engine=at, admission=admission,
              rounds=rounds, seed=seed)
    check_numbers(run)
    aggregation = aggregation.bind(run)
    run = replace(run, strategy=run.strategy.bind(run), aggregation=aggregation)
    check_moments(run)
    run.topology.check(run)
    check_server(run)
    run.privacy.check(run)
    run.trainer.check(run)
    return replace(run, task=SiteTask(trainer=trainer, privacy=privacy, seed=seed, strategy=run.strategy,
                                      aggregation=aggregation))


def check_sites(run: Run, sites: Sequence[Site]) -> None:
    """Checks the patients of sites.

    Raises:
        ValueError: a site has no patients, or a technique cannot work with them; under a guarantee per patient a
            person has several scans.
    """
    empty = [site.name for site in sites if len(site.train) == 0]
    if empty:
        raise ValueError(f"these sites have no patient to train on: {empty}; leave them out or give them patients")
    for site in sites:
        if any("patient" in layer.units for layer in layers_at(run.privacy.layers, site.name)):
            check_one_scan_each(site)
        run.privacy.check_site(site, run)


def each_round(
    trainer: SiteTrainer, sites: Sequence[Site | str], *, strategy: Strategy | None = None,
    privacy: Privacy | None = None, aggregation: Aggregation | None = None, rounds: int = 10, topology: Topology = star,
    engine: Engine | Elsewhere | None = None, admission: Admission | None = None, seed: int = 0,
    state: ServerState | None = None, site_states: SiteStates | None = None,
) -> Iterator[Round]:
    """Runs round after round, yielding each as it ends: `next(run)`, look, `next(run)`.

    Args:
        trainer: trains locally, from the weights its model had when the trainer was made.
        sites: with unique names and at least one training patient each; or names, for an engine that reaches the
            sites elsewhere.
        strategy: `FedAvg()` by default.
        privacy: a technique or several joined by `+`; none by default.
        aggregation: `SecureAggregation(threshold=...)` for sums that hide single updates; in the open by default.
        rounds: number of the last round, so a resumed run ends where the whole run would.
        topology: who exchanges weights with whom: `star`, `ring`, `Gossip(...)`, `Tree(...)`, `Buffered(...)`.
        engine: where sites work: by default `Local()`, this process; `Processes()`; `NVFlare()`, which also runs the
            loop elsewhere.
        admission: rules by which a run continues without sites that fail; by default the first failure ends it.
        seed: one seed gives bit-equal weights on one machine.
        state, site_states: where to go on from, such as `finished.state` and `finished.site_states` of a round; the
            beginning by default.

    Raises:
        ValueError: no site, an empty site, two sites of one name, no round, or parts that don't work together.
        SiteError: a site failed.
        PrivacyBudgetExhausted: no site may take part any more.
        PrivacyError: a technique refused or failed; nothing was sent.

    Example:
        >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
        >>> trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16))
        >>> run = fl.each_round(trainer, sites, rounds=2)
        >>> next(run)
        <Round 0: updates of 2 of 2 sites>
    """
    run = make_run(trainer, sites, strategy=strategy, privacy=privacy, aggregation=aggregation, rounds=rounds,
                   topology=topology, engine=engine, admission=admission, seed=seed)
    return _rounds(run, state, site_states)


def _rounds(run: Run, state: ServerState | None, site_states: SiteStates | None) -> Iterator[Round]:
    if isinstance(run.engine, Elsewhere):
        return run.engine.rounds(run, state)
    check_sites(run, run.sites)
    if site_states is None:
        site_states = SiteStates(run.names if state is None else ())
    return loop(replace(run, site_states=site_states), state)


def loop(run: Run, state: ServerState | None) -> Iterator[Round]:
    """The rounds of a run that was checked, from a state on or from the beginning.

    Raises:
        ValueError: the strategy does not count the rounds.
    """
    if state is None:
        state = replace(run.strategy.begin(run.trainer.initial()), buffers=run.trainer.initial_buffers())
    void = 0
    while state.round < run.rounds and void < getattr(run.admission, "max_void", math.inf):
        finished = run.topology(run, state)
        if finished.state.round != state.round + 1:
            raise ValueError(f"the state after round {state.round} is that of round {finished.state.round}, expected "
                             f"{state.round + 1}; in step() return super().step(state, mean), or count the round")
        # Noise at the server hides void rounds, so nothing may depend on them.
        void = void + 1 if finished.void is not None and not run.privacy.works_at_server else 0
        state = finished.state
        yield finished


def federate(
    trainer: SiteTrainer, sites: Sequence[Site | str], *, strategy: Strategy | None = None,
    privacy: Privacy | None = None, aggregation: Aggregation | None = None, rounds: int = 10, topology: Topology = star,
    engine: Engine | Elsewhere | None = None, admission: Admission | None = None, seed: int = 0,
    validate: Validate | None = None,
    on_round: Callable[[Round], None] | Sequence[Callable[[Round], None]] = (),
    checkpoint: Path | str | None = None, trace: Path | str | None = None, progress: bool = True,
) -> History:
    """Runs all rounds and returns their history, with the final weights in `history.state` and in the trainer's model.

    Args:
        trainer, sites, strategy, privacy, aggregation, rounds, topology, engine, admission, seed: as in `each_round`.
        validate: called with the global model and the round's number after each round; the numbers that it returns,
            such as the Dice of held-out patients, join the round's metrics. See `OnPublicPatients`.
        on_round: called with each finished round; one or several, such as `[CsvTracker(path="rounds.csv"), show]`.
        checkpoint: a folder in which the run is saved after every round. If it holds the beginning of this same run,
            by content, the run continues from there, to the bit-equal result.
        trace: a file of the sites that took part in each round, chained by hashes; see `fedlab.run.trace`.
        progress: show a progress bar.

    Raises:
        ValueError, SiteError, PrivacyError: as in `each_round`. When the privacy budgets of all sites are used up,
            the run ends early instead, and `history.stopped` says so.
        RunError: the checkpoint or the trace is of a run with other settings, damaged, or cannot be saved.

    Example:
        >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
        >>> trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16))
        >>> fl.federate(trainer, sites, strategy=fl.FedAvg(), rounds=2, seed=0)
        <History: 2 of 2 rounds, loss ...; no formal guarantee>
    """
    run = make_run(trainer, sites, strategy=strategy, privacy=privacy, aggregation=aggregation, rounds=rounds,
                   topology=topology, engine=engine, admission=admission, seed=seed)
    history = History.of(run)
    identity = run_recipe(run) if checkpoint is not None or trace is not None else {}
    saved, site_states = None, None
    if checkpoint is not None:
        saved = Checkpoint.open(checkpoint, recipe=identity, start=trainer.initial_model())
        identity = saved.recipe
        history.state, site_states, records = saved.load() or (None, saved.new_states(run.names), [])
        history.site_states = site_states
        history.records.extend(records)
        run = replace(run, task=replace(run.task, identity=identity))
    rounds_left = _rounds(run, history.state, site_states)
    traced = None if trace is None else Trace.open(
        trace, recipe=identity, settings=run_as_code(run), sites=run.sites, state=history.state,
        start=trainer.initial_model(), resumable=saved is not None)
    try:
        with full_disk_explained(), history.progress(enabled=progress, sites=run.names) as show:
            for finished in _until_exhausted(rounds_left, history):
                if validate is not None:
                    finished = validated(finished, validate, _with_weights(trainer, finished.state))
                history.add(finished)
                if traced is not None:
                    traced.add(finished)  # first: a repeated round is visible, a missing one would not be
                if saved is not None:
                    saved.save(finished.state, finished.site_states, history.records)
                show()
                for call in on_round if isinstance(on_round, Sequence) else (on_round,):
                    call(finished)
    finally:
        if saved is not None:
            saved.leave(parts_recipe(run))
    if traced is not None:
        traced.end(round=0 if history.state is None else history.state.round, stopped=history.stopped)
    if history.state is not None:
        _with_weights(trainer, history.state)
    return history


def _until_exhausted(run: Iterator[Round], history: History) -> Iterator[Round]:
    """The rounds of a run, ending early when no site has any privacy budget left, or too many rounds are void."""
    try:
        yield from run
        if history.records and history.state is not None and history.state.round < history.rounds:
            history.stopped = f"too many rounds in succession were void, the last one: {history.records[-1]['void']}"
    except PrivacyBudgetExhausted as error:
        history.stopped = str(error)


def _with_weights(trainer: SiteTrainer, state: ServerState) -> torch.nn.Module:
    load_weights(trainer.model, trainer.local(state))
    return trainer.model


def _placed(sites: Sequence[Site | str], engine: Any) -> tuple[Site, ...]:
    """The sites; one that is only named has its patients elsewhere."""
    named = [site for site in sites if isinstance(site, str)]
    if named and not isinstance(engine, Elsewhere):
        raise ValueError(f"the sites {named} are given by name only, for an engine that reaches them elsewhere, such "
                         f"as NVFlare(...), but {engine!r} needs them with their patients")
    return tuple(Site(name=site, train=()) if isinstance(site, str) else site for site in sites)
