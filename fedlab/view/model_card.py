"""A model card for what a run has trained, in the parts of Model Cards for Model Reporting (Mitchell et al. 2019).

What the run knows is filled in; what only people know says so and stays open.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedlab.core.errors import RunError
from fedlab.core.types import MODALITIES, REGIONS, Site
from fedlab.core.weights import weights_sha256
from fedlab.data.cards.schema import MARK
from fedlab.run.history import History
from fedlab.run.trace import Verdict
from fedlab.training.metrics import summary

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ModelCard", "make_model_card"]

_REGION_NAMES = {"TC": "tumour core", "WT": "whole tumour", "ET": "enhancing tumour"}


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A model card.

    Attributes:
        text: Markdown with front matter, as model hubs read it.
    """

    text: str

    @property
    def open(self) -> int:
        """How many places people still have to complete."""
        return self.text.count(MARK)

    def save(self, path: Path | str) -> Path:
        """Writes it as a new file.

        Raises:
            RunError: the file exists already.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8", newline="\n") as file:
                file.write(self.text)
        except FileExistsError as error:
            raise RunError(f"{path} exists already and is not overwritten: remove it, or give another path") from error
        return path

    def __repr__(self) -> str:
        return f"<ModelCard: {len(self.text.splitlines())} lines, {self.open} places to complete>"

    def _repr_markdown_(self) -> str:
        return self.text.partition("\n---\n")[2]


def make_model_card(history: History, *, name: str, sites: Sequence[Site], settings: Mapping[str, str],
               scores: pd.DataFrame | None = None, trace: Verdict | None = None, generated: bool = False) -> ModelCard:
    """The card of the global model of a run.

    Args:
        history: of the run.
        name: what the model is called.
        sites: that trained it; their data cards are named where there are some.
        settings: with what it was trained, as code, such as {"trainer": repr(trainer), "strategy": repr(strategy)}.
        scores: of the global model on held-out patients, as `fedlab.training.metrics.evaluate` gives them.
        trace: what `fedlab.run.trace.verify` found.
        generated: whether the patients were generated, which a reader must know first.

    Raises:
        RunError: the run has no finished round.
    """
    if history.state is None:
        raise RunError("the run has no finished round, so there is no model to describe")
    parts = [
        _front_matter(name), f"# {_safe(name)}",
        "Segments glioma in 3-D MRI. Trained by federated learning: scans stayed at their sites."
        + (" All patients it was trained on are generated; it has learned from no real scan." if generated else ""),
        "## Model details", _details(history, settings),
        "## Intended use",
        "Research on federated learning and on privacy techniques in medical imaging: comparisons, teaching, starting "
        "weights for further research.",
        "Not for: any decision about a patient, in diagnosis, planning or follow-up; it is no medical device and was "
        "reviewed by nobody who could say otherwise. Not for children, for treated tumours, for metastases or other "
        "lesions, or for other sequences, unless evaluated on them.",
        "## Factors", "Results differ between sites: see the table by site. Scanner, field strength, slice thickness, "
        f"tumour grade, age and sex were not analysed. {MARK}: the groups that matter where it is to be used.",
        "## Metrics and evaluation data", _evaluation(scores),
        "## Training data", _training_data(sites),
        "## Privacy", _privacy(history),
        "## Traceability", _traceability(history, trace),
        "## Ethical considerations",
        f"{MARK}: consent and approval at each site, and who may get the weights. Weights can tell about the patients "
        "they were trained on, as far as no guarantee above bounds it.",
        "## Caveats and recommendations", _caveats(history, scores),
    ]
    return ModelCard(text="\n\n".join(parts) + "\n")


def _front_matter(name: str) -> str:
    import yaml

    fields = {"license": MARK, "model_name": name, "library_name": "fedlab-workbench", "metrics": ["dice"],
              "pipeline_tag": "image-segmentation",
              "tags": ["medical", "mri", "brain-tumour", "glioma", "federated-learning"]}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _details(history: History, settings: Mapping[str, str]) -> str:
    params = history.state.params if history.state is not None else {}
    rows = [("parameters", f"{sum(t.numel() for t in params.values()):,}"),
            ("input", f"MRI of shape (4, X, Y, Z): {', '.join(MODALITIES)}; z-scored over brain voxels"),
            ("output", f"a probability a voxel for {', '.join(f'{_REGION_NAMES[r]} ({r})' for r in REGIONS)}"),
            ("rounds", f"{len(history.records)} of {history.rounds}"),
            ("weights, SHA-256", weights_sha256(params)), *settings.items(),
            ("developed by", MARK), ("contact", MARK)]
    return _table(("", "value"), rows)


def _evaluation(scores: pd.DataFrame | None) -> str:
    if scores is None or scores.empty:
        return f"{MARK}: it was not evaluated on held-out patients in this run."
    held_out = int(scores["patient"].nunique())
    whole = summary(scores)
    by_site = scores.pivot_table(index="site", columns="region", values="dice", aggfunc="mean", sort=False)
    counts = scores.groupby("site", sort=False)["patient"].nunique()
    regions = [region for region in ("WT", "TC", "ET") if region in by_site]
    rows = [(str(site), str(counts[site]), *(f"{by_site.loc[site, r]:.3f}" for r in regions)) for site in by_site.index]
    means = ", ".join(f"{region} {whole['dice'][region]:.3f}" for region in regions)
    return (f"Dice on {held_out} held-out patients of the same sites: {means}. {whole.attrs['rule']}\n\n"
            + _table(("site", "held-out patients", *(f"Dice {r}" for r in regions)), rows))


def _training_data(sites: Sequence[Site]) -> str:
    rows = [(site.name, str(len(site.train)), str(len(site.val)), _card_name(site.card)) for site in sites]
    return _table(("site", "patients trained on", "held out", "data card"), rows)


def _card_name(card: object) -> str:
    return "none" if card is None else str(getattr(card, "name", card))


def _privacy(history: History) -> str:
    technique = "none" if history.privacy == "Privacy()" else f"`{history.privacy}`"
    return f"Technique: {technique}. Guarantee: {_safe(history.guarantee())}."


def _traceability(history: History, trace: Verdict | None) -> str:
    if trace is None:
        return f"{MARK}: the run was not traced (`federate(..., trace=...)`)."
    found = "whole" if trace.ok else "NOT whole: " + "; ".join(map(_safe, trace.problems))
    return (f"The trace of {trace.rounds} rounds is {found}. Its head, with which `fedlab verify RUN --head` tells "
            f"whether it was written anew: `{trace.head}`.")


def _caveats(history: History, scores: pd.DataFrame | None) -> str:
    said = []
    absent: dict[str, int] = {}
    for record in history.records:
        for site in record["absent"]:
            absent[site] = absent.get(site, 0) + 1
    if absent:
        said.append("Updates that are not in the model: " + ", ".join(
            f"{_safe(name)} in {count} of {len(history.records)} rounds"
            for name, count in sorted(absent.items())) + ".")
    if history.stopped:
        said.append(f"The run ended early: {_safe(history.stopped)}.")
    held_out = 0 if scores is None or scores.empty else int(scores["patient"].nunique())
    said.append(f"Evaluated on {held_out} patients of the sites that trained it: that says nothing about other sites. "
                "Evaluate it on patients of the place where it is to be used, and look at the segmentations.")
    return " ".join(said)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_safe(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _safe(text: str) -> str:
    """One line of text that stays text in Markdown, also in a table."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#!" else c for c in " ".join(str(text).split()))
