"""A run as data: in a folder, as the job that NVFLARE is given, and its finished rounds at the server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlab.core.errors import FedlabError, RunError
from fedlab.core.files import filled_in, write_whole
from fedlab.core.types import Round, ServerState, Spent
from fedlab.core.weights import weights_sha256
from fedlab.deploy.messages import pack_weights, unpack_weights
from fedlab.deploy.plan import Plan
from fedlab.run.checkpoint import Checkpoint
from fedlab.run.history import record_of

__all__ = ["FinishedRounds", "SavedRun", "read_round"]


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """Everything that a run needs, as data.

    Attributes:
        plan: of the run; the server receives it and shows it to the sites.
        start: packed first weights.
        seconds: longest time for a site's answer.
        patience: seconds of silence after which a site counts as gone.
        noise_repeats: whether noise that a guarantee rests on repeats with the seed, which the server knows.
    """

    plan: Plan
    start: bytes
    seconds: float
    patience: float
    noise_repeats: bool = True

    @property
    def job_name(self) -> str:
        """The name of every job of the run."""
        return f"fedlab-{self.plan.run[:12]}"

    def write(self, folder: Path) -> Path:
        """Writes it to a new folder.

        Raises:
            RunError: the folder exists and is not empty.
        """
        if folder.exists() and any(folder.iterdir()):
            raise RunError(f"{folder} is not empty; choose another folder, nothing is overwritten")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "start.safetensors").write_bytes(self.start)
        note = {"seconds": self.seconds, "patience": self.patience, "noise_repeats": self.noise_repeats}
        (folder / "times.json").write_text(json.dumps(note), encoding="utf-8")
        (folder / "plan.json").write_text(self.plan.to_json(), encoding="utf-8")
        return folder

    @classmethod
    def read(cls, folder: Path) -> SavedRun:
        """A run that `write` has written.

        Raises:
            RunError: the folder holds none.
        """
        try:
            times = json.loads((folder / "times.json").read_text(encoding="utf-8"))
            return cls(plan=Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"), sender=str(folder)),
                       start=(folder / "start.safetensors").read_bytes(), seconds=float(times["seconds"]),
                       patience=float(times["patience"]), noise_repeats=times.get("noise_repeats") is not False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{folder} holds no run written by NVFlare.save ({error})") from error

    def write_job(self, folder: Path, threads: int) -> Path:
        """Writes the job into a new folder, with `threads` of torch at the sites (0: their own choice).

        NVFLARE's own recipe for Collab would put the source of fedlab's classes into the job and ask the sites to run
        it; here a job holds no code, and sites accept none.
        """
        fewest = len(self.plan.sites)
        match self.plan.admission:
            case {"with": {"min_sites": int() as given}}:
                fewest = given
        text = filled_in("fedlab.engines.nvflare", "job.json", name=self.job_name, fewest=fewest, threads=threads,
                         sites=self.plan.sites, seconds=self.seconds, patience=self.patience)
        for place, content in json.loads(text).items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_text(json.dumps(content, indent=1), encoding="utf-8")
        (folder / "server" / "config" / "plan.json").write_text(self.plan.to_json(), encoding="utf-8")
        (folder / "server" / "config" / "start.safetensors").write_bytes(self.start)
        return folder


class FinishedRounds:
    """One entry per round: `NNNN.json` with its numbers, and `NNNN.safetensors` with the global weights after it.

    An entry is complete when its `.json` exists, and never changes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "rounds"

    def __len__(self) -> int:
        """Number of rounds from the first on without a gap."""
        count = 0
        while self._path(count, "json").is_file():
            count += 1
        return count

    def add(self, finished: Round) -> None:
        """Writes a finished round; an existing entry stays as it is."""
        self._write({**record_of(finished), "cohort": list(finished.cohort)}, finished.state)

    def catch_up(self, checkpoint: Path) -> None:
        """Writes the last round of a checkpoint, if the server was stopped before it could write it here."""
        saved = Checkpoint(checkpoint).load()
        if saved is not None:
            state, _, records = saved
            self._write({**records[-1], "cohort": [*records[-1]["sites"], *records[-1]["absent"]]}, state)

    def since(self, number: int) -> Iterator[Round]:
        """The rounds from a number on."""
        for k in range(number, len(self)):
            yield read_round(self.text(k), self.weights(k))

    def text(self, number: int) -> str:
        """The numbers of a round, as JSON."""
        return self._path(number, "json").read_text(encoding="utf-8")

    def weights(self, number: int) -> bytes:
        """The global weights after a round."""
        return self._path(number, "safetensors").read_bytes()

    def _write(self, record: Mapping[str, Any], state: ServerState) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (entry := self._path(record["round"], "json")).is_file():
            write_whole(self._path(record["round"], "safetensors"), pack_weights(state.model))
            text = json.dumps({**record, "model": weights_sha256(state.model), "buffers": list(state.buffers)},
                              ensure_ascii=False)
            write_whole(entry, text.encode())

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"{number:04d}.{kind}"


def read_round(text: str, weights: bytes) -> Round:
    """A round from its entry. Its state holds the global weights, which is all that leaves the server.

    Raises:
        FedlabError: the entry is damaged, or its weights are not those that it names.
    """
    try:
        note = json.loads(text)
        model, number, buffers = unpack_weights(weights), int(note["round"]), frozenset(note["buffers"])
        if weights_sha256(model) != note["model"]:
            raise FedlabError(f"the weights received for round {number} are not those that its entry names")
        return Round(
            number=number, state=ServerState(
                round=number + 1, params={name: t for name, t in model.items() if name not in buffers},
                buffers={name: t for name, t in model.items() if name in buffers}),
            cohort=tuple(map(str, note["cohort"])), sites={str(k): _numbers(v) for k, v in note["sites"].items()},
            spent={str(k): tuple(_spent(**one) for one in v) for k, v in note["spent"].items()},
            metrics=_numbers(note["metrics"]), seconds=float(note["seconds"]),
            absent={str(k): str(v) for k, v in note["absent"].items()},
            void=None if note["void"] is None else str(note["void"]), server_only=frozenset(note["server_only"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FedlabError(f"the server sent a round that cannot be read ({type(error).__name__}: {error})") from error


def _numbers(value: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(number) for name, number in value.items()}


def _spent(*, epsilon: float, delta: float, unit: Any, accountant: str, adjacency: str, repeats: bool = True) -> Spent:
    if unit not in ("patient", "site") or not epsilon >= 0 or not 0 <= delta < 1:
        raise ValueError(f"an invalid statement of privacy spent: ε = {epsilon} at δ = {delta} per {str(unit)[:40]}")
    return Spent(float(epsilon), float(delta), unit, str(accountant), str(adjacency), bool(repeats))
