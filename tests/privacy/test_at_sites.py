"""A technique for some sites: there it is the technique itself, elsewhere there is nothing of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cohorts import TinyNet, blob_sites
from fedlab import DPSGD, FedAvg, Privacy, SecureAggregation, SiteTrainer, federate
from fedlab.core import weights_sha256
from fedlab.core.errors import FedlabError, PrivacyError
from fedlab.core.types import ServerState, Site, SiteState, Update
from fedlab.privacy import Aggregation, AtSites, CentralGaussian, Ledger, LocalGaussian
from fedlab.privacy.base import layers_at, technique_at
from fedlab.run import History

DP = DPSGD(clip=1.0, noise_multiplier=1.0, delta=0.1, batch=2)


def run(privacy: Privacy, *, aggregation: Aggregation | None = None, sizes: tuple[int, ...] = (3, 3, 3)) -> History:
    trainer = SiteTrainer(model=TinyNet(seed=3), lr=0.05, steps=2, crop=(8, 8, 8), precision="fp32",
                          optimiser=torch.optim.SGD)
    return federate(trainer, blob_sites(sizes), strategy=FedAvg(weights="uniform"), privacy=privacy, rounds=2, seed=5,
                    aggregation=aggregation, progress=False)


def sha(history: History) -> str:
    assert history.state is not None
    return weights_sha256(history.state.params)


def test_named_sites_are_protected_and_charged_and_the_others_are_not() -> None:
    history = run(AtSites(sites=("site-1",), technique=DP))
    assert set(history.records[-1]["spent"]) == {"site-1"}
    assert Ledger(history.site_states["site-1"]).spent()[0].epsilon > 0
    assert not history.site_states["site-0"].ledger
    assert "loss" in history.records[-1]["sites"]["site-0"] and "loss" not in history.records[-1]["sites"]["site-1"]


def test_for_all_sites_it_is_the_technique_itself_and_for_none_of_them_is_nothing() -> None:
    everywhere = ("site-0", "site-1", "site-2")
    assert sha(run(AtSites(sites=everywhere, technique=DP))) == sha(run(DP))
    one, plain = run(AtSites(sites=("site-1",), technique=DP)), run(Privacy())
    assert sha(one) != sha(plain)
    assert one.records[0]["sites"]["site-0"]["norm"] == plain.records[0]["sites"]["site-0"]["norm"]
    assert one.records[0]["sites"]["site-1"]["norm"] != plain.records[0]["sites"]["site-1"]["norm"]


def test_beside_secure_aggregation() -> None:
    secure = SecureAggregation(clip=5.0, threshold=2)
    dp = run(AtSites(sites=("site-1",), technique=DP), aggregation=secure)
    assert set(dp.records[-1]["spent"]) == {"site-1"}
    clipped = AtSites(sites=("site-1",), technique=DPSGD(clip=0.01, noise_multiplier=0, batch=2))  # noise would differ
    both, alone = run(clipped, aggregation=secure), run(clipped)
    assert both.state is not None and alone.state is not None
    for name, tensor in both.state.params.items():  # up to the fixed point
        assert torch.allclose(tensor, alone.state.params[name], atol=1e-6)
    assert sha(both) != sha(run(Privacy(), aggregation=secure))


def test_at_a_site_only_what_works_there_is_left() -> None:
    noise = LocalGaussian(clip=1.0, noise_multiplier=1.0, delta=0.1)
    both = AtSites(sites=("a",), technique=DP) + AtSites(sites=("b",), technique=noise)
    assert both.at("a") is DP and both.at("b") is noise and type(both.at("c")) is Privacy
    assert both.units == {"patient", "site"}
    assert (DP + noise).at("a").units == {"patient", "site"}


class Notes(Privacy):
    """Notes with what its hooks were called."""

    units = frozenset({"patient"})

    def __init__(self) -> None:
        self._calls: list[tuple[Any, ...]] = []

    def check_order(self, *, before: Any, after: Any) -> None:
        self._calls.append(("order", list(before), list(after)))

    def check(self, run: Any) -> None:
        self._calls.append(("check", run))

    def check_site(self, site: Any, run: Any) -> None:
        self._calls.append(("site", site, run))

    def equip(self, kit: Any, site: Any, state: Any) -> Any:
        self._calls.append(("equip", kit, site, state))
        return SimpleNamespace(around=kit)

    def protect(self, update: Update, state: Any, rng: Any) -> Update:
        self._calls.append(("protect", update, state, rng))
        return replace(update, weight=9.0)


def test_every_hook_of_the_technique_is_asked_at_the_named_sites_only() -> None:
    notes, state, rng = Notes(), SiteState(), torch.Generator()
    some = AtSites(sites=("zurich", "aachen"), technique=notes)
    run: Any = SimpleNamespace(names=("mainz", "aachen", "zurich"))
    kit: Any = SimpleNamespace()
    some.check(run)
    assert notes._calls == [("check", run)]
    for name in ("mainz", "aachen", "zurich"):
        notes._calls.clear()
        site, update = Site(name=name, train=[]), Update(site=name, delta={}, weight=1.0)
        some.check_site(site, run)
        equipped, sent = some.equip(kit, site, state), some.protect(update, state, rng)
        if name == "mainz":
            assert equipped is kit and sent is update and notes._calls == []
        else:
            assert getattr(equipped, "around", None) is kit and sent.weight == 9.0
            assert notes._calls == [("site", site, run), ("equip", kit, site, state), ("protect", update, state, rng)]
    with pytest.raises(ValueError, match=r"\['bern', 'ulm'\] are not sites of the run"):
        AtSites(sites=("ulm", "aachen", "bern"), technique=notes).check(run)


def test_the_order_of_techniques_is_checked_site_by_site() -> None:
    first, second, third = Notes(), Notes(), Notes()
    AtSites(sites=("b", "a"), technique=first) + AtSites(sites=("c", "b"), technique=second) + third
    assert first._calls == [("order", [], after) for after in ([second], [], [second, third], [third])]
    assert second._calls == [("order", before, after) for after in ([], [third]) for before in ([], [first])]


def test_a_technique_for_some_of_the_sites_of_another() -> None:
    noise = LocalGaussian(clip=1.0, noise_multiplier=1.0, delta=0.1)
    both = AtSites(sites=("b", "a"), technique=DP + AtSites(sites=("b",), technique=noise))
    assert both.at("a") is DP and both.at("b").layers == (DP, noise) and type(both.at("c")) is Privacy
    inner, after = Notes(), Notes()
    AtSites(sites=("b", "a"), technique=AtSites(sites=("b",), technique=inner)) + after
    assert inner._calls == [("order", [], [after])]


def test_refused_where_it_would_not_hold() -> None:
    with pytest.raises(ValueError, match="concerns all sites"):
        AtSites(sites=("a",), technique=CentralGaussian(clip=1.0, noise_multiplier=1.0))
    with pytest.raises(ValueError, match="aggregation="):
        AtSites(sites=("a",), technique=SecureAggregation(clip=5.0, threshold=2))
    with pytest.raises(ValueError, match="stands once"):
        AtSites(sites=("a", "b"), technique=DP) + AtSites(sites=("b",), technique=DP)
    with pytest.raises(ValueError, match="stands once"):
        DP + AtSites(sites=("b",), technique=DP)
    with pytest.raises(ValueError, match="one or more different"):
        AtSites(sites="ab", technique=DP)
    for sites in ((), ("a", "b", "a")):
        with pytest.raises(ValueError, match="one or more different"):
            AtSites(sites=sites, technique=DP)
    with pytest.raises(ValueError, match="is a privacy technique, got 'noise'"):
        AtSites(sites=("a",), technique="noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not sites of the run"):
        run(AtSites(sites=("nobody",), technique=DP))


def test_travels_in_a_plan() -> None:
    from fedlab.deploy.plan import describe, make

    privacy = AtSites(sites=("a",), technique=DP) + LocalGaussian(clip=1.0, noise_multiplier=1.0, delta=0.1)
    assert repr(make(describe(privacy), approve=lambda module: None)) == repr(privacy)


class Chain(Privacy):
    """At a site the next of a chain, which ends with a technique."""

    def __init__(self, length: int, last: Privacy) -> None:
        self._length, self._last = length, last

    def at(self, site: str) -> Privacy:
        return Chain(self._length - 1, self._last) if self._length > 1 else self._last


def test_what_a_technique_is_at_a_site_is_asked_until_nothing_changes() -> None:
    noise = LocalGaussian(clip=1.0, noise_multiplier=1.0, delta=0.1)
    for length in (1, 2, 20):
        assert technique_at(Chain(length, DP), "a") is DP
        assert technique_at(Chain(length, DP) + noise, "a").layers == (DP, noise)
        assert technique_at(noise + Chain(length, Privacy()), "a") is noise
        assert type(technique_at(Chain(length, Privacy()), "a")) is Privacy
    for length in (21, 22, 10**9):
        with pytest.raises(PrivacyError, match=r"^Chain\(.*\) never says what it is at Ulm; return a technique"):
            technique_at(noise + Chain(length, DP), "Ulm")


def test_a_technique_that_is_the_same_everywhere_stays_itself() -> None:
    noise = LocalGaussian(clip=1.0, noise_multiplier=1.0, delta=0.1)
    both = DP + noise
    assert technique_at(both, "a") is both and technique_at(DP, "a") is DP
    assert both.at("a") is both and layers_at(both.layers, "a") == [DP, noise]
    assert layers_at([Privacy(), DP, Privacy()], "a") == [DP]


def test_a_technique_that_differs_at_one_site_is_asked_about_that_site() -> None:
    class ButUlm(Privacy):
        def at(self, site: str) -> Privacy:
            return DP if site == "Ulm" else self

    technique = ButUlm()
    assert technique_at(technique, "Bern") is technique and technique_at(technique, "Ulm") is DP


class Sends(Privacy):
    """A technique that sends a number beside the update, and works at the server."""

    def __init__(self, name: str, units: frozenset[str] = frozenset()) -> None:
        self.sends, self.units, self._heard = frozenset({name}), units, list[Any]()

    def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
        self._heard.append((state.owner, update.site, rng))
        return update.map(lambda t: t * 2 + len(self.sends))

    def release(self, mean: Update, cohort: Any, state: Any, rng: torch.Generator) -> Update:
        self._heard.append((state.owner, cohort, rng))
        return mean.map(lambda t: t * 3 - 1)


def test_a_sum_is_all_of_its_techniques_in_order_and_back_at_the_server() -> None:
    first, last = Sends("one", frozenset({"site"})), Sends("other", frozenset({"patient"}))
    both = first + last
    assert both.units == {"site", "patient"} and both.sends == {"one", "other"} and both.layers == (first, last)
    assert both.works_at_server and not (DP + Notes()).works_at_server
    assert (Privacy() + first).works_at_server and repr(both) == f"{first!r} + {last!r}"
    state, rng = SiteState(owner="privacy"), torch.Generator()
    sent = both.protect(Update(site="Bern", delta={"w": torch.tensor([1.0, -0.5])}, weight=1.0), state, rng)
    assert sent.delta["w"].tolist() == [7.0, 1.0]  # (t · 2 + 1) · 2 + 1
    server = ServerState(round=0, params={}, owner="privacy")
    mean = both.release(Update(site="mean", delta={"w": torch.tensor([1.0, 0.5])}, weight=1.0), "cohort", server, rng)
    assert mean.delta["w"].tolist() == [5.0, 0.5]  # (t · 3 - 1) · 3 - 1
    assert first._heard == [("privacy 0", "Bern", rng), ("privacy 0", "cohort", rng)]
    assert last._heard == [("privacy 1", "Bern", rng), ("privacy 1", "cohort", rng)]
    with pytest.raises(TypeError, match=r"only privacy techniques are joined by \+, got 3"):
        first + 3  # type: ignore[operator]


def test_a_sum_asks_each_of_its_techniques_before_and_during_training() -> None:
    first, last = Notes(), Notes()
    both, state = first + last, SiteState(owner="privacy")
    run: Any = SimpleNamespace(names=("Bern",))
    site, kit = Site(name="Bern", train=[]), SimpleNamespace()
    for notes in (first, last):
        notes._calls.clear()
    both.check(run)
    both.check_site(site, run)
    equipped: Any = both.equip(kit, site, state)  # type: ignore[arg-type]
    for place, (notes, inner) in enumerate(((first, kit), (last, equipped.around))):
        assert notes._calls[:2] == [("check", run), ("site", site, run)]
        (name, given, where, own), = notes._calls[2:]
        assert (name, given, where, own.owner) == ("equip", inner, site, f"privacy {place}")
        assert own.namespaces is state.namespaces
    assert equipped.around.around is kit


@pytest.mark.parametrize("spoil", [
    lambda update: replace(update, delta={"v": update.delta["w"]}), lambda update: replace(update, site="Ulm"),
    lambda update: replace(update, buffers={}), lambda update: update.map(lambda t: t / 0)])
def test_what_one_technique_spoils_is_found_before_the_next(spoil: Any) -> None:
    class Spoils(Privacy):
        def protect(self, update: Update, state: SiteState, rng: torch.Generator) -> Update:
            changed: Update = spoil(update)
            return changed

    notes = Notes()
    update = Update(site="Bern", delta={"w": torch.ones(2)}, weight=1.0, buffers={"n": torch.ones(1)})
    (Privacy() + notes).protect(update, SiteState(), torch.Generator())
    with pytest.raises((PrivacyError, FedlabError)):
        (Spoils() + notes).protect(update, SiteState(), torch.Generator())
    assert len(notes._calls) == 3  # its order in two sums, and the one update
