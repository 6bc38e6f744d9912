"""A federated run in a thread of its own, so that a notebook stays free to look at it."""

from __future__ import annotations

import copy
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import torch

from fedlab.core.errors import RunError
from fedlab.core.protocols import Engine
from fedlab.core.types import Round, Site
from fedlab.core.weights import load_weights
from fedlab.privacy.base import Privacy
from fedlab.run.checkpoint import Checkpoint
from fedlab.run.federate import federate
from fedlab.run.history import History
from fedlab.run.local import Local
from fedlab.training.metrics import evaluate, summary
from fedlab.training.trainer import SiteTrainer

__all__ = ["BackgroundRun", "SiteDice", "State"]

#: "pausing" and "stopping" last until the round that is being worked on has ended.
State = Literal["ready", "running", "pausing", "paused", "stopping", "stopped", "finished", "failed"]

_ENDED = ("stopped", "finished", "failed")
_log = logging.getLogger(__name__)


class BackgroundRun:
    """`federate` in a thread: start, look, pause, take single rounds, stop, wait. `RunDashboard` shows it.

    The weights are bit-equal to those of `federate` with the same arguments, however often the run was paused: it
    pauses between rounds, never within one. It trains a copy of the trainer's model, so the model may be used
    meanwhile; `wait()` copies the weights into it.

    One run at a time: torch has one random number generator a process, and two runs would draw from it in turn. For
    the same reason a network with dropout repeats bit by bit only if nothing else draws random numbers from torch's
    global generator while it trains. Not to be used meanwhile: the `engine` that is given, if one is.

    Made again with the same objects while it is under way, as when its cell is run again, it is the very same run
    and nothing new begins. After it has ended, a new one begins at the trainer's first weights, or where its
    `checkpoint` ends. An interrupt of the kernel ends what the cell does, such as `wait()`, and not the run. The
    thread ends with its process, whatever it is doing.

    Args:
        trainer, sites: as in `federate`.
        **settings: the other arguments of `federate` by their names, such as strategy, privacy, rounds, validate,
            on_round (called in the thread) and checkpoint; all but progress.

    Attributes:
        history: what has happened so far, as `federate` returns it.
        kept: for each of the rounds that this process has seen, the numbers that techniques left in the state of the
            sites ("diagnostics", such as norms before clipping), by site. A simulation holds all sites' memories; in a
            deployment these numbers never leave the site.
        views: what shows this run, by kind; a second view of one kind is another look at the first.

    Raises:
        TypeError: `federate` has no such argument.
    """

    def __init__(self, trainer: SiteTrainer, sites: Sequence[Site], **settings: Any) -> None:
        made = _Work(trainer, sites, settings)
        current = _under_way()
        self._work = current if current is not None and current.same_as(made) else made

    @property
    def state(self) -> State:
        """What it is doing."""
        return self._work.state

    @property
    def ended(self) -> bool:
        """Whether it is stopped, finished or failed."""
        return self._work.state in _ENDED

    @property
    def history(self) -> History:
        """What has happened so far."""
        return self._work.history

    @property
    def kept(self) -> dict[int, dict[str, dict[str, float]]]:
        """Round -> site -> the numbers it keeps for itself; see the class."""
        return self._work.kept

    @property
    def error(self) -> BaseException | None:
        """Why it failed, if it did; `wait()` raises it."""
        return self._work.error

    @property
    def privacy(self) -> Privacy:
        """The techniques of the run."""
        return self._work.privacy

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites of the run."""
        return self._work.sites

    @property
    def round_seconds(self) -> float:
        """Seconds since the last round ended, or the work began; 0 while nothing is being done."""
        return self._work.seconds()

    @property
    def views(self) -> dict[str, Any]:
        """What shows this run, by kind."""
        return self._work.views

    def start(self) -> BackgroundRun:
        """Begins, or goes on after a pause, until the last round.

        Raises:
            RunError: the run has ended, or another one is under way in this process.
        """
        self._work.go(math.inf)
        return self

    def step(self) -> BackgroundRun:
        """Does one round and pauses; while one is being worked on, pauses after it.

        Raises:
            RunError: as `start`.
        """
        self._work.go(1)
        return self

    def pause(self) -> BackgroundRun:
        """Pauses as soon as the round that is being worked on has ended."""
        self._work.pause()
        return self

    def stop(self) -> BackgroundRun:
        """Ends the run as soon as the round that is being worked on has ended; what is finished stays."""
        self._work.stop()
        return self

    def wait(self, timeout: float | None = None) -> History:
        """Waits until the run has ended or pauses, and copies its weights into the trainer's model.

        Args:
            timeout: seconds to wait at most; None for no limit.

        Returns:
            The history so far.

        Raises:
            RunError: the run was never started.
            TimeoutError: it is still working; the run goes on.
            KeyboardInterrupt: the kernel was interrupted; the run goes on.
            BaseException: whatever made the run fail.
        """
        return self._work.wait(timeout)

    def on_change(self, call: Callable[[], None]) -> None:
        """Calls `call` after every round and every change of `state`, in whichever thread that happens."""
        self._work.listeners.append(call)

    @staticmethod
    def under_way() -> BackgroundRun | None:
        """The run that has begun in this process and hasn't ended, or None."""
        current = _under_way()
        return None if current is None else BackgroundRun(current.trainer, current.sites, **current.settings)

    def __repr__(self) -> str:
        return f"<BackgroundRun, {self.state}: {self.history!r}>"


