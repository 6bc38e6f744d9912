"""The command line: `fedlab demo`, `run`, `resume`, `evaluate`, `verify`, `data`, `site`, `export` and `deploy`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlab.apps.cli_data import add_data, add_layout, read_shape
from fedlab.apps.cli_deploy import add_deploy
from fedlab.apps.cli_site import add_export, add_site
from fedlab.apps.cli_verify import add_verify
from fedlab.core.errors import FedlabError

__all__ = ["main"]

_ABOUT = """\
Privacy-preserving federated learning on 3-D brain-tumour MRI.

Begin with 'fedlab demo': it generates patients of several hospitals, trains one network on them without pooling
the scans, compares it with each hospital alone and with all data pooled, and writes a report. Then look at
notebooks/ ('make lab')."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status: 0 done, 1 an error that is explained, 130 interrupted.

    `fedlab data inspect` has one more, see its help.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int | None = options.command(options)
    except (FedlabError, ValueError, OSError) as error:
        print(f"fedlab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        run = options.out if getattr(options, "resumable", False) else None
        print(f"\nfedlab: interrupted{f'; continue with: fedlab resume {run}' if run else ''}", file=sys.stderr)
        return 130
    return status or 0


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("fedlab", description=_ABOUT, formatter_class=style)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="federated learning on generated patients, against the alternatives",
                               formatter_class=style, description=(
        "Trains three arms with equal numbers of gradient steps on generated patients: federated (FedAvg), all data\n"
        "pooled, and each site alone. Writes a run directory with report.html and summary.json."))
    demo.add_argument("--sites", type=int, help="number of sites (default 4)")
    demo.add_argument("--patients", type=int, help="of all sites together (default 18 per site; a third is held out)")
    demo.add_argument("--shape", type=read_shape, help="voxels of a volume, such as 48,64,48 (the default) or 64,64,64")
    demo.add_argument("--full", action="store_true",
                      help="13 sites and 285 patients at 64,64,64, of sizes as unequal as in a real study; takes far "
                           "longer")
    demo.add_argument("--real", metavar="DIR", help="also try the federated model on real scans (BraTS folder); they "
                                                    "are never trained on")
    _add_training(demo)
    demo.set_defaults(command=_demo)

    run = commands.add_parser("run", help="the same job on real scans", formatter_class=style, description=(
        "Trains the three arms on a folder of scans (any BraTS layout, FeTS, Medical Segmentation Decathlon, or a CSV\n"
        "table of paths; see 'fedlab data inspect') whose patients a CSV table with the columns\n"
        "Partition_ID,Subject_ID assigns to sites."))
    run.add_argument("--data", required=True, metavar="DIR", help="the folder of scans")
    run.add_argument("--sites", required=True, metavar="TABLE.csv", help="the institution table")
    run.add_argument("--spacing", type=float, default=3.0, metavar="MM", help="voxel size to train at (default 3 mm)")
    _add_reading(run)
    _add_training(run)
    run.set_defaults(command=_run)

    resume = commands.add_parser("resume", help="continue an interrupted demo or run, to the bit-equal result")
    resume.add_argument("out", type=Path, metavar="RUN", help="its run directory, such as runs/demo")
    resume.set_defaults(command=_resume)

    score = commands.add_parser("evaluate", help="run a trained model on a folder of scans", formatter_class=style,
                                description=(
        "Segments every patient of a folder of scans with a model.safetensors, writes the label maps as NIfTI on each\n"
        "patient's own grid, and scores them where there are expert labels."))
    score.add_argument("model", type=Path, metavar="MODEL", help="model.safetensors of a run")
    score.add_argument("--data", required=True, metavar="DIR", help="the folder of scans, or a CSV table of paths")
    _add_reading(score)
    score.add_argument("--out", type=Path, help="new directory for predictions and summary.json "
                                                "(default runs/evaluate-TIME)")
    score.set_defaults(command=_evaluate)

    add_verify(commands)
    add_data(commands)
    add_site(commands)
    add_export(commands)
    add_deploy(commands)
    return parser


