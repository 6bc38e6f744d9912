"""Worker processes: what they tell arrives, what they raise is what their parent sees, and they end when told.

That they end with a killed parent is shown in test_comparison.py, on a demo that is killed.
"""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import CancelledError

import pytest
import torch

from fedlab.core.errors import SiteError
from fedlab.core.workers import Stopped, Workers, available_cores, tell


def talk(name: str, count: int) -> int:
    for number in range(count):
        tell((name, number))
    return os.getpid()


def fail(error: BaseException) -> None:
    tell("before the error")
    raise error


def settings() -> tuple[int, object]:
    return torch.get_num_threads(), signal.getsignal(signal.SIGINT)


def work_until_stopped() -> None:
    while True:
        tell("working")
        time.sleep(0.02)


@pytest.fixture(scope="module")
def workers():
    with Workers(2) as pool:
        yield pool


def collect(pool: Workers, count: int) -> list[object]:
    """The next `count` messages; they may come a moment after the task's result."""
    found: list[object] = []
    end = time.monotonic() + 60
    while len(found) < count and time.monotonic() < end:
        found += pool.messages()
        time.sleep(0.01)
    return found


def test_messages_arrive_complete_and_in_each_task_s_order(workers):
    futures = [workers.submit(talk, name, 50) for name in ("a", "b", "c")]
    pids = {future.result() for future in futures}
    assert os.getpid() not in pids
    found = collect(workers, 150)
    for name in ("a", "b", "c"):
        assert [number for sender, number in found if sender == name] == list(range(50))
    assert list(workers.messages()) == []


def test_an_error_keeps_its_type_and_the_workers_go_on(workers):
    with pytest.raises(SiteError, match="site 'Bern' failed in round 3 at stage 'fit': loss is nan") as caught:
        workers.submit(fail, SiteError("Bern", 3, "fit", "loss is nan")).result()
    assert (caught.value.site, caught.value.round, caught.value.stage) == ("Bern", 3, "fit")
    assert "before the error" in collect(workers, 1)
    with pytest.raises(KeyError, match="gone"):
        workers.submit(fail, KeyError("gone")).result()
    collect(workers, 1)
    assert workers.submit(talk, "still there", 0).result() > 0


def test_one_thread_each_and_deaf_to_ctrl_c(workers):
    assert workers.submit(settings).result() == (1, signal.SIG_IGN)


def test_telling_outside_a_worker_does_nothing(workers):
    assert tell("nobody listens") is None
    assert list(workers.messages()) == []


def test_stop_ends_running_tasks_and_waiting_ones_never_start():
    pool = Workers(1)
    running = pool.submit(work_until_stopped)
    waiting = [pool.submit(work_until_stopped) for _ in range(4)]
    assert collect(pool, 3)[:3] == ["working"] * 3
    pool.stop()
    with pytest.raises(Stopped):
        running.result(timeout=1)
    # One more than there are workers may be on its way already; it too ends at its first word.
    for future in waiting:
        with pytest.raises((Stopped, CancelledError)):
            future.result(timeout=1)
    assert all(future.cancelled() for future in waiting[1:])
    with pytest.raises(RuntimeError):
        pool.submit(settings)


def test_an_error_in_the_block_stops_the_workers():
    with pytest.raises(ZeroDivisionError), Workers(1) as pool:
        running = pool.submit(work_until_stopped)
        collect(pool, 1)
        raise ZeroDivisionError
    with pytest.raises(Stopped):
        running.result(timeout=1)


@pytest.mark.parametrize("count", [0, -1])
def test_a_pool_without_workers_is_refused(count):
    with pytest.raises(ValueError, match=f"workers is a positive whole number or None, got {count}"):
        Workers(count)


def test_by_default_one_worker_for_each_core_we_may_use():
    assert available_cores() >= 1
    if hasattr(os, "sched_setaffinity"):
        allowed = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, {min(allowed)})
            assert available_cores() == 1
            with Workers() as pool:
                assert pool._max_workers == 1
        finally:
            os.sched_setaffinity(0, allowed)
