"""A dashboard of a run in the background of a notebook, with buttons; for JupyterLab and Voilà."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from html import escape
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fedlab.core.files import filled_in
from fedlab.core.settings import check_positive
from fedlab.core.types import REPEATS, Spent
from fedlab.privacy.at_sites import AtSites
from fedlab.privacy.base import Privacy
from fedlab.run.site_errors import kind_of
from fedlab.run.svg_charts import Points, Style, chart
from fedlab.view.background_run import ENDED, BackgroundRun
from fedlab.view.colours import BLUE, GREEN, GREY, LINES, ORANGE, RED
from fedlab.view.run_figures import curves, privacy_curves
from fedlab.view.widget_snapshot import display_snapshot, snapshot

if TYPE_CHECKING:
    from fedlab.view.picture import Picture

__all__ = ["RunDashboard"]

_COLOURS = {"ready": GREY, "running": GREEN, "pausing": ORANGE, "paused": ORANGE, "stopping": RED, "stopped": RED,
            "finished": BLUE, "failed": RED}
_DASHES = ("", "5 3", "2 2")
#: The colours of lines, of which one follows the theme: dark grey is not seen on black.
_LINES = tuple(f"var(--jp-ui-font-color2,{colour})" if colour == "#444444" else colour for colour in LINES)
_INTERVAL = 0.3  # least seconds between two refreshes


class RunDashboard:
    """The progress of a `BackgroundRun`, refreshed after every round, with buttons to start, pause, step and stop it.

    For each site: training loss, Dice of its held-out patients (with `validate=SiteDice(sites=…)`), norm and bytes of
    its updates, the share that was clipped, ε spent against the budget, and the rounds it missed, with the reason.
    What a run does not have takes no room.

    The signal-to-noise ratio of a round is ‖s‖ ÷ (σ √n): the norm of what is hidden, over the expected norm of
    independent noise of standard deviation σ on its n entries. With `LocalGaussian` s is the clipped update, with
    `DPSGD` the sum of clipped gradients in a step, each as a root mean square over the steps of the round; these norms
    are read from the state of the sites, which a simulation holds. With `CentralGaussian` the norm of the mean is
    covered by the guarantee, so an upper bound stands for it: N sites whose updates are as long as the clipping norm
    allows, all in one direction, give N ÷ (noise multiplier × √n). Below 1 the noise is longer than the signal; a mean
    over sites, steps and rounds can still have a larger ratio.

    Leakage is the AUC of `BackgroundRun(leakage=fl.evidence.RoundMembership(sites=…))`, with its interval and n.

    A second dashboard of a run shares the widgets of the first. Without a kernel, as in an exported notebook, the state
    last sent remains: that at the start, at a pause, at the end, and after `wait()`.

    Args:
        run: a `BackgroundRun`, started or not.
        budget: the ε that the run may spend, drawn as a line; by default the `max_epsilon` of its techniques.
        metric: of the rounds; the sites have "<metric>, <site>".

    Raises:
        ValueError: `budget` is not a positive number.
        TypeError: `run` is not a `BackgroundRun`.

    Example:
        >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
        >>> trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16))
        >>> run = fl.view.BackgroundRun(trainer, sites, rounds=2)
        >>> dashboard = fl.RunDashboard(run)  # as the last line of a cell it is shown
        >>> _ = run.start()
        >>> run.wait()
        <History: 2 of 2 rounds, loss ...; no formal guarantee>
    """

    def __init__(self, run: BackgroundRun, *, budget: float | None = None, metric: str = "Dice") -> None:
        if not isinstance(run, BackgroundRun):
            raise TypeError(f"expected a BackgroundRun, got {type(run).__name__}; make one from the arguments of "
                            "federate: BackgroundRun(trainer, sites, rounds=…).start()")
        check_positive(optional=True, budget=budget)
        self.run, self.budget, self.metric = run, budget, metric
        if "dashboard" not in run.views:
            run.views["dashboard"] = _Panel(run)
        self._panel: _Panel = run.views["dashboard"]
        self._panel.content = self.html
        self._panel.refresh()

    @property
    def widget(self) -> Any:
        """The ipywidgets box, for use in an app."""
        return self._panel.box

    def html(self) -> str:
        """The dashboard without its buttons as it is now: self-contained HTML."""
        return _Page(self.run, self.budget, self.metric).html()

    def figure(self) -> Picture:
        """The curves as a figure, once a round has ended: ε and the metric under a guarantee, else loss and metric."""
        history = self.run.history
        if not history.records:
            raise ValueError("no round has ended yet, so there is no curve to draw")
        if not history.published().spent().empty:
            return privacy_curves(history, metric=self.metric, budget=self.budget)
        return curves({"federated": history}, metric=self.metric)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        return snapshot(self.widget, text=repr(self), html=self.html(),
                        picture=self.figure if self.run.history.records else None)

    def _ipython_display_(self) -> None:
        self._panel.displayed(display_snapshot(self._repr_mimebundle_))

    def __repr__(self) -> str:
        return f"RunDashboard({self.run!r})"


class _Panel:
    """The widgets of one run, shared by all its dashboards."""

    def __init__(self, run: BackgroundRun) -> None:
        import ipywidgets as widgets

        self.run = run
        self.content: Callable[[], str] = str
        self._lock, self._last, self._drawn = threading.RLock(), -math.inf, ""
        self._displays: list[Callable[[], None]] = []
        self.note, self.page = widgets.HTML(), widgets.HTML()
        self.buttons = {name: widgets.Button(description=text, icon=icon, tooltip=tip, button_style=style,
                                             layout=widgets.Layout(width="110px"))
                        for name, (text, icon, tip, style, _) in _BUTTONS.items()}
        for name, button in self.buttons.items():
            button.on_click(self._clicked(getattr(run, name)))
        self.box = widgets.VBox([widgets.HBox([*self.buttons.values(), self.note]), self.page])
        run.on_change(self.refresh)

    def displayed(self, update: Callable[[], None]) -> None:
        """Remembers a display in the notebook; its static copy is renewed when the run pauses or ends."""
        self._displays = [*self._displays[-3:], update]

    def refresh(self) -> None:
        """Updates the widgets: at once when the run's state has changed, else at most every `_INTERVAL`."""
        with self._lock:
            state, now = self.run.state, time.monotonic()
            if state == self._drawn == "running" and now - self._last < _INTERVAL:
                return
            rests, changed = state in ("paused", *ENDED), state != self._drawn
            self._drawn, self._last = state, now
            self.page.value = self.content()
            for name, button in self.buttons.items():
                button.disabled = state not in _BUTTONS[name][-1]
            self.buttons["start"].description = "Start" if state == "ready" else "Continue"
            # In the main thread, as from `wait()`, the output belongs to the current cell.
            if rests and (changed or threading.current_thread() is threading.main_thread()):
                for update in self._displays:
                    update()

    def _clicked(self, act: Callable[[], object]) -> Callable[[object], None]:
        def handle(button: object) -> None:
            try:
                act()
                self.note.value = ""
            except Exception as error:  # a button has no cell to show it
                self.note.value = f'<span style="color:{RED}">{escape(str(error))}</span>'

        return handle


