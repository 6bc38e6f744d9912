"""What NVFLARE runs at a site: it passes the server's messages to the site's own `SiteHost`.

NVFLARE imports this module by its name from the installation at the site. A job holds no code.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from nvflare.collab import collab

from fedlab.core.errors import FedlabError, PrivacyError, RunError
from fedlab.core.text import without_folders
from fedlab.deploy.host import SiteHost
from fedlab.engines.nvflare.kits import site_folder
from fedlab.engines.nvflare.simulation import simulated_host
from fedlab.run.site_errors import kind_of

__all__ = ["SitePart"]

#: Seconds that the process of an ended job is given to release the site's folder.
_LET_GO = 30.0


class SitePart:
    """One site in one job.

    Errors are returned as values: NVFLARE would send the text and the traceback of an exception to the server, with all
    that they quote.

    Args:
        threads: of torch at this site; 0 leaves torch's own choice. The last bits of sums depend on it, so runs that
            are compared need the same number.
    """

    def __init__(self, threads: int = 0) -> None:
        self.threads = threads
        self._host: SiteHost | None = None
        self._busy = threading.Lock()  # a call that the server has given up may still run when the next one arrives

    @collab.init  # type: ignore[untyped-decorator]
    def prepare(self) -> None:
        """Imports slow modules before the server begins to count the seconds."""
        for module in ("monai.losses", "monai.transforms", "monai.networks.nets", "opacus", "torch._dynamo"):
            importlib.import_module(module)

    @collab.publish  # type: ignore[untyped-decorator]
    def alive(self) -> int:
        """Answers also while the site trains."""
        return os.getpid()

    @collab.publish  # type: ignore[untyped-decorator]
    def begin(self, plan: str, start: bytes) -> dict[str, Any]:
        """Takes part in a run, or says why this site refuses."""
        kit, name = Path(collab.workspace.get_root_dir()), str(collab.site_name)
        return self._told(lambda: self._open(kit, name).begin(plan, start))

    @collab.publish  # type: ignore[untyped-decorator]
    def train(self, run: str, state: bytes) -> dict[str, Any]:
        """The packed answer to a round."""
        return self._told(lambda: self._opened().train(run, state))

    @collab.publish  # type: ignore[untyped-decorator]
    def exchange(self, run: str, step: str, inbox: dict[str, bytes]) -> dict[str, Any]:
        """The site's part in one exchange of messages between the sites."""
        return self._told(lambda: self._opened().exchange(run, step, inbox))

    @collab.final  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Releases the site's folder for another job."""
        if self._host is not None:
            self._host.close()

    def _told(self, work: Callable[[], Any]) -> dict[str, Any]:
        """What the server receives: the value of the work, or the text of an error that is meant for it."""
        try:
            if collab.caller != "server":
                raise PrivacyError(f"only the server may ask this site for work, not {str(collab.caller)[:80]!r}")
            with self._busy:
                return {"value": work()}
        except FedlabError as error:
            return {"error": kind_of(error), "text": without_folders(str(error))}  # the host has decided what it tells
        except Exception as error:
            logging.getLogger(__name__).exception("this stays here: the server receives the kind of the error only")
            return {"error": "FedlabError", "text": f"{kind_of(error)}; its text stays in the log of this site"}

    def _open(self, kit: Path, name: str) -> SiteHost:
        if self._host is None and self.threads > 0:
            torch.set_num_threads(self.threads)
        end = time.monotonic() + _LET_GO
        while self._host is None:
            try:
                self._host = simulated_host(name) or SiteHost.open(site_folder(kit), progress=False)
            except (FedlabError, ValueError, OSError) as error:
                if not isinstance(error, RunError) or time.monotonic() > end:
                    logging.getLogger(__name__).exception("this site's folder cannot be used")
                    raise RunError(f"{name} cannot use its folder ({kind_of(error)}); the reason stays in its "
                                   "log") from None
                time.sleep(0.5)
        if (found := self._host.site.name) != name:
            self.close()
            self._host = None
            raise RunError(f"this kit is of {name}, but the folder it is linked to is of {found}")
        return self._host

    def _opened(self) -> SiteHost:
        if self._host is None:
            raise RunError("no run has begun at this site in this job")
        return self._host
