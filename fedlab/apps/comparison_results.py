"""The results of a comparison as files: tables, figures, the model card, the report and `summary.json`."""

from __future__ import annotations

import math
import platform
import shutil
import textwrap
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from fedlab import __version__
from fedlab.apps.comparison import Outcome
from fedlab.apps.comparison_data import Folder
from fedlab.core.extras import MissingExtra
from fedlab.core.files import packaged_toml, write_json, write_whole
from fedlab.core.regions import REGION_ORDER
from fedlab.core.text import counted
from fedlab.core.types import Patient
from fedlab.core.weights import weights_sha256
from fedlab.data.sites.persons import name_several
from fedlab.evidence.differences import Difference, differences, groups, verdict
from fedlab.run.trace import verify
from fedlab.training.metrics import summary, threshold_dice
from fedlab.view.colours import arm_label
from fedlab.view.label_layers import ViewSettings, make_case
from fedlab.view.live_viewer import live_viewer
from fedlab.view.model_card import make_model_card
from fedlab.view.report_page import Section, save_figure, write_report
from fedlab.view.run_figures import contributions_figure, cross_site_heatmap, curves, dice_by_arm
from fedlab.view.site_figures import sites_figure
from fedlab.view.slices import compare

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

__all__ = ["caution", "cross_site", "describe", "dice_table", "summarise", "versions", "write_results"]

_COLUMNS = (*REGION_ORDER, "mean")
#: Held-out patients below which their mean is no estimate for other patients.
_FEW = 20
#: Settings of a private arm, without a meaning where there is none.
_NOISE = ("delta", "clip")
_LIVE = 4  # patients in the 3-D view of a report
_ROWS = 8  # patients in its figure of tumours
_TEXTS = packaged_toml("fedlab.apps", "report.toml")


