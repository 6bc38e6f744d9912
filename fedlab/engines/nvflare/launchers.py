"""NVFLARE's job launchers in a rehearsal: a party's first job goes to a process that was forked beforehand.

NVFLARE imports this module by its name, as `local/resources.json` in a kit says.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import threading
from contextlib import suppress
from typing import Any

from nvflare.apis.fl_constant import FLContextKey, JobConstants
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.app_common.job_launcher.process_launcher import ProcessHandle
from nvflare.app_common.job_launcher.server_process_launcher import ServerProcessJobLauncher
from nvflare.utils.job_launcher_utils import get_credential_env

__all__ = ["ServerLauncher", "SiteLauncher", "keep_spare"]

#: The process that waits for this party's first job, and the line to it.
_spare: tuple[int, socket.socket] | None = None


def keep_spare() -> list[str] | None:
    """Forks a process that waits for the first job of this party, and ends with it.

    Returns:
        None in this process. In the other one, once there is a job: the module that it runs and the arguments.

    Raises:
        RuntimeError: this process has threads, which the other one would lack.
    """
    global _spare
    if threading.active_count() > 1:
        raise RuntimeError("a process that has threads is not forked")
    here, there = socket.socketpair()
    if pid := os.fork():
        there.close()
        _spare = pid, here
        return None
    here.close()
    with there, there.makefile(encoding="utf-8") as line:
        order = line.readline()
    if not order.endswith("\n"):
        os._exit(0)  # the party has ended
    os.setsid()  # NVFLARE ends a job as a process group
    program, variables = json.loads(order)
    os.environ.clear()
    os.environ.update(variables)
    return list(program)


def _given_to_spare(launcher: Any, job: dict[str, Any], context: Any) -> ProcessHandle | None:
    """Gives a job, with all that NVFLARE's own launcher would pass on, to the spare process; None if there is none."""
    global _spare
    spare, _spare = _spare, None
    _, option, *program = shlex.split(launcher.get_command(job, context))
    code = context.get_prop(FLContextKey.WORKSPACE_OBJECT).get_app_custom_dir(job.get(JobConstants.JOB_ID))
    if spare is None or os.path.exists(code) or option != "-m":
        return None
    secrets = get_credential_env(context.get_prop(FLContextKey.JOB_PROCESS_ARGS) or {})
    pid, line = spare
    with line, suppress(BrokenPipeError):
        line.sendall(json.dumps([program, {**os.environ, **secrets}]).encode() + b"\n")
        return ProcessHandle(pid=pid)
    return None


class SiteLauncher(ClientProcessJobLauncher):  # type: ignore[misc]
    """Of a site."""

    def launch_job(self, job_meta: dict[str, Any], fl_ctx: Any) -> Any:
        return _given_to_spare(self, job_meta, fl_ctx) or super().launch_job(job_meta, fl_ctx)


class ServerLauncher(ServerProcessJobLauncher):  # type: ignore[misc]
    """Of the server."""

    def launch_job(self, job_meta: dict[str, Any], fl_ctx: Any) -> Any:
        return _given_to_spare(self, job_meta, fl_ctx) or super().launch_job(job_meta, fl_ctx)
