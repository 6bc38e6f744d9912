"""Is one arm better than another, by how much, and how sure is that? Paired differences of Dice and intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedlab.core.regions import REGION_ORDER
from fedlab.core.settings import check_choice, check_whole
from fedlab.core.text import counted
from fedlab.core.types import REGIONS
from fedlab.training.metrics import summary

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Difference", "Share", "difference", "differences", "differences_table", "groups", "mean_dice", "share_kept",
           "verdict"]

_PATIENT = ["seed", "site", "patient"]
#: Held-out patients below which no interval is stated.
_FEWEST = 6
#: Held-out patients of a site below which it is drawn together with other small sites.
_SMALL_SITE = 3


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The paired difference of two arms' mean Dice on the same patients.

    Attributes:
        one, other: names of the arms; the difference is `one` minus `other`.
        value: the difference of the means.
        low, high: limits of its 95 % interval; NaN if too few patients are held out to state one.
        patients, sites, seeds: numbers of patients, sites and seeds of the comparison that it rests on.
        region: WT, TC, ET or the "mean" over the three.
        empty: how a patient counts whose reference lacks a region, as in `fedlab.evaluate` and `fedlab.summary`.
    """

    one: str
    other: str
    value: float
    low: float
    high: float
    patients: int
    sites: int
    seeds: int
    region: str
    empty: str

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0; only then may a text claim a difference."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        interval = (f"95 % interval {self.low:+.3f} to {self.high:+.3f}" if math.isfinite(self.low) else
                    f"no interval from fewer than {_FEWEST} patients")
        what = "mean Dice" if self.region == "mean" else f"{self.region} Dice"
        seeds = f", {self.seeds} seeds" if self.seeds > 1 else ""
        return (f"{self.one} − {self.other}: {self.value:+.3f} {what} ({interval}; paired over "
                f"{counted(self.patients, 'patient')} of {counted(self.sites, 'site')}{seeds})")


@dataclass(frozen=True, kw_only=True)
class Share:
    """The share of a gain in mean Dice that an arm keeps, over the same patients.

    Attributes:
        value: (arm − start) / (full − start); NaN if the gain of the full arm over the start is not clear of 0.
        low, high: limits of its 95 % interval; NaN as above, or if too few patients are held out to state one.
        patients: number of patients.
        gain: the difference of which it is the share.
    """

    value: float
    low: float
    high: float
    patients: int
    gain: Difference

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"no share: {self.gain.one} has no clear gain over {self.gain.other} (n = {self.patients})"
        interval = f"{self.low:.0%} to {self.high:.0%}" if math.isfinite(self.low) else "no interval"
        return f"{self.value:.0%} ({interval}; n = {self.patients})"


def difference(scores: pd.DataFrame, one: str, other: str, *, region: str = "mean",
               empty: Literal["brats", "skip"] = "brats", draws: int = 4000, seed: int = 0) -> Difference:
    """The difference of two arms' mean Dice, paired over patients, with a 95 % bootstrap interval.

    Patients are drawn with replacement within their site, all scores of a patient together. Of n patients n − 1 are
    drawn, so that the variance of a mean is unbiased in small sites (McCarthy and Snowden 1985; Rao and Wu 1988); sites
    with fewer than three held-out patients are drawn together. The interval says how the difference would vary with
    other patients of these sites. It does not cover other trainings; seeds do, each of which brings its own patients.
    Where seeds share their patients, leave the column "seed" out: a patient then counts once, with the mean over seeds.

    Args:
        scores: rows of `fedlab.evaluate` with a column "arm", and "seed" if there are several.
        one, other: names of arms. The arms "local site-01", "local site-02", ..., each trained at the site that it
            names, are "local_own" on their own site's patients, and "local_others" on those of the other sites, where
            each patient counts with the mean of their scores.
        region: "WT", "TC", "ET" or "mean", the mean of the three regions' means.
        empty: how a patient counts whose reference lacks the region; see `fedlab.summary`.
        draws: of the bootstrap.
        seed: of the draws.

    Raises:
        ValueError: an unknown arm or region, or arms that were not scored on the same patients.

    Example:
        >>> import pandas as pd
        >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
        >>> models = {name: fl.public_model(name) for name in ("broad", "collection")}
        >>> scores = pd.concat([fl.evaluate(model, sites).assign(arm=name) for name, model in models.items()])
        >>> print(fl.difference(scores, "broad", "collection"))
        broad − collection: ... mean Dice (no interval from fewer than ... patients; paired over 2 patients of 2 sites)
    """
    check_choice((*REGIONS, "mean"), region=region)
    check_choice(("brats", "skip"), empty=empty)
    check_whole(draws=draws)
    gaps = _dice(scores, one, empty) - _dice(scores, other, empty)
    if gaps.empty or not gaps["both"].notna().all():
        raise ValueError(f"{one!r} and {other!r} were not scored on the same patients; evaluate both on all of them")
    values = gaps[list(REGIONS) if region == "mean" else [region]].to_numpy(dtype=float)
    value = _mean(values, np.ones((1, len(values))))[0]
    low = high = math.nan
    if len(values) >= _FEWEST:
        means = _mean(values, _draws(gaps, draws, np.random.default_rng(seed)))
        low, high = np.nanquantile(means, (0.025, 0.975))
    return Difference(one=one, other=other, value=float(value), low=float(low), high=float(high), patients=len(gaps),
                      sites=gaps.index.get_level_values("site").nunique(),
                      seeds=gaps.index.get_level_values("seed").nunique(), region=region, empty=empty)


