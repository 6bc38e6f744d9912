"""What leaves the server depends on nobody who took part; what an error says of patients stays at the site; a lying
site ends no run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cohorts import TinyNet, blob_sites
from fedlab.core import DataError, PrivacyError, Update
from fedlab.core.errors import FedlabError, PrivacyBudgetExhausted, SiteError
from fedlab.core.weights import weights_sha256
from fedlab.deploy.host import SiteHost
from fedlab.deploy.messages import pack_weights
from fedlab.deploy.plan import Plan, built
from fedlab.deploy.policy import SitePolicy
from fedlab.engines.processes import Processes
from fedlab.engines.remote import Remote
from fedlab.faults.sites import Corrupt, Crash, DropOut, Fault, Faulty, Scale
from fedlab.privacy import DPSGD, CentralGaussian, Ledger, LocalGaussian, Privacy, SecureAggregation
from fedlab.run.admission import Admission
from fedlab.run.federate import federate
from fedlab.run.history import History
from fedlab.run.local import Local
from fedlab.run.publishable import OnPublicPatients
from fedlab.run.site_errors import without_paths
from fedlab.run.trackers import CsvTracker
from fedlab.strategies import FedAvg
from fedlab.topologies import star
from fedlab.training.trainer import SiteTrainer
from fedlab.view.background_run import BackgroundRun
from fedlab.view.dashboard import RunDashboard
from fedlab.view.model_card import make_model_card
from fedlab.view.report_page import privacy_section
from trainers import trainer

UNIFORM = FedAvg(weights="uniform")
CENTRAL = CentralGaussian(clip=1.0, noise_multiplier=2.0, delta=1e-3)
LOCAL = LocalGaussian(clip=1.0, noise_multiplier=8.0, delta=1e-3)


def made() -> SiteTrainer:
    """A trainer that other sites can make."""
    return trainer(steps=1, model=built(TinyNet, seed=0))


def run(privacy: Privacy, sizes: tuple[int, ...] = (2, 2, 2), faults: tuple[Fault, ...] = (), **more: Any) -> History:
    settings: dict[str, Any] = {"strategy": UNIFORM, "rounds": 2, "progress": False, "admission": Admission()}
    return federate(trainer(steps=1), blob_sites(sizes), privacy=privacy,
                    engine=Faulty(engine=Local(), faults=faults) if faults else Local(), **{**settings, **more})


# What leaves the server


def outputs(folder: Path, sizes: tuple[int, ...], faults: tuple[Fault, ...], privacy: Privacy,
            **more: Any) -> dict[str, str]:
    """Everything that is printed, saved or sent of a run, without what is computed from the noised model."""
    history = run(privacy, sizes, faults, on_round=CsvTracker(path=folder / "rounds.csv"),
                  validate=lambda model, number: {"Dice": sum(sizes) / 100}, **more)
    section = privacy_section(history)
    card = make_model_card(history, name="m", sites=blob_sites(sizes), settings={}).text
    return {"table": history.table().to_string(), "repr": repr(history), "html": history._repr_html_(),
            "guarantee": history.guarantee(), "tracker": (folder / "rounds.csv").read_text(),
            "published": json.dumps(history.published().records), "report": section.text + section.table.to_string(),
            "figure": section.figure.alt, "card": re.sub("[0-9a-f]{64}", "", card)}


@pytest.mark.parametrize("more", [{}, {"aggregation": SecureAggregation(threshold=2, clip=1.0)}],
                         ids=["open", "secure"])
@pytest.mark.parametrize("faults, sizes", [
    ((DropOut(sites=("site-1",), rounds=(1,)),), (2, 2, 2)), ((DropOut(sites=("site-0", "site-1"), rounds=(0,)),),
                                                              (2, 2, 2)),
    ((DropOut(),), (2, 2, 2)), ((), (2, 5, 2))], ids=["one away", "two away", "all away", "more patients"])
def test_nothing_that_is_published_under_noise_at_the_server_tells_who_took_part(tmp_path, faults, sizes, more):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = outputs(tmp_path / "a", (2, 2, 2), (), CENTRAL, **more)
    other = outputs(tmp_path / "b", sizes, faults, CENTRAL, **more)
    assert {name: text for name, text in whole.items() if text != other[name]} == {}
    assert "ε = " in whole["guarantee"] and "server" in whole["published"]
    assert not any(re.search("site-[012] |Dice|seconds|bytes", whole[name]) for name in whole
                   if name not in ("card", "published"))


def test_the_cohort_that_was_drawn_is_not_published():
    sampled = FedAvg(weights="uniform", sample=0.4)
    history = run(CENTRAL, (1,) * 6, strategy=sampled, rounds=5, seed=3)
    assert len({len(record["sites"]) for record in history.records}) > 1  # the server's own record knows
    assert history.table().columns.tolist() == [] and len(history.table()) == 5
    shown = history.published()
    assert shown.sites().empty and shown.absent().empty and set(shown.spent().index.get_level_values("site")) == {
        "server"}
    assert {len(json.dumps({**record, "spent": 0})) for record in shown.records} == {
        len(json.dumps({**shown.records[0], "spent": 0}))}


def test_ledgers_of_single_sites_are_not_published_under_noise_at_the_server():
    """What a site has spent says in how many rounds it took part."""
    history = run(LOCAL + CENTRAL, faults=(DropOut(sites=("site-1",), rounds=(1,)),))
    assert "site-1" in history.spent().index.get_level_values("site") and "site-" not in history.guarantee()
    assert "in their own ledgers" in history.guarantee()


@pytest.mark.parametrize("privacy", [CENTRAL, LOCAL, DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.1, sample_rate=0.5)])
def test_no_time_is_published_under_a_guarantee(privacy):
    assert "seconds" not in run(privacy, rounds=1).table() and "seconds" in run(Privacy(), rounds=1).table()


def test_scores_of_public_patients_may_be_published_and_no_others():
    def score(model: Any, number: int) -> dict[str, float]:
        return {"Dice": 0.5}

    assert "Dice" not in run(CENTRAL, validate=score).table()
    assert run(CENTRAL, validate=OnPublicPatients(score)).table()["Dice"].tolist() == [0.5, 0.5]
    history = run(CENTRAL, validate=score)
    assert history.records[0]["metrics"] == {"Dice": 0.5}  # for the server


def test_the_saved_form_of_the_dashboard_names_no_site_under_noise_at_the_server():
    class Quotes(Privacy):
        def protect(self, update: Update, *_: Any) -> Update:
            raise KeyError("Mueller")

    one = BackgroundRun(trainer(steps=1), blob_sites((2, 2)), rounds=1, privacy=CENTRAL, strategy=UNIFORM)
    one.start().wait(300)
    page = RunDashboard(one).html()
    assert "site-0" not in page and "s per round" not in page and "ε = " in page
    other = BackgroundRun(trainer(steps=1), blob_sites((2, 2)), rounds=1, privacy=Quotes() + CENTRAL, strategy=UNIFORM)
    with pytest.raises(SiteError):
        other.start().wait(300)
    assert "Mueller" not in RunDashboard(other).html() and "SiteError" in RunDashboard(other).html()


# What a site says of an error


class Quotes(Privacy):
    """Fails at one site with an exception about a patient."""

    def __init__(self, *, how: str) -> None:
        self.how = how

    def equip(self, kit: Any, site: Any, state: Any) -> Any:
        if site.name == "site-1":
            raise_about_a_patient(self.how)
        return kit


class Chart(FedlabError):
    """A project's own error."""


