"""The processes of a rehearsal: one per party and job, all forked from one, which they end with."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil
import pytest

from fedlab.core import RunError
from fedlab.engines.nvflare.kits import free_port, make_kits, running, stop
from fedlab.engines.nvflare.launchers import keep_source
from fedlab.engines.nvflare.parties import parties
from runs import wait_for


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("rehearsal") / "project", server="localhost", sites=["a"],
                     port=free_port())


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_each_party_is_a_process_in_its_own_folder_and_all_end_with_the_one_they_are_forked_from(
        kits: Path, tmp_path: Path) -> None:
    with parties(tmp_path, {"OMP_NUM_THREADS": "1"}) as start:
        started = {name: start(kits / name) for name in ("server", "a")}
        # The party and the process that its jobs are forked from.
        wait_for(lambda: all(len(running(kits / name)) == 2 for name in started), seconds=20, why="they are there")
        for name, pid in started.items():
            assert running(kits / name)[0].pid == pid
            assert running(kits / name)[1].ppid() == pid
            assert (kits / name / "console.log").is_file()
        source = psutil.Process(started["a"]).parent()
        assert source is not None and source == psutil.Process(started["server"]).parent()
        assert stop(kits / "a") == 2 and len(running(kits / "server")) == 2
        left = [source, *source.children(recursive=True)]
        os.kill(source.pid, signal.SIGKILL)
        wait_for(lambda: not any(map(lives, left)), seconds=20, why="no party outlives it")
        assert running(kits / "server") == []
        with pytest.raises(RunError, match="could not be started"):
            start(kits / "a")


def test_with_threads_nothing_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threading.active_count", lambda: 2)
    with pytest.raises(RuntimeError, match="has threads"):
        keep_source()
