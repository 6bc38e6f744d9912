"""The researcher's connection to a server: jobs and what they have to say, over NVFLARE's admin interface."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from fedlab.core.errors import RunError
from fedlab.engines.nvflare.requirement import need_nvflare

__all__ = ["Admin"]


class Admin:
    """A session with the server, opened again when it was lost.

    Args:
        kit: the researcher's startup kit.
        patience: seconds for which the server may be gone, such as for a restart.

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

    def __enter__(self) -> Admin:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the session; nothing happens to jobs."""
        session, self._session = self._session, None
        if session is not None:
            with _quietly(), contextlib.suppress(Exception):
                session.close()

    def submit(self, job: Path) -> str:
        """Hands in a job and returns its name.

        Raises:
            RunError: the server can't be reached or doesn't take it.
        """
        return str(self._do(lambda session: session.submit_job(str(job))))

    def sites(self) -> list[str]:
        """Names of the sites that are connected."""
        return sorted(site.name for site in self._do(lambda session: session.get_connected_client_list()))

    def heard_of(self) -> dict[str, float]:
        """When the server last heard of each connected site, by the server's clock."""
        return {site.name: float(site.last_connect_time)
                for site in self._do(lambda session: session.get_connected_client_list())}

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs that the server knows, as NVFLARE describes them."""
        return list(self._do(lambda session: session.list_jobs()))

    def job_of(self, name: str, *, besides: Collection[str] = ()) -> str | None:
        """The job of that name which is waiting or running now, if there is one, besides those that are known."""
        now = ("SUBMITTED", "APPROVED", "DISPATCHED", "RUNNING")
        found = [str(job["job_id"]) for job in self.jobs() if job.get("job_name") == name and job.get("status") in now]
        return next((job for job in found if job not in besides), None)

    def status(self, job: str) -> str:
        """NVFLARE's word for how a job stands, such as "RUNNING" or "FINISHED:COMPLETED"."""
        return str(self._do(lambda session: session.get_job_meta(job)).get("status"))

    def abort(self, job: str) -> None:
        """Ends a job; what its run has done stands, and another job can go on with it."""
        self._do(lambda session: session.abort_job(job))

    def ask(self, job: str, question: dict[str, Any]) -> dict[str, Any] | None:
        """What the running job answers: an empty dict if the server says that it isn't running, None if nothing came.

        Raises:
            RunError: the server doesn't let this researcher ask.
        """
        from nvflare.fuel.flare_api import api_spec

        try:
            reply = self._session_now().do_app_command(job, "fedlab", question)
        except api_spec.JobNotRunning:
            return {}
        except (api_spec.NoReply, api_spec.InternalError):
            return None  # not yet begun, or just over
        except (api_spec.AuthenticationError, api_spec.AuthorizationError) as error:
            raise RunError(f"the server refuses this: {error}") from error
        except Exception:  # whatever it is that NVFLARE raises when the server is gone: the next question connects anew
            self.close()
            return None
        return reply if isinstance(reply, dict) else None

    def weights(self, job: str, number: int) -> bytes | None:
        """The packed weights after a round, fetched piece by piece, or None if the job is over before all are here."""
        data = b""
        while True:
            reply = self.ask(job, {"weights": number, "from": len(data)})
            if not reply or "piece" not in reply:
                return None
            data += base64.b64decode(reply["piece"])
            if len(data) >= int(reply["size"]):
                return data

    def _do(self, call: Any) -> Any:
        """A call, tried again while the server is gone."""
        from nvflare.fuel.flare_api import api_spec

        for last in _until(self.patience):
            try:
                return call(self._session_now())
            except (api_spec.SessionClosed, api_spec.NoConnection) as error:
                self.close()
                if last:
                    raise RunError(f"the server has not answered for {self.patience:g} s: {error}") from error
            except (api_spec.AuthenticationError, api_spec.AuthorizationError) as error:
                raise RunError(f"the server refuses this: {error}") from error
            except Exception as error:  # NVFLARE raises RuntimeError and others for what the server has refused
                raise RunError(f"the server could not do this: {error}") from error
        raise RunError("the server was not asked")

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


def _until(seconds: float) -> Iterator[bool]:
    """Tries with pauses between them for so long; True with the last."""
    end, pause = time.monotonic() + seconds, 0.5
    while time.monotonic() + pause < end:
        yield False
        time.sleep(pause)
        pause = min(2 * pause, 10.0)
    yield True


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """NVFLARE prints and logs while it connects; what matters of it comes as an exception."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
