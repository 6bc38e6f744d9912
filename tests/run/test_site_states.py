"""What sites keep: on disk while they are not at work, gone with the run, and whole or refused."""

from __future__ import annotations

import multiprocessing
import os
import signal
import weakref

import pytest
import torch

from fedlab.core.errors import RunError
from fedlab.core.types import SiteState
from fedlab.run.site_states import SiteStates, pack_site_state, unpack_site_state


def state() -> SiteState:
    return SiteState(enrolled=True, updates=3, ledger={"format": "x", "entries": [1.5]},
                     namespaces={"optimiser": {"w|step": torch.tensor(6.0), "w|exp_avg": torch.randn(2, 3)},
                                 "privacy 0": {"half": torch.ones(4, dtype=torch.float16), "count": torch.tensor(7)},
                                 "empty": {}},
                     diagnostics={"norm": torch.tensor(1.25, dtype=torch.float64)}, secrets={"key": b"s"})


def test_a_state_comes_back_as_it_was_but_for_its_secrets():
    one = state()
    other = unpack_site_state(pack_site_state(one, site="a"), what="a", site="a")
    assert (other.enrolled, other.updates, other.ledger, other.secrets) == (True, 3, one.ledger, {})
    assert {o: list(s) for o, s in other.namespaces.items()} == {o: list(s) for o, s in one.namespaces.items()}
    for owner, slots in one.namespaces.items():
        for name, tensor in slots.items():
            found = other.namespaces[owner][name]
            assert found.dtype == tensor.dtype and torch.equal(found, tensor) and found.shape == tensor.shape
    assert torch.equal(other.diagnostics["norm"], one.diagnostics["norm"])


@pytest.mark.parametrize("spoil", [lambda data: data[:-3], lambda data: b"", lambda data: data[:40] + b"}" + data[41:]])
def test_a_damaged_or_foreign_file_is_refused(spoil):
    with pytest.raises(RunError, match="x is damaged"):
        unpack_site_state(spoil(pack_site_state(state(), site="a")), what="x", site="a")
    with pytest.raises(RunError, match="it is about"):
        unpack_site_state(pack_site_state(state(), site="b"), what="x", site="a")


def test_a_number_that_was_changed_on_disk_is_noticed(tmp_path):
    """One bit of one weight: the file is still a whole one."""
    states = SiteStates(["a", "b"], folder=tmp_path / "states")
    states.save("a", SiteState(enrolled=True, namespaces={"optimiser": {"w": torch.ones(3)}}))
    (tmp_path / "kept").mkdir()
    saved = states.link_to(tmp_path / "kept")
    assert saved["b"] is None
    restored = SiteStates.restored(tmp_path / "kept", saved, to=tmp_path / "new")
    assert torch.equal(restored["a"].namespaces["optimiser"]["w"], torch.ones(3))
    file = tmp_path / "kept" / "a.safetensors"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert not torch.equal(unpack_site_state(file.read_bytes(), what="a").namespaces["optimiser"]["w"], torch.ones(3))
    with pytest.raises(RunError, match="its content is not what was written"):
        SiteStates.restored(tmp_path / "kept", saved, to=tmp_path / "newer")


def test_work_that_fails_leaves_the_state_but_for_its_ledger():
    states = SiteStates(["a"])
    with states.working("a") as first:
        first.own["x"] = torch.ones(2)
    with pytest.raises(ZeroDivisionError), states.working("a") as tried:
        tried.own["x"] = torch.zeros(2)
        tried.updates += 1
        tried.ledger["entries"] = ["charged"]
        raise ZeroDivisionError
    assert states["a"].namespaces["site"]["x"].tolist() == [1, 1] and states["a"].updates == 0
    assert states["a"].ledger == {"entries": ["charged"]}


def test_the_folder_goes_with_the_run():
    states = SiteStates(["a"])
    folder = states.folder
    states.save("a", state())
    assert list(states) == ["a"] and states.get("b") is None
    del states
    assert not folder.exists()


def aged(folder):
    os.utime(folder, (0, 0))
    return folder


def test_folders_of_killed_processes_go_and_those_in_use_stay():
    made, ready = multiprocessing.Pipe()

    def work():
        states = SiteStates(["a"])
        states.save("a", state())
        ready.send(states.folder)
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    killed, ours = made.recv(), SiteStates(["a"])
    process.join()
    assert killed.exists()
    aged(killed), aged(ours.folder)
    SiteStates()
    assert not killed.exists() and ours.folder.exists()


def test_a_forked_copy_leaves_the_folder_alone():
    states = SiteStates(["a"])
    states.save("a", state())

    def work():
        weakref.finalize._exitfunc()  # as when the forked process ends of itself

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0 and states["a"].updates == state().updates
