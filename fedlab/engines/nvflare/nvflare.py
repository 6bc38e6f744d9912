"""The engine that sends a run to NVIDIA FLARE and brings its rounds back, live."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedlab.core.errors import RunError
from fedlab.core.protocols import Topology
from fedlab.core.types import Memory, Round, ServerState, Site
from fedlab.core.weights import weights_sha256
from fedlab.deploy.messages import pack_weights
from fedlab.deploy.plan import Plan
from fedlab.engines.nvflare.environments import Environment, Simulation
from fedlab.engines.nvflare.named_sites import unseen_sites
from fedlab.engines.nvflare.saved_run import SavedRun
from fedlab.engines.remote import away
from fedlab.privacy.base import Privacy
from fedlab.run.admission import Admission
from fedlab.run.round import star
from fedlab.run.site_task import SiteTask
from fedlab.strategies.averaging import FedAvg, Strategy
from fedlab.training.trainer import SiteTrainer

__all__ = ["NVFlare"]


class NVFlare:
    """Runs on NVIDIA FLARE 2.9: `federate(trainer, sites, ..., engine=NVFlare())`.

    The same trainer, strategy, technique, topology and rules travel as plain data, weights as safetensors; nothing is
    pickled, and no code travels. The loop runs at the server, in a folder there that outlives jobs, restarts and this
    notebook; each round comes back when it is finished, with the global weights. What else the server's state holds,
    such as the moments of its optimiser, stays there.

    Args:
        env: `Simulation()` by default, `ProofOfConcept()` or `Production(kit=...)`. In production `sites` are names
            and the patients are at the sites; else they are sites of this process, written to a folder.
        seconds: longest time for a site's answer in a round. By default the admission rules' deadline and a minute, or
            ten minutes and another one for every step and patient of a batch: a site that is gone is noticed long
            before, so this matters for one that hangs.
        patience: seconds without a sign of life after which a site counts as gone in this round.

    Raises:
        ValueError: a time that is not positive.
    """

    def __init__(self, *, env: Environment | None = None, seconds: float | None = None, patience: float = 30.0) -> None:
        if patience <= 0 or (seconds is not None and seconds <= 0):
            raise ValueError(f"seconds and patience are positive numbers, got {seconds} and {patience}")
        self.env: Environment = Simulation() if env is None else env
        self.seconds, self.patience = seconds, patience
        self.memory: dict[str, Memory] = {}  # stays empty: what sites remember is on their own disks

    def placed(self, sites: Sequence[Site | str]) -> list[Site]:
        """The sites, with a stand-in for each that is only named."""
        return [away(site, patients=1) if isinstance(site, str) else site for site in sites]

    def rounds(self, task: SiteTask, sites: Sequence[Site], *, rounds: int, topology: Topology,
               admission: Admission | None, state: ServerState | None) -> Iterator[Round]:
        """Sends the run and yields its rounds as they are finished; see `each_round`.

        Raises:
            ValueError: parts that don't work together, or that can't travel.
            PrivacyError: a technique that can't travel, or that no site accepts.
            RunError: NVFLARE or the server fails, or goes on from another state than this one.
        """
        saved = SavedRun(plan=self._plan(task, sites, rounds, topology, admission), patience=self.patience,
                         start=pack_weights(task.trainer.initial()),
                         seconds=self.seconds or _seconds(task.trainer, admission))
        return self._rounds(saved, sites, state)

    def _plan(self, task: SiteTask, sites: Sequence[Site], rounds: int, topology: Topology,
              admission: Admission | None) -> Plan:
        unseen_sites(task, [site.name for site in sites], rounds=rounds, topology=topology)
        return Plan.of(trainer=task.trainer, strategy=task.strategy, privacy=task.privacy, topology=topology,
                       admission=admission, rounds=rounds, seed=task.seed, sites=sites)

    def _rounds(self, saved: SavedRun, sites: Sequence[Site], state: ServerState | None) -> Iterator[Round]:
        number = 0 if state is None else state.round
        for finished in self.env.rounds(saved.plan, sites, saved.write_job, have=max(0, number - 1)):
            if finished.number >= number:
                yield finished
            elif state is not None and weights_sha256(finished.state.params) != weights_sha256(state.params):
                raise RunError(f"after round {number - 1} the model at the server is another than the one here; go on "
                               "with the checkpoint of this very run, or without one")

    def save(self, folder: Path | str, trainer: SiteTrainer, sites: Sequence[Site | str], *,
             strategy: Strategy | None = None, privacy: Privacy | None = None, rounds: int = 10,
             topology: Topology = star, admission: Admission | None = None, seed: int = 0) -> Path:
        """Writes a run to a new folder, for `fedlab deploy submit FOLDER --kit KIT`; arguments as of `federate`.

        Raises:
            ValueError, PrivacyError: as in `rounds`.
            RunError: the folder exists and isn't empty.
        """
        folder, placed = Path(folder), self.placed(sites)
        task = SiteTask(trainer=trainer, privacy=Privacy() if privacy is None else privacy, seed=seed,
                        strategy=FedAvg() if strategy is None else strategy)
        plan = self._plan(task, placed, rounds, topology, admission)
        return SavedRun(plan=plan, start=pack_weights(trainer.initial()), patience=self.patience,
                        seconds=self.seconds or _seconds(trainer, admission)).write(folder)

    def __repr__(self) -> str:
        said = [f"env={self.env!r}"] + ([] if self.seconds is None else [f"seconds={self.seconds:g}"])
        return f"NVFlare({', '.join(said)})"


def _seconds(trainer: SiteTrainer, admission: Admission | None) -> float:
    if admission is not None and admission.deadline is not None:
        return admission.deadline + 60
    steps = trainer.steps if trainer.steps is not None else 1000 * (trainer.epochs or 1)
    return 600.0 + 60.0 * steps * trainer.batch_size
