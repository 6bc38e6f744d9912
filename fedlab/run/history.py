"""What happened in a run: numbers per round and site, and the weights it ended with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from fedlab.core.protocols import Run
from fedlab.core.types import REPEATS, Round, ServerState, Spent
from fedlab.privacy.base import layers_at
from fedlab.run.svg_charts import chart

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["History", "draws_noise", "noise_repeats", "record_of"]


def _frame(rows: list[dict[str, Any]], *index: str, columns: Sequence[str] = ()) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows, columns=None if rows else [*index, *columns]).set_index(list(index))


def record_of(finished: Round) -> dict[str, Any]:
    """The numbers of a round as plain values."""
    return {
        "round": finished.number,
        "seconds": finished.seconds,
        "metrics": dict(finished.metrics),
        "sites": {name: dict(numbers) for name, numbers in finished.sites.items()},
        "spent": {name: [s._asdict() for s in spent] for name, spent in finished.spent.items() if spent},
        "absent": dict(finished.absent),
    }


def draws_noise(part: Any) -> bool:
    """Whether a technique or an aggregation adds noise that a guarantee rests on.

    One that works at the server and does not say otherwise is taken to add noise there, except one that only keeps
    tensors at the sites.
    """
    noise = bool(getattr(part, "noise_multiplier", "secure_mode" in dir(part)))
    return bool(part.units) or noise or (getattr(part, "works_at_server", False) and not part.keeps_tensors)


def noise_repeats(run: Run) -> bool:
    """Whether noise that a guarantee of the run rests on repeats with its seed."""
    parts: list[Any] = [run.aggregation, *(part for site in run.names for part in layers_at(run.privacy.layers, site))]
    return any(draws_noise(part) and getattr(part, "secure_mode", False) is not True for part in parts)


class History:
    """The record of a run, round by round. It holds one state, the last, however long the run.

    It is for the server only. Where noise is added at the server (`CentralGaussian`), no guarantee covers the numbers
    about single updates in `sites()` and `records`, such as their norms. Publish `table()` and `spent()` then, without
    the losses that such a technique withholds.

    Args:
        rounds: number of rounds the run was to have.
        privacy: the techniques of the run, as code.

    Attributes:
        stopped: why the run ended before its last round, if it did.
        state: the server's state after the last finished round, None before the first.
        site_states: what each site keeps for itself, by site, such as `history.site_states["site-01"].diagnostics`;
            empty where the sites work elsewhere.
        records: one plain dict per finished round; `table()` and `sites()` show them as tables.
    """

    def __init__(self, *, rounds: int, privacy: str = "Privacy()") -> None:
        self.rounds, self.privacy = rounds, privacy
        self.stopped: str | None = None
        self.state: ServerState | None = None
        self.site_states: Any = {}
        self.records: list[dict[str, Any]] = []

    def add(self, finished: Round) -> None:
        """Takes in a finished round."""
        self.state, self.site_states = finished.state, finished.site_states
        self.records.append(record_of(finished))

    def table(self) -> pd.DataFrame:
        """One row per round: mean training loss by weight, bytes sent, seconds, metrics of the global model."""
        rows = []
        for record in self.records:
            sites = list(record["sites"].values())
            weight = sum(s["weight"] for s in sites)
            known = sites and all("loss" in s for s in sites)  # a technique may withhold it
            loss = {"loss": sum(s["loss"] * s["weight"] for s in sites) / weight} if known else {}
            rows.append({"round": record["round"], **loss, "bytes": sum(s["bytes"] for s in sites),
                         "seconds": record["seconds"], **record["metrics"]})
        return _frame(rows, "round")

    def sites(self) -> pd.DataFrame:
        """One row per round and site: loss, norm of the update, weight, steps and bytes sent.

        These numbers are for the server only; see the class about noise at the server.
        """
        return _frame([{"round": record["round"], "site": name, **numbers}
                       for record in self.records for name, numbers in record["sites"].items()], "round", "site")

    def spent(self) -> pd.DataFrame:
        """One row per round, site and unit: privacy spent so far, with δ, adjacency, accountant, and whether the
        noise repeats with the seed, which is for research.

        Empty for a run without a formal guarantee. The site "server" stands for noise added there, whose guarantee
        holds for every site.
        """
        return _frame([{"round": record["round"], "site": name, **entry} for record in self.records
                       for name, entries in record["spent"].items() for entry in entries], "round", "site", "unit")

    def absent(self) -> pd.DataFrame:
        """One row per round and site whose update is not in the model, and why."""
        return _frame([{"round": record["round"], "site": name, "reason": reason} for record in self.records
                       for name, reason in record["absent"].items()], "round", "site", columns=("reason",))

    def guarantee(self) -> str:
        """The formal guarantee of the run so far, one sentence per unit, and the sites for which it gives none."""
        last: dict[str, dict[str, Spent]] = {}
        for record in self.records:
            for site, entries in record["spent"].items():
                for entry in entries:
                    last.setdefault(entry["unit"], {})[site] = Spent(**entry)
        sent = {site for record in self.records for site in (*record["sites"], *record["spent"])} - {"server"}
        out = []
        for spent in last.values():
            site = max(spent, key=lambda name, of=spent: (of[name].epsilon, name))  # type: ignore[misc]
            bare = [] if "server" in spent else sorted(sent - spent.keys())
            more = f" and {len(bare) - 6} more" if len(bare) > 6 else ""
            out.append(f"{spent[site]._replace(repeats=False)} at {site}"
                       + (f", none at {', '.join(bare[:6])}{more}" if bare else "")
                       + (f"; {REPEATS}" if any(one.repeats for one in spent.values()) else ""))
        return "; ".join(out) or "no formal guarantee"

    @contextmanager
    def progress(self, *, enabled: bool) -> Iterator[Callable[[], None]]:
        """A progress bar over the rounds; yields a function that moves it to the last finished round."""
        with tqdm(total=self.rounds, initial=len(self.records), desc="rounds", disable=not enabled) as bar:
            def show() -> None:
                last = self._latest()
                bar.set_postfix({k: f"{last[k]:.3f}" for k in ("loss", "Dice") if k in last}, refresh=False)
                bar.update(len(self.records) - bar.n)

            yield show

    def __repr__(self) -> str:
        if not self.records:
            return f"<History: no round of {self.rounds} finished>"
        shown = ", ".join(f"{k} {v:.3f}" for k, v in self._latest().items() if k not in ("bytes", "seconds"))
        early = f", stopped: {self.stopped}" if self.stopped else ""
        return f"<History: {len(self.records)} of {self.rounds} rounds, {shown}; {self.guarantee()}{early}>"

    def _latest(self) -> dict[str, float]:
        """The last known value of each number; a metric may be missing in some rounds."""
        last = self.table().ffill().iloc[-1].dropna()
        return {str(name): float(value) for name, value in last.items()}

    def _repr_html_(self) -> str:
        table = self.table()
        if table.empty:
            return f"<p>{escape(repr(self))}</p>"
        shown = [name for name in table if name not in ("bytes", "seconds") and table[name].notna().any()]
        drawn = "".join(self._chart(table[name].dropna()) for name in shown[:3])
        last = table.tail(10).astype({"bytes": int})
        html: str = last.to_html(float_format="{:.3f}".format, na_rep="–")
        early = f"<p>Stopped: {escape(self.stopped)}</p>" if self.stopped else ""
        return (f"<p>{len(self.records)} of {self.rounds} rounds; privacy: {escape(self.guarantee())}</p>{early}{drawn}"
                f"<p>The last {len(last)}:</p>{html}")

    def _chart(self, values: pd.Series[float]) -> str:
        points = [(index + 1, value) for index, value in zip(values.index.tolist(), values.tolist(), strict=True)]
        return chart(f"{values.name} {values.iloc[-1]:.3f}", {str(values.name): points}, rounds=self.rounds,
                     styles={str(values.name): ("#0072B2", "")})
