"""Whether a network is fit for patient-level privacy: the layers that leak or break, and the network without them."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedlab.core.global_generators import seeded
from fedlab.core.kit import Kit
from fedlab.core.settings import check_choice
from fedlab.core.types import REGIONS
from fedlab.core.weights import trainable
from fedlab.privacy.dp.contents import copied, fingerprint
from fedlab.privacy.dp.gradients import MODES, Gradients, per_patient
from fedlab.privacy.dp.passes import leaks, probe_copy, probes
from fedlab.training.defaults import DiceBCE

__all__ = ["Fitness", "check_loss", "check_private", "fix_private", "require_private"]

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

#: Gradients of single patients may differ by this share of their norm from those of batches of one.
_TOLERANCE = 1e-3
#: Fingerprints of networks that have passed in this process, and the most that are kept.
_PASSED: dict[str, None] = {}
_KEPT = 256
#: Voxels of the volumes that are tried.
_CROP = (64, 64, 64)
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_INSTANCE_NORM = nn.modules.instancenorm._InstanceNorm


@dataclass(frozen=True, kw_only=True)
class Fitness:
    """The findings of `check_private`; true if nothing is wrong."""

    gradients: Gradients  # how gradients of single patients were computed
    problems: tuple[str, ...] = ()  # one sentence each, beginning with the layer's name
    remedy: str = ""  # for the problems

    def __bool__(self) -> bool:
        return not self.problems

    def __repr__(self) -> str:
        if self:
            return f"fit for patient-level privacy with gradients={self.gradients!r}"
        return "\n".join([f"not fit for patient-level privacy with gradients={self.gradients!r}:",
                          *(f"- {problem}" for problem in self.problems), f"remedy: {self.remedy}"])

    def _repr_html_(self) -> str:
        first, *rest = repr(self).splitlines()
        items = "".join(f"<li>{html.escape(line.removeprefix('- '))}</li>" for line in rest)
        return f"<p>{html.escape(first)}</p><ul>{items}</ul>" if rest else f"<p>{html.escape(first)}</p>"


def check_private(model: nn.Module, *, gradients: Gradients = "backward", loss: Loss | None = None,
                  crop: tuple[int, int, int] = _CROP) -> Fitness:
    """Whether `DPSGD` can protect patients with this network, and if not, which layer leaks or breaks.

    Some leaking layers are recognised by type. Beyond that a copy of the network is tried with patients of random
    numbers, some of them large, tiny, negative, constant or with one bright voxel, in batches of several sizes: whether
    a pass in training or evaluation sets a parameter, a buffer or any attribute of the network or the loss from them,
    whether one patient's output depends on the others, and whether every patient's gradient equals that of a batch of
    one. A branch for values that none of these patients has is not found.

    Args:
        model: maps (B, 4, X, Y, Z) to logits (B, 3, X, Y, Z); it is not changed.
        gradients: how gradients of single patients will be computed; see `fedlab.privacy.dp.gradients.per_patient`.
        loss: of logits and regions, `DiceBCE()` by default.
        crop: size in voxels that the network takes; smaller sizes are tried first, to save time.

    Raises:
        ValueError: `gradients` is unknown, or nothing is trainable.
    """
    check_choice(MODES, gradients=gradients)
    trainable(model)
    return _fitness(model, gradients, DiceBCE() if loss is None else loss, crop)


def _fitness(model: nn.Module, gradients: Gradients, loss: Loss, crop: tuple[int, int, int], *,
             few: bool = False) -> Fitness:
    problems = tuple(_leaking(model)) or tuple(_tried(model, gradients, loss, crop, few=few))
    if not problems:
        return Fitness(gradients=gradients)
    leaky = any(not problem.startswith("gradients=") for problem in problems)
    return Fitness(gradients=gradients, problems=problems, remedy=_remedy(model, gradients, loss, crop, leaky=leaky))


def require_private(model: nn.Module, loss: Loss, *, gradients: Gradients, device: torch.device) -> None:
    """Refuses what `check_private` and `check_loss` find fault with; what has passed is tried anew when it changes.

    What the network and the loss hold and their code decide whether they are the same, not which objects they are.
    Where nothing but trained weights has changed, fewer patients are tried.

    Raises:
        ValueError: the network leaks or breaks, or the loss mixes patients.
    """
    rest, whole = fingerprint(model, loss, gradients, device.type)
    if whole in _PASSED:
        return
    if rest not in _PASSED:
        check_loss(loss, device=device)
    on_cpu = loss if device.type == "cpu" else DiceBCE()
    fitness = _fitness(model, gradients, on_cpu, _CROP, few=rest in _PASSED)
    if not fitness:
        raise ValueError(repr(fitness))
    for known in (rest, whole):
        _PASSED.pop(known, None)
        _PASSED[known] = None
    while len(_PASSED) > _KEPT:
        del _PASSED[next(iter(_PASSED))]


def fix_private(model: nn.Module, *, gradients: Gradients = "backward") -> nn.Module:
    """A copy of the network in which layers that leak or break are replaced; train or pretrain the copy.

    BatchNorm becomes GroupNorm (Wu and He 2018), of 32 groups or the largest divisor of 32 that divides the channels,
    with the same scale and shift; running statistics of InstanceNorm are removed. The copy then computes other numbers
    than the network. For other gradients than "backward", activations and the sums of MONAI's residual blocks no
    longer work in place, which changes no number.

    Args:
        model: is not changed.
        gradients: how gradients of single patients will be computed.
    """
    fixed: nn.Module = copied(model)
    for name, layer in list(fixed.named_modules()):
        better = _without_leak(layer)
        if better is not layer:
            if not name:
                return better
            parent, _, own = name.rpartition(".")
            setattr(fixed.get_submodule(parent), own, better)
    if gradients != "backward":
        from fedlab.privacy.dp.residual_blocks import REPLACED  # MONAI takes seconds to import

        for layer in fixed.modules():
            if getattr(layer, "inplace", False):
                layer.inplace = False  # type: ignore[assignment]
            layer.__class__ = REPLACED.get(type(layer), type(layer))
    return fixed


def check_loss(loss: Loss, *, device: torch.device | str = "cpu") -> None:
    """Refuses a loss that mixes patients: clipping each patient's gradient would then bound no patient's influence.

    On random logits and targets, on a device, the loss of several patients must be the mean of their losses: for logits
    that are large, tiny, constant, all positive or all negative, and patients without tumour or of nothing else. A loss
    that mixes patients only for other values is not detected.

    Raises:
        ValueError: the loss mixes patients.
    """
    loss, rng = copied(loss), torch.Generator().manual_seed(0)
    tumours = torch.tensor([0.0, 0.2, 0.02, 1.0]).view(4, 1, 1, 1, 1)  # shares of voxels, patients without any too
    for offset, scale in ((0.0, 3.0), (5.0, 1.0), (-5.0, 1.0), (0.0, 30.0), (0.0, 1e-3), (2.0, 0.0), (-20.0, 5.0)):
        all_logits = (offset + scale * torch.randn(4, len(REGIONS), 16, 16, 16, generator=rng)).to(device)
        all_targets = (torch.rand(4, len(REGIONS), 16, 16, 16, generator=rng) < tumours).float().to(device)
        for chosen in ((0, 1), (2, 1), (1, 1), (0, 1, 2, 3)):
            logits, target = all_logits[list(chosen)], all_targets[list(chosen)]
            both = float(loss(logits, target))
            mean = sum(float(loss(one[None], its[None])) for one, its in zip(logits, target, strict=True)) / len(chosen)
            if not math.isclose(both, mean, rel_tol=1e-4, abs_tol=1e-6):
                raise ValueError(
                    f"the loss {loss!r} mixes patients: for {len(chosen)} patients it is {both:.6g}, the mean of their "
                    f"losses is {mean:.6g}. Use a loss that is computed per patient and then averaged, such as "
                    "DiceBCE() or MONAI's DiceLoss(batch=False, reduction='mean')")


def _leaking(model: nn.Module) -> Iterator[str]:
    for name, layer in model.named_modules():
        kind = f"{name or 'the network'} ({type(layer).__name__})"
        if isinstance(layer, _BATCH_NORM):
            yield f"{kind} leaks: it mixes the patients of a batch and keeps statistics of them without noise"
        elif isinstance(layer, _INSTANCE_NORM) and layer.track_running_stats:
            yield f"{kind} leaks: it keeps running statistics of the patients without noise"


def _without_leak(layer: nn.Module) -> nn.Module:
    if isinstance(layer, _BATCH_NORM):
        channels = layer.num_features
        better: nn.Module = nn.GroupNorm(math.gcd(32, channels), channels, eps=layer.eps, affine=layer.affine)
    elif isinstance(layer, _INSTANCE_NORM) and layer.track_running_stats:
        better = type(layer)(layer.num_features, eps=layer.eps, affine=layer.affine)
    else:
        return layer
    own = dict(layer.named_parameters())
    better.load_state_dict({name: p.detach() for name, p in own.items()})
    for name, p in better.named_parameters():
        p.data = p.data.to(own[name].device)
        p.requires_grad_(own[name].requires_grad)
    return better.train(layer.training)


def _tried(model: nn.Module, gradients: Gradients, loss: Loss, crop: tuple[int, int, int], *,
           few: bool = False, passes: bool = True) -> Iterator[str]:
    """The problems found with two patients of random numbers, on the smallest volume that the network takes."""
    sizes = [(s, s, s) for s in (16, 32) if s <= min(crop)]
    failed: Exception | None = None
    # In float64 no rounding is taken for a leak; float32 is for networks that take nothing else.
    for size, dtype in itertools.product((*sizes, crop), (torch.float64, torch.float32)):
        pairs = probes(size, few=few or max(size) > 16)
        image = pairs["ordinary"].to(dtype)
        target = (torch.rand(2, len(REGIONS), *size, generator=torch.Generator().manual_seed(0)) < 0.2).float()
        try:
            with seeded():
                probe_copy(model, dtype)(image[:1])
        except (RuntimeError, ValueError) as error:
            failed = error
            continue
        with seeded():
            if passes:
                yield from leaks(model, loss, pairs)
            if not few or gradients != "backward":
                yield from _gradients_differ(model, gradients, loss, image, target)
        return
    yield f"the network fails on a crop of {crop} voxels in training: {_first_line(failed)}"


def _gradients_differ(model: nn.Module, gradients: Gradients, loss: Loss, image: torch.Tensor,
                      target: torch.Tensor) -> Iterator[str]:
    """Whether each patient's gradient is that of a batch of one, of plain autograd."""
    kit = _kit(probe_copy(model, image.dtype), loss)
    expected = []
    for k in range(len(image)):
        one = kit.loss(image[k:k + 1], target[k:k + 1])
        found = torch.autograd.grad(one, list(trainable(kit.model).values()), allow_unused=True, materialize_grads=True)
        expected.append(torch.cat([g.flatten() for g in found]))
    try:
        kit = _kit(probe_copy(model, image.dtype), loss)
        parts = list(per_patient(kit, image[:, None], target[:, None], gradients))
    except Exception as error:  # a network's own code may raise anything under hooks or vmap
        yield f"gradients={gradients!r} breaks this network: {_first_line(error)}{_suspects(model)}"
        return
    actual = torch.cat([torch.cat([g.reshape(len(g), -1) for g in part.gradients], dim=1) for part in parts])
    wrong = max(float((a - e).norm() / e.norm().clamp(min=1e-12)) for a, e in zip(actual, expected, strict=True))
    if not wrong <= _TOLERANCE:
        yield (f"gradients={gradients!r} gives wrong gradients for this network: off by {wrong:.1%} from batches of "
               f"one{_suspects(model)}")


