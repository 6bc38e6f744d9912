"""Evidence on techniques: what stands in it, that nothing is done twice, and what is refused before any training."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from cohorts import blob_patient
from fedlab.core.errors import RunError
from fedlab.core.types import Site
from fedlab.evidence.arms import Arm
from fedlab.evidence.assessment import assess
from fedlab.evidence.attacked import Case, ModelMembership, NotApplicable, SentMembership
from fedlab.evidence.differences import share_kept
from fedlab.evidence.findings import Finding, Threat
from fedlab.evidence.presets import presets
from fedlab.privacy.base import Privacy
from fedlab.privacy.compression import TopK
from fedlab.privacy.dp.dpsgd import DPSGD
from fedlab.privacy.dp.site_level import CentralGaussian, LocalGaussian
from fedlab.privacy.secure_aggregation.secure_sum import SecureAggregation
from fedlab.run.federate import federate
from fedlab.run.history import History
from fedlab.strategies.averaging import FedAvg
from trainers import trainer


class Halved(Privacy):
    """A technique of a notebook: half of the update leaves."""

    def protect(self, update, state, rng):
        return update.map(lambda t: t / 2)


def sites() -> list[Site]:
    return [Site(name=f"site-{k}", train=[blob_patient(f"s{k}p{i}", seed=100 * k + i) for i in range(3)],
                 val=[blob_patient(f"s{k}v{i}", seed=100 * k + 50 + i) for i in range(3)]) for k in range(3)]


class Counting:
    """An attack of one's own: how many sites can be told apart in what is sent."""

    def try_on(self, case: Case):
        if case.arm.aggregation is not None:
            raise NotApplicable("a sum has no site")
        return {"sites": len(case.seen()), "moved": bool(case.state.round)}

    def found(self, tries) -> Finding:
        assert all(one["moved"] for one in tries)
        share = sum(one["sites"] for one in tries) / (3 * len(tries))
        return Finding(attack="Counting()", threat=Threat(who="server", sees="all", wants="how many sites there are"),
                       measure="share of sites seen", value=share, low=0.0, high=1.0, trials=len(tries), chance=0.5)

    def __repr__(self) -> str:
        return "Counting()"


TECHNIQUES = {"halved": Halved(), "noise": LocalGaussian(clip=0.1, noise_multiplier=20.0, delta=1e-2),
              "central": CentralGaussian(clip=0.1, noise_multiplier=1.0, delta=1e-2),
              "sum": SecureAggregation(threshold=2)}


@pytest.fixture(scope="module")
def assessed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    attacks = {"by the update": SentMembership(), "by the model": ModelMembership(), "counting": Counting()}

    def again(**changes):
        settings = dict(rounds=2, seeds=2, attacks=attacks, out=folder, progress=False, workers=1)
        return assess(TECHNIQUES, sites(), trainer(), **(settings | changes))

    return folder, again, again()


def test_utility_guarantee_and_leakage_stand_side_by_side_each_with_its_n(assessed):
    _, _, found = assessed
    assert list(found.techniques) == ["start", "none", *TECHNIQUES]
    halved, noise = found["halved"], found["noise"]
    per_seed = found.scores.groupby(["arm", "seed", "region"])["dice"].mean().groupby("arm").mean()
    assert halved.dice.value == pytest.approx(per_seed["halved"])
    assert halved.to_none.value == pytest.approx(per_seed["halved"] - per_seed["none"])
    assert halved.to_start.value == pytest.approx(per_seed["halved"] - per_seed["start"])
    assert (halved.dice.patients, halved.dice.seeds) == (9, 1), "a patient in both seeds counts once"
    assert halved.guarantee == "no formal guarantee" and math.isinf(halved.epsilon)
    assert [(one.unit, one.delta) for one in noise.spent] == [("site", 1e-2)]
    for word in (f"{noise.epsilon:.2f}"[:3], "δ = 0.01", "per site", "any two updates of a site", "rdp accountant"):
        assert word in noise.guarantee
    assert math.isnan(noise.seconds) and noise.megabytes > 0, "time is not covered by the guarantee"
    assert math.isnan(found["central"].megabytes) and halved.seconds > 0
    table = found.table()
    assert list(table.index) == list(found.techniques)
    numbers = ["Dice", "minus none", "minus start", "by the update", "by the model", "counting"]
    shown = [cell for column in numbers for cell in table[column] if cell != "–"]
    assert shown and all(re.search(r"n = \d+\)$", cell) for cell in shown), shown


