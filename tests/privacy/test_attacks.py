"""Attacks on guarantees, each of which once succeeded: what must not leave a site does not, whoever asks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from chance import FALSE_ALARM, seeded
from cohorts import TinyNet, blob_sites
from fedlab.checks import check_privacy
from fedlab.core import PrivacyError, ServerState, SiteState, Update
from fedlab.core.types import Failure, Spent
from fedlab.deploy.host import SiteHost
from fedlab.deploy.messages import pack_state, pack_weights, unpack_answer
from fedlab.deploy.plan import Plan, built
from fedlab.deploy.policy import Budget, SitePolicy
from fedlab.faults.sites import Fault, Faulty
from fedlab.privacy import (
    DPSGD,
    AtSites,
    CentralGaussian,
    Gaussian,
    Ledger,
    LedgerFile,
    LocalGaussian,
    Privacy,
    SecureAggregation,
    Terms,
    epsilon_of,
    noise_multiplier_for,
)
from fedlab.privacy.accounting.ledger import PATIENT_ZEROED, check_statement
from fedlab.privacy.aggregation import shown_sha256
from fedlab.privacy.base import technique_at
from fedlab.privacy.noise.streams import noise_generator, noise_stream
from fedlab.run.admission import Admission
from fedlab.run.federate import each_round, federate
from fedlab.run.history import History
from fedlab.run.local import Local
from fedlab.strategies import FedAvg, weighted_mean
from fedlab.topologies import star
from fedlab.training.trainer import SiteTrainer

UNIFORM = FedAvg(weights="uniform")
DP = DPSGD(clip=1.0, noise_multiplier=4.0, delta=0.01, sample_rate=0.5, secure_mode=True)
TRAINER = SiteTrainer(model=built(TinyNet, seed=3), lr=0.05, steps=1, crop=(8, 8, 8), augment=None, precision="fp32",
                      optimiser=torch.optim.SGD)
START = TRAINER.initial()
NAMES = ("site-0", "site-1", "site-2", "site-3")
NOBODY = AtSites(sites=NAMES, technique=AtSites(sites=NAMES, technique=AtSites(sites=("site-1",), technique=DP)))


def plan_of(**parts: Any) -> Plan:
    return Plan.of(**{"trainer": TRAINER, "strategy": UNIFORM, "privacy": Privacy(), "topology": star,
                      "admission": None, "rounds": 3, "seed": 7, "sites": NAMES, **parts})


@contextmanager
def hosts_of(folder: Path, plan: Plan, policy: SitePolicy | None = None) -> Iterator[dict[str, SiteHost]]:
    """The sites of a run, begun."""
    policy = replace(policy or SitePolicy(), installed=("cohorts", "test_attacks"))
    hosts = {site.name: SiteHost(site=site, folder=folder / site.name, policy=policy) for site in blob_sites((3,) * 4)}
    try:
        for host in hosts.values():
            host.begin(plan.to_json(), pack_weights(START))
        yield hosts
    finally:
        for host in hosts.values():
            host.close()


# A technique that is for other sites


def test_an_update_leaves_a_site_with_a_budget_only_under_its_guarantee(tmp_path):
    """The plan hides that it protects other sites only: AtSites(AtSites(AtSites(...)))."""
    policy = SitePolicy(budgets={"patient": Budget(epsilon=9.0, delta=0.01)}, secure_mode=True)
    with hosts_of(tmp_path, plan_of(privacy=DP), policy) as hosts:
        state = ServerState(round=0, params=START)
        honest = unpack_answer(hosts["site-0"].train(plan_of(privacy=DP).run, pack_state(state)), site="site-0")
        assert isinstance(honest, Update) and honest.spent  # the ledger's total is no longer empty
        with pytest.raises(PrivacyError, match=r"budget: .*gives no guarantee per patient"):
            hosts["site-0"].begin(plan_of(privacy=NOBODY, seed=8).to_json(), pack_weights(START))


class Other(Privacy):
    """Is another technique at a site, which is another one in turn."""

    units = frozenset({"patient"})

    def __init__(self, *, left: int) -> None:
        self.left = left

    def at(self, site: str) -> Privacy:
        return Other(left=self.left - 1) if self.left else Privacy()


def test_what_a_technique_is_at_a_site_is_asked_until_nothing_changes():
    assert NOBODY.units == {"patient"} and technique_at(NOBODY, "site-0").units == frozenset()
    assert technique_at(NOBODY, "site-1") is DP
    assert type(technique_at(Other(left=5), "site-0")) is Privacy
    both = NOBODY + LocalGaussian(clip=1.0, noise_multiplier=2.0)
    assert technique_at(both, "site-0").units == {"site"} and technique_at(both, "site-1").units == {"patient", "site"}
    with pytest.raises(PrivacyError, match="never says what it is at site-0"):
        technique_at(Other(left=-1), "site-0")


def test_a_budget_asks_for_a_charge_of_this_round():
    terms = Terms(unit="patient", delta=0.01, adjacency="add or remove one patient")
    policy = SitePolicy(budgets={"patient": Budget(epsilon=9.0, delta=0.01)})
    state = SiteState()
    first = Ledger.open(state, site="site-0", round=0, stream="a")
    first.charge(Gaussian(noise_multiplier=4.0), terms=terms)
    policy.check_spent(Ledger(state))
    for ledger in (None, Ledger.open(state, site="site-0", round=1, stream="b")):
        with pytest.raises(PrivacyError, match=r"was not charged per patient for this round"):
            policy.check_spent(ledger)


class SendsTheLoss(LocalGaussian):
    """Names the loss of training among what its noise covers, which it does not."""

    sends = frozenset({"loss", "norm"})

    def protect(self, *arguments: Any) -> Update:
        out = super().protect(*arguments)
        return replace(out, metrics={**out.metrics, "norm": out.norm(), "other": 1.0})


def test_of_the_numbers_of_training_none_leaves_under_a_guarantee():
    sent = run(SendsTheLoss(clip=1.0, noise_multiplier=8.0, delta=1e-3), rounds=1).records[0]["sites"]["site-0"]
    assert "norm" in sent and not {"loss", "other"} & sent.keys()


# A sum that is asked for twice


class Server:
    """An aggregation server over hosts, which does in a round what it likes.

    Args:
        hosts: the sites.
        survivors: those whose update it counts.
        shows: the state that a site is shown, if not the server's own.
    """

    def __init__(self, hosts: Mapping[str, SiteHost], plan: Plan, aggregation: SecureAggregation, *,
                 survivors: tuple[str, ...] = NAMES, shows: Mapping[str, ServerState] | None = None) -> None:
        self.hosts, self.run, self.aggregation = hosts, plan.run, replace(aggregation, sites=len(hosts))
        self.survivors, self.shows, self.names = survivors, shows or {}, tuple(hosts)

    def send(self, step: str, inboxes: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
        return {name: self.hosts[name].exchange(self.run, step, dict(inboxes.get(name, {}))) for name in self.names}

    def sum(self, state: ServerState) -> dict[str, torch.Tensor]:
        """The sum of the survivors' updates."""
        self.shown, self.names = shown_sha256(state), tuple(self.hosts)
        keys = self.aggregation.before(self)
        answers = [unpack_answer(self.hosts[name].train(self.run, pack_state(self.shows.get(name, state))), site=name)
                   for name in self.survivors]
        for answer in answers:
            if isinstance(answer, Failure):
                raise answer.error
        self.names = self.survivors
        mean = self.aggregation.after(weighted_mean(answers), keys, self)
        return {name: t * len(answers) for name, t in mean.delta.items()}