def _kit(model: nn.Module, loss: Loss) -> Kit:
    unused: Any = None
    return Kit(model=model, optimiser=unused, loader=(), patients=unused, objective=loss, device=torch.device("cpu"),
               dtype=torch.float32, seed=0, backward=unused)


def _suspects(model: nn.Module) -> str:
    """Layers that work in place, the usual reason for which hooks and vmap fail."""
    from fedlab.privacy.dp.residual_blocks import REPLACED

    found = [name for name, layer in model.named_modules() if getattr(layer, "inplace", False)
             or type(layer) in REPLACED]
    if not found:
        return ""
    return f"; these work in place: {', '.join(found[:4])}{f' and {len(found) - 4} more' if len(found) > 4 else ''}"


def _remedy(model: nn.Module, gradients: Gradients, loss: Loss, crop: tuple[int, int, int], *, leaky: bool) -> str:
    """The remedy, tried before it is recommended; of a network that leaks nothing only the gradients are tried."""
    def helps(candidate: nn.Module, how: Gradients) -> bool:
        return not any(_leaking(candidate)) and not any(_tried(candidate, how, loss, crop, few=leaky, passes=leaky))

    if gradients != "backward" and helps(model, "backward"):
        other = "say gradients='backward', which takes this network as it is"
        fixed = helps(fix_private(model, gradients=gradients), gradients)
        return f"{other}, or use fix_private(model, gradients={gradients!r})" if fixed else other
    for how in dict.fromkeys((gradients, "backward")):
        if helps(fix_private(model, gradients=how), how):
            return f"use fix_private(model, gradients={how!r}) and say gradients={how!r}"
    return "use a network without these layers, such as segresnet()"


def _first_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}" if str(error) else type(error).__name__