def test_attackers_see_what_the_technique_lets_them_see(assessed):
    _, _, found = assessed
    whose = {name: found[name].findings["by the update"].threat for name in ("none", *TECHNIQUES)}
    assert {name: threat.who for name, threat in whose.items()} == {
        "none": "server", "halved": "server", "noise": "server", "central": "site", "sum": "server"}
    assert "sum of the updates" in whose["sum"].sees and "two successive rounds" in whose["central"].sees
    assert {found[name].findings["by the update"].trials for name in TECHNIQUES} == {2 * 18}
    assert found["sum"].not_tried == {"counting": "a sum has no site"}
    assert found["halved"].findings["counting"].value == 1.0


def test_an_update_is_seen_as_it_is_sent():
    own = trainer()
    arm = Arm(trainer=own, rounds=1, strategy=FedAvg(weights="uniform"), privacy=Halved())
    history = federate(trainer(), sites(), rounds=1, privacy=Privacy(), seed=5, progress=False,
                       strategy=FedAvg(weights="uniform"))
    case = Case(arm=arm, sites=sites(), seed=5, state=history.state)
    seen = case.seen()
    assert [one.sites[0].name for one in seen] == ["site-0", "site-1", "site-2"]
    start = own.initial()
    for name, moved in history.state.params.items():
        mean = sum(one.delta[name] for one in seen) / 3
        np.testing.assert_allclose(2 * mean, moved - start[name], atol=1e-6)
    summed = replace(arm, privacy=None, aggregation=SecureAggregation(threshold=2))
    hidden = Case(arm=summed, sites=sites(), seed=5, state=history.state).seen()
    assert len(hidden) == 1 and len(hidden[0].sites) == 3
    for name, moved in history.state.params.items():
        np.testing.assert_allclose(hidden[0].delta[name], moved - start[name], atol=1e-6)
    assert all(bool((a == b).all()) for a, b in zip(own.initial().values(), start.values(), strict=True))


def test_it_continues_where_it_ended(assessed):
    folder, again, found = assessed
    files = [*folder.rglob("scores.csv"), *folder.rglob("attacks/*.json")]
    assert len(files) == 2 * 6 + 2 * 5 * 3
    marks = {path: path.stat().st_mtime_ns for path in files}
    second = again()
    assert {path: path.stat().st_mtime_ns for path in files} == marks
    assert second.as_json() == found.as_json()


