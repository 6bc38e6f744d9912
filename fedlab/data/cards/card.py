"""Data cards: one page of Markdown a data set, with a front matter that programs read.

A card says where the scans come from, who may use them and for what, and what is wrong with them (Gebru et al. 2021,
doi:10.1145/3458723). The cards of public data sets are in `data_cards/`; a hospital fills a template from what its
site may tell (`fill_card`) and completes what only people know.
"""

from __future__ import annotations

import copy
import importlib.resources
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fedlab.core.errors import DataError
from fedlab.core.extras import need
from fedlab.data.cards.croissant import croissant
from fedlab.data.cards.schema import FIELDS, MARK, is_open, problems, read_front_matter, split_sections

if TYPE_CHECKING:
    from fedlab.data.sites.distributions import SiteStatistics

__all__ = ["DataCard", "card_template", "fill_card", "read_card"]

#: A card is text that somebody wrote; anything longer is something else.
_LARGEST_BYTES = 256 * 1024
_WITHHELD = "withheld"


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """A data card that is in order; made by `read_card`, `card_template` and `fill_card`.

    Attributes:
        metadata: the front matter, see `fedlab.data.cards.schema.FIELDS`.
        body: the Markdown text below it, from the title on.

    Raises:
        DataError: a field or section is missing or in the wrong form; all problems are listed.
    """

    metadata: Mapping[str, Any]
    body: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", copy.deepcopy(dict(self.metadata)))
        if found := problems(self.metadata, self.body):
            listing = "\n".join(f"  - {problem}" for problem in found[:50])
            more = f"\n  and {len(found) - 50} more" if len(found) > 50 else ""
            raise DataError(f"the data card has {len(found)} problem{'s' * (len(found) > 1)}:\n{listing}{more}")

    @property
    def name(self) -> str:
        """What people call the data set."""
        return str(self.metadata["pretty_name"])

    @property
    def summary(self) -> str:
        """The paragraph below the title, on one line."""
        return " ".join(split_sections(self.body)[0][1].partition("\n")[2].split())

    @property
    def open(self) -> tuple[str, ...]:
        """Fields and sections that people still have to complete."""
        fields = [field.name for field in FIELDS if is_open(self.metadata.get(field.name))]
        return (*fields, *(f"## {heading}" for heading, text in split_sections(self.body) if MARK in text))

    def section(self, heading: str) -> str:
        """The text below a heading.

        Raises:
            KeyError: there is no such heading.
        """
        return dict(split_sections(self.body))[heading]

    def to_markdown(self) -> str:
        """The card as a file holds it; `parse` gives the same card back."""
        front = yaml.dump(dict(self.metadata), Dumper=_Written, sort_keys=False, allow_unicode=True, width=110)
        return f"---\n{front}---\n\n{self.body}\n"

    @classmethod
    def parse(cls, text: str, *, where: str = "the card") -> DataCard:
        """A card from its text.

        Args:
            text: front matter and Markdown.
            where: its name, for messages.

        Raises:
            DataError: it is too large, its front matter can't be read, or it isn't in order.
        """
        if len(text) > _LARGEST_BYTES:
            raise DataError(f"{where}: a data card has at most {_LARGEST_BYTES} characters, got {len(text)}")
        metadata, body = read_front_matter(text, where=where)
        try:
            return cls(metadata=metadata, body=body)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the card as Markdown.

        Raises:
            DataError: the file exists already; nothing is overwritten.
        """
        return _write(path, self.to_markdown())

    def to_croissant(self, *, draft: bool = False) -> dict[str, Any]:
        """The card as Croissant metadata, version 1.0 with its responsible-AI properties 1.0 (MLCommons).

        It describes the files and what their numbers mean; it can't make anybody's scans download.

        Args:
            draft: leaves out what is still to be completed, and says so, instead of refusing.

        Raises:
            DataError: something is still to be completed and `draft` is False.
        """
        if self.open and not draft:
            raise DataError(f"{self.name}: still to be completed: {', '.join(self.open)}; complete them, or say "
                            "draft=True to leave them out")
        return croissant(self.metadata, self.summary, open_fields=self.open)

    def save_croissant(self, path: str | os.PathLike[str], *, draft: bool = False) -> Path:
        """Writes `to_croissant` as JSON.

        Raises:
            DataError: as `to_croissant`, or the file exists already; nothing is overwritten.
        """
        return _write(path, json.dumps(self.to_croissant(draft=draft), indent=2, ensure_ascii=False) + "\n")

    def __repr__(self) -> str:
        state = f"{len(self.open)} parts to be completed" if self.open else "complete"
        licence = "to be completed" if is_open(self.metadata["license"]) else self.metadata["license"]
        return f"<DataCard {self.name!r}: licence {licence}, {state}>"

    def _repr_markdown_(self) -> str:
        return self.body

    def _repr_html_(self) -> str:
        """The text, and the front matter folded away; everything from the file is escaped, nothing is loaded."""
        todo = "".join(f"<li>{escape(part)}</li>" for part in self.open)
        notice = (f"<p><strong>Still to be completed by the hospital:</strong></p><ul>{todo}</ul>" if todo else "")
        rows = "".join(f"<tr><th style='text-align:left;vertical-align:top'>{escape(name)}</th>"
                       f"<td style='text-align:left'>{_cell(value)}</td></tr>" for name, value in self.metadata.items())
        return (f"<article>{notice}{_markdown_html(self.body)}<details><summary>All fields of the card</summary>"
                f"<table>{rows}</table></details></article>")


class _Written(yaml.SafeDumper):
    """Writes a value out wherever it stands: aliases are refused on reading."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def read_card(path: str | os.PathLike[str]) -> DataCard:
    """A data card from a Markdown file.

    Raises:
        DataError: the file can't be read, is too large, is no UTF-8 text, or isn't a card in order; the message says
            which field, what was expected and what came.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(_LARGEST_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(raw) > _LARGEST_BYTES:
        raise DataError(f"{path}: expected a data card of at most {_LARGEST_BYTES} bytes, the file is larger")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text in UTF-8, got the byte 0x{raw[error.start]:02x} at position "
                        f"{error.start}") from error
    return DataCard.parse(text.replace("\r\n", "\n"), where=str(path))


def card_template() -> DataCard:
    """The card for a hospital's own scans, with marks where people must say something."""
    file = importlib.resources.files("fedlab.data.cards") / "card_template.md"
    return DataCard.parse(file.read_text("utf-8"), where="the template")


