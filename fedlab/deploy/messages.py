"""Messages between server and sites: tensors as safetensors, everything else as JSON in the header.

Reading executes nothing. A message that is not exactly of this form is refused as a whole with a `FedlabError` that
names its sender. Tensors arrive with the types, shapes, bits and order with which they were sent: the order of a
model's tensors is the order in which noise is drawn.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from itertools import accumulate
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedlab.core.errors import DataError, FedlabError, PrivacyBudgetExhausted, PrivacyError, RunError, SiteError
from fedlab.core.types import Answer, Failure, ServerState, Spent, Tensors, Update, Withdrawal

__all__ = ["are_notes", "limit_for", "pack_answer", "pack_state", "pack_weights", "printable", "strict_json",
           "unpack_answer", "unpack_state", "unpack_weights"]

_Groups = dict[tuple[str, str], dict[str, torch.Tensor]]

_FORMAT = "fedlab-message-3"
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
           torch.int8, torch.uint8, torch.bool)
_LARGEST_HEADER, _LARGEST_MESSAGE, _LARGEST_NOTE = 8 * 2**20, 16 * 2**30, 2**20
_LONGEST_TEXT = 4000
_ERRORS: dict[str, type[FedlabError]] = {
    cls.__name__: cls for cls in (FedlabError, PrivacyError, PrivacyBudgetExhausted, RunError, DataError)}


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_TEXT + 2


def _is_spent(value: Any) -> bool:
    match value:
        case [epsilon, delta, "patient" | "site", accountant, adjacency, bool()]:
            return (epsilon == "inf" or _is_number(epsilon)) and _is_number(delta) and all(
                map(_is_text, (accountant, adjacency)))
    return False


def _or_none(is_valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_valid(value)


def _are_metrics(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= 1000 and all(map(_is_number, value.values()))


#: For each kind of message the checks of its fields, and the groups that its tensors belong to.
_KINDS: dict[str, tuple[dict[str, Callable[[Any], bool]], set[str]]] = {
    "weights": ({}, {"weights"}),
    "state": ({"round": _is_count}, {"params", "buffers", "moments", "broadcast"}),
    "update": ({"site": _is_text, "weight": _is_number, "steps": _is_count, "metrics": _are_metrics,
                "spent": lambda value: isinstance(value, list) and len(value) <= 100 and all(map(_is_spent, value)),
                "encoded": _or_none(_is_count), "round": _or_none(_is_count), "seconds": _is_number},
               {"delta", "buffers"}),
    # A withdrawal or a failure.
    "refusal": ({"site": _is_text, "type": _is_text, "round": _or_none(_is_count), "stage": _or_none(_is_text),
                 "text": _is_text}, set()),
}


def limit_for(params: Tensors) -> int:
    """Largest size in bytes of a message about this model: its weights eight times in float64, and a mebibyte."""
    return 8 * 8 * sum(t.numel() for t in params.values()) + 512 * len(params) + 2**20


def pack_weights(params: Tensors) -> bytes:
    """Weights as one message."""
    return _pack("weights", {}, [("weights", "", params)])


def unpack_weights(data: bytes, *, sender: str = "the server", limit: int | None = None) -> dict[str, torch.Tensor]:
    """Weights from a message of `pack_weights`, of at most `limit` bytes."""
    return _unpack(data, ("weights",), sender=sender, limit=limit)[2].get(("weights", ""), {})


def pack_state(state: ServerState) -> bytes:
    """What a site is shown of the server's state, of `ServerState.at(site)`: params, buffers, moments and
    broadcast.

    Raises:
        ValueError: it holds the models of several sites.
    """
    if state.models:
        raise ValueError("this state holds the models of single sites; send each site state.at(site) only")
    moments = [("moments", name, tensors) for name, tensors in state.moments.items()]
    return _pack("state", {"round": state.round},
                 [("params", "", state.params), ("buffers", "", state.buffers), *moments,
                  ("broadcast", "", state.broadcast)])


def unpack_state(data: bytes, *, sender: str = "the server", limit: int | None = None) -> ServerState:
    """The state from a message of `pack_state`, of at most `limit` bytes."""
    _, note, groups = _unpack(data, ("state",), sender=sender, limit=limit)
    moments = {name: tensors for (group, name), tensors in groups.items() if group == "moments"}
    return ServerState(round=note["round"], params=groups.get(("params", ""), {}), moments=moments,
                       buffers=groups.get(("buffers", ""), {}), broadcast=groups.get(("broadcast", ""), {}))


def pack_answer(answer: Answer) -> bytes:
    """The result of a site's work as one message.

    Raises:
        FedlabError: it holds numbers that cannot be written, such as NaN.
    """
    if isinstance(answer, Update):
        note = {f.name: getattr(answer, f.name) for f in fields(Update) if f.name not in ("delta", "buffers")}
        note["spent"] = [["inf" if s.epsilon == math.inf else s.epsilon, *s[1:]] for s in answer.spent]
        return _pack("update", {**note, "metrics": dict(answer.metrics)},
                     [("delta", "", answer.delta), ("buffers", "", answer.buffers)])
    note = {"site": answer.site, "type": "Withdrawal", "round": None, "stage": None}
    if isinstance(answer, Withdrawal):
        text = answer.reason
    elif isinstance(answer.error, SiteError):
        note |= {"type": "SiteError", "round": answer.error.round, "stage": answer.error.stage}
        text = answer.error.reason
    else:
        kind, text = type(answer.error).__name__, str(answer.error)
        note["type"] = kind if kind in _ERRORS else "FedlabError"
    short = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} …"
    return _pack("refusal", {**note, "text": short}, [])


def unpack_answer(data: bytes, *, site: str, limit: int | None = None) -> Answer:
    """The answer from a message of `pack_answer`, of at most `limit` bytes.

    The values of an update are checked where it enters the model, as of any update. `site` is the sender, as the
    transport knows it; a message in another site's name is refused.
    """
    kind, note, groups = _unpack(data, ("update", "refusal"), sender=site, limit=limit)
    if note["site"] != site:
        raise _refused(site, f"it says it is of {note['site'][:80]!r}")
    if kind == "update":
        spent = tuple(Spent(math.inf if epsilon == "inf" else epsilon, delta, unit, printable(accountant),
                            printable(adjacency), repeats)
                      for epsilon, delta, unit, accountant, adjacency, repeats in note["spent"])
        return Update(delta=groups.get(("delta", ""), {}), buffers=groups.get(("buffers", ""), {}),
                      **{**note, "spent": spent})
    text = printable(note["text"])
    match note:
        case {"type": "Withdrawal", "round": None, "stage": None}:
            return Withdrawal(site, text)
        case {"type": "SiteError", "round": int() as round, "stage": str() as stage}:
            return Failure(site, SiteError(site, round, printable(stage)[:40], text))
        case {"type": kind, "round": None, "stage": None} if kind in _ERRORS:
            return Failure(site, _ERRORS[kind](text))
    raise _refused(site, "it names an error that fedlab does not have")


def _pack(kind: str, note: Mapping[str, Any], groups: Sequence[tuple[str, str, Tensors]]) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    names: list[list[str]] = []
    stored: set[int] = set()
    for group, part, members in groups:
        for name, tensor in members.items():
            values = tensor.detach().cpu().contiguous()
            if values.data_ptr() in stored:  # a safetensors file holds each tensor on its own
                values = values.clone()
            stored.add(values.data_ptr())
            tensors[str(len(names))] = values
            names.append([group, part, name])
    try:
        text = json.dumps({"format": _FORMAT, "kind": kind, "tensors": names, **note}, allow_nan=False)
        return save(tensors, metadata={"fedlab": text})
    except (ValueError, TypeError, SafetensorError) as error:
        raise FedlabError(f"this {kind} can't be sent: {error}") from error


def _unpack(data: bytes, kinds: tuple[str, ...], *, sender: str, limit: int | None,
            ) -> tuple[str, dict[str, Any], _Groups]:
    """Kind, fields and tensors by group of a message of one of these kinds, checked against its header."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise _refused(sender, f"expected bytes, got {type(data).__name__}")
    data = bytes(data)
    note = _header(data, sender, _LARGEST_MESSAGE if limit is None else limit)
    kind, form, names = note.pop("kind", None), note.pop("format", None), note.pop("tensors", None)
    if form != _FORMAT or kind not in kinds:
        raise _refused(sender, f"expected {' or '.join(map(repr, kinds))} in format {_FORMAT!r}, got "
                               f"{str(kind)[:40]!r} in {str(form)[:40]!r}")
    checks, known = _KINDS[kind]
    if note.keys() != checks.keys():
        raise _refused(sender, f"a message of kind {kind!r} has the fields {sorted(checks)}")
    if invalid := [name for name, is_valid in checks.items() if not is_valid(note[name])]:
        raise _refused(sender, f"its values of {', '.join(invalid)} are not valid")
    if not isinstance(names, list) or not all(
            isinstance(n, list) and len(n) == 3 and all(isinstance(part, str) for part in n) for n in names):
        raise _refused(sender, "its tensors have invalid names")
    if len(set(map(tuple, names))) != len(names):
        raise _refused(sender, "two of its tensors have the same name")
    if any(group not in known or (part and group != "moments") for group, part, _ in names):
        raise _refused(sender, f"it has a group of tensors that a message of kind {kind!r} does not have")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError, AssertionError) as error:
        raise _refused(sender, f"its tensors cannot be read ({str(error)[:200]})") from error
    if tensors.keys() != {str(k) for k in range(len(names))}:
        raise _refused(sender, "its tensors are not those that its header names")
    if any(t.dtype not in _DTYPES or t.dim() > 16 or any(n >= 2**40 for n in t.shape) for t in tensors.values()):
        raise _refused(sender, "one of its tensors has a type or shape that fedlab does not send")
    groups: _Groups = {}
    for k, (group, part, name) in enumerate(names):
        groups.setdefault((group, part), {})[name] = tensors[str(k)]
    return kind, note, groups


