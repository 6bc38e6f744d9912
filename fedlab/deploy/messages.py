"""What goes between server and sites: tensors as safetensors, everything else as JSON in its header.

Reading executes nothing. A message that is not exactly of this form is refused as a whole, with the name of who sent
it. Tensors come back with the dtypes, shapes, bits and order that they were sent with: the order of a model's tensors
decides in which order noise is drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedlab.core.errors import (
    DataError,
    FedlabError,
    PrivacyBudgetExhausted,
    PrivacyError,
    RunError,
    SiteError,
)
from fedlab.core.types import Failure, Memory, ServerState, Spent, Tensors, Update, Withdrawal
from fedlab.core.weights import weights_sha256

__all__ = ["limit_for", "pack_answer", "pack_memory", "pack_state", "pack_weights", "strict_json", "unpack_answer",
           "unpack_memory", "unpack_state", "unpack_weights"]

Answer = Update | Withdrawal | Failure

_FORMAT = "fedlab-wire-1"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
           "BOOL": torch.bool}
_LARGEST_HEADER, _LARGEST_MESSAGE = 8 * 2**20, 16 * 2**30
_LONGEST_TEXT = 4000
_ERRORS: dict[str, Callable[[str], FedlabError]] = {
    "FedlabError": FedlabError, "PrivacyError": PrivacyError, "PrivacyBudgetExhausted": PrivacyBudgetExhausted,
    "RunError": RunError, "DataError": DataError}


def limit_for(params: Tensors) -> int:
    """Largest message in bytes that has to do with this model: its weights eight times in float64, and a mebibyte."""
    return 8 * 8 * sum(t.numel() for t in params.values()) + 512 * len(params) + 2**20


def pack_weights(params: Tensors) -> bytes:
    """Weights as one message."""
    return _pack("weights", {}, [("", "", params)])


def unpack_weights(data: bytes, *, sender: str = "the server", limit: int | None = None) -> dict[str, torch.Tensor]:
    """Weights from a message of `pack_weights`.

    Args:
        data: what came.
        sender: who it is from, for the error.
        limit: largest size in bytes that is looked at.

    Raises:
        FedlabError: anything else than weights came.
    """
    _, groups = _unpack(data, "weights", (), sender=sender, limit=limit)
    if groups.keys() - {("", "")}:
        raise _odd(sender, "it has groups of tensors that weights don't have")
    return groups.get(("", ""), {})


def pack_state(state: ServerState) -> bytes:
    """The server's state as one message to a site; of the server's memory only the group "broadcast".

    Args:
        state: as `ServerState.at(site)` gives it.

    Raises:
        ValueError: it holds the models of several sites.
    """
    if state.models:
        raise ValueError("this state holds the models of single sites; send each site state.at(site) only")
    groups: list[tuple[str, str, Tensors]] = [("params", "", state.params)]
    groups += [("moments", name, tensors) for name, tensors in state.moments.items()]
    groups += [("memory", name, tensors) for name, tensors in state.memory.items() if name == "broadcast"]
    return _pack("state", {"round": state.round}, groups)


def unpack_state(data: bytes, *, sender: str = "the server", limit: int | None = None) -> ServerState:
    """The state from a message of `pack_state`.

    Raises:
        FedlabError: anything else than a state came.
    """
    note, groups = _unpack(data, "state", ("round",), sender=sender, limit=limit)
    if not _whole(note["round"]):
        raise _odd(sender, "the number of the round is none")
    moments, memory = {}, {}
    for (kind, name), tensors in groups.items():
        if kind == "moments":
            moments[name] = tensors
        elif kind == "memory" and name == "broadcast":
            memory[name] = tensors
        elif (kind, name) != ("params", ""):
            raise _odd(sender, f"it has a group of tensors that no state has ({kind[:40]!r}, {name[:40]!r})")
    return ServerState(round=note["round"], params=groups.get(("params", ""), {}), moments=moments, memory=memory)


def pack_answer(answer: Answer) -> bytes:
    """What came of a site's work as one message.

    Raises:
        FedlabError: it holds numbers that can't be written, such as NaN.
    """
    if isinstance(answer, Update):
        spent = [[_shown(s.epsilon), s.delta, s.unit, s.accountant, s.adjacency] for s in answer.spent]
        note = {"site": answer.site, "weight": answer.weight, "steps": answer.steps, "metrics": dict(answer.metrics),
                "spent": spent, "encoded": answer.encoded, "round": answer.round, "seconds": answer.seconds}
        return _pack("update", note, [("delta", "", answer.delta)])
    if isinstance(answer, Withdrawal):
        return _pack("withdrawal", {"site": answer.site, "reason": _short(answer.reason)}, [])
    error = answer.error
    where = {"round": error.round, "stage": error.stage} if isinstance(error, SiteError) else {
        "round": None, "stage": None}
    text = error.reason if isinstance(error, SiteError) else str(error)
    kind = type(error).__name__
    return _pack("failure", {"site": answer.site, "type": kind if kind in _ERRORS or kind == "SiteError" else
                             "FedlabError", **where, "text": _short(text)}, [])


def unpack_answer(data: bytes, *, site: str, limit: int | None = None) -> Answer:
    """The answer from a message of `pack_answer`.

    What the numbers and tensors of an update mean is checked where it is let in, as of any update.

    Args:
        data: what came.
        site: who sent it, as the transport knows; the answer must say the same.
        limit: largest size in bytes that is looked at.

    Raises:
        FedlabError: no answer came, or one in another site's name.
    """
    kind = _kind(data, site, limit)
    fields = {"update": ("site", "weight", "steps", "metrics", "spent", "encoded", "round", "seconds"),
              "withdrawal": ("site", "reason"), "failure": ("site", "type", "round", "stage", "text")}
    if kind not in fields:
        raise _odd(site, f"it is a message of kind {kind[:40]!r}, expected an answer")
    note, groups = _unpack(data, kind, fields[kind], sender=site, limit=limit)
    if note["site"] != site:
        raise _odd(site, f"it says it is of {str(note['site'])[:80]!r}")
    if kind == "update":
        if groups.keys() - {("delta", "")}:
            raise _odd(site, "it has groups of tensors that no update has")
        return _update(note, groups.get(("delta", ""), {}), site)
    if groups:
        raise _odd(site, f"a {kind} carries no tensors")
    if kind == "withdrawal":
        return Withdrawal(site, _clean(note["reason"], site))
    return Failure(site, _failure(note, site))


def pack_memory(memory: Memory, *, site: str, **note: str | int) -> bytes:
    """A site's memory for its own disk, with a checksum; without the secrets of the moment.

    Args:
        memory: groups of tensors; those whose name begins with "_" are left out.
        site: name of the site.
        note: what must be the same when it is read, such as the run.
    """
    groups: list[tuple[str, str, Tensors]] = [("memory", name, slots) for name, slots in memory.items()
                                              if not name.startswith("_")]
    # A group without tensors would not be found again.
    empty = sorted(name for _, name, slots in groups if not slots)
    return _pack("memory", {"sha256": _checksum(groups), "empty": empty, "about": {"site": site, **note}}, groups)


def unpack_memory(data: bytes, *, site: str, **note: str | int) -> Memory:
    """The memory from `pack_memory`.

    Raises:
        FedlabError: it is damaged or about something else than `note` says.
    """
    found, groups = _unpack(data, "memory", ("sha256", "empty", "about"), sender=f"the disk of {site}", limit=None)
    checksum = _checksum([(kind, name, slots) for (kind, name), slots in groups.items()])
    if found["about"] != {"site": site, **note} or found["sha256"] != checksum:
        raise _odd(f"the disk of {site}", f"it is damaged, or not about {note}")
    return {**{name: {} for name in found["empty"]}, **{name: slots for (_, name), slots in groups.items()}}


def _checksum(groups: Sequence[tuple[str, str, Tensors]]) -> str:
    return weights_sha256({json.dumps([name, key]): t for _, name, slots in groups for key, t in slots.items()})


def _update(note: Mapping[str, Any], delta: Tensors, site: str) -> Update:
    metrics, spent = note["metrics"], note["spent"]
    if not (_number(note["weight"]) and _whole(note["steps"]) and _number(note["seconds"])
            and (note["encoded"] is None or _whole(note["encoded"]))
            and (note["round"] is None or _whole(note["round"]))):
        raise _odd(site, "weight, steps, size, round or seconds are no such numbers")
    if not isinstance(metrics, dict) or len(metrics) > 1000 or not all(map(_number, metrics.values())):
        raise _odd(site, "its metrics are no numbers by name")
    if not isinstance(spent, list) or len(spent) > 100:
        raise _odd(site, "its statements of privacy spent are none")
    return Update(site=site, delta=delta, weight=note["weight"], steps=note["steps"], metrics=metrics,
                  spent=tuple(_spent(one, site) for one in spent), encoded=note["encoded"], round=note["round"],
                  seconds=note["seconds"])


def _spent(value: Any, site: str) -> Spent:
    if not isinstance(value, list) or len(value) != 5:
        raise _odd(site, "its statements of privacy spent are none")
    epsilon, delta, unit, accountant, adjacency = value
    epsilon = math.inf if epsilon == "inf" else epsilon
    if not (isinstance(epsilon, float | int) and not isinstance(epsilon, bool) and _number(delta)
            and unit in ("patient", "site") and isinstance(accountant, str) and isinstance(adjacency, str)):
        raise _odd(site, "its statements of privacy spent are none")
    return Spent(epsilon, delta, unit, _clean(accountant, site), _clean(adjacency, site))


def _failure(note: Mapping[str, Any], site: str) -> FedlabError:
    text = _clean(note["text"], site)
    if note["type"] == "SiteError":
        if not _whole(note["round"]):
            raise _odd(site, "the number of the round is none")
        return SiteError(site, note["round"], _clean(note["stage"], site)[:40], text)
    if not isinstance(note["type"], str) or note["type"] not in _ERRORS or note["stage"] is not None:
        raise _odd(site, "it names an error that fedlab doesn't have")
    return _ERRORS[note["type"]](text)


def _pack(kind: str, note: Mapping[str, Any], groups: Sequence[tuple[str, str, Tensors]]) -> bytes:
    tensors: dict[str, torch.Tensor] = {}
    names: list[list[str]] = []
    seen: set[int] = set()
    for group, part, members in groups:
        for name, tensor in members.items():
            plain = tensor.detach().cpu().contiguous()
            if plain.data_ptr() in seen:  # a file of tensors holds each on its own
                plain = plain.clone()
            seen.add(plain.data_ptr())
            tensors[str(len(names))] = plain
            names.append([group, part, name])
    try:
        text = json.dumps({"format": _FORMAT, "kind": kind, "tensors": names, **note}, allow_nan=False)
        return save(tensors, metadata={"fedlab": text})
    except (ValueError, TypeError, SafetensorError) as error:
        raise FedlabError(f"this {kind} can't be sent: {error}") from error


def _kind(data: bytes, sender: str, limit: int | None) -> str:
    kind = _header(data, sender, limit)[0].get("kind")
    if not isinstance(kind, str):
        raise _odd(sender, "it doesn't say of which kind it is")
    return kind


def _unpack(data: bytes, kind: str, fields: Sequence[str], *, sender: str, limit: int | None,
            ) -> tuple[dict[str, Any], dict[tuple[str, str], dict[str, torch.Tensor]]]:
    """The fields of a message and its tensors by group, all checked against what the header says."""
    note, entries = _header(data, sender, limit)
    if note.get("format") != _FORMAT or note.get("kind") != kind:
        raise _odd(sender, f"expected {kind!r} in format {_FORMAT!r}, it is {str(note.get('kind'))[:40]!r} in "
                           f"{str(note.get('format'))[:40]!r}")
    if note.keys() != {"format", "kind", "tensors", *fields}:
        raise _odd(sender, f"a message of kind {kind!r} has the fields {sorted(fields)}")
    names = note["tensors"]
    if not isinstance(names, list) or entries.keys() != {str(k) for k in range(len(names))}:
        raise _odd(sender, "its tensors are not those that its header names")
    if not all(isinstance(n, list) and len(n) == 3 and all(isinstance(part, str) for part in n) for n in names):
        raise _odd(sender, "its tensors have no proper names")
    if len({tuple(n) for n in names}) != len(names):
        raise _odd(sender, "two of its tensors have the same name")
    for entry in entries.values():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(entry, dict) or entry.get("dtype") not in _DTYPES or not isinstance(shape, list) \
                or len(shape) > 16 or not all(_whole(n) and n < 2**40 for n in shape):
            raise _odd(sender, "one of its tensors is of a type or shape that fedlab doesn't send")
    try:
        tensors = load(bytes(data))
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError, AssertionError) as error:
        raise _odd(sender, f"its tensors can't be read ({str(error)[:200]})") from error
    groups: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for k, (group, part, name) in enumerate(names):
        tensor, entry = tensors[str(k)], entries[str(k)]
        if tensor.dtype != _DTYPES[entry["dtype"]] or list(tensor.shape) != entry["shape"]:
            raise _odd(sender, "one of its tensors is not what its header says")
        groups.setdefault((group, part), {})[name] = tensor
    return note, groups


def _header(data: bytes, sender: str, limit: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our note in the header, and the entry of each tensor."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise _odd(sender, f"expected bytes, got {type(data).__name__}")
    most = _LARGEST_MESSAGE if limit is None else limit
    if len(data) > most:
        raise _odd(sender, f"it has {len(data)} bytes, at most {most} are expected")
    length = int.from_bytes(bytes(data[:8]), "little")
    if len(data) < 8 or not 2 <= length <= min(_LARGEST_HEADER, len(data) - 8):
        raise _odd(sender, "it is cut off or no safetensors message")
    header = strict_json(bytes(data[8:8 + length]), sender=sender)
    outer = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(outer, dict) or outer.keys() != {"fedlab"} or not isinstance(outer["fedlab"], str):
        raise _odd(sender, "its header has no note of fedlab's")
    note = strict_json(outer["fedlab"].encode("utf-8", "surrogatepass"), sender=sender)
    if not isinstance(note, dict):
        raise _odd(sender, "the note in its header is none")
    return note, header


def strict_json(data: bytes, *, sender: str) -> Any:
    """JSON without what JSON leaves open: no name twice in an object, no NaN, no infinite or endless numbers.

    Raises:
        FedlabError: it is no such JSON.
    """
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(items)
        if len(out) != len(items):
            raise ValueError("a name stands twice in one object")
        return out

    def constant(text: str) -> Any:
        raise ValueError(f"{text} is no number")

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
        # Objects in objects are followed by recursion.
        if max(text.count("["), text.count("{")) > 100_000 or _depth(text) > 100:
            raise ValueError("it is nested too deeply or has too many parts")
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_float=real, parse_int=whole)
    except (ValueError, RecursionError) as error:  # decoding errors are ValueErrors
        raise _odd(sender, f"it holds no proper JSON ({str(error)[:200]})") from error


def _depth(text: str) -> int:
    """How deep brackets are nested, at most; brackets inside of strings count too, which only makes it stricter."""
    depth = deepest = 0
    inside = escaped = False
    for sign in text:
        if inside:
            escaped, inside = (not escaped and sign == "\\"), not (sign == '"' and not escaped)
        elif sign == '"':
            inside = True
        elif sign in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif sign in "]}":
            depth -= 1
    return deepest


def _odd(sender: str, why: str) -> FedlabError:
    return FedlabError(f"the message of {sender} was refused: {why}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(epsilon: float) -> float | str:
    return "inf" if epsilon == math.inf else epsilon


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} …"


def _clean(text: Any, site: str) -> str:
    """Text from outside, short enough to show and without signs that would act on a terminal."""
    if not isinstance(text, str) or len(text) > _LONGEST_TEXT + 2:
        raise _odd(site, f"a text of at most {_LONGEST_TEXT} signs was expected")
    return "".join(sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text)

