"""One round is one readable function, and the same to the bit as a loop that is written out without fedlab.run."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import RandomSampler

from cohorts import TinyNet, blob_sites
from fedlab.core.convolution import FastConvolutions
from fedlab.core.errors import PrivacyBudgetExhausted, PrivacyError, SiteError
from fedlab.core.seeds import derive, generator
from fedlab.core.types import ServerState, SiteState, Update
from fedlab.core.weights import weights_sha256
from fedlab.faults.sites import DropOut, Faulty, Replay
from fedlab.privacy.accounting.ledger import Gaussian, Ledger, Terms
from fedlab.privacy.aggregation import shown_sha256
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import TopK
from fedlab.privacy.noise.streams import noise_generator
from fedlab.privacy.personal_layers import PersonalLayers
from fedlab.run.admission import Admission
from fedlab.run.federate import each_round, federate
from fedlab.run.local import Local
from fedlab.run.round import one_round
from fedlab.run.site_task import SiteTask
from fedlab.strategies.averaging import FedAvg
from fedlab.strategies.client_drift import SCAFFOLD, Ditto
from fedlab.training.defaults import DiceBCE
from trainers import batches, plain_sgd, trainer


def test_one_round_reads_as_one_text():
    source = inspect.getsource(one_round)
    assert len(source.splitlines()) <= 40
    steps = ["run.select(", "aggregation.before(", "engine.train(", "arrivals.admit(", "_combine(",
             "aggregation.after(", "_release(", "strategy.step(", "arrivals.close("]
    places = [source.index(step) for step in steps]
    assert places == sorted(places)


class Scales(Privacy):
    """A factor at each site and another at the server."""

    def protect(self, update, state, rng):
        return update.map(lambda t: t * 0.7)

    def release(self, mean, cohort, state, rng):
        return mean.map(lambda t: t * 1.3)


def naive_training(params, site, moments, *, seed):
    """Three steps of AdamW over the site's whole volumes; the change of the weights."""
    model = TinyNet()
    model.load_state_dict(params)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=1e-5, fused=True)
    if site.name in moments:
        optimiser.load_state_dict(moments[site.name])
    order = list(RandomSampler(site.train, num_samples=6, generator=generator(seed, "order")))
    for image, target in batches(site.train, [order[0:2], order[2:4], order[4:6]]):
        optimiser.zero_grad()
        with FastConvolutions():  # the same products in another order: their last bits differ from torch's own
            loss = DiceBCE()(model(image), target)
        loss.backward()
        optimiser.step()
    moments[site.name] = optimiser.state_dict()
    return {name: p.detach() - params[name] for name, p in model.named_parameters()}


def naive_run(sites, *, rounds, seed, sample):
    """Federated averaging as in DESIGN's pseudo-code, with everything in memory."""
    params, moments = {name: p.detach().clone() for name, p in TinyNet().named_parameters()}, {}
    for number in range(rounds):
        drawn = torch.rand(len(sites), generator=generator(seed, "select", number), dtype=torch.float64) < sample
        cohort = [site for site, taken in zip(sites, drawn.tolist(), strict=True) if taken]
        updates = {}
        for site in cohort:
            delta = naive_training(params, site, moments, seed=derive(seed, "site", site.name, number))
            updates[site.name] = {name: t * 0.7 for name, t in delta.items()}  # protect
        patients = sum(len(site.train) for site in cohort)
        for name, p in params.items() if cohort else ():
            mean = sum(len(site.train) * updates[site.name][name].double() for site in cohort) / patients  # combine
            params[name] = (p.double() + mean * 1.3).float()  # release and step
    return params


def test_a_run_is_the_naive_loop_to_the_bit(one_thread):
    sites, settings = blob_sites((3, 2, 4)), dict(rounds=4, seed=5)
    ours = federate(trainer(), sites, strategy=FedAvg(sample=0.7), privacy=Scales(), progress=False, **settings)
    assert len({len(record["sites"]) for record in ours.records}) > 1  # rounds of different sites
    assert weights_sha256(ours.state.params) == weights_sha256(naive_run(sites, sample=0.7, **settings))


