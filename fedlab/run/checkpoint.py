"""A run on disk after each of its rounds, so that an interrupted run continues to the bit-equal result."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedlab.core.errors import RunError
from fedlab.core.files import replacing, write_json
from fedlab.core.types import ServerState, Tensors
from fedlab.core.weights import weights_sha256
from fedlab.run.recipe import Json, differences
from fedlab.run.site_states import SiteStates

__all__ = ["Checkpoint", "Saved", "full_disk_explained"]

Saved = tuple[ServerState, SiteStates, list[dict[str, Any]]]

_FORMAT = "fedlab-checkpoint-3"


class Checkpoint:
    """The folder of one run: `run.json` says which run it is, `round-NNNN/` holds its last finished round, and
    `site-states/` the present states of the sites.

    A round is written beside the previous one and renamed into place when complete, so a kill at any moment leaves one
    whole round.

    Attributes:
        folder: of the run.
        recipe: of the run when it began.
    """

    def __init__(self, folder: Path, recipe: Mapping[str, Json] | None = None) -> None:
        self.folder, self.recipe = folder, dict(recipe or {})

    @classmethod
    def open(cls, folder: Path | str, *, recipe: Mapping[str, Json], start: Tensors) -> Checkpoint:
        """The checkpoint in a folder that is new, empty, or of this very run.

        Args:
            recipe: the content that makes a run the same run; see `fedlab.run.recipe`.
            start: the weights that the run begins with.

        Raises:
            RunError: the folder holds something else, or another run.
        """
        folder = Path(folder)
        wanted = json.loads(json.dumps({"format": _FORMAT, "start_sha256": weights_sha256(start), **recipe}))
        note, left = folder / "run.json", folder / "as-left.json"
        if note.is_file():
            try:
                found = json.loads(note.read_text(encoding="utf-8"))
                as_left = {**found, **(json.loads(left.read_text(encoding="utf-8")) if left.is_file() else {})}
            except ValueError as error:
                raise RunError(f"{folder} is damaged ({error}); remove the folder to start over") from error
            differing = differences(found, wanted)
            if differing and as_left != wanted:
                more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
                raise RunError(f"{folder} holds a run with other settings or data ({'; '.join(differing[:3])}{more}); "
                               "choose another folder, or remove this one to train anew")
        elif folder.exists() and any(folder.iterdir()):
            raise RunError(f"{folder} is not empty and holds no fedlab run; choose another folder")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            found = wanted
            write_json(note, found)
        return cls(folder, {name: found[name] for name in recipe})

    def leave(self, parts: Mapping[str, Json]) -> None:
        """Notes the recipe of the parts as this process leaves them, if the run itself has changed them.

        A technique that keeps a log in an attribute is then still the same when the run continues in this process.
        """
        left = json.loads(json.dumps(parts))
        if left != {name: self.recipe[name] for name in left}:
            with suppress(OSError):  # a full disk has its own error
                write_json(self.folder / "as-left.json", left)

    def new_states(self, names: Sequence[str]) -> SiteStates:
        """The states of the sites for a run that begins."""
        shutil.rmtree(self.folder / "site-states", ignore_errors=True)
        return SiteStates(names, folder=self.folder / "site-states")

    def save(self, state: ServerState, states: Any, records: list[dict[str, Any]]) -> None:
        """Writes the state after a round, replacing the round before it."""
        final = self.folder / f"round-{state.round:04d}"
        shutil.rmtree(self.folder / f"{final.name}.part", ignore_errors=True)
        tensors = {f"params|{name}": t for name, t in state.params.items()}
        tensors |= {f"broadcast|{name}": t for name, t in state.broadcast.items()}
        tensors |= {f"buffers|{name}": t for name, t in state.buffers.items()}
        groups = {"moments": state.moments, "models": state.models, "namespaces": state.namespaces}
        for kind, members in groups.items():
            # Sites may share one model; a file of tensors holds each separately.
            tensors |= {f"{kind}|{quote(group, safe='')}|{name}": t.clone() for group, slots in members.items()
                        for name, t in slots.items()}
        plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        with replacing(final) as scratch:
            scratch.mkdir()
            save_file(plain, scratch / "state.safetensors")
            note = {"round": state.round, "state_sha256": weights_sha256(plain), "ledger": state.ledger,
                    "site_states": states.link_to(scratch) if isinstance(states, SiteStates) else {},
                    "records": records}
            (scratch / "round.json").write_text(json.dumps(note, ensure_ascii=False), encoding="utf-8")
        for other in self._rounds():
            if other != final:
                shutil.rmtree(other, ignore_errors=True)

    def load(self) -> Saved | None:
        """State, site states and records of the last finished round, or None before the first.

        Raises:
            RunError: a file is missing or its content is not what was written.
        """
        rounds = self._rounds()
        if not rounds:
            return None
        folder = rounds[-1]
        state, note = self._state(folder)
        shutil.rmtree(self.folder / "site-states", ignore_errors=True)
        states = SiteStates.restored(folder, note["site_states"], to=self.folder / "site-states")
        return state, states, note["records"]

    def state(self) -> ServerState | None:
        """The server's state after the last finished round, or None before the first; changes nothing on disk."""
        rounds = self._rounds()
        return self._state(rounds[-1])[0] if rounds else None

    def records(self) -> list[dict[str, Any]]:
        """The history's records after the last finished round; changes nothing on disk."""
        rounds = self._rounds()
        return list(self._state(rounds[-1])[1]["records"]) if rounds else []

    def _state(self, folder: Path) -> tuple[ServerState, dict[str, Any]]:
        try:
            note = json.loads((folder / "round.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "state.safetensors")
            if weights_sha256(tensors) != note["state_sha256"]:
                raise ValueError("its content is not what was written")
            groups = _grouped(tensors)
            moments, models, namespaces = (
                {unquote(group): slots for group, slots in _grouped(groups.get(kind, {})).items()}
                for kind in ("moments", "models", "namespaces"))
            return ServerState(round=note["round"], params=groups["params"], broadcast=groups.get("broadcast", {}),
                               buffers=groups.get("buffers", {}), ledger=note["ledger"], moments=moments, models=models,
                               namespaces=namespaces), note
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise RunError(f"{folder} is damaged ({error}); remove the run's folder to start over") from error

    def _rounds(self) -> list[Path]:
        found = [p for p in self.folder.glob("round-*") if p.is_dir() and p.name[6:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[6:]))  # not by text: 10000 comes after 9999


def _grouped(flat: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in flat.items():
        group, name = key.split("|", 1)
        groups.setdefault(group, {})[name] = tensor
    return groups


@contextmanager
def full_disk_explained() -> Iterator[None]:
    """Says what to do where something cannot be saved for lack of space."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f"the run cannot be saved ({error}); free some space and start it again: with its checkpoint "
                       "it continues after the last round that was saved") from error
