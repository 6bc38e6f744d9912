"""The command line's `fedlab deploy`: a server and sites on NVIDIA FLARE, from their kits to their logs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

__all__ = ["add_deploy"]

_ABOUT = """\
Sets up and runs a project across hospitals on NVIDIA FLARE 2.9.

  fedlab deploy init project --server fl.hospital-a.example --sites A B C      kits for all, in project/kits
  fedlab deploy start project/kits/server                                      on the server's machine
  fedlab deploy start kits/A --site FOLDER                                     at site A; FOLDER: fedlab site init
  fedlab deploy status project/kits/admin                                      who is there, which jobs
  fedlab deploy submit RUN --kit project/kits/admin                            a run that NVFlare(...).save has written

In a notebook: federate(trainer, ["A", "B", "C"], ..., engine=NVFlare(env=Production(kit="project/kits/admin")))."""


def add_deploy(commands: Any) -> None:
    """Adds `deploy` and its own commands to argparse's sub-parsers."""
    style = argparse.RawDescriptionHelpFormatter
    deploy = commands.add_parser("deploy", help="run across hospitals on NVIDIA FLARE", description=_ABOUT,
                                 formatter_class=style)
    kinds = deploy.add_subparsers(required=True, metavar="COMMAND")
    _add_kits(kinds, style)
    _add_jobs(kinds, style)


def _add_kits(kinds: Any, style: Any) -> None:
    """What is done with a kit where it lies: make it, start it, stop it, look at its log."""
    init = kinds.add_parser("init", help="write a project and its startup kits", formatter_class=style, description=(
        "Makes keys and certificates (mutual TLS, valid for 360 days) and a startup kit for the server, for each site\n"
        "and for the researcher. Hand each kit to its owner over a safe way: it holds a private key. The folder\n"
        "authority holds the key that all certificates hang on: it stays with you."))
    init.add_argument("folder", type=Path, metavar="DIR", help="new folder")
    init.add_argument("--server", required=True, metavar="HOST", help="the server's name as the sites reach it")
    init.add_argument("--sites", required=True, nargs="+", metavar="NAME", help="names of the sites")
    init.add_argument("--port", type=int, default=8002, help="the one port that the server listens on (default 8002)")
    init.add_argument("--researcher", default="researcher@fedlab.example", metavar="EMAIL",
                      help="name on the researcher's certificate")
    init.set_defaults(command=_init)

    start = kinds.add_parser("start", help="start the server or a site from its kit, in the background",
                             formatter_class=style, description=(
        "Starts what the kit is of, in the background, and returns; what it says goes to log.txt in the kit. The\n"
        "server needs its one port reachable, a site only calls out. After a crash of the machine it isn't started\n"
        "again: have your service manager (such as systemd) do that, with the kit's startup/start.sh.\n\n"
        "  fedlab deploy start project/kits/server\n"
        "  fedlab deploy start kits/hospital-a --site hospital-a      the folder that fedlab site init has made"))
    start.add_argument("kit", type=Path, nargs="+", metavar="KIT", help="kits/server or kits/NAME")
    start.add_argument("--site", type=Path, metavar="FOLDER", help="the site's own folder (fedlab site init); "
                                                                   "remembered in the kit")
    start.set_defaults(command=_start)

    stop = kinds.add_parser("stop", help="end the server or a site and all that it has begun",
                            formatter_class=style, description=(
        "Ends the processes of a kit on this machine, with those of its jobs. What a site was at work on is lost,\n"
        "its ledger isn't. A run goes on where it stood when server and sites are back and it is handed in again."))
    stop.add_argument("kit", type=Path, nargs="+", metavar="KIT")
    stop.set_defaults(command=_stop)

    logs = kinds.add_parser("logs", help="the last lines of a server's or site's log", formatter_class=style,
                            description=(
        "Prints the end of a kit's own log, which stays on the machine of the kit: nobody reads a site's log from\n"
        "afar. What went wrong inside a round at a site is in site.log in the site's folder."))
    logs.add_argument("kit", type=Path, metavar="KIT")
    logs.add_argument("--lines", type=int, default=40, help="how many (default 40)")
    logs.set_defaults(command=_logs)


