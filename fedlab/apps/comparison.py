"""The comparison behind `fedlab demo` and `run`: one start, trained federated, on pooled data and at each site alone.

`run_job` prepares the data, trains the arms side by side in worker processes and evaluates them on held-out
patients; `fedlab.apps.comparison_results` writes tables, figures and the report.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from tqdm.auto import tqdm

from fedlab.apps.comparison_data import Folder, Phantoms
from fedlab.core.errors import DataError, RunError
from fedlab.core.files import locked, replacing, write_json, write_whole
from fedlab.core.settings import check_choice, check_whole
from fedlab.core.types import Patient, ServerState, Site
from fedlab.core.weights import load_weights
from fedlab.core.workers import Workers
from fedlab.data.readers.folders import check_sites, find_patients, read_patient
from fedlab.data.sites.partition import Partition
from fedlab.data.store import load_sites, save_sites
from fedlab.evidence.arms import Arm, main_arm, messages_until_done, models_of, segment, train_models
from fedlab.evidence.contributions import Contributions, KeepUpdates, dice_on, site_contributions
from fedlab.privacy.accounting.ledger import noise_multiplier_for
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.run.history import History
from fedlab.run.local import Local
from fedlab.run.trackers import CsvTracker
from fedlab.training.defaults import augmentation
from fedlab.training.networks import save_model, segresnet
from fedlab.training.public_model import public_model
from fedlab.training.schedules import CosineDecay
from fedlab.training.trainer import SiteTrainer
from fedlab.view.colours import arm_colours

__all__ = ["Job", "Outcome", "arms_of", "data_changed", "open_job", "read_job", "remove_working_files",
           "run_job", "sole_use"]

_FORMAT = "fedlab-job-3"
#: In the run directory: the state of the files that the run has read.
_DATA_STATE = "data_state.txt"
#: In the run directory: the user's file of arms.
_ARMS_FILE = "arms.py"
#: Share of a site's patients in a step of the private arm. At equal ε a larger one takes longer and gains little.
_SAMPLE_RATE = 0.25
_SOURCES = {"phantoms": Phantoms, "folder": Folder}


@dataclass(frozen=True, kw_only=True)
class Job:
    """The settings of a comparison: data, network and training. The defaults are the demo's.

    Args:
        rounds: of the federated arm, whose sites average their optimisers' moments too; the other arms take as many
            gradient steps.
        steps: gradient steps of a site per round.
        batch_size: crops per step.
        lr: highest learning rate of federated arms, reached after an eighth of the rounds and falling to 0 by
            `CosineDecay`; chosen, like the next two, on the demo's seeds 10 and 11, one run each.
        lr_pooled: of the pooled arm.
        lr_local: of each site alone.
        start: the weights that all arms begin with: a public model, which then is an arm too, or "random" ones, as in
            Li et al. 2019.
        filters: width of the network if it starts at random; 32 is the paper's.
        crop: voxels of a training crop.
        real: folder of real scans on which the federated model is evaluated; not trained on.
        watch_every: rounds between two measurements of the Dice of held-out patients.
        keep: whether prepared data and checkpoints are kept after the run is complete.
        epsilon: adds the arm "private": federated under patient-level DP-SGD that spends at most this ε at each site.
        delta, clip: of that arm; see `fedlab.DPSGD`.
        contributions: whether to store all updates and compute from them what each site contributed.
        arms: whether the run directory has a file arms.py that defines the arms, instead of the usual three; its
            function `arms(seed)` returns them by name (`fedlab.evidence.Arm`).

    Raises:
        ValueError: a count below 1, or an unknown start.
    """

    source: Phantoms | Folder
    rounds: int = 32
    steps: int = 2
    batch_size: int = 2
    lr: float = 4e-3
    lr_pooled: float = 2e-3
    lr_local: float = 1e-3
    start: Literal["collection", "broad", "random"] = "collection"
    filters: int = 8
    crop: tuple[int, int, int] = (32, 32, 32)
    seed: int = 0
    real: str | None = None
    watch_every: int = 8
    keep: bool = False
    epsilon: float | None = None
    delta: float = 1e-3
    clip: float = 1.0
    contributions: bool = False
    arms: bool = False

    def __post_init__(self) -> None:
        check_whole(rounds=self.rounds, steps=self.steps, batch_size=self.batch_size, watch_every=self.watch_every)
        check_choice(("collection", "broad", "random"), start=self.start)
        if self.epsilon is not None:
            self.technique()  # refuses settings that give no guarantee, before any work

    def trainer(self, lr: float | None = None) -> SiteTrainer:
        """The trainer of every arm: the same start, schedule and limit of gradients in all, each at its own rate."""
        model = (segresnet(filters=self.filters, seed=self.seed, mirror=True) if self.start == "random" else
                 public_model(self.start))
        # A few hundred steps are too few to learn upside-down heads, so only left and right are flipped. Half of the
        # crops are drawn anywhere: with fewer healthy voxels the network finds tumour everywhere.
        return SiteTrainer(model=model, steps=self.steps, batch_size=self.batch_size, crop=self.crop, clip_norm=1.0,
                           lr=CosineDecay(start=lr or self.lr, rounds=self.rounds, warmup=self.rounds // 8),
                           tumour_share=0.5, augment=augmentation(flips=(0,)))

    def technique(self) -> DPSGD:
        """The technique of the arm "private"; its noise is set for ε over all steps of the run."""
        noise = noise_multiplier_for(target_epsilon=self.epsilon or 0.0, delta=self.delta, sample_rate=_SAMPLE_RATE,
                                     steps=self.rounds * self.steps)
        return DPSGD(clip=self.clip, noise_multiplier=noise, delta=self.delta, sample_rate=_SAMPLE_RATE,
                     max_epsilon=self.epsilon)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a job.

    Attributes:
        arms: by name.
        main: the arm that all others are compared with, and whose model is saved.
        histories: by model: "federated", "pooled", "local site-01", ...
        scores: one row per model, patient and region, on the held-out patients of all sites.
        predictions: label maps of the first held-out patient of each site, by model and patient id.
        saved: whether the main arm's model is in model.safetensors.
        train: scores of the main arm's model on its own training patients, if those are real.
        real: scores of the main arm's model on the folder of real scans, if there is one.
        real_cases: these patients with the main arm's label maps.
        seconds: wall time of data, train, evaluate and total.
    """

    job: Job
    arms: dict[str, Arm]
    main: str
    sites: list[Site]
    partition: Partition
    histories: dict[str, History]
    scores: pd.DataFrame
    predictions: dict[str, dict[str, torch.Tensor]]
    saved: bool
    train: pd.DataFrame | None
    real: pd.DataFrame | None
    real_cases: list[tuple[Patient, torch.Tensor]]
    contributions: Contributions | None
    seconds: dict[str, float]


