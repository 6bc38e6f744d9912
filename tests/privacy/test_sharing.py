"""What is sent less of: values by hand, bytes that decode to the very update, error feedback that loses nothing."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import irregular
from cohorts import blob_sites
from fedlab.core.errors import PrivacyError
from fedlab.core.types import SiteState, Update
from fedlab.core.weights import weights_sha256
from fedlab.privacy.compression import (
    Quantise,
    ScaledSign,
    SharePercentile,
    TopK,
    decode_levels,
    decode_sparse,
    encode_levels,
    encode_sparse,
    entries,
    sparse_bytes,
)
from fedlab.run.federate import each_round, federate
from trainers import trainer

ALL = [SharePercentile(keep=0.3, bound=0.4), TopK(keep=0.2), TopK(keep=0.2, per_layer=True), ScaledSign(),
       Quantise(bits=3), SharePercentile(keep=0.3, bound=0.4, error_feedback=True),
       TopK(keep=0.2, error_feedback=True), ScaledSign(error_feedback=False), Quantise(bits=3, error_feedback=True)]


def update(**tensors: torch.Tensor) -> Update:
    return Update(site="a", delta=tensors, weight=1.0)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sent(technique, tensors, state=None, seed=0):
    return technique.protect(update(**tensors), SiteState() if state is None else state, rng(seed))


# By hand

def test_percentile_by_hand():
    values = {"a": torch.tensor([0.1, -0.9, 0.3]), "b": torch.tensor([[0.0, 0.5], [-0.2, 0.05]])}
    out = sent(SharePercentile(keep=3 / 7, bound=0.6), values).delta
    torch.testing.assert_close(out["a"], torch.tensor([0.0, -0.6, 0.3]))
    torch.testing.assert_close(out["b"], torch.tensor([[0.0, 0.5], [0.0, 0.0]]))
    ties = sent(SharePercentile(keep=0.25), {"a": torch.tensor([1.0, -1.0, 0.5, 0.0])}).delta["a"]
    assert ties.tolist() == [1.0, -1.0, 0.0, 0.0]
    whole = sent(SharePercentile(keep=1.0), values).delta
    assert all(whole[name].equal(t) for name, t in values.items())
    both = sent(SharePercentile(keep=0.5, bound=0.75), {"b": torch.tensor([2.0, 0.5]), "a": torch.tensor([0.7, -3.0])})
    assert both.delta["b"].tolist() == [0.75, 0.0] and both.delta["a"].tolist() == [0.0, -0.75]


@pytest.mark.parametrize("n,keep,k", [(1000, 0.1, 100), (30, 0.1, 3), (1000, 0.0005, 1), (7, 1.0, 7), (3, 0.5, 2)])
def test_share_is_the_stated_one(n, keep, k):
    values = {"a": torch.randn(n, generator=rng(1))}
    for technique in (SharePercentile(keep=keep), TopK(keep=keep)):
        out = sent(technique, values).delta["a"]
        assert int((out != 0).sum()) == k
        largest = values["a"].abs().sort(descending=True).values[k - 1]
        assert out.equal(values["a"].where(values["a"].abs() >= largest, 0.0))


def test_top_k_takes_exactly_its_share_of_ties_and_of_each_layer():
    ones = {"a": torch.ones(10), "b": torch.full((4, 5), 9.0)}
    assert int((sent(TopK(keep=0.3), {"a": torch.ones(10)}).delta["a"] != 0).sum()) == 3
    assert int((sent(TopK(keep=0.3), ones).delta["a"] != 0).sum()) == 0
    layers = sent(TopK(keep=0.3, per_layer=True), ones).delta
    assert int((layers["a"] != 0).sum()) == 3 and int((layers["b"] != 0).sum()) == 6


def test_sign_by_hand():
    out = sent(ScaledSign(error_feedback=False), {"a": torch.tensor([3.0, -1.0, 0.0, -4.0]), "z": torch.zeros(5)})
    assert out.delta["a"].tolist() == [2.0, -2.0, 2.0, -2.0] and not out.delta["z"].any()
    assert out.encoded == (4 + 1) + 4  # a scale and four bits; a scale of 0


def test_quantised_values_are_levels_and_right_on_average():
    values, draws = torch.tensor([1.0, -0.7, 0.5, 0.2, -0.1, 0.0]), 4000
    out = sent(Quantise(bits=3), {"a": values.expand(draws, 6), "b": torch.tensor([0.3]), "z": torch.zeros(3)}).delta
    levels = out["a"].double() * 3
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-6)
    assert float((out["a"] - values).abs().max()) < 1 / 3
    share = values.double() * 3 % 1  # probability of the upper level
    error = 4.5 * (share * (1 - share) / draws).sqrt() / 3  # p = 7e-6 each
    assert ((out["a"].double().mean(0) - values).abs() <= error + 1e-6).all()
    assert float(out["b"]) == pytest.approx(0.3) and not out["z"].any()


@pytest.mark.parametrize("bits", [2, 5, 8, 16])
def test_quantised_values_are_rounded_by_draws_from_the_given_stream(bits):
    """Up where a draw from [0, 1) is below what exceeds the level, after a tensor of zeros and one of no entries."""
    values = {"z": torch.zeros(2, 3), "none": torch.zeros(0, 4), "b": torch.tensor([[0.3, -0.77], [0.01, 1.3]])}
    stream, top = rng(7), 2 ** (bits - 1) - 1
    torch.rand(6, generator=stream, dtype=torch.float64)
    draws = torch.rand(4, generator=stream, dtype=torch.float64).tolist()
    expected = []
    for value, draw in zip(values["b"].flatten().tolist(), draws, strict=True):
        level = value / float(values["b"].max()) * top
        expected.append((math.floor(level) + (draw < level - math.floor(level))) / top * 1.3)
    out = sent(Quantise(bits=bits), values, seed=7)
    assert out.delta["b"].flatten().tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert not out.delta["z"].any() and out.delta["none"].shape == (0, 4)
    assert out.encoded == 3 * 4 + math.ceil(4 * bits / 8)


def test_settings_left_out_are_the_usual_ones():
    assert repr(SharePercentile()) == "SharePercentile(keep=0.1, bound=None, error_feedback=False)"
    assert repr(TopK()) == "TopK(keep=0.01, per_layer=False, error_feedback=False)"
    assert repr(ScaledSign()) == "ScaledSign(error_feedback=True)"
    assert repr(Quantise()) == "Quantise(bits=8, error_feedback=False)"


# Bytes

def floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def test_sparse_codes_by_hand():
    some = {"b": torch.zeros(3, 10), "a": torch.zeros(10)}
    some["a"][7] = -2.0
    assert encode_sparse(some) == b"\x02" + struct.pack("<I", 37) + floats(-2.0)  # shorter than 5 bytes of a bitmap
    few = torch.zeros(32)
    few[[1, 17]] = torch.tensor([1.5, -0.25])
    assert encode_sparse({"w": few}) == b"\x01" + bytes([0b01000000, 0, 0b01000000, 0]) + floats(1.5, -0.25)
    assert encode_sparse({"w": torch.tensor([0.5, 3.0])}) == b"\x00" + floats(0.5, 3.0)
    one, lacks_one = torch.zeros(32), torch.ones(32)  # of codes of one length the first of the three
    one[9], lacks_one[9] = 1.0, 0.0
    assert encode_sparse({"w": one}) == b"\x01" + bytes([0, 0b01000000, 0, 0]) + floats(1.0)
    assert encode_sparse({"w": lacks_one}) == b"\x00" + floats(*lacks_one.tolist())
    most = torch.ones(200)
    most[:6] = 0  # a bitmap takes 25 bytes and saves 24
    assert encode_sparse({"w": most}) == b"\x00" + floats(*most.tolist())
    most[6] = 0
    assert len(encode_sparse({"w": most})) == 1 + 25 + 4 * 193


def test_codes_of_levels_by_hand():
    """Lowest bit first, three bits each: 1, 6 and 3 are 100 011 110."""
    wire = encode_levels([torch.tensor([5, 5]), torch.tensor([[1, 6, 3]])], [0.0, 1.5], bits=3)
    assert wire == floats(0.0, 1.5) + bytes([0b10001111, 0])
    back = decode_levels(wire, {"z": torch.zeros(2), "a": torch.zeros(1, 3)}, bits=3)
    assert back["z"].tolist() == [0.0, 0.0] and back["a"].tolist() == [[-1.0, 1.5, 0.0]]
    with pytest.raises(ValueError, match="zip"):
        encode_levels([torch.tensor([1, 0])], [1.0, 2.0], bits=1)


@settings(max_examples=60, deadline=None)
@given(irregular.shapes(), st.sampled_from([0.0, 0.01, 0.02, 0.2, 0.9, 1.0]), st.integers(0, 99))
def test_sparse_code_is_exact_and_never_longer_than_dense(shape, density, seed):
    source = rng(seed)
    delta = {f"t{k}": torch.randn(s, generator=source) * (torch.rand(s, generator=source) < density)
             for k, s in enumerate(shape)}
    wire = encode_sparse(delta)
    back = decode_sparse(wire, delta)
    assert all(back[name].equal(t) and back[name].shape == t.shape for name, t in delta.items())
    n, k = sum(t.numel() for t in delta.values()), sum(int((t != 0).sum()) for t in delta.values())
    assert len(wire) == sparse_bytes(n, k) == 1 + min(8 * k, math.ceil(n / 8) + 4 * k, 4 * n)


@settings(max_examples=60, deadline=None)
@given(irregular.shapes(), st.integers(1, 16), st.integers(0, 99))
def test_codes_of_any_width_come_back(shape, bits, seed):
    source = rng(seed)
    like = {f"t{k}": torch.zeros(s) for k, s in enumerate(shape)}
    codes = [torch.randint(0, max(2, 2**bits - 1), s, generator=source) for s in shape]
    wire = encode_levels(codes, [2.0] * len(shape), bits=bits)
    assert len(wire) == sum(4 + math.ceil(t.numel() * bits / 8) for t in like.values())
    middle = 0.5 if bits == 1 else 2 ** (bits - 1) - 1
    for (name, back), code in zip(decode_levels(wire, like, bits=bits).items(), codes, strict=True):
        torch.testing.assert_close(back, (2 * (code - middle) / middle).float(), rtol=1e-6, atol=0)
        assert back.shape == like[name].shape


@pytest.mark.parametrize("technique", ALL, ids=repr)
def test_bytes_are_those_of_an_encoding_of_what_is_averaged(technique):
    values = {"a": torch.randn(40, 50, generator=rng(1)), "b": torch.randn(301, generator=rng(2)),
              "personal": torch.zeros(64)}
    out = sent(technique, values)
    assert out.nbytes == out.encoded < 4 * 2365 / 2
    if isinstance(technique, SharePercentile | TopK):
        wire = encode_sparse(out.delta)
        again = decode_sparse(wire, values)
    else:
        bits = getattr(technique, "bits", 1)
        scales = [float(t.abs().max()) for t in out.delta.values()]
        if bits == 1:
            codes = [(t > 0).long() for t in out.delta.values()]
        else:
            codes = [(t / (s or 1) * 3).round().long() + 3 for t, s in zip(out.delta.values(), scales, strict=True)]
        wire = encode_levels(codes, scales, bits=bits)
        again = decode_levels(wire, values, bits=bits)
    assert len(wire) == out.encoded
    for name in values:
        torch.testing.assert_close(again[name], out.delta[name], rtol=1e-6, atol=0)


def test_damaged_bytes_are_refused():
    like = {"a": torch.randn(100, generator=rng())}
    for k in (1, 10, 90):
        wire = encode_sparse(sent(TopK(keep=k / 100), like).delta)
        for bad in (wire[:-1], wire + b"\x00", b"\x07" + wire[1:], b""):
            with pytest.raises(ValueError, match="not a sparse code"):
                decode_sparse(bad, like)
    wire = encode_levels([torch.ones(100, dtype=torch.int64)], [1.0], bits=5)
    for bad in (wire[:-1], wire + b"\x00", b"\x01"):
        with pytest.raises(ValueError, match="bytes"):
            decode_levels(bad, like, bits=5)


# Error feedback

@pytest.mark.parametrize("technique", [t for t in ALL if t.error_feedback], ids=repr)
def test_with_error_feedback_nothing_is_lost(technique):
    state, total, arrived = SiteState(), torch.zeros(200), torch.zeros(200)
    for number in range(12):
        wanted = torch.randn(200, generator=rng(number))
        total += wanted
        arrived += sent(technique, {"w": wanted}, state, seed=number).delta["w"]
    torch.testing.assert_close(arrived + state.own["w"], total, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(arrived, total, atol=0.1)


@pytest.mark.parametrize("technique", [t for t in ALL if not t.error_feedback], ids=repr)
def test_without_error_feedback_nothing_is_remembered(technique):
    state = SiteState()
    first = sent(technique, {"w": torch.randn(50, generator=rng())}, state)
    again = sent(technique, {"w": torch.randn(50, generator=rng())}, state)
    assert not any(state.namespaces.values()) and not state.diagnostics and first.delta["w"].equal(again.delta["w"])


def test_with_error_feedback_a_small_but_steady_change_arrives():
    """Half of two entries is sent; without a state the smaller one never is, though it always points one way."""
    for feedback, low, high in ((False, 0.0, 0.0), (True, 8.5, 10.1)):
        arrived, state = torch.zeros(2), SiteState()
        for _ in range(100):
            arrived += sent(TopK(keep=0.5, error_feedback=feedback), {"x": torch.tensor([1.0, 0.1])}, state).delta["x"]
        assert low <= float(arrived[1]) <= high


def test_what_waits_for_another_model_is_refused():
    state, technique = SiteState(), TopK(keep=0.5, error_feedback=True)
    sent(technique, {"w": torch.ones(3)}, state)
    with pytest.raises(PrivacyError, match="another model"):
        sent(technique, {"w": torch.ones(4)}, state)


# Runs

def test_sending_everything_equals_a_plain_run():
    plain = federate(trainer(), blob_sites(), rounds=2, progress=False)
    for technique in (SharePercentile(keep=1.0), TopK(keep=1.0, error_feedback=True)):
        run = federate(trainer(), blob_sites(), privacy=technique, rounds=2, progress=False)
        assert weights_sha256(run.state.params) == weights_sha256(plain.state.params)
        assert run.table()["bytes"].tolist() == [b + 2 for b in plain.table()["bytes"]]  # a byte names the code


@pytest.mark.parametrize("technique", [ALL[1], ALL[4], ALL[6], ALL[3]], ids=repr)
def test_a_resumed_run_equals_a_whole_one_and_claims_nothing(technique, tmp_path):
    whole = federate(trainer(), blob_sites(), privacy=technique, rounds=3, progress=False)
    for rounds in (1, 3):
        history = federate(trainer(), blob_sites(), privacy=technique, rounds=rounds, progress=False,
                           checkpoint=tmp_path / "run")
    assert weights_sha256(history.state.params) == weights_sha256(whole.state.params)
    assert "no formal guarantee" in repr(history) and history.spent().empty
    dense = next(each_round(trainer(), blob_sites())).sites["site-0"]["bytes"]
    assert (history.sites()["bytes"] < dense / 2).all()


@pytest.mark.parametrize("make", [
    lambda: SharePercentile(keep=0.0), lambda: SharePercentile(keep=1.1), lambda: SharePercentile(keep=math.nan),
    lambda: SharePercentile(bound=0.0), lambda: TopK(keep=-0.1), lambda: Quantise(bits=1), lambda: Quantise(bits=17),
    lambda: Quantise(bits=3.5)])
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="got"):
        make()


def test_techniques_print_as_the_code_that_makes_them():
    for technique in ALL:
        assert repr(eval(repr(technique))) == repr(technique)


def test_a_share_is_a_number_of_entries_whatever_it_is_in_binary():
    """0.1 of 30 is 3, although 0.1 * 30 is a little more; a part of an entry is a whole one, and one is always sent."""
    assert [entries(0.1, size) for size in (30, 31, 10, 3)] == [3, 4, 1, 1]
    assert entries(1.0, 7) == 7 and entries(0.07, 100) == 7 and entries(1e-6, 5) == 1
