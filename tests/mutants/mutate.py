"""Mutation testing: wrong code is made one change at a time, and the tests of its package should notice each.

    make mutants                        everything below, resumable: a night
    make mutants BASE=main              lines changed since a commit, at most 10 minutes
    make mutants ARGS="--share 0.05"    a twentieth of all lines, drawn at random: an estimate in hours
    make mutants ARGS="fedlab/run/trace.py --tests tests/run/test_trace.py"

The tool is mutmut. It imports torch and the tests once and forks a process per mutant, which takes less than a second;
it runs only the tests that reach the function, and continues where it was stopped. cosmic-ray starts Python for every
mutant, which is 6 seconds here before the first test. What mutmut lacks is here: one file at a time with the tests that
name it, only changed lines, and a list of mutants that are judged equivalent (equivalent.toml).

Texts of errors are not mutated, nor code outside of functions, such as default values: mutmut can't.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs" / "mutants"
EQUIVALENT = Path(__file__).with_name("equivalent.toml")
#: What is mutated, and the share of mutants, without the equivalent ones, that tests should notice.
GOALS = {"core": 80, "privacy": 90, "strategies": 90, "run": 90, "training/metrics.py": 90, "data/readers": 80,
         "deploy/policy.py": 80, "deploy/required.py": 80}
SETTINGS = """[mutmut]
source_paths=fedlab
only_mutate={path}
pytest_add_cli_args_test_selection=
    {tests}
