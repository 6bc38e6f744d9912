"""Data cards: one page of Markdown per data set, with a front matter for programs.

A card states the origin of the scans, who may use them and for what, and their known defects (Gebru et al. 2021,
doi:10.1145/3458723). The cards of public data sets are in `data_cards/`; a hospital fills a template with the
statistics that its site releases (`fill_card`) and completes what only people know.
"""

from __future__ import annotations

import copy
import importlib.resources
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fedlab.core.errors import DataError
from fedlab.core.files import filled_in, write_new
from fedlab.core.text import counted, escape_markdown
from fedlab.data.cards.croissant import croissant
from fedlab.data.cards.schema import FIELDS, MARK, is_open, problems, read_front_matter, split_sections, summary
from fedlab.data.readers.findings import bullets

if TYPE_CHECKING:
    from fedlab.data.sites.distributions import SiteStatistics

__all__ = ["DataCard", "card_template", "fill_card", "read_card"]

#: Largest card that is read; a card is text written by people.
_LARGEST_BYTES = 256 * 1024


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """A valid data card; created by `read_card`, `card_template` and `fill_card`.

    Attributes:
        metadata: the front matter, see `fedlab.data.cards.schema.FIELDS`.
        body: the Markdown text below it, from the title on.

    Raises:
        DataError: a field or section is missing or invalid; all problems are listed.
    """

    metadata: Mapping[str, Any]
    body: str

    def __post_init__(self) -> None:
        if found := problems(self.metadata, self.body):
            more = f"\n  and {len(found) - 50} more" if len(found) > 50 else ""
            raise DataError(f"the data card has {counted(len(found), 'problem')}:\n"
                            f"{bullets(found[:50])}{more}")

    @property
    def name(self) -> str:
        """The common name of the data set."""
        return str(self.metadata["pretty_name"])

    @property
    def summary(self) -> str:
        """The paragraph below the title, on one line."""
        return summary(self.body)

    @property
    def open(self) -> tuple[str, ...]:
        """Fields and sections that people still have to complete."""
        fields = [field.name for field in FIELDS if is_open(self.metadata.get(field.name))]
        return (*fields, *(f"## {heading}" for heading, text in split_sections(self.body) if MARK in text))

    def section(self, heading: str) -> str:
        """The text below a heading.

        Raises:
            KeyError: an unknown heading.
        """
        return dict(split_sections(self.body))[heading]

    def to_markdown(self) -> str:
        """The card as the content of a file; `parse` restores it."""
        front = yaml.dump(dict(self.metadata), Dumper=_NoAliasDumper, sort_keys=False, allow_unicode=True, width=110)
        return f"---\n{front}---\n\n{self.body}\n"

    @classmethod
    def parse(cls, text: str, *, where: str = "the card") -> DataCard:
        """A card from front matter and Markdown; `where` is its name in messages.

        Raises:
            DataError: the text is too large, its front matter cannot be read, or the card is invalid.
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
            DataError: the file exists already.
        """
        return write_new(path, self.to_markdown().encode(), error=DataError)

    def to_croissant(self, *, draft: bool = False) -> dict[str, Any]:
        """The card as Croissant metadata, version 1.0 with its responsible-AI properties 1.0 (MLCommons).

        It describes the files and the meaning of their values; it does not provide a download. A draft leaves out open
        parts and lists them.

        Raises:
            DataError: a part is still to be completed and `draft` is False.
        """
        if self.open and not draft:
            raise DataError(f"{self.name}: still to be completed: {', '.join(self.open)}; complete them, or pass "
                            "draft=True to leave them out")
        return croissant(self.metadata, self.summary, open_fields=self.open)

    def save_croissant(self, path: str | os.PathLike[str], *, draft: bool = False) -> Path:
        """Writes `to_croissant` as JSON.

        Raises:
            DataError: as `to_croissant`, or the file exists already.
        """
        text = json.dumps(self.to_croissant(draft=draft), indent=2, ensure_ascii=False) + "\n"
        return write_new(path, text.encode(), error=DataError)

    def __repr__(self) -> str:
        state = f"{len(self.open)} parts to be completed" if self.open else "complete"
        licence = "to be completed" if is_open(self.metadata["license"]) else self.metadata["license"]
        return f"<DataCard {self.name!r}: licence {licence}, {state}>"

    def _repr_markdown_(self) -> str:
        return self.body

    def _repr_html_(self) -> str:
        """The text, with the front matter folded; the content of the file is escaped, and nothing is loaded."""
        return filled_in(__package__, "card.html", open=self.open, text=_markdown_html(self.body),
                         metadata=self.metadata)


