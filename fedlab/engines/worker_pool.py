"""The workers of `Processes`: how they are started, given work, replaced and ended."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import traceback
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch

from fedlab.core.errors import FedlabError, RunError, SiteError
from fedlab.core.types import Answer, Failure, Site, SiteState
from fedlab.core.workers import forkserver, script_not_imported, settle
from fedlab.engines.shared_tensors import SharedObject
from fedlab.run.local import answer_of
from fedlab.run.recipe import versions
from fedlab.run.site_task import SiteTask

__all__ = ["Pool", "Ticket"]

#: Seconds that an idle worker gets to end by itself.
_PATIENCE = 5.0
_POOLS: weakref.WeakSet[Pool] = weakref.WeakSet()


@dataclass(eq=False, kw_only=True)
class Ticket:
    """A site's work in a round, and its result.

    Attributes:
        answer: the result, once there is one.
        site_state: of the site afterwards; None where it has not changed.
        lost: why there is no result.
    """

    answer: Answer | None = None
    site_state: SiteState | None = None
    lost: str = ""


@dataclass(eq=False, kw_only=True)
class _Worker:
    """A worker process, as its parent sees it."""

    process: BaseProcess
    connection: Connection
    place: int
    ready: bool = False
    ticket: Ticket | None = None
    sites: weakref.WeakSet[Site] = field(default_factory=weakref.WeakSet)  # that it has read

    def end(self, *, patience: float) -> int | None:
        """Ends the process, after some seconds of patience; returns its exit code."""
        self.connection.close()
        if patience:
            self.process.join(patience)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        self.process.close()
        return code


class _Packed(NamedTuple):
    """A task or a site, ready to be sent to any worker.

    Attributes:
        number: by which workers that have read it know it.
        patients: of a site, with the versions of their tensors; they stay alive, so that none is taken for another.
    """

    number: int
    shared: SharedObject
    patients: list[tuple[Any, Any]]


class _AtWorker(Exception):
    """The text of an exception in a worker process, chained to the one raised in the parent."""

    def __str__(self) -> str:
        return f"in a worker process:\n{self.args[0]}"


class Pool:
    """Worker processes, started when there is work for them and replaced when they die.

    Args:
        visible: CUDA_VISIBLE_DEVICES of the workers, in turn; None: that of their parent.
    """

    def __init__(self, *, visible: Sequence[str | None]) -> None:
        self._visible = visible
        self._workers: list[_Worker] = []
        self._wanted = 0
        self._settings: Mapping[str, Any] = {}
        self._numbers = itertools.count()
        self._task: tuple[SiteTask, _Packed] | None = None
        self._sites: weakref.WeakKeyDictionary[Site, _Packed] = weakref.WeakKeyDictionary()
        self._owner = os.getpid()
        _POOLS.add(self)

    def prepare(self, task: SiteTask, *, workers: int, settings: Mapping[str, Any]) -> None:
        """Before the sites of a round: sets their task and starts enough workers."""
        if self._task is None or self._task[0] is not task:
            shared = _shared(task, "the trainer, strategy or technique")
            self._task = task, _Packed(next(self._numbers), shared, [])
        self._settings, self._wanted = settings, workers
        if not self._workers and any(pool._workers for pool in _POOLS if pool is not self):
            gc.collect()  # ends engines that only an exception's traceback still held
        self._grow()

    def submit(self, ticket: Ticket, site: Site, state: SharedObject, site_state: SharedObject) -> None:
        """Gives a site to a worker, as soon as one is free."""
        packed = self._packed(site)
        for _ in range(3):
            worker = self._idle(site)
            try:
                self._send(worker, packed, state, site_state)
            except OSError:
                self._drop(worker)  # it died while it was idle
            else:
                worker.ticket = ticket
                worker.sites.add(site)
                return
        raise RunError(f"three workers in turn died before they could begin with {site.name}; if this machine is out "
                       "of memory, take fewer of them: Processes(workers=1)")

    def wait_for(self, ticket: Ticket) -> None:
        """Waits until a site's work has a result, or its worker is lost."""
        while ticket.answer is None and not ticket.lost:
            self._listen()

    def give_up(self, ticket: Ticket) -> None:
        """Ends the worker that is at work on a ticket, if there is one."""
        for worker in [worker for worker in self._workers if worker.ticket is ticket]:
            self._drop(worker)

    def close(self) -> None:
        """Ends all workers."""
        if os.getpid() != self._owner:
            return  # in a fork of the process that owns them
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.connection.close()  # all of them end at once
        for worker in workers:
            if worker.ticket is not None:
                worker.ticket.lost = "the workers were ended while it trained"
            worker.end(patience=0 if worker.ticket else _PATIENCE)
        self._task = None
        self._sites.clear()

    def _grow(self) -> None:
        context = forkserver()
        while len(self._workers) < self._wanted:
            place = min(set(range(self._wanted)) - {worker.place for worker in self._workers})
            connection, for_worker = context.Pipe()
            process = context.Process(target=_serve, args=(for_worker, self._visible[place % len(self._visible)]),
                                      name=f"fedlab-site-worker-{place}", daemon=True)
            with script_not_imported():
                process.start()
            for_worker.close()
            self._workers.append(_Worker(process=process, connection=connection, place=place))

    def _packed(self, site: Site) -> _Packed:
        """The site as it is sent; packed again if its patients have changed."""
        patients = [(patient, versions(patient)) for split in (site.train, site.val) if isinstance(split, list | tuple)
                    for patient in split]
        packed = self._sites.get(site)
        if packed is None or [(id(p), v) for p, v in packed.patients] != [(id(p), v) for p, v in patients]:
            shared = _shared(site, f"the patients of {site.name}")
            packed = self._sites[site] = _Packed(next(self._numbers), shared, patients)
        return packed

    def _idle(self, site: Site) -> _Worker:
        """Waits for an idle worker; preferably one that has read the site."""
        while True:
            idle = [worker for worker in self._workers if worker.ready and worker.ticket is None]
            for worker in idle:
                if worker.connection.poll() or not worker.process.is_alive():  # an idle worker only reports its end
                    self._drop(worker)
            alive = [worker for worker in idle if worker in self._workers]
            if alive:
                return max(alive, key=lambda worker: site in worker.sites)
            self._grow()
            self._listen()

    def _send(self, worker: _Worker, site: _Packed, state: SharedObject, site_state: SharedObject) -> None:
        if self._task is None:
            raise RunError("the workers were ended in the middle of a round; close() the engine between rounds")
        task = self._task[1]
        current = {task.number, *(packed.number for packed in self._sites.values())}  # a worker forgets the others
        worker.connection.send((task.number, site.number, current, self._settings))
        for shared in (task.shared, site.shared, state, site_state):
            shared.send(worker.connection)

    def _listen(self) -> None:
        """Waits until a worker sends a message or dies."""
        sources: dict[Any, _Worker] = {}
        for worker in self._workers:
            if not worker.ready or worker.ticket is not None:
                sources |= {worker.connection: worker, worker.process.sentinel: worker}
        if not sources:
            raise RunError("the workers were ended in the middle of a round; close() the engine between rounds")
        for source in wait(list(sources)):
            worker = sources[source]
            if worker in self._workers:
                try:
                    heard = worker.connection.poll() and self._hear(worker)
                except (EOFError, OSError):
                    heard = False
                if not heard:
                    self._drop(worker)

    def _hear(self, worker: _Worker) -> bool:
        if not worker.ready:
            worker.ready = worker.connection.recv_bytes() == b"ready"
            return worker.ready
        answer, text, site_state = SharedObject.receive(worker.connection).open()
        ticket, worker.ticket = worker.ticket, None
        if answer is None:
            raise FedlabError("a worker process cannot read what it was sent; it must find the same modules as this "
                              "process (close() the engine after changing one), or say engine=Local()"
                              ) from _AtWorker(text)
        if isinstance(answer, Failure):
            answer.error.__cause__ = _AtWorker(text)
        if ticket is not None:
            ticket.answer, ticket.site_state = answer, site_state
        return True

    def _drop(self, worker: _Worker) -> None:
        """Removes a worker that is dead or no longer needed."""
        self._workers.remove(worker)
        killed = worker.process.is_alive()
        code = worker.end(patience=0)
        if worker.ticket is not None:
            worker.ticket.lost = _why(code)
        elif not worker.ready and not killed:
            raise RunError(f"a worker process ended before it could begin (exit code {code}); see its own error "
                           "output, or say engine=Local()")


