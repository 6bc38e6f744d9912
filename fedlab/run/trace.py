"""A run's trace: one line per round, each with the hash of the line before, so that every change is detected."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedlab.core.errors import DataError, RunError
from fedlab.core.files import append_whole
from fedlab.core.text import counted
from fedlab.core.types import Round, ServerState, Site, Tensors
from fedlab.core.weights import weights_sha256
from fedlab.data.sites.partition import Partition
from fedlab.run.checkpoint import Checkpoint
from fedlab.run.history import record_of
from fedlab.run.recipe import Json

__all__ = ["Trace", "Verdict", "verify"]

_FORMAT = "fedlab-trace-2"
_NOTHING = "0" * 64


class Trace:
    """The trace file of a run; `federate(..., trace="trace.jsonl")` makes one.

    The first line has the settings as code, versions, and for each site hashes of its patients' ids and of its data
    card. Then one line per round: the sites that took part and their weights, norms, absent sites with the reason,
    hashes of the model before and after, privacy spent. A line marks where a run was resumed, and one its end. Every
    line holds the SHA-256 of its own content and of the line before.

    Limits: anyone who can write the file can write it anew, from any line on, with hashes that fit. Note `head`, the
    last line's hash, where others cannot change it (a message to the other sites, a paper); `verify(path, head=...)`
    then detects that. A hash of ids does not hide ids that can be guessed. It is for the server only: under a guarantee
    some of its numbers must not be published, see `fedlab.run.publishable`.

    Attributes:
        path: the file.
        head: hash of the last line.
    """

    def __init__(self, path: Path, *, lines: int = 0, head: str = _NOTHING, model: str = "") -> None:
        self.path, self.head = path, head
        self._lines, self._model = lines, model

    @classmethod
    def open(cls, path: Path | str, *, recipe: Mapping[str, Json], settings: Mapping[str, str], sites: Sequence[Site],
             start: Tensors, state: ServerState | None, resumable: bool) -> Trace:
        """The trace of a run that begins or continues.

        Args:
            path: a new file, or the trace of this same run; a last line that a crash cut off is removed.
            recipe: the content that makes a run the same run; see `fedlab.run.recipe`.
            settings: of the run, as code.
            start, state: the weights that the run began with, and the state from which it continues, if it does.
            resumable: whether the run has a checkpoint to go on from.

        Raises:
            RunError: the file is of another run, or damaged.
        """
        path = Path(path)
        begin = {"format": _FORMAT, "settings": dict(settings), "versions": _versions(), **_data_of(sites),
                 "recipe_sha256": {part: hashlib.sha256(_canonical(what)).hexdigest() for part, what in recipe.items()}}
        number = 0 if state is None else state.round
        model = model_sha256(state.model if state else start, state.models if state else {})
        lines, rest = _complete_lines(path) if path.exists() else ([], b"")
        first_bytes = _canonical({"format": _FORMAT})[:-1]
        if resumable and not lines and rest[:len(first_bytes)] == first_bytes[:len(rest)]:
            rest = b""  # a kill left only a part of the first line
        if not lines and not rest:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            trace = cls(path, model=model)
            trace._write("start", round=number, model=model, **begin)
            return trace
        if not resumable:
            raise RunError(f"{path} exists and is not overwritten; choose another file for the trace of this run")
        entries = [entry for line in lines if (entry := _parse(line)) is not None]
        if not entries or len(entries) < len(lines) or entries[0].get("format") != _FORMAT:
            raise RunError(f"{path} is no trace, or a damaged one; see 'fedlab verify {path}'")
        first, last = entries[0], entries[-1]
        of_file, of_run = ({**part["recipe_sha256"], "sites": part["sites"]} for part in (first, begin))
        if differing := sorted(k for k in of_file.keys() | of_run.keys() if of_file.get(k) != of_run.get(k)):
            raise RunError(f"{path} is the trace of a run with other settings ({', '.join(differing)} differ); choose "
                           "another file")
        rounds = max(int(entry["round"]) + int(entry["kind"] == "round") for entry in entries)
        planned = [entry["settings"]["rounds"] for entry in entries if "rounds" in entry.get("settings", {})]
        if last["kind"] == "end" and (rounds, last["model"], planned[-1]) == (number, model, settings["rounds"]):
            return cls(path, lines=len(lines), head=last["sha256"], model=model)
        if rest:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size - len(rest))
        trace = cls(path, lines=len(lines), head=last["sha256"], model=model)
        changed = {k: v for k, v in settings.items() if k == "rounds" or first["settings"].get(k) != v}
        trace._write("resume", round=number, model=model, missing=list(range(rounds, number)), cut_bytes=len(rest),
                     settings=changed, versions=begin["versions"])
        return trace

    def add(self, finished: Round) -> None:
        """Adds a finished round, which is on the disk when this returns."""
        after = model_sha256(finished.state.model, finished.state.models)
        self._write("round", cohort=list(finished.cohort), before=self._model, after=after, **record_of(finished))
        self._model = after

    def end(self, *, round: int, stopped: str | None) -> None:
        """Ends the trace after a number of rounds, if it has not ended; `stopped` says why the run ended early."""
        lines, _ = _complete_lines(self.path)
        if (_parse(lines[-1]) or {}).get("kind") != "end":
            self._write("end", round=round, model=self._model, stopped=stopped)

    def _write(self, kind: str, **content: Any) -> None:
        # JSON has no NaN and no infinity.
        content = json.loads(json.dumps(content), parse_constant=lambda word: str(float(word)))
        entry = {"kind": kind, "line": self._lines, "time": datetime.now(UTC).isoformat(timespec="seconds"),
                 **content, "previous": self.head}
        entry["sha256"] = _hash_of(entry)
        append_whole(self.path, _canonical(entry) + b"\n")
        self._lines, self.head = self._lines + 1, entry["sha256"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `verify` found in a trace.

    Attributes:
        path: the file.
        lines: number of complete lines.
        rounds: rounds of the run so far.
        head: hash of the last line.
        problems: each with its line; none in a trace that is whole.
        notes: remarks about a trace, whole or not.
    """

    path: Path
    lines: int
    rounds: int
    head: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def __str__(self) -> str:
        said = [f"{self.path}: {counted(self.lines, 'line')}, {counted(self.rounds, 'round')}, "
                + ("whole" if self.ok else f"{counted(len(self.problems), 'problem')}")]
        said += [f"  - {problem}" for problem in self.problems] + [f"  note: {note}" for note in self.notes]
        return "\n".join([*said, f"  head {self.head}"])

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def verify(path: Path | str, *, head: str | None = None) -> Verdict:
    """Checks every line of a trace, and compares it with the saved model of its run.

    Detects lines that were changed, removed, added or moved, and a model other than the one the trace ends with. See
    `Trace` about what cannot be detected without a head noted elsewhere.

    Args:
        path: a run's directory, or the trace itself.
        head: the hash of a line as it was noted elsewhere.

    Raises:
        RunError: there is no trace.
    """
    path = Path(path)
    file = path / "trace.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise RunError(f"there is no trace {file}; 'fedlab demo' and 'fedlab run' write one, and so does "
                       "federate(..., trace=...)")
    reading = _Reading()
    lines, rest = _complete_lines(file)
    for number, line in enumerate(lines):
        reading.take(number, line)
    if rest:
        reading.problems.append(f"line {len(lines) + 1} is cut off after {len(rest)} bytes: the run was killed while "
                                "it wrote, or bytes were removed; resuming the run repairs it")
    if not lines:
        reading.problems.append("there is no complete line")
    if head is not None and head not in reading.hashes:
        reading.problems.append(f"no line has the head that was noted, {head}: the trace was written anew or cut")
    elif head is not None and head != reading.hashes[-1]:
        reading.notes.append(f"{len(lines) - 1 - reading.hashes.index(head)} lines follow the head that was noted")
    if not reading.ended:
        reading.notes.append(f"the run has not ended: {reading.expected or 0} of {reading.planned} rounds are traced")
    if path.is_dir():
        reading.compare(path)
    return Verdict(path=file, lines=len(lines), rounds=reading.expected or 0,
                   head=reading.hashes[-1] if reading.hashes else _NOTHING, problems=tuple(reading.problems),
                   notes=tuple(reading.notes))


