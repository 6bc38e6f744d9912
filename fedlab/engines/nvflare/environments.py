"""The engine that sends a run to NVIDIA FLARE, and where NVFLARE runs: on this machine, simulated or as real processes,
or at hospitals.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError, RunError
from fedlab.core.protocols import Run
from fedlab.core.settings import check_positive
from fedlab.core.types import Round, ServerState, Site
from fedlab.core.weights import weights_sha256
from fedlab.deploy.messages import pack_weights
from fedlab.deploy.plan import Plan
from fedlab.deploy.weights_file import save_run_weights
from fedlab.engines.nvflare.admin import Admin, watch
from fedlab.engines.nvflare.kits import check_site_names, class_rules, free_port, make_kits, need_nvflare
from fedlab.engines.nvflare.parties import parties
from fedlab.engines.nvflare.run_folder import FinishedRounds, SavedRun
from fedlab.engines.nvflare.simulation import SIMULATION, prepare_simulation
from fedlab.run.federate import make_run
from fedlab.run.history import noise_repeats
from fedlab.training.trainer import SiteTrainer

__all__ = ["Environment", "NVFlare", "Production", "ProofOfConcept", "Simulation"]


class Environment(Protocol):
    """Where a run is sent."""

    def rounds(self, saved: SavedRun, sites: Sequence[Site], *, have: int) -> Iterator[Round]:
        """The rounds of a run from number `have` on, each as it is finished."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """NVFLARE's simulator on this machine: one process per site, connected without encryption on loopback.

    Args:
        folder: for patients, checkpoints and logs; it is kept, and a run of the same plan with the same folder
            continues where it ended. By default a temporary folder, which is removed.
        threads: of torch in each process; by default as many as here, so that the weights are the same bits as with
            `Local()`.
        tries: how often a simulation that dies is started, to continue where it ended; on a busy machine NVFLARE's
            processes sometimes do not find each other at the start.
    """

    folder: Path | str | None = None
    threads: int | None = None
    tries: int = 3

    def rounds(self, saved: SavedRun, sites: Sequence[Site], *, have: int) -> Iterator[Round]:
        need_nvflare()
        check_site_names(saved.plan.sites)
        threads = self.threads or torch.get_num_threads()
        with _folder(self.folder) as folder:
            prepare_simulation(folder, sites, modules=saved.plan.modules)
            run = folder / "runs" / saved.plan.run
            if "stopped" in (how_it_ended(run) or {}):  # an earlier simulation in this folder has completed the run
                yield from FinishedRounds(run).since(have)
                return raise_if_failed(how_it_ended(run))
            for tries_left in reversed(range(self.tries)):
                with tempfile.TemporaryDirectory() as scratch:
                    job = saved.write_job(Path(scratch) / "job", threads)
                    for finished in self._once(folder, job, saved.plan, have, _variables(folder, threads)):
                        have = finished.number + 1
                        yield finished
                how = how_it_ended(run)
                if how is not None or have >= saved.plan.rounds:
                    return raise_if_failed(how)
                if not tries_left:
                    log = (folder / "simulator.log").read_text(encoding="utf-8", errors="replace").splitlines()
                    errors = [line for line in log if "ERROR" in line or "Error" in line]
                    raise RunError("the simulation ended before its last round; its log says:\n"
                                   + "\n".join((errors or log)[-15:]))

    def _once(self, folder: Path, job: Path, plan: Plan, have: int, environment: Mapping[str, str]) -> Iterator[Round]:
        """Starts the simulator and yields the rounds that it finishes until it ends."""
        local, run = folder / "flare" / "local", folder / "runs" / plan.run
        local.mkdir(parents=True, exist_ok=True)
        (local / "resources.json").write_text(json.dumps({"format_version": 2, **class_rules()}), encoding="utf-8")
        (run / "end.json").unlink(missing_ok=True)
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
                for finished in FinishedRounds(run).since(have):
                    have = finished.number + 1
                    yield finished
                if over:
                    return
                # After the run has ended NVFLARE takes seconds to shut down.
                over = process.poll() is not None or how_it_ended(run) is not None
                if not over:
                    time.sleep(0.1)
        finally:
            _end_with_children(process)


@dataclass(frozen=True, kw_only=True)
class ProofOfConcept:
    """A server and sites as processes of this machine, each with its own certificate, as at hospitals.

    Args:
        folder: new or empty, for kits, patients, checkpoints and logs; it is kept. By default a temporary folder, which
            is removed.
        threads: as in `Simulation`.
        wait: seconds within which all must have started.
    """

    folder: Path | str | None = None
    threads: int | None = None
    wait: float = 180.0

    def rounds(self, saved: SavedRun, sites: Sequence[Site], *, have: int) -> Iterator[Round]:
        threads = self.threads or torch.get_num_threads()
        need_nvflare()
        check_site_names(names := saved.plan.sites)
        with _folder(self.folder) as folder, parties(folder, _variables(folder, threads)) as start:
            kits = make_kits(folder / "project", server="localhost", sites=names, port=free_port())
            prepare_simulation(folder, sites, modules=saved.plan.modules)
            for name in ("server", *names):
                start(kits / name)
            researcher = Production(kit=kits / "admin", threads=threads, wait=self.wait, repeatable_noise=True)
            yield from researcher.rounds(saved, sites, have=have)


@dataclass(frozen=True, kw_only=True)
class Production:
    """A server and sites that run elsewhere, reached with the researcher's startup kit.

    The run is stored at the server: a notebook that is closed and run again receives the rounds that were finished
    meanwhile and follows the others.

    Args:
        kit: the folder `kits/admin` made by `fedlab deploy init`.
        threads: of torch at the sites; by default each site's own choice.
        wait: seconds until enough sites must be connected for a job to begin.
        patience: seconds for which the server may be unreachable, such as for a restart.
        repeatable_noise: whether to send a run whose noise repeats with its seed. The server knows the seed and can
            subtract that noise: for research only.
    """

    kit: Path | str
    threads: int = 0
    wait: float = 600.0
    patience: float = 600.0
    repeatable_noise: bool = False

    def rounds(self, saved: SavedRun, sites: Sequence[Site], *, have: int) -> Iterator[Round]:
        """The rounds of a run from number `have` on.

        Raises:
            PrivacyError: noise of the run repeats with its seed, and `repeatable_noise` does not allow it.
        """
        self._check_noise(saved)
        check_site_names(saved.plan.sites)
        with Admin(Path(self.kit), patience=self.patience) as admin:
            raise_if_failed((yield from watch(admin, saved, have=have, wait=self.wait, threads=self.threads)))

    def submit(self, folder: Path) -> str:
        """Submits the job of a run saved in a folder and returns the job's name.

        Raises:
            RunError: the folder holds no run, or the server does not accept it.
            PrivacyError: as `rounds`.
        """
        saved = SavedRun.read(folder)
        self._check_noise(saved)
        with Admin(Path(self.kit), patience=20.0) as admin:
            return admin.submit(saved, threads=self.threads)

    def follow(self, folder: Path) -> Iterator[str]:
        """Submits a run saved in a folder, or continues it, and writes its rounds and final weights into the folder.

        Yields:
            A line about each round.

        Raises:
            RunError, PrivacyError: as `NVFlare.rounds`.
        """
        saved, kept = SavedRun.read(folder), FinishedRounds(folder)
        for finished in self.rounds(saved, [], have=len(kept)):
            kept.add(finished)
            absent = "".join(f"; {site} is not in it: {why}" for site, why in finished.absent.items())
            yield (f"round {finished.number + 1} of {saved.plan.rounds}: {len(finished.sites)} sites, "
                   f"{finished.seconds:.1f} s{absent}")
        for last in kept.since(max(0, len(kept) - 1)):
            weights = folder / "weights.safetensors"
            save_run_weights(weights, last.state.model, plan=saved.plan)
            yield f"weights after round {last.number + 1}: {weights}"

    def _check_noise(self, saved: SavedRun) -> None:
        if saved.noise_repeats and self.repeatable_noise is not True:
            raise PrivacyError("noise of this run repeats with its seed, so the server, which knows the seed, can "
                               "subtract it; say secure_mode=True in each technique and aggregation that adds noise. "
                               "For research only: Production(repeatable_noise=True), or fedlab deploy submit "
                               "--repeatable-noise")


class NVFlare:
    """Runs on NVIDIA FLARE 2.9: `federate(trainer, sites, ..., engine=NVFlare())`.

    The same trainer, strategy, technique, aggregation, topology and rules travel as plain data, weights as safetensors;
    nothing is pickled, and no code travels. The loop runs at the server, in a folder there that outlives jobs, restarts
    and this notebook; each round is returned when it is finished, with the global weights. The rest of the server's
    state, such as the moments of its optimiser, stays there.

    Args:
        env: `Simulation()` by default, `ProofOfConcept()` or `Production(kit=...)`. In production `sites` are names
            and the patients are at the sites; otherwise they are sites of this process, written to a folder.
        seconds: longest time for a site's answer in a round. By default the admission rules' deadline and a minute, or
            ten minutes and another one per step and patient of a batch: a site that is gone is noticed much earlier,
            so this matters for one that hangs.
        patience: seconds without a sign of life after which a site counts as gone in this round.

    Raises:
        ValueError: a time that is not positive.
    """

    def __init__(self, *, env: Environment | None = None, seconds: float | None = None, patience: float = 30.0) -> None:
        check_positive(patience=patience)
        check_positive(optional=True, seconds=seconds)
        self.env: Environment = Simulation() if env is None else env
        self.seconds, self.patience = seconds, patience

    def rounds(self, run: Run, state: ServerState | None) -> Iterator[Round]:
        """Sends the run and yields its rounds as they are finished; see `each_round`.

        Raises:
            ValueError: something of the run cannot travel.
            PrivacyError: a technique that cannot travel, or that no site accepts.
            RunError: NVFLARE or the server fails, or continues from another state than this one.
        """
        return self._rounds(self._saved(run), run.sites, state)

    def save(self, folder: Path | str, trainer: SiteTrainer, sites: Sequence[Site | str], **settings: Any) -> Path:
        """Writes a run to a new or empty folder, for `fedlab deploy submit FOLDER --kit KIT`.

        Trainer, sites and settings are those of `each_round`.

        Raises:
            ValueError, PrivacyError: as in `rounds`, or parts that do not work together.
            RunError: the folder exists and is not empty.
        """
        return self._saved(make_run(trainer, sites, engine=self, **settings)).write(Path(folder))

    def _saved(self, run: Run) -> SavedRun:
        plan = Plan.of(trainer=run.trainer, strategy=run.strategy, privacy=run.privacy, aggregation=run.aggregation,
                       topology=run.topology, admission=run.admission, rounds=run.rounds, seed=run.seed,
                       sites=run.sites)
        return SavedRun(plan=plan, start=pack_weights(run.trainer.initial_model()), patience=self.patience,
                        seconds=self.seconds or _seconds(run), noise_repeats=noise_repeats(run))

    def _rounds(self, saved: SavedRun, sites: Sequence[Site], state: ServerState | None) -> Iterator[Round]:
        number = 0 if state is None else state.round
        for finished in self.env.rounds(saved, sites, have=max(0, number - 1)):
            if finished.number >= number:
                yield finished
            elif state is not None and weights_sha256(finished.state.model) != weights_sha256(state.model):
                raise RunError(f"after round {number - 1} the server's model differs from the one here; continue with "
                               "the checkpoint of this very run, or without one")

    def __repr__(self) -> str:
        shown = [f"env={self.env!r}"] + ([] if self.seconds is None else [f"seconds={self.seconds:g}"])
        return f"NVFlare({', '.join(shown)})"


def _seconds(run: Run) -> float:
    deadline: float | None = getattr(run.admission, "deadline", None)
    if deadline is not None:
        return deadline + 60
    steps = run.trainer.steps if run.trainer.steps is not None else 1000 * (run.trainer.epochs or 1)
    return 600.0 + 60.0 * steps * run.trainer.batch_size


def _variables(folder: Path, threads: int) -> dict[str, str]:
    """Environment variables of processes of this machine: the data's folder, threads, and this process's modules."""
    return {SIMULATION: str(folder), "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}


def how_it_ended(run: Path) -> Mapping[str, Any] | None:
    """The server's note at the end of a job, if there is one."""
    try:
        note = json.loads((run / "end.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return note if isinstance(note, dict) else None


def raise_if_failed(how: Mapping[str, Any] | None) -> None:
    """Raises the error, `PrivacyBudgetExhausted`, `PrivacyError` or `RunError`, that has ended a run at the server."""
    if how and how.get("stopped"):
        raise PrivacyBudgetExhausted(str(how["stopped"]))
    if how and "failed" in how:
        raise (PrivacyError if how.get("kind") == "PrivacyError" else RunError)(f"at the server: {how['failed']}")


@contextlib.contextmanager
def _folder(wanted: Path | str | None) -> Iterator[Path]:
    if wanted is not None:
        Path(wanted).mkdir(parents=True, exist_ok=True)
        yield Path(wanted).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="fedlab-", ignore_cleanup_errors=True) as scratch:
        yield Path(scratch).resolve()


def _end_with_children(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and all its descendants."""
    import psutil

    with contextlib.suppress(psutil.Error):
        family = [first := psutil.Process(process.pid), *first.children(recursive=True)]
        for one in family:
            with contextlib.suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(family, timeout=10)
    process.wait()
