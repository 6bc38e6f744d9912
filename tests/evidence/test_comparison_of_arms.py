"""Comparisons of any arms: the same models as plain runs, scored on the same patients, continued where they ended."""

from __future__ import annotations

import os
import pickle
import subprocess
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from cohorts import blob_sites
from fedlab.core.errors import DataError, PrivacyError
from fedlab.core.types import Site
from fedlab.core.weights import load_weights, weights_sha256
from fedlab.evidence.arms import Arm
from fedlab.evidence.comparison import compare_arms
from fedlab.evidence.differences import groups
from fedlab.privacy.base import Privacy
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.personal_layers import PersonalLayers
from fedlab.run.baselines import centralised
from fedlab.run.federate import federate
from fedlab.strategies.client_drift import FedProx
from fedlab.topologies import ring
from fedlab.training.metrics import evaluate
from trainers import trainer
from warm import PYTHON


class Halved(Privacy):
    """A technique of a notebook: half of the update leaves."""

    def protect(self, update, state, rng):
        return update.map(lambda t: t / 2)


def sites() -> list[Site]:
    return blob_sites((3, 1, 2))


def arms() -> dict[str, Arm]:
    return {"untouched": Arm(trainer=trainer(), rounds=0), "federated": Arm(trainer=trainer(), rounds=2),
            "halved": Arm(trainer=trainer(), rounds=1, strategy=FedProx(mu=0.1), privacy=Halved()),
            "pooled": Arm(trainer=trainer(), rounds=2, data="pooled"),
            "alone": Arm(trainer=trainer(), rounds=2, data="each")}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arms")
    return folder, compare_arms(sites(), arms(), seeds=(0, 7), out=folder, progress=False, workers=1)


def expected_state(name: str, seed: int):
    if name == "untouched":
        return trainer().initial()
    if name == "pooled":
        return centralised(trainer(), sites(), rounds=2, seed=seed, progress=False).state.params
    parts = {"strategy": FedProx(mu=0.1), "privacy": Halved()} if name == "halved" else {}
    chosen = [site for site in sites() if name == f"alone {site.name}"] or sites()
    return federate(trainer(), chosen, rounds=1 if parts else 2, seed=seed, progress=False, **parts).state.params


def test_every_model_is_that_of_a_plain_run_and_scored_on_everybody(compared):
    _, found = compared
    names = ["untouched", "federated", "halved", "pooled", *(f"alone site-{k}" for k in range(3))]
    assert set(found.histories) == {(seed, name) for seed in (0, 7) for name in names}
    for (seed, name), history in found.histories.items():
        params = expected_state(name, seed)
        assert weights_sha256(history.state.params) == weights_sha256(params), name
        used = trainer()
        load_weights(used.model, params)
        rows = found.scores[(found.scores["arm"] == name) & (found.scores["seed"] == seed)]
        pd.testing.assert_frame_equal(rows[["site", "patient", "region", "dice"]].reset_index(drop=True),
                                      evaluate(used.model, sites())[["site", "patient", "region", "dice"]])


def test_it_shows_differences_and_claims_none_without_an_interval(compared):
    _, found = compared
    assert found.main == "federated"
    table = found.table()
    assert list(table.index) == ["untouched", "federated", "halved", "pooled", "alone_own", "alone_others"]
    assert table.loc["pooled", "difference"] == pytest.approx(table.loc["federated", "mean"]
                                                              - table.loc["pooled", "mean"])
    assert table["patients"].tolist() == [3] * 6  # the seeds share their three patients
    assert "3 held-out patients, federated is" in found.verdict()
    gap = found.difference("federated", "pooled")
    by_hand = found.scores.groupby("arm")["dice"].mean()
    assert (gap.patients, gap.value) == (3, pytest.approx(by_hand["federated"] - by_hand["pooled"]))
    assert "<table" in found._repr_html_() and "federated is" in repr(found)