def _why(code: int | None) -> str:
    if code == -signal.SIGKILL:
        reason = ("was killed (SIGKILL), as systems do when memory runs out: take fewer workers, smaller batches or "
                  "smaller crops")
    elif code is not None and code < 0:
        reason = f"crashed ({signal.Signals(-code).name}); engine=Local() shows where"
    else:
        reason = f"ended itself (exit code {code}); look for sys.exit() or os._exit() in what runs at the site"
    return f"its worker process {reason}. Its state is as it was before the round"


def _shared(value: Any, what: str) -> SharedObject:
    try:
        return SharedObject.of(value)
    except Exception as error:  # whatever the user's objects raise
        raise ValueError(f"{what} cannot be sent to a worker process ({type(error).__name__}: {error}); keep open "
                         "files, locks and generators out of it, or say engine=Local()") from error


def _serve(connection: Connection, visible: str | None) -> None:
    """The main function of a worker."""
    settle()
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible  # before anything asks for a GPU
    known: dict[int, Any] = {}
    try:
        connection.send_bytes(b"ready")
        while True:
            _serve_one(connection, known)
    except (EOFError, OSError):
        return  # the parent has closed the connection, or has ended


def _serve_one(connection: Connection, known: dict[int, Any]) -> None:
    """Receives an order; sends the site's answer, the text of an exception, and the site's state."""
    task_number, site_number, current, settings = connection.recv()
    received = [SharedObject.receive(connection) for _ in range(4)]
    try:
        for number in known.keys() - current:
            del known[number]
        for number, shared in zip((task_number, site_number), received, strict=False):
            if number not in known:
                known[number] = shared.open()
        task, site = known[task_number], known[site_number]
        state, site_state = (shared.open() for shared in received[2:])
    except Exception as error:  # of the user's own modules
        SharedObject.of((None, "".join(traceback.format_exception(error)), None)).send(connection)
        return
    _compute_as(settings)
    answer, text = answer_of(site.name, lambda: task(site, state, site_state)), ""
    if isinstance(answer, Failure):
        text = "".join(traceback.format_exception(answer.error))
        answer = Failure(site.name, _of_fedlab(answer.error))
    try:
        sent = SharedObject.of((answer, text, site_state))
    except Exception as error:  # of a technique that keeps or sends what cannot be pickled
        text = "".join(traceback.format_exception(error))
        reason = f"what the site sends or keeps cannot leave its process ({type(error).__name__}: {error})"
        sent = SharedObject.of((Failure(site.name, SiteError(site.name, state.round, "remember", reason)), text, None))
    sent.send(connection)


def _of_fedlab(error: FedlabError) -> FedlabError:
    """The error as one of fedlab's own types, which the parent has."""
    kind = next(kind for kind in type(error).__mro__ if kind.__module__.partition(".")[0] == "fedlab")
    if kind is type(error):
        return error
    plain = SiteError(error.site, error.round, error.stage, error.reason) if isinstance(error, SiteError) else \
        kind(str(error))
    plain.stage, plain.told = error.stage, error.told
    return plain


def _compute_as(settings: Mapping[str, Any]) -> None:
    """Sets torch as in the parent, so that results have the same bits."""
    torch.set_num_threads(settings["threads"])
    torch.set_default_dtype(settings["dtype"])
    torch.set_float32_matmul_precision(settings["matmul"])
    wanted = settings["deterministic"], settings["warn_only"]
    if wanted != (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()):
        torch.use_deterministic_algorithms(wanted[0], warn_only=wanted[1])  # imports for seconds
    for name, value in settings["cudnn"].items():
        setattr(torch.backends.cudnn, name, value)
