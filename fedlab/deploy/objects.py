"""Objects as plain data and back: what a server sends to sites in place of objects.

An object travels as the call that makes it, a function or class as its module and name; nothing is pickled. Before the
first module is imported the whole plan is checked: every module that it names must be approved, and every name must
have a place in a run (a technique, a strategy, an aggregation, a topology, admission rules, a trainer or a part of it).
Of a file that a site has approved, or of another package that is installed there, only such classes are made, each
where it is defined. A function, or a class that the file imports or keeps for itself, was not reviewed to be called
with the settings of a server.
"""

from __future__ import annotations

import importlib
import inspect
import math
import operator
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial, reduce
from numbers import Number
from types import FunctionType, ModuleType
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import nn

from fedlab.core.errors import FedlabError, PrivacyError
from fedlab.core.files import packaged_toml
from fedlab.core.protocols import Strategy, Topology
from fedlab.privacy.aggregation import Aggregation
from fedlab.privacy.base import Privacy
from fedlab.run.recipe import Json
from fedlab.strategies.averaging import FedAvg
from fedlab.training.schedules import PolyDecay

__all__ = ["Approve", "Load", "built", "check_plain", "describe", "dict_of", "follows", "graph_of", "infinity", "make",
           "sum_of", "tuple_of"]

#: Raises `PrivacyError` for a module that is not approved.
Approve = Callable[[str], None]
#: Imports a module by its name.
Load = Callable[[str], ModuleType]

_Made = TypeVar("_Made")

_NAME = re.compile(r"(?P<module>[A-Za-z]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z]\w*)", re.ASCII)
_DEEPEST, _MOST, _LONGEST = 20, 20_000, 1_000_000
_PACKAGES = ("fedlab", "monai", "torch")
#: Names that a plan may use one by one, by module; what follows from a base class is in `_found`.
_LISTED: Mapping[str, list[str]] = packaged_toml("fedlab.deploy", "plan_names.toml")


def built(factory: Callable[..., _Made], **settings: Any) -> _Made:
    """Calls `factory(**settings)` and notes on the result how it was made, so that it can travel in a plan.

    For networks, losses and transforms: `SiteTrainer(model=built(UNet, spatial_dims=3, ...), ...)`. Models of
    `segresnet` and transforms of `augmentation` carry the note already. Other processes must be able to import the
    factory, of fedlab, MONAI or torch, or a class of an approved file; its settings are plain values, with
    a seed where it draws the first weights.

    Raises:
        ValueError: a factory or a setting that cannot travel, or a result that cannot carry the note.
    """
    describe(factory), describe(settings)
    made = factory(**settings)
    try:
        made.__dict__["_built"] = (factory, settings)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"a {type(made).__name__} has no attributes to note in how it was made; write a class that "
                         "keeps each constructor argument in an attribute of the same name") from error
    return made


def describe(value: Any) -> Json:
    """An object as plain data, from which `make` makes an equal one.

    Accepted are plain values and containers; functions and classes of modules; dataclasses; objects that keep their
    constructor arguments in attributes of the same name; results of `built`; `functools.partial` of these with keyword
    arguments; techniques joined by `+`; undirected networkx graphs.

    Raises:
        ValueError: something that cannot travel, with the remedy.
        PrivacyError: a technique that is defined in a notebook, a script or a function.
    """
    return _described(value, depth=0)


