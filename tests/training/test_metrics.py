import math
import time
from dataclasses import replace
from operator import methodcaller

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings

import irregular
from cohorts import oblique
from fedlab.core.regions import labels_to_regions
from fedlab.core.types import REGIONS, Patient, Site
from fedlab.training import metrics
from fedlab.training.metrics import (
    COLUMNS,
    WORST_HD95_MM,
    _block,
    _dice_curves,
    evaluate,
    predict,
    score,
    score_rows,
    summary,
    threshold_dice,
)
from fedlab.training.networks import segresnet

TC, WT, ET = (REGIONS.index(name) for name in ("TC", "WT", "ET"))


def regions(shape=(24, 24, 24), **boxes):
    out = torch.zeros(3, *shape, dtype=torch.bool)
    for name, box in boxes.items():
        out[REGIONS.index(name)][box] = True
    return out


def patient(seed=0, shape=(20, 24, 17), name="P", labelled=True, spacing=2.0):
    """FLAIR is above 1 in the whole tumour, T1 in the core, T1c in the enhancing part, and nowhere else."""
    rng = torch.Generator().manual_seed(seed)
    label = torch.zeros(shape, dtype=torch.uint8)
    label[4:14, 5:15, 4:14], label[6:12, 7:13, 6:12], label[8:10, 9:11, 8:10] = 2, 4, 1
    tc, wt, et = labels_to_regions(label)
    image = 0.1 + 0.8 * torch.rand(4, *shape, generator=rng)
    for channel, region in enumerate((wt, tc, et)):
        image[channel] += region
    return Patient(id=name, image=image.half(), label=label if labelled else None, affine=np.diag([spacing] * 3 + [1]))


