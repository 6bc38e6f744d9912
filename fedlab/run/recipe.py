"""The identity of a run by content: recipes of its objects and a hash of the patients' data.

Two objects have one recipe if they compute the same: class, settings down to those of losses, optimisers and
transforms, the user's functions and classes by their source with the values that they use, and tensors by their bytes.
Checkpoints, traces, plans and noise streams use it. A wrapper that does not change the result names the object that it
stands for in an attribute `stands_for`.
"""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import inspect
import json
import math
import re
import sys
import textwrap
import tokenize
import types
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

from fedlab.core.hardware import computed_in
from fedlab.core.protocols import Run
from fedlab.core.types import Patient
from fedlab.core.weights import patient_sha256, weights_sha256
from fedlab.training.trainer import SiteTrainer

__all__ = ["differences", "parts_recipe", "patients_sha256", "recipe", "recipe_sha256", "run_as_code",
           "run_recipe", "sha256_of", "versions"]

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

#: Attributes of a torch module that are no settings: its tensors have a hash of their values, hooks change.
_MODULE_STATE = frozenset(vars(nn.Module())) | {"training"}
#: The note of how an object was made (`fedlab.deploy.objects.built`), which changes nothing that it computes.
_NOTE = "_built"
#: Methods of a user's class that compute nothing.
_SHOWN = frozenset({"__repr__", "__str__", "__hash__", "__eq__"})
_PATIENTS: weakref.WeakKeyDictionary[Patient, tuple[tuple[int, ...], str]] = weakref.WeakKeyDictionary()


def recipe(value: Any) -> Json:
    """An object as plain data that is equal for objects that compute the same, in any process."""
    return _recipe(value, ())


def run_recipe(run: Run) -> dict[str, Json]:
    """The identity of a run by content: its parts, seed and the data of each site."""
    sites = {site.name: "elsewhere" if len(site.train) == 0 else patients_sha256(site.train) for site in run.sites}
    return {**parts_recipe(run), "patients": dict(sites)}


def parts_recipe(run: Run) -> dict[str, Json]:
    """The identity of a run without the data of its sites."""
    parts = ("trainer", "strategy", "privacy", "aggregation", "topology", "admission", "seed")
    return {name: recipe(getattr(run, name)) for name in parts}


def run_as_code(run: Run) -> dict[str, str]:
    """The settings of a run, each as the code that makes it."""
    names = ("trainer", "strategy", "privacy", "aggregation", "topology", "admission", "engine", "seed", "rounds")
    return {name: repr(getattr(run, name)) for name in names}


def recipe_sha256(value: Any) -> str:
    """The SHA-256 of an object's recipe."""
    return sha256_of(recipe(value))


def sha256_of(recipe: Json) -> str:
    """The SHA-256 of a recipe."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


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
    known = getattr(patients, "content_sha256", None)
    if known is not None:
        return str(known())
    digest = hashlib.sha256()
    for patient in patients:
        digest.update(_patient_sha256(patient).encode())
    return digest.hexdigest()


def versions(patient: Patient) -> tuple[int, ...]:
    """Numbers that change when the patient's image or label is changed in place."""
    return tuple(-1 if t.is_inference() else t._version for t in (patient.image, patient.label) if t is not None)


def _patient_sha256(patient: Patient) -> str:
    known = _PATIENTS.get(patient)
    if known is None or known[0] != versions(patient):
        known = _PATIENTS[patient] = versions(patient), patient_sha256(patient)
    return known[1]


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
        case np.ndarray():
            return {"array": _recipe(value.tolist(), above)}
        case Mapping():
            pairs: list[Json] = [[_recipe(k, above), _recipe(v, above)] for k, v in value.items()]
            return _collection(value, {"dict": sorted(pairs, key=json.dumps)}, above)
        case set() | frozenset():
            return _collection(value, {"set": sorted((_recipe(item, above) for item in value), key=json.dumps)}, above)
        case list() | tuple():
            return _collection(value, [_recipe(item, above) for item in value], above)
        case functools.partial():
            return {"partial": [_recipe(part, above) for part in (value.func, value.args, value.keywords)]}
        case types.MethodType() | types.BuiltinMethodType() | types.MethodWrapperType() if not isinstance(
                value.__self__, types.ModuleType | None):
            return {"method": value.__name__, "of": _recipe(value.__self__, above)}
        case types.FunctionType():
            return _function(value, above)
        case type() | types.BuiltinFunctionType() | types.ModuleType():
            return _named(value, above)
        case types.CodeType():
            return _code(value, above)
        case nn.Module():
            return _module(value, above)
        case SiteTrainer():
            return _trainer(value, above)
    return _object(value, above)


def _collection(value: Any, items: Json, above: tuple[int, ...]) -> Json:
    """The items of a collection; with its class and settings, if the class is a user's."""
    return items if _of_a_library(type(value)) else {"items": items, **_object(value, above)}


def _named(value: Any, above: tuple[int, ...]) -> Json:
    """A library's class, function or module by its name; a user's class by its methods and attributes."""
    name = f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"
    if not isinstance(value, type) or _of_a_library(value):
        return {"name": name}
    parts = {key: part for key, part in vars(value).items() if key not in _SHOWN and not key.startswith("_abc_")
             and (not key.startswith("__") or isinstance(part, types.FunctionType))}
    return {"class": name, "bases": [_recipe(base, above) for base in value.__bases__],
            "body": {key: _recipe(_unwrapped(part), above) for key, part in parts.items()}}


def _unwrapped(attribute: Any) -> Any:
    """The function behind a property, a static or a class method."""
    for name in ("fget", "func", "__func__"):
        attribute = getattr(attribute, name, attribute)
    return attribute


