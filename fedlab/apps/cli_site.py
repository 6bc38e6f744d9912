"""The commands at a site, `fedlab site init|show|approve`, and `fedlab export technique` for authors of a technique."""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedlab.apps.cli_arguments import add_command, add_group, add_layout, read_shape

__all__ = ["add_export", "add_site"]


def add_site(commands: Any) -> None:
    """Adds `site` and its own commands to argparse's sub-parsers."""
    kinds = add_group(commands, "site", help="at a hospital: declare which patients take part and what is allowed")
    init = add_command(kinds, "init", _init, help="make a site's folder", about="""
        Makes a folder with site.toml, in which a site declares its name, its patients and its policy: required
        techniques, its privacy budget, the largest number of rounds, approved files. All of it stays at the site and
        no server can relax it. Scans are inspected and left where they are; nothing is sent.

          fedlab site init --data /data/brats hospital-a
          (edit hospital-a/site.toml)
          fedlab site show hospital-a""")
    init.add_argument("name", metavar="NAME", help="the site's name, by which the server knows it")
    init.add_argument("--data", type=Path, required=True, metavar="DIR",
                      help="folder of scans, or a CSV table of paths")
    add_layout(init)
    init.add_argument("--table", type=Path, metavar="CSV",
                      help="institution table, if only some of the patients are this site's")
    init.add_argument("--partition", metavar="NAME", help="the site's name in the table (default NAME)")
    init.add_argument("--spacing", type=float, metavar="MM", help="voxel size, the same at all sites (default 3 mm)")
    init.add_argument("--shape", type=read_shape,
                      help="voxels, such as 64,64,64 (default: large enough for every brain)")
    init.add_argument("--held-out", type=float, metavar="SHARE",
                      help="share of the patients that is never trained on (default 0.2)")
    init.add_argument("--card", type=Path, metavar="FILE", help="the site's data card")
    init.add_argument("--out", type=Path, metavar="FOLDER", help="new folder (default ./NAME)")

    show = add_command(kinds, "show", _show, help="a site's data, policy and privacy spent", about="""
        Prints the settings and the policy of a site, whether approved files are unchanged, how many models it has
        answered, and the privacy it has spent so far: ε with its δ, unit, adjacency and accountant.""")
    show.add_argument("folder", type=Path, metavar="FOLDER", help="the site's folder")

    approve = add_command(kinds, "approve", _approve, help="allow a technique's file at this site", about="""
        Shows a Python file, asks, copies it into the site's techniques/ and enters its SHA-256 into site.toml. A run
        may then name classes and functions that the file defines; their code runs at this site with access to its
        scans, so review it first. Later changes of the file are detected and refused.""")
    approve.add_argument("folder", type=Path, metavar="FOLDER", help="the site's folder")
    approve.add_argument("file", type=Path, metavar="FILE", help="the technique's file, such as my_technique.py")
    approve.add_argument("--yes", action="store_true", help="do not ask: I have reviewed the file")


def add_export(commands: Any) -> None:
    """Adds `export` to argparse's sub-parsers."""
    kinds = add_group(commands, "export", metavar="WHAT",
                      help="write a definition of a notebook into a file that sites can approve")
    technique = add_command(kinds, "technique", _export, help="a privacy technique of a notebook", about="""
        Writes a class of a notebook's cell into a file, with the imports, functions and constants of other cells
        that it needs. The notebook is read, not run. A separate process imports the file and passes it to
        fedlab.check_privacy; if either fails, nothing is written.

          fedlab export technique SharePercentile --from 03_privacy.ipynb --to share_percentile.py
          fedlab export technique Mine --from n.ipynb --to mine.py --call "Mine(keep=0.1)"

        Then import it from the file in the notebook, and at each site: fedlab site approve FOLDER FILE""")
    technique.add_argument("name", metavar="NAME", help="the class")
    technique.add_argument("--from", dest="notebook", type=Path, required=True, metavar="NOTEBOOK.ipynb",
                           help="the notebook that defines it")
    technique.add_argument("--to", type=Path, required=True, metavar="FILE.py", help="new file")
    technique.add_argument("--call", metavar="CODE", help="an expression that makes one for the check (default NAME())")
    technique.add_argument("--no-check", action="store_true", help="import the file, but leave out check_privacy")


