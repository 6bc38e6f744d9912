"""The public models do what their cards say; their training is resumable and shows no patient twice."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cohorts import blob_sites
from fedlab.core.weights import trainable, weights_sha256
from fedlab.data.phantom.generator import make_cohort
from fedlab.deploy.plan import Plan
from fedlab.privacy.base import Privacy
from fedlab.run.federate import federate
from fedlab.strategies.averaging import FedAvg
from fedlab.topologies import star
from fedlab.training.metrics import evaluate, predict, summary, threshold_dice
from fedlab.training.networks import load_model
from fedlab.training.public_model import public_card, public_file, public_model
from fedlab.training.trainer import SiteTrainer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "public_model.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("public_model_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def tiny(script):
    return replace(script.RECIPES["broad"], block=4, passes=2, steps=5, warmup=1, crop=16, spacing_mm=6.0,
                   shape=(32, 32, 32))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


def test_each_patient_gives_its_crops_and_is_never_seen_again(script):
    recipe = replace(script.RECIPES["broad"], block=6, passes=3)
    numbers = [recipe.number(0, crop) for crop in range(6 * 3 * 5)]
    assert all(numbers.count(n) == 3 for n in range(30)) and max(numbers) == 29
    last = {n: len(numbers) - 1 - numbers[::-1].index(n) for n in numbers}
    assert all(n // 6 == crop // 18 for crop, n in enumerate(numbers)) and last[0] < 18
    fixed = replace(recipe, passes=0)
    assert sorted(fixed.number(0, crop) for crop in range(12)) == sorted([*range(6)] * 2)


def test_an_interrupted_training_ends_in_the_same_weights(script, tiny, tmp_path):
    whole = script.train("broad", tmp_path / "whole", recipe=tiny, seed=0, every=2, watch=1, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        def stop(*_):
            raise KeyboardInterrupt
        patch.setattr(script, "_write_curve", stop)  # right after the first checkpoint
        with pytest.raises(KeyboardInterrupt):
            script.train("broad", tmp_path / "parts", recipe=tiny, seed=0, every=2, watch=1, progress=False)
    parts = script.train("broad", tmp_path / "parts", recipe=tiny, seed=0, every=2, watch=1, progress=False)
    assert weights_sha256(trainable(parts)) == weights_sha256(trainable(whole))
    rows = list(csv.DictReader((tmp_path / "parts" / "curve.csv").open()))
    assert [int(row["step"]) for row in rows] == [2, 4, 5] and [int(row["patients"]) for row in rows] == [4, 4, 8]
    with pytest.raises(ValueError, match="choose another --out"):
        script.train("broad", tmp_path / "parts", recipe=tiny, seed=1, progress=False)


def test_the_average_follows_the_weights(script, tiny, tmp_path):
    script.train("broad", tmp_path, recipe=replace(tiny, steps=2), seed=0, every=1, watch=0, progress=False)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    start = dict(script.segresnet(seed=0).named_parameters())
    name = "conv_final.2.conv.weight"
    # Shares of 1 - 1/10 and 1 - 2/11 of the present weights: nearly all of the initial ones is forgotten.
    drift = (state["average"][name] - state["model"][name]).abs().max()
    assert 0 < drift < 0.5 * (state["model"][name] - start[name]).abs().max()


def test_a_training_may_begin_with_another_ones_average(script, tiny, tmp_path):
    first = script.train("broad", tmp_path / "first", recipe=replace(tiny, steps=2), seed=0, watch=0, progress=False)
    recipe = replace(tiny, steps=2, rate=1e-12, warmup=0)
    after = script.train("broad", tmp_path / "after", recipe=recipe, seed=3, start=tmp_path / "first", watch=0,
                         progress=False)
    for name, tensor in trainable(first).items():
        torch.testing.assert_close(trainable(after)[name], tensor, rtol=1e-5, atol=1e-7)
    state = torch.load(tmp_path / "after" / "checkpoint.pt", weights_only=True)
    assert state["start"][:2] == ["broad", 2] and state["start"][3:] == [weights_sha256(trainable(first)), 4, 0]


def test_a_training_may_begin_with_a_shipped_model_and_counts_the_looks_at_real_patients_on(script, tiny, tmp_path):
    recipe = replace(tiny, steps=1, rate=1e-12, warmup=0)
    after = script.train("broad", tmp_path, recipe=recipe, seed=3, start="broad", watch=0, progress=False)
    for name, tensor in trainable(public_model()).items():
        torch.testing.assert_close(trainable(after)[name], tensor, rtol=1e-5, atol=1e-7)
    told = json.loads(public_file().with_suffix(".json").read_text(encoding="utf-8"))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["start"][:2] == ["broad", told["step"]] and state["start"][3] == told["sha256"]
    assert state["start"][4] > 5000  # patients
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_cohort", lambda **settings: [])
        patch.setattr(script, "_means", lambda table: {})
        patch.setattr(script, "_threshold", lambda patients: {})
        patch.setattr(script, "evaluate", lambda model, patients: None)
        assert script.score(tmp_path, seed=1)["looks"] == told["looks"] >= 2


def test_the_collection_is_narrow(script):
    profiles = [script.profile("collection", 0, number) for number in range(8)]
    assert profiles[:4] == profiles[4:] and len({repr(one.scanner) for one in profiles}) == 4
    assert {one.scanner.field_t for one in profiles} == {3.0}
    assert all(one.scanner.noise == 0.012 and one.scanner.coverage == (1.0,) * 4 for one in profiles)
    assert all((one.population.low_grade, one.population.median_ml) == (0.0, 110.0) for one in profiles)
    broad = [script.profile("broad", 0, number) for number in range(40)]
    assert len({repr(one) for one in broad}) == 40 and {one.scanner.field_t for one in broad} == {1.5, 3.0}


def test_means_by_hand(script):
    import pandas as pd

    rows = [{"site": "", "patient": str(i), "region": region, "dice": dice, "hd95_mm": 0.0, "reference_ml": ml,
             "predicted_ml": predicted}
            for region in ("TC", "WT", "ET")
            for i, (dice, ml, predicted) in enumerate([(0.5, 1.0, 1.0), (0.9, 1.0, 1.0), (1.0, 0.0, 0.0),
                                                       (0.0, 0.0, 2.0)])]
    found = script._means(pd.DataFrame(rows))
    assert found["patients"] == 4 and found["false alarms"] == {"TC": 1, "WT": 1, "ET": 1}
    assert found["brats"]["WT"][0] == pytest.approx(0.6) and found["skip"]["WT"][0] == pytest.approx(0.7)
    assert found["skip"]["mean"][1:] == pytest.approx([0.5, 0.9])
    assert 0.0 <= found["brats"]["ET"][1] < 0.6 < found["brats"]["ET"][2] <= 1.0


def test_what_is_shipped_is_what_was_trained(script, tiny, tmp_path):
    model = script.train("broad", tmp_path / "run", recipe=tiny, seed=0, every=5, watch=0, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make_cohort", lambda **settings: [])
        patch.setattr(script, "_means", lambda table: {})
        patch.setattr(script, "_threshold", lambda patients: {})
        patch.setattr(script, "evaluate", lambda model, patients: None)
        script.score(tmp_path / "run", seed=1)
        patch.setattr(script, "card", lambda state, found: "# a card\n")
        script.ship(tmp_path / "run", tmp_path / "package")
    back, spacing_mm = load_model(tmp_path / "package" / "broad.safetensors")
    assert spacing_mm == 6.0 and weights_sha256(trainable(back)) == weights_sha256(trainable(model))
    found = json.loads((tmp_path / "package" / "broad.json").read_text())
    assert found["step"] == 5 and found["looks"] == 0 and found["sha256"] == weights_sha256(trainable(model))
    case = script.patient("broad", tiny, 5, 0)
    even = slice(0, case.image.shape[1] // 2 * 2)  # padded by as much on the left as on the right
    case = replace(case, image=case.image[:, even], label=case.label[even])
    flipped = replace(case, image=case.image.flip(1), label=case.label.flip(0))
    # A model that takes the mean over both sides gives a mirrored patient the mirrored prediction.
    np.testing.assert_allclose(predict(back, flipped).flip(1), predict(back, case), atol=1e-5)


def test_the_card_says_how_often_real_patients_were_looked_at(script):
    mean = {rule: {name: [0.5, 0.4, 0.6] for name in ("WT", "TC", "ET", "mean")} for rule in ("brats", "skip")}
    threshold = {"dice": 0.4, "modality": "FLAIR"}
    state = {"settings": {"kind": "broad", "seed": 0, **vars(script.RECIPES["broad"])}, "step": 10, "seconds": 60.0,
             "generators": [[0, "phantom-1"], [4, "phantom-2"]], "curve": [{"patients": 96}],
             "plans": [[0, 20], [4, 10]],
             "start": ["collection", 1500, [], "cd", 160, 1]}
    found = {"sha256": "ab", "looks": 2, "generator of the scores": "phantom-2",
             "generated": {"patients": 48, "threshold": threshold, **mean},
             "real": {"patients": 5, "threshold": threshold, **mean}}
    text = " ".join(script.card(state, found).split())
    assert "scored on the real patients 2 times" in text and "`phantom-2` from step 4 on" in text
    assert ("10 steps, begun with the weights of `collection` after 1,500 steps and 160 other patients; the cosine was "
            "planned for 20 until step 4.") in text
    assert "Seen: 96 patients, each of whom gives 4 crops and is never seen again" in text
    assert text.count("0.50 (0.40 to 0.60)") == 16 and "0.40 (FLAIR) on the real patients" in text


# --- the models that fedlab brings along

@pytest.mark.parametrize("name", ["broad", "collection"])
def test_a_public_model_is_the_one_of_its_card(name):
    model, spacing_mm = load_model(public_file(name))
    assert spacing_mm == 3.0 and model.settings["mirror"] is True
    found = json.loads(public_file(name).with_suffix(".json").read_text(encoding="utf-8"))
    card, digest = public_card(name), weights_sha256(trainable(model))
    assert digest == found["sha256"] and digest in card
    assert weights_sha256(trainable(public_model(name))) == digest
    for words in (f'"{name}"', "generated patients alone", "not a medical device", f"{found['step']:,} steps"):
        assert words in " ".join(card.split())
    for group in ("generated", "real"):
        for rule in ("brats", "skip"):
            assert all("{:.2f} ({:.2f} to {:.2f})".format(*value) in card for value in found[group][rule].values())
    rows = list(csv.DictReader(public_file(name).with_suffix(".csv").open(encoding="utf-8")))
    assert int(rows[-1]["step"]) == found["step"] == found["real"]["step"] and found["looks"] >= 1
    assert all(int(a["step"]) < int(b["step"]) for a, b in pairwise(rows))


def test_both_are_small_and_another_name_is_refused():
    assert sum(public_file(name).stat().st_size for name in ("broad", "collection")) <= 10e6
    for ask in (public_model, public_card, public_file):
        with pytest.raises(ValueError, match="'broad', 'collection', got 'narrow'"):
            ask("narrow")
    assert public_file() == public_file("broad")


def test_a_run_begins_with_a_public_model():
    model = public_model("collection")
    trainer = SiteTrainer(model=model, lr=1e-4, steps=1, crop=(16, 16, 16))
    start = weights_sha256(trainer.initial())
    assert start == weights_sha256(trainable(public_model("collection")))
    history = federate(trainer, blob_sites([2]), rounds=1, progress=False)
    assert weights_sha256(history.state.params) != start == weights_sha256(trainer.initial())
    plan = Plan.of(trainer=trainer, strategy=FedAvg(), privacy=Privacy(), topology=star, admission=None, rounds=1,
                   seed=0, sites=["a"])
    assert plan.model == start  # other processes begin with these weights too


def test_the_broad_model_beats_any_threshold_and_the_narrow_one_leaves_something_to_gain():
    sites = make_cohort(sizes=[1] * 8, held_out=0, shape=(48, 64, 48), seed=5, workers=0, progress=False)
    patients = [patient for site in sites for patient in site.train]
    broad, narrow = (summary(evaluate(public_model(name), patients))["dice"] for name in ("broad", "collection"))
    assert broad["WT"] > threshold_dice(patients).dice
    assert broad["mean"] > narrow["mean"] + 0.05
