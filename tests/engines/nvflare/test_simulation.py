"""A run in NVFLARE's simulator: the same bits as in this process, each round as it is finished."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
import torch

from cohorts import BatchNet, TinyNet, blob_sites
from fedlab import Local, PrivacyError, SiteTrainer, federate
from fedlab.core import Round, RunError
from fedlab.core import weights_sha256 as sha
from fedlab.deploy.plan import built
from fedlab.engines import NVFlare, ProofOfConcept, Simulation
from fedlab.run import History
from fedlab.strategies import FedOpt


def run(engine: Local | NVFlare, *, rounds: int = 3, came: list[tuple[float, Round]] | None = None,
        network: type[TinyNet] = TinyNet) -> History:
    trainer = SiteTrainer(model=built(network, seed=3), lr=0.01, steps=2, crop=(8, 8, 8), precision="fp32")
    seen = [] if came is None else came
    return federate(trainer, blob_sites((3, 2)), strategy=FedOpt(rule="adam", server_lr=0.01), rounds=rounds, seed=5,
                    engine=engine, progress=False, on_round=lambda one: seen.append((time.monotonic(), one)))


def processes_of(folder: Path) -> list[int]:
    return [p.pid for p in psutil.process_iter(["cmdline"]) if any(str(folder) in part for part in
                                                                   p.info["cmdline"] or ())]


def test_same_bits_as_local(tmp_path: Path) -> None:
    """Of the weights and of batch norm's statistics."""
    torch.set_num_threads(1)
    came: list[tuple[float, Round]] = []
    there = run(NVFlare(env=Simulation(folder=tmp_path / "simulation")), came=came, network=BatchNet)
    over = time.monotonic()
    here = run(Local(), network=BatchNet)
    assert here.state is not None and there.state is not None
    assert len(here.state.buffers) == 3 and here.state.buffers.keys() == there.state.buffers.keys()
    assert sha(there.state.params) == sha(here.state.params)
    assert sha(there.state.model) == sha(here.state.model)
    assert [one.number for _, one in came] == [0, 1, 2] and came[0][0] < over
    for mine, theirs in zip(here.records, there.records, strict=True):
        assert mine["sites"].keys() == theirs["sites"].keys()
        for site, numbers in mine["sites"].items():
            own = {name: value for name, value in numbers.items() if name != "seconds"}
            assert own == {name: value for name, value in theirs["sites"][site].items() if name != "seconds"}
    assert processes_of(tmp_path) == []

    # The run lies in the folder: the same run again is only read.
    log = tmp_path / "simulation" / "simulator.log"
    size = log.stat().st_size
    again = run(NVFlare(env=Simulation(folder=tmp_path / "simulation")), network=BatchNet)
    assert again.state is not None and sha(again.state.model) == sha(here.state.model)
    assert log.stat().st_size == size


def test_processes_with_certificates_of_their_own_give_the_same_bits(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    there, here = run(NVFlare(env=ProofOfConcept(folder=tmp_path)), rounds=2), run(Local(), rounds=2)
    assert here.state is not None and there.state is not None
    assert sha(there.state.params) == sha(here.state.params)
    assert processes_of(tmp_path) == []
    log = (tmp_path / "project" / "kits" / "server" / "log.txt").read_text(encoding="utf-8")
    for name in ("site-0", "site-1"):
        # The site and its job, each with the site's certificate; no job was a program of its own.
        assert log.count(f"SSL {name}] is created") >= 2
        assert "posix_spawn" not in (tmp_path / "project" / "kits" / name / "log.txt").read_text(encoding="utf-8")
    assert "ServerLauncher" in log and "posix_spawn" not in log


def test_what_a_site_refuses_reaches_the_researcher(tmp_path: Path) -> None:
    """A crop that is larger than its patients, found out only at the sites."""
    trainer = SiteTrainer(model=built(TinyNet, seed=3), lr=0.01, steps=2, crop=(64, 64, 64), precision="fp32")
    with pytest.raises((RunError, PrivacyError), match="larger than patient"):
        federate(trainer, blob_sites((3, 2)), rounds=1, engine=NVFlare(env=Simulation(folder=tmp_path)),
                 progress=False)


def test_what_cannot_run_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    trainer = SiteTrainer(model=built(TinyNet, seed=3), lr=0.01, steps=2, crop=(8, 8, 8), precision="fp32")
    engine = NVFlare(env=Simulation(folder=tmp_path / "none"))
    with pytest.raises(ValueError, match="rounds is a positive"):
        federate(trainer, blob_sites((3, 2)), rounds=0, engine=engine)
    with pytest.raises(ValueError, match="by name only"):
        federate(trainer, ["a", "b"], rounds=1, engine=Local())
    with pytest.raises(ValueError, match="another function"):
        class Mine(torch.nn.Conv3d):
            pass

        federate(SiteTrainer(model=Mine(4, 3, 1), lr=0.01, steps=2), blob_sites((3, 2)), rounds=1, engine=engine)
    assert not (tmp_path / "none").exists()