def _init(options: argparse.Namespace) -> None:
    from fedlab.data.readers.folders import find_patients
    from fedlab.deploy.settings import read_settings, write_settings

    if not options.name.isprintable() or not options.name.strip() or len(options.name) > 200:
        raise ValueError(f"a site's name has 1 to 200 printable characters, got {options.name!r}")
    out: Path = options.out or Path(options.name)
    if options.out is None and out.name != options.name:
        raise ValueError(f"{options.name!r} cannot be a folder's name; choose a folder with --out FOLDER")
    found = find_patients(options.data, layout=options.layout, label_convention=options.label_convention)
    path = write_settings(out, name=options.name, data=options.data, layout=options.layout,
                          label_convention=options.label_convention, table=options.table, partition=options.partition,
                          spacing_mm=options.spacing, shape=options.shape, held_out=options.held_out, card=options.card)
    read_settings(out)
    labelled = sum(files.label is not None for files in found.values())
    print(f"{len(found)} patients in {options.data}, {labelled} of them labelled\n\n"
          f"Next, state the site's policy in {path}\nThen check it with: fedlab site show {out}")


def _show(options: argparse.Namespace) -> None:
    from fedlab.deploy.settings import read_settings
    from fedlab.privacy.accounting.ledger_file import LedgerFile

    settings = read_settings(options.folder)
    print(f"site      {settings.name}\ndata      {settings.data}")
    for name in ("table", "partition", "layout", "label_convention", "card"):
        if getattr(settings, name) is not None:
            print(f"{name:10s}{getattr(settings, name)}")
    shape = "large enough for every brain" if settings.shape is None else "x".join(map(str, settings.shape))
    print(f"grid      {settings.spacing_mm:g} mm, {shape}\nheld out  {settings.held_out:g}\n\npolicy")
    for line in _policy_lines(settings.policy):
        print(f"  {line}")
    for module, digest in settings.policy.approved.items():
        print(f"  approved {module}.py: {_state_of(options.folder / 'techniques' / f'{module}.py', digest)}")
    answers = options.folder / "ledger" / "answers.json"
    known = json.loads(answers.read_text(encoding="utf-8")) if answers.is_file() else {}
    print(f"\nanswered  {sum(map(len, known.values()))} models in {len(known)} runs")
    file = LedgerFile(options.folder / "ledger", settings.name)
    if not file.path.is_file():
        print("privacy   nothing was released under a guarantee")
        return
    for spent in file.read().spent():
        budget = settings.policy.budgets.get(spent.unit)
        print(f"privacy   {spent}" + (f"; the budget is ε = {budget.epsilon:g}" if budget else "; no budget is set"))


def _policy_lines(policy: Any) -> list[str]:
    lines = [f"requires {required!r}" for required in policy.require]
    lines += [f"spends at most ε = {budget.epsilon:g} per {unit} at δ = {budget.delta:g}"
              for unit, budget in policy.budgets.items()]
    if policy.secure_mode:
        lines.append("draws noise from the operating system only (secure_mode)")
    for name in ("max_rounds", "max_updates"):
        if getattr(policy, name) is not None:
            lines.append(f"{name} = {getattr(policy, name)}")
    if policy.min_sites > 1:
        lines.append(f"takes part in runs of at least {policy.min_sites} sites")
    if policy.installed:
        lines.append(f"runs may name the installed modules {', '.join(policy.installed)}")
    if policy.tell_errors:
        lines.append("sends the server the text of errors where no guarantee forbids it")
    return lines or ["demands nothing but code known to this site: anyone with the server's key can request plain "
                     "updates; see site.toml"]


