"""Startup kits, one for the server, each site and the researcher, and the processes that are started from them.

NVFLARE makes keys, certificates and what its processes read when they start. What a process may do at its site is
decided by files in the kit's folder `local`, which stays at the site. fedlab writes them strict: a job may use fedlab's
two classes only, no job brings code, no log leaves a site, and no site's files can be read remotely.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedlab.core.errors import RunError
from fedlab.core.files import filled_in
from fedlab.deploy.policy import SitePolicy

__all__ = ["FORKED", "VARIABLES", "begin", "check_site_names", "class_rules", "free_port", "hurry", "make_kits",
           "need_nvflare", "program_of", "running", "server_policy", "site_folder", "stop"]

#: The module that processes of a rehearsal are forked from.
FORKED = "fedlab.engines.nvflare.parties"
#: Variables of NVFLARE's processes: a finished job waits this long for sites that are gone.
VARIABLES = {"NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "30"}

#: All classes that a job may use at a server or site.
_CLASSES = ["nvflare.collab.runtime.controller.CollabController", "nvflare.collab.runtime.executor.CollabExecutor",
            "fedlab.engines.nvflare.server_part.ServerPart", "fedlab.engines.nvflare.site_part.SitePart"]
#: A job that lacks sites is tried again within seconds, for an hour and a half; by default NVFLARE takes 10 s and more.
_SCHEDULE = {"min_schedule_interval": 1.0, "max_schedule_interval": 10.0, "max_schedule_count": 540}
_RIGHTS = {"submit_job": "any", "clone_job": "none", "manage_job": "any", "download_job": "any", "view": "any",
           "operate": "o:site", "shell_commands": "none", "byoc": "none", "app_command": "any"}


def need_nvflare() -> None:
    """Raises `RunError` with the remedy where NVFLARE is missing or of another series than 2.9."""
    install = "pip install 'fedlab-workbench[nvflare]'"
    try:
        version = metadata.version("nvflare")
    except metadata.PackageNotFoundError:
        raise RunError("NVFLARE is not installed in this environment. In the checkout, run: make install. Elsewhere: "
                       f"{install}") from None
    if version.split(".")[:2] != ["2", "9"]:
        raise RunError(f"fedlab runs on NVFLARE 2.9, found {version}. Install it with: {install}")


def check_site_names(names: Sequence[str]) -> None:
    """Raises `ValueError` for names that NVFLARE does not accept."""
    valid = [name for name in names if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name) and name not in ("server", "admin")]
    if not names or len(set(valid)) != len(names):
        raise ValueError(f"on NVFLARE sites have different names of letters, digits, - and _, other than 'server' and "
                         f"'admin'; got {list(names)!r}")


def make_kits(folder: Path, *, server: str, sites: Sequence[str], port: int = 8002,
              researcher: str = "researcher@fedlab.example") -> Path:
    """Writes `project.yml` and the kits of a new project.

    Args:
        folder: a new or empty folder. `kits/server`, `kits/NAME` and `kits/admin` in it are for their owners;
            `authority`, with the project's root key, stays with the person who made them.
        server: name of the server's machine as the sites reach it; with "localhost" it listens on loopback only.
        sites: their names.
        port: that sites and researcher connect to; the only one that the server needs open.
        researcher: an e-mail address, the name on the researcher's certificate.

    Returns:
        The folder of the kits.

    Raises:
        ValueError: names that NVFLARE does not accept.
        RunError: the folder is not empty, or NVFLARE is missing or failed.
    """
    need_nvflare()
    check_site_names(sites)
    if folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} is not empty; choose another folder, nothing is overwritten")
    import yaml

    text = filled_in("fedlab.engines.nvflare", "project.yml", server=server, sites=sites, port=port,
                     researcher=researcher)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "project.yml").write_text(text, encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = _provision(yaml.safe_load(text), Path(scratch))
        for name, kit in {server: "server", researcher: "admin", **{site: site for site in sites}}.items():
            _harden(made / name)
            shutil.copytree(made / name, folder / "kits" / kit)
        shutil.copytree(made.parent / "state", folder / "authority")
    for private in (folder / "authority", *(folder / "kits").glob("*/startup")):
        os.chmod(private, 0o700)
    return folder / "kits"


def _provision(project: dict[str, Any], scratch: Path) -> Path:
    """The folder in which NVFLARE has put the kits. Unlike its command line this leaves the home folder alone."""
    from nvflare.lighter.provision import prepare_builders, prepare_project
    from nvflare.lighter.provisioner import Provisioner

    errors: list[str] = []
    log = SimpleNamespace(error=lambda *message: errors.append(" ".join(map(str, message))),
                          **dict.fromkeys(("debug", "info", "warning"), lambda *message: None))
    try:
        done = Provisioner(str(scratch), prepare_builders(project)).provision(prepare_project(project), logger=log)
    except (ValueError, RuntimeError) as error:
        raise RunError(f"NVFLARE cannot make such a project: {error}") from error
    if done.get("build_error") or errors:
        raise RunError(f"NVFLARE could not make the kits: {'; '.join(errors) or 'it gave no reason'}")
    return scratch / str(project["name"]) / "prod_00"


def _harden(kit: Path) -> None:
    """Writes what the kit's process may do, as files that take precedence over NVFLARE's defaults."""
    local = kit / "local"
    resources = json.loads((local / "resources.json.default").read_text(encoding="utf-8"))
    if "components" not in resources:  # the researcher's kit runs nothing
        return
    resources |= class_rules()
    resources["components"] = [c for c in resources["components"] if "logging" not in c["path"]]
    if "servers" in resources:
        resources["servers"][0]["heart_beat_timeout"] = 60
        scheduler = next(c for c in resources["components"] if c["id"] == "job_scheduler")
        scheduler["args"] |= _SCHEDULE
    rights = {"format_version": "1.0", "permissions": {"project_admin": _RIGHTS, "lead": _RIGHTS}}
    for name, content in (("resources", resources), ("authorization", rights)):
        (local / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    at_site = (kit / "startup" / "fed_client.json").is_file()
    (local / "fedlab.toml").write_text(filled_in("fedlab.engines.nvflare", "fedlab.toml", at_site=at_site),
                                       encoding="utf-8")


def class_rules() -> dict[str, Any]:
    """Which classes NVFLARE's processes may use for a job, and that no log leaves them."""
    return {"class_list_enforcement_mode": "enforce", "class_allow_list": _CLASSES, "allow_log_streaming": False}


