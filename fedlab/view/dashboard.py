"""A live view of a run in the background of a notebook, with buttons; in JupyterLab and in Voilà."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from fedlab.core.types import Spent
from fedlab.privacy.base import Privacy
from fedlab.view.background_run import BackgroundRun
from fedlab.view.privacy_figures import privacy_curves
from fedlab.view.run_figures import curves
from fedlab.view.style import Picture
from fedlab.view.svg_charts import Points, chart, colours_of, legend
from fedlab.view.widget_snapshot import display_live, live_bundle

__all__ = ["RunDashboard"]

_SIGNS = {"ready": "#666666", "running": "#009E73", "pausing": "#E08A00", "paused": "#E08A00", "stopping": "#B3261E",
          "stopped": "#B3261E", "finished": "#0072B2", "failed": "#B3261E"}
_LEAST = 0.3  # seconds between two refreshes, however short the rounds
_UNDER_GUARANTEE = ("Under the guarantee losses and other numbers of the training stay at the sites. The Dice of "
                    "held-out patients, where it is measured, is outside the guarantee.")
_AT_HOME = ("What was clipped comes from the memory of the sites, which a simulation holds; in a deployment these "
            "numbers never leave the site.")


class RunDashboard:
    """What a `BackgroundRun` is doing, renewed after every round, with buttons to start, pause, step and stop it.

    For each site: training loss, Dice of its held-out patients (with `validate=SiteDice(sites=…)`), norm and bytes of
    its updates, how much was clipped, ε spent against the budget, and the rounds it missed, with the reason. Where a
    guarantee keeps numbers at the site, it says so. An ε always comes with δ, unit, adjacency and accountant.

    Shown again, as when its cell is run again, it is another look at the same run and the same widgets. Without a
    kernel, as in an exported notebook, the state that was last sent stays: that at the start, at a pause, at the end,
    and after `wait()`.

    Args:
        run: a `BackgroundRun`, started or not.
        budget: the ε that the run may spend, drawn as a line; by default the `max_epsilon` of its techniques.
        metric: of the rounds' metrics, the one that is followed; sites have "<metric>, <site>".

    Raises:
        ValueError: `budget` is not a positive number.
        TypeError: `run` is no `BackgroundRun`.
    """

    def __init__(self, run: BackgroundRun, *, budget: float | None = None, metric: str = "Dice") -> None:
        if not isinstance(run, BackgroundRun):
            raise TypeError(f"expected a BackgroundRun, got {type(run).__name__}; make one from the arguments of "
                            "federate: BackgroundRun(trainer, sites, rounds=…).start()")
        if budget is not None and not 0 < budget < math.inf:
            raise ValueError(f"budget is a positive ε, got {budget!r}")
        self.run, self.budget, self.metric = run, budget, metric
        if "dashboard" not in run.views:
            run.views["dashboard"] = _Panel(run)
        self._panel: _Panel = run.views["dashboard"]
        self._panel.content = self.html
        self._panel.refresh()

    @property
    def widget(self) -> Any:
        """The ipywidgets box that is shown: for an app of one's own."""
        return self._panel.box

    def html(self) -> str:
        """The dashboard without its buttons, as it is now: one self-contained piece of HTML."""
        return _Page(self.run, self.budget, self.metric).html()

    def figure(self) -> Picture:
        """The curves as a figure to keep: what was learned, and what was spent if there is a guarantee.

        Raises:
            ValueError: no round has ended yet.
        """
        history = self.run.history
        if not history.records:
            raise ValueError("no round has ended yet, so there is no curve to draw")
        if not history.spent().empty:
            return privacy_curves(history, metric=self.metric, budget=self.budget)
        return curves({"federated": history}, metric=self.metric)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        return live_bundle(self.widget, text=repr(self), html=self.html(),
                           picture=self.figure if self.run.history.records else None)

    def _ipython_display_(self) -> None:
        self._panel.shown(display_live(self._repr_mimebundle_))

    def __repr__(self) -> str:
        return f"RunDashboard({self.run!r})"