def _state_of(path: Path, digest: str) -> str:
    if not path.is_file():
        return "missing; runs that need it are refused"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"unchanged ({digest[:12]}…)" if found == digest else "CHANGED since it was approved; it is refused"


def _approve(options: argparse.Namespace) -> int:
    from fedlab.core.errors import RunError
    from fedlab.core.files import write_whole
    from fedlab.deploy.settings import enter_approved, read_settings

    settings, module = read_settings(options.folder), options.file.stem
    if options.file.suffix != ".py" or not module.isidentifier() or not options.file.is_file():
        raise RunError(f"expected a Python file with an importable name, such as my_technique.py, got {options.file}")
    source = options.file.read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    there = options.folder / "techniques" / options.file.name
    if there.exists() and there.read_bytes() != source:
        raise RunError(f"{there} exists with another content and is not overwritten; rename the new "
                       "version, or remove the old one by hand")
    if settings.policy.approved.get(module) == digest and there.exists():
        print(f"{module}.py is approved already, unchanged: {digest}")
        return 0
    for number, line in enumerate(source.decode("utf-8", "replace").splitlines(), 1):
        shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line.expandtabs())
        print(f"{number:5d}  {shown}")
    print(f"\nSHA-256 {digest}\nIts code will run at {settings.name} with access to its scans, whenever a run names "
          f"the module {module!r}.")
    if not options.yes and input("Approve it? [y/N] ").strip().lower() not in ("y", "yes"):
        print("Nothing was changed.")
        return 1
    there.parent.mkdir(exist_ok=True)
    write_whole(there, source)
    enter_approved(options.folder, module, digest)
    print(f"approved: {there}")
    return 0


def _export(options: argparse.Namespace) -> None:
    from fedlab.core.errors import RunError
    from fedlab.core.files import write_new
    from fedlab.deploy.technique_file import source_of

    target: Path = options.to
    if target.suffix != ".py" or not target.stem.isidentifier():
        raise RunError(f"{target} cannot be imported by its name; choose one such as my_technique.py")
    if target.exists():
        raise RunError(f"{target} exists and is not overwritten; choose another name")
    source = source_of(options.notebook, options.name)
    report = _try_out(target.stem, source, options.name, options.call, check=not options.no_check)
    write_new(target, source.encode())
    print(f"{report.strip()}\n\nwritten: {target}\nsha256:  {hashlib.sha256(source.encode()).hexdigest()}\n\n"
          f"In the notebook, in place of the class: from {target.stem} import {options.name}\n"
          f"At each site: fedlab site approve FOLDER {target.name}")


def _try_out(module: str, source: str, name: str, call: str | None, *, check: bool) -> str:
    """Imports the file and checks the technique in a separate process; returns what that prints."""
    from fedlab.core.errors import RunError

    code = _TRY.format(module=module, name=name, call=call or f"{name}()", check=check)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"{module}.py").write_text(source, encoding="utf-8")
        found = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=1800,
                               check=False)
    if found.returncode:
        last = "\n".join(found.stderr.strip().splitlines()[-25:])
        raise RunError(f"nothing was written: the file with {name} fails.\n{found.stdout}{last}")
    return found.stdout


_TRY = """\
import sys
sys.path.insert(0, sys.argv[1])
import {module} as module
from fedlab import Privacy, check_privacy
found = module.{name}
if not (isinstance(found, type) and issubclass(found, Privacy)):
    sys.exit("{name} is no class derived from fedlab.Privacy")
if {check}:
    try:
        technique = eval({call!r}, vars(module))
    except TypeError as error:
        sys.exit(f"{name} needs arguments ({{error}}): give --call \\"{name}(…)\\", or --no-check")
    from fedlab.deploy.plan import describe, make
    from fedlab.run.recipe import recipe
    if recipe(make(describe(technique), approve=lambda module: None)) != recipe(technique):
        sys.exit("the technique cannot be sent: store each argument of __init__ unchanged in an attribute of its name")
    print(check_privacy(technique))
"""
