"""The runs on disk as a table of arms, Dice and privacy spent, and the paired difference of two of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlab.core.errors import RunError
from fedlab.core.settings import check_choice
from fedlab.core.types import Spent
from fedlab.evidence.differences import Difference, difference, groups, mean_dice

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RunOnDisk", "RunTable", "runs"]

_COLUMNS = ("main", "arms", "dice", "low", "high", "guarantee", "patients", "seed", "seconds", "fedlab", "begun",
            "state")


@dataclass(frozen=True, kw_only=True)
class RunOnDisk:
    """A run directory of `fedlab demo` or `fedlab run`.

    Attributes:
        folder: of the run.
        job: its settings.
        summary: its results; None if it was interrupted, and `fedlab resume` continues it.
    """

    folder: Path
    job: dict[str, Any]
    summary: dict[str, Any] | None

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Rows of `fedlab.evaluate` on the held-out patients, with a column "arm".

        Raises:
            RunError: the run is not finished, or its file is damaged.
        """
        import pandas as pd

        if self.summary is None:
            raise RunError(f"{self.folder} is not finished, so there are no scores; continue it with: fedlab resume "
                           f"{self.folder}")
        try:
            table = pd.read_csv(self.folder / "scores.csv", dtype={"site": str, "patient": str, "arm": str})
        except (OSError, ValueError) as error:
            raise RunError(f"{self.folder / 'scores.csv'} cannot be read: {error}") from error
        table["seed"] = self.job.get("seed", 0)
        return table

    def guarantee(self) -> str:
        """The privacy that the main arm's sites have spent, the largest ε per unit; "none" without a guarantee."""
        try:
            records = json.loads((self.folder / "history.json").read_text(encoding="utf-8"))
            spent = [Spent(**{"repeats": True, **entry}) for record in records[(self.summary or {})["main"]]
                     for entries in record["spent"].values() for entry in entries]
        except (OSError, ValueError, KeyError, TypeError):
            return "unknown"
        worst = {one.unit: one for one in sorted(spent, key=lambda one: one.epsilon)}
        return "; ".join(map(str, worst.values())) or "none"

    def row(self) -> dict[str, Any]:
        """The run as a row of a table."""
        begun = (self.folder / "job.json").stat().st_mtime
        found = self.summary
        if found is None:
            return {"seed": self.job.get("seed"), "begun": begun, "state": "not finished"}
        main = found["main"]
        dice, low, high = mean_dice(self.scores, main)
        return {"main": main, "arms": ", ".join(arm for arm in found["dice"] if arm != main), "dice": dice, "low": low,
                "high": high, "guarantee": self.guarantee(), "patients": found["patients"], "seed": found["seed"],
                "seconds": found["seconds"]["total"], "fedlab": found["versions"]["fedlab"], "begun": begun,
                "state": "finished"}


class RunTable:
    """The runs in a folder; `table` sorts them, `runs["name"]` opens one, `difference` compares two.

    Attributes:
        runs: by the names of their folders, the newest first.
    """

    def __init__(self, found: Sequence[RunOnDisk]) -> None:
        newest = sorted(found, key=lambda run: -(run.folder / "job.json").stat().st_mtime)
        self.runs = {run.folder.name: run for run in newest}

    def __getitem__(self, name: str) -> RunOnDisk:
        if name not in self.runs:
            raise RunError(f"there is no run {name!r}; there are {', '.join(self.runs) or 'none'}")
        return self.runs[name]

    def table(self, *, by: str = "begun", descending: bool = True) -> pd.DataFrame:
        """One row per run: its arms, the main arm's mean Dice with its 95 % interval over held-out patients, privacy,
        patients, seed, seconds, version, time of its beginning, and whether it is finished.

        Raises:
            ValueError: an unknown column to sort by.
        """
        import pandas as pd

        check_choice(_COLUMNS, by=by)
        rows = pd.DataFrame.from_dict({name: run.row() for name, run in self.runs.items()}, orient="index",
                                      columns=list(_COLUMNS))
        rows["begun"] = pd.to_datetime(rows["begun"], unit="s").dt.floor("s")
        return rows.sort_values(by, ascending=not descending, na_position="last", kind="stable").rename_axis("run")

    def scores(self, *names: str) -> pd.DataFrame:
        """The main arms' scores of several runs, each under the name of its run, as figures take them."""
        import pandas as pd

        parts = []
        for name in names:
            run = self[name]
            main = (run.summary or {}).get("main")
            parts.append(run.scores[groups(run.scores) == main].assign(arm=name, seed=0))
        return pd.concat(parts, ignore_index=True)

    def difference(self, one: str, other: str, **settings: Any) -> Difference:
        """The main arm of one run minus that of another, paired over the held-out patients that both have.

        Settings are those of `fedlab.evidence.difference`.

        Raises:
            RunError: a run is missing or not finished.
            ValueError: the runs were not scored on the same patients.
        """
        return difference(self.scores(one, other), one, other, **settings)

    def as_json(self) -> list[dict[str, Any]]:
        """The rows of `table` as plain values; None for what is not known."""
        table = self.table().assign(begun=lambda rows: rows["begun"].astype(str)).astype(object)
        return [{str(name): value for name, value in row.items()}
                for row in table.where(table.notna(), None).reset_index().to_dict("records")]

    def text(self, *, by: str = "begun") -> str:
        """The table for a terminal, the largest value of a column first, and below it the guarantees."""
        if not self.runs:
            return "no run"
        table = self.table(by=by)
        guarantees = [f"{run}: {text}" for run, text in table["guarantee"].dropna().items() if text != "none"]
        shown = table.drop(columns=["guarantee", "fedlab"]).to_string(float_format="{:.3f}".format, na_rep="–")
        return "\n".join([str(shown), *guarantees])

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        html: str = self.table().to_html(float_format="{:.3f}".format, na_rep="–")
        return html


def runs(folder: Path | str = "runs") -> RunTable:
    """All runs of `fedlab demo` and `fedlab run` in a folder; other folders are left out.

    Raises:
        RunError: there is no such folder.

    Example:
        >>> from pathlib import Path
        >>> Path("runs").mkdir(exist_ok=True)
        >>> fl.runs("runs")  # after `fedlab demo`: one row per run
        no run
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}; 'fedlab demo' makes one")
    found = []
    for path in [folder, *sorted(folder.iterdir())]:
        try:
            job = json.loads((path / "job.json").read_text(encoding="utf-8"))
            done = path / "summary.json"
            summary = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else None
        except (OSError, ValueError):
            continue
        if isinstance(job, dict) and str(job.get("format", "")).startswith("fedlab-job") and (
                summary is None or {"main", "dice", "versions"} <= set(summary)):
            found.append(RunOnDisk(folder=path, job=job, summary=summary))
    return RunTable(found)
