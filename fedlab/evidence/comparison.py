"""A comparison of any arms over seeds, with paired differences and a verdict."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlab.core.errors import DataError
from fedlab.core.types import Site
from fedlab.core.workers import Workers, script_not_imported
from fedlab.data.store import save_sites
from fedlab.evidence.arms import Arm, Model, main_arm, models_of, train_models
from fedlab.evidence.differences import Difference, difference, differences_table, verdict
from fedlab.run.history import History

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ArmComparison", "compare_arms"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ArmComparison:
    """The result of `compare_arms`; shows as a table of Dice and paired differences.

    Attributes:
        scores: one row per seed, arm, held-out patient and region, as `fedlab.evaluate` returns them.
        histories: of the training, by seed and model.
        main: the arm that the others are compared with.
        same_patients: whether all seeds are scored on the same patients, instead of each on its own. A patient then
            counts once in intervals, with the mean over seeds.
    """

    scores: pd.DataFrame
    histories: Mapping[tuple[int, str], History]
    main: str
    same_patients: bool = False

    @property
    def paired_scores(self) -> pd.DataFrame:
        """The scores as `fedlab.evidence.difference` takes them: without "seed" where seeds share their patients."""
        return self.scores.drop(columns="seed") if self.same_patients else self.scores

    def difference(self, one: str, other: str, **settings: Any) -> Difference:
        """The paired difference of two arms with its interval; see `fedlab.evidence.difference`."""
        return difference(self.paired_scores, one, other, **settings)

    def table(self) -> pd.DataFrame:
        """Mean Dice of each arm by both rules for empty regions, and the main arm's Dice minus the arm's."""
        return differences_table(self.paired_scores, main=self.main)

    def verdict(self) -> str:
        """One sentence per comparison of the main arm; a difference is claimed only where its interval excludes 0."""
        return verdict(self.paired_scores, main=self.main)

    def __repr__(self) -> str:
        return f"<ArmComparison: {self.verdict()}>"

    def _repr_html_(self) -> str:
        html: str = self.table().to_html(float_format="{:+.3f}".format, na_rep="–")
        return f"<p>{escape(self.verdict())}</p>{html}"


def compare_arms(sites: Sequence[Site] | Callable[[int], Sequence[Site]],
                 arms: Mapping[str, Arm] | Callable[[int], Mapping[str, Arm]], *, seeds: Sequence[int] = (0,),
                 out: Path | str | None = None, workers: int | None = None, progress: bool = True) -> ArmComparison:
    """Trains every arm with every seed, side by side in worker processes, and scores all on the same patients.

    Args:
        sites: with held-out patients; or a function of the seed that makes them, so that seeds differ in patients too.
        arms: by name; or a function of the seed, where the start depends on it. The first one that trains on
            data="sites" is the main arm, which the others are compared with.
        seeds: of the runs; an arm has one training per seed.
        out: a folder in which finished rounds and scores are kept, so that a comparison that was interrupted continues
            when it is called again; a temporary one by default.
        workers: processes, one core each; by default all cores.
        progress: show a progress bar.

    Raises:
        ValueError: no arm, or two models of one name.
        DataError: no held-out patient.
        FedlabError: the first failure of an arm.

    Example:
        >>> sites = fl.make_cohort(sizes=(4, 4), held_out=1, shape=(32, 32, 32), spacing_mm=6.0)
        >>> trainer = fl.SiteTrainer(model=fl.public_model("collection"), steps=1, crop=(16, 16, 16))
        >>> arms = {"public": fl.Arm(trainer=trainer, rounds=0), "federated": fl.Arm(trainer=trainer, rounds=1)}
        >>> fl.compare_arms(sites, arms, workers=1)
        <ArmComparison: In mean Dice on 2 held-out patients, federated is ...>
    """
    import pandas as pd

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(out if out is not None else temporary)
        models: list[Model] = []
        main = ""
        for seed in dict.fromkeys(seeds):
            of_seed = list(sites(seed) if callable(sites) else sites)
            if not any(len(site.val) for site in of_seed):
                raise DataError("no site holds out a patient, so there is nothing to compare on; hold out at least six")
            given = arms(seed) if callable(arms) else arms
            main = main or main_arm(given)
            prepared = folder / f"seed-{seed}" / "prepared"
            save_sites(of_seed, prepared)
            models += [model for name, arm in given.items() for model in models_of(
                name, arm, of_seed, prepared=prepared, folder=folder / f"seed-{seed}", seed=seed)]
        _check_models(models)
        with script_not_imported(), Workers(workers) as pool:  # from here on no function of the user's script is called
            trained = train_models(models, pool, progress=progress)
    return ArmComparison(scores=pd.concat([one.scores for one in trained], ignore_index=True), main=main,
                         same_patients=not callable(sites),
                         histories={(m.seed, m.name): one.history for m, one in zip(models, trained, strict=True)})


def _check_models(models: Sequence[Model]) -> None:
    twice = [name for (_, name), count in Counter((m.seed, m.name) for m in models).items() if count > 1]
    if twice:
        raise ValueError(f"several models of the comparison have the name {twice[0]!r}: rename the arm")
