"""The arms of a comparison: each trained in its own way on the same sites, and scored on the same held-out patients.

`train_models` runs them side by side in worker processes, for `compare_arms`, `fedlab demo` and `fedlab run`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm.auto import tqdm

from fedlab.core.errors import RunError
from fedlab.core.files import write_json, write_whole
from fedlab.core.protocols import Elsewhere, Engine, Strategy, Topology
from fedlab.core.regions import regions_to_labels
from fedlab.core.settings import check_choice, check_whole
from fedlab.core.types import Patient, Round, ServerState, Site
from fedlab.core.weights import load_weights, weights_sha256
from fedlab.core.workers import Workers, tell
from fedlab.data.store import load_sites
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy
from fedlab.run.admission import Admission
from fedlab.run.baselines import centralised
from fedlab.run.federate import federate
from fedlab.run.history import History
from fedlab.run.recipe import patients_sha256, sha256_of
from fedlab.run.round import star
from fedlab.strategies.averaged_weights import AveragedWeights
from fedlab.training.metrics import COLUMNS, evaluate, predict, score_rows
from fedlab.training.trainer import SiteTrainer

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Arm", "Model", "Trained", "main_arm", "messages_until_done", "models_of", "segment", "train_models"]

#: Training steps that take about as long as the prediction of a patient; for the progress bar.
_STEPS_PER_PATIENT = 4
#: Its numbers are the share done and the time left of all models together; the text says which model is where.
_BAR = "{desc} {percentage:3.0f} % |{bar}| {remaining} left{postfix}"


@dataclass(frozen=True, kw_only=True, repr=False)
class Arm:
    """One arm of a comparison: how a model is trained, and on which patients.

    Args:
        trainer: as of `fedlab.federate`; its model's weights are the start.
        rounds: of training; 0 scores the start as it is, such as a public model.
        data: "sites": a federation; "pooled": all patients in one place, with as many gradient steps per round as all
            sites together; "each": one model per site, trained there alone, for as many rounds.
        strategy, privacy, aggregation, topology, engine, admission: of the federation, as of `fedlab.federate`. An arm
            of any kind may have `AveragedWeights`, whose mean is then scored.

    Raises:
        ValueError: a setting out of range, settings of a federation where there is none, or a technique that keeps
            tensors at the sites, so that there is no whole model to score.

    Example:
        >>> trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16))
        >>> arms = {"public": fl.Arm(trainer=trainer, rounds=0), "federated": fl.Arm(trainer=trainer, rounds=8),
        ...         "pooled": fl.Arm(trainer=trainer, rounds=8, data="pooled")}
    """

    trainer: SiteTrainer
    rounds: int
    data: Literal["sites", "pooled", "each"] = "sites"
    strategy: Strategy | None = None
    privacy: Privacy | None = None
    aggregation: Aggregation | None = None
    topology: Topology = star
    engine: Engine | Elsewhere | None = None
    admission: Admission | None = None

    def __post_init__(self) -> None:
        check_whole(least=0, rounds=self.rounds)
        check_choice(("sites", "pooled", "each"), data=self.data)
        given = [name for name in ("strategy", "aggregation", "engine", "admission") if getattr(self, name) is not None
                 and not isinstance(getattr(self, name), AveragedWeights)]
        if self.data != "sites" and (given or self.topology != star):
            raise ValueError(f"{', '.join(given) or 'topology'}: settings of a federation, but the arm trains on "
                             f"data={self.data!r}; leave them out, or say data='sites'")
        if self.privacy is not None and any(layer.keeps_tensors for layer in self.privacy.layers):
            raise ValueError(f"{self.privacy!r} keeps tensors at the sites, so the arm has no whole model that every "
                             "patient could be scored with; use fedlab.federate and score each site's own model")

    def __repr__(self) -> str:
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        given = [f"{name}={value!r}" for name, value in shown.items() if value not in (None, star, "sites")]
        return f"Arm({', '.join(given)})"

    def train(self, sites: Sequence[Site], **settings: Any) -> History:
        """Trains on sites, of which an arm with data="each" has one; settings go to `fedlab.federate`."""
        if self.rounds == 0:
            history = History(rounds=0)
            history.state = ServerState(round=0, params=self.trainer.initial(), buffers=self.trainer.initial_buffers())
            load_weights(self.trainer.model, self.trainer.initial_model())
            return history
        train = centralised if self.data == "pooled" else federate
        parts = {name: getattr(self, name) for name in ("aggregation", "topology", "engine", "admission")}
        history = train(self.trainer, sites, rounds=self.rounds, strategy=self.strategy, privacy=self.privacy,
                        progress=False, **settings, **(parts if self.data == "sites" else {}))
        if isinstance(self.strategy, AveragedWeights) and history.state is not None:
            history.state = self.strategy.averaged(history.state)
            load_weights(self.trainer.model, self.trainer.local(history.state))
        return history


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of a comparison, to be trained and scored by a worker process.

    Args:
        arm: how it is trained.
        name: of the model: that of the arm, or "local site-01" of an arm "local" with data="each".
        sites: names of the sites whose patients it is trained on.
        prepared: folder of the sites, as `fedlab.data.store.save_sites` writes it.
        folder: of the model's checkpoint and results.
        seed: of the training.
        watch: of the training's progress: held-out patients are scored after every so many rounds; 0 never.
        on_round: called in the worker with each finished round.
        trace: a file of the sites that took part in each round.
    """

    arm: Arm
    name: str
    sites: Sequence[str]
    prepared: Path
    folder: Path
    seed: int = 0
    watch: int = 0
    on_round: Sequence[Callable[[Round], None]] = ()
    trace: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model of a comparison after its training.

    Attributes:
        history: of the training; its state holds the weights.
        scores: rows of `fedlab.evaluate` on the held-out patients of all sites, with the columns "arm" and "seed".
        labels: label maps of the first held-out patient of each site, by patient id.
    """

    history: History
    scores: pd.DataFrame
    labels: Mapping[str, torch.Tensor] = field(default_factory=dict)


def main_arm(arms: Mapping[str, Arm]) -> str:
    """The arm that others are compared with: the first that trains a federation; the first of all if none does.

    Raises:
        ValueError: there is no arm.
    """
    if not arms:
        raise ValueError("a comparison needs at least one arm, got none")
    return next((name for name, arm in arms.items() if arm.data == "sites" and arm.rounds), next(iter(arms)))


def models_of(name: str, arm: Arm, sites: Sequence[Site], **settings: Any) -> list[Model]:
    """The models of an arm: one, or one per site; settings are those of `Model`."""
    names = [site.name for site in sites]
    parts = {f"{name} {site}": [site] for site in names} if arm.data == "each" and arm.rounds else {name: names}
    folder = settings.pop("folder")
    return [Model(arm=arm, name=model, sites=of, folder=folder / quote(model, safe=" ").replace(" ", "-"), **settings)
            for model, of in parts.items()]


def train_models(models: Sequence[Model], workers: Workers, *, progress: bool = True) -> list[Trained]:
    """Trains and scores models side by side; the longest begin first. What is done already is not done again.

    Raises:
        FedlabError, ValueError: the first failure of a model. The others keep what they have finished.
    """
    import cloudpickle

    held_out = {folder: sum(len(site.val) for site in load_sites(folder)) for folder in {m.prepared for m in models}}
    amount = [_steps_per_round(m) * m.arm.rounds + _STEPS_PER_PATIENT * held_out[m.prepared] for m in models]
    order = sorted(range(len(models)), key=lambda k: -amount[k])
    futures = {k: workers.submit(_train, cloudpickle.dumps(models[k])) for k in order}
    with tqdm(total=sum(amount), desc="training", smoothing=0.05, disable=not progress, bar_format=_BAR) as bar:
        for text, steps in messages_until_done(futures.values(), workers):
            bar.set_postfix_str(text, refresh=False)
            bar.update(steps)
    return [futures[k].result() for k in range(len(models))]


def messages_until_done(futures: Iterable[Future[Any]], workers: Workers) -> Iterator[Any]:
    """What the workers tell until all futures are done; raises the error of the first one that fails."""
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
        yield from workers.messages()
        for future in done:
            future.result()
    yield from workers.messages()


def _steps_per_round(model: Model) -> int:
    return (model.arm.trainer.steps or 10) * len(model.sites)


def _train(packed: bytes) -> Trained:
    """In a worker: trains one model and scores it on the held-out patients of all sites."""
    import cloudpickle

    model: Model = cloudpickle.loads(packed)  # from the process that started this one, never from a file
    sites = load_sites(model.prepared)
    chosen = [site for site in sites if site.name in set(model.sites)]
    first = [site.val[0] for site in sites if len(site.val)]
    rounds, steps = model.arm.rounds, _steps_per_round(model)

    def report(finished: Round) -> None:
        dice = finished.metrics.get("Dice")
        tell((f"{model.name}, round {finished.number + 1} of {rounds}" + (f", Dice {dice:.2f}" if dice else ""), steps))

    def validate(network: torch.nn.Module, number: int) -> dict[str, float]:
        if not model.watch or (number + 1) % model.watch:
            return {}
        scores = evaluate(network, first).groupby("region")["dice"].mean()
        return {"Dice": float(scores.mean()), **{f"Dice {region}": float(v) for region, v in scores.items()}}

    history = model.arm.train(chosen, seed=model.seed, validate=validate, on_round=[report, *model.on_round],
                              checkpoint=model.folder / "rounds", trace=model.trace)
    if history.state is None:
        raise RunError(f"the arm {model.name!r} has no finished round: {history.stopped}")
    scores, labels = _scored(model, history.state, sites)
    return Trained(history=history, scores=scores.assign(arm=model.name, seed=model.seed), labels=labels)


def _scored(model: Model, state: ServerState, sites: Sequence[Site]) -> tuple[pd.DataFrame, dict[str, torch.Tensor]]:
    """Scores on all held-out patients, and the label map of each site's first; kept in the model's folder."""
    import pandas as pd

    table, maps = model.folder / "scores.csv", model.folder / "labels.safetensors"
    note = {"weights": weights_sha256(state.model), "patients": sha256_of([patients_sha256(s.val) for s in sites])}
    with suppress(OSError, ValueError, SafetensorError):
        if json.loads((model.folder / "scored.json").read_text(encoding="utf-8")) == note:
            texts = {"site": str, "patient": str, "region": str}
            kept = pd.read_csv(table, dtype=texts, na_values={c: [""] for c in COLUMNS[3:]}, keep_default_na=False,
                               float_precision="round_trip")
            return kept, load_file(maps)
    scores, labels = segment(model.arm.trainer.model, ((site.name, p) for site in sites for p in site.val),
                             each=(f"{model.name}, evaluating", _STEPS_PER_PATIENT))
    labels = {site.val[0].id: labels[site.val[0].id] for site in sites if len(site.val)}
    model.folder.mkdir(parents=True, exist_ok=True)
    write_whole(table, scores.to_csv(index=False).encode())
    write_whole(maps, save(labels))
    write_json(model.folder / "scored.json", note)
    return scores, labels


def segment(network: torch.nn.Module, patients: Iterable[tuple[str, Patient]], *, each: Any = None,
            ) -> tuple[pd.DataFrame, dict[str, torch.Tensor]]:
    """Scores and label maps by patient id, of pairs of a site's name and a patient; tells `each` after every one."""
    import pandas as pd

    rows: list[dict[str, str | float]] = []
    labels = {}
    for site, patient in patients:
        regions = predict(network, patient) >= 0.5
        rows += score_rows(regions, patient.label, spacing_mm=patient.spacing_mm, site=site, patient=patient.id)
        labels[patient.id] = regions_to_labels(regions)
        tell(each)
    return pd.DataFrame(rows, columns=list(COLUMNS)), labels
