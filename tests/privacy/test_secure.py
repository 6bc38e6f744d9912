"""Secure aggregation: the sum is exact whoever drops out, a single update is random bits, and sites refuse in time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import irregular
from chance import FALSE_ALARM, SIGMAS, seeded
from cohorts import blob_sites
from fedlab.checks.privacy import check_privacy
from fedlab.core.errors import PrivacyError
from fedlab.core.types import SiteState, Update, Withdrawal
from fedlab.core.weights import weights_sha256
from fedlab.privacy.accounting.ledger import Concentrated, Gaussian, Ledger, epsilon_of
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import TopK
from fedlab.privacy.dp.clipping import AdaptiveClip
from fedlab.privacy.dp.site_level import CentralGaussian
from fedlab.privacy.secure_aggregation import protocol
from fedlab.privacy.secure_aggregation.secure_sum import SecureAggregation
from fedlab.run.admission import Admission
from fedlab.run.federate import each_round, federate, make_run
from fedlab.run.local import Local
from fedlab.strategies import FedAvg, weighted_mean
from fedlab.strategies.averaging import TooFewUpdates
from fedlab.topologies.cyclic import ring
from states import kept_as
from trainers import trainer

#: Masks come from the operating system, so a right implementation fails a test of them with this probability.
STAGES = ("keys", "shares", "receive", "train", "agree", "unmask")
UNIFORM = FedAvg(weights="uniform")


def update(site, values):
    values = torch.as_tensor(values)
    return Update(site=site, delta={"b": values[:1], "a": values[1:].reshape(-1, 2)}, weight=7.0,
                  metrics={"loss": 1.0})


class Sim:
    """The calls that a run makes, without training, with the chance to drop sites and to meddle with messages."""

    def __init__(self, technique, values, *, gone=None, meddle=lambda step, sent: sent, seed=0):
        self.technique, self.values, self.gone, self.meddle, self.seed = technique, values, gone or {}, meddle, seed
        self.states = {site: SiteState(owner="aggregation") for site in values}
        self.notes, self.masked, self.shown = {}, [], ""

    @property
    def names(self):
        """As an exchange: the sites whose update was received."""
        return tuple(self.present("train"))

    def send(self, step, inboxes):
        """As an exchange: the sites' answers."""
        if step == "agree":
            inboxes = self.meddle("trained", {site: dict(box) for site, box in inboxes.items()})
        return self.meddle(step, {site: dict(self.answer(step, site, inboxes.get(site, {})))
                                  for site in self.present(step)})

    def answer(self, step, site, inbox):
        return self.technique.answer(step, site, inbox, self.states[site])

    def present(self, stage):
        return [s for s in self.values if STAGES.index(self.gone.get(s, "unmask")) >= STAGES.index(stage)
                and self.gone.get(s) != stage]

    def train(self):
        self.notes = self.technique.before(self)
        for site in self.present("train"):
            rng = torch.Generator().manual_seed(self.seed + len(self.masked))
            self.masked.append(self.technique.mask(update(site, self.values[site]), self.states[site], rng))
        return self

    def finish(self):
        return self.technique.after(weighted_mean(self.masked), self.notes, self)


def flat(result):
    return torch.cat([result.delta["b"].flatten(), result.delta["a"].flatten()])


def halfway(technique, whole):
    """Values half a step beyond whole numbers of steps, which rounding towards zero gives back."""
    whole = torch.as_tensor(whole, dtype=torch.float64)
    return (whole + 0.5 * whole.sign()) * technique.resolution


