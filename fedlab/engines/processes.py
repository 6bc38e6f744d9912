"""Sites in worker processes on one machine."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedlab.core.errors import FedlabError, PrivacyBudgetExhausted, RunError, SiteError
from fedlab.core.settings import check_whole
from fedlab.core.types import Answer, Failure, ServerState, Site, SiteState, Update, Withdrawal
from fedlab.core.workers import available_cores
from fedlab.engines.shared_tensors import SharedObject
from fedlab.engines.worker_pool import Pool, Ticket
from fedlab.run.local import answer_of, exchange_here, with_ledger
from fedlab.run.site_states import SiteStates
from fedlab.run.site_task import SiteTask

__all__ = ["Processes"]


class Processes(AbstractContextManager["Processes"]):
    """Sites work in other processes of this machine, several at a time; tensors travel in shared memory.

    **The same bits as `Local`.** Each worker computes with as many torch threads as this process, since sums over
    another number of threads differ in their last bits, and with the same settings of torch. Where torch has a thread
    per core there is one worker. `torch.set_num_threads(1)` before the run gives every core a worker of its own, which
    is faster; set it for the run that you compare with, too.

    **Memory.** At most as many updates as there are workers wait for the server: a slow site holds the others up.
    Patients in the memory of this process are copied into shared memory once; those of a `PatientFolder` are read by
    the worker that needs them. What a site keeps lies on disk while it is not at work.

    **When a worker dies**, or is killed because memory ran out, its site has failed, its state is as it was before the
    round, and another worker takes over; with `Admission` rules the run continues. The workers end with a `with` block,
    with `close()`, with the engine, with Ctrl-C and with this process.

    Techniques, strategies and models may be defined in a notebook cell or in the script that runs, which the workers
    do not import. Workers import modules once: `close()` the engine after changing one.

    Args:
        workers: number of workers; by default one per GPU of `devices`, else as many as there are cores for `threads`.
        threads: torch threads of each worker; by default those of this process, without which results differ from
            `Local`'s in their last bits.
        devices: GPUs that the workers use in turn, such as ("cuda:0", "cuda:1"), with the trainer's device left at
            "auto"; or ("cpu",) for none. By default all workers compute on the trainer's device.
        ledgers: as in `Local`; read and written by this process.

    Raises:
        ValueError: a setting out of its range.
        FedlabError: this system has no anonymous shared memory.
    """

    def __init__(self, workers: int | None = None, *, threads: int | None = None, devices: Sequence[str] = (),
                 ledgers: Path | str | None = None) -> None:
        check_whole(optional=True, workers=workers, threads=threads)
        if isinstance(devices, str):
            raise ValueError(f"devices are several names, such as ({devices!r},); got the text {devices!r}")
        if not hasattr(os, "memfd_create"):
            raise FedlabError("Processes needs shared memory that only Linux has; use engine=Local() here")
        self.workers, self.threads, self.devices = workers, threads, tuple(devices)
        self.ledgers = None if ledgers is None else Path(ledgers)
        self._pool = Pool(visible=_visible(self.devices))
        self._end = weakref.finalize(self, Pool.close, self._pool)  # with the engine, and when Python ends

    def train(self, task: SiteTask, state: ServerState, cohort: Sequence[Site], states: SiteStates) -> Iterator[Answer]:
        """The answer of each site, in the order of the cohort.

        Raises:
            ValueError: a part of the task or of a site cannot be sent to another process, or the workers do not have
                the trainer's device.
            FedlabError: no worker could be started, or a worker cannot read the task.
        """
        self._check_device(task)
        threads = self.threads or torch.get_num_threads()
        count = self._count(threads)
        self._pool.prepare(task, workers=min(count, len(cohort)), settings=_settings(threads))
        shared = None if state.models else SharedObject.of(state)
        left = iter(cohort)
        begun: deque[_Begun] = deque()
        try:
            while True:
                self._fill(begun, left, state, states, shared, count)
                if not begun:
                    return
                self._pool.wait_for(begun[0].ticket)
                first = begun.popleft()
                self._fill(begun, left, state, states, shared, count)  # the workers go on while the server combines
                yield self._finish(first, state.round)
        except GeneratorExit:
            raise
        except BaseException:
            self._pool.close()
            raise
        finally:
            for site in begun:
                self._pool.give_up(site.ticket)
                with suppress(RunError), site.held:
                    raise RunError("its update is no longer needed")  # so its state stays as it was

    exchange = staticmethod(exchange_here)  # the sites' keys are in this process

    def close(self) -> None:
        """Ends the workers; the next round starts new ones."""
        self._pool.close()

    def _fill(self, begun: deque[_Begun], left: Iterator[Site], state: ServerState, states: SiteStates,
              shared: SharedObject | None, count: int) -> None:
        """Gives sites to workers until as many have begun as there are workers."""
        while len(begun) < count and (site := next(left, None)) is not None:
            held, ticket = ExitStack(), Ticket()
            site_state = held.enter_context(states.working(site.name))
            begun.append(_Begun(site.name, ticket, held, site_state))
            try:
                held.enter_context(with_ledger(self.ledgers, site.name, site_state, engine="Processes"))
            except FedlabError as error:
                ticket.answer = Failure(site.name, error)
                continue
            self._pool.submit(ticket, site, shared or SharedObject.of(state.at(site.name)), SharedObject.of(site_state))

    def _finish(self, begun: _Begun, round: int) -> Answer:
        """A site's answer, with its state and its ledger up to date."""
        answer, begun.ticket.answer = begun.ticket.answer, None  # held in one place only
        if begun.ticket.site_state is not None:
            begun.site_state.take_over(begun.ticket.site_state)
        if answer is None:
            answer = Failure(begun.site, SiteError(begun.site, round, "reach", begun.ticket.lost))

        def hand_on() -> Update:
            with begun.held:  # saved before the update is handed on, and only if there is one
                match answer:
                    case Failure():
                        raise answer.error
                    case Withdrawal():
                        raise PrivacyBudgetExhausted(answer.reason)
                return answer

        return answer_of(begun.site, hand_on)

    def _count(self, threads: int) -> int:
        if self.workers is not None:
            return self.workers
        gpus = [device for device in self.devices if device != "cpu"]
        return len(gpus) or max(1, available_cores() // threads)

    def _check_device(self, task: SiteTask) -> None:
        wanted = task.trainer.device
        if self.devices and wanted != "auto" and wanted not in {torch.device(name).type for name in self.devices}:
            raise ValueError(f"the trainer needs device={wanted!r}, the workers have {self.devices}; say "
                             "SiteTrainer(device='auto', ...), or leave devices out")

    def __exit__(self, *details: object) -> None:
        self.close()

    def __repr__(self) -> str:
        shown = {"workers": self.workers, "threads": self.threads, "devices": self.devices or None,
                 "ledgers": None if self.ledgers is None else str(self.ledgers)}
        return f"Processes({', '.join(f'{name}={value!r}' for name, value in shown.items() if value is not None)})"


class _Begun(NamedTuple):
    """A site at work, or done and waiting for its turn."""

    site: str
    ticket: Ticket
    held: ExitStack
    site_state: SiteState


def _settings(threads: int) -> dict[str, Any]:
    """The settings of this process that decide about the last bits of a sum."""
    cudnn = {name: getattr(torch.backends.cudnn, name) for name in ("deterministic", "benchmark", "allow_tf32")}
    return {"threads": threads, "dtype": torch.get_default_dtype(), "cudnn": cudnn,
            "matmul": torch.get_float32_matmul_precision(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "warn_only": torch.is_deterministic_algorithms_warn_only_enabled()}


def _visible(devices: Sequence[str]) -> list[str | None]:
    """For each device the worker's CUDA_VISIBLE_DEVICES; None leaves it as it is."""
    if not devices:
        return [None]
    found: list[str | None] = []
    kinds = set()
    for name in devices:
        try:
            device = torch.device(name)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{name!r} is no device; devices are 'cpu' or GPUs such as 'cuda:0'") from error
        kinds.add(device.type)
        if device.type == "cpu":
            found.append("")
        elif device.type == "cuda" and device.index is not None:
            shown = os.environ.get("CUDA_VISIBLE_DEVICES")
            numbers = [str(k) for k in range(torch.cuda.device_count())] if shown is None else shown.split(",")
            if device.index >= min(len(numbers), torch.cuda.device_count()):
                raise ValueError(f"there is no {name}: this process sees {torch.cuda.device_count()} GPUs; devices=() "
                                 "computes where the trainer says")
            found.append(numbers[device.index])
        else:
            raise ValueError(f"{name!r} names no single device; devices are 'cpu' or GPUs such as 'cuda:0'")
    if len(kinds) > 1:
        raise ValueError(f"CPU and GPU give different bits, so an update would depend on which worker was free; name "
                         f"one kind of device, got {tuple(devices)}")
    return found
