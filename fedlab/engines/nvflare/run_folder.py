"""Finished rounds of a run in the run's folder at the server, for whoever watches, now or later."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlab.core.errors import FedlabError
from fedlab.core.types import Round, ServerState, Spent
from fedlab.core.weights import weights_sha256
from fedlab.deploy.messages import pack_weights, unpack_weights
from fedlab.run.checkpoint import Checkpoint

__all__ = ["Diary", "read_round"]


class Diary:
    """One entry a round: `NNNN.json` with its numbers, and `NNNN.safetensors` with the global weights after it.

    Entries are complete when their `.json` is there, and never change.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "rounds"

    def __len__(self) -> int:
        """Number of rounds from the first on without a gap."""
        count = 0
        while (self.folder / f"{count:04d}.json").is_file():
            count += 1
        return count

    def add(self, finished: Round) -> None:
        """Writes a finished round; one that is there stays as it is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({
            "number": finished.number, "cohort": list(finished.cohort), "seconds": finished.seconds,
            "sites": {site: dict(numbers) for site, numbers in finished.sites.items()},
            "spent": {site: [list(one) for one in spent] for site, spent in finished.spent.items()},
            "metrics": dict(finished.metrics), "absent": dict(finished.absent),
            "model": weights_sha256(finished.state.params)}, ensure_ascii=False)
        name = f"{finished.number:04d}"
        if not (self.folder / f"{name}.json").is_file():
            _write(self.folder / f"{name}.safetensors", pack_weights(finished.state.params))
            _write(self.folder / f"{name}.json", text.encode())

    def catch_up(self, checkpoint: Path) -> None:
        """Writes the last round of a checkpoint, if the server was stopped before it could write it here."""
        saved = Checkpoint(checkpoint).load()
        if saved is None or len(self) >= saved[0].round:
            return
        state, _, records = saved
        last = records[-1]
        spent = {site: tuple(Spent(**one) for one in entries) for site, entries in last["spent"].items()}
        self.add(Round(number=last["round"], state=state, cohort=(*last["sites"], *last["absent"]),
                       sites=last["sites"], spent=spent, metrics=last["metrics"], seconds=last["seconds"],
                       absent=last["absent"]))

    def text(self, number: int) -> str:
        """The numbers of a round, as they stand in its file."""
        return (self.folder / f"{number:04d}.json").read_text(encoding="utf-8")

    def weights(self, number: int) -> bytes:
        """The global weights after a round."""
        return (self.folder / f"{number:04d}.safetensors").read_bytes()


def _write(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all."""
    scratch = path.with_suffix(f"{path.suffix}.part")
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def read_round(text: str, weights: bytes) -> Round:
    """A round from an entry of a diary. Its state holds the global weights, which is all that leaves the server.

    Raises:
        FedlabError: the entry is damaged, or its weights are others than it says.
    """
    try:
        note = json.loads(text)
        params = unpack_weights(weights)
        if weights_sha256(params) != note["model"]:
            raise FedlabError(f"the weights that came for round {note['number']} are not those that its entry names")
        return Round(
            number=int(note["number"]), state=ServerState(round=int(note["number"]) + 1, params=params),
            cohort=tuple(map(str, note["cohort"])), sites={str(k): _numbers(v) for k, v in note["sites"].items()},
            spent={str(k): tuple(_spent(one) for one in v) for k, v in note["spent"].items()},
            metrics=_numbers(note["metrics"]), seconds=float(note["seconds"]),
            absent={str(k): str(v) for k, v in note["absent"].items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FedlabError(f"the server sent a round that can't be read ({type(error).__name__}: {error})") from error


def _numbers(value: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(number) for name, number in value.items()}


def _spent(value: list[Any]) -> Spent:
    epsilon, delta, unit, accountant, adjacency = value
    if unit not in ("patient", "site") or math.isnan(epsilon):
        raise ValueError(f"no statement of privacy spent: {str(value)[:120]}")
    return Spent(float(epsilon), float(delta), unit, str(accountant), str(adjacency))
