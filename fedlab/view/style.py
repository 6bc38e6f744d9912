"""The look of all figures: the matplotlib settings in `templates/fedlab.mplstyle`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

__all__ = ["styled"]

P = ParamSpec("P")
R = TypeVar("R")
_STYLE = Path(__file__).parent / "templates" / "fedlab.mplstyle"


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """A decorator: the function draws with the settings of our figures, and the user's settings return after it."""
    @functools.wraps(draw)
    def drawing(*args: P.args, **kwargs: P.kwargs) -> R:
        from matplotlib import style

        with style.context(_STYLE):
            return draw(*args, **kwargs)

    return drawing
