"""A federated run in its own thread, so that a notebook stays responsive."""

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
from fedlab.core.settings import check_whole
from fedlab.core.types import Round, ServerState, Site
from fedlab.core.weights import load_weights, trainable
from fedlab.evidence.findings import Finding
from fedlab.evidence.membership import RoundMembership
from fedlab.privacy.base import Privacy
from fedlab.run.checkpoint import Checkpoint
from fedlab.run.federate import federate
from fedlab.run.history import History
from fedlab.run.local import Local
from fedlab.training.metrics import evaluate, summary
from fedlab.training.trainer import SiteTrainer

__all__ = ["ENDED", "BackgroundRun", "SiteDice", "State"]

#: "pausing" and "stopping" last until the current round has ended.
State = Literal["ready", "running", "pausing", "paused", "stopping", "stopped", "finished", "failed"]
#: The states in which a run has ended.
ENDED: tuple[State, ...] = ("stopped", "finished", "failed")

_log = logging.getLogger(__name__)


class BackgroundRun:
    """`federate` in a thread: start, watch, pause, run single rounds, stop, wait. `RunDashboard` displays it.

    The weights are bit-equal to those of `federate` with the same arguments, however often the run was paused: it
    pauses between rounds, never within one. It trains a copy of the trainer's model; `wait()` copies the weights into
    the model.

    Only one run at a time: torch has one random number generator per process, and two runs would draw from it in turn.
    For the same reason a network with dropout repeats bit by bit only if nothing else draws from torch's global
    generator while it trains. If an `engine` is given, do not use it elsewhere meanwhile.

    A second call with the same objects while the run is under way, as when its cell is run again, returns the same run.
    After the end, a call makes a new run that begins at the trainer's initial weights, or where its `checkpoint` ends.
    An interrupt of the kernel ends the cell, such as `wait()`, and not the run.

    Args:
        trainer, sites: as in `federate`.
        leakage: an attack on the change of the global model in a round, whose result the dashboard shows; none by
            default. It takes time after the rounds that it attacks, and changes nothing in the run.
        **settings: the other arguments of `federate` by name, except progress; on_round is called in the thread.

    Attributes:
        state: of the run; see `State`.
        history: so far, as `federate` returns it.
        error: why it failed, if it did; `wait()` raises it.
        diagnostics: round -> site -> numbers that techniques left in the state of the site, such as norms before
            clipping, for the rounds of this process. A simulation holds the states of all sites; in a deployment these
            numbers never leave the site.
        leaked: round -> what the attack found.
        durations: round -> seconds of wall time, with validation, attack and checkpoint, for the rounds of this
            process.
        views: the widgets that display this run, by kind.

    Raises:
        TypeError: `federate` has no such argument.
    """

    state: State

    def __new__(cls, trainer: SiteTrainer, sites: Sequence[Site], *, leakage: RoundMembership | None = None,
                **settings: Any) -> BackgroundRun:
        current = cls.under_way()
        same = current is not None and current._same(trainer, sites, settings) and _alike(current.leakage, leakage)
        return current if current is not None and same else super().__new__(cls)

    def __init__(self, trainer: SiteTrainer, sites: Sequence[Site], *, leakage: RoundMembership | None = None,
                 **settings: Any) -> None:
        if hasattr(self, "state"):  # the run under way, which this call repeats
            return
        if "progress" in settings:
            raise TypeError("RunDashboard shows the progress, not a bar: leave progress out")
        signature(federate).bind(trainer, sites, **settings)  # raises where federate has no such argument
        self.trainer, self.sites, self.settings, self.leakage = trainer, tuple(sites), settings, leakage
        self.privacy: Privacy = settings.get("privacy") or Privacy()
        self.engine: Engine = settings.get("engine") or Local()
        self.rounds: int = settings.get("rounds", signature(federate).parameters["rounds"].default)
        self.history = History(rounds=self.rounds, privacy=repr(self.privacy),
                               remarks=list(dict.fromkeys(remark for site in self.sites for remark in site.remarks)))
        self.diagnostics: dict[int, dict[str, dict[str, float]]] = {}
        self.leaked: dict[int, Finding] = {}
        self.durations: dict[int, float] = {}
        self.views: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.state = "ready"
        self._listeners: list[Callable[[], None]] = []
        self._gate = threading.Condition(threading.RLock())
        self._left = 0.0  # rounds that may still begin
        self._begun = 0.0  # the time at which the present round began
        self._thread: threading.Thread | None = None

    @staticmethod
    def under_way() -> BackgroundRun | None:
        """The run that has begun in this process and has not ended, or None."""
        return _current if _current is not None and not _current.ended else None

    @property
    def ended(self) -> bool:
        """Whether it is stopped, finished or failed."""
        return self.state in ENDED

    def start(self) -> BackgroundRun:
        """Begins, or continues after a pause, until the last round.

        Raises:
            RunError: the run has ended, or another one is under way in this process.
        """
        return self._go(math.inf)

    def step(self) -> BackgroundRun:
        """Runs one round and pauses; during a round, pauses after it. Raises as `start` does."""
        return self._go(1)

    def pause(self) -> BackgroundRun:
        """Pauses as soon as the current round has ended."""
        with self._gate:
            if self.state == "running":
                self._left, self.state = 0, "pausing"
        return self._notify()

    def stop(self) -> BackgroundRun:
        """Ends the run as soon as the current round has ended; finished rounds are kept."""
        with self._gate:
            if self.state in ("running", "pausing", "paused"):
                self.state = "stopping"
                self._gate.notify_all()
            elif self.state == "ready":
                self.state = "stopped"
        return self._notify()

    def wait(self, timeout: float | None = None) -> History:
        """Waits until the run has ended or pauses, copies its weights into the trainer's model, returns the history.

        Raises:
            RunError: the run was never started.
            TimeoutError: it is still working after `timeout` seconds; the run continues.
            KeyboardInterrupt: the kernel was interrupted; the run continues.
            BaseException: the error that ended the run.
        """
        if self.state == "ready":
            raise RunError("the run has not been started: call start() or step() first")
        end = math.inf if timeout is None else time.monotonic() + timeout
        with self._gate:
            while self.state not in (*ENDED, "paused"):
                if (left := end - time.monotonic()) <= 0:
                    raise TimeoutError(f"the run is still {self.state} after {timeout:g} s; it continues")
                self._gate.wait(min(left, 0.5))  # short, so that an interrupt is handled on every system
        if self.ended and self._thread is not None:
            self._thread.join()
        if self.history.state is not None:
            load_weights(self.trainer.model, self.trainer.local(self.history.state))
        self._notify()
        if self.error is not None:
            raise self.error
        return self.history

    def on_change(self, call: Callable[[], None]) -> None:
        """Calls `call` after every round and every change of `state`, in the thread in which that happens."""
        self._listeners.append(call)

    def __repr__(self) -> str:
        return f"<BackgroundRun, {self.state}: {self.history!r}>"

    def _same(self, trainer: SiteTrainer, sites: Sequence[Site], settings: dict[str, Any]) -> bool:
        """Whether these arguments make the same run from the same objects."""
        own = [id(part) for part in (self.trainer, self.settings.get("engine"), *self.sites)]
        return (own == [id(part) for part in (trainer, settings.get("engine"), *sites)]
                and self.settings.keys() == settings.keys()
                and all(_alike(value, settings[name]) for name, value in self.settings.items() if name != "engine"))

    def _go(self, rounds: float) -> BackgroundRun:
        global _current
        with _STARTING, self._gate:
            if self.ended:
                raise RunError(f"the run is {self.state}: make a new BackgroundRun, which begins anew or, with the "
                               "same checkpoint=, continues")
            if self.state == "stopping":
                return self
            if self._thread is None:
                if (other := self.under_way()) is not None:
                    raise RunError(f"another run is {other.state} in this process ({len(other.history.records)} of "
                                   f"{other.rounds} rounds finished); stop() it, or wait() for it, before the next "
                                   "one. BackgroundRun.under_way() returns it if its name is lost")
                _current = self
                self._thread = threading.Thread(target=self._run, name="fedlab run", daemon=True,
                                                args=(torch.get_num_threads(),))
                self._left, self.state = rounds, "running"
                self._thread.start()
            elif self.state == "paused" or rounds == math.inf:
                self._left, self.state = rounds, "running"
            else:  # a step during a round: that round is the step
                self._left, self.state = 0, "pausing"
            self._gate.notify_all()
        return self._notify()

    def _notify(self) -> BackgroundRun:
        for call in list(self._listeners):
            try:
                call()
            except Exception:  # a view that fails must not end a run of hours
                _log.exception("a view of the run failed and is no longer notified of changes")
                with suppress(ValueError):  # the other thread may have removed it at the same moment
                    self._listeners.remove(call)
        return self

    def _run(self, threads: int) -> None:
        end: State = "finished"
        try:
            torch.set_num_threads(threads)  # new threads do not inherit this setting everywhere
            self._pass_gate()
            model = copy.deepcopy(self.trainer.model)
            load_weights(model, self.trainer.initial_model())
            self.history = federate(replace(self.trainer, model=model), self.sites, **{
                **self.settings, "engine": self.engine, "on_round": self._between, "progress": False})
        except _Stop:
            end = "stopped"
            self.history.stopped = f"stopped by hand after {len(self.history.records)} of {self.rounds} rounds"
        except BaseException as error:  # raised in `wait`
            end, self.error = "failed", error
        with self._gate:
            self.state = end
            self._gate.notify_all()
        self._notify()

    def _between(self, finished: Round) -> None:
        """After each round, in the thread of the run."""
        if not self.history.records and finished.number > 0 and self.settings.get("checkpoint") is not None:
            # The rounds before a resumed run goes on.
            self.history.records.extend(Checkpoint(Path(self.settings["checkpoint"])).records()[:-1])
        before = self.history.state
        self.history.add(finished)
        self.diagnostics[finished.number] = {  # of the sites that work on this machine
            name: {key: float(value) for key, value in finished.site_states[name].diagnostics.items()
                   if value.dim() == 0} for name in finished.sites if name in finished.site_states}
        calls = self.settings.get("on_round", ())
        for call in calls if isinstance(calls, Sequence) else (calls,):
            call(finished)
        if self.leakage is not None and (finished.number + 1) % self.leakage.every == 0:
            self._attack(self.leakage, before, finished)
        self.durations[finished.number] = time.monotonic() - self._begun
        if finished.number + 1 < self.rounds:
            self._pass_gate()
        else:
            self._notify()

    def _attack(self, attack: RoundMembership, before: ServerState | None, finished: Round) -> None:
        """Attacks the change of the global model in a round, unless the model before it is not known."""
        model = copy.deepcopy(self.trainer.model)
        if before is not None:
            load_weights(model, self.trainer.local(before))
        elif finished.number == 0:
            load_weights(model, self.trainer.initial_model())
        else:  # the first round after a checkpoint
            return
        start = trainable(model)
        moved = {name: after.to(start[name].device) - start[name].detach()
                 for name, after in finished.state.params.items()}
        if not any(bool(t.any()) for t in moved.values()):  # a void round
            return
        try:
            self.leaked[finished.number] = attack(model, moved)
        except Exception:  # nor may this end a run of hours
            _log.exception("the attack on round %d failed; the run continues", finished.number + 1)

    def _pass_gate(self) -> None:
        """Waits until another round may begin."""
        with self._gate:
            if self.state != "stopping" and self._left < 1:
                self.state = "paused"
                self._gate.notify_all()
        self._notify()
        with self._gate:
            while self.state != "stopping" and self._left < 1:
                self._gate.wait()
            if self.state == "stopping":
                raise _Stop
            self._left -= 1
            self._begun = time.monotonic()