def open_job(job: Job, out: Path, *, arms: Path | None = None) -> None:
    """Makes the run directory `out` and writes the job into it, with a copy of the file of its arms.

    Raises:
        RunError: the directory exists, or the file defines no arms.
        DataError: the job names an unusable folder or table, judged by names, headers and label maps; nothing is made.
    """
    _check_inputs(job)
    if arms is not None:
        _read_arms(arms, job.seed)
    try:
        out.mkdir(parents=True)
    except FileExistsError as error:
        raise RunError(f"{out} exists and is left as it is; choose another --out, or continue it with "
                       f"'fedlab resume {out}'") from error
    kind = next(name for name, source in _SOURCES.items() if isinstance(job.source, source))
    if arms is not None:
        shutil.copyfile(arms, out / _ARMS_FILE)
    write_json(out / "job.json", {"format": _FORMAT, "source_kind": kind, **asdict(job)})


def _check_inputs(job: Job) -> None:
    """Detects mistyped paths and ambiguous labels before anything is written."""
    if isinstance(job.source, Folder):
        check_sites(job.source.data, job.source.table, **job.source.reading)
    if job.real is not None and all(files.label is None for files in find_patients(job.real).values()):
        raise DataError(f"no patient in {job.real} has an expert's label to compare with; 'fedlab evaluate' segments "
                        "scans without labels")


def read_job(out: Path) -> Job:
    """The job of a run directory.

    Raises:
        RunError: the directory has no job, or a damaged one.
    """
    try:
        note = json.loads((out / "job.json").read_text(encoding="utf-8"))
        if note.pop("format") != _FORMAT:
            raise ValueError("written by another version of fedlab")
        source = _SOURCES[note.pop("source_kind")]
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in note.pop("source").items()}
        note["crop"] = tuple(note["crop"])
        return Job(source=source(**fields), **note)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{out} is no run that can be continued ({type(error).__name__}: {error}); expected the "
                       "folder of an interrupted 'fedlab demo' or 'fedlab run'") from error