def mean_dice(scores: pd.DataFrame, arm: str, *,
              empty: Literal["brats", "skip"] = "brats") -> tuple[float, float, float]:
    """An arm's Dice, mean over patients and regions, and its 95 % interval over patients; see `difference`."""
    import pandas as pd

    own = scores[groups(scores) == arm]
    nothing = own.assign(arm="nothing", dice=0.0)
    found = difference(pd.concat([own, nothing]), arm, "nothing", empty=empty)
    return found.value, found.low, found.high


def share_kept(scores: pd.DataFrame, arm: str, *, full: str, start: str, draws: int = 4000, seed: int = 0) -> Share:
    """The share of the gain of the arm `full` over the arm `start` that another arm keeps.

    Gain and share are of mean Dice, paired over patients; each draw of the bootstrap of `difference` gives a ratio, and
    the interval holds the middle 95 % of them. It is stated where the interval of the gain excludes 0: else the ratio
    has no meaning (Fieller 1954).

    Raises:
        ValueError: as in `difference`.
    """
    gain, kept = (difference(scores, one, start, draws=draws, seed=seed) for one in (full, arm))
    low = high = math.nan
    if not (gain.low > 0 or (math.isnan(gain.low) and gain.value > 0)):
        return Share(value=math.nan, low=low, high=high, patients=gain.patients, gain=gain)
    if math.isfinite(gain.low):
        bottom = _dice(scores, start, "brats")
        weights = _draws(bottom, draws, np.random.default_rng(seed))
        top, whole = (_mean((_dice(scores, one, "brats") - bottom)[list(REGIONS)].to_numpy(dtype=float), weights)
                      for one in (arm, full))
        low, high = np.quantile(top[whole > 0] / whole[whole > 0], (0.025, 0.975))
    return Share(value=kept.value / gain.value, low=float(low), high=float(high), patients=gain.patients, gain=gain)


def groups(scores: pd.DataFrame) -> pd.Series[str]:
    """The group of each row of scores: its arm, or "local_own" and "local_others" for arms trained at one site."""
    sites, arms = set(scores["site"].astype(str)), list(scores["arm"].unique())
    prefixes = {arm.removesuffix(site) for arm in arms for site in sites if arm.endswith(f" {site}")}
    families = {arm: prefix for arm in arms for prefix in prefixes if arm.startswith(prefix)}
    family = scores["arm"].map(families)
    own, name = scores["arm"] == family + scores["site"].astype(str), family.astype(object).str.strip()
    return scores["arm"].mask(own, name + "_own").mask(family.notna() & ~own, name + "_others")


def differences(scores: pd.DataFrame, main: str, **settings: Any) -> dict[str, Difference]:
    """The differences of one arm and each other arm or group of arms; settings are those of `difference`."""
    others = [name for name in groups(scores).unique() if name != main]
    return {name: difference(scores, main, name, **settings) for name in others}


