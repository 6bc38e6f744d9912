"""The identity of a run by content: recipes of its objects and a hash of the patients' data.

Two objects have one recipe if they compute the same: class, settings down to those of losses, optimisers and
transforms, the user's functions and classes by their source with the values that they use, and tensors by their bytes.
Checkpoints, traces, plans and noise streams use it. A wrapper that does not change the result names the object that it
stands for in an attribute `stands_for`.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import math
import sys
import textwrap
import types
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlab.core.types import Patient
from fedlab.core.weights import weights_sha256

__all__ = ["differences", "patients_sha256", "recipe", "recipe_sha256"]

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

#: Attributes of a torch module that are no settings: its tensors have a hash of their own, hooks change.
_MODULE_STATE = frozenset(vars(nn.Module())) | {"training"}
#: The note of how an object was made (`fedlab.deploy.objects.built`), which changes nothing that it computes.
_NOTE = "_built"
_PATIENTS: weakref.WeakKeyDictionary[Patient, str] = weakref.WeakKeyDictionary()


def recipe(value: Any) -> Json:
    """An object as plain data that is equal for objects that compute the same, in any process.

    Args:
        value: part of a run, such as a trainer, a technique, or a schedule defined in a notebook cell.
    """
    return _recipe(value, ())


def recipe_sha256(value: Any) -> str:
    """The SHA-256 of an object's recipe."""
    return hashlib.sha256(json.dumps(recipe(value), sort_keys=True).encode()).hexdigest()


def differences(one: Json, other: Json, path: str = "") -> list[str]:
    """Where two recipes differ, as "trainer.lr: 0.01 there, 0.02 here"."""
    if isinstance(one, dict) and isinstance(other, dict):
        return [line for key in sorted(one.keys() | other.keys())
                for line in differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)]
    return [] if one == other else [f"{path or 'value'}: {_short(one)} there, {_short(other)} here"]


def patients_sha256(patients: Sequence[Patient]) -> str:
    """The SHA-256 of the patients' ids, images, labels and affines, in order.

    Args:
        patients: of a site; a collection may define `content_sha256()` where that is cheaper than reading every scan.
    """
    own = getattr(patients, "content_sha256", None)
    if own is not None:
        return str(own())
    digest = hashlib.sha256()
    for patient in patients:
        digest.update(_patient_sha256(patient).encode())
    return digest.hexdigest()


def _patient_sha256(patient: Patient) -> str:
    if patient not in _PATIENTS:
        tensors = {"image": patient.image, "affine": torch.from_numpy(np.ascontiguousarray(patient.affine))}
        if patient.label is not None:
            tensors["label"] = patient.label
        _PATIENTS[patient] = hashlib.sha256(f"{patient.id}|{weights_sha256(tensors)}".encode()).hexdigest()
    return _PATIENTS[patient]


def _recipe(value: Any, above: tuple[int, ...]) -> Json:
    value = getattr(value, "stands_for", value)
    if id(value) in above:
        return {"again": len(above) - above.index(id(value))}  # an object that holds itself
    above = (*above, id(value))
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else repr(value)
        case Enum() | torch.dtype() | torch.device() | PurePath() | bytes() | complex() | range() | slice():
            return {"value": repr(value)}
        case torch.Tensor():
            return {"tensor": weights_sha256({"": value})}
        case np.ndarray() if value.dtype != object:
            return {"array": [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]}
        case np.generic():
            return {"value": repr(value.item())}
        case np.random.RandomState() | np.random.Generator() | torch.Generator():
            return {"generator": type(value).__name__}  # drawn from a stream of the run where it matters
        case Mapping():
            return {"dict": sorted(([_recipe(k, above), _recipe(v, above)] for k, v in value.items()), key=json.dumps)}
        case set() | frozenset():
            return {"set": sorted((_recipe(item, above) for item in value), key=json.dumps)}
        case list() | tuple():
            return [_recipe(item, above) for item in value]
        case functools.partial():
            return {"partial": [_recipe(part, above) for part in (value.func, value.args, value.keywords)]}
        case types.MethodType():
            return {"method": value.__name__, "of": _recipe(value.__self__, above)}
        case types.FunctionType():
            return _function(value, above)
        case type() | types.BuiltinFunctionType() | types.ModuleType():
            return _named(value, above)
        case nn.Module():
            return _module(value, above)
    return _object(value, above)


