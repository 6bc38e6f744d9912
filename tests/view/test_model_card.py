"""The model card states the facts of the run, and marks as open what only people know."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
import yaml

from fedlab.core.errors import RunError
from fedlab.core.types import Round, ServerState, Site, Spent
from fedlab.core.weights import weights_sha256
from fedlab.data.cards.card import card_template
from fedlab.data.cards.schema import MARK
from fedlab.run.history import History
from fedlab.run.trace import Verdict
from fedlab.training.metrics import COLUMNS
from fedlab.view.model_card import make_model_card

PARAMS = {"w": torch.arange(6.0)}
SITES = [Site("Bern|<b>", [None] * 3, [None]), Site("Basel", [None] * 2, [None], card_template())]
SETTINGS = {"trainer": "SiteTrainer(...)", "strategy": "FedAvg()"}


def history(spent=()):
    found = History(rounds=3, privacy="Privacy()" if not spent else "DPSGD(...)")
    for number in range(2):
        found.add(Round(number=number, state=ServerState(round=number + 1, params=PARAMS), cohort=("Basel",),
                        sites={}, spent={"Basel": tuple(spent)}, metrics={}, seconds=1.0, absent={"Basel": "late"}))
    return found


def scores():
    rows = []
    for site, dice in (("Bern|<b>", 0.8), ("Basel", 0.6)):
        for region in ("TC", "WT", "ET"):
            rows.append({**dict.fromkeys(COLUMNS, 1.0), "site": site, "patient": f"p of {site}", "region": region,
                         "dice": dice})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def test_a_card_says_what_the_run_knows(tmp_path):
    spent = Spent(2.5, 1e-3, "patient", "rdp", "add or remove one patient")
    trace = Verdict(path=tmp_path / "t", lines=4, rounds=2, head="ab" * 32)
    card = make_model_card(history([spent]), name="My model", sites=SITES, settings=SETTINGS, scores=scores(),
                           trace=trace, generated=True)
    front = yaml.safe_load(card.text.split("---")[1])
    assert front["model_name"] == "My model" and front["license"] == MARK
    for heading in ("Model details", "Intended use", "Factors", "Metrics and evaluation data", "Training data",
                    "Privacy", "Traceability", "Ethical considerations", "Caveats and recommendations"):
        assert f"\n## {heading}\n" in card.text
    assert weights_sha256(PARAMS) in card.text and "2 of 3" in card.text and "| parameters | 6 |" in card.text
    assert "| Basel | 1 | 0.600 | 0.600 | 0.600 |" in card.text and "WT 0.700" in card.text
    assert "Bern\\|\\<b\\>" in card.text and "<b>" not in card.text
    assert "ε = 2.5 at δ = 0.001 per patient (add or remove one patient, rdp accountant)" in card.text
    assert "ab" * 32 in card.text and "is whole" in card.text
    assert "Basel in 2 of 2 rounds" in card.text and "All patients" in card.text
    assert card.save(tmp_path / "card.md").read_text() == card.text and "---" not in card._repr_markdown_()[:5]
    with pytest.raises(RunError, match="not overwritten"):
        card.save(tmp_path / "card.md")


def test_a_card_claims_nothing_that_is_not_known():
    card = make_model_card(history(), name="m", sites=SITES, settings={})
    assert "no formal guarantee" in card.text and "was not traced" in card.text and "ε" not in card.text
    assert "not evaluated on held-out patients" in card.text and "generated" not in card.text
    assert card.open >= 6 and str(card.open) in repr(card)
    broken = Verdict(path="t", lines=1, rounds=1, head="", problems=("line 2 is not what was written",))
    assert "NOT whole: line 2" in make_model_card(history(), name="m", sites=[], settings={}, trace=broken).text
    with pytest.raises(RunError, match="no finished round"):
        make_model_card(History(rounds=1), name="m", sites=[], settings={})
