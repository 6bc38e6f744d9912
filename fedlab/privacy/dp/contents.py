"""Everything that a network or a loss holds, by name: parameters, buffers, plain attributes, and what its code uses."""

from __future__ import annotations

import copy
import dis
import functools
import hashlib
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping, Set
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["contents", "copied", "fingerprint", "leaves"]

#: Libraries whose code changes only with their version, and whose objects other than modules hold no data.
_LIBRARIES = frozenset({"torch", "monai", "numpy", "einops", "fedlab", "opacus", "builtins", "pytest"})
#: Types of most values: known without the questions that take time.
_SIMPLE = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device})
_VALUES = _SIMPLE | {torch.Tensor, nn.Parameter, np.ndarray}
#: Attributes of a module that are looked at as what they hold, and its mode, which says nothing about data.
_PARTS, _MODE = ("_parameters", "_buffers", "_modules"), "training"


def leaves(root: object, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values that an object holds, each with its name, such as "norm.history[2]"; every object once.

    Modules, collections, other objects, bound methods and users' functions are entered: closures, defaults and the
    global values that a function reads included.
    """
    return _leaves(root, name, {})


def contents(model: object, loss: object) -> dict[str, str]:
    """The values that a network and its loss hold as short texts by name; large ones by their hash."""
    found = [*leaves(model), *leaves(loss, "loss")]
    return {name: _digest(value) for name, value in found}


def fingerprint(model: nn.Module, loss: object, *more: object) -> tuple[str, str]:
    """Two hashes of what a network and its loss hold, their users' code included: without trained weights, and of all.

    Args:
        model, loss: are not changed.
        more: what else makes a difference.
    """
    weights = "".join(_digest(p) for p in model.parameters() if p.requires_grad)
    found = [(name, _shape(value) if isinstance(value, nn.Parameter) and value.requires_grad else _digest(value))
             for name, value in [*leaves(model), *leaves(loss, "loss")]]
    rest = hashlib.sha256(repr((sorted(found), more)).encode()).hexdigest()
    return rest, hashlib.sha256(f"{rest}{weights}".encode()).hexdigest()


def copied(value: Any) -> Any:
    """A deep copy; tensors that are still part of a graph, which torch does not copy, lose it."""
    graph = {id(t): t.detach().clone() for _, t in leaves(value) if isinstance(t, torch.Tensor) and not t.is_leaf}
    return copy.deepcopy(value, graph)


def _leaves(value: Any, name: str, seen: dict[int, Any]) -> Iterator[tuple[str, Any]]:
    parts = _parts(value)
    if parts is None:
        yield name, value
    elif id(value) not in seen:
        seen[id(value)] = value  # kept, so that no later object gets its id
        yield f"{name}:", type(value)
        for key, part in parts.items():
            yield from _leaves(part, f"{name}{key}".removeprefix("."), seen)


def _parts(value: Any) -> dict[str, Any] | None:
    """What an object holds, by what is written behind its name; None for a value."""
    if type(value) in _VALUES:
        return None
    match value:
        case torch.Tensor() | np.ndarray() | torch.Generator() | np.random.Generator() | types.ModuleType():
            return None
        case type():
            own = vars(value) if _of_a_user(value) else {}
            return {f".{k}": v for k, v in own.items() if not k.startswith("__") or callable(v)} if own else None
        case nn.Module():
            held = {**vars(value), **{k: v for part in _PARTS for k, v in getattr(value, part).items()}}
            return {f".{k}": v for k, v in held.items() if k not in _PARTS and k != _MODE} | _class_of(value)
        case Mapping():
            return {f"[{k!r}]": v for k, v in value.items()}
        case list() | tuple() | deque() | Set():
            return {f"[{k}]": v for k, v in enumerate(sorted(value, key=repr) if isinstance(value, Set) else value)}
        case types.MethodType():
            return {"()": value.__func__, ".": value.__self__}
        case functools.partial():
            return {"()": value.func, "(*)": value.args, "(**)": value.keywords}
        case types.FunctionType():
            return _of_function(value) if _of_a_user(value) else None
        case classmethod() | staticmethod() | property():
            return {"()": getattr(value, "__func__", None) or value.fget}  # type: ignore[union-attr]
    slots = [key for kind in type(value).__mro__ for key in getattr(kind, "__slots__", ()) if key[:2] != "__"]
    held = {key: getattr(value, key) for key in slots if hasattr(value, key)} | getattr(value, "__dict__", {})
    known = not _of_a_user(type(value)) and not isinstance(value, types.SimpleNamespace)
    return None if known or not held else {f".{k}": v for k, v in held.items()} | _class_of(value)


def _class_of(value: Any) -> dict[str, Any]:
    """The classes of an object that are a user's: their code, and the data that all of their objects share."""
    return {f":{kind.__name__}": kind for kind in type(value).__mro__ if _of_a_user(kind)}


def _of_function(function: types.FunctionType) -> dict[str, Any]:
    codes, names = [function.__code__], set()
    for code in codes:
        codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
        names |= {str(step.argval) for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    used = {key: function.__globals__[key] for key in sorted(names) if key in function.__globals__}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    around = {key: cell.cell_contents for key, cell in cells if cell != types.CellType()}
    text = [(code.co_code, code.co_names, [part for part in code.co_consts if not isinstance(part, types.CodeType)])
            for code in codes]
    return {"#code": repr(text), "#defaults": (function.__defaults__, function.__kwdefaults__),
            **{f"#{key}": part for key, part in (used | around).items()}}


def _of_a_user(kind: Any) -> bool:
    root = (getattr(kind, "__module__", None) or "").partition(".")[0]
    return root not in _LIBRARIES and (root == "__main__" or root not in sys.stdlib_module_names)


def _digest(value: Any) -> str:
    if type(value) in _SIMPLE:
        return repr(value)
    match value:
        case torch.Tensor() if not value.is_meta and value.layout is torch.strided:
            data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            return f"{_shape(value)} {hashlib.blake2b(data, digest_size=16).hexdigest()}"
        case np.ndarray() if value.dtype != object:
            return f"{_shape(value)} {hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()}"
        case torch.Generator():
            return hashlib.blake2b(value.get_state().numpy().data, digest_size=16).hexdigest()
        case np.random.Generator():
            return repr(value.bit_generator.state)
        case type() | types.ModuleType() | types.FunctionType() | types.BuiltinFunctionType():
            return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
        case bool() | int() | float() | complex() | str() | bytes():
            return repr(value)
    return _shown(value)


def _shape(value: torch.Tensor | np.ndarray) -> str:
    return f"{value.dtype} {tuple(value.shape)}"


def _shown(value: Any) -> str:
    """A value in words without its address in memory."""
    shown = repr(value)
    return type(value).__qualname__ if " at 0x" in shown else f"{type(value).__qualname__} {shown}"