@st.composite
def rounds(draw):
    sites = draw(st.integers(2, 7))
    technique = SecureAggregation(sites=sites, clip=draw(st.sampled_from([0.3, 1.0, 40.0])),
                                  threshold=draw(st.integers(sites // 2 + 1, sites)), bits=draw(st.integers(24, 40)))
    most = int(0.3 * technique.clip / technique.resolution)
    whole = {name: draw(st.lists(st.integers(-most, most), min_size=5, max_size=5))
             for name in draw(irregular.names(sites))}
    gone = {site: stage for site in whole if (stage := draw(st.sampled_from([*STAGES, *[None] * 12])))}
    return technique, whole, gone


@settings(max_examples=80, deadline=None)
@given(rounds())
def test_the_sum_is_exact_whoever_drops_out_while_enough_remain(case):
    technique, whole, gone = case
    sim = Sim(technique, {site: halfway(technique, numbers) for site, numbers in whole.items()}, gone=gone)
    if len(sim.present("unmask")) < technique.threshold:
        refused = PrivacyError if sim.present("train") else (PrivacyError, TooFewUpdates)  # nothing to unmask
        with pytest.raises(refused, match=f"threshold is {technique.threshold}; nothing is revealed|no update"):
            sim.train().finish()
        assert "recovered" not in sim.notes
        return
    result = sim.train().finish()
    survivors = sim.present("train")
    total = np.array([whole[site] for site in survivors]).sum(axis=0)
    np.testing.assert_array_equal(flat(result).numpy(), total * (technique.resolution / len(survivors)))
    assert list(result.delta) == ["b", "a"] and result.delta["a"].shape == (2, 2)
    assert not sim.notes and all("own" not in sim.states[s].secrets for s in sim.present("unmask"))


@pytest.mark.parametrize("bits", [20, 32, 40])
def test_the_sum_is_read_exactly_from_the_mean_of_up_to_64_sites(bits):
    technique = SecureAggregation(sites=64, clip=1.0, threshold=33, bits=bits) if bits > 20 else SecureAggregation(
        sites=2, clip=1.0, threshold=2, bits=bits)
    rng = np.random.default_rng(bits)
    for count in range(1, 65):
        words = rng.integers(0, 2**bits, (count, 400), dtype=np.uint64)
        words[:, :2] = 2**bits - 1, 0
        words[:, 2:4] = 2**bits - 1 - rng.integers(0, 3, (count, 2), dtype=np.uint64)
        mean = weighted_mean(Update(site=str(k), delta={"w": torch.from_numpy(row.astype(np.float64))}, weight=1.0)
                             for k, row in enumerate(words))
        found = technique._sum(mean.delta["w"].numpy().copy(), count)
        np.testing.assert_array_equal(found, words.sum(axis=0).astype(found.dtype))


def test_sums_of_a_thousand_sites_at_the_limit_are_exact():
    SecureAggregation(sites=2048, clip=1.0, threshold=1025, bits=40)
    with pytest.raises(ValueError, match="at most 39 bits"):
        SecureAggregation(sites=2049, clip=1.0, threshold=1025, bits=40)
    technique = SecureAggregation(sites=2048, clip=1.0, threshold=1025, bits=40)
    for count in (1025, 1999, 2047, 2048):
        sums = count * (2**40 - 1) - np.arange(5000, dtype=np.int64)
        assert (technique._sum(sums.astype(np.float64) / count, count) == sums.astype(np.uint64)).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=40), st.floats(1e-6, 1e6))
def test_whole_numbers_are_never_longer_than_the_clipping_norm(values, clip):
    technique = SecureAggregation(sites=3, clip=clip, threshold=2)
    whole, norm = technique._whole_numbers(np.array(values, dtype=np.float64))
    assert sum(int(v) ** 2 for v in whole) <= int(technique._fixed_point[0]) ** 2
    exact = math.sqrt(math.fsum(v * v for v in values))
    if exact < 0.999 * clip:
        np.testing.assert_allclose(whole * technique.resolution, values, rtol=1e-9, atol=technique.resolution)
    assert norm == pytest.approx(exact)


def p_of_uniform_bytes(words, bits):
    """The smallest p over the bytes of the words, that all values of a byte are equally likely, times their number."""
    columns = words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :bits // 8]
    return min(stats.chisquare(np.bincount(column, minlength=256)).pvalue for column in columns.T) * len(columns.T)


@pytest.mark.chance
@pytest.mark.parametrize("bits", [32, 40])
def test_the_server_sees_a_single_update_as_uniform_bits(bits):
    count = 2**16 + 1
    technique = SecureAggregation(sites=3, clip=1.0, threshold=2, bits=bits)
    plain = torch.randn(count, generator=torch.Generator().manual_seed(seeded(0)), dtype=torch.float64) / count**0.5
    for values in (torch.zeros(count, dtype=torch.float64), plain, torch.eye(1, count, dtype=torch.float64)[0]):
        sim = Sim(technique, {"x": values, "y": values, "z": values}).train()
        seen = [flat(masked).numpy() for masked in sim.masked]
        assert all(0 <= s.min() and s.max() < 2**bits and (s == s.round()).all() for s in seen)
        views = [*seen, seen[0] + seen[1], seen[0] + seen[2], seen[1] - seen[0]]  # less than all three
        for view in views:
            words = np.mod(view, 2.0**bits)
            assert p_of_uniform_bytes(words.astype(np.uint64), bits) > FALSE_ALARM
            assert stats.kstest(words / 2.0**bits, "uniform").pvalue > FALSE_ALARM
            assert abs(np.corrcoef(words, plain)[0, 1]) < SIGMAS / count**0.5
    whole = technique._whole_numbers(plain.numpy().copy())[0].astype(np.int64)
    assert p_of_uniform_bytes(whole % 2**bits, bits) < 1e-12  # the test sees a bare update for what it is


def test_two_masked_updates_of_one_input_differ_and_say_no_more_than_they_must():
    technique = SecureAggregation(sites=3, clip=1.0, threshold=2)
    values = dict.fromkeys("xyz", torch.linspace(-0.1, 0.1, 4001))
    one, other = (Sim(technique, values).train() for _ in range(2))
    for a, b in zip(one.masked, other.masked, strict=True):
        assert (flat(a) == flat(b)).float().mean() < 0.01
        assert a.metrics == {} and a.weight == 1.0 and a.nbytes == 4 * 4001
    torch.testing.assert_close(flat(one.finish()), flat(other.finish()), rtol=0, atol=0)


def test_a_masked_update_is_made_once_a_round():
    sim = Sim(SecureAggregation(sites=3, clip=1.0, threshold=2), dict.fromkeys("xyz", torch.zeros(5))).train()
    with pytest.raises(PrivacyError, match="once per round"):
        sim.technique.mask(update("x", torch.ones(5)), sim.states["x"], torch.Generator())
    with pytest.raises(PrivacyError, match="'no keys'"):
        sim.technique.mask(update("x", torch.ones(5)), SiteState(), torch.Generator())


def test_survivors_that_were_given_different_lists_reveal_nothing():
    def two_lists(step, sent):
        if step == "trained":
            sent["v"] = {"server": b'["v", "w", "x"]'}  # the others are told of all five
        if step == "agree":
            apart = {"v", "y"}, {"v", "z"}
            sent = {a: {b: m for b, m in box.items() if {a, b} not in apart} for a, box in sent.items()}
        return sent

    sim = Sim(SecureAggregation(sites=5, clip=1.0, threshold=3), dict.fromkeys("vwxyz", torch.ones(5)),
              meddle=two_lists).train()
    with pytest.raises(PrivacyError, match="different lists of survivors"):
        sim.finish()


def test_survivors_that_were_shown_different_models_reveal_nothing():
    sim = Sim(SecureAggregation(sites=5, clip=1.0, threshold=3), dict.fromkeys("vwxyz", torch.ones(5)))
    for site, state in sim.states.items():
        state.shown = "one model" if site in "vw" else "another"
    sim.train()
    with pytest.raises(PrivacyError, match=r"shown different models; \w reveals nothing"):
        sim.finish()


def test_no_two_lists_are_confirmed_when_the_server_keeps_the_groups_apart():
    """Half of the sites are told one list, half another, and the server drops what they tell each other."""
    lists = {site: b'["u", "v", "w", "x"]' if site in "uvw" else b'["u", "x", "y", "z"]' for site in "uvwxyz"}

    def split(step, sent):
        if step == "trained":
            return {site: {"server": lists[site]} for site in sent}
        if step == "agree":
            return {a: {b: m for b, m in box.items() if lists[a] == lists[b]} for a, box in sent.items()}
        return sent

    sim = Sim(SecureAggregation(sites=6, clip=1.0, threshold=4), dict.fromkeys("uvwxyz", torch.ones(5)), meddle=split)
    with pytest.raises(PrivacyError, match="3 survivors agree on who survived, the threshold is 4"):
        sim.train().finish()


@pytest.mark.parametrize("survivors", [b'["w", "x", "y"]', b'["v", "w", "q"]', b'["v", "v", "w"]', b'"v"', b"{", b"7"])
def test_a_site_refuses_a_list_that_cannot_be(survivors):
    sim = Sim(SecureAggregation(sites=5, clip=1.0, threshold=3), dict.fromkeys("vwxyz", torch.ones(5))).train()
    with pytest.raises(PrivacyError, match="list of survivors"):
        sim.answer("agree", "v", {"server": survivors})


def test_a_site_answers_one_list_once():
    sim = Sim(SecureAggregation(sites=3, clip=1.0, threshold=2), dict.fromkeys("xyz", torch.ones(5))).train()
    sim.answer("agree", "x", {"server": b'["x", "y", "z"]'})
    with pytest.raises(PrivacyError, match="once per round"):  # for the share of z's key after that of its own mask
        sim.answer("agree", "x", {"server": b'["x", "y"]'})
    word = sim.answer("agree", "y", {"server": b'["x", "y", "z"]'})
    sim.answer("unmask", "x", {"y": word["x"]})
    with pytest.raises(PrivacyError, match="once per round"):
        sim.answer("unmask", "x", {"y": word["x"]})


def test_a_site_that_sent_no_update_helps_to_unmask_none():
    sim = Sim(SecureAggregation(sites=3, clip=1.0, threshold=2), dict.fromkeys("xyz", torch.ones(5)),
              gone={"z": "train"}).train()
    with pytest.raises(PrivacyError, match="stage 'ready'"):
        sim.answer("agree", "z", {"server": b'["x", "z"]'})
    with pytest.raises(PrivacyError, match="no step 'trained'"):
        sim.answer("trained", "z", {})


def meddling(step, change):
    def meddle(now, sent):
        if now == step:
            change(sent)
        return sent
    return meddle


def flip(message, at):
    return message[:at] + bytes([message[at] ^ 1]) + message[at + 1:]


def swap(box, a, b):
    box[a], box[b] = box[b], box[a]


@pytest.mark.parametrize("step, change, message", [
    ("shares", lambda sent: sent["x"].update(y=flip(sent["x"]["y"], 20)), "changed on its way"),
    ("shares", lambda sent: swap(sent["x"], "y", "z"), "changed on its way"),
    ("shares", lambda sent: sent["x"].update(y=b""), "changed on its way"),
    ("agree", lambda sent: sent["x"].update(y=flip(sent["x"]["y"], 3)), "changed on its way"),
    ("agree", lambda sent: swap(sent["x"], "y", "z"), "changed on its way"),
    ("keys", lambda sent: sent.update(x=sent["y"]), "does not find its own keys"),
    ("unmask", lambda sent: sent["x"].update(server=sent["x"]["server"].replace(b'"y"', b'"q"')), "other sites"),
    ("unmask", lambda sent: sent["x"].update(server=b"[]"), "something other than its shares"),
    ("unmask", lambda sent: sent["x"].update(
        server=sent["x"]["server"][:-20] + b"0" * 18 + sent["x"]["server"][-2:]), "something other than its shares"),
])
def test_tampering_is_noticed(step, change, message):
    sim = Sim(SecureAggregation(sites=4, clip=1.0, threshold=3), dict.fromkeys("wxyz", torch.ones(5)),
              meddle=meddling(step, change))
    with pytest.raises(PrivacyError, match=message):
        sim.train().finish()


def test_a_share_changed_at_its_site_is_noticed():
    """Of a survivor's own mask and of the key of a site that dropped out."""
    for gone, digit in (({}, 300), ({"w": "train"}, -10)):
        def change(sent, digit=digit):
            whole = bytearray(sent["x"]["server"])
            whole[digit] = ord("1") if whole[digit] != ord("1") else ord("2")
            sent["x"]["server"] = bytes(whole)

        sim = Sim(SecureAggregation(sites=4, clip=1.0, threshold=3), dict.fromkeys("wxyz", torch.ones(5)), gone=gone,
                  meddle=meddling("unmask", change))
        with pytest.raises(PrivacyError, match=r"do not give what it published|do not belong together"):
            sim.train().finish()


def test_keys_that_differ_from_site_to_site_are_noticed():
    """A peer whose keys the server swapped for its own towards one site only cannot be read."""
    technique = SecureAggregation(sites=3, clip=1.0, threshold=3)
    sim = Sim(technique, dict.fromkeys("xyz", torch.ones(5)))
    keys = {site: sim.answer("keys", site, {})["server"] for site in "xyz"}
    forger = technique.answer("keys", "z", {}, SiteState())["server"]
    sealed = {site: sim.answer("shares", site, keys | ({"z": forger} if site == "x" else {})) for site in "xyz"}
    with pytest.raises(PrivacyError, match="changed on its way"):
        sim.answer("receive", "x", {p: sealed[p]["x"] for p in "yz"})


def test_mask_keys_that_differ_from_site_to_site_are_noticed():
    """With its own mask key in the place of each peer's, towards one site, the server would know that site's masks."""
    technique = SecureAggregation(sites=3, clip=1.0, threshold=3)
    sim = Sim(technique, dict.fromkeys("xyz", torch.ones(5)))
    keys = {site: sim.answer("keys", site, {})["server"] for site in "xyz"}
    forger = technique.answer("keys", "z", {}, SiteState())["server"]
    forged = {peer: keys[peer][:32] + forger[32:64] + keys[peer][64:] for peer in "yz"}  # between two other keys
    sealed = {site: sim.answer("shares", site, keys | (forged if site == "x" else {})) for site in "xyz"}
    for site, peers in (("x", "yz"), ("y", "xz")):
        with pytest.raises(PrivacyError, match="changed on its way"):
            sim.answer("receive", site, {p: sealed[p][site] for p in peers})


def test_sites_with_other_members_reveal_nothing():
    """One site was handed no share of a peer that dropped out, so that it takes the others alone for members."""
    sim = Sim(SecureAggregation(sites=4, clip=1.0, threshold=3), dict.fromkeys("wxyz", torch.ones(5)))
    keys = {site: sim.answer("keys", site, {})["server"] for site in "wxyz"}
    sealed = {site: sim.answer("shares", site, keys) for site in "wxyz"}
    for site in "xyz":
        withheld = {site, "w"} if site == "x" else {site}
        sim.answer("receive", site, {p: sealed[p][site] for p in "wxyz" if p not in withheld})
        sim.technique.mask(update(site, torch.ones(5)), sim.states[site], torch.Generator())
    words = {site: sim.answer("agree", site, {"server": b'["x", "y", "z"]'}) for site in "xyz"}
    for site in "xyz":
        with pytest.raises(PrivacyError, match="different lists of survivors"):
            sim.answer("unmask", site, {p: words[p][site] for p in "xyz" if p != site})


def test_a_site_helps_with_one_update_of_its_own_a_round():
    """Of two sums of the same sites and round the difference would be the change of the one that trained again."""
    values = dict.fromkeys("xyz", torch.full((5,), 0.1))
    first = Sim(SecureAggregation(sites=3, clip=1.0, threshold=2), values)
    wanted = flat(first.train().finish())
    again, other = (Sim(first.technique, mine) for mine in (values, values | {"x": torch.zeros(5)}))
    again.states = other.states = first.states
    torch.testing.assert_close(flat(again.train().finish()), wanted, rtol=0, atol=0)
    with pytest.raises(PrivacyError, match="x has helped to unmask another sum of round"):
        other.train().finish()


def test_what_is_no_mean_of_masked_updates_is_refused():
    for spoil in (lambda u: u.map(lambda t: t * 0.999), lambda u: u.map(lambda t: t + 0.25)):
        sim = Sim(SecureAggregation(sites=3, clip=1.0, threshold=2), dict.fromkeys("xyz", torch.ones(5))).train()
        sim.masked[1] = spoil(sim.masked[1])
        with pytest.raises(PrivacyError, match="not the mean of masked updates"):
            sim.finish()


NOISY = {"sites": 4, "clip": 0.5, "threshold": 3, "noise_multiplier": 1.5, "delta": 1e-2}


@pytest.mark.chance
def test_noise_has_the_variance_and_fourth_moment_it_is_accounted_with():
    """Without drop-outs the sum has 4/3 of the variance promised; at the threshold, exactly the promised one."""
    count = 100_001
    for gone, shares in (({}, 4), ({"s3": "train"}, 3)):
        sim = Sim(SecureAggregation(**NOISY), {f"s{k}": torch.zeros(count) for k in range(4)}, gone=gone,
                  seed=seeded(5))
        total = flat(sim.train().finish()).numpy() * len(sim.masked)
        unit = total / (1.5 * 0.5 * math.sqrt(shares / 3))
        # Standard errors of the moments of a normal variable.
        assert abs(unit.mean()) < SIGMAS / count**0.5
        assert abs((unit**2).mean() - 1) < SIGMAS * (2 / count) ** 0.5
        assert abs((unit**4).mean() - 3) < SIGMAS * (96 / count) ** 0.5


def test_colluding_sites_count_as_adding_no_noise():
    alone, watched = (SecureAggregation(**NOISY | {"threshold": 4, "colluding": c}) for c in (0, 2))
    per_site = [2.0**t._fixed_point[1] * t.resolution for t in (alone, watched)]
    assert per_site == pytest.approx([1.5 * 0.5 / 2, 1.5 * 0.5 / math.sqrt(2)])


def test_the_ledger_equals_the_closed_form():
    history = federate(trainer(), blob_sites((1, 1, 1, 1)), strategy=UNIFORM, aggregation=SecureAggregation(**NOISY),
                       rounds=3, progress=False)
    table = history.spent()
    for n in (1, 2, 3):
        known = epsilon_of([Gaussian(noise_multiplier=1.5, steps=n)], delta=1e-2)  # the same Rényi divergence
        assert list(table["epsilon"].xs(n - 1, level="round")) == pytest.approx([known] * 4, rel=1e-6)
        assert (table["epsilon"].xs(n - 1, level="round") >= known).all()
    assert set(table.index.get_level_values("unit")) == {"site"} and "replaced by zeros" in history.guarantee()
    assert "loss" not in history.table()


def test_sites_with_a_budget_withdraw_in_time():
    limit = epsilon_of([Concentrated(rho=(1 + 1e-9) / (2 * 1.5**2), times=2)], delta=1e-2)
    history = federate(trainer(), blob_sites((1, 1, 1, 1)), strategy=UNIFORM, rounds=5, progress=False,
                       aggregation=SecureAggregation(**NOISY, max_epsilon=limit))
    assert len(history.records) == 2 and "no site is left" in history.stopped
    with pytest.raises(ValueError, match="the first round alone costs"):
        next(each_round(trainer(), blob_sites((1, 1, 1, 1)), strategy=UNIFORM,
                        aggregation=SecureAggregation(**NOISY, max_epsilon=0.1)))


def test_noise_repeats_with_the_seed_and_does_not_in_secure_mode():
    results = {}
    for secure_mode in (False, True):
        one = [federate(trainer(), blob_sites((1, 1, 1, 1)), strategy=UNIFORM, rounds=1, progress=False, seed=3,
                        aggregation=SecureAggregation(**NOISY, secure_mode=secure_mode)) for _ in range(2)]
        results[secure_mode] = len({weights_sha256(history.state.params) for history in one})
    assert results == {False: 1, True: 2}


def test_a_round_run_again_is_charged_again():
    for secure_mode, times in ((False, 2), (True, 2)):  # the sums may be of other sites, whatever the noise
        left = {}
        for _ in range(2):
            crashed = kept_as({site: SiteState(enrolled=True, ledger=state.ledger) for site, state in left.items()})
            left = next(each_round(trainer(), blob_sites((1, 1, 1, 1)), strategy=UNIFORM, site_states=crashed,
                                   aggregation=SecureAggregation(**NOISY, secure_mode=secure_mode))).site_states
        assert len(Ledger(left["site-2"]).releases()) == times


def test_a_run_equals_plain_averaging_to_the_fixed_point():
    sites = blob_sites((3, 2, 1))
    hidden = SecureAggregation(sites=3, clip=5.0, threshold=2)
    plain = federate(trainer(), sites, strategy=UNIFORM, rounds=2, progress=False)
    secure = federate(trainer(), sites, strategy=UNIFORM, aggregation=hidden, rounds=2, progress=False)
    for name, p in plain.state.params.items():
        torch.testing.assert_close(secure.state.params[name], p, rtol=0, atol=100 * hidden.resolution)
    assert secure.guarantee() == "no formal guarantee" and set(secure.sites()["weight"]) == {1.0}
    first = next(each_round(trainer(), sites, strategy=UNIFORM, aggregation=hidden))
    wanted = next(each_round(trainer(), sites, strategy=UNIFORM))
    for name, p in wanted.state.params.items():  # before training amplifies it: one step of each site, float32
        torch.testing.assert_close(first.state.params[name], p, rtol=2e-7, atol=2 * hidden.resolution)


def test_central_noise_is_added_to_the_unmasked_mean_of_clipped_updates():
    sites = blob_sites((2, 1, 1))
    central = CentralGaussian(clip=0.05, noise_multiplier=1e-4, delta=1e-2)  # of so little that it hardly shows
    hidden = SecureAggregation(clip=0.05, threshold=2)
    plain, secure, again = (federate(trainer(), sites, strategy=UNIFORM, privacy=central, aggregation=how, rounds=1,
                                     progress=False) for how in (None, hidden, hidden))
    for name, p in plain.state.params.items():
        torch.testing.assert_close(secure.state.params[name], p, rtol=0, atol=8 * 1e-4 * 0.05 * 2**0.5 / 3)
        assert (p - trainer().initial()[name]).abs().max() > 1e-3
    assert secure.guarantee() == plain.guarantee() and "at server" in secure.guarantee()
    assert weights_sha256(secure.state.params) == weights_sha256(again.state.params)


def test_it_passes_the_checks_of_every_technique():
    check_privacy(SecureAggregation(clip=1.0, threshold=2))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e200])
