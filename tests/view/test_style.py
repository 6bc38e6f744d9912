"""One look: every figure of the package, the notebooks and the benchmarks is drawn with fedlab's style."""

from __future__ import annotations

import ast
import io
import json
import re
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import fedlab as fl
from cohorts import blob_patient, blob_sites
from fedlab.core.regions import REGION_ORDER
from fedlab.view.colours import ARMS, LINES, REGION_COLOURS, REGION_LABELS, REGION_NAMES
from fedlab.view.picture import figure_png, log_ticks

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


@pytest.mark.parametrize("values", [[1.5, 45], [0.02, 0.6], [0.3, 260], [1e-4, 1e2], [1, 2.5]])
def test_ticks_of_a_logarithmic_axis_are_plain_numbers_that_do_not_overlap(values) -> None:
    """As at the tumour volumes of a small cohort, whose labels 3 × 10⁰ and 4 × 10⁰ ran into each other."""
    figure = Figure(figsize=(4, 2.2), layout="constrained")
    ax = figure.subplots()
    ax.plot(values, [0, 1])
    log_ticks(ax)
    figure.canvas.draw()
    labels = [*ax.get_xticklabels(), *ax.get_xticklabels(minor=True)]
    boxes = sorted((label.get_window_extent().x0, label.get_window_extent().x1, label.get_text())
                   for label in labels if label.get_text())
    shown = [box for box in boxes if ax.bbox.x0 - 1 <= (box[0] + box[1]) / 2 <= ax.bbox.x1 + 1]
    assert len(shown) >= 2 and all(float(text) > 0 for _, _, text in shown)
    assert all(left[1] < right[0] for left, right in pairwise(shown)), shown


def test_regions_and_arms_have_one_order() -> None:
    for mapping in (REGION_NAMES, REGION_LABELS, REGION_COLOURS):
        assert tuple(mapping) == REGION_ORDER
    assert list(ARMS)[:4] == ["public", "federated", "pooled", "local"]


@pytest.fixture
def dark():
    with mpl.rc_context():
        fl.style(theme="dark")
        yield
        fl.style()


def luminance(colour: object) -> float:
    """Relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055)**2.4 for c in mpl.colors.to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: object, other: object) -> float:
    light, dark = sorted([luminance(one), luminance(other)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


def corners(figure: Figure) -> np.ndarray:
    """The four pixels at the corners of the picture as it is saved."""
    image = mpl.image.imread(io.BytesIO(figure_png(figure, 60)[0]))[..., :3]
    return 255 * image[[0, 0, -1, -1], [0, -1, 0, -1]]


def package_figures() -> dict[str, Figure]:
    scores = pd.DataFrame([{"arm": arm, "site": "site-0", "patient": f"p{k}", "region": region, "dice": 0.1 * k}
                           for arm in ("federated", "pooled", "public") for k in range(8) for region in REGION_ORDER])
    patient = blob_patient("p", seed=0)
    sites = blob_sites()
    return {"bars": fl.view.dice_by_arm(scores),
            "workflow": fl.view.workflow_figure({"star": fl.topologies.star}, sites),
            "heatmap": fl.view.cross_site_heatmap(pd.DataFrame([[0.5]], index=["pooled"], columns=["site-01"])),
            "viewer": fl.show(patient, {"pooled": patient.label}, backend="static").picture(),
            "sites": fl.view.sites_figure(sites)}


def test_figures_of_the_dark_theme_are_dark_and_their_texts_are_read(dark) -> None:
    for name, figure in package_figures().items():
        assert luminance(figure.get_facecolor()) < 0.02, name
        assert corners(figure).max() < 30, name
        on_images = {text for ax in figure.axes if ax.images for text in ax.texts}
        for text in figure.findobj(mpl.text.Text):
            if text.get_text() and text.get_visible() and text not in on_images:
                assert contrast(text.get_color(), "#111111") > 4.5, (name, text.get_text())
        if name == "bars":
            bars = [bar for ax in figure.axes for bar in ax.patches if bar.get_height()]
            assert len(bars) == 9 and all(contrast(bar.get_facecolor(), "#111111") > 3 for bar in bars)
        for line in figure.findobj(mpl.lines.Line2D):
            if line.get_visible() and line.get_linestyle() != "None" and len(line.get_xdata()) and line.axes:
                is_grid = any(line in axis.get_gridlines() for axis in (line.axes.xaxis, line.axes.yaxis))
                assert is_grid or contrast(line.get_color(), "#111111") > 2.5, (name, line)


def test_own_figures_are_dark_too_and_light_is_what_it_was(dark) -> None:
    ax = Figure().subplots()
    assert luminance(ax.get_facecolor()) < 0.02 and contrast(ax.xaxis.label.get_color(), "#111111") > 4.5
    assert all(contrast(ax.plot([0, 1])[0].get_color(), "#111111") > 4 for _ in LINES)
    fl.style()
    assert luminance(Figure().subplots().get_facecolor()) == 1.0 == luminance(package_figures()["bars"].get_facecolor())
    with pytest.raises(ValueError, match="theme is one of 'light', 'dark', got 'solarized'"):
        fl.style(theme="solarized")  # type: ignore[arg-type]
    assert luminance(Figure().subplots().get_facecolor()) == 1.0


def test_widgets_and_charts_follow_the_theme_of_the_page() -> None:
    """A fixed white background or dark text in a template of a widget stays glaring or is unreadable in the dark."""
    templates = [*(ROOT / "fedlab/view/templates").glob("playground_*"), *(ROOT / "fedlab" / name for name in (
        "view/templates/dashboard.html.j2", "run/templates/chart.svg.j2", "evidence/templates/evidence.svg.j2"))]
    assert len(templates) == 5
    for path in templates:
        text = re.sub(r"var\(--jp-[\w-]+,\s*#\w+\)", "", path.read_text("utf-8"))
        fixed = r"""(?:background|color|fill|stroke)(?:=["']|:)\s*(?:#fff\b|#222|#333|#555|#666|white|black)"""
        assert not re.findall(fixed, text), path
