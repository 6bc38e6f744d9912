"""A run on disk after each of its rounds, so that an interrupted one goes on to the bit-equal result."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedlab.core.errors import RunError
from fedlab.core.types import Memory, ServerState, Tensors
from fedlab.core.weights import weights_sha256

__all__ = ["Checkpoint", "Saved"]

Saved = tuple[ServerState, dict[str, Memory], list[dict[str, Any]]]


class Checkpoint:
    """The folder of one run: `run.json` says which run it is, `round-NNNN/` holds its last finished round.

    A round is written beside the previous one and renamed into place when complete, so a kill at any moment
    leaves one whole round.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: Path | str, *, start: Tensors, describe: Mapping[str, str]) -> Checkpoint:
        """The checkpoint in `folder`, which is made if missing.

        Args:
            folder: new, empty, or of this very run.
            start: the weights that the run begins with.
            describe: the settings that a run must share to be the same run.

        Raises:
            RunError: the folder holds something else, or a run with other settings.
        """
        folder = Path(folder)
        wanted = {"format": "fedlab-checkpoint-2", "start_sha256": weights_sha256(start), **describe}
        note = folder / "run.json"
        if note.is_file():
            try:
                found = json.loads(note.read_text(encoding="utf-8"))
            except ValueError as error:
                raise RunError(f"{note} is damaged ({error}); remove the folder to start over") from error
            differing = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
            if differing:
                key = differing[0]
                raise RunError(f"{folder} holds a run with other settings ({', '.join(differing)} differ: there "
                               f"{str(found.get(key))[:120]!r}, here {str(wanted.get(key))[:120]!r}); "
                               "choose another folder")
        elif folder.exists() and any(folder.iterdir()):
            raise RunError(f"{folder} is not empty and holds no fedlab run; choose another folder")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            scratch = folder / "run.json.part"
            scratch.write_text(json.dumps(wanted, indent=1, ensure_ascii=False), encoding="utf-8")
            os.replace(scratch, note)
        return cls(folder)

    def save(self, state: ServerState, memory: Mapping[str, Memory], records: list[dict[str, Any]]) -> None:
        """Writes the state after a round, replacing the round before it."""
        final = self.folder / f"round-{state.round:04d}"
        scratch = self.folder / f"{final.name}.part"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        tensors = {f"params|{name}": t for name, t in state.params.items()}
        tensors |= {f"moments|{g}|{name}": t for g, slots in state.moments.items() for name, t in slots.items()}
        tensors |= {f"memory|{g}|{name}": t for g, slots in state.memory.items() for name, t in slots.items()}
        # Sites may share one model; a file of tensors holds each on its own.
        tensors |= {f"models|{quote(site, safe='')}|{name}": t.clone() for site, own in state.models.items()
                    for name, t in own.items()}
        save_file(_plain(tensors), scratch / "state.safetensors")
        files = {}
        for index, (site, groups) in enumerate(sorted(memory.items())):
            kept = {f"{group}|{name}": t for group, slots in groups.items() if not group.startswith("_")
                    for name, t in slots.items()}
            files[site] = {"file": f"memory-{index}.safetensors", "sha256": weights_sha256(kept)}
            save_file(_plain(kept), scratch / files[site]["file"])
        note = {"round": state.round, "state_sha256": weights_sha256(tensors), "memory": files, "records": records}
        (scratch / "round.json").write_text(json.dumps(note, ensure_ascii=False), encoding="utf-8")
        os.replace(scratch, final)
        for other in self._rounds():
            if other != final:
                shutil.rmtree(other, ignore_errors=True)

    def load(self) -> Saved | None:
        """State, site memories and records of the last finished round, or None before the first.

        Raises:
            RunError: a file is missing or its content is not what was written.
        """
        rounds = self._rounds()
        if not rounds:
            return None
        folder = rounds[-1]
        try:
            note = json.loads((folder / "round.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "state.safetensors")
            kept = {site: load_file(folder / entry["file"]) for site, entry in note["memory"].items()}
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise RunError(f"{folder} is damaged ({error}); remove the run's folder to start over") from error
        whole = weights_sha256(tensors) == note["state_sha256"] and all(
            weights_sha256(kept[site]) == entry["sha256"] for site, entry in note["memory"].items())
        if not whole:
            raise RunError(f"{folder} does not hold what was written there; remove the run's folder to start over")
        groups = _grouped(tensors)
        state = ServerState(round=note["round"], params=groups["params"], moments=_grouped(groups.get("moments", {})),
                            memory=_grouped(groups.get("memory", {})),
                            models={unquote(s): own for s, own in _grouped(groups.get("models", {})).items()})
        return state, {site: _grouped(flat) for site, flat in kept.items()}, note["records"]

    def _rounds(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("round-*") if p.is_dir() and p.suffix != ".part")


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _grouped(flat: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in flat.items():
        group, name = key.split("|", 1)
        groups.setdefault(group, {})[name] = tensor
    return groups