def test_a_damaged_update_is_not_hidden_by_its_mask(wrong):
    with pytest.raises(PrivacyError, match="NaN, infinite or far too large"):
        Sim(SecureAggregation(sites=3, clip=1.0, threshold=2),
            dict.fromkeys("xyz", torch.tensor([0.0, wrong, 0.0], dtype=torch.float64))).train()


@pytest.mark.parametrize("changes, message", [
    (dict(privacy=CentralGaussian(clip=AdaptiveClip(start=1.0, bit_noise=9.0), noise_multiplier=1.0)), "fixed clip"),
    (dict(privacy=TopK() + CentralGaussian(clip=1.0, noise_multiplier=1.0),
          aggregation=SecureAggregation(threshold=2, clip=1.0, noise_multiplier=1.0, delta=1e-3)),
     "noise_multiplier to one of them"),
    (dict(topology=ring), "hides updates from one server"),
    (dict(admission=Admission(max_norm=1.0)), "max_norm cannot be checked"),
])
def test_a_run_with_parts_that_cannot_stand_beside_it_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        each_round(trainer(), blob_sites((1, 1, 1)),
                   **{"strategy": UNIFORM, "aggregation": SecureAggregation(threshold=2), **changes})
    each_round(trainer(), blob_sites((1, 1, 1)), strategy=UNIFORM, privacy=Privacy() + TopK(),
               aggregation=SecureAggregation(threshold=2), admission=Admission())