def _add_jobs(kinds: Any, style: Any) -> None:
    """What is asked of the server: who is there, take this run, end that job."""
    status = kinds.add_parser("status", help="what runs here (a kit, a project), and who is connected (kits/admin)",
                              formatter_class=style, description=(
        "Says of each kit whether its processes run on this machine. With the researcher's kit among them the server\n"
        "is asked who is connected, which jobs there are and how many rounds the running one has finished.\n\n"
        "  fedlab deploy status project              all kits that lie here\n"
        "  fedlab deploy status project/kits/admin   the server, from wherever it can be reached"))
    status.add_argument("place", type=Path, metavar="DIR", help="a kit, the folder kits, or a project")
    status.set_defaults(command=_status)

    submit = kinds.add_parser("submit", help="hand in a run and follow it to its end", formatter_class=style,
                              description=(
        "RUN is a folder that NVFlare(...).save has written. Finished rounds are written to RUN/rounds, at last the\n"
        "weights to RUN/weights.safetensors. Interrupted, the run goes on at the server; the same command follows it\n"
        "again. With --leave it is only handed in."))
    submit.add_argument("run", type=Path, metavar="RUN")
    submit.add_argument("--kit", type=Path, required=True, metavar="KIT", help="the researcher's: kits/admin")
    submit.add_argument("--leave", action="store_true", help="hand it in and leave")
    submit.add_argument("--wait", type=float, default=600.0, metavar="SECONDS",
                        help="until enough sites must be connected (default 600)")
    submit.set_defaults(command=_submit)

    abort = kinds.add_parser("abort", help="end a job; its run can be gone on with by handing it in again",
                             formatter_class=style, description=(
        "Ends a job at the server and at all sites. Its finished rounds stay at the server: handing in the same run\n"
        "again with fedlab deploy submit, or the same cell of a notebook, goes on after the last of them."))
    abort.add_argument("job", metavar="JOB", help="as fedlab deploy status names it")
    abort.add_argument("--kit", type=Path, required=True, metavar="KIT", help="the researcher's: kits/admin")
    abort.set_defaults(command=_abort)


def _init(options: argparse.Namespace) -> None:
    from fedlab.engines.nvflare.kits import make_kits

    kits = make_kits(options.folder, server=options.server, sites=options.sites, port=options.port,
                     researcher=options.researcher)
    print(f"kits: {', '.join(str(kits / name) for name in ('server', *options.sites, 'admin'))}\n"
          f"{options.folder / 'authority'} holds the project's root key: keep it to yourself, offline at best.\n"
          f"Next: fedlab deploy start {kits / 'server'} on {options.server}, which the sites must reach on port "
          f"{options.port}")


def _start(options: argparse.Namespace) -> None:
    from fedlab.engines.nvflare.party_processes import begin

    if options.site is not None and len(options.kit) > 1:
        raise ValueError("--site is the folder of one site; start the sites one by one")
    for kit in options.kit:
        print(f"{kit}: process {begin(kit, site=options.site)}, log in {kit / 'log.txt'}")


def _stop(options: argparse.Namespace) -> None:
    from fedlab.engines.nvflare.party_processes import stop

    for kit in options.kit:
        ended = stop(kit)
        print(f"{kit}: {ended} process{'' if ended == 1 else 'es'} ended" if ended else f"{kit}: was not running")


def _status(options: argparse.Namespace) -> None:
    from fedlab.core.errors import RunError
    from fedlab.engines.nvflare.party_processes import running

    place = options.place / "kits" if (options.place / "kits").is_dir() else options.place
    kits = [place] if (place / "startup").is_dir() else sorted(p for p in place.glob("*") if (p / "startup").is_dir())
    if not kits:
        raise RunError(f"{place} holds no startup kit")
    for kit in kits:
        if (kit / "startup" / "fed_admin.json").is_file():
            _ask_server(kit)
        else:
            processes = running(kit)
            print(f"{kit.name}: " + (f"runs here: {', '.join(f'process {p.pid}' for p in processes)}"
                                     if processes else "doesn't run on this machine"))


def _ask_server(kit: Path) -> None:
    from fedlab.engines.nvflare.admin import Admin

    with Admin(kit, patience=5.0) as admin:
        sites, jobs = admin.sites(), admin.jobs()
        print(f"connected: {', '.join(sites) or 'no site'}")
        for job in jobs:
            name, stands = str(job.get("job_id")), str(job.get("status"))
            reply = admin.ask(name, {"have": 0}) if stands == "RUNNING" else None
            more = "" if not reply else f", {len(reply['rounds'])} rounds" + (
                f", lost: {', '.join(reply['lost'])}" if reply["lost"] else "")
            print(f"job {name} ({job.get('job_name')}): {stands}{more}")


def _submit(options: argparse.Namespace) -> None:
    from fedlab.engines.nvflare.submission import follow, hand_in

    if options.leave:
        print(f"job {hand_in(options.run, options.kit)}; follow it with: fedlab deploy submit {options.run} --kit "
              f"{options.kit}")
        return
    for line in follow(options.run, options.kit, wait=options.wait):
        print(line, flush=True)


def _abort(options: argparse.Namespace) -> None:
    from fedlab.engines.nvflare.admin import Admin

    with Admin(options.kit, patience=5.0) as admin:
        admin.abort(options.job)
    print(f"job {options.job} is being ended")


def _logs(options: argparse.Namespace) -> None:
    from fedlab.core.errors import RunError

    found = [path for name in ("log.txt", "console.log") if (path := options.kit / name).is_file()]
    if not found:
        raise RunError(f"{options.kit} has no log yet; it is written when the kit is started")
    lines = found[0].read_text(encoding="utf-8", errors="replace").splitlines()[-max(1, options.lines):]
    sys.stdout.writelines(f"{line}\n" for line in lines)
