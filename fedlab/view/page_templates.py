"""HTML and Markdown from the jinja2 templates in the folder `templates`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from fedlab.core.text import escape_markdown

if TYPE_CHECKING:
    import jinja2

__all__ = ["render"]


def render(template: str, **values: Any) -> str:
    """Fills a template, named without ".j2". Values in HTML are escaped, those in Markdown by the filter `markdown`."""
    return _environment().get_template(f"{template}.j2").render(**values)


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedlab.view"), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2",)))
    environment.filters["markdown"] = escape_markdown
    return environment
