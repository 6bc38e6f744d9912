"""The public names of fedlab: few at the top, the rest in namespaces, each loaded when it is first used."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fedlab

NAMESPACES = {"checks", "core", "data", "deploy", "engines", "evidence", "faults", "privacy", "run", "strategies",
              "topologies", "training", "view"}
STUBS = sorted(Path(fedlab.__file__).parent.rglob("__init__.pyi"))
#: What `import fedlab` and the first words of a run must not load.
NOTEBOOK = ("matplotlib", "pandas", "IPython", "ipykernel", "ipywidgets", "ipyniivue", "anywidget", "jupyter_client",
            "jupyterlab", "notebook", "traitlets")
HEAVY = (*NOTEBOOK, "monai", "opacus", "scipy", "skimage", "nilearn", "nibabel", "networkx", "cryptography", "mlflow",
         "nvflare", "torch._dynamo")


def package_of(stub: Path) -> ModuleType:
    parts = stub.parent.relative_to(Path(fedlab.__file__).parent).parts
    return importlib.import_module(".".join(("fedlab", *parts)))


def imported(stub: Path) -> dict[str, str | None]:
    """The names that a stub imports, and the module of each; None for a package itself."""
    nodes = [node for node in ast.parse(stub.read_text("utf-8")).body if isinstance(node, ast.ImportFrom)]
    assert all(node.level == 1 for node in nodes), f"{stub} imports from outside its package"
    pairs = [(alias.name, node.module) for node in nodes for alias in node.names]
    assert len(dict(pairs)) == len(pairs), f"{stub} imports a name twice"
    return dict(pairs)


def test_few_names_at_the_top() -> None:
    names = dir(fedlab)
    assert len(names) <= 45
    assert {name for name in names if isinstance(getattr(fedlab, name), ModuleType)} == NAMESPACES
    assert sorted(names) == sorted(fedlab.__all__)


def test_an_error_about_a_name_says_where_it_stands() -> None:
    for name, place in (("TopK", "fedlab.privacy.TopK"), ("Gossip", "fedlab.topologies.Gossip"),
                        ("load_weights", "fedlab.core.load_weights")):
        with pytest.raises(AttributeError, match=f"no '{name}'; use {place}"):
            getattr(fedlab, name)
    with pytest.raises(AttributeError, match=r"no 'Fedavg'; it offers Arm, DPSGD, FedAvg"):
        _ = fedlab.Fedavg
    assert not hasattr(fedlab, "_nothing")


def test_every_namespace_has_a_stub() -> None:
    folder = Path(fedlab.__file__).parent
    assert {stub.parent.name for stub in STUBS if stub.parent != folder} == NAMESPACES


def test_every_package_says_what_lives_there() -> None:
    folder = Path(fedlab.__file__).parent
    for path in sorted(set(folder.rglob("__init__.py")) - {folder / "__init__.py"}):
        text, place = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "", path.relative_to(folder)
        assert "Read `" in text, f"{place} does not say what to read first"
        assert "import" in text.lower(), f"{place} does not say what it may import"


@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: stub.parent.name)
def test_stub_and_package_agree(stub: Path) -> None:
    package, names = package_of(stub), imported(stub)
    (listed,) = [ast.literal_eval(node.value) for node in ast.parse(stub.read_text("utf-8")).body
                 if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
    assert sorted(listed) == sorted(names) == sorted(package.__all__) == sorted(dir(package))
    assert listed, f"{stub} offers nothing"


@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: stub.parent.name)
def test_every_name_is_what_its_module_defines(stub: Path) -> None:
    """The module is imported first: one that has the name of a function must not take its place."""
    package = package_of(stub)
    for name, module in imported(stub).items():
        if module is not None:
            defined = getattr(importlib.import_module(f"{package.__name__}.{module}"), name)
            assert getattr(package, name) is defined, f"{package.__name__}.{name}"
            assert not isinstance(defined, ModuleType)


@pytest.mark.parametrize("stub", [stub for stub in STUBS if stub.parent.name != "fedlab"], ids=lambda s: s.parent.name)
def test_a_submodule_hides_no_name(stub: Path) -> None:
    """Where a module has the name of something that another module defines, the order of imports would decide."""
    inside = {path.stem for path in stub.parent.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    hidden = {name for name, module in imported(stub).items()
              if name in inside and module is not None and module.partition(".")[0] != name}
    assert not hidden


def test_a_name_at_the_top_stands_in_its_namespace_too() -> None:
    for name, module in imported(Path(fedlab.__file__).with_suffix(".pyi")).items():
        if module is not None:
            namespace = getattr(fedlab, module.partition(".")[0])
            assert getattr(namespace, name) is getattr(fedlab, name)


#: `fl.NAME` or `fedlab.NAME` in a docstring, message, page or notebook; not a host, a file, a pattern or a longer word.
NAMED = re.compile(r"(?<![\w./@-])(?:fedlab|fl)\.(?!hospital|mplstyle)([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?![\w*…])")
FILES = {"css", "html", "ipynb", "json", "md", "py", "toml"}


def exists(path: str) -> bool:
    """Whether a dotted name below `fedlab` is a module, or stands in one, as an attribute or a field of a class."""
    parts = path.split(".")
    for cut in range(len(parts), -1, -1):
        try:
            found: object = importlib.import_module(".".join(["fedlab", *parts[:cut]]))
        except ImportError:
            continue
        for name in parts[cut:]:
            found = name if name in getattr(found, "__dataclass_fields__", {}) else getattr(found, name, None)
        if found is not None:
            return True
    return False


def test_a_name_that_does_not_exist_is_noticed() -> None:
    real = ("apps", "core.Site.train", "run.federate", "run.federate.make_run", "training.trainer.SiteTrainer.steps")
    assert all(map(exists, real)) and not any(map(exists, ("curves", "core.Site.trained", "run.federate.curves")))


def test_names_in_docstrings_messages_pages_and_notebooks_exist(repository: Path) -> None:
    texts = [path for folder in ("fedlab", "docs", "notebooks", "data_cards", "benchmarks")
             for path in (repository / folder).rglob("*") if path.suffix in (".py", ".md", ".ipynb", ".j2", ".toml")]
    named = {(match[1], path.name) for path in [*texts, repository / "README.md"]
             for match in NAMED.finditer(path.read_text("utf-8")) if match[1].split(".")[0] not in FILES}
    assert len(named) > 500
    assert [f"{file}: fedlab.{name}" for name, file in sorted(named) if not exists(name)] == []


def loaded(statement: str, repository: Path) -> set[str]:
    """Modules in a new process after a statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(repository)},
                          capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(done.stdout))


def test_import_loads_nothing_heavy(repository: Path) -> None:
    assert not loaded("import fedlab", repository) & set(HEAVY)


def test_what_a_run_needs_loads_no_notebook(repository: Path) -> None:
    names = ("federate", "each_round", "SiteTrainer", "FedAvg", "DPSGD", "Patient", "Local", "evaluate",
             "check_privacy", "topologies.Gossip", "engines.Processes", "deploy.SiteHost", "privacy.TopK",
             "run.History")
    assert not loaded("import fedlab as fl\n" + "\n".join(f"fl.{name}" for name in names), repository) & set(NOTEBOOK)


def test_namespaces_load_nothing_themselves(repository: Path) -> None:
    every = "".join(f"\nfl.{name}, dir(fl.{name})" for name in sorted(NAMESPACES))
    assert not loaded(f"import fedlab as fl{every}", repository) & {*HEAVY, "torch", "numpy"}
