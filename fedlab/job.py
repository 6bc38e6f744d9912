"""The main job: the same network trained federated, on pooled data and at each site alone, and compared.

`run_job` prepares the data, trains the arms side by side in worker processes and evaluates them on held-out
patients; `fedlab.results` writes what came of it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from fedlab.baselines import centralised
from fedlab.data.brats import find_patients, read_patient, read_sites
from fedlab.data.phantom import make_cohort
from fedlab.data.prepare import regions_to_labels
from fedlab.data.store import load_sites, save_sites
from fedlab.errors import RunError
from fedlab.history import History
from fedlab.metrics import COLUMNS, evaluate, predict, score_rows
from fedlab.models import load_weights, segresnet
from fedlab.server import federate
from fedlab.training import PolyDecay, SiteTrainer, pick_device, pick_precision
from fedlab.types import Patient, Round, ServerState, Site
from fedlab.workers import Workers, start_workers, tell

__all__ = ["Folder", "Job", "Outcome", "Phantoms", "forget_working_files", "open_job", "read_job", "run_job"]


@dataclass(frozen=True, kw_only=True)
class Phantoms:
    """A generated cohort as the data of a job; see `fedlab.data.phantom.make_cohort`.

    Args:
        sites: number of sites.
        patients: of all sites together.
        shape: voxels of the common grid.
        spacing_mm: edge of a voxel in mm.
        held_out: patients that each site holds out, a number or a share.
        equal: whether all sites have the same number of patients, else sizes as unequal as in a real study.
    """

    sites: int = 4
    patients: int = 120
    shape: tuple[int, int, int] = (48, 64, 48)
    spacing_mm: float = 3.0
    held_out: int | float = 0.2
    equal: bool = True

    def __post_init__(self) -> None:
        if self.equal and self.patients % self.sites:
            raise ValueError(f"{self.patients} patients do not divide into {self.sites} equal sites; "
                             f"use {self.patients // self.sites * self.sites or self.sites} patients")

    def prepare(self, *, seed: int, workers: Workers) -> list[Site]:
        sizes = [self.patients // self.sites] * self.sites if self.equal else None
        return make_cohort(sites=self.sites, patients=self.patients, shape=self.shape, spacing_mm=self.spacing_mm,
                           seed=seed, held_out=self.held_out, sizes=sizes, workers=workers)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A BraTS folder and its institution table as the data of a job; see `fedlab.data.brats.read_sites`.

    Args:
        data: folder with one folder per patient.
        table: CSV file with the columns Partition_ID and Subject_ID.
        spacing_mm: edge of a voxel in mm.
        held_out: patients that each site holds out, a number or a share.
    """

    data: str
    table: str
    spacing_mm: float = 3.0
    held_out: int | float = 0.2

    def prepare(self, *, seed: int, workers: Workers) -> list[Site]:
        return read_sites(self.data, self.table, spacing_mm=self.spacing_mm, held_out=self.held_out, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train on what, and how long. The defaults are the demo's.

    Args:
        source: `Phantoms` or `Folder`.
        rounds: of the federated arm; the other arms take as many gradient steps.
        steps: gradient steps of a site per round.
        batch_size: crops per step.
        lr: learning rate of the first round, falling to 0 by `PolyDecay`.
        filters: width of the network; 32 is the paper's.
        crop: voxels of a training crop.
        seed: of the data, the first weights and the training.
        real: folder of real scans to try the federated model on, in a BraTS layout; not trained on.
        watch_every: rounds between two looks at the Dice of held-out patients.
    """

    source: Phantoms | Folder
    rounds: int = 32
    steps: int = 6
    batch_size: int = 2
    lr: float = 4e-3
    filters: int = 8
    crop: tuple[int, int, int] = (32, 32, 32)
    seed: int = 0
    real: str | None = None
    watch_every: int = 4

    def trainer(self) -> SiteTrainer:
        """The trainer of every arm: same network, same start, same schedule, moments kept in all."""
        return SiteTrainer(model=segresnet(filters=self.filters, seed=self.seed), steps=self.steps,
                           lr=PolyDecay(start=self.lr, rounds=self.rounds), batch_size=self.batch_size, crop=self.crop)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a job found.

    Attributes:
        job: the settings.
        sites: the prepared sites.
        histories: by arm: "federated", "centralised", "local site-01", ...
        scores: one row per arm, patient and region, on the held-out patients of all sites.
        predictions: label maps of the patients shown, by arm and patient id.
        real: the scores of the federated model on real scans, if there are any.
        real_cases: these patients with the federated model's label maps.
        seconds: wall time of data, train, evaluate and total.
    """

    job: Job
    sites: list[Site]
    histories: dict[str, History]
    scores: pd.DataFrame
    predictions: dict[str, dict[str, torch.Tensor]]
    real: pd.DataFrame | None
    real_cases: list[tuple[Patient, torch.Tensor]]
    seconds: dict[str, float]


def open_job(job: Job, out: Path) -> None:
    """Makes the run directory `out` and notes the job in it.

    Raises:
        RunError: the directory exists.
    """
    try:
        out.mkdir(parents=True)
    except FileExistsError as error:
        raise RunError(f"{out} exists and is left as it is; choose another --out, or continue it with "
                       f"'fedlab resume {out}'") from error
    kind = {Phantoms: "phantoms", Folder: "folder"}[type(job.source)]
    note = {"format": "fedlab-job-1", "source_kind": kind, **asdict(job)}
    scratch = out / "job.json.part"
    scratch.write_text(json.dumps(note, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(scratch, out / "job.json")


def read_job(out: Path) -> Job:
    """The job noted in a run directory.

    Raises:
        RunError: there is none, or it is damaged.
    """
    path = out / "job.json"
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        if note.pop("format") != "fedlab-job-1":
            raise ValueError("not the format of this fedlab")
        source = {"phantoms": Phantoms, "folder": Folder}[note.pop("source_kind")]
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in note.pop("source").items()}
        note["crop"] = tuple(note["crop"])
        return Job(source=source(**fields), **note)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{out} is no run that can be continued ({type(error).__name__}: {error}); expected the "
                       "folder of an interrupted 'fedlab demo' or 'fedlab run'") from error


def run_job(job: Job, out: Path) -> Outcome:
    """Runs `job` in its run directory, going on from what is there.

    Args:
        job: what to do.
        out: a directory that `open_job` made.

    Raises:
        FedlabError: data, sites or privacy failed; the run can be resumed after the cause is mended.
    """
    started = time.perf_counter()
    prepared = out / "prepared"
    with start_workers() as workers:
        warm = workers.submit(_warm_up)  # imports in the workers while data is generated
        if not (prepared / "complete").is_file():
            save_sites(job.source.prepare(seed=job.seed, workers=workers), prepared)
            (prepared / "complete").touch()
        sites = load_sites(prepared)
        warm.result()
        data_done = time.perf_counter()
        histories = _train(job, sites, out, workers)
        train_done = time.perf_counter()
        scores, predictions = _evaluate(job, sites, histories, prepared, workers)
        real, real_cases = _try_on_real(job, histories["federated"].state) if job.real else (None, [])
    done = time.perf_counter()
    seconds = {"data": data_done - started, "train": train_done - data_done, "evaluate": done - train_done,
               "total": done - started}
    return Outcome(job=job, sites=sites, histories=histories, scores=scores, predictions=predictions, real=real,
                   real_cases=real_cases, seconds=seconds)


def forget_working_files(out: Path) -> None:
    """Removes the prepared data and the checkpoints of a finished run."""
    for name in ("prepared", "arms"):
        shutil.rmtree(out / name, ignore_errors=True)


def _warm_up() -> None:
    import fedlab.preload  # noqa: F401


def _arms(sites: Sequence[Site]) -> list[str]:
    return ["federated", "centralised", *(f"local {site.name}" for site in sites)]  # the long ones first


def _train(job: Job, sites: Sequence[Site], out: Path, workers: Workers) -> dict[str, History]:
    weight = {arm: 1 if arm.startswith("local") else len(sites) for arm in _arms(sites)}
    total = job.rounds * job.steps * sum(weight.values())
    futures = {arm: workers.submit(_train_arm, job, arm, out) for arm in weight}
    shown: dict[str, str] = {}
    with tqdm(total=total, desc="training", unit="step", smoothing=0.05) as bar:
        def look() -> None:
            for arm, dice in workers.messages():
                if dice is not None:
                    shown[f"Dice {arm}"] = f"{dice:.2f}"
                bar.set_postfix(shown, refresh=False)
                bar.update(job.steps * weight[arm])

        _watch(list(futures.values()), look)
        look()
    return {arm: future.result() for arm, future in futures.items()}


def _watch(futures: Sequence[Future[Any]], look: Callable[[], object]) -> None:
    """Calls `look` twice a second until all futures are done; raises what the first failing one raised."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
        look()
        for future in done:
            future.result()


def _train_arm(job: Job, arm: str, out: Path) -> History:
    """In a worker: one arm, with its checkpoint in the run directory."""
    sites = load_sites(out / "prepared")
    trainer = job.trainer()
    # A few held-out patients show how training goes; the scores come from all of them in the end.
    shown = [] if arm.startswith("local") else [site.val[0] for site in sites if len(site.val)]

    def validate(model: torch.nn.Module, number: int) -> dict[str, float]:
        if not shown or (number + 1) % job.watch_every:
            return {}
        scores = evaluate(model, shown, amp=_amp()).groupby("region")["dice"].mean()
        return {"Dice": float(scores.mean()), **{f"Dice {region}": float(v) for region, v in scores.items()}}

    def report(finished: Round) -> None:
        tell((arm, finished.metrics.get("Dice")))

    settings: dict[str, Any] = {"rounds": job.rounds, "seed": job.seed, "progress": False, "on_round": report,
                                "validate": validate, "checkpoint": out / "arms" / arm.replace(" ", "-")}
    if arm == "centralised":
        return centralised(trainer, sites, **settings)
    chosen = sites if arm == "federated" else [site for site in sites if arm == f"local {site.name}"]
    return federate(trainer, chosen, **settings)


def _evaluate(job: Job, sites: Sequence[Site], histories: Mapping[str, History], prepared: Path,
              workers: Workers) -> tuple[pd.DataFrame, dict[str, dict[str, torch.Tensor]]]:
    if not any(len(site.val) for site in sites):
        raise RunError("no site holds out a patient, so nothing can be compared; raise held_out")
    futures = {arm: workers.submit(_evaluate_arm, job, history.state, prepared) for arm, history in histories.items()}
    patients = sum(len(site.val) for site in sites) * len(futures)
    with tqdm(total=patients, desc="evaluating", unit="patient") as bar:
        _watch(list(futures.values()), lambda: bar.update(len(list(workers.messages()))))
        bar.update(len(list(workers.messages())))
    results = {arm: future.result() for arm, future in futures.items()}
    scores = pd.concat([table.assign(arm=arm) for arm, (table, _) in results.items()], ignore_index=True)
    return scores, {arm: shown for arm, (_, shown) in results.items()}


def _evaluate_arm(job: Job, state: ServerState | None, prepared: Path) -> tuple[pd.DataFrame, dict[str, torch.Tensor]]:
    """In a worker: scores on every held-out patient, and the label maps of each site's first."""
    sites = load_sites(prepared)
    model = _model(job, state)
    rows: list[dict[str, str | float]] = []
    shown = {}
    for site in sites:
        for number, patient in enumerate(site.val):
            regions = predict(model, patient, amp=_amp()) >= 0.5
            rows += score_rows(regions, patient.label, spacing_mm=patient.spacing_mm, site=site.name,
                               patient=patient.id)
            if number == 0:
                shown[patient.id] = regions_to_labels(regions)
            tell(patient.id)
    return pd.DataFrame(rows, columns=list(COLUMNS)), shown


def _try_on_real(job: Job, state: ServerState | None) -> tuple[pd.DataFrame, list[tuple[Patient, torch.Tensor]]]:
    model = _model(job, state)
    found = find_patients(job.real) if job.real else {}
    rows: list[dict[str, str | float]] = []
    cases = []
    for files in tqdm(found.values(), desc="real scans", unit="patient"):
        patient = read_patient(files, spacing_mm=job.source.spacing_mm)
        regions = predict(model, patient, amp=_amp()) >= 0.5
        rows += score_rows(regions, patient.label, spacing_mm=patient.spacing_mm, site="real", patient=patient.id)
        cases.append((patient, regions_to_labels(regions)))
    return pd.DataFrame(rows, columns=list(COLUMNS)), cases


def _model(job: Job, state: ServerState | None) -> torch.nn.Module:
    if state is None:
        raise RunError("an arm has no finished round; raise rounds")
    model = segresnet(filters=job.filters, seed=job.seed)
    load_weights(model, state.params)
    return model


def _amp() -> torch.dtype | None:
    dtype = pick_precision("auto", pick_device("cpu"))
    return None if dtype is torch.float32 else dtype
