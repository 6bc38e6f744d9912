"""The gate, the one way out of a site, on values that other checks would let through."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedlab.core.errors import PrivacyError
from fedlab.core.gate import check_update
from fedlab.core.types import Spent, Update

LIKE = {"w": torch.zeros(2), "b": torch.zeros(1)}
RIGHT = Update(site="mainz", delta={"w": torch.tensor([0.5, -0.0]), "b": torch.ones(1)}, weight=3.0, steps=2)
SPENT = Spent(1.0, 0.5, "site", "rdp", "add or remove a site")


def test_a_right_update_passes_as_it_is() -> None:
    assert check_update(RIGHT, like=LIKE, site="mainz") is RIGHT
    stated = replace(RIGHT, spent=(SPENT,))
    assert check_update(stated, like=LIKE, site="mainz") is stated


@pytest.mark.parametrize(("tensor", "words"), [
    (torch.tensor([1e300, 0.0], dtype=torch.float64), "NaN or infinite"),  # finite, and not in the model's float32
    (torch.tensor([0.0, torch.nan]), "NaN or infinite"), (torch.ones(2, requires_grad=True), "history of gradients"),
    (torch.ones(2, device="meta"), "without values"), (torch.ones(2, dtype=torch.int64), "dense floating point"),
    (torch.ones(2).to_sparse(), "dense floating point"), (torch.ones(3), r"shape \(3,\), expected \(2,\)"),
])
def test_a_tensor_that_is_no_plain_values_of_the_model_is_refused(tensor: torch.Tensor, words: str) -> None:
    with pytest.raises(PrivacyError, match=words):
        check_update(replace(RIGHT, delta={**RIGHT.delta, "w": tensor}), like=LIKE, site="mainz")


@pytest.mark.parametrize("change", [
    {"delta": 1.0}, {"delta": -0.1}, {"epsilon": -1.0}, {"unit": "scan"}, {"epsilon": "1"}])
def test_a_statement_that_is_no_guarantee_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(PrivacyError, match="spent"):
        check_update(replace(RIGHT, spent=(SPENT._replace(**change),)), like=LIKE, site="mainz")


def test_an_update_under_another_name_is_refused() -> None:
    with pytest.raises(PrivacyError, match="says it is of 'mainz'"):
        check_update(RIGHT, like=LIKE, site="bonn")