@pytest.mark.parametrize("strategy, sizes, message", [
    (FedAvg(), (1, 1, 1), r"FedAvg\(weights='uniform'\)"), (UNIFORM, (1, 1), "set up for 3 sites, the run has 2"),
    (FedAvg(weights="uniform", sample=0.9), (1, 1, 1), "fewer than the threshold"),
])
def test_a_run_it_cannot_work_in_is_refused_before_the_first_round(strategy, sizes, message):
    with pytest.raises(ValueError, match=message):
        each_round(trainer(), blob_sites(sizes), strategy=strategy,
                   aggregation=SecureAggregation(sites=3, clip=1.0, threshold=2))


def test_the_number_of_sites_is_read_from_the_run():
    run = make_run(trainer(), blob_sites((1,) * 5), strategy=UNIFORM, aggregation=SecureAggregation(threshold=3))
    assert run.aggregation.sites == 5 and run.task.aggregation is run.aggregation
    with pytest.raises(ValueError, match="threshold lies between 3 and 5 for 5 sites"):
        make_run(trainer(), blob_sites((1,) * 5), strategy=UNIFORM, aggregation=SecureAggregation(threshold=2))
    unbound = SecureAggregation(threshold=2)
    unbound.answer("keys", "x", {}, state := SiteState())
    with pytest.raises(ValueError, match="not bound to a run"):
        unbound.answer("shares", "x", {}, state)


