"""A site allows what its policy says and nothing more, keeps its ledger, and remembers what it must."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cohorts import TinyNet, blob_sites
from fedlab import DPSGD, FedAvg, FedlabError, Privacy, PrivacyError, SecureAggregation, SiteTrainer, Update
from fedlab.core import ServerState, weights_sha256
from fedlab.core.errors import RunError, SiteError
from fedlab.core.types import Failure, Site, SiteState, Withdrawal
from fedlab.deploy.host import SiteHost
from fedlab.deploy.messages import pack_state, pack_weights, unpack_answer
from fedlab.deploy.plan import Plan, built
from fedlab.deploy.policy import Budget, Required, SitePolicy
from fedlab.deploy.settings import write_settings
from fedlab.deploy.snapshots import SiteSnapshots
from fedlab.privacy import Aggregation, LedgerFile, LocalGaussian, SharePercentile
from fedlab.run.site_task import SiteTask
from fedlab.strategies import SCAFFOLD
from fedlab.topologies import star
from folders import write_patient

SITE = blob_sites((3, 2))[0]
DP = DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.1, batch=2)
KNOWN = {"installed": ("cohorts", "test_site_host")}


def trainer(**settings: Any) -> SiteTrainer:
    return SiteTrainer(model=built(TinyNet, seed=3), **{"lr": 0.05, "steps": 1, "crop": (8, 8, 8), "augment": None,
                                                        "optimiser": torch.optim.SGD, "precision": "fp32", **settings})


def plan_of(**more: Any) -> Plan:
    return Plan.of(**{"trainer": trainer(), "strategy": FedAvg(), "privacy": Privacy(), "topology": star,
                      "admission": None, "rounds": 3, "seed": 0, "sites": ["site-0", "site-1"], **more})


START = trainer().initial()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Callable[..., SiteHost]]:
    """Opens hosts one after the other on one folder; all are closed in the end."""
    made: list[SiteHost] = []

    def open(policy: SitePolicy | None = None, *, site: Site = SITE) -> SiteHost:
        for other in made:
            other.close()
        made.append(SiteHost(site=site, folder=tmp_path / "site",
                             policy=SitePolicy(**KNOWN) if policy is None else replace(policy, **KNOWN)))
        return made[-1]

    yield open
    for one in made:
        one.close()


def begin(host: SiteHost, plan: Plan) -> str:
    host.begin(plan.to_json(), pack_weights(START))
    return plan.run


def ask(host: SiteHost, run: str, round: int, *, shift: float = 0.0, **more: Any) -> Any:
    state = ServerState(round=round, params={k: t + shift for k, t in START.items()}, **more)
    return unpack_answer(host.train(run, pack_state(state)), site="site-0")


def required(technique: str, **limits: Any) -> SitePolicy:
    return SitePolicy(require=(Required(technique=technique, **limits),))


UNIFORM = FedAvg(weights="uniform")
SECURE = SecureAggregation(clip=1.0, threshold=2)
NOISY = SecureAggregation(clip=1.0, threshold=2, noise_multiplier=2.0, delta=0.1)
REFUSED: dict[str, tuple[SitePolicy, dict[str, Any], str]] = {
    "technique": (required("DPSGD"), {}, r"insists on DPSGD, the plan protects with Privacy\(\)"),
    "other technique": (required("DPSGD"), {"privacy": SharePercentile()}, "insists on DPSGD"),
    "least": (required("DPSGD", least={"noise_multiplier": 1.1}), {"privacy": DP},
              "noise_multiplier of at least 1.1, the plan has 1.0"),
    "most": (required("DPSGD", most={"clip": 0.5}), {"privacy": DP}, "clip of at most 0.5, the plan has 1.0"),
    "exactly": (required("DPSGD", exactly={"secure_mode": True}), {"privacy": DP}, "secure_mode of exactly True"),
    "setting it hasn't": (required("DPSGD", least={"nonsense": 1.0}), {"privacy": DP}, "the plan has None"),
    "one of two": (required("LocalGaussian", least={"noise_multiplier": 2.0}),
                   {"privacy": LocalGaussian(clip=1.0, noise_multiplier=3.0, delta=0.1)
                    + LocalGaussian(clip=1.0, noise_multiplier=1.0, delta=0.1)}, "at least 2.0, the plan has 1.0"),
    "no noise": (required("SecureAggregation", least={"noise_multiplier": 0.1}),
                 {"aggregation": SECURE, "strategy": UNIFORM}, "the plan has None"),
    "aggregation": (required("SecureAggregation"), {"privacy": DP}, "insists on SecureAggregation"),
    "noise of the sum that repeats": (SitePolicy(secure_mode=True), {"aggregation": NOISY, "strategy": UNIFORM},
                                      "secure_mode: .*SecureAggregation.secure_mode=True"),
    "budget with a larger delta of the sum": (
        SitePolicy(budgets={"site": Budget(epsilon=9.0, delta=0.01)}), {"aggregation": NOISY, "strategy": UNIFORM},
        "δ of at most 0.01, the plan has 0.1"),
    "rounds": (SitePolicy(max_rounds=2), {}, "max_rounds: .* at most 2 rounds of a run, the plan has 3"),
    "sites": (SitePolicy(min_sites=3), {}, "min_sites: .* at least 3 sites, the plan has 2"),
    "noise that repeats": (SitePolicy(secure_mode=True), {"privacy": DP}, "secure_mode: .*operating system"),
    "budget without guarantee": (SitePolicy(budgets={"patient": Budget(epsilon=9.0, delta=0.1)}), {},
                                 "budget: .*gives no guarantee per patient"),
    "budget of another unit": (SitePolicy(budgets={"site": Budget(epsilon=9.0, delta=0.1)}), {"privacy": DP},
                               "gives no guarantee per site"),
    "budget with a larger delta": (SitePolicy(budgets={"patient": Budget(epsilon=9.0, delta=0.01)}), {"privacy": DP},
                                   "δ of at most 0.01, the plan has 0.1"),
    "not its run": (SitePolicy(), {"sites": ["site-1", "site-2"]}, "this one is 'site-0'"),
}


@pytest.mark.parametrize("rule", REFUSED)
def test_a_run_that_the_policy_does_not_allow_is_refused_with_the_rule(host: Any, rule: str) -> None:
    policy, more, words = REFUSED[rule]
    plan = plan_of(**more)
    one = host(policy)
    with pytest.raises(PrivacyError, match=f"site-0 refuses: .*{words}"):
        begin(one, plan)
    answer = ask(one, plan.run, 0)
    assert isinstance(answer, Failure) and "has not begun" in str(answer.error)
    assert not (one.folder / "states").exists() and not (one.folder / "ledger").exists()
    begin(host(SitePolicy(min_sites=1)), plan) if rule != "not its run" else None  # the rule alone has refused it


def test_a_run_within_the_policy_begins(host: Any) -> None:
    policy = SitePolicy(require=(Required(technique="DPSGD", least={"noise_multiplier": 1.0}, most={"clip": 1.0}),),
                        budgets={"patient": Budget(epsilon=50.0, delta=0.1)}, max_rounds=3, min_sites=2)
    one = host(policy)
    run = begin(one, plan_of(privacy=DP))
    assert isinstance(ask(one, run, 0), Update)
    assert one.spent()[0].unit == "patient"


def test_a_required_aggregation_and_a_budget_that_it_covers_let_a_run_begin(host: Any) -> None:
    limits = Required(technique="SecureAggregation", least={"noise_multiplier": 2.0, "threshold": 2})
    policy = SitePolicy(require=(limits,), budgets={"site": Budget(epsilon=9.0, delta=0.1)})
    begin(host(policy), plan_of(aggregation=NOISY, strategy=UNIFORM))


class Weak(DPSGD):
    """Its name in another module."""


Weak.__qualname__ = Weak.__name__ = "DPSGD"


def test_a_technique_of_the_same_name_elsewhere_is_not_the_one_required() -> None:
    weak = Weak(clip=1.0, noise_multiplier=1.0, delta=0.1, batch=2)
    with pytest.raises(PrivacyError, match="insists on DPSGD"):
        Required(technique="DPSGD").check(weak, Aggregation())
    Required(technique="test_site_host:DPSGD").check(weak, Aggregation())


def test_files_run_only_while_they_are_what_was_approved(tmp_path: Path) -> None:
    source = b"from fedlab import Privacy\n\n\nclass Mine(Privacy):\n    def __init__(self, keep=0.5):\n" \
             b"        self.keep = keep\n\n    def protect(self, update, state, rng):\n" \
             b"        return update.map(lambda t: t * self.keep)\n"
    digest = hashlib.sha256(source).hexdigest()
    note = json.loads(plan_of().to_json())
    note["privacy"] = {"make": "h2_mine:Mine", "with": {"keep": 0.25}}
    plan = json.dumps(note)

    def open(**more: Any) -> SiteHost:
        return SiteHost(site=SITE, folder=tmp_path / "site", policy=SitePolicy(installed=("cohorts",), **more))

    with open() as host, pytest.raises(PrivacyError, match="'h2_mine', which this site has not approved"):
        host.begin(plan, pack_weights(START))
    with open(approved={"h2_mine": digest}) as host:
        (host.techniques).mkdir()
        (host.techniques / "h2_mine.py").write_bytes(source + b"import os\n")
        with pytest.raises(PrivacyError, match="was changed since"):
            host.begin(plan, pack_weights(START))
        assert "h2_mine" not in sys.modules
        (host.techniques / "h2_mine.py").write_bytes(source)
        host.begin(plan, pack_weights(START))
        assert isinstance(ask(host, Plan.from_json(plan).run, 0), Update)
    with open(approved={"h2_mine": "0" * 64}) as host, pytest.raises(PrivacyError, match="SHA-256"):
        host.begin(plan, pack_weights(START))


def test_a_file_must_not_stand_in_for_an_installed_module(tmp_path: Path) -> None:
    (tmp_path / "wave.py").write_bytes(b"class Wave: pass\n")
    policy = SitePolicy(approved={"wave": hashlib.sha256(b"class Wave: pass\n").hexdigest()})
    sys.modules.pop("wave", None)
    with pytest.raises(PrivacyError, match="name of a module that is installed"):
        policy.load("wave", techniques=tmp_path)


def test_other_weights_than_the_plan_names_are_refused(host: Any) -> None:
    one, plan = host(), plan_of()
    with pytest.raises(FedlabError):
        one.begin(plan.to_json(), pack_weights({k: t + 1 for k, t in START.items()}))
    for text in ("{}", "", plan.to_json()[:-1]):
        with pytest.raises(FedlabError):
            one.begin(text, pack_weights(START))
    with pytest.raises(FedlabError):
        one.begin(plan.to_json(), b"no weights")


@pytest.mark.parametrize(("state", "words"), [
    (ServerState(round=3, params=START), "round 3 was asked for, the plan has 3"),
    (ServerState(round=0, params={}), "not those of the run's model"),
    (ServerState(round=0, params={k: t.double() for k, t in START.items()}), "not those of the run's model"),
    (ServerState(round=0, params={k: t[..., :1] for k, t in START.items()}), "not those of the run's model"),
    (ServerState(round=0, params={k: t * torch.nan for k, t in START.items()}), "NaN"),
    (ServerState(round=0, params=START, moments={"m": {"x": torch.zeros(1)}}), "'m' of the state are not"),
    (ServerState(round=0, params=START, moments={"m": {k: t.double() * torch.inf for k, t in START.items()}}),
     "'m' of the state hold NaN or infinite"),
])
def test_states_of_another_model_or_round_are_refused_before_training(
        host: Any, state: ServerState, words: str) -> None:
    one = host()
    run = begin(one, plan_of())
    answer = unpack_answer(one.train(run, pack_state(state)), site="site-0")
    assert isinstance(answer, Failure) and words in str(answer.error)


def test_a_state_may_hold_the_weights_four_times(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as a strategy may keep moments of them; a larger one is not unpacked."""
    one, state = host(), pack_state(ServerState(round=0, params=START))
    run = begin(one, plan_of())
    for limit, taken in ((-(-len(state) // 4), True), (len(state) // 4 - 1, False)):
        monkeypatch.setattr("fedlab.deploy.host.limit_for", lambda start, limit=limit: limit)
        assert isinstance(unpack_answer(one.train(run, state), site="site-0"), Update if taken else Failure)


@pytest.mark.parametrize("data", [b"", b"nonsense", pack_weights(START)])
def test_what_is_no_state_is_answered_with_a_failure(host: Any, data: bytes) -> None:
    one = host()
    answer = unpack_answer(one.train(begin(one, plan_of()), data), site="site-0")
    assert isinstance(answer, Failure)


def test_a_round_that_is_asked_again_gives_the_same_bits_and_counts_once(host: Any, tmp_path: Path) -> None:
    plan = plan_of(privacy=DP, trainer=trainer(optimiser=torch.optim.AdamW))
    one = host()
    run = begin(one, plan)
    first = [ask(one, run, round) for round in range(3)]
    before = one.spent()
    for round in (1, 2):
        again = host()
        begin(again, plan)
        answer = ask(again, run, round)
        assert weights_sha256(answer.delta) == weights_sha256(first[round].delta)
        assert again.spent() == before
    other = ask(again, run, 2, shift=0.5)  # other weights: other noise, and both are accounted for
    assert other.spent[0].epsilon > first[2].spent[0].epsilon


def test_the_ledger_never_goes_back_though_the_state_does(host: Any, tmp_path: Path) -> None:
    plan = plan_of(privacy=DP)
    one = host()
    run = begin(one, plan)
    ask(one, run, 0), ask(one, run, 1)
    spent = one.spent()
    again = host()
    begin(again, plan)
    answer = ask(again, run, 0, shift=1.0)
    assert answer.spent[0].epsilon > spent[0].epsilon
    again.close()
    (tmp_path / "site" / "ledger" / "site-0.ledger.json").unlink()
    lost = host()
    begin(lost, plan)
    refused = ask(lost, run, 1)
    assert isinstance(refused, Failure) and "missing" in str(refused.error)


def test_a_state_that_is_lost_or_damaged_is_refused(host: Any, tmp_path: Path) -> None:
    plan = plan_of(strategy=SCAFFOLD())
    one = host()
    run = begin(one, plan)
    ask(one, run, 0), ask(one, run, 1)
    files = sorted((tmp_path / "site" / "states" / run).glob("from-*"))
    assert [f.name for f in files] == [f"from-00000{k}.state" for k in range(3)]
    whole = files[2].read_bytes()
    files[2].write_bytes(whole[:-3] + b"abc")
    assert "damaged" in str(ask(one, run, 2).error)
    files[2].write_bytes(files[1].read_bytes())
    assert "damaged" in str(ask(one, run, 2).error)
    for file in files:
        file.unlink()
    again = host()
    begin(again, plan)
    assert "has no state of this run" in str(ask(again, run, 2).error)


def test_secrets_of_the_moment_are_never_on_disk(tmp_path: Path) -> None:
    snapshots = SiteSnapshots(tmp_path / "m", site="a", run="r")
    now = snapshots.before(0)
    now.secrets["secure"] = {"key": "M" * 8}
    now.of("kept").own["x"] = torch.ones(2)
    snapshots.save(now, 0)
    assert "secure" in snapshots.before(1).secrets and "kept" in snapshots.before(1).namespaces
    assert "secure" in snapshots.with_secrets().secrets
    assert all(b"secure" not in file.read_bytes() for file in (tmp_path / "m").iterdir())
    other = SiteSnapshots(tmp_path / "m", site="a", run="r")
    assert "secure" not in other.before(1).secrets and "kept" in other.before(1).namespaces
    assert "kept" not in other.before(0).namespaces


def test_only_the_last_rounds_are_kept_and_undone_ones_forgotten(tmp_path: Path) -> None:
    snapshots = SiteSnapshots(tmp_path / "m", site="a", run="r")

    def state(number: int) -> SiteState:
        return SiteState(namespaces={"x": {"round": torch.tensor(number)}})

    def kept(round: int) -> int:
        return int(snapshots.before(round).namespaces["x"]["round"])

    for round in range(8):
        snapshots.save(state(round), round)
    assert kept(8) == 7 and kept(5) == 4
    with pytest.raises(PrivacyError, match="no state of this run before round 4"):
        snapshots.before(4)
    snapshots.save(state(50), 5)
    assert kept(9) == 50  # rounds 6 and 7 haven't happened
    assert snapshots.before(0).enrolled and not snapshots.before(0).namespaces  # a run that starts, starts anew


def test_two_processes_on_one_folder_are_refused(host: Any, tmp_path: Path) -> None:
    host()
    code = ("import sys\nfrom filelock import FileLock, Timeout\n"
            "try:\n    FileLock(sys.argv[1]).acquire(timeout=0)\nexcept Timeout:\n    print('held')")
    told = subprocess.run([sys.executable, "-c", code, str(tmp_path / "site" / ".lock")], capture_output=True,
                          text=True, check=True, timeout=60)
    assert told.stdout.strip() == "held"
    with pytest.raises(RunError, match="another process is using"):
        SiteHost(site=SITE, folder=tmp_path / "site")


def test_a_site_answers_only_as_many_models_as_it_allows(host: Any) -> None:
    one = host(SitePolicy(max_rounds=3, max_updates=5))
    run = begin(one, plan_of())
    for shift in (0.0, 0.1, 0.1, 0.2):  # three models, four updates
        assert isinstance(ask(one, run, 0, shift=shift), Update)
    over = ask(one, run, 1)
    assert isinstance(over, Withdrawal) and "max_rounds" in over.reason
    again = host(SitePolicy(max_rounds=3, max_updates=5))  # it is on disk
    other = begin(again, plan_of(seed=1))
    assert isinstance(ask(again, other, 0), Update)
    over = ask(again, other, 1)
    assert isinstance(over, Withdrawal) and "max_updates" in over.reason


def test_an_answer_that_the_policy_does_not_allow_costs_neither_privacy_nor_time(
        host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, train = [], SiteTask.__call__
    monkeypatch.setattr(SiteTask, "__call__", lambda task, *shown: (trained.append(task), train(task, *shown))[1])
    one = host(SitePolicy(max_updates=1))
    run = begin(one, plan_of(privacy=DP))
    once = ask(one, run, 0).spent
    assert isinstance(ask(one, run, 1), Withdrawal) and one.spent() == once and len(trained) == 1


def test_a_budget_counts_over_runs(host: Any, tmp_path: Path) -> None:
    one = host()
    run = begin(one, plan_of(privacy=DP))
    costs = [ask(one, run, round).spent[0].epsilon for round in range(3)]
    budget = Budget(epsilon=costs[2], delta=0.1)
    again = host(SitePolicy(budgets={"patient": budget}))
    other = begin(again, plan_of(privacy=DP, seed=9))
    kept = LedgerFile(tmp_path / "site" / "ledger", "site-0").path.read_bytes()
    answer = ask(again, other, 0)
    assert isinstance(answer, Withdrawal) and f"{budget.epsilon:g}" in answer.reason
    assert LedgerFile(tmp_path / "site" / "ledger", "site-0").path.read_bytes() == kept


class Clumsy(Privacy):
    """Quotes what no server should read."""

    def __init__(self, private: bool = False) -> None:
        self.private = private

    def protect(self, update: Update, state: Any, rng: Any) -> Update:
        raise KeyError("patient-Jane-Doe")


def test_the_text_of_errors_stays_in_the_sites_log(host: Any, tmp_path: Path) -> None:
    for tell in (False, True):
        one = host(SitePolicy(tell_errors=tell))
        answer = ask(one, begin(one, plan_of(privacy=Clumsy())), 0)
        assert isinstance(answer, Failure) and isinstance(answer.error, SiteError)
        assert answer.error.stage == "protect" and ("Jane" in str(answer.error)) is tell
    one = host(SitePolicy(tell_errors=True))
    guarded = Clumsy() + LocalGaussian(clip=1.0, noise_multiplier=1.0, delta=0.1)
    assert "Jane" not in str(ask(one, begin(one, plan_of(privacy=guarded)), 0).error)
    assert (tmp_path / "site" / "site.log").read_text(encoding="utf-8").count("patient-Jane-Doe") == 3


def test_a_site_with_a_full_disk_answers_with_a_failure(host: Any, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    one = host()
    run = begin(one, plan_of())
    original = Path.open

    def full(path: Path, mode: str = "r", *more: Any, **settings: Any) -> Any:
        if set(mode) & set("wa"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, mode, *more, **settings)

    monkeypatch.setattr(Path, "open", full)
    answer = ask(one, run, 0)
    assert isinstance(answer, Failure) and "OSError" in str(answer.error)
    assert "site.log cannot be written" in capsys.readouterr().err
    monkeypatch.undo()
    assert isinstance(ask(one, run, 0), Update)


@pytest.mark.parametrize(("step", "inbox"), [
    ("nonsense", {}), ("keys", {"stranger": b"x"}), ("keys", {"site-1": "text"}), ("keys", {"site-1": b"x" * 2**21}),
    ("keys", []), ("shares", {}), (3, {}),
])
def test_exchanges_that_are_none_are_refused(host: Any, step: Any, inbox: Any) -> None:
    one = host()
    run = begin(one, plan_of(aggregation=SECURE, strategy=UNIFORM))
    assert set(one.exchange(run, "keys", {})) == {"server"}
    with pytest.raises(PrivacyError):
        one.exchange(run, step, inbox)
    with pytest.raises(RunError, match="has not begun"):
        one.exchange("other", "keys", {})


def test_a_folder_made_by_init_opens_with_its_patients(tmp_path: Path) -> None:
    for k in range(3):
        write_patient(tmp_path / "scans", f"BraTS2021_0000{k}", seed=k)
    write_settings(tmp_path / "a", name="site-0", data=tmp_path / "scans", spacing_mm=1.0, shape=(32, 48, 32),
                   held_out=1)
    with SiteHost.open(tmp_path / "a", progress=False) as host:
        assert len(host.site.train) == 2 and len(host.site.val) == 1
        first = [patient.id for patient in host.site.train]
        assert host.site.train[0].image.shape == (4, 32, 48, 32)
    assert list((tmp_path / "a" / "prepared").glob("*.safetensors"))
    with SiteHost.open(tmp_path / "a", progress=False) as host:
        assert [patient.id for patient in host.site.train] == first
    with pytest.raises(RunError, match="no site's folder"):
        SiteHost.open(tmp_path / "scans")
