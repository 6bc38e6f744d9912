"""Messages between server and sites: tensors as safetensors, everything else as JSON in the header.

Reading executes nothing. A message that is not exactly of this form is refused as a whole, and the error names its
sender. Tensors arrive with the types, shapes, bits and order with which they were sent: the order of a model's tensors
is the order in which noise is drawn.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
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

_FORMAT = "fedlab-message-2"
#: For each kind of message its fields, and the groups that its tensors belong to.
_KINDS: dict[str, tuple[set[str], set[str]]] = {
    "weights": (set(), {"weights"}),
    "state": ({"round"}, {"params", "moments", "broadcast"}),
    "update": ({f.name for f in fields(Update)} - {"delta"}, {"delta"}),
    "refusal": ({"site", "type", "round", "stage", "text"}, set()),  # a withdrawal or a failure
}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
           torch.int8, torch.uint8, torch.bool)
_LARGEST_HEADER, _LARGEST_MESSAGE, _LARGEST_NOTE = 8 * 2**20, 16 * 2**30, 2**20
_LONGEST_TEXT = 4000
_ERRORS: dict[str, type[FedlabError]] = {
    cls.__name__: cls for cls in (FedlabError, PrivacyError, PrivacyBudgetExhausted, RunError, DataError)}


def limit_for(params: Tensors) -> int:
    """Largest size in bytes of a message about this model: its weights eight times in float64, and a mebibyte."""
    return 8 * 8 * sum(t.numel() for t in params.values()) + 512 * len(params) + 2**20


def pack_weights(params: Tensors) -> bytes:
    """Weights as one message."""
    return _pack("weights", {}, [("weights", "", params)])


def unpack_weights(data: bytes, *, sender: str = "the server", limit: int | None = None) -> dict[str, torch.Tensor]:
    """Weights from a message of `pack_weights`, of at most `limit` bytes.

    Raises:
        FedlabError: another message; the error names the sender.
    """
    _, _, groups = _unpack(data, ("weights",), sender=sender, limit=limit)
    return groups.get(("weights", ""), {})


def pack_state(state: ServerState) -> bytes:
    """What a site is shown of the server's state, of `ServerState.at(site)`: params, moments and broadcast.

    Raises:
        ValueError: it holds the models of several sites.
    """
    if state.models:
        raise ValueError("this state holds the models of single sites; send each site state.at(site) only")
    moments = [("moments", name, tensors) for name, tensors in state.moments.items()]
    return _pack("state", {"round": state.round},
                 [("params", "", state.params), *moments, ("broadcast", "", state.broadcast)])


def unpack_state(data: bytes, *, sender: str = "the server", limit: int | None = None) -> ServerState:
    """The state from a message of `pack_state`, of at most `limit` bytes.

    Raises:
        FedlabError: another message; the error names the sender.
    """
    _, note, groups = _unpack(data, ("state",), sender=sender, limit=limit)
    if not _count(note["round"]):
        raise _odd(sender, "it has no valid round number")
    moments = {name: tensors for (group, name), tensors in groups.items() if group == "moments"}
    return ServerState(round=note["round"], params=groups.get(("params", ""), {}), moments=moments,
                       broadcast=groups.get(("broadcast", ""), {}))


def pack_answer(answer: Answer) -> bytes:
    """The result of a site's work as one message.

    Raises:
        FedlabError: it holds numbers that cannot be written, such as NaN.
    """
    if isinstance(answer, Update):
        note = {f.name: getattr(answer, f.name) for f in fields(Update) if f.name != "delta"}
        note["spent"] = [["inf" if s.epsilon == math.inf else s.epsilon, *s[1:]] for s in answer.spent]
        return _pack("update", {**note, "metrics": dict(answer.metrics)}, [("delta", "", answer.delta)])
    error, text = (None, answer.reason) if isinstance(answer, Withdrawal) else (answer.error, str(answer.error))
    kind = "Withdrawal" if error is None else type(error).__name__
    note = {"type": kind if kind in ("Withdrawal", *_ERRORS) else "FedlabError", "round": None, "stage": None}
    if isinstance(error, SiteError):
        note, text = {"type": "SiteError", "round": error.round, "stage": error.stage}, error.reason
    short = text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} …"
    return _pack("refusal", {"site": answer.site, **note, "text": short}, [])


def unpack_answer(data: bytes, *, site: str, limit: int | None = None) -> Answer:
    """The answer from a message of `pack_answer`, of at most `limit` bytes.

    The values of an update are checked where it enters the model, as of any update. `site` is the sender, as the
    transport knows it.

    Raises:
        FedlabError: another message, or one in another site's name.
    """
    kind, note, groups = _unpack(data, ("update", "refusal"), sender=site, limit=limit)
    if note["site"] != site:
        raise _odd(site, f"it says it is of {str(note['site'])[:80]!r}")
    return _update(note, groups.get(("delta", ""), {}), site) if kind == "update" else _refusal(note, site)


def _update(note: Mapping[str, Any], delta: Tensors, site: str) -> Update:
    metrics, spent = note["metrics"], note["spent"]
    if not (_number(note["weight"]) and _count(note["steps"]) and _number(note["seconds"])
            and (note["encoded"] is None or _count(note["encoded"]))
            and (note["round"] is None or _count(note["round"]))):
        raise _odd(site, "its weight, steps, size, round or seconds is no valid number")
    if not isinstance(metrics, dict) or len(metrics) > 1000 or not all(map(_number, metrics.values())):
        raise _odd(site, "its metrics are not numbers by name")
    if not isinstance(spent, list) or len(spent) > 100:
        raise _odd(site, "it has no valid list of privacy spent")
    return Update(delta=delta, **{**note, "spent": tuple(_spent(one, site) for one in spent)})


def _spent(value: Any, site: str) -> Spent:
    match value:
        case [epsilon, delta, "patient" | "site" as unit, str() as accountant, str() as adjacency]:
            epsilon = math.inf if epsilon == "inf" else epsilon
            if _number(epsilon) and _number(delta):
                return Spent(epsilon, delta, unit, _clean(accountant, site), _clean(adjacency, site))
    raise _odd(site, "one of its statements of privacy spent is invalid")


def _refusal(note: Mapping[str, Any], site: str) -> Withdrawal | Failure:
    text = _clean(note["text"], site)
    match note:
        case {"type": "Withdrawal", "round": None, "stage": None}:
            return Withdrawal(site, text)
        case {"type": "SiteError", "round": round, "stage": stage} if _count(round):
            return Failure(site, SiteError(site, round, _clean(stage, site)[:40], text))
        case {"type": str() as kind, "round": None, "stage": None} if kind in _ERRORS:
            return Failure(site, _ERRORS[kind](text))
    raise _odd(site, "it names an error that fedlab does not have")


def _pack(kind: str, note: Mapping[str, Any], groups: Sequence[tuple[str, str, Tensors]]) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    names: list[list[str]] = []
    seen: set[int] = set()
    for group, part, members in groups:
        for name, tensor in members.items():
            plain = tensor.detach().cpu().contiguous()
            if plain.data_ptr() in seen:  # a safetensors file holds each tensor on its own
                plain = plain.clone()
            seen.add(plain.data_ptr())
            tensors[str(len(names))] = plain
            names.append([group, part, name])
    try:
        text = json.dumps({"format": _FORMAT, "kind": kind, "tensors": names, **note}, allow_nan=False)
        return save(tensors, metadata={"fedlab": text})
    except (ValueError, TypeError, SafetensorError) as error:
        raise FedlabError(f"this {kind} can't be sent: {error}") from error


def _unpack(data: bytes, kinds: tuple[str, ...], *, sender: str, limit: int | None,
            ) -> tuple[str, dict[str, Any], _Groups]:
    """Kind, fields and tensors by group of a message of one of these kinds, checked against its header."""
    note = _header(data, sender, limit)
    kind, form, names = note.pop("kind", None), note.pop("format", None), note.pop("tensors", None)
    if form != _FORMAT or kind not in kinds:
        raise _odd(sender, f"expected {' or '.join(map(repr, kinds))} in format {_FORMAT!r}, got {str(kind)[:40]!r} in "
                           f"{str(form)[:40]!r}")
    fields, known = _KINDS[kind]
    if note.keys() != fields:
        raise _odd(sender, f"a message of kind {kind!r} has the fields {sorted(fields)}")
    if not isinstance(names, list) or not all(
            isinstance(n, list) and len(n) == 3 and all(isinstance(part, str) for part in n) for n in names):
        raise _odd(sender, "its tensors have invalid names")
    if len({tuple(n) for n in names}) != len(names):
        raise _odd(sender, "two of its tensors have the same name")
    if any(group not in known or (part and group != "moments") for group, part, _ in names):
        raise _odd(sender, f"it has a group of tensors that a message of kind {kind!r} does not have")
    try:
        tensors = load(bytes(data))
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError, AssertionError) as error:
        raise _odd(sender, f"its tensors cannot be read ({str(error)[:200]})") from error
    if tensors.keys() != {str(k) for k in range(len(names))}:
        raise _odd(sender, "its tensors are not those that its header names")
    if any(t.dtype not in _DTYPES or t.dim() > 16 or any(n >= 2**40 for n in t.shape) for t in tensors.values()):
        raise _odd(sender, "one of its tensors has a type or shape that fedlab does not send")
    groups: _Groups = {}
    for k, (group, part, name) in enumerate(names):
        groups.setdefault((group, part), {})[name] = tensors[str(k)]
    return kind, note, groups


def _header(data: bytes, sender: str, limit: int | None) -> dict[str, Any]:
    """Fedlab's note in the header."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise _odd(sender, f"expected bytes, got {type(data).__name__}")
    most = _LARGEST_MESSAGE if limit is None else limit
    if len(data) > most:
        raise _odd(sender, f"it has {len(data)} bytes, at most {most} are expected")
    length = int.from_bytes(bytes(data[:8]), "little")
    if len(data) < 8 or not 2 <= length <= min(_LARGEST_HEADER, len(data) - 8):
        raise _odd(sender, "it is truncated or no safetensors message")
    header = strict_json(bytes(data[8:8 + length]), sender=sender)
    outer = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(outer, dict) or outer.keys() != {"fedlab"} or not isinstance(outer["fedlab"], str):
        raise _odd(sender, "its header has no note of fedlab")
    note = strict_json(outer["fedlab"].encode("utf-8", "surrogatepass"), sender=sender)
    if not isinstance(note, dict):
        raise _odd(sender, "the note in its header is no JSON object")
    return note


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
        raise _odd(sender, f"it holds no valid JSON ({str(error)[:200]})") from error


def are_notes(value: object, sites: Collection[str]) -> bool:
    """Whether these are messages of an exchange, short and by the name of a site or "server"."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and (name in sites or name == "server") and isinstance(message, bytes)
        and len(message) <= _LARGEST_NOTE for name, message in value.items())


def _odd(sender: str, why: str) -> FedlabError:
    return FedlabError(f"the message of {sender} was refused: {why}")


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _clean(text: Any, site: str) -> str:
    if not isinstance(text, str) or len(text) > _LONGEST_TEXT + 2:
        raise _odd(site, f"it holds something else than a text of at most {_LONGEST_TEXT} characters")
    return printable(text)


def printable(text: str) -> str:
    """Text from outside without characters that act on a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
