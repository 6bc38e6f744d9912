"""The commands for runs: `fedlab demo`, `run`, `resume`, `evaluate` and `verify`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedlab.apps.cli_arguments import add_command, add_reading, new_path, read_shape

__all__ = ["add_runs"]


def add_runs(commands: Any) -> None:
    """Adds `demo`, `run`, `resume`, `evaluate` and `verify` to argparse's sub-parsers."""
    demo = add_command(commands, "demo", _demo, help="federated learning on generated patients, against the "
                       "alternatives", about="""
        Trains three arms with equal numbers of gradient steps on generated patients: federated (FedAvg), all data
        pooled, and each site alone. Writes a run directory with report.html and summary.json.""")
    demo.add_argument("--sites", type=int, help="number of sites (default 4)")
    demo.add_argument("--patients", type=int, help="patients of all sites together (default 18 per site; a third is "
                                                   "held out)")
    demo.add_argument("--shape", type=read_shape, help="voxels of a volume, such as 48,64,48 (the default) or 64,64,64")
    demo.add_argument("--full", action="store_true",
                      help="13 sites and 285 patients at 64,64,64, of sizes as unequal as in a real study; takes far "
                           "longer")
    demo.add_argument("--real", metavar="DIR", help="also evaluate the federated model on real scans (BraTS folder); "
                                                    "no model is trained on them")
    _add_training(demo)

    run = add_command(commands, "run", _run, help="the same comparison on real scans", about="""
        Trains the three arms on a folder of scans: any BraTS layout, FeTS, Medical Segmentation Decathlon, or a CSV
        table of paths (see 'fedlab data inspect'). A CSV table with the columns Partition_ID,Subject_ID assigns the
        patients to sites.""")
    run.add_argument("--data", required=True, metavar="DIR", help="the folder of scans")
    run.add_argument("--sites", required=True, metavar="TABLE.csv", help="the institution table")
    run.add_argument("--spacing", type=float, default=3.0, metavar="MM", help="voxel size to train at (default 3 mm)")
    add_reading(run)
    _add_training(run)

    resume = add_command(commands, "resume", _resume,
                         help="continue an interrupted demo or run, to the bit-equal result")
    resume.add_argument("out", type=Path, metavar="RUN", help="its run directory, such as runs/demo")

    evaluate = add_command(commands, "evaluate", _evaluate, help="run a trained model on a folder of scans", about="""
        Segments every patient of a folder of scans with a model.safetensors. Writes the label maps as NIfTI on each
        patient's own grid, and scores them where there are expert labels.""")
    evaluate.add_argument("model", type=Path, metavar="MODEL", help="model.safetensors of a run")
    evaluate.add_argument("--data", type=Path, required=True, metavar="DIR",
                          help="the folder of scans, or a CSV table of paths")
    add_reading(evaluate)
    evaluate.add_argument("--out", type=Path,
                          help="new directory for predictions and summary.json (default runs/evaluate-TIME)")

    verify = add_command(commands, "verify", _verify, help="check a run's trace and its model against tampering",
                         about="""
        Checks the trace of a run. It has one line per round: which sites took part with which weight, which were
        absent and why, and hashes of the model before and after. Each line holds the hash of the line before. A line
        that was changed, removed, added or moved is found and named; the saved model must be the one that the trace
        ends with.

        A person who can write the file can also rewrite all of it. Note the head, the hash of the last line, where
        others cannot change it, and pass it later:

          fedlab verify runs/demo                    prints the head
          fedlab verify runs/demo --head 3f9a...     fails unless that line is still there

        Exit status: 0 the trace is whole, 1 it is not.""")
    verify.add_argument("path", type=Path, metavar="RUN", help="run directory, or a trace.jsonl")
    verify.add_argument("--head", metavar="HASH", help="the head noted earlier")


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, help="federated rounds")
    parser.add_argument("--steps", type=int, help="gradient steps of a site per round")
    parser.add_argument("--seed", type=int, default=0, help="of data, first weights and training (default 0)")
    parser.add_argument("--out", type=Path, help="new run directory (default runs/NAME-TIME)")
    parser.add_argument("--keep", action="store_true",
                        help="keep prepared data and checkpoints (about 100 MB), after a resume too")
    parser.add_argument("--contributions", action="store_true",
                        help="compute what each site contributed (Shapley values); stores every update, about 5 MB per "
                             "site and round")


def _given(**settings: Any) -> dict[str, Any]:
    """The settings given on the command line; the defaults stand in one place, the job."""
    return {name: value for name, value in settings.items() if value is not None}


def _demo(options: argparse.Namespace) -> None:
    from fedlab.apps.comparison_data import Phantoms

    given = _given(sites=options.sites, patients=options.patients, shape=options.shape)
    if options.full:
        source = Phantoms(**{"sites": 13, "patients": 285, "shape": (64, 64, 64), "held_out": 0.2, "equal": False,
                             **given})
    else:
        source = Phantoms(**{"patients": 18 * given.get("sites", Phantoms.sites), **given})
    _begin(options, "demo", source, real=options.real)


def _run(options: argparse.Namespace) -> None:
    from fedlab.apps.comparison_data import Folder

    _begin(options, "run", Folder(data=options.data, table=options.sites, spacing_mm=options.spacing,
                                  layout=options.layout, label_convention=options.label_convention,
                                  skip_broken=options.skip_broken))


def _begin(options: argparse.Namespace, name: str, source: Any, **settings: Any) -> None:
    import fedlab.apps.comparison_results  # noqa: F401  # needs the extra lab: refused before a folder is made
    from fedlab.apps.comparison import Job, open_job

    job = Job(source=source, seed=options.seed, keep=options.keep, contributions=options.contributions, **settings,
              **_given(rounds=options.rounds, steps=options.steps))
    options.out = new_path(options.out, name)
    open_job(job, options.out)
    options.resumable = True
    _finish(job, options.out)


def _resume(options: argparse.Namespace) -> None:
    from fedlab.apps.comparison import read_job

    job = read_job(options.out)
    if not _complete(options.out):
        options.resumable = True
        _finish(job, options.out)


def _complete(out: Path) -> bool:
    """Whether nothing is left to do in a run directory; prints that."""
    done = (out / "summary.json").is_file()
    if done:
        print(f"{out} is complete: {out / 'report.html'}")
    return done


def _finish(job: Any, out: Path) -> None:
    from fedlab.apps.comparison import remove_working_files, run_job, sole_use
    from fedlab.apps.comparison_results import caution, describe, write_results

    with sole_use(out):
        if _complete(out):  # by another process, since this one began
            return
        print(f"fedlab: run directory {out}; interrupted, it continues with: fedlab resume {out}", flush=True)
        outcome = run_job(job, out)
        found = write_results(outcome, out)
        if not job.keep:
            remove_working_files(out)
    print(describe(found, note=caution(outcome)))
    print(f"\nreport: {out / 'report.html'}")


def _evaluate(options: argparse.Namespace) -> None:
    from fedlab.apps.evaluation import describe_evaluation, evaluate_folder

    options.out = new_path(options.out, "evaluate")
    result = evaluate_folder(options.model, options.data, options.out, layout=options.layout,
                             label_convention=options.label_convention, skip_broken=options.skip_broken)
    print(f"{describe_evaluation(result)}\n\npredictions and summary.json: {options.out}")


def _verify(options: argparse.Namespace) -> int:
    from fedlab.run.trace import verify

    verdict = verify(options.path, head=options.head)
    print(verdict)
    return 0 if verdict.ok else 1
