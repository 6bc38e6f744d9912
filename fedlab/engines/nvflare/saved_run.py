"""A run as data, in a folder or as the job that NVFLARE is given."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fedlab.core.errors import RunError
from fedlab.core.files import filled_in
from fedlab.deploy.plan import Plan

__all__ = ["SavedRun"]


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """Everything that a run needs, as data.

    Attributes:
        plan: of the run; the server receives it and shows it to the sites.
        start: packed first weights.
        seconds: longest time for a site's answer.
        patience: seconds of silence after which a site counts as gone.
    """

    plan: Plan
    start: bytes
    seconds: float
    patience: float

    @property
    def job_name(self) -> str:
        """The name of every job of the run."""
        return f"fedlab-{self.plan.run[:12]}"

    def write(self, folder: Path) -> Path:
        """Writes it to a new folder.

        Raises:
            RunError: the folder exists and is not empty.
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
            raise RunError(f"{folder} holds no run written by NVFlare.save ({error})") from error

    def write_job(self, folder: Path, threads: int) -> Path:
        """Writes the job into `folder`, which is made.

        NVFLARE's own recipe for Collab would put the source of fedlab's classes into the job and ask the sites to run
        it; here a job holds no code, and sites accept none.

        Args:
            folder: new.
            threads: of torch at the sites, 0 for their own choice.
        """
        fewest = len(self.plan.sites)
        match self.plan.admission:
            case {"with": {"min_sites": int() as given}}:
                fewest = given
        text = filled_in("fedlab.engines.nvflare", "job.json", name=self.job_name, fewest=fewest, threads=threads,
                         sites=self.plan.sites, seconds=self.seconds, patience=self.patience)
        for place, content in json.loads(text).items():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_text(json.dumps(content, indent=1), encoding="utf-8")
        (folder / "server" / "config" / "plan.json").write_text(self.plan.to_json(), encoding="utf-8")
        (folder / "server" / "config" / "start.safetensors").write_bytes(self.start)
        return folder
