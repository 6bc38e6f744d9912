"""Following a run at a server: submits its job, hands on its rounds, and submits the next job where one is needed."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlab.core.errors import FedlabError, RunError
from fedlab.core.types import Round
from fedlab.deploy.plan import Plan
from fedlab.engines.nvflare.admin import Admin
from fedlab.engines.nvflare.run_folder import read_round
from fedlab.engines.nvflare.saved_run import job_name

__all__ = ["watch"]

#: Seconds between questions, and between looks at the job and the sites.
_PAUSE, _LOOK = 0.5, 3.0
#: Seconds after which a job that is said to run, and isn't running, is over.
_STALE = 15.0
#: Jobs in a row that end without a new round and without saying why, before the run is given up.
_VAIN = 3


def watch(admin: Admin, job: Path, plan: Plan, *, have: int, wait: float) -> Iterator[Round | Mapping[str, Any]]:
    """The rounds of a run from number `have` on as they are finished, and at last how it has ended.

    A run is a sequence of jobs: the sites of an NVFLARE job are those that were connected when it began. When the
    server was restarted, or a site is back that the job had lost, the next job goes on with the run.

    Args:
        admin: the connection.
        job: folder of the job.
        plan: of the run.
        have: number of the first round to hand on.
        wait: seconds until enough sites must be connected for a job to begin.

    Raises:
        RunError: the server is out of reach, or its jobs end without a word.
    """
    vain, followed = 0, set[str]()
    while True:
        # A notebook that was closed has left its job running: it is followed, not begun again.
        left = admin.job_of(job_name(plan), besides=followed)
        follower = _Follower(admin, left or admin.submit(job), plan, wait=wait)
        followed.add(follower.job)
        before = have
        for finished in follower.rounds(have):
            have = finished.number + 1
            yield finished
        if follower.end is not None and "paused" not in follower.end:
            yield follower.end
            return
        if have >= plan.rounds:  # the last words were lost on their way
            yield {"stopped": None}
            return
        vain = 0 if have > before or follower.end is not None else vain + 1
        if vain >= _VAIN:
            raise RunError(f"{vain} jobs have ended without a round or a word; the last stands at {follower.said}. "
                           "fedlab deploy logs shows what server and sites have to say")


class _Follower:
    """One job.

    Attributes:
        end: how it says that it has ended, None if it ended without saying so.
        said: NVFLARE's last words about it.
    """

    def __init__(self, admin: Admin, job: str, plan: Plan, *, wait: float) -> None:
        self.admin, self.job, self.plan, self.wait = admin, job, plan, wait
        self.end: Mapping[str, Any] | None = None
        self.said = "submitted"
        self._heard = time.monotonic()
        self._pause = False
        self._seen: dict[str, float] = {}  # when a lost site was last heard of, as it was when it was first missed

    def rounds(self, have: int) -> Iterator[Round]:
        """The job's rounds from a number on, until it ends."""
        looked = -math.inf
        while self.end is None:
            reply = self.admin.ask(self.job, {"have": have, **({"pause": True} if self._pause else {})})
            for text in reply.get("rounds", []) if reply else []:
                weights = self.admin.weights(self.job, have)
                if weights is None:
                    reply = None
                    break
                yield read_round(text, weights)
                have += 1
            if reply:
                self._heard, self.end = time.monotonic(), reply.get("end")
            if self.end is None and time.monotonic() - looked > _LOOK:
                looked = time.monotonic()
                if reply:
                    self._look_for(reply.get("lost", []))
                elif self._is_over(not_running=reply is not None):
                    return
            if not reply or not reply.get("rounds"):
                time.sleep(_PAUSE)

    def _is_over(self, *, not_running: bool) -> bool:
        """Whether the job has ended.

        Raises:
            RunError: it has not begun, for lack of sites.
        """
        self.said, silent = self.admin.status(self.job), time.monotonic() - self._heard
        if self.said.startswith("FINISHED") or self.said in ("FAILED_TO_RUN", "ABANDONED", "None"):
            return True
        if self.said == "RUNNING" and not_running and silent > _STALE:
            return True  # a server that was killed goes on calling its old jobs running
        if self.said in ("SUBMITTED", "APPROVED") and silent > self.wait:
            self.admin.abort(self.job)
            raise RunError(f"the job has not begun within {self.wait:g} s; connected are {self.admin.sites()}, the run "
                           f"is of {list(self.plan.sites)}")
        return False

    def _look_for(self, lost: object) -> None:
        """Asks the job to end after its round if a site that it has lost, or never had, is connected again."""
        if not isinstance(lost, list):
            raise FedlabError("the server sent something else than names of lost sites")
        if not lost:
            self._seen.clear()
            return
        heard = self.admin.heard_of()
        for name in lost:
            if name in heard and heard[name] > self._seen.setdefault(name, heard[name]):
                self._pause = True
            elif name not in heard:
                self._seen[name] = 0.0
