"""Settings × seeds side by side on the cores there are, as one tidy table: a grid, or a search with Optuna."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlab.core.extras import need
from fedlab.core.settings import check_whole
from fedlab.core.text import counted
from fedlab.core.types import Site
from fedlab.evidence.arms import Arm
from fedlab.evidence.comparison import ArmComparison, compare_arms
from fedlab.evidence.differences import mean_dice
from fedlab.training.metrics import summary

if TYPE_CHECKING:
    import pandas as pd
    from optuna.distributions import BaseDistribution

__all__ = ["Sweep", "search", "sweep"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sweep:
    """The result of `sweep` or `search`; shows as its table, and `fedlab.view.sweep_figure` draws it.

    Attributes:
        settings: by name of the arm that was made from them.
        comparison: scores and histories of these arms; `comparison.difference` compares two of them.
    """

    settings: Mapping[str, Mapping[str, Any]]
    comparison: ArmComparison

    def table(self) -> pd.DataFrame:
        """One row per setting and seed, for further analysis.

        Columns: the settings; seed; patients that were scored; WT, TC, ET and mean Dice (BraTS rule), with the 95 %
        interval of the mean over patients (low, high); guarantee, the privacy spent in words; MB that sites sent;
        seconds of the rounds.
        """
        import pandas as pd

        scores, rows = self.comparison.scores, list[dict[str, Any]]()
        for (seed, name), history in self.comparison.histories.items():
            own = scores[(scores["arm"] == name) & (scores["seed"] == seed)]
            dice, (_, low, high), rounds = summary(own)["dice"], mean_dice(own, name), history.published().table()
            rows.append({**self.settings[name], "seed": seed, "patients": own["patient"].nunique(),
                         **{region: dice[region] for region in ("WT", "TC", "ET", "mean")}, "low": low, "high": high,
                         "guarantee": history.guarantee(),
                         "MB": rounds["bytes"].sum() / 1e6 if "bytes" in rounds else None,
                         "seconds": rounds["seconds"].sum() if "seconds" in rounds else None})
        return pd.DataFrame(rows)

    def over_seeds(self) -> pd.DataFrame:
        """One row per setting: mean Dice over the patients of all seeds with its 95 % interval, and numbers of both."""
        import pandas as pd

        seeds = {name: sum(of == name for _, of in self.comparison.histories) for name in self.settings}
        rows = []
        for name, settings in self.settings.items():
            found = self.comparison.difference(name, name)
            dice, low, high = mean_dice(self.comparison.paired_scores, name)
            rows.append({**settings, "dice": dice, "low": low, "high": high, "seeds": seeds[name],
                         "patients": found.patients})
        return pd.DataFrame(rows)

    def best(self) -> Mapping[str, Any]:
        """The settings of the highest mean Dice. It flatters: they were chosen on these patients; score on others."""
        scores = self.comparison.paired_scores
        return self.settings[max(self.settings, key=lambda name: mean_dice(scores, name)[0])]

    def __repr__(self) -> str:
        table = self.over_seeds().to_string(float_format="{:.3g}".format)
        return f"<Sweep of {counted(len(self.settings), 'setting')}>\n{table}"

    def _repr_html_(self) -> str:
        html: str = self.over_seeds().to_html(float_format="{:.3g}".format, index=False)
        return html


def sweep(make: Callable[..., Arm], grid: Mapping[str, Sequence[Any]], *,
          sites: Sequence[Site] | Callable[[int], Sequence[Site]], seeds: Sequence[int] = (0,),
          out: Path | str | None = None, workers: int | None = None, progress: bool = True) -> Sweep:
    """Trains one arm per combination of settings and seed, side by side, and scores all on the same patients.

    Args:
        make: makes the `Arm` of one combination, called with its settings by name, and with seed= if it has such an
            argument.
        grid: the values to try, by name of the setting.
        sites, seeds, out, workers, progress: as of `compare_arms`; with `out` a sweep that was interrupted continues,
            and one with more values or seeds trains what is new.

    Raises:
        ValueError: no setting, a setting without a value, or an arm that trains one model per site.

    Example:
        >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
        >>> def make(lr):
        ...     trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16), lr=lr)
        ...     return fl.Arm(trainer=trainer, rounds=1)
        >>> found = fl.sweep(make, {"lr": (1e-3, 3e-3)}, sites=sites, workers=1)
    """
    if not grid or not all(len(values) for values in grid.values()):
        raise ValueError(f"a sweep needs at least one setting, each with at least one value; got {dict(grid)!r}")
    combinations = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    settings = {_name(one): one for one in combinations}
    if len(settings) < len(combinations):
        raise ValueError(f"some values of the sweep appear twice: {dict(grid)!r}")
    return _trained(make, settings, sites=sites, seeds=seeds, out=out, workers=workers, progress=progress)


def search(make: Callable[..., Arm], space: Mapping[str, BaseDistribution], *, trials: int,
           sites: Sequence[Site] | Callable[[int], Sequence[Site]], seeds: Sequence[int] = (0,), at_once: int = 4,
           seed: int = 0, out: Path | str | None = None, workers: int | None = None,
           progress: bool = True) -> Sweep:
    """Looks for the settings of the highest mean Dice with Optuna's TPE (Bergstra et al. 2011) instead of a grid.

    The choice is made on the held-out patients of `sites`, so their Dice of the best settings is too high: report the
    Dice of other patients. Needs `pip install 'fedlab-workbench[search]'`.

    Args:
        make: as of `sweep`.
        space: a distribution of Optuna per setting, such as `optuna.distributions.FloatDistribution(1e-4, 1e-2,
            log=True)`.
        trials: combinations to train, each with all `seeds`.
        at_once: combinations proposed together from the scores before them, and trained side by side.
        seed: of the proposals. The same call proposes the same settings, so with `out` a search that was interrupted
            continues.
        sites, seeds, out, workers, progress: as of `sweep`.

    Raises:
        ValueError: a count below 1, no setting, or an arm that trains one model per site.
        MissingExtra: Optuna is not installed.

    Example:
        >>> from optuna.distributions import FloatDistribution
        >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
        >>> def make(lr):
        ...     trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16), lr=lr)
        ...     return fl.Arm(trainer=trainer, rounds=1)
        >>> space = {"lr": FloatDistribution(1e-4, 1e-2, log=True)}
        >>> found = fl.evidence.search(make, space, trials=2, sites=sites, workers=1)
        >>> len(found.settings), list(found.best())
        (2, ['lr'])
    """
    need("search", "optuna", what="a search")
    from optuna import create_study, logging
    from optuna.samplers import TPESampler

    check_whole(trials=trials, at_once=at_once)
    if not space:
        raise ValueError("a search needs at least one setting in `space`, each with a distribution of Optuna")
    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        study = create_study(direction="maximize", sampler=TPESampler(seed=seed))
        settings: dict[str, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory() as temporary:
            while (told := len(study.trials)) < trials:
                asked = [study.ask(dict(space)) for _ in range(min(at_once, trials - told))]
                settings |= {_name(one.params): dict(one.params) for one in asked}
                found = _trained(make, settings, sites=sites, seeds=seeds, out=out or temporary, workers=workers,
                                 progress=progress)
                for one in asked:
                    study.tell(one, mean_dice(found.comparison.paired_scores, _name(one.params))[0])
    finally:
        logging.set_verbosity(before)
    return found


def _name(settings: Mapping[str, Any]) -> str:
    """The name of the arm that is made from settings."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def _trained(make: Callable[..., Arm], settings: Mapping[str, Mapping[str, Any]], *, sites: Any, seeds: Sequence[int],
             out: Path | str | None, workers: int | None, progress: bool) -> Sweep:
    """Trains the arms of these settings that are not in `out` yet."""
    seeded = "seed" in inspect.signature(make).parameters

    def arms(seed: int) -> dict[str, Arm]:
        made = {name: make(**one, **({"seed": seed} if seeded else {})) for name, one in settings.items()}
        if any(arm.data == "each" for arm in made.values()):
            raise ValueError("a sweep compares arms of one model each; use compare_arms for data='each'")
        return made

    found = compare_arms(sites, arms, seeds=seeds, out=out, workers=workers, progress=progress)
    return Sweep(settings=settings, comparison=found)
