"""The commands for runs and models, from `demo` and `run` to `report`, `verify` and `runs`."""

from __future__ import annotations

import argparse
import json
import sys
import webbrowser
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fedlab.apps.cli_arguments import (
    FLAG,
    HELP,
    LAYOUT,
    READING,
    REQUIRED_PATH,
    Arguments,
    add_command,
    new_path,
    read_shape,
)

__all__ = ["add_runs"]

_TRAINING: Arguments = {
    "--rounds": {"type": int}, "--steps": {"type": int}, "--start": {"choices": ("collection", "broad", "random")},
    "--from-scratch": {"dest": "start", "action": "store_const", "const": "random"},
    "--seed": {"type": int, "default": 0}, "--out": {"type": Path},
    "--keep": FLAG, "--contributions": FLAG, "--json": FLAG}

_PRIVACY: Arguments = {
    "--epsilon": {"type": float, "metavar": "E"}, "--delta": {"type": float, "metavar": "D"},
    "--clip": {"type": float, "metavar": "NORM"}}

_ARMS: Arguments = {"--arms": {"type": Path, "metavar": "FILE.py"}}


#: The page of `demo` and `run`, and the page of `assess` and `evaluate`.
_PAGES = ("report.html", "page.html")

#: Patients per site, rounds and steps of a demo in a minute.
_QUICK = {"patients": 5, "rounds": 4, "steps": 3}


def add_runs(commands: Any) -> None:
    """Adds the commands for runs and models to argparse's sub-parsers."""
    add_command(commands, "demo", _demo, {
        "--sites": {"type": int}, "--patients": {"type": int}, "--shape": {"type": read_shape},
        "--spacing": {"type": float, "metavar": "MM"}, "--full": FLAG, "--quick": FLAG,
        "--real": {"metavar": "DIR"}, **_TRAINING, **_PRIVACY, **_ARMS})
    add_command(commands, "run", _run, {
        "--data": {"required": True, "metavar": "DIR"}, "--sites": {"required": True, "metavar": "TABLE.csv"},
        "--spacing": {"type": float, "default": 3.0, "metavar": "MM"}, **READING, **_TRAINING, **_PRIVACY,
        **_ARMS})
    add_command(commands, "assess", _assess, {
        "file": {"type": Path, "nargs": "?", "metavar": "FILE.py"}, "--data": {"metavar": "DIR"},
        "--sites": {"metavar": "TABLE.csv"}, "--spacing": {"type": float, "default": 3.0, "metavar": "MM"}, **READING,
        "--rounds": {"type": int}, "--steps": {"type": int}, "--seeds": {"type": int, "default": 3},
        "--out": {"type": Path}, "--keep": FLAG, "--json": FLAG})
    add_command(commands, "resume", _resume, {"out": {"type": Path, "metavar": "RUN"}, "--json": FLAG})
    add_command(commands, "evaluate", _evaluate, {
        "model": {"type": Path, "metavar": "MODEL", "nargs": "?"},
        "--public": {"nargs": "?", "const": "broad", "choices": ("broad", "collection")},
        "--data": {**REQUIRED_PATH, "metavar": "DIR"}, **READING,
        "--spacing": {"type": float, "metavar": "MM"}, "--out": {"type": Path}, "--json": FLAG})
    add_command(commands, "show", _show, {
        "scan": {"type": Path, "metavar": "SCAN"}, "--model": {"type": Path, "metavar": "MODEL"},
        "--public": {"nargs": "?", "const": "broad", "choices": ("broad", "collection")},
        "--prediction": {"type": Path, "metavar": "FILE"}, **LAYOUT, "--spacing": {"type": float, "metavar": "MM"},
        "--out": {"type": Path, "metavar": "FILE"}})
    add_command(commands, "report", _report, {"run": {"type": Path, "metavar": "RUN"}, "--open": FLAG})
    add_command(commands, "verify", _verify, {
        "path": {"type": Path, "metavar": "RUN"}, "--head": {"metavar": "HASH"}, "--json": FLAG})
    add_command(commands, "runs", _runs, {
        "folder": {"type": Path, "nargs": "?", "default": Path("runs"), "metavar": "DIR"},
        "--sort": {"default": "begun", "metavar": "COLUMN", "dest": "by"}, "--json": FLAG})


def _given(**settings: Any) -> dict[str, Any]:
    """The settings given on the command line; the defaults stand in one place, the job."""
    return {name: value for name, value in settings.items() if value is not None}


