"""One HTML page that says what was done and what came out: figures and all in a single file, nothing loaded."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from fedlab.core.errors import RunError
from fedlab.run.history import History
from fedlab.view.privacy_figures import privacy_curves

__all__ = ["Section", "privacy_section", "save_figure", "write_report"]

#: Rounds that a table shows before it leaves some out.
_ROUNDS = 12


@dataclass(frozen=True, kw_only=True, eq=False)
class Section:
    """A part of a report.

    Attributes:
        title: its heading; without one it goes on with the section before it.
        text: plain text; an empty line begins a new paragraph.
        table: shown with its index, numbers to three digits after the point.
        figure: any matplotlib figure.
        caption: one line under the figure or table, which says what is to be seen in it.
        alt: the figure in words, for those who don't see it; the figure's own `alt`, or the caption, by default.
    """

    title: str = ""
    text: str = ""
    table: pd.DataFrame | None = None
    figure: Figure | None = None
    caption: str = ""
    alt: str = ""

    def __post_init__(self) -> None:
        if self.figure is not None and not self._seen():
            raise ValueError("a figure needs words for those who don't see it: give caption= or alt=")

    def _seen(self) -> str:
        return self.alt or getattr(self.figure, "alt", "") or self.caption


def privacy_section(history: History, *, metric: str = "Dice", budget: float | None = None) -> Section:
    """What a run guarantees: ε of each site after each round beside the model's metric, or that there is no guarantee.

    Args:
        history: of the run.
        metric: of the rounds, shown where it was taken.
        budget: ε that no site was to exceed.
    """
    spent, rounds = history.spent(), history.table()
    technique = "" if history.privacy == "Privacy()" else f" Technique: {history.privacy}."
    if spent.empty:
        return Section(title="Privacy", text=f"No formal guarantee: no ε can be stated for what left the sites."
                                             f"{technique}")
    names = [f"ε per {unit}, {site}" for _, site, unit in spent.index]
    wide = spent.assign(column=names).reset_index().pivot(index="round", columns="column", values="epsilon").ffill()
    wide.columns.name = None
    if metric in rounds:
        wide.insert(0, metric, rounds[metric].reindex(wide.index))
    left = len(wide) > _ROUNDS
    if left:
        wide = wide.iloc[sorted({round(k * (len(wide) - 1) / (_ROUNDS - 1)) for k in range(_ROUNDS)})]
    stopped = f" The run ended early: {history.stopped}." if history.stopped else ""
    text = (f"What the run guarantees: {history.guarantee()}. In the table, ε spent so far by each site after each "
            f"round{', some rounds left out' if left else ''}.{technique}{stopped}")
    return Section(title="Privacy", text=text, table=wide.rename_axis("round"),
                   figure=privacy_curves(history, metric=metric, budget=budget),
                   caption="Privacy spent by each site, and what the model had learned by then.")


def write_report(
    path: Path | str, *, title: str, lead: str, sections: Sequence[Section], results: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None, versions: Mapping[str, str] | None = None, notes: Sequence[str] = (),
) -> Path:
    """Writes one self-contained page: no script, nothing loaded from anywhere, fit to be mailed and printed.

    Args:
        path: the new file, such as "report.html".
        title: what the page is about.
        lead: one paragraph in plain words: what was asked and what came out.
        sections: the parts of the page, in order.
        results: what it is and its value, such as {"mean Dice, federated": "0.79"}; shown large under the lead.
        settings: with what the run was made; mappings within are written out as "outer, inner".
        versions: of the programs that made it.
        notes: what a reader must know to judge it, such as limits and how empty regions count.

    Returns:
        The file's path.

    Raises:
        RunError: the file exists already; nothing is overwritten.
    """
    path = Path(path)
    _refuse_existing(path)
    page = _environment().get_template("report_page.html.j2").render(
        title=title, lead=_paragraphs(lead), results=dict(results or {}), notes=list(notes),
        sections=[_prepared(section, number) for number, section in enumerate(sections)],
        settings=_flat(settings or {}), versions=dict(versions or {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _new(path) as file:
        file.write(page.encode("utf-8"))
    return path


def save_figure(figure: Figure, path: Path | str, *, dpi: int = 200) -> Path:
    """Writes a figure as PNG, `dpi` pixels an inch.

    Raises:
        ValueError: the file isn't called .png.
        RunError: the file exists already; nothing is overwritten.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"figures are written as .png, got {path.name!r}")
    _refuse_existing(path)
    image = _png(figure, dpi)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _new(path) as file:
        file.write(image)
    return path


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise RunError(f"{path} exists already and is not overwritten: remove it, or give another path")


def _new(path: Path) -> io.BufferedWriter:
    try:
        return path.open("xb")
    except FileExistsError as error:  # made since the check before the work
        raise RunError(f"{path} exists already and is not overwritten: remove it, or give another path") from error


def _png(figure: Figure, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _environment() -> jinja2.Environment:
    return jinja2.Environment(loader=jinja2.PackageLoader("fedlab.view", ""), autoescape=True, trim_blocks=True,
                              lstrip_blocks=True, undefined=jinja2.StrictUndefined)


def _prepared(section: Section, number: int) -> dict[str, Any]:
    """The values of a section as the template wants them."""
    shown: dict[str, Any] = {
        "id": f"part-{number + 1}", "title": section.title, "text": _paragraphs(section.text),
        "caption": section.caption, "table": None, "image": None,
    }
    if section.table is not None:
        shown["table"] = _table(section.table)
    if section.figure is not None:
        width, height = (round(inches * 96) for inches in section.figure.get_size_inches())  # 96 CSS pixels an inch
        shown["image"] = {"data": base64.b64encode(_png(section.figure, dpi=150)).decode("ascii"), "width": width,
                          "height": height, "alt": section._seen()}
    return shown


def _table(table: pd.DataFrame) -> dict[str, Any]:
    index = [name if isinstance(name, tuple) else (name,) for name in table.index]
    return {
        "corner": ["" if name is None else str(name) for name in table.index.names],
        "columns": [" ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in table.columns],
        "rows": [([_text(name) for name in names], [(_text(value), _is_number(value)) for value in row])
                 for names, row in zip(index, table.itertuples(index=False, name=None), strict=True)],
    }


def _is_number(value: Any) -> bool:
    return not isinstance(value, (str, bool)) and pd.api.types.is_number(value)


def _text(value: Any) -> str:
    """A value as a reader wants it: three digits after the point, a dash for what wasn't measured."""
    if value is None or value is pd.NaT or value is pd.NA:
        return "–"
    if pd.api.types.is_float(value):
        number = float(value)
        if math.isnan(number):
            return "–"
        return f"{number:.3f}" if 1e-3 <= abs(number) < 1e4 else f"{number:.3g}"
    if pd.api.types.is_integer(value) and not isinstance(value, bool):
        return f"{int(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}") if abs(int(value)) >= 10_000 else str(value)
    return str(value)


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Settings as they were given: exact numbers, mappings written out, sequences as lists."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{name}, ")
        elif isinstance(value, (list, tuple)):
            flat[f"{before}{name}"] = ", ".join(map(str, value))
        else:
            flat[f"{before}{name}"] = str(value)
    return flat


def _paragraphs(text: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]
