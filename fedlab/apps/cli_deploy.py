"""The commands across hospitals, `fedlab deploy`: a server and sites on NVIDIA FLARE, from their kits to their logs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fedlab.apps.cli_arguments import add_command, add_group

__all__ = ["add_deploy"]


def add_deploy(commands: Any) -> None:
    """Adds `deploy` and its own commands to argparse's sub-parsers."""
    kinds = add_group(commands, "deploy", help="run across hospitals on NVIDIA FLARE", about="""
        Sets up and runs a project across hospitals on NVIDIA FLARE 2.9.

          fedlab deploy init project --server fl.hospital-a.example --sites A B C      kits for all, in project/kits
          fedlab deploy start project/kits/server                                      on the server's machine
          fedlab deploy start kits/A --site FOLDER                                     at site A (FOLDER: site init)
          fedlab deploy status project/kits/admin                                      connected sites and jobs
          fedlab deploy submit RUN --kit project/kits/admin                            a run saved by NVFlare(...).save

        In a notebook:
        federate(trainer, ["A", "B", "C"], ..., engine=NVFlare(env=Production(kit="project/kits/admin")))""")
    _add_kits(kinds)
    _add_jobs(kinds)


def _add_kits(kinds: Any) -> None:
    """The commands for a kit on the machine where it lies: make, start and stop it, read its log."""
    init = add_command(kinds, "init", _init, help="write a project and its startup kits", about="""
        Makes keys and certificates (mutual TLS, valid for 360 days) and a startup kit for the server, for each site
        and for the researcher. Send each kit to its owner through a secure channel: it holds a private key. The
        folder authority holds the root key of all certificates: it stays with you.""")
    init.add_argument("folder", type=Path, metavar="DIR", help="new folder")
    init.add_argument("--server", required=True, metavar="HOST", help="the server's name as the sites reach it")
    init.add_argument("--sites", required=True, nargs="+", metavar="NAME", help="names of the sites")
    init.add_argument("--port", type=int, default=8002, help="the one port that the server listens on (default 8002)")
    init.add_argument("--researcher", default="researcher@fedlab.example", metavar="EMAIL",
                      help="name on the researcher's certificate")

    start = add_command(kinds, "start", _start, help="start the server or a site from its kit, in the background",
                        about="""
        Starts the server or the site in the background and returns; its output goes to log.txt in the kit. The
        server needs its one port reachable, a site only makes outgoing connections. It is not restarted after a
        crash of the machine: let your service manager (such as systemd) do that, with the kit's startup/start.sh.

          fedlab deploy start project/kits/server
          fedlab deploy start kits/hospital-a --site hospital-a      the folder made by fedlab site init""")
    start.add_argument("kit", type=Path, nargs="+", metavar="KIT", help="kits/server or kits/NAME")
    start.add_argument("--site", type=Path, metavar="FOLDER",
                       help="the site's own folder (fedlab site init); remembered in the kit")

    stop = add_command(kinds, "stop", _stop, help="end the server or a site and all processes it has started", about="""
        Ends the processes of a kit on this machine, with those of its jobs. A site loses the work on the current
        round, but not its ledger. When server and sites are back and the run is submitted again, it continues after
        its last finished round.""")
    stop.add_argument("kit", type=Path, nargs="+", metavar="KIT", help="kits/server or kits/NAME")

    logs = add_command(kinds, "logs", _logs, help="the last lines of a server's or site's log", about="""
        Prints the end of a kit's log, which stays on the machine of the kit: a site's log cannot be read remotely.
        Errors inside a round at a site are in site.log in the site's folder.""")
    logs.add_argument("kit", type=Path, metavar="KIT", help="kits/server or kits/NAME")
    logs.add_argument("--lines", type=int, default=40, help="how many (default 40)")


def _add_jobs(kinds: Any) -> None:
    """The commands for the server: list sites and jobs, submit a run, end a job."""
    status = add_command(kinds, "status", _status,
                         help="what runs here (a kit, a project), and which sites are connected (kits/admin)", about="""
        Reports for each kit whether its processes run on this machine. With the researcher's kit among them, also
        asks the server which sites are connected, which jobs exist and how many rounds the running one has finished.

          fedlab deploy status project              all kits of the project on this machine
          fedlab deploy status project/kits/admin   the server, from any machine that reaches it""")
    status.add_argument("place", type=Path, metavar="DIR", help="a kit, the folder kits, or a project")

    submit = add_command(kinds, "submit", _submit, help="submit a run and follow it to its end", about="""
        RUN is a folder written by NVFlare(...).save. Finished rounds are written to RUN/rounds, the final weights to
        RUN/weights.safetensors. If the command is interrupted, the run continues at the server; the same command
        follows it again. With --leave the run is only submitted.""")
    submit.add_argument("run", type=Path, metavar="RUN", help="the folder of the saved run")
    submit.add_argument("--kit", type=Path, required=True, metavar="KIT", help="the researcher's: kits/admin")
    submit.add_argument("--leave", action="store_true", help="submit without following")
    submit.add_argument("--wait", type=float, default=600.0, metavar="SECONDS",
                        help="how long to wait until enough sites are connected (default 600)")

    abort = add_command(kinds, "abort", _abort, help="end a job; submitting its run again continues it", about="""
        Ends a job at the server and at all sites. Its finished rounds stay at the server: submitting the same run
        again with fedlab deploy submit, or from the same cell of a notebook, continues after the last of them.""")
    abort.add_argument("job", metavar="JOB", help="its name in the output of fedlab deploy status")
    abort.add_argument("--kit", type=Path, required=True, metavar="KIT", help="the researcher's: kits/admin")


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
        print(f"{kit}: {ended} process{'' if ended == 1 else 'es'} ended" if ended else f"{kit}: was not running")


def _status(options: argparse.Namespace) -> None:
    from fedlab.core.errors import RunError
    from fedlab.engines.nvflare.kits import running

    place = options.place / "kits" if (options.place / "kits").is_dir() else options.place
    kits = [place] if (place / "startup").is_dir() else sorted(p for p in place.glob("*") if (p / "startup").is_dir())
    if not kits:
        raise RunError(f"{place} holds no startup kit; give a kit, the folder kits, or a project of fedlab deploy init")
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
            name, state = str(job.get("job_id")), str(job.get("status"))
            reply = admin.ask(name, {"have": 0}) if state == "RUNNING" else None
            more = "" if not reply else f", {len(reply['rounds'])} rounds" + (
                f", lost: {', '.join(reply['lost'])}" if reply["lost"] else "")
            print(f"job {name} ({job.get('job_name')}): {state}{more}")


def _submit(options: argparse.Namespace) -> None:
    from fedlab.engines.nvflare.environments import Production

    researcher = Production(kit=options.kit, wait=options.wait)
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
    from fedlab.core.errors import RunError

    found = [path for name in ("log.txt", "console.log") if (path := options.kit / name).is_file()]
    if not found:
        raise RunError(f"{options.kit} has no log yet; it is written when the kit is started")
    lines = found[0].read_text(encoding="utf-8", errors="replace").splitlines()[-max(1, options.lines):]
    sys.stdout.writelines(f"{line}\n" for line in lines)
