"""The files that say how fedlab is installed agree with each other and with what is installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import BytesParser
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import fedlab

#: What the person who asked for fedlab named.
NAMED = {"jupyterlab", "ipywidgets", "torch", "monai", "nibabel", "itkwidgets", "opacus", "pytest", "nbval"}
#: Extras that are in the conda environment.
IN_CONDA = ("lab", "itk", "nvflare", "tracking", "search", "test")


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def environment(repository: Path) -> list[Any]:
    return yaml.safe_load((repository / "environment.yml").read_text("utf-8"))["dependencies"]


@pytest.fixture(scope="module")
def pinned(repository: Path) -> dict[str, Version]:
    lines = [line for line in (repository / "constraints.txt").read_text("utf-8").splitlines() if line[:1] != "#"]
    pins = [re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)", line) for line in lines]
    wrong = [line for line, pin in zip(lines, pins, strict=True) if pin is None]
    assert not wrong, f"constraints.txt pins canonical names to exact public versions; these lines do not: {wrong}"
    return {pin[1]: Version(pin[2]) for pin in pins if pin}


def table(lines: list[str]) -> dict[str, tuple[SpecifierSet, frozenset[str]]]:
    """Requirement lines by canonical name: version specifiers and extras."""
    parsed = [Requirement(line) for line in lines]
    names = [canonicalize_name(requirement.name) for requirement in parsed]
    assert len(set(names)) == len(names), f"a package is listed twice: {sorted(names)}"
    return {name: (one.specifier, frozenset(one.extras)) for name, one in zip(names, parsed, strict=True)}


def test_conda_environment_equals_pyproject(project: dict[str, Any], environment: list[Any]) -> None:
    extras = project["optional-dependencies"]
    wanted = table([*project["dependencies"], *(line for extra in IN_CONDA for line in extras[extra])])
    *conda, pip = environment
    options = [line for line in pip["pip"] if line.startswith("-")]
    listed = table([line for line in pip["pip"] if not line.startswith("-")])
    assert listed == wanted
    assert options == ["-c constraints.txt", "-e ."]
    assert conda == ["python=3.11", "pip"]
    assert project["requires-python"] == ">=3.11"


def test_conda_environment_has_what_was_named(environment: list[Any]) -> None:
    assert set(table([line for line in environment[-1]["pip"] if not line.startswith("-")])) >= NAMED


def test_constraints_satisfy_pyproject(project: dict[str, Any], pinned: dict[str, Version]) -> None:
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in (*IN_CONDA, "dev") for line in extras[extra])]
    for name, (specifier, _) in table(lines).items():
        assert name in pinned, f"constraints.txt pins no version of {name}"
        assert specifier.contains(pinned[name], prereleases=True), f"{name}=={pinned[name]} is not {specifier}"
    assert pinned["torch"] == Version("2.13.0")


def test_lower_bounds_are_stated(project: dict[str, Any]) -> None:
    unbounded = [
        name
        for name, (specifier, _) in table(project["dependencies"]).items()
        if not any(one.operator in {">=", "=="} for one in specifier)
    ]
    assert not unbounded


def test_constraints_are_what_is_installed(pinned: dict[str, Version]) -> None:
    """The suite speaks for the pinned versions only if it runs on them."""
    installed = {canonicalize_name(d.metadata["Name"]): Version(d.version) for d in metadata.distributions()}
    differ = {
        name: f"pinned {version}, installed {installed[name]}"
        for name, version in pinned.items()
        if name in installed and Version(installed[name].public) != version
    }
    if differ and not os.environ.get("CI"):
        pytest.skip(f"not the tested environment (make install): {differ}")
    assert not differ


def test_wheel_carries_the_package_and_its_notebooks(
    repository: Path, project: dict[str, Any], tmp_path: Path
) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=repository, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        names = set(archive.namelist())
        info = f"fedlab_workbench-{fedlab.__version__}.dist-info"
        facts = BytesParser().parsebytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert {name.split("/")[0] for name in names} == {"fedlab", info}
    files = (path for path in (repository / "fedlab").rglob("*") if path.is_file() and path.suffix != ".pyc")
    sources = {path.relative_to(repository).as_posix() for path in files}
    assert sources <= names
    assert {"fedlab/py.typed", f"{info}/licenses/LICENSE"} <= names
    assert facts["Name"] == "fedlab-workbench"
    assert facts["License-Expression"] == "Apache-2.0"
    assert set(facts.get_all("Provides-Extra")) == set(project["optional-dependencies"])
    series = {path.relative_to(repository).as_posix() for folder in ("notebooks", "data_cards")
              for path in (repository / folder).iterdir() if path.suffix in (".ipynb", ".md")}
    assert {name.removeprefix("fedlab/series/") for name in names if name.startswith("fedlab/series/")} == series
    open_lab(tmp_path)
    assert {path.relative_to(tmp_path / "fedlab-series").as_posix()
            for path in (tmp_path / "fedlab-series").rglob("*") if path.is_file()} == series
    mine = tmp_path / "fedlab-series" / "notebooks" / "00_welcome.ipynb"
    mine.write_text("changed by the user")
    assert "fedlab-series/notebooks" in open_lab(tmp_path) and mine.read_text() == "changed by the user"
    assert entry_points.split() == ["[console_scripts]", "fedlab", "=", "fedlab.apps.cli:main"]


def open_lab(folder: Path) -> str:
    """What `fedlab lab` says in a folder, run from the wheel unpacked there; JupyterLab says its version and ends."""
    environment = {**os.environ, "PYTHONPATH": str(folder / "installed"), "JUPYTER_CONFIG_DIR": str(folder / "config")}
    done = subprocess.run([sys.executable, "-m", "fedlab.apps.cli", "lab", "--", "--version"], cwd=folder, check=True,
                          env=environment, capture_output=True, text=True, timeout=120)
    assert re.match(r"\d+\.\d+", done.stdout)
    return done.stderr


def test_version_is_one(repository: Path) -> None:
    citation = yaml.safe_load((repository / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == fedlab.__version__
    assert fedlab.__version__ in (repository / "CHANGELOG.md").read_text("utf-8")
    assert citation["license"] == "Apache-2.0"
    assert {"10.1007/978-3-030-32692-0_16", "10.1038/s41746-020-00323-1"} == {
        reference["doi"] for reference in citation["references"]
    }
    deposit = json.loads((repository / ".zenodo.json").read_text("utf-8"))
    assert (deposit["title"], deposit["license"]) == (citation["title"], citation["license"])
    assert [one["name"] for one in deposit["creators"]] == [one["name"] for one in citation["authors"]]
    assert deposit["keywords"] == citation["keywords"]


def test_the_page_for_coding_agents_names_only_what_exists(repository: Path) -> None:
    text = (repository / "AGENTS.md").read_text("utf-8")
    makefile = (repository / "Makefile").read_text("utf-8")
    for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"`((?:fedlab|tests|docs|benchmarks|notebooks)/[\w./]*)`|\]\(([\w./]+)\)", text):
        assert (repository / "".join(path)).exists(), path


def run_import(folder: Path, repository: Path) -> subprocess.CompletedProcess[str]:
    """Import fedlab in a new process that also sees the distributions in `folder`."""
    paths = os.pathsep.join((str(repository), str(folder)))
    return subprocess.run(
        [sys.executable, "-c", "import fedlab; print(fedlab.__version__)"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )


def install_fake(folder: Path, name: str) -> None:
    info = folder / f"{name.replace('-', '_')}-1.3.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.3.0\n")


def test_refuses_to_import_beside_the_other_fedlab(tmp_path: Path, repository: Path) -> None:
    install_fake(tmp_path, "fedlab")
    done = run_import(tmp_path, repository)
    assert done.returncode == 1
    assert "ImportError: another project's package is installed under the name fedlab" in done.stderr
    assert "1.3.0" in done.stderr and str(tmp_path) in done.stderr
    assert "python -m pip uninstall fedlab" in done.stderr


def test_imports_beside_similar_names(tmp_path: Path, repository: Path) -> None:
    for name in ("fedlab-workbench", "fedlab-extras", "notfedlab"):
        install_fake(tmp_path, name)
    done = run_import(tmp_path, repository)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == fedlab.__version__


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as a person would, not as part of the make that runs these tests."""
    inherited = {"MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "PIP_CACHE_DIR"}
    env = {name: value for name, value in os.environ.items() if name not in inherited}
    return subprocess.run(["make", *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def test_make_alone_says_what_there_is(repository: Path) -> None:
    done = make(repository)
    assert done.returncode == 0, done.stderr
    for target in ("demo", "test", "lab", "install"):
        assert f"make {target}" in done.stdout


def copy_build_files(repository: Path, folder: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).write_bytes((repository / name).read_bytes())


def test_make_refuses_an_old_python(repository: Path, tmp_path: Path) -> None:
    copy_build_files(repository, tmp_path)
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = make(tmp_path, "install", f"PYTHON={old}")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr and "Python 3.9.1" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_names_a_missing_python(repository: Path, tmp_path: Path) -> None:
    copy_build_files(repository, tmp_path)
    done = make(tmp_path, "install", "PYTHON=python-that-is-not-there")
    assert done.returncode != 0
    assert "no program 'python-that-is-not-there'" in done.stderr


def test_make_keeps_out_of_the_home_folder(repository: Path, tmp_path: Path) -> None:
    """Every folder that a tool would take from the home directory lies in the checkout."""
    folders = ("PIP_CACHE_DIR", "XDG_CACHE_HOME", "MPLCONFIGDIR", "IPYTHONDIR", "npm_config_cache")
    jupyter = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    (tmp_path / "show.mk").write_text("include Makefile\nshow: ; @env\n")
    shown = make(repository, "-f", str(tmp_path / "show.mk"), "show").stdout
    settings = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    outside = {n: settings.get(n) for n in (*folders, *jupyter) if not settings.get(n, "").startswith(str(repository))}
    assert not outside


def test_continuous_integration_runs_make_test_and_nothing_else(repository: Path) -> None:
    script = (repository / ".ci" / "run").read_text("utf-8").splitlines()
    commands = [line for line in script if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["exec make test"]