def _of_a_library(value: Any) -> bool:
    """Whether a class, function or module is part of an installed package, which its name and version identify."""
    module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None) or ""
    if module == "__main__" or "<locals>" in getattr(value, "__qualname__", "") or value.__name__ == "<lambda>":
        return False  # of a notebook or a script, whatever file started the process
    file = getattr(sys.modules.get(module), "__file__", None)
    return module.partition(".")[0] in {*sys.stdlib_module_names, "fedlab"} or (
        file is not None and bool({"site-packages", "dist-packages"} & set(PurePath(file).parts)))


def _function(function: types.FunctionType, above: tuple[int, ...]) -> Json:
    """A user's function by its source and by the global and enclosing values that it uses."""
    if _of_a_library(function):
        return _named(function, above)
    code = function.__code__
    names = {str(step.argval) for part in _codes(code) for step in dis.get_instructions(part)
             if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    around = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    cells = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
    return {"function": function.__qualname__, "source": _source(code) or _code(code, above),
            "around": {name: _used(value, code, above) for name, value in around.items()},
            "closure": {name: _recipe(value, above) for name, value in cells.items()},
            "defaults": _recipe([function.__defaults__, function.__kwdefaults__], above)}


def _used(value: Any, code: types.CodeType, above: tuple[int, ...]) -> Json:
    """A global of a function; of a user's module the parts that the function names."""
    if not isinstance(value, types.ModuleType) or _of_a_library(value):
        return _recipe(value, above)
    names = {name for part in _codes(code) for name in part.co_names}
    return {"module": value.__name__, "parts": {name: _recipe(vars(value)[name], above)
                                                for name in sorted(names & vars(value).keys())}}


#: Sources by the id of their code, which is kept with them: inspect looks through all modules for each. Not by the
#: code itself, for two that differ in a default alone are equal.
_SOURCES: dict[int, tuple[types.CodeType, str]] = {}


def _source(code: types.CodeType) -> str:
    """The source of a function without comments and layout; of a lambda none, since its line holds more than it."""
    if code.co_name == "<lambda>":
        return ""
    if id(code) not in _SOURCES:
        _SOURCES[id(code)] = code, _read_source(code)
    return _SOURCES[id(code)][1]


def _read_source(code: types.CodeType) -> str:
    try:
        source = inspect.getsource(code)
    except (OSError, TypeError, tokenize.TokenError):
        return ""
    try:
        return ast.unparse(ast.parse(textwrap.dedent(source)))
    except SyntaxError:
        return " ".join(source.split())


def _code(code: types.CodeType, above: tuple[int, ...]) -> Json:
    """Compiled code, where there is no source."""
    return {"code": code.co_code.hex(), "names": [*code.co_names, *code.co_varnames, *code.co_freevars],
            "constants": [_recipe(constant, above) for constant in code.co_consts]}


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _trainer(trainer: SiteTrainer, above: tuple[int, ...]) -> Json:
    """A trainer, with the precision that "auto" is here; what becomes of buffers only where training moves some."""
    found: dict[str, Any] = _object(trainer, above)
    found["settings"]["precision"] = computed_in(trainer.model, trainer.precision, trainer.device)
    if moving := trainer.initial_model().keys() - trainer.initial().keys():
        found["settings"]["model"] = _module(trainer.model, (*above, id(trainer.model)), moving)
    else:
        del found["settings"]["buffers"]
    return found


def _module(module: nn.Module, above: tuple[int, ...], moving: Collection[str] = ()) -> Json:
    """A torch module: its class, settings and children; of its tensors those that do not change in training.

    Args:
        module: the module.
        above: the objects that it is part of.
        moving: names of its buffers that training moves.
    """
    own = {name: value for name, value in vars(module).items() if name not in _MODULE_STATE and name != _NOTE}
    tensors = {**dict(module.named_buffers(recurse=False)), **dict(module.named_parameters(recurse=False))}
    changing = {name for name, t in tensors.items() if t.requires_grad or name in moving}
    fixed = {name: t for name, t in tensors.items() if name not in changing}
    trained: dict[str, Json] = {name: [str(t.dtype), *t.shape] for name, t in tensors.items() if name in changing}
    inside = {name: {key.removeprefix(f"{name}.") for key in moving if key.startswith(f"{name}.")}
              for name, _ in module.named_children()}
    return {"module": _recipe(type(module), above), "settings": {name: _recipe(v, above) for name, v in own.items()},
            "trained": trained, "fixed": weights_sha256(fixed) if fixed else "",
            "children": {name: _module(child, (*above, id(child)), inside[name]) if inside[name] else
                         _recipe(child, above) for name, child in module.named_children()}}


def _object(value: Any, above: tuple[int, ...]) -> dict[str, Json]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ()) if name[:2] != "__"]
    if is_dataclass(value):
        values = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
    elif hasattr(value, "adj"):  # a networkx graph is its nodes and edges
        edges = sorted(repr(sorted(map(repr, edge))) for edge in value.edges)
        values = {"nodes": sorted(map(repr, value.nodes)), "edges": edges}
    elif hasattr(value, "__dict__") or slots:
        values = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})
        cached = {name for kind in type(value).__mro__ for name, part in vars(kind).items()
                  if isinstance(part, functools.cached_property)}
        values = {name: part for name, part in values.items() if name != _NOTE and name not in cached}
    else:  # of a type written in C
        values = {"shown": re.sub(r" at 0x[0-9a-f]+", "", repr(value))}
    settings: dict[str, Json] = {name: _recipe(part, above) for name, part in sorted(values.items())}
    return {"object": _recipe(type(value), above), "settings": settings}


def _short(value: Json) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
