"""Noise that repeats with the seed is for research: every ε says so, and a deployment refuses it unless told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cohorts import TinyNet, blob_sites
from fedlab import DPSGD, FedAvg, Privacy, PrivacyError, SecureAggregation, SiteTrainer, federate
from fedlab.apps.cli import main
from fedlab.core.errors import RunError
from fedlab.core.gate import check_update
from fedlab.core.types import Round, ServerState, SiteState, Spent, Update
from fedlab.data import site_statistics
from fedlab.deploy.messages import pack_answer, unpack_answer
from fedlab.deploy.plan import built
from fedlab.engines import NVFlare, Production
from fedlab.engines.nvflare.run_folder import FinishedRounds, SavedRun, read_round
from fedlab.privacy import (
    AtSites,
    CentralGaussian,
    Gaussian,
    Ledger,
    LedgerFile,
    LocalGaussian,
    PersonalLayers,
    SharePercentile,
    SparseVector,
    Terms,
)
from fedlab.privacy.accounting.ledger import check_statement
from fedlab.privacy.aggregation import Aggregation
from fedlab.run.federate import make_run
from fedlab.run.history import History, noise_repeats
from fedlab.run.trackers import numbers
from fedlab.view.model_card import make_model_card
from fedlab.view.playground import Knobs
from fedlab.view.report_page import privacy_section
from fedlab.view.run_figures import privacy_curves

REMARK = "noise repeats with the seed: for research"
SITES = blob_sites((3, 3, 3))
TRAINER = SiteTrainer(model=built(TinyNet, seed=3), lr=0.05, steps=1, crop=(8, 8, 8), augment=None, precision="fp32",
                      optimiser=torch.optim.SGD)
TERMS = Terms(unit="site", delta=1e-3, adjacency="any two updates of a site")
#: Every technique and aggregation that adds noise: one that repeats, and the rest of its run.
NOISY: dict[str, tuple[Any, dict[str, Any]]] = {
    "DPSGD": (DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.1, batch=2), {}),
    "LocalGaussian": (LocalGaussian(clip=1.0, noise_multiplier=2.0, delta=0.1), {}),
    "CentralGaussian": (CentralGaussian(clip=1.0, noise_multiplier=2.0, delta=0.1),
                        {"strategy": FedAvg(weights="uniform")}),
    "SparseVector": (SparseVector(fraction=0.1, epsilon=1.0, delta=0.1), {}),
    "SecureAggregation": (SecureAggregation(threshold=2, clip=1.0, noise_multiplier=2.0, delta=0.1),
                          {"strategy": FedAvg(weights="uniform")}),
}


def with_secure_mode(part: Any, secure: bool) -> Any:
    if not secure:
        return part
    if isinstance(part, SparseVector | SecureAggregation):
        return replace(part, secure_mode=True)
    given = {name: value for name, value in vars(part).items() if not name.startswith("_")}
    return type(part)(**{**given, "secure_mode": True})


def run(name: str, *, secure: bool) -> History:
    part, more = NOISY[name]
    kind = "aggregation" if isinstance(part, Aggregation) else "privacy"
    return federate(TRAINER, SITES, rounds=1, progress=False, **{kind: with_secure_mode(part, secure)}, **more)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("name", NOISY)
def test_every_statement_says_whether_its_noise_repeats(name: str, secure: bool) -> None:
    history = run(name, secure=secure)
    assert history.spent()["repeats"].tolist() == [not secure] * len(history.spent()) and len(history.spent())
    shown = [history.guarantee(), privacy_curves(history).alt, privacy_section(history).text,
             make_model_card(history, name="m", sites=SITES, settings={}).text]
    assert [text.count(REMARK) for text in shown] == [0 if secure else 1] * 4


def test_a_statement_that_rests_on_one_release_that_repeats_says_so_for_good(tmp_path: Path) -> None:
    state = SiteState()
    for round, secure in enumerate((True, False, True)):
        ledger = Ledger.open(state, site="a", round=round, stream=f"s{round}")
        ledger.charge(Gaussian(noise_multiplier=4.0), terms=TERMS, repeatable=not secure)
        assert ledger.spent()[0].repeats is (round > 0)
        assert (REMARK in str(ledger.spent()[0])) is (round > 0) and (REMARK in repr(ledger)) is (round > 0)
    file = LedgerFile(tmp_path, "a")
    file.save(state)
    assert file.read().spent() == Ledger(state).spent()
    merged = SiteState()  # another copy, all of whose releases were from the operating system
    Ledger.open(merged, site="a", round=9, stream="t").charge(Gaussian(noise_multiplier=4.0), terms=TERMS,
                                                             repeatable=False)
    assert not Ledger(merged).spent()[0].repeats
    Ledger(merged).merge(file.read())
    assert Ledger(merged).spent()[0].repeats
    for entry in merged.ledger["entries"]:
        del entry["seeded"]  # a ledger of before: in doubt it repeats
    assert Ledger(merged).spent()[0].repeats


def test_noised_statistics_say_it_too(tmp_path: Path) -> None:
    for seed in (None, 3):
        file = LedgerFile(tmp_path / str(seed), SITES[0].name)
        told = site_statistics(SITES[0], epsilon=1.0, seed=seed, charge=file.charging(delta=1e-3))
        said = [told.guarantee, repr(told), type(told).from_json(told.to_json()).guarantee, str(file.read().spent()[0])]
        assert [REMARK in text for text in said] == [seed is not None] * 4


@pytest.mark.parametrize("repeats", [False, True])
def test_the_remark_travels_with_an_answer_and_with_a_finished_round(tmp_path: Path, repeats: bool) -> None:
    spent = (Spent(1.0, 1e-3, "site", "rdp", "any", repeats),)
    update = Update(site="a", delta={"w": torch.zeros(2)}, weight=1.0, spent=spent, round=0)
    assert unpack_answer(pack_answer(update), site="a").spent == spent
    finished = FinishedRounds(tmp_path)
    finished.add(Round(number=0, state=ServerState(round=1, params={"w": torch.zeros(2)}), cohort=("a",), sites={},
                       spent={"a": spent}, metrics={}, seconds=1.0))
    assert read_round(finished.text(0), finished.weights(0)).spent == {"a": spent}
    (name,) = [name for _, name, value in numbers(read_round(finished.text(0), finished.weights(0))) if value == 1.0
               and "epsilon" in name]  # as trackers write it
    assert (REMARK in name) is repeats
    note = json.loads(finished.text(0))
    del note["spent"]["a"][0]["repeats"]  # a round of before: in doubt it repeats
    assert read_round(json.dumps(note), finished.weights(0)).spent["a"][0].repeats


def test_the_playground_says_it_of_its_example() -> None:
    spent = Knobs(clip=1.0, noise_multiplier=4.0).spent(delta=0.01, rounds=10)
    assert spent is not None and REMARK in str(spent)


def test_a_site_cannot_leave_the_remark_out() -> None:
    technique: Privacy = NOISY["LocalGaussian"][0]
    (spent,) = run("LocalGaussian", secure=False).records[0]["spent"]["site-0"]
    honest = Update(site="a", delta={"w": torch.zeros(2)}, weight=1.0, spent=(Spent(**spent),))
    check_statement(honest, [technique])
    silent = replace(honest, spent=(Spent(**{**spent, "repeats": False}),))
    with pytest.raises(PrivacyError, match=REMARK):
        check_statement(silent, [technique])
    check_statement(silent, [with_secure_mode(technique, True)])
    check_statement(honest, [with_secure_mode(technique, True)])  # an earlier run of the site may have repeated
    with pytest.raises(PrivacyError, match="statements of privacy"):
        check_update(replace(honest, spent=(Spent(**{**spent, "repeats": 1}),)), like=honest.delta, site="a")


# At hospitals


def parts(name: str, *, secure: bool) -> dict[str, Any]:
    part, more = NOISY[name]
    kind = "aggregation" if isinstance(part, Aggregation) else "privacy"
    return {kind: with_secure_mode(part, secure), **more}


@pytest.mark.parametrize("name", NOISY)
def test_production_refuses_noise_that_repeats_unless_told_otherwise(tmp_path: Path, name: str,
                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    names, none = ["a", "b", "c"], tmp_path / "none"
    folders = {secure: NVFlare().save(tmp_path / str(secure), TRAINER, names, rounds=1, **parts(name, secure=secure))
               for secure in (False, True)}
    strict, told = Production(kit=none), Production(kit=none, repeatable_noise=True)
    for ask in (lambda place, folder: place.submit(folder), lambda place, folder: list(place.follow(folder)),
                lambda place, folder: list(place.rounds(SavedRun.read(folder), [], have=0))):
        with pytest.raises(PrivacyError, match="noise of this run repeats with its seed"):
            ask(strict, folders[False])
        for place, folder in ((told, folders[False]), (strict, folders[True]), (told, folders[True])):
            with pytest.raises(RunError):  # only now is the kit looked for
                ask(place, folder)
    with pytest.raises(PrivacyError, match="repeatable_noise=True"):
        federate(TRAINER, names, rounds=1, engine=NVFlare(env=strict), progress=False, **parts(name, secure=False))
    for options, words in (([], "repeats with its seed"), (["--leave"], "repeats with its seed")):
        assert main(["deploy", "submit", str(folders[False]), "--kit", str(none), *options]) == 1
        assert words in capsys.readouterr().err
    for folder, options in ((folders[False], ["--repeatable-noise"]), (folders[True], [])):
        assert main(["deploy", "submit", str(folder), "--kit", str(none), *options]) == 1
        assert "repeats with its seed" not in capsys.readouterr().err


def test_a_run_without_noise_is_not_refused_and_one_of_unknown_noise_is(tmp_path: Path) -> None:
    for number, privacy in enumerate((Privacy(), SharePercentile(), PersonalLayers(names=["last*"]),
                                      DPSGD(clip=1.0, noise_multiplier=0.0, delta=0.1, batch=2))):
        assert not noise_repeats(make_run(TRAINER, SITES, privacy=privacy))
        folder = NVFlare().save(tmp_path / str(number), TRAINER, ["a", "b"], rounds=1, privacy=privacy)
        assert not SavedRun.read(folder).noise_repeats
    one = AtSites(sites=("site-1",), technique=NOISY["LocalGaussian"][0])
    assert noise_repeats(make_run(TRAINER, SITES, privacy=one + SharePercentile()))
    note = json.loads((folder / "times.json").read_text())
    for repeats in ({}, {"noise_repeats": None}, {"noise_repeats": 0}):  # by hand, or saved before this was noted
        (folder / "times.json").write_text(json.dumps({"seconds": note["seconds"], "patience": 1.0, **repeats}))
        with pytest.raises(PrivacyError, match="repeats with its seed"):
            Production(kit=tmp_path).submit(folder)
