"""One self-contained HTML page about a run: texts, tables and figures in a single file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Number, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlab.core.files import filled_in, write_new
from fedlab.core.types import rounded_up
from fedlab.run.history import History
from fedlab.view.run_figures import privacy_curves

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from fedlab.view.live_viewer import LiveViewer

__all__ = ["Section", "privacy_section", "save_figure", "write_report"]

_MOST_ROUNDS = 12  # of a table, before it leaves some out


@dataclass(frozen=True, kw_only=True, eq=False)
class Section:
    """A part of a report. A figure without a description raises `ValueError`.

    Attributes:
        title: the heading; without one the section continues the one before it.
        text: plain text; an empty line starts a new paragraph.
        table: shown under the figure, with its index, numbers with three decimals.
        caption: one line under the figure or table.
        note: a footnote at the end of the section.
        alt: a description for readers who do not see the figure; by default the figure's own `alt`, or the caption.
        live: a viewer of patients; a page has at most one.
    """

    title: str = ""
    text: str = ""
    table: pd.DataFrame | None = None
    figure: Figure | None = None
    caption: str = ""
    note: str = ""
    alt: str = ""
    live: LiveViewer | None = None

    def __post_init__(self) -> None:
        if self.figure is not None and not self.description:
            raise ValueError("a figure needs a description for readers who do not see it: give caption= or alt=")

    @property
    def description(self) -> str:
        """The figure in words."""
        return self.alt or getattr(self.figure, "alt", "") or self.caption


def privacy_section(history: History, *, metric: str = "Dice", budget: float | None = None) -> Section:
    """The guarantee of a run, with ε of each site after each round beside a metric of the model.

    The arguments are those of `fedlab.view.run_figures.privacy_curves`.
    """
    history = history.published()
    spent, rounds = history.spent(), history.table()
    technique = "" if history.privacy == "Privacy()" else f" Technique: {history.privacy}."
    if spent.empty:
        return Section(title="Privacy", text="No formal guarantee: there is no ε for the updates that the sites sent."
                                             f"{technique}")
    names = [f"ε per {unit}, {site}" for _, site, unit in spent.index]
    wide = spent.assign(column=names).reset_index().pivot(index="round", columns="column", values="epsilon").ffill()
    wide.columns.name = None
    if metric in rounds:
        wide.insert(0, metric, rounds[metric].reindex(wide.index))
    thinned = len(wide) > _MOST_ROUNDS
    if thinned:
        wide = wide.iloc[np.linspace(0, len(wide) - 1, _MOST_ROUNDS).round().astype(int)]
    stopped = f" The run ended early: {history.stopped}." if history.stopped else ""
    text = (f"The run guarantees: {history.guarantee()}. The table shows the ε that each site has spent after each "
            f"round{', with some rounds left out' if thinned else ''}.{technique}{stopped}")
    return Section(title="Privacy", text=text, table=wide.rename_axis("round"),
                   figure=privacy_curves(history, metric=metric, budget=budget),
                   caption="Privacy spent by each site, and the accuracy of the model at that time.")


def write_report(
    path: Path | str, *, title: str, lead: str, sections: Sequence[Section], verdict: str = "",
    results: Mapping[str, str] | None = None, settings: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None, notes: Sequence[str] = (),
) -> Path:
    """Writes one self-contained page that loads nothing and can be mailed and printed.

    It has scripts only for a live viewer, and its content policy admits only those.

    Args:
        path: of the new file.
        title: of the page.
        lead: one paragraph in plain words: the question, and the result if there is no verdict.
        sections: the parts of the page, in order.
        verdict: the answer in one sentence, above the lead.
        results: name -> value, such as {"mean Dice, federated": "0.79"}; shown large under the lead.
        settings: of the run; nested mappings are printed as "outer, inner".
        versions: of the programs used.
        notes: what a reader must know to judge the results, such as limits and the treatment of empty regions.

    Raises:
        RunError: the file exists already.
        ValueError: more than one live viewer.
    """
    import pandas as pd

    if len(live := [section.live for section in sections if section.live is not None]) > 1:
        raise ValueError(f"a page has at most one live viewer, got {len(live)}; give one all patients")
    flat = pd.json_normalize(dict(settings), sep=", ").to_dict("records")[0] if settings else {}
    page = filled_in(
        "fedlab.view", "report_page.html", title=title, lead=_paragraphs(lead), verdict=verdict,
        results=dict(results or {}),
        notes=list(notes), sections=[_prepared(section, number) for number, section in enumerate(sections)],
        settings={name: ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
                  for name, value in flat.items()}, versions=dict(versions or {}),
        policy="; ".join(["default-src 'none'", "img-src data:", "style-src 'unsafe-inline'",
                          *(one.policy for one in live)]))
    return write_new(path, page.encode())


def save_figure(figure: Figure, path: Path | str, *, dpi: int = 200) -> Path:
    """Writes a figure as a new PNG file with `dpi` pixels per inch; raises `RunError` if it exists already."""
    from fedlab.view.picture import figure_png

    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"figures are written as .png, got {Path(path).name!r}")
    return write_new(path, figure_png(figure, dpi)[0])


def _prepared(section: Section, number: int) -> dict[str, Any]:
    """The values of a section for the template."""
    from fedlab.view.picture import figure_png

    image = None
    if section.figure is not None:
        png, size = figure_png(section.figure, dpi=150)
        image = {"data": base64.b64encode(png).decode("ascii"), **size, "alt": section.description}
    return {"id": f"part-{number + 1}", "title": section.title, "text": _paragraphs(section.text),
            "caption": section.caption, "note": section.note, "image": image,
            "table": None if section.table is None else _table(section.table),
            "live": None if section.live is None else section.live.html}


def _table(table: pd.DataFrame) -> dict[str, Any]:
    index = [name if isinstance(name, tuple) else (name,) for name in table.index]
    return {
        "corner": ["" if name is None else str(name) for name in table.index.names],
        "columns": [" ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in table.columns],
        "rows": [([_text(name) for name in names],
                  [(rounded_up(value, 4) if "ε" in str(column) and isinstance(value, float) and value == value
                    else _text(value, str(column)), isinstance(value, Number) and not isinstance(value, bool))
                   for column, value in zip(table.columns, row, strict=True)])
                 for names, row in zip(index, table.itertuples(index=False, name=None), strict=True)],
    }


def _text(value: Any, column: str = "") -> str:
    """A value for readers: three decimals, of mm and ml one, a dash for a missing value, and digits in threes."""
    import pandas as pd

    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    if isinstance(value, Real) and not isinstance(value, Integral):
        number = float(value)
        if column.endswith(("[mm]", "[ml]")):
            return f"{number:.1f}"
        return f"{number:.3f}" if number == 0 or 1e-3 <= abs(number) < 1e4 else f"{number:.3g}"
    if isinstance(value, Integral) and abs(int(value)) >= 10_000:
        return f"{int(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return str(value)


def _paragraphs(text: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]