NOISY = SecureAggregation(clip=1.0, threshold=3, noise_multiplier=2.0, delta=0.1)


@pytest.mark.parametrize("aggregation", [SecureAggregation(clip=1.0, threshold=3), NOISY], ids=["masks", "noise"])
def test_the_difference_of_two_sums_of_one_round_is_not_to_be_had(tmp_path, aggregation):
    plan, state = plan_of(aggregation=aggregation), ServerState(round=0, params=START)
    with hosts_of(tmp_path, plan) as hosts:
        first = Server(hosts, plan, aggregation).sum(state)
        with pytest.raises(PrivacyError, match="helped to unmask another sum of round 0"):
            Server(hosts, plan, aggregation, survivors=NAMES[:3]).sum(state)
        again = Server(hosts, plan, aggregation).sum(state)  # a server that crashed before it wrote the first sum
        assert all(torch.equal(first[name], again[name]) for name in first)
        if aggregation.units:
            assert len(Ledger(ledger_of(hosts["site-0"])).releases()) == 3  # every masking
        Server(hosts, plan, aggregation, survivors=NAMES[:3]).sum(replace(state, round=1))  # another round is new


def test_the_difference_is_not_to_be_had_after_the_sites_are_restarted_either(tmp_path):
    aggregation = SecureAggregation(clip=1.0, threshold=3)
    plan, state = plan_of(aggregation=aggregation), ServerState(round=0, params=START)
    with hosts_of(tmp_path, plan) as hosts:
        first = Server(hosts, plan, aggregation).sum(state)
    with hosts_of(tmp_path, plan) as hosts:
        with pytest.raises(PrivacyError, match="helped to unmask another sum of round 0"):
            Server(hosts, plan, aggregation, survivors=NAMES[:3]).sum(state)
        again = Server(hosts, plan, aggregation).sum(state)  # the run goes on where the server was killed
        assert all(torch.equal(first[name], again[name]) for name in first)
        Server(hosts, plan, aggregation).sum(replace(state, round=1))
    (tmp_path / NAMES[0] / "states" / plan.run / "sums.json").unlink()
    with pytest.raises(PrivacyError, match="which sums this site has helped to unmask"), hosts_of(tmp_path, plan):
        pass


