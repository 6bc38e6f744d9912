"""A model card for the model of a run, with the parts of Model Cards for Model Reporting (Mitchell et al. 2019).

The facts of the run are filled in; what only people know is marked as open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlab.core.errors import RunError
from fedlab.core.files import filled_in, write_new
from fedlab.core.types import MODALITIES, REGIONS, Site
from fedlab.core.weights import weights_sha256
from fedlab.data.cards.schema import MARK
from fedlab.run.history import History
from fedlab.run.trace import Verdict
from fedlab.training.metrics import summary
from fedlab.view.colours import REGION_NAMES

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ModelCard", "make_model_card"]


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A model card; `text` is Markdown with front matter, as model hubs read it."""

    text: str

    @property
    def open(self) -> int:
        """The number of places to complete."""
        return self.text.count(MARK)

    def save(self, path: Path | str) -> Path:
        """Writes the card as a new file; raises `RunError` if it exists already."""
        return write_new(path, self.text.encode())

    def __repr__(self) -> str:
        return f"<ModelCard: {len(self.text.splitlines())} lines, {self.open} places to complete>"

    def _repr_markdown_(self) -> str:
        return self.text.partition("\n---\n")[2]


def make_model_card(history: History, *, name: str, sites: Sequence[Site], settings: Mapping[str, str],
                    scores: pd.DataFrame | None = None, trace: Verdict | None = None,
                    generated: bool = False) -> ModelCard:
    """The card of the global model of a run.

    Args:
        history: of the run.
        name: of the model.
        sites: that trained it; the card names their data cards.
        settings: of the training, as code, such as {"trainer": repr(trainer), "strategy": repr(strategy)}.
        scores: of the global model on held-out patients, as `fedlab.training.metrics.evaluate` returns them; left out
            where noise at the server protects all data of a site, unless the patients were generated.
        trace: verdict of `fedlab.run.trace.verify`.
        generated: whether the patients were generated; the card then says so first.

    Raises:
        RunError: the run has no finished round.
    """
    import yaml

    if history.state is None:
        raise RunError("the run has no finished round, so there is no model to describe")
    params, shown = history.state.params, history.published()
    hidden = shown.hides_sites  # numbers of single sites, and of their patients
    withheld = hidden and not generated and scores is not None
    if withheld:
        scores = None
    front_matter = {"license": MARK, "model_name": name, "library_name": "fedlab-workbench", "metrics": ["dice"],
                    "pipeline_tag": "image-segmentation",
                    "tags": ["medical", "mri", "brain-tumour", "glioma", "federated-learning"]}
    details = {"parameters": f"{sum(t.numel() for t in params.values()):,}",
               "input": f"MRI of shape (4, X, Y, Z): {', '.join(MODALITIES)}; z-scored over brain voxels",
               "output": "one probability per voxel for " + ", ".join(f"{REGION_NAMES[r]} ({r})" for r in REGIONS),
               "rounds": f"{len(history.records)} of {history.rounds}",
               "weights, SHA-256": weights_sha256(history.state.model), **settings,
               "developed by": MARK, "contact": MARK}
    return ModelCard(text=filled_in(
        "fedlab.view", "model_card.md", name=name,
        front_matter=yaml.safe_dump(front_matter, sort_keys=False, allow_unicode=True),
        mark=MARK, generated=generated, details=details.items(), **_evaluation(scores), withheld=withheld, trace=trace,
        sites=[(site.name, *(("withheld", "withheld") if hidden else (len(site.train), len(site.val))),
                "none" if site.card is None else getattr(site.card, "name", site.card)) for site in sites],
        technique="" if history.privacy == "Privacy()" else history.privacy, guarantee=history.guarantee(),
        absent=dict(sorted(Counter(site for record in shown.records for site in record["absent"]).items())),
        rounds=len(history.records), stopped=shown.stopped))


def _evaluation(scores: pd.DataFrame | None) -> dict[str, Any]:
    """Mean Dice per region, and one row per site."""
    if scores is None or scores.empty:
        return {"held_out": 0, "regions": {}, "score_columns": [], "scores": [], "rule": ""}
    whole = summary(scores)
    by_site = scores.pivot_table(index="site", columns="region", values="dice", aggfunc="mean", sort=False)
    counts = scores.groupby("site", sort=False)["patient"].nunique()
    regions = [region for region in REGION_NAMES if region in by_site]
    return {"held_out": int(scores["patient"].nunique()), "rule": whole.attrs["rule"],
            "regions": {region: float(whole["dice"][region]) for region in regions},
            "score_columns": [f"Dice {region}" for region in regions],
            "scores": [(site, counts[site], *(f"{by_site.loc[site, region]:.3f}" for region in regions))
                       for site in by_site.index]}