@dataclass(frozen=True, kw_only=True, repr=False)
class SiteDice:
    """For `federate(validate=…)`: the mean Dice of each site's held-out patients, as "Dice, <site>", and of all.

    A patient counts by the mean over WT, TC and ET; a region that a patient lacks counts 1 if none is predicted and 0
    if one is, as in BraTS. "Dice" is the mean over all patients. These numbers are functions of patients and outside
    any guarantee of the run.

    Args:
        sites: whose held-out patients are taken; sites without any are left out.
        every: rounds between two looks, since each takes time; the first look is after so many rounds.
        patients: of each site at most so many, the first ones; None for all.
        precision: as in `fedlab.predict`.

    Raises:
        ValueError: no held-out patient, or a number below 1.
    """

    sites: tuple[Site, ...]
    every: int = 1
    patients: int | None = None
    precision: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))
        for name, value in (("every", self.every), ("patients", self.patients)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is a positive whole number, got {value}")
        if not any(len(site.val) for site in self.sites):
            raise ValueError("no site holds out a patient, so there is nobody to take the Dice of")

    def __call__(self, model: torch.nn.Module, number: int) -> dict[str, float]:
        if (number + 1) % self.every:
            return {}
        shown = [replace(site, val=list(site.val[:self.patients])) for site in self.sites if len(site.val)]
        table = evaluate(model, shown, precision=self.precision)
        each = {f"Dice, {site.name}": float(summary(table[table["site"] == site.name])["dice"]["mean"])
                for site in shown}
        return {"Dice": float(summary(table)["dice"]["mean"]), **each}

    def __repr__(self) -> str:
        names = ", ".join(site.name for site in self.sites)
        return (f"SiteDice(sites=<{names}>, every={self.every}, patients={self.patients}, "
                f"precision={self.precision!r})")


class _Stop(Exception):
    """Leaves `federate` between two rounds."""


class _Work:
    """One run, its thread and the gate between its rounds; several `BackgroundRun` may stand for it."""

    def __init__(self, trainer: SiteTrainer, sites: Sequence[Site], settings: dict[str, Any]) -> None:
        if "progress" in settings:
            raise TypeError("progress is shown by RunDashboard, not as a bar: leave it out")
        signature(federate).bind(trainer, sites, **settings)  # raises where federate has no such argument
        self.trainer, self.sites, self.settings = trainer, tuple(sites), dict(settings)
        self.privacy: Privacy = settings.get("privacy") or Privacy()
        self.engine: Engine = settings.get("engine") or Local()
        self.rounds: int = settings.get("rounds", signature(federate).parameters["rounds"].default)
        self.history = History(rounds=self.rounds, privacy=repr(self.privacy))
        self.kept: dict[int, dict[str, dict[str, float]]] = {}
        self.views: dict[str, Any] = {}
        self.listeners: list[Callable[[], None]] = []
        self.error: BaseException | None = None
        self.state: State = "ready"
        self._gate = threading.Condition(threading.RLock())
        self._left = 0.0  # rounds that may still begin
        self._since: float | None = None
        self._thread: threading.Thread | None = None

    def same_as(self, other: _Work) -> bool:
        """Whether it would do the same with the same objects."""
        return (self.trainer is other.trainer and len(self.sites) == len(other.sites)
                and all(a is b for a, b in zip(self.sites, other.sites, strict=True))
                and self.settings.get("engine") is other.settings.get("engine")
                and self.settings.keys() == other.settings.keys()
                and all(_alike(value, other.settings[name]) for name, value in self.settings.items()
                        if name != "engine"))

    def seconds(self) -> float:
        since = self._since
        return 0.0 if since is None else time.perf_counter() - since

    def go(self, rounds: float) -> None:
        with _STARTING, self._gate:
            if self.state in _ENDED:
                raise RunError(f"the run is {self.state}: make a new BackgroundRun, which begins anew or, with the "
                               "same checkpoint=, goes on")
            if self.state == "stopping":
                return
            if self._thread is None:
                self._claim()
                self._thread = threading.Thread(target=self._run, name="fedlab run", daemon=True,
                                                args=(torch.get_num_threads(),))
                self._left, self.state = rounds, "running"
                self._thread.start()
            elif self.state == "paused" or rounds == math.inf:
                self._left, self.state = rounds, "running"
            else:  # a step while a round is being worked on: that round is the step
                self._left, self.state = 0, "pausing"
            self._gate.notify_all()
        self.tell()

    def pause(self) -> None:
        with self._gate:
            if self.state == "running":
                self._left, self.state = 0, "pausing"
        self.tell()

    def stop(self) -> None:
        with self._gate:
            if self.state in ("running", "pausing", "paused"):
                self.state = "stopping"
                self._gate.notify_all()
            elif self.state == "ready":
                self.state = "stopped"
        self.tell()

    def wait(self, timeout: float | None) -> History:
        if self.state == "ready":
            raise RunError("the run has not been started: call start() or step() first")
        end = math.inf if timeout is None else time.monotonic() + timeout
        with self._gate:
            while self.state not in (*_ENDED, "paused"):
                if (left := end - time.monotonic()) <= 0:
                    raise TimeoutError(f"the run is still {self.state} after {timeout:g} s; it goes on")
                self._gate.wait(min(left, 0.5))  # short, so that an interrupt gets through on every system
        if self.state in _ENDED and self._thread is not None:
            self._thread.join()
        if self.history.state is not None:
            load_weights(self.trainer.model, self.history.state.params)
        self.tell()
        if self.error is not None:
            raise self.error
        return self.history

    def tell(self) -> None:
        for call in list(self.listeners):
            try:
                call()
            except Exception:  # a view that fails must not end a run of hours
                _log.exception("a view of the run failed and is no longer told of changes")
                with suppress(ValueError):  # the other thread may have found it out at the same moment
                    self.listeners.remove(call)

    def _claim(self) -> None:
        global _current
        if (other := _under_way()) is not None:
            raise RunError(f"another run is {other.state} in this process ({len(other.history.records)} of "
                           f"{other.rounds} rounds finished); stop() it, or wait() for it, before the next one. "
                           "BackgroundRun.under_way() gives it back where its name is lost")
        _current = self

    def _run(self, threads: int) -> None:
        end: State = "finished"
        try:
            torch.set_num_threads(threads)  # a setting that new threads don't inherit everywhere
            self._pass_gate()
            history = federate(_with_own_model(self.trainer), self.sites, **{
                **self.settings, "engine": self.engine, "on_round": self._between, "progress": False})
            self.history = history
        except _Stop:
            end = "stopped"
            done = len(self.history.records)
            self.history.stopped = f"stopped by hand after {done} of {self.rounds} rounds"
        except BaseException as error:  # whatever it is, it belongs to whoever waits
            end, self.error = "failed", error
        with self._gate:
            self.state, self._since = end, None
            self._gate.notify_all()
        self.tell()

    def _between(self, finished: Round) -> None:
        """After each round, in the thread of the run."""
        if not self.history.records and finished.number > 0 and self.settings.get("checkpoint") is not None:
            # The rounds before a resumed run goes on.
            self.history.records.extend(Checkpoint(Path(self.settings["checkpoint"])).records()[:-1])
        self.history.add(finished)
        self.kept[finished.number] = {name: numbers for name in finished.sites
                                      if (numbers := _plain_numbers(finished, name))}
        calls = self.settings.get("on_round", ())
        for call in calls if isinstance(calls, Sequence) else (calls,):
            call(finished)
        if finished.number + 1 < self.rounds:
            self._pass_gate()
        else:
            self.tell()

    def _pass_gate(self) -> None:
        """Waits until another round may begin."""
        with self._gate:
            if self.state != "stopping" and self._left < 1:
                self.state, self._since = "paused", None
                self._gate.notify_all()
        self.tell()
        with self._gate:
            while self.state != "stopping" and self._left < 1:
                self._gate.wait()
            if self.state == "stopping":
                raise _Stop
            self._left -= 1
            self._since = time.perf_counter()


_STARTING = threading.Lock()
_current: _Work | None = None


def _under_way() -> _Work | None:
    return _current if _current is not None and _current.state not in _ENDED else None


def _with_own_model(trainer: SiteTrainer) -> SiteTrainer:
    """The trainer with a copy of its model, and the same first weights."""
    model = copy.deepcopy(trainer.model)
    load_weights(model, trainer.initial())
    return replace(trainer, model=model)


def _alike(one: Any, other: Any) -> bool:
    """The same object; or values that print as the same code; or a function that was defined again word by word."""
    if one is other:
        return True
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        cells = [[cell.cell_contents for cell in f.__closure__ or ()] for f in (one, other)]
        return (one.__code__ == other.__code__ and one.__defaults__ == other.__defaults__
                and len(cells[0]) == len(cells[1]) and all(a is b for a, b in zip(*cells, strict=True)))
    return type(one) is type(other) and repr(one) == repr(other)


def _plain_numbers(finished: Round, site: str) -> dict[str, float]:
    """Single numbers that techniques left in a site's diagnostics, where the site works on this machine."""
    noted = finished.site_states[site].diagnostics if site in finished.site_states else {}
    return {name: float(value) for name, value in noted.items() if value.dim() == 0}
