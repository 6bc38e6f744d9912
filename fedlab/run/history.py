"""What happened in a run: numbers per round and site, and the weights it ended with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from fedlab.core.hardware import computed_in
from fedlab.core.protocols import Elsewhere, Run
from fedlab.core.text import counted
from fedlab.core.types import REPEATS, Round, ServerState, Spent
from fedlab.privacy.base import layers_at
from fedlab.run.publishable import hidden_in, published
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
        "void": finished.void,
        "server_only": sorted(finished.server_only),
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

    What it prints and draws, `table()` and `guarantee()` may be published. `records`, `sites()`, `spent()` and
    `absent()` are the server's own: under a guarantee some of their numbers must not leave it. `published()` is the
    history without those; see `fedlab.run.publishable`.

    Args:
        rounds: number of rounds the run was to have.
        privacy: the techniques of the run, as code.
        remarks: what else must be said beside the guarantee.

    Attributes:
        precision: "bf16" or "fp32" where the run trains in this process or beside it; "" where sites decide.
        stopped: why the run ended before its last round, if it did.
        state: the server's state after the last finished round, None before the first.
        site_states: what each site keeps for itself, by site, such as `history.site_states["site-01"].diagnostics`;
            empty where the sites work elsewhere.
        records: one plain dict per finished round; `table()` and `sites()` show them as tables.
    """

    def __init__(self, *, rounds: int, privacy: str = "Privacy()", remarks: Sequence[str] = ()) -> None:
        self.rounds, self.privacy, self.remarks = rounds, privacy, tuple(remarks)
        self.precision = ""
        self.stopped: str | None = None
        self.state: ServerState | None = None
        self.site_states: Any = {}
        self.records: list[dict[str, Any]] = []

    @classmethod
    def of(cls, run: Run) -> History:
        """The history of a run that begins."""
        secure = f", aggregation={run.aggregation!r}" if run.aggregation.hides_updates else ""
        history = cls(rounds=run.rounds, privacy=f"{run.privacy!r}{secure}",
                      remarks=list(dict.fromkeys(remark for site in run.sites for remark in site.remarks)))
        if not isinstance(run.engine, Elsewhere):
            trainer = run.trainer
            history.precision = computed_in(trainer.model, trainer.precision, trainer.device)
        return history

    def published(self) -> History:
        """The history with those numbers only that may leave the server under the guarantee of the run."""
        out = History(rounds=self.rounds, privacy=self.privacy, remarks=self._remarks())
        out.records, out.state, out.stopped = [published(record) for record in self.records], self.state, self.stopped
        out.precision = self.precision
        if self.stopped and self.hides_sites:  # the reason may name sites, or say that they have withdrawn
            out.stopped = "the reason is in the server's own record"
        return out

    def _remarks(self) -> tuple[str, ...]:
        hiding = [record for record in self.records if "sites" in hidden_in(record)]
        more = ("what single sites have spent besides is in their own ledgers",) if any(
            record["spent"].keys() - {"server"} for record in hiding) else ()
        return (*self.remarks, *more)

    @property
    def hides_sites(self) -> bool:
        """Whether the numbers of single sites are for the server only, as where it adds the noise."""
        return any("sites" in hidden_in(record) for record in self.records)

    def add(self, finished: Round) -> None:
        """Takes in a finished round."""
        self.state, self.site_states = finished.state, finished.site_states
        self.records.append(record_of(finished))

    def table(self) -> pd.DataFrame:
        """One row per round: mean training loss by weight, bytes sent, seconds, metrics of the global model.

        It lacks what must not leave the server.
        """
        rows = []
        for record in map(published, self.records):
            sites = list(record["sites"].values())
            weight = sum(s["weight"] for s in sites)
            known = sites and all("loss" in s for s in sites)  # a technique may withhold it
            loss = {"loss": sum(s["loss"] * s["weight"] for s in sites) / weight} if known else {}
            sent = {} if "sites" in hidden_in(record) else {"bytes": sum(s["bytes"] for s in sites)}
            took = {"seconds": record["seconds"]} if "seconds" in record else {}
            rows.append({"round": record["round"], **loss, **sent, **took, **record["metrics"]})
        return _frame(rows, "round")

    def sites(self) -> pd.DataFrame:
        """One row per round and site: loss, norm of the update, weight, steps and bytes sent; for the server only."""
        return _frame([{"round": record["round"], "site": name, **numbers}
                       for record in self.records for name, numbers in record["sites"].items()], "round", "site")

    def spent(self) -> pd.DataFrame:
        """One row per round, site and unit: privacy spent so far, with δ, adjacency, accountant, and whether the
        noise repeats with the seed, which is for research.

        Empty for a run without a formal guarantee. The site "server" stands for noise added there, whose guarantee
        holds for every site. Where there is such noise, the rows of single sites are for the server only.
        """
        return _frame([{"round": record["round"], "site": name, **entry} for record in self.records
                       for name, entries in record["spent"].items() for entry in entries], "round", "site", "unit")

    def absent(self) -> pd.DataFrame:
        """One row per round and site whose update is not in the model, and why; for the server only."""
        return _frame([{"round": record["round"], "site": name, "reason": reason} for record in self.records
                       for name, reason in record["absent"].items()], "round", "site", columns=("reason",))

    def guarantee(self) -> str:
        """The formal guarantee of the run so far, one sentence per unit, and the sites for which it gives none."""
        last: dict[str, dict[str, Spent]] = {}
        records = list(map(published, self.records))
        for record in records:
            for site, entries in record["spent"].items():
                for entry in entries:
                    last.setdefault(entry["unit"], {})[site] = Spent(**entry)
        sent = {site for record in records for site in (*record["sites"], *record["spent"])} - {"server"}
        out = []
        for spent in last.values():
            site = max(spent, key=lambda name, of=spent: (of[name].epsilon, name))  # type: ignore[misc]
            bare = [] if "server" in spent else sorted(sent - spent.keys())
            more = f" and {len(bare) - 6} more" if len(bare) > 6 else ""
            out.append(f"{spent[site]._replace(repeats=False)} at {site}"
                       + (f", none at {', '.join(bare[:6])}{more}" if bare else "")
                       + (f"; {REPEATS}" if any(one.repeats for one in spent.values()) else ""))
        out += self._remarks() if out else ()
        return "; ".join(out) or "no formal guarantee"

    @contextmanager
    def progress(self, *, enabled: bool, sites: Sequence[str] = ()) -> Iterator[Callable[[], None]]:
        """A progress bar over the rounds, with the name of a site alone; yields a function that moves it on."""
        timeless = "{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}" if self.privacy != "Privacy()" else None
        name = f"{sites[0]}, rounds" if len(sites) == 1 else "rounds"
        with tqdm(total=self.rounds, initial=len(self.records), desc=name, disable=not enabled,
                  bar_format=timeless) as bar:
            def show() -> None:
                last = self._latest()
                bar.set_postfix({k: f"{last[k]:.3f}" for k in ("loss", "Dice") if k in last}, refresh=False)
                bar.update(len(self.records) - bar.n)

            yield show

    def __repr__(self) -> str:
        if not self.records:
            return f"<History: no round of {self.rounds} finished>"
        shown = "".join(f", {k} {v:.3f}" for k, v in self._latest().items() if k not in ("bytes", "seconds"))
        stopped = self.published().stopped
        early = f", stopped: {stopped}" if stopped else ""
        return f"<History: {len(self.records)} of {counted(self.rounds, 'round')}{shown}; {self.guarantee()}{early}>"

    def _latest(self) -> dict[str, float]:
        """The last known value of each number; a metric may be missing in some rounds."""
        last = self.table().ffill().iloc[-1].dropna()
        return {str(name): float(value) for name, value in last.items()}

    def _repr_html_(self) -> str:
        table, stopped = self.table(), self.published().stopped
        if table.empty:
            return f"<p>{escape(repr(self))}</p>"
        shown = [name for name in table if name not in ("bytes", "seconds") and table[name].notna().any()]
        drawn = "".join(self._chart(table[name].dropna()) for name in shown[:3])
        last = table.tail(10).astype({name: int for name in ("bytes",) if name in table})
        html: str = last.to_html(float_format="{:.3f}".format, na_rep="–")
        early = f"<p>Stopped: {escape(stopped)}</p>" if stopped else ""
        return (f"<p>{len(self.records)} of {counted(self.rounds, 'round')}; "
                f"privacy: {escape(self.guarantee())}</p>{early}{drawn}"
                f"<p>The last {len(last)}:</p>{html}")

    def _chart(self, values: pd.Series[float]) -> str:
        points = [(index + 1, value) for index, value in zip(values.index.tolist(), values.tolist(), strict=True)]
        return chart(f"{values.name} {values.iloc[-1]:.3f}", {str(values.name): points}, rounds=self.rounds,
                     styles={str(values.name): ("#0072B2", "")})