def test_sites_that_are_shown_different_models_form_no_sum(tmp_path):
    """All but one train a dead model, so that the sum is the update of that one (Pasquini et al. 2022)."""
    aggregation = SecureAggregation(clip=10.0, threshold=3)
    plan, state = plan_of(aggregation=aggregation), ServerState(round=0, params=START)
    dead = replace(state, params={name: torch.zeros_like(p) for name, p in START.items()})
    with hosts_of(tmp_path, plan) as hosts, pytest.raises(PrivacyError, match="shown different models"):
        Server(hosts, plan, aggregation, shows=dict.fromkeys(NAMES[:3], dead)).sum(state)


def ledger_of(host: SiteHost) -> SiteState:
    return SiteState(ledger=LedgerFile(host.folder / "ledger", host.site.name).read().note())


# What is shown as spent is not too little


LOCAL = LocalGaussian(clip=1.0, noise_multiplier=8.0, delta=1e-3)


def run(privacy: Privacy, *, sizes: tuple[int, ...] = (2, 2, 2), rounds: int = 2, **more: Any) -> History:
    return federate(TRAINER, blob_sites(sizes), privacy=privacy, rounds=rounds, progress=False, **more)


def test_a_guarantee_names_the_sites_that_it_does_not_cover():
    history = run(AtSites(sites=("site-0",), technique=LOCAL))
    assert "at site-0, none at site-1, site-2" in history.guarantee()
    assert "none at" not in run(LOCAL).guarantee()
    central = CentralGaussian(clip=1.0, noise_multiplier=2.0, delta=1e-3)
    both = AtSites(sites=("site-0",), technique=LOCAL) + central  # noise at the server covers every site
    assert "none at" not in run(both, strategy=UNIFORM).guarantee()