class Page(HTMLParser):
    """Tags that are open, and addresses that a page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "rect", "line", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("rect", "line", "circle"):
            assert self.open.pop() == tag


def test_the_page_says_what_was_tried_against_whom_what_was_found_and_what_it_does_not_show(assessed, tmp_path):
    _, _, found = assessed
    path = found.save(tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and not page.loaded
    for title in ("What was tried", "Against whom", "What was found", "What this does not show", "Settings"):
        assert f"<h2>{title}</h2>" in text
    for one in found.techniques.values():
        assert all(str(finding).split(";")[0].split(": ", 1)[1] in text for finding in one.findings.values())
    assert text.count(found["noise"].guarantee) >= 2 and "Halved()" in text and "not tried: a sum has no site" in text
    assert "<svg" in found._repr_html_() and "halved: reaches Dice" in repr(found)
    with pytest.raises(RunError, match="exists already"):
        found.save(path)
    json.dumps(found.as_json(), allow_nan=False)


def test_the_share_of_a_gain_by_hand():
    rows = [{"arm": arm, "site": "s", "patient": str(k), "region": region, "dice": value + 0.001 * k, "hd95_mm": 1.0,
             "reference_ml": 1.0, "predicted_ml": 1.0} for arm, value in (("start", 0.4), ("none", 0.6), ("mine", 0.55))
            for k in range(8) for region in ("TC", "WT", "ET")]
    kept = share_kept(pd.DataFrame(rows), "mine", full="none", start="start")
    assert (kept.value, kept.low, kept.high) == pytest.approx((0.75,) * 3)  # 0.15 of 0.20 for every patient
    assert str(kept) == "75% (75% to 75%; n = 8)"
    lost = share_kept(pd.DataFrame(rows), "mine", full="start", start="none")
    assert math.isnan(lost.value) and "no clear gain" in str(lost)


def test_the_interval_of_a_share_covers_as_often_as_it_says():
    random, within = np.random.default_rng(0), 0
    for _ in range(40):
        gain = random.normal(0.2, 0.1, size=24)
        mine = 0.5 * gain + random.normal(0, 0.05, size=24)
        rows = [{"arm": arm, "site": "s", "patient": str(k), "region": region, "dice": values[k], "reference_ml": 1.0}
                for arm, values in (("start", gain * 0), ("none", gain), ("mine", mine))
                for k in range(24) for region in ("TC", "WT", "ET")]
        kept = share_kept(pd.DataFrame(rows), "mine", full="none", start="start", draws=400)
        within += kept.low <= 0.5 <= kept.high
    assert within >= 29  # P(Binomial(40, 0.95) < 29) = 4e-7


@pytest.mark.parametrize("techniques, message", [
    ({}, "no technique to assess"),
    ({"start": Privacy()}, "'start' is the untouched model"),
    ({"none": TopK(keep=0.1)}, "'none' is the training without protection"),
    ({"a": "TopK"}, "expected a fedlab.Privacy"),
    ({"a": Arm(trainer=trainer(), rounds=1, data="pooled")}, "trains no federation"),
    ({"a": DPSGD(clip=1.0, noise_multiplier=1.0, sample_rate=1.0, delta=0.5)}, "'a' cannot be assessed"),
    ({"a": SecureAggregation(threshold=9)}, "'a' cannot be assessed"),
    ({"a": Arm(trainer=trainer(momentum="average"), rounds=1)}, "'a' cannot be assessed: attacks read the weights"),
])
def test_what_cannot_be_assessed_is_refused_before_any_training(techniques, message):
    with pytest.raises(ValueError, match=message):
        assess(techniques, sites(), trainer(), rounds=1, seeds=1, progress=False)


def test_presets_run_and_spend_what_they_are_made_for():
    own, rounds = trainer(), 2
    made = presets(sites(), own, rounds=rounds, epsilon=8.0, delta=1e-2)
    for name, technique in made.items():
        part = {"privacy": technique} if isinstance(technique, Privacy) else {"aggregation": technique}
        history: History = federate(trainer(), sites(), rounds=rounds, strategy=FedAvg(weights="uniform"),
                                    progress=False, **part)
        spent = [] if history.published().spent().empty else history.published().spent()["epsilon"]
        if name in ("SVT, corrected", "local noise", "central noise", "DP-SGD"):
            assert 7.5 < max(spent) <= 8.0, name
        elif name in ("SVT, as published", "Flower LocalDpMod"):
            assert max(spent) > 16, f"{name} states ε of a round; what its noise proves is more"
        elif name == "NVFLARE SVTPrivacy":  # of NVFLARE: γ = 1e-5 for each of 3 steps, 0.1 for choice and for a value
            count = math.ceil(0.1 * sum(t.numel() for t in own.initial().values()))
            choice = 0.1 / (1 + (2 * count) ** (2 / 3))
            noise = technique.scales(10)
            assert (noise.threshold, noise.query, noise.release) == pytest.approx(
                (3e-5 / choice, 2 * count * 3e-5 / (0.1 - choice), 2 * 3e-5 / 0.1))
        else:
            assert len(spent) == 0, name
    with pytest.raises(ValueError, match="states epochs"):
        presets(sites(), trainer(steps=None, epochs=1), rounds=1)
