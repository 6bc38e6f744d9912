"""A full disk ends a run with one clear line, leaves no half file, and the run goes on when there is space again."""

from __future__ import annotations

import errno
import json
import os

import pytest
from safetensors import SafetensorError

from cohorts import blob_sites
from fedlab.core import files
from fedlab.core.errors import RunError
from fedlab.core.weights import weights_sha256
from fedlab.run import checkpoint as checkpoints
from fedlab.run import site_states
from fedlab.run.federate import federate
from fedlab.run.trace import verify
from fedlab.run.trackers import CsvTracker
from trainers import trainer

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FULL_BY_SAFETENSORS = SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')


def run(folder, *, rounds=3):
    return federate(trainer(), blob_sites(), rounds=rounds, checkpoint=folder / "run", trace=folder / "trace.jsonl",
                    on_round=CsvTracker(path=folder / "rounds.csv"), progress=False)


def full(monkeypatch, module, name, error, *, calls):
    """Raises the error in a call of a function, after some that succeed."""
    works, left = getattr(module, name), [calls]

    def fails(*arguments, **settings):
        done = works(*arguments, **settings)
        left[0] -= 1
        if left[0] < 0:
            raise error  # what was written before stays
        return done

    monkeypatch.setattr(module, name, fails)


@pytest.mark.parametrize("module, name, error, calls, lost", [
    (files.os, "fsync", FULL, 3, None), (files.os, "fsync", FULL, 5, None), (files.os, "fsync", FULL, 4, 0),
    (files.os, "fsync", FULL, 6, 1), (checkpoints, "save_file", FULL_BY_SAFETENSORS, 1, None),
    (site_states, "save_file", FULL_BY_SAFETENSORS, 2, None),
], ids=["trace, round 0", "trace, round 1", "tracker, round 0", "tracker, round 1", "model", "site's state"])
def test_a_full_disk_is_one_clear_line_and_the_run_goes_on(tmp_path, monkeypatch, module, name, error, calls, lost):
    """The tracker lacks the round in which it failed itself, since the checkpoint had that round already."""
    with monkeypatch.context() as patch, pytest.raises(RunError, match=r"No space left on device") as caught:
        full(patch, module, name, error, calls=calls)
        run(tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.part"))
    for line in (tmp_path / "trace.jsonl").read_bytes().splitlines(keepends=True):
        assert line.endswith(b"\n") and json.loads(line)
    if (tmp_path / "rounds.csv").exists():
        assert all(line.count(",") == 3 for line in (tmp_path / "rounds.csv").read_text().splitlines())
    again, whole = run(tmp_path), run(tmp_path / "whole")
    assert weights_sha256(again.state.params) == weights_sha256(whole.state.params)
    norms = [line for line in (tmp_path / "rounds.csv").read_text().splitlines() if ",norm," in line]
    assert norms == [f"{record['round']},{site},norm,{numbers['norm']}" for record in whole.records
                     if record["round"] != lost for site, numbers in record["sites"].items()]
    assert verify(tmp_path / "trace.jsonl").ok and verify(tmp_path / "trace.jsonl").rounds == 3


def test_the_message_says_what_to_do(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        full(patch, checkpoints, "save_file", FULL_BY_SAFETENSORS, calls=0)
        with pytest.raises(RunError, match=r"the run cannot be saved .*free some space and start it again"):
            run(tmp_path)
