"""NVFLARE's job launchers in a rehearsal: the jobs of a party are forked from a process that it keeps for this.

NVFLARE imports this module by its name, as `local/resources.json` in a kit says.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from nvflare.apis.fl_constant import FLContextKey, JobConstants
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.app_common.job_launcher.process_launcher import ProcessHandle
from nvflare.app_common.job_launcher.server_process_launcher import ServerProcessJobLauncher
from nvflare.utils.job_launcher_utils import get_credential_env

__all__ = ["ServerLauncher", "SiteLauncher", "become_subreaper", "keep_source"]

#: The line to the process that this party's jobs are forked from.
_line: socket.socket | None = None
_one_at_a_time = threading.Lock()


def become_subreaper() -> None:
    """Makes orphans among the descendants of this process its children. Linux only."""
    ctypes.CDLL(None).prctl(36, 1)


def keep_source() -> list[str] | None:
    """Forks a process from which the jobs of this party are forked, and which ends with it.

    A party that runs has threads, so nothing can be forked from itself. The jobs become its children all the same.

    Returns:
        None in this process. In the process of a job, the module that it runs and the arguments.

    Raises:
        RuntimeError: this process has threads, which the other one would lack.
    """
    global _line
    if threading.active_count() > 1:
        raise RuntimeError("a process that has threads is not forked")
    become_subreaper()
    here, there = socket.socketpair()
    if os.fork():
        there.close()
        _line = here
        return None
    here.close()
    with there, there.makefile(encoding="utf-8") as orders:
        while (order := orders.readline()).endswith("\n"):
            if os.fork():
                os.wait()
                continue
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:  # until it is an orphan, and with that the party's child
                time.sleep(0.001)
            there.sendall(b"%d\n" % os.getpid())
            break
        else:
            os._exit(0)  # the party has ended
    os.setsid()  # NVFLARE ends a job as a process group
    program, variables = json.loads(order)
    os.environ.clear()
    os.environ.update(variables)
    return list(program)


def _forked(launcher: Any, job: dict[str, Any], context: Any) -> ProcessHandle | None:
    """The process of a job, with all that NVFLARE's own launcher would pass on; None if it cannot be forked."""
    _, option, *program = shlex.split(launcher.get_command(job, context))
    code = context.get_prop(FLContextKey.WORKSPACE_OBJECT).get_app_custom_dir(job.get(JobConstants.JOB_ID))
    if _line is None or os.path.exists(code) or option != "-m":
        return None
    secrets = get_credential_env(context.get_prop(FLContextKey.JOB_PROCESS_ARGS) or {})
    with _one_at_a_time, suppress(OSError), _line.makefile(encoding="utf-8") as replies:
        _line.sendall(json.dumps([program, {**os.environ, **secrets}]).encode() + b"\n")
        if reply := replies.readline():
            return ProcessHandle(pid=int(reply))
    return None


class SiteLauncher(ClientProcessJobLauncher):  # type: ignore[misc]
    """Of a site."""

    def launch_job(self, job_meta: dict[str, Any], fl_ctx: Any) -> Any:
        return _forked(self, job_meta, fl_ctx) or super().launch_job(job_meta, fl_ctx)


class ServerLauncher(ServerProcessJobLauncher):  # type: ignore[misc]
    """Of the server."""

    def launch_job(self, job_meta: dict[str, Any], fl_ctx: Any) -> Any:
        return _forked(self, job_meta, fl_ctx) or super().launch_job(job_meta, fl_ctx)