def test_an_update_that_is_turned_away_has_left_its_site_and_counts():
    history = run(LOCAL, admission=Admission(max_norm=1.0), rounds=3)  # the noise alone is longer
    assert all(not record["sites"] for record in history.records)
    for site, state in history.site_states.items():
        shown = history.spent().xs(site, level="site")["epsilon"].iloc[-1]
        assert shown == Ledger(state).spent()[0].epsilon == epsilon_of([Gaussian(noise_multiplier=4.0)] * 3, delta=1e-3)
    assert history.guarantee() != "no formal guarantee"


def test_an_update_of_eight_steps_states_more_than_seven_cost():
    technique = DPSGD(clip=1.0, noise_multiplier=2.0, sample_rate=0.5, delta=1e-2)
    seven, eight = (epsilon_of([Gaussian(noise_multiplier=2.0, sample_rate=0.5, steps=n)], delta=1e-2) for n in (7, 8))
    for epsilon in (seven, eight):
        update = Update(site="site-1", delta={}, weight=2.0, steps=8,
                        spent=(Spent(epsilon, 1e-2, "patient", "rdp", PATIENT_ZEROED, repeats=True),))
        with nullcontext() if epsilon == eight else pytest.raises(PrivacyError, match="under DPSGD"):
            check_statement(update, [technique])


@dataclass(frozen=True, kw_only=True)
class Says(Fault):
    """A site whose software states something else as spent."""

    spent: tuple[Spent, ...] = ()

    def send(self, update: Update, *arguments: Any) -> Update:
        return replace(update, spent=self.spent)


ANY_TWO = "any two updates of a site"


@pytest.mark.parametrize("spent", [
    (), (Spent(1e-6, 1e-3, "site", "rdp", ANY_TWO),), (Spent(9.0, 1e-9, "patient", "rdp", ANY_TWO),),
    (Spent(9.0, 0.5, "site", "rdp", ANY_TWO),), (Spent(9.0, 1e-3, "site", "gdp", ANY_TWO),),
    (Spent(9.0, 1e-3, "site", "rdp", "nothing of note"),)], ids=str)
def test_a_statement_that_the_technique_rules_out_is_refused(spent):
    engine = Faulty(engine=Local(), faults=[Says(sites=("site-1",), spent=spent)])
    history = run(LOCAL, engine=engine, admission=Admission())
    assert "under LocalGaussian" in history.absent()["reason"].iloc[0]
    assert {name for record in history.records for name in record["spent"]} == {"site-0", "site-2"}
    with pytest.raises(PrivacyError, match=r"the update of site-1 states .* as spent"):
        run(LOCAL, engine=engine)


@dataclass(frozen=True, kw_only=True)
class CountsLongOnesMore(FedAvg):
    def combine(self, updates: Any) -> Update:
        return weighted_mean(replace(u, weight=max(u.norm(), 1e-9) ** 4) for u in updates)


@dataclass(frozen=True, kw_only=True)
class WeighsByNorm(FedAvg):
    def _weight(self, update: Update) -> float:
        return max(update.norm(), 1e-9)


@dataclass(frozen=True, kw_only=True)
class LargestFirst(FedAvg):
    """Always the largest sites, as if drawn with probability `sample`."""

    def select(self, sites: Any, rng: torch.Generator) -> Any:
        return sorted(sites, key=lambda s: (-len(s.train), s.name))[:max(1, round(self.sample * len(sites)))]


@pytest.mark.parametrize("strategy, words", [
    (CountsLongOnesMore(weights="uniform"), "plain mean"), (WeighsByNorm(weights="uniform"), "plain mean"),
    (LargestFirst(weights="uniform", sample=0.4), "drawn independently")], ids=repr)
def test_a_strategy_that_overrides_what_the_proof_needs_is_refused(strategy, words):
    central = CentralGaussian(clip=0.05, noise_multiplier=1.0, delta=1e-3)
    with pytest.raises(ValueError, match=words):
        run(central, strategy=strategy)
    run(central, strategy=FedAvg(weights="uniform", sample=0.4), rounds=1)
    run(central, strategy=LargestFirst(weights="uniform"), rounds=1)  # no amplification is credited


