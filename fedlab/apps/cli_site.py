"""The commands at a site, `fedlab site init|show|approve`, and `fedlab export technique` for authors of a technique."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedlab.apps.cli_arguments import FLAG, LAYOUT, REQUIRED_PATH, add_command, add_group, read_shape
from fedlab.core.errors import RunError
from fedlab.core.text import counted

__all__ = ["add_export", "add_site", "try_technique"]


def add_site(commands: Any) -> None:
    """Adds `site` and its own commands to argparse's sub-parsers."""
    kinds = add_group(commands, "site")
    folder = {"type": Path, "metavar": "FOLDER"}
    add_command(kinds, "site init", _init, {
        "name": {"metavar": "NAME"}, "--data": {**REQUIRED_PATH, "metavar": "DIR"}, **LAYOUT,
        "--table": {"type": Path, "metavar": "CSV"}, "--partition": {"metavar": "NAME"},
        "--spacing": {"type": float, "metavar": "MM"}, "--shape": {"type": read_shape},
        "--held-out": {"type": float, "metavar": "SHARE"}, "--card": {"type": Path, "metavar": "FILE"},
        "--out": folder})
    add_command(kinds, "site show", _show, {"folder": folder})
    add_command(kinds, "site approve", _approve, {
        "folder": folder, "file": {"type": Path, "metavar": "FILE"}, "--yes": FLAG})


def add_export(commands: Any) -> None:
    """Adds `export` to argparse's sub-parsers."""
    add_command(add_group(commands, "export", metavar="WHAT"), "export technique", _export, {
        "name": {"metavar": "NAME"}, "--from": {**REQUIRED_PATH, "dest": "notebook", "metavar": "NOTEBOOK.ipynb"},
        "--to": {**REQUIRED_PATH, "metavar": "FILE.py"}, "--call": {"metavar": "CODE"}, "--no-check": FLAG})


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
    print(f"{counted(len(found), 'patient')} in {options.data}, {labelled} of them labelled\n\n"
          f"Next, state the site's policy in {path}\nThen check it with: fedlab site show {out}")


def _show(options: argparse.Namespace) -> None:
    from fedlab.deploy.settings import read_settings
    from fedlab.privacy.accounting.ledger_file import LedgerFile

    settings = read_settings(options.folder)
    for name in ("name", "data", "table", "partition", "layout", "label_convention", "card"):
        if (value := getattr(settings, name)) is not None:
            print(f"{'site' if name == 'name' else name:10s}{value}")
    shape = "large enough for every brain" if settings.shape is None else "x".join(map(str, settings.shape))
    print(f"grid      {settings.spacing_mm:g} mm, {shape}\nheld out  {settings.held_out:g}\n\npolicy")
    print(*(f"  {line}" for line in settings.policy.lines()), sep="\n")
    for module, digest in settings.policy.approved.items():
        print(f"  approved {module}.py: {_state_of(options.folder / 'techniques' / f'{module}.py', digest)}")
    answers = options.folder / "ledger" / "answers.json"
    known = json.loads(answers.read_text(encoding="utf-8")) if answers.is_file() else {}
    print(f"\nsent      {counted(sum(map(len, known.values())), 'update')} in {counted(len(known), 'run')}")
    file = LedgerFile(options.folder / "ledger", settings.name)
    if not file.path.is_file():
        print("privacy   nothing was released under a guarantee")
        return
    for spent in file.read().spent():
        budget = settings.policy.budgets.get(spent.unit)
        print(f"privacy   {spent}" + (f"; the budget is ε = {budget.epsilon:g}" if budget else "; no budget is set"))


def _state_of(path: Path, digest: str) -> str:
    if not path.is_file():
        return "missing; runs that need it are refused"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    return f"unchanged ({digest[:12]}…)" if found == digest else "CHANGED since it was approved; it is refused"


