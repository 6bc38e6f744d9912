"""What an attacker still learns and what protection costs, of any techniques, in one call.

Read `attacked` for the attacks and `report` for what is shown.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from tqdm.auto import tqdm

from fedlab.core.errors import FedlabError
from fedlab.core.files import write_json
from fedlab.core.protocols import Strategy
from fedlab.core.settings import check_whole
from fedlab.core.types import ServerState, Site, Spent
from fedlab.core.weights import weights_sha256
from fedlab.core.workers import Workers, script_not_imported, tell
from fedlab.data.store import load_sites
from fedlab.evidence.arms import Arm, messages_until_done
from fedlab.evidence.attacked import (
    Attack,
    Canaries,
    Case,
    ModelMembership,
    NotApplicable,
    SentMembership,
    SentReconstruction,
)
from fedlab.evidence.comparison import compare_arms
from fedlab.evidence.differences import difference, share_kept
from fedlab.evidence.report import Assessed, Evidence
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy
from fedlab.run.federate import check_sites, make_run
from fedlab.run.history import History
from fedlab.run.publishable import published
from fedlab.run.recipe import patients_sha256, sha256_of
from fedlab.strategies.averaging import FedAvg
from fedlab.training.trainer import SiteTrainer

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["assess", "default_attacks"]

Technique = Privacy | Aggregation | Arm


def default_attacks() -> dict[str, Attack]:
    """The attacks of `assess`, by name."""
    return {"canaries": Canaries(), "reconstruction": SentReconstruction(),
            "membership, by the update": SentMembership(), "membership, by the model": ModelMembership()}


def assess(techniques: Mapping[str, Technique], sites: Sequence[Site] | Callable[[int], Sequence[Site]],
           trainer: SiteTrainer, *, rounds: int, seeds: int | Sequence[int] = 3, strategy: Strategy | None = None,
           attacks: Mapping[str, Attack] | None = None, public: bool = False, out: Path | str | None = None,
           workers: int | None = None, progress: bool = True) -> Evidence:
    """Trains with every technique, attacks what each reveals, and sets utility beside guarantee and leakage.

    Each technique is trained once per seed, on the same sites from the same weights, in worker processes, and scored on
    the held-out patients. "none", the training without protection, and "start", the untouched model, are added. Then
    the attacks are tried on each technique and seed. What a technique proves stands beside what attacks reach: an
    attack that fails proves nothing, a proven ε does.

    Args:
        techniques: by name: a privacy technique, an aggregation such as `SecureAggregation`, or a whole
            `fedlab.evidence.Arm` of a federation with another trainer, strategy or number of rounds.
        sites: with held-out patients; or a function of the seed that makes them, so that seeds differ in patients too.
            With the same patients in every seed a patient counts once, with the mean of the seeds.
        trainer: of every technique; its model's weights are the start.
        rounds: of every training.
        seeds: number of trainings of each technique, with the seeds 0, 1, ...; or the seeds.
        strategy: of every technique; `FedAvg(weights="uniform")` by default, which noise at the server requires.
        attacks: by name, see `fedlab.evidence.Attack`; `default_attacks()` by default.
        public: whether the patients are public, such as generated ones. Only then are the numbers shown that a
            guarantee does not cover: seconds, and bytes where there is noise at the server.
        out: a folder in which trainings and attacks are kept, so that an assessment that was interrupted continues when
            it is called again; a temporary one by default.
        workers: processes, one core each; by default all cores.
        progress: show progress bars.

    Raises:
        ValueError: no technique, a name that is taken, a technique that cannot work with the rest, or settings out of
            range; before anything is trained.
        DataError: no held-out patient.
        FedlabError: the first failure of a training.

    Example:
        >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
        >>> trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16))
        >>> techniques = {"top 10 %": fl.privacy.TopK(keep=0.1)}
        >>> evidence = fl.assess(techniques, sites, trainer, rounds=1, seeds=1, attacks={}, workers=1)
    """
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(dict.fromkeys(seeds))
    check_whole(rounds=rounds, seeds=len(chosen))
    arms = _arms(techniques, trainer, rounds, FedAvg(weights="uniform") if strategy is None else strategy)
    first = list(sites(chosen[0]) if callable(sites) else sites)
    for name, arm in arms.items():
        _check(name, arm, first)
    attacks = default_attacks() if attacks is None else dict(attacks)
    with _folder(out) as folder:
        compared = compare_arms(sites, arms, seeds=chosen, out=folder, workers=workers, progress=progress)
        jobs = [_Try(attack=attack, name=name, arm=arm, seed=seed, prepared=folder / f"seed-{seed}" / "prepared",
                     file=folder / f"seed-{seed}" / "attacks" / f"{quote(f'{name}, {called}', safe=' ,')}.json",
                     state=compared.histories[seed, name].state)
                for name, arm in arms.items() if arm.rounds for called, attack in attacks.items()
                for seed in (chosen[:1] if getattr(attack, "once", False) else chosen)]
        tried = _all(jobs, workers, progress)
    results = {(job.name, job.seed, repr(job.attack)): one for job, one in zip(jobs, tried, strict=True)}
    found = {name: _assessed(name, arm, compared.paired_scores, [compared.histories[seed, name] for seed in chosen],
                             {called: [results[name, seed, repr(attack)] for seed in chosen
                                       if (name, seed, repr(attack)) in results]
                              for called, attack in attacks.items() if arm.rounds}, attacks, public)
             for name, arm in arms.items()}
    settings = {"sites": len(first), "patients trained on": sum(len(site.train) for site in first),
                "patients held out": sum(len(site.val) for site in first), "rounds": rounds,
                "seeds": ", ".join(map(str, chosen)), "patients": "new ones in every seed" if callable(sites) else
                "the same in every seed; each counts once, with the mean of the seeds",
                "trainer": repr(trainer), "start weights, SHA-256": weights_sha256(trainer.initial())[:16],
                **{name: version(of) for name, of in (("fedlab", "fedlab-workbench"), ("torch", "torch"))}}
    return Evidence(techniques=found, scores=compared.scores, settings=settings)


def _arms(techniques: Mapping[str, Technique], trainer: SiteTrainer, rounds: int, strategy: Strategy) -> dict[str, Arm]:
    if not techniques:
        raise ValueError("there is no technique to assess; give one or more by name, such as {'mine': MyTechnique()}")
    if "start" in techniques:
        raise ValueError("'start' is the untouched model; choose another name for the technique")
    arms = {"start": Arm(trainer=trainer, rounds=0), "none": Arm(trainer=trainer, rounds=rounds, strategy=strategy)}
    for name, technique in techniques.items():
        match technique:
            case Arm():
                arm = technique
            case Privacy():
                arm = Arm(trainer=trainer, rounds=rounds, strategy=strategy, privacy=technique)
            case Aggregation():
                arm = Arm(trainer=trainer, rounds=rounds, strategy=strategy, aggregation=technique)
            case _:
                raise ValueError(f"the technique {name!r} is {technique!r}, expected a fedlab.Privacy, an aggregation "
                                 "or a fedlab.evidence.Arm")
        if arm.data != "sites" or not arm.rounds:
            raise ValueError(f"the technique {name!r} trains no federation: {arm!r}; compare such arms with "
                             "compare_arms")
        arms[name] = arm
    bare = arms["none"]
    if (bare.privacy is not None and type(bare.privacy) is not Privacy) or bare.aggregation is not None:
        raise ValueError(f"'none' is the training without protection, but is given {bare!r}; choose another name")
    return arms


def _check(name: str, arm: Arm, sites: Sequence[Site]) -> None:
    """Before hours of training: can the technique work with the trainer, the strategy and the patients?"""
    if not arm.rounds:
        return
    if arm.trainer.momentum == "average":
        raise ValueError(f"the technique {name!r} cannot be assessed: attacks read the weights of an update and not "
                         "the moments that its sites average too, so they would show less than an attacker can learn; "
                         "say SiteTrainer(momentum='keep', ...)")
    try:
        check_sites(make_run(arm.trainer, sites, strategy=arm.strategy, privacy=arm.privacy, topology=arm.topology,
                             aggregation=arm.aggregation, rounds=arm.rounds, engine=arm.engine,
                             admission=arm.admission), sites)
    except (FedlabError, ValueError) as error:
        raise ValueError(f"the technique {name!r} cannot be assessed: {error}") from error


@contextmanager
def _folder(out: Path | str | None) -> Iterator[Path]:
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


@dataclass(frozen=True, kw_only=True)
class _Try:
    """An attack on a technique with a seed, for a worker process."""

    attack: Attack
    name: str
    arm: Arm
    seed: int
    prepared: Path
    file: Path
    state: ServerState | None


def _all(jobs: Sequence[_Try], workers: int | None, progress: bool) -> list[dict[str, Any]]:
    import cloudpickle

    with script_not_imported(), Workers(workers) as pool, tqdm(
            total=len(jobs), desc="attacks", unit="try", disable=not progress) as bar:
        futures = [pool.submit(_try, cloudpickle.dumps(job)) for job in jobs]
        for text in messages_until_done(futures, pool):
            bar.set_postfix_str(text, refresh=False)
            bar.update()
        return [future.result() for future in futures]


def _try(packed: bytes) -> dict[str, Any]:
    """In a worker: what an attack returns, or why it does not fit; kept in its file."""
    import cloudpickle

    job: _Try = cloudpickle.loads(packed)  # from the process that started this one, never from a file
    state, sites = job.state, load_sites(job.prepared)
    if state is None:
        return {"not_tried": "no round was finished"}
    note = {"attack": repr(job.attack), "technique": repr(job.arm), "weights": weights_sha256(state.model),
            "patients": sha256_of([patients_sha256([*site.train, *site.val]) for site in sites])}
    with suppress(OSError, ValueError, KeyError):
        kept = json.loads(job.file.read_text(encoding="utf-8"))
        if kept["note"] == note:
            tell(f"{job.name}, kept")
            return dict(kept["result"])
    result: dict[str, Any]
    try:
        result = {"tried": dict(job.attack.try_on(Case(arm=job.arm, sites=sites, seed=job.seed, state=state)))}
    except NotApplicable as reason:
        result = {"not_tried": str(reason)}
    job.file.parent.mkdir(parents=True, exist_ok=True)
    write_json(job.file, {"note": note, "result": result})
    tell(f"{job.name}, {job.attack!r}")
    return result


def _assessed(name: str, arm: Arm, scores: pd.DataFrame, histories: Sequence[History],
              results: Mapping[str, Sequence[Mapping[str, Any]]], attacks: Mapping[str, Attack],
              public: bool) -> Assessed:
    import pandas as pd

    own = scores[scores["arm"] == name]
    nothing = own.assign(arm="nothing", dice=0.0)
    technique = arm.privacy if arm.aggregation is None else arm.aggregation if arm.privacy is None else (
        arm.privacy, arm.aggregation)
    protected = name not in ("start", "none")
    worst = max(histories, key=_epsilon)
    records = [record if public else published(record) for history in histories for record in history.records]
    stopped = next((history.published().stopped for history in histories if history.stopped), None)
    return Assessed(
        technique="untouched" if name == "start" else repr(technique or Privacy()),
        dice=difference(pd.concat([own, nothing]), name, "nothing"),
        to_none=None if name == "none" else difference(scores, name, "none"),
        to_start=None if name == "start" else difference(scores, name, "start"),
        kept=share_kept(scores, name, full="none", start="start") if protected else None,
        spent=_spent(worst), guarantee=worst.guarantee(),
        findings={called: attacks[called].found(tried) for called, of in results.items()
                  if (tried := [one["tried"] for one in of if "tried" in one])},
        not_tried={called: of[0]["not_tried"] for called, of in results.items()
                   if all("not_tried" in one for one in of)},
        megabytes=_mean(numbers["bytes"] / 1e6 for record in records for numbers in record["sites"].values()),
        seconds=_mean(record.get("seconds") for record in records) * arm.rounds, stopped=stopped or "")


def _epsilon(history: History) -> float:
    return max((one.epsilon for one in _spent(history)), default=0.0)


def _spent(history: History) -> list[Spent]:
    """The largest ε that may be published of each unit."""
    found = [Spent(**entry) for record in map(published, history.records) for entries in record["spent"].values()
             for entry in entries]
    return list({one.unit: one for one in sorted(found, key=lambda one: one.epsilon)}.values())


def _mean(values: Iterable[float | None]) -> float:
    """NaN of no value; None is a number that may not be published."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