def _add_reading(parser: argparse.ArgumentParser) -> None:
    add_layout(parser)
    parser.add_argument("--skip-broken", action="store_true", help="go on without patients whose files have errors")


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, help="federated rounds")
    parser.add_argument("--steps", type=int, help="gradient steps of a site per round")
    parser.add_argument("--seed", type=int, default=0, help="of data, first weights and training (default 0)")
    parser.add_argument("--out", type=Path, help="new run directory (default runs/NAME-TIME)")
    parser.add_argument("--keep", action="store_true",
                        help="keep prepared data and checkpoints (about 100 MB), after a resume too")
    parser.add_argument("--contributions", action="store_true",
                        help="work out what each site has contributed (Shapley values); needs space for every update, "
                             "about 5 MB a site and round")


def _given(**settings: Any) -> dict[str, Any]:
    """The settings that were given on the command line; the defaults stand in one place, the job."""
    return {name: value for name, value in settings.items() if value is not None}


def _new_run(out: Path | None, name: str) -> Path:
    return out if out is not None else Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _demo(options: argparse.Namespace) -> None:
    from fedlab.apps.comparison import Job
    from fedlab.apps.comparison_data import Phantoms

    given = _given(sites=options.sites, patients=options.patients, shape=options.shape)
    if options.full:
        source = Phantoms(**{"sites": 13, "patients": 285, "shape": (64, 64, 64), "held_out": 0.2, "equal": False,
                             **given})
    else:
        source = Phantoms(**{"patients": 18 * given.get("sites", Phantoms.sites), **given})
    job = Job(source=source, seed=options.seed, real=options.real, keep=options.keep,
              contributions=options.contributions, **_given(rounds=options.rounds, steps=options.steps))
    options.out = _new_run(options.out, "demo")
    _begin(job, options)


def _run(options: argparse.Namespace) -> None:
    from fedlab.apps.comparison import Job
    from fedlab.apps.comparison_data import Folder

    source = Folder(data=options.data, table=options.sites, spacing_mm=options.spacing, layout=options.layout,
                    label_convention=options.label_convention, skip_broken=options.skip_broken)
    job = Job(source=source, seed=options.seed, keep=options.keep, contributions=options.contributions,
              **_given(rounds=options.rounds, steps=options.steps))
    options.out = _new_run(options.out, "run")
    _begin(job, options)


def _begin(job: Any, options: argparse.Namespace) -> None:
    from fedlab.apps.comparison import open_job

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
    """Whether nothing is left to do in a run directory, which is then said."""
    done = (out / "summary.json").is_file()
    if done:
        print(f"{out} is complete: {out / 'report.html'}")
    return done


def _finish(job: Any, out: Path) -> None:
    from fedlab.apps.comparison import forget_working_files, run_job, sole_use
    from fedlab.apps.comparison_results import caution, describe, write_results

    with sole_use(out):
        if _complete(out):  # by another process, since this one began
            return
        print(f"fedlab: run directory {out}; interrupted, it continues with: fedlab resume {out}", flush=True)
        outcome = run_job(job, out)
        found = write_results(outcome, out)
        note = caution(outcome)
        if not job.keep:
            forget_working_files(out)
    print(describe(found, note=note))
    print(f"\nreport: {out / 'report.html'}")


def _evaluate(options: argparse.Namespace) -> None:
    from fedlab.apps.evaluation import describe_evaluation, evaluate_folder

    options.out = _new_run(options.out, "evaluate")
    print(describe_evaluation(evaluate_folder(options.model, Path(options.data), options.out, layout=options.layout,
                                              label_convention=options.label_convention,
                                              skip_broken=options.skip_broken)))
    print(f"\npredictions and summary.json: {options.out}")


if __name__ == "__main__":
    sys.exit(main())