def _settle(kit: Path) -> None:
    """Makes a server keep its jobs in its own kit, at its present place; NVFLARE's default is one folder for all."""
    path = kit / "local" / "resources.json"
    resources = json.loads(path.read_text(encoding="utf-8"))
    for component in resources["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(kit.resolve() / "jobs")
    if "snapshot_persistor" in resources:
        resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(kit.resolve() / "snapshots")
    path.write_text(json.dumps(resources, indent=2), encoding="utf-8")


def hurry(kit: Path) -> None:
    """For a rehearsal: the kit's process starts jobs as `launchers` says, and a site that is early soon asks again."""
    path = kit / "local" / "resources.json"
    resources = json.loads(path.read_text(encoding="utf-8"))
    launcher = next(c for c in resources["components"] if c["id"] == "process_launcher")
    if _kind_of(kit) == "server":
        launcher["path"] = "fedlab.engines.nvflare.launchers.ServerLauncher"
    else:
        launcher["path"] = "fedlab.engines.nvflare.launchers.SiteLauncher"
        resources["client"]["client_register_interval"] = 0.5
    path.write_text(json.dumps(resources, indent=2), encoding="utf-8")


def _link_site(kit: Path, folder: Path) -> None:
    """Notes in a site's kit where the site's own folder is."""
    note = kit / "local" / "fedlab.toml"
    if not (kit / "startup" / "fed_client.json").is_file() or not note.is_file():
        raise RunError(f"{kit} is no kit of a site")
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}; make the site's own folder with fedlab site init")
    note.write_text(f"folder = {json.dumps(str(folder.resolve()))}\n", encoding="utf-8")


def site_folder(kit: Path) -> Path:
    """The site's own folder, as noted in its kit; raises `RunError` where it is not."""
    folder = _note_of(kit).get("folder")
    if not isinstance(folder, str):
        raise RunError(f"{kit / 'local' / 'fedlab.toml'} does not name this site's own folder; write it there, or "
                       "start the kit with fedlab deploy start --site FOLDER")
    return Path(folder)


def server_policy(kit: Path) -> SitePolicy:
    """What a plan may name at the server: fedlab, torch, MONAI, and what `local/fedlab.toml` in its kit approves."""
    found = _note_of(kit)
    if not found.keys() <= {"installed", "approved"}:
        raise ValueError(f"fedlab.toml of the server's kit {kit} has installed and approved only, got {sorted(found)}")
    return SitePolicy(installed=tuple(found.get("installed", ())), approved=found.get("approved", {}))


