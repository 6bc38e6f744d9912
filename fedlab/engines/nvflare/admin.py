"""The researcher's connection to a server, over NVFLARE's admin interface: jobs, and following a run."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import math
import tempfile
import time
from collections.abc import Collection, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedlab.core.errors import FedlabError, RunError
from fedlab.core.types import Round
from fedlab.engines.nvflare.kits import need_nvflare
from fedlab.engines.nvflare.run_folder import SavedRun, read_round

__all__ = ["Admin", "watch"]

#: Seconds between questions, and between checks of the job and the sites.
_PAUSE, _CHECK_EVERY = 0.5, 3.0
#: Seconds after which a job that is reported as running, and is not, is over.
_STALE = 15.0
#: Jobs in a row that end without a new round and without a reason, before the run is given up.
_MOST_EMPTY = 3


class Admin(contextlib.AbstractContextManager["Admin"]):
    """A session with the server, opened again when it was lost. Its methods raise `RunError` where the server refuses.

    Args:
        kit: the researcher's startup kit.
        patience: seconds for which the server may be unreachable, such as for a restart.

    Raises:
        RunError: no such kit, or NVFLARE is missing.
    """

    def __init__(self, kit: Path, *, patience: float = 300.0) -> None:
        need_nvflare()
        self.kit, self.patience = kit, patience
        note = kit / "startup" / "fed_admin.json"
        if not note.is_file():
            raise RunError(f"{kit} is no startup kit of a researcher (it has no startup/fed_admin.json)")
        self._user = json.loads(note.read_text(encoding="utf-8"))["admin"]["username"]
        self._session: Any = None

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the session; jobs continue."""
        session, self._session = self._session, None
        if session is not None:
            with _quietly(), contextlib.suppress(Exception):
                session.close()

    def submit(self, saved: SavedRun, *, threads: int = 0) -> str:
        """Submits a job of a run, with `threads` of torch at the sites (0: their own choice); returns its name."""
        with tempfile.TemporaryDirectory() as scratch:
            job = saved.write_job(Path(scratch) / "job", threads)
            return str(self._do(lambda session: session.submit_job(str(job))))

    def sites(self) -> list[str]:
        """Names of the connected sites."""
        return sorted(self.heard_of())

    def heard_of(self) -> dict[str, float]:
        """When the server last heard of each connected site, by the server's clock."""
        return {site.name: float(site.last_connect_time)
                for site in self._do(lambda session: session.get_connected_client_list())}

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs that the server knows, as NVFLARE describes them."""
        return list(self._do(lambda session: session.list_jobs()))

    def job_of(self, name: str, *, besides: Collection[str] = ()) -> str | None:
        """A job of that name which is waiting or running, besides those that are known."""
        now = ("SUBMITTED", "APPROVED", "DISPATCHED", "RUNNING")
        found = (str(job["job_id"]) for job in self.jobs() if job.get("job_name") == name and job.get("status") in now)
        return next((job for job in found if job not in besides), None)

    def status(self, job: str) -> str:
        """NVFLARE's word for the state of a job, such as "RUNNING" or "FINISHED:COMPLETED"."""
        return str(self._do(lambda session: session.get_job_meta(job)).get("status"))

    def abort(self, job: str) -> None:
        """Ends a job; the finished rounds of its run remain, and another job can continue it."""
        self._do(lambda session: session.abort_job(job))

    def ask(self, job: str, question: dict[str, Any]) -> dict[str, Any] | None:
        """The running job's reply: an empty dict if the server reports that it is not running, None without a reply."""
        from nvflare.fuel.flare_api import api_spec

        try:
            reply = self._session_now().do_app_command(job, "fedlab", question)
        except api_spec.JobNotRunning:
            return {}
        except (api_spec.NoReply, api_spec.InternalError):
            return None  # not yet begun, or just over
        except (api_spec.AuthenticationError, api_spec.AuthorizationError) as error:
            raise RunError(f"the server refuses this: {error}") from error
        except Exception:  # of various types, when the server is gone: the next question connects again
            self.close()
            return None
        return reply if isinstance(reply, dict) else None

    def weights(self, job: str, number: int) -> bytes | None:
        """The packed weights after a round, fetched in pieces; None if the job is over before all have arrived."""
        data = b""
        while (reply := self.ask(job, {"weights": number, "from": len(data)})) and "piece" in reply:
            data += base64.b64decode(reply["piece"])
            if len(data) >= int(reply["size"]):
                return data
        return None

    def _do(self, call: Any) -> Any:
        """A call, repeated while the server is unreachable."""
        from nvflare.fuel.flare_api import api_spec

        end, pause = time.monotonic() + self.patience, 0.5
        while True:
            try:
                return call(self._session_now())
            except (api_spec.SessionClosed, api_spec.NoConnection) as error:
                self.close()
                if time.monotonic() + pause > end:
                    raise RunError(f"the server has not answered for {self.patience:g} s: {error}") from error
            except (api_spec.AuthenticationError, api_spec.AuthorizationError) as error:
                raise RunError(f"the server refuses this: {error}") from error
            except Exception as error:  # NVFLARE raises RuntimeError and others for what the server has refused
                raise RunError(f"the server could not do this: {error}") from error
            time.sleep(pause)
            pause = min(2 * pause, 10.0)

    def _session_now(self) -> Any:
        if self._session is None:
            from nvflare.apis.fl_exception import FLCommunicationError
            from nvflare.fuel.flare_api.api_spec import NoConnection
            from nvflare.fuel.flare_api.flare_api import new_secure_session

            with _quietly():
                try:
                    self._session = new_secure_session(self._user, str(self.kit), timeout=10.0)
                except FLCommunicationError as error:
                    raise NoConnection(str(error)) from error
            self._session.set_timeout(20.0)
        return self._session


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Suppresses what NVFLARE prints and logs while it connects; errors arrive as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def watch(admin: Admin, saved: SavedRun, *, have: int, wait: float,
          threads: int = 0) -> Generator[Round, None, Mapping[str, Any]]:
    """Yields the rounds of a run from number `have` on as they are finished, and returns how it has ended.

    A run is a sequence of jobs: the sites of an NVFLARE job are those that were connected when it began. When the
    server was restarted, or a site is back that the job had lost, the next job continues the run.

    Args:
        have: number of the first round to yield.
        wait: seconds until enough sites must be connected for a job to begin.
        threads: of torch at the sites, 0 for their own choice.

    Raises:
        RunError: the server cannot be reached, or its jobs end without a reason.
    """
    empty, followed = 0, set[str]()
    while True:
        # A notebook that was closed has left its job running: it is followed, not begun again.
        left = admin.job_of(saved.job_name, besides=followed)
        follower = _Follower(admin, left or admin.submit(saved, threads=threads), saved.plan.sites, wait=wait)
        followed.add(follower.job)
        before = have
        for finished in follower.rounds(have):
            have = finished.number + 1
            yield finished
        if follower.end is not None and "paused" not in follower.end:
            return follower.end
        if have >= saved.plan.rounds:  # the job's last message was lost
            return {"stopped": None}
        empty = 0 if have > before or follower.end is not None else empty + 1
        if empty >= _MOST_EMPTY:
            raise RunError(f"{empty} jobs have ended without a round or a reason; the last one is {follower.status}. "
                           "fedlab deploy logs shows the logs of server and sites")