def test_a_round_taken_by_hand_is_that_of_the_run():
    whole = federate(trainer(), blob_sites(), rounds=3, progress=False)
    first = next(each_round(trainer(), blob_sites(), rounds=3))
    last = list(each_round(trainer(), blob_sites(), rounds=3, state=first.state, site_states=first.site_states))[-1]
    assert weights_sha256(last.state.params) == weights_sha256(whole.state.params)
    forgot = list(each_round(trainer(), blob_sites(), rounds=3, state=first.state))[-1]  # the optimiser's moments
    assert weights_sha256(forgot.state.params) != weights_sha256(whole.state.params)


@pytest.mark.parametrize("parts", [
    {}, {"strategy": SCAFFOLD()}, {"strategy": Ditto(lam=0.1)}, {"privacy": PersonalLayers(names=["last.*"])},
    {"privacy": TopK(keep=0.1, error_feedback=True)}], ids=repr)
@pytest.mark.parametrize("engine", [
    Local(), Faulty(engine=Local(), faults=[Replay(sites=("site-1",), rounds=(1, 2), disguised=True),
                                            DropOut(sites=("site-0",), rounds=(1,))])], ids=repr)
def test_a_second_run_on_one_engine_is_the_first_to_the_bit(engine, parts):
    """What sites keep (moments, control variates, personal layers, a fault's old update) belongs to the run."""
    settings = {"optimiser": plain_sgd} if "strategy" in parts else {"momentum": "keep"}
    first, second = (federate(trainer(**settings), blob_sites(), rounds=3, engine=engine, admission=Admission(),
                              progress=False, **parts) for _ in range(2))
    assert weights_sha256(first.state.params) == weights_sha256(second.state.params)
    assert first.site_states.folder != second.site_states.folder
    for site, state in first.site_states.items():
        other = second.site_states[site]
        assert state.namespaces.keys() == other.namespaces.keys() and state.namespaces
        for owner, slots in state.namespaces.items():
            assert weights_sha256(slots) == weights_sha256(other.namespaces[owner])


SCRIPT = textwrap.dedent("""
    from pathlib import Path
    import torch
    from cohorts import TinyNet, blob_sites
    from fedlab.run.federate import federate
    from trainers import trainer

    class Large(TinyNet):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.zeros(1_250_000))

        def forward(self, image):
            seen.append(allocated())
            return super().forward(image) + self.shift.mean()

    def allocated():
        # bytes, without the parts of libraries that happen to be in memory
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

    seen = []
    torch.set_num_threads(1)
    done = federate(trainer(model=Large(), steps=1), blob_sites((1,) * 24), rounds=2, progress=False)
    size = done.site_states.path("site-0").stat().st_size
    print(len(seen), max(seen[:4]), max(seen[4:]), size)
    """)


def test_what_is_not_at_work_lies_on_disk():
    """Of 24 sites that keep moments, the others train in as much memory as the first four."""
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300,
                         env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]),
                                                                           str(Path(__file__).parents[2])])})
    assert out.returncode == 0, out.stderr
    steps, first, others, size = map(int, out.stdout.split())
    assert steps == 48 and size > 9e6  # two moments of 5 MB
    assert others - first < 3 * size  # in memory, 20 more states would be 200 MB


# The task at a site, alone: what each part is given, what leaves, and what the noise depends on

SITE = Terms(unit="site", delta=1e-2, adjacency="any two updates of a site")
STEP = Gaussian(noise_multiplier=2.0)