def test_noise_at_the_server_is_checked_beside_sampling():
    central = CentralGaussian(clip=1.0, noise_multiplier=1.0, delta=1e-3)
    trainer = replace(TRAINER, lr=1.0)
    assert check_privacy(central, trainer=trainer, sites=blob_sites((2,) * 5),
                         strategy=FedAvg(weights="uniform", sample=0.2), raise_=False)


def test_one_ledger_holds_what_a_site_spends_on_any_network(tmp_path):
    wider = SiteTrainer(model=torch.nn.Conv3d(4, 3, 1), lr=0.05, steps=1, crop=(8, 8, 8), precision="fp32")
    for trainer in (TRAINER, wider):
        federate(trainer, blob_sites((2, 2)), privacy=LOCAL, engine=Local(ledgers=tmp_path), rounds=2, progress=False)
    spent = LedgerFile(tmp_path, "site-0").read().spent()[0]
    assert spent.epsilon == epsilon_of([Gaussian(noise_multiplier=4.0)] * 4, delta=1e-3)


def test_two_ledgers_of_other_terms_are_not_joined():
    one, other = (Ledger.open(SiteState(), site="a", round=k, stream=str(k)) for k in range(2))
    one.charge(Gaussian(noise_multiplier=1.0), terms=Terms(unit="site", delta=1e-3, adjacency=ANY_TWO))
    other.charge(Gaussian(noise_multiplier=1.0), terms=Terms(unit="site", delta=1e-5, adjacency=ANY_TWO))
    with pytest.raises(PrivacyError, match="cannot be added up"):
        one.merge(other)


@pytest.mark.parametrize("epsilon, shown", [(1.2301, "1.24"), (0.99904, "1"), (8.004, "8.01"), (123456.0, "1.24e+05"),
                                            (0.5, "0.5"), (0.1, "0.1"), (1e-7, "1e-07"),
                                            (float("inf"), "inf"), (0.0, "0")])
def test_an_epsilon_is_shown_rounded_up(epsilon, shown):
    assert f"ε = {shown} at" in str(Spent(epsilon, 1e-5, "site", "rdp", ANY_TWO))
    assert float(shown) >= epsilon


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, float("nan")])
def test_a_delta_that_is_no_probability_is_refused(delta):
    release = Gaussian(noise_multiplier=1.0)
    for refused in (lambda: epsilon_of([release], delta=delta), lambda: noise_multiplier_for(
            target_epsilon=1.0, delta=delta, sample_rate=0.1, steps=2), lambda: replace(LOCAL_TERMS, delta=delta)):
        with pytest.raises(ValueError, match="delta"):
            refused()


LOCAL_TERMS = Terms(unit="site", delta=1e-3, adjacency=ANY_TWO)


@pytest.mark.parametrize("releases", [
    [Gaussian(noise_multiplier=0.05, sample_rate=0.01, steps=1000)],
    [Gaussian(noise_multiplier=0.4, sample_rate=0.5, steps=200_000)],
    [Gaussian(noise_multiplier=0.5 + k / 50, sample_rate=0.1, steps=10) for k in range(60)]])
def test_numerical_composition_is_bounded_and_never_above_the_renyi_bound(releases):
    started = time.process_time()
    found = epsilon_of(releases, delta=1e-5, accountant="prv")
    assert time.process_time() - started < 30  # without a bound it takes minutes and gigabytes
    assert found <= epsilon_of(releases, delta=1e-5, accountant="rdp")


# Noise that repeats with the seed


