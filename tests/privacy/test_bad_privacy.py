"""Privacy settings that cannot work are refused at construction or before any training, with the remedy."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from test_privacy_frame import Noise
from torch import nn

import fedlab
from cohorts import TinyNet, blob_sites
from fedlab.core.errors import PrivacyError
from fedlab.deploy.plan import describe, make
from fedlab.privacy.accounting.ledger import Terms, noise_multiplier_for
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import Quantise, SharePercentile, TopK
from fedlab.privacy.dp.clipping import AdaptiveClip
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.privacy.personal_layers import PersonalLayers
from fedlab.privacy.secure_aggregation.secure_sum import SecureAggregation
from fedlab.privacy.sparse.partial_sharing import SVT, PartialSharing, SparseVector
from fedlab.run.federate import each_round, federate
from fedlab.strategies import CoordinateMedian, FedAvg, GeometricMedian, NormBound
from fedlab.training.trainer import SiteTrainer
from states import copies, kept_as
from trainers import trainer

UNIFORM = FedAvg(weights="uniform")


@dataclass(frozen=True, kw_only=True, repr=False)
class NeverTrains(SiteTrainer):
    """Training is a failed test."""

    def fit(self, *args, **kwargs):
        raise AssertionError("training began")


def untrained(**changes) -> NeverTrains:
    usual = trainer(**changes)
    settings = {name: getattr(usual, name) for name in ("model", "lr", "steps", "epochs", "batch_size", "crop",
                                                        "augment", "precision", "loss")}
    return NeverTrains(**settings)


class Normed(TinyNet):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm3d(6)

    def forward(self, image):
        return self.last(torch.relu(self.norm(self.first(image))))


class BatchDice(nn.Module):
    """One Dice for all patients of a batch."""

    def __init__(self):
        super().__init__()
        from monai.losses import DiceLoss

        self.dice = DiceLoss(sigmoid=True, batch=True)

    def forward(self, logits, target):
        return self.dice(logits, target)


def central(**changes):
    return CentralGaussian(**({"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3} | changes))


def local(**changes):
    return LocalGaussian(**({"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3} | changes))


def dpsgd(**changes):
    return DPSGD(**({"clip": 1.0, "noise_multiplier": 1.0, "delta": 1e-3, "sample_rate": 0.5} | changes))


SETTINGS = [
    lambda: local(clip=0), lambda: local(clip=-1), lambda: local(clip=float("nan")), lambda: local(noise_multiplier=0),
    lambda: local(noise_multiplier=float("inf")), lambda: local(delta=0), lambda: local(delta=1),
    lambda: local(accountant="moments"), lambda: local(max_epsilon=0), lambda: central(clip=0),
    lambda: central(noise_multiplier=-1), lambda: central(clip=AdaptiveClip(start=1.0, bit_noise=0.4)),
    lambda: AdaptiveClip(start=0.0, bit_noise=1.0), lambda: AdaptiveClip(start=1.0, bit_noise=1.0, quantile=1.0),
    lambda: dpsgd(clip=0), lambda: dpsgd(noise_multiplier=-0.1), lambda: dpsgd(sample_rate=0),
    lambda: dpsgd(sample_rate=1.5), lambda: dpsgd(batch=4), lambda: dpsgd(crops=0), lambda: dpsgd(gradients="ghost"),
    lambda: dpsgd(delta=1.0), lambda: dpsgd(max_epsilon=0.01), lambda: PartialSharing(fraction=0),
    lambda: PartialSharing(fraction=1.01), lambda: SVT(fraction=0, epsilon_threshold=1, epsilon_release=1),
    lambda: SVT(fraction=1.5, epsilon_threshold=1, epsilon_release=1),
    lambda: SVT(fraction=0.1, epsilon_threshold=0, epsilon_release=1), lambda: SparseVector(fraction=0, epsilon=1),
    lambda: SparseVector(fraction=2, epsilon=1), lambda: SparseVector(fraction=0.1, epsilon=0),
    lambda: SparseVector(fraction=0.1, epsilon=1, delta=1), lambda: TopK(keep=0), lambda: SharePercentile(keep=1.1),
    lambda: PersonalLayers(names=[]), lambda: SecureAggregation(sites=1, clip=1.0, threshold=1),
    lambda: SecureAggregation(threshold=1), lambda: SecureAggregation(sites=4, clip=1.0, threshold=2),
    lambda: SecureAggregation(sites=4, clip=0.0, threshold=3), lambda: SecureAggregation(clip=0.0, threshold=3),
    lambda: SecureAggregation(sites=4, clip=1.0, threshold=3, noise_multiplier=1.0),
    lambda: SecureAggregation(threshold=3, noise_multiplier=1.0, delta=1e-3),
    lambda: SecureAggregation(sites=4, clip=1.0, threshold=3, noise_multiplier=1.0, delta=0.3),
    lambda: local(delta=float("nan")), lambda: local(clip=None), lambda: central(delta=1.0),
    lambda: central(accountant="moments"), lambda: central(max_epsilon=-1.0),
    lambda: central(clip=AdaptiveClip(start=1.0, bit_noise=2.0), per_layer=True), lambda: dpsgd(delta=0.0),
    lambda: dpsgd(accountant="gdp"), lambda: dpsgd(clip=AdaptiveClip(start=1.0, bit_noise=0.5)),
    lambda: dpsgd(sample_rate=None), lambda: SVT(fraction=0.1, epsilon_threshold=1, epsilon_release=-1),
    lambda: SVT(fraction=0.1, epsilon_threshold=1, epsilon_release=1, clip=0.0),
    lambda: SparseVector(fraction=0.1, epsilon=float("inf")), lambda: Quantise(bits=0), lambda: TopK(keep=1.5),
    lambda: Terms(unit="crop", delta=1e-3, adjacency="x"), lambda: Terms(unit="site", delta=1e-3, adjacency=""),
    lambda: noise_multiplier_for(target_epsilon=0, delta=1e-3, sample_rate=0.1, steps=10),
    lambda: noise_multiplier_for(target_epsilon=1e-6, delta=1e-3, sample_rate=1.0, steps=10**6),
    lambda: dpsgd() + dpsgd(), lambda: central() + TopK(keep=0.1),
]


@pytest.mark.parametrize("make", SETTINGS, ids=range(len(SETTINGS)))
def test_a_setting_out_of_its_range_is_refused_at_construction(make):
    with pytest.raises(ValueError) as found:
        make()
    assert len(str(found.value)) > 25 and "assert" not in str(found.value)


RUNS = [
    ("delta below 1 over sites", local(delta=0.6), {}, r"delta is below 1 over the number of sites \(1/2\)"),
    ("delta below 1 over sites, server", central(delta=0.6), dict(strategy=UNIFORM), "1 over the number of sites"),
    ("delta below 1 over patients", dpsgd(delta=0.4), {}, r"delta is below 1 over the number of patients \(1/3"),
    ("delta, sparse vector", SparseVector(fraction=0.1, epsilon=1, delta=0.6), {}, "1 over the number of sites"),
    ("weights it isn't given", central(), {}, r"plain mean.*use FedAvg\(weights='uniform'\)"),
    ("a median", central(), dict(strategy=CoordinateMedian()), "plain mean"),
    ("a geometric median", central(clip=AdaptiveClip(start=1.0, bit_noise=2.0)), dict(strategy=GeometricMedian()),
     "plain mean"),
    ("updates shortened at the server", central(), dict(strategy=NormBound(bound=1.0, weights="uniform")),
     "plain mean"),
    ("weights by steps", central(), dict(strategy=FedAvg(weights="steps")), "plain mean"),
    ("a median of masks", None, dict(strategy=CoordinateMedian(), aggregation=SecureAggregation(threshold=2)),
     "plain mean"),
    ("BatchNorm", dpsgd(), dict(one=untrained(model=Normed())), "BatchNorm"),
    ("a batch loss", dpsgd(), dict(one=untrained(loss=BatchDice())), "patient"),
    ("a batch larger than a site", dpsgd(sample_rate=None, batch=5), {}, "has only 3"),
    ("sites of secure aggregation", None,
     dict(strategy=UNIFORM, aggregation=SecureAggregation(sites=3, threshold=2)),
     "set up for 3 sites, the run has 2; leave sites out"),
    ("a threshold above the sites", None, dict(strategy=UNIFORM, aggregation=SecureAggregation(threshold=3)),
     "between 2 and 2 for 2 sites"),
    ("delta of secure aggregation", None,
     dict(strategy=UNIFORM, aggregation=SecureAggregation(threshold=2, clip=1.0, noise_multiplier=1.0, delta=0.5)),
     r"1 over the number of sites \(1/2\)"),
    ("a technique that noise before the sum would break", central(),
     dict(strategy=UNIFORM, aggregation=SecureAggregation(threshold=2, clip=1.0, noise_multiplier=1.0, delta=1e-3)),
     "noise_multiplier to one of them"),
    ("names of no tensor", PersonalLayers(names=["decoder.*"]), {}, "no tensor of the model"),
    ("a budget below a round", local(max_epsilon=0.1), {}, "more than the budget"),
    ("gdp with sampled sites", central(accountant="gdp"), dict(strategy=FedAvg(weights="uniform", sample=0.5)), "gdp"),
]


@pytest.mark.parametrize("technique,changes,words", [case[1:] for case in RUNS], ids=[case[0] for case in RUNS])
def test_a_run_that_cannot_work_is_refused_before_training(technique, changes, words):
    one, parts = changes.get("one", untrained()), {"privacy": technique, **changes}
    parts.pop("one", None)
    with pytest.raises(ValueError, match=words):
        next(each_round(one, blob_sites(), **parts))
    with pytest.raises(ValueError, match=words):
        federate(one, blob_sites(), **parts, rounds=1, progress=False)


def test_secure_aggregation_and_a_technique_that_changes_masks_cannot_be_joined():
    """A technique after the mask would spoil it: there is no such order any more, as an aggregation comes last."""
    with pytest.raises(TypeError, match="aggregation="):
        TopK(keep=0.1) + SecureAggregation(threshold=3)


def test_a_ledger_of_another_site_is_refused_before_training_and_one_of_another_network_is_not():
    wider = TinyNet()
    wider.last = nn.Conv3d(6, 3, 3, padding=1)
    first = next(each_round(trainer(), blob_sites(), privacy=local()))
    kept = copies(first.site_states)
    swapped = kept_as({"site-0": kept["site-1"], "site-1": kept["site-0"]})
    with pytest.raises(PrivacyError, match=r"another site \('site-1', not 'site-0'\).*own ledger back.*nothing was"):
        next(each_round(untrained(), blob_sites(), privacy=local(), state=first.state, site_states=swapped, rounds=2))
    begun = FedAvg().begin(trainer(model=wider).initial())
    with pytest.raises(fedlab.core.SiteError, match="training began"):  # the patients are the same
        next(each_round(untrained(model=wider), blob_sites(), privacy=local(), state=begun, site_states=kept_as(kept)))


def test_the_test_itself_trains_where_nothing_is_wrong():
    with pytest.raises(fedlab.core.SiteError, match="training began"):
        next(each_round(untrained(), blob_sites(), privacy=local()))


# What a remote site cannot import


class Here(Privacy):
    def __init__(self, *, how=None):
        self.how = how


def modules_of(technique):
    """The modules beyond fedlab that another process imports to make the technique."""
    asked = set()
    make(describe(technique), approve=asked.add)
    return tuple(sorted(name for name in asked if name.partition(".")[0] != "fedlab"))


def test_what_can_be_imported_elsewhere_names_its_modules():
    assert modules_of(local() + TopK(keep=0.1)) == ()
    assert modules_of(central(clip=AdaptiveClip(start=1.0, bit_noise=2.0))) == ()
    assert modules_of(Noise() + local()) == ("test_privacy_frame",)
    assert modules_of(Here(how=[{"rate": 0.1}, TinyNet])) == ("cohorts", "test_bad_privacy")
    with pytest.raises(PrivacyError, match="cohorts:blob_sites has no place in a plan"):  # no function of a file
        modules_of(Here(how=[{"rate": 0.1}, blob_sites]))


@pytest.mark.parametrize("made", [
    lambda: type("Cell", (Privacy,), {"__module__": "__main__"})(),
    lambda: local() + type("Cell", (Privacy,), {"__module__": "__main__"})(),
    lambda: type("Inside", (Privacy,), {"__module__": __name__})(),
    lambda: Here(how=lambda t: t),
    lambda: Here(how={"inner": [type("Cell", (), {"__module__": "__main__"})()]}),
])
def test_what_was_made_in_a_notebook_or_a_function_is_refused(made):
    with pytest.raises(PrivacyError, match=r"%%writefile my_technique.py"):
        describe(made())


def test_a_class_of_a_script_is_refused_there_and_accepted_from_its_file(tmp_path, repository, monkeypatch):
    text = ("from fedlab.deploy.plan import describe\nfrom fedlab.privacy.base import Privacy\n\n\n"
            "class Mine(Privacy):\n    pass\n\n\nif __name__ == '__main__':\n    print(describe(Mine()))\n")
    (tmp_path / "my_technique.py").write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, str(tmp_path / "my_technique.py")], cwd=repository, capture_output=True,
                          text=True, timeout=300, env={"PYTHONPATH": str(repository), "PATH": ""})
    assert done.returncode == 1 and "PrivacyError: Mine of Mine() is defined in a notebook" in done.stderr
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = importlib.import_module("my_technique").Mine
    assert modules_of(mine()) == ("my_technique",)
