"""The job that NVFLARE is given: names of installed classes, the plan of a run, and the weights it starts from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fedlab.core.errors import RunError
from fedlab.deploy.plan import Plan

__all__ = ["SavedRun", "job_name"]


def job_name(plan: Plan) -> str:
    """The name of every job of a run."""
    return f"fedlab-{plan.run[:12]}"


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """All that a run needs, as data.

    Attributes:
        plan: of the run. It goes to the server, which shows it to the sites.
        start: packed first weights.
        seconds: longest time for a site's answer.
        patience: seconds of silence after which a site counts as gone.
    """

    plan: Plan
    start: bytes
    seconds: float
    patience: float

    def write(self, folder: Path) -> Path:
        """Writes it to a new folder.

        Raises:
            RunError: the folder exists and isn't empty.
        """
        if folder.exists() and any(folder.iterdir()):
            raise RunError(f"{folder} is not empty; choose another folder, nothing is overwritten")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "start.safetensors").write_bytes(self.start)
        (folder / "times.json").write_text(json.dumps({"seconds": self.seconds, "patience": self.patience}),
                                           encoding="utf-8")
        (folder / "plan.json").write_text(self.plan.to_json(), encoding="utf-8")
        return folder

    @classmethod
    def read(cls, folder: Path) -> SavedRun:
        """A run that `write` has written.

        Raises:
            RunError: the folder holds none.
        """
        try:
            times = json.loads((folder / "times.json").read_text(encoding="utf-8"))
            return cls(plan=Plan.from_json((folder / "plan.json").read_text(encoding="utf-8"), sender=str(folder)),
                       start=(folder / "start.safetensors").read_bytes(), seconds=float(times["seconds"]),
                       patience=float(times["patience"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{folder} holds no run that NVFlare.save has written ({error})") from error

    def write_job(self, folder: Path, threads: int) -> Path:
        """Writes the job into `folder`, which is made.

        NVFLARE's own recipe for Collab would put the sources of our classes into the job and ask the sites to run
        them; here a job has no code, and sites take none.

        Args:
            folder: new.
            threads: of torch at the sites, 0 for their own choice.
        """
        plan = self.plan
        needed = len(plan.sites)
        if isinstance(plan.admission, dict):
            rules = plan.admission.get("with")
            fewest = rules.get("min_sites") if isinstance(rules, dict) else None
            needed = fewest if isinstance(fewest, int) else needed
        server = {"format_version": 2, "workflows": [{
            "id": "controller", "path": "nvflare.collab.runtime.controller.CollabController",
            "args": {"server_obj_id": "server_part", "sync_task_timeout": max(300, int(self.patience))}}],
            "components": [{"id": "server_part", "path": "fedlab.engines.nvflare.server_part.ServerPart",
                            "args": {"seconds": self.seconds, "patience": self.patience}}]}
        site = {"format_version": 2, "executors": [{"tasks": ["*"], "executor": {
            "id": "executor", "path": "nvflare.collab.runtime.executor.CollabExecutor",
            "args": {"client_obj_id": "site_part"}}}],
            "components": [{"id": "site_part", "path": "fedlab.engines.nvflare.site_part.SitePart",
                            "args": {"threads": threads}}]}
        meta = {"name": job_name(plan), "resource_spec": {}, "min_clients": needed,
                "deploy_map": {"server": ["server"], "site": list(plan.sites)}}
        for place, name, content in (("server", "config_fed_server.json", server),
                                     ("site", "config_fed_client.json", site)):
            (folder / place / "config").mkdir(parents=True)
            (folder / place / "config" / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
        (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        (folder / "server" / "config" / "plan.json").write_text(plan.to_json(), encoding="utf-8")
        (folder / "server" / "config" / "start.safetensors").write_bytes(self.start)
        return folder