def _groups(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Rows of each compared group; local models form two, on their own and on the other sites' patients."""
    of_row = groups(scores)
    return {str(name): scores[of_row == name] for name in of_row.unique()}


def dice_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice of each arm (rows) for WT, TC, ET and their mean; `scores` as in `fedlab.apps.comparison.Outcome`."""
    columns = list(_COLUMNS)
    rows = {name: summary(group)["dice"][columns] for name, group in _groups(scores).items()}
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
    """The content of `summary.json`: verdict, Dice and differences of the arms, settings, weights' hash, versions.

    Scores are not rounded here, so that what a terminal or a page prints is rounded once.
    """
    table = dice_table(outcome.scores)
    federated = outcome.histories[outcome.main].state
    held_out = [patient for site in outcome.sites for patient in site.val]
    found: dict[str, Any] = {
        "main": outcome.main,
        "verdict": verdict(outcome.scores, outcome.main, names={arm: arm_label(arm) for arm in table.index}),
        "dice": {arm: row.to_dict() for arm, row in table.iterrows()},
        "differences": {rule: {arm: _as_json(one) for arm, one in differences(
            outcome.scores, outcome.main, empty=rule).items()} for rule in ("brats", "skip")},
        "empty_regions": _rule(_groups(outcome.scores)[outcome.main]),
        "thresholding": {"WT": threshold_dice(held_out).dice},
        "seconds": {name: round(value, 1) for name, value in outcome.seconds.items()},
        "patients": sum(len(site.train) + len(site.val) for site in outcome.sites),
        "sites": len(outcome.sites),
        "rounds": outcome.job.rounds,
        "seed": outcome.job.seed,
        "weights_sha256": weights_sha256(federated.params) if federated else None,
        "versions": versions(),
    }
    if (pooled := _watched(outcome, "pooled")) and outcome.main == "federated":
        last = pooled[max(pooled)]
        found["rounds_to_pooled"] = next(
            (n for n, dice in _watched(outcome, "federated").items() if dice >= last), None)
    if outcome.train is not None:
        found["train"] = {"patients": sum(len(site.train) for site in outcome.sites),
                          "dice": summary(outcome.train)["dice"][list(_COLUMNS)].to_dict()}
    if outcome.real is not None:
        found["real"] = {"patients": int(outcome.real["patient"].nunique()),
                         "dice": summary(outcome.real)["dice"][list(REGION_ORDER)].to_dict()}
    return found


def _watched(outcome: Outcome, model: str) -> dict[int, float]:
    """Dice of one held-out patient per site after those rounds, counted from 1, in which a model was watched."""
    records = outcome.histories[model].published().records if model in outcome.histories else []
    return {record["round"] + 1: record["metrics"]["Dice"] for record in records if "Dice" in record["metrics"]}


def _reached(found: dict[str, Any]) -> str:
    if "rounds_to_pooled" not in found:
        return ""
    rounds = found["rounds_to_pooled"]
    return _text("lead", "reached" if rounds else "behind", rounds=rounds)


def _as_json(one: Difference) -> dict[str, Any]:
    """A difference as plain values; None where there is no interval."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(one).items()}


def _rule(scores: pd.DataFrame) -> str:
    """How empty regions count, in words, with the number of such cases."""
    return str(summary(scores).attrs["rule"])


def write_results(outcome: Outcome, out: Path) -> dict[str, Any]:
    """Writes the results into the run directory and returns the summary.

    Files, in addition to model.safetensors, partition.json, trace.jsonl and rounds.csv (every number of every round)
    of the job: scores.csv, dice.csv, cross_site.csv, train.csv and real.csv for real scans, contributions.csv if the
    job asks for it, history.json, model_card.md, figures/, report.html, and last summary.json, which marks the run as
    complete. Files that an interrupted attempt left are overwritten.
    """
    for name in ("report.html", "model_card.md"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "figures", ignore_errors=True)
    worth = outcome.contributions
    for name, text in {
        "scores": outcome.scores.to_csv(index=False),
        "dice": dice_table(outcome.scores).to_csv(index_label="arm"),
        "cross_site": cross_site(outcome.scores).to_csv(),
        "train": None if outcome.train is None else outcome.train.to_csv(index=False),
        "real": None if outcome.real is None else outcome.real.to_csv(index=False),
        "contributions": None if worth is None else worth.table.to_csv(),
    }.items():
        if text is not None:
            write_whole(out / f"{name}.csv", text.encode())
    write_json(out / "history.json", {arm: history.published().records for arm, history in outcome.histories.items()})
    _write_model_card(outcome, out / "model_card.md")
    found = summarise(outcome)
    _write_report(outcome, found, out)
    write_json(out / "summary.json", found)
    return found


def _write_model_card(outcome: Outcome, path: Path) -> None:
    settings = {"arm": repr(outcome.arms[outcome.main]), "seed": str(outcome.job.seed),
                "data": repr(outcome.job.source), "voxel size": f"{outcome.job.source.spacing_mm:g} mm"}
    make_model_card(outcome.histories[outcome.main], name=path.parent.name, sites=outcome.sites,
                    scores=_groups(outcome.scores)[outcome.main], settings=settings, trace=verify(path.parent),
                    generated=not isinstance(outcome.job.source, Folder)).save(path)


def caution(outcome: Outcome) -> str:
    """A sentence of warning if few patients are held out; empty if they suffice for a first impression."""
    held_out = sum(len(site.val) for site in outcome.sites)
    if held_out >= _FEW:
        return ""
    return _text("notes", "few", held_out=held_out, patients="patient was" if held_out == 1 else "patients were",
                 trained=sum(len(site.train) for site in outcome.sites))


def describe(found: dict[str, Any], *, note: str = "") -> str:
    """The summary in a few lines for a terminal, ending with the verdict, and `note`, such as `caution` gives."""
    rows = {arm_label(arm): dice for arm, dice in found["dice"].items()}
    rows["best intensity threshold, chosen with hindsight"] = found["thresholding"]
    for name, text in (("train", "{}, on the {} patients it was trained on"), ("real", "{} model on {} real patients")):
        if name in found:
            rows[text.format(found["main"], found[name]["patients"])] = found[name]["dice"]
    lines = [f"{'Dice on held-out patients':<44}" + "".join(f"{name:>8}" for name in _COLUMNS)]
    lines += [f"{text:<44}" + "".join(f"{dice[name]:8.3f}" for name in _COLUMNS if name in dice)
              for text, dice in rows.items()]
    lines.append(found["empty_regions"])
    seconds = found["seconds"]
    lines.append(f"{counted(found['patients'], 'patient')} of {counted(found['sites'], 'site')}, "
                 f"{counted(found['rounds'], 'round')}, seed "
                 f"{found['seed']}; {seconds['total']:.0f} s (data {seconds['data']:.0f}, training "
                 f"{seconds['train']:.0f}, evaluation {seconds['evaluate']:.0f})")
    lines += [text for text in (_reached(found), note) if text]
    return "\n".join([*lines, "", *textwrap.wrap(found["verdict"], 100)])


def _write_report(outcome: Outcome, found: dict[str, Any], out: Path) -> None:
    sections = _sections(outcome, found)
    for name, section in sections.items():
        if section.figure is not None:
            save_figure(section.figure, out / "figures" / f"{name}.png")
    write_report(
        out / "report.html", title=_TEXTS["title"], lead=_lead(outcome, found), verdict=found["verdict"],
        results={f"mean Dice, {arm_label(arm)}": f"{means['mean']:.2f}" for arm, means in found["dice"].items()},
        sections=list(sections.values()), versions=found["versions"],
        settings=_settings(outcome, found), notes=_notes(outcome, found))


def _settings(outcome: Outcome, found: dict[str, Any]) -> dict[str, str]:
    """The settings as the report shows them: in words, folders by their names alone."""
    job, seconds = outcome.job, found["seconds"]
    values = {name: value for name, value in {**asdict(job.source), **asdict(job)}.items()
              if name in _TEXTS["settings"] and value is not None and (job.epsilon is not None or name not in _NOISE)}
    shown = {_TEXTS["settings"][name]: _shown(value) for name, value in values.items()}
    arms = {f"arm: {name}": repr(arm) for name, arm in outcome.arms.items()}
    return {"data": _TEXTS["sources"][type(job.source).__name__], **shown, **arms,
            "SHA-256 of the weights": found["weights_sha256"],
            "seconds": ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())}


