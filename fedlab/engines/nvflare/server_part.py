"""What NVFLARE runs at the server: the federated run itself, in a folder that outlives the job.

NVFLARE imports this module by its name from the installation at the server. A job holds no code.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from nvflare.collab import collab

from fedlab.core.types import Round
from fedlab.deploy.messages import unpack_weights
from fedlab.deploy.plan import Plan
from fedlab.engines.nvflare.kits import server_policy
from fedlab.engines.nvflare.run_folder import FinishedRounds
from fedlab.engines.nvflare.simulation import SIMULATION, simulated_policy
from fedlab.engines.nvflare.site_calls import Ended, SiteCall, SiteCalls
from fedlab.engines.remote import Remote
from fedlab.run.federate import federate

__all__ = ["ServerPart"]

#: Bytes of weights in one reply.
_CHUNK = 4 * 2**20
#: Seconds that a finished job waits for a researcher who has followed it.
_WATCHED = 15.0


class _Paused(Exception):
    """The job ends here and another one continues the run."""


class ServerPart:
    """One run, or a part of it, in one job.

    Args:
        seconds: longest time for a site's answer.
        patience: seconds of silence after which a site counts as gone.
    """

    def __init__(self, seconds: float = 3600.0, patience: float = 30.0) -> None:
        self.seconds, self.patience = seconds, patience
        self._finished: FinishedRounds | None = None
        self._lost: Callable[[], list[str]] = list  # sites that were gone when last asked, or when the job began
        self._end: dict[str, Any] | None = None  # how it ended
        self._told = False
        self._asked = 0.0
        self._pause = False

    @collab.main  # type: ignore[untyped-decorator]
    def run(self) -> None:
        """Begins the run of the job's plan or continues it, and waits until its follower has received everything."""
        context, workspace = collab.fl_ctx, collab.workspace
        config = Path(workspace.get_app_config_dir(context.get_job_id()))
        plan = Plan.from_json((config / "plan.json").read_text(encoding="utf-8"))
        kit, policy = Path(workspace.get_root_dir()), simulated_policy()
        folder = (kit if policy is None else Path(os.environ[SIMULATION])) / "runs" / plan.run
        policy = server_policy(kit) if policy is None else policy
        folder.mkdir(parents=True, exist_ok=True)
        finished = self._finished = FinishedRounds(folder)
        call = collab.context
        calls = SiteCalls({site.name: partial(SiteCall, site) for site in collab.clients}, seconds=self.seconds,
                          patience=self.patience, aborted=call.is_aborted)
        self._lost = lambda: sorted(calls.silent | (set(plan.sites) - set(calls.sites)))
        context.get_engine().register_app_command("fedlab", self.reply)

        def after(done: Round) -> None:
            finished.add(done)
            if self._pause and done.number + 1 < plan.rounds:
                raise _Paused

        try:
            with FileLock(folder / "lock", timeout=0):
                finished.catch_up(folder / "checkpoint")
                start = unpack_weights((config / "start.safetensors").read_bytes())
                parts = plan.parts(start, **policy.access(kit / "local" / "techniques"))
                engine = Remote(plan=plan, ask=calls.ask, ledgers=folder.parent.parent / "server-ledger")
                history = federate(**parts, engine=engine, checkpoint=folder / "checkpoint",
                                   trace=folder / "trace.jsonl", on_round=after, progress=False)
                self._end = {"stopped": history.stopped}
        except Timeout:
            self._end = {"failed": "another job is at work on this very run; wait for it or end it"}
        except _Paused:
            self._end = {"paused": True}
        except Ended:
            return  # the next job continues after the last finished round
        except Exception as error:
            self._end = {"failed": str(error), "kind": type(error).__name__}
            raise
        finally:
            if self._end is not None and not call.is_aborted():
                (folder / "end.json").write_text(json.dumps(self._end), encoding="utf-8")
                while self._asked and time.monotonic() - self._asked < _WATCHED and not (
                        self._told or call.is_aborted()):
                    time.sleep(0.2)

    def reply(self, topic: str, question: Any, context: Any) -> dict[str, Any]:
        """Answers the researcher: the new rounds, and pieces of the weights after one.

        `{"have": n}` asks for the rounds from n on, `{"weights": n, "from": bytes}` for a piece of the weights after
        round n; `{"pause": true}` ends the job after the present round. Topic and context are NVFLARE's.
        """
        self._asked = time.monotonic()
        finished, question = self._finished, question if isinstance(question, dict) else {}
        if finished is None:
            return {"rounds": [], "lost": []}
        if isinstance(number := question.get("weights"), int):
            data, start = finished.weights(number), int(question.get("from", 0))
            return {"piece": base64.b64encode(data[start:start + _CHUNK]).decode(), "size": len(data)}
        self._pause = self._pause or question.get("pause") is True
        have, end, ready = int(question.get("have", 0)), self._end, len(finished)
        rounds = [finished.text(number) for number in range(have, ready)]
        self._told = end is not None and have >= ready
        return {"rounds": rounds[:100], "lost": self._lost(), **({"end": end} if self._told else {})}