def _demo(options: argparse.Namespace) -> None:
    from fedlab.apps.comparison_data import Phantoms, equal_sizes
    from fedlab.data.phantom.population import site_sizes

    sites, patients = options.sites, options.patients
    if sites is not None and sites < 1:
        raise ValueError(f"a comparison needs at least one site, got {sites}")
    if options.quick:
        if options.full:
            raise ValueError("give --quick or --full, not both")
        sites = 2 if sites is None else sites
        patients = _QUICK["patients"] * sites if patients is None else patients
        options.rounds = _QUICK["rounds"] if options.rounds is None else options.rounds
        options.steps = _QUICK["steps"] if options.steps is None else options.steps
        print(HELP["demo"]["quick"].strip(), file=sys.stderr)
    settings = _given(shape=options.shape, spacing_mm=options.spacing)
    if options.full:
        sites, patients = 13 if sites is None else sites, 285 if patients is None else patients
        settings = {"sizes": tuple(site_sizes(sites, patients)), "shape": (64, 64, 64), "held_out": 0.2,
                    **settings}
    elif (sites, patients) != (None, None):
        sites = len(Phantoms.sizes) if sites is None else sites
        settings |= {"sizes": equal_sizes(sites, 12 * sites if patients is None else patients),
                     "held_out": 1 if options.quick else 1 / 3}
    _begin(options, "demo", Phantoms(**settings), start=options.start or "collection", real=options.real)


def _run(options: argparse.Namespace) -> None:
    from fedlab.apps.comparison_data import Folder

    _begin(options, "run", Folder(data=options.data, table=options.sites, spacing_mm=options.spacing,
                                  layout=options.layout, label_convention=options.label_convention,
                                  skip_broken=options.skip_broken), start=options.start or "broad")


def _assess(options: argparse.Namespace) -> None:
    from fedlab.apps.assessing import assess_file
    from fedlab.apps.comparison import Job, remove_working_files
    from fedlab.apps.comparison_data import Folder, Phantoms

    if (options.data is None) != (options.sites is None):
        raise ValueError("--data and --sites go together: a folder of scans, and the table of its sites")
    source = Phantoms() if options.data is None else Folder(
        data=options.data, table=options.sites, spacing_mm=options.spacing, layout=options.layout,
        label_convention=options.label_convention, skip_broken=options.skip_broken)
    options.out = new_path(options.out, "assess")
    say = partial(print, file=sys.stderr if options.json else sys.stdout, flush=True)
    say(f"fedlab: run directory {options.out}; interrupted, it continues with the same command and --out {options.out}")
    found = assess_file(Job(source=source, **_given(rounds=options.rounds, steps=options.steps)), options.out,
                        file=options.file, seeds=options.seeds)
    if not options.keep:
        remove_working_files(options.out)
    print(json.dumps(found.as_json(), indent=1, allow_nan=False) if options.json else
          "\n".join([*found.sentences().values(), "", found.table().T.to_string()]))
    say(f"\npage: {options.out / 'page.html'}")


def _begin(options: argparse.Namespace, name: str, source: Any, **settings: Any) -> None:
    import fedlab.apps.comparison_results  # noqa: F401  # needs the extra lab: refused before a folder is made
    from fedlab.apps.comparison import Job, open_job

    given = _given(rounds=options.rounds, steps=options.steps, epsilon=options.epsilon, delta=options.delta,
                   clip=options.clip)
    if options.arms is not None and (given or options.start or options.contributions):
        raise ValueError(f"{options.arms} says how its arms train; leave --rounds, --steps, --start, --epsilon and "
                         "--contributions out")
    if options.epsilon is None and (options.delta, options.clip) != (None, None):
        raise ValueError("--delta and --clip belong to a guarantee: say --epsilon too")
    if settings["start"] == "random":
        given = {"rounds": 33, "steps": 10, "lr": 3e-3, "lr_pooled": 3e-3, "lr_local": 3e-3, **given}
    job = Job(source=source, seed=options.seed, keep=options.keep, contributions=options.contributions,
              arms=options.arms is not None, **settings, **given)
    options.out = new_path(options.out, name)
    open_job(job, options.out, arms=options.arms)
    options.resumable = True
    _finish(job, options)


def _resume(options: argparse.Namespace) -> None:
    from fedlab.apps.comparison import read_job

    job = read_job(options.out)
    if not _complete(job, options):
        options.resumable = True
        _finish(job, options)