def _shown(value: Any) -> str:
    """A setting for a reader; a path without the folders above it."""
    if isinstance(value, str):
        return Path(value).name
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sections(outcome: Outcome, found: dict[str, Any]) -> dict[str, Section]:
    """The sections of the report, by the names of their figures."""
    job, worth = outcome.job, outcome.contributions
    first = {site.name: site.val[0] for site in outcome.sites if len(site.val)}
    shown = list(first.values())[:_ROWS]
    overlays = {}
    for name, arm in outcome.arms.items():
        of_patient = {p: outcome.predictions.get(name) or outcome.predictions[f"{name} {site}"]
                      for site, p in first.items()}
        overlays[arm_label(f"{name}_own") if arm.data == "each" and arm.rounds else name] = [
            labels[p.id] for p, labels in of_patient.items()][:_ROWS]
    sections = {"dice": _section(
        "dice", rule=found["empty_regions"], table=dice_table(outcome.scores).rename(index=arm_label),
        figure=dice_by_arm(outcome.scores.assign(arm=groups(outcome.scores))))}
    if outcome.train is not None:
        sections["train"] = _section("train", rule=_rule(outcome.train), table=_means(outcome.train))
    sections["tumours"] = _section("tumours", whose=_whose(len(shown), len(first)), figure=compare(shown, overlays))
    sections["live"] = _live_section(shown[:_LIVE], overlays)
    if outcome.real is not None:
        patients, labels = zip(*outcome.real_cases, strict=True)
        sections["real"] = _section(
            "real", patients=found["real"]["patients"], spacing_mm=job.source.spacing_mm, rule=_rule(outcome.real),
            table=_means(outcome.real), figure=compare(list(patients), {outcome.main: list(labels)}))
    sections["cross_site"] = _section("cross_site", figure=cross_site_heatmap(cross_site(outcome.scores)))
    if worth is not None:
        sections["contributions"] = _section(
            "contributions", method=worth.method, start=worth.start, end=worth.end, evaluations=worth.evaluations,
            seconds=worth.seconds, megabytes=worth.stored_bytes / 1e6, table=worth.table,
            figure=contributions_figure(worth, metric="mean Dice"))
    if any(column in history.table() for history in outcome.histories.values() for column in ("loss", "Dice")):
        sections["curves"] = _section("curves", reached=_reached(found), figure=curves(outcome.histories))
    sections["sites"] = _section("sites", partition=outcome.partition.id, table=outcome.partition.table(),
                                 figure=sites_figure(outcome.sites))
    return sections


def _whose(shown: int, sites: int) -> str:
    """Which sites have a patient in the figure."""
    return "each site" if shown == sites else f"each of the first {shown} sites"