@dataclass(eq=False)
class _Reading:
    """Goes through a trace, line by line."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    models: dict[int, str] = field(default_factory=dict)
    expected: int | None = None
    planned: str = "?"
    ended: bool = False

    def take(self, number: int, line: bytes) -> None:
        """Reads one line and checks its place in the chain."""
        entry, where = _parse(line), f"line {number + 1}"
        if entry is None:
            self.problems.append(f"{where} cannot be read: it was changed")
            self.hashes.append("")
            self.expected = None
            return
        if _canonical(entry) != line or entry["sha256"] != _hash_of(entry):
            self.problems.append(f"{where} is not what was written: it was changed")
        previous = self.hashes[-1] if self.hashes else _NOTHING
        if entry["previous"] != previous and previous:
            self.problems.append(f"{where} does not follow the one before it: a line was changed, removed, added or "
                                 "moved there")
        self.hashes.append(str(entry["sha256"]))
        try:
            self._follow(entry, where)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            self.problems.append(f"{where} lacks a required value ({type(error).__name__}: {error})")
            self.expected = None

    def _follow(self, entry: dict[str, Any], where: str) -> None:
        kind, number = entry["kind"], entry["round"]
        if (kind == "start") != (len(self.hashes) == 1):
            self.problems.append(f"{where}: a trace has one start, in its first line")
        if self.ended and kind != "resume":
            self.problems.append(f"{where} comes after the end of the run")
        self.ended = kind == "end"
        match kind:
            case "start" | "resume":
                self.planned = str(entry["settings"].get("rounds", self.planned))
                self._begin(entry, number, where)
                self.expected, self.models[number] = number, entry["model"]
            case "round":
                self._round(entry, number, where)
                self.expected, self.models[number + 1] = number + 1, entry["after"]
            case "end":
                last = self.expected, self.models.get(self.expected or 0)
                if self.expected is not None and (number, entry["model"]) != last:
                    self.problems.append(f"{where}: the end of the run does not match its last round")
                if entry["stopped"]:
                    self.notes.append(f"the run ended early: {entry['stopped']}")
            case _:
                self.problems.append(f"{where} is of an unknown kind, {kind!r}")

    def _begin(self, entry: dict[str, Any], number: int, where: str) -> None:
        if entry["kind"] == "start":
            if number:
                self.notes.append(f"the trace begins in round {number}; the rounds before are not in it")
            return
        if self.expected is not None and number > self.expected:
            self.problems.append(f"{where}: rounds {self.expected} to {number - 1} were run but are not in the trace")
        elif self.models.get(number, entry["model"]) != entry["model"]:
            self.problems.append(f"{where}: the run went on in round {number} with another model than it had")
        elif self.expected is not None and number < self.expected:
            self.notes.append(f"rounds {number} to {self.expected - 1} were run again after an interruption")
        if entry["cut_bytes"]:
            self.notes.append(f"a line that a crash had cut off was removed before line {entry['line'] + 1}")

    def _round(self, entry: dict[str, Any], number: int, where: str) -> None:
        if self.expected is not None and number != self.expected:
            self.problems.append(f"{where} is round {number}, expected round {self.expected}")
        elif self.expected is not None and entry["before"] != self.models.get(number):
            self.problems.append(f"{where}: round {number} begins with another model than the round before ended with")
        if self.models.get(number + 1, entry["after"]) != entry["after"]:
            self.notes.append(f"round {number} was run again and gave another model: other data, or another machine")

    def compare(self, folder: Path) -> None:
        """Compares the trace with the saved model."""
        try:
            saved = _saved_model(folder)
        except (RunError, OSError, ValueError) as error:
            self.problems.append(f"the saved model cannot be compared: {error}")
            return
        if saved is None:
            self.notes.append(f"{folder} holds no saved model to compare with")
            return
        what, number, found = saved
        number = self.expected if number is None else number
        if number is None or found != self.models.get(number):
            self.problems.append(f"{what} ({found[:12]}…) is not the model that the trace has after {number} rounds "
                                 f"({self.models.get(number or 0, 'none')[:12]}…)")


def model_sha256(params: Tensors, models: Mapping[str, Tensors]) -> str:
    """Hash of the global model, and of the sites' own where they have some."""
    if not models:
        return weights_sha256(params)
    hashes = {name: weights_sha256(model) for name, model in models.items()}
    return hashlib.sha256(_canonical({"params": weights_sha256(params), "models": hashes})).hexdigest()