@pytest.mark.chance
def test_a_noise_stream_has_more_seeds_than_can_be_tried():
    """Torch's own seeds are 32 bits on the CPU: whoever sees noise tries them all."""
    same, other = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert torch.equal(torch.randn(4, generator=same), torch.randn(4, generator=other))  # the reason
    stream = noise_stream(seeded(0), "x")
    streams = [stream, *(stream ^ 1 << bit for bit in range(0, 256, 5)), 5, 5 + 2**32]
    drawn = [torch.randn(1000, generator=noise_generator(stream, "noise")) for stream in streams]
    assert all(0 < stream < 2**256 for stream in streams) and len(streams) == 55
    table = torch.stack(drawn)
    assert torch.equal(drawn[0], torch.randn(1000, generator=noise_generator(streams[0], "noise")))
    apart = torch.corrcoef(table) - torch.eye(len(streams))
    assert float(apart.abs().max()) < 7.1 / 1000**0.5  # of 1485 pairs: probability 2e-9
    assert stats.kstest(table.flatten().numpy(), "norm").pvalue > FALSE_ALARM


def test_streams_whose_names_run_together_are_apart():
    """Site "a1" in round 2 and site "a" in round 12, or one seed and another."""
    names = [(1, "a1", 2), (1, "a", 12), (1, "a12"), (11, "a", 2), (1, "1a", 2)]
    assert len({noise_stream(*name) for name in names}) == len(names)
    assert len({float(torch.randn(1, generator=noise_generator(*name))) for name in names}) == len(names)


class DoesNotRepeat(SiteTrainer):
    """Training whose arithmetic differs from run to run, as on some hardware."""

    def fit(self, *arguments: Any, **more: Any) -> Update:
        update = super().fit(*arguments, **more)
        shift = 1e-3 * torch.rand(())
        return update.map(lambda t: t + shift)


def test_noise_depends_on_the_update_that_it_hides():
    """The same noise on two updates would cancel out in the difference of what was sent."""
    settings = {f.name: getattr(TRAINER, f.name) for f in fields(TRAINER) if f.init}
    seen = []
    for number in (1, 1, 2):
        trainer = DoesNotRepeat(**{**settings, "model": built(TinyNet, seed=3)})
        with torch.random.fork_rng():
            torch.manual_seed(number)
            finished = next(each_round(trainer, blob_sites((2,)), privacy=LOCAL, seed=5))
        seen.append(torch.cat([p.double().flatten() for p in finished.state.params.values()]))
    assert torch.equal(seen[0], seen[1])
    assert float((seen[2] - seen[0]).std()) > 8.0  # two independent noises of standard deviation 8


def test_a_guarantee_says_that_its_noise_repeats():
    remark = "noise repeats with the seed: for research"
    for technique in (LOCAL, AtSites(sites=("site-1",), technique=LOCAL), DPSGD(
            clip=1.0, noise_multiplier=1.0, delta=0.01, sample_rate=0.5)):
        assert remark in run(technique, rounds=1).guarantee()
    secure = replace_settings(LOCAL, secure_mode=True)
    assert remark not in run(secure, rounds=1).guarantee() and remark in run(secure + LOCAL, rounds=1).guarantee()
    assert run(Privacy(), rounds=1).guarantee() == "no formal guarantee"


def test_several_scans_of_a_person_are_refused_under_a_guarantee_per_patient():
    """A person with two scans is clipped and drawn twice, and loses twice the privacy that is stated."""
    first, second = blob_sites((2, 2))
    ids = ("BraTS-GLI-00001-100", "BraTS-GLI-00001-101")
    second = replace(second, train=[replace(p, id=name) for p, name in zip(second.train, ids, strict=True)])
    private, made = DPSGD(clip=1.0, noise_multiplier=1.0, sample_rate=0.5), {"rounds": 1, "progress": False}
    with pytest.raises(ValueError, match=rf"{second.name}' has several scans of 1 of its.*{ids[0]} and {ids[1]}"):
        federate(TRAINER, [first, second], privacy=private, **made)
    for technique in (AtSites(sites=(first.name,), technique=private), LocalGaussian(clip=1.0, noise_multiplier=1.0)):
        federate(TRAINER, [first, second], privacy=technique, **made)


def replace_settings(technique: LocalGaussian, **changes: Any) -> LocalGaussian:
    settings = {name: getattr(technique, name) for name in ("clip", "noise_multiplier", "delta")}
    return LocalGaussian(**settings, **changes)