class Parts(Privacy):
    """A trainer, strategy, technique and aggregation in one, which note what they are given."""

    hides_updates, sends = False, frozenset({"share"})

    def __init__(self, *, units=frozenset(), fails=None, buffers=None):
        self.units, self.heard, self.fails, self.buffers = units, {}, fails, buffers or {}

    def at(self, site):
        self.heard["at"] = site
        return self

    def note(self, stage, **given):
        self.heard[stage] = given
        if stage == self.fails:
            raise ValueError(f"{stage} fails")

    def prepare(self, site, state, *, site_state, seed):
        self.note("prepare", site=site, state=state, site_state=site_state, seed=seed)
        return SimpleNamespace(seed=seed, close=lambda: self.note("close"))

    def equip(self, kit, site, *more):
        self.note("equip" if len(more) == 1 else "strategy", kit=kit, site=site, more=more, seed=kit.seed)
        return SimpleNamespace(**{**vars(kit), "around": kit})

    def fit(self, kit, site, state, *, site_state, seed):
        self.note("fit", kit=kit, site=site, state=state, site_state=site_state, seed=seed)
        return Update(site=site.name, delta={name: p + 1 for name, p in state.params.items()}, weight=2.0, steps=3,
                      metrics={"loss": 0.5, "share": 0.25}, buffers=self.buffers)

    def protect(self, update, state, rng):
        self.note("protect", update=update, state=state, drawn=torch.rand(3, generator=rng).tolist())
        if self.units:
            Ledger(state).charge(STEP, terms=SITE)
        return replace(update.map(lambda t: t * 2), metrics={**update.metrics, "share": 0.75})

    def mask(self, update, state, rng):
        self.note("mask", update=update, state=state, drawn=torch.rand(3, generator=rng).tolist())
        return update.map(lambda t: t + 8)

    def remember(self, *given):
        self.note("remember", given=given)


class Open(Parts):
    """An aggregation, without units of its own."""

    sends = frozenset()


def site_task(parts=None, *, seed=5, aggregation=None, **changes):
    parts = Parts(**changes) if parts is None else parts
    identity = {"trainer": "t", "strategy": "s", "privacy": "p", "aggregation": "a"}
    return SiteTask(trainer=parts, privacy=parts, strategy=parts, aggregation=aggregation or Open(), seed=seed,
                    identity=identity), parts


def shown(round=4, w=(1.0, -2.0), **more):
    return ServerState(round=round, params={"w": torch.tensor(w)}, broadcast={"clip": torch.tensor(0.5)}, **more)


