"""Text of unknown origin in Markdown."""

from __future__ import annotations

__all__ = ["escape_markdown"]


def escape_markdown(text: object) -> str:
    """One line of text without effect as Markdown, also in a table."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#!" else c for c in " ".join(str(text).split()))
