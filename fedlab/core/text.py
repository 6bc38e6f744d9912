"""Text for readers: numbers with nouns; text of unknown origin, in Markdown and without the folders of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["counted", "escape_markdown", "without_folders"]

#: The beginning of an absolute path: /, ~/, C:\, \\server\, file:///.
_ROOT = r"(?:\bfile:|~\w*|\b[A-Za-z]:)?[/\\]+"
#: Folders up to the last separator. A name may hold blanks and no punctuation of a sentence, and then no dot.
_WORD, _BARE = r"[^\s'\"`<>|:;,()\[\]{}/\\]+", r"[^\s'\"`<>|:;,()\[\]{}/\\.]+"
_FOLDERS = rf"(?:(?:{_WORD}|{_BARE}(?: {_BARE}){{1,3}})[/\\]+)*"
_QUOTED = re.compile(rf"""(?P<quote>['"`])(?:{_ROOT}|\.{{1,2}}[/\\])[^'"`\n]*?(?P<name>[^/\\'"`\n]*)(?P=quote)""")
_ABSOLUTE = re.compile(rf"(?<!https:)(?<!http:)(?<![\w.)\]/<]){_ROOT}(?=[^\s/\\]){_FOLDERS}")
_RELATIVE = re.compile(r"(?<![\w/\\])(?:[\w.+@%~-]+[/\\]+)+(?=[\w+@%~-][\w.+@%~-]*\.[A-Za-z]\w*)")


def counted(number: int, noun: str) -> str:
    """A number and its noun, such as "1 patient" and "3 patients"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def escape_markdown(text: object) -> str:
    """One line of text without effect as Markdown, also in a table."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#!" else c for c in " ".join(str(text).split()))


def without_folders(text: str, places: Iterable[Path | str] = ()) -> str:
    """Text in which paths are names of files only, so that it says nothing about the folders of this machine.

    Args:
        text: such as of an error.
        places: folders and files that may be named, also with blanks in their names: each loses its parents, a folder
            within such a path too.
    """
    known = {str(form) for place in places for form in (Path(place), Path(place).absolute(), Path(place).resolve())}
    for place in sorted(known - {".", "/"}, key=len, reverse=True):
        folder = "|".join(re.escape(form) for form in {place, place.replace("\\", "\\\\")})  # also as repr shows it
        text = re.sub(rf"(?<!\w)(?:{folder})[/\\]+", "/", text)
        text = Path(place).name.join(re.split(rf"(?<!\w)(?:{folder})(?!\w)", text))
    text = _QUOTED.sub(lambda found: f"{found['quote']}{found['name']}{found['quote']}", text)
    return _RELATIVE.sub("", _ABSOLUTE.sub("", text))