def fill_card(template: DataCard, statistics: SiteStatistics) -> DataCard:
    """A site's card: a template with what the site may tell about its patients.

    What the statistics withhold stays withheld, what was noised says with which ε, and what only people know stays
    marked; `DataCard.open` lists it.

    Args:
        template: usually `card_template()`.
        statistics: from `fedlab.data.sites.statistics.site_statistics`.
    """
    name = f"Glioma MRI of {' '.join(statistics.site.split())}"
    told = {"pretty_name": name, "size_categories": [_size(statistics.patients)], "splits": _splits(statistics),
            "statistics": _rows(statistics)}
    sections = [(heading, _patients(statistics) if heading == "Patients" else text)
                for heading, text in split_sections(template.body)]
    opening = "\n".join([f"# {_safe(name)}", *sections[0][1].splitlines()[1:]])
    body = "\n\n".join([opening, *(f"## {heading}\n\n{text}" for heading, text in sections[1:])])
    return replace(template, metadata={**template.metadata, **{name: v for name, v in told.items() if v}}, body=body)


def _size(patients: float | None) -> str:
    if patients is None:
        return "other"
    return "n<1K" if patients < 1_000 else "1K<n<10K" if patients < 10_000 else "10K<n<100K"


def _number(value: float | None) -> str:
    """As the site told it: whole numbers whole, others to three digits."""
    if value is None or value != value:
        return _WITHHELD
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.3g}"


def _splits(statistics: SiteStatistics) -> list[dict[str, str]]:
    parts = {"all": statistics.patients}
    if statistics.held_out != 0:
        parts |= {"to train on": statistics.train, "held out": statistics.held_out}
    return [{"name": name, "patients": _number(count), "labelled": f"{MARK}: how many have a label map",
             "source": "counted by fedlab at the site"} for name, count in parts.items()]


def _rows(statistics: SiteStatistics) -> list[dict[str, str]]:
    table = statistics.table()
    return [{"quantity": str(name), **{column: _number(row[column]) for column in ("patients", "mean", "sd", "median")}}
            for name, row in table.iterrows()]


def _patients(statistics: SiteStatistics) -> str:
    """The section on patients, in Markdown."""
    counts = ", ".join(f"{split['name']} {split['patients']}" for split in _splits(statistics))
    lines = [f"Patients: {counts}."]
    for name, table in (("Voxel size [mm]", statistics.spacing_mm), ("Voxels as read", statistics.shape)):
        told = ", ".join(f"{_safe(key)}: {_number(count)} patients" for key, count in table.items())
        lines.append(f"{name}: {told or _WITHHELD}.")
    rows = [[row[column] for column in ("quantity", "patients", "mean", "sd", "median")] for row in _rows(statistics)]
    if rows:
        lines.append(_table(["Quantity", "Patients", "Mean", "Standard deviation", "Median"], rows))
    lines.append(_guarantee(statistics))
    lines += [f"- Not told: {_safe(reason)}" for reason in statistics.withheld]
    return "\n\n".join(lines)


def _guarantee(statistics: SiteStatistics) -> str:
    if statistics.spent:
        cost = "; ".join(map(str, statistics.spent))
        return f"These numbers carry Laplace noise. They cost each patient {cost}."
    return (f"A number that fewer than {_number(statistics.minimum)} patients stand behind is withheld; the median of "
            "a volume is the mean of that many patients around it. There is no noise in these numbers and no formal "
            "guarantee.")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *([_safe(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _safe(text: str) -> str:
    """One line of text that stays text in Markdown, also in a table."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#!" else c for c in " ".join(text.split()))


def _write(path: str | os.PathLike[str], text: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError as error:
        raise DataError(f"{path} exists already and is not overwritten: remove it, or give another path") from error
    return path


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "<br>".join(map(_cell, value))
    if isinstance(value, Mapping):
        return "; ".join(f"{escape(str(name))}: {escape(str(item))}" for name, item in value.items())
    return escape(str(value))


def _markdown_html(text: str) -> str:
    """Markdown as HTML in which nothing of the text runs, is loaded or leads out of http(s)."""
    need("lab", "mistune", what="a data card in a notebook")
    import mistune

    class Plain(mistune.HTMLRenderer):
        """Pictures become their description: a card that is looked at tells nobody."""

        def image(self, text: str, url: str, title: str | None = None) -> str:
            return f"[picture: {escape(text)}]"

    rendered = mistune.create_markdown(renderer=Plain(escape=True), plugins=["table"])(text)
    return rendered if isinstance(rendered, str) else ""