@pytest.mark.parametrize("units", [frozenset(), frozenset({"site"})])
def test_every_part_is_given_its_own_and_what_leaves_is_what_the_last_one_made(units):
    task, parts = site_task(units=units)
    site, state, kept = blob_sites((2,))[0], shown(), SiteState(enrolled=True, updates=0)
    update = task(site, state, kept)
    heard, seed = parts.heard, derive(5, "site", "site-0", 4)
    own = {"prepare": "optimiser", "fit": "optimiser", "protect": "privacy"}
    for stage in ("prepare", "fit"):
        assert heard[stage]["site"] is site and heard[stage]["state"] is state and heard[stage]["seed"] == seed
    for stage, owner in own.items():
        given = heard[stage]["state" if stage == "protect" else "site_state"]
        assert given.owner == owner and given.namespaces is kept.namespaces
    assert [one if one is state else one.owner for one in heard["strategy"]["more"]] == [state, "strategy"]
    assert [one.owner for one in heard["equip"]["more"]] == ["privacy"]
    assert heard["strategy"]["site"] is heard["equip"]["site"] is site
    assert heard["fit"]["kit"].around is heard["equip"]["kit"] and heard["equip"]["kit"].around is heard[
        "strategy"]["kit"]
    assert "close" in heard and (heard["strategy"]["seed"] == heard["equip"]["seed"] == seed) is not bool(units)
    masked = task.aggregation.heard["mask"]
    assert masked["state"].owner == "aggregation" and masked["update"].delta["w"].tolist() == [4.0, -2.0]
    assert masked["drawn"] != heard["protect"]["drawn"]
    assert heard["protect"]["update"].metrics == ({} if units else {"loss": 0.5, "share": 0.25})
    assert update.metrics == ({"share": 0.75} if units else {"loss": 0.5, "share": 0.75})
    assert update.delta["w"].tolist() == [12.0, 6.0] and update.round == 4 and update.weight == 2.0
    trainer_, site_, state_, sent, strategy, seed_ = heard["remember"]["given"]
    assert trainer_ is parts and site_ is site and state_ is state and strategy.owner == "strategy" and seed_ == seed
    assert sent.delta["w"].tolist() == [12.0, 6.0] and sent.round == 4 and bool(sent.spent) is bool(units)
    assert (kept.round, kept.updates, kept.shown) == (4, 1, "") and kept.broadcast == dict(state.broadcast)
    assert kept.broadcast is not state.broadcast
    if units:
        assert update.seconds == 0.0 and [one.unit for one in update.spent] == ["site"]
        assert Ledger(kept).note()["site"] == "site-0" and Ledger(kept).note()["round"] == 4
        trained = weights_sha256({"w": torch.tensor([2.0, -1.0])})  # the noise is of the update that it is added to
        rng = noise_generator(int(Ledger(kept).note()["stream"]), "protect", trained)
        assert Ledger(kept).note()["noise_on"] == {f"4|{Ledger(kept).note()['stream']}": trained}
    else:
        assert 0 < update.seconds < 60 and update.spent == () and kept.ledger == {}
        rng = generator(seed, "protect")
    assert heard["protect"]["drawn"] == torch.rand(3, generator=rng).tolist()
    assert masked["drawn"] == torch.rand(3, generator=rng).tolist()


def test_a_site_that_sums_in_secret_knows_what_it_is_shown():
    hidden = Open()
    hidden.hides_updates = True
    task, _ = site_task(aggregation=hidden)
    kept, state = SiteState(), shown()
    task(blob_sites((1,))[0], state, kept)
    assert kept.shown == shown_sha256(state) != ""


def test_a_site_is_shown_its_own_model_and_asks_what_the_technique_is_there():
    task, parts = site_task()
    state = shown(models={"site-1": {"w": torch.zeros(2)}, "site-0": {"w": torch.tensor([4.0, 5.0])}})
    task(blob_sites((1,))[0], state, SiteState())
    for stage in ("prepare", "fit"):
        given = parts.heard[stage]["state"]
        assert given.params["w"].tolist() == [4.0, 5.0] and given.models == {}
    assert parts.heard["at"] == "site-0"


def test_the_updates_of_a_site_are_counted():
    task, _ = site_task()
    kept = SiteState(updates=7)
    for count in (8, 9):
        task(blob_sites((1,))[0], shown(), kept)
        assert kept.updates == count


@pytest.mark.parametrize(("fails", "stage"), [("prepare", "equip"), ("strategy", "equip"), ("equip", "equip"),
                                              ("fit", "fit"), ("protect", "protect"), ("remember", "remember")])
def test_an_error_names_site_round_and_stage_and_carries_the_work(fails, stage):
    task, parts = site_task(fails=fails)
    site, state, kept = blob_sites((1,))[0], shown(), SiteState()
    with pytest.raises(SiteError, match=f"{fails} fails") as caught:
        task(site, state, kept)
    work = caught.value.work
    assert (caught.value.site, caught.value.round, caught.value.stage) == ("site-0", 4, stage) == (
        work.site.name, work.state.round, work.stage)
    assert work.site is site and work.state is state and work.site_state is kept and work.trainer is parts
    assert work.guarded is False and (work.kit is None) is (fails == "prepare")
    assert ("close" in parts.heard) is (fails in ("fit", "protect", "remember"))
    assert kept.updates == (fails == "remember") and str(caught.value.__cause__) == f"{fails} fails"