def sole_use(out: Path) -> AbstractContextManager[None]:
    """Locks a run directory for this process.

    Raises:
        RunError: another process works there.
    """
    return locked(out / "run.lock", RunError(f"another process works in {out} right now; wait until it ends, or stop "
                                             "it first"))


def run_job(job: Job, out: Path) -> Outcome:
    """Runs `job` in the directory that `open_job` made, continuing from the state found there.

    Raises:
        FedlabError: data, sites or privacy failed; the run can be resumed after the cause is removed.
    """
    try:
        with Workers() as workers:
            return _run(job, out, workers)
    except BrokenProcessPool as error:
        raise RunError(f"a worker process was killed, perhaps for lack of memory; 'fedlab resume {out}' continues from "
                       "the last finished round") from error


def data_changed(job: Job, out: Path) -> bool:
    """Whether scans, label maps or the table were written or replaced since the run in `out` read them.

    Raises:
        DataError: the folder of scans cannot be read.
    """
    noted = out / _DATA_STATE
    return noted.is_file() and noted.read_text(encoding="ascii") != job.source.state()


def arms_of(job: Job, out: Path) -> dict[str, Arm]:
    """The arms of a job, by name; those of its file if it has one.

    Raises:
        RunError: the file cannot be run, or returns something else than arms.
    """
    if job.arms:
        return _read_arms(out / _ARMS_FILE, job.seed)
    trainer = job.trainer()
    engine = KeepUpdates(engine=Local(), folder=out / "arms" / "updates") if job.contributions else None
    private = {} if job.epsilon is None else {
        "private": Arm(trainer=replace(trainer, clip_norm=None), rounds=job.rounds, privacy=job.technique())}
    return {**({} if job.start == "random" else {"public": Arm(trainer=trainer, rounds=0)}), **private,
            "federated": Arm(trainer=replace(trainer, momentum="average"), rounds=job.rounds, engine=engine),
            "pooled": Arm(trainer=job.trainer(job.lr_pooled), rounds=job.rounds, data="pooled"),
            "local": Arm(trainer=job.trainer(job.lr_local), rounds=job.rounds, data="each")}


def _read_arms(path: Path, seed: int) -> dict[str, Arm]:
    try:
        arms = dict(runpy.run_path(str(path))["arms"](seed))
    except Exception as error:
        raise RunError(f"{path} defines no arms ({type(error).__name__}: {error}); expected a function arms(seed) that "
                       "returns a dictionary of fedlab.evidence.Arm by name") from error
    if wrong := [name for name, arm in arms.items() if not isinstance(arm, Arm)]:
        raise RunError(f"{path}: the arm {wrong[0]!r} is {arms[wrong[0]]!r}, expected a fedlab.evidence.Arm")
    main_arm(arms)
    arm_colours(arms)  # before a training of hours whose report could not tell them apart
    return arms


def _run(job: Job, out: Path, workers: Workers) -> Outcome:
    started = time.perf_counter()
    prepared = out / "prepared"
    warm = workers.submit(os.getpid)  # starts the workers, which import MONAI while data is generated
    if not (prepared / "complete").is_file() or data_changed(job, out):
        shutil.rmtree(prepared, ignore_errors=True)
        state = job.source.state()
        save_sites(job.source.prepare(seed=job.seed, workers=workers), prepared)
        if state:
            write_whole(out / _DATA_STATE, state.encode("ascii"))
        (prepared / "complete").touch()
    sites = load_sites(prepared)
    if not any(len(site.val) for site in sites):
        raise DataError("no site holds out a patient, so there is nothing to compare on; at least one site needs two "
                        "or more patients")
    partition = _save_partition(job, sites, out / "partition.json")
    warm.result()
    data_done = time.perf_counter()
    arms = arms_of(job, out)
    main = main_arm(arms)
    recorded = {"trace": out / "trace.jsonl", "on_round": [CsvTracker(path=out / "rounds.csv")]}
    models = [model for name, arm in arms.items() for model in models_of(
        name, arm, sites, prepared=prepared, folder=out / "arms", seed=job.seed,
        watch=0 if arm.data == "each" else job.watch_every, **(recorded if name == main else {}))]
    trained = dict(zip((model.name for model in models), train_models(models, workers), strict=True))
    train_done = time.perf_counter()
    results = _results_of(job, trained[main].history, out, workers)
    done = time.perf_counter()
    seconds = {"data": data_done - started, "train": train_done - data_done, "evaluate": done - train_done,
               "total": done - started}
    return Outcome(job=job, arms=arms, main=main, sites=sites, partition=partition, seconds=seconds, **results,
                   histories={name: one.history for name, one in trained.items()},
                   scores=pd.concat([one.scores for one in trained.values()], ignore_index=True),
                   predictions={name: dict(one.labels) for name, one in trained.items()})


