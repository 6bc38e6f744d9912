"""Server and sites as processes of this machine: started from their kits, looked at, and ended with all they began."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fedlab.core.errors import RunError
from fedlab.engines.nvflare.kits import link_site, settle
from fedlab.engines.nvflare.requirement import need_nvflare

__all__ = ["begin", "end_with_children", "free_port", "kind_of", "running", "stop"]

_NOTE = "process.json"


def kind_of(kit: Path) -> str:
    """"server" or "client", as NVFLARE calls them.

    Raises:
        RunError: no kit of either.
    """
    for kind in ("server", "client"):
        if (kit / "startup" / f"fed_{kind}.json").is_file():
            return kind
    raise RunError(f"{kit} is no startup kit of a server or a site; fedlab deploy init makes them, in its folder kits")


def begin(kit: Path, *, site: Path | None = None, environment: dict[str, str] | None = None) -> int:
    """Starts the server or site of a kit in the background and returns its process id.

    What it says goes to `console.log` in the kit, its log to `log.txt`. It runs until `stop`; nothing starts it again
    after a crash or a restart of the machine: have that done by what does it for other services, such as systemd, with
    the kit's own startup/start.sh.

    Args:
        kit: of the server or a site.
        site: the site's own folder, from `fedlab site init`; noted in the kit.
        environment: variables beyond those of this process.

    Raises:
        RunError: it runs already, the kit is none, or a site's kit doesn't say where the site's folder is.
    """
    need_nvflare()
    kind, kit = kind_of(kit), kit.resolve()
    if running(kit):
        raise RunError(f"{kit.name} runs already, as process {running(kit)[0].pid}")
    if site is not None:
        link_site(kit, site)
    settle(kit)
    extra = [f"uid={_name(kit)}"] if kind == "client" else []
    (kit / "transfer").mkdir(exist_ok=True)
    with (kit / "console.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", f"nvflare.private.fed.app.{kind}.{kind}_train", "-m", str(kit),
             "-s", f"fed_{kind}.json", "--set", "secure_train=true", "config_folder=config", f"org={_org(kit)}",
             *extra],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            # A job that is over waits this long for word from sites that are gone.
            env={**os.environ, "NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "30", **(environment or {})})
    note = {"pid": process.pid, "born": _born(process.pid)}
    (kit / _NOTE).write_text(json.dumps(note), encoding="utf-8")
    return process.pid


def running(kit: Path) -> list[Any]:
    """The kit's processes, as psutil shows them: what was started, and the jobs that it has begun.

    A job's process that has lost its parent is found too, by its command line.
    """
    import psutil

    found: dict[int, Any] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            said = process.cmdline()
            mine = any(part == str(kit.resolve()) for part in said) and any("nvflare." in part for part in said)
            watchdog = any(part.startswith(str(kit.resolve() / "startup")) and part.endswith("start.sh")
                           for part in said)
            if (mine or watchdog) and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process
    first = _noted(kit)
    return sorted(found.values(), key=lambda process: (process.pid != first, process.pid))


def stop(kit: Path, *, within: float = 15.0) -> int:
    """Ends the kit's processes and returns how many there were. What a site was at work on is lost, its ledger isn't.

    A watchdog that NVFLARE's start.sh has left goes first, or it would start the others again.

    Raises:
        RunError: some are still there.
    """
    import psutil

    kind_of(kit)
    processes = running(kit)
    watchdogs = [p for p in processes if any(part.endswith("start.sh") for part in _said(p))]
    for process in [*watchdogs, *(p for p in processes if p not in watchdogs)]:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=within)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _, left = psutil.wait_procs(left, timeout=within)
    left = [*left, *running(kit)]
    if left:
        raise RunError(f"these processes of {kit.name} could not be ended: {sorted({p.pid for p in left})}")
    for name in (_NOTE, "pid.fl", "daemon_pid.fl"):
        (kit / name).unlink(missing_ok=True)
    return len(processes)


def end_with_children(pid: int) -> None:
    """Ends a process and all that it has begun, at once."""
    import psutil

    with contextlib.suppress(psutil.Error):
        first = psutil.Process(pid)
        all_of_them = [first, *first.children(recursive=True)]
        for process in all_of_them:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(all_of_them, timeout=10)


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _said(process: Any) -> list[str]:
    import psutil

    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def _born(pid: int) -> float:
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return time.time()


def _noted(kit: Path) -> int:
    """The process id that was noted when the kit was started, if it is still that process's."""
    try:
        note = json.loads((kit / _NOTE).read_text(encoding="utf-8"))
        return int(note["pid"]) if abs(_born(int(note["pid"])) - float(note["born"])) < 1.0 else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _name(kit: Path) -> str:
    return str(json.loads((kit / "startup" / "fed_client.json").read_text(encoding="utf-8"))["client"]["fqsn"])


def _org(kit: Path) -> str:
    return "".join(sign if sign.isalnum() else "_" for sign in _name(kit)) if kind_of(kit) == "client" else "fedlab"
