"""Quality of a segmentation: Dice and HD95 per region and patient, and a baseline of thresholding.

Empty regions count as in the BraTS and FeTS evaluations (Baid et al. 2021, arXiv:2107.02314; Pati et al. 2022):
reference and prediction both empty give Dice 1 and HD95 0; only one of them empty gives Dice 0 and HD95
373.13 mm, the diagonal of the BraTS grid of 240 x 240 x 155 mm. `summary(empty="skip")` leaves patients whose
reference lacks a region out of that region's mean instead, and counts the false alarms among them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np
import torch

from fedlab.core.hardware import calling, precision_for
from fedlab.core.regions import REGION_ORDER, labels_to_regions
from fedlab.core.settings import check_choice
from fedlab.core.types import MODALITIES, REGIONS, Patient, Site

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["COLUMNS", "WORST_HD95_MM", "RegionScore", "Thresholding", "evaluate", "predict", "score", "score_rows",
           "summary", "threshold_dice"]

#: HD95 where only one of reference and prediction is empty: the diagonal of the BraTS grid in mm.
WORST_HD95_MM = math.sqrt(240**2 + 240**2 + 155**2)
#: Columns of the table that `evaluate` returns, one row per patient and region.
COLUMNS = ("site", "patient", "region", "dice", "hd95_mm", "reference_ml", "predicted_ml")
#: Multiples to which a volume is padded, the first that a network takes, or the window; and those known so far.
_MULTIPLES = (16, 32, 64, 128, None)
_MULTIPLE: weakref.WeakKeyDictionary[torch.nn.Module, int | None] = weakref.WeakKeyDictionary()


class RegionScore(NamedTuple):
    """One region of one patient."""

    dice: float
    hd95_mm: float
    reference_ml: float
    predicted_ml: float


def score(prediction: torch.Tensor, reference: torch.Tensor, *, spacing_mm: Sequence[float]) -> dict[str, RegionScore]:
    """Dice, HD95 and volumes of each region.

    HD95 is the larger of the two directed 95th percentiles of the distances between the surfaces.

    Args:
        prediction: bool or 0/1 regions, shape (3, X, Y, Z), in the order of `fedlab.core.types.REGIONS`.
        reference: regions of the same shape, or labels 1/2/4 of shape (X, Y, Z).
        spacing_mm: voxel size along X, Y, Z in mm.

    Returns:
        A score for each of `fedlab.core.regions.REGION_ORDER`; see the module's docstring about empty regions.

    Raises:
        ValueError: shapes that do not fit, values other than 0 and 1, or a spacing that is not three positive numbers.
    """
    if len(spacing_mm) != 3 or not all(0 < s < math.inf for s in spacing_mm):
        raise ValueError(f"spacing_mm is three positive numbers of mm, got {tuple(spacing_mm)}")
    target = labels_to_regions(reference) if reference.ndim == 3 else reference
    if prediction.ndim != 4 or prediction.shape[0] != len(REGIONS) or prediction.shape != target.shape:
        raise ValueError(f"expected a prediction of shape (3, X, Y, Z) and a reference on the same grid, got "
                         f"{tuple(prediction.shape)} and {tuple(reference.shape)}")
    guess, truth = _mask(prediction, "prediction"), _mask(target, "reference")
    voxel_ml = math.prod(spacing_mm) / 1000
    channels = {name: REGIONS.index(name) for name in REGION_ORDER}
    return {name: _score_region(guess[i], truth[i], spacing_mm, voxel_ml) for name, i in channels.items()}


def _mask(regions: torch.Tensor, name: str) -> torch.Tensor:
    regions = regions.detach().cpu()
    if regions.dtype != torch.bool and not bool(((regions == 0) | (regions == 1)).all()):
        raise ValueError(f"the {name} holds values besides 0 and 1; threshold probabilities first, e.g. p >= 0.5")
    return regions.bool()


def _score_region(guess: torch.Tensor, truth: torch.Tensor, spacing_mm: Sequence[float],
                  voxel_ml: float) -> RegionScore:
    predicted_ml, reference_ml = int(guess.sum()) * voxel_ml, int(truth.sum()) * voxel_ml
    if not guess.any() or not truth.any():
        same = not guess.any() and not truth.any()
        return RegionScore(float(same), 0.0 if same else WORST_HD95_MM, reference_ml, predicted_ml)
    from monai.metrics import compute_dice
    from monai.metrics.utils import get_mask_edges, get_surface_distance

    dice = compute_dice(guess[None, None].float(), truth[None, None].float(), include_background=True)
    # As MONAI's compute_hausdorff_distance, which in 1.6 warns of an argument that it passes itself.
    edges = get_mask_edges(guess.float(), truth.float())
    directed = (torch.as_tensor(get_surface_distance(one, other, spacing=list(spacing_mm)))
                for one, other in (edges[:2], edges[1::-1]))
    distance = max(float(torch.quantile(distances, 0.95).float()) for distances in directed)
    return RegionScore(float(dice), distance, reference_ml, predicted_ml)


def score_rows(prediction: torch.Tensor, reference: torch.Tensor | None, *, spacing_mm: Sequence[float], site: str,
               patient: str) -> list[dict[str, str | float]]:
    """The rows of `COLUMNS` for one patient, as of `score`; without a reference only predicted volumes are known."""
    scores = score(prediction, prediction if reference is None else reference, spacing_mm=spacing_mm)
    rows = []
    for region, result in scores.items():
        if reference is None:
            result = RegionScore(math.nan, math.nan, math.nan, result.predicted_ml)
        rows.append({"site": site, "patient": patient, "region": region, **result._asdict()})
    return rows


def summary(table: pd.DataFrame, *, empty: Literal["brats", "skip"] = "brats") -> pd.DataFrame:
    """Mean Dice and HD95 over patients, for each region and over the regions.

    Args:
        table: rows of `COLUMNS`, as returned by `evaluate`.
        empty: how a patient counts whose reference lacks the region. "brats": Dice 1 and HD95 0 if the prediction
            lacks it too, else Dice 0 and HD95 373.13 mm; "skip": not at all, but false alarms among them (a non-empty
            prediction) are counted.

    Returns:
        Indexed by WT, TC, ET and "mean"; columns dice, hd95_mm, patients (that count), without_region (reference
        empty), false_alarms. `attrs["rule"]` states the rule in a sentence. A region for which no patient counts is
        NaN, and so is the mean.

    Raises:
        ValueError: an unknown `empty`, missing columns, or no patient with a reference.

    Example:
        >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
        >>> fl.summary(fl.evaluate(fl.public_model(), sites))[["patients", "without_region", "false_alarms"]]
              patients  without_region  false_alarms
        WT           2               0             0
        TC           2               0             0
        ET           2               0             0
        mean         2               0             0
    """
    import pandas as pd

    check_choice(("brats", "skip"), empty=empty)
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise ValueError(f"expected the columns {', '.join(COLUMNS)}; missing: {', '.join(missing)}")
    labelled = table[table["reference_ml"].notna()]
    if labelled.empty:
        raise ValueError("no patient in the table has a reference to compare with")
    rows: dict[str, dict[str, float]] = {}
    for region in REGION_ORDER:
        of_region = labelled[labelled["region"] == region]
        absent = of_region["reference_ml"] == 0
        counted = of_region[~absent] if empty == "skip" else of_region
        rows[region] = {"dice": float(counted["dice"].mean()), "hd95_mm": float(counted["hd95_mm"].mean()),
                        "patients": len(counted), "without_region": int(absent.sum()),
                        "false_alarms": int((absent & (of_region["predicted_ml"] > 0)).sum())}
    result, counts = pd.DataFrame.from_dict(rows, orient="index"), ["patients", "without_region", "false_alarms"]
    result.loc["mean", ["dice", "hd95_mm"]] = result[["dice", "hd95_mm"]].mean(skipna=False)
    people = len(labelled[["site", "patient"]].astype(str).drop_duplicates())
    result.loc["mean", counts] = (people, result["without_region"].sum(), result["false_alarms"].sum())
    result[counts] = result[counts].astype(int)
    result.attrs["rule"] = _rule(empty, result)
    return result


def _rule(empty: str, result: pd.DataFrame) -> str:
    cases = ", ".join(f"{region} {count}" for region, count in result["without_region"].drop("mean").items())
    alarms = int(result["false_alarms"].drop("mean").sum())
    if empty == "skip":
        return (f"Patients whose reference lacks a region do not count for it ({cases}); in {alarms} of these cases "
                "the prediction has it.")
    return (f"BraTS rule: a region that both reference and prediction lack has Dice 1 and HD95 0, one that only one "
            f"of them lacks has Dice 0 and HD95 {WORST_HD95_MM:.2f} mm. Reference lacks the region: {cases}; false "
            f"alarms among them: {alarms}.")


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Sets every part of `model` to evaluation, and each back to its mode afterwards."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def predict(model: torch.nn.Module, patient: Patient, *, window: tuple[int, int, int] | None = None,
            overlap: float = 0.25, mirror: bool | None = None, precision: str = "auto",
            device: torch.device | str | None = None) -> torch.Tensor:
    """Probabilities of the three regions over the whole volume.

    A volume no larger than `window` is predicted at once, padded to a multiple of 16, or of 32, 64 or 128, or to the
    window, whatever the network takes first; a larger one in sliding windows that are blended with Gaussian weights
    (MONAI's sliding-window inference), and only where the scan is not 0.

    Args:
        model: maps (N, 4, X, Y, Z) to logits (N, 3, X, Y, Z); of several outputs (deep supervision) that of full
            resolution counts. It keeps its training mode.
        patient: with the image to segment.
        window: largest input of the model, in voxels; None: as `segresnet(window=)` says, else 64 per axis.
        overlap: of neighbouring windows, as a fraction.
        mirror: whether to predict each window together with its mirror image along X, left and right exchanged, as one
            batch, and to take the mean of both; None: as `segresnet(mirror=)` says of the model, else False.
        precision: "auto", "bf16" or "fp32", as a `SiteTrainer` has it; see `fedlab.core.hardware.precision_for`.
        device: of the computation; None is that of the model, which is never moved.

    Returns:
        float32, shape (3, X, Y, Z), on the CPU, in the order of `fedlab.core.types.REGIONS`.

    Raises:
        ValueError: the model takes none of these sizes, or returns another number of channels, another grid, or
            values that are not finite.

    Example:
        >>> patient = fl.make_cohort(sites=1, patients=2, shape=(32, 32, 32), spacing_mm=6.0)[0].train[0]
        >>> fl.predict(fl.public_model(), patient).shape
        torch.Size([3, 32, 32, 32])
    """
    from monai.inferers import sliding_window_inference

    from fedlab.training.networks import segresnet

    place = torch.device(device) if device is not None else next((p.device for p in model.parameters()),
                                                                 torch.device("cpu"))
    dtype = precision_for(model, precision, place)
    image = patient.image[None].to(place, torch.float64 if dtype is torch.float64 else torch.float32)
    settings = getattr(model, "settings", None)
    settings = settings if isinstance(settings, dict) else {}
    mirror = settings.get("mirror") is True if mirror is None else mirror
    window = window or (settings.get("window") or 64,) * 3
    probabilities = _mirrored_probabilities if mirror else _probabilities
    # What `segresnet` made predicts faster channels-last, but for narrow layers in bf16 (AVX-512, AMX or not); another
    # network may have a view() that takes no such input.
    made_by, made_with = cast("tuple[Any, Any]", getattr(model, "_built", (None, {})))
    last = (place.type == "cpu" and made_by is segresnet
            and (dtype is torch.float32 or made_with["filters"] % 16 == 0))
    memory_format = torch.channels_last_3d if last else torch.contiguous_format
    within = _in_windows(image[0], window)
    image, grid = image[:, :, *within], image.shape[2:]
    first: Exception | None = None
    for multiple in _MULTIPLES[_MULTIPLES.index(_MULTIPLE.get(model, _MULTIPLES[0])):]:
        block = _block(image.shape[2:], window, multiple)
        try:
            with torch.inference_mode(), _evaluating(model), calling(place, dtype):
                out = sliding_window_inference(image, block, 1, lambda batch: probabilities(
                    model, batch.contiguous(memory_format=memory_format)), overlap=overlap, mode="gaussian")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a network raises for a size that it does not take
            first = first or error
            continue
        _MULTIPLE[model] = multiple
        break
    else:
        if isinstance(first, ImportError):
            raise first
        raise ValueError(f"the model takes no input of {'x'.join(map(str, window))} voxels or less "
                         f"({type(first).__name__}: {first}); pass window= with the size it was made for") from first
    result = torch.zeros((len(REGIONS), *grid))
    result[:, *within] = cast(torch.Tensor, out)[0].float().cpu()
    if not bool(torch.isfinite(result).all()):
        raise ValueError(f"the model's output for patient {patient.id} has NaN or infinite values; check whether its "
                         "training diverged")
    return result


def _in_windows(image: torch.Tensor, window: tuple[int, int, int]) -> tuple[slice, ...]:
    """The part of a scan, shape (C, X, Y, Z), to predict: all of it if it fits into the window, else what is not 0."""
    if all(n <= most for n, most in zip(image.shape[1:], window, strict=True)):
        return (slice(None),) * 3
    from monai.transforms import generate_spatial_bounding_box

    starts, ends = generate_spatial_bounding_box(image, select_fn=lambda x: x != 0)
    return tuple(slice(start, end if end > start else None) for start, end in zip(starts, ends, strict=True))


def _block(grid: Sequence[int], window: tuple[int, int, int], multiple: int | None) -> list[int]:
    """The size of the network's input: the volume's, padded to a multiple, within the window; None: the window."""
    if multiple is None:
        return list(window)
    limits = window if multiple == 16 else [max(multiple, most // multiple * multiple) for most in window]
    return [min(most, -(-n // multiple) * multiple) for most, n in zip(limits, grid, strict=True)]


def _probabilities(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    expected = (batch.shape[0], len(REGIONS), *batch.shape[2:])
    out = model(batch)
    outputs = out.unbind(1) if isinstance(out, torch.Tensor) and out.dim() == batch.dim() + 1 else (
        out if isinstance(out, list | tuple) else [out])
    for logits in outputs:
        if isinstance(logits, torch.Tensor) and tuple(logits.shape) == expected:
            return logits.float().sigmoid()
    got = [tuple(one.shape) if isinstance(one, torch.Tensor) else type(one).__name__ for one in outputs]
    raise ValueError(f"expected logits of shape {expected}, one channel for each of {', '.join(REGIONS)}; the model "
                     f"returned {' and '.join(map(str, got))}")


def _mirrored_probabilities(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    plain, mirrored = _probabilities(model, torch.cat([batch, batch.flip(2)])).chunk(2)
    return (plain + mirrored.flip(2)) / 2


def evaluate(model: torch.nn.Module, patients: Sequence[Site] | Sequence[Patient], *, threshold: float = 0.5,
             window: tuple[int, int, int] | None = None, overlap: float = 0.25, mirror: bool | None = None,
             precision: str = "auto", device: torch.device | str | None = None,
             progress: bool = False) -> pd.DataFrame:
    """Scores a model on held-out patients, whole volumes, on the patients' grid.

    Args:
        model, window, overlap, mirror, precision, device: as in `predict`.
        patients: sites, whose held-out patients (`val`) are used, or patients.
        threshold: a region is predicted where its probability is at least this.
        progress: show a progress bar.

    Returns:
        One row per patient and region, with `COLUMNS`; NaN where there is no label. The site of bare patients is "".

    Raises:
        ValueError: no patient to evaluate on.

    Example:
        >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
        >>> fl.evaluate(fl.public_model(), sites)[["site", "patient", "region"]].head(2)
              site      patient region
        0  site-01  site-01-000     WT
        1  site-01  site-01-000     TC
    """
    import pandas as pd
    from tqdm.auto import tqdm

    cases: list[tuple[str, Patient]] = []
    for item in patients:
        cases += [(item.name, p) for p in item.val] if isinstance(item, Site) else [("", item)]
    if not cases:
        raise ValueError("no patient to evaluate on: give patients, or sites with held-out patients (val)")
    rows: list[dict[str, str | float]] = []
    for site, patient in tqdm(cases, desc="evaluating", unit="patient", disable=not progress):
        guess = predict(model, patient, window=window, overlap=overlap, mirror=mirror, precision=precision,
                        device=device) >= threshold
        rows += score_rows(guess, patient.label, spacing_mm=patient.spacing_mm, site=site, patient=patient.id)
    return pd.DataFrame(rows, columns=list(COLUMNS))


@dataclass(frozen=True, kw_only=True)
class Thresholding:
    """The best result of a threshold on one modality, chosen with hindsight.

    Attributes:
        modality, oracle_modality: of `fedlab.core.types.MODALITIES`.
        above: True if voxels at or above the threshold are tumour, False if those below it are.
        threshold: in standard deviations from the mean of the brain.
        dice: mean WT Dice over the patients with this one threshold for all.
        oracle_dice: the same with the best threshold of each patient, one modality and direction for all.
    """

    modality: str
    above: bool
    threshold: float
    dice: float
    oracle_modality: str
    oracle_dice: float


def threshold_dice(patients: Sequence[Patient], *, low: float = -4.0, high: float = 8.0,
                   bins: int = 600) -> Thresholding:
    """WT Dice of intensity thresholding inside the brain, every choice made with hindsight.

    Thresholds lie from `low` to `high`, in standard deviations, in `bins` steps. They are tried all at once, from one
    histogram of tumour and one of other brain voxels per patient and modality.

    Raises:
        ValueError: no patients, one without a label, or an empty range of thresholds.
    """
    if not patients or not low < high or bins < 1:
        raise ValueError(f"expected patients and low < high, got {len(patients)} patients, low={low}, high={high}, "
                         f"bins={bins}")
    curves = np.stack([_dice_curves(patient, low, high, bins) for patient in patients])  # patient, modality, way, cut
    mean = curves.mean(axis=0)
    modality, way, cut = (int(i) for i in np.unravel_index(mean.argmax(), mean.shape))
    oracle = curves.max(axis=3).mean(axis=0)
    best, _ = np.unravel_index(oracle.argmax(), oracle.shape)
    return Thresholding(modality=MODALITIES[modality], above=way == 0,
                        threshold=round(low + (high - low) * cut / bins, 6), dice=float(mean.max()),
                        oracle_modality=MODALITIES[int(best)], oracle_dice=float(oracle.max()))


def _dice_curves(patient: Patient, low: float, high: float, bins: int) -> np.ndarray:
    """WT Dice by (modality, above or below, threshold), shape (4, 2, bins + 1)."""
    if patient.label is None:
        raise ValueError(f"patient {patient.id} has no label; thresholds with hindsight need one")
    brain = (patient.image != 0).any(dim=0)
    tumour = (patient.label > 0)[brain].long()
    reference = int((patient.label > 0).sum())
    curves = np.empty((len(MODALITIES), 2, bins + 1))
    for m, channel in enumerate(patient.image):
        # bin b + 1 holds [low + b * step, low + (b + 1) * step); the first and the last take what lies beyond
        place = ((channel[brain].float() - low) * (bins / (high - low))).floor().clamp(-1, bins).long() + 1
        counts = torch.bincount(place + (bins + 2) * tumour, minlength=2 * (bins + 2)).view(2, bins + 2).numpy()
        below = counts.cumsum(axis=1)[:, :-1]  # voxels under each threshold: others, tumour
        for way, chosen in enumerate((counts.sum(axis=1, keepdims=True) - below, below)):
            size = chosen.sum(axis=0) + reference
            curves[m, way] = np.where(size > 0, 2 * chosen[1] / np.maximum(size, 1), 1.0)
    return curves