def _save_partition(job: Job, sites: Sequence[Site], path: Path) -> Partition:
    """Writes the patients of each site into the run directory; a resumed run must have the same ones as before."""
    partition = replace(Partition.of(sites), how=f"{job.source!r}, seed={job.seed}")
    if not path.is_file():
        with replacing(path) as scratch:
            scratch.unlink(missing_ok=True)
            partition.save(scratch)
    elif (known := Partition.load(path)).id != partition.id:
        raise RunError(f"{path} says that this run began with other patients (partition {known.id}, now "
                       f"{partition.id}): the scans or their table were changed; begin a new run")
    return partition


def remove_working_files(out: Path) -> None:
    """Removes the prepared data, the checkpoints and the lock of a finished run."""
    (out / "run.lock").unlink(missing_ok=True)
    for name in ("prepared", "arms"):
        shutil.rmtree(out / name, ignore_errors=True)


def _save_model(job: Job, state: ServerState | None, out: Path) -> bool:
    """In a worker, which has MONAI loaded: saves the main arm's model, if it is one of `segresnet`."""
    model, path = _model(job, state, out), out / "model.safetensors"
    if isinstance(getattr(model, "settings", None), dict):
        path.unlink(missing_ok=True)
        save_model(path, model, spacing_mm=job.source.spacing_mm)
    return path.exists()


def _results_of(job: Job, history: History, out: Path, workers: Workers) -> dict[str, Any]:
    """What is found of the federated model alone, by the attributes of an `Outcome`; saves the model."""
    waiting: dict[str, Future[Any]] = {"saved": workers.submit(_save_model, job, history.state, out)}
    total = 0
    if job.contributions:
        waiting["contributions"] = workers.submit(_contributions, job, history, out)
    if isinstance(job.source, Folder):  # shows whether the model has learned anything at all
        waiting["train"] = workers.submit(_segment_training_patients, job, history.state, out)
        total += sum(len(site.train) for site in load_sites(out / "prepared"))
    if job.real is not None:
        waiting["real"] = workers.submit(_segment_real, job, history.state, out)
        total += len(find_patients(job.real))
    with tqdm(total=total, desc="evaluating", unit="patient", disable=not total) as bar:
        for _ in messages_until_done(waiting.values(), workers):
            bar.update()
    found: dict[str, Any] = {name: future.result() for name, future in waiting.items()}
    found["real"], found["real_cases"] = found.get("real", (None, []))
    return {"contributions": None, "train": None, **found}


def _contributions(job: Job, history: History, out: Path) -> Contributions:
    """In a worker: Shapley values of the sites, measured on one held-out patient of each."""
    sites = load_sites(out / "prepared")
    utility = dice_on(_model(job, history.state, out), [site.val[0] for site in sites if len(site.val)])
    return site_contributions(history, out / "arms" / "updates", utility,
                              permutations=None if len(sites) <= 5 else 20, seed=job.seed)


def _segment_training_patients(job: Job, state: ServerState | None, out: Path) -> pd.DataFrame:
    """In a worker: scores on the patients that the model was trained on."""
    sites = load_sites(out / "prepared")
    return segment(_model(job, state, out), ((site.name, p) for site in sites for p in site.train))[0]


def _segment_real(job: Job, state: ServerState | None, out: Path,
                  ) -> tuple[pd.DataFrame, list[tuple[Patient, torch.Tensor]]]:
    """In a worker: scores on real scans, and the patients with their label maps."""
    files = find_patients(str(job.real)).values()
    patients = [read_patient(scans, spacing_mm=job.source.spacing_mm) for scans in files]
    scores, labels = segment(_model(job, state, out), (("real", patient) for patient in patients))
    return scores, [(patient, labels[patient.id]) for patient in patients]


def _model(job: Job, state: ServerState | None, out: Path) -> torch.nn.Module:
    """The main arm's network with the weights of a state."""
    if state is None:
        raise RunError("an arm has no finished round; raise rounds")
    arms = arms_of(job, out)
    trainer = arms[main_arm(arms)].trainer
    load_weights(trainer.model, trainer.local(state))
    return trainer.model
