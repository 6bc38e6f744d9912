"""What a site keeps of its optimiser between rounds, or sites average: moments, and numbers that it counts."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fedlab.core.types import MOMENT, Tensors
from fedlab.core.weights import trainable

__all__ = ["averaged", "group_values", "initial_moments", "kept", "new_optimiser", "restore", "to_average"]

#: Makes an optimiser from weights and a learning rate.
Make = Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]


def group_values(optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """A copy of the settings in the optimiser's groups, in which some optimisers count."""
    return {f"group {k}|{slot}": copy.deepcopy(value) for k, group in enumerate(optimiser.param_groups)
            for slot, value in group.items() if slot != "params"}


def kept(optimiser: torch.optim.Optimizer, model: nn.Module, *, before: Mapping[str, Any], scheduled: bool,
         earlier: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors from which `restore` continues: the optimiser's state, and the settings that it has changed itself.

    Args:
        optimiser: after training.
        model: whose parameters it steps.
        before: the settings in its groups before training, of `group_values`.
        scheduled: whether the learning rate is set anew every round, and so not kept.
        earlier: what was kept after the round before.

    Raises:
        ValueError: the optimiser keeps something other than tensors and numbers.
    """
    names = {id(p): name for name, p in trainable(model).items()}
    found: dict[str, Any] = {}
    for weight, slots in optimiser.state.items():
        owner = names.get(id(weight), str(weight) if isinstance(weight, str) else "of another tensor than the weights")
        if id(weight) not in names:
            raise ValueError(_refusal(optimiser, owner, slots))
        found |= {f"{owner}|{slot}": value for slot, value in slots.items() if value is not None}
    for key, value in group_values(optimiser).items():
        changed = key not in before or not _same(before[key], value)
        if (changed or {key, f"number|{key}"} & earlier.keys()) and not (scheduled and key.endswith("|lr")):
            found[key] = value
    tensors: dict[str, torch.Tensor] = {}
    for key, value in found.items():
        if isinstance(value, torch.Tensor):
            tensors[key] = value.detach().cpu().clone()
        elif isinstance(value, bool | int | float):
            tensors[f"number|{key}"] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        else:
            raise ValueError(_refusal(optimiser, key.replace("|", ", "), value))
    return tensors


def new_optimiser(make: Make, model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """An optimiser of a model's trainable weights.

    Raises:
        ValueError: its step evaluates the loss.
    """
    made = make(trainable(model).values(), rate)
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"{type(made).__name__} evaluates the loss several times per step, which a site's training "
                         "does not; use an optimiser whose step() needs no closure")
    return made


def initial_moments(make: Make, model: nn.Module, *, rate: float, scheduled: bool) -> dict[str, torch.Tensor]:
    """Zeros for each moment that an optimiser keeps of the weights, under the names of `averaged`.

    Raises:
        ValueError: it keeps none, or something else than tensors of floating point numbers per weight.
    """
    probe = copy.deepcopy(model)
    optimiser = new_optimiser(make, probe, rate)
    before = group_values(optimiser)
    for p in trainable(probe).values():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    found = kept(optimiser, probe, before=before, scheduled=scheduled, earlier={})
    unfit = [key for key, value in found.items()
             if key.startswith(("number|", "group ")) or not value.is_floating_point()]
    if unfit or not found:
        why = f"keeps {unfit[0]!r}, which has no mean" if unfit else "keeps nothing from step to step"
        raise ValueError(f"momentum='average' takes the mean of the sites' moments, but {type(optimiser).__name__} "
                         f"{why}; say momentum='keep' or 'restart'")
    return {MOMENT + key: torch.zeros_like(value) for key, value in found.items()}


def averaged(buffers: Tensors) -> dict[str, torch.Tensor]:
    """The mean moments among the buffers of a server's state, as `restore` takes them; none before the first mean."""
    found = {name.removeprefix(MOMENT): t for name, t in buffers.items() if name.startswith(MOMENT)}
    return found if any(bool(t.any()) for t in found.values()) else {}


def to_average(moments: Tensors, like: Tensors) -> dict[str, torch.Tensor]:
    """Moments of `kept` under the names of `averaged`, with zeros for those of weights without a gradient.

    Raises:
        ValueError: a moment that is not among those that the optimiser had after a first step.
    """
    if unknown := sorted(MOMENT + key for key in moments if MOMENT + key not in like):
        raise ValueError(f"the optimiser keeps {unknown[0].removeprefix(MOMENT)!r}, which it did not after a first "
                         "step, so it cannot be averaged; say momentum='keep' or 'restart'")
    return {name: moments.get(name.removeprefix(MOMENT), zeros) for name, zeros in like.items()}


def restore(optimiser: torch.optim.Optimizer, model: nn.Module, kept: Mapping[str, torch.Tensor]) -> None:
    """Puts the kept tensors and numbers into a new optimiser of the same kind."""
    parameters = trainable(model)
    # Counts of steps are on the CPU, unless the step is one kernel that reads them.
    on_device = any(group.get("fused") or group.get("capturable") for group in optimiser.param_groups)
    for key, value in kept.items():
        *number, owner, slot = key.rsplit("|", 2)
        parameter = parameters.get(owner)
        place: dict[str, Any] = optimiser.param_groups[int(owner.removeprefix("group "))] if parameter is None else (
            optimiser.state[parameter])
        device = parameter.device if parameter is not None and (value.dim() or on_device) else torch.device("cpu")
        place[slot] = value.item() if number else value.clone().to(device)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _refusal(optimiser: torch.optim.Optimizer, where: str, value: Any) -> str:
    return (f"{type(optimiser).__name__} keeps a {type(value).__name__} ({where}) from step to step; momentum='keep' "
            "keeps tensors and numbers of single weights or groups only: say SiteTrainer(momentum='restart', ...)")