def _note_of(kit: Path) -> dict[str, Any]:
    note = kit / "local" / "fedlab.toml"
    try:
        return tomllib.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RunError(f"{note} cannot be read: {error}") from error


def _kind_of(kit: Path) -> str:
    """"server" or "client", as NVFLARE calls them."""
    for kind in ("server", "client"):
        if (kit / "startup" / f"fed_{kind}.json").is_file():
            return kind
    raise RunError(f"{kit} is no startup kit of a server or a site; fedlab deploy init makes them, in its folder kits")


def begin(kit: Path, *, site: Path | None = None, environment: dict[str, str] | None = None) -> int:
    """Starts the server or site of a kit in the background and returns its process id.

    Its output goes to `console.log` in the kit, its log to `log.txt`. It runs until `stop`. It is not restarted after a
    crash or a restart of the machine: let a service manager such as systemd do that, with the kit's startup/start.sh.

    Args:
        kit: of the server or a site.
        site: the site's own folder, from `fedlab site init`; noted in the kit.
        environment: variables beyond those of this process.

    Raises:
        RunError: it runs already, there is no such kit, or a site's kit does not name the site's folder.
    """
    program = program_of(kit, site=site)
    with (kit / "console.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-u", "-m", *program], stdin=subprocess.DEVNULL, stdout=log,
                                   stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**os.environ, **VARIABLES, **(environment or {})})
    return process.pid


def program_of(kit: Path, *, site: Path | None = None) -> list[str]:
    """The module of NVFLARE that runs the server or site of a kit, and its arguments; makes the kit ready for it.

    Raises:
        RunError: as `begin`.
    """
    need_nvflare()
    kind, kit = _kind_of(kit), kit.resolve()
    if found := running(kit):
        raise RunError(f"{kit.name} runs already, as process {found[0].pid}")
    if site is not None:
        _link_site(kit, site)
    _settle(kit)
    name, org = "", "fedlab"
    if kind == "client":
        name = json.loads((kit / "startup" / "fed_client.json").read_text(encoding="utf-8"))["client"]["fqsn"]
        org = "".join(c if c.isalnum() else "_" for c in name)
    (kit / "transfer").mkdir(exist_ok=True)
    return [f"nvflare.private.fed.app.{kind}.{kind}_train", "-m", str(kit), "-s", f"fed_{kind}.json",
            "--set", "secure_train=true", "config_folder=config", f"org={org}", *([f"uid={name}"] if name else [])]


def running(kit: Path) -> list[Any]:
    """The kit's processes, of `psutil`, the oldest first: the one that was started, then the jobs that it has begun.

    A job's process that has lost its parent is found too, by its command line; one of a rehearsal by its folder.
    """
    import psutil

    home = str(kit.resolve())
    found = [process for process in psutil.process_iter(["cmdline", "status", "create_time"])
             if process.info["status"] != psutil.STATUS_ZOMBIE and (command := process.info["cmdline"])
             and ((home in command and any("nvflare." in part for part in command)) or _is_watchdog(process, home)
                  or (FORKED in command and _folder_of(process) == home))]
    return sorted(found, key=lambda process: (process.info["create_time"], process.pid))


def stop(kit: Path, *, within: float = 15.0) -> int:
    """Ends the kit's processes and returns how many there were. A site's present work is lost, its ledger is not.

    A watchdog that NVFLARE's start.sh has left is ended first, or it would restart the others.

    Raises:
        RunError: some are still running.
    """
    import psutil

    _kind_of(kit)
    processes = running(kit)
    for process in sorted(processes, key=lambda process: not _is_watchdog(process, str(kit.resolve()))):
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, left = psutil.wait_procs(processes, timeout=within)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    _, left = psutil.wait_procs(left, timeout=within)
    if left := [*left, *running(kit)]:
        raise RunError(f"these processes of {kit.name} could not be ended: {sorted({p.pid for p in left})}")
    for name in ("pid.fl", "daemon_pid.fl"):
        (kit / name).unlink(missing_ok=True)
    return len(processes)


def free_port() -> int:
    """A free port of loopback."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _folder_of(process: Any) -> str | None:
    import psutil

    with contextlib.suppress(psutil.Error):
        return str(process.cwd())
    return None


def _is_watchdog(process: Any, home: str) -> bool:
    """Whether it is a start.sh of the kit, which restarts what it has started."""
    return any(part.startswith(f"{home}/startup") and part.endswith("start.sh") for part in process.info["cmdline"])