_STARTING = threading.Lock()
_current: BackgroundRun | None = None


class _Stop(Exception):
    """Leaves `federate` between two rounds."""


def _alike(one: Any, other: Any) -> bool:
    """Whether two settings are the same object, print as the same code, or are a function defined again unchanged."""
    if one is other:
        return True
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        cells = [[cell.cell_contents for cell in f.__closure__ or ()] for f in (one, other)]
        return (one.__code__ == other.__code__ and one.__defaults__ == other.__defaults__
                and len(cells[0]) == len(cells[1]) and all(a is b for a, b in zip(*cells, strict=True)))
    return type(one) is type(other) and repr(one) == repr(other)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class SiteDice:
    """For `federate(validate=…)`: the mean Dice of each site's held-out patients, as "Dice, <site>", and of all.

    The score of a patient is the mean over WT, TC and ET; a region that the patient lacks scores 1 if none is
    predicted and 0 if one is, as in BraTS. These numbers depend on patients and are outside any guarantee of the run.

    Args:
        sites: their held-out patients are scored; sites without any are left out.
        every: rounds between two measurements, the first after as many rounds.
        patients: the number of patients scored per site, the first ones; None for all.
        precision: as in `fedlab.predict`.
        public: whether the patients are public, such as generated ones; see `fedlab.run.OnPublicPatients`.

    Raises:
        ValueError: no held-out patient, or a number below 1.
    """

    sites: Sequence[Site]
    every: int = 1
    patients: int | None = None
    precision: str = "auto"
    public: bool = False

    def __post_init__(self) -> None:
        check_whole(every=self.every)
        check_whole(optional=True, patients=self.patients)
        if not any(len(site.val) for site in self.sites):
            raise ValueError("no site holds out a patient, so there is no Dice to measure")

    def __call__(self, model: torch.nn.Module, number: int) -> dict[str, float]:
        if (number + 1) % self.every:
            return {}
        scored = [replace(site, val=list(site.val[:self.patients])) for site in self.sites if len(site.val)]
        table = evaluate(model, scored, precision=self.precision)
        parts = {"Dice": table} | {f"Dice, {site}": rows for site, rows in table.groupby("site", sort=False)}
        return {name: float(summary(rows)["dice"]["mean"]) for name, rows in parts.items()}

    def __repr__(self) -> str:
        names = ", ".join(site.name for site in self.sites)
        return (f"SiteDice(sites=<{names}>, every={self.every}, patients={self.patients}, "
                f"precision={self.precision!r}{', public=True' if self.public else ''})")