def _live_section(patients: list[Patient], overlays: dict[str, list[torch.Tensor]]) -> Section:
    """Patients in 3-D with every arm, or the command that installs what this needs."""
    cases = [make_case(patient, {name: labels[number] for name, labels in overlays.items()})
             for number, patient in enumerate(patients)]
    first = next(iter(overlays))
    try:
        live = live_viewer(cases, ViewSettings(layer=first, crosshair=cases[0].centre()))
    except MissingExtra as missing:
        return Section(title=_TEXTS["sections"]["live"]["title"], text=str(missing))
    return Section(**_TEXTS["sections"]["live"], live=live)


def _section(name: str, *, table: pd.DataFrame | None = None, figure: Figure | None = None,
             **values: Any) -> Section:
    """A section with its texts from report.toml, in which the values are filled in."""
    texts = {key: text.format(**values) for key, text in _TEXTS["sections"][name].items()}
    return Section(**texts, table=table, figure=figure)


def _text(group: str, name: str, **values: Any) -> str:
    return " ".join(str(_TEXTS[group][name]).format(**values).split())


def _means(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice, median HD95 and the patients that count, by region."""
    table = summary(scores)[["dice", "patients"]]
    table.insert(1, "median HD95 [mm]", scores.groupby("region")["hd95_mm"].median())
    return table.rename(columns={"dice": "mean Dice"})


def _lead(outcome: Outcome, found: dict[str, Any]) -> str:
    how = "federation" if outcome.arms[outcome.main].data == "sites" else "other"
    steps = {arm: sum(int(numbers["steps"]) for record in history.published().records
                      for numbers in record["sites"].values())
             for arm, history in outcome.histories.items()}
    by_arm = {name: sum(n for model, n in steps.items() if model == name or model.startswith(f"{name} "))
              for name in outcome.arms}
    trained = {name: count for name, count in by_arm.items() if count}
    all_known = set(trained) == {name for name, arm in outcome.arms.items() if arm.rounds}
    shared = any(arm.data == "each" and arm.rounds for arm in outcome.arms.values())
    equal = "unequal" if not all_known or len(set(trained.values())) > 1 else "shares" if shared else "equal"
    held_out = sum(len(site.val) for site in outcome.sites)
    said = [_text("lead", how, rounds=outcome.arms[outcome.main].rounds, sites=found["sites"],
                  patients=found["patients"], trained=found["patients"] - held_out, held_out=held_out),
            _text("lead", equal, steps=max(by_arm.values()),
                  by_arm=", ".join(f"{name} {n:,}" for name, n in trained.items()))]
    rates = {name: outcome.arms[name].trainer.lr for name in trained}
    rates = {name: getattr(rate, "start", rate) for name, rate in rates.items()}
    if all(isinstance(rate, int | float) for rate in rates.values()) and len(set(rates.values())) > 1:
        said.append(_text("lead", "rates", by_arm=", ".join(f"{name} {rate}" for name, rate in rates.items())))
    averaged = [name for name in trained if outcome.arms[name].trainer.momentum == "average"]
    if averaged:
        said.append(_text("lead", "moments", arms=", ".join(averaged)))
    return " ".join([*said, caution(outcome)]).rstrip()


def _notes(outcome: Outcome, found: dict[str, Any]) -> list[str]:
    generated = [] if isinstance(outcome.job.source, Folder) else [_text("notes", "generated")]
    held_out = sum(len(site.val) for site in outcome.sites)
    without = ", ".join(site.name for site in outcome.sites if not len(site.val))
    several = name_several(outcome.partition.patients)
    protected = {name: arm for name, arm in outcome.arms.items() if arm.privacy or arm.aggregation}
    privacy = [f"{name}: {arm.privacy or arm.aggregation!r}: {outcome.histories[name].guarantee()}."
               for name, arm in protected.items() if name in outcome.histories] or [_text("notes", "privacy")]
    if protected and not generated:
        privacy.append(_text("notes", "covered"))
    narrow = outcome.job.start == "collection" and not outcome.job.arms
    return [*generated, caution(outcome) or _text("notes", "chance", held_out=held_out), *privacy,
            *([_text("notes", "windows")] if narrow else []),
            _text("notes", "empty", arm=outcome.main, rule=found["empty_regions"]),
            *([_text("notes", "without", names=without)] if without else []), *([f"{several}."] if several else [])]
