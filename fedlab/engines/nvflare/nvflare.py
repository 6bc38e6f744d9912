"""The engine that sends a run to NVIDIA FLARE and yields its rounds as they are finished."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedlab.core.errors import RunError
from fedlab.core.protocols import Run
from fedlab.core.settings import check_positive
from fedlab.core.types import Round, ServerState, Site
from fedlab.core.weights import weights_sha256
from fedlab.deploy.messages import pack_weights
from fedlab.deploy.plan import Plan
from fedlab.engines.nvflare.environments import Environment, Simulation
from fedlab.engines.nvflare.run_folder import SavedRun
from fedlab.run.federate import make_run
from fedlab.training.trainer import SiteTrainer

__all__ = ["NVFlare"]


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
                        seconds=self.seconds or _seconds(run))

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