def test_without_a_clip_updates_of_usual_length_are_not_shortened():
    """The clip of 100 takes the place of a setting; longer updates are shortened to it, which the site sees."""
    wide = SecureAggregation(sites=2, threshold=2)
    sim = Sim(wide, {"x": torch.tensor([99.0, 0, 0, 0, 0]), "y": torch.tensor([0, 300.0, 0, 0, 0])})
    result = flat(sim.train().finish())
    torch.testing.assert_close(result, torch.tensor([49.5, 50, 0, 0, 0], dtype=torch.float64), rtol=1e-6, atol=0)
    assert float(sim.states["y"].diagnostics["norm before masking"]) == pytest.approx(300)


class Flaky(Local):
    """Sites that drop out at a stage of every round."""

    def __init__(self, gone):
        super().__init__()
        self.gone = gone

    def train(self, task, state, cohort, states):
        for site in cohort:
            if self.gone.get(site.name) == "train":
                yield Withdrawal(site.name, "cable pulled")
            else:
                yield from super().train(task, state, [site], states)

    def exchange(self, task, step, inboxes, sites, states):
        return super().exchange(task, step, inboxes, [s for s in sites if self.gone.get(s.name) != step], states)


def test_a_run_goes_on_without_the_sites_that_drop_out():
    sites = blob_sites((1, 1, 1, 1))
    hidden = SecureAggregation(sites=4, clip=5.0, threshold=3)
    settings = {"strategy": UNIFORM, "aggregation": hidden}
    finished = next(each_round(trainer(), sites, **settings, engine=Flaky({"site-1": "train"})))
    wanted = next(each_round(trainer(), [sites[0], *sites[2:]], strategy=UNIFORM))
    assert list(finished.sites) == ["site-0", "site-2", "site-3"]
    assert finished.absent == {"site-1": "cable pulled"}
    for name, p in wanted.state.params.items():
        torch.testing.assert_close(finished.state.params[name], p, rtol=2e-7, atol=2 * hidden.resolution)
    with pytest.raises(PrivacyError, match="2 survivors agree on who survived, the threshold is 3"):
        next(each_round(trainer(), sites, **settings, engine=Flaky({"site-1": "train", "site-2": "agree"})))


