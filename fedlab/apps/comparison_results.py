"""The results of a comparison as files: tables, figures, the model card, the report and `summary.json`."""

from __future__ import annotations

import platform
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from fedlab import __version__
from fedlab.apps.comparison import Outcome
from fedlab.apps.comparison_data import Folder
from fedlab.core.files import write_json
from fedlab.core.types import REGIONS
from fedlab.core.weights import weights_sha256
from fedlab.run.trace import verify
from fedlab.training.metrics import summary, threshold_dice
from fedlab.view.model_card import make_model_card
from fedlab.view.report_page import Section, save_figure, write_report
from fedlab.view.run_figures import contributions_figure, cross_site_heatmap, curves, dice_by_arm
from fedlab.view.site_figures import sites_figure
from fedlab.view.slices import compare

__all__ = ["caution", "cross_site", "describe", "dice_table", "summarise", "versions", "write_results"]

_LOCAL = "local "
_COLUMNS = ("WT", "TC", "ET", "mean")
#: Held-out patients below which their mean is no estimate for other patients.
_FEW = 20
_SPOKEN = {"federated": "federated", "centralised": "all data pooled",
           "local_own": "each site alone, on its own patients",
           "local_others": "each site alone, on the other sites' patients"}


def _groups(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Rows of each compared group; local models form two, on their own and on the other sites' patients."""
    local = scores[scores["arm"].str.startswith(_LOCAL)]
    own = local["arm"].str.removeprefix(_LOCAL) == local["site"]
    groups = {"federated": scores[scores["arm"] == "federated"], "centralised": scores[scores["arm"] == "centralised"],
              "local_own": local[own], "local_others": local[~own]}
    return {name: rows for name, rows in groups.items() if len(rows)}


def dice_table(scores: pd.DataFrame, *, empty: str = "brats") -> pd.DataFrame:
    """Mean Dice of each arm: a row per arm, columns WT, TC, ET and mean.

    Args:
        scores: one row per arm, site, patient and region, as in `fedlab.apps.comparison.Outcome`.
        empty: how empty regions count, see `fedlab.training.metrics.summary`.
    """
    columns = list(_COLUMNS)
    rows = {name: summary(group, empty=empty)["dice"][columns] for name, group in _groups(scores).items()}  # type: ignore[arg-type]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).astype(float)


def cross_site(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice over regions of each arm's model (rows) on each site's held-out patients (columns)."""
    table = scores.pivot_table(index="arm", columns="site", values="dice", aggfunc="mean", sort=False)
    return table.rename_axis(index="model", columns="patients of")


def versions() -> dict[str, str]:
    """Versions of the software that determines the numbers."""
    return {"fedlab": __version__, "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "monai", "numpy")}}


def summarise(outcome: Outcome) -> dict[str, Any]:
    """The content of `summary.json`: Dice of the arms, seconds, settings, hash of the federated weights, versions."""
    table = dice_table(outcome.scores)
    federated = outcome.histories["federated"].state
    held_out = [patient for site in outcome.sites for patient in site.val]
    found: dict[str, Any] = {
        "dice": {arm: _rounded(row) for arm, row in table.iterrows()},
        "thresholding": {"WT": round(threshold_dice(held_out).dice, 4)},
        "seconds": {name: round(value, 1) for name, value in outcome.seconds.items()},
        "patients": sum(len(site.train) + len(site.val) for site in outcome.sites),
        "sites": len(outcome.sites),
        "rounds": outcome.job.rounds,
        "seed": outcome.job.seed,
        "weights_sha256": weights_sha256(federated.params) if federated else None,
        "versions": versions(),
    }
    if outcome.train is not None:
        found["train"] = {"patients": sum(len(site.train) for site in outcome.sites),
                          "dice": _rounded(summary(outcome.train)["dice"][list(_COLUMNS)])}
    if outcome.real is not None:
        found["real"] = {"patients": int(outcome.real["patient"].nunique()),
                         "dice": _rounded(summary(outcome.real)["dice"][list(REGIONS)])}
    return found


def _rounded(dice: pd.Series[Any]) -> dict[str, float]:
    return {str(name): round(float(value), 4) for name, value in dice.items()}


def write_results(outcome: Outcome, out: Path) -> dict[str, Any]:
    """Writes the results into the run directory and returns the summary.

    Files, in addition to model.safetensors, partition.json, trace.jsonl and rounds.csv (every number of every round)
    of the job: scores.csv, dice.csv, cross_site.csv, train.csv and real.csv for real scans, contributions.csv if the
    job asks for it, history.json, model_card.md, figures/, report.html, and last summary.json, which marks the run as
    complete. Files that an interrupted attempt left are overwritten.
    """
    (out / "report.html").unlink(missing_ok=True)
    shutil.rmtree(out / "figures", ignore_errors=True)
    outcome.scores.to_csv(out / "scores.csv", index=False)
    dice_table(outcome.scores).to_csv(out / "dice.csv", index_label="arm")
    cross_site(outcome.scores).to_csv(out / "cross_site.csv")
    for name, table in (("train", outcome.train), ("real", outcome.real)):
        if table is not None:
            table.to_csv(out / f"{name}.csv", index=False)
    if outcome.contributions is not None:
        outcome.contributions.table.to_csv(out / "contributions.csv")
    write_json(out / "history.json", {arm: history.records for arm, history in outcome.histories.items()})
    _write_model_card(outcome, out / "model_card.md")
    found = summarise(outcome)
    _write_report(outcome, found, out)
    write_json(out / "summary.json", found)
    return found


def _write_model_card(outcome: Outcome, path: Path) -> None:
    settings = {"trainer": outcome.trainer, "strategy": "FedAvg()", "seed": str(outcome.job.seed),
                "data": repr(outcome.job.source), "voxel size": f"{outcome.job.source.spacing_mm:g} mm"}
    card = make_model_card(outcome.histories["federated"], name=path.parent.name, sites=outcome.sites,
                           scores=_groups(outcome.scores)["federated"], settings=settings, trace=verify(path.parent),
                           generated=not isinstance(outcome.job.source, Folder))
    path.unlink(missing_ok=True)
    card.save(path)


def caution(outcome: Outcome) -> str:
    """A sentence of warning if few patients are held out; empty if they suffice for a first impression."""
    held_out = sum(len(site.val) for site in outcome.sites)
    if held_out >= _FEW:
        return ""
    trained = sum(len(site.train) for site in outcome.sites)
    patients = "patient was" if held_out == 1 else "patients were"
    return (f"Only {held_out} {patients} held out and {trained} trained on: nothing generalises from so few, and these "
            "figures say nothing about other patients.")


def describe(found: dict[str, Any], *, note: str = "") -> str:
    """The summary in a few lines for a terminal, ending with `note`, such as `caution` gives."""
    rows = {_SPOKEN[arm]: dice for arm, dice in found["dice"].items()}
    rows["best intensity threshold, chosen with hindsight"] = found["thresholding"]
    for name, text in (("train", "federated, on the {} patients it was trained on"),
                       ("real", "federated model on {} real patients")):
        if name in found:
            rows[text.format(found[name]["patients"])] = found[name]["dice"]
    lines = [f"{'Dice on held-out patients':<44}" + "".join(f"{name:>8}" for name in _COLUMNS)]
    lines += [f"{text:<44}" + "".join(f"{dice[name]:8.3f}" for name in _COLUMNS if name in dice)
              for text, dice in rows.items()]
    seconds = found["seconds"]
    lines.append(f"{found['patients']} patients of {found['sites']} sites, {found['rounds']} rounds, seed "
                 f"{found['seed']}; {seconds['total']:.0f} s (data {seconds['data']:.0f}, training "
                 f"{seconds['train']:.0f}, evaluation {seconds['evaluate']:.0f})")
    return "\n".join([*lines, note] if note else lines)


def _write_report(outcome: Outcome, found: dict[str, Any], out: Path) -> None:
    job, dice = outcome.job, found["dice"]
    shown = [site.val[0] for site in outcome.sites if len(site.val)][:6]
    overlays = {arm: [outcome.predictions[arm][p.id] for p in shown] for arm in ("federated", "centralised")}
    overlays["local, the patient's own site"] = [outcome.predictions[_LOCAL + site.name][site.val[0].id]
                                                 for site in outcome.sites if len(site.val)][:6]
    figures = {
        "tumours": compare(shown, overlays),
        "dice": dice_by_arm(outcome.scores.assign(arm=_spoken_arms(outcome.scores))),
        "cross_site": cross_site_heatmap(cross_site(outcome.scores)),
        "curves": curves(outcome.histories),
        "sites": sites_figure(outcome.sites),
    }
    table = dice_table(outcome.scores).rename(index=_SPOKEN)
    sections = [
        Section(title="Accuracy", text=_rule(_groups(outcome.scores)["federated"]), table=table,
                figure=figures["dice"], caption="Dice of held-out patients of all sites, by a model's training data."),
        Section(title="The same patients by each model", figure=figures["tumours"],
                caption="One held-out patient of each site. White line: the reference's whole tumour."),
        Section(title="Every model on every site", figure=figures["cross_site"],
                caption="Mean Dice over WT, TC and ET of each model on each site's held-out patients."),
        Section(title="Training", figure=figures["curves"],
                caption="Mean training loss, and Dice on one held-out patient per site, by round."),
        Section(title="Sites", figure=figures["sites"], caption="Patients of each site and volumes of their tumours.",
                text=f"partition.json lists the training and held-out patients of each site (partition "
                     f"{outcome.partition.id}).", table=outcome.partition.table()),
    ]
    if outcome.train is not None:
        sections.insert(1, _scored(
            outcome.train, "The federated model on its own training patients. This shows whether it has learned them, "
            "not how well it segments others.", title="On the patients it was trained on"))
    if outcome.real is not None:
        figures["real"] = compare([p for p, _ in outcome.real_cases],
                                  {"federated": [labels for _, labels in outcome.real_cases]})
        sections.insert(-3, _scored(
            outcome.real, f"The federated model on {found['real']['patients']} real patients it has never seen, "
            f"resampled to {job.source.spacing_mm:g} mm.", title="On real scans", figure=figures["real"],
            caption="Reference and the federated model on real scans."))
    if outcome.contributions is not None:
        worth = outcome.contributions
        figures["contributions"] = contributions_figure(worth, metric="mean Dice")
        sections.insert(-2, Section(
            title="What each site contributed", table=worth.table, figure=figures["contributions"],
            caption="Shapley values and leave-one-out of the sites, from the updates of this run.",
            text=f"{worth.how}, from {worth.nobody:.3f} (untrained) to {worth.everybody:.3f} mean Dice on one held-out "
                 f"patient of each site. It took {worth.evaluations} evaluations, {worth.seconds:.0f} s and "
                 f"{worth.stored_bytes / 1e6:.0f} MB of stored updates. The values hold for these patients."))
    for name, figure in figures.items():
        save_figure(figure, out / "figures" / f"{name}.png")
    write_report(
        out / "report.html", title="Federated brain tumour segmentation", lead=_lead(outcome, found),
        results={f"mean Dice, {_SPOKEN[arm]}": f"{means['mean']:.2f}" for arm, means in dice.items()},
        sections=sections, versions=found["versions"],
        settings={**asdict(job), "trainer": outcome.trainer, "weights_sha256": found["weights_sha256"],
                  "seconds": found["seconds"]},
        notes=_notes(outcome))


def _spoken_arms(scores: pd.DataFrame) -> pd.Series[str]:
    named, groups = scores["arm"].copy(), _groups(scores)
    for group, text in (("local_own", "local, own patients"), ("local_others", "local, other sites' patients")):
        if group in groups:
            named[groups[group].index] = text
    return named


def _scored(scores: pd.DataFrame, text: str, **parts: Any) -> Section:
    return Section(text=f"{text} {_rule(scores)}", table=summary(scores)[["dice", "hd95_mm", "patients"]], **parts)


def _rule(scores: pd.DataFrame) -> str:
    return str(summary(scores).attrs["rule"])


def _lead(outcome: Outcome, found: dict[str, Any]) -> str:
    dice, job = found["dice"], outcome.job
    text = (f"{found['sites']} sites with {found['patients']} patients trained one network for {found['rounds']} "
            f"rounds without sharing a scan. On held-out patients it reaches a mean Dice of "
            f"{dice['federated']['mean']:.2f}; the same network with all data in one place reaches "
            f"{dice['centralised']['mean']:.2f}")
    if "local_others" in dice:
        text += f", and a site that trains alone {dice['local_others']['mean']:.2f} on the other sites' patients"
    text += f". All arms took the same number of gradient steps, {job.rounds * job.steps * found['sites']} in all."
    return f"{text} {caution(outcome)}".rstrip()


def _notes(outcome: Outcome) -> list[str]:
    held_out = sum(len(site.val) for site in outcome.sites)
    notes = [caution(outcome) or f"{held_out} held-out patients: differences of a few hundredths between arms can be "
             "chance; repeat with other seeds before drawing conclusions.",
             "Local models are each trained with a site's own share of the steps.",
             "No privacy technique was applied: updates left the sites unchanged, with no formal guarantee."]
    without = [site.name for site in outcome.sites if not len(site.val)]
    if without:
        notes.append(f"No patient is held out at: {', '.join(without)}. All patients there are training patients.")
    if isinstance(outcome.job.source, Folder):
        return notes
    return ["The patients are generated: real anatomy, simulated tumours and scanners.", *notes]
