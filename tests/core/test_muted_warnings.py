"""Muted warnings: only those, only in the block, and of several threads none leaves a filter behind."""

from __future__ import annotations

import threading
import warnings

import pytest

from fedlab.core.muted_warnings import muted


def test_only_that_warning_is_muted_and_only_in_the_block():
    with pytest.warns(UserWarning) as shown:
        with muted("a grid"):
            warnings.warn("a grid is coarse", stacklevel=1)
            warnings.warn("another", stacklevel=1)
        warnings.warn("a grid is coarse", stacklevel=1)
    assert [str(one.message) for one in shown] == ["another", "a grid is coarse"]


def test_blocks_that_overlap_in_threads_leave_the_filters_as_they_were():
    before, entered, left = list(warnings.filters), threading.Event(), threading.Event()

    def other():
        with muted("a grid"):
            entered.set()
            left.wait()

    thread = threading.Thread(target=other)
    with muted("a grid"):
        thread.start()
        entered.wait()
    assert len(warnings.filters) == len(before) + 1  # the other thread is still in its block
    left.set()
    thread.join()
    assert list(warnings.filters) == before


def test_filters_that_were_reset_in_the_block_are_left_alone():
    with warnings.catch_warnings():
        with muted("a grid"):
            warnings.resetwarnings()
        assert warnings.filters == []
