"""Where NVFLARE runs: simulated on this machine, as real processes on this machine, or at hospitals."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError, RunError
from fedlab.core.types import Round, Site
from fedlab.deploy.plan import Plan
from fedlab.engines.nvflare.admin import Admin
from fedlab.engines.nvflare.follow import watch
from fedlab.engines.nvflare.kits import check_site_names, class_rules, make_kits
from fedlab.engines.nvflare.party_processes import begin, end_with_children, free_port, stop
from fedlab.engines.nvflare.requirement import need_nvflare
from fedlab.engines.nvflare.run_folder import Diary, read_round
from fedlab.engines.nvflare.simulation import SIMULATION, prepare_simulation

__all__ = ["Environment", "Production", "ProofOfConcept", "Simulation"]

#: Writes the job of a run into a new folder, with so many threads of torch at the sites.
WriteJob = Callable[[Path, int], Path]


class Environment(Protocol):
    """Where a run is sent."""

    def rounds(self, plan: Plan, sites: Sequence[Site], write_job: WriteJob, *, have: int) -> Iterator[Round]:
        """The rounds of a plan from number `have` on, each as it is finished."""
        ...


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """NVFLARE's simulator on this machine: a process a site, connected without encryption on loopback.

    Args:
        folder: where patients, checkpoints and logs are written; it is kept, and a run of the same plan with the same
            folder goes on where it stood. Without it a temporary folder is used and removed.
        threads: of torch in each process; by default as many as here, so that the weights are the same bits as with
            `Local()`.
        tries: how often a simulation that dies is started, to go on where it stood; on a busy machine NVFLARE's
            processes sometimes miss each other at the start.
    """

    folder: Path | str | None = None
    threads: int | None = None
    tries: int = 3

    def rounds(self, plan: Plan, sites: Sequence[Site], write_job: WriteJob, *, have: int) -> Iterator[Round]:
        need_nvflare()
        check_site_names(plan.sites)
        threads = self.threads or torch.get_num_threads()
        with _folder(self.folder) as folder:
            prepare_simulation(folder, sites, modules=plan.modules)
            how, run = how_it_ended(folder / "runs" / plan.run), folder / "runs" / plan.run
            if how is not None and "stopped" in how:  # an earlier simulation in this folder has brought it to its end
                yield from _rounds_of(Diary(run), have)
                return raise_if_failed(how)
            for left in reversed(range(self.tries)):
                with tempfile.TemporaryDirectory() as scratch:
                    job = write_job(Path(scratch) / "job", threads)
                    for finished in self._once(folder, job, plan, have, environment_for(folder, plan, threads)):
                        have = finished.number + 1
                        yield finished
                how = how_it_ended(run)
                if how is not None or have >= plan.rounds:
                    return raise_if_failed(how)
                if not left:
                    raise RunError(f"the simulation ended before its last round; its log says:\n{_tail(folder)}")

    def _once(self, folder: Path, job: Path, plan: Plan, have: int, environment: Mapping[str, str]) -> Iterator[Round]:
        """Starts the simulator, and yields what it has finished until it ends."""
        (folder / "flare" / "local").mkdir(parents=True, exist_ok=True)
        (folder / "flare" / "local" / "resources.json").write_text(
            json.dumps({"format_version": 2, **class_rules()}), encoding="utf-8")
        (folder / "runs" / plan.run / "end.json").unlink(missing_ok=True)
        diary = Diary(folder / "runs" / plan.run)
        with (folder / "simulator.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-u", "-m", "nvflare.private.fed.app.simulator.simulator", str(job),
                 "-w", str(folder / "flare"), "-c", ",".join(plan.sites), "-n", str(len(plan.sites)),
                 "-t", str(len(plan.sites)), "-l", "full"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **environment})
        try:
            over = False
            while True:
                for finished in _rounds_of(diary, have):
                    have = finished.number + 1
                    yield finished
                if over:
                    return
                # What is left after the run has ended is NVFLARE's farewell, seconds of it.
                over = process.poll() is not None or how_it_ended(folder / "runs" / plan.run) is not None
                if not over:
                    time.sleep(0.1)
        finally:
            end_with_children(process.pid)
            process.wait()


@dataclass(frozen=True, kw_only=True)
class ProofOfConcept:
    """A server and sites as processes of this machine, with certificates of their own, as hospitals would have them.

    Args:
        folder: new or empty; kits, patients, checkpoints and logs are written to it and kept. Without it a temporary
            folder is used and removed.
        threads: as in `Simulation`.
        wait: seconds in which all must have started.
    """

    folder: Path | str | None = None
    threads: int | None = None
    wait: float = 180.0

    def rounds(self, plan: Plan, sites: Sequence[Site], write_job: WriteJob, *, have: int) -> Iterator[Round]:
        need_nvflare()
        threads = self.threads or torch.get_num_threads()
        with _folder(self.folder) as folder:
            kits = make_kits(folder / "project", server="localhost", sites=plan.sites, port=free_port())
            prepare_simulation(folder, sites, modules=plan.modules)
            environment = environment_for(folder, plan, threads)
            try:
                for name in ("server", *plan.sites):
                    begin(kits / name, environment=environment)
                researcher = Production(kit=kits / "admin", wait=self.wait)
                yield from researcher.rounds(plan, sites, lambda place, _: write_job(place, threads), have=have)
            finally:
                for name in (*plan.sites, "server"):
                    stop(kits / name)


@dataclass(frozen=True, kw_only=True)
class Production:
    """A server and sites that run elsewhere, reached with the researcher's startup kit.

    The run lies at the server: a notebook that is closed and run again sees the rounds that were finished meanwhile
    and goes on watching.

    Args:
        kit: the folder `kits/admin` that `fedlab deploy init` has made.
        threads: of torch at the sites; by default each takes what its machine has.
        wait: seconds until enough sites must be connected for a job to begin.
        patience: seconds for which the server may be out of reach, such as for a restart.
    """

    kit: Path | str
    threads: int = 0
    wait: float = 600.0
    patience: float = 600.0

    def rounds(self, plan: Plan, sites: Sequence[Site], write_job: WriteJob, *, have: int) -> Iterator[Round]:
        check_site_names(plan.sites)
        with Admin(Path(self.kit), patience=self.patience) as admin, tempfile.TemporaryDirectory() as scratch:
            job = write_job(Path(scratch) / "job", self.threads)
            how: Mapping[str, Any] | None = None
            for came in watch(admin, job, plan, have=have, wait=self.wait):
                if isinstance(came, Round):
                    yield came
                else:
                    how = came
            raise_if_failed(how)


def environment_for(folder: Path, plan: Plan, threads: int) -> dict[str, str]:
    """Variables of the processes of this machine: where their data are, threads, and where the plan's modules are."""
    places = []
    for module in plan.modules:
        top = module.partition(".")[0]
        found = importlib.util.find_spec(top) if top not in ("fedlab", "torch", "monai") else None
        if found is not None and found.origin is not None:
            origin = Path(found.origin).resolve()
            places.append(str(origin.parent.parent if origin.name == "__init__.py" else origin.parent))
    path = [*dict.fromkeys(places), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {SIMULATION: str(folder), "OMP_NUM_THREADS": str(threads), **({"PYTHONPATH": os.pathsep.join(path)} if path
                                                                       else {})}


def how_it_ended(run: Path) -> Mapping[str, Any] | None:
    """What the server has noted at the end of a job, if it came to that."""
    try:
        note = json.loads((run / "end.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def raise_if_failed(how: Mapping[str, Any] | None) -> None:
    """Raises what has ended a run at the server.

    Raises:
        PrivacyBudgetExhausted: no site is left that may take part.
        PrivacyError, RunError: with the server's words.
    """
    if how is not None and how.get("stopped"):
        raise PrivacyBudgetExhausted(str(how["stopped"]))
    if how is not None and "failed" in how:
        raise (PrivacyError if how.get("kind") == "PrivacyError" else RunError)(f"at the server: {how['failed']}")


@contextmanager
def _folder(wanted: Path | str | None) -> Iterator[Path]:
    if wanted is not None:
        Path(wanted).mkdir(parents=True, exist_ok=True)
        yield Path(wanted).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="fedlab-", ignore_cleanup_errors=True) as scratch:
        yield Path(scratch).resolve()


def _rounds_of(diary: Diary, have: int) -> Iterator[Round]:
    for number in range(have, len(diary)):
        yield read_round(diary.text(number), diary.weights(number))


def _tail(folder: Path) -> str:
    lines = (folder / "simulator.log").read_text(encoding="utf-8", errors="replace").splitlines()
    telling = [line for line in lines if "ERROR" in line or "Error" in line]
    return "\n".join((telling or lines)[-15:])
