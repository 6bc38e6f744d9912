"""The look of all figures, viewers and pages: colours and names of labels, regions and arms, matplotlib's settings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, ParamSpec, TypeVar, get_args

from fedlab.core.settings import check_choice

__all__ = ["ARMS", "BLUE", "ERRORS", "GREEN", "GREY", "INK", "LABEL_ABBREVIATIONS", "LABEL_COLOURS", "LABEL_NAMES",
           "LINES", "MODALITY_COLOURS", "ORANGE", "RED", "REGION_COLOURS", "REGION_LABELS", "REGION_NAMES",
           "arm_colours", "arm_label", "arm_of", "style", "styled"]

P = ParamSpec("P")
R = TypeVar("R")
Theme = Literal["light", "dark"]
_TEMPLATES = Path(__file__).parent / "templates"
_STYLES: Mapping[Theme, list[Path]] = {
    "light": [_TEMPLATES / "fedlab.mplstyle"],
    "dark": [_TEMPLATES / "fedlab.mplstyle", _TEMPLATES / "fedlab_dark.mplstyle"]}
_theme: Theme = "light"  # of this session, as `style` has set it

BLUE, ORANGE, GREEN, INK, RED, GREY = "#0072B2", "#E08A00", "#009E73", "#222222", "#B3261E", "#666666"
#: Colours of lines (Okabe & Ito 2008, safe for the colour-blind), in an order in which neighbours differ.
LINES = (BLUE, ORANGE, GREEN, "#CC79A7", "#444444", "#56B4E9", "#8C510A", "#6A51A3")

#: BraTS label -> its colour. The usual red, green and a third colour, in tones that are safe for the colour-blind.
LABEL_COLOURS: Mapping[int, str] = {1: "#E8432E", 2: "#12B886", 4: "#FFD43B"}
#: BraTS label -> its name.
LABEL_NAMES: Mapping[int, str] = {1: "necrotic / non-enhancing core", 2: "oedema", 4: "enhancing tumour"}
#: BraTS label -> its abbreviation.
LABEL_ABBREVIATIONS: Mapping[int, str] = {1: "NCR", 2: "ED", 4: "ET"}
#: Value of an error map -> its colour and name; distinct from each other and from `LABEL_COLOURS`.
ERRORS: Mapping[int, tuple[str, str]] = {
    1: ("#F032E6", "false positive"), 2: ("#2F8CFF", "false negative"), 3: ("#8BC34A", "both"),
}
#: Region -> its name, the largest first.
REGION_NAMES: Mapping[str, str] = {"WT": "whole tumour", "TC": "tumour core", "ET": "enhancing tumour"}
#: Region -> the labels that belong to it.
REGION_LABELS: Mapping[str, tuple[int, ...]] = {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}
#: Region -> its colour where regions are lines or dots.
REGION_COLOURS: Mapping[str, str] = {"WT": "#56B4E9", "TC": "#D55E00", "ET": "#CC79A7"}
#: Modality -> its colour where modalities are dots.
MODALITY_COLOURS: Mapping[str, str] = {"FLAIR": BLUE, "T1": GREEN, "T1c": ORANGE, "T2": "#6A51A3"}

#: Arm of a comparison -> its colour in every figure.
ARMS: Mapping[str, str] = {"public": GREEN, "federated": BLUE, "pooled": "#444444", "local": ORANGE,
                           "thresholding": "#9A9A9A"}
#: After the lines' colours those of Tol 2021 (muted), safe for the colour-blind too.
_FURTHER = (*(colour for colour in LINES if colour not in ARMS.values()), "#882255", "#999933", "#332288", "#44AA99",
            "#CC6677", "#DDCC77", "#117733", "#AA4499")


def style(theme: Theme = "light") -> None:
    """Gives every later matplotlib figure of this session the look of fedlab's own: fonts, frame, colours of lines.

    Call it once before the figures of a notebook or a script. The figures of fedlab have it in any case. A picture
    cannot follow the theme of JupyterLab, so say `fl.style(theme="dark")` there: it holds for your figures and for
    those of fedlab. Dashboards, charts and the playground follow the theme by themselves.

    Args:
        theme: "light", or "dark" for light text on JupyterLab's dark background.

    Raises:
        ValueError: another theme.

    Example:
        >>> import matplotlib
        >>> fl.style()  # before the first figure of a notebook
        >>> matplotlib.rcParams["axes.spines.top"]
        False
    """
    global _theme
    from matplotlib import style as styles

    check_choice(get_args(Theme), theme=theme)
    _theme = theme
    styles.use(_STYLES[theme])


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """A decorator: the function draws with the settings of our figures, and the user's settings return after it.

    Under the dark theme the colours that it names itself follow too.
    """
    @functools.wraps(draw)
    def drawing(*args: P.args, **kwargs: P.kwargs) -> R:
        from matplotlib import style as styles

        with styles.context(_STYLES[_theme]):
            figure = draw(*args, **kwargs)
        if _theme == "dark":
            from fedlab.view.picture import darken

            darken(figure)
        return figure

    return drawing


def arm_of(name: str) -> str:
    """The arm of a run: "local" for "local_own" and "local: Bern"; for others the name without such an end."""
    name = name.removesuffix("_own").removesuffix("_others")
    return next((arm for arm in ARMS if name.lower().startswith(arm)), name)


def arm_label(name: str) -> str:
    """The name of an arm, or of a group of local models, as figures, tables and texts say it."""
    arm, _, whose = name.rpartition("_")
    return {"own": f"{arm} on own patients", "others": f"{arm} on others' patients"}.get(whose, name) if arm else name


def arm_colours(names: Iterable[str]) -> dict[str, str]:
    """One colour per name: that of its arm, or the next free colour for an arm that is not in `ARMS`."""
    names = list(names)
    unknown = list(dict.fromkeys(arm for name in names if (arm := arm_of(name)) not in ARMS))
    if len(unknown) > len(_FURTHER):
        raise ValueError(f"at most {len(_FURTHER)} arms besides {', '.join(ARMS)} can be told apart by colour, got "
                         f"{len(unknown)}: {', '.join(unknown)}; draw them in several figures")
    colours = {**ARMS, **dict(zip(unknown, _FURTHER, strict=False))}
    return {name: colours[arm_of(name)] for name in names}
