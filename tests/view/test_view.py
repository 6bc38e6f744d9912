"""Slices show the correct side, slice and colours; curves show the given numbers."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import matplotlib as mpl
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import fedlab.view
from fedlab.core.types import Patient, Round, ServerState, Site
from fedlab.run.history import History
from fedlab.view.colours import ARMS, LABEL_COLOURS, arm_colours, arm_label
from fedlab.view.picture import Picture
from fedlab.view.run_figures import cross_site_heatmap, curves, dice_by_arm
from fedlab.view.site_figures import sites_figure
from fedlab.view.slices import best_slice, compare, overlay, show_patient

SHAPE = (30, 36, 24)


def patient(name: str = "p-1", *, labelled: bool = True, spacing: tuple[float, float, float] = (2.0, 2.0, 2.0),
            bright: tuple[int, int, int] = (22, 10, 18)) -> Patient:
    """A dark brain with a bright cube around `bright`: by default right, posterior and superior."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in SHAPE], indexing="ij"))
    brain = torch.from_numpy((grid**2).sum(axis=0) < 0.8)
    x, y, z = bright
    image = torch.full((4, *SHAPE), -0.5)
    label = torch.zeros(SHAPE, dtype=torch.uint8)
    for value, radius in ((2, 3), (4, 2), (1, 1)):
        cube = (slice(x - radius, x + radius + 1), slice(y - radius, y + radius + 1), slice(z - radius, z + radius + 1))
        label[cube] = value
        image[(slice(None), *cube)] = 3.0
    return Patient(id=name, image=image * brain, label=label if labelled else None, affine=np.diag([*spacing, 1.0]))


