"""The workers of Processes end with it, whatever happens to it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import monai.transforms  # noqa: F401  # its imports that failed hold all frames above them, so not within a test
import pytest
from test_processes import Tells, Waits, alive, pids, run

from cohorts import blob_sites
from fedlab.checks.engine import FailsAt
from fedlab.core.errors import RunError, SiteError
from fedlab.engines.processes import Processes
from fedlab.run.federate import each_round
from fedlab.strategies import FedAvg
from runs import wait_for
from trainers import trainer
from warm import PYTHON

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_notebook_s_own_cell_and_nothing_left_when_its_kernel_ends(tmp_path):
    """A process whose code is in no file, as a kernel's: one cell, then the end without any clean-up."""
    cell = textwrap.dedent("""
        import os, sys, torch
        torch.set_num_threads(1)
        from cohorts import TinyNet, blob_sites
        from fedlab import Local, Privacy, SiteTrainer, federate
        from fedlab.core import weights_sha256
        from fedlab.engines import Processes
        class Mine(Privacy):
            def protect(self, update, state, rng):
                return update.map(lambda t: t * 0.5)
        trainer = SiteTrainer(model=TinyNet(), lr=1e-2, steps=1, crop=(16, 16, 16), augment=None, precision="fp32")
        engine = Processes(workers=2)
        for used in (engine, Local()):
            done = federate(trainer, blob_sites((1, 1)), privacy=Mine(), rounds=1, progress=False, engine=used)
            print(weights_sha256(done.state.params))
        print(*(worker.process.pid for worker in engine._pool._workers))
        """)
    out = subprocess.run([*PYTHON, "-c", cell], capture_output=True, text=True, timeout=300,
                         env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
    assert out.returncode == 0, out.stderr
    ours, theirs, workers = out.stdout.splitlines()
    assert ours == theirs and len(workers.split()) == 2
    wait_for(lambda: not any(alive(int(pid)) for pid in workers.split()), seconds=10, why="workers outlive it")


SCRIPT = """
import torch
torch.set_num_threads(1)
print("the script runs")
from cohorts import TinyNet, blob_sites
from fedlab import Local, Privacy, SiteTrainer, federate
from fedlab.core import weights_sha256
from fedlab.engines import Processes

class Halves(Privacy):
    def protect(self, update, state, rng):
        return update.map(lambda t: t / 2)

trainer = SiteTrainer(model=TinyNet(), lr=1e-2, steps=1, crop=(16, 16, 16), augment=None, precision="fp32")
for engine in (Processes(workers=2), Local()):
    done = federate(trainer, blob_sites((1, 1)), privacy=Halves(), rounds=1, progress=False, engine=engine)
    print(weights_sha256(done.state.params))
"""


@pytest.mark.parametrize("how", ["standard input", "file", "module"])
def test_a_script_without_a_main_guard_works(how, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = {"standard input": [*PYTHON, "-"], "file": [sys.executable, str(tmp_path / "script.py")],
               "module": [*PYTHON, "-m", "script"]}[how]
    out = subprocess.run(command, input=SCRIPT, capture_output=True, text=True, timeout=300,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join(
                             [str(Path(__file__).parents[1]), str(tmp_path), os.environ.get("PYTHONPATH", "")])})
    assert out.returncode == 0, out.stderr
    said, ours, theirs = out.stdout.splitlines()
    assert said == "the script runs" and ours == theirs and len(ours) == 64


def test_workers_end_with_the_block_the_engine_and_close():
    with Processes(workers=2) as engine:
        run(engine, rounds=1)
        first = pids(engine)
        assert len(first) == 2 and all(map(alive, first))
    assert not any(map(alive, first))
    run(engine, rounds=1)  # of use again
    second = pids(engine)
    engine.close()
    engine.close()
    run(engine, rounds=1)
    third = pids(engine)
    del engine
    gc.collect()
    assert len(second) == len(third) == 2 and not any(map(alive, (*second, *third)))


def test_running_a_cell_again_piles_up_no_processes():
    """Also where an exception's traceback holds on to the engine, as in a notebook."""
    seen, held = [], None
    for _ in range(3):
        engine = Processes(workers=2)
        try:
            run(engine, privacy=Tells(what="worker"))
        except SiteError as error:
            held = error
        seen += pids(engine)
    assert held is not None
    assert sum(map(alive, seen)) <= 4
    held = engine = None
    gc.collect()
    assert not any(map(alive, seen))


def test_ctrl_c_ends_the_workers(tmp_path):
    engine = Processes(workers=2)
    told = []

    def interrupt():
        wait_for((tmp_path / "site-0").is_file, seconds=60, why="site-0 doesn't begin")
        time.sleep(0.2)
        told.extend(pids(engine))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run(engine, privacy=Waits(folder=str(tmp_path), site="site-0"))
    finally:
        signal.signal(signal.SIGINT, before)
        thread.join()
    assert len(told) == 2 and not any(map(alive, told)) and pids(engine) == []


def test_an_exception_of_the_server_ends_the_sites_that_had_run_ahead(tmp_path):
    engine = Processes(workers=2)
    started = time.monotonic()
    with pytest.raises(SiteError):
        run(engine, (1, 1), privacy=FailsAt(site="site-0", stage="fit", round=0)
            + Waits(folder=str(tmp_path), site="site-1"))
    gc.collect()
    assert time.monotonic() - started < 50  # site-1 would wait for a minute
    assert len(pids(engine)) == 1
    engine.close()


def test_closing_it_in_the_middle_of_a_round_is_an_error_not_a_hang():
    engine = Processes(workers=1)
    with pytest.raises((RunError, SiteError)):
        for _ in each_round(trainer(), blob_sites((1, 1, 1)), engine=engine, rounds=1, strategy=Closes(engine)):
            pass
    engine.close()


class Closes(FedAvg):
    def __init__(self, engine):
        super().__init__()
        object.__setattr__(self, "closing", engine.close)

    def combine(self, updates):
        def closed():
            for update in updates:
                self.closing()
                yield update

        return super().combine(closed())

    def __reduce__(self):
        return FedAvg, ()
