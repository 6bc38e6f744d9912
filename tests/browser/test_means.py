"""The tools of the browser tests: their measurements, and the installation of Chromium."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lab import coloured, differing, grey, require_chromium

COLOURS = {"NCR": (0.91, 0.26, 0.18), "ED": (0.07, 0.72, 0.53), "ET": (1.0, 0.83, 0.23)}


def test_without_chromium_tests_are_skipped_but_not_in_ci() -> None:
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        require_chromium(None, ci=False)
    with pytest.raises(pytest.fail.Exception, match="must not skip"):
        require_chromium(None, ci=True)
    require_chromium("chromium", ci=True)


@pytest.mark.parametrize("colour", COLOURS.values(), ids=COLOURS)
def test_a_tumour_is_distinguished_from_a_brain(colour: tuple[float, float, float]) -> None:
    brain = np.zeros((60, 60, 3), np.float32)
    brain[5:55, 5:55] = 0.5
    assert coloured(brain) == 0 and grey(brain) == 2500
    tumour = brain.copy()
    tumour[20:40, 20:40] = 0.4 * tumour[20:40, 20:40] + 0.6 * np.array(colour, np.float32)
    assert coloured(tumour) == 400 and grey(tumour) == 2100
    assert differing(brain, tumour) == 400 and differing(brain, brain) == 0


def test_pictures_without_a_tumour() -> None:
    blank = np.zeros((60, 60, 3), np.float32)
    assert coloured(blank) == grey(blank) == 0 == coloured(1 - blank) == grey(1 - blank)
    crosshair = blank.copy()
    crosshair[30] = (0.5, 0.83, 1.0)
    assert coloured(crosshair) == 0
    assert differing(blank, np.zeros((60, 61, 3), np.float32)) == 3600


def make_chromium(repository: Path, folder: Path, **programs: str) -> subprocess.CompletedProcess[str]:
    """Runs `make chromium` with these programs, given as shell scripts, and few others."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(repository / name, folder)
    (folder / "bin").mkdir()
    for name in ("sh", "cat", "pwd", "mkdir", "env", "make"):
        (folder / "bin" / name).symlink_to(shutil.which(name) or name)
    for name, script in programs.items():
        file = folder / "bin" / name.replace("_", "-")
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", "chromium"], cwd=folder, capture_output=True, text=True, timeout=60,
                          env={**environment, "PATH": str(folder / "bin")})


APT = 'echo "$@" >> apt.log'


def test_make_installs_chromium_for_root(repository: Path, tmp_path: Path) -> None:
    done = make_chromium(repository, tmp_path, id="echo 0", apt_get=APT)
    assert done.returncode == 0 and "installing Chromium" in done.stdout, done
    assert (tmp_path / "apt.log").read_text().splitlines() == ["update", "install -y --no-install-recommends chromium"]


def test_make_installs_chromium_with_sudo_without_password(repository: Path, tmp_path: Path) -> None:
    done = make_chromium(repository, tmp_path, id="echo 1000", sudo='[ "$1" = -n ] && shift && "$@"', apt_get=APT,
                         true="exit 0")
    assert done.returncode == 0 and "install" in (tmp_path / "apt.log").read_text(), done


def test_make_continues_without_chromium(repository: Path, tmp_path: Path) -> None:
    done = make_chromium(repository, tmp_path, id="echo 1000", sudo="exit 1", apt_get=APT)
    assert done.returncode == 0 and "are skipped" in done.stdout, done
    assert not (tmp_path / "apt.log").exists()


def test_make_continues_when_chromium_cannot_be_installed(repository: Path, tmp_path: Path) -> None:
    done = make_chromium(repository, tmp_path, id="echo 0", apt_get="exit 100")
    assert done.returncode == 0 and "that failed" in done.stdout, done


def test_make_keeps_an_installed_chromium(repository: Path, tmp_path: Path) -> None:
    done = make_chromium(repository, tmp_path, id="echo 0", apt_get=APT, chromium="exit 0")
    assert done.returncode == 0 and done.stdout == "", done
    assert not (tmp_path / "apt.log").exists()