def test_what_is_unsafe_is_found_at_the_check_and_told_with_its_stage():
    class Other(Parts):
        def protect(self, update, state, rng):
            return replace(super().protect(update, state, rng), delta={"v": torch.zeros(2)})

    for units in (frozenset(), frozenset({"site"})):
        task, _ = site_task(Other(units=units))
        with pytest.raises(PrivacyError, match=r"^round 4, site-0, check: .*; nothing was sent$") as caught:
            task(blob_sites((1,))[0], shown(), SiteState(enrolled=True))
        assert caught.value.work.stage == "check" and caught.value.work.guarded is bool(units)


def test_under_a_guarantee_a_withdrawal_quotes_no_text_of_a_technique():
    class Withdraws(Parts):
        def protect(self, update, state, rng):
            raise PrivacyBudgetExhausted("P017 has spent all")

    for units in (frozenset(), frozenset({"site"})):
        task, _ = site_task(Withdraws(units=units))
        with pytest.raises(PrivacyBudgetExhausted, match=r"^site-0 takes no part in round 4: ") as caught:
            task(blob_sites((1,))[0], shown(), SiteState(enrolled=True))
        assert ("P017" in str(caught.value)) is not bool(units)


def test_buffers_leave_without_a_guarantee_only():
    buffers = {"mean": torch.tensor([0.5])}
    for where in (frozenset(), frozenset({"site"})):
        task, _ = site_task(units=where, buffers=buffers)
        state, kept = replace(shown(), buffers={"mean": torch.zeros(1)}), SiteState(enrolled=True)
        if where:
            with pytest.raises(PrivacyError, match="no guarantee covers the network's buffers"):
                task(blob_sites((1,))[0], state, kept)
        else:
            assert task(blob_sites((1,))[0], state, kept).buffers["mean"].tolist() == [0.5]


def test_a_run_is_guarded_by_any_of_its_parts():
    class AtServer(Parts):
        def release(self, mean, cohort, state, rng):
            return mean

    def guarded(parts, *, summed=()):
        return site_task(parts, aggregation=Open(units=frozenset(summed)))[0].guarded

    assert guarded(Parts()) is False
    assert guarded(Parts(units=frozenset({"site"}))) is guarded(AtServer()) is guarded(Parts(), summed=["site"]) is True


def test_noise_depends_on_all_that_the_update_depends_on():
    """On the seed, site, round, weights, parts, patients, and what the site keeps or is sent; and on nothing else."""
    def stream(*, seed=5, name="site-0", state=None, recipe="p", sizes=(2,), kept=None, shift=0.0, broadcast=0.5):
        site = replace(blob_sites(sizes)[0], name=name)
        parts = Parts(units=frozenset({"site"}))
        task = SiteTask(trainer=parts, privacy=parts, strategy=parts, aggregation=Open(), seed=seed,
                        identity={"trainer": "t", "strategy": "s", "privacy": recipe, "aggregation": "a", "run": shift})
        state = replace(state or shown(), broadcast={"clip": torch.tensor(broadcast)})
        own = SiteState(enrolled=True, namespaces={"privacy": kept or {}}, diagnostics={"n": torch.tensor(shift)})
        task(site, state, own)
        assert parts.heard["strategy"]["seed"] == parts.heard["equip"]["seed"] == int(Ledger(own).note()["stream"])
        return parts.heard["equip"]["seed"], parts.heard["protect"]["drawn"]

    usual = stream()
    assert usual == stream() == stream(shift=1.0)
    kept = {"w": torch.ones(1)}
    others = [stream(seed=6), stream(name="site-1"), stream(state=shown(round=3)), stream(state=shown(w=(1.0, -2.5))),
              stream(recipe="q"), stream(sizes=(3,)), stream(kept=kept), stream(kept={"v": torch.ones(1)}),
              stream(kept={"w": torch.zeros(1)}), stream(broadcast=0.25)]
    assert len({name for name, _ in (usual, *others)}) == len(others) + 1
    assert len({tuple(drawn) for _, drawn in (usual, *others)}) == len(others) + 1