class _Follower:
    """One job.

    Attributes:
        end: how it reports its end, None if it ended without a report.
        status: NVFLARE's last word about it.
    """

    def __init__(self, admin: Admin, job: str, sites: Collection[str], *, wait: float) -> None:
        self.admin, self.job, self.sites, self.wait = admin, job, sites, wait
        self.end: Mapping[str, Any] | None = None
        self.status = "submitted"
        self._heard = time.monotonic()
        self._pause = False
        self._seen: dict[str, float] = {}  # when the server had last heard of a lost site as it was first missed

    def rounds(self, have: int) -> Iterator[Round]:
        """The job's rounds from a number on, until it ends."""
        checked = -math.inf
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
            if self.end is None and time.monotonic() - checked > _CHECK_EVERY:
                checked = time.monotonic()
                if reply:
                    self._pause_for_returned(reply.get("lost", []))
                elif self._is_over(not_running=reply is not None):
                    return
            if not reply or not reply.get("rounds"):
                time.sleep(_PAUSE)

    def _is_over(self, *, not_running: bool) -> bool:
        """Whether the job has ended; raises `RunError` where it has not begun, for lack of sites."""
        self.status, silent = self.admin.status(self.job), time.monotonic() - self._heard
        if self.status.startswith("FINISHED") or self.status in ("FAILED_TO_RUN", "ABANDONED", "None"):
            return True
        if self.status == "RUNNING" and not_running and silent > _STALE:
            return True  # a server that was killed still reports its old jobs as running
        if self.status in ("SUBMITTED", "APPROVED") and silent > self.wait:
            self.admin.abort(self.job)
            raise RunError(f"the job has not begun within {self.wait:g} s; connected are {self.admin.sites()}, the run "
                           f"is of {list(self.sites)}")
        return False

    def _pause_for_returned(self, lost: object) -> None:
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
