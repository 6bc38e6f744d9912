"""Server and sites of a rehearsal on this machine, forked from one process that has imported everything.

Importing torch, MONAI and NVFLARE takes seconds of processor time, which each party and each job would spend again. As
elsewhere every party is a process with a kit and a certificate of its own, and so is every job of a party.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, cast

from fedlab.core.errors import RunError
from fedlab.engines.nvflare.kits import FORKED, VARIABLES, begin, hurry, program_of, stop

__all__ = ["parties"]

#: The programs of a party and its jobs, and what they import later.
_IMPORTED = (
    "fedlab.core.warm_imports", "opacus",
    "nvflare.private.fed.app.server.server_train", "nvflare.private.fed.app.server.runner_process",
    "nvflare.private.fed.app.client.client_train", "nvflare.private.fed.app.client.worker_process",
    "nvflare.fuel.f3.drivers.aio_grpc_driver", "nvflare.fuel.f3.drivers.aio_http_driver", "nvflare.app_opt.pt",
    "nvflare.app_common.executors.client_api_executor", "nvflare.collab.runtime.controller",
    "nvflare.collab.runtime.executor", "fedlab.engines.nvflare.launchers", "fedlab.engines.nvflare.server_part",
    "fedlab.engines.nvflare.site_part")
#: Seconds that the processes have to end.
_WITHIN = 10.0


@contextlib.contextmanager
def parties(folder: Path, environment: Mapping[str, str]) -> Iterator[Callable[..., int]]:
    """Yields a function that starts the server or site of a kit, as `kits.begin` does, and returns its process id.

    Its arguments are the kit and, as there, the site's own folder. All of them end with the block, or with this
    process. Where the system is not Linux, forking is not safe, and they are programs of their own.

    Args:
        folder: for the log of the process that the others are forked from.
        environment: variables of all of them, beyond those of this process.
    """
    if sys.platform != "linux":
        begun: list[Path] = []

        def start(kit: Path, site: Path | None = None) -> int:
            begun.append(kit)
            return begin(kit, site=site, environment=dict(environment))

        try:
            yield start
        finally:
            for kit in reversed(begun):
                stop(kit)
        return

    with (folder / "processes.log").open("ab") as log:
        source = subprocess.Popen([sys.executable, "-u", "-m", FORKED, str(folder)], stdin=subprocess.PIPE, text=True,
                                  stdout=subprocess.PIPE, stderr=log, start_new_session=True,
                                  env={**os.environ, **VARIABLES, **environment})
    orders, replies = cast("IO[str]", source.stdin), cast("IO[str]", source.stdout)  # pipes, as asked for above
    try:
        yield partial(_fork, orders, replies, Path(log.name))
    finally:
        with contextlib.suppress(BrokenPipeError):
            orders.close()
        source.wait()
        replies.close()


def _fork(orders: IO[str], replies: IO[str], log: Path, kit: Path, site: Path | None = None) -> int:
    """Has the server or site of a kit forked, and returns its process id."""
    program = program_of(kit, site=site)
    hurry(kit)
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps([str(kit.resolve()), program]), file=orders, flush=True)
        if reply := replies.readline():
            return int(reply)
    raise RunError(f"the processes could not be started; {log} says why")


def _serve() -> list[str] | None:
    """Forks a party for each line of standard input and replies with its process id; at the end it ends all of them.

    Returns:
        In a forked process, the module that it runs and the arguments; None in this one.
    """
    from fedlab.engines.nvflare.launchers import become_subreaper

    if threading.active_count() > 1:
        raise RuntimeError("a process that has threads is not forked")
    become_subreaper()  # a job whose party was killed is found here
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that have ended leave nothing behind
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        source = os.getpid()
        for line in sys.stdin:
            if pid := os.fork():
                print(pid, file=replies, flush=True)
                continue
            replies.close()
            kit, program = json.loads(line)
            _settle(Path(kit), source)
            return list(program)
    _end_all()
    return None


def _settle(kit: Path, source: int) -> None:
    """Makes a forked process a party: in its kit's folder, with a log there, ending with the process it is from."""
    import numpy as np

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: sent to this process when its parent ends
    if os.getppid() != source:
        os._exit(1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.chdir(kit)
    with open(os.devnull, "rb") as nothing, open("console.log", "ab") as log:
        for old, new in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(old.fileno(), new)
    np.random.seed()  # else all forked processes would draw the same numbers; Python's own generator is seeded anew


def _end_all() -> None:
    import psutil

    left = psutil.Process().children(recursive=True)
    for how in ("terminate", "kill"):
        for process in left:
            with contextlib.suppress(psutil.Error):
                getattr(process, how)()
        left = [*psutil.wait_procs(left, timeout=_WITHIN)[1], *psutil.Process().children(recursive=True)]


def main() -> None:
    """Imports everything, then becomes what it is told."""
    for module in _IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # the collector would write to memory that forked processes share
    program = _serve()
    if program is None:
        return
    from fedlab.engines.nvflare.launchers import keep_source

    module, *arguments = keep_source() or program
    sys.argv[1:] = arguments
    sys.modules.pop(module, None)  # run anew as the main module
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