def test_where_sites_differ_noise_depends_on_what_the_technique_is_there():
    class Differs(Privacy):
        units = frozenset({"site"})

        def __init__(self, there):
            self.there = there

        def at(self, site):
            return self.there[site]

    class Scaled(Parts):
        def __init__(self, scale):
            super().__init__(units=frozenset({"site"}))
            self.scale = scale

    def stream(*scales):
        there = {f"site-{k}": Scaled(scale) for k, scale in enumerate(scales)}
        task = SiteTask(trainer=Parts(), privacy=Differs(there), strategy=Parts(), aggregation=Open(), seed=5)
        task(blob_sites((1,))[0], shown(), SiteState(enrolled=True))
        return there["site-0"].heard["equip"]["seed"]

    assert stream(0.5, 2.0) == stream(0.5, 2.0) == stream(0.5, 3.0) != stream(0.75, 2.0)


def test_noise_on_another_update_of_the_same_round_is_other_noise_and_refused():
    class Drifts(Parts):
        def fit(self, *given, **more):
            return super().fit(*given, **more).map(lambda t: t + self.drift)

    drawn = []
    kept = SiteState(enrolled=True)
    for drift in (0.0, 0.0, 0.5):
        parts = Drifts(units=frozenset({"site"}))
        parts.drift = drift
        task, _ = site_task(parts)
        if drift:
            with pytest.raises(PrivacyError, match="training gave another update"):
                task(blob_sites((1,))[0], shown(), kept)
        else:
            task(blob_sites((1,))[0], shown(), kept)
        drawn.append(parts.heard["protect"]["drawn"])
    assert drawn[0] == drawn[1] != drawn[2] and len(Ledger(kept).releases()) == 1


@pytest.mark.parametrize(("kept", "round", "says"), [
    (dict(), 0, None), (dict(enrolled=True), 3, None), (dict(), 1, "no state from the rounds before"),
    (dict(), 4, "no state from the rounds before"), (dict(enrolled=True, updates=1), 2, "its ledger is missing"),
    (dict(updates=3), 0, "its ledger is missing"), (dict(updates=2, charged=True), 5, None),
    (dict(charged=True), 1, None)])
def test_a_site_that_may_have_spent_privacy_needs_its_ledger(kept, round, says):
    kept = dict(kept)
    state = SiteState()
    if kept.pop("charged", False):
        Ledger.open(state, site="site-0", round=0, stream="before").charge(STEP, terms=SITE)
    for name, value in kept.items():
        setattr(state, name, value)
    before, (task, parts) = len(Ledger(state).releases()), site_task(units=frozenset({"site"}))
    if says is None:
        task(blob_sites((1,))[0], shown(round=round), state)
        assert len(Ledger(state).releases()) == before + 1
        return
    with pytest.raises(PrivacyError, match=f"round {round}, site-0, ledger: .*{says}.*nothing was sent"):
        task(blob_sites((1,))[0], shown(round=round), state)
    assert parts.heard.keys() == {"at"} and state.updates == kept.get("updates", 0)


def test_a_site_keeps_tensors_by_name_only():
    class Keeps(Parts):
        def remember(self, *given):
            given[4].own.update(self.slots)

    for slots, says in (({"w": 3}, "holds tensors by name, got int under 'w'"), ({7: torch.zeros(1)}, "under 7; keep")):
        parts = Keeps()
        parts.slots = slots
        with pytest.raises(SiteError, match=says):
            site_task(parts)[0](blob_sites((1,))[0], shown(), SiteState())
    parts.slots = {"w": torch.zeros(1)}
    site_task(parts)[0](blob_sites((1,))[0], shown(), SiteState())
