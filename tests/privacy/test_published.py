"""What leaves the server depends on nobody who took part; what an error says of patients stays at the site; a lying
site ends no run."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from chance import SIGMAS, seeded
from cohorts import TinyNet, blob_sites
from fedlab.core import DataError, PrivacyError, Site, Update
from fedlab.core.errors import FedlabError, PrivacyBudgetExhausted, SiteError
from fedlab.core.weights import weights_sha256
from fedlab.data.phantom.generator import write_brats
from fedlab.data.readers.folders import read_cohort, read_sites
from fedlab.data.sites.distributions import Domain, SiteStatistics
from fedlab.data.sites.fingerprint import Match, same_person
from fedlab.data.sites.harmonisation import fit_harmonisation
from fedlab.data.sites.partition import Partition, by_institution, split_patients
from fedlab.data.sites.statistics import site_statistics
from fedlab.data.store import load_sites, save_sites
from fedlab.deploy.host import SiteHost
from fedlab.deploy.messages import pack_weights
from fedlab.deploy.plan import Plan, built
from fedlab.deploy.policy import SitePolicy
from fedlab.deploy.settings import SiteSettings, read_site
from fedlab.engines.processes import Processes
from fedlab.engines.remote import Remote
from fedlab.faults.sites import Corrupt, Crash, DropOut, Fault, Faulty, Scale
from fedlab.privacy import (
    DPSGD,
    CentralGaussian,
    Gaussian,
    Ledger,
    LedgerFile,
    LocalGaussian,
    Privacy,
    SecureAggregation,
    epsilon_of,
)
from fedlab.run.admission import Admission
from fedlab.run.federate import each_round, federate
from fedlab.run.history import History
from fedlab.run.local import Local
from fedlab.run.publishable import OnPublicPatients
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
    # Where each site protects what it sends itself, it is known who takes part.
    assert run(LOCAL, validate=score).table()["Dice"].tolist() == [0.5, 0.5]


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


# The ledger of noise at the server


def test_the_servers_ledger_outlives_a_run_and_its_loss_is_refused(tmp_path):
    def spent(seed: int, **more: Any) -> float:
        history = federate(trainer(steps=1), blob_sites((2, 2)), privacy=CENTRAL, strategy=UNIFORM, rounds=3,
                           engine=Local(ledgers=tmp_path), seed=seed, progress=False, **more)
        return float(history.spent()["epsilon"].iloc[-1])

    def closed_form(steps: int) -> float:
        return epsilon_of([Gaussian(noise_multiplier=2.0)] * steps, delta=1e-3)

    assert spent(0) == closed_form(3)
    assert spent(1) == closed_form(6)  # more on the same sites
    assert spent(1) == closed_form(6)  # bit for bit the same run: the same noise, once
    assert LedgerFile(tmp_path, "server").read().spent()[0].epsilon == closed_form(6)
    (tmp_path / "server.ledger.json").unlink()
    with pytest.raises(PrivacyError, match=r"ledger of server was kept in .* which is missing"):
        spent(2)


def test_a_budget_of_the_server_holds_over_runs(tmp_path):
    """Three rounds in each run; the budget is what five cost."""
    budget = epsilon_of([Gaussian(noise_multiplier=2.0)] * 5, delta=1e-3)
    limited = CentralGaussian(clip=1.0, noise_multiplier=2.0, delta=1e-3, max_epsilon=budget)
    done = [len(federate(trainer(steps=1), blob_sites((2, 2)), privacy=limited, strategy=UNIFORM, rounds=3, seed=seed,
                         engine=Faulty(engine=Local(ledgers=tmp_path), faults=()), progress=False).records)
            for seed in range(3)]
    assert done == [3, 2, 0]


def test_a_round_of_the_server_that_is_run_again_counts_once_or_with_other_noise_twice(tmp_path):
    for secure, charged in ((False, 1), (True, 2)):
        technique = CentralGaussian(clip=1.0, noise_multiplier=2.0, delta=1e-3, secure_mode=secure)
        for _ in range(2):  # as after a crash before the checkpoint
            next(each_round(trainer(steps=1), blob_sites((2, 2)), privacy=technique, strategy=UNIFORM,
                            engine=Local(ledgers=tmp_path / str(secure))))
        assert len(LedgerFile(tmp_path / str(secure), "server").read().releases()) == charged


def test_a_ledger_of_the_server_in_a_file_is_not_left_behind(tmp_path):
    settings: dict[str, Any] = {"privacy": CENTRAL, "strategy": UNIFORM, "rounds": 2}
    first = next(each_round(trainer(steps=1), blob_sites((2, 2)), engine=Local(ledgers=tmp_path), **settings))
    with pytest.raises(PrivacyError, match=r"the ledger of server is kept in a file.*Local\(ledgers=…\)"):
        next(each_round(trainer(steps=1), blob_sites((2, 2)), engine=Local(), state=first.state,
                        site_states=first.site_states, **settings))


def test_no_site_is_named_as_the_server():
    sites = [replace(site, name=name) for site, name in zip(blob_sites((2, 2)), ("a", "server"), strict=True)]
    with pytest.raises(ValueError, match="stands for the server"):
        federate(trainer(), sites, rounds=1, progress=False)


# What a guarantee does not cover, though the run rests on it


def statistics_of(sites: list[Site], epsilon: float | None) -> list[SiteStatistics]:
    domain = Domain(intensity=tuple(range(-6, 13)), spacings=("3x3x3",), shapes=("16x16x16",))
    return [site_statistics(site, minimum=1, domain=domain, epsilon=epsilon, seed=None if epsilon is None else 0)
            for site in sites]


@pytest.mark.parametrize("epsilon, said", [(None, "were not noised and are outside it"),
                                           (1e4, "have spent ε = 1e+04 at δ = 0 per patient")])
def test_a_guarantee_says_that_intensities_were_harmonised(epsilon, said):
    sites = blob_sites((2, 2))
    harmonised = [fit_harmonisation(statistics_of(sites, epsilon)).site(site) for site in sites]
    history = federate(trainer(steps=1), harmonised, privacy=LOCAL, rounds=1, progress=False)
    assert history.guarantee().count(said) == 1 and said in repr(history) and said in history.published().guarantee()
    assert said in make_model_card(history, name="m", sites=harmonised, settings={}).text
    assert "outside it" not in federate(trainer(steps=1), sites, privacy=LOCAL, rounds=1, progress=False).guarantee()
    plain = federate(trainer(steps=1), harmonised, rounds=1, progress=False)
    assert plain.guarantee() == "no formal guarantee"


def test_a_guarantee_says_that_persons_were_found_by_fingerprints(tmp_path):
    match = Match(site="site-0", patient="s0p0", other_site="site-0", other_patient="s0p1", distance=0.01)
    sites = blob_sites((3, 2))
    split = Partition(train={"a": ("s0p0", "s0p1", "s0p2"), "b": ("s1p0", "s1p1")}, held_out={"a": (), "b": ()},
                      same=same_person([match]))
    split.save(tmp_path / "split.json")
    for partition in (split, Partition.load(tmp_path / "split.json")):
        made = partition.apply([patient for site in sites for patient in site.train])
        assert "fingerprints" in federate(trainer(steps=1), made, privacy=LOCAL, rounds=1, progress=False).guarantee()


def test_a_guarantee_says_that_the_grid_was_chosen_from_the_patients(tmp_path):
    folder = write_brats(tmp_path / "d", sizes=[2, 2], shape=(32, 32, 32), spacing_mm=6.0, workers=0, progress=False,
                         cache=tmp_path / "cache")
    reading: dict[str, Any] = {"spacing_mm": 8.0, "held_out": 0, "progress": False}
    table = folder / "partitioning.csv"
    chosen, public = read_sites(folder, table, **reading), read_sites(folder, table, shape=(32, 32, 32), **reading)
    assert [bool(site.remarks) for site in (*chosen, *public)] == [True, True, False, False]
    history = federate(trainer(steps=1), chosen, privacy=LOCAL, rounds=1, progress=False)
    assert "the grid was chosen from the patients: say shape=" in history.guarantee()
    save_sites(chosen, tmp_path / "kept")  # as a simulation in other processes reads them
    assert [site.remarks for site in load_sites(tmp_path / "kept")] == [site.remarks for site in chosen]


# Who is held out, and who is one person


@pytest.mark.parametrize("held_out", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("size", [3, 8, 40])
def test_whether_a_patient_is_held_out_does_not_depend_on_the_others(size, held_out):
    ids = [f"p{number}" for number in range(size)]
    settings: dict[str, Any] = {"held_out": held_out, "seed": 4, "site": "s", "at_least": 0}
    whole = set(split_patients(ids, **settings)[1])
    for left_out in ids:
        rest = [each for each in ids if each != left_out]
        train, held = split_patients(rest, **settings)
        if len(held) < len(rest) - 1 and len(whole) < size - 1:  # one person always trains
            assert set(held) == whole - {left_out} and set(train) == set(rest) - whole


@pytest.mark.chance
def test_the_share_held_out_is_that_which_was_asked_for():
    """Binomial: 2000 persons at 0.3 have a standard deviation of 20.5."""
    held = split_patients([f"p{number}" for number in range(2000)], held_out=0.3, seed=seeded(0), site="s")[1]
    assert abs(len(held) - 600) < SIGMAS * (2000 * 0.3 * 0.7) ** 0.5


def test_at_least_one_is_held_out_where_it_is_asked_and_one_always_trains():
    for seed in range(60):
        for size in (1, 2, 3):
            ids = [f"p{number}" for number in range(size)]
            train, held = split_patients(ids, held_out=0.2, seed=seed, site="s")
            assert train and bool(held) is (size > 1) and sorted(train + held) == ids
            assert split_patients(ids, held_out=0.99, seed=seed, site="s", at_least=0)[0]
    assert any(not split_patients(["a", "b"], held_out=0.2, seed=seed, site="s", at_least=0)[1] for seed in range(60))


def test_another_scan_of_a_person_moves_nobody():
    ids = [f"BraTS-GLI-{number:05d}-100" for number in range(30)]
    held = set(split_patients(ids, held_out=0.3, seed=1, site="s")[1])
    more = split_patients([*ids, "BraTS-GLI-00007-000"], held_out=0.3, seed=1, site="s")[1]
    assert set(more) - {"BraTS-GLI-00007-000"} == held
    assert ("BraTS-GLI-00007-000" in more) is ("BraTS-GLI-00007-100" in held)


PRIVATE = DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.1, sample_rate=0.5)


def test_a_column_of_persons_is_known_where_patients_are_counted(tmp_path):
    """A table of sites whose ids say nothing, and a table of paths."""
    folder = write_brats(tmp_path / "d", sizes=[3, 2], shape=(32, 32, 32), spacing_mm=6.0, workers=0, progress=False,
                         cache=tmp_path / "cache")
    lines = (folder / "partitioning.csv").read_text().splitlines()
    ids = [line.split(",")[1] for line in lines[1:]]
    table = tmp_path / "sites.csv"
    table.write_text("\n".join([f"{lines[0]},Person", *(f"{line},{who}" for line, who in zip(
        lines[1:], ("x", "x", "y", "z", ""), strict=True))]))
    reading: dict[str, Any] = {"spacing_mm": 8.0, "held_out": 0, "shape": (32, 32, 32), "progress": False}
    sites = read_sites(folder, table, **reading)
    assert sites[0].same == (frozenset(ids[:2]),) and sites[1].same == ()
    made = by_institution(table, held_out=0).apply([p for site in sites for p in site.train])
    paths = ["patient,flair,t1,t1c,t2,label,person", *(",".join([each, *(
        f"{folder.name}/{each}/{each}_{kind}.nii.gz" for kind in ("flair", "t1", "t1ce", "t2", "seg")), who])
        for each, who in zip(ids, "xyzxw", strict=True))]
    (tmp_path / "paths.csv").write_text("\n".join(paths))
    cohort = read_cohort(tmp_path / "paths.csv", spacing_mm=8.0, shape=(32, 32, 32), progress=False)
    own = SiteSettings(name="own", data=tmp_path / "paths.csv", held_out=0, spacing_mm=8.0, shape=(32, 32, 32),
                       policy=SitePolicy())
    for several in (sites, made, [Site("all", cohort)], [read_site(own, progress=False)]):
        with pytest.raises(ValueError, match="has several scans of 1 of its persons"):
            federate(trainer(steps=1), several, privacy=PRIVATE, rounds=1, progress=False)
    with pytest.raises(ValueError, match="several scans of 1 of its persons"):
        site_statistics(sites[0], minimum=1, epsilon=1.0)
    federate(trainer(steps=1, crop=(8, 8, 8)), sites[1:], privacy=PRIVATE, rounds=1, progress=False)
