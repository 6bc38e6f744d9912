"""The commands across hospitals, `fedlab deploy`: a server and sites on NVIDIA FLARE, from their kits to their logs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fedlab.apps.cli_arguments import FLAG, add_command, add_group
from fedlab.core.errors import RunError
from fedlab.core.text import counted

__all__ = ["add_deploy"]


def add_deploy(commands: Any) -> None:
    """Adds `deploy` and its own commands to argparse's sub-parsers."""
    kinds = add_group(commands, "deploy")
    kit = {"type": Path, "metavar": "KIT"}
    # On the machine where a kit lies.
    add_command(kinds, "deploy init", _init, {
        "folder": {"type": Path, "metavar": "DIR"}, "--server": {"required": True, "metavar": "HOST"},
        "--sites": {"required": True, "nargs": "+", "metavar": "NAME"}, "--port": {"type": int, "default": 8002},
        "--researcher": {"default": "researcher@fedlab.example", "metavar": "EMAIL"}})
    add_command(kinds, "deploy start", _start, {
        "kit": {**kit, "nargs": "+"}, "--site": {"type": Path, "metavar": "FOLDER"}})
    add_command(kinds, "deploy stop", _stop, {"kit": {**kit, "nargs": "+"}})
    add_command(kinds, "deploy logs", _logs, {"kit": kit, "--lines": {"type": int, "default": 40}})
    # Of the server, from any machine that reaches it.
    add_command(kinds, "deploy status", _status, {"place": {"type": Path, "metavar": "DIR"}})
    add_command(kinds, "deploy submit", _submit, {
        "run": {"type": Path, "metavar": "RUN"}, "--kit": {**kit, "required": True}, "--leave": FLAG,
        "--repeatable-noise": FLAG, "--wait": {"type": float, "default": 600.0, "metavar": "SECONDS"}})
    add_command(kinds, "deploy abort", _abort, {"job": {"metavar": "JOB"}, "--kit": {**kit, "required": True}})


def _init(options: argparse.Namespace) -> None:
    from fedlab.engines.nvflare.kits import make_kits

    kits = make_kits(options.folder, server=options.server, sites=options.sites, port=options.port,
                     researcher=options.researcher)
    print(f"kits: {', '.join(str(kits / name) for name in ('server', *options.sites, 'admin'))}\n"
          f"{options.folder / 'authority'} holds the project's root key: keep it offline and to yourself.\n"
          f"Next: fedlab deploy start {kits / 'server'} on {options.server}, which the sites must reach on port "
          f"{options.port}")


def _start(options: argparse.Namespace) -> None:
    from fedlab.engines.nvflare.kits import begin

    if options.site is not None and len(options.kit) > 1:
        raise ValueError(f"--site names the folder of one site, got {len(options.kit)} kits; start them one by one")
    for kit in options.kit:
        print(f"{kit}: process {begin(kit, site=options.site)}, log in {kit / 'log.txt'}")


def _stop(options: argparse.Namespace) -> None:
    from fedlab.engines.nvflare.kits import stop

    for kit in options.kit:
        ended = stop(kit)
        print(f"{kit}: {ended} process{'es' * (ended > 1)} ended" if ended else f"{kit}: was not running")


def _status(options: argparse.Namespace) -> None:
    from fedlab.engines.nvflare.kits import running

    place = options.place / "kits" if (options.place / "kits").is_dir() else options.place
    kits = [place] if (place / "startup").is_dir() else sorted(p for p in place.glob("*") if (p / "startup").is_dir())
    if not kits:
        raise RunError(f"{place} holds no startup kit; give a kit, the folder kits, or a project of fedlab deploy init")
    for kit in kits:
        if (kit / "startup" / "fed_admin.json").is_file():
            _ask_server(kit)
        else:
            processes = ", ".join(f"process {process.pid}" for process in running(kit))
            print(f"{kit.name}: " + (f"runs here: {processes}" if processes else "does not run on this machine"))


def _ask_server(kit: Path) -> None:
    from fedlab.engines.nvflare.admin import Admin

    with Admin(kit, patience=5.0) as admin:
        sites, jobs = admin.sites(), admin.jobs()
        print(f"connected: {', '.join(sites) or 'no site'}")
        for job in jobs:
            name, state = str(job.get("job_id")), str(job.get("status"))
            line = f"job {name} ({job.get('job_name')}): {state}"
            if state == "RUNNING" and (reply := admin.ask(name, {"have": 0})):
                line += f", {counted(len(reply['rounds']), 'round')}"
                line += f", lost: {', '.join(reply['lost'])}" if reply["lost"] else ""
            print(line)


def _submit(options: argparse.Namespace) -> None:
    from fedlab.engines.nvflare.environments import Production

    researcher = Production(kit=options.kit, wait=options.wait, repeatable_noise=options.repeatable_noise)
    if options.leave:
        print(f"job {researcher.submit(options.run)}; follow it with: fedlab deploy submit {options.run} --kit "
              f"{options.kit}")
        return
    for line in researcher.follow(options.run):
        print(line, flush=True)


def _abort(options: argparse.Namespace) -> None:
    from fedlab.engines.nvflare.admin import Admin

    with Admin(options.kit, patience=5.0) as admin:
        admin.abort(options.job)
    print(f"job {options.job}: ending")


def _logs(options: argparse.Namespace) -> None:
    found = [path for name in ("log.txt", "console.log") if (path := options.kit / name).is_file()]
    if not found:
        raise RunError(f"{options.kit} has no log yet; it is written when the kit is started")
    lines = found[0].read_text(encoding="utf-8", errors="replace").splitlines()[-max(1, options.lines):]
    sys.stdout.writelines(f"{line}\n" for line in lines)