def _header(data: bytes, sender: str, limit: int) -> dict[str, Any]:
    """Fedlab's note in the header."""
    if len(data) > limit:
        raise _refused(sender, f"it has {len(data)} bytes, at most {limit} are expected")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= min(_LARGEST_HEADER, len(data) - 8):
        raise _refused(sender, "it is truncated or no safetensors message")
    match strict_json(data[8:8 + length], sender=sender):
        case {"__metadata__": {"fedlab": str() as text, **others}} if not others:
            note = strict_json(text.encode("utf-8", "surrogatepass"), sender=sender)
            if isinstance(note, dict):
                return note
    raise _refused(sender, "its header has no note of fedlab, which is a JSON object")


def strict_json(data: bytes, *, sender: str) -> Any:
    """JSON without what JSON leaves open: unique names in every object, finite numbers of limited size.

    Raises:
        FedlabError: the data are not such JSON.
    """
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            raise ValueError("an object has the same name twice")
        return out

    def real(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text[:40]} is no finite number")
        return value

    def whole(text: str) -> int:
        if len(text) > 20 or not -2**63 <= int(text) < 2**63:
            raise ValueError(f"{text[:40]} is too large a number")
        return int(text)

    try:
        text = data.decode("utf-8")
        brackets = re.findall(r"[][{}]", re.sub(r'"(?:[^"\\]|\\.)*+"?', "", text, flags=re.DOTALL))
        # Nested objects are read by recursion.
        if len(brackets) > 200_000 or max(accumulate(1 if b in "[{" else -1 for b in brackets), default=0) > 100:
            raise ValueError("it is nested too deeply or has too many parts")
        return json.loads(text, object_pairs_hook=pairs, parse_constant=real, parse_float=real, parse_int=whole)
    except (ValueError, RecursionError) as error:  # decoding errors are ValueErrors
        raise _refused(sender, f"it holds no valid JSON ({str(error)[:200]})") from error


def are_notes(value: object, sites: Collection[str]) -> bool:
    """Whether these are messages of an exchange, short and by the name of a site or "server"."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and (name in sites or name == "server") and isinstance(message, bytes)
        and len(message) <= _LARGEST_NOTE for name, message in value.items())


def printable(text: str) -> str:
    """Text from outside without characters that act on a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _refused(sender: str, reason: str) -> FedlabError:
    return FedlabError(f"the message of {sender} was refused: {reason}")