def test_it_continues_where_it_ended(compared, monkeypatch):
    folder, found = compared
    marks = {path: path.stat().st_mtime_ns for path in folder.rglob("scores.csv")}
    assert len(marks) == 14
    again = compare_arms(sites(), arms(), seeds=(0, 7), out=folder, progress=False, workers=1)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("scores.csv")} == marks
    pd.testing.assert_frame_equal(again.scores, found.scores)


def test_a_site_without_a_held_out_patient_still_has_its_own_model():
    scores = pd.DataFrame({"arm": ["local a", "local b", "local a", "local b", "pooled"], "site": list("aaccc")})
    assert groups(scores).tolist() == ["local_own", "local_others", "local_others", "local_others", "pooled"]


@pytest.mark.parametrize("settings, message", [
    (dict(rounds=-1), "rounds is a whole number of at least 0"),
    (dict(rounds=1, data="all"), "data is one of"),
    (dict(rounds=1, data="pooled", strategy=FedProx(mu=0.1)), "strategy: settings of a federation"),
    (dict(rounds=1, privacy=PersonalLayers(names=["*bias*"])), "keeps tensors at the sites"),
])
def test_wrong_arms_are_refused_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        Arm(trainer=trainer(), **settings)


def test_an_arm_can_be_changed_in_another_process():
    arm = pickle.loads(pickle.dumps(Arm(trainer=trainer(), rounds=1, data="pooled")))
    assert replace(arm, rounds=2).rounds == 2
    with pytest.raises(ValueError, match="topology: settings of a federation"):
        replace(arm, topology=ring)


def test_wrong_comparisons_are_refused_before_training():
    with pytest.raises(ValueError, match="at least one arm"):
        compare_arms(sites(), {}, progress=False, workers=1)
    with pytest.raises(DataError, match="no site holds out a patient"):
        compare_arms([Site(name="a", train=sites()[0].train, val=[])], arms(), progress=False, workers=1)
    twice = {"local": Arm(trainer=trainer(), rounds=1, data="each"), "local site-0": Arm(trainer=trainer(), rounds=1)}
    with pytest.raises(ValueError, match="several models of the comparison have the name 'local site-0'"):
        compare_arms(sites(), twice, progress=False, workers=1)


def test_a_technique_that_refuses_ends_the_comparison_with_its_reason():
    bad = {"private": Arm(trainer=trainer(model=torch.nn.Sequential(torch.nn.BatchNorm3d(4), torch.nn.Conv3d(4, 3, 1))),
                          rounds=1, privacy=DPSGD(clip=1.0, noise_multiplier=1.0, sample_rate=1.0))}
    with pytest.raises((ValueError, PrivacyError), match="BatchNorm"):
        compare_arms(sites(), bad, progress=False, workers=1)


def test_seeds_with_patients_of_their_own_count_each_patient():
    found = compare_arms(lambda seed: blob_sites((2, 2)), {"federated": Arm(trainer=trainer(), rounds=1)},
                         seeds=(0, 1), progress=False, workers=1)
    assert found.difference("federated", "federated").patients == 4
    assert "4 held-out patients, 2 seeds" in found.verdict()


SCRIPT = """
from pathlib import Path
from cohorts import TinyNet, blob_sites
import fedlab as fl

def sites(seed):
    assert Path(__file__).name == "script.py"
    return blob_sites((1, 1))

def arms(seed):
    assert Path(__file__).is_file()
    trainer = fl.SiteTrainer(model=TinyNet(), steps=1, crop=(16, 16, 16), augment=None)
    return {"public": fl.Arm(trainer=trainer, rounds=0), "federated": fl.Arm(trainer=trainer, rounds=1)}

print("the script runs")
print(fl.compare_arms(sites, arms, seeds=(0,), workers=1, progress=False).main)
"""


def test_functions_of_a_script_know_its_file_and_workers_do_not_run_it_again(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT, "utf-8")
    folders = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    done = subprocess.run([*PYTHON, str(tmp_path / "script.py")], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["the script runs", "federated"]
