"""Local(debug=True) keeps what a failing site was working with, in this process and nowhere else."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from cohorts import blob_sites
from fedlab.checks.engine import FailsAt
from fedlab.core.errors import PrivacyError, SiteError
from fedlab.core.weights import trainable, weights_sha256
from fedlab.privacy.accounting.ledger_file import LedgerFile
from fedlab.privacy.base import Privacy
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.run.admission import Admission
from fedlab.run.federate import federate
from fedlab.run.local import Local
from trainers import trainer


class Explodes(Privacy):
    """Training goes on to NaN at one site after a step, in its second round."""

    def __init__(self, *, site, words="a voxel of Anna's scan"):
        self.site, self.words = site, words

    def equip(self, kit, site, state):
        if site.name == self.site and state.round == 1:
            steps, backward = [], kit.backward

            def breaks(kit, image, target):
                steps.append(image)
                if len(steps) == 2:
                    raise FloatingPointError(self.words)
                return backward(kit, image, target)

            kit.backward = breaks
        return kit


def run(engine, made, *, privacy, rounds=3):
    return federate(made, blob_sites((2, 2, 1)), rounds=rounds, privacy=privacy, engine=engine,
                    admission=Admission(min_sites=1), progress=False)


def test_what_a_failing_site_was_working_with():
    engine, made = Local(debug=True), trainer(batch_size=2)
    history = run(engine, made, privacy=Explodes(site="site-1"))
    assert list(engine.failed) == ["site-1"] and list(history.records[1]["absent"]) == ["site-1"]
    failed = engine.failed["site-1"]
    assert (failed.site.name, failed.round, failed.stage, failed.guarded) == ("site-1", 1, "fit", False)
    assert type(failed.error) is SiteError and type(failed.cause) is FloatingPointError
    assert "in breaks" in failed.traceback and "Anna" in failed.traceback
    image, target = failed.batch
    assert image.shape == (2, 4, 16, 16, 16) and target.shape == (2, 3, 16, 16, 16)
    assert failed.state.round == 1 and failed.site_state.enrolled and "optimiser" in failed.site_state.namespaces
    # One step away from where its round began, whatever became of the model since.
    began, now = weights_sha256(failed.state.params), weights_sha256(failed.weights)
    assert now not in (began, weights_sha256(trainable(made.model)))
    kit = failed.restore()
    assert weights_sha256(trainable(kit.model)) == now
    assert kit is failed.kit and torch.isfinite(kit.loss(image, target))


def test_its_state_is_that_of_the_failure():
    engine = Local(debug=True)
    history = run(engine, trainer(), privacy=FailsAt(site="site-1", stage="protect", round=1), rounds=4)
    assert engine.failed["site-1"].round == 1
    later = history.site_states["site-1"].of("optimiser").own
    assert weights_sha256(engine.failed["site-1"].site_state.of("optimiser").own) != weights_sha256(later)


def test_the_last_failure_of_each_site_is_kept():
    engine = Local(debug=True)
    run(engine, trainer(), privacy=FailsAt(site=None, stage="equip", round=0), rounds=2)
    assert sorted(engine.failed) == ["site-0", "site-1", "site-2"]
    assert {failed.round for failed in engine.failed.values()} == {0}
    failed = engine.failed["site-0"]
    assert failed.stage == "equip" and failed.batch is None and failed.kit is not None


def test_without_debug_nothing_is_kept():
    engine = Local()
    assert run(engine, trainer(), privacy=Explodes(site="site-1")).records[1]["absent"]
    assert engine.failed == {} and repr(engine) == "Local()"
    assert repr(Local(debug=True)) == "Local(debug=True)"
    assert repr(Local(ledgers="here", debug=True)) == "Local(ledgers='here', debug=True)"


def test_it_is_shown_and_escaped():
    engine = Local(debug=True)
    run(engine, trainer(), privacy=Explodes(site="site-1", words="<script>alert(1)</script>"))
    failed = engine.failed["site-1"]
    assert repr(failed).startswith("<FailedSite site-1: failed in: round 1, stage 'fit'; exception: FloatingPointError")
    assert "TinyNet on cpu" in repr(failed) and "batch: 2×4×16×16×16 float32 and" in repr(failed)
    shown = failed._repr_html_()
    assert "&lt;script&gt;" in shown and "<script>" not in shown and "traceback" in shown


def test_it_leaves_the_process_in_no_way():
    engine = Local(debug=True)
    run(engine, trainer(), privacy=Explodes(site="site-1"))
    for leave in (pickle.dumps, copy.deepcopy, copy.copy):
        with pytest.raises(PrivacyError, match="holds its patients and stays in this process"):
            leave(engine.failed["site-1"])


def test_under_a_guarantee_a_notebook_shows_no_text_of_the_exception():
    engine = Local(debug=True)
    technique = DPSGD(clip=1.0, noise_multiplier=1.0, delta=1e-3, sample_rate=1.0) + Explodes(site="site-1")
    run(engine, trainer(), privacy=technique)
    failed = engine.failed["site-1"]
    assert failed.guarded and "Anna" in failed.traceback
    assert "Anna" not in repr(failed) + failed._repr_html_() and "FloatingPointError" in repr(failed)
    assert set(failed.weights) == set(failed.state.params)
    restored = failed.restore()
    assert weights_sha256(trainable(getattr(restored.model, "_module", restored.model))) == \
        weights_sha256(failed.weights)


def test_a_site_that_failed_before_it_began(tmp_path):
    """At its ledger's file, where no model is yet."""
    engine = Local(ledgers=tmp_path, debug=True)
    technique = DPSGD(clip=1.0, noise_multiplier=1.0, delta=1e-3, sample_rate=1.0)
    run(engine, trainer(), privacy=technique, rounds=1)
    LedgerFile(tmp_path, "site-1").path.unlink()
    run(engine, trainer(), privacy=technique, rounds=1)
    failed = engine.failed["site-1"]
    assert (failed.stage, failed.kit, failed.weights, failed.batch) == ("ledger", None, {}, None)
    assert type(failed.error) is PrivacyError and failed.cause is failed.error
    with pytest.raises(ValueError, match="before there was a model to train"):
        failed.restore()