class _NoAliasDumper(yaml.SafeDumper):
    """Writes repeated values out, since aliases are refused on reading."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def read_card(path: str | os.PathLike[str]) -> DataCard:
    """A data card from a Markdown file.

    Raises:
        DataError: the file cannot be read, is too large or not UTF-8 text, or the card is invalid; the message states
            the field, what was expected and what was given.
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
    """The card for a hospital's own scans, with marks at the parts that people have to complete."""
    file = importlib.resources.files(__package__) / "card_template.md"
    return DataCard.parse(file.read_text("utf-8"), where="the template")


def fill_card(template: DataCard, statistics: SiteStatistics) -> DataCard:
    """A site's card: a template with the statistics that the site releases about its patients.

    Withheld statistics remain withheld, noised numbers are given with their ε, and what only people know remains
    marked; `DataCard.open` lists it. The template is usually `card_template()`.
    """
    name = f"Glioma MRI of {' '.join(statistics.site.split())}"
    splits = _splits(statistics)
    rows = [{"quantity": str(quantity), **{column: _number(value) for column, value in row.items()}}
            for quantity, row in statistics.table().iterrows()]
    patients = filled_in(__package__, "patients.md", statistics=statistics, splits=splits, rows=rows, number=_number,
                         escape=escape_markdown).strip()
    filled = {"pretty_name": name, "size_categories": [_size(statistics.patients)], "splits": splits,
              "statistics": rows}
    sections = [(heading, patients if heading == "Patients" else text)
                for heading, text in split_sections(template.body)]
    opening = "\n".join([f"# {escape_markdown(name)}", *sections[0][1].splitlines()[1:]])
    body = "\n\n".join([opening, *(f"## {heading}\n\n{text}" for heading, text in sections[1:])])
    known = {field: value for field, value in filled.items() if value}
    return replace(template, metadata={**copy.deepcopy(dict(template.metadata)), **known}, body=body)


def _size(patients: float | None) -> str:
    if patients is None:
        return "other"
    return "n<1K" if patients < 1_000 else "1K<n<10K" if patients < 10_000 else "10K<n<100K"


def _number(value: float | None) -> str:
    """A whole number in full, any other to three digits."""
    if value is None or value != value:
        return "withheld"
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.3g}"


def _splits(statistics: SiteStatistics) -> list[dict[str, str]]:
    parts = {"all": statistics.patients}
    if statistics.held_out != 0:
        parts |= {"to train on": statistics.train, "held out": statistics.held_out}
    return [{"name": name, "patients": _number(count), "labelled": f"{MARK}: how many have a label map",
             "source": "counted by fedlab at the site"} for name, count in parts.items()]


def _markdown_html(text: str) -> str:
    """Markdown as HTML in which nothing is executed or loaded, and links lead to http(s) only."""
    import mistune

    class OfflineRenderer(mistune.HTMLRenderer):
        """Replaces images by their description, so that showing a card contacts no server."""

        def image(self, text: str, url: str, title: str | None = None) -> str:
            return f"[picture: {escape(text)}]"

    rendered = mistune.create_markdown(renderer=OfflineRenderer(escape=True), plugins=["table"])(text)
    return rendered if isinstance(rendered, str) else ""
