"""What NVFLARE runs at the server: the federated run itself, in a folder that outlives the job.

NVFLARE imports this module by its name from what is installed at the server. A job carries no code.
"""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from nvflare.collab import collab

from fedlab.core.errors import RunError
from fedlab.core.types import Round
from fedlab.deploy.messages import unpack_weights
from fedlab.deploy.plan import Plan, make
from fedlab.deploy.policy import SitePolicy
from fedlab.engines.nvflare.cancellable import Line
from fedlab.engines.nvflare.kits import server_policy
from fedlab.engines.nvflare.named_sites import unseen_sites
from fedlab.engines.nvflare.run_folder import Diary
from fedlab.engines.nvflare.simulation import SIMULATION, simulated_policy
from fedlab.engines.nvflare.time_limits import Calls, Ended
from fedlab.engines.remote import Remote
from fedlab.run.admission import Admission
from fedlab.run.federate import federate

__all__ = ["CHUNK", "COMMAND", "ServerPart"]

#: The name under which NVFLARE hands the researcher's questions on to the running job.
COMMAND = "fedlab"
#: Bytes of weights that go into one reply.
CHUNK = 4 * 2**20
#: Seconds that a finished job waits for a researcher who was watching until then.
_WATCHED = 15.0


class _Paused(Exception):
    """The job ends here and another one goes on with the run."""


class ServerPart:
    """One run, or a part of it, in one job.

    Args:
        seconds: longest time for a site's answer.
        patience: seconds of silence after which a site counts as gone.
    """

    def __init__(self, seconds: float = 3600.0, patience: float = 30.0) -> None:
        self.seconds, self.patience = seconds, patience
        self._diary: Diary | None = None
        self._calls: Calls | None = None
        self._plan: Plan | None = None
        self._end: dict[str, Any] | None = None  # how it ended, once it has
        self._told = False
        self._asked = 0.0
        self._pause = False

    @collab.main  # type: ignore[untyped-decorator]
    def run(self) -> None:
        """Begins the run of the job's plan or goes on with it, and waits until who watches it has seen all."""
        context, workspace = collab.fl_ctx, collab.workspace
        config = Path(workspace.get_app_config_dir(context.get_job_id()))
        plan = self._plan = Plan.from_json((config / "plan.json").read_text(encoding="utf-8"))
        kit, policy = Path(workspace.get_root_dir()), simulated_policy()
        folder = (kit if policy is None else Path(os.environ[SIMULATION])) / "runs" / plan.run
        policy = server_policy(kit) if policy is None else policy
        folder.mkdir(parents=True, exist_ok=True)
        self._diary = Diary(folder)
        call = collab.context
        self._calls = Calls({site.name: Line(site) for site in collab.clients}, seconds=self.seconds,
                            patience=self.patience, aborted=call.is_aborted)
        context.get_engine().register_app_command(COMMAND, self.reply)
        try:
            with FileLock(folder / "lock", timeout=0):
                self._end = self._federate(plan, (config / "start.safetensors").read_bytes(), folder, policy,
                                            kit / "local" / "techniques")
        except Timeout:
            self._end = {"failed": "another job is at work on this very run; wait for it or end it"}
        except _Paused:
            self._end = {"paused": True}
        except Ended:
            return  # the run stands where it stood, and the next job goes on from there
        except Exception as error:
            self._end = {"failed": str(error), "kind": type(error).__name__}
            raise
        finally:
            if self._end is not None and not call.is_aborted():
                (folder / "end.json").write_text(json.dumps(self._end), encoding="utf-8")
                self._wait_for_watcher(call)

    def _federate(self, plan: Plan, start: bytes, folder: Path, policy: SitePolicy, techniques: Path) -> dict[str, Any]:
        """The run, from its beginning or from where an earlier job has left it."""
        def approve(module: str) -> None:
            policy.approve(module, techniques=techniques)

        if self._diary is None or self._calls is None:
            raise RunError("the job has not begun")
        self._diary.catch_up(folder / "checkpoint")
        task, topology = plan.task(unpack_weights(start), approve=approve), plan.make_topology(approve=approve)
        admission = make(plan.admission, approve=approve)
        if admission is not None and not isinstance(admission, Admission):
            raise RunError(f"the plan's admission rules are a {type(admission).__name__}")
        sites = unseen_sites(task, plan.sites, rounds=plan.rounds, topology=topology)
        history = federate(
            task.trainer, sites, strategy=task.strategy, privacy=task.privacy, rounds=plan.rounds, topology=topology,
            engine=Remote(plan=plan, ask=self._calls.ask), admission=admission, seed=plan.seed,
            checkpoint=folder / "checkpoint", trace=folder / "trace.jsonl", on_round=self._after, progress=False)
        return {"stopped": history.stopped}

    def _after(self, finished: Round) -> None:
        if self._diary is not None:
            self._diary.add(finished)
        if self._pause and self._plan is not None and finished.number + 1 < self._plan.rounds:
            raise _Paused

    def _wait_for_watcher(self, call: Any) -> None:
        while not self._told and not call.is_aborted() and time.monotonic() - self._asked < _WATCHED and self._asked:
            time.sleep(0.2)

    def reply(self, topic: str, question: Any, context: Any) -> dict[str, Any]:
        """Answers the researcher: what is new since a round, and pieces of the weights after one.

        Args:
            topic: `COMMAND`.
            question: `{"have": n}` asks for the rounds from n on, `{"weights": n, "from": bytes}` for a piece of the
                weights after round n; `{"pause": true}` ends the job after the present round.
            context: NVFLARE's.
        """
        self._asked = time.monotonic()
        diary, question = self._diary, question if isinstance(question, dict) else {}
        if diary is None:
            return {"rounds": [], "lost": []}
        if isinstance(number := question.get("weights"), int):
            data, start = diary.weights(number), int(question.get("from", 0))
            return {"piece": base64.b64encode(data[start:start + CHUNK]).decode(), "size": len(data)}
        self._pause = self._pause or question.get("pause") is True
        have, end = int(question.get("have", 0)), self._end
        ready = len(diary)
        rounds = [diary.text(number) for number in range(have, ready)]
        self._told = end is not None and have >= ready
        return {"rounds": rounds[:100], "lost": self._lost(),
                **({"end": end} if end is not None and have >= ready else {})}

    def _lost(self) -> list[str]:
        """Sites of the run that were gone when last asked, or weren't there when the job began."""
        if self._calls is None or self._plan is None:
            return []
        return sorted(self._calls.silent | (set(self._plan.sites) - set(self._calls.sites)))
