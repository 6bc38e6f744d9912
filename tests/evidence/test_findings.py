"""A finding is never shown without interval, number of trials and chance, nor taken for protection."""

from dataclasses import replace

import pytest

from fedlab.evidence.findings import Finding, Threat

THREAT = Threat(who="server", sees="one update", wants="whose it is")
FOUND = Finding(attack="Attack()", threat=THREAT, measure="AUC", value=0.8, low=0.7, high=0.9, trials=40, chance=0.5)


def test_a_finding_is_shown_with_interval_trials_chance_and_threat():
    for text in (str(FOUND), FOUND._repr_html_()):
        for part in ("0.80", "0.70 to 0.90", "n = 40", "chance 0.50", "clear of chance", "the server sees one update"):
            assert part in text


def test_an_auc_below_chance_is_an_inverted_sign_and_no_protection():
    found = replace(FOUND, value=0.3, low=0.2, high=0.4)
    assert found.is_clear and found.is_inverted
    assert "inverted sign: an attacker who turns it reaches 0.70" in str(found)
    unclear = replace(FOUND, value=0.5, low=0.4, high=0.6)
    assert not unclear.is_clear and "no proof of protection" in str(unclear)


def test_a_reconstruction_below_the_prior_is_no_leak():
    found = replace(FOUND, measure="correlation within channels", value=0.3, low=0.2, high=0.4)
    assert not found.is_clear and not found.is_inverted
    assert "below chance: this attack learns nothing, which is no proof of protection" in str(found)
    assert replace(found, value=0.7, low=0.6, high=0.8).is_clear


def test_a_lower_bound_has_no_upper_limit():
    bound = replace(FOUND, measure="ε", value=1.2, low=0.8, high=float("inf"), chance=0.0)
    assert "1.20 (at least 0.80 with 95 % confidence, n = 40)" in str(bound)


@pytest.mark.parametrize("wrong", [{"trials": 0}, {"low": 0.85}, {"high": 0.75}, {"value": float("nan")},
                                   {"value": float("inf"), "high": float("inf")}, {"chance": float("nan")}])
def test_a_number_without_interval_or_trials_is_refused(wrong):
    with pytest.raises(ValueError):
        replace(FOUND, **wrong)


def test_a_threat_names_a_known_attacker_and_what_it_sees_and_wants():
    with pytest.raises(ValueError, match="who is one of"):
        replace(THREAT, who="hacker")
    with pytest.raises(ValueError, match="in words"):
        replace(THREAT, sees=" ")
