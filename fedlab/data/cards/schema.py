"""The contents of a data card: front matter, sections, and a safe reader for files of unknown origin.

The fields are those of Hugging Face's dataset cards and, with the prefix "rai:", the responsible-AI properties of
Croissant (MLCommons, Croissant RAI specification 1.0), as far as they apply to brain scans.
"""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from fedlab.core.errors import DataError
from fedlab.core.files import packaged_toml

__all__ = ["FIELDS", "LICENCES", "MARK", "SECTIONS", "CardField", "is_open", "problems", "read_front_matter",
           "split_sections", "summary"]

#: The beginning of a text that the hospital has to complete; such a text counts as open.
MARK = "TO BE COMPLETED"
_PARTS = packaged_toml(__package__, "schema.toml")
#: Headings ("## ...") that every card has, each with text below it.
SECTIONS: tuple[str, ...] = tuple(_PARTS["sections"])
#: Hugging Face's name of a licence -> its page. "other" needs `license_name` and `license_link`.
LICENCES: Mapping[str, str] = _PARTS["licences"]
#: Limits: characters of a front matter, characters of one text in it, items of a list, levels of nesting.
_LONGEST_FRONT, _LONGEST_TEXT, _MOST_ITEMS, _DEEPEST = 64_000, 8_000, 200, 4
_MOST_UNKNOWN = 20  # unknown fields that are listed individually
#: A control character other than line breaks and tabs.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff\ud800-\udfff]")
_FENCE = re.compile(r"\s{0,3}(`{3,}|~{3,})")

Kind = Literal["text", "texts", "date", "url", "table"]


@dataclass(frozen=True, kw_only=True)
class CardField:
    """One field of the front matter.

    Attributes:
        name: in the file.
        kind: "text"; "texts", a list of them; "date", such as 2021-07-05; "url"; "table", a list of rows.
        about: its content.
        required: whether a card without it is refused.
        choices: the permitted values; empty if any value is permitted.
        columns: of a table; each row has exactly these.
    """

    name: str
    kind: Kind
    about: str
    required: bool = True
    choices: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()


#: The front matter of a card, in its order.
FIELDS = tuple(CardField(choices=tuple(field.pop("choices", ())), columns=tuple(field.pop("columns", ())), **field)
               for field in _PARTS["fields"])
_BY_NAME = {field.name: field for field in FIELDS}


