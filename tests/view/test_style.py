"""One look: every figure of the package, the notebooks and the benchmarks is drawn with fedlab's style."""

from __future__ import annotations

import ast
import json
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib.figure import Figure

import fedlab as fl
from fedlab.core.regions import REGION_ORDER
from fedlab.view.colours import ARMS, LINES, REGION_COLOURS, REGION_LABELS, REGION_NAMES

ROOT = Path(__file__).resolve().parents[2]
CODE = sorted((ROOT / "fedlab").rglob("*.py"))


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]


def calls(function: ast.FunctionDef) -> set[str]:
    found = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {f.id if isinstance(f, ast.Name) else f.attr for f in found if isinstance(f, ast.Name | ast.Attribute)}


def is_styled(function: ast.FunctionDef) -> bool:
    return any(isinstance(one, ast.Name) and one.id == "styled" for one in function.decorator_list)


@pytest.mark.parametrize("path", [p for p in CODE if "Picture(" in p.read_text("utf-8") and p.name != "picture.py"],
                         ids=lambda path: path.name)
def test_every_figure_of_the_package_is_drawn_with_the_style(path: Path) -> None:
    """A function that makes a figure is styled, or is called by styled functions alone."""
    defined = functions(path)
    makers = [f for f in defined if "Picture" in calls(f) and not is_styled(f)]
    for maker in makers:
        callers = [f for f in defined if maker.name in calls(f)]
        assert maker.name.startswith("_") and callers and all(map(is_styled, callers)), maker.name


def test_the_package_makes_no_figure_in_another_way() -> None:
    for path in CODE:
        text = path.read_text("utf-8")
        assert "matplotlib.pyplot" not in text and "import pyplot" not in text, path
        assert "Figure(" not in text.replace("class Picture(Figure)", ""), path


def test_notebooks_and_benchmarks_with_figures_of_their_own_take_the_style() -> None:
    found = 0
    for path in [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("docs/*.py")]:
        text = path.read_text("utf-8")
        if path.suffix == ".ipynb":
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        if "pyplot" in text:
            found += 1
            assert text.index("pyplot") < text.index("style()") < text.index("subplots("), path
    assert found >= 7


def test_the_style_holds_for_later_figures_and_that_of_a_figure_of_fedlab_only_for_it() -> None:
    with mpl.rc_context():
        mpl.rcdefaults()
        before = dict(mpl.rcParams)
        fl.view.cross_site_heatmap(pd.DataFrame([[0.5]], index=["pooled"], columns=["site-01"]))
        assert dict(mpl.rcParams) == before
        fl.style()
        ax = Figure().subplots()
        assert not ax.spines["top"].get_visible()
        assert tuple(line.get_color().upper() for line in (ax.plot([0, 1])[0] for _ in LINES)) == LINES


def test_ticks_of_small_and_large_numbers_do_not_overlap() -> None:
    """As at the histograms of the updates of notebook 03, whose labels -0.0020 and -0.0015 ran into each other."""
    with mpl.rc_context():
        fl.style()
        for values in ([-0.002, 0.002], [-2e-5, 3e-5], [0, 4e6], [0.97, 1.03]):
            figure = Figure(figsize=(3, 2.2), layout="constrained")
            ax = figure.subplots()
            ax.plot(values, [0, 1])
            figure.canvas.draw()
            boxes = sorted((label.get_window_extent().x0, label.get_window_extent().x1)
                           for label in ax.get_xticklabels() if label.get_text())
            shown = [box for box in boxes if ax.bbox.x0 - 1 <= sum(box) / 2 <= ax.bbox.x1 + 1]
            assert all(left[1] < right[0] for left, right in pairwise(shown)), values


def test_regions_and_arms_have_one_order() -> None:
    for mapping in (REGION_NAMES, REGION_LABELS, REGION_COLOURS):
        assert tuple(mapping) == REGION_ORDER
    assert list(ARMS)[:4] == ["public", "federated", "pooled", "local"]
