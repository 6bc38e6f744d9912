"""The base install alone, without a notebook, runs a federation and a site's host.

A new environment is filled with the wheel of this checkout and with links to the distributions that its base
requirements need, directly or through others, taken from the environment that runs the tests. Nothing else can be
imported in it, as after `pip install` of the wheel; but it takes seconds and no network, where an installation would
copy torch and reach for an index. That the requirements can be met from an index is what `make install` shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import venv
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SCRIPT = Path(__file__).with_name("base_install.py")
#: Runs the first cell of each notebook, and prints the error that it ends in.
FIRST_CELLS = """
import json, sys
said = {}
for name, source in json.load(open(sys.argv[1])).items():
    try:
        exec(source, {})
        said[name] = "nothing is missing"
    except Exception as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def closure(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """The installed distributions that requirements need, with those that these need in turn."""
    found: dict[str, metadata.Distribution] = {}
    asked: set[tuple[str, str]] = set()
    open_ends = [(Requirement(text), "") for text in requirements]
    while open_ends:
        requirement, extra = open_ends.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found[name] = metadata.distribution(requirement.name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in asked:
                asked.add((name, wanted))
                open_ends += [(Requirement(text), wanted) for text in found[name].requires or ()]
    return found


def tops(distribution: metadata.Distribution) -> dict[str, list[PurePosixPath]]:
    """Its files inside site-packages by their first part; scripts and the like, which lie outside, are left out."""
    files: dict[str, list[PurePosixPath]] = defaultdict(list)
    for path in distribution.files or ():
        if ".." not in path.parts and path.parts[0] != "__pycache__" and not path.is_absolute():
            files[path.parts[0]].append(PurePosixPath(path))
    return files


def link(distributions: dict[str, metadata.Distribution], target: Path) -> None:
    """Links distributions into `target`: whole folders, or single files where several distributions share a folder."""
    owners: dict[str, int] = defaultdict(int)
    for installed in metadata.distributions():
        for top in tops(installed):
            owners[top] += 1
    for name, distribution in distributions.items():
        listed = tops(distribution)
        assert listed, f"{name} does not say which files it has"
        for top, files in listed.items():
            for path in [PurePosixPath(top)] if owners[top] == 1 else files:
                place = target / path
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(Path(str(distribution.locate_file(str(path)))))


@pytest.fixture(scope="module")
def base(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of programs of an environment with the base install."""
    folder = tmp_path_factory.mktemp("base")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"
    where = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                           capture_output=True, text=True, check=True)
    project = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]
    link(closure(project["dependencies"]), Path(where.stdout.strip()))
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=repository, check=True, capture_output=True, timeout=120)
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet",
               *map(str, folder.glob("*.whl"))]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    yield python.parent


def run(program: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run([program, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_a_federated_run_and_a_site_host(base: Path, tmp_path: Path) -> None:
    done = run(base / "python", str(SCRIPT), str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fedlab"].startswith(str(base.parent)), "not the checkout, but what the wheel brought"
    assert found["rounds"] == 2 and found["patients scored"] > 0 and found["weight of the update"] > 0
    assert found["present"] == [], "these belong to extras"
    for name, said in found["refusals"].items():
        assert "pip install 'fedlab-workbench[lab]'" in said, name


def test_the_command_line(base: Path, tmp_path: Path) -> None:
    for arguments in (["--help"], ["site", "--help"], ["site", "init", "--help"], ["deploy", "--help"]):
        done = run(base / "fedlab", *arguments, cwd=tmp_path)
        assert done.returncode == 0 and "usage: fedlab" in done.stdout, done.stderr


def test_a_folder_is_inspected_without_a_page(base: Path, tmp_path: Path) -> None:
    made = run(base / "fedlab", "data", "phantom", "--out", "scans", "--sites", "1", "--patients", "2", "--shape",
               "32,32,32", "--spacing", "6", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    done = run(base / "fedlab", "data", "inspect", "scans", cwd=tmp_path)
    assert done.returncode == 0 and "2 patients" in done.stdout, done.stderr
    assert "no page is written" in done.stderr and "pip install 'fedlab-workbench[lab]'" in done.stderr
    asked = run(base / "fedlab", "data", "inspect", "scans", "--html", "page.html", cwd=tmp_path)
    assert asked.returncode == 1 and "pip install 'fedlab-workbench[lab]'" in asked.stderr


def test_every_notebook_names_the_command_in_its_first_cell(base: Path, repository: Path, tmp_path: Path) -> None:
    notebooks = sorted((repository / "notebooks").glob("*.ipynb"))
    cells = {path.name: nbformat.read(path, as_version=4).cells for path in notebooks}
    firsts = {name: next(cell.source for cell in found if cell.cell_type == "code") for name, found in cells.items()}
    (tmp_path / "firsts.json").write_text(json.dumps(firsts))
    done = run(base / "python", "-c", FIRST_CELLS, str(tmp_path / "firsts.json"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert len(said) == len(notebooks) >= 10
    for name, error in said.items():
        if name.startswith("08"):
            assert error.startswith("NVFLARE is not installed") and "make install" in error
        else:
            assert error.startswith("this notebook needs matplotlib"), f"{name}: {error}"
            assert "pip install 'fedlab-workbench[lab]'" in error, name


def test_a_comparison_names_the_extra_before_anything_is_made(base: Path, tmp_path: Path) -> None:
    done = run(base / "fedlab", "demo", "--out", "demo", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "pip install 'fedlab-workbench[lab]'" in done.stderr
    assert not any(tmp_path.iterdir())
