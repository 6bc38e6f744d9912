"""Settings out of range are refused with their name, what was expected and what was given."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedlab.core.settings import check_choice, check_patterns, check_positive, check_share, check_whole, check_within
from fedlab.core.tensors import flatten, matching, unflatten


def test_settings_in_range_pass():
    check_positive(lr=0.1, steps=3, other=np.float32(2.0))
    check_positive(optional=True, bound=None, clip=1.0)
    check_whole(rounds=1, sites=64)
    check_whole(optional=True, rounds=None, sites=3)
    check_share(sample=1, fraction=0.1)
    check_within(mu=0, other=1e9)
    check_within(below=0.5, trim=0.49)
    check_within(most=1, tumour_share=1)
    check_choice(("a", "b"), mode="b")
    check_patterns(exclude=(), names=["norm*"])


@pytest.mark.parametrize("check, says", [
    *[(lambda bad=bad: check_positive(lr=0.1, clip=bad), r"clip is a positive number, got")
      for bad in (0, -1.0, math.inf, math.nan, None, "1")],
    (lambda: check_positive(optional=True, bound=0.0), "bound is a positive number or None, got 0.0"),
    *[(lambda bad=bad: check_whole(rounds=bad), "rounds is a positive whole number, got") for bad in (0, -1, 1.0)],
    *[(lambda bad=bad: check_share(sample=bad), "sample is above 0 and at most 1, got") for bad in (0, 1.01, math.nan)],
    *[(lambda bad=bad: check_within(mu=bad), "mu is at least 0 and finite, got") for bad in (-1, math.inf, math.nan)],
    (lambda: check_whole(optional=True, rounds=0), "rounds is a positive whole number or None, got 0"),
    (lambda: check_within(mu="0.5"), "mu is at least 0 and finite, got 0.5"),  # a text is no number
    (lambda: check_within(below=0.5, trim=0.5), "trim is at least 0 and below 0.5, got 0.5"),
    (lambda: check_within(most=1, tumour_share=1.1), "tumour_share is at least 0 and at most 1, got 1.1"),
    *[(lambda bad=bad: check_whole(least=0, seed=bad), "seed is a whole number of at least 0") for bad in (-1, True)],
    (lambda: check_choice(("a", "b"), mode="c"), "mode is one of 'a', 'b', got 'c'"),
    *[(lambda bad=bad: check_patterns(names=bad), "names is a list of names or patterns") for bad in ("a", [1], None)],
])
def test_settings_out_of_range_are_refused(check, says):
    with pytest.raises(ValueError, match=says):
        check()


def test_tensors_laid_end_to_end_come_back_as_they_were():
    tensors = {"b": torch.randn(2, 3), "a": torch.tensor(4.0), "c": torch.arange(5).half()}
    flat = flatten(tensors)
    assert flat.dtype == torch.float32 and flat.shape == (12,) and flat[6] == 4.0
    flat[0] = tensors["b"][0, 0]  # a copy
    for name, t in unflatten(flat, tensors).items():
        assert torch.equal(t, tensors[name].float())
    assert list(unflatten(flat, tensors)) == ["b", "a", "c"]
    assert flatten(tensors, torch.float64).dtype == torch.float64


def test_patterns_find_names_and_one_that_finds_none_is_refused():
    names = ["down.norm.weight", "down.conv.weight", "head.bias"]
    assert matching(names, ["head.*", "*norm*"]) == ["down.norm.weight", "head.bias"] and matching(names, []) == []
    with pytest.raises(ValueError, match=r"no tensor of the model is called 'tail.\*'"):
        matching(names, ["head.*", "tail.*"])