timeout_multiplier=4
timeout_constant=20
"""


def goal_of(path: str) -> int | None:
    return next((goal for part, goal in GOALS.items() if path.startswith(f"fedlab/{part}")), None)


def tests_of(path: str) -> list[str]:
    """Tests of the same package that name the module or what it offers, else all tests of the package."""
    package, module = path.split("/")[1], path.removesuffix(".py").replace("/", ".")
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    word = re.compile(rf"{re.escape(module)}\b|\b({'|'.join(map(re.escape, names or ['-']))})\b")
    found = sorted(file for file in (ROOT / "tests" / package).glob("test_*.py")
                   if '"benchmarks"' not in file.read_text("utf-8"))  # which are not where mutants run
    return [str(file.relative_to(ROOT)) for file in found if word.search(file.read_text("utf-8"))] or [
        str(file.relative_to(ROOT)) for file in found]


def changed_lines(base: str) -> dict[str, set[int]]:
    """Lines of this working tree that were changed since it left a commit, by file."""
    diff = subprocess.run(["git", "diff", "-U0", "--merge-base", base, "--", "fedlab"], cwd=ROOT, check=True,
                          capture_output=True, text=True).stdout
    found: dict[str, set[int]] = {}
    for line in diff.splitlines():
        if line.startswith("+++ "):
            path = line.removeprefix("+++ b/")
        elif match := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            first, count = int(match[1]), int(match[2] or 1)
            found.setdefault(path, set()).update(range(first, first + count))
    return {path: lines for path, lines in found.items() if lines and (ROOT / path).exists()}


def part_of(path: str) -> str:
    """The part of fedlab with a goal of its own that a file belongs to."""
    return next((part for part in GOALS if path.startswith(f"fedlab/{part}")), "elsewhere")


def lines_to_mutate(path: str, changed: set[int] | None, *, share: float = 1.0, seed: int = 0) -> list[int]:
    """All lines, the changed ones or a random share, without those of errors and of what is written for readers."""
    source = (ROOT / path).read_text("utf-8")
    lines = set(range(1, source.count("\n") + 2)) if changed is None else set(changed)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) or (isinstance(node, ast.FunctionDef) and node.name == "__repr__"):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    drawn = random.Random(f"{seed} {path}")
    return [line for line in sorted(lines) if share >= 1 or drawn.random() < share]


def mutate(path: str, *, tests: list[str], lines: list[int], seconds: float) -> dict[str, int | None]:
    """Exit codes of the tests by mutant, None where time did not suffice; continues what was begun."""
    folder = WORK / path.removesuffix(".py").replace("/", ".")
    key = [(ROOT / path).read_text("utf-8"), lines, [(ROOT / file).read_text("utf-8") for file in tests]]
    digest, mark = hashlib.sha256(json.dumps(key).encode()).hexdigest(), folder / "inputs"
    if not mark.exists() or mark.read_text() != digest:  # other code or tests: nothing found before counts
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("fedlab", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        (folder / "setup.cfg").write_text(SETTINGS.format(path=path, tests="\n    ".join(tests)))
        (folder / "lines.json").write_text(json.dumps({path: lines}))
        mark.write_text(digest)
    places = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p).resolve() != ROOT]
    with (folder / "log").open("w") as log:
        child = subprocess.Popen([sys.executable, __file__, "--inside"], cwd=folder, stdout=log, stderr=log, env={
            **os.environ, "PYTHONPATH": os.pathsep.join(places)})
        try:
            child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)
            child.wait()
    meta = folder / "mutants" / f"{path}.meta"
    if not meta.exists() or child.returncode not in (0, -signal.SIGINT, None):
        print(f"{path}: mutmut ended with status {child.returncode}; see {folder / 'log'}")
    return dict(json.loads(meta.read_text())["exit_code_by_key"]) if meta.exists() else {}


def inside() -> None:
    """In the folder of one file: mutmut, told which lines it may change as it is told which ones tests cover.

    Of the tests that reach a function the quick ones come first, since the first that fails ends a mutant.
    """
    from mutmut.__main__ import cli
    from mutmut.runners.harness import PytestRunner
    from mutmut.state import state

    in_any_order = PytestRunner._pytest_args_regular_run

    def quick_first(self: PytestRunner, tests: Iterable[str]) -> list[str]:
        return in_any_order(self, sorted(tests, key=lambda name: (state().duration_by_test.get(name, 0.0), name)))

    PytestRunner._pytest_args_regular_run = quick_first  # type: ignore[method-assign]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what runs in the background ignore it

    lines = json.loads(Path("lines.json").read_text())
    state()._covered_lines = {str((Path("mutants") / path).absolute()): set(found) for path, found in lines.items()}
    cli(["run", "--max-children", os.environ.get("MUTANTS_AT_ONCE", "1")])


def differences(path: str, mutants: list[str]) -> dict[str, tuple[str, str]]:
    """Of each mutant the line that was changed, and what it became."""
    show = ("import json, sys; from mutmut.mutation.diff_apply import get_diff_for_mutant as diff; "
            "print(json.dumps({name: diff(name, path=sys.argv[1]) for name in sys.argv[2:]}))")
    done = subprocess.run([sys.executable, "-c", show, path, *mutants], capture_output=True, text=True, check=True,
                          cwd=WORK / path.removesuffix(".py").replace("/", "."))
    found = {}
    for name, text in json.loads(done.stdout.splitlines()[-1]).items():
        was, now = ([line[1:].strip() for line in text.splitlines() if line[:1] == sign and line[:3] != 3 * sign]
                    for sign in "-+")
        found[name] = " ".join(was), " ".join(now)
    return found


def report(path: str, codes: dict[str, int | None], equivalent: list[dict[str, str]]) -> tuple[int, int]:
    """Prints what was noticed and every survivor; returns how many were noticed, and of how many."""
    known = {(one["file"], one["was"], one["now"]) for one in equivalent}
    missed = differences(path, [name for name, code in codes.items() if code in (0, 5, 33)])
    survivors = {name: pair for name, pair in missed.items() if (path, *pair) not in known}
    unchecked = sum(code is None for code in codes.values())
    judged = len(codes) - unchecked - (len(missed) - len(survivors))
    share = 100 * (judged - len(survivors)) / judged if judged else 0.0 if unchecked else 100.0
    slow = sum(code in (24, 36, 152, 255, -24, -9) for code in codes.values())
    print(f"{path}: {judged - len(survivors)} of {judged} noticed ({share:.0f} %, goal {goal_of(path) or 80} %), "
          f"{slow} by taking too long; {len(missed) - len(survivors)} equivalent, {unchecked} not tried", flush=True)
    for name, (was, now) in survivors.items():
        print(f"  {name.rpartition('.')[2]}\n    - {was}\n    + {now}", flush=True)
    return judged - len(survivors), judged


def totals(found: dict[str, list[tuple[int, int]]]) -> bool:
    """Prints the share noticed in each part of fedlab, with its interval; whether all goals are reached.

    The interval (Clopper and Pearson) takes mutants as drawn one by one; those of a line are alike: it is too narrow.
    """
    from scipy.stats import binomtest

    good = True
    for part, counts in found.items():
        noticed, judged = (sum(column) for column in zip(*counts, strict=True))
        if judged:
            low, high = binomtest(noticed, judged).proportion_ci()
            goal = GOALS.get(part, 80)
            print(f"{part}: {noticed} of {judged} noticed, {noticed / judged:.1%} (95 % interval {low:.1%} to "
                  f"{high:.1%}), goal {goal} %; {len(counts)} files")
            good &= 100 * noticed >= goal * judged
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description="Changes code, one line at a time, and runs its tests.")
    parser.add_argument("files", nargs="*", help="such as fedlab/run/trace.py; by default all that have a goal")
    parser.add_argument("--base", help="a commit: only lines that differ from it")
    parser.add_argument("--share", type=float, default=1.0, help="of the lines, drawn at random (default: 1, all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--tests", nargs="+", help="tests to run instead of those of the package that name the module")
    parser.add_argument("--minutes", type=float, help="10 with --base, else without end")
    given = parser.parse_args()
    changed = changed_lines(given.base) if given.base else None
    every = [str(file.relative_to(ROOT)) for file in sorted((ROOT / "fedlab").rglob("*.py"))]
    files = given.files or [path for path in every if goal_of(path) and (changed is None or path in changed)]
    end = time.monotonic() + 60 * (given.minutes or (10 if given.base else 1e6))
    equivalent = tomllib.loads(EQUIVALENT.read_text("utf-8")).get("mutant", [])
    found: dict[str, list[tuple[int, int]]] = {}
    for path in files:
        lines = lines_to_mutate(path, changed and changed.get(path, set()), share=given.share, seed=given.seed)
        if not lines:
            continue
        left = end - time.monotonic()
        if left < 30:
            print(f"{path}: not tried, the time is over; run the command again to continue")
            continue
        codes = mutate(path, tests=given.tests or tests_of(path), lines=lines, seconds=left)
        found.setdefault(part_of(path), []).append(report(path, codes, equivalent))
    return 0 if totals(found) else 1


if __name__ == "__main__":
    sys.exit(inside() if sys.argv[1:] == ["--inside"] else main())
