"""Messages come back bit for bit, and whatever else comes is refused with the name of who sent it."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedlab import FedlabError, PrivacyError, Update
from fedlab.core import ServerState, SiteError, Spent, weights_sha256
from fedlab.core.errors import DataError, PrivacyBudgetExhausted, RunError
from fedlab.core.types import Failure, SiteState, Withdrawal
from fedlab.deploy.messages import (
    limit_for,
    pack_answer,
    pack_state,
    pack_weights,
    unpack_answer,
    unpack_state,
    unpack_weights,
)
from fedlab.run.site_states import pack_site_state, unpack_site_state

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16,
          torch.int64, torch.int32, torch.uint8, torch.bool)


def same(one: Any, other: Any) -> bool:
    """Same names in the same order, dtypes, shapes and bits."""
    return list(one) == list(other) and weights_sha256(one) == weights_sha256(other)


@st.composite
def tensor(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(-9, 9, shape, generator=rng).double().div(7).to(draw(st.sampled_from(DTYPES)))


name = st.text(max_size=12)
tensors = st.dictionaries(name, tensor(), max_size=4)
number = st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 2**53)
spent = st.builds(Spent, number.map(abs) | st.just(math.inf), st.floats(0, 1), st.sampled_from(["patient", "site"]),
                  st.just("rdp"), st.text("abc ", max_size=9))
updates = st.builds(Update, site=st.just("a"), delta=tensors, weight=number, steps=st.integers(0, 9),
                    metrics=st.dictionaries(name, number, max_size=3), spent=st.lists(spent, max_size=2).map(tuple),
                    encoded=st.none() | st.integers(0, 99), round=st.none() | st.integers(0, 99), seconds=number)


@settings(max_examples=100, deadline=None)
@given(updates)
def test_updates_come_back_as_they_were(update: Update) -> None:
    back = unpack_answer(pack_answer(update), site="a")
    assert isinstance(back, Update) and same(back.delta, update.delta)
    for field in ("site", "weight", "steps", "metrics", "spent", "encoded", "round", "seconds"):
        assert repr(getattr(back, field)) == repr(getattr(update, field))


@settings(max_examples=100, deadline=None)
@given(tensors, st.dictionaries(name, tensors, max_size=2), tensors, tensors, st.integers(0, 10**6))
def test_states_come_back_without_what_is_the_servers_own(
        params: Any, moments: Any, broadcast: Any, secret: Any, round: int) -> None:
    state = ServerState(round=round, params=params, moments=moments, broadcast=broadcast, namespaces={"own": secret})
    back = unpack_state(pack_state(state))
    assert back.round == round and same(back.params, params)
    assert all(same(back.moments.get(k, {}), v) for k, v in moments.items()) and back.moments.keys() <= moments.keys()
    assert same(back.broadcast, broadcast) and not back.namespaces
    with pytest.raises(ValueError, match=r"state\.at\(site\)"):
        pack_state(ServerState(round=0, params=params, models={"a": params}))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(name, tensors, max_size=4), st.text(max_size=9))
def test_site_states_come_back_without_their_secrets(namespaces: Any, run: str) -> None:
    state = SiteState(enrolled=True, updates=2, namespaces=namespaces, diagnostics={"norm": torch.ones(3)},
                      ledger={"entries": [1, "two"]}, secrets={"key": "secret"})
    data = pack_site_state(state, site="a", run=run)
    back = unpack_site_state(data, what="the file", site="a", run=run)
    assert back.namespaces.keys() == namespaces.keys()
    assert all(same(back.namespaces[k], v) for k, v in namespaces.items())
    assert (back.enrolled, back.updates, back.ledger) == (True, 2, state.ledger)
    assert same(back.diagnostics, state.diagnostics) and not back.secrets
    with pytest.raises(RunError, match="the file is damaged"):
        unpack_site_state(data, what="the file", site="a", run=run + "x")


@settings(max_examples=100, deadline=None)
@given(tensors)
def test_weights_come_back_in_their_order(params: Any) -> None:
    assert same(unpack_weights(pack_weights(params)), params)


def test_views_and_shared_tensors_are_packed_as_their_values() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    back = unpack_weights(pack_weights({"a": whole.T, "b": whole, "c": whole, "d": whole[1:, ::2]}))
    assert torch.equal(back["a"], whole.T) and torch.equal(back["c"], whole) and torch.equal(back["d"], whole[1:, ::2])
    back["b"][0] = 9
    assert torch.equal(back["c"], whole)


@pytest.mark.parametrize("error", [
    SiteError("a", 3, "fit", "the loss is nan"), PrivacyError("refused"), FedlabError("odd"), DataError("no scan"),
    PrivacyBudgetExhausted("spent")], ids=lambda e: type(e).__name__)
def test_failures_come_back_with_type_stage_and_text(error: FedlabError) -> None:
    back = unpack_answer(pack_answer(Failure("a", error)), site="a")
    assert isinstance(back, Failure) and type(back.error) is type(error) and str(back.error) == str(error)
    if isinstance(error, SiteError):
        assert (back.error.round, back.error.stage) == (3, "fit")  # type: ignore[attr-defined]


def test_texts_are_short_and_act_on_no_terminal() -> None:
    assert unpack_answer(pack_answer(Withdrawal("a", "budget")), site="a") == Withdrawal("a", "budget")
    back = unpack_answer(pack_answer(Withdrawal("a", "\x1b[2J" + "x" * 10**6)), site="a")
    assert isinstance(back, Withdrawal) and len(back.reason) < 5000 and "\x1b" not in back.reason


def test_an_answer_in_another_name_is_refused() -> None:
    for answer in (Update(site="b", delta={}, weight=1.0), Withdrawal("b", ""), Failure("b", FedlabError("x"))):
        with pytest.raises(FedlabError, match=r"message of a was refused: it says it is of 'b'"):
            unpack_answer(pack_answer(answer), site="a")


def test_numbers_that_are_none_are_not_sent() -> None:
    for odd in (math.nan, math.inf):
        with pytest.raises(FedlabError, match="can't be sent"):
            pack_answer(Update(site="a", delta={}, weight=odd))
        with pytest.raises(FedlabError, match="can't be sent"):
            pack_answer(Update(site="a", delta={}, weight=1.0, metrics={"loss": odd}))


MESSAGE = pack_answer(Update(site="a", delta={"w": torch.ones(2, 3), "b": torch.zeros(3)}, weight=2.0, steps=1,
                             metrics={"loss": 0.5}, spent=(Spent(1.0, 1e-5, "patient", "rdp", "one"),), round=0))


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_damaged_messages_are_refused_or_are_still_updates(data: st.DataObject) -> None:
    damaged = bytearray(MESSAGE)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(damaged))) if data.draw(st.booleans()) else len(damaged)
    more = data.draw(st.binary(max_size=8)) if data.draw(st.booleans()) else b""
    try:
        back = unpack_answer(bytes(damaged[:cut]) + more, site="a")
    except FedlabError as error:
        assert "message of a was refused" in str(error)
    else:
        assert back.site == "a"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    for unpack in (unpack_state, unpack_weights, lambda d: unpack_answer(d, site="the server")):
        with pytest.raises(FedlabError, match="message of the server was refused"):
            unpack(data)


def spoilt(**changes: Any) -> bytes:
    """The message with other fields in its note; None as a name's value takes the field away."""
    length = struct.unpack("<Q", MESSAGE[:8])[0]
    header = json.loads(MESSAGE[8:8 + length])
    note = {**json.loads(header["__metadata__"]["fedlab"]), **changes}
    header["__metadata__"]["fedlab"] = json.dumps({k: v for k, v in note.items() if v != "gone"})
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + MESSAGE[8 + length:]