def _complete(job: Any, options: argparse.Namespace) -> bool:
    """Whether nothing is left to do in a run directory; prints that."""
    from fedlab.apps.comparison import data_changed
    from fedlab.core.errors import DataError

    out = options.out
    if not (out / "summary.json").is_file():
        return False
    say = partial(print, file=sys.stderr if options.json else sys.stdout)
    say(f"{out} is complete: {out / 'report.html'}")
    try:
        changed = data_changed(job, out)
    except DataError:  # the report stands without the scans
        changed = False
    if changed:
        say("The scans or their table have changed since this run read them; its report describes them as they were. "
            "Train on the changed ones in a new run.")
    if options.json:
        print((out / "summary.json").read_text(encoding="utf-8"))
    return True


def _finish(job: Any, options: argparse.Namespace) -> None:
    from fedlab.apps.comparison import remove_working_files, run_job, sole_use
    from fedlab.apps.comparison_results import caution, describe, write_results

    out, say = options.out, partial(print, file=sys.stderr if options.json else sys.stdout, flush=True)
    with sole_use(out):
        if _complete(job, options):  # by another process, since this one began
            return
        say(f"fedlab: run directory {out}; interrupted, it continues with: fedlab resume {out}")
        outcome = run_job(job, out)
        found = write_results(outcome, out)
        if not job.keep:
            remove_working_files(out)
    print((out / "summary.json").read_text(encoding="utf-8") if options.json else
          describe(found, note=caution(outcome)))
    say(f"\nreport: {out / 'report.html'}")


def _evaluate(options: argparse.Namespace) -> None:
    import pandas as pd

    from fedlab.apps.evaluation import describe_evaluation, evaluate_folder
    from fedlab.training.public_model import public_file

    if (options.model is None) == (options.public is None):
        raise ValueError("give either the file of a model or --public, for a model that fedlab brings along")
    model = options.model or public_file(options.public)
    name = f"Public model '{options.public}'" if options.public else ""
    options.out = new_path(options.out, "evaluate")
    result = evaluate_folder(model, options.data, options.out, layout=options.layout,
                             label_convention=options.label_convention, skip_broken=options.skip_broken,
                             spacing_mm=options.spacing, name=name)
    if options.json:
        print((options.out / "summary.json").read_text(encoding="utf-8"))
    else:
        scores = pd.read_csv(options.out / "scores.csv", dtype={"patient": str})
        print(f"{describe_evaluation(result, scores)}\n\npredictions and summary.json: {options.out}")
    page = options.out / "page.html"
    if page.is_file():
        print(f"page with pictures: {page}", file=sys.stderr if options.json else sys.stdout)


def _show(options: argparse.Namespace) -> None:
    from fedlab.apps.evaluation import open_model
    from fedlab.apps.scan_page import scan_page
    from fedlab.training.public_model import public_file

    model, spacing = None, options.spacing
    if sum(one is not None for one in (options.model, options.public, options.prediction)) > 1:
        raise ValueError("give one of --model, --public and --prediction")
    if options.model is not None or options.public:
        model, spacing = open_model(options.model or public_file(options.public), spacing)
    page = new_path(options.out, "show", ".html")
    scan_page(options.scan, page, prediction=options.prediction, model=model, spacing_mm=spacing,
              layout=options.layout, label_convention=options.label_convention)
    print(f"page: {page}")


def _report(options: argparse.Namespace) -> None:
    from fedlab.core.errors import RunError

    run: Path = options.run
    if not run.is_dir():
        raise RunError(f"there is no run directory {run}; 'fedlab runs' lists those in runs/")
    page = next((run / name for name in _PAGES if (run / name).is_file()), None)
    if page is None and (run / "job.json").is_file():
        raise RunError(f"{run} is not finished and has no report yet; continue it with: fedlab resume {run}")
    if page is None:
        raise RunError(f"{run} holds no report; expected a run directory with {' or '.join(_PAGES)}")
    print(page)
    if options.open and not webbrowser.open(page.resolve().as_uri()):
        raise RunError(f"found no browser on this machine; copy {page} to one that has one: it is one file")


def _verify(options: argparse.Namespace) -> int:
    from fedlab.run.trace import verify

    verdict = verify(options.path, head=options.head)
    print(json.dumps({**asdict(verdict), "path": str(verdict.path), "ok": verdict.ok}) if options.json else verdict)
    return 0 if verdict.ok else 1


def _runs(options: argparse.Namespace) -> None:
    from fedlab.evidence.runs import runs

    found = runs(options.folder)
    print(json.dumps(found.as_json(), indent=1, allow_nan=False) if options.json else found.text(by=options.by))