class _Panel:
    """The widgets of one run: made once, whoever looks at them."""

    def __init__(self, run: BackgroundRun) -> None:
        import ipywidgets as widgets

        self.run = run
        self.content: Callable[[], str] = str
        self._lock, self._last, self._drawn = threading.RLock(), -math.inf, ""
        self._displays: list[Callable[[], None]] = []
        self.note = widgets.HTML()
        self.page = widgets.HTML()
        self.buttons = {name: widgets.Button(description=text, icon=icon, tooltip=tip, button_style=style,
                                             layout=widgets.Layout(width="110px"))
                        for name, text, icon, tip, style in (
                            ("start", "Start", "play", "Begin, or go on until the last round", "success"),
                            ("pause", "Pause", "pause", "Pause after the round that is being worked on", ""),
                            ("step", "Step", "step-forward", "One round, then pause", ""),
                            ("stop", "Stop", "stop", "End after the round that is being worked on; what is finished "
                             "stays", "danger"))}
        for name, button in self.buttons.items():
            button.on_click(self._clicked(getattr(run, name)))
        self.box = widgets.VBox([widgets.HBox([*self.buttons.values(), self.note]), self.page])
        run.on_change(self.refresh)

    def shown(self, update: Callable[[], None]) -> None:
        """A place of the notebook that shows it; its static picture is renewed when the run rests."""
        self._displays = [*self._displays[-3:], update]

    def refresh(self) -> None:
        """Brings the widgets up to date, at most every so often; at once when the run's state has changed."""
        with self._lock:
            state, now = self.run.state, time.monotonic()
            if state == self._drawn == "running" and now - self._last < _LEAST:
                return
            rests = state != self._drawn and (self.run.ended or state == "paused")
            self._drawn, self._last = state, now
            self.page.value = self.content()
            for name, button in self.buttons.items():
                button.disabled = state not in _WHEN[name]
            self.buttons["start"].description = "Start" if state == "ready" else "Go on"
            if rests or self._waited(state):
                for update in self._displays:
                    update()

    def _waited(self, state: str) -> bool:
        """Whether the notebook's own thread tells it, as `wait()` does: then what is sent belongs to that cell."""
        return threading.current_thread() is threading.main_thread() and state in ("paused", *_ENDS)

    def _clicked(self, act: Callable[[], object]) -> Callable[[object], None]:
        def handle(button: object) -> None:
            try:
                act()
                self.note.value = ""
            except Exception as error:  # where a button was clicked there is no cell to show it
                self.note.value = f'<span style="color:#B3261E">{escape(str(error))}</span>'

        return handle


_ENDS = ("stopped", "finished", "failed")
#: In which states a button can be pressed.
_WHEN = {"start": ("ready", "paused", "pausing"), "pause": ("running",), "step": ("ready", "paused"),
         "stop": ("running", "pausing", "paused")}