def test_nothing_secret_is_written_to_disk_and_an_interrupted_run_ends_the_same(tmp_path, monkeypatch):
    sites, secrets = blob_sites((1, 1, 1)), []

    def noted(make):
        def made(*arguments):
            secrets.append(make(*arguments))
            return secrets[-1]
        return made

    monkeypatch.setattr(protocol.crypto, "new_key", noted(protocol.crypto.new_key))
    monkeypatch.setattr(protocol.secrets, "token_bytes", noted(protocol.secrets.token_bytes))
    settings = {"strategy": UNIFORM, "aggregation": SecureAggregation(clip=5.0, threshold=2), "rounds": 3,
                "progress": False}
    whole = federate(trainer(), sites, **settings)
    assert len(secrets) == 3 * 3 * 3  # rounds, sites, secrets of each

    def look_and_crash(finished):
        written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
        assert len(written) > 10_000  # sites' states, saved while the round's keys were there, and the checkpoint
        assert not [key for key in secrets if key in written or key.hex().encode() in written]
        assert not any(state.secrets for state in finished.site_states.values())
        if finished.number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(trainer(), sites, **settings, checkpoint=tmp_path / "run", on_round=look_and_crash)
    assert weights_sha256(federate(trainer(), sites, **settings, checkpoint=tmp_path / "run").state.params
                          ) == weights_sha256(whole.state.params)