#: Method of the run -> label, icon, tooltip and style of its button, and the states in which it is enabled.
_BUTTONS = {
    "start": ("Start", "play", "Begin, or continue until the last round", "success", ("ready", "paused", "pausing")),
    "pause": ("Pause", "pause", "Pause after the current round", "", ("running",)),
    "step": ("Step", "step-forward", "One round, then pause", "", ("ready", "paused")),
    "stop": ("Stop", "stop", "End after the current round; finished rounds are kept", "danger",
             ("running", "pausing", "paused")),
}


class _Page:
    """The content of the dashboard at one moment."""

    def __init__(self, run: BackgroundRun, budget: float | None, metric: str) -> None:
        self.run, self.metric = run, metric
        self.records, self.diagnostics = list(run.history.published().records), dict(run.diagnostics)
        self.budgets = _budgets(run, budget)
        self.sites = [site.name for site in run.sites]
        if run.history.hides_sites:  # the page is saved with the notebook
            self.sites, self.diagnostics = [], {}
        self.styles: dict[str, Style] = {
            name: (_LINES[k % len(_LINES)], _DASHES[k // len(_LINES) % len(_DASHES)])
            for k, name in enumerate(self.sites)}
        self.private = bool(run.privacy.units) or any(record["spent"] for record in self.records)
        self.at_server = any("server" in record["spent"] for record in self.records)
        self.numbers = self._numbers()

    def html(self) -> str:
        run, done = self.run, len(self.records)
        charts, missing = self._panels()
        further = {"all": bool(self.numbers["metric"]["all"]), "server": self.at_server}
        return filled_in(
            "fedlab.view", "dashboard.html", colour=_COLOURS[run.state], done=done, rounds=run.history.rounds,
            state=f"{run.state} after this round" if run.state in ("pausing", "stopping") else run.state,
            pace=self._pace(), share=f"{100 * done / max(run.history.rounds, 1):.1f}", error=self._error(),
            stopped=run.history.published().stopped, technique=_names(run), code=run.history.privacy,
            styles=self.styles | {name: ("currentColor", "") for name, shown in further.items()
                                  if shown and name not in self.styles},
            charts=charts, missing=missing, columns=self._columns() if done else {}, private=self.private,
            diagnostics=any(any(sites.values()) for sites in self.diagnostics.values())
            and any(any(self.numbers[key].values()) for key in ("clipped", "SNR")))

    def _pace(self) -> str:
        """Time per round and time left, unless a guarantee hides the time."""
        took = [seconds for _, seconds in sorted(self.run.durations.items())][-5:]
        if not took or not self.records or "seconds" not in self.records[-1]:
            return ""
        pace, left = sum(took) / len(took), self.run.history.rounds - len(self.records)
        more = f", about {_time(pace * left)} left" if left and not self.run.ended else ""
        return f"{_time(pace)} per round{more}"

    def _error(self) -> tuple[str, str] | None:
        """Kind and text of the error that has ended the run."""
        if self.run.error is None:
            return None
        if self.private or self.run.privacy.works_at_server:
            return kind_of(self.run.error), "its text may quote patients and is not shown here; wait() raises it"
        return type(self.run.error).__name__, str(self.run.error)

    def _numbers(self) -> dict[str, dict[str, Points]]:
        """Loss, metric, norm, clipped share and MB sent: site -> (rounds finished, value) where it is known."""
        def points(read: Callable[[dict[str, Any], str], float | None], *further: str) -> dict[str, Points]:
            return {name: [(record["round"] + 1.0, value) for record in self.records
                           if (value := read(record, name)) is not None] for name in (*self.sites, *further)}

        def of_site(key: str) -> dict[str, Points]:
            return points(lambda record, site: record["sites"].get(site, {}).get(key))

        keys = {name: f"{self.metric}, {name}" for name in self.sites} | {"all": self.metric}
        rounds = [record["round"] + 1.0 for record in self.records]
        sent = {name: accumulate(record["sites"].get(name, {}).get("bytes", 0.0) / 1e6 for record in self.records)
                for name in self.sites}
        # The norm of masked numbers says nothing.
        hidden = getattr(self.run.settings.get("aggregation"), "hides_updates", False)
        return {"loss": of_site("loss"), "norm": {} if hidden else of_site("norm"), "clipped": points(self._clipped),
                "SNR": points(self._ratio) | self._at_most(rounds),
                "metric": points(lambda record, name: record["metrics"].get(keys[name]), "all"),
                "MB": {name: list(zip(rounds, values, strict=True)) for name, values in sent.items()}}

    def _chart(self, title: str, lines: Mapping[str, Points], **more: Any) -> str:
        # For a long run the axis ends shortly after the finished rounds, or they would be squeezed to its beginning.
        rounds = max(1, min(self.run.history.rounds, max(10, math.ceil(1.25 * len(self.records)))))
        return chart(title, lines, styles=self.styles, rounds=rounds, **more)

    def _panels(self) -> tuple[list[tuple[str, str]], list[str]]:
        """The charts that have something to show, each with its terms, and why others are missing."""
        if not self.records:
            return [], ["nothing yet: no round has ended"]
        kept, numbers = " A guarantee keeps it at the site." if self.private else "", self.numbers
        drawn: list[tuple[str, str, dict[str, Any], str, str]] = [  # key, title, settings, terms, what if it is missing
            ("loss", "Training loss", {}, "", f"No site reports its loss.{kept}"),
            ("metric", f"{self.metric} of held-out patients",
             {"bottom": 0, "top": 1 if self.metric == "Dice" else None, "bold": "all"}, "",
             f"{self.metric} is for the server only: see fedlab.run.OnPublicPatients." if self.at_server else
             "Not measured: give validate=SiteDice(sites=sites)."),
            ("norm", "Norm of the update that was sent", {"bottom": 0}, "", ""),
            ("clipped", "Share that was clipped", {"bottom": 0, "top": 1}, "", ""),
            ("SNR", "Signal-to-noise ratio", {"bottom": 0, "bold": "server"},
             "norm of what is sent ÷ (σ √entries), before the noise" + ("; server: upper bound" * self.at_server), ""),
            ("MB", "Bytes sent so far [MB]", {"bottom": 0}, "", ""),
        ]
        charts = [(self._chart(title, numbers[key], **settings), terms) for key, title, settings, terms, _ in drawn
                  if any(numbers[key].values())]
        missing = [why for key, _, _, _, why in drawn if why and not any(numbers[key].values())]
        leaked, unseen = self._leakage()
        spent, unproven = self._epsilons()
        return [*charts, *leaked, *spent], [*missing, *unseen, *unproven]

    def _leakage(self) -> tuple[list[tuple[str, str]], list[str]]:
        """The chart of what the attack on each round found, or why it is not shown."""
        run, found = self.run, dict(self.run.leaked)
        if run.leakage is None or not found:
            return [], []
        if run.history.hides_sites and not run.leakage.public:
            return [], ["Leakage is for the server only, unless the attacked patients are public: "
                        "RoundMembership(public=True)."]
        points, last = [(number + 1.0, one.value) for number, one in sorted(found.items())], found[max(found)]
        chart = self._chart(
            f"Leakage: membership AUC {last.value:.2f}, n = {last.trials}", {"all": points}, bottom=0, top=1, limit=0.5,
            spans=[(number + 1.0, one.low, one.high) for number, one in sorted(found.items())])
        return [(chart, f"with 95 % intervals; 0.5, dashed, is chance. Round {max(found) + 1}: {last.verdict}. "
                        f"Threat: {last.threat}. Outside any guarantee.")], []

    def _clipped(self, record: dict[str, Any], site: str) -> float | None:
        """Share that the site clipped: of its patients' gradients, or of its update as a whole (0 or 1)."""
        known = self.diagnostics.get(record["round"], {}).get(site, {}) | record["sites"].get(site, {})
        match known:
            case {"clipped": share}:
                return float(share)
            case {"within_clip": within}:
                return float(within < 0)
            case {"share beyond the clipping norm": share}:
                return float(share)
            case {"norm before clipping": before, "norm after clipping": after}:
                return float(after < before * (1 - 1e-9))
        return None

    def _ratio(self, record: dict[str, Any], site: str) -> float | None:
        """The signal-to-noise ratio at a site, from the norms that its technique noted."""
        known = self.diagnostics.get(record["round"], {}).get(site, {})
        signal = known.get("norm after clipping", known.get("norm of the clipped sum"))
        noise = known.get("norm of the noise", 0.0)
        return None if signal is None or noise <= 0 else signal / noise

    def _at_most(self, rounds: list[float]) -> dict[str, Points]:
        """The largest ratio that the clipping allows in the mean, where the noise is added at the server."""
        state, layers = self.run.history.state, self.run.privacy.layers
        noise = [float(layer.noise_on_updates) for layer in layers if hasattr(layer, "noise_on_updates")]
        if state is None or not noise:
            return {}
        entries = sum(t.numel() for t in state.params.values())
        return {"server": [(number, len(self.run.sites) / (noise[0] * math.sqrt(entries))) for number in rounds]}

    def _epsilons(self) -> tuple[list[tuple[str, str]], list[str]]:
        """A chart per unit with its terms, or why there is no ε."""
        units: dict[str, dict[str, list[tuple[float, float]]]] = {}
        terms: dict[str, dict[str, None]] = {}
        for record in self.records:
            for site, entries in record["spent"].items():
                for s in (Spent(**entry) for entry in entries):
                    units.setdefault(s.unit, {}).setdefault(site, []).append((record["round"] + 1.0, s.epsilon))
                    words = (f"δ = {s.delta:g}, per {s.unit}, {s.adjacency}, {s.accountant} accountant"
                             f"{f', {REPEATS}' * s.repeats}")
                    terms.setdefault(s.unit, {})[words] = None
        if not units:
            return [], ["No ε is spent yet." if self.private else
                        "No formal guarantee: nothing bounds what the updates reveal, so there is no ε."]
        budgets = {unit: f", budget {limit:g}" for unit, limit in self.budgets.items()}
        return [(self._chart(f"ε per {unit}{budgets.get(unit, '')}", lines, bottom=0, limit=self.budgets.get(unit),
                             bold="server"), " · ".join(terms[unit])) for unit, lines in units.items()], []

    def _columns(self) -> dict[str, list[str]]:
        """The last known numbers of each site: head -> a cell per site, with equal decimals; no column is empty."""
        names = [*self.sites, *["server"] * self.at_server]
        last = {key: {name: points[-1][1] for name, points in lines.items() if points and name in names}
                for key, lines in self.numbers.items()}
        last["MB"] = {name: value for name, value in last["MB"].items() if self._present(name)}
        last["clipped"] = {name: 100 * value for name, value in last["clipped"].items()}
        columns = {"site": names, "rounds": [f"{self._present(name)}" * (name in self.sites) for name in names]}
        for key, head, digits, unit in (
                ("loss", "loss", 3, ""), ("metric", self.metric, 3, ""), ("clipped", "clipped", 0, " %"),
                ("MB", "sent [MB]", 3, ""), ("norm", "norm", _decimals(last["norm"]), ""),
                ("SNR", "signal / noise", _decimals(last["SNR"]), "")):
            columns[head] = [f"{last[key][name]:.{digits}f}{unit}" if name in last[key] else "" for name in names]
        columns |= {"ε spent of budget": list(map(self._spending, names)), "absent": list(map(self._absence, names))}
        return {head: [cell or "–" for cell in cells] for head, cells in columns.items() if any(cells)}

    def _present(self, name: str) -> int:
        return sum(name in record["sites"] for record in self.records)

    def _spending(self, name: str) -> str:
        entries: list[Any] = next((record["spent"][name] for record in reversed(self.records)
                                   if name in record["spent"]), [])
        return "; ".join(str(s._replace(repeats=False))
                         + (f", of {self.budgets[s.unit]:g}" if s.unit in self.budgets else "")
                         + f"; {REPEATS}" * s.repeats for s in (Spent(**entry) for entry in entries))

    def _absence(self, name: str) -> str:
        away = [(record["round"], record["absent"][name]) for record in self.records
                if name in record.get("absent", {})]
        return (f"{len(away)} of {len(self.records)} rounds, last round {away[-1][0] + 1}: {away[-1][1]}"
                if away else "")


def _decimals(values: Mapping[str, float]) -> int:
    """So many decimals that the smallest of these numbers has three digits, at most six."""
    small = min((abs(value) for value in values.values() if value), default=1.0)
    return min(6, max(0, 2 - math.floor(math.log10(small))))


def _time(seconds: float) -> str:
    """A time in two digits or so: "4.2 s", "35 s", "12 min", "3.5 h"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _names(run: BackgroundRun) -> str:
    """The techniques and the aggregation of a run by name, in one line."""
    sums = run.settings.get("aggregation")
    parts: list[Any] = [layer for layer in run.privacy.layers if type(layer) is not Privacy]
    parts += [sums] if sums is not None and sums.hides_updates else []
    return " + ".join(map(_name, parts)) or "no privacy technique"


def _name(part: Any) -> str:
    if not isinstance(part, AtSites):
        return type(part).__name__
    place = part.sites[0] if len(part.sites) == 1 else f"{len(part.sites)} sites"
    return f"{' + '.join(type(layer).__name__ for layer in part.technique.layers)} at {place}"


def _budgets(run: BackgroundRun, given: float | None) -> dict[str, float]:
    """Unit -> the ε that the run may spend: the given one, or the smallest limit of its techniques."""
    if given is not None:
        return {"patient": given, "site": given}
    budgets: dict[str, float] = {}
    for layer in run.privacy.layers:
        limit, terms = getattr(layer, "max_epsilon", None), getattr(layer, "_terms", None)
        if limit is not None and terms is not None:
            budgets[terms.unit] = min(budgets.get(terms.unit, math.inf), float(limit))
    return budgets