def differences_table(scores: pd.DataFrame, main: str) -> pd.DataFrame:
    """Dice of each arm or group of arms, and the main arm's Dice minus the arm's.

    Returns:
        One row per arm; columns WT, TC, ET, mean (BraTS rule), mean_skip (without patients that lack a region),
        patients, and difference, low and high: the main arm's mean minus the arm's, with its 95 % interval.
    """
    import pandas as pd

    of_group = groups(scores)
    rows = {}
    for name in of_group.unique():
        own = scores[of_group == name]
        dice, skip = summary(own)["dice"], summary(own, empty="skip")["dice"]
        rows[name] = {**dice[[*REGION_ORDER, "mean"]].to_dict(), "mean_skip": skip["mean"],
                      "patients": len(_dice(scores, name, "brats"))}
    found = differences(scores, main)
    for name, one in found.items():
        rows[name] |= {"difference": one.value, "low": one.low, "high": one.high}
    return pd.DataFrame.from_dict(rows, orient="index")


def verdict(scores: pd.DataFrame, main: str, *, names: Mapping[str, str] | None = None) -> str:
    """Whether the main arm is better than each other one: a claim only where the interval excludes 0.

    Args:
        names: how arms are called in the text; by default by their names.
    """
    spoken = dict(names or {})
    parts: dict[str, list[str]] = {"better than": [], "worse than": [], "not clearly different from": []}
    for name, one in differences(scores, main).items():
        what = "not clearly different from" if not one.is_clear else "better than" if one.value > 0 else "worse than"
        interval = f", 95 % interval {one.low:+.3f} to {one.high:+.3f}" if math.isfinite(one.low) else ", no interval"
        parts[what].append(f"{spoken.get(name, name)} ({one.value:+.3f}{interval})")
    claims = [f"{what} {', '.join(of)}" for what, of in parts.items() if of]
    found = difference(scores, main, main)
    return (f"In mean Dice on {counted(found.patients, 'held-out patient')}"
            f"{f', {found.seeds} seeds' * (found.seeds > 1)}, "
            f"{spoken.get(main, main)} is {'; '.join(claims) or 'the only arm'}.")


def _dice(scores: pd.DataFrame, arm: str, empty: str) -> pd.DataFrame:
    """Dice of an arm by patient, one column per region, NaN where the patient does not count; "both" marks a score."""
    names = groups(scores)
    rows = scores[(names == arm) | (scores["arm"] == arm)]
    if rows.empty:
        raise ValueError(f"no arm {arm!r} in the scores; there are {', '.join(names.unique())}")
    rows = rows.assign(seed=rows["seed"] if "seed" in rows else 0)
    dice = rows["dice"].mask(rows["reference_ml"] == 0) if empty == "skip" else rows["dice"]
    table = rows.assign(dice=dice).groupby([*_PATIENT, "region"])["dice"].mean().unstack("region")
    return table.reindex(columns=list(REGIONS)).assign(both=0.0)


def _draws(gaps: pd.DataFrame, draws: int, random: np.random.Generator) -> np.ndarray:
    """How often each patient counts in each draw, shape (draws, patients)."""
    strata = gaps.reset_index()[["seed", "site"]].astype(str).agg("|".join, axis=1)
    small = strata.map(strata.value_counts()) < _SMALL_SITE
    strata = strata.mask(small, "small sites")
    if 0 < small.sum() < _SMALL_SITE:  # too few even together: with the first of the others
        strata = strata.mask(small, strata[~small].iloc[0])
    weights = np.zeros((draws, len(gaps)))
    for _, places in strata.groupby(strata):
        n = len(places)
        weights[:, places.index] = random.multinomial(n - 1, [1 / n] * n, size=draws) * (n / (n - 1))
    return weights


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean over columns of the weighted means over rows that are not NaN, one for each row of weights."""
    counted = weights @ np.isfinite(values)
    with np.errstate(invalid="ignore"):
        means: np.ndarray = (weights @ np.nan_to_num(values) / counted).mean(axis=1)
    return means