def _described(value: Any, *, depth: int) -> Json:
    if depth > _DEEPEST:
        raise ValueError(f"settings that are nested more than {_DEEPEST} deep, or contain themselves, cannot travel")

    def call(factory: Any, settings: Mapping[str, Any], word: str = "make") -> Json:
        return {word: _name_of(factory),
                "with": {name: _described(item, depth=depth + 1) for name, item in settings.items()}}

    if value is None or isinstance(value, bool | str):
        return value
    if type(value) is int:
        if not -2**63 <= value < 2**63:
            raise ValueError(f"a plan carries whole numbers of 64 bits, got {str(value)[:40]}")
        return value
    if type(value) is float:
        if math.isnan(value):
            raise ValueError("a plan does not carry NaN; give a number")
        return value if math.isfinite(value) else call(infinity, {"sign": "+" if value > 0 else "-"})
    if type(value) is list:
        return [_described(item, depth=depth + 1) for item in value]
    if type(value) is tuple:
        return call(tuple_of, {"items": list(value)})
    if type(value) is dict:
        return call(dict_of, {"pairs": [list(pair) for pair in value.items()]})
    match value:
        case partial():
            if value.args:
                raise ValueError(f"{value!r} has arguments by position; name them: partial(function, name=…)")
            return call(value.func, value.keywords, "partial")
        case FunctionType() | type():
            return {"name": _name_of(value)}
        case Privacy() if len(value.layers) > 1:
            return call(sum_of, {"techniques": list(value.layers)})
        case Number() | np.generic():
            raise ValueError(f"a plan carries plain numbers, got {value!r} ({type(value).__name__}); convert it with "
                             "float(...) or int(...)")
    networkx = sys.modules.get("networkx")  # imported wherever there is a graph
    if networkx is not None and isinstance(value, networkx.Graph):
        if value.is_directed() or value.is_multigraph():
            raise ValueError(f"a plan carries plain undirected graphs, got {value!r}")
        return call(graph_of, {"nodes": list(value), "edges": [list(edge) for edge in value.edges]})
    factory, settings = getattr(value, "__dict__", {}).get("_built", (type(value), None))
    try:
        _name_of(factory)  # before its settings are read
        return call(factory, _settings(value) if settings is None else settings)
    except _NotImportable as error:
        if not isinstance(value, Privacy):
            raise
        raise PrivacyError(
            f"{error.name} of {value!r} is defined in a notebook, a script or a function, from which other sites "
            "cannot import it: write it into a file (fedlab export technique, or %%writefile my_technique.py as the "
            "first line of its cell), have that file approved at every site, and import it from there") from error


def tuple_of(*, items: list[Any]) -> tuple[Any, ...]:
    """A tuple in a plan."""
    return tuple(items)


def dict_of(*, pairs: list[list[Any]]) -> dict[Any, Any]:
    """A dictionary in a plan, from pairs of key and value."""
    out = {key: value for key, value in pairs}
    if len(out) != len(pairs) or not all(isinstance(key, str | int | float | bool | None) for key in out):
        raise ValueError("its keys are different plain values")
    return out


def infinity(*, sign: Literal["+", "-"]) -> float:
    """An infinite number in a plan."""
    if sign not in ("+", "-"):
        raise ValueError("sign is '+' or '-'")
    return float(f"{sign}inf")


def graph_of(*, nodes: list[str | int], edges: list[list[str | int]]) -> Any:
    """An undirected networkx graph in a plan."""
    import networkx

    if not all(isinstance(node, str | int) for node in nodes) or not all(
            a in nodes and b in nodes for a, b in edges):
        raise ValueError("its nodes are text or whole numbers, its edges pairs of nodes")
    graph = networkx.Graph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from(edges)
    return graph


def sum_of(*, techniques: list[Privacy]) -> Privacy:
    """Techniques in a plan, joined by `+`."""
    if len(techniques) < 2 or not all(isinstance(technique, Privacy) for technique in techniques):
        raise ValueError("two or more techniques are joined by +")
    return reduce(operator.add, techniques)


def _settings(value: Any) -> dict[str, Any]:
    """The constructor arguments of an object, read from attributes of the same names."""
    cls = type(value)
    if is_dataclass(cls):
        return {f.name: getattr(value, f.name) for f in fields(cls) if f.init}
    if cls.__module__.partition(".")[0] in {*sys.stdlib_module_names, "numpy"} or isinstance(value, torch.Tensor):
        raise ValueError(f"a plan carries plain values and parts of a run, no {cls.__name__}: {str(value)[:80]}; "
                         "express it in text or numbers")

    def unknown(reason: str) -> ValueError:
        return ValueError(f"it is unknown how this {cls.__name__} was made{reason}; make it with fedlab.deploy.built("
                          f"{cls.__name__}, name=value, …), which notes it, or keep each constructor argument in an "
                          "attribute of the same name")

    try:
        wanted = inspect.signature(cls).parameters
    except (TypeError, ValueError) as error:
        raise unknown("") from error
    known = getattr(value, "__dict__", {})
    if isinstance(value, nn.Module):
        known = {**value._modules, **value._parameters, **known}
    for name, parameter in wanted.items():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise unknown(f": a plan names every argument, which {cls.__name__}({parameter}) does not allow")
        if name not in known:
            raise unknown(f": it has an argument but no attribute {name!r}")
    if not wanted and isinstance(value, nn.Module) and any(p.requires_grad for p in value.parameters()):
        raise unknown("")
    return {name: known[name] for name in wanted}