def raise_about_a_patient(how: str) -> None:
    text = "/hospital/scans/Mueller_Anna/t1.nii.gz of Mueller is cut off"
    match how:
        case "data":
            raise DataError(text)
        case "privacy":
            raise PrivacyError(text)
        case "budget":
            raise PrivacyBudgetExhausted(text)
        case "site":
            raise SiteError("site-1", 0, f"reading {text}", text)
        case "own type":
            raise Chart(text)
        case "key":
            raise KeyError("Mueller")
        case "named":
            raise type("Mueller", (ValueError,), {})("nothing")
        case "notes":
            error = ValueError("nothing")
            error.add_note(text)
            raise error
        case "cause":
            raise PrivacyError("the gate refused") from ValueError(text)


HOWS = ["data", "privacy", "budget", "site", "own type", "key", "named", "notes", "cause"]
SERVER: dict[str, Any] = {"rounds": 1, "admission": Admission(), "progress": False, "strategy": UNIFORM}


@pytest.fixture(scope="module")
def processes():
    with Processes(workers=1) as engine:
        yield engine


@pytest.mark.parametrize("where", ["local", "processes", "remote"])
@pytest.mark.parametrize("how", HOWS)
def test_no_error_of_a_site_quotes_a_patient_under_a_guarantee(how, where, tmp_path, processes):
    privacy, sites = Quotes(how=how) + LOCAL, blob_sites((2, 2))
    settings: dict[str, Any] = {**SERVER, "privacy": privacy, "trace": tmp_path / "trace.jsonl"}
    hosts: dict[str, SiteHost] = {}
    if where == "remote":
        policy = SitePolicy(installed=("cohorts", "test_published"), tell_errors=True)
        hosts = {site.name: SiteHost(site=site, folder=tmp_path / site.name, policy=policy) for site in sites}
        plan = Plan.of(trainer=made(), strategy=UNIFORM, privacy=privacy, topology=star,
                       admission=Admission(), rounds=1, seed=0, sites=list(hosts))
        sites = [replace(site, train=site.train[:0] or (), val=()) for site in sites]

    def ask(names: Any, method: str, arguments: Any) -> Any:
        for name in names:
            try:
                yield name, getattr(hosts[name], method)(*arguments[name])
            except Exception as error:
                yield name, error

    engine: Any = {"local": Local(), "processes": processes}.get(where) or Remote(plan=plan, ask=ask)
    history = federate(made(), sites, engine=engine, **settings)
    found = str(history.absent().to_dict()) + (tmp_path / "trace.jsonl").read_text() + history._repr_html_()
    assert list(history.records[0]["absent"]) == ["site-1"]
    assert not re.search("Mueller|hospital|t1.nii", found)
    for host in hosts.values():
        host.close()
    if hosts:
        assert "Mueller" in (tmp_path / "site-1" / "site.log").read_text()