def is_open(value: Any) -> bool:
    """Whether a text, or one of several, is still to be completed."""
    if isinstance(value, (list, Mapping)):
        return any(is_open(item) for item in (value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, str) and value.lstrip(" *_").startswith(MARK)


def split_sections(body: str) -> list[tuple[str, str]]:
    """The parts of a Markdown text as (heading, text): the text before the first "## " heading has the heading ""."""
    parts: list[tuple[str, list[str]]] = [("", [])]
    fence = ""
    for line in body.splitlines():
        if match := _FENCE.match(line):
            if not fence:
                fence = match[1]
            elif match[1].startswith(fence):
                fence = ""
        if not fence and line.startswith("## "):
            parts.append((line[3:].strip(), []))
        else:
            parts[-1][1].append(line)
    return [(heading, "\n".join(lines).strip()) for heading, lines in parts]


def problems(metadata: Mapping[str, Any], body: str) -> list[str]:
    """All missing and invalid parts of a card: the field, what was expected, what was given."""
    unknown = [name for name in metadata if name not in _BY_NAME]
    found = [f"{name[:80]}: unknown field{_nearest(name)}" for name in unknown[:_MOST_UNKNOWN]]
    if len(unknown) > _MOST_UNKNOWN:
        found.append(f"front matter: {len(unknown)} of its fields are unknown; is this a data card?")
    for field in FIELDS:
        value = metadata.get(field.name)
        if value is None:
            if field.required or field.name in metadata:
                found.append(f"{field.name}: expected {_WANTED[field.kind]} ({field.about}), got nothing")
        else:
            found += [f"{field.name}{problem}" for problem in _problems_of(field, value)]
    if metadata.get("license") == "other":
        found += [f"{name}: expected a text because license is 'other' ({_BY_NAME[name].about}), got nothing"
                  for name in ("license_name", "license_link") if metadata.get(name) is None]
    sections = split_sections(body)
    headings = [heading for heading, _ in sections]
    for heading in SECTIONS:
        if heading not in headings:
            found.append(f"section '## {heading}': expected in the text, but missing")
        elif not next(text for name, text in sections if name == heading):
            found.append(f"section '## {heading}': expected text below it, got nothing")
    found += [f"section '## {heading}': expected once, found {headings.count(heading)} times"
              for heading in dict.fromkeys(headings) if headings.count(heading) > 1]
    if not sections[0][1].startswith("# ") or not summary(body):
        found.append("text: expected a title ('# ...') and below it a paragraph that describes the data set")
    return found


def summary(body: str) -> str:
    """The paragraph below the title, on one line."""
    return " ".join(split_sections(body)[0][1].partition("\n")[2].split())


def _nearest(name: object) -> str:
    close = difflib.get_close_matches(str(name)[:80], _BY_NAME, n=1)
    return f"; did you mean {close[0]}?" if close else f"; the fields are {', '.join(_BY_NAME)}"


_WANTED: Mapping[Kind, str] = {"text": "a text", "texts": "a list of texts", "date": "a date such as 2021-07-05",
                               "url": "a URL that begins with https:// or http://", "table": "a list of rows"}


def _problems_of(field: CardField, value: Any) -> list[str]:
    wanted = f"expected {_WANTED[field.kind]} ({field.about})"
    if field.kind not in ("texts", "table"):
        return _problems_of_text(field, value, wanted)
    if not isinstance(value, list) or not value:
        return [f": {wanted}, got {_shown(value)}"]
    if len(value) > _MOST_ITEMS:
        return [f": expected at most {_MOST_ITEMS} items, got {len(value)}"]
    check = _problems_of_row if field.kind == "table" else _problems_of_text
    return [f"[{number}]{problem}" for number, item in enumerate(value) for problem in check(field, item, wanted)]


def _problems_of_row(field: CardField, row: Any, wanted: str) -> list[str]:
    if not isinstance(row, Mapping) or set(row) != set(field.columns):
        return [f": expected a row with exactly {', '.join(field.columns)}, got {_shown(row)}"]
    cells = [CardField(name=name, kind="text", about=name) for name in field.columns
             if name not in ("value", "patients") or type(row[name]) is not int or row[name] < 0]
    return [f".{cell.name}{problem}" for cell in cells
            for problem in _problems_of_text(cell, row[cell.name], "expected a text")]


def _problems_of_text(field: CardField, value: Any, wanted: str) -> list[str]:
    if not isinstance(value, str) or not value.strip():
        quote = "; put it in quotes" if isinstance(value, (bool, int, float)) else ""
        return [f": {wanted}, got {_shown(value)}{quote}"]
    if len(value) > _LONGEST_TEXT:
        return [f": expected at most {_LONGEST_TEXT} characters, got {len(value)}"]
    if _CONTROL.search(value):
        return [f": expected printable characters, got {_shown(value)}"]
    if is_open(value):
        return []
    if field.choices and value not in field.choices:
        return [f": expected one of {', '.join(field.choices)}, got {_shown(value)}"]
    fits = _FITS.get(field.kind)
    return [f": {wanted}, got {_shown(value)}"] if fits and not fits(value) else []


def _is_date(text: str) -> bool:
    if not re.fullmatch(r"\d{4}(-\d{2}(-\d{2})?)?", text, re.ASCII):
        return False
    try:
        datetime.date.fromisoformat(f"{text}-01-01"[:10])
    except ValueError:
        return False
    return True


_FITS: Mapping[Kind, Callable[[str], object]] = {
    "date": _is_date, "url": lambda text: re.fullmatch(r"https?://[^\s<>\"'`\\]{3,2000}", text)}


def _shown(value: Any) -> str:
    """A value in an error message: its type and its beginning."""
    kind = {str: "the text", bool: "the truth value", int: "the number", float: "the number", dict: "the mapping",
            list: "the list", type(None): "nothing"}.get(type(value), f"a {type(value).__name__}")
    if value is None:
        return kind
    text = f"with {len(value)} items" if isinstance(value, (dict, list)) and len(value) > 6 else ascii(value)
    return f"{kind} {text if len(text) <= 80 else text[:77] + '...'}"


def read_front_matter(text: str, *, where: str) -> tuple[dict[str, Any], str]:
    """The front matter of a card and the Markdown below it, from a text of unknown origin.

    Aliases, tags and deep nesting are refused before any value is built, so that a small file needs little memory.
    Messages call the card `where`.

    Raises:
        DataError: the front matter is missing, too large, not plain YAML, or repeats a key.
    """
    lines = text.removeprefix("\ufeff").splitlines()
    ends = [number for number, line in enumerate(lines) if line.rstrip() == "---"]
    if len(ends) < 2 or ends[0] != 0:
        raise DataError(f"{where}: expected a front matter, YAML between two lines of '---' at the very beginning of "
                        "the file, found none")
    front = "\n".join(lines[1:ends[1]])
    if len(front) > _LONGEST_FRONT:
        raise DataError(f"{where}: expected a front matter of at most {_LONGEST_FRONT} characters, got {len(front)}; "
                        "move long texts below it")
    try:
        metadata = yaml.load(front, _StrictLoader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{where}: the front matter cannot be read as YAML: {_reason(error)}") from error
    if not isinstance(metadata, dict):
        raise DataError(f"{where}: expected fields with values in the front matter, got {_shown(metadata)}")
    return {str(name): _dated(value) for name, value in metadata.items()}, "\n".join(lines[ends[1] + 1:]).strip()


class _StrictLoader(yaml.SafeLoader):
    """Refuses everything that plain data does not need."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise ValueError("anchors and aliases (& and *) are not permitted; write the value out")
        if event.tag is not None:
            raise ValueError("tags (!) are not permitted; write a plain value")
        if self.depth >= _DEEPEST and isinstance(event, yaml.CollectionStartEvent):
            raise ValueError(f"values are nested more than {_DEEPEST} levels deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        names = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
        if len(names) < len(node.value):
            raise ValueError("a field's name must be a text, got a list or a mapping")
        if double := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"the field {double[0][:80]!r} occurs twice")
        return super().construct_mapping(node, deep)


def _dated(value: Any) -> Any:
    """A date as text: YAML converts texts that look like one."""
    return value.isoformat() if isinstance(value, datetime.date) else value


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem or error.context} in its line {error.problem_mark.line + 1}"
    return " ".join(str(error).split())[:200]