def _saved_model(folder: Path) -> tuple[str, int | None, str] | None:
    """The name of the model in a run directory, the rounds it has seen (None: all), and its hash."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    if file.is_file():
        try:
            return file.name, None, weights_sha256(load_file(file))
        except SafetensorError as error:
            raise RunError(f"{file} is damaged ({error})") from error
    for place in (folder, folder / "arms" / "federated"):
        state = Checkpoint(place).state() if (place / "run.json").is_file() else None
        if state is not None:
            return f"the checkpoint of round {state.round - 1}", state.round, model_sha256(state.model, state.models)
    return None


def _versions() -> dict[str, str]:
    ours = import_module("fedlab").__version__  # by name: the package imports this module
    return {"fedlab": ours, "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "monai", "opacus")}}


def _data_of(sites: Sequence[Site]) -> dict[str, Any]:
    """Hashes of each site's patients and card."""
    try:
        seen = all(len(site.train) for site in sites)
        partition = Partition.of(sites).id if seen else "not known here"
    except DataError as error:
        partition = f"none: {error}"
    rows: dict[str, dict[str, Any]] = {}
    for site in sites:
        if len(site.train) == 0:  # its patients are not in this process
            rows[site.name] = {"train": None, "held_out": None, "patients_sha256": None, "card_sha256": None}
            continue
        # A folder knows the ids of its patients without reading their scans.
        ids = sorted(id for split in (site.train, site.val) for id in getattr(split, "ids", None) or [
            patient.id for patient in split])
        card = None if site.card is None else getattr(site.card, "to_markdown", site.card.__repr__)()
        rows[site.name] = {
            "train": len(site.train), "held_out": len(site.val),
            "patients_sha256": hashlib.sha256(_canonical(ids)).hexdigest(),
            "card_sha256": None if card is None else hashlib.sha256(str(card).encode()).hexdigest()}
    return {"partition": partition, "sites": rows}


def _complete_lines(path: Path) -> tuple[list[bytes], bytes]:
    """The complete lines, and the rest of a last line that was cut off."""
    *lines, rest = path.read_bytes().split(b"\n")
    return lines, rest


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line as it was written, or None."""
    try:
        entry = json.loads(line)
        return entry if isinstance(entry, dict) and {"sha256", "previous", "kind"} <= entry.keys() else None
    except (ValueError, RecursionError):
        return None


def _hash_of(entry: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical({k: v for k, v in entry.items() if k != "sha256"})).hexdigest()


def _canonical(value: Any) -> bytes:
    """JSON that is the same for the same content."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()
