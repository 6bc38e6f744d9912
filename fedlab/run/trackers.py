"""Numbers of a run for experiment trackers: calls for `federate(..., on_round=...)`.

They are given what may be published under the guarantee of the run (`fedlab.run.publishable`), and no more.
A tracker continues where it stopped when a run is resumed, and refuses a second run. If a run is killed between its
checkpoint and its tracker, the tracker lacks that round; `History` and the trace have it.
"""

from __future__ import annotations

import csv
import io
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlab.core.errors import RunError
from fedlab.core.extras import install_command, need
from fedlab.core.files import append_whole, replacing
from fedlab.core.types import REPEATS, Round, Spent
from fedlab.run.history import record_of
from fedlab.run.publishable import published

__all__ = ["CsvTracker", "MLflowTracker", "TensorBoardTracker"]

_COLUMNS = ("round", "site", "name", "value")


class _Tracker(ABC):
    """Opens its record at its first round, and again where a round does not follow the one before: for another run."""

    _expected: int | None = None

    def __call__(self, finished: Round) -> None:
        if finished.number != self._expected:
            self._open(finished.number)
        self._expected = None  # until the round is written
        self._write(finished)
        self._expected = finished.number + 1

    @abstractmethod
    def _open(self, number: int) -> None:
        """Takes up the record of this run before round `number`, or begins one."""

    @abstractmethod
    def _write(self, finished: Round) -> None:
        """Adds a round."""


@dataclass(kw_only=True, eq=False)
class CsvTracker(_Tracker):
    """Writes what may be published of every round into a CSV table.

    Its columns are round, site (empty for the global model), name and value.

    Args:
        path: a new file, or that of this run; rounds that are run again are replaced.

    Raises:
        RunError: at the first round, if the file is another table or another run's, or cannot be written.
    """

    path: Path | str

    def _open(self, number: int) -> None:
        """Keeps the rounds before this one; drops later rows, and a row that a kill cut off."""
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.stat().st_size == 0:
            return
        if number == 0:
            raise RunError(f"{path} exists and is not overwritten; choose another file for this run")
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        if tuple(rows[0]) != _COLUMNS:
            raise RunError(f"{path} is another table, with columns {', '.join(rows[0])}; choose another file")
        kept = [row for row in rows[1:] if len(row) == len(_COLUMNS) and row[0].isdigit() and int(row[0]) < number]
        with replacing(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([_COLUMNS, *kept])

    def _write(self, finished: Round) -> None:
        text, path = io.StringIO(newline=""), Path(self.path)
        if not path.exists() or path.stat().st_size == 0:
            csv.writer(text).writerow(_COLUMNS)
        csv.writer(text).writerows((finished.number, *row) for row in numbers(finished))
        append_whole(path, text.getvalue().encode())


@dataclass(kw_only=True, eq=False)
class MLflowTracker(_Tracker):
    """Logs every round to MLflow (`pip install 'fedlab-workbench[tracking]'`).

    Metrics have the names of the history, those of a site "site/name". Names of sites and the numbers that the server
    receives from them are sent to the tracking server: set `uri` to one of yours.

    Args:
        run_file: holds the id of the MLflow run, beside the checkpoint; a resumed run continues in that MLflow run.
        experiment: its name in MLflow.
        uri: of the tracking server; None uses MLflow's own settings. MLflow 3 accepts a folder, as "file:...", only
            with MLFLOW_ALLOW_FILE_STORE=true.
        settings: logged as parameters when the run begins, such as {"strategy": repr(strategy)}.

    Raises:
        ImportError: at the first round, if MLflow is not installed.
        RunError: the file does not hold an id, or it belongs to an earlier run.
    """

    run_file: Path | str
    experiment: str = "fedlab"
    uri: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    _client: Any = field(default=None, init=False, repr=False)
    _id: str = field(default="", init=False, repr=False)

    def end(self) -> None:
        """Marks the MLflow run as finished."""
        if self._client is not None:
            self._client.set_terminated(self._id)

    def _open(self, number: int) -> None:
        need("tracking", "mlflow", what="MLflowTracker")
        from mlflow import MlflowClient

        client, path = MlflowClient(tracking_uri=self.uri), Path(self.run_file)
        if path.exists():
            if number == 0:
                raise RunError(f"{path} names the MLflow run of an earlier run; choose another file for this one")
            self._id = path.read_text(encoding="utf-8").strip()
            if re.fullmatch("[0-9a-f]{32}", self._id) is None:
                raise RunError(f"{path} does not hold the id of an MLflow run; remove it to begin a new one")
            client.set_terminated(self._id, status="RUNNING")
        else:
            known = client.get_experiment_by_name(self.experiment)
            experiment = client.create_experiment(self.experiment) if known is None else known.experiment_id
            self._id = client.create_run(experiment).info.run_id
            for name, value in self.settings.items():
                client.log_param(self._id, name, value[:6000])  # MLflow's limit
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._id + "\n", encoding="utf-8")
        self._client = client

    def _write(self, finished: Round) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        shown = [Metric(_key(site, name), value, now, finished.number) for site, name, value in numbers(finished)
                 if math.isfinite(value)]  # not every store of MLflow takes NaN
        for first in range(0, len(shown), 1000):  # MLflow's limit per call
            self._client.log_batch(self._id, metrics=shown[first:first + 1000])


@dataclass(kw_only=True, eq=False)
class TensorBoardTracker(_Tracker):
    """Writes every round for TensorBoard (`pip install 'fedlab-workbench[tracking]'`; `tensorboard --logdir FOLDER`).

    Args:
        folder: of the event files; new, or that of this run. Rounds that are run again are replaced.

    Raises:
        ImportError: at the first round, if TensorBoard is not installed.
        RunError: the folder holds events of another run.
    """

    folder: Path | str
    _writer: Any = field(default=None, init=False, repr=False)

    def _open(self, number: int) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise ImportError(f"TensorBoardTracker needs TensorBoard: {install_command('tracking')}") from error
        if number == 0 and any(Path(self.folder).glob("events.out.tfevents.*")):
            raise RunError(f"{self.folder} holds the events of an earlier run; choose another folder for this one")
        writer: Any = SummaryWriter
        self._writer = writer(str(self.folder), purge_step=number or None)

    def _write(self, finished: Round) -> None:
        for site, name, value in numbers(finished):
            self._writer.add_scalar(_key(site, name), value, finished.number)
        self._writer.flush()


def numbers(finished: Round) -> Iterator[tuple[str, str, float]]:
    """Every number of a round that may be published, as (site, name, value); the site is empty for the global model."""
    record = published(record_of(finished))
    if "seconds" in record:
        yield "", "seconds", float(record["seconds"])
    if "sites" not in finished.server_only:
        yield "", "sites in the model", float(len(record["sites"]))
    for name, value in record["metrics"].items():
        yield "", name, float(value)
    for site, values in record["sites"].items():
        for name, value in values.items():
            yield site, name, float(value)
    for site, entries in record["spent"].items():
        for one in (Spent(**entry) for entry in entries):
            # An ε has no meaning without δ, unit, adjacency and accountant, so they are in its name.
            yield site, (f"epsilon at delta {one.delta:g} per {one.unit}, {one.adjacency}, {one.accountant} "
                         f"accountant{f', {REPEATS}' * one.repeats}"), float(one.epsilon)


def _key(site: str, name: str) -> str:
    """A name that MLflow and TensorBoard accept: letters, digits, _ - . / and blanks."""
    return re.sub(r"[^A-Za-z0-9_\-./ ]", "_", f"{site}/{name}" if site else name)[:250]