class _Page:
    """The content of the dashboard at one moment."""

    def __init__(self, run: BackgroundRun, budget: float | None, metric: str) -> None:
        self.run, self.history, self.metric = run, run.history, metric
        self.records = list(run.history.records)
        self.kept = dict(run.kept)
        self.budgets = _budgets(run, budget)
        names = [site.name for site in run.sites]
        self.sites = names
        self.styles = colours_of(names)
        self.private = bool(run.privacy.units) or any(record["spent"] for record in self.records)

    def html(self) -> str:
        more = {name: ("#222222", "") for name in ("all", "server") if name not in self.styles and (
            self._metric()[name] if name == "all" else any(name in record["spent"] for record in self.records))}
        parts = [self._head(), f'<div style="margin:6px 0;font-size:12px">{legend({**self.styles, **more})}</div>',
                 f'<div style="display:flex;flex-wrap:wrap">{"".join(self._charts())}</div>',
                 self._table(), *self._notes()]
        return f'<div style="font-family:sans-serif;color:#222;background:#fff;padding:8px">{"".join(parts)}</div>'

    def _head(self) -> str:
        run, done = self.run, len(self.records)
        share = 100 * done / max(self.history.rounds, 1)
        words = {"pausing": "pausing after this round", "stopping": "stopping after this round"}.get(
            run.state, run.state)
        mean = sum(record["seconds"] for record in self.records) / done if done else math.nan
        pace = f", {mean:.3g} s a round" if done else ""
        failed = "" if run.error is None else (
            f'<div style="color:#B3261E;white-space:pre-wrap"><b>{escape(type(run.error).__name__)}</b>: '
            f"{escape(str(run.error))}</div>")
        early = f"<div>{escape(self.history.stopped)}</div>" if self.history.stopped else ""
        return (f'<div><b style="color:{_SIGNS[run.state]}">● {words}</b> — {done} of {self.history.rounds} rounds'
                f'{pace}; {escape(self._technique())}</div><div style="background:#E4E4E4;height:6px;'
                f'margin:5px 0"><div style="background:{_SIGNS[run.state]};height:6px;width:{share:.1f}%"></div></div>'
                f"{early}{failed}")

    def _technique(self) -> str:
        return "no privacy technique" if self.history.privacy == repr(Privacy()) else self.history.privacy

    def _charts(self) -> list[str]:
        # Of a long run the axis shows what is done and a little more, or its beginning would be a line at the edge.
        rounds = max(1, min(self.history.rounds, max(10, math.ceil(1.25 * len(self.records)))))
        metric = self._metric()
        clipped = self._per_site(self._clipped)
        home = " A guarantee keeps it at the site." if self.private else ""

        def draw(title: str, lines: Mapping[str, Points], **more: Any) -> str:
            return chart(title, lines, styles=self.styles, rounds=rounds, **more)

        waiting = "" if self.records else "nothing yet"
        return [
            draw("Training loss", self._per_site(lambda r, site: r["sites"][site].get("loss")),
                 note=waiting or f"No site reports its loss.{home}"),
            draw(f"{self.metric} of held-out patients", metric, bottom=0, top=1 if self.metric == "Dice" else None,
                 bold="all", note=waiting or "Not measured: give validate=SiteDice(sites=sites)"),
            draw("Norm of the update that was sent", self._per_site(lambda r, site: r["sites"][site]["norm"]),
                 bottom=0),
            draw("Share that was clipped", clipped, bottom=0, top=1,
                 note=waiting or "No technique of this run says what it clipped."),
            draw("Bytes sent so far [MB]", self._bytes(), bottom=0),
            *self._epsilons(draw),
        ]

    def _per_site(self, read: Callable[[dict[str, Any], str], float | None]) -> dict[str, Points]:
        """Name -> (rounds finished, value) for every round in which the site took part and has the number."""
        return {name: [(record["round"] + 1.0, value) for record in self.records if name in record["sites"]
                       and (value := read(record, name)) is not None] for name in self.sites}

    def _metric(self) -> dict[str, Points]:
        lines = {name: [(record["round"] + 1.0, record["metrics"][key]) for record in self.records
                        if (key := f"{self.metric}, {name}") in record["metrics"]] for name in self.sites}
        return lines | {"all": [(record["round"] + 1.0, record["metrics"][self.metric]) for record in self.records
                                if self.metric in record["metrics"]]}

    def _clipped(self, record: dict[str, Any], site: str) -> float | None:
        """Share of what the site clipped: patients' gradients, or its update as a whole (0 or 1)."""
        numbers, kept = record["sites"][site], self.kept.get(record["round"], {}).get(site, {})
        if "clipped" in numbers:
            return float(numbers["clipped"])
        if "within_clip" in numbers:
            return float(numbers["within_clip"] < 0)
        if "share beyond the clipping norm" in kept:
            return kept["share beyond the clipping norm"]
        if "norm after clipping" in kept:
            return float(kept["norm after clipping"] < kept["norm before clipping"] * (1 - 1e-9))
        return None

    def _bytes(self) -> dict[str, Points]:
        lines: dict[str, Points] = {}
        for name in self.sites:
            total, points = 0.0, []
            for record in self.records:
                total += record["sites"].get(name, {}).get("bytes", 0.0) / 1e6
                points.append((record["round"] + 1.0, total))
            lines[name] = points
        return lines

    def _epsilons(self, draw: Callable[..., str]) -> list[str]:
        units: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for record in self.records:
            for site, entries in record["spent"].items():
                for entry in entries:
                    units.setdefault(entry["unit"], {}).setdefault(site, []).append(
                        (record["round"] + 1.0, entry["epsilon"]))
        if not units:
            note = ("nothing spent yet" if self.private else
                    "No formal guarantee: nothing proves what the updates give away, so there is no ε.")
            return [draw("ε spent", {}, note=note)]
        out = []
        for unit, lines in units.items():
            terms = " · ".join(self._terms(unit))
            limit = self.budgets.get(unit)
            title = f"ε per {unit}" + ("" if limit is None else f", budget {limit:g}")
            out.append(f'<div>{draw(title, lines, bottom=0, limit=limit, bold="server")}<div style="font-size:11px;'
                       f'width:330px;margin:-6px 0 8px 6px">{escape(terms)}</div></div>')
        return out

    def _terms(self, unit: str) -> list[str]:
        return list(dict.fromkeys(
            f"δ = {s.delta:g}, per {s.unit}, {s.adjacency}, {s.accountant} accountant"
            for record in self.records for entries in record["spent"].values()
            for entry in entries if (s := Spent(**entry)).unit == unit))

    def _table(self) -> str:
        if not self.records:
            return ""
        head = ("site", "rounds", "loss", self.metric, "norm", "clipped", "MB sent", "ε spent of budget", "away")
        shown = [*self.sites, *(["server"] if any("server" in r["spent"] for r in self.records) else [])]
        rows = "".join("<tr>" + "".join(f'<td style="text-align:left;padding:1px 10px 1px 0">{cell}</td>'
                                        for cell in self._row(name)) + "</tr>" for name in shown)
        return ('<table style="border-collapse:collapse;font-size:12px"><tr>' + "".join(
            f'<th style="text-align:left;padding:1px 10px 1px 0">{escape(name)}</th>' for name in head)
            + f"</tr>{rows}</table>")

    def _row(self, name: str) -> list[str]:
        """The site's last known numbers."""
        part = [record for record in self.records if name in record["sites"]]
        last = part[-1]["sites"][name] if part else {}
        dice = [r["metrics"][key] for r in self.records if (key := f"{self.metric}, {name}") in r["metrics"]]
        clipped = self._clipped(part[-1], name) if part else None
        away = [(r["round"], r["absent"][name]) for r in self.records if name in r.get("absent", {})]
        return [escape(name), f"{len(part)}" if name in self.sites else "–", _number(last.get("loss")),
                _number(dice[-1] if dice else None), _number(last.get("norm")),
                "–" if clipped is None else f"{100 * clipped:.0f} %",
                f"{sum(r['sites'][name]['bytes'] for r in part) / 1e6:.3f}" if part else "–",
                escape("; ".join(self._spending(name))) or "–",
                escape(f"{len(away)} of {len(self.records)} rounds, last round {away[-1][0] + 1}: {away[-1][1]}")
                if away else ""]

    def _spending(self, name: str) -> list[str]:
        none: list[dict[str, Any]] = []
        entries = next((r["spent"][name] for r in reversed(self.records) if name in r["spent"]), none)
        return [f"{s}" + (f", of {limit:g}" if (limit := self.budgets.get(s.unit)) is not None else "")
                for s in (Spent(**entry) for entry in entries)]

    def _notes(self) -> list[str]:
        notes = [_UNDER_GUARANTEE] if self.private else []
        if any(numbers for sites in self.kept.values() for numbers in sites.values()) and any(
                self._per_site(self._clipped).values()):
            notes.append(_AT_HOME)
        return [f'<div style="font-size:11px;color:#555">{escape(note)}</div>' for note in notes]


def _budgets(run: BackgroundRun, given: float | None) -> dict[str, float]:
    """Unit -> the ε that the run may spend: the one given, or the smallest that a technique allows itself."""
    if given is not None:
        return {"patient": given, "site": given}
    budgets: dict[str, float] = {}
    for layer in run.privacy.layers:
        limit, terms = getattr(layer, "max_epsilon", None), getattr(layer, "_terms", None)
        if limit is not None and terms is not None:
            budgets[terms.unit] = min(budgets.get(terms.unit, math.inf), float(limit))
    return budgets


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