def _approve(options: argparse.Namespace) -> int:
    from fedlab.core.files import write_whole
    from fedlab.deploy.messages import printable
    from fedlab.deploy.settings import enter_approved, read_settings

    settings, module = read_settings(options.folder), options.file.stem
    if options.file.suffix != ".py" or not module.isidentifier() or not options.file.is_file():
        raise RunError(f"expected a Python file with an importable name, such as my_technique.py, got {options.file}")
    source = options.file.read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    target = options.folder / "techniques" / options.file.name
    if target.exists() and target.read_bytes() != source:
        raise RunError(f"{target} exists with another content and is not overwritten; rename the new version, or "
                       "remove the old one by hand")
    if settings.policy.approved.get(module) == digest and target.exists():
        print(f"{module}.py is approved already, unchanged: {digest}")
        return 0
    for number, line in enumerate(source.decode("utf-8", "replace").splitlines(), 1):
        print(f"{number:5d}  {printable(line.expandtabs())}")
    print(f"\nSHA-256 {digest}\nIts code will run at {settings.name} with access to its scans, whenever a run names "
          f"the module {module!r}.")
    if not options.yes and not _confirmed():
        print("Nothing was changed.")
        return 1
    target.parent.mkdir(exist_ok=True)
    write_whole(target, source)
    enter_approved(options.folder, module, digest)
    print(f"approved: {target}")
    return 0


def _confirmed() -> bool:
    try:
        return input("Approve it? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError as error:
        raise RunError("standard input is closed, so the question has no answer; review the file and pass "
                       "--yes") from error


def _export(options: argparse.Namespace) -> None:
    from fedlab.core.files import write_new
    from fedlab.deploy.technique_file import source_of

    target: Path = options.to
    if target.suffix != ".py" or not target.stem.isidentifier():
        raise RunError(f"{target} cannot be imported by its name; choose one such as my_technique.py")
    if target.exists():
        raise RunError(f"{target} exists and is not overwritten; choose another name")
    source = source_of(options.notebook, options.name).encode()
    call = "" if options.no_check else options.call or f"{options.name}()"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / target.name).write_bytes(source)
        command = "import sys; from fedlab.apps.cli_site import try_technique; try_technique(*sys.argv[1:])"
        tried = subprocess.run([sys.executable, "-c", command, folder, target.stem, options.name, call],
                               capture_output=True, encoding="utf-8", timeout=1800, check=False,
                               env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    if tried.returncode:
        last = "\n".join(tried.stderr.strip().splitlines()[-25:])
        raise RunError(f"nothing was written: the file with {options.name} fails.\n{tried.stdout}{last}")
    write_new(target, source)
    print(f"{tried.stdout.strip()}\n\nwritten: {target}\nsha256:  {hashlib.sha256(source).hexdigest()}\n\n"
          f"In the notebook, in place of the class: from {target.stem} import {options.name}\n"
          f"At each site: fedlab site approve FOLDER {target.name}")


def try_technique(folder: str, module: str, name: str, call: str) -> None:
    """Imports a technique's file and checks what the expression `call` makes, if it is not empty; ends this process
    with an error if either fails. It is called in a process of its own.
    """
    from fedlab.checks.privacy import check_privacy
    from fedlab.deploy.objects import describe, make
    from fedlab.privacy.base import Privacy
    from fedlab.run.recipe import recipe

    sys.path.insert(0, folder)
    defined = vars(importlib.import_module(module))
    if not (isinstance(defined[name], type) and issubclass(defined[name], Privacy)):
        sys.exit(f"{name} is no class derived from fedlab.Privacy")
    if not call:
        return
    try:
        technique = eval(call, defined)
    except TypeError as error:
        sys.exit(f'{name} needs arguments ({error}): give --call "{name}(…)", or --no-check')
    if recipe(make(describe(technique), approve=lambda module: None)) != recipe(technique):
        sys.exit("the technique cannot be sent: store each argument of __init__ unchanged in an attribute of its name")
    print(check_privacy(technique))
