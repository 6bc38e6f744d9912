"""A provisioned server and three hospitals as processes of this machine, with mutual TLS and folders of their own."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from hospitals import DP, ENVIRONMENT, NAMES, PRIVATE, SECURE, UNIFORM, Hospitals, forge, knock, spoil, trainer
from opacus.accountants import RDPAccountant
from safetensors.torch import load_file

from fedlab import Local, PrivacyError, federate
from fedlab.core import Round, weights_sha256
from fedlab.engines.nvflare.admin import Admin
from fedlab.engines.nvflare.kits import begin, running
from fedlab.engines.nvflare.parties import parties
from fedlab.engines.nvflare.run_folder import FinishedRounds, read_round
from fedlab.privacy import AtSites, LedgerFile
from fedlab.run import Admission, verify
from runs import command, wait_for


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        made = Hospitals(tmp_path_factory.mktemp("hospitals"))
        try:
            # Forked, since importing everything takes each job of each party seconds. What a test kills or ends is
            # started again as in a hospital, by fedlab deploy start.
            with parties(made.folder, ENVIRONMENT) as start:
                start(made.kits / "server")
                for name in NAMES:
                    start(made.kits / name, made.folder / name)
                yield made
        finally:
            made.end()
            left = [p.pid for p in psutil.process_iter(["cmdline"])
                    if any(str(made.folder) in part for part in p.info["cmdline"] or ())]
            assert left == []


def test_only_who_has_a_certificate_of_the_project_is_let_in(hospitals: Hospitals, tmp_path: Path) -> None:
    with Admin(hospitals.kits / "admin") as admin:
        wait_for(lambda: admin.sites() == sorted(NAMES), seconds=120, why="the three sites connect")
        authority, kit = hospitals.project / "authority", hospitals.kits / "stranger"
        wrong = forge(kit, tmp_path / "wrong", authority, expired=False)
        expired = forge(kit, tmp_path / "expired", authority, expired=True)
        assert knock(hospitals.port, kit) == "open"
        assert "ALERT" in knock(hospitals.port, wrong)
        assert "ALERT_CERTIFICATE_EXPIRED" in knock(hospitals.port, expired)
        assert "ALERT" in knock(hospitals.port, None)
        assert knock(hospitals.port, None, plain=True) != "open"
        for place, let_in in ((expired, False), (kit, True)):
            begin(place, site=hospitals.folder / "site-01")
            try:
                log = place / "console.log"
                wait_for(lambda log=log: b"aux handler" in log.read_bytes(), seconds=120, why="it looks for the server")
                if let_in:
                    wait_for(lambda: "stranger" in admin.sites(), seconds=60, why="with its own kit it is let in")
                else:
                    time.sleep(8)
                    assert b"Successfully registered" not in log.read_bytes()
                    assert "stranger" not in admin.sites()
            finally:
                command("deploy", "stop", place)


def test_a_run_that_a_site_does_not_allow_is_refused_with_the_reason(hospitals: Hospitals) -> None:
    with pytest.raises(PrivacyError, match="site-01 refuses: this site insists on DPSGD"):
        federate(trainer(), NAMES, rounds=1, engine=hospitals.engine(), progress=False)


def test_a_server_that_is_killed_and_started_again_comes_to_the_same_bits(hospitals: Hospitals) -> None:
    """With DP-SGD at one site and secure aggregation over all; each round is charged once."""
    came: list[Round] = []
    listening: set[str] = set()

    def after(finished: Round) -> None:
        came.append(finished)
        if finished.number == 1:
            for process in hospitals.processes():
                listening.update(line.laddr.ip for line in process.net_connections() if line.status == "LISTEN")
            hospitals.kill("server")
            hospitals.start("server")

    settings = {"strategy": UNIFORM, "privacy": PRIVATE, "aggregation": SECURE, "rounds": 4, "seed": 3}
    there = federate(trainer(), NAMES, engine=hospitals.engine(), on_round=after, progress=False, **settings)
    here = federate(trainer(), hospitals.sites(), engine=Local(), progress=False, **settings)
    assert here.state is not None and there.state is not None
    assert weights_sha256(there.state.params) == weights_sha256(here.state.params)
    assert [one.number for one in came] == [0, 1, 2, 3] and not any(one.absent for one in came)
    assert listening == {"127.0.0.1"}

    spent = LedgerFile(hospitals.folder / "site-01" / "ledger", "site-01").read().spent()
    assert came[-1].spent["site-01"] == spent and not came[-1].spent.get("site-02")
    accountant = RDPAccountant()
    for _ in range(4 * 2):
        accountant.step(noise_multiplier=DP.noise_multiplier, sample_rate=2 / len(hospitals.sites()[0].train))
    assert spent[0].epsilon == pytest.approx(accountant.get_epsilon(DP.delta), rel=1e-3)

    runs = [run for run in (hospitals.kits / "server" / "runs").iterdir() if (run / "rounds").is_dir()]
    assert len(runs) == 1 and verify(runs[0] / "trace.jsonl").ok
    said = json.loads((runs[0] / "trace.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert said["sites"]["site-01"]["train"] is None  # how many patients a site has is not known to the server


def test_a_site_that_is_killed_leaves_the_run_going_and_comes_back(hospitals: Hospitals) -> None:
    came: list[Round] = []

    def after(finished: Round) -> None:
        came.append(finished)
        if finished.number == 0:
            time.sleep(0.5)  # the next round is under way
            hospitals.kill("site-03")
            assert running(hospitals.kits / "site-03") == []
            hospitals.start("site-03")

    federate(trainer(steps=40), NAMES, strategy=UNIFORM, privacy=PRIVATE, aggregation=SECURE, rounds=12, seed=4,
             on_round=after, engine=hospitals.engine(), admission=Admission(min_sites=2), progress=False)
    assert [one.number for one in came] == list(range(12))
    gone = [one.number for one in came if "site-03" in one.absent]
    assert gone and gone[0] in (1, 2)
    assert all(set(one.sites) >= {"site-01", "site-02"} for one in came)
    assert "site-03" in came[-1].sites and came[-1].number not in gone


def test_updates_that_were_spoiled_stay_out(hospitals: Hospitals, tmp_path: Path) -> None:
    """By the command line: a saved run, handed in and followed."""
    folder, kit = tmp_path / "run", hospitals.kits / "admin"
    with Admin(kit) as admin:  # alone, this test begins while the sites still look for the server
        wait_for(lambda: set(NAMES) <= set(admin.sites()), seconds=120, why="the three sites connect")
        command("deploy", "stop", hospitals.kits / "site-02")
        last = admin.heard_of().get("site-02", 0.0)
        begin(hospitals.kits / "site-02", environment=spoil(tmp_path / "spoiled"))
        wait_for(lambda: admin.heard_of().get("site-02", 0.0) > last, seconds=120, why="site-02 connects again")
    hospitals.engine().save(folder, trainer(), NAMES, strategy=UNIFORM, rounds=7, seed=5, admission=Admission(),
                            privacy=AtSites(sites=("site-01",), technique=DP))
    printed = command("deploy", "submit", folder, "--kit", kit, "--repeatable-noise")
    kept = FinishedRounds(folder)
    came = [read_round(kept.text(number), kept.weights(number)) for number in range(len(kept))]
    reasons = {one.number: one.absent.get("site-02", "") for one in came}
    assert len(came) == 7 and reasons[0] == reasons[6] == ""
    for number, reason in ((1, "was refused"), (2, "bytes, at most"), (3, "shape"), (4, "site-03"),
                           (5, "answers round")):
        assert reason in reasons[number], reasons
    assert all({"site-01", "site-03"} <= set(one.sites) for one in came)
    assert "round 7 of 7: 3 sites" in printed and "site-02 is not in it" in printed
    assert weights_sha256(load_file(folder / "weights.safetensors")) == weights_sha256(came[-1].state.params)

    wait_for(lambda: "FINISHED" in command("deploy", "status", hospitals.project), seconds=120,
             why="NVFLARE ends the job some seconds after the run")
    status = command("deploy", "status", hospitals.project)
    assert "connected: site-01, site-02, site-03" in status and "FINISHED" in status
    assert "site-01: runs here: process" in status and "stranger: does not run" in status
    assert len(command("deploy", "logs", hospitals.kits / "site-03", "--lines", 5).splitlines()) == 5