def with_header(text: str, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode() + body


def test_the_undamaged_message_is_read_when_put_together_by_hand() -> None:
    assert isinstance(unpack_answer(spoilt(), site="a"), Update)


@pytest.mark.parametrize("data", [
    spoilt(weight="2"), spoilt(weight=True), spoilt(weight=None), spoilt(steps=-1), spoilt(steps=1.5),
    spoilt(metrics=[]), spoilt(metrics={"loss": "x"}), spoilt(metrics={"loss": math.nan}), spoilt(spent=[[1, 2]]),
    spoilt(spent=[[1.0, 1e-5, "cat", "rdp", "x"]]), spoilt(spent="x"), spoilt(round=-1), spoilt(encoded="1"),
    spoilt(seconds=[]), spoilt(seconds=math.inf), spoilt(more=1), spoilt(weight="gone"), spoilt(kind="state"),
    spoilt(kind="pickle"), spoilt(kind=["update"]), spoilt(format="fedlab-message-0"),
    spoilt(site=["a"]), spoilt(tensors=[]),
    spoilt(tensors=[["delta", "", "w"]]), spoilt(tensors=[["delta", "", "w"], ["delta", "", "w"]]),
    spoilt(tensors=[["params", "", "w"], ["delta", "", "b"]]), spoilt(tensors=[["delta", "", "w"], ["delta", "", 3]]),
    spoilt(tensors={"0": "w"}), spoilt(weight=10**400), spoilt(kind="withdrawal"),
    b"", b"\0" * 8, MESSAGE[:-1], MESSAGE + b"\0", b"\xff" * 8 + MESSAGE[8:], MESSAGE[:7],
    save({"0": torch.ones(1)}), save({"0": torch.ones(1)}, metadata={"fedlab": "[1]"}),
    save({"0": torch.ones(1)}, metadata={"fedlab": "[" * 90_000}),
    save({"0": torch.ones(1)}, metadata={"fedlab": '{"kind": "update", "kind": "update"}'}),
    with_header('{"__metadata__": {"fedlab": "{}"}, "__metadata__": {"fedlab": "{}"}}'), with_header("[" * 200_000),
    with_header('{"0": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}', b"\0" * 4),
    with_header('{"__metadata__": {"fedlab": "{}"}, "0": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}'),
    "text", None, 7, ["list"], {"dict": 1},
], ids=lambda d: repr(d)[-30:])
def test_anything_else_is_refused_with_the_senders_name(data: Any) -> None:
    with pytest.raises(FedlabError, match="message of a was refused"):
        unpack_answer(data, site="a")


def test_the_shape_of_a_tensor_cannot_be_larger_than_its_bytes() -> None:
    length = struct.unpack("<Q", MESSAGE[:8])[0]
    header = MESSAGE[8:8 + length].decode()
    for shape in ("[4294967296,4294967296]", "[2,3,0]", "[-2,-3]", "[6.0]", "[1099511627776,0]"):
        data = with_header(header.replace("[2,3]", shape), MESSAGE[8 + length:])
        with pytest.raises(FedlabError, match="message of a was refused"):
            unpack_answer(data, site="a")


def test_sizes_are_bounded_by_the_model() -> None:
    params = {"w": torch.zeros(1000)}
    limit = limit_for(params)
    double = Update(site="a", delta={"w": torch.zeros(1000, dtype=torch.float64)}, weight=1.0)
    assert len(pack_answer(double)) < limit < 2**21
    large = pack_answer(Update(site="a", delta={"w": torch.zeros(limit // 8 + 1, dtype=torch.float64)}, weight=1.0))
    with pytest.raises(FedlabError, match=rf"it has {len(large)} bytes, at most {limit} are expected"):
        unpack_answer(large, site="a", limit=limit)
    with pytest.raises(FedlabError, match="at most 100"):
        unpack_weights(pack_weights(params), limit=100)


def test_a_state_has_no_other_groups() -> None:
    with pytest.raises(FedlabError, match="expected 'state'"):
        unpack_state(MESSAGE)
    with pytest.raises(FedlabError, match="expected 'weights'"):
        unpack_weights(pack_state(ServerState(round=0, params={})))