def _named(value: Any, above: tuple[int, ...]) -> Json:
    """A library's class, function or module by its name; a user's class by its methods and plain attributes."""
    name = f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"
    if not isinstance(value, type) or _of_a_library(value):
        return {"name": name}
    plain = types.FunctionType | property | int | float | str
    parts = {key: part for key, part in vars(value).items() if key in ("__init__", "__call__", "__post_init__")
             or (not key.startswith("__") and isinstance(part, plain))}
    bodies = {key: _recipe(part.fget if isinstance(part, property) else part, above) for key, part in parts.items()}
    return {"class": name, "bases": [_recipe(base, above) for base in value.__bases__], "body": bodies}


def _of_a_library(value: Any) -> bool:
    """Whether a class or function is part of an installed package, which its name and version identify."""
    module = getattr(value, "__module__", None) or ""
    if module == "__main__" or "<locals>" in value.__qualname__ or value.__name__ == "<lambda>":
        return False  # of a notebook or a script, whatever file started the process
    file = getattr(sys.modules.get(module), "__file__", None)
    return module.partition(".")[0] in {*sys.stdlib_module_names, "fedlab"} or (
        file is not None and bool({"site-packages", "dist-packages"} & set(PurePath(file).parts)))


def _function(function: types.FunctionType, above: tuple[int, ...]) -> Json:
    """A user's function by its source and by the global and enclosing values that it uses."""
    if _of_a_library(function):
        return _named(function, above)
    code = function.__code__
    try:
        source = _normal(inspect.getsource(function))
    except (OSError, TypeError):
        source = ""
    if not source or function.__name__ == "<lambda>":  # one line may hold several
        source += f"|{code.co_code.hex()}|{[c for c in code.co_consts if not isinstance(c, types.CodeType)]!r}"
    around = {name: function.__globals__[name] for name in sorted(_names(code)) if name in function.__globals__}
    cells = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
    return {"function": function.__qualname__, "source": source,
            "around": {name: _recipe(value, above) for name, value in around.items()},
            "closure": {name: _recipe(value, above) for name, value in cells.items()},
            "defaults": _recipe([function.__defaults__, function.__kwdefaults__], above)}


def _names(code: types.CodeType) -> set[str]:
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _normal(source: str) -> str:
    """Source without comments, indentation and layout."""
    try:
        return ast.unparse(ast.parse(textwrap.dedent(source)))
    except SyntaxError:  # a lambda in the middle of a call
        return " ".join(source.split())


def _module(module: nn.Module, above: tuple[int, ...]) -> Json:
    """A torch module: its class, settings and children; of its tensors those that are not trained."""
    own = {name: value for name, value in vars(module).items() if name not in _MODULE_STATE and name != _NOTE}
    fixed: dict[str, torch.Tensor] = dict(module.named_buffers(recurse=False))
    fixed |= {name: p for name, p in module.named_parameters(recurse=False) if not p.requires_grad}
    trained: dict[str, Json] = {name: [str(p.dtype), *p.shape] for name, p in module.named_parameters(recurse=False)
                                if p.requires_grad}
    return {"module": _recipe(type(module), above), "settings": {name: _recipe(v, above) for name, v in own.items()},
            "trained": trained, "fixed": weights_sha256(fixed) if fixed else "",
            "children": {name: _recipe(child, above) for name, child in module.named_children()}}


def _object(value: Any, above: tuple[int, ...]) -> Json:
    if is_dataclass(value):
        own = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
    elif hasattr(value, "__dict__"):
        own = {name: part for name, part in vars(value).items() if name != _NOTE}
    else:
        own = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
    if hasattr(value, "adj"):  # a networkx graph, of which nodes and edges count
        edges = sorted(repr(sorted(map(repr, edge))) for edge in value.edges)
        own = {"nodes": sorted(map(repr, value.nodes)), "edges": edges}
    settings: dict[str, Json] = {name: _recipe(part, above) for name, part in sorted(own.items())}
    return {"object": _recipe(type(value), above), "settings": settings}


def _slots(cls: type) -> list[str]:
    return [name for kind in cls.__mro__ for name in getattr(kind, "__slots__", ()) if not name.startswith("__")]


def _short(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