@pytest.mark.parametrize("change, message", [
    ({"sites": 1}, "sites is a whole number of at least 2"), ({"sites": 3.0}, "of at least 2, got 3.0"),
    ({"threshold": 2}, "between 3 and 4"), ({"threshold": 3.0}, "threshold is a whole number"),
    ({"threshold": 5}, "between 3 and 4"),
    ({"colluding": 2}, "at least 2 more than colluding"), ({"colluding": 3}, "at least 2 more than colluding"),
    ({"sites": 6, "colluding": 2, "threshold": 4}, "between 5 and 6"),
    ({"colluding": 3, "threshold": 5}, "colluding lies between 0 and 2"), ({"colluding": -1}, "is a whole number"),
    ({"bits": 19}, "between 20 and 40"), ({"bits": 41}, "between 20 and 40"), ({"clip": 0.0}, "clip is a positive"),
    ({"clip": math.inf}, "clip is a positive"), ({"delta": 0.01}, "together or neither"),
    ({"noise_multiplier": 1.0}, "together or neither"), ({"max_epsilon": 1.0}, "concern noise"),
    ({"clip": None, "noise_multiplier": 1.0, "delta": 0.01}, "give both"),
    ({"secure_mode": True}, "concern noise"), ({"noise_multiplier": 1.0, "delta": 0.25}, r"1 over the number of sites"),
    ({"noise_multiplier": 0.0, "delta": 0.01}, "noise_multiplier is a positive"),
    ({"noise_multiplier": math.nan, "delta": 0.01}, "noise_multiplier is a positive"),
    ({"sites": 1000, "threshold": 501, "bits": 20}, "take more bits"),
    ({"noise_multiplier": 1e-7, "delta": 0.01}, r"2\^4 within the noise of a site.*at least 4096 and 2\^8"),
    ({"noise_multiplier": 1e8, "delta": 0.01}, "leave 0 steps within the clipping norm.*nearer to clip"),
    ({"sites": 4096, "threshold": 2500, "bits": 40}, "exceed 2\\^51"),
])
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SecureAggregation(**{"sites": 4, "clip": 1.0, "threshold": 3} | change)


def test_the_largest_sum_fits_the_ring():
    """Every site sends its clipping norm in one number: the sum stays below half the modulus, whatever the settings."""
    for sites in (2, 3, 13, 64, 1000):
        for noise in ({}, {"noise_multiplier": 0.7, "delta": 1e-4}, {"noise_multiplier": 30.0, "delta": 1e-4}):
            technique = SecureAggregation(sites=sites, clip=0.3, threshold=sites // 2 + 1, bits=34, **noise)
            reach = technique.clip / technique.resolution
            share = 2.0**technique._fixed_point[1] if noise else 0.0
            assert sites * reach + 12 * share * sites**0.5 < 2**33 * (1 + 1e-12)


def test_it_prints_as_the_code_that_makes_it():
    for technique in (SecureAggregation(sites=4, clip=1.0, threshold=3), SecureAggregation(**NOISY, secure_mode=True)):
        assert eval(repr(technique)) == technique
