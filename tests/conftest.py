"""Every test runs offline, one thread a process, without a screen; real scans are optional."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import warm

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; worker processes and kernels inherit it
os.environ.setdefault("MPLBACKEND", "Agg")

REPOSITORY = Path(__file__).resolve().parents[1]
REAL_SCANS = REPOSITORY.parent / "shared" / "data" / "brats_real"
LOOPBACK = {"localhost", "127.0.0.1", "::1", "0.0.0.0", ""}


#: Grid and crops of notebooks, which take minutes with their own. `make gallery` runs them as they are.
CROP, COARSE = "crop = (16, 16, 16)", "shape, spacing_mm = (32, 40, 32), 4.5"
#: Fewer patients, rounds and steps, as far as the compared outputs of a notebook do not show them.
SHORTER = {
    "00_welcome.ipynb": "sizes, held_out, steps = (4, 4, 4, 4), 2, 2",
    "03_privacy_techniques.ipynb": "sizes, held_out, rounds, steps = (4, 4, 3, 3), 1, 2, 2",
    "04_write_your_own_technique.ipynb": "sizes, held_out, steps = (4, 4, 3, 3), 1, 2",
    "05_opacus_dp_sgd.ipynb": "sizes, held_out = (18, 16, 14), 2",
    "06_visualise_predictions_in_3d.ipynb": "sizes, held_out, steps = (4, 4, 4, 4), 2, 2",
    "07_workflows.ipynb": "sizes, held_out, rounds, steps = (4, 4, 3, 3), 1, 2, 2",
    "09_what_an_attacker_learns.ipynb": "attack_steps, canaries = 80, 300",
}
#: Notebooks whose compared outputs show their grid; tests in JupyterLab run both with their own crops too.
SHOW_THEIR_GRID = ("01_first_federated_run.ipynb", "06_visualise_predictions_in_3d.ipynb")
#: Folders whose files take longest: they come first, so that no process waits for the last file of another.
LONGEST = ("nvflare", "notebooks", "browser")


def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores, at most 4: tests of real servers and browsers wait most of their time."""
    return min(4, 1 + (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))


def pytest_configure(config: pytest.Config) -> None:
    """Before several processes run the tests: a process that Pythons and kernels of tests are forked from."""
    warm.servers_of_workers()
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None) or not hasattr(os, "pidfd_open"):
        return
    folder = Path(tempfile.mkdtemp(prefix="fedlab-tests-"))
    kernel = folder / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    started = [*warm.PYTHON, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": started, "display_name": "Python 3", "language": "python"}), "utf-8")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("JUPYTER_PATH")]))
    server = warm.start(folder)
    config.add_cleanup(lambda: (warm.stop(server), shutil.rmtree(folder, ignore_errors=True)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        cell = getattr(item, "cell", None)
        if cell is not None and "parameters" in cell.metadata.get("tags", ()) and re.search(r"\bcrop\b", cell.source):
            cell.source += "\n".join(["", CROP, *([] if item.path.name in SHOW_THEIR_GRID else [COARSE]),
                                      SHORTER.get(item.path.name, "")])
    items.sort(key=lambda item: next((k for k, name in enumerate(LONGEST) if name in item.path.parts), len(LONGEST)))


@pytest.fixture(scope="session", autouse=True)
def offline() -> Iterator[None]:
    """Fail a test that reaches for another machine, at once and by name."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            raise RuntimeError(f"a test opened a connection to {address[0]}: tests must not need the network")
        connect(self, address)

    def guarded_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name is not None and name not in LOOPBACK:
            raise RuntimeError(f"a test looked up {name}: tests must not need the network")
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch with one thread, for tests that compare the bits of several processes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def real_scans() -> Path:
    """The folder of real BraTS scans beside the checkout; the test is skipped where there is none."""
    if not REAL_SCANS.is_dir():
        pytest.skip("no real scans beside the checkout (../shared/data/brats_real)")
    return REAL_SCANS