class _NotImportable(ValueError):
    """A class or function that no other process can import, and its name."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text)
        self.name = name


def _name_of(value: Any) -> str:
    """Module and name of a class or function, if another process can import it from there."""
    module, name = getattr(value, "__module__", None) or "", getattr(value, "__qualname__", "")
    full = f"{module}:{name}"
    if module == "__main__" or _NAME.fullmatch(full) is None or getattr(sys.modules.get(module), name,
                                                                        None) is not value:
        kind, written = ("a class", "") if isinstance(value, type) else ("a function", " as a class")
        raise _NotImportable(
            name or repr(value)[:80],
            f"{name or repr(value)[:80]} is {kind} of a notebook, a script or another function, or its name begins "
            f"with an underscore, so other sites cannot import it: write it{written} into a file (in a notebook: "
            "fedlab export technique, or %%writefile as the first line of its cell), have that file approved at every "
            f"site, and import {name.rpartition('.')[2] or 'it'} from there")
    return full


def make(plan: Json, *, approve: Approve, load: Load = importlib.import_module) -> Any:
    """The object that plain data of `describe` stand for.

    Args:
        plan: the plain data.
        approve: called with the name of every module in the plan before the first is imported; raises `PrivacyError`
            for one that this process must not import.
        load: imports an approved module.

    Raises:
        PrivacyError: a module that is not approved, or a name that has no place in a plan.
        ValueError: invalid plain data, or settings that do not fit.
    """
    check_plain(plan, approve)
    return _make(plan, load)


def check_plain(plan: Json, approve: Approve) -> None:
    """Checks the whole plan, and asks for approval of every module in it, before anything is imported."""
    left, count = [(plan, 0)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if depth > 3 * _DEEPEST or count > _MOST:
            raise ValueError(f"a plan has at most {_MOST} parts, {_DEEPEST} deep")
        match value:
            case list():
                left += [(item, depth + 1) for item in value]
            case dict():
                left += [(item, depth + 1) for item in _settings_of(value, approve)]
            case None | bool():
                pass
            case str() if len(value) <= _LONGEST:
                pass
            case int() if -2**63 <= value < 2**63:
                pass
            case float() if math.isfinite(value):
                pass
            case _:
                raise ValueError(f"a plan holds plain JSON, got {str(value)[:80]!r} ({type(value).__name__})")


def _settings_of(value: Mapping[str, Json], approve: Approve) -> list[Json]:
    """The settings in a call or name, which has a place in a plan as far as names tell."""
    match dict(value):
        case {"name": str() as full, **rest} if not rest:
            settings: dict[str, Json] = {}
        case ({"make": str() as full, "with": dict() as settings, **rest}
              | {"partial": str() as full, "with": dict() as settings, **rest}) if not rest:
            pass
        case _:
            raise ValueError(f"unknown part of a plan: {str(sorted(map(str, value)))[:200]}; it was made by another "
                             "version of fedlab, or by hand")
    found = _NAME.fullmatch(full) if len(full) <= 300 else None
    if found is None or "__" in full:
        raise PrivacyError("a plan gives names as module:name, without dots in the name or underscores before it; "
                           f"{full[:120]!r} is refused")
    module, name = found["module"], found["name"]
    # Outside of the three packages the site decides.
    if module.partition(".")[0] in _PACKAGES and name not in _LISTED.get(module, ()) and not module.startswith(
            ("fedlab.privacy.", "fedlab.strategies.", "fedlab.topologies.", "torch.optim.")):
        raise _no_place(full)
    approve(module)
    bad = [key for key in settings if not (isinstance(key, str) and key.isidentifier() and key[0] != "_")]
    if bad:
        raise ValueError(f"a plan's settings have plain names, got {str(bad[0])[:80]!r}")
    return list(settings.values())


def _make(plan: Json, load: Load) -> Any:
    match plan:
        case list():
            return [_make(item, load) for item in plan]
        case {"name": str() as name}:
            return _found(name, load)
        case {"with": dict() as settings, **others}:
            ((word, full),) = others.items()
            name = str(full)
            target, given = _found(name, load), {key: _make(item, load) for key, item in settings.items()}
            bind = inspect.Signature.bind if word == "make" else inspect.Signature.bind_partial
            try:
                bind(inspect.signature(target), **given)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} takes other settings than {sorted(given)}: {error}") from error
            return _called(name, target, given) if word == "make" else partial(target, **given)
    return plan  # a plain value; `check_plain` lets nothing else through


def _called(name: str, target: Any, given: dict[str, Any]) -> Any:
    """The result of a call, with the note of how it was made where its attributes may not show it."""
    try:
        made = target(**given)
    except FedlabError:
        raise
    except Exception as error:
        raise ValueError(f"{name} cannot be made with {str(given)[:200]}: {error}") from error
    attributes = getattr(made, "__dict__", None)
    of_library = target.__module__.partition(".")[0] in ("monai", "torch")
    if attributes is not None and (type(made) is not target or of_library or isinstance(made, nn.Module)):
        attributes.setdefault("_built", (target, given))
    return made


def _found(full: str, load: Load) -> Any:
    """The class or function of that name, if it is of a kind that has a place in a plan; its module is approved."""
    module_name, _, name = full.partition(":")
    try:
        module = load(module_name)
    except ImportError as error:
        raise PrivacyError(f"this site cannot import {module_name} ({type(error).__name__}); install or approve it "
                           "here") from error
    found = vars(module).get(name)
    if not isinstance(found, type | FunctionType) or found.__module__ != module_name or found.__qualname__ != name:
        raise PrivacyError(f"{full} is no class or function that {module_name} defines; a plan names things where they "
                           "are defined")
    package = module_name.partition(".")[0]
    if package not in _PACKAGES:
        if not isinstance(found, type) or not _is_part(found):
            raise _no_place(full)
    elif name not in _LISTED.get(module_name, ()):
        kind: Any = Privacy | FedAvg | Aggregation if package == "fedlab" else torch.optim.Optimizer
        topology = module_name.startswith("fedlab.topologies.")
        if not isinstance(found, type) or not (follows(found, Topology) if topology else issubclass(found, kind)):
            raise _no_place(full)
    return found


def _is_part(found: type) -> bool:
    """Whether a class of another package than fedlab, torch and MONAI is of a kind that has a place in a run."""
    transforms = sys.modules.get("monai.transforms")  # imported by a module that defines one
    kinds = (Privacy, FedAvg, Aggregation, PolyDecay, nn.Module, torch.optim.Optimizer,
             *((transforms.Transform,) if transforms else ()))
    return issubclass(found, kinds) or follows(found, Strategy) or follows(found, Topology)


def _no_place(full: str) -> PrivacyError:
    return PrivacyError(
        f"{full} has no place in a plan: of fedlab it names techniques, aggregations, strategies, topologies and parts "
        "of trainers, of torch and MONAI optimisers and a list of losses, networks and transforms, and of files that "
        "the site approves such classes only. Write anything else as a class there, such as a network or a loss as a "
        "class derived from torch.nn.Module, a schedule as one derived from PolyDecay")


def follows(found: type, protocol: type) -> bool:
    """Whether a class has all methods of a protocol."""
    wanted = [name for name in vars(protocol) if callable(vars(protocol)[name]) and not name.startswith("_")]
    return found is not protocol and all(callable(getattr(found, name, None)) for name in wanted)