class Reader(torch.nn.Module):
    """Knows the rule of `patient`: a perfect, voxel-wise model."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(20.0))
        self.shift = shift
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return self.slope * (x[:, [1, 0, 2]] - 1 - self.shift)


# --- Dice, HD95, volumes

def test_dice_and_volumes_by_hand():
    reference = regions(WT=np.s_[2:6, 2:6, 2:6], TC=np.s_[2:4, 2:4, 2:4], ET=np.s_[2, 2, 2])
    guess = regions(WT=np.s_[4:8, 2:6, 2:6], TC=np.s_[2:4, 2:4, 2:3], ET=np.s_[3, 2, 2])
    got = score(guess, reference, spacing_mm=(1.0, 2.0, 3.0))
    assert got["WT"].dice == pytest.approx(0.5)  # 32 of 64 and 64 voxels
    assert got["TC"].dice == pytest.approx(2 * 4 / (8 + 4))
    assert got["ET"].dice == 0
    assert got["WT"].reference_ml == pytest.approx(64 * 6 / 1000)
    assert got["TC"].predicted_ml == pytest.approx(4 * 6 / 1000)
    assert score(reference.float(), reference, spacing_mm=(1, 1, 1))["WT"][:2] == (1.0, 0.0)


@pytest.mark.parametrize(("step", "spacing", "expected"),
                         [((3, 0, 0), (2.0, 1.0, 1.0), 6.0), ((0, 0, 3), (2.0, 1.0, 1.5), 4.5),
                          ((3, 4, 0), (1.0, 1.0, 9.0), 5.0)])
def test_hd95_is_in_mm_along_each_axis(step, spacing, expected):
    reference = regions(WT=np.s_[5, 5, 5])
    guess = regions(WT=tuple(5 + s for s in step))
    assert score(guess, reference, spacing_mm=spacing)["WT"].hd95_mm == pytest.approx(expected)


def test_hd95_takes_the_95th_percentile_by_hand():
    reference = regions(WT=np.s_[2:22, 2, 2])  # twenty voxels in a row, every one of them surface
    guess = reference.clone()
    guess[WT, 10, 12, 2] = True
    assert score(guess, reference, spacing_mm=(1, 1, 1))["WT"].hd95_mm == pytest.approx(0.0)  # rank 19.0 of 0..20
    guess[WT, 14, 11, 2] = True  # distances 20 x 0, 9, 10: rank 19.95 lies between 0 and 9
    assert score(guess, reference, spacing_mm=(1, 1, 1))["WT"].hd95_mm == pytest.approx(8.55, abs=1e-4)
    swapped = score(reference, guess, spacing_mm=(1, 1, 1))["WT"].hd95_mm
    assert swapped == pytest.approx(8.55, abs=1e-4)  # the larger of both directions


def test_hd95_agrees_with_all_pairs_of_surface_voxels():
    from scipy.ndimage import binary_erosion
    from scipy.spatial.distance import cdist

    rng = np.random.default_rng(1)
    one, other = (np.zeros((24, 24, 24), bool) for _ in range(2))
    one[4:15, 5:14, 6:20] = True
    other[6:18, 4:12, 5:17] = True
    other &= rng.random(other.shape) > 0.2
    spacing = np.array([1.0, 1.5, 3.0])
    edges = [np.argwhere(m & ~binary_erosion(m)) * spacing for m in (one, other)]
    pairs = cdist(*edges)
    expected = max(np.percentile(pairs.min(1), 95), np.percentile(pairs.min(0), 95))
    masks = [regions(WT=np.s_[0:0, 0, 0]) for _ in range(2)]
    for mask, array in zip(masks, (one, other), strict=True):
        mask[WT] = torch.from_numpy(array)
    assert score(masks[1], masks[0], spacing_mm=tuple(spacing))["WT"].hd95_mm == pytest.approx(expected, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(irregular.masks(), irregular.spacings())
def test_scores_of_irregular_masks_are_the_naive_ones(pair, spacing):
    """Dice and volumes by counting, HD95 by all pairs of surface voxels, on odd grids of unequal voxels."""
    edges = []
    for mask in pair:
        voxels = {tuple(v) for v in mask.nonzero().tolist()}
        inside = {v for v in voxels if all((*v[:k], v[k] + step, *v[k + 1:]) in voxels for k in range(3)
                                           for step in (-1, 1))}
        edges.append(np.array(sorted(voxels - inside), float).reshape(-1, 3) * spacing)
    guess, reference = (torch.stack([mask] * 3) for mask in pair)
    common, counts = int((pair[0] & pair[1]).sum()), [int(mask.sum()) for mask in pair]
    for name, got in score(guess, reference, spacing_mm=spacing).items():
        assert got.predicted_ml == pytest.approx(counts[0] * math.prod(spacing) / 1000), name
        assert got.reference_ml == pytest.approx(counts[1] * math.prod(spacing) / 1000)
        if not all(counts):
            assert got[:2] == ((0.0, WORST_HD95_MM) if any(counts) else (1.0, 0.0))
            continue
        away = np.linalg.norm(edges[0][:, None] - edges[1][None], axis=-1)
        hd95 = max(np.percentile(away.min(1), 95), np.percentile(away.min(0), 95))
        assert got.dice == pytest.approx(2 * common / sum(counts)) and got.hd95_mm == pytest.approx(hd95, rel=1e-5,
                                                                                                   abs=1e-6)


def test_labels_are_taken_as_regions():
    label = patient().label
    assert score(labels_to_regions(label), label, spacing_mm=(1, 1, 1))["ET"].dice == 1
    assert score(labels_to_regions(label), label, spacing_mm=(1, 1, 1))["TC"].reference_ml == pytest.approx(0.216)


def test_empty_regions_follow_brats():
    full = regions(WT=np.s_[1:5, 1:5, 1:5], TC=np.s_[1:3, 1:3, 1:3])
    guess = regions(WT=np.s_[1:5, 1:5, 1:5], ET=np.s_[1, 1, 1])
    got = score(guess, full, spacing_mm=(1, 1, 1))
    assert WORST_HD95_MM == pytest.approx(373.1287, abs=1e-4)
    assert got["TC"][:2] == (0.0, WORST_HD95_MM) and got["TC"].predicted_ml == 0  # missed
    assert got["ET"][:2] == (0.0, WORST_HD95_MM) and got["ET"].reference_ml == 0  # false alarm
    guess[ET] = False
    assert score(guess, full, spacing_mm=(1, 1, 1))["ET"][:2] == (1.0, 0.0)  # rightly nothing


@pytest.mark.parametrize(("guess", "reference", "spacing", "message"), [
    (torch.zeros(3, 4, 4, 4), torch.zeros(3, 4, 4, 5), (1, 1, 1), "on the same grid"),
    (torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4), (1, 1, 1), r"shape \(3, X, Y, Z\)"),
    (torch.full((3, 4, 4, 4), 0.3), torch.zeros(4, 4, 4), (1, 1, 1), "threshold probabilities first"),
    (torch.zeros(3, 4, 4, 4), torch.zeros(4, 4, 4), (1, 1), "three positive numbers"),
    (torch.zeros(3, 4, 4, 4), torch.zeros(4, 4, 4), (1, 1, 0), "three positive numbers"),
])
def test_score_refuses(guess, reference, spacing, message):
    with pytest.raises(ValueError, match=message):
        score(guess, reference, spacing_mm=spacing)


# --- summaries

def table():
    rows = [("a", "p1", 0.8, 4.0, 10.0, 9.0), ("a", "p2", 0.6, 8.0, 5.0, 5.0),
            ("b", "p1", 0.0, WORST_HD95_MM, 0.0, 1.0), ("b", "p4", 1.0, 0.0, 0.0, 0.0)]
    full = [(s, p, region, *(v if region == "ET" else (0.9, 2.0, 10.0, 10.0)))
            for s, p, *v in rows for region in REGIONS]
    return pd.DataFrame(full, columns=list(COLUMNS))


def test_summary_by_the_brats_rule_by_hand():
    got = summary(table())
    assert list(got.index) == ["WT", "TC", "ET", "mean"]
    assert got.loc["ET", "dice"] == pytest.approx((0.8 + 0.6 + 0 + 1) / 4)
    assert got.loc["ET", "hd95_mm"] == pytest.approx((4 + 8 + WORST_HD95_MM + 0) / 4)
    assert got.loc["mean", "dice"] == pytest.approx((0.9 + 0.9 + 0.6) / 3)
    assert got.loc["ET", ["patients", "without_region", "false_alarms"]].tolist() == [4, 2, 1]
    assert got.loc["mean", "patients"] == 4  # p1 of site a and p1 of site b are two patients
    assert "373.13 mm" in got.attrs["rule"] and "WT 0, TC 0, ET 2" in got.attrs["rule"]


def test_summary_that_skips_and_counts_false_alarms():
    got = summary(table(), empty="skip")
    assert got.loc["ET", "dice"] == pytest.approx(0.7) and got.loc["ET", "hd95_mm"] == pytest.approx(6.0)
    assert got.loc["ET", ["patients", "without_region", "false_alarms"]].tolist() == [2, 2, 1]
    assert "in 1 of these cases" in got.attrs["rule"]
    nowhere = table()
    nowhere.loc[nowhere["region"] == "ET", "reference_ml"] = 0.0
    got = summary(nowhere, empty="skip")
    assert np.isnan(got.loc["ET", "dice"]) and np.isnan(got.loc["mean", "dice"])  # not silently a mean of two


def test_summary_leaves_the_unlabelled_out_and_refuses_nonsense():
    extra = pd.DataFrame(score_rows(regions(), None, spacing_mm=(1, 1, 1), site="c", patient="p9"))
    assert list(extra.columns) == list(COLUMNS) and extra["dice"].isna().all() and (extra["predicted_ml"] == 0).all()
    both = pd.concat([table(), extra])
    pd.testing.assert_frame_equal(summary(both), summary(table()))
    with pytest.raises(ValueError, match="no patient in the table has a reference"):
        summary(extra)
    with pytest.raises(ValueError, match="'brats', 'skip', got 'none'"):
        summary(table(), empty="none")
    with pytest.raises(ValueError, match="missing: hd95_mm"):
        summary(table().drop(columns="hd95_mm"))


# --- predictions

def test_predict_sees_a_small_volume_at_once_and_a_large_one_by_windows():
    model, case = Reader(), patient()
    whole = predict(model, case)
    assert model.seen == [(1, 4, 32, 32, 32)] and whole.shape == (3, 20, 24, 17) and whole.dtype == torch.float32
    torch.testing.assert_close(whole, model(case.image[None].float())[0].sigmoid().detach(), atol=1e-5, rtol=1e-5)
    model.seen.clear()
    parts = predict(model, case, window=(16, 16, 16))
    assert len(model.seen) > 4 and set(model.seen) == {(1, 4, 16, 16, 16)}
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_windows_overlap_by_the_share_that_is_asked_for():
    """Along 40 voxels, windows of 16: 3 side by side, 4 that overlap by half, 7 by three quarters."""
    for overlap, windows in ((0.0, 3), (0.5, 4), (0.75, 7)):
        model = Reader()
        predict(model, patient(shape=(40, 16, 16)), window=(16, 16, 16), overlap=overlap)
        assert len(model.seen) == windows


def test_a_network_says_how_large_its_windows_are():
    model, case, seen = segresnet(window=16), patient(shape=(40, 24, 17)), []
    model.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[2:])))
    found = predict(model, case)
    assert set(seen) == {(16, 16, 16)} and found.shape == (3, 40, 24, 17)
    torch.testing.assert_close(found, predict(segresnet(), case, window=(16, 16, 16)))
    seen.clear()
    predict(model, case, window=(64, 64, 64))
    assert seen == [(48, 32, 32)]
    assert len(evaluate(model, [case])) == 3 and seen[-1] == (16, 16, 16)


def test_in_windows_only_the_brain_is_predicted():
    whole, within = patient(shape=(40, 24, 17)), (slice(3, 33), slice(2, 22), slice(0, 15))
    image = torch.zeros_like(whole.image)
    image[:, *within] = whole.image[:, *within]
    model = Reader()
    found = predict(model, replace(whole, image=image), window=(16, 16, 16))
    part = predict(model, replace(whole, image=whole.image[:, *within], label=whole.label[within]), window=(16, 16, 16))
    torch.testing.assert_close(found[:, *within], part)
    assert float(part.min()) > 0 and int((found == 0).sum()) == found.numel() - part.numel()
    nothing = replace(whole, image=torch.zeros_like(whole.image))
    assert predict(model, nothing, window=(16, 16, 16)).shape == (3, 40, 24, 17)
    at_once = predict(model, replace(whole, image=image))
    assert float(at_once.min()) > 0  # of a volume that fits into the window nothing is left out
    assert torch.equal(predict(model, replace(whole, image=image), window=(40, 24, 17)) > 0, at_once > 0)


def test_a_probability_of_just_the_threshold_is_the_region():
    undecided = torch.nn.Conv3d(4, 3, 1)
    torch.nn.init.zeros_(undecided.weight)
    torch.nn.init.zeros_(undecided.bias)  # 0.5 everywhere
    found = evaluate(undecided, [patient()]).set_index("region")
    assert found.loc["WT", "predicted_ml"] == pytest.approx(20 * 24 * 17 * 8 / 1000)


def test_predict_leaves_the_model_as_it_was_and_gives_a_plain_tensor():
    model = torch.nn.Sequential(Reader(), torch.nn.Dropout(0.9), torch.nn.Dropout(0.9)).train()
    model[2].eval()
    first, second = predict(model, patient()), predict(model, patient())
    assert torch.equal(first, second)  # no dropout while predicting
    assert [part.training for part in model.modules()] == [True, True, True, False]
    assert not first.is_inference() and not first.requires_grad
    with pytest.raises(ValueError, match="RuntimeError: stop"):
        predict(torch.nn.Sequential(*model, Stop()), patient())
    assert [part.training for part in model.modules()] == [True, True, True, False]


class Stop(torch.nn.Module):
    def forward(self, x):
        raise RuntimeError("stop")


class WithSettings(torch.nn.Conv3d):
    """A user's network with a name that fedlab's have too."""

    @property
    def settings(self):
        return {"filters": "32"}


@pytest.mark.parametrize(("network", "precision", "last"), [
    (lambda: segresnet(filters=8), "fp32", True), (lambda: segresnet(filters=16), "bf16", True),
    (lambda: segresnet(filters=8), "bf16", False),
    (lambda: WithSettings(4, 3, 3, padding=1), "fp32", False)])  # may have a view() that takes no such input
def test_channels_last_where_it_is_faster_with_the_same_numbers(network, precision, last):
    network = network()
    image, formats = torch.randn(4, 32, 32, 16, generator=torch.Generator().manual_seed(0)), []
    with torch.no_grad():
        expected = network.eval()(image[None])[0].sigmoid()
    lies_last = methodcaller("is_contiguous", memory_format=torch.channels_last_3d)
    network.register_forward_pre_hook(lambda _, x: formats.append(lies_last(x[0])))
    found = predict(network, Patient("p", image, None, np.eye(4)), precision=precision)
    assert formats == [last]
    torch.testing.assert_close(found, expected, atol=1e-5 if precision == "fp32" else 0.05, rtol=0)
    paired = predict(network, Patient("p", image, None, np.eye(4)), precision=precision, mirror=True)
    assert formats == [last, last] and not torch.equal(paired, found)


def test_predict_in_bfloat16_is_close():
    torch.manual_seed(0)
    model = torch.nn.Conv3d(4, 3, 3, padding=1)
    full, half = predict(model, patient(), precision="fp32"), predict(model, patient(), precision="bf16")
    assert half.dtype == torch.float32 and 0 < (full - half).abs().max() < 0.02


def test_a_mirrored_prediction_is_the_mean_over_both_sides():
    both, case = OneSided(), patient(shape=(32, 24, 17))
    image = case.image[None].float()
    expected = (both(image).sigmoid() + both(image.flip(2)).sigmoid().flip(2))[0].detach() / 2
    both.seen.clear()
    got = predict(both, case, mirror=True, precision="fp32")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert both.seen == [(2, 4, 32, 32, 32)]  # a pair in one batch
    assert not torch.allclose(got, predict(both, case, precision="fp32"), atol=0.05)


class OneSided(Reader):
    """Sees less the further left: unlike itself in a mirror."""

    def forward(self, x):
        return super().forward(x) - torch.linspace(0, 3, x.shape[2]).view(-1, 1, 1)


def test_windows_are_mirrored_each_and_evaluate_does_the_same():
    model, case = Reader(), patient()
    torch.testing.assert_close(predict(model, case, window=(16, 16, 16), mirror=True), predict(model, case),
                               atol=1e-5, rtol=1e-5)
    assert {shape[0] for shape in model.seen[:-1]} == {2}
    lopsided = OneSided()
    evaluate(lopsided, [case], mirror=True)
    assert [shape[0] for shape in lopsided.seen] == [2]


@pytest.mark.parametrize(("model", "message"), [
    (torch.nn.Conv3d(4, 2, 1), r"logits of shape \(1, 3, 32, 32, 32\), "
     r"one channel for each of TC, WT, ET; the model returned \(1, 2"),
    (torch.nn.Conv3d(4, 3, 2), r"the model returned \(1, 3, 31, 31, 31\)"),
    (Reader(shift=float("nan")), "has NaN or infinite values; check whether its training diverged"),
])
def test_predict_refuses(model, message):
    with pytest.raises(ValueError, match=message):
        predict(model, patient())


def test_evaluate_measures_along_each_axis_of_an_oblique_scan():
    """Voxels of 1 x 2 x 5 mm, a label one voxel away from what the network finds: HD95 is the size of a voxel."""
    for axis, size in enumerate((1.0, 2.0, 5.0)):
        one = patient()
        moved = Patient(id="P", image=one.image, label=one.label.roll(1, dims=axis), affine=oblique((1.0, 2.0, 5.0)))
        found = evaluate(Reader(), [moved]).set_index("region")
        assert found.loc["WT", "hd95_mm"] == pytest.approx(size)
        assert found.loc["WT", "reference_ml"] == pytest.approx(1000 * 10 / 1000)


def test_evaluate_gives_a_tidy_table():
    sites = [Site("a", [patient(9)], [patient(0, name="p0"), patient(1, name="p1")]), Site("b", [patient(8)], ()),
             Site("c", (), [patient(2, name="p0", labelled=False)])]
    got = evaluate(Reader(), sites)
    assert list(got.columns) == list(COLUMNS)
    assert got[["site", "patient"]].drop_duplicates().values.tolist() == [["a", "p0"], ["a", "p1"], ["c", "p0"]]
    assert (got[got["site"] == "a"]["dice"] == 1).all() and (got[got["site"] == "a"]["hd95_mm"] == 0).all()
    unlabelled = got[got["site"] == "c"]
    assert unlabelled[["dice", "hd95_mm", "reference_ml"]].isna().all(axis=None)
    assert unlabelled.set_index("region").loc["WT", "predicted_ml"] == pytest.approx(1000 * 8 / 1000)
    plain = evaluate(Reader(), [patient(0, name="p0")])
    assert plain["site"].tolist() == [""] * 3 and plain["dice"].tolist() == [1, 1, 1]
    assert evaluate(Reader(), [patient()], threshold=1.1)["dice"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="no patient to evaluate on"):
        evaluate(Reader(), [sites[1]])


# --- thresholding

def noisy(seed, offset):
    """WT brighter in FLAIR by two standard deviations; the level differs between patients."""
    rng = torch.Generator().manual_seed(seed)
    image = torch.randn(4, 16, 16, 16, generator=rng)
    label = torch.zeros(16, 16, 16, dtype=torch.uint8)
    label[4:10, 4:10, 4:10] = 2
    image[0] += 2 * (label > 0) + offset
    image[:, :2] = 0  # outside the brain
    return Patient(id=str(seed), image=image.half(), label=label, affine=np.eye(4))


def naive(cases, modality, above, cut):
    out = []
    for case in cases:
        brain, truth = (case.image != 0).any(0), case.label > 0
        value = case.image[modality].float()
        guess = brain & (value >= cut if above else value < cut)
        out.append(float(2 * (guess & truth).sum() / (guess.sum() + truth.sum())))
    return out


def test_threshold_dice_is_the_best_of_all_thresholds():
    cases = [noisy(0, 0.0), noisy(1, 1.5), noisy(2, -1.0)]
    got = threshold_dice(cases, bins=120)
    assert (got.modality, got.above) == ("FLAIR", True)
    assert got.dice == pytest.approx(np.mean(naive(cases, 0, True, got.threshold)))
    cuts = np.linspace(-4, 8, 121)
    every = np.array([[[naive(cases, m, above, cut) for cut in cuts] for above in (True, False)] for m in range(4)])
    assert got.dice == pytest.approx(every.mean(-1).max())
    assert got.oracle_dice == pytest.approx(every.max(2).mean(-1).max()) and got.oracle_dice > got.dice + 0.05
    assert got.oracle_modality == "FLAIR"


def test_threshold_dice_finds_dark_tumours_and_values_beyond_the_range():
    case = noisy(3, 0.0)
    image = case.image.clone()
    image[2] = 50.0
    image[2][case.label > 0] = -50.0
    got = threshold_dice([Patient(id="dark", image=image, label=case.label, affine=case.affine)])
    assert (got.modality, got.above, got.dice, got.oracle_dice) == ("T1c", False, 1.0, 1.0)
    healthy = Patient(id="none", image=case.image, label=torch.zeros_like(case.label), affine=case.affine)
    assert threshold_dice([healthy]).dice == 1.0  # nothing marked, nothing there


def test_the_oracle_of_threshold_dice_keeps_one_direction_for_all_patients():
    """A bright and a dark tumour of 8 of 64 voxels: the wrong way round all voxels are taken, 2 · 8 / (64 + 8)."""
    label = torch.zeros(4, 4, 4, dtype=torch.uint8)
    label[:2, :2, :2] = 1
    cases = []
    for name, value in (("bright", 3.0), ("dark", -1.0)):
        image = torch.ones(4, 4, 4, 4)
        image[3][label > 0] = value
        cases.append(Patient(id=name, image=image.half(), label=label, affine=np.eye(4)))
    got = threshold_dice(cases)
    assert (got.dice, got.oracle_dice) == pytest.approx((0.5, (1 + 2 / 9) / 2))


def test_threshold_dice_is_fast():
    cases = [Patient(id=str(i), image=torch.randn(4, 64, 64, 64).half(), affine=np.eye(4),
                     label=torch.zeros(64, 64, 64, dtype=torch.uint8)) for i in range(6)]
    start = time.process_time()
    threshold_dice(cases)
    assert time.process_time() - start < 4  # 24 patients take about 1.5 s of an idle core


def test_threshold_dice_refuses():
    with pytest.raises(ValueError, match="got 0 patients"):
        threshold_dice([])
    with pytest.raises(ValueError, match="low < high"):
        threshold_dice([noisy(0, 0)], low=2, high=1)
    with pytest.raises(ValueError, match="P has no label"):
        threshold_dice([patient(labelled=False)])


# --- settings on their way, and what a network takes

@pytest.mark.parametrize("spacing", [(1, 1, math.inf), (math.nan, 1, 1), (1, -0.5, 1), (1, 1, 1, 1), ()])
def test_a_spacing_is_three_positive_numbers(spacing):
    with pytest.raises(ValueError, match="three positive numbers"):
        score(regions(), regions(), spacing_mm=spacing)


def test_masks_of_zeros_and_ones_of_any_type_are_masks_and_others_are_named():
    one, other = regions(WT=np.s_[2:5, 3, 3]), regions(WT=np.s_[3:7, 3, 3])
    for kind in (torch.uint8, torch.int64, torch.float16, torch.bool):
        got = score(one.to(kind), other.to(kind), spacing_mm=(0.5, 1, 2))["WT"]
        assert (got.dice, got.predicted_ml, got.reference_ml) == pytest.approx((4 / 7, 0.003, 0.004))
    for value in (2, -1, 0.5):
        wrong = one.float() * value
        with pytest.raises(ValueError, match="the prediction holds values besides 0 and 1"):
            score(wrong, other, spacing_mm=(1, 1, 1))
        with pytest.raises(ValueError, match="the reference holds values besides 0 and 1"):
            score(one, wrong, spacing_mm=(1, 1, 1))


def test_rows_carry_their_names_and_without_a_reference_volumes_only():
    guess = regions(WT=np.s_[1:4, 1, 1], TC=np.s_[1, 1, 1])
    rows = score_rows(guess, None, spacing_mm=(1, 2, 3), site="Bern", patient="P7")
    names = [(row["site"], row["patient"], row["region"]) for row in rows]
    assert names == [("Bern", "P7", "WT"), ("Bern", "P7", "TC"), ("Bern", "P7", "ET")]
    assert [row["predicted_ml"] for row in rows] == pytest.approx([0.018, 0.006, 0.0])
    assert all(math.isnan(row[name]) for row in rows for name in ("dice", "hd95_mm", "reference_ml"))
    known = score_rows(guess, regions(WT=np.s_[1:3, 1, 1]), spacing_mm=(1, 2, 3), site="", patient="")
    assert [row["reference_ml"] for row in known] == pytest.approx([0.012, 0.0, 0.0])
    assert [row["dice"] for row in known] == pytest.approx([0.8, 0.0, 1.0])


def test_the_rule_of_a_summary_counts_what_lacks_the_region():
    assert summary(table(), empty="skip").attrs["rule"] == (
        "Patients whose reference lacks a region do not count for it (WT 0, TC 0, ET 2); in 1 of these cases the "
        "prediction has it.")
    assert summary(table()).attrs["rule"].endswith("lacks the region: WT 0, TC 0, ET 2; false alarms among them: 1.")


@pytest.mark.parametrize(("grid", "window", "multiple", "expected"), [
    ((20, 24, 17), (64, 64, 64), 16, [32, 32, 32]), ((16, 33, 64), (64, 64, 64), 16, [16, 48, 64]),
    ((200, 20, 50), (40, 64, 24), 16, [40, 32, 24]), ((200, 20, 50), (40, 100, 24), 32, [32, 32, 32]),
    ((200, 97, 33), (70, 100, 64), 32, [64, 96, 64]), ((65, 64, 1), (200, 64, 64), 64, [128, 64, 64]),
    ((20, 24, 17), (48, 40, 56), None, [48, 40, 56])])
def test_the_input_of_a_network_is_the_volume_padded_within_the_window(grid, window, multiple, expected):
    assert _block(grid, window, multiple) == expected


class Picky(Reader):
    """Takes sides that are multiples of a number only."""

    def __init__(self, multiple, error=RuntimeError):
        super().__init__()
        self.multiple, self.error, self.tried = multiple, error, []

    def forward(self, x):
        self.tried.append(tuple(x.shape[2:]))
        if any(side % self.multiple for side in x.shape[2:]):
            raise self.error(f"attempt {len(self.tried)}")
        return super().forward(x)


def test_the_multiple_that_a_network_takes_is_tried_once_and_kept():
    model, case = Picky(64), patient(shape=(20, 40, 17))
    found = predict(model, case, window=(64, 64, 64))
    assert model.tried == [(32, 48, 32), (32, 64, 32), (64, 64, 64)]
    torch.testing.assert_close(found, predict(Reader(), case), atol=1e-6, rtol=1e-5)
    predict(model, case, window=(64, 64, 64))
    assert model.tried[3:] == [(64, 64, 64)]
    whole = Picky(40)
    predict(whole, case, window=(40, 40, 40))
    assert whole.tried[-1] == (40, 40, 40) and predict(whole, case, window=(80, 40, 40)).shape == (3, 20, 40, 17)
    assert whole.tried[-1] == (80, 40, 40)


def test_of_a_network_that_takes_nothing_the_first_error_is_told():
    model = Picky(7)
    with pytest.raises(ValueError, match=r"48x64x40 voxels or less \(RuntimeError: attempt 1\); pass window="):
        predict(model, patient(shape=(20, 24, 17)), window=(48, 64, 40))
    assert len(model.tried) == 5 and model.tried[-1] == (48, 64, 40)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ImportError])
def test_errors_that_no_size_explains_are_raised_as_they_are(error):
    model = Picky(7, error)
    with pytest.raises(error, match="attempt 1"):
        predict(model, patient(shape=(20, 24, 17)))
    assert len(model.tried) == (1 if error is torch.OutOfMemoryError else 5)


class Several(Reader):
    """Gives a coarse output, one of full resolution, and another."""

    def __init__(self, pack):
        super().__init__()
        self.pack = pack

    def forward(self, x):
        full = super().forward(x)
        return self.pack(full)


def test_of_several_outputs_the_first_of_full_resolution_counts():
    case = patient(shape=(16, 16, 16))
    expected = predict(Reader(), case)
    for pack in (lambda full: [full[..., ::2, ::2, ::2], full, -full], lambda full: ("text", full),
                 lambda full: torch.stack([full, -full], dim=1)):
        torch.testing.assert_close(predict(Several(pack), case), expected)
    with pytest.raises(ValueError, match=r"the model returned \(1, 3, 8, 8, 8\) and dict\); pass window="):
        predict(Several(lambda full: [full[..., ::2, ::2, ::2], {}]), case)


def test_a_network_says_itself_whether_it_is_mirrored_and_has_no_parameters_to_have():
    class Without(torch.nn.Module):
        def __init__(self, said):
            super().__init__()
            self.settings, self.seen = said, []

        def forward(self, x):
            self.seen.append(x.shape[0])
            return x[:, :3] - torch.linspace(0, 1, x.shape[2]).view(-1, 1, 1)

    for said, batch in (({"mirror": True}, 2), ({"mirror": False}, 1), ({"mirror": 1}, 1), ({}, 1), ("mirror", 1)):
        model = Without(said)
        predict(model, patient(shape=(16, 16, 16)))
        assert model.seen == [batch]
        predict(model, patient(shape=(16, 16, 16)), mirror=batch == 1, device="cpu")
        assert model.seen[1] == 3 - batch


def test_a_volume_beyond_64_voxels_is_predicted_in_windows_that_overlap_by_half():
    model = Reader()
    predict(model, patient(shape=(120, 16, 16)))
    assert model.seen == [(1, 4, 64, 16, 16)] * 3  # from 0, 32 and 56


@pytest.mark.parametrize("given", [{}, {"window": (16, 24, 32), "overlap": 0.5, "mirror": True, "precision": "bf16",
                                        "device": "cpu", "threshold": 0.25}])
def test_evaluate_hands_its_settings_on(given, monkeypatch, capsys):
    seen = []

    def fake(model, case, **given):
        seen.append((model, case.id, given))
        return torch.full((3, 20, 24, 17), 0.375)

    monkeypatch.setattr(metrics, "predict", fake)
    found = evaluate("model", [patient(name="P3")], **given)
    usual = {"window": None, "overlap": 0.25, "mirror": None, "precision": "auto", "device": None}
    assert seen == [("model", "P3", {name: given.get(name, value) for name, value in usual.items()})]
    assert (found["predicted_ml"] > 0).all() == ("threshold" in given) and found["patient"].tolist() == ["P3"] * 3
    assert capsys.readouterr().err == ""
    evaluate("model", [patient(name="P3")], progress=True)
    assert "evaluating: 100%" in (shown := capsys.readouterr().err) and "patient" in shown


def test_the_curves_of_all_thresholds_are_the_naive_ones():
    """Seven bins of 4/7, values on and beyond their edges, a tumour that reaches out of the brain."""
    rng = torch.Generator().manual_seed(3)
    image = torch.randn(4, 9, 7, 5, generator=rng) * 2
    image[0, 0] = -1.5  # the lowest threshold itself
    image[1, 1] = 2.5  # and the highest
    image[:, :, 6] = 0  # outside of the brain
    label = torch.zeros(9, 7, 5, dtype=torch.uint8)
    label[2:6, 4:, 1:4] = 2
    case = Patient(id="P", image=image, label=label, affine=np.eye(4))
    found, cuts = _dice_curves(case, -1.5, 2.5, 7), [-1.5 + 4 * k / 7 for k in range(8)]
    expected = [[[naive([case], m, above, cut)[0] for cut in cuts] for above in (True, False)] for m in range(4)]
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-6)


def test_a_threshold_is_given_in_standard_deviations_at_either_end_too():
    label = torch.zeros(5, 4, 3, dtype=torch.uint8)
    label[:2] = 4
    for inside, outside, low, high, bins, above, threshold in (
            (1.5, 0.5, -1.0, 2.0, 3, True, 1.0), (-2.5, 1.0, -2.0, 1.0, 1, False, -2.0),
            (0.25, 0.75, 0.0, 1.0, 4, False, 0.5), (3.5, 1.0, 2.0, 3.0, 2, True, 2.0)):
        image = torch.full((4, 5, 4, 3), outside)
        image[2][label > 0] = inside
        got = threshold_dice([Patient(id="P", image=image, label=label, affine=np.eye(4))], low=low, high=high,
                             bins=bins)
        assert (got.modality, got.oracle_modality, got.above, got.threshold) == ("T1c", "T1c", above, threshold)
        assert got.dice == got.oracle_dice == 1.0
    for wrong in ({"low": 1.0, "high": 1.0}, {"bins": 0}):
        with pytest.raises(ValueError, match="expected patients and low < high"):
            threshold_dice([noisy(0, 0)], **wrong)