def pixels(figure: Figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(float) / 255


def panel(figure: Figure, number: int) -> np.ndarray:
    """The pixels inside the axes with that number."""
    seen = pixels(figure)
    box = figure.axes[number].get_window_extent()
    height = seen.shape[0]
    return seen[int(height - box.y1) + 2:int(height - box.y0) - 2, int(box.x0) + 2:int(box.x1) - 2]


def centre(mask: np.ndarray) -> tuple[float, float]:
    """Centre of a mask in a picture: 0 is the top or left edge, 1 the bottom or right one."""
    rows, columns = np.nonzero(mask)
    return rows.mean() / mask.shape[0], columns.mean() / mask.shape[1]


def reddish(seen: np.ndarray) -> np.ndarray:
    return (seen[..., 0] - seen[..., 1:].max(axis=-1)) > 0.2


@pytest.mark.parametrize(("plane", "rows", "columns"), [
    ("axial", "low", "left"),         # behind is down, the patient's right is on the left
    ("coronal", "high", "left"),      # above is up
    ("sagittal", "high", "right"),    # the face is on the left, so behind is on the right
])
def test_sides_are_where_a_radiologist_expects_them(plane: str, rows: str, columns: str) -> None:
    figure = Figure(figsize=(4, 4), dpi=80)
    who = patient()
    overlay(figure.add_axes((0, 0, 1, 1)), who, who.label, plane=plane)
    seen = panel(figure, 0)
    down, across = centre(reddish(seen))
    assert (down > 0.55) if rows == "low" else (down < 0.45)
    assert (across < 0.45) if columns == "left" else (across > 0.55)
    bright = seen.min(axis=-1) > 0.35  # the bright cube of the image itself lies under its label
    assert centre(bright) == pytest.approx((down, across), abs=0.08)
    marks = [text.get_text() for text in figure.axes[0].texts]
    assert marks == (["A", "P"] if plane == "sagittal" else ["R", "L"])


def test_the_picture_agrees_with_nibabel_on_a_scan_stored_the_other_way_round() -> None:
    who = patient()
    stored = nib.Nifti1Image(who.image[0].numpy()[::-1, ::-1], who.affine @ np.diag([-1, -1, 1, 1]))
    assert nib.aff2axcodes(stored.affine) == ("L", "P", "S")
    ras = nib.as_closest_canonical(stored)
    again = Patient(id="p", image=torch.from_numpy(ras.get_fdata(dtype=np.float32).copy()).expand(4, *SHAPE),
                    label=who.label, affine=ras.affine)
    one, two = (show_patient(p, index=18, plane="axial") for p in (who, again))
    assert np.abs(panel(one, 0) - panel(two, 0)).max() < 1e-6


def test_axes_that_are_not_ras_are_refused() -> None:
    who = patient()
    turned = Patient(id="t", image=who.image, label=who.label, affine=np.diag([-2.0, 2.0, 2.0, 1.0]))
    with pytest.raises(ValueError, match="L, A, S"):
        show_patient(turned)


def test_best_slice_has_the_largest_area() -> None:
    label = torch.zeros(SHAPE, dtype=torch.uint8)
    label[5, 5:9, 7] = 1
    label[5:12, 20, 11] = 4
    assert [best_slice(label, plane=plane) for plane in ("axial", "coronal", "sagittal")] == [11, 20, 5]
    assert best_slice(label.numpy()) == 11
    with pytest.raises(ValueError, match="no tumour"):
        best_slice(torch.zeros(SHAPE))
    with pytest.raises(ValueError, match="'axial', got 'oblique'"):
        best_slice(label, plane="oblique")


def test_voxels_that_are_not_cubes_keep_their_proportions() -> None:
    """A cube of 7 voxels at 1 x 1 x 3 mm is three times as high as wide in a coronal slice."""
    figure = Figure(figsize=(5, 5), dpi=100)
    who = patient(spacing=(1.0, 1.0, 3.0))
    overlay(figure.add_axes((0, 0, 1, 1)), who, who.label, plane="coronal")
    seen = pixels(figure)
    coloured = seen.max(axis=-1) - seen.min(axis=-1) > 0.15
    rows, columns = np.nonzero(coloured)
    assert (np.ptp(rows) + 1) / (np.ptp(columns) + 1) == pytest.approx(3.0, rel=0.05)


def test_each_label_is_filled_with_its_colour() -> None:
    figure = Figure(figsize=(4, 4), dpi=100)
    who = patient()
    flat = Patient(id="f", image=torch.ones_like(who.image), label=who.label, affine=who.affine)
    overlay(figure.add_axes((0, 0, 1, 1)), flat, flat.label, index=18)
    seen = panel(figure, 0)
    none = Figure(figsize=(4, 4), dpi=100)
    overlay(none.add_axes((0, 0, 1, 1)), flat, None, index=18)
    grey = panel(none, 0)
    assert np.ptp(grey, axis=-1).max() < 0.02  # no label, no colour
    middle = grey[grey.shape[0] // 2, grey.shape[1] // 2]
    for colour in LABEL_COLOURS.values():
        mixed = 0.36 * np.array(to_rgb(colour)) + 0.64 * middle
        assert (np.abs(seen - mixed).max(axis=-1) < 0.02).sum() > 20, colour


def test_wrong_input_is_refused_with_what_to_do() -> None:
    who, ax = patient(), Figure().add_subplot()
    with pytest.raises(ValueError, match=r"label map of patient p-1 has shape \(3, 3, 3\); .* of shape \(30, 36, 24\)"):
        overlay(ax, who, torch.ones(3, 3, 3))
    with pytest.raises(ValueError, match="'FLAIR', 'T1', 'T1c', 'T2', got 'T9'"):
        overlay(ax, who, None, modality="T9")
    with pytest.raises(ValueError, match="from 0 to 23, got 24"):
        overlay(ax, who, None, index=24)
    with pytest.raises(ValueError, match="-1"):
        overlay(ax, who, None, index=-1)
    with pytest.raises(ValueError, match="1 label maps for 2 patients"):
        compare([who, who], {"federated": [who.label]})
    with pytest.raises(ValueError, match="no patient"):
        compare([], {})


def test_show_patient_has_a_panel_for_all_there_is_to_see() -> None:
    who = patient()
    titles = [ax.get_title() for ax in show_patient(who, who.label).axes]
    assert titles == ["FLAIR", "T1", "T1c", "T2", "reference", "prediction, WT Dice 1.00"]
    unlabelled = show_patient(patient(labelled=False), who.label)
    assert [ax.get_title() for ax in unlabelled.axes if ax.get_title()][-1] == "prediction"
    assert len(show_patient(patient(labelled=False)).axes) == 4
    assert "axial slice 18" in show_patient(who).get_suptitle()


def test_compare_scores_the_whole_volume() -> None:
    who, other = patient("first"), patient("second", bright=(15, 18, 12))
    half = who.label.clone()
    half[..., :18] = 0  # 4 of 7 slices remain: 2 * 4 / (7 + 4)
    figure = compare([who, other], {"federated": [who.label, other.label], "local_others": [half, other.label * 0]})
    titles = np.array([ax.get_title() for ax in figure.axes]).reshape(2, 4)
    assert titles.tolist() == [["", "", "WT Dice 1.00", "WT Dice 0.73"], ["", "", "WT Dice 1.00", "WT Dice 0.00"]]
    assert "second: federated, WT Dice 1.00; local on others' patients, WT Dice 0.00." in figure.alt
    without = compare([patient(labelled=False)], {"federated": [who.label]})
    assert len(without.axes) == 2
    assert not any("Dice" in ax.get_title() for ax in without.axes)


def test_a_blank_scan_and_half_precision_can_be_shown() -> None:
    who = patient()
    blank = Patient(id="b", image=torch.zeros_like(who.image), label=None, affine=who.affine)
    assert panel(show_patient(blank), 0)[40:].max() < 0.01
    half = Patient(id="h", image=who.image.half(), label=who.label, affine=who.affine)
    assert np.abs(panel(show_patient(half), 0) - panel(show_patient(who), 0)).max() < 0.02


def history(losses: list[float], *, dice: list[float] | None = None) -> History:
    made = History(rounds=len(losses))
    for number, loss in enumerate(losses):
        made.add(Round(number=number, state=ServerState(round=number + 1, params={}), cohort=("a", "b"), spent={},
                       sites={s: {"loss": loss, "weight": w, "bytes": 8.0} for s, w in (("a", 1.0), ("b", 3.0))},
                       metrics={"Dice": dice[number]} if dice else {}, seconds=1.0))
    return made


def test_curves_draw_the_numbers_of_the_rounds_in_the_arms_colours() -> None:
    figure = curves({"federated": history([3.0, 2.0, 1.0], dice=[0.1, 0.5, 0.75]), "local: a": history([3.0, 2.5]),
                     "local: b": history([3.0, 2.8])})
    loss, dice = figure.axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[3.0, 2.0, 1.0], [3.0, 2.5], [3.0, 2.8]]
    assert list(loss.lines[0].get_xdata()) == [1, 2, 3]
    assert [line.get_color() for line in loss.lines] == [ARMS["federated"], ARMS["local"], ARMS["local"]]
    assert list(dice.lines[0].get_ydata()) == [0.1, 0.5, 0.75]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["federated", "local (2 models)"]
    assert "federated ends at 0.75" in figure.alt
    assert len(curves({"federated": history([1.0])}).axes) == 1  # no panel without Dice
    seldom = curves({"federated": history([3.0] * 32, dice=[0.5 if k % 8 == 7 else np.nan for k in range(32)])})
    loss, dice = seldom.axes  # Dice of every eighth round lies below the same ticks as the loss
    assert loss.get_xlim() == dice.get_xlim() and list(loss.get_xticks()) == list(dice.get_xticks())
    with pytest.raises(ValueError, match="none of the histories"):
        curves({"federated": History(rounds=3)})


def test_unknown_arms_get_colours_of_their_own() -> None:
    colours = arm_colours(["federated", "fedprox", "scaffold", "local_own", "local_others"])
    assert colours["local_own"] == colours["local_others"] == ARMS["local"]
    assert len(set(colours.values())) == 4
    with pytest.raises(ValueError, match="told apart"):
        arm_colours([f"strategy {n}" for n in range(19)])
    assert arm_label("local_others") == "local on others' patients"


def test_heatmap_writes_every_number_and_frames_a_models_own_site() -> None:
    table = pd.DataFrame([[0.81, 0.79], [0.75, 0.5], [np.nan, 0.7]], index=["federated", "local: a", "local: b"],
                         columns=["a", "b"])
    figure = cross_site_heatmap(table)
    ax = figure.axes[0]
    assert [text.get_text() for text in ax.texts] == ["0.81", "0.79", "0.75", "0.50", "–", "0.70"]
    framed = [(round(patch.get_y() + 0.47), round(patch.get_x() + 0.47)) for patch in ax.patches]
    assert framed == [(1, 0), (2, 1)]
    many = cross_site_heatmap(pd.DataFrame(np.eye(17), index=[f"m{n}" for n in range(17)],
                                           columns=[f"institution {n}" for n in range(17)]))
    assert many.get_figwidth() <= 11
    with pytest.raises(ValueError, match="empty"):
        cross_site_heatmap(pd.DataFrame())


def scores() -> pd.DataFrame:
    rows = [("federated", "a", "p1", "WT", 0.8), ("federated", "a", "p2", "WT", 0.6),
            ("federated", "a", "p1", "ET", np.nan), ("federated", "a", "p2", "ET", 0.4),
            ("local_others", "a", "p1", "WT", 0.5), ("local_others", "a", "p1", "WT", 0.3),
            ("local_others", "b", "p1", "WT", 0.1)]  # another patient with the same id, at another site
    return pd.DataFrame(rows, columns=["arm", "site", "patient", "region", "dice"])


def test_bars_are_means_over_patients_and_dots_are_patients() -> None:
    figure = dice_by_arm(scores())
    ax = figure.axes[0]
    assert [text.get_text() for text in ax.texts] == ["0.70", "0.25", "0.40"]
    assert [len(dots.get_offsets()) for dots in ax.collections] == [2, 2, 1]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["whole tumour (WT)", "enhancing tumour (ET)"]
    with pytest.raises(ValueError, match=r"lack the columns \['arm'\]"):
        dice_by_arm(scores().drop(columns="arm"))
    with pytest.raises(ValueError, match="no row"):
        dice_by_arm(scores().assign(dice=np.nan))


def test_sites_figure_counts_patients_and_millilitres() -> None:
    figure = sites_figure([Site(name="Bern", train=[patient(), patient("q")], val=[patient("r")]),
                           Site(name="Basel", train=[patient("s", labelled=False)])])
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == ["2 + 1", "1 + 0"]
    volumes = {dots.get_label(): dots.get_offsets()[:, 0].tolist() for dots in right.collections}
    assert volumes["core"] == pytest.approx([27 * 8 / 1000] * 3)  # a 3-voxel cube at 2 mm, three labelled patients
    assert volumes["enhancing"] == pytest.approx([(125 - 27) * 8 / 1000] * 3)
    with pytest.raises(ValueError, match="no site"):
        sites_figure([])


def test_figures_show_themselves_in_notebooks_and_leave_nothing_behind() -> None:
    before = dict(mpl.rcParams)
    figure = curves({"federated": history([2.0, 1.0])})
    data, size = figure._repr_png_()
    assert data.startswith(b"\x89PNG")
    assert size == {"width": 960, "height": 374}
    assert isinstance(figure, Picture)
    assert dict(mpl.rcParams) == before
    code = ("import sys, fedlab.view.slices, fedlab.view.run_figures, fedlab.view.report_page; "
            "sys.exit(bool({'matplotlib.pyplot', 'monai'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_modules_load_matplotlib_and_jupyter_only_inside_functions() -> None:
    """Except the two whose classes derive from those of matplotlib and ipywidgets, which no other module loads."""
    names = sorted({module.name for module in pkgutil.iter_modules(fedlab.view.__path__)} - {"picture", "niivue"})
    code = (f"import sys, importlib; [importlib.import_module(f'fedlab.view.{{name}}') for name in {names!r}]; "
            "print({'matplotlib', 'pandas', 'IPython', 'ipywidgets', 'ipyniivue', 'jinja2'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert len(names) > 15 and done.stdout == "set()\n"


def test_same_input_same_picture() -> None:
    one, two = (pixels(compare([patient()], {"federated": [patient().label]})) for _ in range(2))
    assert np.array_equal(one, two)


def test_history_shows_its_curves_without_a_drawing_library() -> None:
    shown = history([2.0, 1.0], dice=[0.25, 0.5])._repr_html_()
    assert shown.count("<svg") == 2
    assert "Dice 0.500" in shown
    assert "M46.0 166.0L330.0 35.8" in shown  # Dice rises from the lower left to the upper right
    assert "&lt;History: no round of 3 finished&gt;" in History(rounds=3)._repr_html_()