@pytest.mark.parametrize("how", ["budget", "privacy"])
def test_what_fedlab_itself_says_about_ledgers_and_budgets_is_told(how, tmp_path):
    small = LocalGaussian(clip=1.0, noise_multiplier=2.0, delta=1e-3, max_epsilon=4.0)
    if how == "budget":
        history = run(small, rounds=9)
        assert "budget is ε = 4" in history.stopped
        return
    engine = Local(ledgers=tmp_path)
    federate(trainer(steps=1), blob_sites((2, 2)), engine=engine, privacy=LOCAL, **SERVER)
    (tmp_path / "site-0.ledger.json").unlink()
    history = federate(trainer(steps=1), blob_sites((2, 2)), engine=engine, privacy=LOCAL, **SERVER)
    reason = history.records[0]["absent"]["site-0"]
    assert "was kept in site-0.ledger.json, which is missing; restore it" in reason


@pytest.mark.parametrize("how", ["data", "privacy", "own type"])
def test_no_path_leaves_a_site_without_a_guarantee_either(how):
    reason = run(Quotes(how=how), rounds=1).records[0]["absent"]["site-1"]
    assert "hospital" not in reason and "t1.nii.gz of Mueller is cut off" in reason


@pytest.mark.parametrize("text, left", [
    ("/hospital/scans/Anna/t1.nii.gz is cut off", "t1.nii.gz is cut off"),
    ("[Errno 2] No such file: '/home/Anna Mueller/a b/t1.nii'", "[Errno 2] No such file: 't1.nii'"),
    ("/data/Anna Mueller/scan 1/flair.nii.gz, 3 bytes", "flair.nii.gz, 3 bytes"),
    (r"C:\Users\Anna\seg.nii.gz: empty", "seg.nii.gz: empty"), ("~/scans/Anna/", "Anna"),
    ("scans/Anna/t2.nii.gz", "t2.nii.gz"), ("../Anna/t2", "t2"), ("add or remove 1/285 of add/remove", None),
    ("δ is below 1/3, <b>enough</b>; 3 / 4 mm/s", None)])
def test_of_a_path_the_last_part_is_left(text, left):
    assert without_paths(text) == (text if left is None else left)


def test_a_site_says_nothing_about_patients_before_its_first_round(tmp_path):
    """Several scans of one person: the names of the scans are in the error."""
    site, = blob_sites((2,))
    ids = ("BraTS-GLI-00001-100", "BraTS-GLI-00001-101")
    site = replace(site, train=[replace(p, id=name) for p, name in zip(site.train, ids, strict=True)])
    dp = DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.01, sample_rate=0.5)
    plan = Plan.of(trainer=made(), strategy=UNIFORM, privacy=dp, topology=star, admission=None, rounds=1, seed=0,
                   sites=[site.name])
    policy = SitePolicy(installed=("cohorts",), tell_errors=True)
    with SiteHost(site=site, folder=tmp_path, policy=policy) as host, pytest.raises(FedlabError) as caught:
        host.begin(plan.to_json(), pack_weights(made().initial()))
    assert "00001" not in str(caught.value) and "BraTS-GLI-00001" in (tmp_path / "site.log").read_text()


# A round that is void


@dataclass(frozen=True, kw_only=True)
class Sends(Fault):
    """A site whose software states or weighs something else."""

    changes: Any

    def send(self, update: Update, *_: Any) -> Update:
        return replace(update, **self.changes)


LIES = {"a multiple of its masked update": Scale(sites=("site-3",), factor=0.3, rounds=(1,)),
        "states no ε": Sends(sites=("site-2", "site-3"), rounds=(1,), changes={"spent": ()}),
        "two of four away": DropOut(sites=("site-2", "site-3"), rounds=(1,)),
        "two of four crash": Crash(sites=("site-2", "site-3"), rounds=(1,)),
        "infinite": Corrupt(sites=("site-2", "site-3"), how="nan", rounds=(1,)),
        "unknown tensors": Corrupt(sites=("site-2", "site-3"), how="garbage", rounds=(1,))}
SECURE = SecureAggregation(clip=1.0, threshold=3, noise_multiplier=4.0, delta=0.1)


@pytest.mark.parametrize("fault", LIES.values(), ids=list(LIES))
def test_a_site_that_lies_or_stays_away_voids_its_round_and_ends_no_run(fault):
    history = run(Privacy(), (2, 2, 2, 2), (fault,), rounds=3, aggregation=SECURE)
    assert [record["void"] is None for record in history.records] == [True, False, True]
    void = history.records[1]
    assert not void["sites"] and set(void["absent"]) == {f"site-{k}" for k in range(4)}
    once = history.records[0]["spent"]["site-0"][0]["epsilon"]
    assert void["spent"]["site-0"][0]["epsilon"] > once  # what was masked has left its site
    stated = history.records[2]["spent"]["site-0"][0]["epsilon"]
    assert stated == Ledger(history.site_states["site-0"]).spent()[0].epsilon
    with pytest.raises((FedlabError, ValueError)):
        run(Privacy(), (2, 2, 2, 2), (fault,), rounds=3, aggregation=SECURE, admission=None)


def test_the_model_stays_as_it_was_in_a_void_round():
    fault = Scale(sites=("site-3",), factor=0.3, rounds=(1,))
    models: list[str] = []
    run(Privacy(), (2, 2, 2, 2), (fault,), rounds=3, aggregation=SecureAggregation(clip=1.0, threshold=3),
        on_round=lambda done: models.append(weights_sha256(done.state.params)))
    assert models[0] == models[1] != models[2]


def test_malformed_shares_void_the_round():
    class Lies(SecureAggregation):
        def answer(self, step: str, site: str, inbox: Any, state: Any) -> Any:
            sent = super().answer(step, site, inbox, state)
            return {"server": b"no shares"} if (step, site) == ("unmask", "site-3") else sent

    history = run(Privacy(), (2, 2, 2, 2), rounds=2, aggregation=Lies(clip=1.0, threshold=3))
    assert all("something other than its shares" in record["void"] for record in history.records)


def test_a_run_ends_after_so_many_void_rounds_in_succession():
    faults = (DropOut(sites=("site-1", "site-2"), rounds=(0, 1, 3, 4, 5, 6, 7)),)
    history = run(Privacy(), (2, 2, 2), faults, rounds=9, aggregation=SecureAggregation(clip=1.0, threshold=2),
                  admission=Admission(max_void=3))
    assert [record["void"] is None for record in history.records] == [False, False, True, False, False, False]
    assert "rounds in succession were void" in history.stopped and "threshold is 2" in history.stopped
    assert history.stopped in repr(history)


def test_noise_at_the_server_hides_a_round_without_a_sum():
    """The model moves by noise, and the round is charged: whoever sees the models can't tell that sites were away."""
    models: list[str] = []
    fault = DropOut(sites=("site-2", "site-3"), rounds=(1,))
    history = run(CENTRAL, (2, 2, 2, 2), (fault,), rounds=3, aggregation=SecureAggregation(clip=1.0, threshold=3),
                  on_round=lambda done: models.append(weights_sha256(done.state.params)))
    assert history.records[1]["void"] and history.published().records[1]["void"] is None
    assert len(set(models)) == 3 and history.spent()["epsilon"].is_monotonic_increasing
    assert [entry for _, entry in history.published().spent().index.droplevel("unit")] == ["server"] * 3
